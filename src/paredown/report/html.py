"""The report of a run: one HTML file that holds everything it shows and loads nothing."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import cache
from typing import Any

import yaml
from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from paredown.report import figures, ledger, words
from paredown.workflow.record import Interval, LayerChange, RunRecord, Score, Size, Speed, StepRecord

_GRID_LIMIT = 512  # units a layer up to which each one gets a cell of its own
_FAR = 0.2  # a plan that misses its measurement by more than this is marked


def render(record: RunRecord) -> str:
    """Draw the report of a run.

    Parameters
    ----------
    record
        What the run left behind; nothing else is read.

    Returns
    -------
    str
        A whole HTML document with its styles and drawings inside. The same record gives the same text. Every text of
        the record is escaped, and a content security policy forbids the page to load or run anything.
    """
    record = record.model_copy(update={"scores": [words.in_percent(score) for score in record.scores]})
    context: dict[str, Any] = {
        "record": record,
        "name": words.short_name(record.model),
        "lead": _lead(record),
        "facts": _facts(record),
        "warnings": [(n, step, text) for n, step in enumerate(record.steps, start=1) for text in step.warnings],
        "plans": [_plan(record, step) for step in record.steps],
        "removed": [_removed(step) for step in record.steps],
        "scores": [_score(score) for score in record.scores],
        "costs": _costs(record),
        "ledger": ledger.rows(record),
        "ledger_heads": ledger.HEADS,
        "policies": words.policies(record),
        "steps": [_step(step) for step in record.steps],
        "proof": _proof(record),
        "versions": [
            (words.line(k), words.line(v)) for k, v in ({"paredown": record.paredown} | record.versions).items()
        ],
        "recipe": yaml.safe_dump(record.recipe, sort_keys=False, allow_unicode=True, width=100).rstrip(),
    }
    return environment().get_template("report.html.j2").render(context)


@cache
def environment() -> Environment:
    """Return the templates' environment: everything escaped, nothing undefined passes."""
    made = Environment(
        loader=PackageLoader("paredown.report"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    made.globals.update({"w": words, "datum": datum})
    made.filters["visible"] = words.visible
    made.filters["line"] = words.line
    return made


def datum(value: float | None, text: str) -> Markup:
    """A measured number: ``text`` for people, the exact value for machines and for a resting mouse."""
    if value is None:
        return Markup("{}").format(text)
    exact = f"{value:,}" if isinstance(value, int) else repr(value)
    return Markup('<data value="{}" title="{}">{}</data>').format(repr(value), exact, text)


# ---- what a busy reader sees first -----------------------------------------------------------------------------------


def _lead(record: RunRecord) -> list[str]:
    """The verdict, sentence by sentence: what went in, what came out, what it cost, whether it is proven."""
    acting = words.policies(record)
    methods = words.joined(
        list(dict.fromkeys(words.line(step.method) for step in record.steps if step.kind != "policy"))
    )
    gone = words.joined(words.removed(record)) or "no whole unit"
    stands = words.written(record)
    sentences = [
        f"Paredown {'removed' if stands else 'would have removed'} {gone}{f' with {methods}' if methods else ''}."
    ]
    if acting and len(acting) == len(record.steps):
        sentences = ["Paredown changed no weight."]
    if acting:
        verb = "acts" if len(acting) == 1 else "act"
        sentences.append(f"{words.joined(acting)} {verb} while the model runs; paredown.load attaches what acts.")
    before, after = record.size_before.bytes_weights, record.size_after.bytes_weights
    sentences.append(
        f"The weights {'went' if stands else 'would have gone'} from {words.move(before, after).replace('→', 'to')} "
        f"({words.change(before, after)})."
    )
    if record.scores:
        sentences.append(_quality(record.scores[0]))
    if record.proof is not None:
        sentences.append("The proof passed." if record.proof.passed else "The proof failed: do not use the result.")
    else:
        sentences.append("It has not been proven." if stands else "Nothing was written.")
    if not record.gate.passed:
        sentences.insert(0, words.gate_sentence(record))
    return sentences


def _quality(score: Score) -> str:
    name = words.line(score.name)
    name = name[:1].upper() + name[1:]
    unit = f"{words.NARROW}{words.score_unit(score)}".rstrip()
    after = f"{words.mean(score.after)}{unit} {words.bounds(score.after)}"
    if score.before is None:
        return f"{name} is {after}."
    said = words.reading(score)
    told = {"better": ", a gain", "worse": ", a loss"}.get(said, f": {said}")
    verb = "went" if told.startswith(":") else "rose" if (said == "better") == score.higher_is_better else "fell"
    return f"{name} {verb} from {words.mean(score.before)} {words.bounds(score.before)} to {after}{told}."


def _facts(record: RunRecord) -> list[dict[str, Any]]:
    before, after = record.size_before, record.size_after
    facts = [
        {
            "name": "Weights",
            "big": words.move(before.bytes_weights, after.bytes_weights),
            "small": words.change(before.bytes_weights, after.bytes_weights),
            "state": "",
        }
    ]
    if record.scores:
        score = record.scores[0]
        name = words.line(score.name)
        unit = f"{words.NARROW}{words.score_unit(score)}".rstrip()
        before_text = f"{words.mean(score.before)} → " if score.before else ""
        facts.append(
            {
                "name": name[:1].upper() + name[1:],
                "big": f"{before_text}{words.mean(score.after)}{unit}",
                "small": _difference(score),
                "state": "",
            }
        )
    gate = record.gate
    value = "" if gate.value is None else words.significant(gate.value)
    facts.append(
        {
            "name": "Gate",
            "big": "none asked" if gate.kind == "none" else "passed" if gate.passed else "failed",
            "small": " ".join(
                part
                for part in (
                    "" if gate.kind == "none" else f"{gate.kind} {value}".strip(),
                    "" if gate.limit is None else f"(limit {words.significant(gate.limit)})",
                )
                if part
            ),
            "state": "" if gate.kind == "none" else "good" if gate.passed else "bad",
        }
    )
    proof = record.proof
    facts.append(
        {
            "name": "Proof",
            "big": "not made" if proof is None else "passed" if proof.passed else "failed",
            "small": "nothing was written"
            if not words.written(record)
            else "the result was not reopened"
            if proof is None
            else "fresh process, logits equal"
            if proof.max_abs_logit_difference == 0
            else f"fresh process, logits within {words.significant(proof.max_abs_logit_difference, 2)}",
            "state": "" if proof is None else "good" if proof.passed else "bad",
        }
    )
    return facts


def _difference(score: Score) -> str:
    if score.difference is None:
        return words.bounds(score.after)
    unit = words.difference_unit(score)
    moved = f"{words.mean(score.difference, signed=True)}{f' {unit}' if unit else ''}"
    return f"{moved} {words.bounds(score.difference, signed=True)}"


# ---- plan against measurement ----------------------------------------------------------------------------------------


def _plan(record: RunRecord, step: StepRecord) -> dict[str, Any]:
    plan = step.plan
    rows = [
        _planned("Parameters", words.many, step.parameters_before, plan.parameters_after, step.parameters_after),
    ]
    # Weights are written once, after the last step: only there is a measured size to hold against the plan.
    if step is record.steps[-1]:
        rows.append(
            _planned("Weights", words.size, plan.bytes_before, plan.bytes_after, record.size_after.bytes_weights)
        )
    else:
        rows.append(_planned("Weights", words.size, plan.bytes_before, plan.bytes_after, None))
    rows.append(_planned("Peak memory", words.size, None, plan.peak_memory_bytes, step.peak_memory_bytes))
    rows.append(_planned("Time", words.duration, None, plan.seconds, step.seconds))
    return {"step": step, "plan": plan, "rows": rows, "shapes": words.shape_groups(plan.shapes)}


def _planned(
    name: str, show: Any, before: float | None, planned: float, measured: float | None
) -> dict[str, Any]:  # `show` is one of the formatters of `words`
    def cell(value: float | None) -> Markup:
        return Markup(words.DASH) if value is None else datum(value, show(value))

    far = measured is not None and planned != 0 and abs(measured / planned - 1) > _FAR
    return {
        "name": name,
        "before": cell(before),
        "planned": cell(planned or None),  # a forecast of zero is one that was not made
        "measured": cell(measured),
        "deviation": words.DASH if measured is None else words.deviation(planned, measured),
        "far": far,
    }


# ---- what was removed ------------------------------------------------------------------------------------------------


def _removed(step: StepRecord) -> dict[str, Any]:
    groups = words.by_unit(step.changes)
    lone = {name: changes for name, changes in groups.items() if all(one.before <= 1 for one in changes)}
    drawn = [_strip(step, lone)] if lone else []
    drawn += [_grid(name, changes) for name, changes in groups.items() if name not in lone]
    return {"step": step, "figures": drawn}


def _depth(step: StepRecord) -> int:
    """Layers that a step is known to have had: those it lists and those whose tensors the plan names."""
    planned = [words.layer_pattern(name)[1] for name in step.plan.shapes]
    return 1 + max([one.layer for one in step.changes] + [layer for layer in planned if layer is not None], default=0)


def _strip(step: StepRecord, groups: dict[str, list[LayerChange]]) -> dict[str, Any]:
    """Sub-layers and blocks: one row a kind, one cell a layer."""
    depth = _depth(step)
    open_end = all(one.after == 0 for changes in groups.values() for one in changes)
    rows = []
    for name, changes in groups.items():
        gone = [one.layer for one in changes if one.after < one.before]
        of = f" of {len(changes)}" if len(changes) > len(gone) else ""
        stay = [layer for layer in range(depth) if layer not in set(gone)]
        label = f"{words.unit(name, 2)}: {len(gone)}{of} removed, layers {words.ranges(gone) or 'none'}"
        rows.append(
            {
                "head": words.unit(name, 2),
                "drawing": figures.cells(depth, stay, label),
                "text": f"{len(gone)}{of} removed",
                "lists": [("removed in layers", words.ranges(gone) or "none")],
                "details": _by_layer(changes),
            }
        )
    names = words.joined([words.unit(name, 2) for name in groups])
    return {
        "caption": f"{names[:1].upper()}{names[1:]} by layer. Filled: kept. Hollow: removed."
        + (f" Layers after {depth - 1} are as they were." if open_end else ""),
        "corner": "",
        "axis": "layer",
        "rows": rows,
        "width": figures.cells_width(depth),
        "ticks": figures.ticks(depth),
        "summary": "The layers, listed",
    }


def _by_layer(changes: list[LayerChange]) -> list[tuple[str, str]]:
    """Details of layers, turned around: for each key, its value layer by layer on one line."""
    keys = list(dict.fromkeys(key for one in changes for key in one.detail))
    return [
        (
            f"{words.label(key)} by layer",
            ", ".join(f"{one.layer}: {words.plain(one.detail[key])}" for one in changes if key in one.detail),
        )
        for key in keys
    ]


def _grid(name: str, changes: list[LayerChange]) -> dict[str, Any]:
    """Units inside layers: one row a layer, a cell each (or a bar where they are too many for cells)."""
    widest = max(one.before for one in changes)
    several = words.unit(name, 2)
    ragged = all(_widths(one) is not None for one in changes)
    small = (
        not ragged and widest <= _GRID_LIMIT and all(one.kept is not None or one.after == one.before for one in changes)
    )
    rows = []
    for one in changes:
        gone = one.before - one.after
        label = f"layer {one.layer}: {words.count(one.after)} of {words.count(one.before)} {several} kept"
        if ragged:
            widths, full = _widths(one) or ([], 1.0)
            drawing = figures.levels([width / full for width in widths], label)
        elif small:
            kept = None if one.kept is None else [index for index in one.kept if 0 <= index < one.before]
            drawing = figures.cells(one.before, kept, label)
        else:
            drawing = figures.bar(one.after / one.before if one.before else 0.0, label)
        lists = [] if one.kept is None and gone else [("kept", "all")]
        if one.kept is not None:
            lists = [("kept", words.shortened(one.kept))]
        if one.kept is not None and one.before <= _GRID_LIMIT:
            lists.append(("removed", words.ranges(set(range(one.before)) - set(one.kept)) or "none"))
        rows.append(
            {
                "head": f"{one.layer}",
                "drawing": drawing,
                "text": f"{words.count(one.after)} of {words.count(one.before)} kept" if gone else "all kept",
                "lists": lists,
                "details": [("", words.plain(one.detail))] if one.detail else [],
            }
        )
    how = (
        "Each cell is an expert, filled up to the share of its neurons that stayed."
        if ragged
        else "Filled: kept. Hollow: removed."
    )
    columns = len((_widths(changes[0]) or ([], 1.0))[0]) if ragged else widest
    return {
        "caption": f"{several[:1].upper()}{several[1:]}, layer by layer. {how}",
        "corner": "Layer",
        "axis": "expert" if ragged else words.unit(name),
        "rows": rows,
        "width": figures.cells_width(columns if small or ragged else 24),
        "ticks": figures.ticks(columns) if small or ragged else None,
        "summary": "The kept indices, listed" if any(one.kept is not None for one in changes) else "The layers, listed",
    }


def _widths(one: LayerChange) -> tuple[list[int], float] | None:
    """Neurons kept of each expert (``detail["widths"]``) and the width that each had, if a step records them."""
    widths = one.detail.get("widths")
    if not isinstance(widths, list) or not widths or not all(isinstance(width, int) for width in widths):
        return None
    return widths, max(one.before / len(widths), 1.0)


# ---- scores and costs ------------------------------------------------------------------------------------------------


def _score(score: Score) -> dict[str, Any]:
    name = words.line(score.name)
    unit = words.difference_unit(score)
    label = f"{name}: after {words.mean(score.after)} {words.bounds(score.after)}"
    if score.before is not None:
        label = f"{name}: before {words.mean(score.before)} {words.bounds(score.before)}, " + label.split(": ", 1)[1]
    moved = score.difference
    shown = words.reading(score) in ("better", "worse")
    times = math.exp(moved.mean) if moved and shown and words.is_perplexity(score) and moved.mean < 700 else None
    return {
        "name": name,
        "unit": words.score_unit(score),
        "goal": "higher is better" if score.higher_is_better else "lower is better",
        "items": (moved or score.after).n,
        "before": None if score.before is None else _estimate(score.before),
        "after": _estimate(score.after),
        "drawing": figures.intervals(score.before, score.after, label),
        "difference": None if moved is None else _estimate(moved, signed=True),
        "difference_unit": unit,
        "times": None if times is None else f"{words.number(times, 3)}{words.TIMES} the perplexity",
        "difference_drawing": None
        if moved is None
        else figures.difference(
            moved,
            f"{name}: paired difference {words.mean(moved, signed=True)} {words.bounds(moved, signed=True)} {unit}; "
            f"{words.reading(score)}",
        ),
        "reading": words.reading(score),
    }


def _estimate(one: Interval, *, signed: bool = False) -> dict[str, Any]:
    return {
        "mean": datum(one.mean, words.mean(one, signed=signed)),
        "bounds": Markup('<span title="{} to {}">{}</span>').format(
            repr(one.low), repr(one.high), words.bounds(one, signed=signed)
        ),
    }


def _costs(record: RunRecord) -> list[dict[str, Any]]:
    sizes: list[tuple[str, str, Any]] = [
        ("Parameters", "parameters", words.many),
        ("Weights", "bytes_weights", words.size),
        ("Weight files on disk", "bytes_disk", words.size),
    ]
    speeds: list[tuple[str, str, Any]] = [
        ("Peak memory", "peak_memory_bytes", words.size),
        ("Steady memory", "steady_memory_bytes", words.size),
        ("Prefill time", "prefill_seconds", words.duration),
        ("Prefill speed", "prefill_tokens_per_second", words.rate),
        ("Decode speed", "decode_tokens_per_second", words.rate),
    ]
    rows = [_cost(name, field, show, record.size_before, record.size_after) for name, field, show in sizes]
    if record.speed_after is not None:
        rows += [_cost(name, field, show, record.speed_before, record.speed_after) for name, field, show in speeds]
        rows[-3]["note"] = f"{words.count(record.speed_after.prefill_tokens)} tokens"
    return rows


def _cost(name: str, field: str, show: Any, before: Size | Speed | None, after: Size | Speed) -> dict[str, Any]:
    new = getattr(after, field)
    old = None if before is None else getattr(before, field)
    shown_old = words.DASH if old is None else show(old)
    return {
        "name": name,
        "note": "",
        "before": datum(old, shown_old),
        "after": datum(new, show(new)),
        "ratio": words.DASH if old is None else words.factor(old, new),
        "change": words.DASH if old is None else words.change(old, new),
        "drawing": Markup("")
        if old is None
        else figures.pair(old, new, f"{name}: before {shown_old}, after {show(new)}"),
    }


# ---- steps and proof -------------------------------------------------------------------------------------------------


def _step(step: StepRecord) -> dict[str, Any]:
    total = sum(step.seconds_by_stage.values())
    shares = [(name, value, value / total if total else 0.0) for name, value in step.seconds_by_stage.items()]
    told = ", ".join(f"{words.label(name)} {words.duration(value)}" for name, value, _ in shares)
    return {
        "step": step,
        "stages": shares,
        "drawing": figures.stages([share for _, _, share in shares], f"time by stage: {told}") if shares else None,
        "tables": [
            (caption, words.rows(values))
            for caption, values in (("Fields", step.fields), ("Data", step.data), ("Coverage", step.coverage))
            if values
        ],
    }


def _proof(record: RunRecord) -> list[dict[str, Any]]:
    if record.proof is None:
        return []
    proof = record.proof
    flags: Sequence[tuple[bool, str]] = (
        (proof.finite, "all weights are finite"),
        (proof.bytes_match_plan, "the size equals the plan"),
        (proof.weights_match_config, "weights and config agree"),
    )
    # The checks of a proof that passed say all that the flags say, and in more detail.
    found = [("good", text) if good else ("bad", f"NOT: {text}") for good, text in flags if not (good and proof.checks)]
    found += [("good" if proof.passed else "", words.line(text)) for text in proof.checks]
    return [{"state": state, "text": text} for state, text in found]
