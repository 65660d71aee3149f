"""Residual expansion: the card's checks."""

from __future__ import annotations

import itertools
import json
import math

import families
import pytest
import torch
from toys import normal, toy

from paredown.core import calibration, checkpoint, surgery
from paredown.core.checkpoint import Model
from paredown.core.depth.gates import gated
from paredown.core.edits import DropBlock
from paredown.core.looking.expansion import Expansion, Interaction
from paredown.core.looking.scales import branches, factors, fold
from paredown.core.looking.skips import rank_correlation
from paredown.core.looking.walk import sample, walk
from paredown.core.sequential import Resident
from paredown.errors import ArchitectureError, DataError
from paredown.methods.analysis.residual_network_depth import ResidualNetworkDepth


def batch(rows: int = 3, length: int = 12) -> calibration.Batch:
    ids = torch.randint(3, 90, (rows, length), generator=torch.Generator().manual_seed(1))
    return calibration.Batch(ids, None, "random", "", 0, rows)


class Terms:
    """Keeps the terms of a run as tensors."""

    def __init__(self, longest: int) -> None:
        self.expansion, self.found = Expansion(longest), {}

    def follow(self, walk, step):
        self.found |= self.expansion.expand(step)


def expanded(functions, x):
    terms = Terms(len(functions))
    toy(x, functions, [terms])
    return terms.found[0, len(functions)]


@pytest.mark.parametrize("count", [2, 3, 4])
def test_linear_blocks_have_exactly_the_paths_of_first_and_second_order(count):
    """Card: T1 and T2 are the parts of prod(I + A_i) x; of two blocks nothing is left."""
    x, matrices = normal(2, 5, 4), [normal(4, 4, seed=i + 1) for i in range(count)]
    found = expanded([lambda h, a=a: h @ a for a in matrices], x)
    orders = [torch.zeros_like(x) for _ in range(count + 1)]
    for order in range(1, count + 1):
        for chosen in itertools.combinations(matrices, order):
            path = x
            for a in chosen:
                path = path @ a
            orders[order] = orders[order] + path
    assert torch.allclose(found.first, orders[1])
    assert torch.allclose(found.second, orders[2])
    assert torch.allclose(found.rest, sum(orders[3:], torch.zeros_like(x)), atol=1e-9)
    if count == 2:
        assert float(found.rest.norm() / found.total.norm()) < 1e-6


def test_blocks_that_are_the_identity_count_their_paths():
    """Card: the number of terms of order k of four blocks is C(4, k)."""
    x = normal(1, 3, 2)
    found = expanded([lambda h: h] * 4, x)
    assert torch.allclose(found.first, math.comb(4, 1) * x)
    assert torch.allclose(found.second, math.comb(4, 2) * x)
    assert torch.allclose(found.rest, (math.comb(4, 3) + math.comb(4, 4)) * x)


def smooth(index: int, eps: float):
    """A smooth block that mixes tokens, as attention does."""
    inner, outer, mix = normal(6, 8, seed=index), normal(8, 6, seed=index + 9), normal(5, 5, seed=index + 20)
    return lambda h: eps * (torch.tanh(mix @ h @ inner) @ outer)


def slope(values: list[float], scales: list[float]) -> float:
    return math.log(values[0] / values[1]) / math.log(scales[0] / scales[1])


def test_orders_fall_with_the_size_of_blocks_as_their_names_say():
    """Card: T1 ~ eps, T2 ~ eps^2, R ~ eps^3; with pairs swapped or a term missing R stays at eps^2."""
    x, sizes = normal(2, 5, 6), [1e-3, 1e-4]
    runs = [expanded([smooth(i, eps) for i in range(3)], x) for eps in sizes]
    for order, name in enumerate(("first", "second", "rest"), 1):
        assert slope([float(getattr(run, name).norm()) for run in runs], sizes) == pytest.approx(order, abs=0.1)
    without = [float((run.total - run.first).norm()) for run in runs]
    assert slope(without, sizes) == pytest.approx(2, abs=0.1)
    swapped = []
    for eps, run in zip(sizes, runs, strict=True):
        functions = [smooth(i, eps) for i in range(3)]
        wrong = torch.zeros_like(x)
        for i, j in itertools.combinations(range(3), 2):
            wrong += torch.func.jvp(functions[i], (x,), (functions[j](x),))[1]
        swapped.append(float((run.total - run.first - wrong).norm()))
    assert slope(swapped, sizes) == pytest.approx(2, abs=0.1)


