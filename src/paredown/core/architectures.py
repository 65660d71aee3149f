"""What shape and name alone cannot tell, by ``config.model_type``: the only file of the core that knows families.

Everything in it is read by `anatomy` and `configs`. A family that is not mentioned is handled by shape and name alone,
and where that would be a guess it is refused.
"""

from __future__ import annotations

from typing import Literal

# How the rows of one fused qkv projection are laid out. ``interleaved``: [heads, 3, head_dim] (each head's q, k and v
# next to each other); ``stacked``: [3, heads, head_dim] (all queries, then all keys, then all values).
FUSED_ORDER: dict[str, Literal["interleaved", "stacked"]] = {
    "gpt_neox": "interleaved",
    "qwen2_vl": "stacked",
    "qwen2_vl_vision": "stacked",
    "qwen2_5_vl": "stacked",
    "qwen2_5_vl_vision": "stacked",
}

# Families whose attention reads `config.head_dim` although their configuration class does not declare it.
READS_HEAD_DIM = frozenset({"arcee", "granite", "phi", "qwen2", "qwen2_moe", "smollm3", "starcoder2"})

# Families whose attention derives the size of a head from the hidden size whatever the configuration says.
IGNORES_HEAD_DIM = frozenset(
    {
        "bert",
        "clip_vision_model",
        "gpt_neox",
        "internvl_vision",
        "qwen2_5_vl_text",
        "qwen2_5_vl_vision",
        "qwen2_vl_text",
        "qwen2_vl_vision",
        "siglip_vision_model",
        "vit",
    }
)

# What attention modules call their window and whether they rotate: layers of some families differ in it.
SEES = ("sliding_window", "attention_type", "layer_type", "use_rope")

# Configuration keys that hold the width of the dense MLP, tried in this order.
MLP_WIDTH_KEYS = ("intermediate_size", "ffn_dim", "n_inner", "mlp_dim")

# Families that compute the width from other keys, and from which; layers that were cut name theirs in `MLP_WIDTH_KEY`.
COMPUTED_WIDTH: dict[str, tuple[str, str]] = {"qwen2_vl_vision": ("embed_dim", "mlp_ratio")}
MLP_WIDTH_KEY = "intermediate_size"

# Experts: configuration keys of their count, width, experts a token and groups, tried in this order.
EXPERT_COUNT_KEYS = ("n_routed_experts", "num_experts", "num_local_experts", "moe_num_experts")
EXPERT_WIDTH_KEYS = ("moe_intermediate_size", "expert_intermediate_size", "intermediate_size")
EXPERT_TOP_K_KEYS = ("num_experts_per_tok", "top_k", "moe_k")
EXPERT_GROUP_KEYS = ("n_group", "num_expert_group")
# A configuration that has the first computes the shared width from the routed one; the second is then only written
# by surgery.
SHARED_WIDTH_KEYS = ("n_shared_experts", "shared_expert_intermediate_size")

# A sub-layer's own norms, by name: (before attention, after attention, before the MLP, after the MLP). The first row
# whose names all occur in a block is taken, so longer patterns come first.
NORM_PATTERNS: tuple[tuple[tuple[str, ...], tuple[str, ...], tuple[str, ...], tuple[str, ...]], ...] = (
    (
        ("input_layernorm",),
        ("post_attention_layernorm",),
        ("pre_feedforward_layernorm",),
        ("post_feedforward_layernorm",),
    ),
    ((), ("post_attention_layernorm",), (), ("post_feedforward_layernorm",)),
    (("input_layernorm",), (), ("post_attention_layernorm",), ()),
    (("layernorm_before",), (), ("layernorm_after",), ()),
    (("layer_norm1",), (), ("layer_norm2",), ()),
    (("norm1",), (), ("norm2",), ()),
    (("ln_1",), (), ("ln_2",), ()),
    (("attention_norm",), (), ("ffn_norm",), ()),
)

# Names of projections: the last component of the path, or the last two where one is not enough.
QUERY = ("q_proj", "query", "q_lin", "wq")
KEY = ("k_proj", "key", "k_lin", "wk")
VALUE = ("v_proj", "value", "v_lin", "wv")
FUSED = ("query_key_value", "qkv", "qkv_proj", "Wqkv", "c_attn")
LATENT = ("kv_b_proj",)
OUTPUT = ("o_proj", "out_proj", "dense", "proj", "projection_layer", "c_proj", "out_lin", "wo")
MLP_GATE = ("gate_proj", "w1")
MLP_UP = ("up_proj", "fc1", "dense_h_to_4h", "c_fc", "intermediate.dense", "w3", "linear_fc1")
MLP_DOWN = ("down_proj", "fc2", "dense_4h_to_h", "c_proj", "output.dense", "w2", "linear_fc2")
MLP_FUSED = ("gate_up_proj",)
VISION = ("vision_tower", "visual", "vision_model", "vision_encoder")
PROJECTOR = ("multi_modal_projector", "merger", "connector", "aligner", "projector")
CLASS_TOKEN = ("class_embedding", "cls_token")

# Families in whose vision tower patches may leave: what follows it is known to take a grid with gaps.
THINNABLE = frozenset({"internvl", "llava", "llava_next", "qwen2_vl"})
