"""Exported GGUF files in the real llama.cpp."""

from __future__ import annotations

import json
import random
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tokenizers import AddedToken

from engines.serving import GGUF_FAMILIES, interpreter, own_perplexity, run_engine, windows_of
from ggufs import write_gguf
from quantine import Calibration, Plan, quantize
from quantine.formats.export import export
from quantine.formats.foreign.gguf.grid_types import type_of
from quantine.formats.foreign.gguf.metadata import architecture_of
from quantine.formats.foreign.gguf.mixtures import MIXTURES
from quantine.run.prepare import prepare
from quantine.run.target_plan import target_plan
from quantine.source.gguf.parts import read_parts
from quantine.source.gguf.splits import SPLITS, UNSAID, Split
from quantine.source.gguf.weights import model_names
from quantine.source.locate import locate
from sentencepieces import for_transformers, sentencepiece
from tiny_models import build, random_model, some_tokens, tiny_config

pytestmark = [pytest.mark.engines, pytest.mark.slow]
TEXTS = ["Hello world 123, it's  fine.\n\n ok", "naïve 日本 2024!", "def f(x):\n\treturn x**2"]
LETTERS = "the aonqu.日é\n"
SIGNS = "aB1 2\n\t'.,$+é日_-s`"
QUANTIZER = Path(__file__).parents[2] / "benchmarks" / "llama_cpp_quantizer.py"
SAME = 0.001
"""Largest relative difference of perplexities, where llama.cpp multiplies with decoded weights."""
ROUNDED = 0.01
"""The same where it multiplies with blocks: it then rounds activations to 8 bits."""
GRIDS: list[dict[str, Any]] = [
    {"bits": 3, "group_size": 32},
    {"bits": 4, "group_size": 64},
    {"bits": 4, "group_size": 64, "sym": True},
    {"bits": 5, "group_size": 64},
    {"bits": 8, "group_size": -1, "sym": True},
]


@pytest.mark.parametrize("grid", GRIDS, ids=lambda grid: "-".join(map(str, grid.values())))
def test_the_same_perplexity(grid: dict[str, Any], tmp_path: Path) -> None:
    assert_same_perplexity(Plan.preset("rtn", clip="mse", **grid), 24, tmp_path)


def test_the_same_perplexity_with_2_bits(tmp_path: Path) -> None:
    """In one matrix of each block: with 2 bits in all of them the model says nothing, and what
    rounding changes there has no bound."""
    grid = {"method": "rtn", "clip": "mse", "group_size": 64}
    rules = [
        {"match": "*.o_proj", **grid, "bits": 2, "sym": True},
        {"match": "@blocks", **grid, "bits": 4},
    ]
    assert_same_perplexity(Plan.from_dict({"rules": rules}), 24, tmp_path)


@pytest.mark.parametrize("target", ["Q4_0", "Q4_K_M", "Q2_K"])
def test_the_same_perplexity_in_its_own_types(target: str, tmp_path: Path) -> None:
    assert_same_perplexity(target_plan("demo", f"llama.cpp:{target}", method="rtn"), 8, tmp_path)


