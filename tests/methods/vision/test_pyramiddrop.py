"""PyramidDrop: the checks of its paper card, the schedule, and real answers."""

from __future__ import annotations

from typing import Any

import families
import pytest
import torch
import transformers as tf

import paredown
from paredown.core.attach import attach
from paredown.errors import ArchitectureError, BudgetError, RecipeError
from paredown.methods.vision import pyramiddrop
from paredown.methods.vision.pyramiddrop import PyramidDrop
from paredown.testbeds import heldout_digits, path
from paredown.testbeds.tasks import mosaic_accuracy


def build(family: str) -> Any:
    return families.FAMILIES[family]()


def generate(hf, given, **more):
    options = {"max_new_tokens": 5, "do_sample": False, "eos_token_id": None, "pad_token_id": 0, **more}
    options["suppress_tokens"] = [families.IMAGE_TOKEN]
    with torch.no_grad():
        return hf.generate(**given, **options, return_dict_in_generate=True, output_logits=True)


def close(one, other):
    torch.testing.assert_close(one, other, atol=2e-5, rtol=1e-4)


def fixed(monkeypatch, sign=1.0):
    """Let positions decide instead of attention, so that the same tokens go whatever the last token is."""

    def scores(call, rows):
        at = call.positions().float()
        return sign * ((at * 7) % 11)[:, None, None].expand(-1, 2, 1, -1)

    monkeypatch.setattr(pyramiddrop, "attended", scores)


