"""Single matrices in llama.cpp's types: solved here, and as its quantizer makes them.

    python benchmarks/llama_cpp_layers.py demo OUT.json --work DIR

DIR has the files ``TYPE.engine.gguf`` that `benchmarks/against_llama_cpp.py` lets llama.cpp make.
Printed is the squared error of a matrix's output on held-out text, as a share of the squared
output: by the engine, and by methods here that saw the same calibration text.
"""

from __future__ import annotations

import argparse
import json
import math
from pathlib import Path
from typing import Any, Final

import torch
from torch import Tensor

from against_llama_cpp import TARGETS, held_out
from quantine.calibrate.segments import Calibration, calibration_segments
from quantine.core.permute import inverse
from quantine.families import family_of
from quantine.families.layers import Layer, find_layers
from quantine.formats.foreign.gguf.arrange import row_order
from quantine.formats.foreign.gguf.grid_types import GRID_TYPES, GridType
from quantine.kernels.gram import add_gram
from quantine.methods.gptq import GPTQ
from quantine.methods.rtn import RTN
from quantine.methods.solver import Solver
from quantine.source.gguf.header import GGUFTensor
from quantine.source.gguf.parts import read_parts
from quantine.source.gguf.weights import model_names
from quantine.source.locate import locate
from quantine.statistics.hessian import Hessian

SOLVERS: Final[dict[str, Solver]] = {
    "rtn": RTN("mse"),
    "gptq, mse": GPTQ(),
    "gptq, hessian": GPTQ(clip="hessian"),
}
MATRICES: Final = ("self_attn.q_proj", "self_attn.o_proj", "mlp.up_proj", "mlp.down_proj")


def main() -> None:
    """Print and write a row for each matrix and type."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model")
    parser.add_argument("json", type=Path)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--targets", nargs="+", default=TARGETS)
    parser.add_argument("--blocks", nargs="+", type=int, default=(4, 18))
    arguments = parser.parse_args()
    source = locate(arguments.model)
    config = source.config()
    model = source.float_model(torch.bfloat16)
    names = {name: gguf for gguf, name in model_names("llama", model).items()}
    wanted = {f"model.layers.{block}.{path}" for block in arguments.blocks for path in MATRICES}
    layers = [one for one in find_layers(model, family_of(config)) if one.name in wanted]
    text = calibration_segments(
        Calibration(samples=16), source.tokenizer(), config.vocab_size, None
    )
    seen = observed(model, layers, text)
    unseen = observed(model, layers, torch.tensor(held_out(arguments.model, 512, 8)))
    rows: list[dict[str, Any]] = []
    for target in arguments.targets:
        parts = read_parts(arguments.work / f"{target}.engine.gguf")
        stored = {tensor.name: tensor for part in parts for tensor in part.tensors}
        found = []
        for layer in layers:
            gguf, weight = names[layer.stored_name], layer.read(model).float()
            kind = next(k for k in GRID_TYPES.values() if k.code == stored[gguf].type)
            made = {"engine": engine_weight(stored[gguf], kind, config)}
            for name, solver in SOLVERS.items():
                made[name] = solver(weight, seen[layer.name], kind.spec).dequantize()
            hessian = unseen[layer.name]
            energy = hessian.error_energy(weight)
            errors = {k: hessian.error_energy(w - weight) / energy for k, w in made.items()}
            found.append(errors)
            rows.append({"target": target, "type": kind.name, "matrix": layer.name, **errors})
            print(*rows[-1].values(), flush=True)
        means = {
            name: math.exp(sum(math.log(one[name] / one["engine"]) for one in found) / len(found))
            for name in SOLVERS
        }
        rows.append({"target": target, "matrix": "geometric mean over engine", **means})
        print(*rows[-1].values(), flush=True)
    arguments.json.write_text(json.dumps(rows, indent=1) + "\n")


@torch.no_grad()
def observed(model: Any, layers: list[Layer], text: Tensor) -> dict[str, Hessian]:
    """Statistics of the inputs of ``layers`` on the windows ``text``, by name."""
    found = {layer.name: Hessian(layer.in_features, add_gram) for layer in layers}
    handles = [
        layer.observe(model, lambda x, name=layer.name: found[name].update(x.float()))
        for layer in layers
    ]
    for window in text:
        model.model(window[None])
    for handle in handles:
        handle.remove()
    return found


def engine_weight(stored: GGUFTensor, kind: GridType, config: Any) -> Tensor:
    """A matrix of an engine's file, rows in the model's order."""
    data = torch.frombuffer(bytearray(stored.read()), dtype=torch.uint8)
    weight = kind.decode(data.reshape(stored.shape[0], -1)).dequantize()
    order = row_order(stored.name, len(weight), config)
    return weight if order is None else weight[inverse(order)]


if __name__ == "__main__":
    main()
