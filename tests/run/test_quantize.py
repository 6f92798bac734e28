"""The loop: what each layer is calibrated on, what is reported, what progress is told."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import quantine
from little_memory import little_memory
from quantine import Calibration, Plan
from quantine.calibrate.segments import calibration_segments
from quantine.run.store import RunStore
from tiny_models import FAMILIES, byte_tokenizer, matrices_of, stored_tensors, with_weights

Tiny = Callable[[str], Path]
PLAN = Plan.preset("gptq", bits=3, group_size=32, arithmetic="exact")


def inputs_of(model: Any, names: list[str], segments: Tensor) -> dict[str, Tensor]:
    """What each module reads while ``model`` runs over ``segments``, as rows ``[tokens, in]``."""
    seen: dict[str, Tensor] = {}

    def recorder(name: str) -> Callable[..., None]:
        def hook(_: Any, args: tuple[Tensor, ...]) -> None:
            seen[name] = args[0].reshape(-1, args[0].shape[-1]).double()

        return hook

    handles = [model.get_submodule(n).register_forward_pre_hook(recorder(n)) for n in names]
    with torch.no_grad():
        model(input_ids=segments)
    for handle in handles:
        handle.remove()
    return seen


@pytest.mark.parametrize("name", FAMILIES)
def test_every_layer_is_judged_on_what_the_quantized_layers_before_it_put_out(
    name: str, tiny: Tiny, packed: Callable[[str, str], Path], short: Calibration
) -> None:
    out = packed(name, "gptq")
    layers = json.loads((out / "quantine_report.json").read_text())["layers"]
    names = [layer["name"] for layer in layers]
    assert sorted(names) == sorted(matrices_of(tiny(name)))
    segments = calibration_segments(short, byte_tokenizer(), 300, None)
    loaded, _ = quantine.load(out)
    seen = inputs_of(loaded, names, segments)
    exact = with_weights(tiny(name), {})
    for layer in layers:
        module = exact.get_submodule(layer["name"])
        weight = module.weight.detach().double()
        weight = weight.T if type(module).__name__ == "Conv1D" else weight
        solved = loaded.get_submodule(layer["name"]).dequantize().double()
        x = seen[layer["name"]]
        error = ((x @ (solved - weight).T) ** 2).sum() / ((x @ weight.T) ** 2).sum()
        assert layer["output_error"] == pytest.approx(float(error), rel=2e-3), layer["name"]
        spread = ((solved - weight) ** 2).sum() / (weight**2).sum()
        assert layer["weight_error"] == pytest.approx(float(spread), rel=1e-4)
        assert layer["damp"] == 0.01


def test_the_report_says_everything(
    tiny: Tiny, packed: Callable[[str, str], Path], short: Calibration
) -> None:
    report = json.loads((packed("llama", "gptq") / "quantine_report.json").read_text())
    assert report["family"] == "llama"
    assert report["plan"] == PLAN.as_dict()
    assert report["calibration"] == {
        "source": Path(short.source).name,
        "samples": 4,
        "seqlen": 32,
        "seed": 0,
        "bfloat16": False,
        "bos": "each",
        "tokens": 128,
    }
    assert report["kept"] == [
        {"name": "model.embed_tokens", "reason": "no rule matches"},
        {"name": "lm_head", "reason": "no rule matches"},
    ]
    run = report["run"]
    assert run["peak_memory_bytes"] > 50_000_000
    assert 0 < sum(layer["seconds"] for layer in report["layers"]) < run["seconds"]
    assert [block["block"] for block in run["blocks"]] == [0, 1]
    assert sum(block["seconds"] for block in run["blocks"]) < run["seconds"]
    assert run["stages"].keys() >= {"reading", "forwards", "Hessians", "factorization", "solving"}
    assert all(spent["seconds"] >= 0 for spent in run["stages"].values())
    assert 0 < sum(spent["seconds"] for spent in run["stages"].values()) < run["seconds"]
    for block in run["blocks"]:
        assert block["processor_seconds"] > 0
        assert 50_000_000 < block["memory_after_bytes"] <= block["peak_memory_bytes"]
    assert report["versions"]["quantine"] == quantine.__version__
    (rule,) = PLAN.as_dict()["rules"]
    assert all({"match": "@blocks", **layer["scheme"]} == rule for layer in report["layers"])
    card = (packed("llama", "gptq") / "README.md").read_text()
    assert f"{report['totals']['bits_per_weight']:.3f}" in card
    assert "import quantine" in card


def test_without_calibration_nothing_is_claimed_about_outputs(
    packed: Callable[[str, str], Path],
) -> None:
    report = json.loads((packed("llama", "rtn") / "quantine_report.json").read_text())
    assert report["calibration"]["tokens"] == 0
    assert {layer["output_error"] for layer in report["layers"]} == {None}
    assert {layer["damp"] for layer in report["layers"]} == {None}
    assert all(0 < layer["weight_error"] < 0.1 for layer in report["layers"])


@pytest.mark.parametrize("true_sequential", [True, False])
def test_only_a_true_sequential_plan_sees_what_came_before_in_the_block(
    true_sequential: bool, tiny: Tiny, short: Calibration, tmp_path: Path
) -> None:
    coarse_before, last = [], "model.layers.0.mlp.down_proj.codes"
    for bits in (2, 8):
        early = {"match": "model.layers.0.self_attn.*", "method": "rtn", "bits": bits}
        late = {"match": "@blocks", "method": "gptq", "bits": 3}
        rules = [{**rule, "group_size": 32} for rule in (early, late)]
        plan = Plan.from_dict({"rules": rules, "true_sequential": true_sequential})
        out = quantine.quantize(tiny("llama"), tmp_path / str(bits), plan, short).path
        coarse_before.append(stored_tensors(out)[last])
    assert torch.equal(*coarse_before) == (not true_sequential)


def test_spilled_activations_give_the_same_bytes(
    tiny: Tiny, packed: Callable[[str, str], Path], short: Calibration, tmp_path: Path
) -> None:
    with little_memory():
        out = quantine.quantize(tiny("llama"), tmp_path / "out", PLAN, short).path
    name = "model.safetensors"
    assert (out / name).read_bytes() == (packed("llama", "gptq") / name).read_bytes()


def test_the_same_request_gives_the_same_bytes_and_another_seed_others(
    tiny: Tiny, packed: Callable[[str, str], Path], short: Calibration, tmp_path: Path
) -> None:
    name = "model.safetensors"
    before = (packed("llama", "gptq") / name).read_bytes()
    again = quantine.quantize(tiny("llama"), tmp_path / "again", PLAN, short).path
    assert (again / name).read_bytes() == before
    seeded = Calibration(short.source, short.samples, short.seqlen, seed=1)
    other = quantine.quantize(tiny("llama"), tmp_path / "other", PLAN, seeded).path
    assert (other / name).read_bytes() != before


def test_calibration_lowers_the_error_on_the_calibration_text(
    tiny: Tiny, packed: Callable[[str, str], Path], short: Calibration, tmp_path: Path
) -> None:
    rounded = Plan.preset("rtn", bits=3, group_size=32)
    rtn = quantine.quantize(tiny("llama"), tmp_path / "rtn", rounded, short).path
    scores = [
        quantine.evaluate(out, short.source, window=32, limit=40, reference=tiny("llama"))
        for out in (packed("llama", "gptq"), rtn)
    ]
    solved, rounded = (found["texts"][Path(short.source).name]["kl"] for found in scores)
    assert 0 < solved < rounded


class Listener:
    """Writes down what it is told."""

    def __init__(self) -> None:
        self.events: list[Any] = []

    def note(self, text: str) -> None:
        self.events.append(("note", text))

    def start(self, blocks: int, done: int) -> None:
        self.events.append(("start", blocks, done))

    def layer(self, report: dict[str, Any]) -> None:
        self.events.append(("layer", report["name"]))

    def block(self, index: int) -> None:
        self.events.append(("block", index))

    def finish(self, report: dict[str, Any]) -> None:
        self.events.append(("finish", len(report["layers"])))


def test_progress_hears_of_every_layer_in_running_order(
    tiny: Tiny, short: Calibration, tmp_path: Path
) -> None:
    listener = Listener()
    quantine.quantize(tiny("llama"), tmp_path / "out", PLAN, short, progress=listener)
    order = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    told = [event for event in listener.events if event[0] != "note"]
    heard = [event[1].rpartition(".")[2] if event[0] == "layer" else event for event in told]
    assert heard == [
        ("start", 2, 0),
        *order,
        ("block", 0),
        *order,
        ("block", 1),
        ("finish", 14),
    ]


def test_kept_layers_stay_as_they_were(tiny: Tiny, short: Calibration, tmp_path: Path) -> None:
    rules = [
        {"match": "*.0.*", "method": "keep"},
        {"match": "*.mlp.down_proj", "method": "keep"},
        {"match": "@blocks", "method": "gptq", "group_size": 32},
    ]
    plan = Plan.from_dict({"rules": rules})
    result = quantine.quantize(tiny("llama"), tmp_path / "out", plan, short)
    source, stored = stored_tensors(tiny("llama")), stored_tensors(result.path)
    kept = [n for n in matrices_of(tiny("llama")) if ".0." in n or n.endswith("down_proj")]
    assert len(kept) == 8
    for name in kept:
        assert torch.equal(stored[f"{name}.weight"].float(), source[f"{name}.weight"])
        assert f"{name}.codes" not in stored
    reasons = {entry["name"]: entry["reason"] for entry in result.report["kept"]}
    assert reasons["model.layers.0.mlp.down_proj"] == "rule 1: *.0.*"
    assert reasons["model.layers.1.mlp.down_proj"] == "rule 2: *.mlp.down_proj"
    assert len(result.report["layers"]) == 6


def test_the_source_is_not_changed(tiny: Tiny, short: Calibration, tmp_path: Path) -> None:
    before = {file.name: file.read_bytes() for file in tiny("qwen3").iterdir()}
    quantine.quantize(tiny("qwen3"), tmp_path / "out", PLAN, short)
    assert {file.name: file.read_bytes() for file in tiny("qwen3").iterdir()} == before


def test_tokenizer_and_generation_settings_travel_along(
    tiny: Tiny, packed: Callable[[str, str], Path]
) -> None:
    for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        source = tiny("llama") / name
        assert (packed("llama", "gptq") / name).read_bytes() == source.read_bytes()


@pytest.mark.parametrize("resume", [False, True])
def test_who_comes_between_the_check_and_the_lock_is_seen(
    resume: bool, tiny: Tiny, short: Calibration, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another run finishes in OUT after this one found it empty, and before this one locks it."""
    out, lock = tmp_path / "out", RunStore.lock
    other = Plan.preset("rtn", bits=2, group_size=32)

    def late(store: RunStore) -> None:
        monkeypatch.setattr(RunStore, "lock", lock)
        quantine.quantize(tiny("llama"), out, other, short)
        lock(store)

    monkeypatch.setattr(RunStore, "lock", late)
    kind = quantine.ResumeMismatch if resume else quantine.OutputError
    with pytest.raises(kind, match=r"another plan|is not empty"):
        quantine.quantize(tiny("llama"), out, PLAN, short, resume=resume)
    report = json.loads((out / "quantine_report.json").read_text(encoding="utf-8"))
    assert report["plan"] == other.as_dict()
    assert not list(out.glob(".quantine*"))
    quantine.load(out)


def test_of_runs_that_begin_together_one_makes_the_output(
    tiny: Tiny, short: Calibration, tmp_path: Path
) -> None:
    out, together = tmp_path / "out", threading.Barrier(4)
    ended: list[object] = []

    def run(bits: int) -> None:
        plan = Plan.preset("rtn", bits=bits, group_size=32)
        together.wait()
        try:
            ended.append(quantine.quantize(tiny("llama"), out, plan, short, resume=True))
        except (quantine.OutputError, quantine.ResumeMismatch) as error:
            ended.append(error)

    tiny("llama")
    threads = [threading.Thread(target=run, args=(bits,)) for bits in (2, 3, 4, 5)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(ended) == 4
    assert sum(not isinstance(one, Exception) for one in ended) == 1
    report = json.loads((out / "quantine_report.json").read_text(encoding="utf-8"))
    bits = {layer["scheme"]["bits"] for layer in report["layers"]}
    assert len(bits) == 1
    assert not list(out.glob(".quantine*"))
    quantine.load(out)
