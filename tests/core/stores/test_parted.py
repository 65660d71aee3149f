"""Caches in two forms go with tokens that were dropped in the stream: positions, padding and pieces stay in step."""

from __future__ import annotations

import families
import pytest
import torch

from paredown.core.attach import attach_runtimes, wrap
from paredown.core.runtime import Runtime
from paredown.core.stores import elements
from paredown.core.stores.elements import SparseElements
from paredown.core.stores.thin import ThinKeys


class Drops(Runtime):
    """Lets a third of a prompt's tokens go after the first block."""

    def after(self, layer, stream):
        if layer == 0 and stream.now.length > 1:
            stream.keep(stream.now.ids % 3 != 0)


class Loses(Runtime):
    """Keeps the channels 1, 2, 5 and 6 of old keys."""

    class Store(ThinKeys):
        def score(self, call):
            told = torch.tensor([0.0, 1, 1, 0, 0, 1, 1, 0])
            return told.expand(*call.key.shape[:2], -1)

    def store(self, layer):
        return self.Store(0.5, 4)


class Packs(Runtime):
    """Packs old tokens and loses nothing."""

    class Store(SparseElements):
        def stays(self, elements, kind, at):
            return torch.ones_like(elements, dtype=torch.bool)

    def store(self, layer):
        return self.Store(4)


@torch.no_grad()
def read(hf, kinds, tokens, cuts, mask):
    model, out, cache, start = wrap(hf), [], None, 0
    with attach_runtimes(model, [kind(None, model) for kind in kinds]):
        for stop in cuts:
            where = (mask.cumsum(1) - 1).clamp_min(0)[:, start:stop]
            told = hf(tokens[:, start:stop], attention_mask=mask[:, :stop], position_ids=where, past_key_values=cache)
            cache, start = told.past_key_values, stop
            out.append(told.logits)
    return torch.cat(out, 1), cache


def without_half_of_the_channels():
    hf = families.llama()
    with torch.no_grad():
        for layer in hf.model.layers:
            projection = layer.self_attn.k_proj
            dead = [head * 8 + i for head in (0, 1) for i in (0, 3, 4, 7)]
            projection.weight[dead], projection.bias[dead] = 0, 0
    return hf


@pytest.mark.parametrize("kind", [Loses, Packs])
@pytest.mark.parametrize("pieces", [True, False])
def test_dropped_tokens_padding_and_later_passes(kind, pieces, monkeypatch):
    monkeypatch.setattr(elements, "GROUP", 64)
    monkeypatch.setattr(elements, "SEGMENT", 1)
    for store in (ThinKeys, SparseElements):
        monkeypatch.setattr(store, "expands", lambda *_: not pieces)
    hf = without_half_of_the_channels()
    tokens = torch.randint(3, families.VOCAB, (2, 128), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(tokens)
    mask[1, :9] = 0
    cuts = (106, 107, 108, 120, 121, 128)
    expected, _ = read(hf, [Drops], tokens, cuts, mask)
    told, cache = read(hf, [Drops, kind], tokens, cuts, mask)
    torch.testing.assert_close(told[mask.bool()], expected[mask.bool()], atol=3e-5, rtol=1e-3)
    assert cache.layers[0].stores[0].old >= cache.layers[1].stores[0].old >= 64
    plain, _ = read(hf, [], tokens, cuts, mask)
    assert (told - plain)[mask.bool()].abs().max() > 1e-2
