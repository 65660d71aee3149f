"""What each step of a run cost: bytes, quality and time, step by step, where there are several."""

from __future__ import annotations

from paredown.report import words
from paredown.workflow.record import RunRecord, Score, StepRecord

HEADS = ("Step", "Weights", "Perplexity", "Paired difference", "Divergence", "Time")


def rows(record: RunRecord) -> list[tuple[str, ...]]:
    """Return a row of texts for each step that changed weights, in the order of ``HEADS``; none for a single step.

    Scores compare the model after a step with the model before that step, so that a repair shows as a gain.
    """
    changing = [step for step in record.steps if step.kind != "policy"]
    if len(changing) < 2 or not all(step.bytes_after is not None for step in changing):
        return []
    found: list[tuple[str, ...]] = []
    before = record.size_before.bytes_weights
    for step in changing:
        assert step.bytes_after is not None
        weights = f"{words.move(before, step.bytes_after)} ({words.change(before, step.bytes_after)})"
        found.append(
            (f"{step.index}. {words.line(step.method)}", weights, *_quality(step), words.duration(step.seconds))
        )
        before = step.bytes_after
    return found


def _quality(step: StepRecord) -> tuple[str, str, str]:
    perplexity = next((score for score in step.scores if words.is_perplexity(score)), None)
    divergence = next((score for score in step.scores if not words.is_perplexity(score)), None)
    moved, difference = words.DASH, words.DASH
    if perplexity is not None:
        start = f"{words.mean(perplexity.before)} → " if perplexity.before is not None else ""
        moved = f"{start}{words.mean(perplexity.after)}"
        difference = _difference(perplexity)
    apart = (
        words.DASH if divergence is None else f"{words.mean(divergence.after)} {words.score_unit(divergence)}".strip()
    )
    return moved, difference, apart


def _difference(score: Score) -> str:
    if score.difference is None:
        return words.DASH
    value = f"{words.mean(score.difference, signed=True)} {words.difference_unit(score)}".strip()
    return f"{value} {words.bounds(score.difference, signed=True)}"
