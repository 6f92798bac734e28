"""Checkpoints of other engines as sources: imported, quantized again, or refused if damaged."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from tokenizers.models import WordLevel

import quantine
from ggufs import write_gguf
from quantine import (
    Calibration,
    CheckpointError,
    FormatError,
    OutputError,
    Plan,
    QuantineError,
    ResumeMismatch,
    quantize,
)
from quantine.formats.directory import RUN_DIRECTORY
from quantine.formats.export import export
from quantine.formats.finished import FinishedDirectory
from quantine.formats.foreign import FOREIGN
from quantine.formats.foreign.gguf.blocks import TYPES
from quantine.formats.imported import import_model, second_rounding, source_files
from quantine.runtime.load import load_model
from quantine.source.gguf.header import UNLISTED
from quantine.source.locate import locate
from quantine.source.weight_files import SINGLE
from stopped_runs import stopped_at
from tiny_models import build, logits_of, random_model, tiny_config

Packed = Callable[[str, str], Path]
NONE = Calibration(samples=0)
LAYER = "model.layers.1.self_attn.k_proj"
TO = pytest.mark.parametrize("to", ["gptq", "compressed-tensors"])


@pytest.fixture
def exported(packed: Packed, tmp_path: Path) -> Callable[[str], Path]:
    """A tiny model of 4 bits in another engine's directory."""
    return lambda to: export(packed("llama", "rtn"), tmp_path / to, to).path


def tensors_changed(directory: Path, change: Callable[[dict[str, torch.Tensor]], None]) -> None:
    file = directory / "model.safetensors"
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file, metadata={"format": "pt"})


def settings_changed(directory: Path, **changes: Any) -> None:
    config = json.loads((directory / "config.json").read_text())
    config["quantization_config"].update(changes)
    (directory / "config.json").write_text(json.dumps(config))


def refused(directory: Path, out: Path) -> str:
    """The message with which an import is refused, of which nothing is left."""
    before = set(out.parent.iterdir())
    with pytest.raises(QuantineError) as caught:
        import_model(directory, out)
    assert set(out.parent.iterdir()) == before
    assert len(str(caught.value)) < 400
    return str(caught.value)


@TO
def test_a_second_rounding_is_announced(
    to: str, exported: Callable[[str], Path], packed: Packed, tmp_path: Path
) -> None:
    source = exported(to)
    said = second_rounding(locate(source))
    assert said is not None
    assert f"quantized already ({to})" in said
    # Onto the same grid, nothing changes any more.
    plan = Plan.preset("rtn", bits=8, group_size=32, arithmetic="exact")
    out = quantize(source, tmp_path / "again", plan, NONE).path
    wanted = logits_of(quantine.load(packed("llama", "rtn"), arithmetic="exact")[0])
    found = logits_of(quantine.load(out, "float32", arithmetic="exact")[0])
    assert float((found - wanted).abs().max()) < 0.3
    assert second_rounding(locate(packed("llama", "rtn"))) is None


def bytes_under(directory: Path) -> int:
    return sum(path.stat().st_size for path in directory.rglob("*") if path.is_file())


@pytest.mark.parametrize("to", ["gptq", "compressed-tensors", "gguf"])
def test_sources_are_decoded_while_they_are_read(
    to: str, exported: Callable[[str], Path], tmp_path: Path
) -> None:
    """Nothing of a source is on disk while it is quantized; and a run goes on after a stop."""
    source, plan = exported(to), Plan.preset("gptq", bits=4, group_size=32)
    model = next(source.glob("*.gguf"), source)
    text = tmp_path / "text.txt"
    text.write_text("the cat sat on the mat and looked at the dog, " * 40)
    calibration = Calibration(str(text), samples=4, seqlen=32)
    whole = quantize(model, tmp_path / "whole", plan, calibration).path
    with stopped_at("block-00001"):
        quantize(model, tmp_path / "out", plan, calibration)
    states = bytes_under(tmp_path / "out" / RUN_DIRECTORY / "states")
    assert bytes_under(tmp_path / "out") - states < 1.1 * bytes_under(whole)
    out = quantize(model, tmp_path / "out", plan, calibration, resume=True).path
    assert (out / SINGLE).read_bytes() == (whole / SINGLE).read_bytes()
    assert {path.name for path in out.iterdir()} == {path.name for path in whole.iterdir()}
    assert (out / "tokenizer.json").is_file()


