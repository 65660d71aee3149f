"""A scan as people read it: tables on a terminal, columns in a pipe, a page that loads nothing."""

from __future__ import annotations

import html.parser
import io
import re

import pytest
from rich.console import Console

from paredown.report import scandraw, scanned, scanpage, words
from paredown.workflow.scanned import Acting, Column, LayerRow, ScanRecord, ScanView, Suggestion

HOSTILE = "<script>alert(1)</script>[bold]\x1b[2J\u202e"


def column(key: str, kind: str = "value", unit: str = "share") -> Column:
    return Column(key=key, title=key.replace("_", " "), kind=kind, unit=unit, meaning=f"meaning of {key}")


def view(name: str, columns: list[Column], rows: list[LayerRow], **more) -> ScanView:
    fields = {
        "title": name.title(),
        "measures": f"What {name} measures.",
        "unit": "share",
        "methods": [],
        "reading": f"What {name} says.",
        "suggests": [],
        "notes": [],
        "seconds": 0.5,
    }
    return ScanView(name=name, columns=columns, rows=rows, **{**fields, **more})


def row(layer: int, part: str, count: int, values: dict, **more) -> LayerRow:
    return LayerRow(layer=layer, part=part, count=count, values=values, **more)


def record(**changes) -> ScanRecord:
    use = view(
        "expert-use",
        [column("for_90", unit="experts"), column("entropy"), column("mass", "series"), column("tokens", "series"),
         column("never", "units", "expert")],
        [row(i, "routed experts", 4, {"for_90": 2.0, "entropy": 0.5},
             series={"mass": [0.6, 0.3, 0.1, 0.0], "tokens": [0.5, 0.3, 0.2, 0.0]}, units={"never": [3]})
         for i in range(2)],
        methods=[Acting(name="dern", unit="experts"), Acting(name="other", unit="expert neurons")],
        suggests=[Suggestion(unit="experts", keep=0.5, because="it leaves 90 % of the mass")],
    )  # fmt: skip
    alike = view(
        "expert-similarity",
        [column(k, unit="cosine") for k in ("twins", "highest", "output_highest")] + [column("by_weights", "series")],
        [row(i, "routed experts", 4, {"twins": 0.2, "highest": 0.987, "output_highest": None},
             series={"by_weights": [0.1, 0.2, 0.987, 0.987]}) for i in range(2)],
    )  # fmt: skip
    stream = view(
        "stream-similarity",
        [column(k, unit="cosine") for k in ("attention", "mlp", "block")],
        [row(0, "stream", 1, {"attention": None, "mlp": -0.1, "block": 0.5}),
         row(1, "stream", 1, {"attention": 0.9999, "mlp": 0.9, "block": 0.8})],
    )  # fmt: skip
    neurons = view(
        "neuron-energy",
        [column(k) for k in ("half", "most", "nearly_all")] + [column("curve", "series")],
        [row(i, part, 16, {"half": 0.1, "most": 0.3, "nearly_all": 0.6}, series={"curve": [0.5, 0.9, 1.0]})
         for i in range(2) for part in ("routed experts", "shared expert")],
    )  # fmt: skip
    heads = view(
        "head-importance",
        [column("groups", unit="KV groups"), column("groups_99", unit="KV groups"), column("heads", "series")],
        [row(i, "attention", 4, {"groups": 2.0, "groups_99": 1.0}, series={"heads": [0.7, 0.3, 0.0, 0.0]})
         for i in range(2)],
    )  # fmt: skip
    spectrum = view(
        "spectrum",
        [column("rank_90"), column("rank_99"), column("factors", unit="share of the bytes")],
        [row(i, part, 8, {"rank_90": 0.25, "rank_99": 0.5, "factors": 0.8}, tower=tower)
         for tower, part in (("language", "q_proj"), ("vision", "qkv")) for i in range(2)],
    )  # fmt: skip
    fields = {
        "model": "testbed:moe",
        "family": "qwen3_moe",
        "parameters": 5_000_000,
        "layers": 2,
        "data": {"name": "texts.jsonl", "tokens": 32_768},
        "views": [use, alike, stream, neurons, heads, spectrum],
        "notes": ["A note on the scan."],
        "created": "2026-11-22T06:00:00+00:00",
        "seconds": 12.0,
        "seconds_by_stage": {"read": 1.0, "forward": 9.0},
        "peak_memory_bytes": 2**29,
        "versions": {"torch": "2.13"},
        "hardware": {"device": "cpu"},
    }
    return ScanRecord(**{**fields, **changes})


def printed(given: ScanRecord, *, terminal: bool, width: int = 120) -> str:
    stream = io.StringIO()
    scanned.scan(given, Console(file=stream, force_terminal=terminal, width=width, no_color=True))
    return stream.getvalue().replace("\u202f", " ")


