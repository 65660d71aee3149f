"""Continuous depth-wise batching: tokens at different loops of one shared stack run together.

Source: "Relaxed Recursive Transformers", 2024, arXiv 2410.20672. All loops use the same weights, so a token in its
second loop can be multiplied with them next to one in its first. Each tick runs the stack once on up to ``width``
tokens, each with the deltas, norms and cache slots of its own depth; a token that leaves makes room for a waiting one.

The next token of a sequence starts when the one before it has been through the first loop: what it attends to at each
depth is then there. What a token that left early would have said further down is not there, and is not attended to.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from paredown.core.checkpoint import Model
from paredown.core.sequential import Call, Resident, catch
from paredown.errors import ArchitectureError


@dataclass
class Token:
    """One token on its way: of which sequence, where in it, and which loop it is to run next."""

    request: int
    position: int
    loop: int
    hidden: Tensor


@dataclass
class _Slot:
    """What one sequence holds at one depth: positions and keys and values ``[Hkv, d]`` of each."""

    positions: list[int] = field(default_factory=list)
    keys: list[Tensor] = field(default_factory=list)
    values: list[Tensor] = field(default_factory=list)


class _Past:
    """Stands in for a cache within one block and one token: knows what came before, notes what is new."""

    def __init__(self, keys: Tensor, values: Tensor) -> None:
        self.keys, self.values = keys, values
        self.new: tuple[Tensor, Tensor] | None = None

    def update(self, keys: Tensor, values: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        """Return keys and values ``[1, Hkv, t + 1, d]`` with the new ones at the end."""
        self.new = keys, values
        return torch.cat([self.keys, keys], 2), torch.cat([self.values, values], 2)


@torch.no_grad()
def depthwise(
    model: Model,
    requests: Sequence[Sequence[int]],
    *,
    width: int,
    leave: Callable[[Token, Tensor], bool] | None = None,
    watch: Callable[[Sequence[Token]], None] | None = None,
) -> list[Tensor]:
    """Read sequences token by token, with tokens at different loops in one batch.

    Parameters
    ----------
    model : a recursive one: its blocks share the weights of the first K in a cycle
    requests : tokens of each sequence
    width : tokens in a tick, at most
    leave : called with a token and its state ``[H]`` after each loop but the last; true lets it leave
    watch : called with the tokens of each tick

    Returns
    -------
    For each sequence its states ``[T, H]`` behind the final norm, as the model's own forward gives them.

    Raises
    ------
    ArchitectureError
        If the blocks are no cycle over shared ones.
    """
    tower = model.anatomy.language
    blocks = [model.hf.get_submodule(part.path) for part in tower.blocks]
    unique, shape = _unique(model), _shape(model)
    norm = model.hf.get_submodule(tower.final_norm) if tower.final_norm else nn.Identity()
    with _eager(model):
        inputs = [catch(Resident(model), torch.tensor([list(ids)]), None) for ids in requests]
        states: list[dict[int, Tensor]] = [{} for _ in requests]
        slots: dict[tuple[int, int], _Slot] = {}
        started = [0] * len(requests)
        active: list[Token] = []
        while True:
            busy = {token.request for token in active if token.loop == 0}
            for request, ids in enumerate(requests):
                if len(active) < width and started[request] < len(ids) and request not in busy:
                    active.append(Token(request, started[request], 0, inputs[request][0][0, started[request]]))
                    started[request] += 1
            if not active:
                break
            if watch is not None:
                watch(tuple(active))
            for k in range(unique):
                _step(blocks, k, unique, active, slots, [calls for _, calls in inputs], shape)
            going = []
            for token in active:
                token.loop += 1
                last = token.loop * unique == len(blocks)
                if last or (leave is not None and leave(token, token.hidden)):
                    states[token.request][token.position] = token.hidden
                else:
                    going.append(token)
            active = going
    return [norm(torch.stack([found[position] for position in sorted(found)])) for found in states]


def _unique(model: Model) -> int:
    parts = model.anatomy.language.blocks
    sources = [part.index if part.shared is None else part.shared.source for part in parts]
    unique = len(set(sources))
    if unique == len(parts) or sources != [i % unique for i in range(len(parts))]:
        raise ArchitectureError(
            f"the blocks of {model.source} are no loops over shared ones; make them so with relaxed-recursive."
        )
    return unique


def _shape(model: Model) -> tuple[int, int]:
    """Return the number of KV heads and their size, which all blocks have in common."""
    attentions = [part.attention for part in model.anatomy.language.blocks]
    found = {(a.kv_heads, a.head_dim) for a in attentions if a is not None and a.layout != "mla"}
    if len(found) != 1:
        raise ArchitectureError(f"the attention of {model.source} is not of one kind, as depth-wise batches need it.")
    return found.pop()


def _step(
    blocks: Sequence[nn.Module],
    k: int,
    unique: int,
    tokens: Sequence[Token],
    slots: dict[tuple[int, int], _Slot],
    calls: Sequence[Sequence[Call]],
    shape: tuple[int, int],
) -> None:
    """Run the shared block ``k`` on all tokens, each at its own depth."""
    depths = [token.loop * unique + k for token in tokens]
    mine = [slots.setdefault((token.request, depth), _Slot()) for token, depth in zip(tokens, depths, strict=True)]
    shared, own = _parameters(blocks, k, sorted(set(depths)))
    stacked = {name: torch.stack([blocks[depth].get_parameter(name).detach() for depth in depths]) for name in own}
    given = [calls[token.request][depth].kwargs for token, depth in zip(tokens, depths, strict=True)]
    longest = max(len(slot.positions) for slot in mine)
    past = [_padded(slot, longest, *shape, tokens[0].hidden) for slot in mine]
    masks = torch.stack([_mask(t, slot, longest, kw) for t, slot, kw in zip(tokens, mine, given, strict=True)])
    turned: list[Any] = [kw.get("position_embeddings") for kw in given]
    tables = None
    if turned[0] is not None:
        rows = [
            [part[:, t.position : t.position + 1] for part in table] for table, t in zip(turned, tokens, strict=True)
        ]
        tables = tuple(torch.stack(parts) for parts in zip(*rows, strict=True))
    cache = "layer_past" if "layer_past" in inspect.signature(type(blocks[k]).forward).parameters else "past_key_values"

    def run(params: dict[str, Tensor], hidden: Tensor, keys: Tensor, values: Tensor, mask: Tensor, table: Any) -> Any:
        before = _Past(keys, values)
        named: dict[str, Any] = {cache: before, "attention_mask": mask, "use_cache": True}
        if table is not None:
            named["position_embeddings"] = table
        output = functional_call(blocks[k], {**shared, **params}, (hidden,), named)
        assert before.new is not None
        return (output[0] if isinstance(output, tuple) else output, *before.new)

    hidden = torch.stack([token.hidden for token in tokens])[:, None, None]
    keys, values = (torch.stack([pair[part] for pair in past]) for part in range(2))
    # Over the tokens' own parameters; what is shared is one operand for all of them.
    over = torch.func.vmap(run, in_dims=(0, 0, 0, 0, 0, None if tables is None else 0))
    after, new_keys, new_values = over(stacked, hidden, keys, values, masks, tables)
    for i, (token, slot) in enumerate(zip(tokens, mine, strict=True)):
        token.hidden = after[i, 0, 0]
        slot.positions.append(token.position)
        slot.keys.append(new_keys[i, 0, :, 0])
        slot.values.append(new_values[i, 0, :, 0])


def _parameters(blocks: Sequence[nn.Module], k: int, depths: Sequence[int]) -> tuple[dict[str, Tensor], list[str]]:
    """Return what all depths have in common, and the names of what each has for itself."""
    shared: dict[str, Tensor] = {}
    own: list[str] = []
    for name, parameter in blocks[k].named_parameters():
        if all(blocks[depth].get_parameter(name) is parameter for depth in depths):
            shared[name] = parameter.detach()
        else:
            own.append(name)
    return shared, own


def _padded(slot: _Slot, longest: int, heads: int, size: int, like: Tensor) -> tuple[Tensor, Tensor]:
    """Return keys and values ``[1, Hkv, longest, d]``, filled up with zeros behind."""
    found = []
    for held in (slot.keys, slot.values):
        whole = like.new_zeros(1, heads, longest, size)
        if held:
            whole[0, :, : len(held)] = torch.stack(held, 1)
        found.append(whole)
    return found[0], found[1]


def _mask(token: Token, slot: _Slot, longest: int, given: dict[str, Any]) -> Tensor:
    """Return what is added to the scores, ``[1, 1, 1, longest + 1]``: of the past what the model lets it see."""
    row: Tensor = given["attention_mask"][0, 0, token.position]
    mask = torch.full((longest + 1,), torch.finfo(token.hidden.dtype).min, dtype=token.hidden.dtype, device=row.device)
    seen = row[slot.positions]
    mask[: len(slot.positions)][seen if seen.dtype == torch.bool else seen == 0] = 0
    mask[-1] = 0
    return mask[None, None, None]


@contextmanager
def _eager(model: Model) -> Iterator[None]:
    """Let attention be computed with masks that are always given, by operations that can be mapped over tokens."""
    hf = model.hf
    before = hf.config._attn_implementation
    hf.set_attn_implementation("eager")
    try:
        yield
    finally:
        hf.set_attn_implementation(before)
