"""The HTML report: whole, self-contained, escaped, deterministic, and complete."""

from __future__ import annotations

import re
from collections.abc import Callable
from html.parser import HTMLParser

import pytest

from paredown.report import html, words
from paredown.workflow.record import Interval, RunRecord

Make = Callable[[str], RunRecord]
NAMES = ["experts", "depth", "stopped", "ragged", "hostile"]
_VOID = {"meta", "br", "hr", "img", "link", "input", "col", "wbr"}


class Page(HTMLParser):
    """Collects tags, attributes and text; fails on a tag that is closed out of turn or never."""

    def __init__(self, text: str) -> None:
        super().__init__(convert_charrefs=True)
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.words: list[str] = []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in _VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open, tag
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if not self.open or self.open[-1] != "style":
            self.words.append(data)

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.words).split()).replace(words.NARROW, " ").replace(words.MINUS, "-")

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attrs for name, attrs in self.tags if name == tag]


@pytest.mark.parametrize("name", NAMES)
def test_parses_with_every_tag_closed_in_turn(make: Make, name: str) -> None:
    text = html.render(make(name))
    assert text.startswith("<!DOCTYPE html>")
    page = Page(text)
    assert [tag for tag, _ in page.tags].count("h1") == 1
    assert len(page.all("section")) == 8


@pytest.mark.parametrize("name", NAMES)
def test_loads_and_runs_nothing(make: Make, name: str) -> None:
    text = html.render(make(name))
    page = Page(text)
    assert not {"script", "link", "img", "iframe", "object", "embed", "video", "audio", "base", "form"} & {
        tag for tag, _ in page.tags
    }
    for tag, attrs in page.tags:
        for key, value in attrs.items():
            assert not key.startswith("on"), (tag, key)
            if key in ("src", "href", "xlink:href", "data", "action", "poster", "srcset"):
                assert tag == "a", (tag, key)
                assert value is not None
                assert value.startswith(("#", "https://arxiv.org/abs/")), value
            assert not (key == "style" and value and "url" in value)
    styles = "".join(re.findall(r"<style>(.*?)</style>", text, flags=re.S))
    assert "@import" not in styles
    assert "url(" not in styles
    policy = [attrs["content"] for attrs in page.all("meta") if attrs.get("http-equiv") == "Content-Security-Policy"]
    assert policy
    assert (policy[0] or "").startswith("default-src 'none'")


@pytest.mark.parametrize("name", NAMES)
def test_is_deterministic_and_survives_a_round_trip(make: Make, name: str) -> None:
    first, again = html.render(make(name)), html.render(make(name))
    assert first == again
    first.encode()


def test_hostile_texts_are_shown_and_never_act(make: Make) -> None:
    text = html.render(make("hostile"))
    assert "<script" not in text
    assert "&lt;script&gt;" in text
    assert "\x1b" not in text
    assert "\u202e" not in text
    page = Page(text)
    assert not any("evil" in (attrs.get("href") or "") for attrs in page.all("a"))
    assert "<script>alert('x')</script>" in page.text
    assert "{{7*7}}" in page.text


def test_a_link_is_made_only_of_an_arxiv_id(make: Make) -> None:
    links = [attrs.get("href") for attrs in Page(html.render(make("experts"))).all("a")]
    assert "https://arxiv.org/abs/2509.10377" in links
    assert not any(
        "arxiv" in (href or "") for href in (a.get("href") for a in Page(html.render(make("hostile"))).all("a"))
    )


def test_every_measured_number_is_there_exactly(make: Make) -> None:
    record = make("experts")
    page = Page(html.render(record))
    values = {attrs["value"] for attrs in page.all("data")}
    step = record.steps[0]
    assert record.speed_before is not None
    assert record.speed_after is not None
    wanted: list[float] = [record.seconds]
    for size in (record.size_before, record.size_after):
        wanted += [size.parameters, size.bytes_weights, size.bytes_disk]
    for speed in (record.speed_before, record.speed_after):
        wanted += [value for key, value in speed.model_dump().items() if key != "prefill_tokens"]
    plan = step.plan
    wanted += [plan.parameters_after, plan.bytes_before, plan.bytes_after, plan.peak_memory_bytes, plan.seconds]
    wanted += [step.keep, step.touched_share, step.parameters_before, step.parameters_after, step.seconds]
    wanted += [step.peak_memory_bytes, *step.seconds_by_stage.values()]
    titles = {attrs.get("title") for attrs in page.all("span")}
    for score in map(words.in_percent, record.scores):
        for one in (score.before, score.after, score.difference):
            if one is not None:
                wanted.append(one.mean)
                assert f"{one.low!r} to {one.high!r}" in titles
    missing = [value for value in wanted if repr(value) not in values]
    assert missing == []


def test_what_a_reader_must_see_stands_in_the_text(make: Make) -> None:
    record = make("experts")
    text = Page(html.render(record)).text
    for wanted in (
        "Paredown removed 48 of 96 experts with dern.",
        "The weights went from 10.8 to 6.29 MiB (-42 %).",
        "Perplexity rose from 23.4 [22.9, 23.9] to 26.9 [26.3, 27.5], a loss.",
        "The proof passed.",
        "+0.138",
        "[+0.129, +0.147]",
        f"1.148{words.TIMES} the perplexity",
        "no difference shown",
        "+16 %",  # time against plan
        "8 of 16 kept",
        f"16 {words.TIMES} 256 {words.TIMES} 128",
        "14.9 s",
        "3, 11",  # experts never seen in layer 5
        "limit 2.00",
        "Opens in plain transformers.",
        "AutoModelForCausalLM",
        "5.23.0",
        "AMD EPYC 7B13",
        "paredown run testbed:moe --method dern --keep 0.5 --out small",
        "the edge of the wood",
        "+1.0] points",
        "with plain transformers",
        "experts never seen, layer 5",
        "2026-11-22 05:12 UTC",
    ):
        assert wanted in text, wanted
    for step in record.steps:
        for change in step.changes:
            assert words.ranges(change.kept or []) in Page(html.render(record)).text.replace("&ndash;", words.DASH)
        for value in (*step.data.values(), *step.fields.values()):
            assert words.plain(value) in text
        assert all(warning in text for warning in step.warnings)


