"""Solvers: callables from a weight matrix and statistics of its input to a quantized matrix."""

from quantine.methods.gptq import GPTQ
from quantine.methods.rtn import RTN
from quantine.methods.solver import Solver
from quantine.methods.spqr import SpQR

__all__ = ["GPTQ", "METHODS", "RTN", "Solver", "SpQR"]

METHODS: dict[str, type[Solver]] = {
    "rtn": RTN,
    "gptq": GPTQ,
    "spqr": SpQR,
}
"""Every method by the name that plans use; docs/adding.md shows how to add one."""
