"""On residual network depth: a run of blocks as paths, side by side and through each other, order by order.

Source: "On residual network depth", 2025, arXiv 2510.03470 (Residual Expansion Theorem); no code. Its use on trained
transformers is inferred, from our own derivation. For a run of blocks that reads ``x``:

- ``T1 = sum_i f_i(x)``, ``T2 = sum_j J_j(x) [sum_{i<j} f_i(x)]``, ``R = x' - x - T1 - T2``, against ``|x' - x|``
- interaction ``I_ij = |J_j(h_j) f_i(h_i)| / |f_j(h_j)|``: how strongly block j reacts to block i
- path ablation: random sets of blocks bypassed, and the divergence of the output against their number
- scale sweep: one factor a block (on what each of its sub-layers adds) and one for all, and the divergence

``f_i`` is what block i adds, a function of the whole sequence; derivatives are forward-mode, at ``x``.

What is held against it: with factor 1 the rest R is not small, so the truncated expansion is a diagnosis and not an
approximation of a trained net; the paper was withdrawn from review, and both the ensemble view (Veit et al., 2016) and
scaling by depth have earlier sources. Late blocks look additive also because norms make them insensitive to the size
of the stream. Routers of experts choose by rank, which the derivatives take as fixed.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from pydantic import Field

from paredown.core.calibration import Batch
from paredown.core.checkpoint import Model
from paredown.core.looking import scales
from paredown.core.looking.expansion import WHOLE, Expansion, Interaction
from paredown.core.looking.skips import rank_correlation
from paredown.core.looking.walk import Tokens, sample, walk
from paredown.core.method import Probe, register
from paredown.core.sequential import Resident
from paredown.errors import DataError

CRITICISM = (
    "A diagnosis, not an approximation: in trained models the rest R is not small beside T1 and T2. The source was "
    "withdrawn from review; the ensemble view and scaling by depth are older than it."
)
SWEEP = (0.0, 0.25, 0.5, 0.75, 1.0, 1.25)
TERMS = {"first": "t1", "second": "t2", "rest": "rest"}


@register
class ResidualNetworkDepth(Probe):
    """Shows how far runs of blocks could work side by side, and how the model bears weaker or missing blocks."""

    name: ClassVar[str] = "residual-network-depth"
    title: ClassVar[str] = "On residual network depth"
    year: ClassVar[int | None] = 2025
    arxiv: ClassVar[str | None] = "2510.03470"
    axis: ClassVar = "analysis"
    unit: ClassVar[str] = "blocks"
    needs: ClassVar[tuple[str, ...]] = ("calibration-data",)

    sequences: int = Field(8, ge=1, description="Calibration rows that are looked at, from the first.")
    length: int = Field(128, ge=8, description="Tokens of each row.")
    longest: int = Field(4, ge=2, description="Blocks of the longest run that is expanded.")
    draws: int = Field(4, ge=1, description="Random sets of blocks for each number that is bypassed.")
    sweep: tuple[float, ...] = Field(
        SWEEP, min_length=1, description="Factors that are tried on each block and on all."
    )

    def measure(self, model: Model, data: Batch | None, *, seed: int = 0) -> list[dict[str, Any]]:
        """Return a row for the whole model (``layer`` is ``"all"``) and one for each block.

        - ``t1_G``, ``t2_G``, ``rest_G`` for runs of G blocks from this one on: mean over tokens, relative to the run's
          whole change; ``with_first_*`` count the first token of each row too. None where the run would not fit.
        - ``reacts``: list, ``I`` of this block on each later one (0 before); ``needed`` its mean over later blocks,
          ``needs`` the mean of its column: how much this block reacts to earlier ones.
        - ``sweep``: divergence (nats) with this block's branches times each factor (``factors``); ``without`` at 0 and
          ``curvature`` at 1 (None where the factors around 1 were not tried). In ``"all"`` the factor is that of all.
        - ``"all"`` only: ``ablation``, ``ablation_sd`` (mean and standard deviation over the random sets, for 1 to L
          bypassed blocks), ``smooth`` (rank correlation of divergence and number), ``note``.
        """
        if data is None:
            raise DataError(f"{self.name} looks at calibration data; give some with --data.")
        blocks = model.anatomy.language.blocks
        rows = sample(data, self.sequences, self.length)
        expansion, interaction = Expansion(min(self.longest, len(blocks))), Interaction()
        for ids, mask in rows:
            for found, step in walk(Resident(model), ids, mask, blocks):
                expansion.follow(found, step)
                interaction.follow(found, step)
            expansion.renew()
            interaction.renew()
        depth, listed = len(blocks), list(self.sweep)
        alone = [scales.factors([block], c) for block in blocks for c in listed]
        together = [scales.factors(blocks, c) for c in listed]
        drawn = self._sets(depth, seed)
        gone = [scales.factors([blocks[i] for i in chosen], 0.0) for chosen in drawn]
        lost = [t.mean for t in scales.divergences(model, rows, [*alone, *together, *gone])]
        table = []
        for layer in range(depth):
            row: dict[str, Any] = {"layer": layer}
            for length in range(2, self.longest + 1):
                for prefix in ("", f"{WHOLE}_"):
                    for name, short in TERMS.items():
                        tokens = expansion.terms.get((layer, length, prefix + name))
                        row[f"{prefix}{short}_{length}"] = tokens.mean if tokens else None
            pairs = [interaction.pairs.get((layer, later)) for later in range(depth)]
            row["reacts"] = [one.mean if one else 0.0 for one in pairs]
            row["needed"] = _mean([one for one in pairs if one])
            row["needs"] = _mean([interaction.pairs[i, layer] for i in range(layer)])
            row |= _swept(listed, lost[layer * len(listed) : (layer + 1) * len(listed)])
            table.append(row)
        whole: dict[str, Any] = dict.fromkeys(table[0])
        whole |= {"layer": "all", **_swept(listed, lost[len(alone) : len(alone) + len(together)])}
        totals = self._ablated(drawn, lost[len(alone) + len(together) :]) | {"note": CRITICISM}
        return [{**whole, **totals}, *({**row, **dict.fromkeys(totals)} for row in table)]

    def _sets(self, depth: int, seed: int) -> list[tuple[int, ...]]:
        """Draw sets of blocks: ``draws`` of each size, but each set of a size once where there are fewer."""
        generator = torch.Generator().manual_seed(seed)
        found: list[tuple[int, ...]] = []
        for size in range(1, depth + 1):
            chosen = [
                tuple(sorted(torch.randperm(depth, generator=generator)[:size].tolist())) for _ in range(self.draws)
            ]
            found += dict.fromkeys(chosen)
        return found

    def _ablated(self, drawn: list[tuple[int, ...]], lost: list[float]) -> dict[str, Any]:
        sizes = sorted({len(chosen) for chosen in drawn})
        by_size = [torch.tensor([v for c, v in zip(drawn, lost, strict=True) if len(c) == size]) for size in sizes]
        return {
            "ablation": [float(values.mean()) for values in by_size],
            "ablation_sd": [float(values.std(correction=0)) for values in by_size],
            "smooth": rank_correlation(torch.tensor([float(len(c)) for c in drawn]), torch.tensor(lost)),
        }


def _mean(tokens: list[Tokens]) -> float | None:
    return sum(one.mean for one in tokens) / len(tokens) if tokens else None


def _swept(factors: list[float], lost: list[float]) -> dict[str, Any]:
    """Return what a sweep shows: its values, that at 0, and the second difference around 1."""
    at = dict(zip(factors, lost, strict=True))
    step = next((1 - c for c in sorted(factors, reverse=True) if c < 1 and 2 - c in at), None)
    curvature = None
    if step is not None and 1.0 in at:
        curvature = (at[1 + step] - 2 * at[1.0] + at[1 - step]) / step**2
    return {"factors": factors, "sweep": lost, "without": at.get(0.0), "curvature": curvature}
