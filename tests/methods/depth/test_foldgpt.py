"""FoldGPT: every check of its card."""

from __future__ import annotations

import functools
from copy import deepcopy
from itertools import combinations
from pathlib import Path
from typing import Any

import families
import matrix
import pytest
import torch
import transformers as tf

import paredown
from paredown.core import surgery
from paredown.core.checkpoint import Model
from paredown.core.depth.gate_training import GateTask, GateWeights
from paredown.core.depth.gates import gated
from paredown.core.depth.lowrank import linears
from paredown.core.edits import DropBlock, ShareBlock
from paredown.core.roles import Shared
from paredown.errors import ArchitectureError, BudgetError, DataError
from paredown.methods.depth.foldgpt import FoldGPT, RandomFold, children_of

LAYERS = 8
QUICK: dict[str, Any] = {"gate_steps": 4, "steps": 0, "batch": 2}


@functools.cache
def _deep() -> tf.PreTrainedModel:
    config = tf.LlamaConfig(
        **{**families._GQA, "num_hidden_layers": LAYERS, "eos_token_id": None}, attention_bias=True, mlp_bias=True
    )
    return families._seeded(lambda: tf.LlamaForCausalLM(config))


def deep() -> Model:
    """A llama of eight layers with every bias."""
    return Model.of(deepcopy(_deep()))


def logits(model: Model) -> torch.Tensor:
    return families.logits(model.hf, families.inputs("llama"))


def gone(outcome: Any) -> set[int]:
    return gone_of(outcome.edits)


def gone_of(edits: Any) -> set[int]:
    return {edit.layer for edit in edits if isinstance(edit, DropBlock)}


def children(outcome: Any) -> dict[int, int]:
    return {edit.layer: edit.source for edit in outcome.edits if isinstance(edit, ShareBlock)}


def test_keep_one_changes_nothing() -> None:
    model = deep()
    before, config = logits(model), model.config.to_dict()
    outcome = FoldGPT(keep=1.0).compress(model, matrix.batch())
    assert outcome.edits == []
    assert torch.equal(logits(model), before)
    assert model.config.to_dict() == config


@pytest.mark.parametrize("done", [0, 3, 10])
def test_an_open_gate_is_exactly_one(done: int) -> None:
    """The plain formula a^2 / (a^2 + eps) fails this."""
    weights = GateWeights(5, 10)
    weights.step += done
    assert torch.equal(weights.gates(), torch.ones(5))
    assert float(1.0**2 / (1.0**2 + 1e-3)) != 1.0
    weights.a.data = torch.tensor([0.0, 0.01, 0.5, 1.0, -1.0])
    found = weights.gates()
    assert found[0] == 0
    assert torch.equal(found[3:], torch.ones(2))
    if done == 10:  # polarised: a half is nearly open, a hundredth nearly closed
        assert found[1] < 0.1
        assert found[2] > 0.99


def test_a_closed_gate_is_a_deleted_block_bit_for_bit() -> None:
    model, cut = deep(), deep()
    surgery.apply_model(cut.hf, cut.anatomy, [DropBlock(layer=3)])
    ids = families.inputs("llama")["input_ids"]
    with gated(model) as gates, torch.no_grad():
        gates.set({(i, "block"): float(i != 3) for i in range(LAYERS)})
        assert torch.equal(model.hf(input_ids=ids, use_cache=False).logits, logits(cut))
        gates.set({(i, "block"): 1.0 for i in range(LAYERS)})
        assert torch.equal(model.hf(input_ids=ids, use_cache=False).logits, logits(deep()))


def _planted() -> Model:
    """Blocks that add little, except 2, which adds nothing at all."""
    model = deep()
    with torch.no_grad():
        block = model.hf.model.layers[2]
        for linear in (block.self_attn.o_proj, block.mlp.down_proj):
            linear.weight.mul_(1e-4)
            linear.bias.zero_()
    return model


def _own_words(model: Model) -> Any:
    """Return text that the model wrote itself, with a sharper head: it is as good at it as one can be."""
    model.hf.lm_head.weight.data.mul_(8)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        start = torch.full((16, 1), 5)
        ids = model.hf.generate(start, max_new_tokens=24, do_sample=True, top_k=0, pad_token_id=0)
    return matrix.of(ids, None)


