"""FlowCut: the checks of its paper card, the way through the tower against a plain rewriting, and real answers."""

from __future__ import annotations

import itertools
import math
from typing import Any

import families
import pytest
import torch
import transformers as tf

import paredown
from paredown.core import budget
from paredown.core.attach import attach, attach_runtimes, wrap
from paredown.core.runtime import Runtime
from paredown.errors import PolicyError
from paredown.methods.vision import flowcut
from paredown.methods.vision.flowcut import FlowCut
from paredown.testbeds import heldout_digits, path
from paredown.testbeds.tasks import mosaic_accuracy

LAYERS = 7  # of the deep tower: five are scored, and the first, third and fifth cut


def deep(side: int = 6) -> Any:
    """LLaVA with a tower of seven layers and ``side`` x ``side`` patches."""
    config = tf.LlavaConfig(
        vision_config=tf.CLIPVisionConfig(**{**families._CLIP, "num_hidden_layers": LAYERS, "image_size": 8 * side}),
        text_config=tf.LlamaConfig(**families._GQA),
        image_token_id=families.IMAGE_TOKEN,
        vision_feature_layer=-2,
        vision_feature_select_strategy="default",
        image_seq_length=side * side,
    )
    return families._seeded(lambda: tf.LlavaForConditionalGeneration(config))


def shown(side: int = 6, batch: int = 2, seed: int = 0) -> dict[str, torch.Tensor]:
    draw = torch.Generator().manual_seed(seed)
    ids = torch.tensor([[5, *[families.IMAGE_TOKEN] * side**2, 7, 8, 9]] * batch)
    return {"input_ids": ids, "pixel_values": torch.randn(batch, 3, 8 * side, 8 * side, generator=draw)}


def big_qwen() -> Any:
    """Qwen2-VL with a tower of four layers."""
    config = families.qwen2_vl().config
    config.vision_config.depth = 4
    return families._seeded(lambda: tf.Qwen2VLForConditionalGeneration(config))


