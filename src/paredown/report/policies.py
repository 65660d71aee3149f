"""Comparisons of policies and what generating took, for people; the forms of `results`."""

from __future__ import annotations

from typing import TYPE_CHECKING

from paredown.report import drawing, words
from paredown.report.tables import difference, footnotes, interval, markdown_row, plain, table

if TYPE_CHECKING:
    from rich.console import Console

    from paredown.workflow.generate import Generated
    from paredown.workflow.measured import PolicyComparison, PolicyRow

_TASKS = {"recall": "recall", "vqa": "answers", "ppl": "perplexity"}


def generated(made: Generated) -> str:
    """Say in one line what generating took."""
    parts = [
        f"{words.count(made.prompt_tokens)} prompt tokens",
        f"first token after {words.duration(made.seconds_to_first_token)}",
    ]
    if made.tokens_per_second is not None:
        parts.append(f"{words.count(made.new_tokens)} new tokens at {words.rate(made.tokens_per_second)}")
    else:
        parts.append(f"{words.count(made.new_tokens)} new token")
    if made.cache_peak_bytes:
        held = f"{words.size(made.cache_peak_bytes)} at most, {words.size(made.cache_steady_bytes)} at the end"
        parts.append(f"key-value cache {held}")
    if made.policies:
        parts.append(f"under {words.joined([words.line(one['method']) for one in made.policies])}")
    return ", ".join(parts).replace(words.NARROW, " ")


def comparison(record: PolicyComparison, console: Console) -> None:
    """Print a comparison: a table on a terminal, the same rows as plain lines in a pipe."""
    heads, rows = _heads(record), [_original(record), *(_cells(record, row) for row in record.rows)]
    if console.is_terminal:
        console.print(table(heads, rows))
    else:
        widths = [max(len(row[column]) for row in (heads, *rows)) for column in range(len(heads))]
        plain(["  ".join(c.ljust(w) for c, w in zip(row, widths, strict=True)) for row in (heads, *rows)], console)
    footnotes(_captions(record), console)


def markdown(record: PolicyComparison) -> str:
    """Return a comparison as a Markdown table with what is needed to read it; for docs."""
    heads, rows = _heads(record), [_original(record), *(_cells(record, row) for row in record.rows)]
    left = {"method", "verdict", "and verdict"}
    lines = [markdown_row(heads), markdown_row(["---" if head in left else "---:" for head in heads])]
    lines += [markdown_row(row) for row in rows]
    return "\n".join([*lines, "", *(f"- {caption}" for caption in _captions(record))]) + "\n"


def svg(record: PolicyComparison) -> str:
    """Return a comparison as a drawing: the score against what was kept, controls dashed; the same bytes each time."""
    text = record.task == "ppl"
    return drawing.svg(
        [(row.method, row.keep, row.score) for row in record.rows],
        {row.control for row in record.rows if row.control is not None},
        level=(record.original.mean, "no policy"),
        log=text,
        label="perplexity" if text else "share of correct answers",
        title=f"{words.short_name(record.model)}: mean and 95 % interval, {_seeds(record)}",
    )


def _heads(record: PolicyComparison) -> list[str]:
    heads = ["method", "keep", _TASKS[record.task]]
    if record.task == "ppl":
        heads.append("KL")
    heads += ["KV bytes", "tokens kept", "time", "against random", "verdict"]
    if _with_streaming(record):
        heads += ["against streaming", "and verdict"]
    return heads


def _original(record: PolicyComparison) -> list[str]:
    tokens = "" if record.original_tokens is None else words.significant(record.original_tokens)
    row = ["no policy", "1", interval(record.original)]
    if record.task == "ppl":
        row.append("0")
    row += [words.percent(1.0), tokens, words.duration(record.original_seconds), "", ""]
    return [*row, "", ""] if _with_streaming(record) else row


def _cells(record: PolicyComparison, row: PolicyRow) -> list[str]:
    share = words.percent(_rounded(row.steady_share))
    if abs(row.peak_share - row.steady_share) > 0.01 * row.steady_share:
        share += f" (at most {words.percent(_rounded(row.peak_share))})"
    preparing = f" + {words.duration(row.seconds_preparing)}" if row.seconds_preparing > 0.05 else ""
    found = [words.line(row.method), f"{row.keep:g}", interval(row.score)]
    if record.task == "ppl":
        found.append("" if row.kl is None else interval(row.kl))
    found += [
        share,
        "" if row.tokens is None else words.significant(row.tokens),
        f"{words.duration(row.seconds)}{preparing}",
        "" if row.difference is None else difference(row.difference, ""),
        row.verdict or "",
    ]
    if _with_streaming(record):
        found += [
            "" if row.streaming_difference is None else difference(row.streaming_difference, ""),
            row.streaming_verdict or "",
        ]
    return found


def _rounded(share: float) -> float:
    return round(share, 3)


def _with_streaming(record: PolicyComparison) -> bool:
    return any(row.streaming_difference is not None for row in record.rows)


def _seeds(record: PolicyComparison) -> str:
    return f"{len(record.seeds)} seed{'s' if len(record.seeds) > 1 else ''}"


def _captions(record: PolicyComparison) -> list[str]:
    what = {
        "recall": f"{record.items} questions about planted facts",
        "vqa": f"{record.items} questions about cells of images",
        "ppl": f"{record.items} held-out rows of {record.data.get('length', 0)} tokens",
    }[record.task]
    sample = record.calibration
    learned = f", calibrated on {sample['sequences']} rows of {sample['length']}" if sample else ""
    if record.task != "ppl":
        unit = "share of correct answers; above zero is better"
    elif record.metric == "ppl":
        unit = "negative log-likelihood, in nats a token; below zero is better"
    else:
        unit = "KL divergence from the model without policy, in nats a token; below zero is better"
    return [
        f"{words.line(record.model)}, {_seeds(record)}, {what}{learned}, {record.dtype}; 95 % intervals over seeds and "
        "items.",
        f"“Against” is the paired difference at the same keep to the random control of the same unit"
        f"{', and to streaming' if _with_streaming(record) else ''}, in {unit}.",
        f"KV bytes: what the caches held at the end, as a share of {words.size(record.original_bytes[1])} without a "
        "policy; tokens kept: entries of a row at the end, the mean over layers and heads; time: scoring + preparing.",
        *(words.line(note) for note in record.notes),
    ]
