"""Relaxed Recursive Transformers: every check of its card."""

from __future__ import annotations

import functools
from copy import deepcopy
from pathlib import Path
from typing import Any

import families
import matrix
import pytest
import torch
import transformers as tf
from safetensors import safe_open

import paredown
from paredown.core.checkpoint import Model
from paredown.core.depth.lowrank import DeltaLinear, linears
from paredown.core.edits import ChangeWeights, ShareBlock
from paredown.core.learning.teacher import fitness
from paredown.errors import ArchitectureError, BudgetError, DataError
from paredown.methods.depth.relaxed_recursive import RandomRecursive, RelaxedRecursive

LAYERS = 6


@functools.cache
def _deep() -> tf.PreTrainedModel:
    config = tf.Qwen3Config(**{**families._GQA, "num_hidden_layers": LAYERS, "eos_token_id": None}, head_dim=8)
    return families._seeded(lambda: tf.Qwen3ForCausalLM(config))


def deep() -> Model:
    """A Qwen3 of six layers, grouped queries, query and key norms."""
    return Model.of(deepcopy(_deep()))


def logits(model: Model) -> torch.Tensor:
    return families.logits(model.hf, families.inputs("qwen3"))


def weight(model: Model, layer: int, name: str = "mlp.up_proj.weight") -> torch.Tensor:
    return model.hf.get_parameter(f"model.layers.{layer}.{name}").detach()


def test_one_loop_changes_nothing() -> None:
    model = deep()
    before, config = logits(model), model.config.to_dict()
    outcome = RelaxedRecursive(keep=1.0).compress(model, matrix.batch())
    assert outcome.edits == []
    assert torch.equal(logits(model), before)
    assert model.config.to_dict() == config


@pytest.mark.parametrize("keep", [0.5, 0.3333, 0.16])
@pytest.mark.parametrize("init", ["average", "stepwise", "lower"])
def test_full_rank_is_the_original_whatever_the_loops_and_the_start(keep: float, init: Any) -> None:
    model = deep()
    before = logits(model)
    RelaxedRecursive(keep=keep, init=init, rank=1000, norms="own", steps=0).compress(model, matrix.batch())
    torch.testing.assert_close(logits(model), before, atol=1e-4, rtol=1e-4)


def test_with_shared_norms_full_rank_is_not_the_original() -> None:
    """Norms have no deltas, so the card's claim holds with norms of the depths' own."""
    model = deep()
    before = logits(model)
    RelaxedRecursive(rank=1000, steps=0).compress(model, matrix.batch())
    assert float((logits(model) - before).abs().max()) > 1e-2
    assert weight(model, 4, "input_layernorm.weight") is not None
    assert torch.equal(weight(model, 4, "input_layernorm.weight"), weight(model, 1, "input_layernorm.weight"))


@pytest.mark.parametrize("init", ["average", "stepwise", "lower"])
def test_what_is_missing_is_what_the_singular_values_say(init: Any) -> None:
    """SVD optimality: W_l - W' - B A is as small as a rank allows, at every depth, the first loop's too."""
    dense, before = deep(), float("inf")
    for rank in (1, 4, 12):
        model, total = deep(), 0.0
        RelaxedRecursive(rank=rank, init=init, steps=0).compress(model, matrix.batch())
        for layer in range(LAYERS):
            for path, linear in linears(model.hf.model.layers[layer]).items():
                assert isinstance(linear, DeltaLinear)
                original = weight(dense, layer, f"{path}.weight")
                values = torch.linalg.svdvals(original - linear.weight.detach())
                missing = float(torch.linalg.norm(original - linear.dense()))
                assert missing == pytest.approx(float(values[rank:].square().sum().sqrt()), abs=1e-4)
                total += missing
        assert total < before
        before = total


def _repeated(unique: int) -> Model:
    model = deep()
    layers = model.hf.model.layers
    for i in range(unique, LAYERS):
        layers[i].load_state_dict(layers[i % unique].state_dict())
    return model


@pytest.mark.parametrize("keep", [0.5, 0.3333])
@pytest.mark.parametrize("init", ["average", "lower"])
def test_truly_repeated_layers_convert_bit_for_bit(keep: float, init: Any) -> None:
    """Mistakes with the index, (l - 1) div B for l mod K, fail this."""
    model = _repeated(3 if keep == 0.5 else 2)
    before = logits(model)
    RelaxedRecursive(keep=keep, init=init, rank=0, steps=0).compress(model, matrix.batch())
    assert torch.equal(logits(model), before)
    wrong = _repeated(2 if keep == 0.5 else 3)
    before = logits(wrong)
    RelaxedRecursive(keep=keep, init=init, rank=0, steps=0).compress(wrong, matrix.batch())
    assert not torch.allclose(logits(wrong), before, atol=1e-2)


