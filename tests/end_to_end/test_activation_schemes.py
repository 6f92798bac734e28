"""Rounded activations from a plan to a loaded directory."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import quantine
from other_process import logits_elsewhere
from quantine import Calibration, Plan, quantize
from quantine.activations.grids import StaticGrid, TokenGrid
from quantine.activations.modules import AttentionSites, PermutedNorm
from quantine.cli import main
from quantine.errors import CalibrationError, FamilyError, PlanError
from quantine.eval.evaluate import evaluate
from quantine.kernels.integer import levels
from quantine.kernels.integer.cpu import SCALAR
from quantine.rptq.clusters import Clusters
from quantine.run.store import RunStore
from quantine.runtime.modules import QuantLinear
from tiny_models import byte_tokenizer, stored_tensors

Tiny = Callable[[str], Path]
# Like the calibration text: static grids cover nothing else.
TOKENS = torch.tensor([byte_tokenizer()("Line 33: 22 apples and 10 pears.\nLine 34").input_ids])
NAMES = ("opt", "llama", "gemma2", "qwen3", "phi3", "neox_parallel")
CLUSTERS = (8, 2, 2, 8, 8)


def plan_of(scheme: str, **parameters: Any) -> Plan:
    plan = Plan.scheme(scheme, arithmetic="exact", **parameters)
    assert plan.activations is not None
    return replace(plan, activations=replace(plan.activations, clusters=CLUSTERS))


def budget_with(scheme: str) -> Plan:
    """The activations of ``scheme``, and weights whose bits a budget decides."""
    activations = plan_of(scheme).activations
    # Groups along outputs, or of inputs in several clusters, are no operands of integer products.
    plan = Plan.budget(4.5, ("in",) if scheme.endswith("-token") else ("in", "out"))
    return replace(plan, arithmetic="exact", activations=activations, loss_weights=True)


@torch.no_grad()
def logits_of(model: Any) -> Tensor:
    logits: Tensor = model(input_ids=TOKENS).logits
    return logits


def distance(model: Any, floats: Any) -> float:
    found, expected = logits_of(model).log_softmax(-1), logits_of(floats).log_softmax(-1)
    return float((expected.exp() * (expected - found)).sum(-1).mean())


def float_model(directory: Path) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(directory).eval()


@pytest.mark.parametrize("name", NAMES)
def test_eight_bit_activations_are_near_the_float_model(
    name: str, tiny: Tiny, short: Calibration, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    quantize(tiny(name), out, plan_of("W8A8"), short)
    model, _ = quantine.load(out)
    floats = float_model(tiny(name))
    assert 0 < distance(model, floats) < 0.15
    grids = [m for m in model.modules() if isinstance(m, StaticGrid)]
    blocks = model.config.num_hidden_layers
    inputs = {"opt": 6, "phi3": 4, "neox_parallel": 4}.get(name, 7)
    assert len(grids) == blocks * (inputs + 3)
    assert sum(isinstance(m, PermutedNorm) for m in model.modules()) == 2 * blocks
    assert all(m.softmax == 8 for m in model.modules() if isinstance(m, AttentionSites))


SURVIVING = (
    "W16A8",
    "W4A3KV",
    "W4A3KV-rotated-mixed",
    "W4A3KV-mixed-centred",
    "W4A4-rotated",
    "W4A4-token",
    "W4A4-tensor",
    "W4A4-faithful",
)


@pytest.fixture(scope="module")
def surviving(
    tiny: Tiny, short: Calibration, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, tuple[Path, Tensor]]:
    """By scheme, a directory and the logits that another process computes with it."""
    root = tmp_path_factory.mktemp("surviving")
    outs = {scheme: root / scheme for scheme in SURVIVING}
    for scheme, out in outs.items():
        quantize(tiny("llama"), out, plan_of(scheme), short)
    logits = logits_elsewhere(outs.values(), TOKENS, ["float32"], root)
    return {scheme: (out, logits[f"{out} float32"]) for scheme, out in outs.items()}


@pytest.mark.parametrize("scheme", SURVIVING)
def test_schemes_survive_the_file(
    scheme: str, surviving: dict[str, tuple[Path, Tensor]], tmp_path: Path
) -> None:
    out, elsewhere = surviving[scheme]
    model, _ = quantine.load(out, torch.float32)
    expected = logits_of(model)
    assert torch.equal(elsewhere, expected)
    kinds = {"W4A4-token": TokenGrid}
    assert any(isinstance(m, kinds.get(scheme, StaticGrid)) for m in model.modules())
    model.save_pretrained(tmp_path / "copy")
    assert torch.equal(logits_of(float_model(tmp_path / "copy")), expected)


@pytest.mark.parametrize("name", ["opt", "llama"])
@pytest.mark.parametrize(
    "plan", [plan_of("W4A8"), plan_of("W8A8-token"), budget_with("W4A8-token")]
)
def test_integers_predict_what_the_simulation_does(
    name: str, plan: Plan, tiny: Tiny, short: Calibration, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    quantize(tiny(name), out, plan, short)
    model, _ = quantine.load(out)
    matrices = [m for m in model.modules() if isinstance(m, QuantLinear) and m.inputs is not None]
    assert matrices
    integers = levels() not in ([], [SCALAR])
    assert all((m.input_grid() is not None) == integers for m in matrices)
    met: dict[QuantLinear, Tensor] = {}
    hooks = [
        m.register_forward_pre_hook(lambda module, args: met.update({module: args[0]}))
        for m in matrices
    ]
    found = logits_of(model)
    for hook in hooks:
        hook.remove()
    # Products that a gradient is wanted of are simulated.
    for matrix in matrices:
        wanted = matrix(met[matrix].clone().requires_grad_()).detach()
        with torch.no_grad():
            error = (matrix(met[matrix]) - wanted).abs().max()
        assert float(error) < 1e-5 * float(wanted.abs().max())
    inputs = model.get_input_embeddings()(TOKENS).detach().requires_grad_()
    expected = model(inputs_embeds=inputs).logits.detach()
    # Sums round differently; a later value near the middle between two codes may take the other.
    errors = (found - expected).abs() / expected.abs().max()
    assert float(errors[:, :16].median()) < 1e-5
    assert float(errors.max()) < 0.03
    # So may two tokens that are about as likely, and no others.
    differ = found.argmax(-1) != expected.argmax(-1)
    best = expected.topk(2).values[differ]
    assert int(differ.sum()) <= 1
    assert ((best[:, 0] - best[:, 1]) < 0.03 * expected.abs().max()).all()


def test_what_runs_is_what_was_solved_for(tiny: Tiny, short: Calibration, tmp_path: Path) -> None:
    # Without the rounding of weights and activations, what is left of a directory is the model.
    out = tmp_path / "out"
    quantize(tiny("opt"), out, plan_of("W16A16"), short)
    model, _ = quantine.load(out)
    floats = logits_of(float_model(tiny("opt")))
    assert float((logits_of(model) - floats).abs().max() / floats.abs().max()) < 1e-5
    tensors = stored_tensors(out)
    order = tensors["model.decoder.layers.0.self_attn_layer_norm.order"]
    assert sorted(order.tolist()) == list(range(64))
    assert order.tolist() != list(range(64))


def test_groups_of_weights_are_the_clusters_of_their_inputs(
    tiny: Tiny, short: Calibration, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    quantize(tiny("llama"), out, plan_of("W4A8"), short)
    config = json.loads((out / "config.json").read_text())["quantization_config"]
    tensors = stored_tensors(out)
    for name, layer in config["layers"].items():
        sizes = tuple(config["schemes"][layer["scheme"]]["cluster_sizes"])
        assert Clusters(tensors[f"{name}.inputs.labels"].long()).sizes == sizes
        assert tensors[f"{name}.scale"].shape == (layer["shape"][0], len(sizes))


def test_other_methods_keep_their_own_groups(
    tiny: Tiny, short: Calibration, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    quantize(tiny("llama"), out, plan_of("W4A8", method="spqr", group_size=16), short)
    assert distance(quantine.load(out)[0], float_model(tiny("llama"))) < 0.3


def test_a_budget_decides_the_bits_of_weights_beside_a_scheme(
    tiny: Tiny, short: Calibration, tmp_path: Path
) -> None:
    plan = Plan.budget(4.5, ("in", "out")).with_activations("W4A8")
    assert plan.activations == Plan.scheme("W4A8").activations
    totals = quantize(tiny("llama"), tmp_path / "out", plan, short).report["totals"]
    assert 4 < totals["bits_per_weight"] <= 4.5
    assert "W4A8" in plan.name
    model, _ = quantine.load(tmp_path / "out")
    assert any(isinstance(m, StaticGrid) for m in model.modules())
    assert distance(model, float_model(tiny("llama"))) < 0.3


@pytest.mark.parametrize(
    "plan",
    [
        plan_of("W4A4"),
        budget_with("W4A4"),
        plan_of("W4A4-strict-rotated"),
        plan_of("W4A3KV-rotated-mixed"),
        plan_of("W4A3KV-centred"),
    ],
)
def test_an_interrupted_run_ends_with_the_same_bytes(
    plan: Plan, tiny: Tiny, short: Calibration, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    quantize(tiny("llama"), tmp_path / "whole", plan, short)
    commit = RunStore.commit

    def stop_after_first(self: RunStore, part: str, *rest: Any) -> None:
        if part == "block-00001":
            raise KeyboardInterrupt
        commit(self, part, *rest)

    with monkeypatch.context() as patch:
        patch.setattr(RunStore, "commit", stop_after_first)
        with pytest.raises(KeyboardInterrupt):
            quantize(tiny("llama"), tmp_path / "cut", plan, short)
    quantize(tiny("llama"), tmp_path / "cut", plan, short, resume=True)
    first, second = (stored_tensors(tmp_path / name) for name in ("whole", "cut"))
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_generation_goes_on_with_the_modules(
    tiny: Tiny, short: Calibration, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    quantize(tiny("opt"), out, plan_of("W4A8"), short)
    model, _ = quantine.load(out)
    tokens = model.generate(TOKENS[:1], max_new_tokens=4, do_sample=False)
    longer = model(input_ids=tokens[:, :-1]).logits[0, TOKENS.shape[1] - 1 :].argmax(-1)
    assert tokens[0, TOKENS.shape[1] :].tolist() == longer.tolist()


def test_evaluation_counts_weights_that_stay(
    tiny: Tiny, short: Calibration, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    result = quantize(tiny("opt"), out, plan_of("W16A8"), short)
    assert result.report["totals"]["bits_per_weight"] == 16
    found = evaluate(out, [short.source], window=32, limit=2)
    assert found["texts"][Path(short.source).name]["perplexity"] > 1


@pytest.mark.parametrize(
    ("name", "plan", "samples", "error", "message"),
    [
        ("opt_projected", Plan.scheme("W4A8"), 4, FamilyError, "do_layer_norm_before is True"),
        ("bloom", Plan.scheme("W4A4KV"), 4, FamilyError, "bloom models cannot .* at key, value:"),
        ("opt", Plan.scheme("W4A4KV-centred"), 4, FamilyError, "has no kinds of rotary embeddings"),
        ("llama", Plan.scheme("W16A8"), 0, CalibrationError, "need calibration samples"),
        (
            "llama",
            Plan.preset("rtn", group_size=0),
            4,
            PlanError,
            "has no clusters of inputs",
        ),
    ],
)
def test_what_cannot_be_done_is_refused_first(
    name: str,
    plan: Plan,
    samples: int,
    error: type[Exception],
    message: str,
    tiny: Tiny,
    short: Calibration,
    tmp_path: Path,
) -> None:
    with pytest.raises(error, match=message):
        quantize(tiny(name), tmp_path / "out", plan, replace(short, samples=samples))
    assert not (tmp_path / "out").exists()


def fed_grids(model: Any) -> list[StaticGrid]:
    """The grids whose channels are rounded in turn."""
    grids = [m for m in model.modules() if isinstance(m, StaticGrid)]
    return [grid for grid in grids if grid.fed() is not None]


@pytest.mark.parametrize("name", ["opt", "llama", "neox_parallel"])
def test_feedback_is_chosen_by_text_that_was_held_out(
    name: str, tiny: Tiny, short: Calibration, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    text = replace(short, samples=96, seqlen=64)  # three batches, of which one ranks grids
    quantize(tiny(name), out, plan_of("W16A3KV"), text)
    model, _ = quantine.load(out)
    assert fed_grids(model)
    for grid in fed_grids(model):
        feedback = grid.fed()
        assert feedback is not None
        assert feedback.shape[0] * feedback.shape[1] == len(grid.get_buffer("labels"))
    assert 1e-4 < distance(model, float_model(tiny(name))) < 0.7


@pytest.mark.parametrize("scheme", ["W4A8", "W4A4"])
def test_tokens_of_any_loudness_are_rounded_alike(
    scheme: str, tiny: Tiny, short: Calibration, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    quantize(tiny("llama"), out, plan_of(scheme), replace(short, samples=96, seqlen=64))
    model, _ = quantine.load(out)
    scaled = {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, QuantLinear)
        and isinstance(module.inputs, StaticGrid)
        and module.inputs.reached() is not None
    }
    last = [name for name in scaled if name.endswith(("o_proj", "down_proj"))]
    assert scheme == "W4A4" or len(last) == len(scaled) == 2 * len(model.model.layers)
    assert scaled
    for module in scaled.values():
        # Few rows are rounded as floats, many are multiplied as integers.
        x = torch.randn(40, module.in_features, generator=torch.Generator().manual_seed(0)) / 1024
        with torch.no_grad():
            few = torch.cat([module(row) for row in x.split(8)])
            many = module(x)
            quiet = module(x / 1024)
        assert torch.allclose(few, many, atol=1e-5 * float(few.abs().max()))
        assert torch.equal(quiet, many / 1024)


def test_older_directories_load_as_they_were_made(
    tiny: Tiny, short: Calibration, tmp_path: Path
) -> None:
    out, plan = tmp_path / "out", plan_of("W8A8")
    assert plan.activations is not None
    quantize(
        tiny("llama"),
        out,
        replace(plan, activations=replace(plan.activations, token_factors=False)),
        short,
    )
    before = logits_of(quantine.load(out)[0])
    config = json.loads((out / "config.json").read_text(encoding="utf-8"))
    activations = config["quantization_config"]["activations"]
    assert activations.pop("value_clusters")
    assert activations.pop("token_factors") is False
    (out / "config.json").write_text(json.dumps(config), encoding="utf-8")
    assert torch.equal(logits_of(quantine.load(out)[0]), before)
    assert activations.pop("relative")
    (out / "config.json").write_text(json.dumps(config), encoding="utf-8")
    older, _ = quantine.load(out)
    assert not any(m.relative for m in older.modules() if isinstance(m, AttentionSites))


def test_model_in_bfloat16_keeps_its_grids(tiny: Tiny, short: Calibration, tmp_path: Path) -> None:
    out = tmp_path / "out"
    quantize(tiny("llama"), out, plan_of("W8A3"), short)
    model, _ = quantine.load(out, dtype=torch.bfloat16)
    assert all(
        m.get_buffer("scale").dtype == torch.float32
        for m in model.modules()
        if isinstance(m, StaticGrid)
    )
    assert all(grid.get_buffer("feedback").dtype == torch.float16 for grid in fed_grids(model))
    assert isinstance(model, nn.Module)
    assert bool(torch.isfinite(logits_of(model).float()).all())


@pytest.mark.parametrize("asked", ["W4A4", "W16A8-faithful", "W4A4 --bits-per-weight 5"])
def test_the_command_line_takes_schemes(
    asked: str, tiny: Tiny, short: Calibration, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    scheme, *more = asked.split()
    text = ["--calibration", short.source, "--samples", "4", "--seqlen", "32"]
    flags = ["--scheme", scheme, *more, *text]
    out = str(tmp_path / "out")
    assert main(["plan", str(tiny("opt")), *flags]) == 0
    assert main(["quantize", str(tiny("opt")), out, *flags, "--quiet"]) == 0
    assert main(["inspect", out]) == 0
    assert main(["eval", out, "--text", short.source, "--window", "32", "--limit", "1"]) == 0
    assert ("clusters" in capsys.readouterr().out) == (asked == "W4A4")
    model, _ = quantine.load(out)
    assert any(isinstance(m, StaticGrid) for m in model.modules())


def test_a_scheme_decides_the_bits_of_weights(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", "somewhere", "--scheme", "W4A4", "--bits", "3"]) == 2
    assert "--scheme decides everything: leave out --bits" in capsys.readouterr().err
    assert main(["plan", "somewhere", "--scheme", "W4A4", "--preset", "spqr-3bit"]) == 2
    assert "leave out --scheme" in capsys.readouterr().err
