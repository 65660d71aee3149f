"""Which experts are used, and which are alike."""

from __future__ import annotations

import functools
import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from paredown.core.anatomy import Block
from paredown.core.method import View
from paredown.core.ragged import expert_weights
from paredown.core.statistics import Observer
from paredown.workflow.scanned import Column, LayerRow, Suggestion
from paredown.workflow.views.base import OfExperts, Seen, budget, carrying, shares, span, tidied, tidy

TWIN = 0.9
"""From this similarity on an expert counts as nearly the same as its nearest twin."""
COMPARISONS = 2e12
"""Operations a layer that comparing segments may take; about what a forward pass over 32,000 tokens takes."""
FEWEST, TOKENS, TOKENS_A_BATCH = 8, 64, 8
_OUTPUT_NUMBERS = 1 << 24


class Routing(Observer):
    """What the router hands to the experts: sums ``tokens [E]``, ``mass [E]``, ``total``, and ``first``, the sum over
    tokens of the largest routing weight's share of the token's weights.
    """

    def attach(self, view: View) -> list[Any]:
        """Hook the input of the experts."""
        part = view.part.experts
        assert part is not None

        def hook(_: nn.Module, args: tuple[Any, ...]) -> None:
            _, index, weights = args[:3]
            index, weights = self.flat(index), self.flat(weights).float()
            zeros = torch.zeros(part.count, device=weights.device)
            self.add("tokens", zeros.index_add(0, index.reshape(-1), torch.ones_like(weights).reshape(-1)))
            self.add("mass", zeros.index_add(0, index.reshape(-1), weights.reshape(-1)))
            self.add("total", torch.tensor(float(index.shape[0])))
            self.add("first", (weights.amax(1) / weights.sum(1).clamp(min=1e-12)).sum())

        return [view.child(part.experts).register_forward_pre_hook(hook)]