@pytest.mark.parametrize(
    ("init", "keep", "taken"),
    [
        ("average", 0.5, [(0, 3), (1, 4), (2, 5)]),
        ("average", 0.3333, [(0, 2, 4), (1, 3, 5)]),
        ("stepwise", 0.5, [(0,), (3,), (5,)]),
        ("stepwise", 0.3333, [(0,), (5,)]),
        ("stepwise", 0.16, [(0,)]),
        ("lower", 0.5, [(0,), (1,), (2,)]),
    ],
)
def test_the_shared_stack_begins_as_the_card_says(init: Any, keep: float, taken: list[tuple[int, ...]]) -> None:
    dense, model = deep(), deep()
    RelaxedRecursive(keep=keep, init=init, rank=0, steps=0).compress(model, matrix.batch())
    for layer in range(LAYERS):
        layers = taken[layer % len(taken)]
        for name in ("self_attn.q_proj.weight", "mlp.down_proj.weight", "input_layernorm.weight"):
            mean = torch.stack([weight(dense, i, name) for i in layers]).mean(0)
            torch.testing.assert_close(weight(model, layer, name), mean)


def test_parameters_are_k_layers_and_b_times_k_sets_of_deltas(tmp_path: Path) -> None:
    model, rank = deep(), 4
    before, layer = model.parameters(), sum(p.numel() for p in model.hf.model.layers[0].parameters())
    deltas = sum(rank * sum(linear.weight.shape) for linear in linears(model.hf.model.layers[0]).values())
    RelaxedRecursive(keep=0.3333, rank=rank, steps=0).compress(model, matrix.batch())
    assert model.parameters() == before - 4 * layer + LAYERS * deltas
    model.save(tmp_path)
    with safe_open(tmp_path / "model.safetensors", framework="pt") as opened:
        stored = set(opened.keys())
    # Embedding, head, final norm; K layers of 7 matrices and 4 norms; 2 halves of 7 deltas for each of B * K layers.
    assert len(stored) == 3 + 2 * (7 + 4) + LAYERS * 2 * 7
    loaded = paredown.load(tmp_path)
    assert torch.equal(logits(loaded), logits(model))
    for target, source in loaded.hf.all_tied_weights_keys.items():
        assert loaded.hf.get_parameter(target).data_ptr() == loaded.hf.get_parameter(source).data_ptr()
    # One optimiser step changes all loops.
    loaded.hf(input_ids=matrix.batch().input_ids, labels=matrix.batch().input_ids).loss.backward()
    untouched = weight(loaded, 0).clone()
    torch.optim.SGD(loaded.hf.parameters(), lr=1.0).step()
    assert not torch.equal(weight(loaded, 0), untouched)
    assert all(torch.equal(weight(loaded, i), weight(loaded, i % 2)) for i in range(LAYERS))


def test_cached_decoding_is_uncached_decoding_with_a_slot_for_each_depth() -> None:
    model = deep()
    RelaxedRecursive(rank=4, steps=0).compress(model, matrix.batch())
    ids = families.inputs("qwen3", length=10)["input_ids"]
    whole = families.logits(model.hf, {"input_ids": ids})
    with torch.no_grad():
        out, found = None, []
        for step in range(10):
            past = None if out is None else out.past_key_values
            out = model.hf(input_ids=ids[:, step : step + 1], past_key_values=past, use_cache=True)
            found.append(out.logits)
    torch.testing.assert_close(torch.cat(found, 1), whole, atol=1e-4, rtol=1e-4)
    assert out is not None
    assert len(out.past_key_values.layers) == LAYERS


@pytest.mark.parametrize("start", ["svd", "zero"])
def test_training_changes_shared_weights_and_deltas_alone(start: Any) -> None:
    model, rank = deep(), 2
    edits = RelaxedRecursive(rank=rank, steps=0, start=start).compress(model, matrix.batch()).edits
    trained = deep()
    outcome = RelaxedRecursive(rank=rank, steps=3, start=start, lr=1e-2).compress(trained, matrix.batch())
    assert [e for e in outcome.edits if isinstance(e, ShareBlock)] == [e for e in edits if isinstance(e, ShareBlock)]
    assert {e.layer for e in outcome.edits if isinstance(e, ChangeWeights)} == {0, 1, 2}
    for name, parameter in trained.hf.named_parameters(remove_duplicate=False):
        same = torch.equal(parameter, model.hf.get_parameter(name))
        assert same == (".layers." not in name), name
    assert len(outcome.coverage["losses"]) == 3
    assert outcome.coverage["losses"][-1] < outcome.coverage["losses"][0]
    # Twice the same.
    again = deep()
    RelaxedRecursive(rank=rank, steps=3, start=start, lr=1e-2).compress(again, matrix.batch())
    assert torch.equal(logits(again), logits(trained))


