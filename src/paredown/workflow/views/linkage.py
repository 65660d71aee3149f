"""Which experts are chosen together, and which the router can hardly tell apart."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from paredown.core.anatomy import Block
from paredown.core.experts.linkage import cluster, dendrogram, distances
from paredown.core.experts.statistics import CoActivation
from paredown.core.method import View
from paredown.core.statistics import Observer
from paredown.errors import BudgetError
from paredown.workflow.scanned import Column, LayerRow, Suggestion
from paredown.workflow.views.base import OfExperts, Seen, budget, carrying, percent, span, span_percent, tidied, tidy

NEAR = 0.5
"""Experts whose router rows are nearer than this share of the layer's mean distance count as one."""
_TOTALS = {"keeps_75": 0.75, "keeps_50": 0.5}


class ExpertCoactivation(OfExperts):
    """Which experts the router chooses for the same tokens."""

    name = "expert-coactivation"
    title = "Experts together"
    measures = "How often two experts are chosen for the same token, over all pairs of each token's top-k."
    unit = "share of the tokens"
    columns = (
        Column(
            key="closest", title="closest pair", unit="share of tokens", meaning="tokens that choose the commonest pair"
        ),
        Column(
            key="lift",
            title="above chance",
            unit="times",
            meaning="the commonest pair against two independent choices of the same frequency",
        ),
        Column(
            key="pairs_90",
            title="pairs for 90 %",
            unit="share of pairs",
            meaning="share of all pairs that make up 90 % of the choices",
        ),
        Column(key="never", title="never", unit="share of pairs", meaning="pairs that no token chose"),
        Column(
            key="with_partner",
            title="with partner",
            kind="series",
            unit="share",
            meaning="share of each expert's tokens that also choose its commonest partner",
        ),
        Column(key="partner", title="partner", kind="units", unit="expert", meaning="each expert's commonest partner"),
    )

    def applies(self, part: Block) -> bool:
        """Blocks whose router chooses at least two of more experts."""
        return part.experts is not None and 1 < part.experts.top_k < part.experts.count

    def observe(self, view: View) -> list[Observer]:
        """Count pairs."""
        return [CoActivation()]

    def look(self, view: View, seen: Seen | None) -> list[LayerRow]:
        """Turn counts into shares."""
        part = view.part.experts
        assert part is not None
        assert seen is not None
        together, tokens = seen["together"].double(), seen["tokens"].double()
        total = seen["total"].double().clamp(min=1)
        pairs = together[tuple(torch.triu_indices(part.count, part.count, 1))]
        best, partner = together.max(1)
        first = int(best.argmax())
        second = int(partner[first])
        by_chance = tokens[first] * tokens[second] / total
        values: dict[str, float | None] = {
            "closest": tidy(best.max() / total),
            "lift": tidy(best.max() / by_chance) if by_chance > 0 else None,
            "pairs_90": tidy(carrying(pairs, 0.9) / len(pairs)),
            "never": tidy((pairs == 0).double().mean()),
        }
        return [
            self.row(
                view,
                values,
                series={"with_partner": tidied(best / tokens.clamp(min=1))},
                units={"partner": partner.tolist()},
            )
        ]

    def read(self) -> tuple[str, list[Suggestion]]:
        """Name the commonest pair, and say how far choices are spread over pairs."""
        row = max(self.rows, key=lambda r: r.values["closest"] or 0)
        expert = max(range(row.count), key=lambda e: row.series["with_partner"][e])
        told = (
            f"{span_percent(self.values('pairs_90'))} of the pairs make up 90 % of the choices. The commonest pair, in "
            f"layer {row.layer}, is chosen by {percent(row.values['closest'] or 0)} of the tokens; there, "
            f"{percent(row.series['with_partner'][expert])} of expert {expert}'s tokens also choose expert "
            f"{row.units['partner'][expert]}."
        )
        self.note(
            "Two experts that both see most tokens are chosen together often; that alone makes none of them idle."
        )
        return told, []


class ExpertLinkage(OfExperts):
    """Which experts the router can hardly tell apart, and how many a common threshold would leave in each layer."""

    name = "expert-linkage"
    title = "Experts alike to the router"
    measures = (
        "Distances between router rows, over the layer's mean distance, clustered by complete linkage; one threshold "
        "for all layers leaves different numbers of clusters in them."
    )
    unit = "share of the mean distance"
    columns = (
        Column(
            key="closest", title="closest pair", unit="of the mean", meaning="distance of the nearest two router rows"
        ),
        Column(
            key="near", title="near", unit="clusters", meaning=f"clusters left at {NEAR:g} of the layer's mean distance"
        ),
        Column(
            key="keeps_75",
            title="of 75 %",
            unit="experts",
            meaning="experts that this layer keeps if one threshold leaves 75 % of all",
        ),
        Column(
            key="keeps_50",
            title="of 50 %",
            unit="experts",
            meaning="experts that this layer keeps if one threshold leaves half of all",
        ),
        Column(
            key="merges",
            title="merges",
            kind="series",
            unit="of the mean",
            meaning="distances at which clusters join, the nearest first",
        ),
    )
    needs_data = False

    def __init__(self) -> None:
        super().__init__()
        self._distances: list[Tensor] = []
        self._least: list[int] = []

    def applies(self, part: Block) -> bool:
        """Blocks with at least two routed experts."""
        return part.experts is not None and part.experts.count > 1

    def look(self, view: View, seen: Seen | None) -> list[LayerRow]:
        """Cluster router rows."""
        part = view.part.experts
        assert part is not None
        apart = distances(view.child(part.router).weight)
        pairs = apart[tuple(torch.triu_indices(part.count, part.count, 1))]
        mean = float(pairs.mean())
        relative: npt.NDArray[np.float64] = (apart / mean if mean > 0 else apart).numpy()
        heights = [merge.distance for merge in dendrogram(relative, 1)]
        self._distances.append(apart)
        self._least.append(min(part.top_k, part.count))
        values: dict[str, float | None] = {
            "closest": tidy(heights[0]),
            "near": float(part.count - sum(height <= NEAR for height in heights)),
            **dict.fromkeys(_TOTALS),
        }
        return [self.row(view, values, series={"merges": tidied(heights)})]

    def read(self) -> tuple[str, list[Suggestion]]:
        """Share two budgets out over the layers by one threshold."""
        counts = [row.count for row in self.rows]
        told = []
        for key, share in _TOTALS.items():
            total = max(round(share * sum(counts)), sum(self._least))
            try:
                found = cluster(self._distances, total, least=self._least, linkage="complete")
            except BudgetError:
                self.note(f"Ties leave no threshold that keeps {percent(share)} of the experts.")
                continue
            for row, members in zip(self.rows, found, strict=True):
                row.values[key] = float(len(members))
            told.append(f"{span([len(members) for members in found])} if {percent(share)} of all stay")
        text = f"The nearest two router rows of a layer are {span(self.values('closest'), '{:.2f}')} of its mean apart."
        if told:
            text += f" One threshold for all layers would keep, of {span(counts)} a layer, {' and '.join(told)}."
        keep = budget(max((row.values["near"] or row.count) / row.count for row in self.rows))
        if keep >= 1:
            return text, []
        because = f"experts whose router rows are nearer than {NEAR:g} of the layer's mean distance count as one"
        return text, [Suggestion(unit="experts", keep=keep, because=because)]
