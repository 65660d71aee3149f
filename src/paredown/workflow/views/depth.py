"""Where depth is used: what blocks add, what needs them, how far they work side by side, where the output is settled.

A few rows walk through the blocks in fp32; each block in memory is run again on other inputs. Together that costs a
fraction of a pass of the scan's data, which the notes name.
"""

from __future__ import annotations

import torch

from paredown.core.anatomy import Block
from paredown.core.calibration import Batch
from paredown.core.looking import labelled, readout
from paredown.core.looking.contributions import PARTS, Contributions
from paredown.core.looking.expansion import Expansion
from paredown.core.looking.labelled import Labelled
from paredown.core.looking.readout import Vectors
from paredown.core.looking.skips import Lens, Locals, Skips
from paredown.core.looking.walk import Step, Tokens, Walk
from paredown.core.method import View
from paredown.core.statistics import Observer
from paredown.errors import DataError
from paredown.registry import Entry
from paredown.workflow.scanned import Column, LayerRow, Suggestion
from paredown.workflow.views.base import Measure, Seen, budget, percent, tidied, tidy

BEARABLE = 0.05
"""Nats that dropped blocks may cost together, if their effects add up, to be suggested: 5 % of perplexity."""
SETTLED = 1.0
"""Nats of divergence from the output below which a prediction counts as settled."""
LONGEST = 4
"""Blocks of the longest run that is expanded."""
EXAMPLES = 2048
"""Places of the scan's data at which a concept is asked for."""
PENALTY = 300.0
"""Of the readout's weights: with so few examples the usual 1 would fit noise."""


class _Following(Measure):
    """A view of the few rows that walk through the blocks."""

    walks = True

    def __init__(self) -> None:
        super().__init__()
        self.depth = 0

    def applies(self, part: Block) -> bool:
        """Blocks that add to a stream."""
        return part.residual != "post"

    def look(self, view: View, seen: Seen | None) -> list[LayerRow]:
        """Nothing: rows are made when the walk is over."""
        self.depth += 1
        return []

    def close(self, walk: Walk) -> None:
        """Make the rows and say what they rest on."""
        if not walk.exact:
            self.note("Blocks were too large to be run in fp32, so small differences are lost in rounding.")
        self.note(f"Of {int(walk.counted.sum())} tokens; the first of each row counts nowhere.")
        self.rows = self.made(walk)

    def made(self, walk: Walk) -> list[LayerRow]:
        """Return the rows."""
        raise NotImplementedError


class Contribution(_Following):
    """What sub-layers and blocks add, against the stream that they read."""

    name = "contribution"
    title = "What blocks add"
    measures = "Norm of what each attention, MLP and block adds, as a share of the stream it reads, and their cosine."
    unit = "times the stream's norm"
    columns = (
        *(
            Column(key=k, title=t, unit="of the stream", meaning=f"mean norm of what the {k} adds, by the stream's")
            for k, t in (("attention", "attention"), ("mlp", "MLP"), ("block", "block"))
        ),
        Column(key="high", title="block, 95 %", unit="of the stream", meaning="95 % quantile of it over tokens"),
        *(
            Column(key=f"cosine_{k}", title=f"{t} cosine", unit="cosine", meaning="below 0 erases, above 0 strengthens")
            for k, t in (("attention", "attention"), ("mlp", "MLP"), ("block", "block"))
        ),
    )

    def __init__(self) -> None:
        super().__init__()
        self.found = Contributions()

    def acts(self, entry: Entry) -> bool:
        """Methods that drop, share or weaken sub-layers and blocks."""
        return entry.axis == "depth"

    def follow(self, walk: Walk, step: Step) -> None:
        """Measure what is added."""
        self.found.follow(walk, step)

    def made(self, walk: Walk) -> list[LayerRow]:
        """Return a row a block."""
        rows = []
        for layer in range(self.depth):
            values: dict[str, float | None] = {}
            for part in PARTS:
                ratio, cosine = self.found.ratios.get((layer, part)), self.found.cosines.get((layer, part))
                values[part] = tidy(ratio.mean) if ratio else None
                values[f"cosine_{part}"] = tidy(cosine.mean) if cosine else None
            block = self.found.ratios[layer, "block"]
            values["high"] = tidy(block.quantile(0.95)) if block else None
            rows.append(LayerRow(layer=layer, part="block", count=1, values=values))
        return rows

    def read(self) -> tuple[str, list[Suggestion]]:
        """Name what adds least, and compare both halves."""
        ranked = sorted((v, row.layer) for row in self.rows if (v := row.values["block"]) is not None)
        if not ranked:
            return "No token could be measured.", []
        told = "Blocks that add least: " + ", ".join(f"{layer} ({value:.2g})" for value, layer in ranked[:3]) + "."
        half = self.depth // 2
        early, late = ([v for v, layer in ranked if (layer >= half) == side] for side in (False, True))
        if early and late:
            mean = [sum(values) / len(values) for values in (early, late)]
            told += (
                f" On average a block of the first half adds {mean[0]:.2g} of the stream, of the second {mean[1]:.2g}."
            )
        erasing = [row.layer for row in self.rows if (row.values["cosine_block"] or 0) < -0.1]
        if erasing:
            told += f" Blocks that mostly erase: {', '.join(map(str, erasing))}."
        return told, []


