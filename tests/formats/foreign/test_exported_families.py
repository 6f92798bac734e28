"""Every family, written for every engine and read again: the same numbers, or refused by name."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import transformers
from transformers import AutoModelForCausalLM

import quantine
from quantine import Calibration, CheckpointError, FormatError
from quantine.formats.export import export
from quantine.formats.finished import FinishedDirectory
from quantine.formats.foreign.gguf.read import OWN
from quantine.formats.imported import import_model
from quantine.run.target_plan import target_plan
from quantine.source.gguf.header import read_header
from quantine.source.gguf.parts import read_parts
from tiny_models import FAMILIES, build, logits_of, tiny_config

Packed = Callable[[str, str], Path]
OWN_DEFAULTS = ("qwen3", "phi3", "gpt2")
"""Of these transformers' own reader takes some sizes from its defaults, which are not tiny."""
UNTOLD = {
    "mistral": "sliding_window",
    "smollm3": "model type smollm3",
    "opt": "model type opt",
    "opt_projected": "model type opt",
    "neox_parallel": "model type gpt_neox",
    "neox_sequential": "model type gpt_neox",
    "falcon_new": "new_decoder_architecture",
    "falcon_alibi": "alibi",
    "gemma2": "query_pre_attn_scalar",
    "gemma3": "query_pre_attn_scalar",
}
"""What a GGUF file of the others cannot tell, or of which architecture none is written."""


