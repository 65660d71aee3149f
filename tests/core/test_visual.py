"""Images before the language model: maps are right, what leaves is gone and nothing else moves."""

from __future__ import annotations

import families
import pytest
import torch
from images import (
    FLAT,
    VLMS,
    Drops,
    Looks,
    MovesUp,
    Thins,
    attached,
    build,
    close,
    embedded,
    generate,
    one,
    several,
)

from paredown.core.attach import attach_runtimes, wrap
from paredown.core.token_scores import attended, images_of, upcoming
from paredown.errors import ArchitectureError, PolicyError


@torch.no_grad()
def shortened(hf, given, stay, *, contiguous=False):
    """Return logits of a language model that is given only the tokens ``stay`` ``[T]`` of one prompt."""
    embeds, ids = embedded(hf, given)
    if contiguous or ids is None:
        ids = torch.arange(embeds.shape[1])[None]
    ids = ids[..., : int(stay.sum())] if contiguous else ids[..., stay]
    embeds = embeds[:, stay]
    # Without a mask a gap in the position ids would count as the start of another document.
    mask = torch.ones(embeds.shape[:2], dtype=torch.long)
    out = hf.model.language_model(inputs_embeds=embeds, position_ids=ids, attention_mask=mask)
    return hf.lm_head(out.last_hidden_state)


@pytest.mark.parametrize("family", VLMS)
class TestLooking:
    def test_changes_no_bit(self, family):
        hf, given = build(family), families.inputs(family)
        expected, told = families.logits(hf, given), generate(hf, given)
        runtime, context = attached(hf, Looks)
        with context:
            assert torch.equal(families.logits(hf, given), expected)
            found = generate(hf, given)
        assert torch.equal(found.sequences, told.sequences)
        for a, b in zip(found.logits, told.logits, strict=True):  # decoding packs the heads of a group: other rounding
            close(a, b)
        assert {layer for layer, _, _ in runtime.calls} == set(range(len(wrap(hf).anatomy.vision.blocks)))

    def test_leaves_no_trace(self, family):
        hf, given = build(family), families.inputs(family)
        families.logits(hf, given)
        before = [(sorted(vars(m)), len(m._forward_hooks), len(m._forward_pre_hooks)) for m in hf.modules()]
        names = [m.config._attn_implementation for m in hf.modules() if hasattr(m, "config")]
        runtime, context = attached(hf, Drops)
        runtime.features = lambda features: (_ for _ in ()).throw(RuntimeError("mine"))
        with pytest.raises(RuntimeError, match="mine"), context:
            families.logits(hf, given)
        assert before == [(sorted(vars(m)), len(m._forward_hooks), len(m._forward_pre_hooks)) for m in hf.modules()]
        assert names == [m.config._attn_implementation for m in hf.modules() if hasattr(m, "config")]

    def test_the_map_names_the_place_that_each_feature_comes_from(self, family):
        hf, given = build(family), families.inputs(family)
        seen = []
        runtime, context = attached(hf, Looks)
        with context:
            handle = hf.get_submodule(wrap(hf).anatomy.projector).register_forward_hook(
                lambda m, a, out: seen.append(out)
            )
            families.logits(hf, given)
            handle.remove()
        found, projected = runtime.map, seen[0]
        if family == FLAT:
            projected = projected.view(2, 4, -1)
        for index in range(len(found.values)):
            if found.marks[index]:
                torch.testing.assert_close(found.values[index], hf.model.image_newline, atol=0, rtol=0)
                continue
            cell = int(found.row[index] * 2 + found.col[index])
            assert torch.equal(found.values[index], projected[int(found.tile[index]), cell])
        assert sorted(found.patches[~found.marks].flatten().tolist()) == list(range(found.patches.max() + 1))

    def test_scores_of_patches_are_pooled_to_features(self, family):
        hf, given = build(family), families.inputs(family)
        runtime, context = attached(hf, Looks)
        with context:
            families.logits(hf, given)
        found = runtime.map
        scores = torch.rand(int(found.patches.max()) + 1)
        pooled = found.pool(scores)
        for index, patches in enumerate(found.patches.tolist()):
            expected = -torch.inf if patches[0] < 0 else scores[patches].mean()
            torch.testing.assert_close(pooled[index], torch.as_tensor(expected))


