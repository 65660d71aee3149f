"""Unified Layer Skipping, static and while decoding: every check of its card but those of its training."""

from __future__ import annotations

import contextlib
import itertools
from copy import deepcopy
from typing import Any

import families
import matrix
import pytest
import running
import torch
import transformers as tf
from torch import Tensor

from paredown.core import surgery
from paredown.core.attach import attach
from paredown.core.cache import nbytes
from paredown.core.checkpoint import Model
from paredown.core.edits import DropBlock, DropSublayer, KeepHeads
from paredown.errors import ArchitectureError, BudgetError, PolicyError
from paredown.methods.depth.unified_layer_skipping import (
    RandomSkipping,
    UnifiedLayerSkipping,
    UnifiedLayerSkippingDynamic,
    spaced,
)

LAYERS = 6


def deep(layers: int = LAYERS, **more: Any) -> Model:
    config = tf.LlamaConfig(**{**families._GQA, "num_hidden_layers": layers, "eos_token_id": None}, **more)
    return Model.of(families._seeded(lambda: tf.LlamaForCausalLM(config)))


def counting(model: Model) -> tuple[list[int], Any]:
    """Count how often each block's MLP runs."""
    counts = [0] * len(model.anatomy.language.blocks)
    handles = []
    for part in model.anatomy.language.blocks:

        def hook(*_: Any, index: int = part.index) -> None:
            counts[index] += 1

        handles.append(model.hf.get_submodule(f"{part.path}.{part.mlp.path}").register_forward_hook(hook))
    return counts, handles


# Card: the sets as computed.
@pytest.mark.parametrize(
    ("layers", "speedup", "wanted"),
    [
        (30, 2, (*range(0, 27, 2), 29)),
        (30, 3, (*range(0, 25, 3), 29)),
        (30, 5, (0, 6, 12, 18, 24, 29)),
        (30, 10, (0, 15, 29)),
        (12, 2, (0, 2, 4, 6, 8, 11)),
        (12, 3, (0, 4, 8, 11)),
        (12, 6, (0, 11)),
    ],
)
def test_sets_are_those_of_the_paper(layers, speedup, wanted):
    policy = UnifiedLayerSkippingDynamic(speedup=speedup)
    assert policy.chosen(layers) == wanted
    assert len(wanted) == int(layers / speedup)


@pytest.mark.parametrize("spread", ["paper", "even"])
def test_every_set_has_its_size_and_both_ends(spread):
    for layers in range(2, 40):
        for stay in range(2, layers + 1):
            found = spaced(layers, stay, spread)
            assert len(found) == len(set(found)) == stay
            assert found == tuple(sorted(found))
            assert (found[0], found[-1]) == (0, layers - 1)
            if spread == "even" and stay > 2:
                steps = [b - a for a, b in itertools.pairwise(found)]
                assert max(steps) - min(steps) <= 1
    assert spaced(1, 1) == (0,)


def test_fewer_than_two_are_refused():
    """Corrected: with R = 0 the official code returns two layers, with R = 1 it divides by zero."""
    for speedup in (7, 12, 13, 100):
        with pytest.raises(BudgetError, match="speed-up of 6 at most"):
            UnifiedLayerSkippingDynamic(speedup=speedup).chosen(12)
    with pytest.raises(BudgetError, match="1 of 6 layers would run"):
        UnifiedLayerSkippingDynamic(keep=0.1).runtime(deep())
    with pytest.raises(BudgetError, match="keep at least"):
        RandomSkipping(keep=0.1).runtime(deep())
    with pytest.raises(BudgetError, match="1 of 6 layers would run"):
        UnifiedLayerSkipping(keep=0.1).compress(deep(), None)


