"""Blocks that run side by side on one input, fused into one wide block of the same family.

The two-stage form of a run of blocks: ``u = h + sum_i Attn_i(norm1_i(h))``, ``y = u + sum_i MLP_i(norm2_i(u))``. It is
an ordinary block, exactly:

- Norms without gain and bias are common to all, so each layer's gain goes into the columns of the projections that
  read the norm, its bias (LayerNorm) through them into their biases. The wide block's norms have gain 1 and bias 0.
- Rows of queries, keys, values, gate and up are stacked, layer by layer, so that query heads stay next to the key-value
  head that they read; columns of the output and down projections lie side by side; their biases add up.

What that cannot express (norms behind sub-layers, gains on queries and keys, experts, blocks that differ in window or
rotary positions) is refused.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from paredown.core.anatomy import Block, Tower, resolve
from paredown.core.effects import fused
from paredown.errors import ArchitectureError

# Numbers that modules keep of their sizes, and of their place: these may differ within a run.
_HEADS = ("num_heads", "num_attention_heads")
_KV_HEADS = ("num_key_value_heads",)
_WIDTHS = ("intermediate_size", "ffn_dim")
_FREE = {*_HEADS, *_KV_HEADS, *_WIDTHS, "layer_idx", "in_features", "out_features", "all_head_size", "training"}


def check(modules: Sequence[nn.Module], parts: Sequence[Block]) -> None:
    """Refuse blocks that no single wide block can stand for.

    Raises
    ------
    ArchitectureError
        In one sentence, naming the layer.
    """
    fused(parts)
    for module, part in zip(modules, parts, strict=True):
        _check_parameters(module, part)
        _check_alike(modules[0], module, parts[0].index, part.index)


def wide(modules: Sequence[nn.Module], parts: Sequence[Block]) -> nn.Module:
    """Return a new block that stands for a run, and leave the run as it is."""
    first = copy.deepcopy(modules[0])
    fuse([first, *modules[1:]], parts)
    return first


@torch.no_grad()
def fuse(modules: Sequence[nn.Module], parts: Sequence[Block]) -> None:
    """Turn the first module of a run into the wide block that stands for all of it; the others are only read.

    Raises
    ------
    ArchitectureError
        See :func:`check`.
    """
    check(modules, parts)
    first, part = modules[0], parts[0]
    attention, mlp = part.attention, part.mlp
    assert attention is not None
    assert mlp is not None
    after = fused(parts)
    assert after.attention is not None
    assert after.mlp is not None
    readers = [(attention.norms[0], path) for path in (attention.q, attention.k, attention.v) if path is not None]
    readers += [(mlp.norms[0], path) for path in (mlp.gate, mlp.up) if path is not None]
    new = {path: _stacked(modules, norm, path) for norm, path in readers}
    new |= {path: _beside(modules, path) for path in (attention.o, mlp.down)}
    for path, (weight, bias) in new.items():
        _put(resolve(first, path), weight, bias)
    for path in (attention.norms[0], mlp.norms[0]):
        _neutral(resolve(first, path))
    heads, kv_heads, width = after.attention.heads, after.attention.kv_heads, after.mlp.width
    for module in first.modules():
        for names, value in ((_HEADS, heads), (_KV_HEADS, kv_heads), (_WIDTHS, width)):
            for name in names:
                if isinstance(vars(module).get(name), int):
                    setattr(module, name, value)


def _stacked(modules: Sequence[nn.Module], norm: str, path: str) -> tuple[Tensor, Tensor | None]:
    """Return the rows of all layers' projections, each with the gain and bias of the norm that it reads."""
    weights, biases = [], []
    for module in modules:
        linear: Any = resolve(module, path)
        gain, shift = _affine(resolve(module, norm))
        weight = linear.weight.float()
        weights.append((weight * gain).to(linear.weight.dtype))
        if linear.bias is not None:
            bias = linear.bias.float()
            biases.append((bias if shift is None else bias + weight @ shift).to(linear.bias.dtype))
    return torch.cat(weights), torch.cat(biases) if biases else None


