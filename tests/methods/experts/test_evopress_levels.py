"""Levels over layers: by search, by rules, at random. All of them at exactly the size of equal levels."""

from __future__ import annotations

import functools
import itertools
from copy import deepcopy

import families
import matrix
import pytest
import torch
import transformers as tf

from paredown.core import audit
from paredown.core.checkpoint import Model
from paredown.core.learning.teacher import Teacher, fitness
from paredown.core.search import evolution, judging
from paredown.core.search.levels import LevelDatabase, keeps_around
from paredown.errors import BudgetError, RecipeError
from paredown.methods.experts.allocate import Allocate
from paredown.methods.experts.camera import CameraP
from paredown.methods.experts.dern import DERN
from paredown.methods.experts.evopress_levels import EvoPressLevels, RandomLevels

QUICK = {"generations": 6, "offspring": 6, "tokens": (24, 72), "survivors": (2, 1), "step": 0.125, "reach": 2}
PLAIN = {"step": 0.125, "reach": 2}


@functools.cache
def _built():
    config = tf.MixtralConfig(**families._GQA, num_local_experts=8, num_experts_per_tok=2)
    return families._seeded(lambda: tf.MixtralForCausalLM(config))


def moe():
    return Model.of(deepcopy(_built()))


def counts(model):
    return [block.experts.count for block in model.anatomy.language.blocks]


def logits(model, ids):
    with torch.no_grad():
        return model.hf(input_ids=ids, use_cache=False).logits


EVERY = [
    EvoPressLevels(keep=0.75, **QUICK),
    RandomLevels(keep=0.75, **PLAIN),
    *(Allocate(keep=0.75, allocation=rule, **PLAIN) for rule in ("uniform", "global", "sensitivity")),
]


@pytest.mark.parametrize("method", EVERY, ids=lambda m: f"{m.name}-{getattr(m, 'allocation', '')}")
def test_the_total_is_that_of_equal_levels_and_what_is_told_is_what_is_there(method):
    model, data = moe(), matrix.batch()
    outcome = method.compress(model, data, seed=4)
    uniform = moe()
    DERN(keep=0.75).compress(uniform, data)
    assert sum(counts(model)) == sum(counts(uniform)) == 18
    assert model.parameters() == uniform.parameters()
    told = outcome.coverage["levels"]
    assert [round(8 * told[str(i)]) for i in range(3)] == counts(model)
    foretold = [len(e.keep) for e in method.foretell(moe().anatomy.language.blocks)]
    assert foretold == (counts(uniform) if getattr(method, "allocation", "") == "uniform" else [7, 5, 6])
    again = moe()
    method.compress(again, data, seed=4)
    assert audit.digests(model.hf) == audit.digests(again.hf)
    if getattr(method, "allocation", "") == "uniform":
        assert torch.equal(logits(model, data.input_ids), logits(uniform, data.input_ids))


def brute_force(method, keep):
    """Score every legal choice; return the best and its value."""
    model, data = moe(), matrix.batch()
    teacher = Teacher.collect(model.hf, data.input_ids)
    database = LevelDatabase.build(method, model, keeps_around(keep, 0.125, 2), data)
    space = evolution.Levels(database.sizes, database.state(keep))
    found = []
    with database.swapping():
        for state in itertools.product(*(range(len(sizes)) for sizes in database.sizes)):
            if space.holds(state):
                database.load(state)
                found.append((fitness(model.hf, teacher, data.input_ids, slice(None), batch=170), state))
    return min(found), {state: value for value, state in found}


def test_the_search_finds_the_best_of_all_choices():
    (best, _), values = brute_force(DERN(), 0.75)
    assert len(values) > 10
    data = matrix.batch()
    fields = QUICK | {"tokens": (1000,), "survivors": (1,), "generations": 12}
    for seed in range(3):
        told = EvoPressLevels(keep=0.75, **fields).compress(moe(), data, seed=seed).coverage["search"]
        assert told["fitness_on_all_data"] == pytest.approx(best, rel=1e-4)
        assert told["fitness_on_all_data"] <= told["fitness_of_equal_levels"]


def test_sensitivity_is_the_harm_of_one_layer_alone_and_the_least_sum_wins():
    data, model = matrix.batch(), moe()
    teacher = judging.teacher_of(model.hf, data, None)
    outcome = Allocate(keep=0.75, **PLAIN).compress(moe(), data)
    costs = outcome.coverage["costs"]
    database = LevelDatabase.build(DERN(), model, keeps_around(0.75, 0.125, 2), data)
    with database.swapping():
        for layer in range(3):
            database.load(tuple(1 if u == layer else 4 for u in range(3)))
            assert costs[str(layer)][1] == pytest.approx(
                fitness(model.hf, teacher, data.input_ids, slice(None), batch=170), rel=1e-5
            )
    sums = {
        state: sum(costs[str(u)][x] for u, x in enumerate(state))
        for state in itertools.product(range(5), repeat=3)
        if sum(state) == 6
    }
    chosen = tuple(round(8 * outcome.coverage["levels"][str(i)]) - 4 for i in range(3))
    assert sums[chosen] == pytest.approx(min(sums.values()))


def test_one_list_over_all_layers_keeps_the_largest_scores():
    data, model = matrix.batch(), moe()
    Allocate(keep=0.75, allocation="global", step=0.125, reach=6).compress(model, data)
    scores, _ = matrix.scores(DERN(keep=0.75), moe(), data)
    listed = sorted(((float(v), i) for i in range(3) for v in scores[i]["importance"]), reverse=True)[:18]
    assert counts(model) == [sum(layer == i for _, layer in listed) for i in range(3)]


def test_any_method_that_works_layer_by_layer():
    data = matrix.batch()
    fields = {"method": "camera-p", "fields": {"form": "ragged"}, "keep": 0.5}
    model = moe()
    EvoPressLevels(**fields, **QUICK).compress(model, data)
    uniform = moe()
    CameraP(form="ragged", keep=0.5).compress(uniform, data)
    assert model.parameters() == uniform.parameters()
    with pytest.raises(RecipeError, match="llm-drop does not work layer by layer"):
        EvoPressLevels(method="llm-drop").compress(moe(), data)
    with pytest.raises(RecipeError, match="has a keep of its own"):
        EvoPressLevels(fields={"keep": 0.5}).compress(moe(), data)
    with pytest.raises(RecipeError, match="dern has no field 'beta'"):
        EvoPressLevels(fields={"beta": 0.5}).compress(moe(), data)
    with pytest.raises(BudgetError, match="cannot be compressed to keep"):
        EvoPressLevels(keep=0.1, **QUICK).compress(moe(), data)


def test_killed_and_resumed_it_gives_the_same_answer(tmp_path, monkeypatch):
    method, data = EvoPressLevels(keep=0.75, **QUICK), matrix.batch()
    whole = method.compress(moe(), data, seed=1)
    honest, calls = evolution._Search._generation, iter(range(10))

    def stop(self):
        if next(calls) == 3:
            raise KeyboardInterrupt
        return honest(self)

    model = moe()
    before = logits(model, data.input_ids)
    with monkeypatch.context() as patch:
        patch.setattr(evolution._Search, "_generation", stop)
        with pytest.raises(KeyboardInterrupt):
            method.compress(model, data, seed=1, folder=tmp_path)
    assert torch.equal(logits(model, data.input_ids), before)  # levels are swapped out again
    again = method.compress(moe(), data, seed=1, folder=tmp_path)
    assert (again.edits, again.coverage) == (whole.edits, whole.coverage)
