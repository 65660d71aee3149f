"""Numbers as people read them."""

from __future__ import annotations

import math

import pytest

from paredown.report import words
from paredown.workflow.record import Interval, LayerChange, Score


def plain(text: str) -> str:
    return text.replace(words.NARROW, " ").replace(words.MINUS, "-").replace(words.DASH, "-").replace(words.TIMES, "x")


@pytest.mark.parametrize(
    ("value", "text"),
    [
        *((0, "0 B"), (999, "999 B"), (1000, "0.977 KiB"), (1024, "1.00 KiB"), (6_597_376, "6.29 MiB")),
        *((1023 * 1024, "0.999 MiB"), (2**30, "1.00 GiB"), (45_000_000_000, "41.9 GiB")),
    ],
)
def test_bytes(value: int, text: str) -> None:
    assert plain(words.size(value)) == text


@pytest.mark.parametrize(
    ("value", "text"),
    [
        *((0.00042, "0.420 ms"), (0.0874, "87.4 ms"), (0.9996, "1.00 s"), (61.42, "61.4 s"), (99.96, "1 min 40 s")),
        *((263.7, "4 min 24 s"), (4211, "1 h 10 min"), (3599.6, "1 h 00 min"), (math.nan, "not a number")),
    ],
)
def test_durations(value: float, text: str) -> None:
    assert plain(words.duration(value)) == text


@pytest.mark.parametrize(
    ("value", "text"),
    [(9_999, "9,999"), (12_345, "12.3 k"), (999_600, "1.00 M"), (5_664_128, "5.66 M"), (7_241_732_096, "7.24 B")],
)
def test_counts(value: int, text: str) -> None:
    assert plain(words.many(value)) == text


@pytest.mark.parametrize(
    ("value", "text"),
    [
        *((12_345, "12,300"), (9.996, "10.0"), (0.00123, "0.00123"), (-0.5, "-0.500"), (1.9e-6, "1.90e-6"), (0, "0")),
        *((math.inf, "∞"), (-math.inf, "-∞")),
    ],
)
def test_three_significant_digits(value: float, text: str) -> None:
    assert plain(words.significant(value)) == text


@pytest.mark.parametrize(
    ("interval", "mean", "bounds"),
    [
        ((23.4187, 22.9013, 23.9478), "23.4", "[22.9, 23.9]"),  # half width 0.52: one digit of it
        ((6.4213, 6.1815, 6.6617), "6.42", "[6.18, 6.66]"),  # 0.24: two digits
        ((71.25, 66.61, 75.62), "71", "[67, 76]"),
        ((1234.0, 1034.0, 1434.0), "1,230", "[1,030, 1,430]"),
        ((0.161, 0.161, 0.161), "0.1610", "[0.1610, 0.1610]"),  # no width: four digits
        ((math.inf, 3.0, math.inf), "∞", "[3.00, ∞]"),
        ((math.nan, math.nan, math.nan), "not a number", "[not a number, not a number]"),
    ],
)
def test_never_more_digits_than_the_interval_justifies(
    interval: tuple[float, float, float], mean: str, bounds: str
) -> None:
    one = Interval(mean=interval[0], low=interval[1], high=interval[2], n=9)
    assert (plain(words.mean(one)), plain(words.bounds(one))) == (mean, bounds)


def test_signs_are_shown_only_where_there_is_something_to_sign() -> None:
    one = Interval(mean=0.0001, low=-0.02, high=0.02, n=9)
    assert plain(words.mean(one, signed=True)) == "+0.000"
    assert plain(words.bounds(one, signed=True)) == "[-0.020, +0.020]"
    assert words.number(-0.001, 2) == "0.00"


@pytest.mark.parametrize(
    ("before", "after", "text"),
    [(100, 58, "-42 %"), (100, 100, "unchanged"), (100, 104.1, "+4.1 %"), (0, 5, "-"), (10**6, 10**6 + 30, "+0.003 %")],
)
def test_changes(before: float, after: float, text: str) -> None:
    assert plain(words.change(before, after)) == text


def test_a_plan_that_came_true_is_exact() -> None:
    assert words.deviation(7, 7) == "exact"
    assert plain(words.deviation(21.0, 24.318)) == "+16 %"


@pytest.mark.parametrize(
    ("indices", "text"), [([], ""), ([3], "3"), ([4, 3], "3, 4"), ([0, 1, 2, 3, 7, 9, 10], "0-3, 7, 9, 10")]
)
def test_ranges(indices: list[int], text: str) -> None:
    assert plain(words.ranges(indices)) == text


