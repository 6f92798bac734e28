"""Packed layouts and the files that hold them."""

from quantine.errors import FormatError
from quantine.formats.base import Format
from quantine.formats.dense import Dense
from quantine.formats.sparse import Sparse
from quantine.formats.spqr import Spqr

FORMATS: dict[str, Format] = {
    "dense": Dense(),
    "sparse": Sparse(),
    "spqr": Spqr(),
    "spqr-replace": Spqr(added=False),
}
"""Every packed layout by name; see docs/adding.md for adding one. A rule of a plan that names none
gets the first that supports what it asks for."""

FORMAT_VERSION = 2
"""Version of docs/format.md that this package writes."""


def format_named(name: str) -> Format:
    """The packed layout called ``name``.

    Raises:
        FormatError: there is none; the file may come from a newer version.
    """
    if name not in FORMATS:
        raise FormatError(
            f"unknown format {name!r} (known: {', '.join(FORMATS)}): "
            "the directory may need a newer quantine"
        )
    return FORMATS[name]
