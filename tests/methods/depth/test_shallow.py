"""Blocks run in parallel: choice, budget and the card's checks; fusing itself is tested in `core/test_fusion`."""

from __future__ import annotations

import functools
from copy import deepcopy
from typing import Any

import families
import matrix
import pytest
import torch
import transformers as tf
from torch import Tensor

import paredown
from paredown.core import calibration, surgery
from paredown.core.checkpoint import Model
from paredown.core.depth.alongside import Rehearsal
from paredown.core.depth.gates import gated
from paredown.core.edits import FuseBlocks
from paredown.core.learning.teacher import Teacher, fitness
from paredown.core.session import Session
from paredown.errors import ArchitectureError, BudgetError, DataError
from paredown.methods.depth.shallow import RandomShallow, Shallow, _Room

LAYERS = 8


@functools.cache
def _deep(layers: int) -> Any:
    config = tf.LlamaConfig(**{**families._GQA, "num_hidden_layers": layers}, attention_bias=True, mlp_bias=True)
    return families._seeded(lambda: tf.LlamaForCausalLM(config))


def deep(layers: int = LAYERS) -> Model:
    return Model.of(deepcopy(_deep(layers)))


def runs(edits: Any) -> list[tuple[int, int]]:
    assert all(isinstance(edit, FuseBlocks) for edit in edits)
    return [(edit.layer, edit.count) for edit in edits]


@torch.no_grad()
def logits(model: Model, ids: Tensor) -> Tensor:
    out: Tensor = model.hf(input_ids=ids, use_cache=False).logits
    return out


def divergence(model: Model, dense: Model, ids: Tensor) -> float:
    one, other = (logits(m, ids)[:, :-1].double().log_softmax(-1) for m in (dense, model))
    return float((one.exp() * (one - other)).sum(-1).mean())


@pytest.mark.parametrize("method", [Shallow, RandomShallow])
def test_keep_one_is_bit_identical(method):
    model, ids = deep(), matrix.batch().input_ids
    before = logits(model, ids)
    outcome = method(keep=1.0).compress(model, matrix.batch())
    assert outcome.edits == []
    assert torch.equal(logits(model, ids), before)


@pytest.mark.parametrize("method", [Shallow, RandomShallow])
@pytest.mark.parametrize("keep", [0.87, 0.75, 0.6, 0.5, 0.38, 0.25])
def test_the_depth_that_stays_is_the_budget(method, keep):
    model = deep()
    outcome = method(keep=keep).compress(model, matrix.batch(rows=2))
    gone = matrix.removed(LAYERS, keep)
    found = runs(outcome.edits)
    assert sum(count - 1 for _, count in found) == gone
    assert model.config.num_hidden_layers == len(model.anatomy.language.blocks) == LAYERS - gone
    covered = [i for start, count in found for i in range(start, start + count)]
    assert len(covered) == len(set(covered))
    assert all(2 <= count <= 4 for _, count in found)
    if gone <= 3:
        assert not set(covered) & {0, 1, LAYERS - 1}, "ends are left alone where the budget allows it"
    assert torch.isfinite(logits(model, matrix.batch().input_ids)).all()


def test_measured_is_what_the_built_model_does():
    """Local error and KL of each candidate, alone and beside a chosen run, against models that are really built."""
    dense, data = deep(), matrix.batch(rows=5)
    ids = data.input_ids
    tried = Rehearsal(dense, ids, None, Teacher.collect(dense.hf, ids), batch=2)
    wanted = [range(2), range(2, 5), range(4, 8)]
    found = tried.measure([range(0), *wanted])
    assert found[range(0)].kl == pytest.approx(0, abs=1e-9)
    states = _states(dense, ids)
    for run in wanted:
        built = deep()
        built.anatomy = fusion_of(built, [run])
        assert found[run].kl == pytest.approx(divergence(built, dense, ids), rel=1e-4)
        there = _states(built, ids)[run.start + 1]
        moved = (states[run.stop] - states[run.start]).norm(dim=-1)
        assert found[run].error == pytest.approx(
            float(((there - states[run.stop]).norm(dim=-1) / moved).mean()), rel=1e-4
        )
    tried.choose(range(2, 5))
    beside = tried.measure([range(0), range(5, 7), range(2)])
    for run, others in ((range(0), []), (range(5, 7), [range(5, 7)]), (range(2), [range(2)])):
        built = deep()
        built.anatomy = fusion_of(built, [range(2, 5), *others])
        assert beside[run].kl == pytest.approx(divergence(built, dense, ids), rel=1e-4)
    assert torch.equal(logits(dense, ids), logits(deep(), ids)), "measuring leaves the model as it was"


