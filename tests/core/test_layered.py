"""Saved and reloaded is bit for bit what was in memory; plain loading of unequal layers fails; generation goes on."""

from __future__ import annotations

import json
from pathlib import Path

import families
import pytest
import torch
from families import DECODERS, FAMILIES, MOE, VLMS, inputs, logits
from transformers import AutoConfig, PreTrainedModel
from transformers.integrations.heterogeneity import HeterogeneousConfigMixin

from paredown.core import anatomy, surgery
from paredown.core.anatomy import Anatomy
from paredown.core.dropped import HollowLayer
from paredown.core.edits import (
    DropBlock,
    DropSublayer,
    Edit,
    KeepExpertNeurons,
    KeepExperts,
    KeepHeads,
    KeepNeurons,
)
from paredown.errors import CheckpointError

NO_HEADS = ("deepseek_v3", "olmoe")
# Fewer heads for all layers can only be said globally where the family reads `head_dim` and the hidden size (32) stays
# a multiple of the heads where the family asks for that; elsewhere they are said layer by layer.
HEADS_GLOBAL = (
    "llama",
    "qwen3",
    "mistral",
    "gemma3",
    "phi",
    "mixtral",
    "qwen2_moe",
    "qwen3_moe",
    "qwen3_moe_mixed",
    "llava",
    "llava_next",
    "internvl",
)


def _uniform(name: str, found: Anatomy) -> list[Edit]:
    """Cut all layers alike and remove one block: what plain transformers can load."""
    edits: list[Edit] = [DropBlock(layer=1)]
    for part in found.language.blocks:
        if part.index == 1:
            continue
        if part.mlp is not None:
            edits.append(KeepNeurons(layer=part.index, keep=tuple(range(part.index, 36 + part.index))))
        if part.experts is not None:
            edits.append(KeepExperts(layer=part.index, keep=(0, 3, 5, 7), top_k=1))
            beside = None if part.experts.shared is None else tuple(range(16))
            narrow = tuple(tuple(range(e, e + 8)) for e in range(4))
            edits.append(KeepExpertNeurons(layer=part.index, keep=narrow, shared=beside))
        if name in HEADS_GLOBAL:
            edits.append(KeepHeads(layer=part.index, keep=(1,)))
    return edits


def _unequal(name: str, found: Anatomy) -> dict[str, list[Edit]]:
    """Return edits after which layers differ, one kind a time."""
    last = found.language.blocks[-1]
    assert last.attention is not None
    kinds: dict[str, list[Edit]] = {}
    if name != "bert":
        kinds["no attention"] = [DropSublayer(layer=0, part="attention")]
        kinds["no mlp"] = [DropSublayer(layer=last.index, part="mlp")]
        kinds["no mlp first"] = [DropSublayer(layer=0, part="mlp")]
    if name not in NO_HEADS:
        kinds["heads"] = [KeepHeads(layer=1, keep=(1,))]
    if last.mlp is not None:
        kinds["neurons"] = [KeepNeurons(layer=last.index, keep=tuple(range(7)))]
    if last.experts is not None:
        whole = (tuple(range(last.experts.width)),) * 8
        kinds["experts"] = [KeepExperts(layer=last.index, keep=(0, 3, 5, 7), top_k=2)]
        kinds["top_k"] = [KeepExperts(layer=last.index, keep=tuple(range(8)), top_k=1)]
        kinds["expert neurons"] = [KeepExpertNeurons(layer=last.index, keep=((0, 5, 7, 9),) * 8)]
        ragged = tuple(tuple(range(3 * e)) for e in range(8))
        kinds["ragged"] = [KeepExpertNeurons(layer=last.index, keep=ragged)]
        kinds["ragged everywhere"] = [
            KeepExpertNeurons(layer=part.index, keep=ragged) for part in found.language.blocks if part.experts
        ]
        if last.experts.shared is not None:
            kinds["shared"] = [KeepExpertNeurons(layer=last.index, keep=whole, shared=(1, 2, 3))]
    return kinds


