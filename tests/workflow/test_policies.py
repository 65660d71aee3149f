"""Scores under policies against hand computations: halves through the cache, tasks, bytes, and what is refused."""

from __future__ import annotations

import pytest
import torch

import paredown
from paredown.core import checkpoint
from paredown.core.stepwise import Held, stepwise
from paredown.errors import RecipeError, UsageError
from paredown.methods.cache.streaming import Streaming
from paredown.workflow import evaluate as evaluation
from paredown.workflow import policies, tasks
from paredown.workflow.evaluate import evaluate


@pytest.fixture(scope="module")
def model(checkpoint_folder):
    return checkpoint.load(checkpoint_folder(seed=0))


@pytest.fixture(scope="module")
def other(checkpoint_folder):
    return checkpoint.load(checkpoint_folder(seed=1))


@pytest.fixture(scope="module")
def ids():
    return torch.randint(2, 64, (5, 24), generator=torch.Generator().manual_seed(3))


@pytest.fixture(scope="module")
def recall():
    return checkpoint.load("testbed:recall", dtype="float32")


def test_without_a_policy_the_halves_are_those_of_one_pass(model, other, ids):
    whole = evaluation.together(other.hf, model.hf, ids)
    for through in (False, True):
        reader = policies.Reader(model, through_cache=through)
        found = policies.text(policies.Reader(other), reader, ids)
        assert found.after.shape == (5, 12)
        assert torch.allclose(found.before, whole[0][:, 11:], atol=1e-5)
        assert torch.allclose(found.after, whole[1][:, 11:], atol=1e-5)
    assert (found.kl > 0.01).all()
    assert policies.text(policies.Reader(model), policies.Reader(model), ids).kl.tolist() == [0.0] * 5


def test_under_a_policy_the_second_half_is_what_a_hand_computes(model, ids):
    """Sink 2 and the last 4 of 12: token by token, with the mask that this leaves, over the whole row at once."""
    policy = Streaming(keep=0.5, sink=2)
    found = policies.text(policies.Reader(model), policies.Reader(model, (policy,)), ids)
    length = ids.shape[1]
    queries, keys = torch.arange(length)[:, None], torch.arange(length)[None]
    causal = keys <= queries
    # Reading the first half sees all of it; after each pass 2 + 4 tokens stay for the next.
    held = causal & ((keys < 2) | (keys >= queries - 4))
    mask = torch.where(queries < 12, causal, held)
    with torch.no_grad():
        logits = model.hf(input_ids=ids, attention_mask=mask[None, None]).logits
    expected = -logits[:, :-1].log_softmax(-1).gather(-1, ids[:, 1:, None])[..., 0]
    assert torch.allclose(found.after, expected[:, 11:], atol=1e-4)
    assert torch.allclose(found.before[:, 0], found.after[:, 0], atol=1e-5)
    assert not torch.allclose(found.before, found.after, atol=1e-2)


def test_batches_do_not_matter(model, ids, monkeypatch):
    reader = policies.Reader(model, (Streaming(keep=0.5),))
    together = policies.text(policies.Reader(model), reader, ids)
    monkeypatch.setattr(policies, "_MOST_ROWS", 2)
    apart = policies.text(policies.Reader(model), reader, ids)
    assert torch.allclose(together.after, apart.after, atol=1e-5)
    assert torch.allclose(together.kl, apart.kl, atol=1e-5)


def test_reading_step_by_step_leaves_gradients_as_they_were_and_the_model_too(model, ids):
    before = torch.is_grad_enabled(), torch.is_inference_mode_enabled()
    passes = stepwise(model.hf, {"input_ids": ids[:, :4]}, ids[:, 4:6])
    next(passes)
    assert (torch.is_grad_enabled(), torch.is_inference_mode_enabled()) == before
    passes.close()
    reader = policies.Reader(model, (Streaming(keep=0.5),))
    stopped = reader.logits(ids, 12, None)
    next(stopped)
    stopped.close()
    with paredown.attach(model, Streaming(keep=0.5)):
        pass


def test_held_counts_bytes_and_tokens(model, ids):
    held = Held()
    list(stepwise(model.hf, {"input_ids": ids[:, :8]}, ids[:, 8:12], watch=held))
    held.close(len(ids))
    each = 2 * 4 * 2 * 8 * 4 * 5  # keys and values, layers, heads, width, float32, rows
    assert (held.first, held.peak, held.steady, held.tokens) == (8 * each, 12 * each, 12 * each, 12)


