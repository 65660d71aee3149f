"""Blocks that use each other's weights, in memory and on disk.

- Every block stays a module of its own, with its own ``layer_idx`` (so with a cache slot of its own), whose parameters
  *are* those of the block that it shares with: gradients of all uses add up, an optimiser sees each tensor once.
- What is shared are the matrices: attention, MLP, experts, router. What has one dimension, norms and biases, may be
  shared or not. Buffers (the correction bias of a router) are every block's own.
- Low-rank deltas (`lowrank`) let a block differ from what it shares.
- transformers is told of the ties at its own seams: ``all_tied_weights_keys`` of the model (loading does not miss them)
  and ``_tied_weights_keys`` of the block (saving writes them once). The config says the rest, see `configs`.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from paredown.core.depth.lowrank import DeltaLinear, Start, add_deltas, is_delta, linears, started
from paredown.core.edits import DropBlock, Edit, ShareBlock
from paredown.core.roles import Shared
from paredown.errors import ArchitectureError

if TYPE_CHECKING:
    from paredown.core.checkpoint import Model

Weights = Mapping[str, Tensor]


def tie(hf: nn.Module, layers: str, wanted: Mapping[int, Shared]) -> None:
    """Let blocks of the module list at ``layers`` share; deltas are there and zero. Doing it again changes nothing.

    Raises
    ------
    ArchitectureError
        If two such blocks are not alike, or a block has matrices that can have no delta. Nothing is touched then.
    """
    blocks: Any = hf.get_submodule(layers)
    for i, how in wanted.items():
        check_alike(blocks[how.source], blocks[i], how.source, i)
        if how.rank:
            linears(blocks[i])
    ties: dict[str, str] = {}
    for i, how in wanted.items():
        block, source = blocks[i], blocks[how.source]
        if how.rank:
            add_deltas(block, how.rank)
        names = shared_names(block, how.norms) if how.source != i else ()
        for name in names:
            owner, _, leaf = name.rpartition(".")
            block.get_submodule(owner)._parameters[leaf] = source.get_parameter(name)
            ties[f"{layers}.{i}.{name}"] = f"{layers}.{how.source}.{name}"
        block.paredown_shared = how
        # Patterns, of which save_pretrained drops what they match as long as it is stored elsewhere.
        block._tied_weights_keys = {re.escape(name) + "$": name for name in names}
    known: Any = getattr(hf, "all_tied_weights_keys", None)
    hf.all_tied_weights_keys = {**(known or {}), **ties}  # type: ignore[assignment]


def shared_names(block: nn.Module, norms: bool) -> tuple[str, ...]:
    """Return the parameters of a block that it shares: its matrices, and its vectors unless ``norms`` are its own."""
    return tuple(
        name
        for name, parameter in block.named_parameters(remove_duplicate=False)
        if not is_delta(name) and (parameter.dim() > 1 or not norms)
    )


def of(edits: Iterable[Edit], numbers: Sequence[int]) -> dict[int, Shared]:
    """Return who shares, in the numbering behind the edits; ``numbers`` are the blocks that stay."""
    at = {old: new for new, old in enumerate(numbers)}
    return {at[e.layer]: Shared(at[e.source], e.rank, e.norms) for e in edits if isinstance(e, ShareBlock)}


def check_alike(source: nn.Module, block: nn.Module, number: int, index: int) -> None:
    """Refuse to let a block use weights of other names or shapes.

    Raises
    ------
    ArchitectureError
        Naming the first difference.
    """
    theirs, own = _shapes(source), _shapes(block)
    different = next((name for name in sorted({*theirs, *own}) if theirs.get(name) != own.get(name)), None)
    if different is not None:
        raise ArchitectureError(
            f"layer {index} cannot share the weights of layer {number}, for {different} has the shape "
            f"{own.get(different, 'of nothing')} in one and {theirs.get(different, 'of nothing')} in the other; choose "
            "a keep under which only layers of one kind share."
        )


@torch.no_grad()
def share(
    model: Model,
    edits: Sequence[Edit],
    weights: Mapping[int, Weights] | None = None,
    *,
    start: Start = "svd",
    seed: int = 0,
) -> None:
    """Carry out edits among which blocks share, in memory, with deltas that begin from what each block held before.

    Parameters
    ----------
    model : changed in place: weights, config and anatomy
    edits : in the numbering before; may remove blocks as well
    weights : by block: new contents of parameters (by name within the block) that it lends; they are its own otherwise
    start : of the deltas, see `lowrank.started`
    seed : of deltas that are drawn

    Raises
    ------
    BudgetError, ArchitectureError
        See `surgery.apply_model`; nothing is touched then.
    """
    from paredown.core import surgery

    blocks = [model.hf.get_submodule(part.path) for part in model.anatomy.language.blocks]
    surgery.new_config(model.config, model.anatomy, edits)  # raises before anything is touched
    given = weights or {}
    halves: dict[int, dict[str, tuple[Tensor, Tensor]]] = {}
    shares = [edit for edit in edits if isinstance(edit, ShareBlock)]
    for edit in shares:
        check_alike(blocks[edit.source], blocks[edit.layer], edit.source, edit.layer)
        if edit.rank:
            found = halves.setdefault(edit.layer, {})
            for number, (path, linear) in enumerate(linears(blocks[edit.layer]).items()):
                name, generator = f"{path}.weight", _generator(seed, edit.layer, number)
                lent = given.get(edit.source, {}).get(name, blocks[edit.source].get_parameter(name))
                residual = linear.weight.float() - lent.float()
                found[path] = started(residual, edit.rank, start, generator)
    for layer, changed in given.items():
        for name, tensor in changed.items():
            blocks[layer].get_parameter(name).copy_(tensor)
    model.anatomy = surgery.apply_model(model.hf, model.anatomy, edits)
    for layer, made in halves.items():
        for path, (a, b) in made.items():
            # Surgery renumbers blocks and keeps their modules.
            linear = blocks[layer].get_submodule(path)
            assert isinstance(linear, DeltaLinear)
            linear.delta_a.copy_(a)
            linear.delta_b.copy_(b)


@torch.no_grad()
def average(blocks: Sequence[nn.Module], names: Iterable[str]) -> dict[str, Tensor]:
    """Return the mean of some parameters over blocks, in their dtype; that of equal tensors is exactly the same.

    Parameters
    ----------
    blocks : alike in shape
    names : parameters, by name within a block
    """
    found = {}
    for name in names:
        first = blocks[0].get_parameter(name)
        apart = [block.get_parameter(name).double() - first.double() for block in blocks]
        found[name] = (first.double() + sum(apart) / len(blocks)).to(first.dtype)
    return found


def stays(edits: Sequence[Edit], count: int) -> list[int]:
    """Return the numbers of the blocks that edits leave, of ``count``."""
    gone = {edit.layer for edit in edits if isinstance(edit, DropBlock)}
    return [i for i in range(count) if i not in gone]


def _shapes(block: nn.Module) -> dict[str, list[int]]:
    named = block.named_parameters(remove_duplicate=False)
    return {name: list(parameter.shape) for name, parameter in named if not is_delta(name)}


def _generator(seed: int, layer: int, number: int) -> torch.Generator:
    return torch.Generator().manual_seed((seed * 10_007 + layer) * 10_007 + number)
