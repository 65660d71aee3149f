"""The only code that changes weights: rows, columns, heads, experts, sub-layers, blocks. Moves the config along.

Weights are handled here; what an edit means for the anatomy stands in `effects`, for the config in `configs`, and how a
model with unequal layers is built for loading in `layered`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from paredown.core import anatomy as anatomies
from paredown.core.anatomy import Anatomy, Attention, Block, Experts, Mlp, Tower, resolve
from paredown.core.configs import TowerName, by_layer, is_uniform, loads_in, new_config, removed_blocks, tower_of
from paredown.core.depth import fusion, sharing
from paredown.core.dropped import DroppedMlp, stand_in
from paredown.core.edits import (
    DropSublayer,
    Edit,
    KeepExpertNeurons,
    KeepExperts,
    KeepHeads,
    KeepNeurons,
    ShareBlock,
)
from paredown.core.effects import edited, runs
from paredown.core.layered import layered
from paredown.core.ragged import RaggedExperts

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel

__all__ = ["RaggedExperts", "apply", "apply_model", "is_uniform", "layered", "loads_in", "new_config", "settle"]


def apply(block: nn.Module, part: Block, edits: Sequence[Edit]) -> Block:
    """Apply one layer's edits to its module in place, in the order given, and return its new anatomy.

    The module's own numbers (heads, experts, widths, top-k) move along, so that it computes in memory what the saved
    and reloaded model computes. All edits are checked before the first one touches a weight.

    Raises
    ------
    BudgetError, ArchitectureError
        See `effects.edited`.
    """
    after = edited(part, edits)
    with torch.no_grad():
        for edit in edits:
            _apply_one(block, part, edit)
            part = edited(part, [edit])
    return after


def apply_model(
    hf: PreTrainedModel, anatomy: Anatomy, edits: Sequence[Edit], *, tower: TowerName = "language"
) -> Anatomy:
    """Apply edits to a whole model, in memory or on the meta device, and return its new anatomy.

    Blocks are removed and renumbered and the new config takes the place of the old one wherever the model holds it.
    The generation config and tied weights stay. Nothing is touched if an edit is not allowed.

    Raises
    ------
    BudgetError, ArchitectureError
        See `configs.new_config`.
    """
    new_config(hf.config, anatomy, edits, tower=tower)  # raises before anything is touched
    which = tower_of(anatomy, tower)
    per_layer = by_layer(which, edits)
    joined, gone = runs(edits, len(which.blocks)), removed_blocks(edits)
    together = [[which.blocks[i] for i in run] for run in joined.values()]
    for parts in together:
        fusion.check([resolve(hf, part.path) for part in parts], parts)
    for edit in edits:
        if isinstance(edit, ShareBlock):
            source, block = (resolve(hf, which.blocks[i].path) for i in (edit.source, edit.layer))
            sharing.check_alike(source, block, edit.source, edit.layer)
    for part in which.blocks:
        if part.index not in gone and part.index not in joined and part.index in per_layer:
            apply(resolve(hf, part.path), part, per_layer[part.index])
    for parts in together:
        fusion.fuse([resolve(hf, part.path) for part in parts], parts)
    return settle(hf, anatomy, edits, tower=tower)


def settle(hf: PreTrainedModel, anatomy: Anatomy, edits: Sequence[Edit], *, tower: TowerName = "language") -> Anatomy:
    """Finish a model whose blocks were edited one by one: remove dropped blocks, move the config along.

    ``anatomy`` is the model's before the edits; its anatomy afterwards is returned.
    """
    config = new_config(hf.config, anatomy, edits, tower=tower)
    gone = removed_blocks(edits)
    if gone:
        _remove_blocks(hf, tower_of(anatomy, tower), gone)
    which = tower_of(anatomy, tower)
    if shared := sharing.of(edits, sharing.stays(edits, len(which.blocks))):
        sharing.tie(hf, which.layers, shared)
    _replace_config(hf, config)
    return anatomies.find(hf)


def _apply_one(block: nn.Module, part: Block, edit: Edit) -> None:
    # `edited` has checked that the part exists; the asserts tell the type checker.
    if isinstance(edit, DropSublayer):
        _drop(block, part, edit.part)
    elif isinstance(edit, KeepHeads):
        assert part.attention is not None
        _keep_heads(block, part.attention, edit.keep)
    elif isinstance(edit, KeepNeurons):
        assert part.mlp is not None
        _keep_neurons(block, part.mlp, edit.keep)
    elif isinstance(edit, KeepExperts):
        assert part.experts is not None
        _keep_experts(block, part.experts, edit.keep, edit.top_k)
    elif isinstance(edit, KeepExpertNeurons):
        assert part.experts is not None
        _keep_expert_neurons(block, part.experts, edit.keep)
        if edit.shared is not None and part.experts.shared is not None:
            _keep_neurons(block, part.experts.shared, edit.shared)


def _cut(owner: nn.Module, name: str, dim: int, keep: Sequence[int]) -> None:
    """Keep these indices of one dimension of a parameter or buffer, in this order."""
    old = getattr(owner, name)
    if old is None:
        return
    index = torch.tensor(list(keep), dtype=torch.long, device=old.device)
    _put(owner, name, old.detach().index_select(dim, index))


def _put(owner: nn.Module, name: str, new: torch.Tensor) -> None:
    old = getattr(owner, name)
    if isinstance(old, nn.Parameter):
        setattr(owner, name, nn.Parameter(new.contiguous(), requires_grad=old.requires_grad))
    else:
        owner._buffers[name] = new.contiguous()


def _keep_rows(linear: nn.Module, keep: Sequence[int]) -> None:
    """Keep outputs of a linear layer; its bias follows."""
    _cut(linear, "weight", 0, keep)
    if getattr(linear, "bias", None) is not None:
        _cut(linear, "bias", 0, keep)
    linear.out_features = len(keep)  # type: ignore[assignment]


def _keep_columns(linear: nn.Module, keep: Sequence[int]) -> None:
    """Keep inputs of a linear layer."""
    _cut(linear, "weight", 1, keep)
    linear.in_features = len(keep)  # type: ignore[assignment]


def _set(module: nn.Module, **values: int) -> None:
    """Set those attributes that the module has as numbers."""
    for name, value in values.items():
        if isinstance(vars(module).get(name), int):
            setattr(module, name, value)


def _replace_child(block: nn.Module, path: str, new: nn.Module) -> None:
    parent, _, name = path.rpartition(".")
    setattr(resolve(block, parent), name, new)


def _drop(block: nn.Module, part: Block, which: str) -> None:
    gone: Attention | Mlp | Experts | None = part.attention if which == "attention" else part.mlp or part.experts
    assert gone is not None
    for norm in gone.norms:
        _replace_child(block, norm, nn.Identity())
    new = stand_in(resolve(block, gone.path)) if which == "attention" else DroppedMlp()
    _replace_child(block, gone.path, new)


def _keep_heads(block: nn.Module, part: Attention, keep: Sequence[int]) -> None:
    size, ratio = part.head_dim, part.heads // part.kv_heads
    queries = [head * ratio + i for head in keep for i in range(ratio)]

    def channels(heads: Sequence[int], offset: int = 0) -> list[int]:
        return [offset + head * size + i for head in heads for i in range(size)]

    if part.qkv is not None:
        if part.fused_order == "interleaved":
            rows = [head * 3 * size + i for head in keep for i in range(3 * size)]
        else:
            keys, values = part.heads * size, (part.heads + part.kv_heads) * size
            rows = channels(queries) + channels(keep, keys) + channels(keep, values)
        _keep_rows(resolve(block, part.qkv), rows)
        owner = resolve(block, part.qkv.rpartition(".")[0])
    else:
        assert part.q is not None
        assert part.k is not None
        assert part.v is not None
        _keep_rows(resolve(block, part.q), channels(queries))
        _keep_rows(resolve(block, part.k), channels(keep))
        _keep_rows(resolve(block, part.v), channels(keep))
        owner = resolve(block, part.q.rpartition(".")[0])
    _keep_columns(resolve(block, part.o), channels(queries))
    heads, kv_heads = len(queries), len(keep)
    _set(owner, num_heads=heads, num_attention_heads=heads, num_key_value_heads=kv_heads, num_key_value_groups=ratio)
    _set(owner, all_head_size=heads * size)
    if getattr(owner, "embed_dim", None) == part.heads * size:
        # InternVL's tower reshapes the heads' outputs to this width.
        _set(owner, embed_dim=heads * size)


def _keep_neurons(block: nn.Module, part: Mlp, keep: Sequence[int]) -> None:
    for path in (part.gate, part.up):
        if path is not None:
            _keep_rows(resolve(block, path), keep)
    _keep_columns(resolve(block, part.down), keep)
    _set(resolve(block, part.path), intermediate_size=len(keep), ffn_dim=len(keep))


def _keep_experts(block: nn.Module, part: Experts, keep: Sequence[int], top_k: int) -> None:
    experts, router = resolve(block, part.experts), resolve(block, part.router)
    if isinstance(experts, RaggedExperts):
        chosen = RaggedExperts.select(experts, keep)
        _replace_child(block, part.experts, chosen)
        experts = chosen
    else:
        _cut_counted(experts, part.count, keep)
    _cut_counted(router, part.count, keep)
    # Blocks, their router and their experts may each keep their own copy of the two numbers.
    for module in (experts, router, resolve(block, part.path), resolve(block, part.experts.rpartition(".")[0])):
        _set(module, num_experts=len(keep), num_local_experts=len(keep), n_routed_experts=len(keep))
        _set(module, top_k=top_k, num_experts_per_tok=top_k)


def _cut_counted(module: nn.Module, count: int, keep: Sequence[int]) -> None:
    """Cut every parameter and buffer of a module that has one entry an expert: weights, biases, correction bias."""
    for name, tensor in [*module._parameters.items(), *module._buffers.items()]:
        if tensor is not None and tensor.dim() > 0 and tensor.shape[0] == count:
            _cut(module, name, 0, keep)


def _keep_expert_neurons(block: nn.Module, part: Experts, keep: Sequence[Sequence[int]]) -> None:
    experts: Any = resolve(block, part.experts)
    lengths = {len(kept) for kept in keep}
    if len(lengths) > 1 or part.widths is not None:
        _replace_child(block, part.experts, RaggedExperts.cut(experts, keep))
        return
    width = len(keep[0])
    gate_up, down = experts.gate_up_proj.detach(), experts.down_proj.detach()
    bias: Any = getattr(experts, "gate_up_proj_bias", None)
    rows_in, columns_out = (
        gate_up.new_empty(part.count, 2 * width, gate_up.shape[2]),
        down.new_empty(*down.shape[:2], width),
    )
    biases = None if bias is None else bias.detach().new_empty(part.count, 2 * width)
    for e, kept in enumerate(keep):
        index = torch.tensor(list(kept), dtype=torch.long, device=gate_up.device)
        both = torch.cat([index, index + part.width])  # gate rows, then up rows
        rows_in[e] = gate_up[e].index_select(0, both)
        columns_out[e] = down[e].index_select(1, index)
        if biases is not None:
            biases[e] = bias[e].index_select(0, both)
    _put(experts, "gate_up_proj", rows_in)
    _put(experts, "down_proj", columns_out)
    if biases is not None:
        _put(experts, "gate_up_proj_bias", biases)
    _set(experts, intermediate_dim=width, intermediate_size=width, expert_dim=width)


def _remove_blocks(hf: PreTrainedModel, tower: Tower, gone: set[int]) -> None:
    layers = resolve(hf, tower.layers)
    assert isinstance(layers, nn.ModuleList)
    stay = [block for i, block in enumerate(layers) if i not in gone]
    for i, block in enumerate(stay):
        for module in block.modules():
            _set(module, layer_idx=i)
    _replace_child(hf, tower.layers, nn.ModuleList(stay))


def _replace_config(hf: PreTrainedModel, new: PreTrainedConfig) -> None:
    """Put the new config, and its parts, where the model and its sub-modules hold the old ones."""
    old = hf.config
    pairs = [(old, new)]
    for key in getattr(old, "sub_configs", {}):
        before, after = getattr(old, key, None), getattr(new, key, None)
        if before is not None and after is not None:
            pairs.append((before, after))
    for module in hf.modules():
        held = getattr(module, "config", None)
        for before, after in pairs:
            # Some families copy a part of the config on building; such a copy is recognised by its type.
            if held is before or (held is not None and type(held) is type(before)):
                module.config = after
                _follow(module, after)
                break


def _follow(module: nn.Module, config: PreTrainedConfig) -> None:
    """Renew what a model's head or body copied out of its config on building."""
    types = vars(config).get("layer_types")
    if types is not None and isinstance(vars(module).get("has_sliding_layers"), bool):
        setattr(module, "has_sliding_layers", "sliding_attention" in types)  # noqa: B010, nn.Module's type stub
    if hasattr(module, "router_aux_loss_coef"):
        per_layer = config.per_layer_attributes or set()
        for name in ("num_experts", "num_experts_per_tok"):
            key = config.attribute_map.get(name, name)
            if key not in per_layer and hasattr(config, name):
                _set(module, **{name: getattr(config, name)})
