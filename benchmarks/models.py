"""Models for benchmarks: random ones in memory, and checkpoints on disk that never were in memory as a whole."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedConfig,
    PreTrainedModel,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)
from transformers.core_model_loading import revert_weight_conversion

from paredown import testbeds
from paredown.core.checkpoint import Model

TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json")


def llama(*, hidden: int, layers: int, width: int, heads: int, vocabulary: int, tied: bool = False) -> LlamaConfig:
    """Return a Llama's config, four query heads a key-value head."""
    return LlamaConfig(
        hidden_size=hidden, num_hidden_layers=layers, intermediate_size=width, num_attention_heads=heads,
        num_key_value_heads=max(1, heads // 4), vocab_size=vocabulary, max_position_embeddings=4096,
        tie_word_embeddings=tied, bos_token_id=0, eos_token_id=1, pad_token_id=None, dtype=torch.bfloat16,
    )  # fmt: skip


def moe(
    *, hidden: int, layers: int, width: int, experts: int, top_k: int, heads: int, vocabulary: int
) -> Qwen3MoeConfig:
    """Return a Qwen3-MoE's config."""
    return Qwen3MoeConfig(
        hidden_size=hidden, num_hidden_layers=layers, moe_intermediate_size=width, intermediate_size=2 * width,
        num_experts=experts, num_experts_per_tok=top_k, num_attention_heads=heads, head_dim=hidden // heads,
        num_key_value_heads=max(1, heads // 4), vocab_size=vocabulary, max_position_embeddings=4096,
        norm_topk_prob=True, bos_token_id=0, eos_token_id=1, pad_token_id=None, dtype=torch.bfloat16,
    )  # fmt: skip


def build(config: PreTrainedConfig, seed: int = 0) -> Model:
    """Return a random model in memory, in bf16."""
    torch.manual_seed(seed)
    previous = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        hf = _class(config)(config).eval().requires_grad_(False)
    finally:
        torch.set_default_dtype(previous)
    return Model.of(hf)


def write_checkpoint(config: PreTrainedConfig, folder: Path, *, seed: int = 0) -> int:
    """Write a random checkpoint shard by shard, with a testbed's tokenizer; return its bytes."""
    folder.mkdir(parents=True)
    with torch.device("meta"):
        hf = _class(config)(config).to(torch.bfloat16)
    tied = set(hf.all_tied_weights_keys or ())
    state = {name: t for name, t in hf.state_dict().items() if name not in tied}
    on_disk = revert_weight_conversion(hf, state)
    groups: dict[str, dict[str, Tensor]] = {}
    for name, tensor in on_disk.items():
        groups.setdefault(".".join(name.split(".")[:3]), {})[name] = tensor
    generator = torch.Generator().manual_seed(seed)
    weight_map: dict[str, str] = {}
    total = 0
    for number, group in enumerate(groups.values(), start=1):
        file = f"model-{number:05d}-of-{len(groups):05d}.safetensors"
        filled = {name: _numbers(tensor, generator) for name, tensor in group.items()}
        save_file(filled, folder / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(group, file)
        total += sum(t.numel() * t.element_size() for t in filled.values())
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index), encoding="utf-8")
    config.architectures = [_class(config).__name__]
    config.save_pretrained(folder)
    for name in TOKENIZER_FILES:
        shutil.copyfile(testbeds.path("moe") / name, folder / name)
    return total


def block_bytes(config: PreTrainedConfig) -> tuple[int, int]:
    """Return the bytes of the largest block and of the largest matrix around the blocks."""
    with torch.device("meta"):
        hf = _class(config)(config).to(torch.bfloat16)
    sizes = [_bytes(block) for block in hf.base_model.layers]
    ends = [_bytes(hf.get_input_embeddings()), _bytes(hf.get_output_embeddings())]
    return max(sizes), max(ends)


def texts(name: str = "moe") -> Path:
    """Return a testbed's calibration sample."""
    return testbeds.path(name) / "calibration.jsonl"


def _bytes(module: nn.Module) -> int:
    return sum(p.numel() * p.element_size() for p in module.parameters())


def _class(config: PreTrainedConfig) -> type[PreTrainedModel]:
    found: Any = LlamaForCausalLM if isinstance(config, LlamaConfig) else Qwen3MoeForCausalLM
    return found  # type: ignore[no-any-return]


def _numbers(like: Tensor, generator: torch.Generator) -> Tensor:
    if like.ndim == 1:
        return torch.ones(like.shape, dtype=torch.bfloat16)
    return torch.empty(like.shape, dtype=torch.bfloat16).normal_(std=0.02, generator=generator)