def _edit(name: str, edits: list[Edit], tower: str = "language") -> PreTrainedModel:
    model = FAMILIES[name]()
    surgery.apply_model(model, anatomy.find(model), edits, tower=tower)  # type: ignore[arg-type]
    return model


def _reload(model: PreTrainedModel, folder: Path) -> PreTrainedModel:
    config = AutoConfig.from_pretrained(folder)
    with surgery.layered(config):
        loaded, report = type(model).from_pretrained(folder, output_loading_info=True)
    assert not any(report.values()), report
    return loaded.eval()


def _same(model: PreTrainedModel, loaded: PreTrainedModel, name: str) -> None:
    assert torch.equal(logits(model, inputs(name)), logits(loaded, inputs(name)))
    assert anatomy.find(loaded) == anatomy.find(model)
    assert surgery.is_uniform(loaded.config) == surgery.is_uniform(model.config)
    for key, value in model.state_dict().items():
        assert torch.equal(value, loaded.state_dict()[key]), key


@pytest.mark.parametrize("name", FAMILIES)
def test_equal_layers_load_in_plain_transformers(name: str, tmp_path: Path) -> None:
    model = FAMILIES[name]()
    found = anatomy.find(model)
    surgery.apply_model(model, found, _uniform(name, found))
    assert surgery.loads_in(model.config) == "transformers"
    model.save_pretrained(tmp_path)
    loaded, report = type(model).from_pretrained(tmp_path, output_loading_info=True)
    assert not any(report.values()), report
    _same(model, loaded.eval(), name)
    if getattr(model.config, "tie_word_embeddings", False) and name in ("llama", "gemma3"):
        assert loaded.lm_head.weight is loaded.model.embed_tokens.weight


@pytest.mark.parametrize("name", FAMILIES)
def test_unequal_layers_load_inside_layered_and_fail_outside(name: str, tmp_path: Path) -> None:
    found = anatomy.find(FAMILIES[name]())
    for i, (kind, edits) in enumerate(_unequal(name, found).items()):
        model = _edit(name, edits)
        assert surgery.loads_in(model.config) == "paredown.load", kind
        folder = tmp_path / str(i)
        model.save_pretrained(folder)
        with pytest.raises(RuntimeError):  # a per-layer value read globally, or weights of another shape
            type(model).from_pretrained(folder)
        _same(model, _reload(model, folder), name)


@pytest.mark.parametrize("name", [name for name in FAMILIES if name not in (*HEADS_GLOBAL, *NO_HEADS)])
def test_heads_that_the_config_cannot_say_are_said_layer_by_layer(name: str, tmp_path: Path) -> None:
    found = anatomy.find(FAMILIES[name]())
    edits: list[Edit] = [KeepHeads(layer=part.index, keep=(1,)) for part in found.language.blocks]
    model = _edit(name, edits)
    assert surgery.loads_in(model.config) == "paredown.load"
    model.save_pretrained(tmp_path)
    with pytest.raises(RuntimeError):
        type(model).from_pretrained(tmp_path)
    _same(model, _reload(model, tmp_path), name)


def test_a_number_of_heads_that_does_not_divide_the_hidden_size(tmp_path: Path) -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=128, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, head_dim=8
    )
    model = LlamaForCausalLM(config).eval()
    surgery.apply_model(model, anatomy.find(model), [KeepHeads(layer=i, keep=(0, 1, 3)) for i in range(2)])
    model.save_pretrained(tmp_path)
    assert surgery.loads_in(model.config) == "paredown.load"
    _same(model, _reload(model, tmp_path), "llama")


@pytest.mark.parametrize("name", VLMS)
def test_a_vision_tower_with_unequal_layers(name: str, tmp_path: Path) -> None:
    found = anatomy.find(FAMILIES[name]())
    assert found.vision is not None
    edits: list[Edit] = [KeepNeurons(layer=0, keep=(0, 2, 4)), KeepHeads(layer=1, keep=(0, 3))]
    edits.append(DropSublayer(layer=0, part="attention"))
    model = _edit(name, edits, "vision")
    model.save_pretrained(tmp_path)
    with pytest.raises(RuntimeError):
        type(model).from_pretrained(tmp_path)
    _same(model, _reload(model, tmp_path), name)


