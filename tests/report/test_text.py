"""The summary on a terminal and in a pipe."""

from __future__ import annotations

import io
from collections.abc import Callable

import pytest
from rich.console import Console

from paredown.report import text, words
from paredown.workflow.record import RunRecord

Make = Callable[[str], RunRecord]


def shown(record: RunRecord, *, terminal: bool, width: int = 100, encoding: str = "utf-8") -> str:
    raw = io.BytesIO()
    file = io.TextIOWrapper(raw, encoding=encoding, newline="\n")
    text.summary(record, Console(file=file, force_terminal=terminal, width=width, color_system=None))
    file.flush()
    return raw.getvalue().decode(encoding).replace(words.NARROW, " ").replace(words.MINUS, "-")


def test_a_pipe_gets_one_plain_line_a_fact(make: Make) -> None:
    lines = shown(make("experts"), terminal=False, width=20).splitlines()
    assert lines[0] == "model: testbed:moe (qwen3_moe)"
    assert lines[1] == "step 1: dern on experts, keeping 50 % (arXiv:2509.10377)"
    assert "weights: 10.8 MiB → 6.29 MiB (-42 %)" in lines
    assert "perplexity: 23.4 [22.9, 23.9] → 26.9 [26.3, 27.5]; +0.138 [+0.129, +0.147] nats a token: worse" in lines
    assert "gate: The gate passed: perplexity after / before 1.15, limit 2.00." in lines
    assert "step 1: peak memory: 411 MiB (planned 384 MiB, +7.1 %)" in lines
    assert any("sha256: 9f2c9f2c9f2c;" in line for line in lines)
    assert any(line.startswith("proof: passed") for line in lines)
    assert all(line.strip() and ": " in line for line in lines)


def test_a_terminal_gets_tables(make: Make) -> None:
    out = shown(make("experts"), terminal=True, width=140)
    assert "──" in out
    for change in make("experts").steps[0].changes:
        assert words.ranges(change.kept or []) in out
    for wanted in ("Step 1: dern", "48 of 96 kept", "perplexity", "no difference shown", "from_pretrained", "0.99"):
        assert wanted in out, wanted


def test_a_forecast_that_was_not_made_is_not_held_against_anything(make: Make) -> None:
    record = make("experts")
    step = record.steps[0]
    step = step.model_copy(update={"plan": step.plan.model_copy(update={"seconds": 0.0, "peak_memory_bytes": 0})})
    out = shown(record.model_copy(update={"steps": [step]}), terminal=False)
    assert "planned" not in out
    assert "step 1: peak memory: 411 MiB\n" in out


@pytest.mark.parametrize("terminal", [True, False])
def test_two_steps_and_a_resumed_run(make: Make, terminal: bool) -> None:
    out = shown(make("depth"), terminal=terminal)
    assert "6 removed, in layers 5, 7" in out
    assert "51,200 of 65,536 kept" in out
    assert out.index("llm-drop") < out.index("random-neurons")
    assert "paredown.load" in out


@pytest.mark.parametrize("terminal", [True, False])
def test_a_gate_that_failed(make: Make, terminal: bool) -> None:
    out = shown(make("stopped"), terminal=terminal)
    assert "The gate failed" in out
    assert "nothing was written" in out
    assert "from_pretrained" not in out


@pytest.mark.parametrize("terminal", [True, False])
def test_neither_markup_nor_escapes_of_a_record_act(make: Make, terminal: bool) -> None:
    out = shown(make("hostile"), terminal=terminal, width=4000)
    assert "\x1b[31m" not in out
    assert "\u202e" not in out
    assert "[bold red]" in out
    assert "\\u001b[31m" in out


@pytest.mark.parametrize("name", ["experts", "depth", "stopped", "hostile"])
def test_an_ascii_pipe_does_not_break_it(make: Make, name: str) -> None:
    assert "->" in shown(make(name), terminal=False, encoding="ascii")
