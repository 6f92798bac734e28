"""Layouts of other engines: what each holds, and how it is written and read."""

from typing import Final

from quantine.errors import PlanError, shown
from quantine.formats.foreign.compressed_tensors.target import CompressedTensorsDirectory
from quantine.formats.foreign.float.target import FloatDirectory
from quantine.formats.foreign.gguf.target import GGUFFileTarget
from quantine.formats.foreign.gptq.target import GPTQDirectory
from quantine.formats.foreign.spqr.target import SpqrDirectory
from quantine.formats.foreign.target import Target

FOREIGN: Final[dict[str, Target]] = {
    "float": FloatDirectory(),
    "gguf": GGUFFileTarget(),
    "gptq": GPTQDirectory(),
    "compressed-tensors": CompressedTensorsDirectory(),
    "spqr": SpqrDirectory(),
}
"""Every layout of another engine by name; see docs/adding.md for adding one."""


def target_named(name: str) -> Target:
    """The layout of another engine called ``name``.

    Raises:
        PlanError: there is none.
    """
    if name not in FOREIGN:
        raise PlanError(f"there is no layout {shown(name)}: give one of {', '.join(FOREIGN)}")
    return FOREIGN[name]
