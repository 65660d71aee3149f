"""Reading of words that typer does not read for us."""

from __future__ import annotations

import pytest

from paredown.commands import options
from paredown.errors import UsageError


@pytest.mark.parametrize(
    ("given", "read"),
    [
        ("a=3", {"a": 3}),
        ("a=0.25", {"a": 0.25}),
        ("a=1e-3", {"a": 0.001}),
        ("a=true", {"a": True}),
        ("a=null", {"a": None}),
        ("a=[1, 2]", {"a": [1, 2]}),
        ("a=ragged", {"a": "ragged"}),
        ("a=x=y", {"a": "x=y"}),
        (" a = ragged ", {"a": "ragged"}),
        ("a=", {"a": ""}),
    ],
)
def test_fields_are_json_where_they_can_be_and_text_elsewhere(given, read):
    assert options.fields([given]) == read


def test_fields_keep_their_order_and_may_be_many():
    assert list(options.fields(["b=1", "a=2"])) == ["b", "a"]
    assert options.fields(None) == {}


@pytest.mark.parametrize("given", [["a"], ["=3"], ["a=1", "a=2"]])
def test_broken_settings_are_told(given):
    with pytest.raises(UsageError, match="--set"):
        options.fields(given)


def test_lists_of_names_and_numbers():
    assert options.names("--methods", "b, a,b") == ["b", "a"]
    assert options.numbers("--keep", "0.75,0.5") == [0.75, 0.5]


def test_recipes_are_told_from_models_by_suffix():
    assert options.is_recipe("steps.yaml")
    assert options.is_recipe("folder/steps.yml")
    assert not options.is_recipe("testbed:moe")
    assert not options.is_recipe("org/model.v1")


def test_fields_of_several_methods():
    given = ["dern.alpha=0.4", "camera-p.form=ragged", "dern.iterations=3"]
    assert options.fields_by_method(given) == {"dern": {"alpha": 0.4, "iterations": 3}, "camera-p": {"form": "ragged"}}
    assert options.fields_by_method(None) == {}
    with pytest.raises(UsageError, match="names no method"):
        options.fields_by_method(["alpha=0.4"])


def test_metrics():
    assert (options.metric("ppl"), options.metric("kl")) == ("ppl", "kl")
    with pytest.raises(UsageError, match="neither"):
        options.metric("accuracy")