def test_derivatives_are_taken_where_the_run_begins():
    """Card: f_i = c_i x*x, T2 in closed form at eps = 1; Jacobians at h_j instead of x would give another."""
    x, c = normal(1, 4, 3), [0.5, -0.3, 0.8]
    found = expanded([lambda h, c=c: c * h * h for c in c], x)
    wanted = sum((2 * c[j] * x * sum(c[i] * x * x for i in range(j)) for j in (1, 2)), torch.zeros_like(x))
    assert torch.allclose(found.second, wanted)
    assert torch.allclose(found.first, sum(c) * x * x)


@pytest.mark.parametrize("family", ["llama", "gpt_neox", "gemma3", "deepseek_v3"])
def test_runs_of_a_real_model_sum_up_by_hand(family):
    model, terms = Model.of(families.FAMILIES[family]()), Terms(3)
    depth = len(model.anatomy.language.blocks)
    steps = []
    for found, step in walk(Resident(model), batch().input_ids, None, model.anatomy.language.blocks):
        terms.follow(found, step)
        steps.append(step)
    assert set(terms.found) == {(s, g) for g in (2, 3) for s in range(depth - g + 1)}
    x = steps[0].before
    first = sum((steps[i].run(x) - x for i in range(3)), torch.zeros_like(x))
    assert torch.allclose(terms.found[0, 3].first, first, atol=1e-4)
    run = terms.found[0, 3]
    assert torch.allclose(run.first + run.second + run.rest, steps[2].after - x, atol=1e-5)


def test_a_block_that_adds_nothing_has_no_interaction():
    """Card: row and column of I are zero; and of a linear toy, I is |A_j A_i h_i| / |A_j h_j|."""
    model = Model.of(families.llama())
    block = model.hf.model.layers[1]
    with torch.no_grad():
        for part in (block.self_attn.o_proj, block.mlp.down_proj):
            part.weight.zero_()
            part.bias.zero_()
    found = ResidualNetworkDepth(sweep=(0.0,), draws=1).measure(model, batch())[1:]
    assert found[1]["needed"] == found[1]["needs"] == 0
    assert found[0]["reacts"][1] == 0
    assert found[0]["reacts"][2] > 0
    assert found[1]["without"] == 0
    x, matrices, pairs = normal(2, 5, 4), [normal(4, 4, seed=i + 1) for i in range(3)], Interaction()
    toy(x, [lambda h, a=a: h @ a for a in matrices], [pairs])
    later = x + x @ matrices[0]
    wanted = (x @ matrices[0] @ matrices[1]).norm(dim=-1) / (later @ matrices[1]).norm(dim=-1)
    assert pairs.pairs[0, 1].mean == pytest.approx(float(wanted[:, 1:].mean()), rel=1e-5)


@pytest.mark.parametrize("family", families.DECODERS)
def test_factors_of_nothing_bypass_and_of_one_leave_alone_bit_by_bit(family):
    model, other = Model.of(families.FAMILIES[family]()), Model.of(families.FAMILIES[family]())
    given = families.inputs(family)
    clean = families.logits(model.hf, given)
    blocks = model.anatomy.language.blocks
    other.anatomy = surgery.apply_model(other.hf, other.anatomy, [DropBlock(layer=1)])
    with gated(model) as gates, torch.no_grad():
        gates.set(factors([blocks[1]], 0.0))
        assert torch.equal(model.hf(**given, use_cache=False).logits, families.logits(other.hf, given))
        gates.set(factors([blocks[1]], 1.0))
        assert torch.equal(model.hf(**given, use_cache=False).logits, clean)