def test_long_lists_are_cut_and_say_so() -> None:
    assert plain(words.shortened(range(0, 40, 2), limit=3)).startswith("0, 2, 4 and 17 more")


def test_no_control_character_survives() -> None:
    shown = words.visible("a\x1b[31m\u202eb\x00\ud800\u2028c\n\t")
    assert shown == "a\\u001b[31m\\u202eb\\u0000\\ud800\\u2028c\n\t"
    shown.encode()  # an unpaired surrogate would not survive a write
    assert words.line(" a\n b ") == "a b"


@pytest.mark.parametrize(
    ("low", "high", "higher", "reading"),
    [
        (0.1, 0.2, False, "worse"),
        (0.1, 0.2, True, "better"),
        (-0.2, -0.1, True, "worse"),
        (-0.2, -0.1, False, "better"),
        (-0.1, 0.1, True, "no difference shown"),
        (0.0, 0.1, True, "no difference shown"),
        (math.nan, math.nan, True, "not a number"),
    ],
)
def test_readings(low: float, high: float, higher: bool, reading: str) -> None:
    some = Interval(mean=1, low=0, high=2, n=3)
    moved = Interval(mean=(low + high) / 2, low=low, high=high, n=3)
    score = Score(name="x", unit="", higher_is_better=higher, before=some, after=some, difference=moved)
    assert words.reading(score) == reading


def test_free_form_values() -> None:
    assert words.plain({"never_seen": {"layer_4": [3]}, "on": True, "rate": 1e-4, "none": None}) == (
        "never seen: layer 4: 3; on: yes; rate: 0.0001; none: none"
    )
    assert plain(words.plain([1, 2, 3, 9])) == "1-3, 9"
    assert words.plain([3, 1]) == "3, 1"
    assert words.plain(list("ab") * 40).endswith("and 48 more")


def test_shares_become_per_cent_and_nothing_else_does() -> None:
    some = Interval(mean=0.07, low=0.06, high=0.08, n=400)
    score = Score(name="recall", unit="share correct", higher_is_better=True, before=some, after=some, difference=None)
    told = words.in_percent(score)
    assert (told.after.mean, told.after.high, told.unit, told.after.n) == (7.0, 8.0, "% correct", 400)
    assert words.difference_unit(told) == "points"
    other = score.model_copy(update={"unit": "nats/token"})
    assert words.in_percent(other) == other


def test_equal_layers_share_a_line_of_shapes() -> None:
    shapes = {f"model.layers.{i}.mlp.gate.weight": ([16, 8], [8, 8]) for i in (0, 1, 2, 5)}
    shapes["model.layers.3.mlp.gate.weight"] = ([16, 8], [4, 8])
    shapes["model.layers.4.attn.weight"] = ([16], [])
    found = [tuple(map(plain, group)) for group in words.shape_groups(shapes)]
    assert found == [
        ("model.layers.*.mlp.gate.weight", "0-2, 5", "16 x 8", "8 x 8"),
        ("model.layers.*.mlp.gate.weight", "3", "16 x 8", "4 x 8"),
        ("model.layers.*.attn.weight", "4", "16", "gone"),
    ]


def test_units_in_words() -> None:
    assert words.unit("attention") == "attention sub-layer"
    assert words.unit("mlp", 2) == words.unit("mlp sub-layers", 2) == "MLP sub-layers"
    assert words.unit("experts") == "expert"
    assert words.unit("attention sub-layers", 1) == "attention sub-layer"
    assert words.unit("expert neuron", 0) == "expert neurons"
    groups = words.by_unit([LayerChange(layer=i, unit="head", before=2, after=1, kept=[0], detail={}) for i in (1, 0)])
    assert [one.layer for one in groups["head"]] == [0, 1]


@pytest.mark.parametrize(
    ("source", "hub", "short"),
    [
        ("Qwen/Qwen3-0.6B", "Qwen/Qwen3-0.6B", "Qwen/Qwen3-0.6B"),
        ("testbed:moe", None, "testbed:moe"),
        ("/home/ann/models/small", None, "small"),
        ("./small", None, "small"),
        ("../a/b/", None, "b"),
        ("C:\\models\\small", None, "small"),
    ],
)
def test_names_of_models(source: str, hub: str | None, short: str) -> None:
    assert (words.hub_id(source), words.short_name(source)) == (hub, short)