def test_the_grid_draws_each_kept_and_each_removed_expert_once(make: Make) -> None:
    record = make("experts")
    page = Page(html.render(record))
    kept = [attrs["d"] or "" for attrs in page.all("path") if attrs.get("class") == "kept"]
    gone = [attrs["d"] or "" for attrs in page.all("path") if attrs.get("class") == "gone"]
    assert len(kept) == len(gone) == 6
    for change, filled, hollow in zip(record.steps[0].changes, kept, gone, strict=True):
        starts = [int(float(x)) for x in re.findall(r"M([\d.]+) 0", filled)]
        assert starts == change.kept
        assert len(re.findall("M", hollow)) == change.before - change.after


def test_every_drawing_says_what_it_shows_and_every_table_has_a_caption(make: Make) -> None:
    for name in NAMES:
        text = html.render(make(name))
        page = Page(text)
        for attrs in page.all("svg"):
            assert attrs.get("aria-hidden") == "true" or (attrs["role"] == "img" and attrs["aria-label"])
        assert len(page.all("caption")) == len(page.all("table"))
        assert len(page.all("th")) == sum("scope" in attrs for attrs in page.all("th"))
        ids = [attrs["id"] for _, attrs in page.tags if "id" in attrs]
        assert len(ids) == len(set(ids))
        assert {href[1:] for attrs in page.all("a") if (href := attrs["href"] or "").startswith("#")} <= set(ids)


def test_a_run_with_unequal_layers(make: Make) -> None:
    text = Page(html.render(make("depth"))).text
    assert "6 of 12 attention sub-layers, 2 of 12 MLP sub-layers and 14,336 of 65,536 neurons" in text
    assert "no difference shown" in text
    assert "Opens with paredown.load." in text
    assert "Opens in plain transformers." not in text
    assert "was resumed 2 times" in text
    assert "more (all stand in the run's record)" in text
    assert "Speed and memory were not measured." in text
    assert "more than 20 % off" in html.render(make("depth"))


def test_only_dropped_layers_listed_claims_no_total(make: Make) -> None:
    record = make("depth")
    step = record.steps[0]
    step = step.model_copy(update={"changes": [one for one in step.changes if one.after == 0]})
    text = Page(html.render(record.model_copy(update={"steps": [step]}))).text
    assert "removed 6 attention sub-layers and 2 MLP sub-layers" in text
    assert "6 removed" in text
    assert "Layers after 11 are as they were." in text


def test_a_gate_that_failed_comes_first(make: Make) -> None:
    text = Page(html.render(make("stopped"))).text
    lead = text[text.index("testbed:moe", text.index("run report")) :]
    assert lead.startswith("testbed:moe The gate failed: perplexity after / before 2.62, limit 2.00.")
    assert "would have removed 48 of 96 experts" in text
    assert "Nothing was written, so there is nothing to prove." in text
    assert "The proof passed" not in text


def test_a_failed_proof_warns_wherever_the_result_is_named(make: Make) -> None:
    record = make("experts")
    assert record.proof is not None
    proof = record.proof.model_copy(
        update={"passed": False, "bytes_match_plan": False, "max_abs_logit_difference": 0.25}
    )
    text = Page(html.render(record.model_copy(update={"proof": proof}))).text
    assert text.count("proof failed") == 3
    assert "NOT: the size equals the plan" in text
    assert "0.250" in text


def test_steps_are_numbered_from_one_however_the_record_counts(make: Make) -> None:
    record = make("depth")
    steps = [step.model_copy(update={"index": index}) for index, step in zip((0, 1), record.steps, strict=True)]
    assert html.render(record.model_copy(update={"steps": steps})) == html.render(record)
    assert "Step 3" not in Page(html.render(record)).text


def test_ragged_experts_are_drawn_by_width(make: Make) -> None:
    record = make("ragged")
    page = Page(html.render(record))
    assert "filled up to the share of its neurons" in page.text
    gone = [attrs for attrs in page.all("path") if attrs.get("class") == "gone"]
    assert len(gone) == 6 * 16


def test_numbers_that_are_not_finite_do_not_break_it(make: Make) -> None:
    record = make("experts")
    nan, inf = float("nan"), float("inf")
    bad = Interval(mean=inf, low=nan, high=inf, n=1)
    score = record.scores[0].model_copy(update={"after": bad, "difference": bad})
    step = record.steps[0].model_copy(update={"seconds": nan, "touched_share": nan, "seconds_by_stage": {"a": 0.0}})
    gate = record.gate.model_copy(update={"value": inf, "passed": False})
    page = Page(html.render(record.model_copy(update={"scores": [score], "steps": [step], "gate": gate})))
    assert "∞" in page.text
    assert "not a number" in page.text


def test_an_empty_run_still_renders(make: Make) -> None:
    record = make("experts").model_copy(
        update={"steps": [], "scores": [], "versions": {}, "hardware": {}, "recipe": {}}
    )
    assert "removed no whole unit" in Page(html.render(record)).text
