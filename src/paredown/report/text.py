"""A run's record on the terminal: tables where somebody is looking, plain lines where a program reads."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from paredown.report import words
from paredown.workflow.record import RunRecord, StepRecord

if TYPE_CHECKING:
    from rich.console import Console

_ASCII = str.maketrans(
    {
        "→": "->",
        words.MINUS: "-",
        words.DASH: "-",
        words.TIMES: "x",
        "∞": "inf",
        words.NARROW: " ",
        "✓": "ok",
        "✕": "FAILED",
    }
)


def summary(record: RunRecord, console: Console) -> None:
    """Print what a run did, step by step.

    Parameters
    ----------
    record
        What the run left behind; nothing else is read.
    console
        On a terminal it gets tables; a pipe gets one plain line a fact, without colour, never wrapped. Texts of the
        record are printed literally: neither rich markup nor terminal escapes in them act.
    """
    if console.is_terminal:
        _tables(record, console)
    else:
        _lines(record, console)


def _lines(record: RunRecord, console: Console) -> None:
    for line in lines(record):
        text = line.replace(words.NARROW, " ")
        if not (console.encoding or "").lower().startswith("utf"):
            text = text.translate(_ASCII).encode("ascii", "backslashreplace").decode("ascii")
        console.print(text, markup=False, highlight=False, emoji=False, soft_wrap=True)


def lines(record: RunRecord) -> list[str]:
    """The summary as plain lines, in the order in which things happened."""
    found = [f"model: {words.line(record.model)} ({words.line(record.family)})"]
    for position, step in enumerate(record.steps, start=1):
        found.append(f"step {position}: {_head(step)}")
        found += [f"step {position}: {name}: {text}" for name, text in _facts(step)]
        found += [f"step {position}: warning: {words.line(warning)}" for warning in step.warnings]
    for name, before, after, moved in _costs(record):
        found.append(f"{name.lower()}: {before} → {after} ({moved})" if before else f"{name.lower()}: {after}")
    for name, before, after, moved in _scores(record):
        found.append(f"{name}: {before} → {after}; {moved}" if before else f"{name}: {after}; {moved}")
    found.append(f"gate: {words.gate_sentence(record)}")
    found.append(f"proof: {_proof(record)}")
    if words.written(record):
        found.append(f"load: {_loads(record)}")
    resumed = f", resumed {record.resumed} times" if record.resumed > 1 else ", resumed once" if record.resumed else ""
    found.append(f"time: {words.duration(record.seconds)}{resumed}")
    return found


def _tables(record: RunRecord, console: Console) -> None:
    from rich import box
    from rich.table import Table
    from rich.text import Text

    def table(*heads: str) -> Table:
        made = Table(box=box.SIMPLE_HEAD, pad_edge=False, show_edge=False, header_style="dim")
        for index, head in enumerate(heads):
            made.add_column(head, justify="left" if index == 0 else "right")
        return made

    def show(text: str, style: str = "") -> None:
        console.print(Text(text, style))

    show(f"{words.line(record.model)} ({words.line(record.family)})", "bold")
    for position, step in enumerate(record.steps, start=1):
        show("")
        show(f"Step {position}: {_head(step)}", "bold")
        facts = Table(box=None, show_header=False, pad_edge=False)
        facts.add_column(style="dim")
        facts.add_column(overflow="fold")
        for name, text in _facts(step):
            facts.add_row(Text(name), Text(text))
        console.print(facts)
        for warning in step.warnings:
            show(f"Warning: {words.line(warning)}", "yellow")
        layers = table("layer", "unit", "before", "after", "kept")
        layers.columns[1].justify = layers.columns[4].justify = "left"
        inside = [one for one in step.changes if one.before > 1]  # whole sub-layers and blocks stand in the facts above
        for one in inside:
            kept = "all" if one.kept is None and one.after == one.before else ""
            if one.kept is not None and one.before <= 256:
                kept = words.ranges(one.kept) or "none"
            row = (str(one.layer), words.unit(one.unit, 2), words.count(one.before), words.count(one.after), kept)
            layers.add_row(*map(Text, row))
        if inside:
            show("")
            console.print(layers)
    show("")
    costs = table("", "before", "after", "change")
    for cost in _costs(record):
        costs.add_row(*map(Text, cost))
    console.print(costs)
    if record.scores:
        show("")
        scores = table("measure", "before", "after", "paired difference")
        scores.columns[3].justify = "left"
        for score in _scores(record):
            scores.add_row(*map(Text, score))
        console.print(scores)
    show("")
    show(words.gate_sentence(record), "" if record.gate.passed else "bold red")
    proof = record.proof
    show(f"Proof: {_proof(record)}", "" if proof is None else "green" if proof.passed else "bold red")
    if words.written(record):
        loads = _loads(record)
        show(f"Opens {'in' if loads == 'plain transformers' else 'with'} {loads}:")
        show(words.visible(record.how_to_load).rstrip(), "cyan")


def _loads(record: RunRecord) -> str:
    acting = words.policies(record)
    if not acting:
        return "plain transformers" if record.uniform else "paredown.load"
    without = ", or without them with plain transformers" if record.uniform else ""
    return f"paredown.load, which attaches {words.joined(acting)}{without}"


def _head(step: StepRecord) -> str:
    id_ = words.arxiv(step)
    paper = f" (arXiv:{id_})" if id_ else ""
    return f"{words.line(step.method)} on {words.line(step.axis)}, keeping {words.percent(step.keep)}{paper}"


def _facts(step: StepRecord) -> list[tuple[str, str]]:
    facts = [
        ("fields", words.plain(step.fields)),
        ("data", words.plain(_short(step.data))),
        ("seed", str(step.seed)),
        *_touched(step),
    ]
    for name, changes in words.by_unit(step.changes).items():
        before, after = sum(one.before for one in changes), sum(one.after for one in changes)
        gone = [one.layer for one in changes if one.after < one.before]
        told = f"{words.count(after)} of {words.count(before)} kept, {len(gone)} layers changed"
        if all(one.before <= 1 for one in changes):
            told = f"{len(gone)} removed, in layers {words.ranges(gone) or 'none'}"
        facts.append((words.unit(name, 2), told))
    stages = ", ".join(f"{words.label(name)} {words.duration(value)}" for name, value in step.seconds_by_stage.items())
    planned = step.plan
    time = _held_against(words.duration, planned.seconds, step.seconds)
    facts.append(("time", f"{time}{f': {stages}' if stages else ''}"))
    facts.append(("peak memory", _held_against(words.size, planned.peak_memory_bytes, step.peak_memory_bytes)))
    if step.coverage:
        facts.append(("coverage", words.plain(step.coverage)))
    return [(name, text) for name, text in facts if text != "none"]


def _touched(step: StepRecord) -> list[tuple[str, str]]:
    if step.kind == "policy":
        return [("acts", "while the model runs; no weight is changed")]
    return [
        ("touched", f"{words.percent(step.touched_share)} of the parameters"),
        ("parameters", f"{words.many(step.parameters_before)} → {words.many(step.parameters_after)}"),
    ]


def _held_against(show: Callable[[float], str], planned: float, measured: float) -> str:
    """A measurement with its forecast; a forecast of zero is one that was not made."""
    if not planned:
        return show(measured)
    return f"{show(measured)} (planned {show(planned)}, {words.deviation(planned, measured)})"


def _short(data: dict[str, Any]) -> dict[str, Any]:
    """Data as a terminal has room for it: hashes cut, empty values left out."""
    kept = {key: value for key, value in data.items() if value not in ([], {}, "", None)}
    return {k: v[:12] if isinstance(v, str) and re.fullmatch("[0-9a-f]{40,}", v) else v for k, v in kept.items()}


def _costs(record: RunRecord) -> list[tuple[str, str, str, str]]:
    before, after = record.size_before, record.size_after
    rows = [
        (
            "Parameters",
            words.many(before.parameters),
            words.many(after.parameters),
            before.parameters,
            after.parameters,
        ),
        (
            "Weights",
            words.size(before.bytes_weights),
            words.size(after.bytes_weights),
            before.bytes_weights,
            after.bytes_weights,
        ),
        ("On disk", words.size(before.bytes_disk), words.size(after.bytes_disk), before.bytes_disk, after.bytes_disk),
    ]
    found = [(name, old, new, words.change(a, b)) for name, old, new, a, b in rows]
    fast, slow = record.speed_after, record.speed_before
    if fast is not None:
        for name, field, show in (
            ("Peak memory", "peak_memory_bytes", words.size),
            ("Steady memory", "steady_memory_bytes", words.size),
            ("Prefill", "prefill_tokens_per_second", words.rate),
            ("Decode", "decode_tokens_per_second", words.rate),
        ):
            new = getattr(fast, field)
            old = None if slow is None else getattr(slow, field)
            found.append(
                (name, "" if old is None else show(old), show(new), "" if old is None else words.factor(old, new))
            )
    return found


def _scores(record: RunRecord) -> list[tuple[str, str, str, str]]:
    found = []
    for score in map(words.in_percent, record.scores):
        before = "" if score.before is None else f"{words.mean(score.before)} {words.bounds(score.before)}"
        after = f"{words.mean(score.after)} {words.bounds(score.after)}"
        moved = ""
        if score.difference is not None:
            moved = f"{words.mean(score.difference, signed=True)} {words.bounds(score.difference, signed=True)} "
            moved += f"{words.difference_unit(score)}: ".lstrip() if words.difference_unit(score) else ""
        found.append((words.line(score.name), before, after, f"{moved}{words.reading(score)}"))
    return found


def _proof(record: RunRecord) -> str:
    proof = record.proof
    if proof is None:
        return "not made yet" if words.written(record) else "nothing was written"
    gap = words.significant(proof.max_abs_logit_difference)
    verdict = "passed" if proof.passed else "FAILED"
    return f"{verdict} (opened with {words.opens(proof.loader)}, logits differ by at most {gap})"
