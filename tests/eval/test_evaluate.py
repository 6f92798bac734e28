"""Several texts in one pass, closeness to a reference, and its predictions on disk."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import quantine
from quantine import CalibrationError, OutputError, cli
from quantine.eval import predictions as predictions_module
from quantine.eval.predictions import Predictions
from quantine.source.locate import locate
from tiny_models import build, tiny_config

Tiny = Callable[[str], Path]
Packed = Callable[[str, str], Path]
SIZES = {"window": 32, "limit": 6}


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory, text_file: Path) -> list[str]:
    """A plain text, and another one as rows of JSON."""
    rows = tmp_path_factory.mktemp("rows") / "rows.jsonl"
    lines = [json.dumps({"text": f"Row {n} has {n * n} cells."}) for n in range(60)]
    rows.write_text("\n".join(lines))
    return [str(text_file), str(rows)]


def without_seconds(found: dict[str, Any]) -> dict[str, Any]:
    texts = {
        name: {key: value for key, value in text.items() if key != "seconds"}
        for name, text in found["texts"].items()
    }
    return {**found, "texts": texts}


def test_texts_measured_together_are_as_measured_alone(
    tiny: Tiny, packed: Packed, texts: list[str]
) -> None:
    out, reference = packed("llama", "gptq"), tiny("llama")
    together = quantine.evaluate(out, texts, **SIZES, reference=reference)
    assert list(together["texts"]) == ["text.txt", "rows.jsonl"]
    for text in texts:
        alone = quantine.evaluate(out, text, **SIZES, reference=reference)
        name = Path(text).name
        expected = without_seconds(alone)["texts"][name]
        assert without_seconds(together)["texts"][name] == expected


def test_recovery_is_the_ratio_of_the_two_perplexities(
    tiny: Tiny, packed: Packed, texts: list[str]
) -> None:
    out, reference = packed("llama", "gptq"), tiny("llama")
    found = quantine.evaluate(out, texts, **SIZES, reference=reference)["texts"]
    plain = quantine.evaluate(reference, texts, **SIZES)["texts"]
    for name, text in found.items():
        assert text["reference_perplexity"] == pytest.approx(plain[name]["perplexity"])
        ratio = plain[name]["perplexity"] / text["perplexity"]
        assert text["recovery"] == pytest.approx(ratio)
        assert text["recovery_low"] < text["recovery"] < text["recovery_high"]
        assert text["digest"] == plain[name]["digest"]
        assert plain[name]["recovery"] is plain[name]["kl"] is None


def test_two_texts_of_one_name_are_refused(tiny: Tiny, text_file: Path) -> None:
    with pytest.raises(CalibrationError, match=r"two texts are called 'text\.txt'"):
        quantine.evaluate(tiny("llama"), [str(text_file)] * 2, **SIZES)


def test_predictions_of_the_other_protocol_are_not_taken(
    tiny: Tiny, packed: Packed, text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = {**SIZES, "reference": tiny("llama"), "cache": tmp_path / "cache"}
    each = quantine.evaluate(packed("llama", "gptq"), str(text_file), **options)
    live = quantine.evaluate(
        packed("llama", "gptq"), str(text_file), **{**options, "cache": None, "bos": "first"}
    )
    first = quantine.evaluate(packed("llama", "gptq"), str(text_file), **options, bos="first")
    found, expected = (one["texts"]["text.txt"] for one in (first, live))
    assert found["kl"] == pytest.approx(expected["kl"], abs=2e-4)
    assert found["reference_perplexity"] == expected["reference_perplexity"]
    assert found["digest"] != each["texts"]["text.txt"]["digest"]
    # Only the first window is the same: it begins with <s> in both.
    assert len(list((tmp_path / "cache").glob("*/*.safetensors"))) == 11


def test_predictions_of_several_context_tokens_are_kept_apart(tiny: Tiny, tmp_path: Path) -> None:
    kept = Predictions(locate(tiny("llama")), torch.float32, tmp_path)
    tokens = torch.arange(9)
    for context in (1, 3, 1, 3):
        made = kept(tokens, context)
        assert len(made.top) == len(made.logits) == 9 - context


def refuse_to_run(*_: Any) -> Any:
    raise AssertionError("the reference is computed again")


def test_the_reference_runs_once(
    tiny: Tiny, packed: Packed, texts: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = {**SIZES, "reference": tiny("llama"), "cache": tmp_path / "cache"}
    live = quantine.evaluate(packed("llama", "gptq"), texts, **SIZES, reference=tiny("llama"))
    first = quantine.evaluate(packed("llama", "gptq"), texts, **options)
    files = sorted((tmp_path / "cache").glob("*/*.safetensors"))
    assert len(files) == 12
    monkeypatch.setattr(Predictions, "model", property(refuse_to_run))
    again = quantine.evaluate(packed("llama", "gptq"), texts, **options)
    for name, text in live["texts"].items():
        for found in (first["texts"][name], again["texts"][name]):
            # float16 blurs probabilities, and nothing else.
            assert found["kl"] == pytest.approx(text["kl"], abs=2e-4)
            for key in ("perplexity", "top1", "reference_perplexity", "recovery", "recovery_low"):
                assert found[key] == text[key]
    # Fewer windows are a part of what is there; other windows are not.
    quantine.evaluate(packed("llama", "rtn"), texts, **{**options, "limit": 3})
    with pytest.raises(AssertionError, match="computed again"):
        quantine.evaluate(packed("llama", "rtn"), texts, **{**options, "window": 16})


CHANGES: dict[str, Callable[[Path], None]] = {
    "weights": lambda path: build(tiny_config("llama"), path, seed=1) and None,
    "config": lambda path: (
        (path / "config.json").write_text(
            (path / "config.json")
            .read_text()
            .replace('"rms_norm_eps": 1e-06', '"rms_norm_eps": 1e-05')
        )
        and None
    ),
}


@pytest.mark.parametrize("change", CHANGES)
def test_another_model_in_the_same_place_is_computed_anew(
    change: str, packed: Packed, text_file: Path, tmp_path: Path
) -> None:
    model = build(tiny_config("llama"), tmp_path / "model")
    options = {**SIZES, "reference": model, "cache": tmp_path / "cache"}
    quantine.evaluate(packed("llama", "rtn"), str(text_file), **options)
    CHANGES[change](model)
    quantine.evaluate(packed("llama", "rtn"), str(text_file), **options)
    directories = list((tmp_path / "cache").iterdir())
    assert len(directories) == 2
    for directory in directories:
        assert json.loads((directory / "model.json").read_text())["model"] == str(model)


def test_other_dtypes_and_texts_are_kept_apart(
    tiny: Tiny, packed: Packed, texts: list[str], tmp_path: Path
) -> None:
    options = {**SIZES, "reference": tiny("llama"), "cache": tmp_path}
    for text in texts:
        quantine.evaluate(packed("llama", "rtn"), text, **options)
    quantine.evaluate(packed("llama", "rtn"), texts[0], **options, dtype=torch.bfloat16)
    counts = sorted(len(list(d.glob("*.safetensors"))) for d in tmp_path.iterdir())
    assert counts == [6, 12]


def test_a_damaged_prediction_is_named(
    tiny: Tiny, packed: Packed, text_file: Path, tmp_path: Path
) -> None:
    options = {**SIZES, "reference": tiny("llama"), "cache": tmp_path}
    quantine.evaluate(packed("llama", "rtn"), str(text_file), **options)
    victim = next(tmp_path.glob("*/*.safetensors"))
    victim.write_bytes(victim.read_bytes()[:100])
    with pytest.raises(OutputError, match=f"{victim.name} is damaged"):
        quantine.evaluate(packed("llama", "rtn"), str(text_file), **options)


def test_a_disk_that_is_too_small_is_found_before_work_starts(
    tiny: Tiny, packed: Packed, text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Full:
        free = 1000

    monkeypatch.setattr(predictions_module.shutil, "disk_usage", lambda _: Full)
    monkeypatch.setattr(Predictions, "model", property(refuse_to_run))
    with pytest.raises(OutputError, match="set a smaller limit"):
        quantine.evaluate(
            packed("llama", "rtn"), str(text_file), **SIZES, reference=tiny("llama"), cache=tmp_path
        )


def test_a_cache_that_cannot_be_made_is_refused(
    tiny: Tiny, packed: Packed, text_file: Path
) -> None:
    with pytest.raises(OutputError, match=r"cannot be kept .*choose another"):
        quantine.evaluate(
            packed("llama", "rtn"),
            str(text_file),
            **SIZES,
            reference=tiny("llama"),
            cache=text_file / "below-a-file",
        )


def test_logits_beyond_float16_leave_the_divergence_finite(
    tiny: Tiny, text_file: Path, tmp_path: Path
) -> None:
    from transformers import AutoModelForCausalLM

    from tiny_models import byte_tokenizer

    model = AutoModelForCausalLM.from_pretrained(tiny("llama"))
    with torch.no_grad():
        model.lm_head.weight *= 1e5
    model.save_pretrained(tmp_path / "model")
    byte_tokenizer().save_pretrained(tmp_path / "model")
    for _ in range(2):  # computed, and read
        found = quantine.evaluate(
            tmp_path / "model",
            str(text_file),
            **SIZES,
            reference=tmp_path / "model",
            cache=tmp_path / "cache",
        )
        text = found["texts"][text_file.name]
        assert abs(text["kl"]) < 1e-3
        assert text["top1"] == 1


def test_the_key_is_that_of_all_files(tiny: Tiny, tmp_path: Path) -> None:
    digests = locate(tiny("llama")).file_digests()
    assert digests.keys() == {"config.json", "model.safetensors"}
    same = build(tiny_config("llama"), tmp_path / "same")
    assert locate(same).file_digests() == digests


def test_eval_prints_every_text_and_the_recovery(
    tiny: Tiny,
    packed: Packed,
    texts: list[str],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    arguments = ["eval", str(packed("llama", "rtn")), "--text", ",".join(texts)]
    arguments += ["--window", "32", "--limit", "6", "--reference", str(tiny("llama"))]
    arguments += ["--cache", str(tmp_path / "cache"), "--json", str(tmp_path / "scores.json")]
    assert cli.main(arguments) == 0
    shown = capsys.readouterr().out
    scores = json.loads((tmp_path / "scores.json").read_text())
    for name, text in scores["texts"].items():
        row = next(line for line in shown.splitlines() if line.startswith(f"{name} "))
        assert f"{text['perplexity']:.3f} ± {text['stderr']:.3f}" in row
        assert f"{text['recovery']:.1%}" in row
        assert f"{text['kl']:.5f}" in row
