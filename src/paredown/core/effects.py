"""What an edit makes of a block's anatomy, as data: the rules that edits must keep, without any tensor."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TypeVar

from paredown.core.anatomy import Attention, Block, Experts
from paredown.core.edits import (
    ChangeWeights,
    DropBlock,
    DropSublayer,
    Edit,
    FuseBlocks,
    KeepExpertNeurons,
    KeepExperts,
    KeepHeads,
    KeepNeurons,
    ShareBlock,
)
from paredown.core.roles import Shared
from paredown.errors import ArchitectureError, BudgetError

_Part = TypeVar("_Part")


def edited(part: Block, edits: Sequence[Edit]) -> Block:
    """Return the anatomy of ``part`` after ``edits``, applied in the order given.

    Raises
    ------
    BudgetError
        If kept units repeat, do not exist, are none, or break a rule of the router.
    ArchitectureError
        If the block's family does not allow the edit.
    """
    for edit in edits:
        part = _one(part, edit)
    return part


def _one(part: Block, edit: Edit) -> Block:
    where = f"layer {part.index}"
    if isinstance(edit, DropBlock):
        raise BudgetError(f"{where}: a whole block can only be removed from a model, not from itself; use apply_model")
    if isinstance(edit, FuseBlocks):
        raise BudgetError(f"{where}: a block can only be fused with the others of its model; use apply_model")
    if isinstance(edit, ChangeWeights):
        return part
    if isinstance(edit, ShareBlock):
        return replace(part, shared=Shared(edit.source, edit.rank, edit.norms))
    if isinstance(edit, DropSublayer):
        return _without(part, edit, where)
    if isinstance(edit, KeepHeads):
        return replace(part, attention=_heads(_has(part.attention, "attention", where), edit, where))
    if isinstance(edit, KeepNeurons):
        mlp = _has(part.mlp, "dense MLP", where)
        _check(edit.keep, mlp.width, "neurons", where)
        return replace(part, mlp=replace(mlp, width=len(edit.keep)))
    experts = _has(part.experts, "experts", where)
    changed = _experts(experts, edit, where) if isinstance(edit, KeepExperts) else _neurons(experts, edit, where)
    return replace(part, experts=changed)


def runs(edits: Sequence[Edit], count: int) -> dict[int, range]:
    """Return the runs that edits fuse in a model of ``count`` blocks, by their first block.

    Raises
    ------
    BudgetError
        If runs overlap or leave the model, or another edit is meant for one of their blocks.
    """
    found = {edit.layer: range(edit.layer, edit.layer + edit.count) for edit in edits if isinstance(edit, FuseBlocks)}
    taken = [edit.layer for edit in edits if not isinstance(edit, FuseBlocks)]
    taken += [layer for run in found.values() for layer in run]
    for run in found.values():
        if run.stop > count:
            raise BudgetError(f"layers {run.start} to {run.stop - 1} cannot be fused, the model ends at {count - 1}")
        twice = next((layer for layer in run if taken.count(layer) > 1), None)
        if twice is not None:
            raise BudgetError(f"layer {twice} would be fused and edited otherwise, too; make it two steps")
    return found


def fused(parts: Sequence[Block]) -> Block:
    """Return the anatomy of blocks that run side by side as one wide block; it has the index of the first.

    Raises
    ------
    ArchitectureError
        If the family's blocks cannot be fused, or these differ in more than their widths.
    """
    for part in parts:
        why = hindrance(part)
        if why is not None:
            raise ArchitectureError(f"layer {part.index} cannot be fused with others: {why}; use another depth method")
    first = parts[0]
    attentions = [part.attention for part in parts if part.attention is not None]
    mlps = [part.mlp for part in parts if part.mlp is not None]
    odd = next((part for part in parts if not alike(first, part)), None)
    if odd is not None:
        raise ArchitectureError(
            f"layers {first.index} and {odd.index} cannot be fused: their heads are of other sizes or see other "
            "tokens, or one MLP has a gate and the other has none; choose another run"
        )
    attention = replace(
        attentions[0], heads=sum(one.heads for one in attentions), kv_heads=sum(one.kv_heads for one in attentions)
    )
    return replace(first, attention=attention, mlp=replace(mlps[0], width=sum(mlp.width for mlp in mlps)))


def alike(one: Block, other: Block) -> bool:
    """Whether two blocks are of one kind, so that one wide block could do what both do."""
    return _kind(one) == _kind(other)


def _kind(part: Block) -> tuple[object, ...]:
    attention, mlp = part.attention, part.mlp
    heads = None if attention is None else (attention.head_dim, attention.heads // attention.kv_heads, attention.sees)
    return heads, None if mlp is None else mlp.gate


def hindrance(part: Block) -> str | None:
    """Return why a block cannot be laid beside others and fused with them; None if nothing in its anatomy forbids it.

    Fusing folds each norm's gain into the projections that read it, so the norm must come before them and nothing
    may come between a projection and the sum over heads or neurons.
    """
    attention, mlp = part.attention, part.mlp
    if part.experts is not None:
        return "its router reads the stream, and experts of several layers have no common router"
    if attention is None or mlp is None:
        return "it lacks its attention or its MLP"
    if part.residual != "pre":
        return "its attention and its MLP do not follow each other with a norm before each"
    if len(attention.norms) != 1 or len(mlp.norms) != 1 or attention.contribution != attention.path:
        return "it has norms behind its sub-layers, which belong to one layer each"
    if attention.layout != "separate":
        return "its queries, keys and values come out of one common projection"
    if attention.head_norms:
        return "its queries and keys are normalised with gains of its own"
    if part.shared is not None:
        return "it shares weights with other layers"
    return None


def _has(part: _Part | None, role: str, where: str) -> _Part:
    if part is None:
        raise BudgetError(f"{where} has no {role} to cut; leave this layer out of the step")
    return part


def _check(keep: Sequence[int], count: int, unit: str, where: str, *, least: int = 1) -> None:
    if len(keep) < least:
        raise BudgetError(f"{where}: {len(keep)} of {count} {unit} would stay; keep at least {least}")
    if len(set(keep)) != len(keep):
        raise BudgetError(f"{where}: some of the kept {unit} are listed twice; list each one once")
    if min(keep, default=0) < 0 or max(keep, default=0) >= max(count, 1):
        raise BudgetError(f"{where}: kept {unit} must be numbers from 0 to {count - 1}, got {min(keep)} to {max(keep)}")


def _without(part: Block, edit: DropSublayer, where: str) -> Block:
    if part.residual == "post":
        raise ArchitectureError(
            f"{where}: the norm of this sub-layer comes after the addition and belongs to the stream, so the sub-layer"
            " cannot be dropped; remove whole blocks instead"
        )
    if edit.part == "attention":
        _has(part.attention, "attention", where)
        return replace(part, attention=None)
    _has(part.mlp or part.experts, "MLP", where)
    return replace(part, mlp=None, experts=None)


def _heads(attention: Attention, edit: KeepHeads, where: str) -> Attention:
    if attention.layout == "mla":
        raise ArchitectureError(
            f"{where}: latent attention shares one compressed key-value state between all heads, so heads cannot be"
            " cut; use another axis for this family"
        )
    if attention.joint_norms:
        raise ArchitectureError(
            f"{where}: queries and keys are normalised over all heads together, so cutting a head would change the"
            " others; use another axis for this family"
        )
    if attention.layout == "fused" and attention.fused_order is None:
        raise ArchitectureError(
            f"{where}: how {attention.qkv} orders the rows of its heads is not known; name it in FUSED_ORDER of"
            " core/architectures.py"
        )
    _check(edit.keep, attention.kv_heads, "key-value heads", where)
    ratio = attention.heads // attention.kv_heads
    return replace(attention, kv_heads=len(edit.keep), heads=len(edit.keep) * ratio)


def _experts(experts: Experts, edit: KeepExperts, where: str) -> Experts:
    keep, groups = edit.keep, experts.groups
    _check(keep, experts.count, "experts", where)
    if not 1 <= edit.top_k <= experts.top_k:
        raise BudgetError(f"{where}: top_k must be from 1 to {experts.top_k}, got {edit.top_k}")
    if len(keep) < edit.top_k:
        raise BudgetError(
            f"{where}: {len(keep)} experts would stay but each token uses {edit.top_k}; keep at least {edit.top_k} or"
            " lower top_k"
        )
    if groups > 1:
        _groups(experts, edit, where)
    widths = None if experts.widths is None else tuple(experts.widths[e] for e in keep)
    width = experts.width if widths is None else max(widths)
    return replace(experts, count=len(keep), top_k=edit.top_k, widths=widths, width=width)


def _groups(experts: Experts, edit: KeepExperts, where: str) -> None:
    """Groups are runs of equal length, the router scores a group by its two best experts and opens some groups."""
    size = experts.count // experts.groups
    of = [e // size for e in edit.keep]
    kept = [of.count(group) for group in range(experts.groups)]
    if len(set(kept)) > 1:
        raise BudgetError(
            f"{where}: the experts form {experts.groups} groups that must lose equally, but {kept} would stay; keep the"
            " same number in each group"
        )
    if of != sorted(of):
        raise BudgetError(f"{where}: kept experts must be listed group by group; sort them")
    least = max(2, -(-edit.top_k // experts.open_groups))
    if kept[0] < least:
        raise BudgetError(
            f"{where}: {kept[0]} experts a group would stay; keep at least {least}, since a token takes {edit.top_k}"
            f" experts from {experts.open_groups} of {experts.groups} groups and a group is judged by its best two"
        )


def _neurons(experts: Experts, edit: KeepExpertNeurons, where: str) -> Experts:
    if len(edit.keep) != experts.count:
        raise BudgetError(
            f"{where}: {len(edit.keep)} lists of neurons for {experts.count} experts; give one list for each expert"
        )
    lengths = tuple(len(kept) for kept in edit.keep)
    ragged = len(set(lengths)) > 1 or experts.widths is not None
    for e, kept in enumerate(edit.keep):
        full = experts.width if experts.widths is None else experts.widths[e]
        _check(kept, full, f"neurons of expert {e}", where, least=0 if ragged else 1)
    if max(lengths) == 0:
        raise BudgetError(f"{where}: no neuron of any expert would stay; drop the MLP instead")
    if not ragged and lengths[0] != experts.width and lengths[0] % experts.step:
        raise BudgetError(
            f"{where}: experts of width {lengths[0]} cannot run in transformers' grouped matrix products; keep a"
            f" multiple of {experts.step} neurons in each expert"
        )
    shared = experts.shared
    if edit.shared is not None:
        whole = _has(shared, "shared expert", where)
        _check(edit.shared, whole.width, "neurons of the shared expert", where)
        shared = replace(whole, width=len(edit.shared))
    return replace(experts, width=max(lengths), widths=lengths if ragged else None, shared=shared)
