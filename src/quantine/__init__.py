"""quantine: makes large language models small without making them worse.

    import quantine

    quantine.quantize("model", "out", plan=quantine.Plan.preset("gptq", bits=3, group_size=64))
    model, tokenizer = quantine.load("out")

Importing quantine imports neither torch nor transformers. It teaches transformers to load what
quantine writes: ``AutoModelForCausalLM.from_pretrained("out")`` works after ``import quantine``.
Loaded models that were pickled need quantine, too; Python imports it by itself.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

import wrapt

if TYPE_CHECKING:
    from quantine.calibrate.segments import Calibration
    from quantine.core.qtensor import QTensor
    from quantine.core.spec import QuantSpec
    from quantine.errors import (
        BackendUnavailable,
        CalibrationError,
        CheckpointError,
        DeviceMemoryError,
        FamilyError,
        FormatError,
        OutputError,
        PlanError,
        QuantineError,
        RankError,
        ResumeMismatch,
        SolverError,
    )
    from quantine.eval.evaluate import evaluate
    from quantine.methods.adadim import AdaDim
    from quantine.methods.gptq import GPTQ
    from quantine.methods.rtn import RTN
    from quantine.methods.spqr import SpQR
    from quantine.plan.plan import Plan
    from quantine.plan.rules import Rule
    from quantine.plan.scheme import Scheme
    from quantine.run.quantize import quantize
    from quantine.runtime.load import load

__version__ = "0.1.0"

__all__ = [
    "GPTQ",
    "RTN",
    "AdaDim",
    "BackendUnavailable",
    "Calibration",
    "CalibrationError",
    "CheckpointError",
    "DeviceMemoryError",
    "FamilyError",
    "FormatError",
    "OutputError",
    "Plan",
    "PlanError",
    "QTensor",
    "QuantSpec",
    "QuantineError",
    "RankError",
    "ResumeMismatch",
    "Rule",
    "Scheme",
    "SolverError",
    "SpQR",
    "evaluate",
    "load",
    "quantize",
]

_HOME = {
    "AdaDim": "methods.adadim",
    "BackendUnavailable": "errors",
    "Calibration": "calibrate.segments",
    "CalibrationError": "errors",
    "CheckpointError": "errors",
    "DeviceMemoryError": "errors",
    "FamilyError": "errors",
    "FormatError": "errors",
    "GPTQ": "methods.gptq",
    "OutputError": "errors",
    "Plan": "plan.plan",
    "PlanError": "errors",
    "QTensor": "core.qtensor",
    "QuantSpec": "core.spec",
    "QuantineError": "errors",
    "RTN": "methods.rtn",
    "RankError": "errors",
    "SpQR": "methods.spqr",
    "ResumeMismatch": "errors",
    "Rule": "plan.rules",
    "Scheme": "plan.scheme",
    "SolverError": "errors",
    "evaluate": "eval.evaluate",
    "load": "runtime.load",
    "quantize": "run.quantize",
}


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'quantine' has no attribute {name!r}")
    return getattr(importlib.import_module(f"quantine.{_HOME[name]}"), name)


def __dir__() -> list[str]:
    return sorted([*__all__, "__version__"])


@wrapt.when_imported("transformers.quantizers.auto")
def _register(auto: Any) -> None:
    from quantine.runtime.hf import register

    register(auto)


@wrapt.when_imported("transformers.modeling_utils")
def _register_attention(_: Any) -> None:
    from quantine.activations.attention import register

    register()