@pytest.mark.parametrize("how", ["after", "within"])
def test_asking_through_the_cache_gives_the_hits_of_one_pass(recall, how):
    plain = tasks.ask("recall", recall, questions=24)
    held = Held()
    assert tasks.ask("recall", recall, questions=24, how=how, held=held).tolist() == plain.tolist()
    assert 0 < plain.mean() <= 1
    assert held.tokens == 512 + 3
    assert tasks.ask("recall", recall, questions=24, how=how, policies=[Streaming(keep=1.0)]).tolist() == plain.tolist()


def test_a_question_after_the_text_finds_less_than_one_within(recall):
    """With 5 % of the tokens, a fact is gone before it is asked for; within the pass the question still sees it."""
    few = [Streaming(keep=0.05)]
    after, within = (
        tasks.ask("recall", recall, questions=24, how=how, policies=few).mean() for how in ("after", "within")
    )
    assert after < 0.3
    assert within >= after


def test_mosaic_through_the_cache():
    model = checkpoint.load("testbed:vlm", dtype="float32")
    plain = tasks.ask("mosaic", model, questions=12)
    assert tasks.ask("mosaic", model, questions=12, how="within").tolist() == plain.tolist()
    assert plain.mean() > 0.5


def test_policies_from_the_words_of_a_command_line():
    [one] = policies.make(["streaming"], 0.25, {"sink": 2})
    assert (one.keep, one.sink) == (0.25, 2)
    [one] = policies.make(["streaming"], None, {"streaming.keep": 0.75})
    assert one.keep == 0.75
    with pytest.raises(UsageError, match="is a compressor, not a policy"):
        policies.make(["dern"], 0.5)
    with pytest.raises(UsageError, match="belongs to no policy"):
        policies.make(["streaming"], 0.5, {"think.keep": 1})
    with pytest.raises(RecipeError, match="no field 'sinks'"):
        policies.make(["streaming"], 0.5, {"sinks": 1})
    with pytest.raises(UsageError, match="there is no method"):
        policies.make(["streamin"])


def test_evaluate_pairs_a_policy_with_the_model_without(checkpoint_folder, text_file):
    folder = checkpoint_folder(seed=0)
    found = evaluate(
        folder, folder, text_file, policies=[Streaming(keep=0.5)], length=24, sequences=8, cost=False, device="cpu"
    )
    text, divergence = found.scores
    assert text.difference.n == 8
    assert text.before.mean != text.after.mean
    assert divergence.after.mean > 0.001
    assert found.model.policies == [{"method": "streaming", "fields": {"keep": 0.5, "sink": 4}}]
    assert found.against.policies == []
    assert any("second half alone" in note for note in found.notes)
    inert = evaluate(
        folder, folder, text_file, policies=[Streaming(keep=1.0)], length=24, sequences=8, cost=False, device="cpu"
    )
    assert inert.scores[0].difference.mean == inert.scores[0].difference.high == 0
    alone = evaluate(
        folder, None, text_file, policies=[Streaming(keep=0.5)], length=24, sequences=8, cost=False, device="cpu"
    )
    assert alone.scores[0].after == text.after
    assert alone.scores[0].before is None


def test_costs_are_held_against_the_same_weights_without(checkpoint_folder, monkeypatch):
    from types import SimpleNamespace

    monkeypatch.setattr(evaluation.measure, "memory", lambda *args, **kwargs: None)
    folder = str(checkpoint_folder(seed=0))
    sides = [
        SimpleNamespace(memory=None, prefill=None, decode=None, cache=None, alone=None, policies=[]) for _ in range(2)
    ]
    ids = torch.arange(60)[None] % 60
    ratios = policies.costs([folder, folder], sides, [(Streaming(keep=0.25),), ()], ids, "cpu", 2, None)
    assert [ratio.n for ratio in ratios] == [2, 2]
    ours, theirs = sides
    assert ours.cache.prompt == 32
    assert ours.cache.steady_bytes < 0.5 * ours.alone.cache.steady_bytes
    assert ours.alone.cache == theirs.cache
    assert theirs.alone is None
    assert ours.alone.decode.n == 2