@pytest.mark.parametrize("name", VLMS)
def test_a_vision_tower_with_equal_layers(name: str, tmp_path: Path) -> None:
    found = anatomy.find(FAMILIES[name]())
    assert found.vision is not None
    edits: list[Edit] = [KeepNeurons(layer=part.index, keep=(0, 2, 4)) for part in found.vision.blocks]
    model = _edit(name, edits, "vision")
    model.save_pretrained(tmp_path)
    # Qwen2-VL's tower computes its width as a multiple of the hidden size; 3 can only be said layer by layer.
    assert surgery.loads_in(model.config) == ("paredown.load" if name == "qwen2_vl" else "transformers")
    _same(model, _reload(model, tmp_path), name)


@pytest.mark.parametrize("name", ["llama", "qwen3_moe_mixed", "deepseek_v3", "gpt_neox", "qwen2_vl"])
def test_a_second_step_on_a_reloaded_result(name: str, tmp_path: Path) -> None:
    found = anatomy.find(FAMILIES[name]())
    last = len(found.language.blocks) - 1
    first: list[Edit] = [DropSublayer(layer=0, part="attention"), DropSublayer(layer=1, part="mlp")]
    if found.language.blocks[last].experts is not None:
        keep = tuple(tuple(range(2 * e)) for e in range(8))
        first.append(KeepExpertNeurons(layer=last, keep=keep))
    model = _edit(name, first)
    model.save_pretrained(tmp_path / "one")
    loaded = _reload(model, tmp_path / "one")
    second: list[Edit] = [DropBlock(layer=1)]
    part = anatomy.find(loaded).language.blocks[last]
    if part.experts is not None:
        second.append(KeepExperts(layer=last, keep=(1, 3, 5, 7), top_k=2))
    else:
        second.append(KeepNeurons(layer=last, keep=(0, 1)))
    surgery.apply_model(loaded, anatomy.find(loaded), second)
    loaded.save_pretrained(tmp_path / "two")
    _same(loaded, _reload(loaded, tmp_path / "two"), name)
    assert loaded.config.get_text_config().num_hidden_layers == last


def test_the_written_schema(tmp_path: Path) -> None:
    model = families.qwen3_moe_mixed()
    found = anatomy.find(model)
    ragged = tuple(tuple(range(e + 1)) for e in range(8))
    surgery.apply_model(
        model,
        found,
        [
            DropSublayer(layer=0, part="attention"),
            DropSublayer(layer=1, part="mlp"),
            KeepExperts(layer=2, keep=(1, 2, 3), top_k=1),
            KeepExpertNeurons(layer=3, keep=ragged),
        ],
    )
    model.save_pretrained(tmp_path)
    written = json.loads((tmp_path / "config.json").read_text())
    assert written["per_layer_config"] == {
        "0": {"skip": ["attention"], "num_key_value_heads": 0},
        "1": {"skip": ["mlp"], "intermediate_size": 0, "moe_intermediate_size": 0},
        "2": {"num_local_experts": 3, "num_experts_per_tok": 1},
        "3": {"expert_widths": [1, 2, 3, 4, 5, 6, 7, 8], "moe_intermediate_size": 0},
    }
    assert "allow_global_per_layer_attribute_access" not in written


@pytest.mark.parametrize("name", DECODERS)
def test_generation_with_cache_equals_full_forwards(name: str) -> None:
    model = FAMILIES[name]()
    found = anatomy.find(model)
    surgery.apply_model(model, found, [DropSublayer(layer=0, part="attention")])
    ids = inputs(name, length=9)["input_ids"]
    mask = torch.ones_like(ids)
    ids[1, :4], mask[1, :4] = 0, 0
    out = model.generate(
        input_ids=ids,
        attention_mask=mask,
        max_new_tokens=20,
        do_sample=False,
        eos_token_id=None,
        pad_token_id=0,
        return_dict_in_generate=True,
    )
    grown, seen = ids, mask
    for _ in range(20):
        positions = (seen.cumsum(-1) - 1).clamp(min=0)
        step = logits(model, {"input_ids": grown, "attention_mask": seen, "position_ids": positions})
        grown = torch.cat([grown, step[:, -1].argmax(-1, keepdim=True)], 1)
        seen = torch.cat([seen, seen.new_ones(2, 1)], 1)
    assert torch.equal(out.sequences, grown)
    layers = out.past_key_values.layers
    stored = [layer.keys.numel() + layer.values.numel() > 0 for layer in layers]
    assert stored == [False] + [True] * (len(layers) - 1)
    assert out.past_key_values.get_seq_length() == grown.shape[1] - 1


