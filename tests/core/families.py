"""The zoo: one tiny random model for each family that the tests cover.

``FAMILIES[name]()`` builds a model in float32 on the CPU, in eval mode, with the same weights at each call. Biases and
norm weights are random too: a test in which they are all zero or one would not see them go missing.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import transformers as tf
from transformers import PreTrainedModel

VOCAB = 128
SEED = 20261122

# Sizes shared by the decoders. Four query heads read two key-value heads where a family has grouped queries.
_TEXT: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "max_position_embeddings": 128,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
_GQA: dict[str, Any] = {**_TEXT, "num_key_value_heads": 2}


def _seeded(build: Callable[[], PreTrainedModel]) -> PreTrainedModel:
    """Build with a seed, then make everything that initialisation leaves constant (biases, norms, routers) random."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(SEED)
        model = build()
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.numel() < 2 or torch.all(parameter == parameter.flatten()[0]):
                    parameter.add_(torch.randn_like(parameter) * 0.1)
                elif parameter.dim() > 1:
                    # With the usual 0.02 a sub-layer's contribution vanishes beside the stream in a model this small.
                    parameter.mul_(4.0)
            for name, buffer in model.named_buffers():
                if name.endswith("e_score_correction_bias"):
                    buffer.add_(torch.randn_like(buffer) * 0.1)
    return model.eval()


def llama() -> PreTrainedModel:
    """Pre-norm, grouped queries, every bias that the family allows, tied embeddings."""
    config = tf.LlamaConfig(**_GQA, attention_bias=True, mlp_bias=True, tie_word_embeddings=True)
    return _seeded(lambda: tf.LlamaForCausalLM(config))


def qwen3() -> PreTrainedModel:
    """Query and key norms over a head, a head size that is not hidden / heads."""
    return _seeded(lambda: tf.Qwen3ForCausalLM(tf.Qwen3Config(**_GQA, head_dim=16)))


def mistral() -> PreTrainedModel:
    """A sliding window shorter than the test sequences."""
    return _seeded(lambda: tf.MistralForCausalLM(tf.MistralConfig(**_GQA, sliding_window=6)))


def gemma3() -> PreTrainedModel:
    """Norms on both sides of each sub-layer; sliding and full attention mixed; tied embeddings."""
    config = tf.Gemma3TextConfig(
        **{**_GQA, "num_hidden_layers": 4},
        head_dim=8,
        sliding_window=6,
        layer_types=["sliding_attention", "full_attention", "sliding_attention", "full_attention"],
        query_pre_attn_scalar=8,
    )
    return _seeded(lambda: tf.Gemma3ForCausalLM(config))


def gpt_neox() -> PreTrainedModel:
    """Parallel residual, one fused projection whose rows are ``[heads, 3 * head_dim]``, biases."""
    config = tf.GPTNeoXConfig(**_TEXT, use_parallel_residual=True, hidden_dropout=0.0, attention_dropout=0.0)
    return _seeded(lambda: tf.GPTNeoXForCausalLM(config))


def phi() -> PreTrainedModel:
    """Parallel residual with one shared norm, separate projections, biases."""
    config = tf.PhiConfig(**_GQA, resid_pdrop=0.0, embd_pdrop=0.0, attention_dropout=0.0)
    return _seeded(lambda: tf.PhiForCausalLM(config))


def mixtral() -> PreTrainedModel:
    """Experts in every layer; their width is ``intermediate_size``."""
    config = tf.MixtralConfig(**_GQA, num_local_experts=8, num_experts_per_tok=2, sliding_window=None)
    return _seeded(lambda: tf.MixtralForCausalLM(config))


def qwen2_moe() -> PreTrainedModel:
    """A shared expert behind a gate next to the routed ones; weights not normalised over the chosen experts."""
    config = tf.Qwen2MoeConfig(
        **_GQA,
        moe_intermediate_size=24,
        shared_expert_intermediate_size=40,
        num_experts=8,
        num_experts_per_tok=2,
        norm_topk_prob=False,
    )
    return _seeded(lambda: tf.Qwen2MoeForCausalLM(config))


