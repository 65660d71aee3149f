"""Layer dropping by position, weights or contribution: every check of its card."""

from __future__ import annotations

from copy import deepcopy
from typing import Any

import families
import matrix
import pytest
import torch
import torch.nn.functional as F
import transformers as tf

import paredown
from paredown import registry
from paredown.core.checkpoint import Model
from paredown.core.depth.gates import gated
from paredown.core.edits import DropBlock
from paredown.core.method import View
from paredown.core.statistics import observing
from paredown.errors import BudgetError, DataError, RecipeError
from paredown.methods.depth.sajjad import Sajjad, SentenceSimilarity, by_position


def deep(layers: int = 12) -> Model:
    config = tf.LlamaConfig(**{**families._GQA, "num_hidden_layers": layers}, attention_bias=True, mlp_bias=True)
    return Model.of(families._seeded(lambda: tf.LlamaForCausalLM(config)))


def dropped(model: Model, data: Any = None, **fields: Any) -> list[int]:
    return [edit.layer for edit in Sajjad(**fields).compress(model, data).edits]


# Card: the sets of every strategy for twelve layers, in the paper's numbers.
SETS = {
    "top": {2: {11, 12}, 4: {9, 10, 11, 12}, 6: {7, 8, 9, 10, 11, 12}},
    "bottom": {2: {1, 2}, 4: {1, 2, 3, 4}, 6: {1, 2, 3, 4, 5, 6}},
    "symmetric": {2: {6, 7}, 3: {6, 7, 8}, 4: {5, 6, 7, 8}, 6: {4, 5, 6, 7, 8, 9}},
    "odd-alternate": {2: {9, 11}, 4: {5, 7, 9, 11}, 6: {1, 3, 5, 7, 9, 11}},
    "even-alternate": {2: {10, 12}, 4: {6, 8, 10, 12}, 6: {2, 4, 6, 8, 10, 12}},
}


