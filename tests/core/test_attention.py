"""Attention under a policy: masks by logical position, packed groups, statistics against full attention maps."""

from __future__ import annotations

import families
import pytest
import torch

from paredown.core import attention
from paredown.core.attach import attach_runtimes, wrap
from paredown.core.attention import Call, capture, column_sums, compute, probabilities, visible
from paredown.core.cache import ends, packed
from paredown.core.runtime import Pass, Runtime

HEADS, KV, WIDTH = 6, 2, 8


def call(queries, keys, *, past=0, mask=None, rows=None, ordered=True, causal=True, batch=2, padding=None):
    generator = torch.Generator().manual_seed(queries * 31 + keys)
    module = torch.nn.Module()
    module.is_causal, module.num_key_value_groups = causal, HEADS // KV

    def own(module, query, key, value, mask, scaling, **_):
        key, value = (t.repeat_interleave(HEADS // KV, 1) for t in (key, value))
        top_left = mask is None and query.shape[2] > 1 and causal
        out = torch.nn.functional.scaled_dot_product_attention(query, key, value, mask, 0.0, top_left, scale=scaling)
        return out.transpose(1, 2), None

    def draw(heads, count):
        return torch.randn(batch, heads, count, WIDTH, generator=generator)

    now = Pass(batch, queries, past, padding, None)
    made = Call(module, 0, draw(HEADS, queries), draw(KV, queries), draw(KV, queries), mask, 0.3, own, {}, now, rows)
    made.ordered = ordered
    return made, draw(KV, keys), draw(KV, keys)


def reference(made, keys, values, seen):
    keys, values = (t.repeat_interleave(HEADS // KV, 1) for t in (keys, values))
    logits = made.query @ keys.transpose(-1, -2) * made.scaling
    weights = logits.masked_fill(~seen, -torch.inf).softmax(-1)
    return (weights @ values).transpose(1, 2), weights


@pytest.mark.parametrize(("queries", "keys", "past"), [(5, 5, 0), (1, 9, 8), (4, 9, 5), (80, 90, 10)])
def test_contiguous_keys_are_seen_causally(queries, keys, past):
    made, k, v = call(queries, keys, past=past)
    seen = torch.arange(keys) <= (torch.arange(queries) + past)[:, None]
    expected, weights = reference(made, k, v, seen)
    torch.testing.assert_close(compute(made, k, v, visible(made, None, keys)), expected)
    torch.testing.assert_close(column_sums(made, k, None), weights.sum(2), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("kind", ["none", "bool", "float", "padding"])
def test_held_entries_are_picked_from_the_models_mask_by_position(kind):
    """Positions with gaps, out of order, an empty slot; queries that are a subset of the pass."""
    past, length, stop = 6, 5, 11
    held = torch.tensor([[0, 2, 9, 7, -1, 3], [1, 2, 3, 6, 8, 10]])
    rows = torch.tensor([[6, 9, 10], [7, 8, 10]])
    real = torch.ones(2, stop, dtype=torch.bool)
    real[1, :3] = False
    hidden = torch.rand(2, 1, length, stop, generator=torch.Generator().manual_seed(1)) < 0.2
    causal = torch.arange(stop) <= (torch.arange(length) + past)[:, None]
    whole = causal[None, None] & ~hidden
    whole[..., 0] = True  # every query sees something
    masks = {
        "none": None,
        "bool": whole,
        "float": torch.zeros(whole.shape).masked_fill(~whole, torch.finfo(torch.float32).min),
        "padding": real,
    }
    made, k, v = call(3, 6, past=past, mask=masks[kind], rows=rows, padding=real if kind == "padding" else None)
    table = {"none": causal.expand(2, 1, -1, -1), "padding": causal & real[:, None, None]}.get(kind, whole)
    seen = torch.zeros(2, 1, 3, 6, dtype=torch.bool)
    for b in range(2):
        for q in range(3):
            for j in range(6):
                seen[b, 0, q, j] = held[b, j] >= 0 and table[b, 0, rows[b, q] - past, held[b, j]]
    expected, _ = reference(made, k, v, seen)
    torch.testing.assert_close(compute(made, k, v, visible(made, held, 6)), expected)
    heads = held[:, None].expand(-1, KV, -1)
    torch.testing.assert_close(compute(made, k, v, visible(made, heads, 6)), expected)


def test_a_merged_entry_counts_as_often_as_its_size():
    made, k, v = call(1, 4, past=3)
    sizes = torch.tensor([[1.0, 3.0, 1.0, 2.0]]).expand(2, -1)
    repeated = torch.tensor([0, 1, 1, 1, 2, 3, 3])
    expected, _ = reference(made, k[:, :, repeated], v[:, :, repeated], torch.ones(7, dtype=torch.bool))
    torch.testing.assert_close(compute(made, k, v, visible(made, None, 4, sizes)), expected)


def test_probabilities_of_a_query_that_sees_nothing_are_zero():
    made, k, _ = call(2, 3)
    seen = torch.tensor([[True, False, True], [False, False, False]])[None, None]
    found = probabilities(made.query, k, 0.3, seen)
    assert torch.equal(found[:, :, 1], torch.zeros(2, HEADS, 3))
    torch.testing.assert_close(found[:, :, 0].sum(-1), torch.ones(2, HEADS))


def test_column_sums_leave_padding_out_and_do_not_depend_on_the_block(monkeypatch):
    padding = torch.ones(2, 20, dtype=torch.bool)
    padding[0, :6] = False
    made, k, v = call(20, 20, mask=padding, padding=padding)
    seen = (torch.arange(20) <= torch.arange(20)[:, None]) & padding[:, None, None]
    weights = reference(made, k, v, seen)[1].nan_to_num(0.0) * padding[:, None, :, None]
    torch.testing.assert_close(column_sums(made, k, None), weights.sum(2), atol=1e-5, rtol=1e-5)
    monkeypatch.setattr(attention, "ROWS_AT_ONCE", 3)
    torch.testing.assert_close(column_sums(made, k, None), weights.sum(2), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma3"])
def test_captured_queries_and_keys_give_the_models_own_attention(family):
    hf = families.FAMILIES[family]()
    tokens = torch.randint(3, families.VOCAB, (2, 6), generator=torch.Generator().manual_seed(0))
    found = {}

    class Scores(Runtime):
        def before(self, layer, stream):
            block = hf.model.layers[layer]
            q, k, _, scaling = capture(block.self_attn, block.input_layernorm(stream.hidden), stream.block)
            found[layer] = probabilities(q[:, :, -1:], k, scaling)[:, :, 0]

    hf.set_attn_implementation("eager")
    with torch.no_grad():
        maps = hf(input_ids=tokens, output_attentions=True).attentions
    hf.set_attn_implementation("sdpa")
    model = wrap(hf)
    with attach_runtimes(model, [Scores(None, model)]), torch.no_grad():
        hf(input_ids=tokens)
    for layer, expected in enumerate(maps):
        torch.testing.assert_close(found[layer], expected[:, :, -1], atol=1e-5, rtol=1e-4)


def test_ends_and_packed_are_per_row():
    real = torch.tensor([[1, 1, 1, 1, 1, 1], [0, 0, 1, 1, 1, 1], [0, 0, 0, 0, 1, 1]]).bool()
    assert ends(real, 1, 2).tolist() == [[0, 4, 5], [2, 4, 5], [-1, 4, 5]]
    assert packed(torch.tensor([[True, False, True], [False, True, False]])).tolist() == [[0, 2], [-1, 1]]
