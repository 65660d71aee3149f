"""The architecture of each testbed, as plain transformers models with fresh weights."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerFast

    from paredown.testbeds.mosaic import MosaicShape

# The published sizes. Tests pass smaller ones to `build`; nothing else about a testbed depends on them.
SIZES: dict[str, dict[str, Any]] = {
    "lm": {
        "hidden_size": 96,
        "num_hidden_layers": 12,
        "intermediate_size": 256,
        "num_attention_heads": 6,
        "head_dim": 16,
    },
    "moe": {
        "hidden_size": 128,
        "num_hidden_layers": 6,
        "intermediate_size": 256,
        "moe_intermediate_size": 128,
        "num_attention_heads": 4,
        "head_dim": 32,
        "num_experts": 16,
        "num_experts_per_tok": 2,
    },
    "recall": {
        "hidden_size": 96,
        "num_hidden_layers": 4,
        "intermediate_size": 256,
        "num_attention_heads": 6,
        "head_dim": 16,
    },
    "recall-moe": {
        "hidden_size": 96,
        "num_hidden_layers": 4,
        "intermediate_size": 128,
        "num_attention_heads": 6,
        "head_dim": 16,
        "num_local_experts": 8,
        "num_experts_per_tok": 2,
    },
    "vlm": {
        "hidden_size": 96,
        "num_hidden_layers": 4,
        "intermediate_size": 256,
        "num_attention_heads": 6,
        "head_dim": 16,
    },
}
VISION_SIZE: dict[str, Any] = {
    "hidden_size": 96,
    "num_hidden_layers": 4,
    "intermediate_size": 256,
    "num_attention_heads": 4,
    "projection_dim": 96,
}


def _common(tokenizer: PreTrainedTokenizerFast) -> dict[str, Any]:
    return {
        "vocab_size": len(tokenizer),
        "num_key_value_heads": 2,
        "max_position_embeddings": 4096,
        "tie_word_embeddings": True,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }


def build(name: str, tokenizer: PreTrainedTokenizerFast, **size: Any) -> PreTrainedModel:
    """Build a testbed with random weights, on the CPU, in float32.

    Parameters
    ----------
    name
        ``lm``, ``moe``, ``recall``, ``recall-moe`` or ``vlm``.
    tokenizer
        Gives the vocabulary and the special tokens.
    **size
        Fields of the (text) configuration that replace those of `SIZES`.
    """
    from transformers import (
        LlamaConfig,
        LlamaForCausalLM,
        MixtralConfig,
        MixtralForCausalLM,
        Qwen3MoeConfig,
        Qwen3MoeForCausalLM,
    )

    fields = {**_common(tokenizer), **SIZES[name], **size}
    if name == "moe":
        return Qwen3MoeForCausalLM(
            Qwen3MoeConfig(norm_topk_prob=True, output_router_logits=False, router_aux_loss_coef=0.01, **fields)
        )
    if name == "recall-moe":
        # Everything but the experts is as in `recall`, whose weights it starts from.
        rotary = {"rope_type": "default", "rope_theta": 10000.0}
        same: dict[str, Any] = {"rope_parameters": rotary, "rms_norm_eps": 1e-6}
        return MixtralForCausalLM(MixtralConfig(router_aux_loss_coef=0.01, **same, **fields))
    if name == "vlm":
        return _build_vlm(tokenizer, fields)
    return LlamaForCausalLM(LlamaConfig(**fields))


def _build_vlm(tokenizer: PreTrainedTokenizerFast, text: dict[str, Any]) -> PreTrainedModel:
    from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

    from paredown.testbeds.mosaic import SHAPE

    config = LlavaConfig(
        vision_config=CLIPVisionConfig(image_size=SHAPE.pixels, patch_size=SHAPE.patch, **VISION_SIZE),
        text_config=LlamaConfig(**text),
        image_token_id=tokenizer.convert_tokens_to_ids("<|image|>"),
        # As LLaVA-1.5 does it: the last block serves the CLS token alone, the language model reads what enters it.
        vision_feature_layer=-2,
        vision_feature_select_strategy="default",
        image_seq_length=SHAPE.visual_tokens,
        tie_word_embeddings=True,
    )
    return LlavaForConditionalGeneration(config)


def build_processor(tokenizer: PreTrainedTokenizerFast, shape: MosaicShape) -> Any:
    """Build the LLaVA processor of the ``vlm`` testbed; the image part runs on PIL alone, without torchvision."""
    from transformers import CLIPImageProcessorPil, LlavaProcessor

    images = CLIPImageProcessorPil(
        size={"shortest_edge": shape.pixels},
        crop_size={"height": shape.pixels, "width": shape.pixels},
        image_mean=[0.5] * 3,
        image_std=[0.5] * 3,
    )
    return LlavaProcessor(
        image_processor=images,
        tokenizer=tokenizer,
        patch_size=shape.patch,
        vision_feature_select_strategy="default",
        image_token="<|image|>",
        num_additional_image_tokens=1,
    )
