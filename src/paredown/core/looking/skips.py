"""What a model loses when one block is bypassed, or what it reads is wiped out: effects on later blocks and the output.

Each class here follows a `walk.Walk` block after block: for every block that was bypassed it carries a second stream
along, so all blocks are tried in one walk, with one block in memory. That costs half as many passes as there are
blocks.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from paredown.core.looking.walk import Step, Tokens, Walk, relative


class Skips:
    """Bypasses one block after another.

    Parameters
    ----------
    cuts : ``[B]``; bypass only at positions before the row's cut and measure only from there on, which tells what later
        *tokens* need of a block; None bypasses and measures everywhere

    The first token of a row is never bypassed, and never counts.

    Attributes
    ----------
    updates
        ``(s, l) -> |D_l - D'_l| / |D_l|``: how much the update of block ``l`` changes without block ``s``.
    distance, divergence
        ``s -> |p - p'|``, and ``s -> KL(p || p')`` in nats, of the distributions over the next token.
    """

    def __init__(self, cuts: Tensor | None = None) -> None:
        self.cuts = cuts
        self.updates: dict[tuple[int, int], Tokens] = {}
        self.distance: dict[int, Tokens] = {}
        self.divergence: dict[int, Tokens] = {}
        self._branches: dict[int, Tensor] = {}

    def follow(self, walk: Walk, step: Step) -> None:
        """Take the next block."""
        clean, counted = step.update, self.measured(walk)
        for first, hidden in self._branches.items():
            out = step.run(hidden)
            self._note(first, step.index, out - hidden - clean, clean, counted)
            self._branches[first] = out
        begun = self.begin(walk, step)
        if begun is not None:
            self._branches[step.index] = begun
            self._note(step.index, step.index, begun - step.after, clean, counted)

    def begin(self, walk: Walk, step: Step) -> Tensor | None:
        """Return the stream behind the block, had it been bypassed."""
        return torch.where(self.changed(walk)[..., None], step.before, step.after)

    def close(self, walk: Walk, clean: Tensor | None = None) -> None:
        """Compare the outputs; ``clean`` are the logits ``[B, T, V]`` of the model as it is, where they are known."""
        counted = self.measured(walk)
        logits = walk.logits(walk.hidden) if clean is None else clean
        known = F.log_softmax(logits, -1)
        probabilities = known.exp()
        for first, hidden in self._branches.items():
            other = F.log_softmax(walk.logits(hidden), -1)
            distance = (other.exp() - probabilities).norm(dim=-1)
            self.distance.setdefault(first, Tokens()).add(distance, counted)
            # Rounding may leave a divergence of nothing a hair below it.
            divergence = (probabilities * (known - other)).sum(-1).clamp(min=0)
            self.divergence.setdefault(first, Tokens()).add(divergence, counted)
        self._branches.clear()

    def renew(self, cuts: Tensor | None) -> None:
        """Get ready for another walk."""
        self.cuts = cuts
        self._branches.clear()

    def share(self, other: Skips) -> None:
        """Write into the tables of another one: several cuts of the same rows count together."""
        self.updates, self.distance, self.divergence = other.updates, other.distance, other.divergence

    def changed(self, walk: Walk) -> Tensor:
        """Return which tokens are bypassed, ``[B, T]``."""
        return walk.counted if self.cuts is None else walk.counted & ~self._late(walk)

    def measured(self, walk: Walk) -> Tensor:
        """Return which tokens count, ``[B, T]``."""
        return walk.counted if self.cuts is None else walk.counted & self._late(walk)

    def later(self, first: int, blocks: int) -> float:
        """Return the mean effect of bypassing a block on all blocks after it; 0 for the last one."""
        found = [one.mean for layer in range(first + 1, blocks) if (one := self.updates.get((first, layer)))]
        return sum(found) / len(found) if found else 0.0

    def _late(self, walk: Walk) -> Tensor:
        assert self.cuts is not None
        positions = torch.arange(walk.counted.shape[1], device=walk.counted.device)
        return positions >= self.cuts.to(positions.device)[:, None]

    def _note(self, first: int, layer: int, difference: Tensor, clean: Tensor, counted: Tensor) -> None:
        self.updates.setdefault((first, layer), Tokens()).add(relative(difference, clean, counted), counted)


class Erasures(Skips):
    """Wipes out what a block reads at positions before the cut: it finds the mean of the stream there instead.

    Measured are positions after the cut; the last block is left out, whose reading of earlier positions nobody needs
    afterwards. After the official code: neither the first position nor the cut itself is wiped out or measured.
    """

    def __init__(self, cuts: Tensor, last: int) -> None:
        super().__init__(cuts)
        self.last = last

    def begin(self, walk: Walk, step: Step) -> Tensor | None:
        """Return the stream behind the block, had it read the mean."""
        if step.index >= self.last:
            return None
        mean = step.before[walk.counted].mean(0)
        return step.run(torch.where(self.changed(walk)[..., None], mean, step.before))

    def measured(self, walk: Walk) -> Tensor:
        """Return which tokens count, ``[B, T]``: those after the cut."""
        late = self._late(walk)
        return walk.counted & late & late.roll(1, 1)


class Locals:
    """How much a block reacts to another one before it, with no block in between: ``(s, l) -> ratio``.

    Block ``l`` is run alone on ``h_l - D_s`` and its update compared with that on ``h_l``.
    """

    def __init__(self) -> None:
        self.updates: dict[tuple[int, int], Tokens] = {}
        self._earlier: dict[int, Tensor] = {}

    def follow(self, walk: Walk, step: Step) -> None:
        """Take the next block."""
        clean, counted = step.update, walk.counted
        for first, update in self._earlier.items():
            without = torch.where(counted[..., None], step.before - update, step.before)
            difference = step.run(without) - without - clean
            found = relative(difference, clean, counted)
            self.updates.setdefault((first, step.index), Tokens()).add(found, counted)
        self._earlier[step.index] = clean

    def renew(self) -> None:
        """Get ready for another walk."""
        self._earlier.clear()


class Lens:
    """The output that the model would give after each block: its final norm and head put on the stream there.

    Attributes
    ----------
    divergence
        For each number of blocks ``0..L``, ``KL(p_lens || p_final)`` in nats.
    overlap
        The share of the five likeliest tokens that both have in common.
    """

    def __init__(self) -> None:
        self.divergence: dict[int, Tokens] = {}
        self.overlap: dict[int, Tokens] = {}
        self._streams: list[Tensor] = []

    def follow(self, walk: Walk, step: Step) -> None:
        """Take the next block."""
        self._streams.append(step.before)

    def close(self, walk: Walk) -> Tensor:
        """Put norm and head on all streams; return the logits ``[B, T, V]`` of the model as it is."""
        logits = walk.logits(walk.hidden)
        known, best = F.log_softmax(logits, -1), logits.topk(min(5, logits.shape[-1])).indices
        for depth, hidden in enumerate([*self._streams, walk.hidden]):
            own = logits if hidden is walk.hidden else walk.logits(hidden)
            lens = F.log_softmax(own, -1)
            divergence = (lens.exp() * (lens - known)).sum(-1).clamp(min=0)
            self.divergence.setdefault(depth, Tokens()).add(divergence, walk.counted)
            common = (own.topk(best.shape[-1]).indices[..., None] == best[..., None, :]).any(-1).float().mean(-1)
            self.overlap.setdefault(depth, Tokens()).add(common, walk.counted)
        self._streams.clear()
        return logits

    def effective(self, limit: float) -> int:
        """Return the smallest number of blocks after which the mean divergence is below ``limit`` nats."""
        return next((d for d in sorted(self.divergence) if self.divergence[d].mean < limit), max(self.divergence))


def depth_score(effects: Tensor) -> Tensor:
    """Return where the weight of the effects lies: ``sum l e_l / sum e_l``, of ``[..., L]``, each at least 0.

    Even effects give the mean index; no effect at all gives nan.
    """
    layers = torch.arange(effects.shape[-1], dtype=torch.float64)
    whole = effects.double()
    found: Tensor = (whole * layers).sum(-1) / whole.sum(-1)
    return found


def rank_correlation(one: Tensor, other: Tensor) -> float:
    """Return Spearman's correlation of two lists ``[n]``; ties share their mean rank, a constant list gives 0."""
    ranks = []
    for values in (one.double(), other.double()):
        ranks.append(((values[:, None] > values).double() + 0.5 * (values[:, None] == values).double()).sum(1))
    a, b = (r - r.mean() for r in ranks)
    scale = float(a.norm() * b.norm())
    return float(a @ b) / scale if scale > 0 else 0.0