class SkipEffect(_Following):
    """What later blocks and the output lose when one block is bypassed."""

    name = "skip-effect"
    title = "What needs a block"
    measures = (
        "Change of each later block's update, and of the output, when one block is bypassed; and the direct part of "
        "it, with no block in between."
    )
    unit = "times the update's norm"
    columns = (
        Column(
            key="output", title="output", unit="nats", meaning="divergence of the output when the block is bypassed"
        ),
        Column(key="output_high", title="output, 95 %", unit="nats", meaning="95 % quantile of it over tokens"),
        Column(key="later", title="later blocks", unit="of the update", meaning="mean change of all later updates"),
        Column(key="direct", title="direct", unit="of the update", meaning="mean change, each later block run alone"),
        Column(
            key="effects",
            title="effects",
            kind="series",
            unit="of the update",
            meaning="change of the update of each block, from the first; 1 is the block itself",
        ),
        Column(
            key="direct_effects",
            title="direct effects",
            kind="series",
            unit="of the update",
            meaning="the same, each block run alone",
        ),
    )

    def __init__(self) -> None:
        super().__init__()
        self.skips, self.local = Skips(), Locals()

    def acts(self, entry: Entry) -> bool:
        """Methods that take blocks or sub-layers out."""
        return entry.axis == "depth" and entry.name not in ("shallow", "relaxed-recursive")

    def follow(self, walk: Walk, step: Step) -> None:
        """Bypass each block before this one, and this one."""
        self.skips.follow(walk, step)
        self.local.follow(walk, step)

    def close(self, walk: Walk) -> None:
        """Compare outputs."""
        self.skips.close(walk)
        super().close(walk)

    def made(self, walk: Walk) -> list[LayerRow]:
        """Return a row a block."""
        self.note("Each block is bypassed alone: what goes together adds up, or worse.")
        rows = []
        for layer in range(self.depth):
            divergence = self.skips.divergence.get(layer)
            listed = [_mean(self.skips.updates.get((layer, l))) for l in range(self.depth)]  # noqa: E741
            direct = [_mean(self.local.updates.get((layer, l))) for l in range(self.depth)]  # noqa: E741
            after = self.depth - layer - 1
            values: dict[str, float | None] = {
                "output": tidy(divergence.mean) if divergence else None,
                "output_high": tidy(divergence.quantile(0.95)) if divergence else None,
                "later": tidy(sum(listed[layer + 1 :]) / after) if after else None,
                "direct": tidy(sum(direct) / after) if after else None,
            }
            series = {"effects": tidied(listed), "direct_effects": tidied(direct)}
            rows.append(LayerRow(layer=layer, part="block", count=1, values=values, series=series))
        return rows

    def read(self) -> tuple[str, list[Suggestion]]:
        """Name the blocks that the output misses least, and how many of them may go by their sum."""
        ranked = sorted((v, row.layer) for row in self.rows if (v := row.values["output"]) is not None)
        if not ranked:
            return "No token could be measured.", []
        listed = ", ".join(f"{layer} ({value:.2g})" for value, layer in ranked[:3])
        told = f"Blocks that the output misses least, in nats: {listed}; most: {ranked[-1][1]} ({ranked[-1][0]:.2g})."
        total, gone = 0.0, 0
        for value, _ in ranked[:-1]:
            total += value
            gone += total <= BEARABLE
        if not gone:
            return told, []
        because = f"the other {gone}, each bypassed alone, cost less than {BEARABLE} nats when added up"
        return told, [Suggestion(unit="blocks", keep=budget((self.depth - gone) / self.depth), because=because)]


