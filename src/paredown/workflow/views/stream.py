"""How much sub-layers and blocks turn the residual stream."""

from __future__ import annotations

from paredown.core.anatomy import Block
from paredown.core.method import View
from paredown.core.statistics import Observer, Similarity
from paredown.registry import Entry
from paredown.workflow.scanned import Column, LayerRow, Suggestion
from paredown.workflow.views.base import Measure, Seen, budget, tidy

STILL = 0.98
"""Above this mean cosine (a turn of about 11 degrees) a sub-layer is named as one to try first."""
_UNITS = {"attention": "attention sub-layers", "mlp": "MLP sub-layers", "block": "blocks"}


class StreamSimilarity(Measure):
    """Mean cosine of the stream before and after each sub-layer and block."""

    name = "stream-similarity"
    title = "Sub-layers and blocks"
    measures = "Mean cosine between the residual stream before and after each attention, each MLP and each whole block."
    unit = "cosine, 1: the stream keeps its direction"
    columns = (
        Column(key="attention", title="attention", unit="cosine", meaning="before and after the attention is added"),
        Column(key="mlp", title="MLP", unit="cosine", meaning="before and after the MLP (or the experts) is added"),
        Column(key="block", title="block", unit="cosine", meaning="what enters and what leaves the block"),
    )

    def acts(self, entry: Entry) -> bool:
        """Methods that drop sub-layers or blocks."""
        return entry.axis == "depth"

    def applies(self, part: Block) -> bool:
        """Every block that adds to a stream."""
        return part.residual != "post"

    def observe(self, view: View) -> list[Observer]:
        """Watch the stream."""
        return [Similarity()]

    def look(self, view: View, seen: Seen | None) -> list[LayerRow]:
        """Divide the sums by the tokens."""
        assert seen is not None
        self.note("Each is measured alone, in the whole model: what goes together adds up.")
        if view.part.residual == "parallel":
            self.note("Attention and MLP run side by side here; each is compared with the stream that both read.")
        tokens = max(1.0, float(seen["tokens"]))
        values = {key: tidy(seen[key] / tokens) if key in seen else None for key in _UNITS}
        return [LayerRow(layer=view.part.index, part="stream", count=1, values=values)]

    def read(self) -> tuple[str, list[Suggestion]]:
        """Name what hardly turns the stream."""
        told, suggests = [], []
        for key, unit in _UNITS.items():
            ranked = sorted((-v, row.layer) for row in self.rows if (v := row.values[key]) is not None)
            if not ranked:
                continue
            still = [layer for value, layer in ranked if -value >= STILL]
            first = ", ".join(f"{layer} ({-value:.3f})" for value, layer in ranked[:3])
            told.append(f"{unit[0].upper()}{unit[1:]} that turn the stream least: {first}.")
            # One stays whatever the numbers say: nobody keeps none.
            keep = budget(max(1, len(ranked) - len(still)) / len(ranked))
            if keep < 1:
                because = (
                    f"{len(still)} of {len(ranked)} {unit} turn the stream by less than 11 degrees (cosine {STILL})"
                )
                suggests.append(Suggestion(unit=unit, keep=keep, because=because))
        return " ".join(told), suggests
