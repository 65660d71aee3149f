"""A second look at surgery: did exactly the units that the edits name survive, and in that order?

Each unit (expert, neuron, head group) gets an integer checksum over all its weights before surgery. Afterwards the
checksums are taken again and must equal the kept ones, in the order of the edit. Integer sums do not depend on the
order of summation, so equality is exact. Experts that were skipped and router rows that were permuted show here.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from paredown.core.anatomy import Block
from paredown.core.edits import DropSublayer, Edit, KeepExpertNeurons, KeepExperts, KeepHeads, KeepNeurons
from paredown.core.method import View
from paredown.core.ragged import expert_weights
from paredown.core.tensors import CHUNK
from paredown.errors import ProofError

Checksums = dict[str, list[Tensor]]


def take(view: View, edits: Sequence[Edit]) -> Checksums:
    """Return the checksums of all units that ``edits`` choose from."""
    return {edit.op: _units(view, edit) for edit in edits if not isinstance(edit, DropSublayer)}


def check(before: Checksums, after: View, edits: Sequence[Edit]) -> None:
    """Compare checksums after surgery with those before it.

    Raises
    ------
    ProofError
        Naming the layer and the first unit that is not what the edit says.
    """
    for edit in edits:
        if isinstance(edit, DropSublayer):
            gone = after.part.attention if edit.part == "attention" else (after.part.mlp or after.part.experts)
            if gone is not None:
                raise ProofError(f"the {edit.part} of layer {edit.layer} was to be dropped but is still there.")
            continue
        if any(other.op == edit.op for other in edits if other is not edit):
            continue  # two edits of one kind compose; the last state is not either's alone
        for was, now, keep in zip(before[edit.op], _units(after, edit), _kept(edit), strict=True):
            expected = was[torch.tensor(keep, dtype=torch.long)]
            if now.shape != expected.shape or not torch.equal(now, expected):
                raise ProofError(
                    f"surgery left layer {edit.layer} with other units than {edit.op} names; "
                    "this is a fault of Paredown's, please report it."
                )


def digests(module: torch.nn.Module) -> dict[str, tuple[tuple[int, ...], int]]:
    """Return shape and checksum of every parameter, to see afterwards which were changed."""
    return {n: (tuple(p.shape), _checksum(p.detach())) for n, p in module.named_parameters()}


def touched(before: dict[str, tuple[tuple[int, ...], int]], after: dict[str, tuple[tuple[int, ...], int]]) -> int:
    """Count the parameters (elements, before) of tensors that were changed, cut or removed."""
    total = 0
    for name, (shape, checksum) in before.items():
        if after.get(name) != (shape, checksum):
            total += torch.Size(shape).numel()
    return total


def _checksum(tensor: Tensor) -> int:
    # In pieces, for the bits of each are widened to 64.
    return sum(int(_bits(part).sum()) for part in torch.split(tensor.reshape(-1), CHUNK))


def _bits(tensor: Tensor) -> Tensor:
    views = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
    return tensor.contiguous().view(views[tensor.element_size()]).long()


def _kept(edit: Edit) -> list[Sequence[int]]:
    if isinstance(edit, KeepExperts):
        return [edit.keep]
    if isinstance(edit, KeepExpertNeurons):
        return [*edit.keep, *([edit.shared] if edit.shared is not None else [])]
    if isinstance(edit, KeepNeurons | KeepHeads):
        return [edit.keep]
    return []


def _units(view: View, edit: Edit) -> list[Tensor]:
    part: Block = view.part
    if isinstance(edit, KeepExperts):
        assert part.experts is not None
        experts, router = view.child(part.experts.experts), view.child(part.experts.router)
        # A weight for each term, so that two errors cannot cancel out.
        pairs = zip(experts.gate_up_proj, experts.down_proj, strict=True)
        sums = torch.stack([_bits(up).sum() + 3 * _bits(down).sum() for up, down in pairs])
        return [sums + 5 * _bits(router.weight).sum(1)]
    if isinstance(edit, KeepExpertNeurons):
        assert part.experts is not None
        found = _expert_neurons(view.child(part.experts.experts), part.experts.count)
        if edit.shared is not None and part.experts.shared is not None:
            found.append(_mlp_neurons(view, part.experts.shared.gate, part.experts.shared.up, part.experts.shared.down))
        return found
    if isinstance(edit, KeepNeurons):
        assert part.mlp is not None
        return [_mlp_neurons(view, part.mlp.gate, part.mlp.up, part.mlp.down)]
    if isinstance(edit, KeepHeads):
        assert part.attention is not None
        weight = _bits(view.child(part.attention.o).weight)
        return [weight.reshape(weight.shape[0], part.attention.kv_heads, -1).sum((0, 2))]
    return []


def _expert_neurons(experts: torch.nn.Module, count: int) -> list[Tensor]:
    found = []
    for expert in range(count):
        gate, up, down = expert_weights(experts, expert)
        found.append(_bits(gate).sum(1) + 3 * _bits(up).sum(1) + 5 * _bits(down).sum(1))
    return found


def _mlp_neurons(view: View, gate: str | None, up: str, down: str) -> Tensor:
    found = 3 * _bits(view.child(up).weight).sum(1) + 5 * _bits(view.child(down).weight).sum(0)
    return found + _bits(view.child(gate).weight).sum(1) if gate is not None else found