@pytest.mark.parametrize("name", ["llama", "gemma3", "qwen3_moe"])
def test_beams_and_static_caches_work_without_the_first_attention(name: str) -> None:
    model = FAMILIES[name]()
    surgery.apply_model(model, anatomy.find(model), [DropSublayer(layer=0, part="attention")])
    ids = inputs(name, length=9)["input_ids"]
    common = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    plain = model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), **common)
    uncached = model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False, **common)
    assert torch.equal(plain, uncached)
    beams = model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), num_beams=3, **common)
    again = model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), num_beams=3, use_cache=False, **common)
    assert torch.equal(beams, again)


def test_a_hollow_layer_counts_and_forgets() -> None:
    layer = HollowLayer()
    assert layer.get_seq_length() == 0
    for _ in range(2):
        layer.update(torch.zeros(2, 1, 3, 0), torch.zeros(2, 1, 3, 0))
    assert (layer.get_seq_length(), layer.get_mask_sizes(4)) == (6, (10, 0))
    layer.crop(-2)
    assert layer.get_seq_length() == 4
    layer.reset()
    assert layer.get_seq_length() == 0


def test_the_patch_does_not_stay() -> None:
    config = _edit("llama", [KeepNeurons(layer=0, keep=(0,))]).config
    post_init = PreTrainedModel.post_init
    access = HeterogeneousConfigMixin.allow_global_per_layer_attribute_access
    with surgery.layered(config):
        assert PreTrainedModel.post_init is not post_init
    with pytest.raises(KeyError), surgery.layered(config):
        raise KeyError
    assert PreTrainedModel.post_init is post_init
    assert HeterogeneousConfigMixin.allow_global_per_layer_attribute_access is access
    with surgery.layered(families.llama().config):
        assert PreTrainedModel.post_init is post_init


def test_building_on_meta() -> None:
    model = _edit("qwen3_moe", _unequal("qwen3_moe", anatomy.find(families.qwen3_moe()))["ragged"])
    with surgery.layered(model.config), torch.device("meta"):
        skeleton = type(model)(model.config)
    assert all(parameter.is_meta for parameter in skeleton.parameters())
    assert {k: v.shape for k, v in skeleton.state_dict().items()} == {k: v.shape for k, v in model.state_dict().items()}


@pytest.mark.parametrize(
    ("override", "says"),
    [({"rope_theta_of_mine": 3}, "rope_theta_of_mine"), ({"intermediate_size": 49}, "from 1 to the global 48")],
)
def test_overrides_of_others_are_refused(override: dict[str, int], says: str) -> None:
    model = families.llama()
    config = model.config
    for key in override:
        if not hasattr(config, key):
            setattr(config, key, 0)
    config.per_layer_config = {1: override}
    with pytest.raises(CheckpointError, match=says), surgery.layered(config):
        type(model)(config)


@pytest.mark.parametrize("name", MOE)
def test_router_logits_and_training_still_work(name: str) -> None:
    model = FAMILIES[name]()
    found = anatomy.find(model)
    edits: list[Edit] = [
        KeepExperts(layer=part.index, keep=(0, 3, 5, 7), top_k=2) for part in found.language.blocks if part.experts
    ]
    surgery.apply_model(model, found, edits)
    ids = inputs(name)["input_ids"]
    loss = model(input_ids=ids, labels=ids, output_router_logits=True).loss
    loss.backward()
    assert all(p.grad is not None for p in model.model.layers[-1].parameters())