def test_scales_of_more_digits_are_sources_of_floats(
    exported: Callable[[str], Path], tmp_path: Path
) -> None:
    source, name = exported("compressed-tensors"), f"{LAYER}.weight"

    def widened(tensors: dict[str, torch.Tensor]) -> None:
        for key in [key for key in tensors if key.endswith("weight_scale")]:
            tensors[key] = tensors[key].float() * (1 + 2**-20)

    read = source_files(locate(source)).read([(name, None)])[0]
    tensors_changed(source, widened)
    assert "float16 does not hold: quantize from it" in refused(source, tmp_path / "bits")
    found = source_files(locate(source)).read([(name, None)])[0]
    torch.testing.assert_close(found, read * (1 + 2**-20), rtol=2**-22, atol=0)
    assert not torch.equal(found, read)
    out = quantize(source, tmp_path / "out", Plan.preset("rtn", bits=8, group_size=32), NONE).path
    assert FinishedDirectory(out).description.layers


def test_floats_that_are_not_finite(
    exported: Callable[[str], Path], packed: Packed, tmp_path: Path
) -> None:
    """They are refused where packed layers pass: by imports and by exports, to any layout."""
    name = "model.norm.weight"

    def damaged(tensors: dict[str, torch.Tensor]) -> None:
        tensors[name][3] = math.nan

    source = exported("gptq")
    tensors_changed(source, damaged)
    assert f"{name} in model.safetensors holds non-finite" in refused(source, tmp_path / "out")
    broken = Path(shutil.copytree(packed("llama", "rtn"), tmp_path / "broken"))
    tensors_changed(broken, damaged)
    for to in FOREIGN:
        with pytest.raises(FormatError, match=f"{name} holds values that are not finite"):
            export(broken, tmp_path / f"to-{to}", to, nearest=True)
        assert not (tmp_path / f"to-{to}").exists()


def test_a_changed_source_is_noticed(exported: Callable[[str], Path], tmp_path: Path) -> None:
    source, plan = exported("gptq"), Plan.preset("rtn", bits=4, group_size=32)
    with stopped_at("block-00001"):
        quantize(source, tmp_path / "out", plan, NONE)
    layer = LAYER.replace("1", "0")
    tensors_changed(source, lambda tensors: tensors[f"{layer}.scales"].mul_(2))
    with pytest.raises(ResumeMismatch, match=rf"{layer}\.weight is not what it read"):
        quantize(source, tmp_path / "out", plan, NONE, resume=True)


@TO
def test_truncated_files(to: str, exported: Callable[[str], Path], tmp_path: Path) -> None:
    source = exported(to)
    file = source / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1000])
    assert "model.safetensors" in refused(source, tmp_path / "out")


@TO
def test_missing_tensors(to: str, exported: Callable[[str], Path], tmp_path: Path) -> None:
    source = exported(to)
    leaf = "scales" if to == "gptq" else "weight_scale"
    tensors_changed(source, lambda tensors: tensors.pop(f"{LAYER}.{leaf}"))
    assert f"{LAYER}.{leaf} is missing" in refused(source, tmp_path / "out")
    tensors_changed(source, lambda tensors: tensors.pop("model.norm.weight"))
    assert "no file holds model.norm.weight" in refused(source, tmp_path / "out")


@TO
def test_tensors_without_a_place(to: str, exported: Callable[[str], Path], tmp_path: Path) -> None:
    """None is left out without a word, whatever it may have meant."""
    source = exported(to)
    for name in (
        f"{LAYER}.something_unknown",
        f"{LAYER}.weight",
        "model.layers.1.self_attn.k_scale",
    ):
        tensors_changed(
            source, lambda tensors, name=name: tensors.update({name: torch.ones(32, 64)})
        )
        assert f"files hold {name} for which" in refused(source, tmp_path / "out")
        tensors_changed(source, lambda tensors, name=name: tensors.pop(name))
    assert import_model(source, tmp_path / "out").layers


