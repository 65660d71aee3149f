"""What neurons and heads add to the residual stream, as energy: mean square over tokens."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from paredown.core.anatomy import Block
from paredown.core.method import View
from paredown.core.ragged import expert_weights
from paredown.core.statistics import ExpertTraffic, HeadMoments, NeuronEnergy, Observer
from paredown.registry import Entry
from paredown.workflow.scanned import Column, LayerRow, Suggestion
from paredown.workflow.views.base import Measure, Seen, budget, carrying, percent, shares, span_percent, tidied, tidy

CURVE = 20
"""Points of the curve of energy over neurons."""
_LEVELS = {"half": 0.5, "most": 0.9, "nearly_all": 0.99}
_NO_CROSS = "Each {0} counts by itself: energy that {0}s add or cancel between them is left out."


class NeuronSpread(Measure):
    """How few neurons carry most of the energy that an MLP or the experts add."""

    name = "neuron-energy"
    title = "Neurons"
    measures = (
        "Share of hidden neurons, the strongest first, that carry 50, 90 and 99 % of the energy "
        "(activation squared, with the routing weight, times the squared norm of the neuron's column of down)."
    )
    unit = "share of the neurons"
    columns = (
        Column(key="half", title="50 %", unit="share", meaning="share of neurons that carry 50 % of the energy"),
        Column(key="most", title="90 %", unit="share", meaning="share of neurons that carry 90 % of the energy"),
        Column(key="nearly_all", title="99 %", unit="share", meaning="share of neurons that carry 99 % of the energy"),
        Column(key="silent", title="silent", unit="neurons", meaning="neurons that no token moved at all"),
        Column(
            key="curve",
            title="energy",
            kind="series",
            unit="share of energy",
            meaning=f"energy carried by the strongest 1/{CURVE}, 2/{CURVE}, ... of the neurons",
        ),
    )

    def acts(self, entry: Entry) -> bool:
        """Methods that remove neurons."""
        kinds = {row.part for row in self.rows}
        return entry.unit.endswith("neurons") and ("routed experts" if "expert" in entry.unit else "MLP") in kinds

    def applies(self, part: Block) -> bool:
        """Dense MLPs, and experts that can be observed."""
        if part.experts is not None and part.experts.widths is not None:
            self.note("Layers whose experts have unequal widths are left out.")
            return False
        return part.mlp is not None or part.experts is not None

    def observe(self, view: View) -> list[Observer]:
        """Watch what enters down projections."""
        return [NeuronEnergy()] if view.part.mlp is not None else [ExpertTraffic(energy=True)]

    def look(self, view: View, seen: Seen | None) -> list[LayerRow]:
        """Weigh activations with the columns that they scale."""
        assert seen is not None
        part = view.part
        if part.mlp is not None:
            return [self._row(part.index, "MLP", seen["energy"] * _columns(view, part.mlp.down))]
        assert part.experts is not None
        module = view.child(part.experts.experts)
        weights = (expert_weights(module, e)[2].detach() for e in range(part.experts.count))
        norms = torch.stack([down.float().square().sum(1).cpu() for down in weights])
        rows = [self._row(part.index, "routed experts", seen["energy"] * norms)]
        if part.experts.shared is not None:
            energy = seen["shared_energy"] * _columns(view, part.experts.shared.down)
            rows.append(self._row(part.index, "shared expert", energy))
        return rows

    def _row(self, layer: int, part: str, energy: Tensor) -> LayerRow:
        self.note(_NO_CROSS.format("neuron"))
        energy = energy.flatten().double()
        count = energy.numel()
        ordered = shares(energy).sort(descending=True).values.cumsum(0)
        points = [math.ceil(count * (i + 1) / CURVE) - 1 for i in range(CURVE)]
        values: dict[str, float | None] = {k: tidy(carrying(energy, q) / count) for k, q in _LEVELS.items()}
        values["silent"] = float((energy == 0).sum())
        return LayerRow(
            layer=layer, part=part, count=count, values=values, series={"curve": tidied(ordered[points].tolist())}
        )

    def read(self) -> tuple[str, list[Suggestion]]:
        """Name the budget that leaves 99 % of the energy in every layer."""
        told, suggests = [], []
        for part in dict.fromkeys(row.part for row in self.rows):
            rows = [row for row in self.rows if row.part == part]
            shown = {key: [row.values[key] or 0.0 for row in rows] for key in _LEVELS}
            told.append(
                f"{part[0].upper()}{part[1:]}: 90 % of the energy lies in {span_percent(shown['most'])} of a layer's "
                f"neurons, 99 % in {span_percent(shown['nearly_all'])}."
            )
            if part != "shared expert":
                unit = "expert neurons" if part == "routed experts" else "neurons"
                keep = budget(max(shown["nearly_all"]))
                if keep < 1:
                    counted = ", counted over all its experts together" if part == "routed experts" else ""
                    because = f"it leaves 99 % of the energy in every layer{counted}"
                    suggests.append(Suggestion(unit=unit, keep=keep, because=because))
        return " ".join(told), suggests


class HeadImportance(Measure):
    """How much energy each query head adds to the stream."""

    name = "head-importance"
    title = "Attention heads"
    measures = (
        "Share of the energy that each query head adds through the output projection, summed per key-value group."
    )
    unit = "share of the layer's heads"
    columns = (
        Column(
            key="groups_99",
            title="groups for 99 %",
            unit="KV groups",
            meaning="key-value groups that carry 99 % of the energy",
        ),
        Column(key="groups", title="groups", unit="KV groups", meaning="key-value groups of the layer"),
        Column(key="heads_90", title="heads for 90 %", unit="heads", meaning="heads that carry 90 % of the energy"),
        Column(key="largest", title="largest head", unit="share", meaning="share of the strongest head"),
        Column(key="least", title="least head", unit="share", meaning="share of the weakest head"),
        Column(key="heads", title="heads", kind="series", unit="share", meaning="share of each query head; sums to 1"),
        Column(
            key="by_group", title="groups", kind="series", unit="share", meaning="share of each KV group; sums to 1"
        ),
    )

    def acts(self, entry: Entry) -> bool:
        """Methods that remove heads."""
        return "head" in entry.unit or "KV group" in entry.unit

    def applies(self, part: Block) -> bool:
        """Blocks that attend."""
        return part.attention is not None

    def observe(self, view: View) -> list[Observer]:
        """Take the heads' second moments."""
        return [HeadMoments()]

    def look(self, view: View, seen: Seen | None) -> list[LayerRow]:
        """Return ``trace(W_h M_h W_h^T)`` of each head, as shares."""
        part = view.part.attention
        assert part is not None
        assert seen is not None
        self.note(_NO_CROSS.format("head"))
        weight = view.child(part.o).weight.detach().float().cpu()
        slices = weight.reshape(weight.shape[0], part.heads, -1).transpose(0, 1)
        energy = ((slices @ seen["moments"]) * slices).sum((1, 2)).clamp(min=0)
        heads = shares(energy)
        groups = heads.reshape(part.kv_heads, -1).sum(1)
        values: dict[str, float | None] = {
            "groups_99": float(carrying(groups, 0.99)),
            "groups": float(part.kv_heads),
            "heads_90": float(carrying(heads, 0.9)),
            "largest": tidy(heads.max()),
            "least": tidy(heads.min()),
        }
        series = {"heads": tidied(heads), "by_group": tidied(groups)}
        return [LayerRow(layer=view.part.index, part="attention", count=part.heads, values=values, series=series)]

    def read(self) -> tuple[str, list[Suggestion]]:
        """Name the weakest heads and the budget that leaves 99 % of the energy."""
        weakest = sorted((v, row.layer, h) for row in self.rows for h, v in enumerate(row.series["heads"]))[:3]
        listed = ", ".join(f"layer {layer} head {head} ({percent(value)})" for value, layer, head in weakest)
        told = f"The weakest heads: {listed}."
        kept = max((row.values["groups_99"] or 0) / (row.values["groups"] or 1) for row in self.rows)
        if budget(kept) >= 1:
            return f"{told} At least one layer needs all its key-value groups for 99 % of the energy.", []
        because = "it leaves 99 % of the energy of heads in every layer"
        return told, [Suggestion(unit="KV groups", keep=budget(kept), because=because)]


def _columns(view: View, path: str) -> Tensor:
    """Return the squared norm of each column of a projection ``[out, in]``, on the CPU."""
    weight: Tensor = view.child(path).weight
    return weight.detach().float().square().sum(0).cpu()