def fusion_of(model: Model, wanted: list[range]) -> Any:
    edits = [FuseBlocks(layer=run.start, count=len(run)) for run in wanted]
    return surgery.apply_model(model.hf, model.anatomy, edits)


def _states(model: Model, ids: Tensor) -> list[Tensor]:
    seen: list[Tensor] = []
    blocks = [model.hf.get_submodule(b.path) for b in model.anatomy.language.blocks]
    handles = [b.register_forward_hook(lambda _, args, out: seen.append((args[0], out))) for b in blocks]
    logits(model, ids)
    for handle in handles:
        handle.remove()
    return [seen[0][0], *(out for _, out in seen)]


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_is_not_measured(side):
    dense, ids, lengths = deep(4), matrix.batch(rows=3, length=12).input_ids, (12, 7, 5)
    padded, mask = torch.zeros_like(ids), torch.zeros_like(ids)
    for i, n in enumerate(lengths):
        place = slice(0, n) if side == "right" else slice(12 - n, None)
        padded[i, place], mask[i, place] = ids[i, :n], 1
    run = range(1, 3)
    together = Rehearsal(dense, padded, mask, Teacher.collect(dense.hf, padded, mask), 2).measure([run])[run]
    alone = []
    for i, n in enumerate(lengths):
        row = ids[i : i + 1, :n]
        alone.append(Rehearsal(dense, row, None, Teacher.collect(dense.hf, row), 1).measure([run])[run])
    error = sum(n * one.error for n, one in zip(lengths, alone, strict=True)) / sum(lengths)
    kl = sum((n - 1) * one.kl for n, one in zip(lengths, alone, strict=True)) / (sum(lengths) - 3)
    assert together.error == pytest.approx(error, rel=1e-3)
    assert together.kl == pytest.approx(kl, rel=1e-3)


def test_it_takes_the_least_rise_for_each_block_saved_and_measures_again():
    dense, data = deep(), matrix.batch(rows=4)
    ids = data.input_ids
    outcome = Shallow(keep=0.75, first=0, last=0).compress(deep(), data)
    chosen: list[range] = []
    left = 2
    while left:
        taken = {i for run in chosen for i in run}
        options = [
            range(s, s + n)
            for s in range(LAYERS)
            for n in range(2, min(4, left + 1) + 1)
            if s + n <= LAYERS and not taken & set(range(s, s + n))
        ]
        before = _built(chosen, dense, ids)
        rises = [(_built([*chosen, run], dense, ids) - before) / (len(run) - 1) for run in options]
        run = options[rises.index(min(rises))]
        chosen.append(run)
        left -= len(run) - 1
    assert runs(outcome.edits) == sorted((run.start, len(run)) for run in chosen)
    table = outcome.coverage["runs"]
    assert [(row["first"], row["last"]) for row in table] == [(run.start, run[-1]) for run in chosen]
    assert table[-1]["kl"] == pytest.approx(_built(chosen, dense, ids), rel=1e-4)


def _built(chosen: list[range], dense: Model, ids: Tensor) -> float:
    if not chosen:
        return 0.0
    built = deep()
    built.anatomy = fusion_of(built, chosen)
    return divergence(built, dense, ids)


def test_planted_neighbours_that_hardly_act_go_first():
    model = deep()
    with torch.no_grad():
        for layer in (4, 5):
            block = model.hf.model.layers[layer]
            for linear in (block.self_attn.o_proj, block.mlp.down_proj):
                linear.weight *= 0.1
                linear.bias *= 0.1
    assert runs(Shallow(keep=0.87).compress(model, matrix.batch()).edits) == [(4, 2)]


