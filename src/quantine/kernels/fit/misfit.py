"""Statistics that do not fit into float16, as kernels report them."""

from __future__ import annotations

from typing import Final

from quantine.errors import SolverError

MISFITS: Final = {
    "scale": "a group needs a scale of {:.4g}, but scales are stored in float16 (at most 65504)",
    "statistic": "a statistic of {:.4g} does not fit into float16",
}
"""Error messages by the kind of misfit. Programs on GPUs number the kinds in this order."""


def raise_misfit(misfit: tuple[str, float] | None) -> None:
    """Turn a kernel's report into an error.

    Args:
        misfit: the kind (a key of `MISFITS`) and the value that does not fit; ``None`` if all fit.

    Raises:
        SolverError: a scale or a statistic does not fit into float16.
    """
    if misfit is not None:
        kind, value = misfit
        raise SolverError(
            f"{MISFITS[kind].format(value)}: rescale the weights, or leave this layer in 16 bit"
        )
