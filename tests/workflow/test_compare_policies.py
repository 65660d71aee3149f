"""Policies compared: what is paired, what is scored once, what the journal believes, and what is refused."""

from __future__ import annotations

import numpy as np
import pytest

from paredown import registry
from paredown.core.stepwise import Held
from paredown.errors import UsageError
from paredown.report import policies as report
from paredown.workflow import compare_policies as comparing
from paredown.workflow.compare import compare
from paredown.workflow.measured import PolicyCell, PolicyComparison

OPTIONS = {"length": 24, "sequences": 8, "calibration_sequences": 4, "device": "cpu"}


def run(folder, text_file, methods=("streaming",), keeps=(0.5,), seeds=2, **options):
    return compare(folder, methods, keeps, seeds, text_file, **(OPTIONS | options))


def without_times(record):
    plain = record.model_dump(exclude={"created", "seconds", "original_seconds"})
    for entry in (*plain["rows"], *plain["cells"]):
        entry.pop("seconds")
        entry.pop("seconds_preparing")
    return plain


def cells(method, share, *, seeds=5, items=60, keep=0.5, seed=0):
    rng = np.random.default_rng(seed)
    return [
        PolicyCell(
            method=method,
            keep=keep,
            seed=number,
            fields={},
            prepared=f"{method}{number}",
            points=(rng.random(items) < share).astype(float).tolist(),
            kl=[],
            first_bytes=50,
            peak_bytes=50,
            steady_bytes=50,
            tokens=5.0,
            seconds_preparing=0.0,
            seconds=1.0,
            reused=False,
        )
        for number in range(seeds)
    ]


def full(size=100):
    held = Held()
    held.first = held.peak = held.steady = size
    return held


@pytest.mark.parametrize(
    ("share", "verdict"), [(0.9, "beats random"), (0.5, "no difference shown"), (0.1, "worse than random")]
)
def test_more_right_answers_are_better(share, verdict):
    made = [*cells("streaming", share, seed=1), *cells("random-tokens", 0.5, seed=2)]
    row, control = comparing.rows(
        made, [("streaming", 0.5, "random-tokens"), ("random-tokens", 0.5, None)], "recall", "ppl", full()
    )
    assert row.verdict == verdict
    assert row.difference.mean == pytest.approx(share - 0.5, abs=0.12)
    assert row.steady_share == 0.5
    assert control.verdict is None
    # Streaming is among the methods, so what acts on the cache is held against it too.
    expected = {"beats random": "worse than streaming", "worse than random": "beats streaming"}.get(verdict, verdict)
    assert control.streaming_verdict == expected
    assert row.streaming_verdict is None


def test_one_seed_gives_no_verdict():
    made = [*cells("streaming", 0.9, seeds=1), *cells("random-tokens", 0.1, seeds=1)]
    [row] = comparing.rows(made, [("streaming", 0.5, "random-tokens")], "recall", "ppl", full())
    assert row.difference.low > 0
    assert row.verdict is None


def test_all_right_is_not_certain():
    made = [cell.model_copy(update={"points": [1.0] * 40}) for cell in cells("streaming", 1.0)]
    [row] = comparing.rows(made, [("streaming", 0.5, None)], "recall", "ppl", full())
    assert row.score.mean == row.score.high == 1
    assert row.score.low < 0.95


def test_text_under_policies(checkpoint_folder, text_file):
    found = run(checkpoint_folder(seed=0), text_file, keeps=(1.0, 0.5))
    assert isinstance(found, PolicyComparison)
    assert (found.task, found.question, found.items) == ("ppl", None, 8)
    inert, half = found.rows
    assert inert.score.mean == pytest.approx(found.original.mean, rel=1e-5)
    assert inert.kl.mean < 1e-5 < half.kl.mean
    assert (inert.steady_share, inert.tokens) == (1, 23)
    assert half.steady_share < 0.4
    assert half.tokens == 6
    assert [cell.reused for cell in found.cells] == [False, True, False, True]
    assert found.cells[2].points == found.cells[3].points
    text = report.markdown(found)
    assert "| streaming | 0.5 |" in text
    assert report.svg(found) == report.svg(found)


def test_the_journal_is_believed_and_no_further(checkpoint_folder, text_file, tmp_path, monkeypatch):
    folder, journal = checkpoint_folder(seed=0), tmp_path / "out" / "cells.jsonl"
    first = run(folder, text_file, journal=journal)
    lines = journal.read_text().splitlines()
    assert len(lines) == 2
    done = []
    original = comparing._cell
    monkeypatch.setattr(comparing, "_cell", lambda *args: done.append(args) or original(*args))
    assert without_times(run(folder, text_file, journal=journal)) == without_times(first)
    assert done == []
    journal.write_text(lines[0] + "\n" + lines[1][:30])
    assert without_times(run(folder, text_file, journal=journal)) == without_times(first)
    assert len(done) == 1
    monkeypatch.setattr(comparing.cells, "own_code", lambda: "other code")
    run(folder, text_file, journal=journal)
    assert len(done) == 3


def test_recall_on_its_testbed():
    found = compare("testbed:recall", ["streaming"], [0.5], 1, questions=16, device="cpu")
    assert (found.task, found.question, found.items) == ("recall", "after", 16)
    assert found.rows[0].score.mean < found.original.mean
    assert 0.45 < found.rows[0].steady_share < 0.55
    within = compare("testbed:recall", ["streaming"], [0.5], 1, questions=16, question="within", device="cpu")
    assert within.cells[0].points != [] != found.cells[0].points


def test_what_does_not_go_together(checkpoint_folder, text_file):
    folder = checkpoint_folder(seed=0)
    with pytest.raises(UsageError, match="compare one kind at a time"):
        run(folder, text_file, methods=("streaming", "llm-drop"))
    with pytest.raises(UsageError, match="is for policies"):
        run(folder, text_file, methods=("llm-drop",), task="recall")
    with pytest.raises(UsageError, match="goes with --task ppl"):
        run(folder, text_file, task="recall", metric="kl")
    with pytest.raises(UsageError, match="none of recall, vqa and ppl"):
        run(folder, text_file, task="sums")


def test_a_control_that_draws_goes_first(monkeypatch):
    entry = registry.entry("streaming")
    named = [
        entry,
        *(type(entry)(**{**entry.__dict__, "name": name}) for name in ("a-control", "random-tokens")),
        type(entry)(**{**entry.__dict__, "name": "random-weights", "kind": "compressor"}),
    ]
    monkeypatch.setattr(registry, "entries", lambda: tuple(named))
    assert registry.control_for("streaming") == "random-tokens"


def test_a_control_gets_only_what_was_asked_for():
    """A policy's defaults are its paper's: they must not rule the control, nor keep two policies apart."""
    made = comparing.cells.lines(["hired", "pyramiddrop", "random"], [0.5], {}, kind="policy")
    assert {line.control for line in made[:2]} == {"random-visual-tokens"}
    assert made[2].made == registry.create("random-visual-tokens", keep=0.5)