def test_biases_that_change_nothing(
    packed: Packed, exported: Callable[[str], Path], tmp_path: Path
) -> None:
    """Older programs add zeros to layers that have no bias."""
    source = exported("gptq")
    tensors_changed(source, lambda tensors: tensors.update({f"{LAYER}.bias": torch.zeros(32)}))
    back = import_model(source, tmp_path / "out").path
    wanted = FinishedDirectory(packed("llama", "rtn")).qtensor(LAYER).dequantize()
    assert torch.equal(FinishedDirectory(back).qtensor(LAYER).dequantize(), wanted)
    tensors_changed(source, lambda tensors: tensors[f"{LAYER}.bias"][3:4].fill_(0.5))
    assert f"files hold {LAYER}.bias for which" in refused(source, tmp_path / "again")


@TO
def test_a_head_packed_beside_the_table_that_it_shares(to: str, tiny: Any, tmp_path: Path) -> None:
    """The table's floats are not those of the head."""
    plan = Plan.from_dict(
        {
            "rules": [
                {"match": "@head", "method": "rtn", "bits": 8, "group_size": 32},
                {"match": "@blocks", "method": "rtn", "bits": 4, "group_size": 32},
            ]
        }
    )
    out = quantize(tiny("llama_tied"), tmp_path / "quantized", plan, NONE).path
    config = json.loads((out / "config.json").read_text())
    (out / "config.json").write_text(json.dumps({**config, "tie_word_embeddings": True}))
    source = export(out, tmp_path / to, to).path
    assert (
        "lm_head"
        in FinishedDirectory(import_model(source, tmp_path / "out").path).description.layers
    )


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json"])
@pytest.mark.parametrize("damage", ["", '{"version": "1.0", "model":', "[1"])
def test_broken_tokenizers(
    name: str, damage: str, exported: Callable[[str], Path], packed: Packed, tmp_path: Path
) -> None:
    source = exported("gptq")
    (source / name).write_text(damage)
    assert f"{name} cannot be read" in refused(source, tmp_path / "out")
    broken = Path(shutil.copytree(packed("llama", "rtn"), tmp_path / "broken"))
    (broken / name).write_text(damage)
    for to in ("gptq", "compressed-tensors", "float", "gguf"):
        with pytest.raises(CheckpointError, match=f"{name} cannot be read"):
            export(broken, tmp_path / f"to-{to}", to)
        assert not (tmp_path / f"to-{to}").exists()


def test_tokenizers_of_another_kind(exported: Callable[[str], Path], tmp_path: Path) -> None:
    """JSON alone is no tokenizer; one that does not know every word is, and none is not broken."""
    source = exported("gptq")
    Tokenizer(WordLevel({"0": 0, "1": 1})).save(str(source / "tokenizer.json"))
    assert import_model(source, tmp_path / "bits").layers
    (source / "tokenizer.json").write_text('{"version": "1.0", "model": {"type": "Other"}}')
    assert "tokenizer.json cannot be read" in refused(source, tmp_path / "out")
    (source / "tokenizer.json").unlink()
    assert import_model(source, tmp_path / "out").layers


def test_wrong_groups_and_zero_points(exported: Callable[[str], Path], tmp_path: Path) -> None:
    source = exported("gptq")
    groups = torch.zeros(64, dtype=torch.int32)
    tensors_changed(source, lambda tensors: tensors.update({f"{LAYER}.g_idx": groups}))
    assert f"{LAYER}.g_idx is wrong" in refused(source, tmp_path / "out")
    tensors_changed(source, lambda tensors: tensors.pop(f"{LAYER}.g_idx"))
    settings_changed(source, sym=True)
    assert "has zero points, but its settings say" in refused(source, tmp_path / "out")
    settings_changed(source, sym=False, checkpoint_format="gptq", format="gptq")
    tensors_changed(source, lambda tensors: tensors[f"{LAYER}.qzeros"].fill_(-1))
    assert "zero point of 16, but 4 bits end at 15" in refused(source, tmp_path / "out")