@pytest.mark.parametrize("strategy", SETS)
def test_sets_by_formula(strategy):
    for count, wanted in SETS[strategy].items():
        found = by_position(strategy, 12, count)
        assert [i + 1 for i in found] == sorted(wanted)
    for layers in range(1, 9):
        for count in range(layers):
            if strategy == "symmetric":
                stay = sorted(set(range(layers)) - set(by_position(strategy, layers, count)))
                bottom = sum(i < (layers + 1) // 2 for i in stay)
                assert len(stay) == layers - count
                assert {0} <= set(stay)
                assert layers - count == 1 or layers - 1 in stay
                assert 0 <= bottom - (len(stay) - bottom) <= 1 or count == 0


@pytest.mark.parametrize("strategy", [*SETS, "parameter", "contribution"])
def test_nothing_to_drop_is_bit_identical_and_a_cut_is_the_dense_model_with_those_layers_bypassed(strategy):
    model, given = deep(6), families.inputs("llama")
    before = families.logits(model.hf, given)
    assert dropped(model, matrix.batch(), keep=1.0, strategy=strategy) == []
    assert torch.equal(families.logits(model.hf, given), before)
    with torch.no_grad():
        dense = deep(6)
    gone = dropped(model, matrix.batch(), keep=0.66, strategy=strategy)
    assert len(gone) == 2
    with gated(dense) as gates:
        gates.drop([(layer, "block") for layer in gone])
        assert torch.equal(families.logits(model.hf, {**given, "use_cache": False}), _plain(dense, given))
    assert model.config.num_hidden_layers == 4


def _plain(model: Model, given: Any) -> torch.Tensor:
    return families.logits(model.hf, {**given, "use_cache": False})


def test_survivors_are_those_that_were_meant():
    """Deleting 5, 7, 9, 11 in ascending order without counting anew would leave others (card)."""
    model = deep()
    weights = [block.mlp.up_proj.weight.clone() for block in model.hf.model.layers]
    assert [i + 1 for i in dropped(model, keep=8 / 12 + 1e-3, strategy="odd-alternate")] == [7, 9, 11]
    model = deep()
    assert [i + 1 for i in dropped(model, keep=0.66, strategy="odd-alternate")] == [5, 7, 9, 11]
    stay = [number - 1 for number in (1, 2, 3, 4, 6, 8, 10, 12)]
    for place, block in enumerate(model.hf.model.layers):
        assert torch.equal(block.mlp.up_proj.weight, weights[stay[place]])
        assert block.self_attn.layer_idx == place


def test_saved_and_loaded_it_is_the_cut_model(tmp_path):
    model = deep(6)
    dropped(model, keep=0.5)
    before = families.logits(model.hf, families.inputs("llama"))
    model.save(tmp_path)
    loaded = tf.AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    assert loaded.config.num_hidden_layers == 3
    assert torch.equal(families.logits(loaded, families.inputs("llama")), before)
    assert torch.equal(families.logits(paredown.load(tmp_path).hf, families.inputs("llama")), before)


def _weaken(model: Model, layer: int) -> None:
    block = model.anatomy.language.blocks[layer]
    with torch.no_grad():
        for path in (block.attention.o, block.mlp.down):
            for parameter in model.hf.get_submodule(f"{block.path}.{path}").parameters():
                parameter *= 1e-4


@pytest.mark.parametrize("layer", [0, 3, 5])
def test_a_planted_layer_goes_first_and_the_threshold_catches_it(layer):
    model = deep(6)
    _weaken(model, layer)
    assert dropped(deepcopy(model), matrix.batch(), keep=0.83, strategy="contribution") == [layer]
    assert dropped(deepcopy(model), matrix.batch(), keep=0.5, strategy="contribution", threshold=0.95) == [layer]


def test_thresholds_give_growing_sets_within_the_budget():
    model = deep(6)
    for layer in (1, 4):
        _weaken(model, layer)
    found, _ = matrix.scores(Sajjad(keep=0.5, strategy="contribution"), deepcopy(model), matrix.batch())
    values = sorted((float(found[i]["block"]) for i in range(6)), reverse=True)
    sets = []
    for threshold in (0.9999, (values[2] + values[3]) / 2, -1.0):
        sets.append(
            set(dropped(deepcopy(model), matrix.batch(), keep=0.3, strategy="contribution", threshold=threshold))
        )
    assert sets[0] == {1, 4}
    assert len(sets[1]) == 3
    assert len(sets[2]) == 4, "never more than keep allows"
    assert sets[0] < sets[1] < sets[2]


def test_a_threshold_above_all_is_told():
    with pytest.raises(BudgetError, match="lower the threshold"):
        dropped(deep(6), matrix.batch(), keep=0.5, strategy="contribution", threshold=0.99999)


@pytest.mark.parametrize("family", ["llama", "phi", "qwen3_moe_mixed"])
def test_contribution_is_that_of_the_sentence_token_before_the_final_norm(family):
    """Against `output_hidden_states`; its last entry is behind the final norm, so the last block is hooked (card)."""
    model, data = matrix.model(family), matrix.batch()
    seen: list[torch.Tensor] = []
    last = model.hf.get_submodule(model.anatomy.language.blocks[-1].path)
    handle = last.register_forward_hook(lambda _, __, out: seen.append(out[0] if isinstance(out, tuple) else out))
    with torch.no_grad():
        states = [*model.hf(input_ids=data.input_ids, output_hidden_states=True).hidden_states[:-1], seen[0]]
    handle.remove()
    found, _ = matrix.scores(Sajjad(keep=0.5, strategy="contribution"), matrix.model(family), data)
    for i in range(len(model.anatomy.language.blocks)):
        wanted = F.cosine_similarity(states[i][:, -1].double(), states[i + 1][:, -1].double(), dim=-1).mean()
        assert float(found[i]["block"]) == pytest.approx(float(wanted), abs=1e-5)


def test_where_tokens_see_both_ways_the_first_stands_for_the_sentence():
    model, ids = matrix.model("bert"), matrix.batch().input_ids
    part = model.anatomy.language.blocks[1]
    view, observer = View(model.hf.get_submodule(part.path), part, model.config), SentenceSimilarity()
    with torch.no_grad(), observing(view, [observer]):
        states = model.hf(input_ids=ids, output_hidden_states=True).hidden_states
    wanted = F.cosine_similarity(states[1][:, 0], states[2][:, 0], dim=-1).mean()
    assert float(observer.sums["cosine"] / observer.sums["sentences"]) == pytest.approx(float(wanted), abs=1e-6)


@pytest.mark.parametrize("side", ["left", "right"])
def test_the_last_real_token_counts_whatever_the_padding(side):
    ids, lengths = matrix.batch(rows=3, length=12).input_ids, (12, 7, 4)
    padded, mask = torch.zeros_like(ids), torch.zeros_like(ids)
    rows = [row[:n] for row, n in zip(ids, lengths, strict=True)]
    for i, row in enumerate(rows):
        place = slice(0, len(row)) if side == "right" else slice(12 - len(row), None)
        padded[i, place], mask[i, place] = row, 1
    method = Sajjad(keep=0.5, strategy="contribution")
    together, _ = matrix.scores(method, deep(4), matrix.of(padded, mask))
    alone, _ = matrix.scores(method, deep(4), None, stream=matrix.rows_apart(rows, lookback=0))
    unmasked, _ = matrix.scores(method, deep(4), matrix.of(padded, None))
    for layer, known in alone.items():
        assert float(together[layer]["block"]) == pytest.approx(float(known["block"]), abs=1e-5)
    if side == "right":
        assert any(abs(float(unmasked[i]["block"] - alone[i]["block"])) > 1e-3 for i in alone)


@pytest.mark.parametrize("statistic", ["magnitude", "variance"])
def test_parameters_are_ranked_by_all_weights_of_a_layer(statistic):
    model = deep(6)
    with torch.no_grad():
        for parameter in model.hf.model.layers[4].parameters():
            parameter *= 0.1
        for parameter in model.hf.model.layers[1].parameters():
            parameter *= 3
    found, _ = matrix.scores(Sajjad(keep=0.5, strategy="parameter", statistic=statistic), deepcopy(model), None)
    for i, block in enumerate(model.hf.model.layers):
        weights = torch.cat([p.detach().flatten().double() for p in block.parameters()])
        wanted = weights.abs().mean() if statistic == "magnitude" else weights.var(unbiased=False)
        assert -float(found[i]["block"]) == pytest.approx(float(wanted), rel=1e-6)
    fields = {"keep": 0.83, "strategy": "parameter", "statistic": statistic}
    assert dropped(deepcopy(model), **fields) == [4]
    assert dropped(deepcopy(model), **fields, direction="highest") == [1]


def test_only_one_strategy_asks_for_data():
    assert registry.get("random-blocks").needs == ()
    assert Sajjad.needs == ("calibration-data",), "the catalogue tells what may be needed"
    assert Sajjad().needs == ()
    with pytest.raises(DataError, match="--data"):
        dropped(deep(3), keep=0.5, strategy="contribution")


def test_what_does_not_fit_is_told():
    with pytest.raises(BudgetError, match="odd-alternate can drop 3 of 6 blocks, but 4"):
        dropped(deep(6), keep=0.3, strategy="odd-alternate")
    with pytest.raises(RecipeError, match="threshold goes with strategy contribution"):
        Sajjad(strategy="top", threshold=0.9)
    with pytest.raises(RecipeError, match="direction goes with strategy parameter"):
        Sajjad(strategy="contribution", direction="highest")
    assert dropped(deep(3), keep=0.01) == [1, 2], "one block stays"


def test_a_plan_with_a_threshold_says_that_it_is_not_exact():
    method, blocks = Sajjad(keep=0.5, strategy="contribution", threshold=0.95), deep(6).anatomy.language.blocks
    trial = {b.index: method.placeholder(b) for b in blocks}
    assert method.decide(blocks, trial) == [DropBlock(layer=i) for i in (1, 3, 5)]
