"""Stores that keep a share of the prompt's tokens and never more: only which ones is up to a subclass.

All that share this base hold equally many entries at every step, so they can be compared.
"""

from __future__ import annotations

import torch
from torch import Tensor

from paredown.core.attention import Call
from paredown.core.cache import Store, packed
from paredown.core.runtime import Pass


class ShareStore(Store):
    """Holds ``max(1, round(keep * n))`` tokens of a row, ``n`` being the tokens of its prompt; while fewer came, all.

    - The prompt is what came in passes of several tokens (a first pass of one counts too): chunks and later turns add
      to it. Tokens that come one by one are answers; they take room and give none.
    - A pass attends to what was held and to all of itself; then tokens go. Padding goes first and is never counted.

    Attributes
    ----------
    spans : ``(start, stop)`` logical positions of the prompt's passes
    """

    def __init__(self, keep: float) -> None:
        super().__init__()
        self.keep = keep
        self.spans: list[tuple[int, int]] = []

    def stays(self, call: Call, order: Tensor, prompt: Tensor, room: Tensor) -> Tensor:
        """Return which entries stay, ``[B, K]`` bool: exactly ``room`` of each row, or all if it has fewer.

        Parameters
        ----------
        call : the pass's last word, for ``call.now``
        order : ``[B, K]``, how many real tokens of its row came before each entry; -1 for padding and empty slots
        prompt : ``[B, K]``, whether it belongs to the prompt
        room : ``[B, 1]``
        """
        raise NotImplementedError

    def settle(self, call: Call) -> None:
        """Let go of what has no room."""
        now, held = call.now, self.entries
        assert now is not None
        if now.length > 1 or not self.spans:
            self.spans.append((now.past, now.stop))
        room = self._room(now, held.keys.device)
        if now.padding is None and held.length <= int(room[0]):
            return
        positions = held.positions
        if positions is None:
            positions = torch.arange(held.length, device=room.device).expand(held.keys.shape[0], -1)
        at = positions.clamp_min(0)
        order = at
        if now.padding is not None:
            count = (now.padding.cumsum(1) - 1).masked_fill(~now.padding, -1)
            order = count.gather(1, at)
        order = order.masked_fill(positions < 0, -1)
        inside = torch.zeros((1, now.stop), dtype=torch.bool, device=room.device)
        for start, stop in self.spans:
            inside[:, start:stop] = True
        stay = self.stays(call, order, inside.expand(len(at), -1).gather(1, at), room)
        if not bool(stay.all()):
            held.select(packed(stay))

    def _room(self, now: Pass, device: torch.device) -> Tensor:
        if now.padding is None:
            number = torch.full((now.batch, 1), sum(stop - start for start, stop in self.spans), device=device)
        else:
            parts = [now.padding[:, start:stop].sum(1, keepdim=True) for start, stop in self.spans]
            number = torch.stack(parts).sum(0)
        return (self.keep * number.double()).round().long().clamp_min(1)

    def crop(self, stop: int) -> None:
        """Forget the tokens at logical positions ``stop`` and later; what had gone does not come back."""
        super().crop(stop)
        self.spans = [(start, min(end, stop)) for start, end in self.spans if start < stop]

    def reset(self) -> None:
        """Forget everything."""
        super().reset()
        self.spans = []