def test_a_block_that_adds_nothing_is_the_first_to_close() -> None:
    model = _planted()
    data = _own_words(model)
    method = FoldGPT(keep=0.75, removal=0.125, gate_steps=60, gate_lr=0.05, steps=0, rank=0)
    outcome = method.compress(model, data)
    assert gone(outcome) == {2}
    gates = outcome.coverage["gates"]
    assert min(range(LAYERS), key=gates.__getitem__) == 2


def _coupled() -> Model:
    """Blocks 4 and 5 add a vector and its opposite, whatever they read; each other block adds one of its own."""
    model = deep()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for i, block in enumerate(model.hf.model.layers):
            vector = torch.randn(32, generator=generator)
            for linear in (block.self_attn.o_proj, block.mlp.down_proj):
                linear.weight.zero_()
                linear.bias.zero_()
            block.mlp.down_proj.bias.copy_(vector if i != 4 else 2 * vector)
        layers = model.hf.model.layers
        layers[5].mlp.down_proj.bias.copy_(-layers[4].mlp.down_proj.bias)
    return model


def test_blocks_that_undo_each_other_go_together() -> None:
    """Both go or none: judged one at a time, nothing tells that the two can only go together."""
    model = _coupled()
    data = _own_words(model)
    ids = data.input_ids

    def loss(*out: int) -> float:
        with gated(model) as gates, torch.no_grad():
            gates.drop([(i, "block") for i in out])
            return float(model.hf(input_ids=ids, labels=ids, use_cache=False).loss)

    alone = [loss(i) for i in range(LAYERS)]
    assert set(sorted(range(LAYERS), key=alone.__getitem__)[-2:]) == {4, 5}
    assert loss(4, 5) == pytest.approx(loss(), abs=1e-5)
    for strength in (20.0, 100.0):
        method = FoldGPT(keep=0.75, removal=0.25, gate_steps=60, gate_lr=0.05, strength=strength, steps=0)
        assert gone(method.compress(deepcopy(model), data)) & {4, 5} in (set(), {4, 5})


