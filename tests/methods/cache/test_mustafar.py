"""Mustafar: the checks of its card, on models small enough to be exact."""

from __future__ import annotations

import itertools

import families
import pytest
import running
import torch

from paredown.core.cache import nbytes
from paredown.core.stores import elements
from paredown.core.stores.bitmap import tile_bytes
from paredown.errors import PolicyError
from paredown.methods.cache import mustafar
from paredown.methods.cache.mustafar import Mustafar, largest
from paredown.methods.cache.random_elements import RandomElements
from paredown.methods.cache.think import ThinK


@pytest.fixture
def _small_groups(monkeypatch):
    """Pack 64 tokens at a time, two groups in a segment: all parts are met within a hundred tokens."""
    monkeypatch.setattr(elements, "GROUP", 64)
    monkeypatch.setattr(elements, "SEGMENT", 2)


def content(cache, layer=0):
    """Return keys and values of a layer as attention sees them."""
    store = cache.layers[layer].stores[0]
    held = store.entries
    if not store.old:
        return held.keys, held.values
    return tuple(torch.cat([a, b], 2) for a, b in zip(store.whole(), (held.keys, held.values), strict=True))


@pytest.mark.parametrize("policy", [Mustafar(window=4), RandomElements(window=4)])
@pytest.mark.parametrize("family", running.FAMILIES)
def test_families(family, policy):
    running.check_family(family, policy)


@pytest.mark.usefixtures("_small_groups")
@pytest.mark.parametrize("policy", [Mustafar(window=4), RandomElements(window=4)])
def test_packed_rows_follow_padding_beams_and_turns(policy):
    hf, tokens = families.llama(), running.ids(2, 100)
    mask = running.padded(tokens, (100, 83))
    with policy.attach(hf):
        whole, cache = running.passes(hf, tokens, (80, *range(81, 101)), mask)
        assert cache.layers[0].stores[0].old == 64
        for row, count in enumerate((100, 83)):
            alone, _ = running.passes(hf, tokens[row : row + 1, -count:], (count - 20, *range(count - 19, count + 1)))
            torch.testing.assert_close(whole[row, -count:], alone[0], atol=3e-5, rtol=1e-3)
        beams = running.generate(hf, tokens, attention_mask=mask, num_beams=3)
        single = running.generate(hf, tokens[1:, -83:], num_beams=3)
        assert torch.equal(beams[1, 100:], single[0, 83:])


def test_short_prompts_and_keep_one_are_bit_identical():
    # Card: s = 0 bit-identical; T <= R bit-identical at any s.
    hf, tokens = families.llama(), running.ids()
    expected, _ = running.passes(hf, tokens, running.steps(24, 16))
    with Mustafar(keep=1).attach(hf):
        told, _ = running.passes(hf, tokens, running.steps(24, 16))
    assert torch.equal(told, expected)
    for share in (0.5, 0.1):
        with Mustafar(keep=share).attach(hf), torch.no_grad():
            _, cache = running.passes(hf, tokens, running.steps(24, 16))
            assert not cache.layers[0].stores[0]._sparse
    with pytest.raises(PolicyError, match=r"more bytes than all elements do"), Mustafar(keep=0.9).attach(hf):
        pass


def test_counts_match_the_rule_with_ties_and_zeros():
    # Card: row-wise kept counts match the rule, including ties and all-zero vectors.
    x = torch.tensor([[3.0, -1, 2, 0.5, -4, 1, 1, 1], [0] * 8, [1] * 8])
    assert largest(x, 0.5).tolist()[0] == [True, True, True, False, True, False, False, False]
    assert largest(x, 0.5).sum(-1).tolist() == [4, 4, 4]
    assert largest(x, 0.5)[2].tolist() == [True] * 4 + [False] * 4
    # The official rule: the threshold stays, and so do all that tie with it.
    assert largest(x, 0.5, "official").sum(-1).tolist() == [7, 8, 8]
    y = torch.randn(50, 8, generator=torch.Generator().manual_seed(0))
    assert (largest(y, 0.5, "official").sum(-1) == 8 - (4 - 1)).all()
    assert (largest(y, 0.3).sum(-1) == 8 - 5).all()


def test_pruned_vectors_are_the_best_of_their_size():
    # Card: kept entries are unchanged; the pruned vector is the best approximation in L2 (brute force, d = 8).
    for x in torch.randn(5, 8, generator=torch.Generator().manual_seed(1)):
        found = x * largest(x, 0.4)
        assert set(found[found != 0].tolist()) <= set(x.tolist())
        errors = []
        for chosen in itertools.combinations(range(8), 4):
            y = torch.zeros(8)
            y[list(chosen)] = x[list(chosen)]
            errors.append((x - y).norm())
        assert torch.isclose((x - found).norm(), min(errors))


