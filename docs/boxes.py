"""Arrays as boxes in SVG: an outline with the grid of its parts, and one part filled.

An array of two dimensions is a rectangle, one of three a box in oblique projection. Where it is
split, lines show the parts, and the part that a device holds is solid. Only this module knows
about points and paths; what is held where comes in as fractions of each dimension.

Colours are CSS variables with a default for light backgrounds and one for dark, chosen by the
reader's system; a page that has its own switch sets the variables itself (``_static/site.css``).
"""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

__all__ = ["BOX", "FLAT", "PALETTE", "STYLE", "Place", "array_svg", "text_svg"]

PALETTE = ("#56a0d3", "#e69f00", "#2aa77c", "#cc79a7", "#d5713a", "#8f86d9", "#c9b71f", "#7d8a2e")
"""Fills of the parts of an array: the first is that of part 0. After Okabe and Ito (2008), which
most people with impaired colour vision can tell apart."""

STYLE = """
svg.mw { --mw-ink: #1c2733; --mw-faint: #6b7785; --mw-line: #aab4bf; --mw-body: #f1f4f7;
  --mw-whole: #97a3b0; font: 14px system-ui, "Segoe UI", "Helvetica Neue", Arial, sans-serif; }
@media (prefers-color-scheme: dark) { svg.mw { --mw-ink: #e3e8ed; --mw-faint: #9aa6b2;
  --mw-line: #5c6773; --mw-body: #20262d; --mw-whole: #8391a0; } }
svg.mw text { fill: var(--mw-ink); }
svg.mw .faint { fill: var(--mw-faint); }
svg.mw .small { font-size: 12.5px; }
svg.mw .bold { font-weight: 600; }
svg.mw .code { font-family: ui-monospace, SFMono-Regular, Menlo, Consolas, monospace;
  font-size: 12.5px; }
svg.mw .outline { fill: var(--mw-body); stroke: var(--mw-line); stroke-width: 1;
  stroke-linejoin: round; }
svg.mw .grid { fill: none; stroke: var(--mw-line); stroke-width: 0.8; }
svg.mw .held { stroke: #10181f; stroke-opacity: 0.55; stroke-width: 0.8; stroke-linejoin: round; }
svg.mw .whole { fill: var(--mw-whole); }
svg.mw .chip { fill: var(--mw-body); stroke: var(--mw-faint); }
svg.mw .rule { stroke: var(--mw-line); stroke-width: 1; fill: none; }
"""
"""One style sheet for all pictures; `svg.mw` keeps it from the rest of a page."""

Place = tuple[tuple[float, float], ...]
"""Begin and end of a part in each dimension, as fractions: across, down and, in a box, back."""

FLAT = (60, 58)
"""Width and height of a rectangle, in pixels."""

BOX = (46, 42, 26, 16)
"""Width and height of a box's front, and how far its back is to the right and up."""


def array_svg(
    x: float, y: float, parts: Sequence[int], held: Place | None, fill: str, *, stripes: str = ""
) -> str:
    """Draw an array whose outline's upper left corner is at (x, y).

    Args:
        x, y: pixels.
        parts: into how many the dims are split: across, down and, in a box, back.
        held: the part to fill; None for an outline alone.
        fill: its colour, or empty for the colour of what is whole.
        stripes: id of a pattern to draw over it.
    """
    corners = _Corners(x, y, len(parts))
    full: Place = ((0.0, 1.0),) * len(parts)
    drawn = [f'<path class="outline" d="{path}"/>' for path in corners.faces(full)]
    lines = corners.grid(parts)
    if lines:
        drawn.append(f'<path class="grid" d="{lines}"/>')
    if held is not None:
        shades = (0.0, 0.28, -0.18)
        for path, shade in zip(corners.faces(held), shades, strict=False):
            style = f'style="fill: {_shaded(fill, shade)}"' if fill else ""
            veil = "" if fill else f' fill-opacity="{1 - abs(shade)}"'
            drawn.append(f'<path class="held{"" if fill else " whole"}" {style}{veil} d="{path}"/>')
            if stripes:
                drawn.append(f'<path fill="url(#{stripes})" d="{path}"/>')
    return "".join(drawn)


class _Corners:
    """Where fractions of a rectangle or a box are on the page."""

    def __init__(self, x: float, y: float, rank: int) -> None:
        self.rank = rank
        if rank == 2:
            (self.width, self.height), self.right, self.up = FLAT, 0, 0
        else:
            self.width, self.height, self.right, self.up = BOX
        self.x, self.y = x, y + self.up

    def at(self, across: float, down: float, back: float = 0.0) -> str:
        x = self.x + across * self.width + back * self.right
        y = self.y + down * self.height - back * self.up
        return f"{x:.5g} {y:.5g}"

    def faces(self, place: Place) -> list[str]:
        """The front of a part and, of a box, its top and its right side."""
        (a, b), (c, d), *deep = place
        e, f = deep[0] if deep else (0.0, 0.0)
        faces = [[(a, c, e), (b, c, e), (b, d, e), (a, d, e)]]
        if deep:
            faces.append([(a, c, e), (b, c, e), (b, c, f), (a, c, f)])
            faces.append([(b, c, e), (b, c, f), (b, d, f), (b, d, e)])
        return [f"M{' L'.join(self.at(*point) for point in face)} Z" for face in faces]

    def grid(self, parts: Sequence[int]) -> str:
        """Lines between the parts, on the faces that can be seen."""
        across, down, *back = parts
        deep = back[0] if back else 1
        lines = []
        for cut in (index / across for index in range(1, across)):
            lines.append([(cut, 1, 0), (cut, 0, 0), (cut, 0, 1)])
        for cut in (index / down for index in range(1, down)):
            lines.append([(0, cut, 0), (1, cut, 0), (1, cut, 1)])
        for cut in (index / deep for index in range(1, deep)):
            lines.append([(0, 0, cut), (1, 0, cut), (1, 1, cut)])
        return " ".join(f"M{' L'.join(self.at(*point) for point in line)}" for line in lines)


def _shaded(colour: str, by: float) -> str:
    """A colour mixed with white, or with black for a negative share."""
    to = 255 if by > 0 else 0
    channels = (int(colour[start : start + 2], 16) for start in (1, 3, 5))
    return "#" + "".join(f"{round(value + (to - value) * abs(by)):02x}" for value in channels)


def text_svg(x: float, y: float, text: str, kind: str = "", anchor: str = "start") -> str:
    """A line of text whose baseline begins (or has its middle, or ends) at (x, y)."""
    return (
        f'<text x="{x:.5g}" y="{y:.5g}" class="{kind}" text-anchor="{anchor}">{escape(text)}</text>'
    )
