"""The model card: a header the hub can read, steady bytes, nothing that acts."""

from __future__ import annotations

import re
from collections.abc import Callable

import pytest
import yaml

from paredown.report import card, words
from paredown.workflow.record import RunRecord, Speed

Make = Callable[[str], RunRecord]


def split(text: str) -> tuple[dict[str, object], str]:
    start, header, body = text.split("---\n", 2)
    assert start == ""
    return yaml.safe_load(header), body.replace(words.NARROW, " ").replace(words.MINUS, "-")


def test_header_of_a_uniform_result(make: Make) -> None:
    header, _ = split(card.render(make("experts")))
    assert header == {
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "tags": ["paredown", "pruned", "experts"],
    }


def test_header_of_a_result_that_needs_paredown(make: Make) -> None:
    header, body = split(card.render(make("depth")))
    assert header["base_model"] == "meta-llama/Llama-3.2-1B"
    assert header["library_name"] == "paredown"
    assert header["tags"] == ["paredown", "pruned", "depth", "width"]
    assert "paredown.load(" in body
    assert "AutoModel" not in body


@pytest.mark.parametrize(
    ("family", "tag"),
    [("llama", "text-generation"), ("qwen2_vl", "image-text-to-text"), ("llava", "image-text-to-text"), ("bert", None)],
)
def test_pipeline_tag_only_where_it_fits(make: Make, family: str, tag: str | None) -> None:
    header, body = split(card.render(make("experts").model_copy(update={"family": family})))
    assert header.get("pipeline_tag") == tag
    name = {"text-generation": "AutoModelForCausalLM", None: "AutoModel"}.get(tag, "AutoModelForImageTextToText")
    assert f"import {name}\n" in body


def test_says_what_was_done_and_what_it_cost(make: Make) -> None:
    _, body = split(card.render(make("experts")))
    for wanted in (
        "it lost 48 of 96 experts.",
        "8 of 16 experts kept in each of 6 layers",
        "alpha `0.6`",
        "[arXiv:2509.10377](https://arxiv.org/abs/2509.10377)",
        "| Weights | 10.8 MiB | 6.29 MiB | -42 % |",
        r"| perplexity | 23.4 \[22.9, 23.9\] | 26.9 \[26.3, 27.5\] | +0.138 \[+0.129, +0.147\] nats a token: worse |",
        "no difference shown",
        "@article{dern,",
        "The gate passed",
        "The proof passed",
        "## Limits",
    ):
        assert wanted in body, wanted


def test_steps_without_a_paper_are_not_cited(make: Make) -> None:
    _, body = split(card.render(make("depth")))
    assert body.count("@article{") == 1
    assert "6 attention sub-layers removed, in layers 5, 7" in body


def test_bytes_do_not_depend_on_when_where_or_how_often_it_ran(make: Make) -> None:
    record = make("experts")
    step = record.steps[0]
    assert record.speed_after is not None
    speed = Speed(**{key: value * 3 for key, value in record.speed_after.model_dump().items()})
    plan = step.plan.model_copy(update={"seconds": 1.0, "peak_memory_bytes": 5})
    other = record.model_copy(
        update={
            "created": "1999-01-01",
            "command": "paredown run testbed:moe --resume --out /home/ann/elsewhere",
            "how_to_load": 'from_pretrained("/home/ann/elsewhere")',
            "recipe": {"out": "/home/ann/elsewhere"},
            "seconds": 1e6,
            "resumed": 7,
            "hardware": {"cpu": "another"},
            "speed_before": None,
            "speed_after": speed,
            "versions": record.versions | {"python": "3.13.0"},
            "steps": [
                step.model_copy(
                    update={
                        "seconds": 9.0,
                        "peak_memory_bytes": 1,
                        "seconds_by_stage": {},
                        "plan": plan,
                        "warnings": ["slow"],
                    }
                )
            ],
        }
    )
    assert card.render(other) == card.render(record)
    # ... while what does decide the weights shows.
    assert card.render(record.model_copy(update={"steps": [step.model_copy(update={"seed": 1})]})) != card.render(
        record
    )


def test_folders_of_the_machine_stay_out(make: Make) -> None:
    record = make("experts")
    step = record.steps[0].model_copy(update={"data": {"source": "/home/ann/texts/a.jsonl"}})
    text = card.render(record.model_copy(update={"model": "/home/ann/models/moe", "steps": [step]}))
    assert "/home" not in text
    assert "# moe, pared down" in text
    assert "`a.jsonl`" in text
    assert "base_model" not in text


def test_hostile_texts_become_text(make: Make) -> None:
    text = card.render(make("hostile"))
    text.encode()
    assert not re.search("[\x00-\x09\x0b-\x1f\u202e]", text)
    header, body = split(text)
    assert set(header) <= {"library_name", "pipeline_tag", "tags"}
    outside = re.sub(r"```.*?```", "", body, flags=re.S)  # code blocks show what they hold
    outside = re.sub(r"(`+)(?!`).*?(?<!`)\1(?!`)", "", outside.replace("\\`", ""))
    assert "<script" not in outside
    assert "](http://evil" not in outside
    assert "\n# head" not in body
    for row in (one for one in body.splitlines() if one.startswith("|")):
        assert len(re.findall(r"(?<!\\)\|", row)) == 5, row


def test_code_spans_hold_backticks() -> None:
    assert card.code("a`b``c") == "``` a`b``c ```"
    assert card.code("a\nb|c") == "`a b¦c`"


def test_nothing_written_is_not_called_proven(make: Make) -> None:
    _, body = split(card.render(make("stopped")))
    assert "The gate failed" in body
    assert "The proof passed" not in body