@pytest.mark.usefixtures("_small_groups")
@pytest.mark.parametrize("policy", [Mustafar(window=4), RandomElements(window=4)])
def test_at_once_or_one_by_one_leaves_the_same_content(policy):
    # Card: prefilling T tokens then decoding n, or decoding all one by one, leaves the same pruned content. Deeper
    # layers read what earlier ones made of a sparse cache, so this holds for the first.
    hf, tokens = families.llama(), running.ids(2, 90)
    told = []
    with policy.attach(hf):
        for cuts in ((90,), (70, *range(71, 91)), tuple(range(1, 91)), (30, 70, 90)):
            _, cache = running.passes(hf, tokens, cuts)
            assert cache.layers[0].stores[0].old == 64
            assert cache.layers[0].stores[0]._sparse == 90 - 64 - 4
            told.append(content(cache))
    for keys, values in told[1:]:
        torch.testing.assert_close(keys, told[0][0], atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(values, told[0][1], atol=1e-5, rtol=1e-5)
    assert ((told[0][0] != 0).sum(-1)[:, :, :-4] <= 4).all()
    assert ((told[0][0] != 0).sum(-1)[:, :, -4:] == 8).all()


@pytest.mark.usefixtures("_small_groups")
@pytest.mark.parametrize("family", ["llama", "gpt_neox"])
def test_pieces_equal_the_expanded_cache(family, monkeypatch):
    # Card: packed products equal dense ones on the expanded cache (1e-6 in fp32); joining equals one softmax.
    hf, tokens = families.FAMILIES[family](), running.ids(2, 120)
    cuts = (100, *range(101, 121))
    with Mustafar(window=4).attach(hf):
        monkeypatch.setattr(elements.SparseElements, "expands", lambda *_: True)
        expanded, _ = running.passes(hf, tokens, cuts)
        monkeypatch.setattr(elements.SparseElements, "expands", lambda *_: False)
        pieces, _ = running.passes(hf, tokens, cuts)
    torch.testing.assert_close(pieces, expanded, atol=1e-5, rtol=1e-5)


@pytest.mark.usefixtures("_small_groups")
def test_bytes_are_those_that_live():
    hf, tokens = families.llama(), running.ids(1, 68)
    with Mustafar(window=4).attach(hf):
        _, cache = running.passes(hf, tokens, (68,))
    store = cache.layers[0].stores[0]
    assert (store.old, store.entries.length) == (64, 4)
    heads, width = 2, 8
    tiles = 0
    for packed in store._segments[0]:
        counts = [bin(b & (2**64 - 1)).count("1") for b in packed.bitmaps.flatten().tolist()]
        assert sum(counts) == 64 * heads * width // 2
        tiles += sum(tile_bytes(count, 4) for count in counts)
    dense = 2 * 4 * heads * 4 * width
    assert cache.layers[0].nbytes == tiles + 2 * heads * 8 + dense + 4 * 8  # tables, window, positions
    assert nbytes(cache) == sum(layer.nbytes for layer in cache.layers)


@pytest.mark.usefixtures("_small_groups")
def test_a_whole_group_waits_as_in_the_official_kernel():
    hf, tokens = families.llama(), running.ids(1, 70)
    with Mustafar(window=4, by_group=True).attach(hf):
        _, cache = running.passes(hf, tokens, (60,))
        assert ((content(cache)[0] != 0).sum(-1) == 8).all()
        _, cache = running.passes(hf, tokens, (70,))
        assert (content(cache)[0] != 0).sum(-1).unique_consecutive().tolist() == [4, 8, 4, 8]
    with Mustafar(window=4).attach(hf):
        _, cache = running.passes(hf, tokens, (60,))
        assert (content(cache)[0] != 0).sum(-1)[0, 0].tolist() == [4] * 56 + [8] * 4


@pytest.mark.usefixtures("_small_groups")
@pytest.mark.parametrize("stop", [205, 190, 128, 100, 40])
def test_cropping_goes_back_into_groups(stop):
    hf, tokens = families.qwen3(), running.ids(2, 210) % 60 + 3
    hf.config.max_position_embeddings = 256
    with Mustafar(window=4).attach(hf):
        _, cache = running.passes(hf, tokens, (210,))
        before = content(cache)
        assert cache.layers[0].stores[0].old == 192
        cache.crop(-(210 - stop))
        for now, then in zip(content(cache), before, strict=True):
            assert torch.equal(now, then[:, :, :stop])
        logits, cache = running.passes(hf, tokens[:, stop:], (1, 2, 5), cache=cache)
        assert cache.get_seq_length() == stop + 5
        assert torch.isfinite(logits).all()
        assert cache.layers[0].stores[0].old == (stop + 5 - 4) // 64 * 64


@pytest.mark.slow
def test_magnitudes_beat_chance_and_whole_channels_and_the_smallest_are_worst(monkeypatch):
    # Card: on a trained model, logit error of token-wise magnitude < a random mask at equal sparsity, and < channels
    # (ThinK) at 70 %; keeping the smallest instead must be clearly worse.
    exact, _ = running.replayed(8)

    def error(policy):
        return float((running.replayed(8, policy)[0] - exact).square().mean())

    for keep in (0.5, 0.3):
        sizes, chance = error(Mustafar(keep=keep)), error(RandomElements(keep=keep))
        assert sizes < chance
        with monkeypatch.context() as patch:
            patch.setattr(mustafar, "largest", lambda x, *given: largest(1 / (x.abs() + 1e-6), *given))
            assert error(Mustafar(keep=keep)) > 1.5 * sizes
    assert sizes < error(ThinK(keep=0.3))
