"""From words to a recipe."""

from __future__ import annotations

import pytest

from paredown.commands.recipes import recipe_for
from paredown.errors import RecipeError, UsageError
from paredown.workflow import recipe as module


class Anything:
    """Stands in for the check of methods' fields, which has its own tests."""


@pytest.fixture(autouse=True)
def any_method(monkeypatch):
    monkeypatch.setattr(module.Step, "build", lambda self: Anything())


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "steps.yaml"
    path.write_text("model: m\nseed: 3\ndata: {calibration: a.txt, sequences: 8}\nsteps:\n  - {method: x, keep: 0.5}\n")
    return str(path)


def test_one_step_from_options():
    made = recipe_for(
        "m", method="x", keep=0.5, settings=["alpha=2", "form=ragged"], data="d.txt", seed=7, gate="kl:0.5"
    )
    assert made.model == "m"
    assert [(step.method, step.fields) for step in made.steps] == [("x", {"alpha": 2, "form": "ragged", "keep": 0.5})]
    assert (made.data.calibration, made.seed, made.gate) == ("d.txt", 7, "kl:0.5")


def test_what_is_not_given_keeps_the_defaults_of_a_recipe():
    made = recipe_for("m", method="x", keep=0.5)
    assert made == module.check({"model": "m", "steps": [{"method": "x", "keep": 0.5}]})


def test_recipe_file_as_it_is(file):
    assert recipe_for(file) == module.read(file)


def test_data_seed_and_gate_of_the_command_line_go_before_those_of_the_file(file):
    made = recipe_for(file, data="b.txt", seed=9, gate="none")
    assert (made.data.calibration, made.data.sequences, made.seed, made.gate) == ("b.txt", 8, 9, "none")
    assert made.steps == module.read(file).steps


@pytest.mark.parametrize("extra", [{"method": "x"}, {"keep": 0.5}, {"settings": ["a=1"]}])
def test_recipe_file_and_single_step_exclude_each_other(file, extra):
    with pytest.raises(UsageError, match="leave out"):
        recipe_for(file, **extra)


@pytest.mark.parametrize(
    ("given", "part"),
    [
        ({}, "--method"),
        ({"method": "x"}, "--keep"),
        ({"method": "x", "keep": 0.5, "settings": ["keep=0.6"]}, "twice"),
        ({"method": "x", "keep": 0.5, "gate": "ppl"}, "ppl:2.0"),
    ],
)
def test_half_a_step_is_a_usage_error(given, part):
    with pytest.raises(UsageError, match=part):
        recipe_for("m", **given)


def test_keep_may_come_as_a_field():
    assert recipe_for("m", method="x", settings=["keep=0.6"]).steps[0].fields == {"keep": 0.6}


def test_seed_out_of_range_names_where():
    with pytest.raises(RecipeError, match="the command line: seed"):
        recipe_for("m", method="x", keep=0.5, seed=-1)
