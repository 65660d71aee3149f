"""Attaching: seams that change nothing by themselves, are undone, refuse what cannot work, and count bytes truly."""

from __future__ import annotations

import contextlib
import gc
from typing import ClassVar

import families
import pytest
import torch
from transformers import DynamicCache, StaticCache

from paredown.core.attach import attach, attach_runtimes, wrap
from paredown.core.cache import PolicyLayer, Store, WindowStore, nbytes
from paredown.core.method import Policy
from paredown.core.runtime import Part, Runtime
from paredown.errors import PolicyError

DECODERS = ("llama", "qwen3", "mistral", "gemma3", "gpt_neox", "phi", "mixtral", "qwen3_moe_mixed")


class Everything(Runtime):
    """Keeps all tokens in the core's own store: the seams at work, nothing taken away."""

    def store(self, layer):
        return Store()


class Halves(Runtime):
    """Stores each KV head apart, in the order 1, 0."""

    def partition(self, layer):
        return [Part(torch.tensor([head]), Store) for head in (1, 0)]


class Streams(Runtime):
    """Hooks every block and changes nothing."""

    def after(self, layer, stream):
        pass


class Window(Runtime):
    def store(self, layer):
        return WindowStore(2, 3)


class ToyPolicy(Policy):
    name: ClassVar[str] = "toy"
    places: ClassVar = frozenset({"slots"})

    def runtime(self, model):
        return Window(self, model)


class ToyHeads(ToyPolicy):
    name: ClassVar[str] = "toy-heads"
    places: ClassVar = frozenset({"heads"})


def ids(batch=2, length=12, seed=0):
    return torch.randint(3, families.VOCAB, (batch, length), generator=torch.Generator().manual_seed(seed))


def attached(hf, kind):
    model = wrap(hf)
    return attach_runtimes(model, [kind(None, model)])


def generate(hf, tokens, **more):
    told = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None, "pad_token_id": 0, **more}
    with torch.no_grad():
        return hf.generate(tokens, **told)


@torch.no_grad()
def passes(hf, tokens, cuts, mask=None):
    """Return the logits of all tokens, read in passes that end at ``cuts``, and the cache."""
    cache, out, start = None, [], 0
    for stop in cuts:
        given = {} if mask is None else {"attention_mask": mask[:, :stop]}
        if mask is not None:
            given["position_ids"] = (mask.cumsum(1) - 1).clamp_min(0)[:, start:stop]
        told = hf(input_ids=tokens[:, start:stop], past_key_values=cache, use_cache=True, **given)
        cache, start = told.past_key_values, stop
        out.append(told.logits)
    return torch.cat(out, 1), cache


