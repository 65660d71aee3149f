"""Depth efficiency: which blocks add little, which feed later ones, and from where on the prediction is settled.

Source: "Do Language Models Use Their Depth Efficiently?", 2025, arXiv 2505.13898; official code
RobertCsordas/llm_effective_depth. Of each block, with ``D_l = h_{l+1} - h_l``:

- contributions: ``|a|/|h|``, ``|m|/|h + a|``, ``|a + m|/|h|`` and the cosines of the same pairs
- skip effect: with block ``s`` bypassed, ``|D_l - D'_l| / |D_l|`` of later blocks and ``|p - p'|`` of the output
- future effect: the same, bypassed only before a cut in the row and measured from there on
- local effect: block ``l`` alone on ``h_l - D_s``, without the blocks in between
- lens: ``KL(p_lens || p)`` and the overlap of the five likeliest tokens, before each block and after the last one
- depth score: ``sum l e_l / sum e_l`` of each row, with e from skips, from erasure (a block finds the mean of the
  stream where the past stood) or from integrated gradients (inferred: over one factor a block)

Different here, on purpose: the first token counts nowhere, means are per row and then over rows (the official mean
norms divide the last row's sum by all rows' tokens), quantiles stand next to maxima, small ``|D_l|`` are floored at a
hundredth of their mean, all in fp32, and cuts are any positions, not multiples of eight. Rankings and effective depth
are ours (inferred). Linear maps between two models: `core.looking.linear_maps.map_errors`.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from pydantic import Field
from torch import Tensor

from paredown.core.calibration import Batch
from paredown.core.checkpoint import Model
from paredown.core.looking import scales
from paredown.core.looking.contributions import PARTS, Contributions
from paredown.core.looking.skips import Erasures, Lens, Locals, Skips, depth_score
from paredown.core.looking.walk import Tokens, sample, walk
from paredown.core.method import Probe, register
from paredown.core.sequential import Resident
from paredown.errors import DataError


@register
class DepthEfficiency(Probe):
    """Shows what each block adds, what later blocks and tokens need of it, and where the prediction is settled."""

    name: ClassVar[str] = "depth-efficiency"
    title: ClassVar[str] = "Do Language Models Use Their Depth Efficiently?"
    year: ClassVar[int | None] = 2025
    arxiv: ClassVar[str | None] = "2505.13898"
    axis: ClassVar = "analysis"
    unit: ClassVar[str] = "blocks"
    needs: ClassVar[tuple[str, ...]] = ("calibration-data",)

    sequences: int = Field(20, ge=1, description="Calibration rows that are looked at, from the first.")
    length: int = Field(128, ge=8, description="Tokens of each row.")
    cuts: int = Field(4, ge=1, description="Random cuts a row for the effect on future tokens.")
    lens_limit: float = Field(1.0, gt=0, description="Nats of divergence below which a prediction counts as settled.")
    gradient_steps: int = Field(0, ge=0, description="Steps of integrated gradients (the paper: 256); 0 leaves it out.")

    def measure(self, model: Model, data: Batch | None, *, seed: int = 0) -> list[dict[str, Any]]:
        """Return a row for the whole model (``layer`` is ``"all"``) and one for each block.

        - ``ratio_*``, ``cosine_*`` of ``attention``, ``mlp``, ``block``: mean; ratios also ``_median``, ``_high`` (95
          %) and ``_max``. ``cosine_stream`` is between the stream before and after.
        - ``skip``, ``future``, ``local``: lists, what bypassing this block does to the updates of all blocks (mean over
          tokens; 0 before it); ``*_max`` the same with maxima, ``*_high`` with 95 % quantiles.
        - ``output``, ``future_output``: mean distance of distributions, with ``_median``, ``_high`` and ``_max``;
          ``output_kl`` nats.
        - ``lens_kl``, ``lens_top5``: of the stream *before* the block; in the row ``"all"`` a list for depths 0 to L.
        - ``rank_contribution``, ``rank_output``, ``rank_future``: place in the order of dropping, 0 goes first. No
          later token reads what the last block writes, so it has no future effect, whatever else it does.
        - ``all`` only: ``effective_depth`` (blocks), ``score_skip``, ``score_erasure``, ``score_gradients``: mean depth
          scores, with ``_low`` and ``_high`` the 10 and 90 % quantiles over rows.
        """
        if data is None:
            raise DataError(f"{self.name} looks at calibration data; give some with --data.")
        blocks = model.anatomy.language.blocks
        depth = len(blocks)
        generator = torch.Generator().manual_seed(seed)
        contributions, skips, local, lens = Contributions(), Skips(), Locals(), Lens()
        future, erasures = Skips(), Erasures(torch.zeros(0), depth - 1)
        examples: dict[str, list[Tensor]] = {"skip": [], "erasure": []}
        rows = sample(data, self.sequences, self.length)
        for ids, mask in rows:
            drawn = [_cuts(ids, mask, generator) for _ in range(self.cuts)]
            late = [Skips(cut) for cut in drawn]
            for skipped in late:
                skipped.share(future)
            erasures.renew(drawn[0])
            found = None
            for found, step in walk(Resident(model), ids, mask, blocks):
                followers: list[Any] = [contributions, skips, local, lens, erasures, *late]
                for one in followers:
                    one.follow(found, step)
            assert found is not None
            clean = lens.close(found)
            for skipped in (skips, erasures, *late):
                skipped.close(found, clean)
            local.renew()
        for name, tracker in (("skip", skips), ("erasure", erasures)):
            examples[name] = [torch.tensor(tracker.distance[s].rows) for s in sorted(tracker.distance)]
        return self._table(
            model, rows, contributions, {"skip": skips, "future": future, "local": local}, lens, examples
        )

    def _table(
        self,
        model: Model,
        rows: scales.Rows,
        contributions: Contributions,
        effects: dict[str, Any],
        lens: Lens,
        examples: dict[str, list[Tensor]],
    ) -> list[dict[str, Any]]:
        depth = len(model.anatomy.language.blocks)
        skips, future = effects["skip"], effects["future"]
        ranks = {
            "contribution": _ranks([_mean(contributions.ratios.get((layer, "block"))) for layer in range(depth)]),
            "output": _ranks([skips.distance[layer].mean for layer in range(depth)]),
            "future": _ranks([future.later(layer, depth) for layer in range(depth)]),
        }
        found = []
        for layer in range(depth):
            row: dict[str, Any] = {"layer": layer}
            for part in PARTS:
                row |= _spread(f"ratio_{part}", contributions.ratios.get((layer, part)))
            for part in (*PARTS, "stream"):
                row[f"cosine_{part}"] = _mean(contributions.cosines.get((layer, part)))
            for name, tracker in effects.items():
                listed = [tracker.updates.get((layer, later)) for later in range(depth)]
                row[name] = [one.mean if one else 0.0 for one in listed]
                row[f"{name}_high"] = [one.quantile(0.95) if one else 0.0 for one in listed]
                row[f"{name}_max"] = [one.largest if one else 0.0 for one in listed]
            row |= _spread("output", skips.distance[layer]) | _spread("future_output", future.distance[layer])
            row["output_kl"] = skips.divergence[layer].mean
            row |= {"lens_kl": lens.divergence[layer].mean, "lens_top5": lens.overlap[layer].mean}
            row |= {f"rank_{name}": rank[layer] for name, rank in ranks.items()}
            found.append(row)
        whole: dict[str, Any] = dict.fromkeys(found[0])
        whole |= {
            "layer": "all",
            "lens_kl": [lens.divergence[d].mean for d in sorted(lens.divergence)],
            "lens_top5": [lens.overlap[d].mean for d in sorted(lens.overlap)],
        }
        totals: dict[str, Any] = {"effective_depth": lens.effective(self.lens_limit)}
        totals |= _scores("skip", torch.stack(examples["skip"], 1))
        totals |= _scores("erasure", torch.stack(examples["erasure"], 1) if examples["erasure"] else None)
        gradients = scales.attributions(model, rows, self.gradient_steps) if self.gradient_steps else None
        totals |= _scores("gradients", gradients.abs() if gradients is not None else None)
        return [{**whole, **totals}, *({**row, **dict.fromkeys(totals)} for row in found)]


def _cuts(ids: Tensor, mask: Tensor | None, generator: torch.Generator) -> Tensor:
    """Draw one position a row, ``[B]``: some real tokens lie before it, some after."""
    real = mask.bool() if mask is not None else torch.ones_like(ids, dtype=torch.bool)
    counts = real.sum(1)
    drawn = 2 + (torch.rand(len(ids), generator=generator) * (counts - 3).clamp(min=1)).long()
    start = real.int().argmax(1)
    return start + drawn


def _mean(tokens: Tokens | None) -> float | None:
    return tokens.mean if tokens else None


def _spread(name: str, tokens: Tokens | None) -> dict[str, float | None]:
    if not tokens:
        return dict.fromkeys((name, f"{name}_median", f"{name}_high", f"{name}_max"))
    high, median = tokens.quantile(0.95), tokens.quantile(0.5)
    return {name: tokens.mean, f"{name}_median": median, f"{name}_high": high, f"{name}_max": tokens.largest}


def _ranks(values: list[float | None]) -> list[int]:
    order = sorted(range(len(values)), key=lambda i: (values[i] or 0.0, i))
    return [order.index(i) for i in range(len(values))]


def _scores(name: str, effects: Tensor | None) -> dict[str, float | None]:
    """Return mean and quantiles over rows of the depth score of effects ``[N, L]``."""
    keys = (f"score_{name}", f"score_{name}_low", f"score_{name}_high")
    if effects is None:
        return dict.fromkeys(keys)
    scores = depth_score(effects)
    scores = scores[scores.isfinite()]
    if not len(scores):
        return dict.fromkeys(keys)
    low, high = scores.quantile(torch.tensor([0.1, 0.9], dtype=scores.dtype)).tolist()
    return dict(zip(keys, (float(scores.mean()), low, high), strict=True))
