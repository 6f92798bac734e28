"""ggml's types as grids, against the decoder of the package gguf; and which matrices get which."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
import transformers

import quantine
from quantine import Calibration, FormatError, Plan, PlanError, quantize
from quantine.core.arithmetic import ARITHMETICS, Arithmetic
from quantine.core.spec import QuantSpec
from quantine.core.transform_spec import Rotate
from quantine.formats.export import export
from quantine.formats.foreign.gguf.grid_types import GRID_TYPES, GridType, type_of
from quantine.formats.foreign.gguf.mixtures import (
    MIXTURES,
    STANDS_IN,
    Build,
    mixture_named,
    type_in,
)
from quantine.kernels import backend
from quantine.kernels.matrix import packed_matrix, product
from quantine.kernels.matrix.reference import multiply_reference
from quantine.methods.gptq import GPTQ
from quantine.methods.rtn import RTN
from quantine.plan.targets import check_target
from quantine.run.prepare import prepare
from quantine.run.target_plan import target_plan
from quantine.source.gguf.parts import read_parts
from samples import correlated_inputs, observed, random_weight
from tiny_models import logits_of, tiny_config

Tiny = Callable[[str], Path]
KINDS = pytest.mark.parametrize("kind", GRID_TYPES.values(), ids=GRID_TYPES)
NONE = Calibration(samples=0)
THIRD = 2
"""Number of the block that gets more bits of each run of three, in mixtures with the ending M."""


def decoded_by_gguf(kind: GridType, data: torch.Tensor) -> torch.Tensor:
    with np.errstate(all="ignore"):
        found = gguf.dequantize(data.numpy(), gguf.GGMLQuantizationType(kind.code))
    return torch.from_numpy(found)


@KINDS
def test_any_blocks_are_decoded_as_gguf_does(kind: GridType) -> None:
    generator = torch.Generator().manual_seed(kind.code)
    data = torch.randint(0, 256, (40, 3 * kind.nbytes), generator=generator, dtype=torch.uint8)
    matrix = kind.decode(data)
    wanted = decoded_by_gguf(kind, data)
    finite = torch.isfinite(wanted)
    assert finite.float().mean() > 0.5
    assert torch.equal(matrix.dequantize()[finite], wanted[finite])
    assert kind.holds(matrix)
    assert torch.equal(kind.encode(matrix), data)
    assert gguf.GGMLQuantizationType(kind.code).name == kind.name
    assert gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType(kind.code)] == (
        kind.weights,
        kind.nbytes,
    )
    assert type_of(kind.spec) is kind


@KINDS
def test_error_feedback_helps_in_the_grid(kind: GridType) -> None:
    weight, hessian = random_weight(24, 512), observed(correlated_inputs(512, 900))
    errors = []
    for solver in (RTN("mse"), GPTQ()):
        solved = solver(weight, hessian, kind.spec)
        assert torch.equal(decoded_by_gguf(kind, kind.encode(solved)), solved.dequantize())
        errors.append(hessian.error_energy(solved.dequantize() - weight))
    assert errors[1] < 0.8 * errors[0]


@pytest.mark.parametrize("name", ["Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0"])
def test_the_search_beats_the_rule_of_ggml(name: str) -> None:
    kind, weight = GRID_TYPES[name], random_weight(64, 256)
    theirs = gguf.quantize(weight.numpy(), gguf.GGMLQuantizationType(kind.code))
    before = (decoded_by_gguf(kind, torch.from_numpy(theirs)) - weight).square().sum()
    found = RTN("mse")(weight, None, kind.spec).dequantize()
    assert (found - weight).square().sum() < before


def test_matrices_of_other_grids_are_not_held() -> None:
    weight, kind = random_weight(4, 256), GRID_TYPES["Q4_0"]
    assert not kind.holds(RTN()(weight, None, QuantSpec(4, 32)))
    assert not kind.holds(RTN()(weight, None, QuantSpec(4, 64, True)))
    assert not kind.holds(RTN()(weight, None, GRID_TYPES["Q4_1"].spec))
    assert not GRID_TYPES["Q4_K"].holds(RTN()(weight, None, GRID_TYPES["Q4_1"].spec))


@pytest.mark.parametrize("name", MIXTURES)
def test_rows_that_no_type_divides_stay_floats(name: str) -> None:
    mixture, build = mixture_named(name, "llama"), Build("llama", 8, 1)
    for width, whole in ((512, True), (96, True), (40, False)):
        found = type_in(mixture, "blk.0.attn_q.weight", width, build, is_head=False)
        assert (found is not None) == whole
        if found is not None:
            assert width % found.weights == 0
            stands_in = STANDS_IN.get(mixture.most, mixture.most)
            assert found.name == (mixture.most if width == 512 else stands_in)


def test_some_matrices_of_mixtures_have_more_bits() -> None:
    assert types_of("Q4_K_M", "ffn_down", Build("llama", 16, 1)) == [
        "Q6_K" if i < 2 or i >= 14 or (i - 2) % 3 == THIRD else "Q4_K" for i in range(16)
    ]
    mixture = mixture_named("Q4_K_M", "llama")
    head = type_in(mixture, "output.weight", 512, Build("llama", 16, 1), is_head=True)
    assert head is not None
    assert head.name == "Q6_K"


def types_of(name: str, leaf: str, build: Build) -> list[str]:
    """Names of the types of the matrices ``leaf`` of all blocks."""
    mixture = mixture_named(name, build.architecture)
    found = [
        type_in(mixture, f"blk.{i}.{leaf}.weight", 512, build, is_head=False)
        for i in range(build.blocks)
    ]
    return [kind.name for kind in found if kind is not None]


@pytest.mark.parametrize("leaf", ["attn_v", "attn_qkv"])
@pytest.mark.parametrize(
    ("name", "build", "wanted"),
    [
        ("Q2_K", Build("llama", 8, 3), ["Q3_K"] * 8),
        ("Q2_K", Build("llama", 8, 4), ["Q4_K"] * 8),
        ("Q2_K", Build("falcon", 8, 71), ["Q4_K"] * 8),
        ("Q3_K_S", Build("llama", 8, 8), ["Q3_K"] * 8),
        ("Q3_K_M", Build("llama", 8, 8), ["Q5_K"] * 2 + ["Q4_K"] * 6),
        ("Q4_K_S", Build("phi3", 8, 4), ["Q5_K"] * 4 + ["Q4_K"] * 4),
        ("Q5_K_M", Build("phi3", 8, 1), ["Q6_K", *["Q5_K", "Q5_K", "Q6_K"] * 2, "Q6_K"]),
        ("Q3_K_S", Build("llama", 80, 8), ["Q5_K"] * 80),
        ("Q3_K_S", Build("llama", 80, 1), ["Q3_K"] * 80),
        ("Q3_K_S", Build("qwen2", 80, 8), ["Q5_K"] * 80),
        ("Q3_K_S", Build("qwen3", 80, 8), ["Q3_K"] * 80),
    ],
)
def test_values_get_the_types_of_llama_cpp(
    name: str, build: Build, wanted: list[str], leaf: str
) -> None:
    assert types_of(name, leaf, build) == wanted


def test_falcon_has_types_of_its_own() -> None:
    build = Build("falcon", 16, 4)
    for name, mixture in MIXTURES.items():
        assert types_of(name, "attn_output", build) == [mixture.most] * 16
        head = type_in(mixture_named(name, "falcon"), "output.weight", 512, build, is_head=True)
        assert head is GRID_TYPES["Q8_0"]
    assert types_of("Q4_K_S", "ffn_down", build) == ["Q4_K"] * 16
    thirds = [i < 2 or i >= 14 or (i - 2) % 3 == THIRD for i in range(1, 16)]
    for name, first, more, others in (
        ("Q3_K_M", "Q5_K", "Q4_K", "Q3_K"),
        ("Q4_K_M", "Q6_K", "Q5_K", "Q4_K"),
    ):
        wanted = [first, *(more if third else others for third in thirds)]
        assert types_of(name, "ffn_down", build) == wanted


def test_heads_that_are_shared_are_counted() -> None:
    for name, changes, shared in (
        ("llama", {"num_key_value_heads": 1}, 4),
        ("llama", {}, 2),
        ("gpt2", {}, 1),
        ("falcon_old", {}, 4),
    ):
        assert Build.of("", tiny_config(name, **changes), 1).shared == shared


@pytest.mark.parametrize("target", ["llama.cpp:Q4_0", "vllm"])
def test_a_head_that_a_rotation_parts_from_the_table_is_that_of_the_target(
    target: str, tiny: Tiny, short: Calibration
) -> None:
    plan = target_plan(tiny("llama_tied"), target, (Rotate(),))
    apart = target_plan(tiny("llama"), target)
    roles = {
        decision.layer.role: decision for decision in prepare(tiny("llama"), apart, short).decisions
    }
    assert plan.transforms == (Rotate(),)
    for decision in prepare(tiny("llama_tied"), plan, short).decisions:
        if decision.layer.role != "block":
            assert decision.scheme == roles[decision.layer.role].scheme


@pytest.mark.parametrize("target", ["Q4_0", "Q4_K_M", "Q2_K"])
def test_solved_and_exported(target: str, tiny: Tiny, short: Calibration, tmp_path: Path) -> None:
    plan = target_plan(tiny("llama_tied"), f"llama.cpp:{target}")
    job = prepare(tiny("llama_tied"), plan, short)
    check_target(f"llama.cpp:{target}", job)
    out = quantize(tiny("llama_tied"), tmp_path / "out", plan, short).path
    exported = export(out, tmp_path / "gguf", "gguf")
    assert not exported.converted
    wanted = {
        gguf.GGMLQuantizationType[type_of(decision.scheme.spec).name]  # type: ignore[union-attr]
        for decision in job.decisions
        if decision.scheme is not None
    }
    parts = read_parts(exported.path / "model.gguf")
    assert {t.type for part in parts for t in part.tensors if len(t.shape) == 2} == wanted
    own = logits_of(quantine.load(out, "float32", arithmetic="exact")[0])
    floats = export(out, tmp_path / "float", "float").path
    decoded = transformers.AutoModelForCausalLM.from_pretrained(floats, dtype=torch.float32)
    torch.testing.assert_close(logits_of(decoded), own)
    with pytest.raises(FormatError, match="does not fit into layout gptq"):
        export(out, tmp_path / "gptq", "gptq")


def test_requests_that_name_no_target(tiny: Tiny) -> None:
    with pytest.raises(PlanError, match=r"no target llama.cpp:IQ2_XS: .* one of Q4_1, "):
        target_plan(tiny("llama"), "llama.cpp:IQ2_XS")
    for nothing in ("", " "):
        with pytest.raises(PlanError, match=r"^llama\.cpp: lacks the type: .* one of Q4_1, "):
            target_plan(tiny("llama"), f"llama.cpp:{nothing}")
    with pytest.raises(FormatError, match="of model type opt are not written"):
        target_plan(tiny("opt"), "llama.cpp:Q4_0")
    plan = target_plan(tiny("llama"), "vllm", method="rtn")
    job = prepare(tiny("llama"), plan, NONE)
    check_target("vllm", job)


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({"signed": True, "bits": 4, "group_size": 32}, "signed is for symmetric grids"),
        ({"minimum": True, "bits": 4}, "minimum needs zero_bits"),
        ({"stat_axis": "groups", "bits": 4}, "stat_axis groups belongs to"),
        ({"signed": True, "sym": True, "scale_bits": 4}, "stat_axis groups belongs to"),
        ({"signed": True, "sym": True, "group_axis": "out"}, "need group_axis in"),
        ({"signed": True, "sym": True, "bits": 3, "group_size": 32}, "no format holds such a grid"),
        ({**GRID_TYPES["Q4_0"].spec.as_dict(), "method": "spqr"}, "fits no grids that are signed"),
        (
            {**GRID_TYPES["Q4_0"].spec.as_dict(), "method": "gptq", "groups": "refit"},
            "use gptq with groups: static, or rtn",
        ),
    ],
)
def test_grids_that_cannot_be(fields: dict[str, object], reason: str) -> None:
    with pytest.raises(PlanError, match=reason):
        Plan.from_dict({"rules": [{"match": "@blocks", "method": "rtn", **fields}]})


@pytest.mark.parametrize("name", ["Q4_0", "Q8_0", "Q5_1", "Q3_K"])
@pytest.mark.parametrize("arithmetic", ARITHMETICS)
def test_products_with_signed_scales(name: str, arithmetic: Arithmetic) -> None:
    qtensor = RTN("mse")(random_weight(48, 256), None, GRID_TYPES[name].spec)
    matrix = packed_matrix(qtensor)
    assert (matrix is None) == (name in {"Q5_1", "Q3_K"} or not is_native())
    if matrix is None:
        return
    assert bool((qtensor.grid.scales() < 0).any())
    x = random_weight(3, 256)
    wanted = multiply_reference(qtensor, x, arithmetic)
    torch.testing.assert_close(product(matrix, x, arithmetic), wanted, atol=1e-5, rtol=1e-4)


def is_native() -> bool:
    return backend.of(torch.empty(0)) == "native"
