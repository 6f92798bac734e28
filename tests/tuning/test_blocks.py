"""Blocks that are tuned one by one: codes move, errors fall, and what became worse is put back."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from quantine.core.tuning_spec import Tuning
from quantine.families import family_of
from quantine.families.layers import find_layers
from quantine.plan.plan import Plan
from quantine.tuning.block_stream import BlockStream
from quantine.tuning.blocks import tune_blocks
from quantine.tuning.kept_blocks import KeptBlocks
from quantine.tuning.segments import TuningText
from quantine.tuning.student import Student, sharing
from tiny_models import build, some_tokens, tiny_config

TEXT = TuningText(some_tokens(64, 64), some_tokens(64, 8), some_tokens(64, 16, seed=6))
TUNING = Tuning(segments=8, block_steps=80)


def float_model(name: str, directory: Path) -> Any:
    build(tiny_config(name), directory)
    return AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()


def student_of(model: Any, bits: int) -> Student:
    scheme = Plan.preset("rtn", bits=bits, group_size=32).rules[0].scheme
    layers = [one for one in find_layers(model, family_of(model.config)) if one.role == "block"]
    matrices = {one: scheme.solver(one.read(model), None, scheme.spec) for one in layers}
    packed = {one.stored_name for one in layers}
    floats = {n: v.detach() for n, v in model.state_dict().items() if n not in packed}
    return Student(model, sharing(model), matrices, floats, torch.float32)


def _matrices(student: Student) -> dict[Any, Any]:
    return {layer: matrix.qtensor() for layer, matrix in student.whole.matrices.items()}


@pytest.mark.parametrize("name", ["llama", "falcon_alibi", "gemma2"])
def test_a_stream_is_what_the_model_computes(name: str, tmp_path: Path) -> None:
    model = float_model(name, tmp_path / "model")
    family, tokens = family_of(model.config), some_tokens(24, 3)
    stream = BlockStream(model, family, tokens, torch.float32)
    with torch.no_grad():
        states = model(input_ids=tokens, output_hidden_states=True).hidden_states
    assert torch.allclose(stream.hidden, states[0], atol=1e-6)
    for index in range(len(states) - 2):  # the last one has passed a norm
        stream.hidden = stream.outputs(index)
        assert torch.allclose(stream.hidden, states[index + 1], atol=1e-5)


def test_tuned_blocks_put_out_what_the_float_ones_do(tmp_path: Path) -> None:
    model = float_model("llama", tmp_path / "model")
    student, family = student_of(model, 3), family_of(model.config)
    before, start = student.divergence(TEXT.judges), student.whole.snapshot()
    notes: list[str] = []
    tune_blocks(student, family, TEXT, TUNING, KeptBlocks(tmp_path / "kept"), notes.append)
    assert len(notes) == 2
    assert student.divergence(TEXT.judges) < 0.9 * before
    for layer, matrix in student.whole.matrices.items():
        computes_with = layer.part_of(student.model.get_parameter(layer.stored_name))
        assert torch.equal(matrix.qtensor().dequantize(), computes_with)
    after = student.whole.snapshot()
    moved = torch.cat([(a != b).flatten() for a, b in zip(start.codes, after.codes, strict=True)])
    assert 0.001 < float(moved.float().mean()) < 0.3


def test_codes_of_unknown_weights_begin_in_the_middle(tmp_path: Path) -> None:
    model = float_model("llama", tmp_path / "model")
    student = student_of(model, 3)
    part = student.block(0, family_of(model.config))
    (first, _), *others = part.matrices.items()
    changed = Student(model, sharing(model), _matrices(student), {}, torch.float32, [first.name])
    tuned = changed.block(0, family_of(model.config))
    changed.free_codes(tuned)
    starts = {layer: matrix.numbers["codes"].start for layer, matrix in tuned.matrices.items()}
    assert torch.equal(starts[first], starts[first].round())
    assert all(not torch.equal(starts[layer], starts[layer].round()) for layer, _ in others)
    assert all(torch.equal(starts[layer].round(), m.codes) for layer, m in tuned.matrices.items())


def test_blocks_that_became_worse_are_put_back(tmp_path: Path) -> None:
    model = float_model("llama", tmp_path / "model")
    student, family = student_of(model, 8), family_of(model.config)
    start = student.whole.snapshot()
    weights = [p.detach().clone() for p in student.whole.parameters()]
    wild = Tuning(segments=1, block_steps=2, rate=0.1)
    tune_blocks(student, family, TEXT, wild, KeptBlocks(tmp_path / "kept"), lambda _: None)
    after = student.whole.snapshot()
    for kind in ("leaves", "codes"):
        pairs = zip(getattr(start, kind), getattr(after, kind), strict=True)
        assert all(torch.equal(a, b) for a, b in pairs)
    assert all(torch.equal(a, b) for a, b in zip(weights, student.whole.parameters(), strict=True))


def test_blocks_whose_numbers_are_lost_are_put_back(tmp_path: Path) -> None:
    model = float_model("llama", tmp_path / "model")
    student, family = student_of(model, 8), family_of(model.config)
    first = student.block(0, family)
    start = first.snapshot()

    def lose(gradient: torch.Tensor) -> torch.Tensor:
        return gradient * float("nan")

    student.model.get_parameter("model.layers.0.input_layernorm.weight").register_hook(lose)
    tuning = Tuning(segments=1, block_steps=2)
    said: list[str] = []
    tune_blocks(student, family, TEXT, tuning, KeptBlocks(tmp_path / "kept"), said.append)
    after = first.snapshot()
    assert all(torch.equal(a, b) for a, b in zip(start.leaves, after.leaves, strict=True))
    assert all(torch.equal(a, b) for a, b in zip(start.codes, after.codes, strict=True))
    assert all(leaf.isfinite().all() for leaf in student.whole.leaves())
    assert "nan" not in "".join(said)


def test_norms_of_a_block_are_tuned_with_it(tmp_path: Path) -> None:
    model = float_model("llama", tmp_path / "model")
    family = family_of(model.config)
    part = student_of(model, 4).block(1, family)
    assert len(part.matrices) == 7
    assert {name.removeprefix("model.layers.1.") for name in part.vectors} == {
        "input_layernorm.weight",
        "post_attention_layernorm.weight",
    }
