"""EvoPress: every check of its card on models; the engine's own stand in tests/core/test_evolution.py."""

from __future__ import annotations

import functools
import itertools
import math
from copy import deepcopy

import families
import matrix
import pytest
import torch
import transformers as tf

from paredown.core import audit
from paredown.core.calibration import Batch
from paredown.core.checkpoint import Model
from paredown.core.depth import gates as gates_module
from paredown.core.depth.gates import gated
from paredown.core.edits import DropBlock, DropSublayer
from paredown.core.learning.teacher import Teacher, fitness
from paredown.core.search import evolution, judging
from paredown.errors import BudgetError, DataError, OutputError
from paredown.methods.depth.evopress import EvoPress, EvoPressBlocks, RandomSearch
from paredown.methods.depth.llm_drop import LLMDrop, RandomSublayers

SMALL = {"tokens": (24, 72), "survivors": (2, 1), "offspring": 6, "drawn": 4, "drawn_tokens": 24}


@functools.cache
def _built(layers):
    config = tf.LlamaConfig(**{**families._GQA, "num_hidden_layers": layers}, attention_bias=True, mlp_bias=True)
    return families._seeded(lambda: tf.LlamaForCausalLM(config))


def deep(layers=4):
    return Model.of(deepcopy(_built(layers)))


def logits(model, ids):
    with torch.no_grad():
        return model.hf(input_ids=ids, use_cache=False).logits


def dropped(edits):
    return sorted((e.layer, e.part) for e in edits)


def parts_gone(model):
    """Which sub-layers the model itself lacks."""
    blocks = model.anatomy.language.blocks
    return sorted(
        [(b.index, "attention") for b in blocks if b.attention is None]
        + [(b.index, "mlp") for b in blocks if b.mlp is None and b.experts is None]
    )


@pytest.fixture
def scored(monkeypatch):
    """Every set of units that was ever taken out by gates."""
    seen = []
    honest = gates_module.Gates.drop

    def drop(self, gone):
        gone = list(gone)
        seen.append(gone)
        honest(self, gone)

    monkeypatch.setattr(gates_module.Gates, "drop", drop)
    return seen


@pytest.mark.parametrize(
    ("part", "wanted"), [("each", (2, 2)), ("attention", (2, 0)), ("mlp", (0, 2)), ("joint", None)]
)
def test_the_budget_holds_in_every_state_ever_scored(scored, part, wanted):
    """Card: int((1 - keep) * L) go in each list; joint takes its share of one list."""
    method = EvoPress(keep=0.6, part=part, generations=3, **SMALL)
    outcome = method.compress(deep(5), matrix.batch())
    assert len(scored) > 20
    for gone in [*scored, dropped(outcome.edits)]:
        attention = sum(kind == "attention" for _, kind in gone)
        assert (attention, len(gone) - attention) == wanted if wanted else len(gone) == 4
    if part == "joint":
        assert len({sum(kind == "attention" for _, kind in gone) for gone in scored}) > 1
    assert len(method.foretell(deep(5).anatomy.language.blocks)) == len(outcome.edits)


def test_nothing_gone_is_no_divergence():
    """Card: sparsity 0 gives KL 0 within rounding."""
    model, data = deep(), matrix.batch()
    teacher = judging.teacher_of(model.hf, data, None)
    with gated(model) as gates:
        judge = judging.TextJudge(model.hf, data, teacher, "kl", lambda state: gates.drop(state))
        assert judge.score((), judge.everything()) < 1e-6
    before = audit.digests(model.hf)
    outcome = EvoPress(keep=1.0).compress(model, data)
    assert not outcome.edits
    assert audit.digests(model.hf) == before


@pytest.mark.parametrize("seed", range(5))
def test_the_brute_force_optimum_is_reached(seed):
    """Card: n = 8 half-blocks, full-batch fitness, five seeds; and what is reported is what brute force measures."""
    data = matrix.batch()
    best, value = brute_force("joint", 2)
    method = EvoPress(keep=0.75, part="joint", generations=15, offspring=4, drawn=4, survivors=(1,), tokens=(1000,))
    outcome = method.compress(deep(), data, seed=seed)
    assert dropped(outcome.edits) == best
    assert outcome.coverage["search"]["fitness_on_all_data"] == pytest.approx(value, rel=1e-4)


