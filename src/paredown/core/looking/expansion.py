"""A run of blocks as a sum of paths: the terms of first and second order, and the rest.

``x' - x = sum_i f_i(x) + sum_j J_j(x) [sum_{i<j} f_i(x)] + R``: blocks side by side, corrected by how each block reacts
to those before it, and what is left. ``f_i(x)`` is what block ``i`` adds to the stream, a function of the whole
sequence. Both classes follow a `walk.Walk` with one block in memory.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from paredown.core.looking.walk import Step, Tokens, Walk, relative

WHOLE = "with_first"
"""Prefix of numbers that count the first token of each row too."""


@dataclass
class Terms:
    """The terms of one run, each ``[B, T, H]``."""

    first: Tensor
    second: Tensor
    rest: Tensor
    total: Tensor


class Expansion:
    """Expands all runs of 2 to ``longest`` blocks.

    Attributes
    ----------
    terms
        ``(start, length, name) -> ratio`` to the norm of the run's whole change, with ``name`` one of ``first``,
        ``second``, ``rest``, and the same with ``with_first_`` before it, where the first token counts too.
    """

    def __init__(self, longest: int) -> None:
        self.longest = longest
        self.terms: dict[tuple[int, int, str], Tokens] = {}
        self._open: dict[int, tuple[Tensor, Tensor, Tensor]] = {}

    def follow(self, walk: Walk, step: Step) -> None:
        """Take the next block."""
        for (start, length), found in self.expand(step).items():
            everyone = torch.ones_like(walk.counted) if walk.mask is None else walk.mask.bool()
            for prefix, counted in (("", walk.counted), (f"{WHOLE}_", everyone)):
                for name in ("first", "second", "rest"):
                    ratio = relative(getattr(found, name), found.total, counted)
                    self.terms.setdefault((start, length, prefix + name), Tokens()).add(ratio, counted)

    def expand(self, step: Step) -> dict[tuple[int, int], Terms]:
        """Return the terms of all runs that end with this block, by start and length."""
        found = {}
        for start, (x, first, second) in list(self._open.items()):
            out, along = step.push(x, first)
            # The derivative of the block is that of what it adds, plus the tangent itself.
            second = second + along - first
            first = first + out - x
            total = step.after - x
            found[start, step.index - start + 1] = Terms(first, second, total - first - second, total)
            self._open[start] = (x, first, second)
            if step.index - start + 1 == self.longest:
                del self._open[start]
        if self.longest > 1:
            self._open[step.index] = (step.before, step.update, torch.zeros_like(step.before))
        return found

    def renew(self) -> None:
        """Get ready for another walk."""
        self._open.clear()


class Interaction:
    """How strongly a block reacts to another one before it: ``(i, j) -> |J_j(h_j) f_i(h_i)| / |f_j(h_j)|``."""

    def __init__(self) -> None:
        self.pairs: dict[tuple[int, int], Tokens] = {}
        self._earlier: dict[int, Tensor] = {}

    def follow(self, walk: Walk, step: Step) -> None:
        """Take the next block."""
        for first, update in self._earlier.items():
            along = step.push(step.before, update)[1] - update
            found = relative(along, step.update, walk.counted)
            self.pairs.setdefault((first, step.index), Tokens()).add(found, walk.counted)
        self._earlier[step.index] = step.update

    def renew(self) -> None:
        """Get ready for another walk."""
        self._earlier.clear()
