"""One factor a block: what the model loses under factors, and factors folded into the weights."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from paredown.core import forward
from paredown.core.checkpoint import Model
from paredown.core.depth.gates import Factor, Kind, Unit, gated
from paredown.core.looking.walk import Tokens
from paredown.core.roles import Block, Experts
from paredown.errors import ArchitectureError

Rows = Sequence[tuple[Tensor, Tensor | None]]
"""Token ids and mask ``[B, T]``, a few rows at a time; see `walk.sample`."""


def branches(block: Block) -> list[Unit]:
    """Return what a block adds to the stream: a factor for each of these scales the whole block."""
    found: list[Unit] = []
    if block.attention is not None:
        found.append((block.index, "attention"))
    if block.mlp is not None or block.experts is not None:
        found.append((block.index, "mlp"))
    return found


def factors(blocks: Sequence[Block], factor: Factor) -> dict[Unit, Factor]:
    """Return the same factor for all that these blocks add."""
    return {unit: factor for block in blocks for unit in branches(block)}


@torch.no_grad()
def divergences(model: Model, rows: Rows, settings: Sequence[Mapping[Unit, Factor]]) -> list[Tokens]:
    """Return ``KL(p || p')`` in nats, token by token, of the model against itself under each setting of its gates."""
    found = [Tokens() for _ in settings]
    for ids, mask in rows:
        counted = mask.bool() if mask is not None else torch.ones_like(ids, dtype=torch.bool)
        with gated(model) as gates:
            known = _distribution(model, ids, mask)
            for setting, tokens in zip(settings, found, strict=True):
                gates.set(setting)
                other = _distribution(model, ids, mask)
                tokens.add((known.exp() * (known - other)).sum(-1).clamp(min=0), counted)
    return found


def _distribution(model: Model, ids: Tensor, mask: Tensor | None) -> Tensor:
    return F.log_softmax(forward.logits(model.hf, ids, mask).float(), -1)


def attributions(model: Model, rows: Rows, steps: int) -> Tensor:
    """Return how much each block of each row adds to the log-probability of the model's own choice: ``[N, L]``.

    Integrated gradients over the factors of all blocks together, from 0 (no block at all) to 1, by midpoints. For each
    row they sum to what all blocks together change, as ``steps`` grows.
    """
    blocks = model.anatomy.language.blocks
    found = []
    trained = [p for p in model.hf.parameters() if p.requires_grad]
    for ids, mask in rows:
        counted = (mask.bool() if mask is not None else torch.ones_like(ids, dtype=torch.bool)).to(model.hf.device)
        with torch.no_grad():
            best = _distribution(model, ids, mask).argmax(-1, keepdim=True)
        total = torch.zeros(len(ids), len(blocks), dtype=torch.float64)
        try:
            for parameter in trained:
                parameter.requires_grad_(False)
            with gated(model) as gates, torch.enable_grad():
                for step in range(steps):
                    level = torch.full((len(blocks), len(ids), 1, 1), (step + 0.5) / steps, device=model.hf.device)
                    level = level.to(model.hf.dtype).requires_grad_()
                    gates.set({unit: level[i] for i, block in enumerate(blocks) for unit in branches(block)})
                    said = _distribution(model, ids, mask).gather(-1, best)[..., 0]
                    mean = (said * counted).sum(1) / counted.sum(1).clamp(min=1)
                    (gradient,) = torch.autograd.grad(mean.sum(), level)
                    total += gradient.reshape(len(blocks), -1).T.double().cpu() / steps
        finally:
            for parameter in trained:
                parameter.requires_grad_(True)
        found.append(total)
    return torch.cat(found)


@torch.no_grad()
def fold(model: Model, given: Mapping[tuple[int, Kind], float]) -> None:
    """Multiply what sub-layers add to the stream, for good: the factors go into their last weights.

    Those are the output projection, the down projections of MLP or experts, each with its bias, or the norm after the
    sub-layer where there is one (Gemma).

    Raises
    ------
    ArchitectureError
        If there is no such sub-layer, or a whole block is named: a block is its sub-layers.
    """
    blocks = {block.index: block for block in model.anatomy.language.blocks}
    for (layer, kind), factor in given.items():
        part = blocks.get(layer)
        served = None if part is None else part.attention if kind == "attention" else part.mlp or part.experts
        if part is None or served is None or kind == "block":
            raise ArchitectureError(f"layer {layer} has no {kind} into which a factor could be folded.")
        module = model.hf.get_submodule(part.path)
        if served.contribution != served.path:
            _scale_norm(module.get_submodule(served.contribution), factor)
            continue
        if kind == "attention":
            assert part.attention is not None
            paths = [part.attention.o]
        elif isinstance(served, Experts):
            paths = [served.shared.down] if served.shared is not None else []
            for name, parameter in module.get_submodule(served.experts).named_parameters():
                if name.startswith("down"):
                    parameter.mul_(factor)
        else:
            assert part.mlp is not None
            paths = [part.mlp.down]
        for path in paths:
            for parameter in module.get_submodule(path).parameters():
                parameter.mul_(factor)


def _scale_norm(norm: nn.Module, factor: float) -> None:
    """Scale a norm's output; some families multiply by ``1 + weight``, which shows where the weight is 0."""
    weight = norm.weight
    assert isinstance(weight, Tensor)
    kept = weight.clone()
    weight.zero_()
    offset = float(norm(torch.ones_like(weight)[None]).abs().max() > 0)
    if getattr(norm, "bias", None) is not None:
        offset = 0.0
        norm.bias.mul_(factor)  # type: ignore[operator]
    weight.copy_((kept.float() + offset) * factor - offset)
