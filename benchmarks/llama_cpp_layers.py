"""Single matrices in llama.cpp's types: solved here, and as its quantizer makes them.

    python benchmarks/llama_cpp_layers.py demo OUT.json --work DIR

DIR has the files ``TYPE.engine.gguf`` that `benchmarks/llama_cpp_types.py` lets llama.cpp make.
Printed is the squared error of a matrix's output on held-out text, as a share of the squared
output: by the engine, and by methods here that saw the same calibration text.
"""

from __future__ import annotations

import json
import math
from dataclasses import replace
from typing import Any, Final

import torch
from torch import Tensor

from llama_cpp_inputs import Inputs, arguments_of, held_out
from quantine.core.permute import inverse
from quantine.formats.foreign.gguf.arrange import row_order
from quantine.formats.foreign.gguf.grid_types import GRID_TYPES, GridType
from quantine.kernels.gram import add_gram
from quantine.methods.gptq import GPTQ
from quantine.methods.rtn import RTN
from quantine.methods.solver import Solver
from quantine.source.gguf.header import GGUFTensor
from quantine.source.gguf.parts import read_parts
from quantine.statistics.hessian import Hessian

SOLVERS: Final[dict[str, Solver]] = {
    "rtn": RTN("mse"),
    "gptq, mse": GPTQ(),
    "gptq, hessian": GPTQ(clip="hessian"),
}
MATRICES: Final = ("self_attn.q_proj", "self_attn.o_proj", "mlp.up_proj", "mlp.down_proj")


def main() -> None:
    """Print and write a row for each matrix and type."""
    parser = arguments_of(__doc__.splitlines()[0], windows=8)
    parser.add_argument("--blocks", nargs="+", type=int, default=(4, 18))
    arguments = parser.parse_args()
    inputs = Inputs.of(arguments.model, torch.bfloat16)
    config = inputs.source.config()
    wanted = {f"model.layers.{block}.{path}" for block in arguments.blocks for path in MATRICES}
    layers = [layer for layer in inputs.layers if layer.name in wanted]
    inputs = replace(inputs, layers=layers)
    seen = observed(inputs, inputs.calibration(arguments.samples))
    unseen = observed(inputs, held_out(inputs.source, arguments.window, arguments.windows).tokens)
    rows: list[dict[str, Any]] = []
    for target in arguments.targets:
        parts = read_parts(arguments.work / f"{target}.engine.gguf")
        stored = {tensor.name: tensor for part in parts for tensor in part.tensors}
        found = []
        for layer in layers:
            gguf, weight = inputs.stored[layer.stored_name], layer.read(inputs.model).float()
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


def observed(inputs: Inputs, text: Tensor) -> dict[str, Hessian]:
    """Statistics of the matrices' inputs on the windows ``text``, by name."""
    found = {layer.name: Hessian(layer.in_features, add_gram) for layer in inputs.layers}
    inputs.observe(text, lambda layer, x: found[layer.name].update(x))
    return found


def engine_weight(stored: GGUFTensor, kind: GridType, config: Any) -> Tensor:
    """A matrix of an engine's file, rows in the model's order."""
    data = torch.frombuffer(bytearray(stored.read()), dtype=torch.uint8)
    weight = kind.decode(data.reshape(stored.shape[0], -1)).dequantize()
    order = row_order(stored.name, len(weight), config)
    return weight if order is None else weight[inverse(order)]


if __name__ == "__main__":
    main()
