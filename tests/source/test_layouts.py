"""Whatever lies in a directory: the tensors that are quantized are those transformers loads.

The oracle is ``from_pretrained``. Where it loads a model whole, quantine must take the same
tensors; where it fills gaps with random weights or leaves tensors out, quantine must refuse.
"""

from __future__ import annotations

import itertools
import json
import random
from collections.abc import Callable
from dataclasses import astuple, dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import AutoModelForCausalLM

import quantine
from quantine import Calibration, CheckpointError, Plan
from quantine.run.prepare import prepare
from quantine.source.locate import locate
from quantine.source.weight_files import INDEX, SINGLE
from tiny_models import BOS, byte_tokenizer, random_model, tiny_config

PLAN = Plan.preset("rtn", bits=8, group_size=32)
NONE = Calibration(samples=0)
Tensors = dict[str, Tensor]


@dataclass(frozen=True)
class Layout:
    """One combination of what may lie in a directory."""

    family: str
    files: str
    place: str
    names: str
    tie: str
    beside: str
    content: str

    def __str__(self) -> str:
        return "-".join(astuple(self))


FILES = ("single", "sharded", "both", "stale", "named", "named index")
PLACES = ("directory", "subfolder", "snapshot")
NAMES = ("whole", "bare")
TIES = ("untied", "tied", "tied, same head", "tied, own head", "tied, head only")
BESIDE = ("nothing", "variants", "pickles")
CONTENTS = ("all", "old buffers", "further block", "adapter", "lost matrix", "other shape", "twice")
FAMILIES = ("llama", "gpt2", "neox_parallel")
COUNT = 150

EVERY = [Layout(*one) for one in itertools.product(
    FAMILIES, FILES, PLACES, NAMES, TIES, BESIDE, CONTENTS
)]  # fmt: skip
# Most layouts hold what they should, so that it is the files that decide.
USUAL = [layout for layout in EVERY if layout.content in ("all", "old buffers")]
SAMPLED = [
    *random.Random(0).sample(USUAL, COUNT // 2),
    *random.Random(1).sample(EVERY, COUNT // 2),
]

WEIGHTS: dict[str, tuple[str, str, str]] = {
    "llama": ("model", "model.layers.{}.mlp.up_proj.weight", "model.embed_tokens.weight"),
    "gpt2": ("transformer", "transformer.h.{}.mlp.c_fc.weight", "transformer.wte.weight"),
    "neox_parallel": (
        "gpt_neox",
        "gpt_neox.layers.{}.mlp.dense_h_to_4h.weight",
        "gpt_neox.embed_in.weight",
    ),
}
"""Base prefix, a matrix in every block, and token table."""
OLD = {
    "llama": "model.layers.0.self_attn.rotary_emb.inv_freq",
    "gpt2": "transformer.h.0.attn.bias",
    "neox_parallel": "gpt_neox.layers.0.attention.masked_bias",
}


def write(root: Path, layout: Layout) -> Path:
    """Make the directory of a layout; returns the path that a user would give."""
    tied = layout.tie != "untied"
    config = tiny_config(layout.family, tie_word_embeddings=tied)
    model = random_model(config)
    tensors = {k: v.detach().clone() for k, v in model.state_dict().items()}
    tensors = changed(tensors, layout)
    directory = root / "sub" if layout.place == "subfolder" else root / "model"
    directory.mkdir(parents=True)
    config.save_pretrained(directory)
    byte_tokenizer().save_pretrained(directory)
    write_files(directory, tensors, layout)
    write_beside(directory, tensors, layout)
    return linked(directory, root / "snapshots") if layout.place == "snapshot" else directory


def changed(tensors: Tensors, layout: Layout) -> Tensors:
    """The tensors that the files hold, by their names there."""
    prefix, matrix, table = WEIGHTS[layout.family]
    if layout.tie == "tied":
        del tensors["lm_head.weight"]
    elif layout.tie == "tied, same head":
        tensors["lm_head.weight"] = tensors[table].clone()
    elif layout.tie == "tied, own head":
        tensors["lm_head.weight"] = tensors[table].flip(0).contiguous()
    elif layout.tie == "tied, head only":
        tensors["lm_head.weight"] = tensors.pop(table)
    if layout.content == "old buffers":
        tensors[OLD[layout.family]] = torch.ones(3)
    elif layout.content == "further block":
        tensors[matrix.format(9)] = torch.ones(4, 4)
    elif layout.content == "adapter":
        tensors[matrix.format(0).replace(".weight", ".lora_A.weight")] = torch.ones(4, 4)
    elif layout.content == "lost matrix":
        del tensors[matrix.format(1)]
    elif layout.content == "other shape":
        tensors[matrix.format(1)] = tensors[matrix.format(1)][:32].clone()
    if layout.names == "bare":
        tensors = {name.removeprefix(f"{prefix}."): tensor for name, tensor in tensors.items()}
    if layout.content == "twice":
        tensors[matrix.format(0)] = tensors.get(matrix.format(0), torch.ones(2, 2)) + 1
    if layout.family == "neox_parallel" and "lm_head.weight" in tensors:
        tensors["embed_out.weight"] = tensors.pop("lm_head.weight")
    return tensors


def shard(directory: Path, tensors: Tensors, index: str, stem: str) -> None:
    weight_map = {}
    for number in range(3):
        own = dict(list(tensors.items())[number::3])
        file = f"{stem}-{number + 1:05}-of-00003.safetensors"
        save_file(own, directory / file, metadata={"format": "pt"})
        weight_map.update(dict.fromkeys(own, file))
    content = {"metadata": {"total_size": 1}, "weight_map": weight_map}
    (directory / index).write_text(json.dumps(content))


def write_files(directory: Path, tensors: Tensors, layout: Layout) -> None:
    others = {name: tensor + 1 for name, tensor in tensors.items()}
    if layout.files in ("single", "both", "stale"):
        save_file(tensors, directory / SINGLE, metadata={"format": "pt"})
    if layout.files == "sharded":
        shard(directory, tensors, INDEX, "model")
    elif layout.files == "both":
        shard(directory, others, INDEX, "model")
    elif layout.files == "stale":
        gone = {"metadata": {}, "weight_map": {"w": "model-00001-of-00009.safetensors"}}
        (directory / INDEX).write_text(json.dumps(gone))
    elif layout.files.startswith("named"):
        save_file(others, directory / SINGLE, metadata={"format": "pt"})
        named = "own.safetensors" if layout.files == "named" else "own.safetensors.index.json"
        if layout.files == "named":
            save_file(tensors, directory / named, metadata={"format": "pt"})
        else:
            shard(directory, tensors, named, "own")
        path = directory / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | {"transformers_weights": named}))