def same_weights(one: Path, two: Path) -> None:
    """Two directories hold the same matrices, and the same floats, by the same names."""
    first, second = FinishedDirectory(one), FinishedDirectory(two)
    assert first.description.layers.keys() == second.description.layers.keys()
    assert first.kept.keys() == second.kept.keys()
    for name in first.description.layers:
        assert torch.equal(first.qtensor(name).dequantize(), second.qtensor(name).dequantize())
    for name in first.kept:
        found, wanted = second.kept_tensor(name).float(), first.kept_tensor(name).float()
        torch.testing.assert_close(found, wanted, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("name", FAMILIES)
def test_floats_load_without_quantine(name: str, packed: Packed, tmp_path: Path) -> None:
    out = packed(name, "mixed")
    exported = export(out, tmp_path / "float", "float")
    assert not exported.converted
    model, info = AutoModelForCausalLM.from_pretrained(exported.path, output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    assert "quantization_config" not in json.loads((exported.path / "config.json").read_text())
    expected = logits_of(quantine.load(out, arithmetic="exact")[0])
    torch.testing.assert_close(logits_of(model), expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("kind", ["gptq", "rtn"])
@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("to", ["gptq", "compressed-tensors"])
def test_directories_come_back(
    to: str, name: str, kind: str, packed: Packed, tmp_path: Path
) -> None:
    out = packed(name, kind)
    if (name, to) == ("gpt2", "compressed-tensors"):
        with pytest.raises(FormatError, match="Conv1D"):
            export(out, tmp_path / to, to)
        return
    exported = export(out, tmp_path / to, to)
    imported = import_model(exported.path, tmp_path / "back")
    assert imported.layers == len(FinishedDirectory(out).description.layers)
    same_weights(out, imported.path)
    again, expected = (
        logits_of(quantine.load(path, "float32", arithmetic="exact")[0])
        for path in (imported.path, out)
    )
    torch.testing.assert_close(again, expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("kind", ["gptq", "rtn"])
@pytest.mark.parametrize("name", [name for name in FAMILIES if name not in UNTOLD])
def test_gguf_files_come_back(name: str, kind: str, packed: Packed, tmp_path: Path) -> None:
    out = packed(name, kind)
    exported = export(out, tmp_path / "gguf", "gguf")
    file = exported.path / "model.gguf"
    if name.startswith("qwen"):  # whose class in transformers splits text in no other way
        with pytest.raises(CheckpointError, match="transformers' Qwen2Tokenizer does not"):
            import_model(file, tmp_path / "back")
        file.write_bytes(file.read_bytes().replace(b"gpt-2", b"qwen2", 1))
    imported = import_model(file, tmp_path / "back")
    same_weights(out, imported.path)
    expected = logits_of(quantine.load(out, arithmetic="exact")[0])
    torch.testing.assert_close(
        logits_of(quantine.load(imported.path, arithmetic="exact")[0]),
        expected,
        atol=1e-4,
        rtol=1e-4,
    )
    again = export(imported.path, tmp_path / "again", "gguf")
    first, second = (read_header(path / "model.gguf") for path in (exported.path, again.path))
    assert [one.read() for one in second.tensors] == [one.read() for one in first.tensors]
    first.metadata["general.name"] = second.metadata["general.name"]
    assert second.metadata == first.metadata
    if name in OWN_DEFAULTS:
        return
    model = AutoModelForCausalLM.from_pretrained(exported.path, gguf_file="model.gguf")
    torch.testing.assert_close(logits_of(model), expected, atol=1e-3, rtol=1e-3)


def test_types_with_a_k_come_back(tmp_path: Path) -> None:
    """Rows of q and k are turned on the way out and in; blocks stay the bytes that they are."""
    sizes = {"hidden_size": 256, "intermediate_size": 256, "num_hidden_layers": 1}
    source = build(tiny_config("llama", **sizes), tmp_path / "model")
    plan = target_plan(source, "llama.cpp:Q3_K_M", method="rtn")
    out = quantine.quantize(source, tmp_path / "out", plan, Calibration(samples=0)).path
    file = export(out, tmp_path / "gguf", "gguf").path / "model.gguf"
    imported = import_model(file, tmp_path / "back")
    assert not imported.decoded
    same_weights(out, imported.path)
    again, expected = (logits_of(quantine.load(path)[0]) for path in (imported.path, out))
    torch.testing.assert_close(again, expected)
    block = next(t for part in read_parts(file) for t in part.tensors if t.type in OWN)
    with file.open("r+b") as damaged:
        damaged.seek(block.offset)
        damaged.write(b"\xff" * block.nbytes)
    with pytest.raises(FormatError, match=f"{block.name} in .* a scale that is not finite"):
        import_model(file, tmp_path / "damaged")
    assert not (tmp_path / "damaged").exists()


@pytest.mark.parametrize("name", UNTOLD)
def test_gguf_files_tell_no_other_model(name: str, packed: Packed, tmp_path: Path) -> None:
    with pytest.raises(FormatError, match=UNTOLD[name]):
        export(packed(name, "rtn"), tmp_path / "gguf", "gguf")
    assert not list(tmp_path.iterdir())


def test_the_tokenizer_is_carried(packed: Packed, tmp_path: Path) -> None:
    out = packed("llama", "rtn")
    exported = export(out, tmp_path / "gguf", "gguf")
    own = transformers.AutoTokenizer.from_pretrained(out)
    found = transformers.AutoTokenizer.from_pretrained(exported.path, gguf_file="model.gguf")
    text = "Line 7: 49 apples, naïve ones."
    assert found(text)["input_ids"] == own(text)["input_ids"]


@pytest.mark.parametrize("target", ["Q8_0", "Q4_K_M", "Q5_1"])
def test_what_was_solved_for_a_type_comes_back(target: str, tmp_path: Path) -> None:
    """Q8_0 stands in where a width is not a multiple of 256. Its scales have either sign here."""
    source = build(tiny_config("llama", num_hidden_layers=1), tmp_path / "model")
    plan = target_plan(source, f"llama.cpp:{target}", method="rtn")
    out = quantine.quantize(source, tmp_path / "out", plan, Calibration(samples=0)).path
    file = export(out, tmp_path / "gguf", "gguf").path / "model.gguf"
    solved = FinishedDirectory(out)
    eights = [q for q in map(solved.qtensor, solved.description.layers) if q.grid.bits == 8]
    lowest = [(q.codes == 0) & (q.dequantize() > 0) for q in eights]
    assert any(bool(found.any()) for found in lowest)  # -128, with a negative scale
    imported = import_model(file, tmp_path / "back")
    assert not imported.decoded
    same_weights(out, imported.path)
    again, expected = (logits_of(quantine.load(path)[0]) for path in (imported.path, out))
    torch.testing.assert_close(again, expected)
    twice = export(imported.path, tmp_path / "again", "gguf").path / "model.gguf"
    first, second = (read_parts(path) for path in (file, twice))
    for one, other in zip(first[0].tensors, second[0].tensors, strict=True):
        assert (one.name, one.type, one.read()) == (other.name, other.type, other.read())