@pytest.mark.parametrize("family", families.DECODERS)
def test_folded_factors_are_those_of_the_gates(family):
    """Card: folding c into the last weights and their biases equals the hook; after the extra norm, if there is one."""
    model = Model.of(families.FAMILIES[family]())
    given, blocks = families.inputs(family), model.anatomy.language.blocks
    chosen = {unit: 0.5 + 0.25 * i for i, unit in enumerate(u for block in blocks for u in branches(block))}
    with gated(model) as gates, torch.no_grad():
        gates.set(chosen)
        wanted = model.hf(**given, use_cache=False).logits
    fold(model, chosen)
    found = families.logits(model.hf, given)
    assert torch.allclose(found, wanted, atol=1e-4)
    assert not torch.allclose(found, families.logits(families.FAMILIES[family](), given), atol=1e-2)
    with pytest.raises(ArchitectureError, match="no attention"):
        fold(model, {(99, "attention"): 0.5})


def test_the_table_says_what_was_found_and_what_is_held_against_it():
    model = Model.of(families.qwen3())
    before = {name: tensor.clone() for name, tensor in model.hf.state_dict().items()}
    method = ResidualNetworkDepth(draws=2)
    found = method.measure(model, batch())
    assert [row["layer"] for row in found] == ["all", 0, 1, 2]
    assert len({tuple(row) for row in found}) == 1
    assert json.loads(json.dumps(found)) == found
    assert "diagnosis" in found[0]["note"]
    assert len(found[0]["ablation"]) == 3
    # All bypassed is every block's factor 0.
    assert found[0]["ablation"][-1] == pytest.approx(found[0]["without"])
    for row in found:
        at = dict(zip(row["factors"], row["sweep"], strict=True))
        assert at[1.0] == 0
        assert at[0.0] == row["without"] > at[0.5]
        assert row["curvature"] == pytest.approx((at[0.75] + at[1.25]) / 0.25**2)
    assert found[1]["t1_2"] is not None
    assert found[1]["t2_3"] is not None
    assert found[1]["t2_4"] is found[3]["t1_2"] is None
    assert found[1]["with_first_t1_2"] != found[1]["t1_2"]
    assert method.measure(model, batch()) == found
    assert all(torch.equal(before[name], tensor) for name, tensor in model.hf.state_dict().items())
    with pytest.raises(DataError, match="calibration data"):
        method.measure(model, None)


@pytest.mark.slow
def test_runs_with_a_small_second_order_can_be_put_side_by_side():
    """Card: rank correlation of |T2| and what is lost side by side is above 0, on five samples of a trained model."""
    model = checkpoint.load("testbed:lm", dtype="float32")
    texts = calibration.read(None, model_ref="testbed:lm", split="calibration")
    for seed in range(5):
        data = calibration.for_model(model, texts, length=96, sequences=4, seed=seed)
        expansion, steps, logits = Expansion(2), [], None
        ids, _ = sample(data, 4, 96)[0]
        for found, step in walk(Resident(model), ids, None, model.anatomy.language.blocks):
            expansion.follow(found, step)
            steps.append(step)
        with torch.no_grad():
            logits = found.logits(found.hidden).log_softmax(-1)
            lost = []
            for start in range(len(steps) - 1):
                x = steps[start].before
                hidden = x + sum((steps[i].run(x) - x for i in (start, start + 1)), torch.zeros_like(x))
                for step in steps[start + 2 :]:
                    hidden = step.run(hidden)
                other = found.logits(hidden).log_softmax(-1)
                lost.append(float((logits.exp() * (logits - other)).sum(-1).mean()))
        second = [expansion.terms[s, 2, "second"].mean for s in range(len(steps) - 1)]
        assert rank_correlation(torch.tensor(second), torch.tensor(lost)) > 0
