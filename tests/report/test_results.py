"""Evaluations and comparisons as people see them: every number there, nothing acting, the same bytes each time."""

from __future__ import annotations

import io
import xml.etree.ElementTree as ElementTree

import pytest
from rich.console import Console

from paredown.report import results, words
from paredown.workflow.measured import Cell, CompareRecord, EvalRecord, Memory, Ratio, Row, Side, Timing
from paredown.workflow.record import Interval, Score, Size

DATA = {"name": "stories.jsonl", "sequences": 64, "length": 512}
COMMON = {
    "created": "2026-01-01T00:00:00+00:00",
    "dtype": "float32",
    "data": DATA,
    "versions": {},
    "hardware": {},
    "seconds": 3.0,
}


def interval(mean, half=0.1):
    return Interval(mean=mean, low=mean - half, high=mean + half, n=64)


def side(name, scale=1):
    seconds = [0.1 * scale, 0.11 * scale, 0.12 * scale]

    def timing(kind, tokens):
        return Timing(
            kind=kind,
            tokens=tokens,
            seconds=seconds,
            median_seconds=seconds[1],
            tokens_per_second=tokens / seconds[1],
        )

    return Side(
        model=name,
        loads_in="transformers",
        size=Size(parameters=3_000_000 * scale, bytes_weights=6_000_000 * scale, bytes_disk=6_000_100 * scale),
        memory=Memory(
            baseline_bytes=400 * 2**20, steady_bytes=410 * 2**20, peak_bytes=500 * 2**20, what="what it includes"
        ),
        prefill=timing("prefill", 448),
        decode=timing("decode", 64),
    )


def evaluated(*, against=True, name="out/smaller"):
    ratio = Ratio(median=0.52, low=0.48, high=0.61, n=3)
    perplexity = Score(
        name="perplexity",
        unit="",
        higher_is_better=False,
        before=interval(10.04) if against else None,
        after=interval(12.34),
        difference=interval(0.206, 0.01) if against else None,
    )
    return EvalRecord(
        model=side(name),
        against=side("testbed:moe", 2) if against else None,
        scores=[perplexity],
        prefill_ratio=ratio if against else None,
        decode_ratio=ratio if against else None,
        notes=["Rows were shortened."],
        **COMMON,
    )


def row(method, keep, ppl, control=None, difference=None, verdict=None):
    return Row(
        method=method,
        keep=keep,
        perplexity=interval(ppl),
        kl=interval(0.25, 0.01),
        parameters=3_000_000,
        bytes_weights=6_000_000,
        seconds=1.5,
        control=control,
        difference=difference,
        verdict=verdict,
    )


def compared(name="testbed:moe"):
    cell = Cell(
        method="dern",
        keep=0.5,
        seed=0,
        fields={},
        nll=[1.0],
        kl=[0.1],
        parameters=3,
        bytes_weights=6,
        seconds=1,
        warnings=[],
    )
    wide = Interval(mean=450, low=6.8, high=29848, n=64)
    return CompareRecord(
        model=name,
        fingerprint="0",
        metric="ppl",
        original=interval(9.5),
        size=Size(parameters=5_000_000, bytes_weights=10_000_000, bytes_disk=10_000_100),
        rows=[
            row("dern", 0.5, 11.2, "random-experts", interval(-0.31, 0.05), "beats random"),
            row("dern", 0.75, 10.1, "random-experts", interval(0.01, 0.05), "no difference shown"),
            row("random-experts", 0.5, 40.0).model_copy(update={"perplexity": wide}),
            row("random-experts", 0.75, 12.0),
        ],
        cells=[cell],
        seeds=[0, 1, 2],
        calibration=DATA,
        notes=["Each seed draws its own rows."],
        **COMMON,
    )


def shown(view, record, *, terminal, encoding="utf-8", width=200):
    raw = io.BytesIO()
    stream = io.TextIOWrapper(raw, encoding=encoding)
    view(record, Console(file=stream, force_terminal=terminal, width=width, color_system=None))
    stream.flush()
    return raw.getvalue().decode(encoding)


