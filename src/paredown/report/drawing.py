"""The drawing of a comparison: a value against what was kept, one line a method, controls dashed."""

from __future__ import annotations

import io
import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

from paredown.report.tables import COLOURS

if TYPE_CHECKING:
    from paredown.workflow.record import Interval


def svg(
    points: Sequence[tuple[str, float, Interval]],
    controls: set[str],
    *,
    level: tuple[float, str] | None,
    log: bool,
    label: str,
    title: str,
) -> str:
    """Return the drawing as SVG; the same bytes each time.

    Parameters
    ----------
    points : method, share kept, value; methods in the order of the legend
    controls : methods that are drawn dashed and grey
    level : a value to compare with, drawn dotted, and its name
    log : whether values that differ more than fivefold get a logarithmic axis
    label, title : of the values, and of the whole
    """
    import matplotlib
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    style = {"svg.hashsalt": "paredown", "svg.fonttype": "none", "font.family": "sans-serif", "font.size": 9}
    with matplotlib.rc_context(style):
        figure = Figure(figsize=(6.4, 3.8), layout="constrained")
        canvas = FigureCanvasSVG(figure)
        axes = figure.add_subplot()
        methods = list(dict.fromkeys(method for method, _, _ in points))
        for index, method in enumerate(methods):
            found = sorted(((keep, value) for name, keep, value in points if name == method), key=lambda one: one[0])
            # A small shift keeps the bars of methods with equal budgets apart.
            shift = (index - (len(methods) - 1) / 2) * 0.004
            axes.errorbar(
                [keep + shift for keep, _ in found],
                [value.mean for _, value in found],
                yerr=[
                    [max(0.0, value.mean - value.low) for _, value in found],
                    [max(0.0, value.high - value.mean) for _, value in found],
                ],
                label=method,
                color="#8a8a8a" if method in controls else COLOURS[index % len(COLOURS)],
                linestyle="--" if method in controls else "-",
                marker="o",
                markersize=4,
                linewidth=1.4,
                capsize=3,
            )
        if level is not None:
            axes.axhline(level[0], color="#333333", linewidth=0.8, linestyle=":", label=level[1])
        means = [value.mean for _, _, value in points]
        if log and min(means) > 0 and max(means) > 5 * min(means) and math.isfinite(max(means)):
            axes.set_yscale("log")
        axes.set_xlabel("share kept")
        axes.set_ylabel(label)
        axes.set_title(title, fontsize=9)
        axes.set_xticks(sorted({keep for _, keep, _ in points}))
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(frameon=False)
        text = io.StringIO()
        canvas.print_svg(text, metadata={"Date": None, "Creator": None})
    return text.getvalue()