class LinearTerm(_Following):
    """How far a run of blocks is the sum of its blocks."""

    name = "linear-term"
    title = "Side by side"
    measures = (
        "Change over two blocks as the sum of both on one input (first order), of the second's reaction to the first "
        "(second order), and the rest."
    )
    unit = "share of the run's change"
    columns = (
        Column(key="first", title="first order", unit="of the change", meaning="norm of the sum of both blocks"),
        Column(key="second", title="second order", unit="of the change", meaning="norm of the reaction of the second"),
        Column(key="rest", title="rest", unit="of the change", meaning="norm of what is left"),
        *(
            Column(
                key=f"{key}_by_length",
                title=f"{title} by length",
                kind="series",
                unit="of the change",
                meaning=f"the same for runs of 2 to {LONGEST} blocks from here on",
            )
            for key, title in (("second", "second order"), ("rest", "rest"))
        ),
    )

    def __init__(self) -> None:
        super().__init__()
        self.found = Expansion(LONGEST)

    def acts(self, entry: Entry) -> bool:
        """Methods that put blocks side by side, share them or take them out in runs."""
        return entry.axis == "depth" and entry.unit.startswith("block")

    def follow(self, walk: Walk, step: Step) -> None:
        """Expand the runs that end with this block."""
        self.found.follow(walk, step)

    def made(self, walk: Walk) -> list[LayerRow]:
        """Return a row for each block that has one after it."""
        self.note(
            "A diagnosis: with the rest left out, no trained model works. Late blocks look additive also because norms "
            "make them insensitive to the size of the stream."
        )
        rows = []
        for layer in range(self.depth - 1):
            terms = self.found.terms
            values: dict[str, float | None] = {
                name: tidy(terms[layer, 2, name].mean) if terms[layer, 2, name] else None
                for name in ("first", "second", "rest")
            }
            series = {
                f"{name}_by_length": tidied(
                    [one.mean for n in range(2, LONGEST + 1) if (one := terms.get((layer, n, name)))]
                )
                for name in ("second", "rest")
            }
            rows.append(LayerRow(layer=layer, part="run", count=2, values=values, series=series))
        return rows

    def read(self) -> tuple[str, list[Suggestion]]:
        """Name the runs that are most nearly sums."""
        ranked = sorted((v, row.layer) for row in self.rows if (v := row.values["second"]) is not None)
        if not ranked:
            return "No token could be measured.", []
        listed = ", ".join(f"{layer} and {layer + 1} ({value:.2g})" for value, layer in ranked[:3])
        worst = ranked[-1]
        return (
            f"Neighbours that depend on each other least, by the second order: {listed}; most: {worst[1]} and "
            f"{worst[1] + 1} ({worst[0]:.2g}).",
            [],
        )


