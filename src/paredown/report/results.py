"""What `evaluate` and `compare` found, for people: tables, plain lines for pipes, Markdown and SVG for docs."""

from __future__ import annotations

import io
import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from paredown.report import words

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

    from paredown.workflow.measured import CompareRecord, EvalRecord, Ratio, Row, Side
    from paredown.workflow.record import Interval

_HEADS = ("method", "keep", "perplexity", "KL", "against random", "", "parameters", "weights", "time")
_ASCII = str.maketrans({words.MINUS: "-", words.TIMES: "x", words.DASH: "-", "∞": "inf", "“": '"', "”": '"'})
_COLOURS = ("#0b6e99", "#c4532d", "#4a7c2c", "#7a4b9c", "#a8860b", "#b03a68", "#2f5d8a", "#5a5a5a")


def evaluation(record: EvalRecord, console: Console) -> None:
    """Print an evaluation: scores, then size, memory and speed.

    Parameters
    ----------
    record
        What was measured.
    console
        A terminal gets tables; a pipe gets the same facts, one a line, never wrapped.
    """
    scores, costs = _scores(record), _costs(record)
    if not console.is_terminal:
        lines = [f"model: {words.line(record.model.model)}"]
        if record.against is not None:
            lines.append(f"against: {words.line(record.against.model)}")
        plain([*lines, *map(_fact, (*scores, *costs))], console)
        _footnotes([_conditions(record), *record.notes], console)
        return
    other = words.short_name(record.against.model) if record.against is not None else None
    own = words.short_name(record.model.model)
    console.print(_table(("", own, *((other, "difference") if other else ())), scores))
    console.print()
    console.print(_table(("", own, *((other, "ratio") if other else ())), costs))
    _footnotes([_conditions(record), *record.notes], console)


def comparison(record: CompareRecord, console: Console) -> None:
    """Print a comparison.

    Parameters
    ----------
    record
        What was measured.
    console
        A terminal gets a table; a pipe gets the same rows, columns apart, without frame or colour.
    """
    rows = [_original(record), *(_cells(row) for row in record.rows)]
    if console.is_terminal:
        console.print(_table(_HEADS, rows))
    else:
        widths = [max(len(row[column]) for row in (_HEADS, *rows)) for column in range(len(_HEADS))]
        plain(["  ".join(c.ljust(w) for c, w in zip(row, widths, strict=True)) for row in (_HEADS, *rows)], console)
    _footnotes(_captions(record), console)


def markdown(record: CompareRecord) -> str:
    """Return a comparison as a Markdown table with what is needed to read it; for docs."""
    rows = [_original(record), *(_cells(row) for row in record.rows)]
    heads = ["method", "keep", "perplexity", "KL", "against random", "verdict", "parameters", "weights", "time"]
    lines = [_markdown_row(heads), _markdown_row(["---", *["---:"] * 4, "---", *["---:"] * 3])]
    lines += [_markdown_row(row) for row in rows]
    return "\n".join([*lines, "", *(f"- {caption}" for caption in _captions(record))]) + "\n"


