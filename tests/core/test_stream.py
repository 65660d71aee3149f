"""The token stream: what leaves, comes back, merges or goes around a block, against naive computations."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import families
import pytest
import torch
from torch import Tensor

from paredown.core.attach import attach_runtimes, wrap
from paredown.core.runtime import Pass, Runtime
from paredown.core.stream import Stream

DECODERS = ("llama", "qwen3", "mistral", "gemma3", "gpt_neox", "phi", "mixtral", "qwen3_moe")
LENGTH = 14

Hook = Callable[[Stream], None]


class Acting(Runtime):
    """Calls ``before[l]`` and ``after[l]`` with the stream."""

    def __init__(self, model: Any, before: dict[int, Hook] | None = None, after: dict[int, Hook] | None = None) -> None:
        self.model = model
        self._before, self._after = before or {}, after or {}

    def before(self, layer: int, stream: Stream) -> None:
        self._before.get(layer, lambda _: None)(stream)

    def after(self, layer: int, stream: Stream) -> None:
        self._after.get(layer, lambda _: None)(stream)


def tokens(batch: int = 2, length: int = LENGTH, seed: int = 0) -> Tensor:
    return torch.randint(3, 90, (batch, length), generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def run(hf: Any, given: dict[str, Any], **hooks: Any) -> Any:
    model = wrap(hf)
    with attach_runtimes(model, [Acting(model, **hooks)]):
        return hf(**given)


def close(one: Tensor, other: Tensor) -> None:
    torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-5)


def stream(batch: int = 2, count: int = 6, *, past: int = 0, padding: Tensor | None = None) -> Stream:
    made = Stream(Pass(batch, count, past, padding, None))
    made.enter(torch.randn(batch, count, 5, generator=torch.Generator().manual_seed(0)))
    return made


def odd(s: Stream) -> Tensor:
    """Every second row; the newest stays."""
    rows = s.positions()
    return (rows % 2 == 1) & (rows < rows.max())


@pytest.mark.parametrize("family", DECODERS)
def test_a_stream_that_nobody_changes_changes_no_bit(family):
    hf, ids = families.FAMILIES[family](), tokens()
    with torch.no_grad():
        expected = hf(ids, use_cache=False).logits
    found = run(hf, {"input_ids": ids, "use_cache": False}, after={0: lambda s: s.keep(s.positions() >= 0)})
    assert torch.equal(found.logits, expected)


@pytest.mark.parametrize("family", DECODERS)
def test_rows_that_come_back_at_once_are_as_if_they_had_never_left(family):
    """Out of order, with their own rotary tables, masks and windows, in a ragged batch."""
    hf, ids = families.FAMILIES[family](), tokens()
    away: list[tuple[Tensor, ...]] = []

    def leave(s: Stream) -> None:
        gone = odd(s)
        assert (gone.sum(1) == LENGTH // 2 - 1).all()
        at = gone.nonzero()[:, 1].view(len(gone), -1)
        ids = s.position_ids().gather(-1, at)
        away.append((s.hidden.gather(1, at[..., None].expand(-1, -1, s.hidden.shape[2])), at, ids))
        s.keep(~gone)
        assert s.ordered

    def come(s: Stream) -> None:
        s.add(*away.pop())
        assert not s.ordered

    for cached in (False, True):
        with torch.no_grad():
            expected = hf(ids, use_cache=cached)
        found = run(hf, {"input_ids": ids, "use_cache": cached}, after={0: leave}, before={1: come})
        close(found.logits, expected.logits)
        assert found.logits.shape == expected.logits.shape


@torch.no_grad()
def test_rows_that_left_come_back_behind_the_last_block_as_they_were():
    hf, ids = families.llama(), tokens()
    found = run(hf, {"input_ids": ids, "use_cache": False}, after={1: lambda s: s.keep(~odd(s))})
    states = hf(ids, output_hidden_states=True).hidden_states
    body = hf.model
    gone = (torch.arange(LENGTH) % 2 == 1) & (torch.arange(LENGTH) < LENGTH - 1)
    close(found.logits[:, gone], hf.lm_head(body.norm(states[2][:, gone])))
    # The others run on at their own positions and see one another only.
    at = (~gone).nonzero()[:, 0]
    cos, sin = body.rotary_emb(states[2], torch.arange(LENGTH)[None])
    mask = (at[None] <= at[:, None])[None, None]
    out = body.layers[2](states[2][:, at], attention_mask=mask, position_embeddings=(cos[:, at], sin[:, at]))
    close(found.logits[:, at], hf.lm_head(body.norm(out)))


@pytest.mark.parametrize("family", DECODERS)
def test_a_ragged_padded_batch_is_its_rows(family):
    """Rows lose different numbers of tokens; fillers stand in front; a later pass sees what is there."""
    hf, ids = families.FAMILIES[family](), tokens()
    mask = torch.ones_like(ids)
    mask[1, :5] = 0

    def leave(s: Stream) -> None:
        assert s.now is not None
        if s.length == 1:
            return
        first = 0 if s.now.padding is None else s.now.padding.int().argmax(1, keepdim=True)
        own = s.positions() - first
        s.keep((own >= 0) & ((own % 3 != 1) | (own == 0)))

    def steps(given: Tensor, mask: Tensor) -> list[Tensor]:
        model, out = wrap(hf), None
        logits = []
        with attach_runtimes(model, [Acting(model, after={0: leave})]), torch.no_grad():
            for token in (given, torch.full((len(given), 1), 7), torch.full((len(given), 1), 8)):
                mask = mask if out is None else torch.cat([mask, mask.new_ones(len(mask), 1)], 1)
                at = (mask.cumsum(1) - 1).clamp_min(0)[:, -token.shape[1] :]
                cache = None if out is None else out.past_key_values
                kept = {"past_key_values": cache, "use_cache": True}
                out = hf(token, attention_mask=mask, position_ids=at, **kept)
                logits.append(out.logits[:, -1])
        return logits

    both = steps(ids, mask)
    for row, start in ((0, 0), (1, 5)):
        for one, other in zip(both, steps(ids[row : row + 1, start:], mask[row : row + 1, start:]), strict=True):
            close(one[row], other[0])


@torch.no_grad()
def test_rows_led_around_a_block_come_back_to_their_places_unchanged():
    hf, ids = families.llama(), tokens()
    seen: dict[str, Tensor] = {}

    def around(s: Stream) -> None:
        seen["before"] = s.hidden
        s.around(odd(s))
        assert s.hidden.shape[1] == LENGTH // 2 + 1

    def after(s: Stream) -> None:
        seen["after"] = s.hidden
        assert s.rows is None or torch.equal(s.rows[0], torch.arange(LENGTH))

    run(hf, {"input_ids": ids, "use_cache": True}, before={1: around}, after={1: after})
    gone = (torch.arange(LENGTH) % 2 == 1) & (torch.arange(LENGTH) < LENGTH - 1)
    assert torch.equal(seen["before"][:, gone], seen["after"][:, gone])
    assert not torch.equal(seen["before"][:, ~gone], seen["after"][:, ~gone])


@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma3"])
def test_renumbered_rows_are_rotated_anew(family):
    """RoPE knows distances alone: all positions moved alike change nothing, spread ones do."""
    hf, ids = families.FAMILIES[family](), tokens()
    with torch.no_grad():
        expected = hf(ids).logits
    moved = {0: lambda s: s.renumber(s.position_ids() + 11)}
    close(run(hf, {"input_ids": ids}, before=moved).logits, expected)
    spread = {0: lambda s: s.renumber(s.position_ids() * 2)}
    assert not torch.allclose(run(hf, {"input_ids": ids}, before=spread).logits, expected, atol=1e-3)


def test_merged_rows_are_means_weighted_by_their_sizes():
    s = stream(1, 5)
    h = s.hidden.clone()
    s.merge(torch.tensor([[0, 0, 2, 2, 4]]))
    assert s.positions().tolist() == [[0, 2, 4]]
    close(s.hidden[0], torch.stack([h[0, :2].mean(0), h[0, 2:4].mean(0), h[0, 4]]))
    assert s.sizes is not None
    assert s.sizes.tolist() == [[2, 2, 1]]
    s.merge(torch.tensor([[0, 0, 2]]))
    close(s.hidden[0], torch.stack([h[0, :4].mean(0), h[0, 4]]))
    assert s.sizes.tolist() == [[4, 1]]
    s.add(torch.ones(1, 1, 5), torch.tensor([[3]]), torch.tensor([[3]]))
    assert s.sizes.tolist() == [[4, 1, 1]]


def test_sizes_come_back_with_the_rows_that_were_led_around():
    s = stream(1, 5)
    s.merge(torch.tensor([[0, 0, 2, 3, 4]]))
    s.around(torch.tensor([[True, False, False, True]]))
    assert s.positions().tolist() == [[2, 3]]
    s.leave(s.hidden + 1)
    assert s.positions().tolist() == [[0, 2, 3, 4]]
    assert s.sizes is not None
    assert s.sizes.tolist() == [[2, 1, 1, 1]]


def test_positions_order_and_fillers():
    s = stream(2, 6, past=10, padding=torch.ones(2, 16, dtype=torch.bool).tril(13))
    assert s.positions().tolist() == [list(range(10, 16))] * 2
    assert s.real().tolist() == [[True] * 4 + [False] * 2, [True] * 5 + [False]]
    assert s.length == 6
    h = s.hidden.clone()
    s.keep(torch.tensor([[1, 0, 1, 1, 0, 0], [1, 1, 1, 1, 0, 1]], dtype=torch.bool))
    assert s.positions().tolist() == [[-1, -1, 10, 12, 13], [10, 11, 12, 13, 15]]
    assert not s.ordered
    assert s.real().tolist() == [[False, False, True, True, True], [True, True, True, True, False]]
    assert torch.equal(s.hidden[0, 2:], h[0, [0, 2, 3]])
    s.select(torch.tensor([[4, 2], [0, 3]]))
    assert s.positions().tolist() == [[13, 10], [10, 13]]
    assert not s.ordered
    s.enter(s.hidden + 1)
    s.keep(torch.tensor([[True, False], [False, True]]))
    assert s.ordered
    whole = s.restored()
    assert whole.shape == h.shape
    gone = torch.ones(2, 6, dtype=torch.bool)
    gone[:, [0, 3]] = False
    assert torch.equal(whole[gone], h[gone])
    assert torch.equal(whole[:, [0, 3]], h[:, [0, 3]] + 1)


def test_tokens_of_earlier_passes_leave_no_trace_in_this_passes_rows():
    s = stream(1, 2, past=4)
    h = s.hidden.clone()
    s.add(torch.ones(1, 2, 5), torch.tensor([[1, -1]]), torch.tensor([[1, 0]]))
    assert s.positions().tolist() == [[4, 5, 1, -1]]
    assert s.visual().tolist() == [[False] * 4]
    assert torch.equal(s.restored(), h)


def test_lengths_of_segments_follow_the_rows():
    """A vision tower without a batch axis tells its blocks where images end."""
    s = Stream(None, flat=True)
    s.enter(torch.randn(7, 3))
    s.keep(torch.tensor([[True, False, True, True, False, False, True]]))
    told = s.told({"cu_seqlens": torch.tensor([0, 4, 7], dtype=torch.int32), "other": "as it was"})
    assert told["cu_seqlens"].tolist() == [0, 3, 4]
    assert told["other"] == "as it was"
    assert s.state().shape == (4, 3)
