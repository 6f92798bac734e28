"""Which text experts should be shown while they are quantized, measured on a small mixture.

    python benchmarks/experts.py train MIXTURE wikitext2_train_raw_5k.txt --seconds 300
    python benchmarks/experts.py measure MIXTURE wikitext2_train_raw_5k.txt wikitext2_test.txt \
        --json experts.json
    python benchmarks/experts.py speed --json experts-speed.json

The mixture has 8 experts, of which each token chooses 2, and predicts bytes. After its training
some channels are made loud and what reads them quiet, which changes no output: so large models are.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM

from quantine import Calibration, Plan, load
from quantine.eval.evaluate import evaluate
from quantine.families.experts import Experts, experts_in, separate
from quantine.families.layers import Layer
from quantine.run.job import Job
from quantine.run.prepare import prepare
from quantine.run.quantize import carry_out
from quantine.runtime.packed import packed_modules
from quantine.survey.specimen import byte_tokenizer
from trained_models import LENGTH, fit

SIZES = {
    "vocab_size": 320,
    "hidden_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "num_experts": 8,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 128,
    "max_position_embeddings": 512,
    "norm_topk_prob": True,
}
LARGER = {
    "hidden_size": 512,
    "moe_intermediate_size": 1024,
    "num_experts": 16,
    "num_attention_heads": 16,
}
"""Sizes of the mixture whose speed is measured."""
LOUD, FACTORS = 0.05, (4.0, 30.0)
"""Share of the channels that become loud, and by how much."""
GROUPS = {"bits": 3, "group_size": 32}
PLANS = {
    "rtn": Plan.preset("rtn", **GROUPS),
    "gptq": Plan.preset("gptq", **GROUPS),
    "spqr": Plan.preset("spqr", bits=3, group_size=16),
    "budget 3.65": Plan.budget(3.65),
}
SAMPLES = 48


class AllTokens(Experts):
    """Shows every token to every expert; outputs are those of the chosen ones, as always."""

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        found = torch.stack([expert(hidden_states) for expert in self])
        rows = torch.arange(len(hidden_states))[:, None]
        return (found[top_k_index, rows] * top_k_weights[..., None]).sum(1)


class Weighed(Experts):
    """Tells each expert's tokens how much they count."""

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        for number, expert in enumerate(self):
            rows, place = torch.where(top_k_index == number)
            expert.factors = top_k_weights[rows, place, None]
        return super().forward(hidden_states, top_k_index, top_k_weights)


class WeighedLayer(Layer):
    """Is shown its inputs times the factors of the outputs that they become."""

    def observe(self, model: nn.Module, look: Callable[[Tensor], None]) -> Any:
        if not self.experts:
            return super().observe(model, look)
        expert = model.get_submodule(self.name.rpartition(".")[0])
        return super().observe(model, lambda x: look(x * expert.factors))


WAYS: dict[str, type[Experts]] = {
    "tokens that chose it": Experts,
    "the same, weighed": Weighed,
    "all tokens": AllTokens,
}


def train(out: Path, text: Path, seconds: float) -> None:
    """Train a mixture on the bytes of ``text`` for a while, and make it loud."""
    torch.manual_seed(0)
    config = AutoConfig.for_model("qwen3_moe", **SIZES)
    model: Any = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    tokenizer = byte_tokenizer()
    fit(model, tokenizer, text, seconds, output_router_logits=True)
    make_loud(model)
    model.save_pretrained(out)
    tokenizer.save_pretrained(out)


@torch.no_grad()
def make_loud(model: Any) -> None:
    """Scale channels up where they are written, and down where they are read."""
    for layer in model.model.layers:
        attention, experts = layer.self_attn, layer.mlp.experts
        for norm, readers in (
            (layer.input_layernorm, (attention.q_proj, attention.k_proj, attention.v_proj)),
            (layer.post_attention_layernorm, (layer.mlp.gate,)),
        ):
            factors = loudness(len(norm.weight))
            norm.weight.mul_(factors)
            for reader in readers:
                reader.weight.div_(factors)
        experts.gate_up_proj.div_(factors)
        for gate_up, down in zip(experts.gate_up_proj, experts.down_proj, strict=True):
            inner = loudness(down.shape[1])
            gate_up[len(inner) :].mul_(inner[:, None])
            down.div_(inner)


def loudness(channels: int) -> Tensor:
    """Factors of channels, most of them 1."""
    low, high = FACTORS
    loud = (torch.rand(channels) < LOUD).float()
    return 1 + loud * (low + torch.rand(channels) * (high - low))