def qwen3_moe() -> PreTrainedModel:
    """Experts in every layer."""
    config = tf.Qwen3MoeConfig(
        **_GQA, head_dim=16, moe_intermediate_size=24, num_experts=8, num_experts_per_tok=2, norm_topk_prob=True
    )
    return _seeded(lambda: tf.Qwen3MoeForCausalLM(config))


def qwen3_moe_mixed() -> PreTrainedModel:
    """Qwen3-MoE with a dense layer between sparse ones (``mlp_only_layers``)."""
    config = tf.Qwen3MoeConfig(
        **{**_GQA, "num_hidden_layers": 4},
        head_dim=16,
        moe_intermediate_size=24,
        num_experts=8,
        num_experts_per_tok=2,
        norm_topk_prob=True,
        mlp_only_layers=[1],
    )
    return _seeded(lambda: tf.Qwen3MoeForCausalLM(config))


def deepseek_v3() -> PreTrainedModel:
    """Latent attention, a dense first layer, two groups of experts (one open), correction bias, shared experts."""
    config = tf.DeepseekV3Config(
        **{**_TEXT, "num_key_value_heads": 4, "num_hidden_layers": 4},
        moe_intermediate_size=24,
        n_shared_experts=2,
        n_routed_experts=8,
        num_experts_per_tok=2,
        n_group=2,
        topk_group=1,
        first_k_dense_replace=1,
        kv_lora_rank=8,
        q_lora_rank=12,
        qk_rope_head_dim=8,
        qk_nope_head_dim=8,
        v_head_dim=8,
    )
    return _seeded(lambda: tf.DeepseekV3ForCausalLM(config))


def olmoe() -> PreTrainedModel:
    """Experts in every layer; query and key norms over all heads together."""
    config = tf.OlmoeConfig(**_GQA, num_experts=8, num_experts_per_tok=2)
    return _seeded(lambda: tf.OlmoeForCausalLM(config))


def bert() -> PreTrainedModel:
    """An encoder: norms after the addition."""
    config = tf.BertConfig(
        **{k: v for k, v in _TEXT.items() if k not in ("bos_token_id", "eos_token_id")},
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )
    return _seeded(lambda: tf.BertForMaskedLM(config))


def vit() -> PreTrainedModel:
    """A vision encoder with a classifier."""
    config = tf.ViTConfig(
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=3,
        num_attention_heads=4,
        image_size=16,
        patch_size=8,
        num_labels=5,
    )
    return _seeded(lambda: tf.ViTForImageClassification(config))


_CLIP: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "image_size": 16,
    "patch_size": 8,
    "projection_dim": 32,
}
IMAGE_TOKEN = 100


def llava() -> PreTrainedModel:
    """CLIP tower, two-layer projector, Llama."""
    config = tf.LlavaConfig(
        vision_config=tf.CLIPVisionConfig(**_CLIP),
        text_config=tf.LlamaConfig(**_GQA),
        image_token_id=IMAGE_TOKEN,
        vision_feature_layer=-2,
        vision_feature_select_strategy="default",
        image_seq_length=4,
    )
    return _seeded(lambda: tf.LlavaForConditionalGeneration(config))


def llava_next() -> PreTrainedModel:
    """LLaVA with image tiles."""
    config = tf.LlavaNextConfig(
        vision_config=tf.CLIPVisionConfig(**_CLIP),
        text_config=tf.LlamaConfig(**_GQA),
        image_token_id=IMAGE_TOKEN,
        vision_feature_layer=-2,
        vision_feature_select_strategy="default",
        image_seq_length=4,
        image_grid_pinpoints=[[16, 32], [32, 16], [32, 32]],
    )
    return _seeded(lambda: tf.LlavaNextForConditionalGeneration(config))