def write_beside(directory: Path, tensors: Tensors, layout: Layout) -> None:
    others = {name: tensor + 2 for name, tensor in tensors.items()}
    if layout.beside == "variants":
        save_file(others, directory / "model.fp16.safetensors", metadata={"format": "pt"})
        shard(directory, others, "model.safetensors.index.fp16.json", "model.fp16")
    elif layout.beside == "pickles":
        torch.save(others, directory / "pytorch_model.bin")


def linked(directory: Path, snapshots: Path) -> Path:
    """What the hub's cache makes of ``directory``: links to blobs."""
    snapshot = snapshots / "0123abcd"
    snapshot.mkdir(parents=True)
    for number, file in enumerate(sorted(directory.iterdir())):
        blob = snapshots / f"{number:040x}"
        file.rename(blob)
        (snapshot / file.name).symlink_to(blob)
    return snapshot


def loaded_by_transformers(path: Path) -> tuple[Tensors, bool] | None:
    """The tensors that transformers loads, and whether all are from the files and all are used."""
    loader: Any = AutoModelForCausalLM
    try:
        model, info = loader.from_pretrained(path, dtype=torch.float32, output_loading_info=True)
    except (RuntimeError, OSError, ValueError):
        return None
    kinds = ("missing_keys", "unexpected_keys", "mismatched_keys")
    return dict(model.state_dict()), not any(info[kind] for kind in kinds)


def accepted(load: Callable[[], Tensors]) -> Tensors | None:
    try:
        return load()
    except CheckpointError:
        return None


@pytest.mark.parametrize("layout", SAMPLED, ids=str)
def test_the_same_tensors_or_none(layout: Layout, tmp_path: Path) -> None:
    path = write(tmp_path, layout)
    expected = loaded_by_transformers(path)

    def quantized() -> Tensors:
        job = prepare(path, PLAN, NONE)
        checkpoint = job.checkpoint()
        return {name: job.read(checkpoint, name) for name in job.model.state_dict()}

    for load in (quantized, lambda: dict(locate(path).float_model(torch.float32).state_dict())):
        found = accepted(load)
        ambiguous = layout.content == "twice" and layout.names == "bare"
        if expected is None or not expected[1] or ambiguous:
            assert found is None or (ambiguous and load is not quantized)
        else:
            assert found is not None
            assert found.keys() == expected[0].keys()
            assert all(torch.equal(found[name], tensor) for name, tensor in expected[0].items())


WHOLE = [
    Layout("llama", files, "directory", "whole", tie, "variants", "all")
    for files, tie in (
        ("stale", "untied"),
        ("both", "tied"),
        ("sharded", "tied, same head"),
        ("named", "tied, own head"),
        ("single", "tied, head only"),
        ("named index", "untied"),
    )
]


@pytest.mark.parametrize("layout", WHOLE, ids=str)
def test_the_whole_way(layout: Layout, tmp_path: Path) -> None:
    """The output computes what transformers' model does, and says of its head what is true."""
    path = write(tmp_path, layout)
    loader: Any = AutoModelForCausalLM
    model = loader.from_pretrained(path, dtype=torch.float32)
    out = quantine.quantize(path, tmp_path / "out", PLAN, NONE).path
    found = quantine.load(out, arithmetic="exact")[0]
    ids = torch.arange(BOS).view(2, -1)[:, :60]
    with torch.no_grad():
        assert (model(ids).logits - found(ids).logits).abs().max() < 0.3
    config = json.loads((out / "config.json").read_text())
    assert config["tie_word_embeddings"] is (layout.tie in WHOLE_TIES)
    assert "own.safetensors" not in json.dumps(config)


WHOLE_TIES = ("tied", "tied, same head", "tied, head only")


def test_the_sample_has_every_kind() -> None:
    for field, values in zip(
        ("family", "files", "place", "names", "tie", "beside", "content"),
        (FAMILIES, FILES, PLACES, NAMES, TIES, BESIDE, CONTENTS),
        strict=True,
    ):
        assert {getattr(layout, field) for layout in SAMPLED} == set(values)
