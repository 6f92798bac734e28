"""Packed layouts and the files that hold them."""

from quantine.errors import FormatError, shown
from quantine.formats.foreign.gguf.layout import Blocks
from quantine.formats.foreign.spqr.layout import Spqr
from quantine.formats.format import Format
from quantine.formats.sparse import Sparse

FORMATS: dict[str, Format] = {
    "dense": Sparse(plain=True),
    "sparse": Sparse(),
    "ggml": Blocks(),
    "spqr": Spqr(),
    "spqr-replace": Spqr(added=False),
}
"""Every packed layout by name; see docs/adding.md for adding one. A rule of a plan that names none
gets the first that supports what it asks for."""


def format_named(name: str) -> Format:
    """The packed layout called ``name``.

    Raises:
        FormatError: there is none; the file may come from a newer version.
    """
    if name not in FORMATS:
        raise FormatError(
            f"unknown format {shown(name)} (known: {', '.join(FORMATS)}): "
            "the directory may need a newer quantine"
        )
    return FORMATS[name]
