"""The seam at the MLPs, and what a policy remembers of a sequence beside keys and values."""

from __future__ import annotations

import contextlib
from typing import Any

import families
import pytest
import torch

from paredown.core.attach import attach_runtimes, wrap
from paredown.core.companion import Companion, CompanionLayer
from paredown.core.runtime import Feed, Pass, Runtime
from paredown.errors import PolicyError


class Halved(Runtime):
    """Halves what the MLP of one layer adds."""

    def __init__(self, model: Any) -> None:
        self.model = model

    def feed(self, call: Feed) -> Any:
        if call.layer != 1:
            return None
        out = call.own(call.hidden)
        return tuple(0.5 * part for part in out) if isinstance(out, tuple) else 0.5 * out


class Counts(Runtime):
    """Remembers the ids of its sequences."""

    class Ids(Companion):
        told = ("ids",)

        def __init__(self) -> None:
            self.ids: torch.Tensor | None = None

    def __init__(self, model: Any) -> None:
        self.model = model

    def companion(self) -> Companion:
        return self.Ids()

    def begin(self, now: Pass) -> None:
        held = now.companions[self]
        assert isinstance(held, self.Ids)
        held.ids = now.ids if held.ids is None else torch.cat([held.ids, now.ids], 1)


@pytest.mark.parametrize("family", ["llama", "gemma3", "qwen3_moe", "gpt_neox", "phi"])
def test_a_policy_computes_an_mlp(family):
    hf, ids = families.FAMILIES[family](), torch.randint(3, 100, (2, 9))
    model = wrap(hf)
    part = model.anatomy.language.blocks[1]
    module = hf.get_submodule(f"{part.path}.{(part.mlp or part.experts).path}")
    handle = module.register_forward_hook(lambda _, __, out: 0.5 * out)
    with torch.no_grad():
        expected = hf(ids).logits
        handle.remove()
        plain = hf(ids).logits
        with attach_runtimes(model, [Halved(model)]):
            assert torch.equal(hf(ids).logits, expected)
        assert torch.equal(hf(ids).logits, plain)
    assert not any("forward" in vars(one) for one in hf.modules())


def test_it_is_taken_off_after_an_error_and_puts_back_what_was_there():
    hf = families.llama()
    model, mlp = wrap(hf), hf.model.layers[0].mlp
    calls = []
    own = mlp.forward
    mlp.forward = lambda hidden: (calls.append(1), own(hidden))[1]
    before = mlp.forward
    with contextlib.suppress(RuntimeError), attach_runtimes(model, [Halved(model)]):
        assert mlp.forward is not before
        hf(torch.tensor([[3, 4]]))
        raise RuntimeError
    assert mlp.forward is before
    assert calls == [1]
    assert "forward" not in vars(hf.model.layers[1].mlp)


def test_nothing_is_installed_for_runtimes_that_do_not_ask():
    hf = families.llama()
    model = wrap(hf)
    with attach_runtimes(model, [Counts(model)]):
        assert not any("forward" in vars(one) for one in hf.modules())


def test_blocks_that_are_one_module_are_refused():
    hf = families.llama()
    hf.model.layers[1].mlp = hf.model.layers[0].mlp
    model = wrap(hf)
    with pytest.raises(PolicyError, match="one and the same module"), attach_runtimes(model, [Halved(model)]):
        pass
    assert "forward" not in vars(hf.model.layers[0].mlp)


class TestCompanions:
    def test_they_follow_beams_crops_and_turns(self):
        hf, ids = families.llama(), torch.randint(3, 100, (2, 9))
        model = wrap(hf)
        options = {"max_new_tokens": 4, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
        with attach_runtimes(model, [Halved(model), Counts(model)]), torch.no_grad():
            told = hf.generate(ids, num_beams=3, return_dict_in_generate=True, **options)
            layer = told.past_key_values.layers[-1]
            assert isinstance(layer, CompanionLayer)
            held = layer.companion.ids
            assert held.shape == (6, 12)
            assert torch.equal(held[:, :9], ids.repeat_interleave(3, 0))
            # The beam that won is among those whose ids are remembered.
            for row in range(2):
                assert any(torch.equal(told.sequences[row, :12], beam) for beam in held[3 * row : 3 * row + 3])
            cache = hf(ids).past_key_values
            cache.crop(-3)
            cache.batch_repeat_interleave(2)
            cache = hf(ids.repeat_interleave(2, 0)[:, 6:8], past_key_values=cache).past_key_values
            assert torch.equal(cache.layers[-1].companion.ids, ids.repeat_interleave(2, 0)[:, :8])

    def test_without_a_cache_each_pass_starts_anew(self):
        hf, ids = families.llama(), torch.randint(3, 100, (2, 9))
        model = wrap(hf)
        with attach_runtimes(model, [Counts(model)]) as it:
            hf(ids, use_cache=False)
            hf(ids, use_cache=False)
            assert it.last is None

    def test_a_cache_changed_behind_its_back_is_refused(self):
        hf, ids = families.llama(), torch.randint(3, 100, (1, 9))
        model = wrap(hf)
        with attach_runtimes(model, [Counts(model)]), torch.no_grad():
            cache = hf(ids).past_key_values
            for layer in cache.layers[:-1]:
                layer.crop(-2)
            with pytest.raises(PolicyError, match="changed from outside"):
                hf(ids, past_key_values=cache)
