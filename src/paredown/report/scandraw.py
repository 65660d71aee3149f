"""Drawings of a scan as inline SVG, by the rules of `figures`: per cent across, pixels down, the page's colours."""

from __future__ import annotations

import math
from collections.abc import Sequence

from markupsafe import Markup

from paredown.report.figures import svg

SHADES = 10
"""Steps of a heat map; more could not be told apart."""


def heat(values: Sequence[float], top: float, label: str, *, breaks: int = 0) -> Markup:
    """One layer of a heat map: a cell a unit, the fuller the nearer to ``top``; units at 0 are hollow.

    Parameters
    ----------
    values
        ``[n]``, not negative.
    top
        The value of a full cell.
    label
        Said by a screen reader, shown by a resting mouse.
    breaks
        Leave a gap after every so many cells; 0: nowhere.
    """
    shades: dict[int, list[str]] = {}
    gap = 0.08 if len(values) <= 96 else 0.0
    for index, value in enumerate(values):
        shade = 0 if value <= 0 or top <= 0 else max(1, min(SHADES, math.ceil(value / top * SHADES)))
        # Half a cell of room sets groups of cells apart.
        start = index + (index // breaks) * 0.5 if breaks else float(index)
        shades.setdefault(shade, []).append(
            f"M{_n(start + gap / 2)} 0h{_n(1 - gap)}v1h-{_n(1 - gap)}z"
        )  # one path a shade keeps the page small
    drawn = "".join(
        f'<path class="gone" d="{"".join(paths)}"/>'
        if shade == 0
        else f'<path class="kept" fill-opacity="{_n(0.08 + 0.92 * shade / SHADES)}" d="{"".join(paths)}"/>'
        for shade, paths in sorted(shades.items())
    )
    return svg(drawn, label, height=18, box=f"0 0 {_n(width(len(values), breaks))} 1")


def width(count: int, breaks: int = 0) -> float:
    """Width of a heat map of ``count`` cells, in cells."""
    return max(count + ((count - 1) // breaks * 0.5 if breaks else 0.0), 1.0)


def nested(levels: Sequence[float], label: str) -> Markup:
    """Bars that lie in each other, the shortest (first) the darkest."""
    drawn = ['<rect class="gone" width="100%" height="100%"/>']
    for index, level in reversed(list(enumerate(levels))):
        opacity = 1 - 0.7 * index / max(1, len(levels) - 1)
        share = _n(min(1.0, max(0.0, level)) * 100)
        drawn.append(f'<rect class="kept" fill-opacity="{_n(opacity)}" width="{share}%" height="100%"/>')
    return svg("".join(drawn), label, height=14)


def dots(values: Sequence[float | None], high: float, label: str) -> Markup:
    """Marks on a line from 0 to ``high``: a disc, a ring and a bar, in this order; None is not drawn."""
    shapes = (
        '<circle class="kept" cx="{0}%" cy="10" r="5"/>',
        '<circle class="ring" cx="{0}%" cy="10" r="4"/>',
        '<line class="tick" x1="{0}%" x2="{0}%" y1="2" y2="18"/>',
    )
    marks = [
        shape.format(_n(2 + 96 * min(1.0, max(0.0, value / high))))
        for shape, value in zip(shapes, values, strict=False)
        if value is not None
    ]
    return svg('<line class="base" x1="2%" x2="98%" y1="10" y2="10"/>' + "".join(reversed(marks)), label, height=20)


def scale(high: float, step: float, unit: str, *, margin: float = 2) -> Markup:
    """Numbers from 0 to ``high`` below `dots` or, with no margin, below bars."""
    marks = "".join(
        f'<text x="{_n(margin + (100 - 2 * margin) * i * step / high)}%" y="11" text-anchor="middle">{_n(i * step)}'
        f"{unit}</text>"
        for i in range(int(high / step + 1e-9) + 1)
    )
    return Markup('<svg aria-hidden="true" height="14">{}</svg>').format(Markup(marks))


def columns(dark: Sequence[float], light: Sequence[float], label: str) -> Markup:
    """Columns side by side, each with a light height behind a dark one, of 1."""
    drawn = []
    for index, heights in enumerate(zip(light, dark, strict=True)):
        drawn.append(f'<path class="gone" d="M{_n(index + 0.06)} 0h.88v1h-.88z"/>')
        for height, name in zip(heights, ('kept" fill-opacity=".4', "kept"), strict=True):
            level = _n(min(1.0, max(0.0, height)))
            drawn.append(f'<path class="{name}" d="M{_n(index + 0.06)} 1h.88v-{level}h-.88z"/>')
    return svg("".join(drawn), label, height=30, box=f"0 0 {max(len(dark), 1)} 1")


def curves(lines: Sequence[Sequence[float]], label: str) -> Markup:
    """Curves that rise from 0 to 1 over equal steps, one a layer, early layers lighter; grid lines at every quarter."""
    drawn = ['<path class="grid" d="M0 25H100M0 50H100M0 75H100M25 0V100M50 0V100M75 0V100"/>']
    for index, line in enumerate(lines):
        steps = len(line)
        points = " ".join(f"{_n((i + 1) / steps * 100)},{_n(100 - 100 * v)}" for i, v in enumerate(line))
        opacity = _n(0.3 + 0.7 * (index + 1) / len(lines))
        drawn.append(f'<polyline class="curve" stroke-opacity="{opacity}" points="0,100 {points}"/>')
    return svg("".join(drawn), label, height=200, box="0 0 100 100")


def _n(value: float) -> str:
    return f"{value:.3f}".rstrip("0").rstrip(".") or "0"
