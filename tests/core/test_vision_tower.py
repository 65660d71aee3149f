"""The vision tower under a policy: fewer rows, the same grid, and families that cannot be followed are refused."""

from __future__ import annotations

from typing import Any

import families
import pytest
import torch
import transformers as tf
from images import (
    FLAT,
    VLMS,
    Drops,
    Looks,
    Thins,
    ThinsUnevenly,
    attached,
    build,
    close,
)

from paredown.core.attach import attach_runtimes, wrap
from paredown.core.runtime import Runtime
from paredown.core.token_scores import images_of
from paredown.errors import ArchitectureError, PolicyError


@torch.no_grad()
def thinned_by_hand(hf, family, given, keep):
    """Return the tower's output where rows ``keep`` go on after block 0, at the layer that features are taken from."""
    tower = wrap(hf).anatomy.vision
    seen: dict[str, Any] = {}

    def note(module, args, kwargs, output):
        seen.update(kwargs=kwargs, hidden=output[0] if isinstance(output, tuple) else output, args=args[1:])

    handle = hf.get_submodule(tower.blocks[0].path).register_forward_hook(note, with_kwargs=True)
    families.logits(hf, given)
    handle.remove()
    hidden, told = seen["hidden"], dict(seen["kwargs"])
    if family == FLAT:
        hidden = hidden[keep]
        told["position_embeddings"] = tuple(table[keep] for table in told["position_embeddings"])
        told["cu_seqlens"] = torch.tensor([0, *keep.view(2, 16).sum(1).cumsum(0).tolist()], dtype=torch.int32)
    else:
        hidden = hidden[:, keep]
    last = len(tower.blocks) - (2 if family in ("llava", "llava_next") else 1)
    for part in tower.blocks[1 : last + 1]:
        out = hf.get_submodule(part.path)(hidden, *seen["args"], **told)
        hidden = out[0] if isinstance(out, tuple) else out
    return hidden


@pytest.mark.parametrize("family", VLMS)
class TestThinningTheTower:
    def test_is_the_tower_run_on_fewer_rows(self, family):
        hf, given = build(family), families.inputs(family)
        runtime, context = attached(hf, Thins)
        with context:
            families.logits(hf, given)
        found = runtime.map
        count = 16 if family == "internvl" else 4
        keep = torch.arange(32) // 4 % 2 == 0 if family == FLAT else torch.arange(count + 1) % 2 == 1
        if family != FLAT:
            keep[0] = True
        hidden = thinned_by_hand(hf, family, given, keep)
        if family == "internvl":
            whole = hidden.new_zeros((2, count + 1, hidden.shape[-1]))
            whole[:, keep] = hf.model.vision_tower.layernorm(hidden)
            shuffled = hf.model.pixel_shuffle(whole[:, 1:].reshape(2, 4, 4, -1)).reshape(2, 4, -1)
            expected = hf.model.multi_modal_projector(shuffled).flatten(0, 1)
            close(found.values, expected)
            return
        if family == FLAT:
            close(found.values[found.alive], hf.model.visual.merger(hidden))
            assert found.alive.tolist() == [True, False] * 4
        else:
            projected = hf.model.multi_modal_projector(hidden[:, 1:])
            alive = found.alive & ~found.marks
            assert alive.sum() * 2 == (~found.marks).sum()
            place = (found.row * 2 + found.col)[alive] // 2
            close(found.values[alive], projected[found.tile[alive], place])
        assert (found.values[~found.alive] == 0).all()
        assert torch.equal(found.kept, found.alive)

    def test_tiles_may_lose_different_numbers(self, family):
        if family == FLAT:
            pytest.skip("no tiles")
        hf, given = build(family), families.inputs(family)
        even, context = attached(hf, Thins)
        with context:
            families.logits(hf, given)
        uneven, context = attached(hf, ThinsUnevenly)
        with context:
            families.logits(hf, given)
        other = (uneven.map.tile != 0) & uneven.map.alive
        close(uneven.map.values[other], even.map.values[other])
        first = (uneven.map.tile == 0) & uneven.map.alive
        assert (uneven.map.values[first] - even.map.values[first]).abs().max() > 1e-4
        calls = [rows for layer, _, rows in uneven.calls if layer == 1]
        # Fillers stand behind, so that the class token stays in front.
        assert calls[0][0][0] == 0
        assert calls[0][0][-1] == -1

    def test_what_belongs_together_must_leave_together(self, family):
        hf, given = build(family), families.inputs(family)

        class Breaks(Looks):
            def after_vision(self, layer, stream):
                if layer == 0:
                    stream.keep(stream.positions() != 0)

        _, context = attached(hf, Breaks)
        with context, pytest.raises(PolicyError, match=r"class token|together|cell"):
            families.logits(hf, given)

    def test_a_prompt_of_embeddings_is_refused(self, family):
        hf, given = build(family), families.inputs(family)
        embeds = hf.get_input_embeddings()(given["input_ids"])
        images = {k: v for k, v in given.items() if k in ("pixel_values", "image_sizes", "image_grid_thw")}
        _, context = attached(hf, Thins)
        with context, torch.no_grad():
            encoded = hf.model.get_image_features(**images, return_dict=True)
            with pytest.raises(PolicyError, match="pass input_ids"):
                hf.model(inputs_embeds=embeds, mm_encoder_outputs={"image": encoded})