class Inputs(Observer):
    """A few of the tokens that enter the experts: ``inputs [n, H]``, evenly spaced in the first batches."""

    def __init__(self, limit: int) -> None:
        super().__init__()
        self.limit, self.taken = limit, 0

    def attach(self, view: View) -> list[Any]:
        """Hook the input of the experts."""
        part = view.part.experts
        assert part is not None

        def hook(_: nn.Module, args: tuple[Any, ...]) -> None:
            hidden = self.flat(args[0])
            count = min(TOKENS_A_BATCH, self.limit - self.taken, len(hidden))
            if count < 1:
                return
            chosen = hidden[[i * len(hidden) // count for i in range(count)]].detach().float()
            self.sums["inputs"] = torch.cat([self.sums["inputs"], chosen]) if self.taken else chosen
            self.taken += count

        return [view.child(part.experts).register_forward_pre_hook(hook)]

    def reduce(self) -> None:
        """Samples are no sums: each worker keeps its own."""


class ExpertUse(OfExperts):
    """How routing spreads over experts."""

    name = "expert-use"
    title = "Expert use"
    measures = "Share of the routing weight (mass) and of the tokens that each expert gets."
    unit = "share of the layer"
    columns = (
        Column(key="for_90", title="for 90 %", unit="experts", meaning="experts that carry 90 % of the routing mass"),
        Column(key="unseen", title="never seen", unit="experts", meaning="experts that no token of the data reached"),
        Column(
            key="entropy",
            title="load entropy",
            unit="share of the largest",
            meaning="entropy of the tokens' spread over experts; 1: all experts see as many tokens",
        ),
        Column(
            key="confidence",
            title="confidence",
            unit="share",
            meaning="mean share of a token's routing weight that its first expert gets; 1 / top-k at least",
        ),
        Column(key="top_k", title="top-k", unit="experts", meaning="experts that the router chooses for a token"),
        Column(key="mass", title="mass", kind="series", unit="share", meaning="share of the routing mass; sums to 1"),
        Column(key="tokens", title="tokens", kind="series", unit="share", meaning="share of choices; sums to 1"),
        Column(key="never", title="never seen", kind="units", unit="expert", meaning="experts never chosen"),
    )

    def observe(self, view: View) -> list[Observer]:
        """Watch the router."""
        return [Routing()]

    def look(self, view: View, seen: Seen | None) -> list[LayerRow]:
        """Turn counts into shares."""
        part = view.part.experts
        assert part is not None
        assert seen is not None
        load, mass = shares(seen["tokens"]), shares(seen["mass"])
        entropy = -(load * load.clamp(min=1e-300).log()).sum()
        never = (seen["tokens"] == 0).nonzero().flatten().tolist()
        values: dict[str, float | None] = {
            "for_90": float(carrying(mass, 0.9)),
            "unseen": float(len(never)),
            "entropy": tidy(entropy / torch.tensor(float(part.count)).log()) if part.count > 1 else None,
            "confidence": tidy(seen["first"] / seen["total"].clamp(min=1)),
            "top_k": float(part.top_k),
        }
        series = {"mass": tidied(mass), "tokens": tidied(load)}
        return [self.row(view, values, series=series, units={"never": never})]

    def read(self) -> tuple[str, list[Suggestion]]:
        """Name the experts that carry most, and those never seen."""
        counts = [row.count for row in self.rows]
        told = f"90 % of the routing mass goes to {span(self.values('for_90'))} of {span(counts)} experts a layer."
        unseen = int(sum(self.values("unseen")))
        if unseen:
            told += (
                f" {unseen} of {sum(counts)} experts were never chosen on these data; more or other data may use them."
            )
        else:
            told += " Every expert was chosen at least once."
        wanted = [max(r.values["for_90"] or 0, r.values["top_k"] or 0) / r.count for r in self.rows]
        keep = budget(max(wanted))
        if keep >= 1:
            return told, []
        return told, [
            Suggestion(unit="experts", keep=keep, because="it leaves 90 % of the routing mass in every layer")
        ]


class ExpertSimilarity(OfExperts):
    """How much of an expert its nearest twin in the layer already holds."""

    name = "expert-similarity"
    title = "Expert similarity"
    measures = (
        "How alike each expert and its nearest twin are: neurons of the one against their best match in the other "
        "(mean cosine of rows of up and columns of down); and, with data, cosine of both outputs for the same tokens."
    )
    unit = "cosine"
    columns = (
        Column(
            key="twins", title="by weights", unit="cosine", meaning="mean over experts of the nearest twin's similarity"
        ),
        Column(key="highest", title="closest pair", unit="cosine", meaning="the most alike pair"),
        Column(
            key="chance",
            title="chance",
            unit="cosine",
            meaning="what two experts with random weights of this size would score",
        ),
        Column(
            key="output_twins",
            title="by output",
            unit="cosine",
            meaning="mean over experts of the nearest twin's mean cosine of outputs",
        ),
        Column(
            key="output_highest",
            title="closest by output",
            unit="cosine",
            meaning="the pair with the most alike outputs",
        ),
        Column(key="by_weights", title="by weights", kind="series", unit="cosine", meaning="nearest twin by weights"),
        Column(key="by_output", title="by output", kind="series", unit="cosine", meaning="nearest twin by output"),
        Column(key="twin", title="twin", kind="units", unit="expert", meaning="each expert's nearest twin by weights"),
        Column(
            key="output_twin", title="twin", kind="units", unit="expert", meaning="each expert's nearest twin by output"
        ),
    )
    needs_data = False

    def applies(self, part: Block) -> bool:
        """Blocks with at least two routed experts."""
        return part.experts is not None and part.experts.count > 1

    def observe(self, view: View) -> list[Observer]:
        """Take a few tokens to ask every expert about."""
        part = view.part.experts
        assert part is not None
        hidden = expert_weights(view.child(part.experts), 0)[0].shape[1]
        return [Inputs(max(FEWEST, min(TOKENS, _OUTPUT_NUMBERS // (part.count * hidden))))]

    def look(self, view: View, seen: Seen | None) -> list[LayerRow]:
        """Compare all experts with each other."""
        part = view.part.experts
        assert part is not None
        module = view.child(part.experts)
        alike, looked = weight_similarity(module, part.count, COMPARISONS)
        if looked < part.width:
            self.note(
                f"By weights, {looked} neurons of each expert, evenly spaced, were matched against all of the other."
            )
        best, twin = nearest(alike)
        hidden = expert_weights(module, 0)[0].shape[1]
        values: dict[str, float | None] = {
            "twins": tidy(best.mean()),
            "highest": tidy(best.max()),
            "chance": tidy(chance(part.width, hidden)),
            "output_twins": None,
            "output_highest": None,
        }
        series, units = {"by_weights": tidied(best)}, {"twin": twin.tolist()}
        if seen is not None:
            self.note(f"By output: cosines are means over {len(seen['inputs'])} tokens that enter the layer.")
            best, twin = nearest(output_similarity(module, part.count, seen["inputs"]))
            values |= {"output_twins": tidy(best.mean()), "output_highest": tidy(best.max())}
            series["by_output"], units["output_twin"] = tidied(best), twin.tolist()
        return [self.row(view, values, series=series, units=units)]

    def read(self) -> tuple[str, list[Suggestion]]:
        """Say how many experts have a near twin."""
        value, layer, expert, twin = max(
            (v, -row.layer, -e, row.units["twin"][e])
            for row in self.rows
            for e, v in enumerate(row.series["by_weights"])
        )
        told = (
            f"The most alike by weights are experts {-expert} and {twin} of layer {-layer} ({value:.2f}; chance "
            f"{span(self.values('chance'), '{:.2f}')})."
        )
        close = sum(v >= TWIN for row in self.rows for v in row.series["by_weights"])
        total = sum(row.count for row in self.rows)
        if self.values("output_twins"):
            outputs = sum(v >= TWIN for row in self.rows for v in row.series.get("by_output", []))
            who = f"{outputs} of {total} experts have" if outputs else "No expert has"
            told += f" {who} a twin whose output has a cosine of {TWIN} or more with its own."
        if not close:
            return f"{told} No expert has a twin of similarity {TWIN} or more: merging any two loses something.", []
        told += f" {close} of {total} have a twin whose weights reach {TWIN}."
        keep = budget(max(_groups(row) / row.count for row in self.rows))
        if keep >= 1:
            return told, []
        return told, [Suggestion(unit="experts", keep=keep, because="it leaves one of each group of near twins")]


def weight_similarity(module: Any, count: int, operations: float) -> tuple[Tensor, int]:
    """Return ``[E, E]``: mean over neurons of expert e of the best match in expert f; and how many neurons were tried.

    The similarity of two neurons is the mean of the cosines of their up rows and of their down columns, as in DERN.
    Experts without neurons are like nobody (0).
    """
    weights = [expert_weights(module, e) for e in range(count)]
    hidden = weights[0][1].shape[1]
    width = max(up.shape[0] for _, up, _ in weights)
    most = min(
        width, max(FEWEST, int(operations / max(1, 4 * count * sum(u.shape[0] for _, u, _ in weights) * hidden)))
    )
    own, owner = [], []
    for e, (_, up, down) in enumerate(weights):
        n = min(most, up.shape[0])
        chosen = [i * up.shape[0] // n for i in range(n)]
        own.append(_neurons(up[chosen], down[chosen]))
        owner += [e] * n
    sources, owners = torch.cat(own), torch.tensor(owner, device=own[0].device)
    members = torch.bincount(owners, minlength=count).clamp(min=1)
    found = torch.zeros(count, count)
    for f, (_, up, down) in enumerate(weights):
        if not up.shape[0]:
            continue
        targets = _neurons(up, down).T
        best = torch.cat([(sources[i : i + 4096] @ targets).amax(1) for i in range(0, len(sources), 4096)])
        total = torch.zeros(count, device=best.device).index_add(0, owners, best)
        found[:, f] = (total / members).cpu()
    return found, most


def output_similarity(module: Any, count: int, inputs: Tensor) -> Tensor:
    """Return ``[E, E]``: mean over tokens ``[n, H]`` of the cosine between the outputs of two experts."""
    outputs = []
    for e in range(count):
        gate, up, down = (w.detach().float() for w in expert_weights(module, e))
        x = inputs.to(gate.device)
        outputs.append(F.normalize((module.act_fn(x @ gate.T) * (x @ up.T)) @ down, dim=1).flatten())
    units = torch.stack(outputs)
    return (units @ units.T).cpu() / max(1, len(inputs))


def nearest(similarity: Tensor) -> tuple[Tensor, Tensor]:
    """Return each unit's largest similarity to another one, and which that is; ties go to the lower index."""
    others = similarity.clone().fill_diagonal_(-2.0)
    best = others.amax(1)
    return best, (others == best.unsqueeze(1)).int().argmax(1)


@functools.cache
def chance(width: int, hidden: int) -> float:
    """Return the similarity of two experts with independent Gaussian weights."""
    generator = torch.Generator().manual_seed(0)
    few = min(width, 64)
    ours, theirs = (
        _neurons(torch.randn(n, hidden, generator=generator), torch.randn(n, hidden, generator=generator))
        for n in (few, width)
    )
    return float((ours @ theirs.T).amax(1).mean())


def _neurons(up: Tensor, down: Tensor) -> Tensor:
    """Return neurons ``[n, 2H]`` whose inner products are the mean of both cosines."""
    halves = [F.normalize(part.detach().float(), dim=1) for part in (up, down)]
    return torch.cat(halves, dim=1) * math.sqrt(0.5)


def _groups(row: LayerRow) -> int:
    """Count experts after near twins are taken together."""
    root = {e: e for e in range(row.count)}

    def find(e: int) -> int:
        while root[e] != e:
            e = root[e]
        return e

    for e, value in enumerate(row.series["by_weights"]):
        if value >= TWIN:
            root[find(e)] = find(row.units["twin"][e])
    return len({find(e) for e in root})
