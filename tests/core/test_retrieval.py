"""Facts planted in text, and which heads copy them out again."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import families
import numpy as np
import pytest
import torch
from torch import Tensor

from paredown.core import retrieval
from paredown.core.attach import attach_runtimes, wrap
from paredown.core.calibration import Batch
from paredown.core.retrieval import Needle, Planter, ablate, copies, find, recall
from paredown.errors import DataError


def rows(count: int = 8, length: int = 40, first: int | None = None) -> Batch:
    ids = torch.randint(3, families.VOCAB, (count, length), generator=torch.Generator().manual_seed(0))
    if first is not None:
        ids[:, 0] = first
    return Batch(ids, None, "random", "", 0, count)


def tokens(length: int = 20) -> Tensor:
    return torch.randint(3, families.VOCAB, (2, length), generator=torch.Generator().manual_seed(1))


# Where the answer stands.


def test_an_exact_place_comes_before_a_close_one():
    shuffled, answer = [4, 3, 2, 1], [1, 2, 3, 4]
    assert find([9, *shuffled, 9, *answer, 9], answer) == (6, 10)
    assert find([9, *shuffled, 9], answer) == (1, 5)
    assert find([9, *answer, *answer], answer) == (1, 5)


def test_more_than_nine_tenths_of_the_tokens_will_do():
    answer = list(range(20, 42))
    changed = [*answer[:-2], 99, 98]  # 20 of 22
    # As in the official code the first such window counts, which may begin early (see the corrections).
    assert find([1, 2, 3, *changed], answer) == (1, 23)
    assert find([1, 2, *answer[:-3], 99, 98, 97], answer) is None  # 19 of 22 are fewer
    assert find([1, 2, 3], answer) is None
    assert find([1, 2, 3], []) is None


def test_recall_counts_each_token_as_often_as_it_is_there():
    assert recall([5, 6], [5, 6, 7, 8]) == 0.5
    assert recall([5, 5, 5], [5, 5, 6]) == pytest.approx(2 / 3)
    assert recall([], [5]) == 0


# Planting.


@pytest.mark.parametrize("depth", [0.0, 0.5, 1.0])
def test_a_needle_stands_at_its_depth_and_is_asked_for(depth):
    needle = Planter(rows(first=1)).needle(40, depth, 6, np.random.default_rng(0))
    assert len(needle.prompt) == 40
    assert needle.prompt[0] == 1
    assert needle.span is not None
    start, stop = needle.span
    assert needle.prompt[start:stop] == needle.answer
    marker = needle.prompt[start - 3 : start]
    assert needle.prompt[-3:] == marker
    assert start - 4 == round(depth * (40 - 1 - 9 - 3))


def test_the_grid_is_drawn_from_the_seed():
    planter = Planter(rows())
    assert planter.grid([24, 40], 3, 4, 5) == planter.grid([24, 40], 3, 4, 5)
    assert planter.grid([24, 40], 3, 4, 5) != planter.grid([24, 40], 3, 4, 6)
    assert [len(needle.prompt) for needle in planter.grid([24, 40], 3, 4, 5)] == [24] * 3 + [40] * 3


def test_what_cannot_be_planted_is_told():
    with pytest.raises(DataError, match="calibration data"):
        Planter(None)
    with pytest.raises(DataError, match="tokenizer"):
        Planter(rows(), None, "It is {value}.")
    with pytest.raises(DataError, match="make it longer"):
        Planter(rows()).needle(12, 0.5, 8, np.random.default_rng(0))


# Scores. The model is made to say what the test wants, and heads to look where it wants.


@contextlib.contextmanager
def says(hf: Any, answer: tuple[int, ...]) -> Iterator[None]:
    """Let the model answer ``answer`` and then its end token, whatever it is asked."""
    told = iter((*answer, *[2] * 60))

    def hook(module: Any, args: Any, kwargs: Any, output: Any) -> Any:
        if kwargs["input_ids"].shape[1] == 1:
            output.logits = torch.nn.functional.one_hot(torch.tensor([[next(told)]]), families.VOCAB).float()
        return output

    handle = hf.register_forward_hook(hook, with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()


def scored(monkeypatch: Any, answer: tuple[int, ...], look: Any = None, **options: Any) -> retrieval.Copies:
    """Score a needle whose key is 10..13 at position 7; head 0 looks at ``look(step)``, all others at the start."""
    hf = families.llama()
    needle = Needle.of([5, 6, 7, 8, 9, 5, 6, 10, 11, 12, 13, 8, 5, 6], [10, 11, 12, 13])
    assert needle.span == (7, 11)

    def looked(call: Any) -> Tensor:
        step = call.now.past - len(needle.prompt) + 1
        at = torch.zeros(1, 4, dtype=torch.long)
        at[:, 0] = (7 + step if step < 4 else 11) if look is None else look(step)
        return at

    monkeypatch.setattr(retrieval, "looked_at_most", looked)
    with says(hf, answer):
        return copies(wrap(hf), [needle], **options)


def test_a_head_that_copies_scores_one_and_one_that_looks_at_the_start_zero(monkeypatch):
    """The card, check 1."""
    found = scored(monkeypatch, (10, 11, 12, 13))
    assert (found.counted, found.asked) == (1, 1)
    for layer in found.scores:
        assert layer.tolist() == [1, 0, 0, 0]
    assert found.frequency[0].tolist() == [1, 0, 0, 0]
    assert found.of_kv_heads((2, 0, 2)).tolist() == [1, 0, 1, 0]


def test_other_tokens_than_those_looked_at_are_no_copies(monkeypatch):
    """The card, check 2: the same tokens in another order pass the gate, and every score is zero."""
    found = scored(monkeypatch, (11, 10, 13, 12))
    assert found.counted == 1
    assert all(layer.tolist() == [0, 0, 0, 0] for layer in found.scores)


def test_a_failed_answer_does_not_count_and_half_an_answer_is_a_failure(monkeypatch):
    """The card, check 3, and the strict gate of the corrections."""
    half = scored(monkeypatch, (10, 11))
    assert half.counted == 0
    assert all(layer.tolist() == [0, 0, 0, 0] for layer in half.scores)
    more = scored(monkeypatch, (10, 11, 12))
    assert more.counted == 1
    assert more.scores[0].tolist() == [0.75, 0, 0, 0]


def test_a_position_counts_once_unless_repeats_are_asked_for(monkeypatch):
    answer = (10, 11, 12, 10, 10)
    looks = [7, 8, 9, 7, 7, 0]
    assert scored(monkeypatch, answer, looks.__getitem__).scores[0][0] == 0.75
    assert scored(monkeypatch, answer, looks.__getitem__, repeats=True).scores[0][0] == 1.25


def test_a_key_that_is_nowhere_counts_as_a_sample_without_copies(monkeypatch):
    """The corrections: the official code averages it in."""
    hf = families.llama()
    with says(hf, (50, 51)):
        found = copies(wrap(hf), [Needle((5, 6, 7, 8), (50, 51), None)])
    assert found.counted == 1
    assert float(torch.cat(found.scores).sum()) == 0


def test_answers_end_at_the_length_or_the_end_token():
    hf = families.llama()
    seen: list[int] = []
    hook = hf.register_forward_pre_hook(lambda m, a, k: seen.append(k["input_ids"].shape[1]), with_kwargs=True)
    with says(hf, (10, 11, 2, 12)):
        copies(wrap(hf), [Needle.of([5, 10, 11, 5], [10, 11])], longest=9)
    assert seen == [3, 1, 1, 1]
    seen.clear()
    with says(hf, (10,) * 20):
        copies(wrap(hf), [Needle.of([5, 10, 11, 5], [10, 11])], longest=9)
    hook.remove()
    assert seen == [3] + [1] * 9


def test_scores_are_shares_and_the_same_each_time():
    model = wrap(families.llama())
    needles = Planter(rows()).grid([30], 4, 4, 0)
    first = copies(model, needles, longest=6)
    # However many are asked at once.
    second = copies(model, needles, longest=6, batch=1)
    assert first.asked == 4
    for one, other in zip(first.scores, second.scores, strict=True):
        assert torch.equal(one, other)
        assert ((one >= 0) & (one <= 1)).all()
    assert model.hf.config._attn_implementation == "sdpa"


@torch.no_grad()
@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma3", "gpt_neox"])
def test_where_heads_look_is_what_eager_attention_says(family):
    """The card, check 4: prefill and a step, layers with a window included."""
    hf, ids = families.FAMILIES[family](), tokens()
    watch = retrieval.Looks(wrap(hf))
    with attach_runtimes(wrap(hf), [watch]):
        watch.looked = {}
        cache = hf(input_ids=ids[:, :-1], use_cache=True).past_key_values
        first = watch.looked
        watch.looked = {}
        hf(input_ids=ids[:, -1:], past_key_values=cache)
        second = watch.looked
    hf.set_attn_implementation("eager")
    for found, until in ((first, 19), (second, 20)):
        maps = hf(input_ids=ids[:, :until], output_attentions=True).attentions
        for layer, weights in enumerate(maps):
            assert torch.equal(found[layer], weights[:, :, -1].argmax(-1)), (family, layer)


# The causal check.


@torch.no_grad()
@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma3", "gpt_neox"])
def test_a_head_without_output_is_one_whose_columns_of_the_projection_are_zero(family):
    hf, ids = families.FAMILIES[family](), tokens()
    model = wrap(hf)
    plain = hf(input_ids=ids).logits
    with ablate(model, {1: [2]}):
        found = hf(input_ids=ids).logits
    assert torch.equal(hf(input_ids=ids).logits, plain)
    assert not torch.allclose(found, plain)
    block = model.anatomy.language.blocks[1]
    assert block.attention is not None
    out = hf.get_submodule(f"{block.path}.{block.attention.o}")
    width = out.weight.shape[1] // 4
    out.weight[:, 2 * width : 3 * width] = 0
    torch.testing.assert_close(found, hf(input_ids=ids).logits)


@torch.no_grad()
def test_a_head_made_uniform_sees_all_tokens_alike():
    hf, ids = families.llama(), tokens()
    with ablate(wrap(hf), {0: [0, 1, 2, 3]}, how="uniform"):
        found = hf(input_ids=ids, output_hidden_states=True).hidden_states[1]
    attention = hf.model.layers[0].self_attn
    attention.q_proj.weight.zero_()
    attention.q_proj.bias.zero_()
    torch.testing.assert_close(found, hf(input_ids=ids, output_hidden_states=True).hidden_states[1])


def test_ablation_ends_with_its_context_also_after_an_exception():
    hf = families.llama()
    for how in ("zero", "uniform"):
        with pytest.raises(RuntimeError, match="stop"), ablate(wrap(hf), {0: [1]}, how=how):
            raise RuntimeError("stop")
    assert not hf.model.layers[0].self_attn.o_proj._forward_pre_hooks
    assert hf.config._attn_implementation == "sdpa"
