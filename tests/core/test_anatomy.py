"""Every part of every family is found, in memory and on meta tensors; what is missing is named."""

from __future__ import annotations

from dataclasses import replace

import families
import pytest
import torch
from families import FAMILIES, VLMS
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from paredown.core import anatomy
from paredown.errors import ArchitectureError

# family: blocks, heads, key-value heads, head size, layout, residual, width of the dense MLP (None: experts)
EXPECTED = {
    "llama": (3, 4, 2, 8, "separate", "pre", 48),
    "qwen3": (3, 4, 2, 16, "separate", "pre", 48),
    "mistral": (3, 4, 2, 8, "separate", "pre", 48),
    "gemma3": (4, 4, 2, 8, "separate", "pre", 48),
    "gpt_neox": (3, 4, 4, 8, "fused", "parallel", 48),
    "phi": (3, 4, 2, 8, "separate", "parallel", 48),
    "mixtral": (3, 4, 2, 8, "separate", "pre", None),
    "qwen2_moe": (3, 4, 2, 8, "separate", "pre", None),
    "qwen3_moe": (3, 4, 2, 16, "separate", "pre", None),
    "qwen3_moe_mixed": (4, 4, 2, 16, "separate", "pre", None),
    "deepseek_v3": (4, 4, 4, 8, "mla", "pre", None),
    "olmoe": (3, 4, 2, 8, "separate", "pre", None),
    "bert": (3, 4, 4, 8, "separate", "post", 48),
    "vit": (3, 4, 4, 8, "separate", "pre", 48),
    "llava": (3, 4, 2, 8, "separate", "pre", 48),
    "llava_next": (3, 4, 2, 8, "separate", "pre", 48),
    "qwen2_vl": (3, 4, 2, 8, "separate", "pre", 48),
    "internvl": (3, 4, 2, 8, "separate", "pre", 48),
}


@pytest.mark.parametrize("name", FAMILIES)
def test_counts_and_shapes(name: str) -> None:
    blocks, heads, kv_heads, head_dim, layout, residual, width = EXPECTED[name]
    tower = anatomy.find(FAMILIES[name]()).language
    assert len(tower.blocks) == blocks
    assert [block.index for block in tower.blocks] == list(range(blocks))
    assert tower.hidden_size == 32
    last = tower.blocks[-1]
    assert last.attention is not None
    found = (last.attention.heads, last.attention.kv_heads, last.attention.head_dim, last.attention.layout)
    assert (*found, last.residual) == (heads, kv_heads, head_dim, layout, residual)
    assert (last.mlp.width if last.mlp else None) == width
    assert (last.experts is None) == (width is not None)


@pytest.mark.parametrize("name", FAMILIES)
def test_paths_lead_to_modules_of_the_stated_shape(name: str) -> None:
    model = FAMILIES[name]()
    found = anatomy.find(model)
    for tower in (found.language, found.vision):
        if tower is None:
            continue
        hidden = tower.hidden_size
        for part in tower.blocks:
            block = anatomy.resolve(model, part.path)
            attention = part.attention
            assert attention is not None
            assert block.get_submodule(attention.o).weight.shape == (hidden, attention.heads * attention.head_dim)
            if attention.k is not None:
                assert block.get_submodule(attention.k).weight.shape[0] == attention.kv_heads * attention.head_dim
            for path in (*attention.norms, *(part.mlp or part.experts).norms, attention.contribution):
                assert block.get_submodule(path) is not None
            if part.mlp is not None:
                assert block.get_submodule(part.mlp.up).weight.shape == (part.mlp.width, hidden)
                assert block.get_submodule(part.mlp.down).weight.shape == (hidden, part.mlp.width)
                if part.mlp.gate is not None:
                    assert block.get_submodule(part.mlp.gate).weight.shape == (part.mlp.width, hidden)
                    assert part.mlp.gate != part.mlp.up
            if part.experts is not None:
                count, width = part.experts.count, part.experts.width
                assert block.get_submodule(part.experts.experts).gate_up_proj.shape == (count, 2 * width, hidden)
                assert block.get_submodule(part.experts.router).weight.shape == (count, hidden)
                config = anatomy.tower_config(model.config, tower)
                keys = (part.experts.count_key, part.experts.width_key, part.experts.top_k_key)
                assert [getattr(config, key) for key in keys] == [count, width, part.experts.top_k]


@pytest.mark.parametrize("name", FAMILIES)
def test_meta_equals_memory(name: str) -> None:
    model = FAMILIES[name]()
    with torch.device("meta"):
        skeleton = type(model)(model.config)
    assert all(parameter.is_meta for parameter in skeleton.parameters())
    assert anatomy.find(skeleton) == anatomy.find(model)


def test_dense_layers_among_sparse_ones() -> None:
    kinds = [block.mlp is not None for block in anatomy.find(families.qwen3_moe_mixed()).language.blocks]
    assert kinds == [False, True, False, False]
    kinds = [block.mlp is not None for block in anatomy.find(families.deepseek_v3()).language.blocks]
    assert kinds == [True, False, False, False]


