"""What `evaluate` and `compare` found, for people: tables, plain lines for pipes, Markdown and SVG for docs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from paredown.report import drawing, words
from paredown.report.tables import difference, footnotes, interval, markdown_row, plain, table

if TYPE_CHECKING:
    from rich.console import Console

    from paredown.workflow.measured import CompareRecord, EvalRecord, Ratio, Row, Side

_HEADS = ("method", "keep", "perplexity", "KL", "against random", "", "parameters", "weights", "time")


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
        footnotes([_conditions(record), *record.notes], console)
        return
    other = words.short_name(record.against.model) if record.against is not None else None
    own = words.short_name(record.model.model)
    console.print(table(("", own, *((other, "difference") if other else ())), scores))
    console.print()
    console.print(table(("", own, *((other, "ratio") if other else ())), costs))
    footnotes([_conditions(record), *record.notes], console)


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
        console.print(table(_HEADS, rows))
    else:
        widths = [max(len(row[column]) for row in (_HEADS, *rows)) for column in range(len(_HEADS))]
        plain(["  ".join(c.ljust(w) for c, w in zip(row, widths, strict=True)) for row in (_HEADS, *rows)], console)
    footnotes(_captions(record), console)


def markdown(record: CompareRecord) -> str:
    """Return a comparison as a Markdown table with what is needed to read it; for docs."""
    rows = [_original(record), *(_cells(row) for row in record.rows)]
    heads = ["method", "keep", "perplexity", "KL", "against random", "verdict", "parameters", "weights", "time"]
    lines = [markdown_row(heads), markdown_row(["---", *["---:"] * 4, "---", *["---:"] * 3])]
    lines += [markdown_row(row) for row in rows]
    return "\n".join([*lines, "", *(f"- {caption}" for caption in _captions(record))]) + "\n"


def svg(record: CompareRecord) -> str:
    """Return a comparison as a drawing: the metric against what was kept, controls dashed; the same bytes each time."""
    text = record.metric == "ppl"
    return drawing.svg(
        [(row.method, row.keep, row.perplexity if text else row.kl) for row in record.rows],
        {row.control for row in record.rows if row.control is not None},
        level=(record.original.mean, "original") if text else None,
        log=True,
        label="perplexity" if text else "KL to the original (nats/token)",
        title=f"{words.short_name(record.model)}: mean and 95 % interval, {_seeds(record)}",
    )


# ---- rows ------------------------------------------------------------------------------------------------------------


def _scores(record: EvalRecord) -> list[tuple[str, ...]]:
    rows: list[tuple[str, ...]] = []
    for score in record.scores:
        unit = f" ({words.line(score.unit)})" if score.unit else ""
        row = [f"{words.line(score.name)}{unit}", interval(score.after)]
        if record.against is not None:
            row.append("" if score.before is None else interval(score.before))
            row.append("" if score.difference is None else difference(score.difference, words.difference_unit(score)))
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
    rows += _caches(sides)
    rows.append(("opens in", *(side.loads_in for side in sides)))
    return rows


def _caches(sides: Sequence[Side]) -> list[tuple[str, ...]]:
    """What policies save: bytes of the caches, and each side under policies against itself without them."""
    found: list[tuple[str, ...]] = []
    held = [side.cache for side in sides if side.cache is not None]
    if len(held) == len(sides):
        name = f"KV cache, {held[0].prompt} + {held[0].decoded} tokens"
        found.append(_sized(f"{name}, peak", [one.peak_bytes for one in held], words.size))
        found.append(_sized(f"{name}, at the end", [one.steady_bytes for one in held], words.size))
    for side in sides:
        alone = side.alone
        if alone is None or side.cache is None:
            continue
        names = words.joined([words.line(one["method"]) for one in side.policies])
        told = [
            f"{kind} {words.significant(ratio.median, 2)}{words.TIMES} the time "
            f"({words.significant(ratio.low, 2)} to {words.significant(ratio.high, 2)})"
            for kind, ratio in (("prefill", alone.prefill), ("decode", alone.decode))
        ]
        share = words.percent(round(side.cache.steady_bytes / max(1, alone.cache.steady_bytes), 3))
        text = f"{', '.join(told)}, KV cache {share}"
        empty = ("",) * (len(sides) - 1)
        place = (text, *empty) if side is sides[0] else (*empty, text)
        found.append((f"{names} against without", *place, *empty))
    return found


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
        interval(record.original),
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
        interval(row.perplexity),
        interval(row.kl),
        "" if row.difference is None else difference(row.difference, ""),
        row.verdict or "",
        words.many(row.parameters),
        words.size(row.bytes_weights),
        words.duration(row.seconds),
    )


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


def _fact(row: Sequence[str]) -> str:
    name, own, *rest = row
    against = f"; against: {rest[0]}" if rest and rest[0] else ""
    return f"{name}: {own}{against}{f'; {rest[1]}' if len(rest) > 1 and rest[1] else ''}"
