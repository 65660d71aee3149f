"""What an edit makes of a block's anatomy, as data: the rules that edits must keep, without any tensor."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TypeVar

from paredown.core.anatomy import Attention, Block, Experts
from paredown.core.edits import (
    DropBlock,
    DropSublayer,
    Edit,
    KeepExpertNeurons,
    KeepExperts,
    KeepHeads,
    KeepNeurons,
)
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