@pytest.mark.parametrize("removal", [None, 0.0, 0.125, 0.25, 0.5])
@pytest.mark.parametrize("keep", [0.25, 0.375, 0.5])
def test_the_budget_is_met_in_blocks(keep: float, removal: float | None, tmp_path: Path) -> None:
    model, rank = deep(), 3
    method = FoldGPT(keep=keep, removal=removal, rank=rank, **QUICK)
    outcome = method.compress(model, matrix.batch())
    unique, deleted = round(LAYERS * keep), len(gone(outcome))
    assert deleted == ((LAYERS - unique) // 2 if removal is None else round(LAYERS * removal))
    blocks = model.anatomy.language.blocks
    assert len(blocks) == LAYERS - deleted
    assert len(blocks) - len(children(outcome)) == unique
    sizes: list[int] = []
    for block in blocks:
        if block.shared is None:
            sizes.append(1)
        else:
            assert block.shared == Shared(block.index - sizes[-1], rank)  # the first of its group, which it follows
            sizes[-1] += 1
    assert len(sizes) == unique
    assert max(sizes) <= -(-len(blocks) // unique)
    # One parent a group, children's own norms, biases and deltas.
    dense = deep()
    parts = {name: p.numel() for name, p in dense.hf.model.layers[0].named_parameters()}
    matrices = sum(n for name, n in parts.items() if dense.hf.model.layers[0].get_parameter(name).dim() == 2)
    vectors = sum(parts.values()) - matrices
    deltas = rank * sum(sum(m.weight.shape) for m in linears(dense.hf.model.layers[0]).values())
    ends = dense.parameters() - LAYERS * (matrices + vectors)
    expected = ends + unique * matrices + len(blocks) * vectors + (len(blocks) - unique) * deltas
    assert model.parameters() == expected
    # What was foretold has the size of what was done.
    planned = deep()
    surgery.apply_model(planned.hf, planned.anatomy, method.foretell(planned.anatomy.language.blocks))
    assert planned.parameters() == expected
    model.save(tmp_path)
    loaded = paredown.load(tmp_path)
    assert loaded.parameters() == expected
    assert torch.equal(logits(loaded), logits(model))
    assert all(
        loaded.hf.get_parameter(target).data_ptr() == loaded.hf.get_parameter(source).data_ptr()
        for target, source in loaded.hf.all_tied_weights_keys.items()
    )


def test_too_much_removal_is_told() -> None:
    with pytest.raises(BudgetError, match=r"deletes 5 of 8 blocks, but 4 are to stay .*set removal to 0.5 at most"):
        FoldGPT(keep=0.5, removal=0.6, **QUICK).compress(deep(), matrix.batch())
    with pytest.raises(DataError):
        FoldGPT(**QUICK).compress(deep(), None)
    model = deep()
    FoldGPT(**QUICK).compress(model, matrix.batch())
    with pytest.raises(ArchitectureError, match="shares weights"):
        FoldGPT(**QUICK).compress(model, matrix.batch())


def test_full_rank_is_the_unfolded_model_and_rank_zero_of_copies_is_bit_identical() -> None:
    model = deep()
    before = logits(model)
    FoldGPT(keep=0.5, removal=0.0, rank=1000, **QUICK).compress(model, matrix.batch())
    torch.testing.assert_close(logits(model), before, atol=1e-4, rtol=1e-4)
    copies = deep()
    layers = copies.hf.model.layers
    for i in range(0, LAYERS, 2):
        layers[i + 1].load_state_dict(layers[i].state_dict())
    before = logits(copies)
    FoldGPT(keep=0.5, removal=0.0, rank=0, **QUICK).compress(copies, matrix.batch())
    assert torch.equal(logits(copies), before)


def test_cached_decoding_is_uncached_decoding() -> None:
    model = deep()
    FoldGPT(**QUICK).compress(model, matrix.batch())
    ids = families.inputs("llama", length=10)["input_ids"]
    with torch.no_grad():
        out, found = None, []
        for step in range(10):
            past = None if out is None else out.past_key_values
            out = model.hf(input_ids=ids[:, step : step + 1], past_key_values=past, use_cache=True)
            found.append(out.logits)
    whole = families.logits(model.hf, {"input_ids": ids})
    torch.testing.assert_close(torch.cat(found, 1), whole, atol=1e-4, rtol=1e-4)
    assert out is not None
    assert len(out.past_key_values.layers) == 6


@pytest.mark.parametrize("cure", ["norms", "blocks"])
def test_the_cure_trains_what_it_says_and_lowers_its_loss(cure: Any) -> None:
    fields = {**QUICK, "cure": cure, "lr": 3e-3}
    untrained, model = deep(), deep()
    FoldGPT(**fields).compress(untrained, matrix.batch())
    outcome = FoldGPT(**{**fields, "steps": 8}).compress(model, matrix.batch())
    assert outcome.coverage["losses"][-1] < outcome.coverage["losses"][0]
    for name, parameter in model.hf.named_parameters():
        norm = "norm" in name
        delta = name.endswith(("delta_a", "delta_b"))
        wanted = norm or delta if cure == "norms" else ".layers." in name
        # A key's bias adds the same to all scores of a query.
        if not name.endswith("k_proj.bias"):
            assert torch.equal(parameter, untrained.hf.get_parameter(name)) != wanted, name


def test_a_killed_search_for_gates_goes_on_where_it_was(tmp_path: Path) -> None:
    class KilledError(Exception):
        pass

    def kill(done: int, total: int, text: str) -> None:
        if "gates" in text and done == 60:
            raise KilledError

    fields: dict[str, Any] = {**QUICK, "gate_steps": 70, "batch": 1}
    whole = deep()
    known = FoldGPT(**fields).compress(whole, matrix.batch())
    with pytest.raises(KilledError):
        FoldGPT(**fields).compress(deep(), matrix.batch(), folder=tmp_path, progress=kill)
    again, said = deep(), []
    found = FoldGPT(**fields).compress(
        again, matrix.batch(), folder=tmp_path, progress=lambda done, total, text: said.append((done, text))
    )
    assert min(done for done, text in said if "gates" in text) == 51
    assert found.coverage["gates"] == known.coverage["gates"]
    assert torch.equal(logits(again), logits(whole))


def test_padding_does_not_count_in_the_loss_of_the_gates() -> None:
    model, ids = deep(), matrix.batch(rows=2, length=12).input_ids
    mask = torch.ones_like(ids)
    mask[:, 8:] = 0
    other = ids.clone()
    other[:, 8:] = 7
    found = []
    with gated(model) as gates:
        for batch in (matrix.of(ids, mask), matrix.of(other, mask), matrix.of(ids[:, :8], None)):
            task = GateTask(model, batch, gates, [1] * LAYERS, 0.75, 10, 100.0)
            found.append(float(task.loss([0, 1]).detach()))
    assert found[0] == found[1] == pytest.approx(found[2], abs=1e-5)


def test_the_control_draws_blocks_and_groups() -> None:
    drawn = set()
    for seed in range(5):
        model = deep()
        outcome = RandomFold(keep=0.5, steps=0).compress(model, matrix.batch(), seed=seed)
        assert len(gone(outcome)) == 2
        assert sum(block.shared is None for block in model.anatomy.language.blocks) == 4
        again = RandomFold(keep=0.5, steps=0).compress(deep(), matrix.batch(), seed=seed)
        assert again.edits == outcome.edits
        drawn.add((tuple(gone(outcome)), tuple(children(outcome).items())))
    assert len(drawn) > 3


def test_of_equal_gates_the_higher_index_goes() -> None:
    assert gone_of(FoldGPT(removal=0.25)._edits([1.0] * LAYERS)) == {6, 7}
    assert gone_of(FoldGPT(removal=0.25)._edits([1.0, 0.5, 1.0, 0.2, 1.0, 0.9, 1.0, 1.0])) == {1, 3}


def test_children_are_the_blocks_that_are_worth_least() -> None:
    generator = torch.Generator().manual_seed(0)
    for count in range(1, 8):
        for groups in range(1, count + 1):
            values = torch.rand(count, generator=generator).tolist()
            found = children_of(values, groups)
            longest = -(-count // groups)
            legal = [
                chosen
                for chosen in combinations(range(1, count), count - groups)
                if not any(set(range(i, i + longest)) <= set(chosen) for i in range(1, count))
            ]
            assert found in legal
            assert sum(values[i] for i in found) == min(sum(values[i] for i in chosen) for chosen in legal)
    assert children_of([1.0] * 6, 3) == (1, 3, 5)
    assert children_of([1.0] * 5, 3) == (2, 4)


def test_gates_are_learned_only_where_there_is_something_to_choose(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise AssertionError

    monkeypatch.setattr("paredown.methods.depth.foldgpt.training.fit", fail)
    model = deep()
    outcome = FoldGPT(keep=0.5, removal=0.0, **QUICK).compress(model, matrix.batch())
    assert children(outcome) == {1: 0, 3: 2, 5: 4, 7: 6}
    with pytest.raises(AssertionError):
        FoldGPT(keep=0.75, removal=0.0, **QUICK).compress(deep(), matrix.batch())


@pytest.mark.slow
def test_on_a_trained_model_gates_find_blocks_that_hardly_matter() -> None:
    """The same number of random deletions costs more, for most of five seeds."""
    from paredown.core import calibration
    from paredown.core.learning.teacher import fitness

    model = paredown.load("testbed:lm")
    texts = calibration.read(None, model_ref="testbed:lm", split="calibration")
    data = calibration.for_model(model, texts, length=128, sequences=32, seed=0)

    def perplexity(method: Any, seed: int) -> float:
        cut = paredown.load("testbed:lm")
        method.compress(cut, data, seed=seed)
        return fitness(cut.hf, None, data.input_ids, slice(None), "ppl", mask=data.attention_mask)

    ours = perplexity(FoldGPT(keep=0.75, removal=0.25, gate_steps=60, steps=0), 0)
    others = [perplexity(RandomFold(keep=0.75, removal=0.25, steps=0), seed) for seed in range(5)]
    assert sum(ours < other for other in others) >= 4
