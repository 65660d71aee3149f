"""Rebuild a block, or a run of blocks (a stage), from those beside it: means and copies of like blocks.

Blocks are alike if their modules are of the same classes in the same places, with the same shapes and the same kind of
attention: only then does a mean of their weights mean anything.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from copy import deepcopy
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from paredown.core import anatomy as anatomies
from paredown.core import forward
from paredown.core.anatomy import resolve
from paredown.core.calibration import Batch
from paredown.core.checkpoint import Model
from paredown.core.learning.objective import next_token
from paredown.core.learning.teacher import real_predictions
from paredown.errors import ArchitectureError, UsageError

State = dict[str, Tensor]
FLOOR = 1e-4
"""What is added to each gradient norm before it weighs a neighbour."""


def weighted_mean(before: Mapping[str, Tensor], after: Mapping[str, Tensor], share: float) -> State:
    """Return ``(1 - share) * before + share * after`` for every entry, buffers too; equal entries come out exactly.

    What is no floating-point number is taken from ``before``. Computed in fp64, returned in the dtype of ``before``.
    """
    found = {}
    for name, first in before.items():
        if first.is_floating_point():
            wide = first.double()
            found[name] = (wide + share * (after[name].to(wide) - wide)).to(first.dtype)
        else:
            found[name] = first.clone()
    return found


def share_of_next(norm_before: float, norm_after: float) -> float:
    """Return how much the next block counts: by the norm of its gradients against that of the block before."""
    a, b = norm_after + FLOOR, norm_before + FLOOR
    return a / (a + b)


def layout(model: Model, index: int) -> tuple[Any, ...]:
    """Return what two blocks must share to be alike."""
    tower = model.anatomy.language
    block = resolve(model.hf, tower.blocks[index].path)
    modules = tuple((path, type(module).__qualname__) for path, module in block.named_modules())
    tensors = tuple((name, tuple(tensor.shape), tensor.dtype) for name, tensor in block.state_dict().items())
    kinds = getattr(anatomies.tower_config(model.config, tower), "layer_types", None)
    kind = kinds[index] if kinds else getattr(block, "attention_type", None)
    return modules, tensors, kind


def state(block: nn.Module) -> State:
    """Return a copy of a block's weights and persistent buffers."""
    return {name: tensor.detach().clone() for name, tensor in block.state_dict().items()}


@torch.no_grad()
def put(block: nn.Module, values: Mapping[str, Tensor]) -> None:
    """Write values into a block's own tensors, so that optimisers and ties hold on to them."""
    for name, tensor in block.state_dict().items():
        tensor.copy_(values[name])