class TestStages:
    @pytest.mark.parametrize("family", families.VLMS)
    def test_nothing_to_drop_leaves_every_bit(self, family):
        # Card: all ratios 1, or no stage.
        hf, given = build(family), families.inputs(family)
        expected = generate(hf, given)
        for policy in (PyramidDrop(layers=(1, 2), ratios=(1.0, 1.0)), PyramidDrop(layers=()), PyramidDrop(keep=1)):
            assert policy.inert
            with attach(hf, policy):
                found = generate(hf, given)
            assert all(torch.equal(a, b) for a, b in zip(found.logits, expected.logits, strict=True))

    @pytest.mark.parametrize("family", families.VLMS)
    @pytest.mark.parametrize("ratios", [(0.5, 0.25), (0.7, 0.3), (0.9, 0.1), (0.3, 0.0)])
    def test_each_stage_leaves_exactly_the_floored_share_of_each_image(self, family, ratios):
        # Card: int(V * r_k), with respect to the original V.
        hf, given = build(family), families.inputs(family)
        with attach(hf, PyramidDrop(layers=(1, 2), ratios=ratios)) as it:
            generate(hf, given)
            length = given["input_ids"].shape[1] + 4
            tokens = int((given["input_ids"][0] == families.IMAGE_TOKEN).sum())
            for layer, ratio in zip(it.last.layers, (1.0, *ratios), strict=True):
                entries = layer.stores[0].entries
                assert entries.length == length - tokens + int(tokens * ratio + 1e-9)
                positions = entries.positions
                if positions is not None:  # original and in order
                    assert (positions[:, 1:] > positions[:, :-1]).all()
            assert it.last.get_seq_length() == length

    def test_budgets_are_by_image(self):
        hf = build("llava")
        ids = torch.tensor([[5, *[100] * 4, 6, *[100] * 4, 7, 8], [0] * 5 + [5, *[100] * 4, 6, 7]])
        pixels = torch.randn(3, 3, 16, 16, generator=torch.Generator().manual_seed(0))
        given = {"input_ids": ids, "pixel_values": pixels, "attention_mask": (ids != 0).long()}
        with attach(hf, PyramidDrop(layers=(1,), ratios=(0.5,))) as it:
            generate(hf, given)
            held = it.last.layers[1].stores[0].entries.positions
        first, second = held[0].tolist(), held[1].tolist()
        assert [sum(a <= p < a + 4 for p in first) for a in (1, 6)] == [2, 2]
        assert sum(6 <= p < 10 for p in second) == 2

    @pytest.mark.parametrize("family", families.VLMS)
    def test_the_best_of_the_last_token_stay(self, family):
        # Card: the scores are the eager attention row of the stage's layer, while nothing was dropped before it.
        hf, given = build(family), families.inputs(family)
        with attach(hf, PyramidDrop(layers=(1,), ratios=(0.5,))) as it, torch.no_grad():
            hf(**given)
            held = it.last.layers[1].stores[0].entries.positions
        hf.set_attn_implementation("eager")
        with torch.no_grad():
            row = hf(**given, output_attentions=True).attentions[1][:, :, -1].mean(1)
        for index in range(2):
            tokens = (given["input_ids"][index] == families.IMAGE_TOKEN).nonzero()[:, 0]
            best = tokens[row[index, tokens].topk(len(tokens) // 2).indices]
            assert sorted(best.tolist()) == [p for p in held[index].tolist() if p in tokens.tolist()]


class TestPositions:
    @pytest.mark.parametrize("family", families.VLMS)
    @pytest.mark.parametrize("layers", [(0, 1, 2), (1, 2)])
    def test_cached_generation_is_a_full_pass_at_every_step(self, family, layers, monkeypatch):
        # Card: the test that a wrong shift of positions in decoding fails.
        fixed(monkeypatch)
        hf, given = build(family), families.inputs(family)
        with attach(hf, PyramidDrop(layers=layers, ratios=(0.75, 0.5, 0.25)[: len(layers)])):
            cached, plain = generate(hf, given), generate(hf, given, use_cache=False)
        for a, b in zip(cached.logits, plain.logits, strict=True):
            close(a, b)

    @pytest.mark.parametrize("family", families.VLMS)
    def test_a_padded_batch_is_its_rows(self, family):
        hf, given = build(family), families.inputs(family)
        rows = [{k: v[i : i + 1] for k, v in given.items()} for i in range(2)]
        if family == "qwen2_vl":
            for i in range(2):
                rows[i]["pixel_values"] = given["pixel_values"][i * 16 : i * 16 + 16]
        pad = torch.zeros((1, 3), dtype=torch.long)
        for name in ("input_ids", "attention_mask", "mm_token_type_ids"):
            if name in given:
                given[name] = torch.cat([given[name][:1], torch.cat([pad, given[name][1:, :-3]], 1)])
                rows[1][name] = rows[1][name][:, :-3]
        with attach(hf, PyramidDrop(keep=0.4)):
            both, alone = generate(hf, given), [generate(hf, row) for row in rows]
        for index in range(2):
            for a, b in zip(both.logits, alone[index].logits, strict=True):
                close(a[index], b[0])

    def test_beams(self, monkeypatch):
        fixed(monkeypatch)
        for family in families.VLMS:
            hf, given = build(family), families.inputs(family)
            with attach(hf, PyramidDrop(keep=0.4)):
                cached, plain = (generate(hf, given, num_beams=3, use_cache=c) for c in (True, False))
            assert torch.equal(cached.sequences, plain.sequences)


class TestSchedule:
    @pytest.mark.parametrize("depth", [3, 4, 28, 32])
    @pytest.mark.parametrize("keep", [0.05, 0.11, 0.22, 0.33, 0.5, 0.75, 0.99])
    def test_keep_is_the_mean_share_over_layers(self, depth, keep):
        schedule = PyramidDrop(keep=keep).schedule(depth)
        share, held = 1.0, 0.0
        for layer in range(depth):
            share = schedule.get(layer, share)
            held += share
        assert held / depth == pytest.approx(keep, abs=1e-6)
        ratios = list(schedule.values())
        first = ratios[0]
        assert ratios == pytest.approx([first ** (k + 1) for k in range(len(ratios))])

    def test_published_stages(self):
        # Card: 8, 16, 24 of 32 layers, lambda 0.5.
        keep = (1 + 0.5 + 0.25 + 0.125) / 4
        assert PyramidDrop(keep=keep).schedule(32) == pytest.approx({8: 0.5, 16: 0.25, 24: 0.125})

    def test_stages_begin_earlier_only_where_they_must(self):
        assert min(PyramidDrop(keep=0.3).schedule(32)) == 8
        assert 0 < min(PyramidDrop(keep=0.2).schedule(32)) < 8
        assert min(PyramidDrop(keep=0.05).schedule(32)) == 0

    def test_what_cannot_be_met_is_refused_with_the_lowest_that_can(self):
        with pytest.raises(BudgetError, match=r"keep more than 0\.25"):
            PyramidDrop(keep=0.2, layers=(8, 16)).schedule(32)
        lowest = None
        try:
            PyramidDrop(keep=0.01).schedule(32)
        except BudgetError as error:
            lowest = float(str(error).rpartition("keep more than ")[2].split(",")[0].rstrip("."))
        assert lowest is not None
        PyramidDrop(keep=lowest * 1.05).schedule(32)
        with pytest.raises(BudgetError):
            PyramidDrop(keep=lowest * 0.95).schedule(32)

    @pytest.mark.parametrize(
        ("fields", "match"),
        [
            ({"layers": (2, 2)}, "ascend"),
            ({"layers": (-1, 2)}, "ascend"),
            ({"ratios": (0.5,)}, "need layers"),
            ({"layers": (1, 2), "ratios": (0.5,)}, "one for each"),
            ({"layers": (1, 2), "ratios": (0.5, 0.6)}, "must fall"),
            ({"layers": (1, 9), "ratios": (0.5, 0.4)}, "layer 9 does not exist"),
        ],
    )
    def test_fields_that_do_not_fit_are_refused(self, fields, match):
        with pytest.raises((RecipeError, ValueError), match=match):
            PyramidDrop(**fields).schedule(4)

    def test_a_model_without_images_is_refused(self):
        with pytest.raises(ArchitectureError, match="pyramiddrop acts on images"):
            PyramidDrop().attach(build("llama")).__enter__()


class TestAnswers:
    def test_late_hurts_less_and_ranking_beats_random_and_reversed_ranking(self, monkeypatch):
        # Card: on a small trained model, five seeds. Its last token knows the question from layer 2 of 4 on.
        model = paredown.load("testbed:vlm")
        processor = tf.AutoProcessor.from_pretrained(path("vlm"))
        digits, labels = heldout_digits()
        own = pyramiddrop.attended

        def accuracy(seed, layer, ranking):
            draw = torch.Generator().manual_seed(seed)
            rankings = {
                "own": own,
                "random": lambda call, rows: torch.rand(own(call, rows).shape, generator=draw),
                "reversed": lambda call, rows: -own(call, rows),
            }
            monkeypatch.setattr(pyramiddrop, "attended", rankings[ranking])
            with attach(model, PyramidDrop(layers=(layer,), ratios=(0.2,))):
                hits = mosaic_accuracy(model.hf, processor, digits, labels, count=40, seed=seed)
            return hits.mean()

        for seed in range(5):
            best, late = accuracy(seed, 2, "own"), accuracy(seed, 3, "own")
            assert late >= accuracy(seed, 1, "own") + 0.2
            assert best > accuracy(seed, 2, "random") + 0.05
            assert best > accuracy(seed, 2, "reversed") + 0.3