@pytest.mark.parametrize(
    ("to", "changes", "message"),
    [
        ("gptq", {"checkpoint_format": "gptq_v3"}, "'gptq_v3' is not read"),
        ("gptq", {"bits": 3}, "qweight is torch.int32"),
        ("gptq", {"bits": "four"}, "quantization_config is damaged"),
        ("gptq", {"group_size": 48}, "groups of 48 do not divide 64 inputs"),
        ("gptq", {"dynamic": {"-:.*k_proj": {}}}, "is packed, but quantization_config calls it"),
        ("gptq", {"dynamic": {"+:(": {}}}, "is no pattern"),
        ("gptq", {"dynamic": {"+:model": 3}}, "'+:model' in quantization_config.dynamic is no"),
        ("gptq", {"group_size": 0}, "group_size must be positive"),
        ("gptq", {"checkpoint_format": "gptq", "format": "gptq_v2"}, "remove the wrong one"),
        ("gptq", {"checkpoint_format": "gptq", "format": "marlin"}, "format 'marlin': remove the"),
        ("gptq", {"desc_act": "false"}, "desc_act in quantization_config is 'false'"),
        ("gptq", {"pack_dtype": "int64"}, "pack_dtype 'int64' is not read"),
        ("gptq", {"checkpoint_format": ["a"]}, "checkpoint_format ['a'] is not read"),
        ("compressed-tensors", {"ignore": 5}, "ignore in quantization_config is no list"),
        ("compressed-tensors", {"ignore": "lm_head"}, "ignore in quantization_config is no list"),
        (
            "compressed-tensors",
            {
                "config_groups": {
                    "group_0": {"targets": "Linear", "weights": {}, "format": "pack-quantized"}
                }
            },
            "targets in quantization_config is no list",
        ),
        ("compressed-tensors", {"config_groups": {}}, "has no config_groups"),
        (
            "compressed-tensors",
            {"config_groups": {"group_0": {}}},
            "group_0 of quantization_config",
        ),
        ("compressed-tensors", {"format": "marlin-24"}, None),
        ("compressed-tensors", {"sparsity_config": {"format": "dense"}}, None),
        (
            "compressed-tensors",
            {"sparsity_config": {"format": "sparse-bitmask"}},
            "sparsity_config",
        ),
        ("compressed-tensors", {"sparsity_config": "dense"}, "sparsity_config"),
        ("compressed-tensors", {"kv_cache_scheme": {"num_bits": 8}}, "keys and values are rounded"),
        ("compressed-tensors", {"ignore": ["re:.*"]}, "quantization_config calls it float"),
        ("compressed-tensors", {"quant_method": "hqq"}, "only GGUF files and directories of"),
    ],
)
def test_other_settings(
    to: str,
    changes: dict[str, Any],
    message: str | None,
    exported: Callable[[str], Path],
    tmp_path: Path,
) -> None:
    source = exported(to)
    settings_changed(source, **changes)
    if message is None:  # nothing is sparse; each group names its own format, which counts
        assert import_model(source, tmp_path / "out").layers
        return
    assert message in refused(source, tmp_path / "out")


def test_older_words_of_config_json(packed: Packed, tmp_path: Path) -> None:
    source = Path(shutil.copytree(packed("llama", "rtn"), tmp_path / "source"))
    config = json.loads((source / "config.json").read_text())
    config["torch_dtype"] = config.pop("dtype")
    (source / "config.json").write_text(json.dumps({**config, "pad_token_id": -1}))
    for to in ("gptq", "compressed-tensors", "float"):
        said = json.loads((export(source, tmp_path / to, to).path / "config.json").read_text())
        assert "dtype" in said
        assert "torch_dtype" not in said
    file = export(source, tmp_path / "gguf", "gguf").path / "model.gguf"
    assert "tokenizer.ggml.padding_token_id" not in gguf.GGUFReader(file).fields


def test_an_export_lies_not_in_its_source(packed: Packed) -> None:
    out = packed("llama", "rtn")
    with pytest.raises(OutputError, match="lies in the directory that is exported"):
        export(out, out / "sub", "gptq")
    assert not (out / "sub").exists()


def test_directories_of_others_are_no_gguf(packed: Packed, tiny: Any, tmp_path: Path) -> None:
    assert "quant_method None" in refused(tiny("llama"), tmp_path / "out")
    assert "quant_method 'quantine'" in refused(packed("llama", "rtn"), tmp_path / "out")


@pytest.mark.parametrize("kind", ["Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0"])
def test_gguf_files_of_others(kind: str, tmp_path: Path) -> None:
    """Files that llama.cpp's rules made: their scales have either sign."""
    model = random_model(tiny_config("llama"))
    file = write_gguf(tmp_path / "m.gguf", model, kind=gguf.GGMLQuantizationType[kind])
    imported = import_model(file, tmp_path / "out")
    assert not imported.decoded
    assert imported.layers == 16
    floats = load_model(locate(file), torch.float32)
    finished = FinishedDirectory(imported.path)
    for name in finished.description.layers:
        found = finished.qtensor(name).dequantize()
        assert torch.equal(found, floats.get_submodule(name).weight)


