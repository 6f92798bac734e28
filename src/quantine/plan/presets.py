"""Plans by name, and the choices for a budget: literal tables, filled by measurement."""

from __future__ import annotations

from typing import Any, Final

_SPQR_ADA: Final = {"method": "adadim", "inner": "spqr", "objective": "hessian"}

PRESETS: Final[dict[str, dict[str, Any]]] = {
    "spqr-2bit": {"method": "spqr", "bits": 2, "threshold": 0.5},
    "spqr-3bit": {"method": "spqr", "bits": 3, "threshold": 0.5},
    "spqr-4bit": {"method": "spqr", "bits": 4, "threshold": 0.3},
    "spqr-faithful": {
        "method": "spqr",
        "bits": 3,
        "group_size": 16,
        "scale_bits": 3,
        "zero_bits": 3,
        "stat_group_size": 16,
        "damp": 1.0,
        "groups": "refit",
        "clip": "minmax",
        "threshold": 0.2,
        "true_sequential": False,
    },
    "rtn-ada-3bit": {"method": "adadim", "inner": "rtn", "bits": 3, "clip": "mse"},
    "rtn-ada-4bit": {"method": "adadim", "inner": "rtn", "bits": 4, "clip": "mse"},
    "gptq-ada-3bit": {"method": "adadim", "inner": "gptq", "bits": 3},
    "gptq-ada-4bit": {"method": "adadim", "inner": "gptq", "bits": 4},
    "spqr-ada-3bit": {**_SPQR_ADA, "bits": 3, "threshold": 0.5},
    "spqr-ada-4bit": {**_SPQR_ADA, "bits": 4, "threshold": 0.3},
}
"""Presets by name: fields of the one scheme for all matrices in the decoder blocks, and those
fields of the plan that differ from their defaults."""

BEST: Final = {"best-3bit": 3.3, "best-4bit": 4.25}
"""Presets that spend a budget of so many bits per weight, groups along either axis, weigh errors by
the loss, let matrices make up for errors before them, and are tuned by `BEST_TUNING`."""
BEST_TUNING: Final = "whole"
"""Name in `quantine.core.tuning_spec.SETTINGS`."""

_BOTH: Final = ("in", "out")
_STEPS: Final = (
    # bits, group_size, scale_bits, zero_bits, threshold, group axes; from the smallest to the most
    # exact
    (2, 32, 3, 3, "inf", _BOTH),
    (2, 16, 3, 3, "inf", _BOTH),
    (2, 16, 3, 3, 1.0, _BOTH),
    (3, 64, 3, 3, 1.0, _BOTH),
    (3, 32, 3, 3, 1.0, _BOTH),
    (3, 16, 3, 4, 1.0, _BOTH),
    (3, 16, 4, 4, 0.7, _BOTH),
    (4, 64, 4, 4, 0.5, _BOTH),
    (4, 32, 3, 4, 0.5, _BOTH),
    (4, 16, 3, 4, 0.3, _BOTH),
    (4, 16, 4, 5, 0.2, _BOTH),
    (5, 64, 5, 5, 0.2, _BOTH),
    (5, 32, 4, 5, 0.2, _BOTH),
    (6, 64, 5, 5, 0.3, _BOTH),
    (8, 64, 4, 0, 0.3, ("in",)),
)
"""Parameters of the schemes in `CHOICES`, with the group axes for which each is offered."""
_STAT_GROUP_SIZE: Final = 128
"""Lines that share a second grid in each: twice as many as elsewhere by default lose about 1%."""
_SWEEPS: Final = 4
"""Sweeps of each, see `quantine.methods.sweeps`. Twice as many gain a fifth more, in twice the
time: 6% of the error becomes 7%."""
CHOICES: Final[tuple[dict[str, Any], ...]] = tuple(
    {
        "method": "spqr",
        "bits": bits,
        "group_size": group_size,
        "scale_bits": scale_bits,
        "zero_bits": zero_bits,
        "stat_group_size": _STAT_GROUP_SIZE,
        "threshold": threshold,
        "group_axis": axis,
        "sweeps": _SWEEPS,
    }
    for bits, group_size, scale_bits, zero_bits, threshold, axes in _STEPS
    for axis in axes
)
"""Schemes that a layer may get under a budget of bits, from the smallest to the most exact."""

TABLE: Final[dict[str, Any]] = {"method": "rtn", "group_size": -1, "clip": "mse"}
"""Scheme of the token table and the output head where a plan gives only their number of bits."""

CLUSTERED: Final = ("gptq", "rtn")
"""Methods whose groups are clusters of inputs by default in a scheme like ``W4A4``."""
PUBLISHED_RPTQ: Final[dict[str, Any]] = {"act_order": False, "damp": 0.01, "clip": "minmax"}
"""Parameters with which method ``gptq`` rounds weights as RPTQ's published code does."""