def distance(own: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> float:
    """Return the norm of the difference of all entries, as a share of the norm of ``own``."""
    real = [name for name, tensor in own.items() if tensor.is_floating_point()]
    apart = sum(float((own[name].double() - other[name].double()).pow(2).sum()) for name in real)
    size = sum(float(own[name].double().pow(2).sum()) for name in real)
    return math.sqrt(apart / size) if size else 0.0


def gradient_norms(model: Model, data: Batch, *, batch: int = 4) -> list[float]:
    """Return the norm of each block's gradient of the next-token loss, the mean over all rows; nothing is changed."""
    blocks = [resolve(model.hf, block.path) for block in model.anatomy.language.blocks]
    wanted = [(p, p.requires_grad, p.grad) for p in model.hf.parameters()]
    learned = {id(p) for block in blocks for p in block.parameters()}
    try:
        for parameter, _, _ in wanted:
            parameter.grad = None
            parameter.requires_grad_(id(parameter) in learned and parameter.is_floating_point())
        for ids, mask in forward.batches(data, batch):
            with torch.enable_grad():
                loss = next_token(forward.logits(model.hf, ids, mask), ids, mask, reduction="sum")
                loss.backward()  # type: ignore[no-untyped-call]
        squares = [
            sum(float(p.grad.float().pow(2).sum()) for p in b.parameters() if p.grad is not None) for b in blocks
        ]
    finally:
        for parameter, requires, grad in wanted:
            parameter.requires_grad_(requires)
            parameter.grad = grad
    tokens = max(1, int(real_predictions(data.input_ids, data.attention_mask).sum()))
    return [math.sqrt(square) / tokens for square in squares]


class Stages:
    """A model cut into stages: 0 is everything around the blocks, 1 to ``n`` are equal runs of blocks.

    Parameters
    ----------
    n : how many runs; it must divide the number of blocks

    Raises
    ------
    UsageError
        If it does not, or there are fewer than three.
    ArchitectureError
        If the stages are not alike, layer by layer.
    """

    def __init__(self, model: Model, n: int) -> None:
        blocks = model.anatomy.language.blocks
        if n < 3 or len(blocks) % n:
            legal = [str(k) for k in range(3, len(blocks) + 1) if len(blocks) % k == 0]
            raise UsageError(
                f"{len(blocks)} blocks cannot be cut into {n} equal stages, of which there must be three at least; "
                f"choose one of {', '.join(legal) or 'none'}."
            )
        self.model, self.n, self.width = model, n, len(blocks) // n
        layouts = [layout(model, block.index) for block in blocks]
        for i, own in enumerate(layouts):
            if own != layouts[i % self.width]:
                raise ArchitectureError(
                    f"block {i} of {model.source} is of another kind than block {i % self.width}, and only like blocks "
                    "can stand in for each other; choose a number of stages such that all are alike."
                )

    def numbers(self, stage: int) -> list[int]:
        """Return the numbers of a stage's blocks; none for stage 0.

        Raises
        ------
        UsageError
            If there is no such stage.
        """
        if not 0 <= stage <= self.n:
            raise UsageError(f"there is no stage {stage}; stages go from 0 (the ends) to {self.n}.")
        return list(range((stage - 1) * self.width, stage * self.width)) if stage else []

    def blocks(self, stage: int) -> list[nn.Module]:
        """Return a stage's blocks."""
        paths = self.model.anatomy.language.blocks
        return [resolve(self.model.hf, paths[i].path) for i in self.numbers(stage)]

    def parameters(self, stage: int) -> list[nn.Parameter]:
        """Return a stage's parameters, each once; those of stage 0 are all that no block has."""
        if stage:
            return list({id(p): p for block in self.blocks(stage) for p in block.parameters()}.values())
        inside = {id(p) for i in range(1, self.n + 1) for p in self.parameters(i)}
        return [p for p in self.model.hf.parameters() if id(p) not in inside]

    def copy(self, stage: int, other: int) -> None:
        """Give a stage the weights of another."""
        for block, source in zip(self.blocks(stage), self.blocks(other), strict=True):
            put(block, state(source))

    def average(self, stage: int, share: float) -> None:
        """Give a stage the mean of the stages beside it, block by block; ``share`` is how much the next one counts."""
        sides = zip(self.blocks(stage - 1), self.blocks(stage + 1), strict=True)
        for block, (before, after) in zip(self.blocks(stage), sides, strict=True):
            put(block, weighted_mean(before.state_dict(), after.state_dict(), share))

    def renew(self, stage: int, seed: int) -> None:
        """Give a stage random weights, as the family begins with."""
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            for block in self.blocks(stage):
                put(block, fresh(self.model.hf, block).state_dict())

    @torch.no_grad()
    def wipe(self, stage: int) -> None:
        """Make a stage's weights not a number, so that nothing of them can be used unseen."""
        for parameter in self.parameters(stage):
            parameter.fill_(torch.nan)


def fresh(hf: PreTrainedModel, block: nn.Module) -> nn.Module:
    """Return a block like this one with random weights, drawn from torch's generator."""
    made = deepcopy(block)
    for module in made.modules():
        # transformers passes over whatever it has initialised or loaded before.
        for thing in (module, *module._parameters.values(), *module._buffers.values()):
            if thing is not None and hasattr(thing, "_is_hf_initialized"):
                delattr(thing, "_is_hf_initialized")
    with torch.no_grad():
        made.apply(hf._init_weights)
    return made