def _beside(modules: Sequence[nn.Module], path: str) -> tuple[Tensor, Tensor | None]:
    """Return the columns of all layers' projections side by side, and the sum of their biases."""
    linears: list[Any] = [resolve(module, path) for module in modules]
    weight = torch.cat([linear.weight for linear in linears], dim=1)
    if linears[0].bias is None:
        return weight, None
    total = torch.stack([linear.bias.float() for linear in linears]).sum(0)
    return weight, total.to(linears[0].bias.dtype)


def _put(linear: Any, weight: Tensor, bias: Tensor | None) -> None:
    trained = linear.weight.requires_grad
    linear.weight = nn.Parameter(weight.contiguous(), requires_grad=trained)
    if bias is not None:
        linear.bias = nn.Parameter(bias.contiguous(), requires_grad=trained)
    linear.out_features, linear.in_features = weight.shape


def _affine(norm: Any) -> tuple[Tensor, Tensor | None]:
    """Return a norm's gain and bias in fp32."""
    bias = getattr(norm, "bias", None)
    return norm.weight.float() + _offset(norm), None if bias is None else bias.float()


def _neutral(norm: Any) -> None:
    """Set a norm to gain 1 and bias 0."""
    offset = _offset(norm)
    norm.weight.fill_(1.0 - offset)
    if getattr(norm, "bias", None) is not None:
        norm.bias.zero_()


def _offset(norm: Any) -> float:
    """Return what a norm adds to its weight: 1 in families that store the gain less 1 (Gemma, Nemotron), else 0."""
    if norm.weight.is_meta:
        return 0.0
    trial = copy.deepcopy(norm)
    for parameter in trial.parameters():
        parameter.zero_()
    # Without its weight a norm gives nothing, unless something is added to the weight.
    sample = torch.linspace(-1, 1, norm.weight.numel(), dtype=norm.weight.dtype, device=norm.weight.device)
    return float(bool(trial(sample[None, None]).any()))


def _check_parameters(module: nn.Module, part: Block) -> None:
    attention, mlp = part.attention, part.mlp
    assert attention is not None
    assert mlp is not None
    linears = [attention.q, attention.k, attention.v, attention.o, mlp.gate, mlp.up, mlp.down]
    norms = [*attention.norms, *mlp.norms]
    known = {f"{path}.{leaf}" for path in (*linears, *norms) if path is not None for leaf in ("weight", "bias")}
    other = next((name for name, _ in module.named_parameters() if name not in known), None)
    if other is not None:
        raise ArchitectureError(
            f"layer {part.index} cannot be fused with others: there is no way to lay its {other} beside theirs; use "
            "another depth method"
        )
    served = ((attention.norms[0], linears[:3]), (mlp.norms[0], linears[4:6]))
    for norm, readers in served:
        shifts = getattr(resolve(module, norm), "bias", None) is not None
        for path in readers:
            if shifts and path is not None and getattr(resolve(module, path), "bias", None) is None:
                raise ArchitectureError(
                    f"layer {part.index} cannot be fused with others: the bias of its {norm} has no place, since "
                    f"{path} has none; use another depth method"
                )


def _check_alike(one: nn.Module, other: nn.Module, first: int, second: int) -> None:
    names = dict(one.named_modules())
    for path, module in other.named_modules():
        known = names.get(path)
        where = f"layers {first} and {second} cannot be fused: "
        if known is None or type(known) is not type(module):
            raise ArchitectureError(f"{where}their {path or 'blocks'} are of different kinds; choose another run")
        for name, value in vars(module).items():
            plain = value is None or isinstance(value, bool | int | float | str)
            if plain and not name.startswith("_") and name not in _FREE and vars(known).get(name) != value:
                raise ArchitectureError(f"{where}they differ in {f'{path}.{name}'.lstrip('.')}; choose another run")


@contextmanager
def replaced(hf: nn.Module, tower: Tower, forwards: Mapping[int, Any]) -> Iterator[None]:
    """Let blocks compute something else inside the ``with`` block: ``forwards[layer](hidden, **kwargs)``."""
    blocks = {i: resolve(hf, tower.blocks[i].path) for i in forwards}
    try:
        for i, block in blocks.items():
            block.forward = forwards[i]
        yield
    finally:
        for block in blocks.values():
            vars(block).pop("forward", None)
