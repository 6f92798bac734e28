"""AdaDim: the axis each matrix gets, against losses computed with modules of transformers alone."""

from __future__ import annotations

import copy
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import oracles
import quantine
from quantine import AdaDim, Calibration, Plan, PlanError, cli
from quantine.calibrate.segments import calibration_segments
from quantine.calibrate.submodules import judged_module
from quantine.families.family import Family
from quantine.families.gpt2 import GPT2
from quantine.families.llama import LLAMA
from quantine.families.opt import OPT
from quantine.formats.inventory import inventory
from quantine.kernels.matrix import FEW_ROWS
from quantine.plan.rules import Rule
from tiny_models import byte_tokenizer, matrices_of, with_weights

Tiny = Callable[[str], Path]
GROUP, BITS = 16, 3
TEXTBOOK = Plan.preset(
    "adadim", inner="rtn", clip="minmax", bits=BITS, group_size=GROUP, float_inputs=True
)


@pytest.fixture(scope="module")
def chosen(tiny: Tiny, short: Calibration, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model whose matrices chose an axis as in the paper."""
    out = tmp_path_factory.mktemp("adadim") / "out"
    return quantine.quantize(tiny("llama"), out, TEXTBOOK, short).path


def layers_of(directory: Path) -> list[dict[str, Any]]:
    layers: list[dict[str, Any]] = json.loads(
        (directory / "quantine_report.json").read_text(encoding="utf-8")
    )["layers"]
    return layers


def rounded(weight: Tensor, axis: str) -> Tensor:
    """The textbook's rounding along an axis."""
    lines = weight.T if axis == "out" else weight
    values = oracles.rtn(lines.double().numpy(), BITS, GROUP, False).values
    return torch.from_numpy(values.T if axis == "out" else values).float()


def recorded(module: nn.Module, run: Callable[[], object]) -> tuple[Any, Any]:
    calls: list[tuple[Any, Any]] = []
    handle = module.register_forward_pre_hook(
        lambda _, args, kwargs: calls.append((args, kwargs)), with_kwargs=True
    )
    with torch.no_grad():
        run()
    handle.remove()
    return calls[0]


def output(module: nn.Module, call: tuple[Any, Any]) -> Tensor:
    with torch.no_grad():
        found = module(*call[0], **call[1])
    return found[0] if isinstance(found, tuple) else found


def textbook_losses(model: Any, tokens: Tensor, index: int) -> dict[str, dict[str, float]]:
    """Losses of both axes, matrix after matrix of a block; winners stay rounded in their part."""
    block = copy.deepcopy(model.model.layers[index])
    parts = {
        "self_attn": ("q_proj", "k_proj", "v_proj"),
        "mlp": ("gate_proj", "up_proj"),
    }
    original = model.model.layers[index]
    losses: dict[str, dict[str, float]] = {}
    for part, names in parts.items():
        call = recorded(
            original.get_submodule(part), lambda: model(input_ids=tokens, use_cache=False)
        )
        module = block.get_submodule(part)
        last = next(name for name, _ in module.named_children() if name in {"o_proj", "down_proj"})
        last_call = recorded(
            original.get_submodule(f"{part}.{last}"),
            lambda: model(input_ids=tokens, use_cache=False),
        )
        for name in (*names, last):
            scope, inputs = (
                (module, call) if name != last else (module.get_submodule(last), last_call)
            )
            linear = module.get_submodule(name)
            before, weight = output(scope, inputs), linear.weight.detach().clone()
            found = {}
            for axis in ("in", "out"):
                linear.weight = nn.Parameter(rounded(weight, axis), requires_grad=False)
                change = (output(scope, inputs) - before).double().square().sum()
                found[axis] = float(change / before.double().square().sum())
            best = "in" if found["in"] <= found["out"] else "out"
            linear.weight = nn.Parameter(rounded(weight, best), requires_grad=False)
            losses[f"model.layers.{index}.{part}.{name}"] = found
    return losses


def test_losses_and_axes_are_the_textbooks(chosen: Path, tiny: Tiny, short: Calibration) -> None:
    segments = calibration_segments(short, byte_tokenizer(), 300, None)
    model = with_weights(tiny("llama"), {})
    expected: dict[str, dict[str, float]] = {}
    for index in range(len(model.model.layers)):
        expected.update(textbook_losses(model, segments, index))
    layers = layers_of(chosen)
    assert sorted(expected) == sorted(layer["name"] for layer in layers)
    axes = set()
    for layer in layers:
        losses = expected[layer["name"]]
        found = {one["group_axis"]: one["loss"] for one in layer["choice"]["choices"]}
        # Scales are rounded to float16 here and in the oracle; sums of floats differ.
        assert found == pytest.approx(losses, rel=1e-3), layer["name"]
        assert layer["scheme"]["group_axis"] == min(losses, key=lambda axis: losses[axis])
        least, most = sorted(found.values())
        assert layer["choice"]["margin"] == pytest.approx(most / least - 1, abs=1e-6)
        assert layer["choice"]["objective"] == "output"
        axes.add(layer["scheme"]["group_axis"])
    assert axes == {"in", "out"}


def test_what_was_decided_in_the_same_block_counts_for_neither_choice(
    tiny: Tiny, short: Calibration, tmp_path: Path
) -> None:
    # OPT has no MLP module: fc1 is judged by the whole block, of which attention is a part.
    out = quantine.quantize(tiny("opt"), tmp_path / "out", TEXTBOOK, short).path
    layers = {layer["name"]: layer for layer in layers_of(out)}
    segments = calibration_segments(short, byte_tokenizer(), 300, None)
    model = with_weights(tiny("opt"), {})
    for index, original in enumerate(model.model.decoder.layers):
        inside = f"model.decoder.layers.{index}."
        call = recorded(original, lambda: model(input_ids=segments, use_cache=False))
        block = copy.deepcopy(original)
        for name in ("q_proj", "k_proj", "v_proj", "out_proj"):
            linear = block.self_attn.get_submodule(name)
            axis = layers[f"{inside}self_attn.{name}"]["scheme"]["group_axis"]
            linear.weight.data = rounded(linear.weight.data, axis)
        before, weight = output(block, call), block.fc1.weight.data.clone()
        for choice in layers[f"{inside}fc1"]["choice"]["choices"]:
            block.fc1.weight.data = rounded(weight, choice["group_axis"])
            change = (output(block, call) - before).double().square().sum()
            expected = float(change / before.double().square().sum())
            assert choice["loss"] == pytest.approx(expected, rel=1e-3)


def test_choices_are_told_apart_by_whatever_differs(
    tiny: Tiny, short: Calibration, tmp_path: Path
) -> None:
    choices = [{"clip": "minmax"}, {"clip": "mse"}]
    rule = {"match": "*.0.mlp.up_proj", "method": "adadim", "inner": "rtn", "choices": choices}
    plan = Plan.from_dict({"rules": [{**rule, "group_size": 16}]})
    (layer,) = layers_of(quantine.quantize(tiny("llama"), tmp_path / "out", plan, short).path)
    assert [one["clip"] for one in layer["choice"]["choices"]] == ["minmax", "mse"]


def test_what_is_stored_is_the_textbooks_rounding(chosen: Path, tiny: Tiny) -> None:
    model, _ = quantine.load(chosen)
    exact = with_weights(tiny("llama"), {})
    for layer in layers_of(chosen):
        weight = exact.get_submodule(layer["name"]).weight.detach()
        found = model.get_submodule(layer["name"]).dequantize()
        expected = rounded(weight, layer["scheme"]["group_axis"])
        same = np.isclose(found.numpy(), expected.numpy(), atol=1e-6)
        assert same.mean() > 0.999, layer["name"]  # ties


def test_logits_are_those_of_the_decoded_matrices(chosen: Path, tiny: Tiny) -> None:
    model, _ = quantine.load(chosen, arithmetic="exact")
    along_outputs = [
        layer["name"] for layer in layers_of(chosen) if layer["scheme"]["group_axis"] == "out"
    ]
    decoded = with_weights(
        tiny("llama"),
        {name: model.get_submodule(name).dequantize() for name in matrices_of(tiny("llama"))},
    )
    for name in along_outputs:
        module, linear = model.get_submodule(name), decoded.get_submodule(name)
        generator = torch.Generator().manual_seed(0)
        x = torch.randn(FEW_ROWS + 1, linear.in_features, generator=generator)
        assert torch.equal(module(x), linear(x)), name  # weights are decoded
        torch.testing.assert_close(module(x[:5]), linear(x[:5]))  # from codes
    tokens = torch.arange(24).view(2, 12)
    with torch.no_grad():
        torch.testing.assert_close(
            model(input_ids=tokens).logits, decoded(input_ids=tokens).logits, atol=2e-4, rtol=1e-4
        )


def test_float_inputs_see_no_quantized_matrix(
    chosen: Path, tiny: Tiny, short: Calibration, tmp_path: Path
) -> None:
    alone = [layer for layer in layers_of(chosen) if ".layers.1." in layer["name"]]
    rule = {"match": "*.1.*", **TEXTBOOK.rules[0].as_dict()} | {"match": "*.1.*"}
    plan = Plan.from_dict({"rules": [rule], "float_inputs": True})
    result = quantine.quantize(tiny("llama"), tmp_path / "out", plan, short)
    for one, other in zip(alone, result.report["layers"], strict=True):
        assert one["choice"] == other["choice"]
        assert one["output_error"] == other["output_error"]


@pytest.mark.parametrize("inner", ["gptq", "spqr"])
def test_the_hessian_objective_takes_the_least_error_of_all_choices(
    inner: str, tiny: Tiny, short: Calibration, tmp_path: Path
) -> None:
    fields: dict[str, Any] = {"bits": 3, "group_size": GROUP, "float_inputs": True}
    fixed = {
        axis: quantine.quantize(
            tiny("llama"), tmp_path / axis, Plan.preset(inner, group_axis=axis, **fields), short
        ).report["layers"]
        for axis in ("in", "out")
    }
    plan = Plan.preset("adadim", inner=inner, objective="hessian", **fields)
    result = quantine.quantize(tiny("llama"), tmp_path / "ada", plan, short)
    for layer, one, other in zip(result.report["layers"], fixed["in"], fixed["out"], strict=True):
        losses = [choice["loss"] for choice in layer["choice"]["choices"]]
        assert losses == [one["output_error"], other["output_error"]]
        assert layer["output_error"] == min(losses)


def test_a_resumed_run_makes_the_same_choices(
    chosen: Path, tiny: Tiny, short: Calibration, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from quantine.run.store import RunStore

    commit, out = RunStore.commit, tmp_path / "out"

    def stop(store: RunStore, name: str, *rest: Any) -> None:
        commit(store, name, *rest)
        if name.startswith("block-"):
            raise KeyboardInterrupt

    monkeypatch.setattr(RunStore, "commit", stop)
    with pytest.raises(KeyboardInterrupt):
        quantine.quantize(tiny("llama"), out, TEXTBOOK, short)
    monkeypatch.undo()
    quantine.quantize(tiny("llama"), out, TEXTBOOK, short, resume=True)
    for name in ("model.safetensors", "config.json"):
        assert (out / name).read_bytes() == (chosen / name).read_bytes()


def test_what_format_version_1_wrote_still_loads(
    tiny: Tiny, packed: Callable[[str, str], Path], tmp_path: Path
) -> None:
    out = Path(shutil.copytree(packed("llama", "gptq"), tmp_path / "out"))
    config = json.loads((out / "config.json").read_text(encoding="utf-8"))
    config["quantization_config"]["format_version"] = 1
    for scheme in config["quantization_config"]["schemes"]:
        assert scheme.pop("group_axis") == "in"
    (out / "config.json").write_text(json.dumps(config), encoding="utf-8")
    old, new = quantine.load(out)[0], quantine.load(packed("llama", "gptq"))[0]
    for name in matrices_of(tiny("llama")):
        one, other = (model.get_submodule(name).dequantize() for model in (old, new))
        assert torch.equal(one, other)
    assert inventory(out)["totals"] == inventory(packed("llama", "gptq"))["totals"] | {
        "header_bytes": inventory(out)["totals"]["header_bytes"]
    }


def test_a_loud_input_decides_for_groups_along_outputs(
    tiny: Tiny, short: Calibration, tmp_path: Path
) -> None:
    exact = with_weights(tiny("llama"), {})
    scaled: dict[str, Tensor] = {}
    for index in range(2):
        name = f"model.layers.{index}.mlp"
        up, down = (
            exact.get_submodule(f"{name}.{end}_proj").weight.clone() for end in ("up", "down")
        )
        up[::40] /= 30
        down[:, ::40] *= 30
        scaled |= {f"{name}.up_proj": up, f"{name}.down_proj": down}
    loud = tmp_path / "loud"
    model = with_weights(tiny("llama"), scaled)
    model.save_pretrained(loud)
    byte_tokenizer().save_pretrained(loud)
    result = quantine.quantize(loud, tmp_path / "out", TEXTBOOK, short)
    fixed = quantine.quantize(
        loud, tmp_path / "in", Plan.preset("rtn", bits=BITS, group_size=GROUP), short
    )
    for layer, other in zip(result.report["layers"], fixed.report["layers"], strict=True):
        if layer["name"].endswith("down_proj"):
            assert layer["scheme"]["group_axis"] == "out"
            assert layer["choice"]["margin"] > 1
            assert layer["output_error"] < 0.5 * other["output_error"]


PARTS: tuple[tuple[Family, str, str], ...] = (
    (LLAMA, "self_attn.v_proj", "self_attn"),
    (LLAMA, "self_attn.o_proj", "self_attn.o_proj"),
    (LLAMA, "mlp.up_proj", "mlp"),
    (LLAMA, "mlp.down_proj", "mlp.down_proj"),
    (OPT, "self_attn.q_proj", "self_attn"),
    (OPT, "fc1", ""),
    (OPT, "fc2", "fc2"),
    (GPT2, "attn.c_attn", "attn"),
)


@pytest.mark.parametrize(("family", "path", "part"), PARTS)
def test_a_matrix_is_judged_by_what_holds_it_and_others_after_it(
    family: Family, path: str, part: str
) -> None:
    assert judged_module(family.groups_in(0), path) == part


def test_inspect_shows_losses_and_margin(chosen: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["inspect", str(chosen), "--layers"]) == 0
    shown = capsys.readouterr().out
    layer = layers_of(chosen)[0]
    losses = [one["loss"] for one in layer["choice"]["choices"]]
    line = next(line for line in shown.splitlines() if line.startswith(layer["name"]))
    assert f"g16 {losses[0]:.3g}, g16 out {losses[1]:.3g}" in line
    assert f"{layer['choice']['margin']:.1%}" in line
    assert "rtn 3 bit g16 out asym, dense" in shown


class TestPlan:
    """How plans say it."""

    def test_both_axes_are_the_default_choices(self) -> None:
        plan = Plan.from_dict(
            {"rules": [{"match": "@blocks", "method": "adadim", "inner": "gptq", "bits": 3}]}
        )
        scheme = plan.rules[0].scheme
        assert isinstance(scheme, AdaDim)
        assert scheme.objective == "output"
        assert [choice.spec.group_axis for choice in scheme.choices] == ["in", "out"]
        assert {choice.method for choice in scheme.choices} == {"gptq"}
        assert Plan.from_dict(plan.as_dict()) == plan

    def test_choices_may_differ_in_anything(self) -> None:
        rule = {
            "match": "@blocks",
            "method": "adadim",
            "inner": "spqr",
            "objective": "hessian",
            "bits": 3,
            "choices": [{"group_size": 32}, {"group_axis": "out", "bits": 2, "scale_bits": 16}],
        }
        scheme = Plan.from_dict({"rules": [rule]}).rules[0].scheme
        assert isinstance(scheme, AdaDim)
        first, second = (choice.spec for choice in scheme.choices)
        assert (first.bits, first.group_size, first.group_axis) == (3, 32, "in")
        assert (second.bits, second.scale_bits, second.group_axis) == (2, 16, "out")

    @pytest.mark.parametrize(
        ("fields", "said"),
        [
            ({}, "adadim needs `inner`, one of rtn, gptq, spqr"),
            ({"inner": "awq"}, "method must be one of rtn, gptq, spqr, keep, not 'awq'"),
            (
                {"inner": "rtn", "choices": [{"method": "keep", "bits": None}]},
                "takes no parameters",
            ),
            (
                {"choices": [{"method": "keep"}]},
                "method 'keep' is no choice",
            ),
            ({"inner": "rtn", "objective": "taste"}, "objective must be one of output, hessian"),
            ({"inner": "rtn", "choices": []}, "choices must not be empty"),
            ({"inner": "rtn", "choices": [3]}, "choices must be a list of mappings"),
            ({"inner": "rtn", "group_axis": "both"}, "group_axis"),
        ],
    )
    def test_what_makes_no_sense_is_refused(self, fields: dict[str, Any], said: str) -> None:
        if fields.get("group_axis"):
            fields = {**fields, "choices": [{}]}
        with pytest.raises(PlanError, match=said):
            Plan.from_dict({"rules": [{"match": "@blocks", "method": "adadim", **fields}]})

    def test_choices_that_do_not_tile_are_left_out(self, tiny: Tiny, short: Calibration) -> None:
        from quantine.run.prepare import prepare

        # 64 divides neither the 32 outputs of keys and values nor the 96 channels of the MLP.
        plan = Plan.preset("adadim", inner="rtn", bits=3, group_size=64)
        job = prepare(tiny("llama"), plan, short)
        for decision in job.scheme_layers():
            layer, scheme = decision.layer, decision.scheme
            along_inputs, along_outputs = layer.in_features % 64 == 0, layer.out_features % 64 == 0
            assert len(decision.choices) == (2 if along_inputs and along_outputs else 0)
            assert scheme is not None
            assert scheme.spec.group_axis == ("in" if along_inputs else "out")

    def test_the_head_has_no_inputs_to_judge_by(self, tiny: Tiny, short: Calibration) -> None:
        from quantine.run.prepare import prepare

        rule = {"match": "lm_head", "method": "adadim", "inner": "rtn", "group_size": 4}
        with pytest.raises(PlanError, match="only by methods that need no inputs, not by adadim"):
            prepare(tiny("llama"), Plan.from_dict({"rules": [rule]}), short)

    def test_a_rule_may_hold_it(self) -> None:
        adadim = Plan.preset("gptq-ada-3bit").rules[0].scheme
        assert Plan((Rule("@blocks", adadim),)).rules[0].as_dict()["method"] == "adadim"