def test_gguf_files_of_two_bits(tmp_path: Path) -> None:
    """Q2_0 is none of the ``gguf`` package's types, so all that reads them decodes it here."""
    sizes = {kind.code: (kind.weights, kind.nbytes) for kind in TYPES}
    assert UNLISTED.items() <= sizes.items()
    model = build(tiny_config("llama", intermediate_size=128), tmp_path / "model")
    plan = Plan.preset("rtn", bits=2, group_size=64, sym=True)
    packed = quantize(model, tmp_path / "packed", plan, NONE).path
    file = export(packed, tmp_path / "gguf", "gguf").path / "model.gguf"
    blocks = [t for t in locate(file).gguf_parts[0].tensors if t.type in UNLISTED]
    assert len(blocks) == 14
    imported = import_model(file, tmp_path / "imported")
    assert (imported.layers, imported.decoded) == (14, [])
    before, after = FinishedDirectory(packed), FinishedDirectory(imported.path)
    for name in before.description.layers:
        assert torch.equal(before.qtensor(name).dequantize(), after.qtensor(name).dequantize())
    floats = export(packed, tmp_path / "float", "float").path
    wanted = logits_of(load_model(locate(floats), torch.float32))
    assert torch.equal(logits_of(load_model(locate(file), torch.float32)), wanted)
    again = quantize(file, tmp_path / "again", plan, NONE).path
    of_floats = quantize(floats, tmp_path / "of floats", plan, NONE).path
    assert (again / SINGLE).read_bytes() == (of_floats / SINGLE).read_bytes()


def test_gguf_files_without_a_grid(tmp_path: Path) -> None:
    model = random_model(tiny_config("llama"))
    plain = write_gguf(tmp_path / "f.gguf", model)
    assert "quantize it, as a source of floats" in refused(plain, tmp_path / "out")
    assert second_rounding(locate(plain)) is None
    file = write_gguf(tmp_path / "m.gguf", model, kind=gguf.GGMLQuantizationType.Q4_1)
    assert second_rounding(locate(file)) is not None


def test_damaged_gguf_files(packed: Packed, tmp_path: Path) -> None:
    file = export(packed("llama", "rtn"), tmp_path / "gguf", "gguf").path / "model.gguf"
    whole = file.read_bytes()
    file.write_bytes(whole[:-100])
    assert "damaged or half downloaded" in refused(file, tmp_path / "out")
    name = b"blk.1.attn_k.weight"
    place = whole.index(name) + len(name) + 4 + 16
    file.write_bytes(whole[:place] + b"\x63\x00\x00\x00" + whole[place + 4 :])
    assert "of ggml's type 99" in refused(file, tmp_path / "out")
    file.write_bytes(b"GGUF\x09\x00\x00\x00" + whole[8:])
    assert "GGUF file of version 2 or 3" in refused(file, tmp_path / "out")


def test_damaged_directories_write_no_export(packed: Packed, tmp_path: Path) -> None:
    broken = Path(shutil.copytree(packed("llama", "rtn"), tmp_path / "broken"))
    tensors_changed(broken, lambda tensors: tensors[f"{LAYER}.scale"].resize_(1))
    for to in ("gptq", "compressed-tensors", "gguf", "float"):
        with pytest.raises((FormatError, CheckpointError)):
            export(broken, tmp_path / to, to)
    assert [path.name for path in tmp_path.iterdir()] == ["broken"]


@pytest.mark.parametrize("value", [-1.0, math.inf, math.nan])
def test_directories_that_do_not_load_write_no_export(
    value: float, packed: Packed, tmp_path: Path
) -> None:
    broken = Path(shutil.copytree(packed("llama", "rtn"), tmp_path / "broken"))
    tensors_changed(broken, lambda tensors: tensors[f"{LAYER}.scale"].view(-1)[3:4].fill_(value))
    with pytest.raises(FormatError, match=f"{LAYER}"):
        quantine.load(broken)
    for to in ("gptq", "compressed-tensors", "gguf", "float"):
        with pytest.raises(FormatError, match=f"{LAYER} in .* is damaged"):
            export(broken, tmp_path / to, to)
    assert [path.name for path in tmp_path.iterdir()] == ["broken"]
