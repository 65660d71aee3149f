"""The token stream between blocks: rows may leave, merge, come back, or be led around a block.

- A pass begins with one row for each new token. As long as nothing is changed, nothing is sliced and no hook returns
  anything: the model computes exactly what it would have.
- Before a block runs, whatever it is told about the rows (rotary tables, position ids, segments) is cut to those that
  are there. Masks stay whole; attention picks from them by logical position (see `core.attention`).
- After the last block every token is a row again: those that left come back in the state in which they left.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from paredown.core.cache import packed
from paredown.core.runtime import Pass
from paredown.errors import PolicyError

Rotate = Callable[[Any, Tensor], Any]


class Stream:
    """The rows that are on their way through a tower in one pass.

    Attributes
    ----------
    hidden : ``[B, n, D]``
    rows : ``[B, n]`` logical positions, -1 for fillers (rows of the batch that have fewer tokens); None while every new
        token is a row
    ordered : whether ``rows`` ascend and hold no fillers
    sizes : ``[B, n]``, tokens merged into each row; None while no row is a merger
    now : the pass; None in a vision tower
    block : what the block before or after which a hook runs was called with, for the current rows
    """

    def __init__(self, now: Pass | None, *, flat: bool = False) -> None:
        self.now, self.flat = now, flat
        self.hidden: Tensor = torch.empty(0)
        self.rows: Tensor | None = None
        self.sizes: Tensor | None = None
        self.ordered = True
        self.block: dict[str, Any] = {}
        self.rotations: list[tuple[Any, Tensor, Rotate]] = []
        self._past = 0 if now is None else now.past
        self._whole: Tensor | None = None
        self._ids: Tensor | None = None
        self._foreign = False
        self._count: int | None = None
        self._turned: dict[int, tuple[Tensor, Any]] = {}
        self._aside: tuple[Tensor, Tensor | None, Tensor | None, Tensor | None, bool, Tensor] | None = None

    @property
    def past(self) -> int:
        """Logical position of the pass's first token."""
        return self._past

    @property
    def length(self) -> int:
        """New tokens of the pass; in a vision tower the rows that it began with."""
        return self.hidden.shape[1] if self._count is None else self._count

    @property
    def changed(self) -> bool:
        """Whether blocks must be told other things than what they are called with."""
        return self.rows is not None or self._foreign

    def positions(self) -> Tensor:
        """Return the logical positions of the rows, ``[B, n]``."""
        if self.rows is not None:
            return self.rows
        batch, count, _ = self.hidden.shape
        return torch.arange(self._past, self._past + count, device=self.hidden.device).expand(batch, -1)

    def real(self) -> Tensor:
        """Return which rows are tokens and neither fillers nor padding, ``[B, n]``."""
        at = self.positions()
        return at >= 0 if self.now is None else self.now.real(at)

    def visual(self) -> Tensor:
        """Return which rows stand for pieces of images, ``[B, n]``; rows of earlier passes never do."""
        at = self.positions()
        if self.now is None or self.now.visual is None:
            return torch.zeros_like(at, dtype=torch.bool)
        new = at - self._past
        return self.now.visual.gather(1, new.clamp_min(0)) & (new >= 0)

    def keep(self, mask: Tensor) -> None:
        """Let the rows go whose ``mask`` ``[B, n]`` is false; order and logical positions stay."""
        if bool(mask.all()):
            return
        index = packed(mask & (self.positions() >= 0))
        if self.now is None:
            # The class token of a vision tower is its first row; fillers go behind.
            index = index.gather(1, (index < 0).int().argsort(dim=1, stable=True))
        self.select(index)

    def select(self, index: Tensor) -> None:
        """Keep the rows ``index`` ``[B, m]``, in that order; -1 makes a filler."""
        before = self.positions()
        self._remember()
        at = index.clamp_min(0)
        self.hidden = self.hidden.gather(1, at[..., None].expand(-1, -1, self.hidden.shape[2]))
        self.rows = before.gather(1, at).masked_fill(index < 0, -1)
        self._take(at)
        self._check_order()

    def merge(self, target: Tensor) -> None:
        """Merge rows: row ``i`` goes into row ``target[b, i]`` (itself, if it stays), weighted by sizes.

        ``target`` is ``[B, n]``; the targets' logical positions and order stay.
        """
        batch, count, width = self.hidden.shape
        own = torch.arange(count, device=target.device).expand(batch, -1)
        sizes = self.hidden.new_ones((batch, count)) if self.sizes is None else self.sizes
        total = torch.zeros_like(sizes).scatter_add(1, target, sizes)
        weighted = torch.zeros_like(self.hidden).scatter_add(
            1, target[..., None].expand(-1, -1, width), self.hidden * sizes[..., None]
        )
        self.sizes = total.clamp_min(1)
        self._remember()
        self.hidden = weighted / self.sizes[..., None]
        self.keep(target == own)

    def add(self, hidden: Tensor, rows: Tensor, ids: Tensor) -> None:
        """Bring tokens back, behind the rows that are there.

        Parameters
        ----------
        hidden : ``[B, r, D]``
        rows : ``[B, r]`` logical positions, -1 for fillers
        ids : their position ids, as :meth:`position_ids` gave them
        """
        before, known = self.positions(), self.position_ids()
        self._remember()
        self.hidden = torch.cat([self.hidden, hidden.to(self.hidden.dtype)], dim=1)
        self.rows = torch.cat([before, rows], dim=1)
        self._ids = torch.cat([known, ids], dim=-1)
        if self.sizes is not None:
            self.sizes = torch.cat([self.sizes, self.sizes.new_ones(rows.shape)], dim=1)
        self._foreign, self.ordered = True, False

    def around(self, mask: Tensor) -> Tensor:
        """Lead the rows whose ``mask`` ``[B, n]`` is true around the next block; call it before that block runs.

        Returns
        -------
        ``[B, m]``, which rows enter the block, -1 for fillers; where none does, the block runs on no rows at all.
        """
        stay = packed(~mask & (self.positions() >= 0))
        self._aside = (self.hidden, self.rows, self._ids, self.sizes, self.ordered, stay)
        self.select(stay)
        return stay

    def renumber(self, ids: Tensor) -> None:
        """Give the rows other position ids than their own (``[B, n]`` or ``[3, B, n]``); logical positions stay.

        Raises
        ------
        PolicyError
            If the model has no rotary embedding that could be asked for them.
        """
        if not self.rotations:
            raise PolicyError("this model's tokens cannot be renumbered: it has no rotary positions.")
        self._ids, self._foreign = ids, True

    def position_ids(self) -> Tensor:
        """Return the rows' position ids as the rotary embedding takes them, ``[B, n]`` or ``[3, B, n]``."""
        if self._ids is not None:
            return self._ids
        if not self.rotations:
            return self.positions()
        ids = self.rotations[0][1]
        batch = self.hidden.shape[0]
        ids = ids.expand(*ids.shape[:-2], batch, -1)
        return ids if self.rows is None else _pick(ids, self._own(), -1)

    # What the hooks of `core.attach` call.

    def enter(self, hidden: Tensor) -> None:
        """Take a block's input."""
        self.hidden = hidden[None] if self.flat else hidden

    def told(self, options: dict[str, Any]) -> dict[str, Any]:
        """Return a block's keyword arguments for the rows that are there."""
        if self.changed:
            options = {name: self._cut(name, value) for name, value in options.items()}
        self.block = options
        return options

    def state(self) -> Tensor:
        """Return the hidden states in the tower's own layout."""
        return self.hidden[0] if self.flat else self.hidden

    def leave(self, hidden: Tensor) -> None:
        """Take a block's output; rows that were led around it come back to their places."""
        self.enter(hidden)
        if self._aside is None:
            return
        whole, rows, ids, sizes, ordered, stay = self._aside
        self._aside = None
        self.hidden = scattered(whole, stay, self.hidden)
        self.rows, self._ids, self.sizes, self.ordered = rows, ids, sizes, ordered

    def restored(self) -> Tensor:
        """Return a row for every new token, those that left in the state in which they left."""
        if self._whole is None:
            return self.state()
        self._remember()
        return self._whole[0] if self.flat else self._whole

    def _remember(self) -> None:
        if self._count is None:
            self._count = self.hidden.shape[1]
        if self.now is None:
            return  # nothing comes back in a vision tower
        if self._whole is None:
            self._whole = self.hidden
            return
        if self.rows is None:
            self._whole = self.hidden
            return
        new = self.rows - self._past
        self._whole = scattered(self._whole, torch.where(self.rows >= 0, new, -1), self.hidden)

    def _take(self, at: Tensor) -> None:
        if self.sizes is not None:
            self.sizes = self.sizes.gather(1, at)
        if self._ids is not None:
            self._ids = _pick(self._ids, at, -1)

    def _check_order(self) -> None:
        assert self.rows is not None
        ascend = (self.rows[:, 1:] > self.rows[:, :-1]).all() & (self.rows >= 0).all()
        self.ordered = bool(ascend)

    def _own(self) -> Tensor:
        assert self.rows is not None
        return (self.rows - self._past).clamp_min(0)

    def _cut(self, name: str, value: Any) -> Any:
        if name.startswith("position_embeddings") and value is not None:
            return self._table(value)
        if not isinstance(value, Tensor):
            return value
        if self.rows is None:
            return value
        if name == "position_ids":
            return _pick(value, self._own(), -1)
        if name == "cache_position":
            return value
        if name == "cu_seqlens":
            return self._segments(value)
        return value

    def _table(self, value: Any) -> Any:
        if self._foreign:
            ids = self.position_ids()
            for index, (table, _, rotate) in enumerate(self.rotations):
                if table is value or (isinstance(value, tuple) and table[0] is value[0]):
                    if index not in self._turned or self._turned[index][0] is not ids:
                        self._turned[index] = (ids, rotate(self.hidden, ids))
                    return self._turned[index][1]
        if self.rows is None:
            return value
        if isinstance(value, Tensor):
            return self._line(value)
        return type(value)(self._line(part) for part in value)

    def _line(self, table: Tensor) -> Tensor:
        own = self._own()
        if self.flat:
            return table[own[0]]
        return _pick(table, own, -2)

    def _segments(self, ends: Tensor) -> Tensor:
        assert self.rows is not None
        segment = torch.bucketize(self.rows[0], ends[1:], right=True)
        counts = torch.bincount(segment, minlength=len(ends) - 1)
        return torch.cat([ends[:1], counts.cumsum(0).to(ends.dtype)])


def _pick(table: Tensor, index: Tensor, axis: int) -> Tensor:
    """Gather ``index`` ``[B, n]`` along ``axis``: -1 of ``[..., B, T]``, -2 of ``[..., B, T, d]``; B may be 1."""
    batch, count = index.shape
    if axis == -1:
        wide = table.expand(*table.shape[:-2], batch, table.shape[-1])
        return wide.gather(-1, index.expand(*table.shape[:-2], batch, count))
    wide = table.expand(*table.shape[:-3], batch, *table.shape[-2:])
    at = index[..., None].expand(*table.shape[:-3], batch, count, table.shape[-1])
    return wide.gather(-2, at)


def scattered(whole: Tensor, at: Tensor, rows: Tensor) -> Tensor:
    """Return ``whole`` ``[B, T, D]`` with ``rows`` ``[B, n, D]`` written to ``at`` ``[B, n]``, and nowhere for -1."""
    out = whole.clone()
    batch = torch.arange(len(at), device=at.device)[:, None].expand_as(at)
    inside = (at >= 0) & (at < whole.shape[1])
    out[batch[inside], at[inside]] = rows[inside].to(out.dtype)
    return out
