"""Figures as SVG inside of a page, in the page's colours."""

from __future__ import annotations

import io
import re
from html import escape
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from matplotlib.figure import Figure

COLOURS: Final = {"#000000": "currentColor", "#eeeeee": "var(--line)", "#1b3a6b": "var(--strong)"}
"""Colour on the page by the colour that pictures are drawn in: legible on white and in the dark."""
ID: Final = re.compile(r' id="([^"]+)"')
"""Pattern of an attribute that gives an element of a picture a name."""


def embedded(figure: Figure, label: str) -> str:
    """``figure`` as an inline picture, whose colours are the page's.

    Args:
        label: what it shows, for those who do not see it.
    """
    import matplotlib

    figure.patch.set_alpha(0)
    for axes in figure.axes:
        axes.patch.set_alpha(0)
    text = io.StringIO()
    # The salt keeps names inside of one picture from meaning parts of another.
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": label}):
        figure.savefig(text, format="svg", metadata={"Date": None})
    svg = text.getvalue()
    svg = svg[svg.index("<svg") :]
    used = set(re.findall(r"#([\w-]+)[\")]", svg))
    svg = ID.sub(lambda found: found[0] if found[1] in used else "", svg)
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    for drawn, shown in COLOURS.items():
        svg = svg.replace(drawn, shown)
    # matplotlib leaves the fill of texts out where it is black.
    svg = svg.replace(
        "<svg ", f'<svg role="img" aria-label="{escape(label)}" fill="currentColor" ', 1
    )
    return f"<figure>{svg}</figure>"
