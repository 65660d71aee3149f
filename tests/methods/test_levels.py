"""Blocks at several levels: what is scored is what stays, also from disk; budgets over layers; costs and knapsack."""

from __future__ import annotations

import itertools

import matrix
import numpy as np
import pytest
import torch

import paredown
from paredown.core import audit
from paredown.core.edits import DropSublayer, KeepExpertNeurons, KeepExperts
from paredown.core.search import allocation
from paredown.core.search.levels import LevelDatabase, keeps_around
from paredown.errors import BudgetError, DataError, RecipeError
from paredown.methods.depth.llm_drop import LLMDrop
from paredown.methods.experts.camera import CameraP
from paredown.methods.experts.dern import DERN
from paredown.methods.experts.random_experts import RandomExperts

FAMILIES = matrix.FAMILIES["experts"]
METHODS = (DERN(alpha=0.0), RandomExperts(), CameraP(), CameraP(form="ragged"))


def logits(model, ids):
    with torch.no_grad():
        return model.hf(input_ids=ids, use_cache=False).logits


def build(method, family, keeps=(0.5, 0.75, 1.0)):
    model = matrix.model(family)
    return model, LevelDatabase.build(method, model, keeps, matrix.batch(), seed=3)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("method", METHODS, ids=lambda m: f"{m.name}-{getattr(m, 'form', '')}")
def test_what_was_scored_is_what_stays(method, family, tmp_path):
    model, database = build(method, family)
    data = matrix.batch().input_ids
    dense, digests = logits(model, data), audit.digests(model.hf)
    sizes = database.sizes
    assert all(list(found) == sorted(set(found)) and len(found) == 3 for found in sizes)
    state = tuple(i % 3 for i in range(len(sizes)))
    with database.swapping():
        database.load(state)
        scored = logits(model, data)
        assert not torch.equal(scored, dense)
    assert torch.equal(logits(model, data), dense)
    assert audit.digests(model.hf) == digests
    edits = database.apply(state)
    assert torch.equal(logits(model, data), scored)
    blocks = {block.index: block for block in model.anatomy.language.blocks}
    for layer, levels, level in zip(database.layers, database.levels, state, strict=True):
        assert [e for e in edits if e.layer == layer] == list(levels[level].edits)
        if levels[level].edits and isinstance(levels[level].edits[0], KeepExperts):
            assert blocks[layer].experts.count == len(levels[level].edits[0].keep)
    model.save(tmp_path / "made")
    again = paredown.load(tmp_path / "made")
    torch.testing.assert_close(logits(again, data), scored, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("method", [DERN(alpha=0.0), RandomExperts()], ids=lambda m: m.name)
def test_a_level_everywhere_is_what_the_method_itself_makes(method):
    model, database = build(method, "mixtral")
    data = matrix.batch()
    database.apply(database.state(0.5))
    other = matrix.model("mixtral")
    method.model_copy(update={"keep": 0.5}).compress(other, data, seed=3)
    assert torch.equal(logits(model, data.input_ids), logits(other, data.input_ids))
    assert audit.digests(model.hf) == audit.digests(other.hf)


def test_untouched_parameters_are_held_once():
    model, database = build(RandomExperts(), "mixtral")
    dense = dict(model.hf.get_submodule(model.anatomy.language.blocks[0].path).named_parameters())
    copy = dict(database.levels[0][0].module.named_parameters())
    shared = [name for name in copy if copy[name] is dense[name]]
    assert any("self_attn" in name for name in shared)
    assert not any("experts" in name for name in shared)


def test_levels_that_cannot_be_are_none_and_equal_ones_are_one():
    model, database = build(RandomExperts(), "mixtral", keeps=(0.1, 0.5, 0.55, 0.6, 1.0))
    part = model.anatomy.language.blocks[0].experts
    found = [level.keeps for level in database.levels[0]]
    assert 0.1 not in [keep for keeps in found for keep in keeps]  # fewer than the router chooses
    counts = {part.count - matrix.removed(part.count, keep) for keep in (0.5, 0.55, 0.6, 1.0)}
    assert len(found) == len(counts)
    with pytest.raises(BudgetError, match=r"layer 0 cannot be compressed to keep 0\.1"):
        database.state(0.1)
    with pytest.raises(BudgetError, match="none of the levels"):
        build(RandomExperts(), "mixtral", keeps=(0.1,))


def test_what_has_no_levels_is_refused():
    with pytest.raises(RecipeError, match="chooses over all layers"):
        build(LLMDrop(), "mixtral")
    with pytest.raises(DataError, match="calibration data"):
        LevelDatabase.build(DERN(), matrix.model("mixtral"), (0.5,), None)


def test_keeps_lie_around_in_decimals():
    assert keeps_around(0.7, 0.1, 8) == [0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0]
    assert keeps_around(0.75, 0.0625, 2) == [0.625, 0.6875, 0.75, 0.8125, 0.875]
    assert keeps_around(0.95, 0.1, 1) == [0.85, 0.95]


def test_lost_scores_are_those_of_removed_units():
    scores = {"importance": torch.tensor([1.0, 2.0, 4.0, 8.0])}
    assert allocation.lost([KeepExperts(layer=0, keep=(0, 3), top_k=1)], scores, "importance") == 6.0
    neurons = {"score": torch.tensor([[1.0, 2.0], [4.0, 8.0]]), "shared": torch.tensor([16.0, 32.0])}
    edit = KeepExpertNeurons(layer=0, keep=((0,), (1,)), shared=(1,))
    assert allocation.lost([edit], neurons, "score") == 2.0 + 4.0 + 16.0
    assert allocation.lost([edit], neurons, None) is None
    assert allocation.lost([DropSublayer(layer=0, part="mlp")], neurons, "score") is None


@pytest.mark.parametrize("seed", range(5))
def test_the_knapsack_is_the_best_of_all_choices(seed):
    rng = np.random.default_rng(seed)
    sizes = [sorted(rng.choice(12, size=4, replace=False).tolist()) for _ in range(4)]
    costs = [rng.integers(0, 6, size=4).astype(float).tolist() for _ in range(4)]
    total = sum(found[1] for found in sizes)
    legal = [
        state
        for state in itertools.product(range(4), repeat=4)
        if sum(sizes[u][level] for u, level in enumerate(state)) == total
    ]
    best = min(legal, key=lambda state: (sum(costs[u][level] for u, level in enumerate(state)), state))
    found = allocation.knapsack(costs, sizes, total)
    assert found in legal
    assert sum(costs[u][x] for u, x in enumerate(found)) == sum(costs[u][x] for u, x in enumerate(best))
    with pytest.raises(BudgetError, match="no choice of levels"):
        allocation.knapsack(costs, sizes, 1000)