class TestStatic:
    def test_it_drops_all_but_the_set(self):
        for keep, stay in ((0.5, (0, 3, 5)), (0.66, (0, 2, 4, 5)), (0.33, (0, 5))):
            model = deep()
            gone = [edit.layer for edit in UnifiedLayerSkipping(keep=keep).compress(model, None).edits]
            assert tuple(i for i in range(LAYERS) if i not in gone) == stay
        even = UnifiedLayerSkipping(keep=0.66, spread="even").compress(deep(), None).edits
        assert even == [DropBlock(layer=1), DropBlock(layer=4)]

    def test_it_is_the_model_of_those_layers(self):
        cut, dense = deep(), deep()
        UnifiedLayerSkipping(keep=0.5).compress(cut, None)
        dense.hf.model.layers = torch.nn.ModuleList(dense.hf.model.layers[i] for i in (0, 3, 5))
        given = families.inputs("llama")
        assert torch.equal(families.logits(cut.hf, given), families.logits(dense.hf, given))


@torch.no_grad()
def two_stage(model: Model, tokens: Tensor, prompt: int, kept: tuple[int, ...], mask: Tensor) -> Tensor:
    """Return logits of all tokens: the prompt through all layers, the rest at once through the kept ones.

    The latter attend to the prompt's keys and values in the same layers, as the second pass of the paper's training.
    """
    where = (mask.cumsum(1) - 1).clamp_min(0)
    first = model.hf(
        input_ids=tokens[:, :prompt], attention_mask=mask[:, :prompt], position_ids=where[:, :prompt], use_cache=True
    )
    cut = deepcopy(model)
    gone = [DropBlock(layer=i) for i in range(len(model.anatomy.language.blocks)) if i not in kept]
    surgery.apply_model(cut.hf, cut.anatomy, gone)
    cache = tf.DynamicCache(config=cut.config)
    for place, layer in enumerate(kept):
        held = first.past_key_values.layers[layer]
        cache.update(held.keys, held.values, place)
    rest = cut.hf(
        input_ids=tokens[:, prompt:], attention_mask=mask, position_ids=where[:, prompt:], past_key_values=cache
    )
    return torch.cat([first.logits, rest.logits], 1)


