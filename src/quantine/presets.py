"""Plans by name, and what a searched layer may get: literal tables, filled by measurement."""

from __future__ import annotations

from typing import Any, Final

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
}
"""One scheme for every matrix in the decoder blocks, and what is not the default in the plan."""

_STEPS = (
    # bits, group_size, scale_bits, threshold; from the smallest to the most exact
    (2, 16, 3, "inf"),
    (2, 16, 3, 0.5),
    (3, 64, 4, 1.0),
    (3, 32, 3, 0.5),
    (3, 16, 3, 0.5),
    (4, 64, 4, 0.3),
    (4, 64, 4, 0.1),
    (4, 16, 3, 0.3),
    (5, 64, 4, 0.3),
    (5, 16, 3, 0.3),
    (6, 64, 4, 0.3),
    (8, 64, 4, 0.3),
)
CHOICES: Final[tuple[dict[str, Any], ...]] = tuple(
    {
        "method": "spqr",
        "bits": bits,
        "group_size": group_size,
        "scale_bits": scale_bits,
        "threshold": threshold,
    }
    for bits, group_size, scale_bits, threshold in _STEPS
)
"""What a layer may get under a budget of bits."""

TABLE: Final[dict[str, Any]] = {"method": "rtn", "group_size": -1, "clip": "mse"}
"""The token table and the output head, where they are quantized by a number of bits alone."""