def test_the_teacher_is_the_recipes_first_model() -> None:
    other = Model.of(deepcopy(_deep()))
    with torch.no_grad():
        other.hf.lm_head.weight.neg_()
    found = []
    for original in (None, lambda: other):
        model = deep()
        method = RelaxedRecursive(steps=2, lm=0.0, lr=1e-2)
        method.compress(model, matrix.batch(), original=original)
        found.append(logits(model))
    assert not torch.equal(*found)


@pytest.mark.parametrize("keep", [0.6, 0.8, 0.95])
def test_budgets_that_are_no_whole_loops_name_the_legal_ones(keep: float) -> None:
    with pytest.raises(BudgetError, match=r"legal keeps are 0.1666 \(1\), 0.3333 \(2\), 0.5 \(3\)"):
        RelaxedRecursive(keep=keep, steps=0).compress(deep(), matrix.batch())
    for legal, loops in ((0.1666, 6), (0.3333, 3), (0.5, 2)):
        model = deep()
        RelaxedRecursive(keep=legal, rank=0, steps=0).compress(model, matrix.batch())
        unique = {block.index for block in model.anatomy.language.blocks if block.shared is None}
        assert len(unique) * loops == LAYERS


def test_layers_of_unlike_shapes_and_missing_data_are_refused() -> None:
    model = Model.of(families.qwen3_moe_mixed())
    before = families.logits(model.hf, families.inputs("qwen3_moe_mixed"))
    with pytest.raises(ArchitectureError, match="only layers of one kind share"):
        RelaxedRecursive(steps=0, rank=0).compress(model, matrix.batch())
    assert torch.equal(families.logits(model.hf, families.inputs("qwen3_moe_mixed")), before)
    with pytest.raises(DataError, match="looks at calibration data"):
        RelaxedRecursive().compress(deep(), None)


def test_twice_is_refused() -> None:
    model = deep()
    RelaxedRecursive(steps=0).compress(model, matrix.batch())
    with pytest.raises(ArchitectureError, match="shares weights"):
        RelaxedRecursive(steps=0).compress(model, matrix.batch())


def test_the_control_draws_layers_in_order() -> None:
    drawn = set()
    for seed in range(5):
        dense, model = deep(), deep()
        RandomRecursive(steps=0, rank=0).compress(model, matrix.batch(), seed=seed)
        layers = [next(i for i in range(LAYERS) if torch.equal(weight(dense, i), weight(model, k))) for k in range(3)]
        assert layers == sorted(set(layers))
        assert all(torch.equal(weight(model, i), weight(model, i % 3)) for i in range(LAYERS))
        drawn.add(tuple(layers))
    assert len(drawn) > 1


@pytest.mark.parametrize("family", ["llama", "gemma3", "gpt_neox", "phi", "mixtral"])
def test_other_families(family: str, tmp_path: Path) -> None:
    model = Model.of(families.FAMILIES[family]())
    keep, rank = (0.5, 4) if family == "gemma3" else (0.3333, 0 if family == "mixtral" else 4)
    RelaxedRecursive(keep=keep, rank=rank, steps=1).compress(model, matrix.batch())
    model.save(tmp_path)
    given = families.inputs(family)
    assert torch.equal(families.logits(paredown.load(tmp_path).hf, given), families.logits(model.hf, given))


@pytest.mark.slow
def test_on_a_trained_model_rank_helps_and_the_svd_start_beats_zero() -> None:
    """Without training perplexity falls towards the original as the rank grows; after a few steps SVD beats zero."""
    from paredown.core import calibration

    texts = calibration.read(None, model_ref="testbed:lm", split="calibration")
    data = calibration.for_model(paredown.load("testbed:lm"), texts, length=64, sequences=16, seed=0)

    def perplexity(**fields: Any) -> float:
        model = paredown.load("testbed:lm")
        RelaxedRecursive(**fields).compress(model, data, seed=0)
        return fitness(model.hf, None, data.input_ids, slice(None), "ppl", mask=data.attention_mask)

    found = [perplexity(rank=rank, steps=0, norms="own") for rank in (4, 16, 48, 96)]
    dense = perplexity(keep=1.0)
    assert found == sorted(found, reverse=True)
    assert found[-1] == pytest.approx(dense, rel=0.02)
    assert perplexity(rank=16, steps=4) < perplexity(rank=16, steps=4, start="zero")