def qwen2_vl() -> PreTrainedModel:
    """A tower with fused qkv and 2x2 merging; rotary positions over three axes."""
    config = tf.Qwen2VLConfig(
        text_config={
            **_GQA,
            "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [1, 1, 2]},
        },
        vision_config={"depth": 2, "embed_dim": 32, "hidden_size": 32, "num_heads": 4, "mlp_ratio": 2, "patch_size": 4},
        image_token_id=IMAGE_TOKEN,
        video_token_id=101,
        vision_start_token_id=102,
        vision_end_token_id=103,
    )
    return _seeded(lambda: tf.Qwen2VLForConditionalGeneration(config))


def internvl() -> PreTrainedModel:
    """InternViT (layer scale), pixel shuffle, Qwen2."""
    config = tf.InternVLConfig(
        vision_config=tf.InternVLVisionConfig(
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=2,
            num_attention_heads=4,
            image_size=[16, 16],
            patch_size=[4, 4],
        ),
        text_config=tf.Qwen2Config(**_GQA),
        image_token_id=IMAGE_TOKEN,
        image_seq_length=4,
    )
    return _seeded(lambda: tf.InternVLForConditionalGeneration(config))


FAMILIES: dict[str, Callable[[], PreTrainedModel]] = {
    "llama": llama,
    "qwen3": qwen3,
    "mistral": mistral,
    "gemma3": gemma3,
    "gpt_neox": gpt_neox,
    "phi": phi,
    "mixtral": mixtral,
    "qwen2_moe": qwen2_moe,
    "qwen3_moe": qwen3_moe,
    "qwen3_moe_mixed": qwen3_moe_mixed,
    "deepseek_v3": deepseek_v3,
    "olmoe": olmoe,
    "bert": bert,
    "vit": vit,
    "llava": llava,
    "llava_next": llava_next,
    "qwen2_vl": qwen2_vl,
    "internvl": internvl,
}
DECODERS = tuple(list(FAMILIES)[:12])
MOE = ("mixtral", "qwen2_moe", "qwen3_moe", "qwen3_moe_mixed", "deepseek_v3", "olmoe")
ENCODERS = ("bert", "vit")
VLMS = ("llava", "llava_next", "qwen2_vl", "internvl")


def inputs(name: str, *, batch: int = 2, length: int = 12, seed: int = 0) -> dict[str, torch.Tensor]:
    """Return model inputs for a family: token ids, pixels, or both with as many placeholders as image features."""
    generator = torch.Generator().manual_seed(seed)
    if name == "vit":
        return {"pixel_values": torch.randn(batch, 3, 16, 16, generator=generator)}
    ids = torch.randint(3, 90, (batch, length), generator=generator)
    if name not in VLMS:
        return {"input_ids": ids}
    images = torch.randn(batch, 3, 16, 16, generator=generator)
    given: dict[str, torch.Tensor] = {"pixel_values": images}
    count = 4
    if name == "llava_next":
        given = {"pixel_values": torch.randn(batch, 3, 3, 16, 16, generator=generator)}
        given["image_sizes"] = torch.tensor([[16, 32]] * batch)
        count = 4 + 2 * 4 + 2  # base tile, unpadded tiles, one newline a row
    elif name == "qwen2_vl":
        given = {
            "pixel_values": torch.randn(batch * 16, 3 * 2 * 4 * 4, generator=generator),
            "image_grid_thw": torch.tensor([[1, 4, 4]] * batch),
        }
    given["input_ids"] = torch.cat(
        [ids[:, :2], torch.full((batch, 1), 102), torch.full((batch, count), IMAGE_TOKEN), ids[:, 2:]], 1
    )
    given["attention_mask"] = torch.ones_like(given["input_ids"])
    if name == "qwen2_vl":
        given["mm_token_type_ids"] = (given["input_ids"] == IMAGE_TOKEN).long()
    return given


def logits(model: PreTrainedModel, given: dict[str, torch.Tensor]) -> torch.Tensor:
    """Run once without cache and without gradients."""
    with torch.no_grad():
        out: torch.Tensor = model(**given).logits
    return out
