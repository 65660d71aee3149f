"""Stores that keep a share of the prompt, by the two controls that are made of them."""

from __future__ import annotations

from typing import Any

import families
import pytest
import torch
from torch import Tensor

from paredown.core.attach import attach
from paredown.methods.cache.random_tokens import RandomTokens
from paredown.methods.cache.streaming import Streaming

CONTROLS = (Streaming, RandomTokens)
LENGTH = 24


def tokens(batch: int = 1, length: int = LENGTH, seed: int = 0) -> Tensor:
    return torch.randint(3, families.VOCAB, (batch, length), generator=torch.Generator().manual_seed(seed))


def held(cache: Any, row: int = 0) -> list[list[int]]:
    """Positions that each layer holds."""
    found = []
    for layer in cache.layers:
        entries = layer.stores[0].entries
        at = range(entries.length) if entries.positions is None else entries.positions[row].tolist()
        found.append([p for p in at if p >= 0])
    return found


@torch.no_grad()
def steps(hf: Any, cache: Any, count: int) -> Any:
    for token in range(count):
        hf(torch.tensor([[5 + token]]), past_key_values=cache)
        yield cache


@pytest.mark.parametrize("keep", [0.1, 0.5, 0.8])
def test_both_hold_equally_many_at_every_step_and_the_newest(keep):
    counts = []
    for control in CONTROLS:
        hf = families.llama()
        with attach(hf, control(keep=keep)), torch.no_grad():
            cache = hf(tokens(), use_cache=True).past_key_values
            found = [held(cache)]
            found += [held(now) for now in steps(hf, cache, 30)]
        for seen, layers in enumerate(found):
            assert layers[0] == layers[1] == layers[2]
            assert layers[0] == sorted(layers[0])
            assert layers[0][-1] == LENGTH + seen - 1
        counts.append([len(layers[0]) for layers in found])
    assert counts[0] == counts[1] == [round(keep * LENGTH)] * 31


@pytest.mark.parametrize("control", CONTROLS)
def test_rows_with_padding_have_their_own_budgets(control):
    hf, ids = families.llama(), tokens(batch=3)
    mask = torch.ones_like(ids)
    mask[1, :7], mask[2, :20] = 0, 0
    options = {"max_new_tokens": 9, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    options |= {"return_dict_in_generate": True, "output_logits": True}
    with attach(hf, control(keep=0.5)), torch.no_grad():
        both = hf.generate(ids, attention_mask=mask, **options)
        for row, pad in ((0, 0), (1, 7), (2, 20)):
            alone = hf.generate(ids[row : row + 1, pad:], **options)
            for one, other in zip(both.logits, alone.logits, strict=True):
                torch.testing.assert_close(one[row], other[0], atol=1e-5, rtol=1e-5)
            own = [[p - pad for p in layer] for layer in held(both.past_key_values, row)]
            assert own == held(alone.past_key_values)
            assert len(own[0]) == round(0.5 * (LENGTH - pad))


def test_chunks_and_turns_add_to_the_prompt_and_answers_do_not():
    for control in CONTROLS:
        hf = families.llama()
        with attach(hf, control(keep=0.5)), torch.no_grad():
            cache = hf(tokens(length=10), use_cache=True).past_key_values
            assert len(held(cache)[0]) == 5
            hf(tokens(length=14), past_key_values=cache)
            assert len(held(cache)[0]) == 12
            for now in steps(hf, cache, 4):
                assert len(held(now)[0]) == 12
            hf(tokens(length=6), past_key_values=cache)
            assert len(held(cache)[0]) == 15
            cache.crop(-33)
            assert held(cache)[0] == [] or max(held(cache)[0]) < 1


def test_streaming_keeps_both_ends():
    hf = families.llama()
    with attach(hf, Streaming(keep=0.5, sink=3)), torch.no_grad():
        cache = hf(tokens(), use_cache=True).past_key_values
        assert held(cache)[0] == [0, 1, 2, *range(15, 24)]
        for _ in steps(hf, cache, 2):
            pass
        assert held(cache)[0] == [0, 1, 2, *range(17, 26)]
    with attach(hf, Streaming(keep=0.01)), torch.no_grad():
        assert held(hf(tokens(), use_cache=True).past_key_values)[0] == [23]


def test_chance_is_of_the_seed_and_the_prompt():
    hf = families.llama()

    def drawn(seed: int, prompt: int) -> list[int]:
        with attach(hf, RandomTokens(keep=0.5, seed=seed)), torch.no_grad():
            return held(hf(tokens(seed=prompt), use_cache=True).past_key_values)[0]

    assert drawn(0, 0) == drawn(0, 0)
    assert drawn(0, 0) != drawn(1, 0)
    assert drawn(0, 0) != drawn(0, 1)
    # Every position but the newest is as likely as another.
    counts = torch.zeros(LENGTH)
    for seed in range(120):
        counts[drawn(seed, 0)] += 1
    assert counts[-1] == 120
    expected = 120 * 11 / 23
    assert (counts[:-1] - expected).abs().max() < 4 * (120 * 0.25) ** 0.5


def test_answers_push_out_the_prompt_by_chance_before_they_go_themselves():
    hf = families.llama()
    with attach(hf, RandomTokens(keep=0.5)), torch.no_grad():
        cache = hf(tokens(), use_cache=True).past_key_values
        before = set(held(cache)[0])
        for step, now in enumerate(steps(hf, cache, 15)):
            kept = set(held(now)[0])
            assert {p for p in kept if p < LENGTH} <= before
            newest = set(range(LENGTH, LENGTH + step + 1))
            assert newest <= kept or kept == set(range(LENGTH + step - 11, LENGTH + step + 1))