def test_deepseek_routing() -> None:
    experts = anatomy.find(families.deepseek_v3()).language.blocks[1].experts
    assert experts is not None
    assert (experts.count, experts.groups, experts.open_groups, experts.group_key) == (8, 2, 1, "n_group")
    assert experts.step == 4
    assert experts.correction_bias == "mlp.gate.e_score_correction_bias"
    assert experts.shared is not None
    assert experts.shared.width == 48
    assert experts.shared_gate is None


def test_the_step_of_widths_follows_the_type() -> None:
    experts = anatomy.find(families.mixtral().to(torch.bfloat16)).language.blocks[0].experts
    assert experts is not None
    assert experts.step == 8


def test_shared_expert_and_its_gate() -> None:
    experts = anatomy.find(families.qwen2_moe()).language.blocks[0].experts
    assert experts is not None
    assert experts.shared is not None
    assert (experts.shared.path, experts.shared.width) == ("mlp.shared_expert", 40)
    assert experts.shared_gate == "mlp.shared_expert_gate"


def test_norms_on_both_sides() -> None:
    block = anatomy.find(families.gemma3()).language.blocks[0]
    assert block.attention is not None
    assert block.mlp is not None
    assert block.attention.norms == ("input_layernorm", "post_attention_layernorm")
    assert block.attention.contribution == "post_attention_layernorm"
    assert block.mlp.norms == ("pre_feedforward_layernorm", "post_feedforward_layernorm")


def test_a_norm_that_feeds_both_sublayers_belongs_to_neither() -> None:
    block = anatomy.find(families.phi()).language.blocks[0]
    assert block.attention is not None
    assert block.mlp is not None
    assert block.attention.norms == block.mlp.norms == ()


@pytest.mark.parametrize("name", VLMS)
def test_two_towers(name: str) -> None:
    model = FAMILIES[name]()
    found = anatomy.find(model)
    assert found.vision is not None
    assert (found.language.config_path, found.vision.config_path) == ("text_config", "vision_config")
    assert (found.language.name, found.vision.name) == ("language", "vision")
    assert found.projector is not None
    assert model.get_submodule(found.language.decoder) is model.model.language_model
    assert found.language.head == "lm_head"
    assert len(found.vision.blocks) in (2, 3)


def test_what_surrounds_the_blocks() -> None:
    tower = replace(anatomy.find(families.gpt_neox()).language, blocks=())
    assert (tower.decoder, tower.layers, tower.embedding) == ("gpt_neox", "gpt_neox.layers", "gpt_neox.embed_in")
    assert (tower.final_norm, tower.head) == ("gpt_neox.final_layer_norm", "lm_head")
    vision = anatomy.find(families.llava()).vision
    assert vision is not None
    assert vision.final_norm == "model.vision_tower.post_layernorm"


def test_a_pure_vision_model_has_one_tower() -> None:
    found = anatomy.find(families.vit())
    assert (found.language.name, found.vision) == ("vision", None)


def _without_router(model: PreTrainedModel) -> None:
    del model.model.layers[1].mlp.gate


def _other_output_name(model: PreTrainedModel) -> None:
    attention = model.model.layers[1].self_attn
    attention.exit = attention.o_proj
    del attention.o_proj


def _no_attention(model: PreTrainedModel) -> None:
    del model.model.layers[1].self_attn


def _transposed(model: PreTrainedModel) -> None:
    experts = model.model.layers[1].mlp.experts
    experts.gate_up_proj = nn.Parameter(experts.gate_up_proj.transpose(1, 2).contiguous())


def _no_down(model: PreTrainedModel) -> None:
    del model.model.layers[1].mlp.down_proj


def _strange_norm(model: PreTrainedModel) -> None:
    block = model.model.layers[1]
    block.third_norm = nn.LayerNorm(32)


def _no_blocks(model: PreTrainedModel) -> None:
    del model.model.layers


@pytest.mark.parametrize(
    ("build", "damage", "role"),
    [
        (families.qwen3_moe, _without_router, "router"),
        (families.qwen3_moe, _transposed, "experts' gate_up_proj"),
        (families.llama, _other_output_name, "attention's output projection"),
        (families.llama, _no_attention, "attention"),
        (families.llama, _no_down, "MLP or experts"),
        (families.llama, _strange_norm, "norms"),
        (families.llama, _no_blocks, "blocks"),
    ],
)
def test_a_missing_role_is_named(build, damage, role: str) -> None:  # type: ignore[no-untyped-def]
    model = build()
    damage(model)
    with pytest.raises(ArchitectureError) as error:
        anatomy.find(model)
    message = str(error.value)
    assert f"the {role}" in message
    assert type(model).__name__ in message
    assert "\n" not in message
    assert message.count(". ") == 0


@pytest.mark.parametrize(
    ("family", "says"),
    [
        ("gpt2", "blocks"),
        ("bloom", "adds for itself"),
        ("ernie4_5_moe", "e_score_correction_bias"),
        ("minimax", "output_gate"),
        ("gpt_oss", "experts' gate_up_proj"),
        ("phi3", "MLP or experts"),
    ],
)
def test_what_only_looks_familiar_is_refused(family: str, says: str) -> None:
    config = AutoConfig.for_model(
        family,
        vocab_size=128,
        hidden_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        num_local_experts=8,
        moe_num_experts=8,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    with pytest.raises(ArchitectureError, match=says):
        anatomy.find(model)