def test_room_counts_what_can_still_be_saved():
    room = _Room(range(8), set(range(7)), 4)
    assert room.capacity() == 6
    assert _Room(range(8), set(range(7)), 2).capacity() == 4
    assert _Room(range(8), set(range(7)) - {3}, 3).capacity() == 4  # two chains of four
    assert _Room(range(7), set(range(7)), 2).capacity() == 3
    # Four pairs are needed: one that begins at an odd block would leave two blocks alone.
    assert _Room(range(8), set(range(7)), 2).candidates(4) == [range(i, i + 2) for i in (0, 2, 4, 6)]
    for draw in range(20):
        model = deep()
        found = runs(RandomShallow(keep=0.5, longest=2).compress(model, None, seed=draw).edits)
        assert found == [(0, 2), (2, 2), (4, 2), (6, 2)]


def test_the_plan_foretells_the_number_of_parameters():
    for keep in (0.87, 0.6, 0.5, 0.25):
        planned, done = deep(), deep()
        edits = Shallow(keep=keep).foretell(planned.anatomy.language.blocks)
        planned.anatomy = surgery.apply_model(planned.hf, planned.anatomy, edits)
        RandomShallow(keep=keep).compress(done, None, seed=3)
        assert planned.parameters() == done.parameters()
        assert len(planned.anatomy.language.blocks) == len(done.anatomy.language.blocks)


def test_what_cannot_be_reached_is_told():
    with pytest.raises(BudgetError, match=r"runs of up to 2 save 4 at most; keep at least 0\.5, or raise longest"):
        Shallow(keep=0.3, longest=2).compress(deep(), matrix.batch())
    with pytest.raises(ArchitectureError, match="Qwen3ForCausalLM has none"):
        Shallow(keep=0.5).compress(Model.of(families.FAMILIES["qwen3"]()), matrix.batch())
    with pytest.raises(DataError, match="--data"):
        Shallow(keep=0.5).compress(deep(), None)


def test_layers_of_two_kinds_are_never_in_one_run():
    config = tf.SmolLM3Config(**{**families._GQA, "num_hidden_layers": 8}, no_rope_layer_interval=4)
    build = lambda: Model.of(families._seeded(lambda: tf.SmolLM3ForCausalLM(config)))  # noqa: E731
    for seed in range(6):
        for start, count in runs(RandomShallow(keep=0.5).compress(build(), None, seed=seed).edits):
            assert not {3, 7} & set(range(start, start + count))
    foretold = runs(Shallow(keep=0.5).foretell(build().anatomy.language.blocks))
    assert all(not {3, 7} & set(range(start, start + count)) for start, count in foretold)


def test_it_can_be_killed_and_tells_how_far_it_is(tmp_path):
    told: list[tuple[int, int, str]] = []
    session = Session(seed=0, folder=tmp_path, progress=lambda done, total, text: told.append((done, total, text)))
    model = deep()
    first = Shallow(keep=0.75).transform(model, matrix.batch(), session)
    assert any("2 blocks to save" in text for _, _, text in told)
    assert {"teacher", "measure", "fuse"} <= session.stages.keys()
    again = Shallow(keep=0.75).transform(deep(), matrix.batch(), Session(folder=tmp_path))
    assert again == first


@pytest.mark.slow
def test_on_a_trained_model_the_chosen_run_beats_random_ones_and_deletion():
    """Five seeds: its KL is below the mean of random runs, and in parallel it hurts less than deleted (card)."""
    dense = paredown.load("testbed:lm", dtype="float32")
    texts = calibration.read(None, model_ref="testbed:lm", split="calibration")
    heldout = calibration.read(None, model_ref="testbed:lm", split="heldout")
    judged = calibration.for_model(dense, heldout, length=128, sequences=8, what="held-out")
    teacher = Teacher.collect(dense.hf, judged.input_ids)

    def kl(model: Model) -> float:
        return fitness(model.hf, teacher, judged.input_ids, slice(None), "kl", 8)

    for seed in range(5):
        data = calibration.for_model(dense, texts, length=128, sequences=4, seed=seed)
        chosen, drawn = deepcopy(dense), []
        edits = Shallow(keep=0.87).compress(chosen, data, seed=seed).edits
        for draw in range(4):
            control = deepcopy(dense)
            RandomShallow(keep=0.87).compress(control, None, seed=10 * seed + draw)
            drawn.append(kl(control))
        assert kl(chosen) < sum(drawn) / len(drawn)
        with gated(dense) as gates:
            gates.drop([(start + i, "block") for start, count in runs(edits) for i in range(count)])
            assert kl(chosen) < kl(dense)