@pytest.mark.parametrize("kind", [Everything, Halves, Streams])
@pytest.mark.parametrize("family", DECODERS)
def test_seams_that_keep_everything_change_no_logits(family, kind):
    hf = families.FAMILIES[family]()
    if kind is Halves and getattr(hf.config, "num_key_value_heads", 4) != 2:
        pytest.skip("this family has more than two KV heads")
    tokens = ids()
    mask = torch.ones_like(tokens)
    mask[1, :4] = 0
    for cuts, given in (((12,), None), ((7, 8, 9, 12), None), ((7, 8, 9, 12), mask)):
        expected, _ = passes(hf, tokens, cuts, given)
        with attached(hf, kind):
            told, _ = passes(hf, tokens, cuts, given)
        real = slice(None) if given is None else given.bool()
        torch.testing.assert_close(told[real], expected[real], atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("family", DECODERS)
def test_generation_is_the_same_greedy_with_beams_and_padding(family):
    hf = families.FAMILIES[family]()
    tokens = ids()
    mask = torch.ones_like(tokens)
    mask[1, :4] = 0
    for more in ({}, {"num_beams": 3}, {"attention_mask": mask}, {"prefill_chunk_size": 5}):
        expected = generate(hf, tokens, **more)
        for kind in (Everything, Streams):
            with attached(hf, kind):
                assert torch.equal(generate(hf, tokens, **more), expected), (more, kind)


def test_a_second_turn_goes_on_with_the_kept_cache():
    hf = families.llama()
    first, more = ids(1, 8), ids(1, 5, seed=1)
    with attached(hf, Everything):
        cache = DynamicCache(config=hf.config)
        told = generate(hf, first, past_key_values=cache)
        again = generate(hf, torch.cat([told, more], 1), past_key_values=cache)
        assert cache.get_seq_length() == again.shape[1] - 1
    assert torch.equal(again, generate(hf, torch.cat([told, more], 1)))


@pytest.mark.parametrize("family", ["bert", "vit"])
def test_encoders_run_under_the_stream_unchanged(family):
    hf = families.FAMILIES[family]()
    given = families.inputs(family)
    expected = families.logits(hf, given)
    with attached(hf, Streams):
        assert torch.equal(families.logits(hf, given), expected)


def test_the_model_is_left_as_it_was_also_after_an_error():
    hf = families.gemma3()

    def found():
        hooks = [(len(m._forward_hooks), len(m._forward_pre_hooks)) for m in hf.modules()]
        names = [m.config._attn_implementation for m in hf.modules() if hasattr(m, "config")]
        return hooks, names, sorted(hf.__dict__), hf.training

    hf.train()
    before = found()
    expected = families.logits(hf, {"input_ids": ids()})
    with attached(hf, Everything):
        assert found() != before
    assert found() == before
    with contextlib.suppress(RuntimeError), attached(hf, Streams):
        raise RuntimeError
    assert found() == before
    with pytest.raises(IndexError), attached(hf, Everything):
        hf(input_ids=torch.tensor([[families.VOCAB + 5]]))
    assert found() == before
    assert torch.equal(families.logits(hf, {"input_ids": ids()}), expected)


def test_a_pass_that_failed_does_not_spoil_the_next_one():
    hf = families.llama()
    expected = families.logits(hf, {"input_ids": ids()})
    with attached(hf, Streams) as it:
        with pytest.raises(IndexError):
            hf(input_ids=torch.tensor([[families.VOCAB + 5]]))
        assert it.now is None
        assert torch.equal(families.logits(hf, {"input_ids": ids()}), expected)


def test_what_cannot_work_is_refused_in_one_sentence():
    hf = families.llama()
    with attach(hf, ToyPolicy(keep=0.5)):
        with pytest.raises(PolicyError, match="StaticCache"):
            hf(input_ids=ids(), past_key_values=StaticCache(config=hf.config, max_cache_len=32))
        with pytest.raises(PolicyError, match="attached to this model already"), attach(hf, ToyPolicy(keep=0.5)):
            pass
        with pytest.raises(PolicyError, match="offloaded"), torch.no_grad():
            hf.generate(ids(), cache_implementation="offloaded", max_new_tokens=2)
    filled = DynamicCache(config=hf.config)
    hf(input_ids=ids(), past_key_values=filled)
    with attach(hf, ToyPolicy(keep=0.5)):
        with pytest.raises(PolicyError, match="filled by the model without the policy"):
            hf(input_ids=ids(), past_key_values=filled)
        ours = hf(input_ids=ids(), use_cache=True).past_key_values
    with pytest.raises(PolicyError, match="no longer attached"):
        hf(input_ids=ids(length=1), past_key_values=ours)
    with attach(hf, ToyHeads(keep=0.5)), pytest.raises(PolicyError, match="another policy"):
        hf(input_ids=ids(length=1), past_key_values=ours)
    with attach(hf, ToyPolicy(keep=0.5)):
        hf(input_ids=ids(length=1), past_key_values=ours)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_compiled_model_is_refused():
    hf = families.llama()
    hf.forward = torch.compile(hf.forward)
    with pytest.raises(PolicyError, match="compiled"), attach(hf, ToyPolicy(keep=0.5)):
        pass


def test_a_model_on_several_devices_is_refused():
    hf = families.llama()
    hf.hf_device_map = {"model.layers.0": 0, "model.layers.1": 1}
    with pytest.raises(PolicyError, match="several devices"), attach(hf, ToyPolicy(keep=0.5)):
        pass


def test_policies_that_share_a_place_are_refused_before_anything_runs():
    hf = families.llama()
    with (
        pytest.raises(PolicyError, match="toy-heads and toy both decide on how the cache is kept"),
        attach(hf, ToyHeads(keep=0.5), ToyPolicy(keep=0.5)),
    ):
        pass
    assert not hf.model.layers[0]._forward_hooks


def test_a_policy_that_keeps_all_touches_nothing():
    hf = families.llama()
    with attach(hf, ToyPolicy(keep=1.0)):
        assert hf.config._attn_implementation == "sdpa"
        cache = hf(input_ids=ids(), use_cache=True).past_key_values
        assert not any(isinstance(layer, PolicyLayer) for layer in cache.layers)


def test_a_window_equals_attention_under_a_mask():
    """A query sees the first 2 tokens, the last 3 before its pass, and its own pass up to itself."""
    hf = families.llama()
    tokens, first = ids(1, 14), 6
    with attached(hf, Window):
        told, cache = passes(hf, tokens, (first, 9, 10, 11, 14))
        assert [layer.parts[0][1].entries.length for layer in cache.layers] == [5, 5, 5]
    starts = [0] * first + [6] * 3 + [9] + [10] + [11] * 3
    seen = torch.zeros(14, 14, dtype=torch.bool)
    for query, start in enumerate(starts):
        for key in range(query + 1):
            seen[query, key] = key < 2 or key >= start - 3
    with torch.no_grad():
        expected = hf(input_ids=tokens, attention_mask=seen[None, None]).logits
    torch.testing.assert_close(told, expected, atol=2e-5, rtol=1e-4)


def test_a_window_in_a_padded_batch_is_that_of_the_single_row():
    hf = families.llama()
    tokens = ids(2, 12)
    mask = torch.ones_like(tokens)
    mask[1, :5] = 0
    with attached(hf, Window):
        both = generate(hf, tokens, attention_mask=mask, return_dict_in_generate=True, output_logits=True)
        alone = generate(hf, tokens[1:, 5:], return_dict_in_generate=True, output_logits=True)
    for one, other in zip(both.logits, alone.logits, strict=True):
        torch.testing.assert_close(one[1:], other, atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("kind", [Everything, Window, Halves])
def test_bytes_are_those_that_live(kind):
    hf = families.llama()
    with attached(hf, kind) as it:
        gc.collect()
        before = _alive()
        cache = passes(hf, ids(4, 60), (50, 51, 52))[1]
        gc.collect()
        assert abs(_alive() - before - nbytes(cache)) <= 0.01 * nbytes(cache) + 64 * 8
        assert it.nbytes() == nbytes(cache)
        cache.reset()
        assert nbytes(cache) == 0


def _alive():
    tensors = [t for t in gc.get_objects() if issubclass(type(t), torch.Tensor)]
    return sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}.values())


def test_cropping_forgets_the_last_tokens():
    hf = families.llama()
    tokens = ids(2, 12)
    with attached(hf, Everything):
        expected, _ = passes(hf, tokens, (12,))
        _, cache = passes(hf, tokens, (9,))
        cache.crop(-3)
        assert cache.get_seq_length() == 6
        with torch.no_grad():
            told = hf(input_ids=tokens[:, 6:], past_key_values=cache).logits
    torch.testing.assert_close(told, expected[:, 6:], atol=2e-5, rtol=1e-4)


def test_gradients_flow_through_the_seams():
    hf = families.llama()
    expected = torch.autograd.grad(hf(input_ids=ids(), use_cache=False).logits.sum(), hf.model.embed_tokens.weight)[0]
    with attached(hf, Streams):
        told = torch.autograd.grad(hf(input_ids=ids(), use_cache=False).logits.sum(), hf.model.embed_tokens.weight)[0]
    torch.testing.assert_close(told, expected)
