"""How a scan's views of depth are drawn: what is said above, drawn in a row, and told beside it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from markupsafe import Markup

from paredown.report import scandraw, words
from paredown.workflow.scanned import LayerRow, ScanView


@dataclass(frozen=True)
class Drawn:
    """A drawing a row: ``count`` cells wide, numbered where ``axis`` names them, or above ``ticks``."""

    caption: str
    draw: Callable[[LayerRow], Markup]
    told: Callable[[LayerRow], str]
    axis: str = ""
    count: int = 24
    ticks: Markup | None = None


def contribution(view: ScanView) -> Drawn:
    """Marks on a line from nothing to the stream's own norm."""
    return _marks(
        view,
        ("attention", "mlp", "block"),
        "Norm of what is added, as a share of the stream's: disc attention, ring MLP, bar the whole block; the "
        "stream's own norm or more at the right edge.",
        "attention, MLP and block add",
    )


def linear_term(view: ScanView) -> Drawn:
    """Marks for second order, rest and first order."""
    return _marks(
        view,
        ("second", "rest", "first"),
        "Two blocks from this one on, as shares of their common change: disc second order, ring the rest, bar the sum "
        "of both on one input. The further left disc and ring, the more the two work side by side.",
        "second order, rest and first order are",
    )


def skip_effect(view: ScanView) -> Drawn:
    """A heat map: a row for the block that is bypassed, a cell for each block whose update changes."""

    def told(row: LayerRow) -> str:
        return f"output {_nats(row.values['output'])}"

    def draw(row: LayerRow) -> Markup:
        listed = ", ".join(words.number(v, 2) for v in row.series["effects"][row.layer + 1 :][:64]) or "none"
        return scandraw.heat(
            row.series["effects"], 1.0, f"block {row.layer} bypassed; {told(row)}; later blocks: {listed}"
        )

    return Drawn(
        "Without the block of a row: change of the update of each block (its own is 1). A full cell has changed by its "
        "own norm or more; right, the divergence of the output.",
        draw,
        told,
        axis="block",
        count=len(view.rows),
    )


def lens(view: ScanView) -> Drawn:
    """Bars: how much of the output's five likeliest tokens stands already."""

    def told(row: LayerRow) -> str:
        text = _nats(row.values["divergence"])
        concept = row.values["concept"]
        return text if concept is None else f"{text}; readout {words.percent(round(concept, 3))}"

    return Drawn(
        "Share of the five likeliest tokens that the output has in common with norm and head put on the stream behind "
        "each block; right, their divergence, and how often the linear readout is right.",
        lambda row: scandraw.nested(
            [row.values["top5"] or 0.0],
            f"after layer {row.layer}: {words.percent(row.values['top5'] or 0.0)}; {told(row)}",
        ),
        told,
        ticks=scandraw.scale(100, 25, " %", margin=0),
    )


def _marks(view: ScanView, keys: Sequence[str], caption: str, verb: str) -> Drawn:
    def told(row: LayerRow) -> str:
        return " / ".join(words.DASH if (v := row.values[k]) is None else words.significant(v, 2) for k in keys)

    return Drawn(
        caption,
        lambda row: scandraw.dots([row.values[k] for k in keys], 1.0, f"layer {row.layer}: {verb} {told(row)}"),
        told,
        ticks=scandraw.scale(1, 0.25, words.TIMES),
    )


def _nats(value: float | None) -> str:
    return words.DASH if value is None else f"{words.significant(value, 2)}{words.NARROW}nats"