@pytest.mark.parametrize("family", VLMS)
class TestDropping:
    def test_is_as_if_the_tokens_had_not_been_there(self, family):
        hf = build(family)
        given = one(family, families.inputs(family), 0)
        runtime, context = attached(hf, Drops)
        with context:
            found = families.logits(hf, given)
        stay = torch.ones(given["input_ids"].shape[1], dtype=torch.bool)
        stay[given["input_ids"][0] == families.IMAGE_TOKEN] = runtime.map.kept
        close(found[:, stay], shortened(hf, given, stay))

    def test_contiguous_positions_are_those_of_a_shorter_prompt(self, family):
        hf, given = build(family), families.inputs(family)
        runtime, context = attached(hf, MovesUp)
        if family == FLAT:
            with context, pytest.raises(PolicyError, match="three axes"):
                families.logits(hf, given)
            return
        given = one(family, given, 0)
        with context:
            found = families.logits(hf, given)
        stay = torch.ones(given["input_ids"].shape[1], dtype=torch.bool)
        stay[given["input_ids"][0] == families.IMAGE_TOKEN] = runtime.map.kept
        close(found[:, stay], shortened(hf, given, stay, contiguous=True))

    @pytest.mark.parametrize("kind", [Drops, MovesUp, Thins])
    @pytest.mark.parametrize("more", [{}, {"num_beams": 3}, {"num_beams": 2, "num_return_sequences": 2}])
    def test_a_cache_makes_no_difference(self, family, kind, more):
        # Also: positions that moved up follow the beams, and images are repeated as the prompt is.
        if family == FLAT and kind is MovesUp:
            pytest.skip("three axes")
        hf, given = build(family), families.inputs(family)
        _, context = attached(hf, kind)
        with context:
            cached = generate(hf, given, **more)
            plain = generate(hf, given, use_cache=False, **more)
        assert torch.equal(cached.sequences, plain.sequences)
        for a, b in zip(cached.logits, plain.logits, strict=True):
            close(a, b)

    @pytest.mark.parametrize("kind", [Drops, MovesUp, Thins])
    def test_a_padded_batch_is_its_rows(self, family, kind):
        if family == FLAT and kind is MovesUp:
            pytest.skip("three axes")
        hf, given = build(family), families.inputs(family)
        rows = [one(family, given, i) for i in range(2)]
        pad = torch.zeros((1, 3), dtype=torch.long)
        for name in ("input_ids", "attention_mask", "mm_token_type_ids"):
            if name in given:
                # The second row loses its last three tokens and gets padding in front.
                given[name] = torch.cat([given[name][:1], torch.cat([pad, given[name][1:, :-3]], 1)])
                rows[1][name] = rows[1][name][:, :-3]
        _, context = attached(hf, kind)
        with context:
            both = generate(hf, given)
            alone = [generate(hf, row) for row in rows]
        for index in range(2):
            for a, b in zip(both.logits, alone[index].logits, strict=True):
                close(a[index], b[0])

    def test_the_cache_holds_what_is_left(self, family):
        hf, given = build(family), families.inputs(family)
        model = wrap(hf)
        runtime = Drops(model)
        with attach_runtimes(model, [runtime]) as it:
            generate(hf, given)
            length = given["input_ids"].shape[1] + 4
            gone = int((~runtime.map.kept).sum()) // 2
            assert it.last.get_seq_length() == length
            for layer in it.last.layers:
                assert layer.stores[0].entries.length == length - gone


