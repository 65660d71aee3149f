"""MustDrop: the checks of its paper card, the plan of its budget, all families, and real answers."""

from __future__ import annotations

import itertools
import math
from typing import Any

import families
import pytest
import torch
import transformers as tf

import paredown
from paredown.core.attach import attach, attach_runtimes, wrap
from paredown.core.cache import PolicyLayer, nbytes
from paredown.core.runtime import Runtime
from paredown.errors import BudgetError, PolicyError, RecipeError
from paredown.methods.vision import mustdrop
from paredown.methods.vision.mustdrop import MustDrop, Plan, stages
from paredown.testbeds import heldout_digits
from paredown.testbeds.tasks import mosaic_accuracy

SIDE = 6
DEPTH = 6


def big() -> Any:
    """LLaVA with 6 x 6 patches and six layers of the language model."""
    config = tf.LlavaConfig(
        vision_config=tf.CLIPVisionConfig(**{**families._CLIP, "num_hidden_layers": 4, "image_size": 8 * SIDE}),
        text_config=tf.LlamaConfig(**{**families._GQA, "num_hidden_layers": DEPTH}),
        image_token_id=families.IMAGE_TOKEN,
        vision_feature_layer=-2,
        vision_feature_select_strategy="default",
        image_seq_length=SIDE * SIDE,
    )
    return families._seeded(lambda: tf.LlavaForConditionalGeneration(config))


def shown(pixels: torch.Tensor | None = None, batch: int = 2) -> dict[str, torch.Tensor]:
    draw = torch.Generator().manual_seed(0)
    ids = torch.tensor([[5, 6, *[families.IMAGE_TOKEN] * SIDE**2, 7, 8, 9, 10]] * batch)
    if pixels is None:
        pixels = torch.randn(batch, 3, 8 * SIDE, 8 * SIDE, generator=draw)
    return {"input_ids": ids, "pixel_values": pixels, "attention_mask": torch.ones_like(ids)}


class Ward(Runtime):
    """Looks at what the policy in front of it left."""

    def __init__(self) -> None:
        self.rows: dict[int, torch.Tensor] = {}
        self.left: dict[int, list[list[int]]] = {}

    def after_vision(self, layer, stream):
        self.rows[layer] = stream.positions()

    def before(self, layer, stream):
        if stream.now.visual is not None:
            seen = zip(stream.positions(), stream.visual(), strict=True)
            self.left[layer] = [at[mask].tolist() for at, mask in seen]

    def counts(self, row=0):
        return [len(rows[row]) for rows in self.left.values()]


def watched(hf, policy, given) -> tuple[Ward, Any]:
    model, ward = wrap(hf), Ward()
    runtime = policy.runtime(model)
    with attach_runtimes(model, [runtime, ward]):
        families.logits(hf, given)
    return ward, runtime


def generate(hf, given, **more):
    options = {"max_new_tokens": 4, "do_sample": False, "eos_token_id": None, "pad_token_id": 0, **more}
    options["suppress_tokens"] = [families.IMAGE_TOKEN]
    with torch.no_grad():
        return hf.generate(**given, **options, return_dict_in_generate=True, output_logits=True)


def alone(family, given, row, cut):
    """Return a row of a batch without its first ``cut`` tokens."""
    size = 16 if family == "qwen2_vl" else 1
    per_token = ("input_ids", "attention_mask", "mm_token_type_ids")
    one = {k: v[row * size : (row + 1) * size] if k == "pixel_values" else v[row : row + 1] for k, v in given.items()}
    return {k: v[:, cut:] if k in per_token else v for k, v in one.items()}


def thresholds(low, single, **fields):
    return MustDrop(global_thr=low, individual_thr=single, **fields)


