"""Solvers: functions from a weight matrix and input statistics to a `QTensor`."""

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
"""Every method by the name plans use; see docs/adding.md for adding one."""
