"""Plain lines when piped, bars on a terminal, always on standard error."""

from __future__ import annotations

import io

import pytest

from paredown.commands import progress as module
from paredown.commands.progress import duration, progress


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_piped_stage_gives_a_line_each_tenth():
    stream = io.StringIO()
    with progress(stream) as report:
        for done in range(201):
            report(done, 200, "calibrating")
    lines = stream.getvalue().splitlines()
    assert len(lines) == 11
    assert lines[0] == "calibrating: 0 %"
    assert lines[5].startswith("calibrating: 50 %")
    assert lines[-1] == "calibrating: 100 %"


def test_time_left_is_told_in_proportion(monkeypatch):
    now = iter([100.0, 130.0])
    monkeypatch.setattr(module.time, "monotonic", lambda: next(now))
    stream = io.StringIO()
    with progress(stream) as report:
        report(0, 4, "scoring")
        report(1, 4, "scoring")
        assert stream.getvalue() == "scoring: 0 %\nscoring: 20 %, 1 min 30 s left\n"


def test_a_resumed_stage_counts_only_what_it_saw(monkeypatch):
    now = iter([100.0, 130.0])
    monkeypatch.setattr(module.time, "monotonic", lambda: next(now))
    stream = io.StringIO()
    with progress(stream) as report:
        report(6, 10, "scoring")
        report(8, 10, "scoring")
        assert stream.getvalue() == "scoring: 60 %\nscoring: 80 %, 30 s left\n"


def test_what_stands_behind_a_semicolon_may_change():
    stream = io.StringIO()
    with progress(stream) as report:
        for done in range(101):
            report(done, 100, f"healing; loss {1 / (1 + done):.3f}")
    lines = stream.getvalue().splitlines()
    assert len(lines) == 11
    assert lines[0] == "healing; loss 1.000: 0 %"
    assert lines[-1] == "healing; loss 0.010: 100 %"


def test_stages_are_told_apart():
    stream = io.StringIO()
    with progress(stream) as report:
        report(1, 1, "reading")
        report(1, 2, "writing")
        report(2, 2, "writing")
        report(1, 2, "writing")
    tails = [line.split(",")[0] for line in stream.getvalue().splitlines()]
    assert tails == ["reading: 100 %", "writing: 50 %", "writing: 100 %", "writing: 50 %", "writing: 100 %"]


def test_a_stage_that_is_over_is_told_so_and_one_that_broke_is_not():
    stream = io.StringIO()

    def work():
        with progress(stream) as report:
            report(0, 2, "reading")
            report(0, 2, "writing")
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        work()
    assert stream.getvalue().splitlines() == ["reading: 0 %", "reading: 100 %", "writing: 0 %"]


def test_nothing_to_do_is_done():
    stream = io.StringIO()
    with progress(stream) as report:
        report(0, 0, "removing")
    assert stream.getvalue() == "removing: 100 %\n"


def test_terminal_gets_bars():
    stream = Terminal()
    with progress(stream) as report:
        report(0, 4, "scoring")
        report(4, 4, "scoring")
        report(1, 2, "writing")
    text = stream.getvalue()
    assert "scoring" in text
    assert "4/4" in text
    assert "writing" in text
    assert "2/2" in text


def test_standard_error_is_the_default(capsys):
    with progress() as report:
        report(1, 1, "reading")
    captured = capsys.readouterr()
    assert (captured.out, captured.err) == ("", "reading: 100 %\n")


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.2, "0 s"), (8, "8 s"), (59.6, "1 min"), (200, "3 min 20 s"), (3600, "1 h"), (7500, "2 h 5 min"), (-1, "0 s")],
)
def test_durations_read_as_people_say_them(seconds, text):
    assert duration(seconds) == text