def skip_where_beams_mix_images(hf, given):
    """Skip where transformers itself gives the beams of a row different images, as releases before 5.23 do."""
    seen = []
    decoder = hf.get_submodule(wrap(hf).anatomy.language.decoder)
    handle = decoder.register_forward_pre_hook(lambda m, a, k: seen.append(k["inputs_embeds"]), with_kwargs=True)
    generate(hf, given, num_beams=2)
    handle.remove()
    if not torch.equal(seen[0][0], seen[0][1]):
        pytest.skip("this release of transformers mixes up the images of beams")


@pytest.mark.parametrize("family", VLMS)
class TestSeveralImages:
    def test_each_token_knows_its_image(self, family):
        hf, given = build(family), several(family)
        runtime, context = attached(hf, Looks)
        with context:
            families.logits(hf, given)
            seen = given["input_ids"] == families.IMAGE_TOKEN
            each = len(runtime.map.values) // 3
            assert runtime.images[seen].tolist() == [i for i in range(3) for _ in range(each)]
            assert (runtime.images[~seen] == -1).all()

    def test_beams_have_the_images_of_their_row(self, family):
        hf, given = build(family), several(family)
        skip_where_beams_mix_images(hf, given)
        runtime, context = attached(hf, Looks)
        with context:
            families.logits(hf, given)
            seen = given["input_ids"] == families.IMAGE_TOKEN
            each = len(runtime.map.values) // 3
            generate(hf, given, num_beams=2)
            # Beams repeat rows; each has two images, shared or copied as the release of transformers has it.
            for row in runtime.images[:2]:
                told = row[seen[0]]
                assert len(told[:each].unique()) == len(told[each:].unique()) == 1
                assert told[0] >= 0
                assert told[-1] == told[0] + 1

    @pytest.mark.parametrize("kind", [Drops, Thins])
    def test_beams_and_cache(self, family, kind):
        hf, given = build(family), several(family)
        skip_where_beams_mix_images(hf, given)
        _, context = attached(hf, kind)
        with context:
            cached, plain = generate(hf, given, num_beams=2), generate(hf, given, num_beams=2, use_cache=False)
        assert torch.equal(cached.sequences, plain.sequences)

    def test_rows_may_lose_different_numbers(self, family):
        hf, given = build(family), several(family)

        class Uneven(Looks):
            def features(self, features):
                features.keep(features.image != 0)

        _, context = attached(hf, Uneven)
        with context:
            both = generate(hf, given)
            plain = generate(hf, given, use_cache=False)
        for a, b in zip(both.logits, plain.logits, strict=True):
            close(a, b)
        # Row 1 kept all that it had.
        dense = generate(hf, given)
        close(both.logits[0][1], dense.logits[0][1])
        assert (both.logits[0][0] - dense.logits[0][0]).abs().max() > 1e-3

    def test_images_are_told_apart_by_their_pixels(self, family):
        hf, given = build(family), several(family)
        runtime, context = attached(hf, Looks)
        with context:
            families.logits(hf, given)
        digests = [runtime.map.digest(i) for i in range(3)]
        assert len(set(digests)) == 3
        last = {k: v[-1:] for k, v in given.items()}
        if family == FLAT:
            last["pixel_values"] = given["pixel_values"][-16:]
        runtime, context = attached(hf, Looks)
        with context:
            families.logits(hf, last)
        assert runtime.map.digest(0) == digests[2]


