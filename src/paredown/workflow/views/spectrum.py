"""Singular values of weight matrices: how low their ranks nearly are."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from paredown.core.anatomy import Block
from paredown.core.method import View
from paredown.core.ragged import expert_weights
from paredown.registry import Entry
from paredown.workflow.scanned import Column, LayerRow, Suggestion
from paredown.workflow.views.base import Measure, Seen, carrying, tidy

EXPERTS_SEEN = 8
"""Experts of a layer whose matrices are decomposed, evenly spaced; rows show their mean."""
DIRECT = 1024
"""Up to this smaller side singular values come from the matrix itself, above from its Gram matrix, which is faster."""


class Spectrum(Measure):
    """Spectra of all weight matrices of all blocks."""

    name = "spectrum"
    title = "Weight spectra"
    measures = "Share of a matrix's singular values, the largest first, that hold 90 and 99 % of its squared norm."
    unit = "share of full rank"
    columns = (
        Column(key="rank_90", title="90 %", unit="share of full rank", meaning="rank that holds 90 % of the energy"),
        Column(key="rank_99", title="99 %", unit="share of full rank", meaning="rank that holds 99 % of the energy"),
        Column(
            key="stable", title="stable rank", unit="rank", meaning="squared Frobenius norm by squared spectral norm"
        ),
        Column(
            key="effective",
            title="effective rank",
            unit="rank",
            meaning="exp of the entropy of the singular values, as shares of their sum",
        ),
        Column(
            key="factors",
            title="factors at 99 %",
            unit="share of the bytes",
            meaning="two factors that hold 99 % of the energy, by the size of the matrix; above 1 nothing is saved",
        ),
    )
    needs_data = False
    any_tower = True

    def acts(self, entry: Entry) -> bool:
        """Methods that factor weights."""
        return entry.axis == "weights" and "rank" in entry.unit

    def applies(self, part: Block) -> bool:
        """All blocks."""
        return True

    def look(self, view: View, seen: Seen | None) -> list[LayerRow]:
        """Decompose matrix by matrix; one at a time is held in fp32."""
        groups: dict[str, list[dict[str, float]]] = {}
        ranks: dict[str, int] = {}
        for name, weight in self._matrices(view):
            ranks[name] = max(ranks.get(name, 0), min(weight.shape))
            groups.setdefault(name, []).append(self._numbers(weight))
        rows = []
        for name, found in groups.items():
            values: dict[str, float | None] = {k: tidy(sum(f[k] for f in found) / len(found)) for k in found[0]}
            rows.append(LayerRow(layer=view.part.index, part=name, count=ranks[name], values=values))
        return rows

    def _matrices(self, view: View) -> Iterator[tuple[str, Tensor]]:
        experts = view.part.experts
        fused = f"{experts.experts}." if experts is not None else None
        for name, parameter in view.module.named_parameters():
            inside = fused is not None and name.startswith(fused)
            if not inside and parameter.ndim == 2 and min(parameter.shape) > 1:
                yield name.removesuffix(".weight"), parameter.detach()
        if experts is None:
            return
        chosen = sorted({i * experts.count // EXPERTS_SEEN for i in range(EXPERTS_SEEN)})
        if len(chosen) < experts.count:
            self.note(f"Of the experts, {len(chosen)} a layer were decomposed, evenly spaced; their mean is shown.")
        else:
            self.note("For experts the mean over a layer is shown.")
        module = view.child(experts.experts)
        for e in chosen:
            for kind, weight in zip(("gate", "up", "down"), expert_weights(module, e), strict=True):
                if min(weight.shape) > 1:
                    yield f"{experts.experts}.{kind}", weight.detach()

    def _numbers(self, weight: Tensor) -> dict[str, float]:
        if min(weight.shape) > DIRECT:
            self.note("Large matrices were decomposed through their Gram matrix; singular values below 0.001 of the "
                      "largest count as zero there.")  # fmt: skip
        values = singular_values(weight).double().cpu()
        full, elements = values.numel(), weight.numel()
        energy = values.square()
        if float(energy.sum()) == 0:
            return dict.fromkeys(("rank_90", "rank_99", "stable", "effective", "factors"), 0.0)
        share = values / values.sum()
        entropy = -(share * share.clamp(min=1e-300).log()).sum()
        rank_99 = carrying(energy, 0.99)
        return {
            "rank_90": carrying(energy, 0.9) / full,
            "rank_99": rank_99 / full,
            "stable": float(energy.sum() / energy.max()),
            "effective": float(entropy.exp()),
            "factors": rank_99 * sum(weight.shape) / elements,
        }

    def read(self) -> tuple[str, list[Suggestion]]:
        """Name the matrices of lowest rank, and whether factors would save anything."""
        kinds: dict[str, list[LayerRow]] = {}
        for row in self.rows:
            kinds.setdefault(row.part if row.tower == "language" else f"{row.tower} {row.part}", []).append(row)
        means = {kind: [_mean(rows, key) for key in ("rank_99", "factors")] for kind, rows in kinds.items()}
        lowest = sorted(means, key=lambda kind: means[kind][0])[:3]
        listed = ", ".join(f"{kind} ({100 * means[kind][0]:.0f} % of full rank)" for kind in lowest)
        saving = [kind for kind, (_, factors) in means.items() if factors < 1]
        told = f"Nearest to low rank, for 99 % of the energy: {listed}."
        if saving:
            return f"{told} Two factors would be smaller than the matrix for {', '.join(saving)}.", []
        return f"{told} For no kind of matrix would two factors that hold 99 % be smaller than the matrix itself.", []


def singular_values(weight: Tensor) -> Tensor:
    """Return the singular values of a matrix in fp32, descending."""
    matrix = weight.float()
    if min(matrix.shape) <= DIRECT:
        values: Tensor = torch.linalg.svdvals(matrix)
        return values
    if matrix.shape[0] > matrix.shape[1]:
        matrix = matrix.T
    squared = torch.linalg.eigvalsh(matrix @ matrix.T).flip(0)
    # Below fp32's resolution of the largest square there is only noise.
    return torch.where(squared > 1e-6 * squared[0], squared, torch.zeros_like(squared)).sqrt()


def _mean(rows: list[LayerRow], key: str) -> float:
    return sum(row.values[key] or 0.0 for row in rows) / len(rows)