class TestWindows:
    @pytest.mark.parametrize("family", families.VLMS)
    def test_nothing_to_merge_or_drop_leaves_every_bit(self, family):
        # Card: similarity 1.01, both thresholds 0, key rate any: logits bit-identical (with all seams in place).
        hf, given = families.FAMILIES[family](), families.inputs(family)
        expected, policy = families.logits(hf, given), thresholds(0, 0, similarity=1.01, key_rate=0.3)
        assert policy.inert
        model = wrap(hf)
        with attach_runtimes(model, [policy.runtime(model)]):
            assert torch.equal(families.logits(hf, given), expected)

    def test_constant_colour_merges_every_window_and_noise_none(self):
        # Card: an image of constant colour merges all windows; a noise image merges none.
        hf = big()
        with torch.no_grad():  # learned places would make the patches of one colour differ
            hf.model.vision_tower.embeddings.position_embedding.weight.zero_()
        noise = torch.randn(1, 3, 8 * SIDE, 8 * SIDE, generator=torch.Generator().manual_seed(1))
        given = shown(torch.cat([torch.ones_like(noise), noise]))
        ward, _ = watched(hf, thresholds(0, 0), given)
        # Each token stands where its window's centre was, in raster order; both rows are cut by themselves.
        centres = [SIDE * row + col for row in (1, 4) for col in (1, 4)]
        assert ward.left[0] == [[2 + at for at in centres], list(range(2, 2 + SIDE**2))]
        assert ward.rows[0][0, :5].tolist() == [0, *(1 + at for at in centres)]

    def test_a_window_is_the_plain_mean_of_its_states_and_counts_once(self):
        hf, given = big(), shown()
        model, seen = wrap(hf), {}

        class Look(Runtime):
            def after_vision(self, layer, stream):
                if layer == 0:
                    seen[len(seen)] = (stream.hidden.clone(), stream.sizes)

        policy = thresholds(0, 0, similarity=-1.0)
        with attach_runtimes(model, [Look(policy, model), policy.runtime(model), Look(policy, model)]):
            families.logits(hf, given)
        grid = seen[0][0][:, 1:].view(2, 2, 3, 2, 3, -1).transpose(2, 3).reshape(2, 4, 9, -1)
        torch.testing.assert_close(seen[1][0][:, 1:], grid.mean(2))
        assert torch.equal(seen[1][0][:, 0], seen[0][0][:, 0])
        assert seen[1][1] is None

    def test_the_score_is_the_mean_cosine_over_all_ordered_pairs(self):
        hf, given = big(), shown()
        with torch.no_grad():
            out = hf.model.vision_tower(given["pixel_values"], output_hidden_states=True)
        states = out.hidden_states[1][:, 1:].view(2, 2, 3, 2, 3, -1).transpose(2, 3).reshape(2, 4, 9, -1)
        unit = torch.nn.functional.normalize(states, dim=-1)
        pairs = (unit @ unit.transpose(-1, -2)).masked_fill(torch.eye(9, dtype=torch.bool), 0).sum((-1, -2)) / 72
        # Between any two scores lies a threshold that divides them so.
        ranked = pairs.flatten().sort().values
        for low, high in itertools.pairwise(ranked):
            ward, _ = watched(hf, thresholds(0, 0, similarity=float(low + high) / 2), given)
            merged = [(SIDE**2 - n) // 8 for n in (ward.counts(0)[0], ward.counts(1)[0])]
            assert merged == (pairs > (low + high) / 2).sum(1).tolist()

    @pytest.mark.parametrize(("family", "grid"), [("llava", "2 x 2"), ("internvl", "2 x 2")])
    def test_windows_must_divide_the_grid(self, family, grid):
        hf, given = families.FAMILIES[family](), families.inputs(family)
        with attach(hf, MustDrop(keep=0.5, window=3)), pytest.raises(PolicyError, match=f"grid of {grid}"):
            families.logits(hf, given)

    @pytest.mark.parametrize("family", families.VLMS)
    def test_a_merged_window_stands_at_its_centre(self, family):
        # All windows merge: one token is left of each tile, at the last of the four cells of its only window.
        hf, given = families.FAMILIES[family](), families.inputs(family)
        ward, _ = watched(hf, thresholds(0, 0, similarity=-1.0), given)
        centres = ward.left[1][0]
        if family == "llava_next":
            # The base tile, then rows of two tiles side by side with a newline behind each.
            assert centres == [3 + 3, 3 + 4 + 4, 3 + 4 + 5 + 1, 3 + 4 + 5 + 3, 3 + 4 + 5 + 4]
        else:
            assert centres == [3 + 3]

    def test_cells_left_over_at_ragged_edges_stay(self):
        # Qwen2-VL: images of any size; a merged token takes the three positions of its window's centre.
        hf = families.FAMILIES["qwen2_vl"]()
        ids = torch.tensor([[5, 102, *[families.IMAGE_TOKEN] * 12, 7, 8]])
        given = {
            "input_ids": ids,
            "pixel_values": torch.randn(48, 96, generator=torch.Generator().manual_seed(0)),
            "image_grid_thw": torch.tensor([[1, 6, 8]]),
            "mm_token_type_ids": (ids == families.IMAGE_TOKEN).long(),
        }
        ward, _ = watched(hf, thresholds(0, 0, similarity=-1.0, window=3), given)
        assert ward.left[1][0] == [2 + cell for cell in (3, 5, 7, 11)]


class TestStages:
    def test_the_key_set_is_the_class_tokens_and_survives_every_stage(self):
        # Card: key-set tokens survive every stage; ceil(0.08 (n - 1)) of CLS attention at the last layer.
        hf, given = big(), shown()
        ward, runtime = watched(hf, thresholds(2.0, 2.0, similarity=1.01, key_rate=0.2), given)
        hf.set_attn_implementation("eager")
        with torch.no_grad():
            told = hf.model.vision_tower(given["pixel_values"], output_attentions=True).attentions[-1]
        keys = told.mean(1)[:, 0, 1:].topk(math.ceil(0.2 * SIDE**2)).indices.sort().values
        assert runtime._stages == (2, 3)
        assert ward.left[5] == [[2 + at for at in row] for row in keys.tolist()]
        assert ward.left[2][0] == list(range(2, 2 + SIDE**2))
        assert ward.left[3] == ward.left[4]

    def test_a_token_goes_only_below_both_thresholds(self):
        # Card: dropped iff g_j < global_thr * sum g and m_j < individual_thr, by the stage's own attention.
        hf, given = big(), shown()
        hf.set_attn_implementation("eager")
        with torch.no_grad():
            maps = hf(**given, output_attentions=True).attentions[2].mean(1)[:, -4:, 2:-4]
        share, most = maps.sum(1) / maps.sum((1, 2))[:, None], maps.amax(1)
        hf.set_attn_implementation("sdpa")
        for low in share.flatten().quantile(torch.tensor([0.2, 0.5, 0.9])).tolist():
            for single in most.flatten().quantile(torch.tensor([0.2, 0.5, 0.9])).tolist():
                policy = thresholds(low, single, similarity=1.01, key_rate=0, layers=(2,))
                ward, _ = watched(hf, policy, given)
                for row in range(2):
                    stay = (share[row] >= low) | (most[row] >= single)
                    assert ward.left[3][row] == (2 + stay.nonzero()[:, 0]).tolist()

    def test_raising_either_threshold_never_keeps_more(self):
        # Card: monotone.
        hf, given = big(), shown()
        for which in (0, 1):
            before = None
            for level in (0.0, 0.01, 0.02, 0.03, 0.05, 1.1):
                told = [0.03, 0.03]
                told[which] = level
                left = watched(hf, thresholds(*told, similarity=1.01, layers=(2,)), given)[0].left[3]
                for now, then in zip(left, before or left, strict=True):
                    assert set(now) <= set(then)
                before = left

    def test_text_between_images_counts_for_those_in_front_of_it(self):
        hf, side = big(), SIDE**2
        one = [families.IMAGE_TOKEN] * side
        ids = torch.tensor([[5, *one, 7, 8, *one, 9, 10]])
        given = {"input_ids": ids, "pixel_values": shown()["pixel_values"]}
        ward, _ = watched(hf, MustDrop(keep=0.6, similarity=1.01), given)
        for layer, left in ward.left.items():
            first = sum(at <= side for at in left[0])
            assert first == len(left[0]) - first, layer


class TestBudget:
    @pytest.mark.parametrize("keep", [0.15, 0.2, 0.33, 0.5, 0.7, 0.9])
    @pytest.mark.parametrize("similarity", [0.8, 0.3])
    def test_the_mean_share_is_met_from_below_to_a_token_a_layer(self, keep, similarity):
        hf, given = big(), shown()
        ward, runtime = watched(hf, MustDrop(keep=keep, similarity=similarity), given)
        for row in range(2):
            counts = ward.counts(row)
            assert all(b <= a for a, b in itertools.pairwise(counts))
            total = sum(counts)
            room = math.floor(keep * SIDE**2 * DEPTH + 1e-9)
            last = DEPTH - 1 - runtime._stages[-1]
            assert total <= room
            # Fewer only where merging alone left fewer.
            assert room - total < last or counts[-1] == counts[0]

    def test_stages_lie_at_the_published_shares_or_earlier(self):
        assert stages(32, 0.5, 0.08) == stages(32, 0.11, 0.08) == (2, 6, 10, 14)
        assert stages(28, 0.3, 0.08) == (2, 6, 9, 13)
        assert stages(32, 0.05, 0.08) == (1, 5, 9, 13)
        assert stages(4, 0.5, 0.08) == (2,)
        assert stages(4, 0.22, 0.08) == (1,)
        assert stages(4, 0.05, 0.08) == (0,)
        assert stages(1, 0.5, 0.08) == (0,)

    def test_a_plan_leaves_equal_shares_and_spends_all(self):
        plan = Plan(100, (2, 6, 10, 14), 32, 32 * 40)
        left = [plan.at(layer, 8) for layer in plan.layers]
        assert 0 <= plan.left < 17
        rates = [b / a for a, b in itertools.pairwise([100, *left])]
        assert max(rates) - min(rates) < 0.06

    def test_a_key_set_beyond_the_budget_keeps_its_best(self):
        hf, given = big(), shown()
        ward, _ = watched(hf, MustDrop(keep=0.6, similarity=1.01, key_rate=0.9, layers=(2,)), given)
        assert ward.counts() == [36, 36, 36, 7, 7, 7]
        full, _ = watched(hf, thresholds(2, 2, similarity=1.01, key_rate=7 / 36, layers=(2,)), given)
        assert ward.left[5] == full.left[5]

    @pytest.mark.parametrize("family", families.VLMS)
    def test_no_family_goes_over(self, family):
        hf, given = families.FAMILIES[family](), families.inputs(family)
        full = 14 if family == "llava_next" else 4
        for keep in (0.5, 0.75):
            ward, _ = watched(hf, MustDrop(keep=keep), given)
            for row in range(2):
                assert sum(ward.counts(row)) <= keep * full * 3

    def test_a_budget_out_of_reach_is_refused(self):
        hf, given = big(), shown()
        with pytest.raises(BudgetError, match="4 are left when all windows"):
            watched(hf, MustDrop(keep=0.05, layers=(4,)), given)
        with pytest.raises(BudgetError, match="no windows merge"):
            MustDrop(keep=0.1, similarity=1.01).runtime(wrap(hf))

    def test_fields_that_do_not_fit_are_refused(self):
        with pytest.raises(RecipeError, match="go together"):
            MustDrop(global_thr=0.1)
        with pytest.raises(RecipeError, match="ascend"):
            MustDrop(layers=(2, 1))
        with pytest.raises(PolicyError, match="layer 9"):
            MustDrop(layers=(9,)).runtime(wrap(big()))


class TestCache:
    def test_layers_from_the_first_stage_on_hold_the_final_set_alone(self):
        # Card, stage C: earlier layers stay full, all others hold what the last stage left; bytes go.
        hf, given = big(), shown()
        ward, runtime = watched(hf, MustDrop(keep=0.6), given)
        with attach(hf, MustDrop(keep=0.6)) as it, torch.no_grad():
            cache = hf(**given, use_cache=True).past_key_values
            assert it.nbytes() == nbytes(cache)
        text = [0, 1, *range(38, 42)]
        for index, layer in enumerate(cache.layers):
            assert isinstance(layer, PolicyLayer)
            held = layer.stores[0].entries
            count = ward.counts()[0] if index < runtime._stages[0] else ward.counts()[-1]
            assert held.length == count + len(text)
            if index >= runtime._stages[0]:
                for row in range(2):
                    assert sorted(held.positions[row].tolist()) == sorted(text + ward.left[5][row])

    def test_the_next_token_is_that_of_a_masked_run(self):
        # Card: after stage C the next-token logits equal a run in which the same tokens were masked in those layers.
        hf, given = big(), shown()
        policy = MustDrop(keep=0.6, similarity=1.01)
        ward, runtime = watched(hf, policy, given)
        more = torch.tensor([[11], [12]])
        with attach(hf, policy), torch.no_grad():
            cache = hf(**given, use_cache=True).past_key_values
            found = hf(input_ids=more, past_key_values=cache).logits[:, -1]

        class Masked(Runtime):
            """All tokens go through all layers; what a layer may see is cut down by a mask."""

            def watch(self, call):
                before, later = call.now.past == 0, call.layer >= runtime._stages[0]
                for row in range(2):
                    final = ward.left[5][row] if later else ward.left[0][row]
                    stay = ward.left[call.layer][row] if before else final
                    hidden = [at for at in range(2, 38) if at not in stay]
                    if call.mask is None:
                        causal = torch.ones(call.now.length, call.now.stop, dtype=torch.bool).tril(call.now.past)
                        call.mask = causal[None, None].repeat(2, 1, 1, 1)
                    call.mask[row, :, :, hidden] = False

        model = wrap(hf)
        with attach_runtimes(model, [Masked(None, model)]), torch.no_grad():
            cache = hf(**given, use_cache=True).past_key_values
            expected = hf(input_ids=more, past_key_values=cache).logits[:, -1]
        torch.testing.assert_close(found, expected, atol=2e-5, rtol=1e-4)

    def test_a_second_turn_goes_on_from_the_trimmed_cache(self):
        hf, given = big(), shown()
        with attach(hf, MustDrop(keep=0.6)), torch.no_grad():
            cache = hf(**given, use_cache=True).past_key_values
            before = [layer.stores[0].entries.length for layer in cache.layers]
            hf(input_ids=torch.tensor([[11, 12, 13]] * 2), past_key_values=cache)
            after = [layer.stores[0].entries.length for layer in cache.layers]
        assert after == [n + 3 for n in before]
        assert cache.get_seq_length() == 45


class TestRuns:
    @pytest.mark.parametrize("family", families.VLMS)
    def test_a_padded_batch_and_its_beams_are_its_rows(self, family):
        hf, given = families.FAMILIES[family](), families.inputs(family)
        given["attention_mask"][1, :2] = 0
        with attach(hf, MustDrop(keep=0.6, similarity=0.5)):
            both, beams = generate(hf, given), generate(hf, given, num_beams=2)
            for row, cut in ((0, 0), (1, 2)):
                one = alone(family, given, row, cut)
                found = generate(hf, one)
                for a, b in zip(both.logits, found.logits, strict=True):
                    torch.testing.assert_close(a[row], b[0], atol=2e-5, rtol=1e-4)
                assert torch.equal(generate(hf, one, num_beams=2).sequences[0], beams.sequences[row, cut:])

    @pytest.mark.parametrize("family", families.VLMS)
    def test_logits_keep_their_shape_and_runs_agree(self, family):
        hf, given = families.FAMILIES[family](), families.inputs(family)
        plain = families.logits(hf, given)
        with attach(hf, MustDrop(keep=0.6)):
            assert families.logits(hf, given).shape == plain.shape
            assert not torch.equal(families.logits(hf, given), plain)
            assert torch.equal(generate(hf, given).sequences, generate(hf, given).sequences)
        assert torch.equal(families.logits(hf, given), plain)


def test_it_beats_random_windows_and_tokens_on_real_answers():
    # Card: beats random dropping at the same average count (figures of more questions are in the report).
    model = paredown.load("testbed:vlm", dtype="float32")
    digits = heldout_digits()

    class Shuffled(mustdrop._Inside):
        """As many windows and tokens in the same layers, by lot."""

        def _merging(self, states, windows, total):
            out = super()._merging(states, windows, total)
            lots = torch.rand(out.shape, generator=torch.Generator().manual_seed(0)).argsort(1).argsort(1)
            return lots < out.sum(1, keepdim=True)

        def after(self, layer, stream):
            told = stream.now.memo.get("mustdrop", (None,))
            if told[0] == layer:
                lots = torch.rand(told[1].shape, generator=torch.Generator().manual_seed(0))
                stream.now.memo["mustdrop"] = (layer, lots, torch.zeros_like(lots))
            super().after(layer, stream)

    def hits(runtime):
        with attach_runtimes(model, [runtime]):
            return mosaic_accuracy(model.hf, model.processor, *digits, count=60, generate=True).mean()

    policy = MustDrop(keep=0.5)
    assert hits(policy.runtime(model)) > hits(Shuffled(policy, model)) + 0.15