@functools.cache
def brute_force(part, count):
    """Delete for good, in every possible way; shares no code with the search."""
    dense, ids = deep(), matrix.batch().input_ids
    wanted = torch.log_softmax(logits(dense, ids)[:, :-1].double(), -1)
    found = []
    for gone in itertools.combinations([(i, k) for i in range(4) for k in ("attention", "mlp")], count):
        model = deep()
        from paredown.core import surgery

        surgery.apply_model(model.hf, model.anatomy, [DropSublayer(layer=i, part=k) for i, k in gone])
        got = torch.log_softmax(logits(model, ids)[:, :-1].double(), -1)
        found.append((float((wanted.exp() * (wanted - got)).sum(-1).mean()), sorted(gone)))
    value, best = min(found)
    return best, value


def test_the_model_is_the_reported_best_state():
    """Card: after the run the loaded model equals the reported best state, bit for bit that which was scored."""
    model, data = deep(), matrix.batch()
    outcome = EvoPress(keep=0.5, generations=4, **SMALL).compress(model, data, seed=1)
    gone = [tuple(unit) for unit in outcome.coverage["search"]["dropped"]]
    assert sorted(gone) == dropped(outcome.edits) == parts_gone(model)
    dense = deep()
    with gated(dense) as gates:
        gates.drop(gone)
        assert torch.equal(logits(dense, data.input_ids), logits(model, data.input_ids))
    teacher = Teacher.collect(dense.hf, data.input_ids)
    kl = fitness(model.hf, teacher, data.input_ids, slice(None))
    assert kl == pytest.approx(outcome.coverage["search"]["fitness_on_all_data"], rel=1e-5)


def test_it_beats_random_search_with_as_many_tokens():
    """Card: then beats random search with the same number of evaluated tokens. Medians over three seeds."""
    data = matrix.batch(rows=2)
    fields = {"keep": 0.5, "part": "joint", "generations": 12, "offspring": 6, "drawn": 6}
    fields |= {"tokens": (12, 24), "survivors": (2, 1), "drawn_tokens": 12}
    own, random, spent = [], [], []
    for seed in range(3):
        for method, into in ((EvoPress(**fields), own), (RandomSearch(**fields), random)):
            told = method.compress(deep(6), data, seed=seed).coverage["search"]
            into.append(told["fitness_on_all_data"])
            spent.append(told["tokens"])
    assert max(spent) <= 1.3 * min(spent)
    assert sorted(own)[1] < sorted(random)[1]


def test_killed_and_resumed_it_gives_the_same_answer(tmp_path, monkeypatch):
    fields = {"keep": 0.5, "generations": 3, **SMALL}
    whole = EvoPress(**fields).compress(deep(), matrix.batch(), seed=2)
    honest = evolution._Search._generation
    for at in range(3):
        calls = iter(range(10))

        def stop(self, at=at, calls=calls):
            if next(calls) == at:
                raise KeyboardInterrupt
            return honest(self)

        with monkeypatch.context() as patch:
            patch.setattr(evolution._Search, "_generation", stop)
            with pytest.raises(KeyboardInterrupt):
                EvoPress(**fields).compress(deep(), matrix.batch(), seed=2, folder=tmp_path / str(at))
        again = EvoPress(**fields).compress(deep(), matrix.batch(), seed=2, folder=tmp_path / str(at))
        assert (again.edits, again.coverage) == (whole.edits, whole.coverage)
    with pytest.raises(OutputError, match="another"):
        EvoPress(**fields).compress(deep(), matrix.batch(seed=5), seed=2, folder=tmp_path / "0")
    with pytest.raises(OutputError, match="another search"):
        EvoPress(**fields).compress(deep(), matrix.batch(), seed=3, folder=tmp_path / "0")


