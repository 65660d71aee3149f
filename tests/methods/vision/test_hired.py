"""HiRED: the checks of its paper card, the allocation over tiles against a plain rewriting, and real answers."""

from __future__ import annotations

import math

import families
import pytest
import torch
import transformers as tf

import paredown
from paredown import registry
from paredown.core.attach import attach
from paredown.core.attention import probabilities
from paredown.core.runtime import Runtime
from paredown.errors import ArchitectureError, PolicyError, RecipeError
from paredown.methods.vision import hired
from paredown.methods.vision.hired import Hired
from paredown.methods.vision.random_visual import RandomVisualTokens
from paredown.testbeds import heldout_digits, path
from paredown.testbeds.tasks import mosaic_accuracy


def kept_of(hf, policy, given):
    """Return the map of the pass after the policy chose."""
    seen = []
    original = hired._Hired.features

    def watch(self, features):
        original(self, features)
        seen.append(features)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(hired._Hired, "features", watch)
        with attach(hf, policy):
            families.logits(hf, given)
    return seen[0]


def big_tiles():
    """LLaVA-NeXT with tiles of 4x4 patches and up to 2x2 of them."""
    clip = {**families._CLIP, "image_size": 32, "num_hidden_layers": 4}
    config = tf.LlavaNextConfig(
        vision_config=tf.CLIPVisionConfig(**clip),
        text_config=tf.LlamaConfig(**families._GQA),
        image_token_id=families.IMAGE_TOKEN,
        vision_feature_layer=-2,
        vision_feature_select_strategy="default",
        image_seq_length=16,
        image_grid_pinpoints=[[64, 64], [32, 64], [64, 32], [32, 96]],
    )
    return families._seeded(lambda: tf.LlavaNextForConditionalGeneration(config))


def prompt(hf, size, seed=0):
    """Return a prompt with one image of ``size`` (height, width)."""
    draw = torch.Generator().manual_seed(seed)
    pixels, sizes = torch.randn(1, 5, 3, 32, 32, generator=draw), torch.tensor([size])
    with torch.no_grad():
        count = len(hf.model.get_image_features(pixels, sizes, return_dict=True).pooler_output[0])
    ids = torch.tensor([[5, *[families.IMAGE_TOKEN] * count, 7, 8, 9]])
    return {"input_ids": ids, "pixel_values": pixels, "image_sizes": sizes}