def measure(model: Path, calibration: Calibration, text: Path, limit: int) -> list[dict[str, Any]]:
    """Perplexity and divergence by plan and way of showing text."""
    rows = []
    with tempfile.TemporaryDirectory() as scratch:
        for name, plan in PLANS.items():
            for way, kind in WAYS.items():
                if name == "rtn" and kind is not Experts:
                    continue
                out = Path(scratch) / f"{name} {way}"
                job = shown(prepare(model, plan, calibration), kind)
                report = carry_out(job, out).report
                found = evaluate(
                    out, [str(text)], window=LENGTH, limit=limit, reference=model, cache=scratch
                )
                (score,) = found["texts"].values()
                inside = [one for one in report["layers"] if "tokens" in one]
                rows.append(
                    {
                        "plan": name,
                        "shown": way,
                        "bits": found["bits_per_weight"],
                        "borrowed": sum(one["tokens_borrowed"] > 0 for one in inside),
                        "reference": score["reference_perplexity"],
                        **{key: score[key] for key in ("perplexity", "stderr", "kl", "kl_stderr")},
                    }
                )
                print(rows[-1], flush=True)
    return rows


def shown(job: Job, kind: type[Experts]) -> Job:
    """``job`` with experts that are shown text in another way."""
    for experts in experts_in(job.model).values():
        experts.__class__ = kind
    if kind is not Weighed:
        return job
    layers = [WeighedLayer(**vars(one.layer)) for one in job.decisions]
    pairs = zip(job.decisions, layers, strict=True)
    return replace(job, decisions=tuple(replace(one, layer=layer) for one, layer in pairs))


def speed(rounds: int) -> dict[str, Any]:
    """Tokens of generated text per second of the processor, packed and decoded to floats; bytes.

    Weights are random. Both models take turns, as others may use the machine; time is that of the
    process.
    """
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as scratch:
        source, out = Path(scratch) / "float", Path(scratch) / "packed"
        model: Any = AutoModelForCausalLM.from_config(
            AutoConfig.for_model("qwen3_moe", **SIZES | LARGER), dtype=torch.float32
        )
        model.save_pretrained(source)
        byte_tokenizer().save_pretrained(source)
        plan = Plan.preset("rtn", bits=4, group_size=64)
        carry_out(prepare(source, plan, Calibration(samples=0)), out)
        packed, _ = load(out, dtype="float32")
        decoded = separated(model, packed)
        models = {"packed": packed, "floats": decoded}
        times: dict[str, list[float]] = {name: [] for name in models}
        for number in range(rounds + 1):  # the first is not counted
            for name, one in models.items():
                started = time.process_time()
                tokens = one.generate(
                    torch.tensor([[7, 8, 9]]), max_new_tokens=32, min_new_tokens=32, do_sample=False
                )
                if number:
                    times[name].append((tokens.shape[1] - 3) / (time.process_time() - started))
        return {
            "file_bytes": (out / "model.safetensors").stat().st_size,
            "packed_bytes": sum(t.nbytes for t in (*packed.parameters(), *packed.buffers())),
            "float_bytes": sum(t.nbytes for t in decoded.parameters()),
            **{name: median(found) for name, found in times.items()},
        }


@torch.no_grad()
def separated(model: Any, packed: Any) -> Any:
    """``model`` with an own module for each expert, and what ``packed`` stands for as floats."""
    separate(model)
    for name, module in packed_modules(packed):
        model.get_submodule(name).weight.copy_(module.dequantize())
    return model.eval()


def main() -> None:
    """Read the arguments, and train or measure."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    verbs = parser.add_subparsers(dest="verb", required=True)
    training, measuring = verbs.add_parser("train"), verbs.add_parser("measure")
    for one in (training, measuring):
        one.add_argument("model", type=Path)
        one.add_argument("text", type=Path, help="to learn from")
    training.add_argument("--seconds", type=float, default=300)
    measuring.add_argument("test", type=Path, help="to measure on")
    measuring.add_argument("--samples", type=int, default=SAMPLES)
    measuring.add_argument("--limit", type=int, default=64, help="windows of the test")
    measuring.add_argument("--json", type=Path)
    timing = verbs.add_parser("speed")
    timing.add_argument("--rounds", type=int, default=5)
    timing.add_argument("--json", type=Path)
    given = parser.parse_args()
    if given.verb == "train":
        train(given.model, given.text, given.seconds)
        return
    if given.verb == "speed":
        rows: Any = speed(given.rounds)
        print(rows)
    else:
        calibration = Calibration(str(given.text), samples=given.samples, seqlen=LENGTH)
        rows = measure(given.model, calibration, given.test, given.limit)
    if given.json:
        given.json.write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