def test_gates_are_off_after_an_interruption(monkeypatch):
    model, data = deep(), matrix.batch()
    before = logits(model, data.input_ids)

    def stop(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(evolution._Search, "_generation", stop)
    with pytest.raises(KeyboardInterrupt):
        EvoPress(keep=0.5, generations=2, **SMALL).compress(model, data)
    assert torch.equal(logits(model, data.input_ids), before)


def test_whole_blocks():
    model, data = deep(6), matrix.batch()
    outcome = EvoPressBlocks(keep=0.6, generations=6, **SMALL).compress(model, data)
    assert len(outcome.edits) == 2
    assert all(isinstance(edit, DropBlock) for edit in outcome.edits)
    assert len(model.anatomy.language.blocks) == model.config.num_hidden_layers == 4
    dense = deep(6)
    with gated(dense) as gates:
        gates.drop([tuple(unit) for unit in outcome.coverage["search"]["dropped"]])
        assert torch.equal(logits(dense, data.input_ids), logits(model, data.input_ids))


@pytest.mark.parametrize("kind", ["kl", "ppl"])
def test_padding_does_not_count(kind):
    data = matrix.batch()
    mask = torch.ones_like(data.input_ids)
    mask[:3, -4:] = 0
    ids = data.input_ids.clone()
    ids[mask == 0] = 7
    method = EvoPress(keep=0.75, fitness=kind, generations=3, **SMALL)
    one, two = (
        method.compress(deep(), matrix.of(tokens, mask)).coverage["search"]["fitness_on_all_data"]
        for tokens in (data.input_ids, ids)
    )
    assert one == pytest.approx(two, rel=1e-4)


def test_perplexity_and_sparse_kl_are_what_they_say():
    data = matrix.batch()
    model = deep()
    told = EvoPress(keep=0.75, fitness="ppl", generations=2, **SMALL).compress(model, data).coverage["search"]
    own = torch.log_softmax(logits(model, data.input_ids)[:, :-1].double(), -1)
    nll = -own.gather(2, data.input_ids[:, 1:, None]).mean()
    assert told["fitness_on_all_data"] == pytest.approx(math.exp(nll), rel=1e-4)
    model = deep()
    told = EvoPress(keep=0.75, top=16, generations=2, **SMALL).compress(model, data).coverage["search"]
    teacher = Teacher.collect(deep().hf, data.input_ids, top=16)
    assert told["fitness_on_all_data"] == pytest.approx(
        fitness(model.hf, teacher, data.input_ids, slice(None)), rel=1e-4
    )


def test_layers_that_must_stay_stay_and_passes_are_limited():
    method = EvoPress(keep=0.5, stay=(0, 3), generations=3, **SMALL)
    outcome = method.compress(deep(), matrix.batch())
    assert {edit.layer for edit in outcome.edits} == {1, 2}
    with pytest.raises(BudgetError, match="from the 1 that may go"):
        EvoPress(keep=0.5, stay=(0, 1, 3)).compress(deep(), matrix.batch())
    told = EvoPress(keep=0.5, passes_limit=60, **SMALL).compress(deep(), matrix.batch()).coverage["search"]
    assert told["forward_passes"] <= 60
    assert told["tokens"] <= 60 * 12
    with pytest.raises(BudgetError, match="one of each for every stage"):
        EvoPress(keep=0.5, tokens=(24,)).compress(deep(), matrix.batch())
    with pytest.raises(DataError, match="two tokens"):
        EvoPress(keep=0.5).compress(deep(), Batch(torch.ones(3, 1, dtype=torch.long), None, "", "", 0, 3))


def test_the_teacher_is_the_model_that_the_recipe_began_with():
    data, model = matrix.batch(), deep()
    LLMDrop(keep=0.75).compress(model, data)
    other = deepcopy(model)
    for student, original in ((model, None), (other, deep)):
        told = EvoPress(keep=0.5, generations=0, drawn=1, survivors=(1,), tokens=(24,)).compress(
            student, data, original=original
        )
        dense = deep() if original else None
        if dense is not None:
            teacher = Teacher.collect(dense.hf, data.input_ids)
            wanted = fitness(student.hf, teacher, data.input_ids, slice(None))
            assert told.coverage["search"]["fitness_on_all_data"] == pytest.approx(wanted, rel=1e-5)


def test_a_share_of_each_kind_is_one_choice_for_all_methods_on_sublayers():
    """llm-drop, random and evopress meet at the same size, so that `compare` can hold them against each other."""
    data = matrix.batch()
    for method in (LLMDrop(keep=0.6, part="each"), RandomSublayers(keep=0.6, part="each")):
        edits = method.compress(deep(5), data).edits
        assert [sum(e.part == kind for e in edits) for kind in ("attention", "mlp")] == [2, 2]
    similarity, _ = matrix.scores(LLMDrop(keep=0.6, part="each"), deep(5), data)
    top = sorted(range(5), key=lambda i: -float(similarity[i]["attention"]))[:2]
    edits = LLMDrop(keep=0.6, part="each").compress(deep(5), data).edits
    assert sorted(e.layer for e in edits if e.part == "attention") == sorted(top)
