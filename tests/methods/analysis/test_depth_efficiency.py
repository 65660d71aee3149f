"""Depth efficiency: the card's checks."""

from __future__ import annotations

import json

import families
import pytest
import torch
from toys import normal, toy

from paredown.core import calibration, checkpoint, surgery
from paredown.core.checkpoint import Model
from paredown.core.depth.gates import gated
from paredown.core.edits import DropBlock
from paredown.core.looking.linear_maps import map_errors
from paredown.core.looking.scales import attributions, divergences, factors
from paredown.core.looking.skips import Erasures, Lens, Locals, Skips, depth_score, rank_correlation
from paredown.core.looking.walk import sample
from paredown.errors import DataError
from paredown.methods.analysis.depth_efficiency import DepthEfficiency


def batch(rows: int = 3, length: int = 16) -> calibration.Batch:
    ids = torch.randint(3, 90, (rows, length), generator=torch.Generator().manual_seed(1))
    return calibration.Batch(ids, None, "random", "", 0, rows)


@pytest.mark.parametrize("family", ["llama", "gemma3", "phi", "qwen3_moe_mixed"])
def test_the_table_has_a_row_a_block_and_one_for_all(family):
    model = Model.of(families.FAMILIES[family]())
    before = {name: tensor.clone() for name, tensor in model.hf.state_dict().items()}
    depth = len(model.anatomy.language.blocks)
    found = DepthEfficiency(cuts=2).measure(model, batch())
    assert [row["layer"] for row in found] == ["all", *range(depth)]
    assert len({tuple(row) for row in found}) == 1
    assert json.loads(json.dumps(found)) == found
    for row in found[1:]:
        layer = row["layer"]
        # The card: nothing before the bypassed block changes, itself by all it adds; the future's diagonal is 0.
        assert row["skip"][:layer] == [0] * layer
        assert row["skip"][layer] == pytest.approx(1, abs=0.02)
        assert row["future"][: layer + 1] == row["local"][: layer + 1] == [0] * (layer + 1)
        assert all(value > 0 for value in row["skip"][layer + 1 :])
        # With one block in between there is a chain besides the direct influence; next to each other they are one.
        if layer + 1 < depth:
            assert row["local"][layer + 1] == pytest.approx(row["skip"][layer + 1], rel=1e-4)
        assert row["output_median"] <= row["output_high"] <= row["output_max"]
    # The card: what the last block adds at earlier positions is read by nobody.
    assert found[-1]["future_output"] == found[-1]["future_output_max"] == 0
    assert found[1]["future_output"] > 0
    whole = found[0]
    # The card: the lens after the last block is the output.
    assert whole["lens_kl"][-1] == 0
    assert whole["lens_top5"][-1] == 1
    assert len(whole["lens_kl"]) == depth + 1
    assert found[1]["lens_kl"] == whole["lens_kl"][0]
    assert 0 <= whole["score_skip_low"] <= whole["score_skip"] <= depth - 1
    assert whole["score_gradients"] is None
    assert sorted(row["rank_output"] for row in found[1:]) == list(range(depth))
    assert DepthEfficiency(cuts=2).measure(model, batch()) == found
    assert all(torch.equal(before[name], tensor) for name, tensor in model.hf.state_dict().items())
    assert not any("forward" in vars(module) for module in model.hf.modules())


def test_a_future_effect_without_its_position_mask_would_show(monkeypatch):
    """The card: a run that forgets the mask fails the check on the last block."""
    monkeypatch.setattr(Skips, "changed", lambda self, walk: walk.counted)
    found = DepthEfficiency(cuts=1).measure(Model.of(families.llama()), batch())
    assert found[-1]["future_output"] > 1e-3


def test_bypassing_nothing_has_no_effect_at_all(monkeypatch):
    monkeypatch.setattr(Skips, "changed", lambda self, walk: torch.zeros_like(walk.counted))
    found = DepthEfficiency(cuts=1).measure(Model.of(families.qwen3()), batch())
    for row in found[1:]:
        assert row["output_max"] == row["output_kl"] == 0
        assert set(row["skip_max"]) == {0}


