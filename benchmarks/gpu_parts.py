"""The parts of `make gpu`, in order, and what is said of them where there is no GPU.

Nothing here needs PyTorch, and any Python 3 runs it: benchmarks/gpu.sh asks before it knows what
there is.
"""

from __future__ import annotations

import sys
from typing import NamedTuple


class Planned(NamedTuple):
    """A part.

    Attributes:
        said: what is done, in words.
        seconds: that it may take. All of them leave two of nine minutes to what is installed first
            and to the last test.
    """

    said: str
    seconds: float


PARTS = {
    "products": Planned("time packed matrices of all kinds, in five shapes, against cuBLAS", 140),
    "integers": Planned("time integer products of few and of many tokens", 30),
    "attention": Planned("time attention over a packed cache", 20),
    "tokens": Planned("time tokens of models of 8B shape, packed and in bfloat16", 60),
    "quantizing": Planned(
        "quantize matrices, a block and the demo model, and compare with the CPU", 90
    ),
    "tests": Planned("run the tests of the programs", 90),
}


def main() -> int:
    """Say what would be done; this is no failure."""
    print(f"{sys.executable} has no PyTorch that knows a GPU. With one, this would")
    for part in PARTS.values():
        print(f"  {part.said},")
    print("  and write benchmarks/results/gpu-NAME.json.")
    return 0


if __name__ == "__main__":
    sys.exit(main())