class TestTiles:
    @pytest.mark.parametrize("size", [(16, 32), (10, 32), (32, 13), (32, 32), (16, 9), (27, 32)])
    def test_unpadded_tiles_are_mapped(self, size):
        # Height, width: padding is cut off rows or columns of the crops' grid, and newlines end the rows.
        hf = build("llava_next")
        pixels = torch.randn(1, 5, 3, 16, 16, generator=torch.Generator().manual_seed(0))
        seen = []
        handle = hf.model.multi_modal_projector.register_forward_hook(lambda m, a, out: seen.append(out))
        runtime, context = attached(hf, Looks)
        with context, torch.no_grad():
            out = hf.model.get_image_features(pixels, torch.tensor([size]), return_dict=True)
            count = len(out.pooler_output[0])
            ids = torch.tensor([[5, *[families.IMAGE_TOKEN] * count, 7, 8]])
            hf(input_ids=ids, pixel_values=pixels, image_sizes=torch.tensor([size]))
        handle.remove()
        found, projected = runtime.map, seen[-1]
        shown = (~found.marks).nonzero()[:, 0]
        cells = found.row * 2 + found.col
        assert torch.equal(found.values[shown], projected[found.tile[shown], cells[shown]])
        rows, cols = found.pictures[0].grid
        assert rows * cols == len(found.pictures[0].crops) == len(projected) - 1
        assert found.marks.sum() > 0

    def test_the_small_picture_of_internvl_comes_last(self):
        hf = build("internvl")
        pixels = torch.randn(4, 3, 16, 16, generator=torch.Generator().manual_seed(0))
        ids = torch.tensor([[5, *[families.IMAGE_TOKEN] * 12, 6, *[families.IMAGE_TOKEN] * 4, 7]])
        runtime, context = attached(hf, Looks)
        with context:
            families.logits(hf, {"input_ids": ids, "pixel_values": pixels})
        first, second = runtime.map.pictures
        assert (first.whole, list(first.crops), second.whole, list(second.crops)) == (2, [0, 1], 3, [])


class TestAhead:
    @pytest.mark.parametrize("family", ["llava", FLAT])
    def test_scores_are_the_attention_of_the_next_block(self, family):
        hf, given, found = build(family), families.inputs(family), {}

        class Scores(Looks):
            def before(self, layer, stream):
                rows = torch.tensor([[stream.hidden.shape[1] - 1, 3]] * 2)
                found[layer] = attended(upcoming(self.model, layer, stream), rows)

        _, context = attached(hf, Scores)
        with context:
            families.logits(hf, given)
        hf.set_attn_implementation("eager")
        with torch.no_grad():
            told = hf(**given, output_attentions=True).attentions
        for layer, scores in found.items():
            close(scores, told[layer][:, :, [-1, 3]])

    def test_images_of_a_stream(self):
        hf, given = build("llava"), several("llava")
        found = []

        class Lists(Looks):
            def before(self, layer, stream):
                found.append([(row, at.tolist(), count) for row, at, count in images_of(stream)])
                if layer == 0:
                    stream.keep(stream.positions() != 2)

        _, context = attached(hf, Lists)
        with context:
            families.logits(hf, given)
        assert found[0] == [(0, [2, 3, 4, 5], 4), (0, [9, 10, 11, 12], 4), (1, [10, 11, 12, 13], 4)]
        assert found[1] == [(0, [2, 3, 4], 4), (0, [8, 9, 10, 11], 4), (1, [9, 10, 11, 12], 4)]


class TestTurns:
    def test_positions_go_on_from_where_they_moved_up_to(self):
        # Two turns with an image each on one cache, against one pass without a cache.
        hf, given = build("llava"), several("llava")
        ids, pixels = given["input_ids"][:1], given["pixel_values"][:2]
        _, context = attached(hf, MovesUp)
        with context, torch.no_grad():
            whole = hf(input_ids=ids, pixel_values=pixels, use_cache=False).logits
            first = hf(input_ids=ids[:, :8], pixel_values=pixels[:1])
            second = hf(input_ids=ids[:, 8:], pixel_values=pixels[1:], past_key_values=first.past_key_values)
        close(second.logits[:, -2:], whole[:, -2:])

    def test_a_text_alone_passes(self):
        hf = build("llava")
        ids = torch.tensor([[5, 6, 7, 8]])
        expected = families.logits(hf, {"input_ids": ids})
        _, context = attached(hf, Drops)
        with context:
            assert torch.equal(families.logits(hf, {"input_ids": ids}), expected)


def test_a_model_without_images_is_refused():
    hf = build("llama")
    with pytest.raises(ArchitectureError, match="reads no images"):
        attached(hf, Drops)[1].__enter__()