@pytest.mark.parametrize("terminal", [False, True])
def test_every_view_is_shown_with_what_it_says(terminal):
    text = printed(record(), terminal=terminal)
    for name in (
        "expert-use",
        "expert-similarity",
        "stream-similarity",
        "neuron-energy",
        "head-importance",
        "spectrum",
    ):
        assert f"What {name} measures." in text
        assert f"What {name} says." in text
    for part in (
        "testbed:moe (qwen3_moe), 5.00 M parameters, 2 layers",
        "texts.jsonl, 32,768 tokens",
        "keep 0.5 of the experts: it leaves 90 % of the mass",
        "dern, other",
        "no registered method yet",
        "A note on the scan.",
        "0.987",
        f"0.800{words.TIMES}",
        "vision: qkv",
    ):
        assert part in text, part


def test_drawings_stand_on_terminals_only():
    drawn = set("▁▂▃▄▅▆▇█▏▎▍▌▋▊▉·")
    assert drawn & set(printed(record(), terminal=True))
    assert not drawn & set(printed(record(), terminal=False))


def test_columns_of_a_pipe_are_aligned_and_never_wrapped():
    lines = printed(record(), terminal=False, width=20).splitlines()
    start = next(i for i, line in enumerate(lines) if line.startswith("expert-use"))
    head, first, second = lines[start + 1 : start + 4]
    assert head.split() == ["layer", "for", "90", "entropy"]
    assert first.split() == ["0", "2", "50", "%"]
    assert len(head) == len(first) == len(second)


def test_hostile_texts_do_nothing():
    bad = record(model=HOSTILE, notes=[HOSTILE], data={"name": HOSTILE, "tokens": 1})
    one = bad.views[0].model_copy(update={"reading": HOSTILE, "notes": [HOSTILE]})
    one.rows[0] = one.rows[0].model_copy(update={"part": HOSTILE})
    bad = bad.model_copy(update={"views": [one, *bad.views[1:]]})
    for terminal in (False, True):
        text = printed(bad, terminal=terminal)
        assert "[bold]" in text
        assert "\x1b[2J" not in text
        assert "\u202e" not in text
    page = scanpage.render(bad)
    assert "<script" not in page
    assert "\x1b" not in page
    assert "\u202e" not in page


class Check(html.parser.HTMLParser):
    """Counts open elements, and keeps ids and links."""

    VOID = ("meta", "rect", "path", "line", "circle", "polyline")

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.ids: list[str] = []
        self.links: list[str] = []

    def handle_starttag(self, tag, attrs):
        given = dict(attrs)
        if tag not in self.VOID:
            self.open.append(tag)
        assert not {"src", "onclick", "onload"} & set(given)
        if "id" in given:
            self.ids.append(given["id"])
        if tag == "a":
            self.links.append(given["href"])

    def handle_startendtag(self, tag, attrs):
        assert tag in self.VOID

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


def test_the_page_is_whole_and_loads_nothing():
    page = scanpage.render(record())
    assert page == scanpage.render(record())
    check = Check()
    check.feed(page)
    assert check.open == []
    assert len(set(check.ids)) == len(check.ids)
    assert {link[1:] for link in check.links} == set(check.ids)
    assert not re.search(r"https?://|url\(|@import", page)
    assert "nan" not in re.findall(r'd="[^"]*"', page)
    assert page.count("<svg") >= 6 * 2
    assert "paredown compare testbed:moe --methods dern,random --keep 0.5" in page
    assert "other,random" not in page
    assert "meaning of entropy" in page


def test_a_model_path_with_a_space_is_quoted_in_the_command():
    page = scanpage.render(record(model="/models/my model"))
    assert "paredown compare &#39;/models/my model&#39; --methods" in page


def test_a_view_that_nothing_can_draw_is_shown_by_its_numbers():
    odd = view("new-view", [column("thing", unit="things")], [row(0, "all", 1, {"thing": 7.0})])
    given = record(views=[odd], data={})
    page = scanpage.render(given)
    assert "What new-view says." in page
    assert ">7</data>" in page
    assert "no data passed" in page
    assert "No curve points at a budget" in page
    for terminal in (False, True):
        assert "What new-view says." in printed(given, terminal=terminal)


def test_nothing_found_is_said():
    given = record(views=[])
    assert "Nothing was found to look at." in scanpage.render(given)
    assert "A note on the scan." in printed(given, terminal=False)


def test_records_survive_json_and_refuse_what_they_do_not_know():
    given = record()
    assert ScanRecord.model_validate_json(given.model_dump_json()) == given
    with pytest.raises(ValueError, match="extra"):
        ScanRecord.model_validate({**given.model_dump(), "more": 1})
    with pytest.raises(ValueError, match="finite"):
        row(0, "all", 1, {"thing": float("nan")})


def test_heat_maps_tell_never_from_hardly():
    drawn = scandraw.heat([0.0, 1e-9, 1.0], 1.0, "label")
    assert drawn.count('class="gone"') == 1
    assert drawn.count('class="kept"') == 2
    assert 'viewBox="0 0 3.5 1"' in scandraw.heat([0.5, 0.5, 0.5], 1.0, "label", breaks=2)
