"""Drawings for the report as inline SVG, written by hand.

Horizontal positions are percentages and colours are CSS variables of the page, so a drawing is sharp at any width, in
light, dark and print, and its text stays at the page's text size. Nothing here reads a clock or a random number.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from markupsafe import Markup

from paredown.workflow.record import Interval

_GRID_GAPS = 64  # above this many cells in a row, the gaps between them would be all one sees


def cells_width(amount: int) -> str:
    """CSS length of a row of ``amount`` cells where there is room for it."""
    return f"{min(amount * 1.75, 40):g}rem"


def svg(body: str, label: str, *, height: float, box: str | None = None) -> Markup:
    """Wrap a drawing; ``label`` is what a screen reader says and what a mouse resting on it shows.

    Parameters
    ----------
    body
        Markup that holds no text of a record.
    label
        Plain text; escaped here.
    height
        In CSS pixels.
    box
        ``viewBox``, for a drawing that is stretched to its place.
    """
    stretch = Markup(' viewBox="{}" preserveAspectRatio="none"').format(box) if box else Markup("")
    return Markup('<svg role="img" aria-label="{0}" height="{1}"{2}><title>{0}</title>{3}</svg>').format(
        label, _n(height), stretch, Markup(body)
    )


def cells(before: int, kept: Sequence[int] | None, label: str) -> Markup:
    """One layer of a grid: a cell for each of ``before`` units, filled where it was kept (None: all)."""
    stay = set(range(before) if kept is None else kept)
    gap = 0.14 if before <= _GRID_GAPS else 0.0
    drawn = []
    for wanted, name in ((True, "kept"), (False, "gone")):
        path = "".join(
            f"M{_n(first + gap / 2)} 0h{_n(length - gap)}v1h-{_n(length - gap)}z"
            for first, length in _runs([(unit in stay) == wanted for unit in range(before)], merge=gap == 0)
        )
        if path:
            drawn.append(f'<path class="{name}" d="{path}"/>')
    return svg("".join(drawn), label, height=16, box=f"0 0 {max(before, 1)} 1")


def levels(shares: Sequence[float], label: str) -> Markup:
    """One layer of a grid whose cells are filled up to the share that stays of each (experts of unequal width)."""
    drawn = []
    for index, share in enumerate(shares):
        level = min(max(share, 0.0), 1.0)
        drawn.append(f'<path class="gone" d="M{_n(index + 0.07)} 0h.86v1h-.86z"/>')
        if level > 0:
            drawn.append(f'<path class="kept" d="M{_n(index + 0.07)} 1h.86v-{_n(level)}h-.86z"/>')
    return svg("".join(drawn), label, height=26, box=f"0 0 {max(len(shares), 1)} 1")


def ticks(amount: int) -> Markup:
    """Indices below a grid of ``amount`` columns, at most nine of them; hidden from screen readers, rows say it all."""
    step = next(s for s in _steps() if (amount - 1) // s < 9)
    marks = "".join(
        f'<text x="{_n((index + 0.5) / amount * 100)}%" y="11" text-anchor="middle">{index}</text>'
        for index in range(0, amount, step)
    )
    return Markup('<svg aria-hidden="true" height="14">{}</svg>').format(Markup(marks))


def bar(share: float, label: str, *, height: float = 12) -> Markup:
    """A bar filled up to ``share`` of one; the rest is what was removed."""
    level = _clip(share) * 100
    return svg(
        f'<rect class="gone" width="100%" height="100%"/><rect class="kept" width="{_n(level)}%" height="100%"/>',
        label,
        height=height,
    )


def pair(before: float, after: float, label: str) -> Markup:
    """Two thin bars on one scale from zero: before above, after below."""
    top = max(before, after)
    if not math.isfinite(top) or top <= 0:
        return Markup("")
    return svg(
        f'<rect class="was" y="1" width="{_n(before / top * 100)}%" height="5"/>'
        f'<rect class="kept" y="8" width="{_n(after / top * 100)}%" height="5"/>',
        label,
        height=14,
    )


def stages(shares: Sequence[float], label: str) -> Markup:
    """One bar cut into the stages of a step; every other piece is lighter."""
    drawn, start = [], 0.0
    for index, share in enumerate(shares):
        width = _clip(share) * 100
        name = "kept" if index % 2 == 0 else "kept half"
        drawn.append(f'<rect class="{name}" x="{_n(start)}%" width="{_n(width)}%" height="100%"/>')
        start += width
    return svg("".join(drawn), label, height=10)


def intervals(before: Interval | None, after: Interval, label: str) -> Markup:
    """Before (hollow) above after (filled), each a mean with its 95 % interval, on one scale."""
    shown = [one for one in (before, after) if one is not None]
    ends = [end for one in shown for end in (one.low, one.mean, one.high)]
    if not all(map(math.isfinite, ends)):
        return Markup("")
    low, high = min(ends), max(ends)
    drawn = []
    for row, (one, name) in enumerate(
        (one, name) for one, name in ((before, "was"), (after, "now")) if one is not None
    ):
        drawn.append(_whisker(one, low, high, 11 + 20 * row, name))
    return svg("".join(drawn), label, height=2 + 20 * len(drawn))


def difference(one: Interval, label: str) -> Markup:
    """A paired difference with its 95 % interval against a line at zero."""
    ends = [one.low, one.mean, one.high]
    if not all(map(math.isfinite, ends)):
        return Markup("")
    low, high = min(0.0, *ends), max(0.0, *ends)
    zero = _n(_place(0.0, low, high))
    return svg(
        f'<line class="zero" x1="{zero}%" x2="{zero}%" y1="2" y2="26"/>' + _whisker(one, low, high, 14, "now"),
        label,
        height=28,
    )


def _whisker(one: Interval, low: float, high: float, y: int, name: str) -> str:
    left, middle, right = (_n(_place(end, low, high)) for end in (one.low, one.mean, one.high))
    caps = "".join(f'<line x1="{end}%" x2="{end}%" y1="{y - 4}" y2="{y + 4}"/>' for end in (left, right))
    return (
        f'<g class="{name}"><line x1="{left}%" x2="{right}%" y1="{y}" y2="{y}"/>{caps}'
        f'<circle cx="{middle}%" cy="{y}" r="4"/></g>'
    )


def _place(value: float, low: float, high: float) -> float:
    """Percentage of the width at which ``value`` stands, with 5 % of room on both sides."""
    return 50.0 if high <= low else 5 + 90 * (value - low) / (high - low)


def _runs(flags: Sequence[bool], *, merge: bool) -> list[tuple[int, int]]:
    """``(start, length)`` of the true cells, neighbours merged on request."""
    runs: list[tuple[int, int]] = []
    for index, flag in enumerate(flags):
        if not flag:
            continue
        if merge and runs and sum(runs[-1]) == index:
            runs[-1] = (runs[-1][0], runs[-1][1] + 1)
        else:
            runs.append((index, 1))
    return runs


def _steps() -> list[int]:
    return [base * 10**power for power in range(7) for base in (1, 2, 4, 5, 8)]


def _clip(share: float) -> float:
    return min(max(share, 0.0), 1.0) if math.isfinite(share) else 0.0


def _n(value: float) -> str:
    """A coordinate, short and always the same: three decimals, no trailing zeros."""
    return f"{value:.3f}".rstrip("0").rstrip(".") or "0"
