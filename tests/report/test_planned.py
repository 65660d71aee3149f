"""A plan as people read it."""

from __future__ import annotations

import io

import pytest
from rich.console import Console

from paredown.report import words
from paredown.report.planned import SHAPES_SHOWN, plan
from paredown.workflow.record import Planned


def step(**changes) -> Planned:
    fields = {
        "method": "dern",
        "keep": 0.5,
        "parameters_before": 2_000_000,
        "parameters_after": 1_000_000,
        "bytes_before": 4 * 2**20,
        "bytes_after": 2 * 2**20,
        "exact": True,
        "peak_memory_bytes": 2**28,
        "seconds": 75.0,
        "uniform": True,
        "loads_in": "transformers",
        "notes": ["[bold]\x1b[2Jliteral"],
        "shapes": {f"layers.{i}.mlp.gate.weight": ([16, 64], [8, 64]) for i in range(3)},
    }
    return Planned(**{**fields, **changes})


@pytest.mark.parametrize("terminal", [False, True])
def test_everything_foretold_is_shown(terminal):
    stream = io.StringIO()
    plan(
        [step(), step(method="llm-drop", exact=False, loads_in="paredown.load")],
        Console(file=stream, force_terminal=terminal, width=120),
    )
    text = stream.getvalue().replace("\u202f", " ")
    for part in (
        "step 1: dern",
        "step 2: llm-drop",
        "4.00 MiB → 2.00 MiB",
        "exactly",
        "about",
        "256 MiB",
        "75.0 s",
        "in plain transformers",
        "with paredown.load",
        f"layers 0\N{EN DASH}2: 16 {words.TIMES} 64 → 8 {words.TIMES} 64",
    ):
        assert part in text
    assert "[bold]" in text
    assert "\x1b[2J" not in text


def test_a_pipe_gets_one_line_a_fact():
    stream = io.StringIO()
    plan([step(notes=["long " * 80])], Console(file=stream, width=40))
    assert all(line.startswith("plan, step 1") for line in stream.getvalue().splitlines())


def test_many_shapes_are_cut_and_said_so():
    shapes = {f"part{i}.weight": ([i + 2], [i + 1]) for i in range(SHAPES_SHOWN + 5)}
    stream = io.StringIO()
    plan([step(shapes=shapes)], Console(file=stream, width=120))
    assert stream.getvalue().count("part") == SHAPES_SHOWN
    assert "5 groups more" in stream.getvalue()