class TestDecoding:
    def test_no_speedup_is_bit_identical(self):
        model, tokens = deep(), running.ids()
        plain = running.generate(model.hf, tokens, output_logits=True, return_dict_in_generate=True)
        for policy in (UnifiedLayerSkippingDynamic(speedup=1), UnifiedLayerSkippingDynamic(keep=1.0)):
            with attach(model, policy):
                found = running.generate(model.hf, tokens, output_logits=True, return_dict_in_generate=True)
            assert torch.equal(found.sequences, plain.sequences)
            assert all(torch.equal(a, b) for a, b in zip(found.logits, plain.logits, strict=True))

    @pytest.mark.parametrize("counts", [(16, 16), (16, 9)])
    @pytest.mark.parametrize("keep", [0.33, 0.5, 0.66])
    def test_steps_are_the_two_stage_attention_written_out(self, counts, keep):
        """Greedy, 20 tokens, two rows, left padding; and teacher forcing equals decoding (card)."""
        model, tokens = deep(), running.ids(2, 16)
        mask = running.padded(tokens, counts)
        policy = UnifiedLayerSkippingDynamic(keep=keep)
        with attach(model, policy):
            found = running.generate(
                model.hf,
                tokens,
                attention_mask=mask,
                max_new_tokens=20,
                no_repeat_ngram_size=1,
                return_dict_in_generate=True,
                output_logits=True,
            )
        said = found.sequences
        whole = torch.cat([mask, mask.new_ones(2, 20)], 1)
        wanted = two_stage(model, said, 16, policy.chosen(LAYERS), whole)
        for step, logits in enumerate(found.logits):
            torch.testing.assert_close(logits, wanted[:, 15 + step], atol=1e-5, rtol=1e-4)
        # A model that skips in the prompt too is another one.
        cut = deep()
        UnifiedLayerSkipping(keep=keep).compress(cut, None)
        with torch.no_grad():
            wrong = cut.hf(input_ids=said, attention_mask=whole, position_ids=(whole.cumsum(1) - 1).clamp_min(0)).logits
        assert float((wrong[:, 16:] - wanted[:, 16:]).abs().max()) > 1e-2

    def test_a_step_runs_the_chosen_blocks_and_the_prompt_all(self):
        model, tokens = deep(), running.ids()
        counts, _ = counting(model)
        with attach(model, UnifiedLayerSkippingDynamic(keep=0.5)):
            _, cache = running.passes(model.hf, tokens, (16,))
            assert counts == [1] * LAYERS
            for step in range(1, 9):
                _, cache = running.passes(model.hf, tokens[:, 15 + step : 16 + step], (1,), cache=cache)
                assert counts == [1 + step * (i in (0, 3, 5)) for i in range(LAYERS)]
                assert {layer.keys.shape[2] for layer in cache.layers} == {16 + step}

    def test_a_skipped_slot_takes_the_newest_of_the_nearest_below_and_keeps_the_prompt(self):
        model, tokens = deep(), running.ids()
        _, plain = running.passes(model.hf, tokens, (16,))
        with attach(model, UnifiedLayerSkippingDynamic(keep=0.5)):
            _, cache = running.passes(model.hf, tokens, running.steps(20, 16))
        for layer in range(LAYERS):
            below = {0: 0, 1: 0, 2: 0, 3: 3, 4: 3, 5: 5}[layer]
            assert torch.equal(cache.layers[layer].keys[:, :, 16:], cache.layers[below].keys[:, :, 16:])
            assert torch.equal(cache.layers[layer].values[:, :, 16:], cache.layers[below].values[:, :, 16:])
            assert torch.equal(cache.layers[layer].keys[:, :, :16], plain.layers[layer].keys)
        assert not torch.equal(cache.layers[4].keys[:, :, :16], cache.layers[3].keys[:, :, :16])

    def test_a_prompt_in_chunks_and_a_second_turn_run_in_full(self):
        """Not "there is a cache": the last chunk here is one token long (card)."""
        model, tokens = deep(), running.ids(1, 17)
        counts, _ = counting(model)
        with attach(model, UnifiedLayerSkippingDynamic(keep=0.5)):
            one = running.generate(model.hf, tokens, return_dict_in_generate=True, output_logits=True)
            assert counts == [1 + 7 * (i in (0, 3, 5)) for i in range(LAYERS)]
            counts[:] = [0] * LAYERS
            other = running.generate(
                model.hf, tokens, prefill_chunk_size=8, return_dict_in_generate=True, output_logits=True
            )
            assert counts == [3 + 7 * (i in (0, 3, 5)) for i in range(LAYERS)]
            for a, b in zip(one.logits, other.logits, strict=True):
                torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-4)
            for turn in (5, 1):  # generate reads what it said last, too
                counts[:] = [0] * LAYERS
                again = torch.cat([other.sequences, tokens[:, : turn - 1]], 1)
                other = running.generate(
                    model.hf, again, past_key_values=other.past_key_values, return_dict_in_generate=True
                )
                assert counts == [1 + 7 * (i in (0, 3, 5)) for i in range(LAYERS)], turn

    @pytest.mark.parametrize("family", running.FAMILIES)
    def test_families_padding_beams_and_turns(self, family):
        running.check_family(family, UnifiedLayerSkippingDynamic(keep=0.5))

    def test_beams_follow_their_rows(self):
        model, tokens = deep(), running.ids(2, 12)
        with attach(model, UnifiedLayerSkippingDynamic(keep=0.5)) as it:
            both = running.generate(model.hf, tokens, num_beams=3, return_dict_in_generate=True)
            for row in range(2):
                alone = running.generate(model.hf, tokens[row : row + 1], num_beams=3)
                assert torch.equal(alone[0], both.sequences[row])
            assert it.nbytes() == nbytes(it.last) > 0

    def test_the_cut_and_the_uneven_model_decode_too(self):
        """Attention that is gone, and layers with other heads than those below: their slots stay of their own size."""
        model = deep()
        model.anatomy = surgery.apply_model(
            model.hf,
            model.anatomy,
            [
                DropSublayer(layer=1, part="attention"),
                DropSublayer(layer=3, part="attention"),
                KeepHeads(layer=4, keep=(1,)),
            ],
        )
        tokens = running.ids()
        with attach(model, UnifiedLayerSkippingDynamic(keep=0.5)):
            logits, cache = running.passes(model.hf, tokens, running.steps(24, 16))
        assert torch.isfinite(logits).all()
        assert [layer.get_seq_length() for layer in cache.layers] == [24] * LAYERS
        assert cache.layers[4].keys.shape[1] == 1

    def test_a_cache_may_go_on_without_the_policy_and_with_another_set(self):
        model, tokens = deep(), running.ids()
        with attach(model, UnifiedLayerSkippingDynamic(keep=0.5)):
            _, cache = running.passes(model.hf, tokens, running.steps(20, 16))
        with attach(model, RandomSkipping(keep=0.5, seed=1)):
            _, cache = running.passes(model.hf, tokens[:, 20:22], (1, 2), cache=cache)
        logits, cache = running.passes(model.hf, tokens[:, 22:], (2,), cache=cache)
        assert cache.get_seq_length() == 24
        assert torch.isfinite(logits).all()

    def test_it_leaves_no_trace_also_after_an_error(self):
        model = deep()
        before = [sorted(vars(m)) for m in model.hf.modules()]

        with contextlib.suppress(RuntimeError), attach(model, UnifiedLayerSkippingDynamic(keep=0.5)):
            running.generate(model.hf, running.ids())
            raise RuntimeError
        assert [sorted(vars(m)) for m in model.hf.modules()] == before

    def test_beside_visual_tokens_that_left(self):
        from paredown.methods.vision.hired import Hired

        hf, told = families.FAMILIES["llava"](), families.inputs("llava", batch=2, length=20)
        options = {"max_new_tokens": 5, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
        with attach(hf, Hired(keep=0.5), UnifiedLayerSkippingDynamic(keep=0.5)), torch.no_grad():
            found = hf.generate(**told, **options, return_dict_in_generate=True, output_logits=True)
        held = {layer.get_seq_length() for layer in found.past_key_values.layers}
        assert len(held) == 1
        assert len({layer.stores[0].entries.length for layer in found.past_key_values.layers}) == 1
        assert all(torch.isfinite(one).all() for one in found.logits)


class TestControl:
    def test_it_keeps_both_ends_and_draws_as_many(self):
        sets = {RandomSkipping(keep=0.5, seed=seed).chosen(12) for seed in range(10)}
        assert len(sets) > 5
        assert all(len(one) == 6 and (one[0], one[-1]) == (0, 11) and one == tuple(sorted(set(one))) for one in sets)
        assert RandomSkipping(keep=0.5, seed=3).chosen(12) == RandomSkipping(keep=0.5, seed=3).chosen(12)
        assert RandomSkipping(speedup=1).inert

    def test_it_stands_for_the_same_unit(self):
        one, other = UnifiedLayerSkippingDynamic, RandomSkipping
        assert (one.unit, one.kind, one.places) == (other.unit, other.kind, other.places)
        assert other.control


def test_models_that_cannot_skip_are_told():
    with pytest.raises(ArchitectureError, match="does not"):
        UnifiedLayerSkippingDynamic(keep=0.5).runtime(Model.of(families.FAMILIES["vit"]()))
    config = tf.Qwen3NextConfig(
        **{**families._GQA, "num_hidden_layers": 4}, num_experts=4, moe_intermediate_size=8, head_dim=8
    )
    model = matrix.model("llama")
    model.hf.config.layer_types = list(config.layer_types[:3])
    with pytest.raises(ArchitectureError, match="must see every token"):
        UnifiedLayerSkippingDynamic(keep=0.5).runtime(model)


def test_with_a_policy_of_the_cache_it_is_refused():
    from paredown.methods.cache.streaming import Streaming

    with (
        pytest.raises(PolicyError, match="cannot run together"),
        attach(deep(), UnifiedLayerSkippingDynamic(keep=0.5), Streaming(keep=0.5)),
    ):
        pass