def plainly(early, late, rate, alpha, grid, side):
    """Return what the card's steps 2 to 5 keep, ``[P, N]``, with crops cut where they lie."""
    tiles, count = late.shape
    total = int(tiles * count * rate)
    first = min(int(total * alpha), count)
    rest = min(total - first, (tiles - 1) * count)
    mask = torch.zeros(tiles, count, dtype=torch.bool)
    mask[0, late[0].topk(first).indices] = True
    bright = torch.zeros(count)
    bright[early[0].topk(int(count * (1 - alpha))).indices] = 1
    rows, cols = grid
    blocks = bright.view(rows, side // rows, cols, side // cols).permute(0, 2, 1, 3).flatten(2).sum(-1).flatten()
    for crop, share in enumerate(blocks.tolist()):
        budget = min(math.floor(rest * share / blocks.sum()), count)
        mask[crop + 1, late[crop + 1].topk(budget).indices] = True
    return mask


class TestScores:
    @pytest.mark.parametrize("family", ["llava", "internvl"])
    def test_the_class_token_attends_as_the_eager_tower_says(self, family, monkeypatch):
        # Card: the recomputed row equals output_attentions of the eager ViT to 1e-5.
        hf, given = families.FAMILIES[family](), families.inputs(family)
        seen = {}
        own = hired.class_attention
        monkeypatch.setattr(hired, "class_attention", lambda call: seen.setdefault(call.layer, own(call)))
        kept_of(hf, Hired(keep=0.5, early=0, late=1), given)
        hf.set_attn_implementation("eager")
        with torch.no_grad():
            told = hf.model.vision_tower(given["pixel_values"], output_attentions=True).attentions
        assert sorted(seen) == [0, 1]
        for layer, heads in seen.items():
            torch.testing.assert_close(heads, told[layer][:, :, 0, 1:], atol=1e-5, rtol=0)

    def test_without_a_class_token_attention_received_or_the_mean_query_score(self, monkeypatch):
        hf, given = families.FAMILIES["qwen2_vl"](), families.inputs("qwen2_vl")
        for how in ("received", "mean-query"):
            seen = []
            own = hired.shared_attention

            def watch(call, told, own=own, seen=seen):
                seen.append((call, own(call, told)))
                return seen[-1][1]

            monkeypatch.setattr(hired, "shared_attention", watch)
            found = kept_of(hf, Hired(keep=0.5, substitute=how), given)
            monkeypatch.undo()
            late = [(call, heads) for call, heads in seen if call.layer == 1]
            assert len(late) == 2
            for image, (call, heads) in enumerate(late):
                query = call.query if how == "received" else call.query.mean(2, keepdim=True)
                expected = probabilities(query, call.key, call.scaling).mean(2)
                torch.testing.assert_close(heads, expected, atol=1e-6, rtol=1e-5)
                cells = expected.sum(1).view(4, 4).mean(1)
                assert found.kept[image * 4 : image * 4 + 4].nonzero()[:, 0].tolist() == sorted(
                    cells.topk(2).indices.tolist()
                )


class TestBudget:
    @pytest.mark.parametrize("family", families.VLMS)
    @pytest.mark.parametrize("keep", [0.1, 0.3, 0.5, 0.75, 0.99])
    def test_each_image_keeps_exactly_its_share(self, family, keep):
        hf, given = families.FAMILIES[family](), families.inputs(family)
        found = kept_of(hf, Hired(keep=keep), given)
        for image in range(2):
            count = int((found.image == image).sum())
            shown = count - int(found.marks[found.image == image].sum())
            assert int(found.kept[found.image == image].sum()) == min(max(1, int(keep * count + 1e-9)), shown)
        # No newline token stays.
        assert not (found.kept & found.marks).any()

    @pytest.mark.parametrize("keep", [0.1, 0.33, 0.5])
    @pytest.mark.parametrize("alpha", [0.0, 0.3, 0.5, 1.0])
    @pytest.mark.parametrize("size", [(64, 64), (50, 64), (32, 64), (20, 64), (32, 90)])
    def test_tiles_keep_exactly_the_share_or_no_more_than_it(self, keep, alpha, size):
        hf = big_tiles()
        given = prompt(hf, size)
        found = kept_of(hf, Hired(keep=keep, alpha=alpha), given)
        assert int(found.kept.sum()) == int(keep * len(found.kept) + 1e-9) or alpha == 1.0
        # Card: never more than T as published, where rounding and padding lose some.
        found = kept_of(hf, Hired(keep=keep, alpha=alpha, exact=False), given)
        assert int(found.kept.sum()) <= int(len(found.pictures[0].tiles) * 16 * keep)

    def test_all_of_the_budget_for_the_whole_image_cannot_exceed_it(self):
        hf = big_tiles()
        found = kept_of(hf, Hired(keep=0.1, alpha=1.0), prompt(hf, (64, 64)))
        assert set(found.tile[found.kept].tolist()) == {0}
        found = kept_of(hf, Hired(keep=0.5, alpha=1.0), prompt(hf, (64, 64)))
        assert int(found.kept.sum()) == len(found.kept) // 2


class TestAllocation:
    @pytest.mark.parametrize("size", [(64, 64), (32, 64), (64, 32)])
    @pytest.mark.parametrize("alpha", [0.25, 0.5, 0.75])
    def test_is_the_published_one_with_crops_where_they_lie(self, size, alpha, monkeypatch):
        # Sizes that fill their grids: nothing is padded, so all that was chosen arrives.
        hf = big_tiles()
        given = prompt(hf, size)
        seen = {}
        own = hired.class_attention
        monkeypatch.setattr(hired, "class_attention", lambda call: seen.setdefault(call.layer, own(call)))
        found = kept_of(hf, Hired(keep=0.4, alpha=alpha, exact=False), given)
        assert sorted(seen) == [0, 2]  # the default: the first layer, and the one whose output is read
        mask = plainly(seen[0].sum(1), seen[2].sum(1), 0.4, alpha, found.pictures[0].grid, 4)
        kept = torch.zeros_like(mask)
        chosen = found.kept.nonzero()[:, 0]
        kept[found.tile[chosen], found.row[chosen] * 4 + found.col[chosen]] = True
        assert torch.equal(kept, mask)

    @pytest.mark.parametrize("official", [False, True])
    @pytest.mark.parametrize("quadrant", range(4))
    def test_one_bright_quadrant_gets_the_budget_of_all_crops(self, official, quadrant, monkeypatch):
        # Card, corrected: at alpha 0.75 as many patches are counted as a quadrant has. The released reshape fails it.
        hf = big_tiles()
        given = prompt(hf, (64, 64))

        def bright(call):
            map_ = torch.rand(call.query.shape[0], 1, 4, 4, generator=torch.Generator().manual_seed(1)) * 0.1
            row, col = divmod(quadrant, 2)
            map_[0, 0, row * 2 : row * 2 + 2, col * 2 : col * 2 + 2] += 1
            return map_.flatten(2)

        monkeypatch.setattr(hired, "class_attention", bright)
        found = kept_of(hf, Hired(keep=0.3, alpha=0.75, exact=False, official_allocation=official), given)
        crops = found.tile[found.kept & (found.tile > 0)]
        assert len(crops) > 0
        assert ((crops == quadrant + 1).all()) != official

    def test_the_thumbnail_of_internvl_is_the_whole_image(self):
        hf = families.FAMILIES["internvl"]()
        pixels = torch.randn(5, 3, 16, 16, generator=torch.Generator().manual_seed(0))
        given = {"input_ids": torch.tensor([[5, *[families.IMAGE_TOKEN] * 20, 7]]), "pixel_values": pixels}
        found = kept_of(hf, Hired(keep=0.4), given)
        tiles = torch.bincount(found.tile[found.kept], minlength=5).tolist()
        # It has four tokens of the eight; how crops lie is not known, so they share equally.
        assert tiles == [1, 1, 1, 1, 4]


class TestFields:
    def test_layers_are_indices_or_shares_of_the_depth(self, monkeypatch):
        hf = families.FAMILIES["llava"]()  # three layers
        for told, layers in (((0, 2), [0, 2]), ((0.0, 0.9), [0, 2]), ((1, None), [1])):
            seen = set()
            own = hired.class_attention
            monkeypatch.setattr(
                hired, "class_attention", lambda call, own=own, seen=seen: (seen.add(call.layer), own(call))[1]
            )
            kept_of(hf, Hired(keep=0.5, early=told[0], late=told[1]), families.inputs("llava"))
            monkeypatch.undo()
            assert sorted(seen) == layers
        with pytest.raises(PolicyError, match="vision layer 3 does not exist"):
            Hired(late=3).attach(hf).__enter__()

    def test_what_cannot_be_is_refused(self):
        with pytest.raises(PolicyError, match="three axes"):
            Hired(positions="contiguous").attach(families.FAMILIES["qwen2_vl"]()).__enter__()
        with pytest.raises(ArchitectureError, match="hired acts on images"):
            Hired().attach(families.FAMILIES["llama"]()).__enter__()

    def test_positions_stay_unless_they_are_asked_to_close_up(self):
        for asked, expected in (({}, False), ({"positions": "contiguous"}, True)):
            found = kept_of(families.FAMILIES["llava"](), Hired(keep=0.5, **asked), families.inputs("llava"))
            assert found.contiguous is expected


class TestRandom:
    @pytest.mark.parametrize("family", families.VLMS)
    def test_exact_by_image_and_by_its_pixels_alone(self, family):
        hf, given = families.FAMILIES[family](), families.inputs(family)
        patches = given["pixel_values"]
        half = len(patches) // 2
        twisted = {**given, "pixel_values": torch.cat([patches[half:], patches[:half]])}
        kept = []
        for told in (given, twisted):
            runtime = RandomVisualTokens(keep=0.4, seed=3).runtime(paredown.core.attach.wrap(hf))
            found = watched(hf, runtime, told)
            kept.append(found.kept.view(2, -1))
            assert (kept[-1].sum(1) == int(0.4 * kept[-1].shape[1])).all()
        assert torch.equal(kept[0], kept[1].flip(0))

    def test_seeds_differ(self):
        hf = big_tiles()
        given = prompt(hf, (64, 64))
        masks = set()
        for seed in range(4):
            runtime = RandomVisualTokens(keep=0.4, seed=seed).runtime(paredown.core.attach.wrap(hf))
            masks.add(tuple(watched(hf, runtime, given).kept.tolist()))
        assert len(masks) == 4

    def test_stages_leave_exactly_their_share_at_random(self):
        hf = families.FAMILIES["llava"]()
        given = families.inputs("llava")
        shown = int((given["input_ids"][0] == hf.config.image_token_id).sum())
        rest = given["input_ids"].shape[1] - shown
        rows: dict[int, list[int]] = {}
        kept = set()

        class Counts(Runtime):
            def watch(self, call):
                rows.setdefault(call.layer, []).append(call.query.shape[2])
                if call.layer == 2:
                    kept.add(tuple(call.positions()[0].tolist()))

        model = paredown.core.attach.wrap(hf)
        for seed in range(4):
            policy = RandomVisualTokens(keep=0.6, seed=seed, layers=(1, 2), ratios=(0.5, 0.25))
            with paredown.core.attach.attach_runtimes(model, [policy.runtime(model), Counts(policy, model)]):
                families.logits(hf, given)
        assert rows == {0: [rest + shown] * 4, 1: [rest + shown // 2] * 4, 2: [rest + shown // 4] * 4}
        assert len(kept) > 1
        with pytest.raises(RecipeError, match="one ratio for each layer"):
            registry.create("random-visual-tokens", layers=(1,))


def watched(hf, runtime, given):
    seen = []
    own = runtime.features
    runtime.features = lambda features: (own(features), seen.append(features))[0]
    with paredown.core.attach.attach_runtimes(runtime.model, [runtime]):
        families.logits(hf, given)
    return seen[0]


class TestAnswers:
    def test_beats_random_tokens_of_the_same_number(self):
        # Card: answers at r = 0.2 on a small trained model, five seeds.
        model = paredown.load("testbed:vlm")
        processor = tf.AutoProcessor.from_pretrained(path("vlm"))
        digits, labels = heldout_digits()
        margins = []
        for seed in range(5):
            hits = []
            for policy in (Hired(keep=0.22), RandomVisualTokens(keep=0.22, seed=seed)):
                with attach(model, policy):
                    hits.append(mosaic_accuracy(model.hf, processor, digits, labels, count=60, seed=seed).mean())
            margins.append(hits[0] - hits[1])
        assert sum(margin > 0 for margin in margins) >= 4
        assert sum(margins) / 5 > 0.05
