"""Heads of two kinds: which are which, and the ring that streaming heads keep."""

from __future__ import annotations

import families
import pytest
import torch

from paredown.core import heads
from paredown.core.attach import attach_runtimes, wrap
from paredown.core.cache import WindowStore, nbytes
from paredown.core.runtime import Runtime
from paredown.errors import ArchitectureError


@pytest.mark.parametrize("keep", [0.1, 0.25, 0.5, 0.9, 1.0])
def test_the_count_is_exact_and_ties_go_to_the_lower_index(keep):
    scores = ((0.5, 0.5), (), (0.5, 0.9, 0.5))
    chosen = heads.best(scores, keep)
    assert sum(map(len, chosen)) == -(-int(5 * keep * 100) // 100)
    assert chosen[1] == ()
    order = [(2, 1), (0, 0), (0, 1), (2, 0), (2, 2)]
    expected = order[: sum(map(len, chosen))]
    assert {(layer, head) for layer, found in enumerate(chosen) for head in found} == set(expected)


def test_layers_with_a_window_do_not_count():
    assert heads.shape(wrap(families.gemma3())) == (0, 2, 0, 2)
    assert heads.shape(wrap(families.llama())) == (2, 2, 2)
    assert heads.sliding(wrap(families.gemma3())) == (True, False, True, False)
    with pytest.raises(ArchitectureError, match="no layer of MistralForCausalLM keeps all tokens"):
        heads.shape(wrap(families.mistral()))


class Kept(Runtime):
    """All heads in one kind of window."""

    def __init__(self, kind):
        self.kind = kind

    def store(self, layer):
        return self.kind(2, 5)


@torch.no_grad()
@pytest.mark.parametrize(
    "cuts", [(12, *range(13, 33)), (3, *range(4, 33)), (9, 10, 11, 18, 19, 20, 32), (32,), (7, 8, 32)]
)
def test_a_ring_is_the_plain_window(cuts):
    """The same numbers whether tokens are overwritten in place or the middle is cut out at each step."""
    hf = families.llama()
    tokens = torch.randint(3, families.VOCAB, (2, 32), generator=torch.Generator().manual_seed(0))
    found = []
    for kind in (WindowStore, heads.RingStore):
        out, start, cache = [], 0, None
        with attach_runtimes(wrap(hf), [Kept(kind)]):
            for stop in cuts:
                told = hf(input_ids=tokens[:, start:stop], past_key_values=cache, use_cache=True)
                cache, start = told.past_key_values, stop
                out.append(told.logits)
            # Beams, a crop, and on.
            cache.reorder_cache(torch.tensor([1, 1]))
            cache.crop(-2)
            out.append(hf(input_ids=tokens[:, :3], past_key_values=cache, use_cache=True).logits)
        found.append(torch.cat(out, 1))
    torch.testing.assert_close(found[0], found[1])


@torch.no_grad()
def test_a_full_ring_neither_moves_nor_grows():
    hf = families.llama()
    with attach_runtimes(wrap(hf), [Kept(heads.RingStore)]):
        cache = hf(input_ids=torch.full((2, 20), 5), use_cache=True).past_key_values
        tensors = list(cache.layers[0].tensors())
        bytes_ = nbytes(cache)
        for _ in range(30):
            hf(input_ids=torch.full((2, 1), 5), past_key_values=cache, use_cache=True)
        after = list(cache.layers[0].tensors())
    assert [t.data_ptr() for t in tensors] == [t.data_ptr() for t in after]
    # K and V, 3 layers, 2 rows, 2 heads, sink + recent and the slot of the newest, 8 channels, 4 bytes.
    assert nbytes(cache) == bytes_ == 2 * 3 * 2 * 2 * (2 + 5 + 1) * 8 * 4
    assert cache.get_seq_length() == 50