def test_a_block_that_adds_nothing_goes_first_in_all_rankings():
    model = Model.of(families.llama())
    block = model.hf.model.layers[1]
    with torch.no_grad():
        for part in (block.self_attn.o_proj, block.mlp.down_proj):
            part.weight.zero_()
            part.bias.zero_()
    row = DepthEfficiency().measure(model, batch())[2]
    assert row["ratio_block"] == row["output_max"] == row["ratio_attention_max"] == 0
    assert set(row["skip"]) == set(row["local"]) == {0}
    assert row["rank_contribution"] == row["rank_output"] == row["rank_future"] == 0


def test_padding_counts_for_nothing():
    model, plain = Model.of(families.qwen3()), batch()
    pad = torch.full((3, 4), 7)
    mask = torch.cat([torch.ones_like(plain.input_ids), torch.zeros_like(pad)], 1)
    padded = calibration.Batch(torch.cat([plain.input_ids, pad], 1), mask, "random", "", 0, 3)
    found = [DepthEfficiency(cuts=1).measure(model, data)[1:] for data in (plain, padded)]
    for one, other in zip(*found, strict=True):
        for key in ("ratio_block", "output", "lens_kl", "skip", "cosine_mlp"):
            assert one[key] == pytest.approx(other[key], rel=1e-3, abs=1e-5)


def test_local_effects_of_linear_blocks_in_closed_form():
    """The card: |A_l D_s| / |A_l h_l|. Skips have the chain in between too."""
    x, matrices = normal(2, 6, 5), [0.4 * normal(5, 5, seed=i + 1) for i in range(4)]
    local, skips, lens = Locals(), Skips(), Lens()
    walk = toy(x, [lambda h, a=a: h @ a for a in matrices], [local, skips, lens])
    streams = [x]
    for a in matrices:
        streams.append(streams[-1] + streams[-1] @ a)
    for s in range(4):
        for l in range(s + 1, 4):  # noqa: E741
            wanted = (streams[s] @ matrices[s] @ matrices[l]).norm(dim=-1) / (streams[l] @ matrices[l]).norm(dim=-1)
            assert local.updates[s, l].mean == pytest.approx(float(wanted[:, 1:].mean()), rel=1e-5)
    chain = streams[0] @ matrices[0] @ (torch.eye(5).double() + matrices[1]) @ matrices[2]
    wanted = chain.norm(dim=-1) / (streams[2] @ matrices[2]).norm(dim=-1)
    assert skips.updates[0, 2].mean == pytest.approx(float(wanted[:, 1:].mean()), rel=1e-5)
    skips.close(walk, lens.close(walk))
    assert lens.divergence[4].largest == 0
    p, lens_1 = streams[4].softmax(-1), streams[1].softmax(-1)
    wanted = (lens_1 * (lens_1 / p).log()).sum(-1)
    assert lens.divergence[1].mean == pytest.approx(float(wanted[:, 1:].mean()), rel=1e-4)
    last = streams[3].softmax(-1)
    assert skips.distance[3].mean == pytest.approx(float((p - last).norm(dim=-1)[:, 1:].mean()), rel=1e-5)


def test_erasure_leaves_the_cut_and_the_first_token_alone_and_measures_after_it():
    seen = []

    class Watching(Erasures):
        def begin(self, walk, step):
            out = super().begin(walk, step)
            seen.append((self.changed(walk), self.measured(walk), out))
            return out

    x = normal(1, 6, 4)
    toy(x, [torch.tanh] * 3, [Watching(torch.tensor([3]), 2)])
    changed, measured, out = seen[0]
    assert changed[0].tolist() == [False, True, True, False, False, False]
    assert measured[0].tolist() == [False, False, False, False, True, True]
    mean = x[0, 1:].mean(0)
    assert torch.allclose(out[0, 1], mean + mean.tanh())
    assert torch.equal(out[0, 3:], x[0, 3:] + x[0, 3:].tanh())
    # Nobody reads earlier positions after the last block.
    assert [one[2] is None for one in seen] == [False, False, True]


