"""Recipes as data: what is read, what is refused, what decides the bytes."""

from __future__ import annotations

from pathlib import Path

import pytest

from paredown.errors import ParedownError, RecipeError, UsageError
from paredown.workflow import plan, recipe
from paredown.workflow.recipe import GateSpec

EXAMPLES = Path(__file__).parents[2] / "examples"
WHOLE = """
model: testbed:moe
seed: 7
data: {calibration: texts.jsonl, sequences: 16, length: 128}
gate: kl:0.5
steps:
  - {method: dern, keep: 0.5, alpha: 0.7}
  - {method: llm-drop, keep: 0.75, part: mlp}
"""


@pytest.fixture
def file(tmp_path):
    def write(text):
        (tmp_path / "recipe.yaml").write_text(text, encoding="utf-8")
        return tmp_path / "recipe.yaml"

    return write


def test_a_whole_recipe(file):
    found = recipe.read(file(WHOLE))
    assert (found.model, found.seed, found.gate) == ("testbed:moe", 7, "kl:0.5")
    assert (found.data.calibration, found.data.sequences, found.data.length) == ("texts.jsonl", 16, 128)
    first, second = found.methods()
    assert (first.name, first.keep, first.alpha) == ("dern", 0.5, 0.7)
    assert (second.name, second.keep, second.part) == ("llm-drop", 0.75, "mlp")


def test_defaults():
    found = recipe.check({"model": "m", "steps": [{"method": "dern"}]})
    assert (found.seed, GateSpec.parse(found.gate)) == (0, GateSpec(kind="ppl", limit=2.0))
    assert (found.data.sequences, found.data.length, found.data.calibration) == (64, 512, None)
    assert found.methods()[0].keep == 0.5


def test_what_is_written_is_read_again(file):
    found = recipe.read(file(WHOLE))
    assert recipe.check(found.model_dump(mode="json")) == found


def test_the_gate_does_not_decide_the_bytes_and_all_else_does():
    base = {"model": "m", "steps": [{"method": "dern", "keep": 0.5}], "gate": "ppl:2.0"}
    known = recipe.check(base).identity()
    assert recipe.check({**base, "gate": "none"}).identity() == known
    for change in (
        {"model": "n"},
        {"seed": 1},
        {"data": {"length": 64}},
        {"steps": [{"method": "dern", "keep": 0.75}]},
        {"steps": [{"method": "dern", "keep": 0.5, "alpha": 0.5}]},
        {"steps": base["steps"] * 2},
    ):
        assert recipe.check({**base, **change}).identity() != known


@pytest.mark.parametrize(
    ("text", "kind", "limit", "back"),
    [("ppl:2.0", "ppl", 2.0, "ppl:2"), ("kl:0.05", "kl", 0.05, "kl:0.05"), ("none", "none", None, "none")],
)
def test_gates(text, kind, limit, back):
    found = GateSpec.parse(text)
    assert (found.kind, found.limit, str(found)) == (kind, limit, back)
    assert GateSpec.parse(str(found)) == found


@pytest.mark.parametrize(
    "text", ["", "ppl", "ppl:", "ppl:x", "ppl:0", "ppl:-1", "ppl:nan", "ppl:inf", "none:1", "acc:1"]
)
def test_gates_that_are_none(text):
    with pytest.raises(UsageError, match="is not one of ppl"):
        GateSpec.parse(text)


def test_a_recipe_is_frozen(file):
    found = recipe.read(file(WHOLE))
    with pytest.raises(ValueError, match="frozen"):
        found.seed = 3


@pytest.mark.parametrize("raw", [{}, {"model": "m"}, {"model": "m", "steps": [{"method": "dern", "x": 1}]}])
def test_messages_are_one_sentence_that_names_the_file(file, raw):
    with pytest.raises(RecipeError) as caught:
        recipe.check(raw, "some.yaml")
    said = str(caught.value)
    assert "\n" not in said
    assert said.endswith(".")
    assert "some.yaml" in said or "dern" in said


@pytest.mark.parametrize(
    "text",
    ["a: &x 1\n", "a: 2026-01-01\n", "? [a, b]\n: c\n", "--- a\n--- b\n", "a: !!binary aGk=\n", "a: !!set {b}\n"],
)
def test_yaml_beyond_plain_data_never_crashes(file, text):
    with pytest.raises(ParedownError):
        recipe.read(file(text))


@pytest.mark.parametrize("file", sorted(EXAMPLES.glob("*.yaml")), ids=lambda file: file.stem)
def test_every_example_can_be_planned(file):
    read = recipe.read(file)
    planned = plan.plan(read, rehearse=False)
    assert [one.method for one in planned] == [step.method for step in read.steps]