def svg(record: CompareRecord) -> str:
    """Return a comparison as a drawing: the metric against what was kept, controls dashed; the same bytes each time."""
    import matplotlib
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    controls = {row.control for row in record.rows} - {None}
    style = {"svg.hashsalt": "paredown", "svg.fonttype": "none", "font.family": "sans-serif", "font.size": 9}
    with matplotlib.rc_context(style):
        figure = Figure(figsize=(6.4, 3.8), layout="constrained")
        canvas = FigureCanvasSVG(figure)
        axes = figure.add_subplot()
        methods = list(dict.fromkeys(row.method for row in record.rows))
        for index, method in enumerate(methods):
            found = sorted((row for row in record.rows if row.method == method), key=lambda row: row.keep)
            # A small shift keeps the bars of methods with equal budgets apart.
            shift = (index - (len(methods) - 1) / 2) * 0.004
            values = [row.perplexity if record.metric == "ppl" else row.kl for row in found]
            axes.errorbar(
                [row.keep + shift for row in found],
                [value.mean for value in values],
                yerr=[
                    [max(0.0, value.mean - value.low) for value in values],
                    [max(0.0, value.high - value.mean) for value in values],
                ],
                label=method,
                color="#8a8a8a" if method in controls else _COLOURS[index % len(_COLOURS)],
                linestyle="--" if method in controls else "-",
                marker="o",
                markersize=4,
                linewidth=1.4,
                capsize=3,
            )
        if record.metric == "ppl":
            axes.axhline(record.original.mean, color="#333333", linewidth=0.8, linestyle=":", label="original")
        means = [row.perplexity.mean if record.metric == "ppl" else row.kl.mean for row in record.rows]
        if min(means) > 0 and max(means) > 5 * min(means) and math.isfinite(max(means)):
            axes.set_yscale("log")
        axes.set_xlabel("share kept")
        axes.set_ylabel("perplexity" if record.metric == "ppl" else "KL to the original (nats/token)")
        axes.set_title(f"{words.short_name(record.model)}: mean and 95 % interval, {_seeds(record)}", fontsize=9)
        axes.set_xticks(sorted({row.keep for row in record.rows}))
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(frameon=False)
        text = io.StringIO()
        canvas.print_svg(text, metadata={"Date": None, "Creator": None})
    return text.getvalue()


# ---- rows ------------------------------------------------------------------------------------------------------------


def _scores(record: EvalRecord) -> list[tuple[str, ...]]:
    rows: list[tuple[str, ...]] = []
    for score in record.scores:
        unit = f" ({words.line(score.unit)})" if score.unit else ""
        row = [f"{words.line(score.name)}{unit}", _interval(score.after)]
        if record.against is not None:
            row.append("" if score.before is None else _interval(score.before))
            row.append("" if score.difference is None else _difference(score.difference, words.difference_unit(score)))
            if score.difference is not None:
                row[-1] += f": {words.reading(score)}"
        rows.append(tuple(row))
    return rows


def _costs(record: EvalRecord) -> list[tuple[str, ...]]:
    sides = [record.model, *([record.against] if record.against is not None else [])]
    rows: list[tuple[str, ...]] = [
        _sized("parameters", [side.size.parameters for side in sides], words.many),
        _sized("weights", [side.size.bytes_weights for side in sides], words.size),
        _sized("on disk", [side.size.bytes_disk for side in sides], words.size),
    ]
    memories = [side.memory for side in sides if side.memory is not None]
    if len(memories) == len(sides):
        rows.append(_sized("steady memory", [used.steady_bytes for used in memories], words.size))
        rows.append(_sized("peak memory", [used.peak_bytes for used in memories], words.size))
        if memories[0].baseline_bytes:
            rows.append(("of which before loading", *(words.size(used.baseline_bytes) for used in memories)))
    for kind, ratio in (("prefill", record.prefill_ratio), ("decode", record.decode_ratio)):
        if found := _timed(kind, sides, ratio):
            rows.append(found)
    rows.append(("opens in", *(side.loads_in for side in sides)))
    return rows


def _sized(name: str, values: Sequence[int], show: Callable[[float], str] | Callable[[int], str]) -> tuple[str, ...]:
    return (
        name,
        *(show(value) for value in values),
        *([words.factor(values[1], values[0])] if len(values) > 1 else []),
    )


def _timed(kind: str, sides: Sequence[Side], ratio: Ratio | None) -> tuple[str, ...]:
    timings = [side.prefill if kind == "prefill" else side.decode for side in sides]
    found = [timing for timing in timings if timing is not None]
    if len(found) < len(sides):
        return ()
    name = f"{kind} ({found[0].tokens} tokens)"
    shown = [f"{words.duration(timing.median_seconds)}, {words.rate(timing.tokens_per_second)}" for timing in found]
    if ratio is None:
        return (name, *shown)
    spread = f"{words.significant(ratio.low, 2)} to {words.significant(ratio.high, 2)}"
    return (name, *shown, f"{words.significant(ratio.median, 2)}{words.TIMES} the time ({spread})")