def test_an_evaluation_in_a_pipe_is_one_fact_a_line():
    lines = shown(results.evaluation, evaluated(), terminal=False, width=40).splitlines()
    assert lines[:2] == ["model: out/smaller", "against: testbed:moe"]
    found = dict(line.split(": ", 1) for line in lines)
    assert found["perplexity"].startswith("12.34 [12.24, 12.44]; against: 10.04 [9.94, 10.14]; +0.206 [+0.196, +0.216]")
    assert "worse" in found["perplexity"]
    assert found["on disk"] == f"5.72 MiB; against: 11.4 MiB; 0.50{words.TIMES}"
    assert found["peak memory"].startswith("500 MiB; against: 500 MiB")
    assert found["decode (64 tokens)"].endswith(f"0.52{words.TIMES} the time (0.48 to 0.61)")
    assert [line for line in lines if line.startswith("note: ")] == [
        "note: Quality: 64 rows of 512 tokens of stories.jsonl, float32, 95 % intervals over rows or questions; "
        "memory: what it includes.",
        "note: Rows were shortened.",
    ]


@pytest.mark.parametrize("terminal", [True, False])
def test_an_evaluation_of_one_model_has_no_empty_columns(terminal):
    text = shown(results.evaluation, evaluated(against=False), terminal=terminal)
    assert "12.34" in text
    assert "against" not in text
    assert "None" not in text


def test_an_evaluation_on_a_terminal_says_what_was_measured():
    text = shown(results.evaluation, evaluated(), terminal=True)
    for part in (
        "smaller",
        "testbed:moe",
        "+0.206",
        "64 rows of 512 tokens",
        "what it includes",
        "Rows were shortened.",
    ):
        assert part in text


@pytest.mark.parametrize("terminal", [True, False])
def test_a_comparison_shows_every_row(terminal):
    text = shown(results.comparison, compared(), terminal=terminal)
    for part in (
        "original",
        "dern",
        "random-experts",
        "beats random",
        "no difference shown",
        f"{words.MINUS}0.31",
        "3 seeds",
    ):
        assert part in text
    assert "450 [6.8, 30,000]" in text  # so wide an interval must not round the mean away


def test_a_pipe_without_unicode_gets_ascii():
    text = shown(results.comparison, compared(), terminal=False, encoding="ascii")
    assert "-0.31" in text
    assert '"Against random"' in text


@pytest.mark.parametrize("terminal", [True, False])
def test_names_do_not_act(terminal):
    name = "[red]evil\x1b[31m|x"
    for view, record in ((results.evaluation, evaluated(name=name)), (results.comparison, compared(name))):
        text = shown(view, record, terminal=terminal)
        assert "\x1b[31m" not in text
        assert "[red]evil" in text


def test_markdown_is_a_table():
    text = results.markdown(compared("a|b"))
    lines = text.splitlines()
    assert lines[1].startswith("| --- | ---: |")
    assert {line.count("|") for line in lines[:7]} == {10}
    minus = words.MINUS
    against = f"{minus}0.31 [{minus}0.36, {minus}0.26] | beats random"
    assert f"| dern | 0.5 | 11.20 [11.10, 11.30] | 0.250 [0.240, 0.260] | {against} |" in text
    assert "\n- " in text


def test_the_drawing_is_svg_and_the_same_each_time():
    record = compared()
    text = results.svg(record)
    assert text == results.svg(record)
    root = ElementTree.fromstring(text)
    assert root.tag.endswith("svg")
    for part in ("dern", "random-experts", "original", "share kept", "perplexity"):
        assert f">{part}<" in text
    assert "KL to the original" in results.svg(record.model_copy(update={"metric": "kl"}))


def test_what_is_infinite_is_shown_as_that():
    record = compared().model_copy(update={"original": Interval(mean=float("inf"), low=1.0, high=float("inf"), n=3)})
    assert "∞" in shown(results.comparison, record, terminal=False)
