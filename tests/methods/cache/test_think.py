"""ThinK: the checks of its card, on models small enough to be exact."""

from __future__ import annotations

import families
import pytest
import running
import torch

from paredown.core.attach import attach
from paredown.core.cache import PolicyLayer, nbytes
from paredown.methods.cache import think
from paredown.methods.cache.random_channels import RandomChannels
from paredown.methods.cache.think import ThinK, scores

SMALL = {"window": 4, "recent": 4}


def store_of(cache, layer=0):
    return cache.layers[layer].stores[0]


@pytest.mark.parametrize("policy", [ThinK(keep=0.5, **SMALL), RandomChannels(keep=0.5, recent=4)])
@pytest.mark.parametrize("family", running.FAMILIES)
def test_families(family, policy):
    running.check_family(family, policy)


def test_ratio_zero_is_bit_identical():
    # Card: ratio 0 is bit-identical. Also a keep that removes not even one of the 8 channels.
    hf, tokens = families.llama(), running.ids()
    expected, _ = running.passes(hf, tokens, running.steps(24, 16))
    for keep in (1.0, 0.9):
        with ThinK(keep=keep, **SMALL).attach(hf):
            told, _ = running.passes(hf, tokens, running.steps(24, 16))
        torch.testing.assert_close(told, expected, atol=0 if keep == 1 else 2e-5, rtol=0 if keep == 1 else 1e-4)


def test_dead_channels_go_first_and_change_nothing():
    # Card: a key channel that is zero for all tokens goes first, and pruning it changes nothing.
    hf, tokens = families.llama(), running.ids()
    with torch.no_grad():
        for layer in hf.model.layers:
            projection = layer.self_attn.k_proj
            # RoPE turns channel i with i + d/2: a dead pair stays dead.
            dead = [0, 3, 4, 7, 8 + 1, 8 + 2, 8 + 5, 8 + 6]
            projection.weight[dead], projection.bias[dead] = 0, 0
    expected, _ = running.passes(hf, tokens, running.steps(24, 16))
    with ThinK(keep=0.5, **SMALL).attach(hf):
        told, cache = running.passes(hf, tokens, running.steps(24, 16))
    torch.testing.assert_close(told, expected, atol=1e-5, rtol=1e-4)
    assert store_of(cache).index[0].tolist() == [[1, 2, 5, 6], [0, 3, 4, 7]]


def test_score_is_the_brute_force_norm():
    # Card: the score equals |q_i k_i^T|_F^2; scaling all queries changes no choice; groups are averaged.
    generator = torch.Generator().manual_seed(0)
    query, keys = torch.randn(2, 4, 5, 8, generator=generator), torch.randn(2, 2, 9, 8, generator=generator)
    told = scores(query, keys)
    for row, head, channel in ((0, 0, 0), (1, 1, 7), (0, 1, 3)):
        norms = [
            torch.outer(query[row, q, :, channel], keys[row, head, :, channel]).square().sum()
            for q in (2 * head, 2 * head + 1)
        ]
        torch.testing.assert_close(told[row, head, channel], sum(norms) / 2)
    assert torch.equal(scores(query * 7, keys).argsort(-1), told.argsort(-1))


@pytest.mark.parametrize("family", ["llama", "gpt_neox"])
def test_gather_equals_zeros_across_the_recent_border(family):
    # Card: the gathered computation equals the zero-filled reference to 1e-6 (GQA and MHA), 20 steps on.
    hf, tokens = families.FAMILIES[family](), running.ids(2, 40)
    told = {}
    for reference in (False, True):
        with ThinK(keep=0.5, **SMALL, reference=reference).attach(hf):
            told[reference], _ = running.passes(hf, tokens, (10, 16, *range(17, 41)))
    torch.testing.assert_close(told[False], told[True], atol=1e-5, rtol=1e-5)
    whole, _ = running.passes(hf, tokens, (40,))
    assert (told[False][:, :10] - whole[:, :10]).abs().max() < 1e-4  # the prompt's own attention is exact
    assert (told[False][:, 16:] - whole[:, 16:]).abs().max() > 1e-3  # and what follows is not


def test_bytes_are_those_of_the_formula():
    # Card: (T - recent) * (d - floor(ratio * d)) + recent * d for each KV head, plus the index; nothing else lives.
    hf, tokens = families.llama(), running.ids(2, 30)
    with ThinK(keep=0.6, **SMALL).attach(hf):
        _, cache = running.passes(hf, tokens, (30,))
    heads, width, gone = 2, 8, 3
    keys = (30 - 4) * (width - gone) + 4 * width
    others = 2 * (4 * 8 + 1)  # logical positions of the recent tokens, and whether a row has chosen
    expected = 2 * heads * (4 * keys + 4 * 30 * width + 8 * (width - gone))
    told = cache.layers[0].nbytes
    assert told == expected + others
    assert nbytes(cache) == sum(layer.nbytes for layer in cache.layers)
    assert store_of(cache)._queries is None