class TestVideos:
    @pytest.mark.parametrize("kind", [Drops, Thins])
    def test_are_left_alone(self, kind):
        hf = build(FLAT)
        ids = torch.tensor([[5, 102, *[101] * 4, 103, 7, 8]])
        given = {
            "input_ids": ids,
            "pixel_values_videos": torch.randn(16, 96, generator=torch.Generator().manual_seed(0)),
            "video_grid_thw": torch.tensor([[1, 4, 4]]),
            "mm_token_type_ids": (ids == 101).long() * 2,
        }
        expected = families.logits(hf, given)
        _, context = attached(hf, kind)
        with context:
            assert torch.equal(families.logits(hf, given), expected)


class TestSegments:
    def test_each_image_of_a_flat_tower_is_seen_apart(self):
        hf, given = build(FLAT), families.inputs(FLAT)
        runtime, context = attached(hf, Thins)
        with context:
            families.logits(hf, given)
        first = [rows for layer, _, rows in runtime.calls if layer == 0]
        assert first == [[list(range(16))], [list(range(16, 32))]]
        later = [rows for layer, _, rows in runtime.calls if layer == 1]
        assert later == [[[0, 1, 2, 3, 8, 9, 10, 11]], [[16, 17, 18, 19, 24, 25, 26, 27]]]


def gemma3_images():
    """A family whose 16 patches are averaged to 4 features, in a way that no map is made for."""
    config = tf.Gemma3Config(
        text_config={**families._GQA, "head_dim": 8, "sliding_window": 64, "query_pre_attn_scalar": 8},
        vision_config={
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "image_size": 16,
            "patch_size": 4,
        },
        mm_tokens_per_image=4,
        image_token_index=families.IMAGE_TOKEN,
        boi_token_index=102,
        eoi_token_index=103,
    )
    hf = tf.Gemma3ForConditionalGeneration(config).eval()
    ids = torch.tensor([[5, 102, *[families.IMAGE_TOKEN] * 4, 103, 7, 8]] * 2)
    pixels = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    return hf, {"input_ids": ids, "pixel_values": pixels, "token_type_ids": (ids == families.IMAGE_TOKEN).long()}


class TestOtherFamilies:
    def test_what_needs_no_map_runs(self):
        hf, given = gemma3_images()
        expected = families.logits(hf, given)
        seen = []

        class Reads(Runtime):
            def before(self, layer, stream):
                seen.append((stream.now.images, list(images_of(stream))))

        model = wrap(hf)
        with attach_runtimes(model, [Reads(None, model)]):
            torch.testing.assert_close(families.logits(hf, given), expected)
        assert seen[0][0][0].tolist() == [-1, -1, 0, 0, 0, 0, -1, -1, -1]
        assert seen[0][0][1].tolist() == [-1, -1, 1, 1, 1, 1, -1, -1, -1]

    def test_what_needs_one_is_refused(self):
        hf, given = gemma3_images()
        with pytest.raises(ArchitectureError, match="patches cannot leave in the vision tower of Gemma3"):
            attached(hf, Thins)[1].__enter__()

        class Scores(Runtime):
            def look(self, call):
                pass

            def features(self, features):
                pass

        model = wrap(hf)
        with attach_runtimes(model, [Scores(None, model)]), pytest.raises(ArchitectureError, match="cannot follow"):
            families.logits(hf, given)


def test_windows_of_patches_are_refused():
    config = tf.Qwen2_5_VLConfig(
        text_config={
            **families._GQA,
            "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [1, 1, 2]},
        },
        vision_config={
            "depth": 2,
            "hidden_size": 32,
            "out_hidden_size": 32,
            "num_heads": 4,
            "intermediate_size": 48,
            "patch_size": 4,
            "window_size": 16,
            "fullatt_block_indexes": [1],
        },
        image_token_id=families.IMAGE_TOKEN,
        video_token_id=101,
        vision_start_token_id=102,
        vision_end_token_id=103,
    )
    hf = tf.Qwen2_5_VLForConditionalGeneration(config).eval()
    with pytest.raises(ArchitectureError, match="windows"):
        attached(hf, Thins)[1].__enter__()