def _original(record: CompareRecord) -> tuple[str, ...]:
    size = record.size
    return (
        "original",
        "1",
        _interval(record.original),
        "0",
        "",
        "",
        words.many(size.parameters),
        words.size(size.bytes_weights),
        "",
    )


def _cells(row: Row) -> tuple[str, ...]:
    return (
        words.line(row.method),
        f"{row.keep:g}",
        _interval(row.perplexity),
        _interval(row.kl),
        "" if row.difference is None else _difference(row.difference, ""),
        row.verdict or "",
        words.many(row.parameters),
        words.size(row.bytes_weights),
        words.duration(row.seconds),
    )


def _interval(of: Interval) -> str:
    if of.high - of.low > 2 * abs(of.mean):
        # So wide an interval justifies no digit of the mean, but somebody will want to know it.
        return f"{words.significant(of.mean, 2)} [{words.significant(of.low, 2)}, {words.significant(of.high, 2)}]"
    return f"{words.mean(of)} {words.bounds(of)}"


def _difference(of: Interval, unit: str) -> str:
    return f"{words.mean(of, signed=True)} {words.bounds(of, signed=True)}{f' {unit}' if unit else ''}"


def _conditions(record: EvalRecord) -> str:
    data = record.data
    read = f"{data['sequences']} rows of {data['length']} tokens of {data['name']}" if data else "no text"
    what = f"; memory: {record.model.memory.what}" if record.model.memory is not None else ""
    return f"Quality: {read}, {record.dtype}, 95 % intervals over rows or questions{what}."


def _seeds(record: CompareRecord) -> str:
    return f"{len(record.seeds)} seed{'s' if len(record.seeds) > 1 else ''}"


def _captions(record: CompareRecord) -> list[str]:
    data, sample = record.data, record.calibration
    what = "negative log-likelihood" if record.metric == "ppl" else "KL divergence from the original"
    return [
        f"{words.line(record.model)}, {_seeds(record)}, {data['sequences']} held-out rows of {data['length']} "
        f"tokens, calibrated on {sample['sequences']} rows of {sample['length']}, {record.dtype}; "
        f"KL and differences in nats a token, 95 % intervals over seeds and rows.",
        f"“Against random” is the paired difference in {what} to the random control of the same unit at the same "
        "keep; below zero is better.",
        *(words.line(note) for note in record.notes),
    ]


# ---- ways to show them -----------------------------------------------------------------------------------------------


def _table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> Table:
    from rich import box
    from rich.table import Table
    from rich.text import Text

    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, show_edge=False, header_style="dim")
    for index, head in enumerate(heads):
        table.add_column(Text(head), justify="left" if index == 0 else "right")
    for row in rows:
        table.add_row(*map(Text, row))
    return table


def _fact(row: Sequence[str]) -> str:
    name, own, *rest = row
    against = f"; against: {rest[0]}" if rest and rest[0] else ""
    return f"{name}: {own}{against}{f'; {rest[1]}' if len(rest) > 1 and rest[1] else ''}"


def plain(lines: Sequence[str], console: Console) -> None:
    """Print lines literally and unwrapped, in ASCII where the pipe takes nothing else."""
    ascii_only = not (console.encoding or "").lower().startswith("utf")
    for line in lines:
        text = line.replace(words.NARROW, " ").rstrip()
        if ascii_only:
            text = text.translate(_ASCII).encode("ascii", "backslashreplace").decode("ascii")
        console.print(text, markup=False, highlight=False, emoji=False, soft_wrap=True)


def _footnotes(notes: Sequence[str], console: Console) -> None:
    from rich.text import Text

    if not console.is_terminal:
        plain([f"note: {words.line(note)}" for note in notes], console)
        return
    console.print()
    for note in notes:
        console.print(Text(words.line(note), "dim"))


def _markdown_row(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in cells)} |"