class LensView(_Following):
    """From which block on the output is settled, and a concept of the text can be read."""

    name = "lens"
    title = "What is settled where"
    measures = (
        "Divergence between the output and the final norm and head put on the stream behind each block; and how well a "
        "linear readout tells there whether a common token comes next."
    )
    unit = "nats"
    columns = (
        Column(key="divergence", title="divergence", unit="nats", meaning="mean over tokens of KL(lens || output)"),
        Column(key="top5", title="top 5", unit="share", meaning="overlap of the five likeliest tokens"),
        Column(key="concept", title="readout", unit="share", meaning="held-out places at which the readout is right"),
        Column(key="auc", title="readout AUC", unit="share", meaning="how often it ranks a yes above a no"),
    )

    def __init__(self) -> None:
        super().__init__()
        self.lens = Lens()
        self.examples: Labelled | None = None
        self.train = torch.zeros(0, dtype=torch.bool)
        self.readouts: dict[int, tuple[float, float]] = {}

    def acts(self, entry: Entry) -> bool:
        """Methods that cut the top off, or leave it out for some tokens."""
        named = ("sajjad", "trimllm", "unified-layer-skipping", "unified-layer-skipping-dynamic", "gamma-mod")
        return entry.name in named or (entry.axis == "depth" and entry.unit.startswith("block"))

    def start(self, data: Batch) -> None:
        """Choose the places at which the concept is asked for."""
        generator = torch.Generator().manual_seed(data.seed)
        try:
            examples = labelled.derive(data, "next", max(1, EXAMPLES // len(data)), generator)
            self.train = readout.divide(examples.labels, examples.groups, 0.6, generator)
            self.examples = examples
        except DataError as error:
            self.note(f"Nothing was read out linearly: {str(error).rstrip('.')}.")

    def observe(self, view: View) -> list[Observer]:
        """Take the stream at these places."""
        return [Vectors(self.examples.positions)] if self.examples is not None else []

    def look(self, view: View, seen: Seen | None) -> list[LayerRow]:
        """Fit the readout behind this block."""
        if self.examples is not None and seen is not None:
            labels, train = self.examples.labels, self.train
            probe = readout.fit(seen["vectors"][train], labels[train], PENALTY)
            scores = probe.scores(seen["vectors"][~train])
            self.readouts[view.part.index] = (
                readout.accuracy(scores, labels[~train]),
                readout.auc(scores, labels[~train]),
            )
        return super().look(view, seen)

    def follow(self, walk: Walk, step: Step) -> None:
        """Keep the stream."""
        self.lens.follow(walk, step)

    def close(self, walk: Walk) -> None:
        """Put norm and head on every stream."""
        self.lens.close(walk)
        super().close(walk)

    def made(self, walk: Walk) -> list[LayerRow]:
        """Return a row for the stream behind each block."""
        self.note("That something can be read does not mean that later blocks do nothing for it.")
        if self.examples is not None:
            held = self.examples.labels[~self.train].float().mean()
            self.note(f"Guessing the commoner answer is right at {percent(float(max(held, 1 - held)))} of the places.")
        rows = []
        for layer in range(self.depth):
            divergence, overlap = self.lens.divergence[layer + 1], self.lens.overlap[layer + 1]
            told = self.readouts.get(layer)
            values = {
                "divergence": tidy(divergence.mean) if divergence else None,
                "top5": tidy(overlap.mean) if overlap else None,
                "concept": tidy(told[0]) if told else None,
                "auc": tidy(told[1]) if told else None,
            }
            rows.append(LayerRow(layer=layer, part="stream", count=1, values=values))
        return rows

    def read(self) -> tuple[str, list[Suggestion]]:
        """Say after how many blocks output and readout are settled."""
        settled = next((row.layer + 1 for row in self.rows if _below(row.values["divergence"])), self.depth)
        told = f"The output is settled to {SETTLED:g} nat after {settled} of {self.depth} blocks."
        if self.readouts:
            curve = [self.readouts[layer][0] for layer in sorted(self.readouts)]
            told += (
                f" The readout is within 1 % of its best ({percent(max(curve))}) after {readout.depth(curve, 0.01)}."
            )
        keep = budget(settled / self.depth)
        because = "blocks above are a bound on what may be cut off at the top; healing, or a head of its own, is needed"
        return told, [Suggestion(unit="blocks", keep=keep, because=because)] if keep < 1 else []


def _mean(tokens: Tokens | None) -> float:
    return tokens.mean if tokens else 0.0


def _below(value: float | None) -> bool:
    return value is not None and value < SETTLED