@pytest.mark.parametrize("target", ["Q2_K", "Q3_K_M", "Q4_K_M", "Q5_K_M", "Q6_K", "Q4_1", "Q5_1"])
def test_types_of_256_inputs(target: str, short: Calibration, tmp_path: Path) -> None:
    """A random model whose rows are whole blocks."""
    sizes = {"hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 3}
    model = build(tiny_config("llama", **sizes), tmp_path / "model")
    plan = target_plan(model, f"llama.cpp:{target}")
    assert_same_perplexity_of_random_tokens(model, plan, short, tmp_path)


@pytest.mark.parametrize("name", GGUF_FAMILIES)
def test_families(name: str, short: Calibration, tmp_path: Path) -> None:
    model = build(tiny_config(name, **GGUF_FAMILIES[name]), tmp_path / "model")
    plan = Plan.preset("rtn", bits=4, group_size=32)
    assert_same_perplexity_of_random_tokens(model, plan, short, tmp_path)


def assert_same_perplexity_of_random_tokens(
    model: Path, plan: Plan, calibration: Calibration, tmp_path: Path
) -> None:
    python = interpreter("QUANTINE_LLAMA_CPP_PYTHON")
    out = quantize(model, tmp_path / "out", plan, calibration).path
    file = export(out, tmp_path / "gguf", "gguf").path / "model.gguf"
    windows, asked = some_tokens(64, 4).tolist(), tmp_path / "asked.json"
    asked.write_text(json.dumps({"windows": windows, "texts": []}), encoding="utf-8")
    decoded = run_engine(python, "llama_cpp_program.py", str(file), str(asked), "decoded")
    expected = own_perplexity(out, windows)
    assert decoded["perplexity"] == pytest.approx(expected, rel=SAME)
    found = run_engine(python, "llama_cpp_program.py", str(file), str(asked))
    assert found["perplexity"] == pytest.approx(expected, rel=ROUNDED)


def assert_same_perplexity(plan: Plan, count: int, tmp_path: Path) -> None:
    python = interpreter("QUANTINE_LLAMA_CPP_PYTHON")
    out = quantize("demo", tmp_path / "out", plan, Calibration(samples=0)).path
    file = export(out, tmp_path / "gguf", "gguf").path / "model.gguf"
    windows = windows_of(out, 512, count)
    asked = tmp_path / "asked.json"
    asked.write_text(json.dumps({"windows": windows, "texts": TEXTS}), encoding="utf-8")
    expected = own_perplexity(out, windows)
    decoded = run_engine(python, "llama_cpp_program.py", str(file), str(asked), "decoded")
    assert decoded["perplexity"] == pytest.approx(expected, rel=SAME)
    found = run_engine(python, "llama_cpp_program.py", str(file), str(asked))
    assert found["perplexity"] == pytest.approx(expected, rel=ROUNDED)


def test_the_same_tokens(tmp_path: Path) -> None:
    python = interpreter("QUANTINE_LLAMA_CPP_PYTHON")
    out = quantize("demo", tmp_path / "out", Plan.preset("rtn"), Calibration(samples=0)).path
    file = export(out, tmp_path / "gguf", "gguf").path / "model.gguf"
    asked = tmp_path / "asked.json"
    asked.write_text(json.dumps({"windows": [[1, 2, 3]], "texts": TEXTS}), encoding="utf-8")
    found = run_engine(python, "llama_cpp_program.py", str(file), str(asked))
    tokenizer = locate(out).tokenizer()
    assert found["texts"] == [tokenizer(t, add_special_tokens=False)["input_ids"] for t in TEXTS]


def test_the_same_tokens_end_an_answer(tmp_path: Path) -> None:
    python = interpreter("QUANTINE_LLAMA_CPP_PYTHON")
    model = build(tiny_config("qwen2", eos_token_id=257), tmp_path / "model")
    (model / "generation_config.json").write_text('{"eos_token_id": [257, 65, 66]}')
    plan = Plan.preset("rtn", group_size=32)
    out = quantize(model, tmp_path / "out", plan, Calibration(samples=0)).path
    file = export(out, tmp_path / "gguf", "gguf").path / "model.gguf"
    asked = tmp_path / "asked.json"
    asked.write_text(json.dumps({"windows": [[1, 2, 3]], "texts": []}), encoding="utf-8")
    found = run_engine(python, "llama_cpp_program.py", str(file), str(asked))
    assert found["ends"] == [65, 66, 257]
    assert sorted(locate(file).config().eos_token_id) == [65, 66, 257]


def test_the_same_tokens_of_sentencepiece(tmp_path: Path) -> None:
    python = interpreter("QUANTINE_LLAMA_CPP_PYTHON")
    model = build(
        tiny_config("llama", vocab_size=424, bos_token_id=1, eos_token_id=2), tmp_path / "model"
    )
    own = for_transformers(sentencepiece())
    own.save_pretrained(model)
    plan = Plan.preset("rtn", group_size=32)
    out = quantize(model, tmp_path / "out", plan, Calibration(samples=0)).path
    file = export(out, tmp_path / "gguf", "gguf").path / "model.gguf"
    pick = random.Random(0)
    texts = [
        *TEXTS,
        "  two",
        "aaaaaaa 🦊",
        *("".join(pick.choices(LETTERS, k=60)) for _ in range(40)),
    ]
    asked = tmp_path / "asked.json"
    asked.write_text(json.dumps({"windows": [[1, 2, 3]], "texts": texts}), encoding="utf-8")
    found = run_engine(python, "llama_cpp_program.py", str(file), str(asked))
    assert found["texts"] == [own(t, add_special_tokens=False)["input_ids"] for t in texts]


@pytest.mark.parametrize("split", SPLITS, ids=lambda split: split.name)
def test_every_way_to_split_text(split: Split, tmp_path: Path) -> None:
    """Files of others, which may say neither how text is split nor whether it has a beginning."""
    python = interpreter("QUANTINE_LLAMA_CPP_PYTHON")
    backend = locate("demo").tokenizer().backend_tokenizer
    model = random_model(tiny_config("llama", vocab_size=backend.get_vocab_size()))
    pick, asked = random.Random(0), tmp_path / "asked.json"
    texts = [*TEXTS, *("".join(pick.choices(SIGNS, k=50)) for _ in range(60))]
    asked.write_text(json.dumps({"windows": [[1, 2, 3]], "texts": texts}), encoding="utf-8")
    unsaid = {".tokenizer.ggml.pre": None} if split.name == UNSAID else {}
    for name, changes in [(split.name, unsaid), *((alias, {}) for alias in split.aliases)]:
        file = tmp_path / "model.gguf"
        write_gguf(file, model, pre=name, bos=0, backend=backend, changes=changes)
        found = run_engine(python, "llama_cpp_program.py", str(file), str(asked), "begun")
        tokenizer = locate(file).tokenizer()
        assert found["texts"] == [tokenizer(text)["input_ids"] for text in texts], name


@pytest.mark.parametrize("drops", [False, True])
@pytest.mark.parametrize("name", ["ophi3", "model"])
def test_the_same_tokens_after_special_ones(name: str, drops: bool, tmp_path: Path) -> None:
    """llama.cpp drops spaces there if the name of the file says that it is Phi-3."""
    python = interpreter("QUANTINE_LLAMA_CPP_PYTHON")
    model = build(
        tiny_config("llama", vocab_size=424, bos_token_id=1, eos_token_id=2), tmp_path / "float"
    )
    own = for_transformers(sentencepiece())
    own.add_tokens([AddedToken("<|endoftext|>", normalized=False, special=True)])
    dropping = [
        AddedToken(word, normalized=False, special=True, rstrip=drops)
        for word in ("<|user|>", "<|end|>", "</s>")
    ]
    own.add_tokens(dropping)
    own.save_pretrained(model)
    plan = Plan.preset("rtn", group_size=32)
    out = quantize(model, tmp_path / name, plan, Calibration(samples=0)).path
    exported = export(out, tmp_path / "gguf", "gguf")
    assert not exported.notes
    texts = ["<|user|>\n there <|end|> the", "<|endoftext|> the<s>  other", "<|end|></s>\n\n and"]
    asked = tmp_path / "asked.json"
    asked.write_text(json.dumps({"windows": [[1, 2, 3]], "texts": texts}), encoding="utf-8")
    found = run_engine(
        python, "llama_cpp_program.py", str(exported.path / "model.gguf"), str(asked), "special"
    )
    wanted = [own(text, add_special_tokens=False)["input_ids"] for text in texts]
    assert found["texts"] == wanted


def types_by_its_quantizer(file: Path, target: str, width: int, scratch: Path) -> dict[str, int]:
    """Codes of the types of all tensors of ``file``, as llama.cpp's own quantizer chooses them.

    Args:
        file: of a model, in any type.
        width: of the inputs of its first ``ffn_down``, of whose importance it is told.
    """
    python = interpreter("QUANTINE_LLAMA_CPP_PYTHON")
    importance = scratch / "importance.npz"
    np.savez(importance, **{"blk.0.ffn_down.weight": np.ones(width, dtype=np.float32)})
    floats, theirs = scratch / "floats.gguf", scratch / "theirs.gguf"
    for arguments in (
        ["decode", file, floats],
        ["quantize", floats, target, theirs, importance],
    ):
        subprocess.run([python, QUANTIZER, *map(str, arguments)], check=True, capture_output=True)
    return {tensor.name: tensor.type for part in read_parts(theirs) for tensor in part.tensors}


def types_of_plan(model: str | Path, target: str) -> dict[str, int]:
    """The same of the matrices that a plan with this target quantizes."""
    plan = target_plan(model, f"llama.cpp:{target}")
    job = prepare(model, plan, Calibration(samples=1), planned=True)
    architecture = architecture_of(job.config)
    assert architecture is not None
    names = {name: stored for stored, name in model_names(architecture, job.model).items()}
    return {
        names[decision.layer.stored_name]: kind.code
        for decision in job.decisions
        if decision.scheme is not None
        and not job.shares_table(decision.layer)
        and (kind := type_of(decision.scheme.spec)) is not None
    }


@pytest.mark.parametrize("target", ["Q4_0", "Q2_K", "Q3_K_M", "Q4_K_M"])
def test_matrices_get_the_types_that_its_quantizer_gives(target: str, tmp_path: Path) -> None:
    file = locate("demo").gguf_parts[0].path
    found, wanted = (
        types_by_its_quantizer(file, target, 1536, tmp_path),
        types_of_plan("demo", target),
    )
    assert len(wanted) == 211
    assert {name: found[name] for name in wanted} == wanted


MANY = {"num_hidden_layers": 16}
WIDE = {"hidden_size": 256, "intermediate_size": 256, **MANY}
BUILDS: dict[str, tuple[str, dict[str, Any]]] = {
    "all heads share one of values": ("llama", {**WIDE, "num_key_value_heads": 1}),
    "two heads share one of values": ("llama", WIDE),
    "queries, keys and values are one": ("phi3", {**WIDE, "num_key_value_heads": 1}),
    "70B": ("qwen2", {**WIDE, "num_hidden_layers": 80}),
    "falcon": ("falcon_old", {"hidden_size": 256, "ffn_hidden_size": 256, **MANY}),
    "gpt2": ("gpt2", {"n_embd": 256, "n_inner": 256, "n_layer": 16}),
}
"""Models of rows of 256 inputs for which llama.cpp has rules of their own."""


@pytest.mark.parametrize("build_of", BUILDS)
def test_all_mixtures_of_other_models(build_of: str, tmp_path: Path) -> None:
    name, sizes = BUILDS[build_of]
    model = build(tiny_config(name, **sizes), tmp_path / "model")
    plan = Plan.preset("rtn", bits=8, group_size=32, sym=True)
    out = quantize(model, tmp_path / "out", plan, Calibration(samples=0)).path
    file = export(out, tmp_path / "gguf", "gguf").path / "model.gguf"
    for target in MIXTURES:
        found, wanted = (
            types_by_its_quantizer(file, target, 256, tmp_path),
            types_of_plan(model, target),
        )
        assert len(wanted) > sizes.get("num_hidden_layers", sizes.get("n_layer")) * 4
        assert {stored: found[stored] for stored in wanted} == wanted, target
