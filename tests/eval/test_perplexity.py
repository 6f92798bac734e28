"""Perplexity against an independent computation, and what the numbers mean."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import processors
from torch import Tensor
from transformers import AutoModelForCausalLM

import quantine
from quantine import CalibrationError, cli
from quantine.calibrate.bos import BOS_CHOICES, Bos
from quantine.calibrate.text import BUILTIN, read_text
from quantine.eval.perplexity import cut_windows
from quantine.source.locate import locate
from tiny_models import BOS, CONTEXT, EOS, build, byte_tokenizer, tiny_config

Tiny = Callable[[str], Path]
WINDOW = 48


def measured(model: Path, text: str, **options: Any) -> dict[str, Any]:
    """What `quantine.evaluate` says of a model and one text, in one dictionary."""
    found = quantine.evaluate(model, text, **options)
    return {**found, **found["texts"][Path(text).name]}


def expected_windows(text: str, window: int, bos: str) -> list[list[int]]:
    """Token ids of all windows: every one, or only the first, has ``<s>`` in front."""
    ids = byte_tokenizer(bos=False)(text)["input_ids"]
    if bos == "first":
        ids, begin = [BOS, *ids], []
    else:
        begin = [BOS]
    step = window - len(begin)
    return [begin + ids[start : start + step] for start in range(0, len(ids) - step + 1, step)]


def expected_losses(model: Path, windows: list[list[int]]) -> list[float]:
    """Mean loss of each window as transformers computes it from labels."""
    loaded = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()
    losses = []
    for window in windows:
        tokens = torch.tensor([window])
        with torch.no_grad():
            losses.append(float(loaded(input_ids=tokens, labels=tokens).loss))
    return losses


@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma2"])
@pytest.mark.parametrize("window", [WINDOW, 2, CONTEXT])
@pytest.mark.parametrize("bos", BOS_CHOICES)
def test_perplexity_is_the_exponential_of_the_mean_loss(
    name: str, window: int, bos: Bos, tiny: Tiny, text_file: Path
) -> None:
    windows = expected_windows(text_file.read_text(), window, bos)[:5]
    losses = expected_losses(tiny(name), windows)
    scores = measured(tiny(name), str(text_file), window=window, limit=5, bos=bos)
    assert scores["bos"] == bos
    mean = sum(losses) / len(losses)
    assert scores["perplexity"] == pytest.approx(math.exp(mean), rel=1e-5)
    # Delta method: the error of exp(m) is exp(m) times the error of m.
    spread = math.sqrt(sum((loss - mean) ** 2 for loss in losses) / (len(losses) - 1))
    expected = math.exp(mean) * spread / math.sqrt(len(losses))
    assert scores["stderr"] == pytest.approx(expected, rel=1e-3)
    assert scores["windows"] == 5
    assert scores["window"] == window
    assert scores["tokens"] == 5 * (window - 1)


def test_the_last_incomplete_window_is_dropped(tiny: Tiny, tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text("abcdefghij" * 10)  # 100 tokens, and <s> before each window
    assert measured(tiny("llama"), str(text), window=51)["windows"] == 2
    assert measured(tiny("llama"), str(text), window=52)["windows"] == 1
    assert measured(tiny("llama"), str(text), window=101)["windows"] == 1
    one = measured(tiny("llama"), str(text), window=101)
    assert one["stderr"] is None
    with pytest.raises(CalibrationError, match="has 100 tokens, fewer than one window of 102"):
        measured(tiny("llama"), str(text), window=102)
    # With <s> before the first only, it is a token of the text.
    assert measured(tiny("llama"), str(text), window=50, bos="first")["windows"] == 2
    assert measured(tiny("llama"), str(text), window=51, bos="first")["windows"] == 1
    with pytest.raises(CalibrationError, match="has 101 tokens, fewer than one window of 102"):
        measured(tiny("llama"), str(text), window=102, bos="first")


@pytest.mark.parametrize("reference", ["llama", "packed"])
def test_a_model_agrees_with_itself(
    reference: str, tiny: Tiny, packed: Callable[[str, str], Path], text_file: Path
) -> None:
    model = tiny("llama") if reference == "llama" else packed("llama", "mixed")
    scores = measured(model, str(text_file), window=WINDOW, limit=3, reference=model)
    assert scores["kl"] == 0
    assert scores["top1"] == 1


def test_divergence_and_agreement_against_plain_formulas(
    tiny: Tiny, packed: Callable[[str, str], Path], text_file: Path
) -> None:
    out = packed("llama", "gptq")
    scores = measured(out, str(text_file), window=WINDOW, limit=3, reference=tiny("llama"))
    windows = expected_windows(text_file.read_text(), WINDOW, "each")[:3]
    tested, _ = quantine.load(out)
    reference = AutoModelForCausalLM.from_pretrained(tiny("llama")).eval()
    divergences, agreements = [], []
    for window in windows:
        tokens = torch.tensor([window])
        with torch.no_grad():
            q = tested(input_ids=tokens).logits[0, :-1].double().softmax(-1)
            p = reference(input_ids=tokens).logits[0, :-1].double().softmax(-1)
        divergences.append((p * (p / q).log()).sum(-1))
        agreements.append((p.argmax(-1) == q.argmax(-1)).double())
    kl = float(torch.cat(divergences).mean())
    assert kl > 0.01
    assert scores["kl"] == pytest.approx(kl, rel=1e-4)
    assert scores["top1"] == pytest.approx(float(torch.cat(agreements).mean()), abs=1e-9)
    assert 0 < scores["top1"] < 1


def windows_of(model: Path, text: Path, window: int = 8, bos: Bos = "first") -> Tensor:
    """The token ids that the model is shown."""
    return cut_windows(locate(model), str(text), window, None, 300, bos).tokens


def test_a_text_file_is_read_verbatim(tiny: Tiny, tmp_path: Path) -> None:
    text = "  a\r\n\n\n  b\tc\u00e9  \n"
    (tmp_path / "text.txt").write_bytes(text.encode())
    ids = windows_of(tiny("llama"), tmp_path / "text.txt", 2).flatten().tolist()
    spelled = byte_tokenizer(bos=False).convert_ids_to_tokens(ids[1:])
    decoded = byte_tokenizer(bos=False).decode(byte_tokenizer()(text)["input_ids"][1 : len(ids)])
    assert ids[0] == BOS
    assert len(spelled) == len(ids) - 1
    assert byte_tokenizer(bos=False).decode(ids[1:]) == decoded
    assert text.encode()[: len(ids) - 1] == decoded.encode()


def test_jsonl_rows_are_joined_with_blank_lines(tiny: Tiny, tmp_path: Path) -> None:
    rows = [{"text": "one row"}, {"text": "another\nrow", "id": 3}, {"text": "third"}]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n\n")
    (tmp_path / "same.txt").write_text("one row\n\nanother\nrow\n\nthird")
    a = windows_of(tiny("llama"), tmp_path / "rows.jsonl", 4)
    b = windows_of(tiny("llama"), tmp_path / "same.txt", 4)
    assert torch.equal(a, b)


@pytest.mark.parametrize("bos", [True, False])
def test_a_beginning_token_only_where_the_tokenizer_adds_one(bos: bool, tmp_path: Path) -> None:
    model = build(tiny_config("llama"), tmp_path / "model", bos=bos)
    (tmp_path / "text.txt").write_text("ab" * 40)
    ids = windows_of(model, tmp_path / "text.txt").flatten()
    assert (ids == BOS).sum() == int(bos)
    assert (int(ids[0]) == BOS) == bos
    every = windows_of(model, tmp_path / "text.txt", bos="each")
    assert ((every == BOS).sum(1) == int(bos)).all()
    assert ((every[:, 0] == BOS) == bos).all()


def test_without_bos_both_protocols_are_one(text_file: Path, tmp_path: Path) -> None:
    model = build(tiny_config("llama"), tmp_path / "model", bos=False)
    options: dict[str, Any] = {"window": WINDOW, "limit": 4}
    each, first = (measured(model, str(text_file), **options, bos=bos) for bos in BOS_CHOICES)
    assert each["bos"] == first["bos"] == "none"
    ids = byte_tokenizer(bos=False)(text_file.read_text())["input_ids"]
    windows = [ids[start : start + WINDOW] for start in range(0, 4 * WINDOW, WINDOW)]
    losses = expected_losses(model, windows)
    assert each["perplexity"] == pytest.approx(math.exp(sum(losses) / 4), rel=1e-5)
    for key in ("perplexity", "tokens", "windows", "digest"):
        assert each[key] == first[key]


def two_tokens_before(model: Path) -> Path:
    """Let the tokenizer of ``model`` begin every text with ``<s></s>``."""
    tokenizer = byte_tokenizer(bos=False)
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> </s> $A", special_tokens=[("<s>", BOS), ("</s>", EOS)]
    )
    tokenizer.save_pretrained(model)
    return model


def test_nothing_that_the_tokenizer_puts_before_is_scored(text_file: Path, tmp_path: Path) -> None:
    model = two_tokens_before(build(tiny_config("llama"), tmp_path / "model"))
    found = measured(model, str(text_file), window=WINDOW, limit=3, reference=model)
    assert found["tokens"] == 3 * (WINDOW - 2)
    ids = byte_tokenizer(bos=False)(text_file.read_text())["input_ids"]
    loaded = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()
    losses = []
    for start in range(0, 3 * (WINDOW - 2), WINDOW - 2):
        tokens = torch.tensor([[BOS, EOS, *ids[start : start + WINDOW - 2]]])
        labels = tokens.masked_fill(torch.arange(WINDOW) < 2, -100)
        with torch.no_grad():
            losses.append(float(loaded(input_ids=tokens, labels=labels).loss))
    assert found["perplexity"] == pytest.approx(math.exp(sum(losses) / 3), rel=1e-5)
    assert (found["kl"], found["top1"]) == (0, 1)
    with pytest.raises(CalibrationError, match="window of 2 tokens has no room for text"):
        measured(model, str(text_file), window=2)


def test_builtin_text_is_split(tiny: Tiny) -> None:
    parts = {split: read_text(BUILTIN, split) for split in ("calibration", "heldout")}
    # Topics of the standard library quote each other, indented more or less.
    paragraphs = {
        split: {" ".join(paragraph.split()) for paragraph in text.split("\n\n")}
        for split, text in parts.items()
    }
    assert not paragraphs["calibration"] & paragraphs["heldout"]
    assert all(len(text) > 50_000 for text in parts.values())
    heldout = byte_tokenizer()(parts["heldout"][:200])["input_ids"]
    ids = cut_windows(locate(tiny("llama")), BUILTIN, 8, 4, 300, "first").tokens.flatten().tolist()
    assert ids == heldout[: len(ids)]


BAD = {
    "one token": ({"window": 1}, "at least 2 tokens"),
    "beyond context": ({"window": CONTEXT + 1}, f"context of {CONTEXT}"),
    "no window": ({"limit": 0}, "at least 1 window"),
}


@pytest.mark.parametrize(("options", "message"), BAD.values(), ids=BAD)
def test_windows_out_of_range_are_refused(
    options: dict[str, int], message: str, tiny: Tiny, text_file: Path
) -> None:
    with pytest.raises(CalibrationError, match=message):
        measured(tiny("llama"), str(text_file), **options)


def test_the_window_defaults_to_the_context(tiny: Tiny, text_file: Path) -> None:
    assert measured(tiny("llama"), str(text_file), limit=1)["window"] == CONTEXT


def test_a_reference_of_another_vocabulary_is_refused(
    tiny: Tiny, text_file: Path, tmp_path: Path
) -> None:
    other = build(tiny_config("llama", vocab_size=260), tmp_path / "other")
    with pytest.raises(CalibrationError, match="different vocabularies"):
        measured(tiny("llama"), str(text_file), window=WINDOW, limit=1, reference=other)


def test_sizes_are_those_of_the_files(
    tiny: Tiny, packed: Callable[[str, str], Path], text_file: Path
) -> None:
    def scores(model: Path) -> dict[str, Any]:
        return measured(model, str(text_file), window=WINDOW, limit=1)

    out = packed("llama", "rtn")
    report = json.loads((out / "quantine_report.json").read_text())
    found = scores(out)
    assert found["model_bytes"] == (out / "model.safetensors").stat().st_size
    assert found["bits_per_weight"] == report["totals"]["bits_per_weight"]
    plain = scores(tiny("llama"))
    assert plain["model_bytes"] == (tiny("llama") / "model.safetensors").stat().st_size
    assert 32 < plain["bits_per_weight"] < 32.5  # float32 and a header


@pytest.mark.parametrize("scale", [1, 1e4])
def test_the_json_is_strict_even_when_perplexity_overflows(
    scale: float, tiny: Tiny, text_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = AutoModelForCausalLM.from_pretrained(tiny("llama"))
    with torch.no_grad():
        model.lm_head.weight *= scale
    model.save_pretrained(tmp_path / "model")
    byte_tokenizer().save_pretrained(tmp_path / "model")
    arguments = ["--text", str(text_file), "--window", "48", "--limit", "2", "--quiet"]
    path = tmp_path / "scores.json"
    assert cli.main(["eval", str(tmp_path / "model"), *arguments, "--json", str(path)]) == 0

    def not_json(constant: str) -> None:
        raise AssertionError(f"{constant} is not JSON")

    found = json.loads(path.read_text(), parse_constant=not_json)
    scores = {**found, **found["texts"][text_file.name]}
    assert scores.keys() >= {
        "perplexity",
        "stderr",
        "tokens",
        "windows",
        "bits_per_weight",
        "model_bytes",
        "kl",
        "top1",
        "seconds",
    }
    assert (scores["perplexity"] is None) == (scale > 1)
    assert scores["windows"] == 2
    assert scores["kl"] is None
    assert scores["top1"] is None
    assert capsys.readouterr().out == ""