def test_depth_scores_and_rank_correlations():
    assert depth_score(torch.ones(7)) == 3
    assert depth_score(torch.tensor([[0.0, 0, 1], [1, 0, 1]])).tolist() == [2, 1]
    assert rank_correlation(torch.tensor([1.0, 2, 3]), torch.tensor([2.0, 5, 90])) == pytest.approx(1)
    assert rank_correlation(torch.tensor([1.0, 2, 3]), torch.tensor([3.0, 2, 1])) == pytest.approx(-1)


def test_integrated_gradients_sum_to_what_all_blocks_change():
    model, rows = Model.of(families.gemma3()), sample(batch(), 3, 16)
    found = attributions(model, rows, 64).sum(1)
    (ids, _) = rows[0]
    logits = families.logits(model.hf, {"input_ids": ids}).log_softmax(-1)
    best = logits.argmax(-1, keepdim=True)
    with torch.no_grad(), gated(model) as gates:
        gates.set(factors(model.anatomy.language.blocks, 0.0))
        none = model.hf(input_ids=ids, use_cache=False).logits.log_softmax(-1)
    change = (logits.gather(-1, best) - none.gather(-1, best))[..., 0].mean(1)
    assert torch.allclose(found, change.double(), rtol=0.02)
    assert all(p.requires_grad for p in model.hf.parameters())
    scored = DepthEfficiency(gradient_steps=2, cuts=1).measure(model, batch())[0]
    assert 0 <= scored["score_gradients"] <= 3


def test_linear_maps_find_the_same_computation():
    """Layers of the same model map onto themselves without error, and those near better than those far."""
    model = Model.of(families.llama())
    data = batch(24, 40)
    errors = map_errors(model, model, data, ridge=1e-9)
    assert errors.shape == (4, 4)
    assert errors.diagonal().max() < 1e-4
    assert errors[0, 3] > errors[2, 3] > errors[3, 3]
    with pytest.raises(DataError, match="two or more"):
        map_errors(model, model, batch(1))


def test_it_needs_data():
    with pytest.raises(DataError, match="calibration data"):
        DepthEfficiency().measure(Model.of(families.llama()), None)


@pytest.mark.slow
def test_what_the_output_misses_least_is_what_can_go():
    """The card: dropping the lowest by O beats the highest, and chance, on five samples of a trained model."""
    wins, correlations = [], []
    for seed in range(5):
        model = checkpoint.load("testbed:lm", dtype="float32")
        texts = calibration.read(None, model_ref="testbed:lm", split="calibration")
        data = calibration.for_model(model, texts, length=96, sequences=8, seed=seed)
        found = DepthEfficiency(sequences=4, cuts=1).measure(model, data)[1:]
        blocks = model.anatomy.language.blocks
        order = sorted(range(len(blocks)), key=lambda i: found[i]["rank_output"])
        drawn = torch.randperm(len(blocks), generator=torch.Generator().manual_seed(seed)).tolist()
        sets = [order[:2], order[-2:], drawn[:2]]
        low, high, chance = (
            tokens.mean
            for tokens in divergences(
                model, sample(data, 8, 96), [factors([blocks[i] for i in chosen], 0.0) for chosen in sets]
            )
        )
        wins.append(low < high and low <= chance)
        turned = torch.tensor([1 - row["cosine_stream"] for row in found])
        correlations.append(rank_correlation(torch.tensor([row["output"] for row in found]), turned))
    assert all(wins)
    # LLM-Drop's score is the cosine over the block: both say much the same here.
    assert min(correlations) > 0.5


def test_a_dropped_block_leaves_the_rest_measurable():
    model = Model.of(families.llama())
    model.anatomy = surgery.apply_model(model.hf, model.anatomy, [DropBlock(layer=1)])
    assert [row["layer"] for row in DepthEfficiency(cuts=1).measure(model, batch())] == ["all", 0, 1]
