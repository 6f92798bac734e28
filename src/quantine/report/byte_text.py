"""How sizes in bytes are written, on the terminal and on pages alike."""

from __future__ import annotations


def megabytes(nbytes: float) -> str:
    """The size in MB (1e6 bytes), or in GB (1e9 bytes) from one GB on."""
    return f"{nbytes / 1e9:.2f} GB" if nbytes >= 1e9 else f"{nbytes / 1e6:.1f} MB"