def qwen_prompt(*grids: tuple[int, int], seed: int = 0) -> dict[str, torch.Tensor]:
    """Return one row with an image of each size, in patches."""
    draw = torch.Generator().manual_seed(seed)
    ids = [5]
    for high, wide in grids:
        ids += [102, *[families.IMAGE_TOKEN] * (high * wide // 4)]
    told = torch.tensor([[*ids, 7, 8, 9]])
    return {
        "input_ids": told,
        "pixel_values": torch.randn(sum(h * w for h, w in grids), 96, generator=draw),
        "image_grid_thw": torch.tensor([[1, h, w] for h, w in grids]),
        "mm_token_type_ids": (told == families.IMAGE_TOKEN).long(),
    }


class Ward(Runtime):
    """Looks at what the policy in front of it left: rows of the tower and visual tokens of each block."""

    def __init__(self) -> None:
        self.rows: dict[int, torch.Tensor] = {}
        self.visual: dict[int, list[int]] = {}

    def after_vision(self, layer, stream):
        self.rows[layer] = stream.positions()

    def before(self, layer, stream):
        if stream.now.visual is not None:
            self.visual[layer] = stream.visual().sum(1).tolist()


def watched(hf, policy, given) -> Ward:
    model, ward = wrap(hf), Ward()
    with attach_runtimes(model, [policy.runtime(model), ward]):
        families.logits(hf, given)
    return ward


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


def plainly(hf, pixels, target):
    """Return features and their patches after the card's steps 1 to 6 for one image, written with eager attention."""
    tower = hf.model.vision_tower
    hidden = tower.pre_layrnorm(tower.embeddings(pixels))
    heads, ids, flow, select = 4, torch.arange(hidden.shape[1]), None, LAYERS - 2
    for index, block in enumerate(tower.encoder.layers[: select + 1]):
        x = block.layer_norm1(hidden)
        parts = [getattr(block.self_attn, f"{n}_proj")(x)[0].view(len(ids), heads, -1).transpose(0, 1) for n in "qkv"]
        query, key, value = parts
        attention = (query @ key.transpose(1, 2) * query.shape[-1] ** -0.5).softmax(-1)
        context = (attention @ value).transpose(0, 1).reshape(1, len(ids), -1)
        middle = hidden + block.self_attn.out_proj(context)
        hidden = middle + block.mlp(block.layer_norm2(middle))
        if index >= select:
            continue
        c, u = attention.mean(0)[0, 1:], value.mean(0)[1:].abs().sum(-1)
        e = (value[:, :1] @ value[:, 1:].transpose(1, 2)).softmax(-1).mean(0)[0]
        score = (c / c.sum() + e / e.sum()) * u
        flow = score if flow is None else 0.5 * flow + 0.5 * score
        left, later = len(c), select - index - 1
        if later % 2 or left <= target:
            continue
        p = c / c.sum()
        ratio = -(p * p.log()).sum() / math.log(left)
        going = left - target if later == 0 else round(float((left - target) / math.sqrt(later) * (1 - ratio**2)))
        stay = flow.topk(max(left - going, target)).indices.sort().values
        flow, rows = flow[stay], torch.cat([torch.tensor([0]), stay + 1])
        hidden, ids = hidden[:, rows], ids[rows]
    return hf.model.multi_modal_projector(hidden[:, 1:]), ids[1:] - 1


class TestTower:
    @pytest.mark.parametrize("family", families.VLMS)
    def test_nothing_to_cut_leaves_every_bit(self, family):
        # Card: K = N: no layer prunes, logits bit-identical (here with all seams in place).
        hf, given = families.FAMILIES[family](), families.inputs(family)
        expected = families.logits(hf, given)
        model = wrap(hf)
        with attach_runtimes(model, [FlowCut(keep=1.0).runtime(model)]):
            found = families.logits(hf, given)
        assert torch.equal(found, expected)

    @pytest.mark.parametrize("keep", [0.05, 0.3, 0.5, 0.9])
    def test_exactly_k_come_out_and_only_every_second_layer_cuts(self, keep):
        # Card: exactly K rows at the feature layer; counts are non-increasing with depth; pruning only at even rpl.
        hf, given = deep(), shown()
        ward = watched(hf, FlowCut(keep=keep), given)
        target = budget.floored(36, keep, least=1)
        counts = [(rows >= 0).sum(1) - 1 for rows in ward.rows.values()]
        assert counts[LAYERS - 2].tolist() == [target, target]
        assert all((after <= before).all() for before, after in itertools.pairwise(counts))
        assert torch.equal(counts[0], counts[1])
        assert torch.equal(counts[2], counts[3])
        assert ward.visual[0] == [target, target]

    @pytest.mark.parametrize("official", [False, True])
    def test_even_attention_waits_and_one_sharp_ray_cuts(self, official, monkeypatch):
        # Card: uniform CLS attention (h = 1) prunes nothing before the last stage; one-hot (h = 0) (N-K)/sqrt(rpl).
        hf, given = deep(), shown()
        policy = FlowCut(keep=0.25, official_pace=official)

        def even(call):
            there = call.positions()[:, None, 1:] >= 0
            return there / there.sum(-1, keepdim=True)

        monkeypatch.setattr(flowcut, "class_attention", even)
        ward = watched(hf, policy, given)
        assert [rows.shape[1] - 1 for rows in ward.rows.values()] == [36, 36, 36, 36, 9, 9, 9]

        def sharp(call):
            return torch.nn.functional.one_hot(torch.zeros(2, 1, dtype=torch.long), call.query.shape[2] - 1).float()

        monkeypatch.setattr(flowcut, "class_attention", sharp)
        ward = watched(hf, policy, given)
        first = 36 - round((36 - 9) / 2)
        second = first - round((first - 9) / math.sqrt(2))
        assert [rows.shape[1] - 1 for rows in ward.rows.values()] == [first, first, second, second, 9, 9, 9]

    def test_only_the_official_pace_lets_one_image_hurry_another(self, monkeypatch):
        # Card: the batch-wide maximum of r couples samples; ours cuts each by itself.
        hf, given = deep(), shown()

        def mixed(call):
            there = (call.positions()[:, None, 1:] >= 0).float()
            there[0, :, 1:] = 0
            return there / there.sum(-1, keepdim=True)

        monkeypatch.setattr(flowcut, "class_attention", mixed)
        own = (watched(hf, FlowCut(keep=0.25), given).rows[0] >= 0).sum(1).tolist()
        shared = (watched(hf, FlowCut(keep=0.25, official_pace=True), given).rows[0] >= 0).sum(1).tolist()
        assert own == [37 - round(27 / 2), 37]
        assert shared == [37 - round(27 / 2)] * 2

    @pytest.mark.parametrize("keep", [0.15, 0.5])
    def test_the_whole_way_equals_a_plain_rewriting_with_ids(self, keep):
        # Card: the composed index map equals brute force (ids carried along).
        hf, given = deep(), shown()
        model, seen, ward = wrap(hf), [], Ward()
        with attach_runtimes(model, [FlowCut(keep=keep).runtime(model), ward]):
            # Behind the seam's own hook, which writes features back to the whole grid.
            handle = hf.model.multi_modal_projector.register_forward_hook(lambda m, a, out: seen.append(out))
            families.logits(hf, given)
        handle.remove()
        for image in range(2):
            with torch.no_grad():
                features, ids = plainly(hf, given["pixel_values"][image : image + 1], budget.floored(36, keep))
            assert (ward.rows[LAYERS - 2][image, 1:] - 1).tolist() == ids.tolist()
            torch.testing.assert_close(seen[0][image, ids], features[0], atol=1e-5, rtol=1e-4)

    def test_scores_of_zero_attention_stay_numbers(self):
        # Card: exact zeros give NaN in the entropy.
        heat = torch.tensor([[1.0, 0.0, 0.0], [1.0, 1.0, 1.0], [0.0, 0.0, 0.0]])
        found = flowcut.entropy_ratio(heat, torch.tensor([3, 3, 3]))
        torch.testing.assert_close(found, torch.tensor([0.0, 1.0, 0.0]), atol=1e-5, rtol=0)

    def test_qwen_cuts_whole_cells_of_each_image(self):
        # Card: prune in groups of one merger cell, 2K in the tower, K in the language model; each image by itself.
        hf, given = big_qwen(), qwen_prompt((8, 8), (4, 12))
        ward = watched(hf, FlowCut(keep=0.25), given)
        rows = ward.rows[3][0]
        assert (rows.view(-1, 4) == rows.view(-1, 4)[:, :1] // 4 * 4 + torch.arange(4)).all()
        assert [(rows < 64).sum().item(), (rows >= 64).sum().item()] == [2 * 4 * 4, 2 * 3 * 4]
        assert [n for (n,) in ward.visual.values()] == [14, 14, 7]
        # rpl = n_blocks - idx - 1 is even in the second and the last.
        assert ward.rows[0].shape[1] == 112
        alone = watched(hf, FlowCut(keep=0.25), {**qwen_prompt((8, 8)), "pixel_values": given["pixel_values"][:64]})
        assert alone.rows[3][0].tolist() == rows[rows < 64].tolist()


class TestLanguage:
    @pytest.mark.parametrize(("family", "full"), [("llava_next", 14), ("qwen2_vl", 4), ("internvl", 4)])
    def test_the_last_cut_leaves_exactly_k(self, family, full):
        hf, given = families.FAMILIES[family](), families.inputs(family)
        for keep in (0.25, 0.5):
            target = budget.floored(full, keep, least=1)
            ward = watched(hf, FlowCut(keep=keep), given)
            assert ward.visual[2] == [target, target]
            assert ward.visual[0] == ward.visual[1]
            assert ward.visual[0][0] >= target

    @pytest.mark.parametrize("size", [(64, 64), (40, 64), (64, 24), (30, 96)])
    def test_tiles_and_padding_come_to_exactly_k(self, size):
        # Card: survivors go back to the grid and are un-padded; counts vary by image, and K of its tokens come out.
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
        hf = families._seeded(lambda: tf.LlavaNextForConditionalGeneration(config))
        pixels = torch.randn(1, 5, 3, 32, 32, generator=torch.Generator().manual_seed(0))
        sizes = torch.tensor([size])
        with torch.no_grad():
            full = len(hf.model.get_image_features(pixels, sizes, return_dict=True).pooler_output[0])
        ids = torch.tensor([[5, *[families.IMAGE_TOKEN] * full, 7, 8]])
        given = {"input_ids": ids, "pixel_values": pixels, "image_sizes": sizes}
        for keep in (0.2, 0.4, 0.7):
            ward = watched(hf, FlowCut(keep=keep), given)
            assert ward.visual[2] == [budget.floored(full, keep)]
            assert all(n <= 1 + 2 * budget.floored(16, keep) for n in (ward.rows[2] >= 0).sum(1).tolist())

    def test_scores_are_those_of_the_last_token(self):
        # Card: LLM stage; both maps over the visual block, mean over heads, times the size of the mean value.
        hf, given = families.FAMILIES["qwen2_vl"](), families.inputs("qwen2_vl")
        model, seen = wrap(hf), []

        class Look(Runtime):
            def watch(self, call):
                if call.layer == 1:
                    seen.append((call, call.now.memo["flowcut"].clone()))

        with attach_runtimes(model, [FlowCut(keep=0.5).runtime(model), Look(None, model)]):
            families.logits(hf, given)
        call, scores = seen[0]
        at = call.positions()[0]
        image = (given["input_ids"][0, at] == families.IMAGE_TOKEN).nonzero()[:, 0]
        query, key, value = call.query[0], call.key[0].repeat_interleave(2, 0), call.value[0]
        a = (query[:, -1:] @ key[:, image].transpose(1, 2) * call.scaling).softmax(-1).mean(0)[0]
        e = (value[:, -1:] @ value[:, image].transpose(1, 2) * value.shape[-1] ** -0.5).softmax(-1).mean(0)[0]
        torch.testing.assert_close(scores[0, image], (a + e) * value.mean(0)[image].abs().sum(-1))

    def test_layers_that_do_not_exist_are_refused(self):
        with pytest.raises(PolicyError, match="language_layer 3"):
            FlowCut(keep=0.5, language_layer=3).runtime(wrap(families.FAMILIES["qwen2_vl"]()))


class TestRuns:
    @pytest.mark.parametrize("family", families.VLMS)
    def test_a_padded_batch_and_its_beams_are_its_rows(self, family):
        hf, given = families.FAMILIES[family](), families.inputs(family)
        given["attention_mask"][1, :2] = 0
        with attach(hf, FlowCut(keep=0.5)):
            both, beams = generate(hf, given), generate(hf, given, num_beams=2)
            for row, cut in ((0, 0), (1, 2)):
                one = alone(family, given, row, cut)
                found = generate(hf, one)
                for a, b in zip(both.logits, found.logits, strict=True):
                    torch.testing.assert_close(a[row], b[0], atol=2e-5, rtol=1e-4)
                assert torch.equal(generate(hf, one, num_beams=2).sequences[0], beams.sequences[row, cut:])

    @pytest.mark.parametrize("family", families.VLMS)
    def test_behind_the_tower_the_budget_is_the_same(self, family):
        hf, given = families.FAMILIES[family](), families.inputs(family)
        full = 14 if family == "llava_next" else 4
        ward = watched(hf, FlowCut(keep=0.25, behind=True), given)
        assert ward.visual[2] == [budget.floored(full, 0.25, least=1)] * 2
        assert len({rows.shape[1] for rows in ward.rows.values()}) == 1

    @pytest.mark.parametrize("family", families.VLMS)
    def test_logits_keep_their_shape_and_runs_agree(self, family):
        hf, given = families.FAMILIES[family](), families.inputs(family)
        plain = families.logits(hf, given)
        with attach(hf, FlowCut(keep=0.5)):
            assert families.logits(hf, given).shape == plain.shape
            assert not torch.equal(families.logits(hf, given), plain)
            again = generate(hf, given)
            assert torch.equal(again.sequences, generate(hf, given).sequences)
        assert torch.equal(families.logits(hf, given), plain)


def test_it_beats_random_at_the_same_place_on_real_answers():
    # Card: beats random on a small trained VLM (figures of 200 questions are in the report; these are fewer).
    model = paredown.load("testbed:vlm", dtype="float32")
    digits = heldout_digits()
    assert path("vlm").is_dir()

    class Shuffled(flowcut._Inside):
        """The same cut at the same place, by lot."""

        def _add(self, layer, count):
            super()._add(layer, count)
            draw = torch.Generator().manual_seed(layer)
            self._sum = torch.rand(self._sum.shape, generator=draw)
            return self._sum, torch.ones_like(self._sum)

    def hits(runtime):
        with attach_runtimes(model, [runtime]):
            return mosaic_accuracy(model.hf, model.processor, *digits, count=60, generate=True).mean()

    policy = FlowCut(keep=0.33)
    assert hits(policy.runtime(model)) > hits(Shuffled(policy, model)) + 0.2