def test_choice_is_exact_ascending_made_once_and_short_prompts_are_left_alone():
    hf, tokens = families.llama(), running.ids(2, 40)
    with ThinK(keep=0.6, **SMALL).attach(hf):
        _, cache = running.passes(hf, tokens, (4, 5, 6))
        assert store_of(cache).old == 0  # T <= recent: nothing to do, and tokens read singly keep all
        _, cache = running.passes(hf, tokens, (20, 22, 23), cache=cache)
        store = store_of(cache)
        first = store.index.clone()
        assert store.old == 28 - 4
        assert first.shape == (2, 2, 5)
        assert torch.equal(first, first.sort(-1).values)
        _, cache = running.passes(hf, tokens, (8,), cache=cache)
        assert torch.equal(store.index, first)
        assert store.old == 37 - 4


def test_window_is_kept_across_passes():
    # The last 8 queries of two passes of 5, where only the second is longer than `recent`.
    hf, tokens = families.llama(), running.ids(1, 10)
    seen = []

    with ThinK(keep=0.5, window=8, recent=6).attach(hf) as attachment:
        plain = attachment.attention

        def spy(seat, call):
            if seat.layer == 0:
                seen.append((call.query, call.key))
            return plain(seat, call)

        attachment.attention = spy
        _, cache = running.passes(hf, tokens, (5, 10))
    query, keys = (torch.cat([part[i] for part in seen], 2) for i in (0, 1))
    best = scores(query[:, :, -8:], keys).sort(dim=-1, descending=True, stable=True).indices[..., :4].sort(-1).values
    assert torch.equal(store_of(cache).index, best)


def test_rows_too_short_to_choose_wait_as_they_would_alone():
    hf, tokens = families.llama(), running.ids(2, 30)
    mask = running.padded(tokens, (30, 20))
    cuts = (14, 24, 25, 26, 30)  # the second row has 4 tokens after the first pass: no more than `recent`
    with ThinK(keep=0.5, **SMALL).attach(hf):
        whole, cache = running.passes(hf, tokens, cuts, mask)
        alone, single = running.passes(hf, tokens[1:, 10:], (4, 14, 15, 16, 20))
    assert torch.equal(store_of(cache).index[1], store_of(single).index[0])
    torch.testing.assert_close(whole[1, 10:], alone[0], atol=3e-5, rtol=1e-3)


def test_cropping_forgets_and_goes_on():
    hf, tokens = families.llama(), running.ids(1, 30)
    for stop in (22, 9):
        with ThinK(keep=0.5, **SMALL).attach(hf):
            _, cache = running.passes(hf, tokens, (20, 21, 22, 23, 24))
            cache.crop(-(24 - stop))
            again, cache = running.passes(hf, tokens[:, stop:], (1, 2), cache=cache)
            assert cache.get_seq_length() == stop + 2
            if stop == 22:
                expected, _ = running.passes(hf, tokens, (20, 21, 22, 23, 24))
                torch.testing.assert_close(again, expected[:, 22:24], atol=1e-5, rtol=1e-4)


def test_only_layers_that_grow_are_touched_and_other_policies_may_divide_heads():
    # Gemma 3: sliding layers are bounded already. A partition hands the store some heads only.
    from paredown.core.runtime import Part, Runtime

    class Halves(Runtime):
        def partition(self, layer):
            return [Part(torch.tensor([head]), None) for head in (1, 0)]

    class Divided(ThinK):
        name = "divided"
        places = frozenset({"heads"})

        def runtime(self, model):
            return Halves(self, model)

    hf, tokens = families.gemma3(), running.ids()
    policy = ThinK(keep=0.5, **SMALL)
    with policy.attach(hf):
        expected, cache = running.passes(hf, tokens, running.steps(24, 16))
        assert [isinstance(layer, PolicyLayer) for layer in cache.layers] == [False, True, False, True]
    with attach(hf, Divided(), policy):
        told, cache = running.passes(hf, tokens, running.steps(24, 16))
        assert len(cache.layers[1].stores) == 2
    torch.testing.assert_close(told, expected, atol=1e-5, rtol=1e-4)


@pytest.mark.slow
def test_queries_choose_better_than_norms_and_chance_and_the_reverse_is_worst(monkeypatch):
    # Card: logit error of the query-driven choice <= key norms only <= chance, on a trained model; 'highest' instead of
    # 'lowest' must fail this.
    exact, _ = running.replayed(8)
    found = {}

    def error(name, policy):
        told, hits = running.replayed(8, policy)
        found[name] = (float((told - exact).square().mean()), hits)

    error("queries", ThinK(keep=0.5))
    chance = []
    for seed in range(3):
        error("chance", RandomChannels(keep=0.5, seed=seed))
        chance.append(found.pop("chance")[0])
    monkeypatch.setattr(think, "scores", lambda queries, keys, real=None: keys.square().sum(2))
    error("norms", ThinK(keep=0.5))
    monkeypatch.setattr(think, "scores", lambda *given: -scores(*given))
    error("reverse", ThinK(keep=0.5))
    assert found["queries"][0] <= found["norms"][0] <= sum(chance) / 3 < found["reverse"][0], (found, chance)
    assert found["queries"][1] > found["reverse"][1]
