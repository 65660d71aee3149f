"""Layer dropping by position, by weights, or by contribution: no search, no teacher, drop and fine-tune.

Source: "On the Effect of Dropping Layers of Pre-trained Transformer Models", 2020, arXiv 2004.03844; the deletion
follows hsajjad/transformers (examples/run_glue.py), the strategies the paper. Layers are counted from 1 there and in
this list, from 0 in edits; ``K`` of ``L`` go:

- top ``{L-K+1 .. L}``; bottom ``{1 .. K}``
- symmetric: ``X`` stay at the bottom and ``X`` at the top, ``2 X + K = L``; if ``L - K`` is odd, one more stays at the
  bottom (inferred)
- odd-alternate, even-alternate: the ``K`` largest numbers of that parity
- parameter: the lowest mean ``|w|`` (or variance) of all weights of a layer; that the sum is divided by the number of
  weights, and that the lowest go, is inferred: ``direction=highest`` turns it round
- contribution: the largest ``c = mean over sentences of cos(what enters the layer, what leaves it)`` at the token that
  stands for the sentence: the first where tokens see each other both ways, else the last (inferred). Taken before the
  final norm, which ``output_hidden_states`` applies to its last entry. ``threshold``: only layers above it, and no
  more than the budget allows (inferred). Ties: lower layer first (ours).

Fine-tuning comes after: the official code deletes layers only while it trains, here the saved model is the cut one.
Measured as it is, without fine-tuning, each set is a baseline for the methods that choose.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from pydantic import Field, model_validator
from torch import Tensor, nn

from paredown.core import budget
from paredown.core.anatomy import Block
from paredown.core.edits import DropBlock, Edit
from paredown.core.method import Compressor, Scores, View, register
from paredown.core.statistics import Observer
from paredown.errors import BudgetError, RecipeError

Strategy = Literal["top", "bottom", "symmetric", "odd-alternate", "even-alternate", "parameter", "contribution"]


class _Needs:
    """Calibration data for the one strategy that looks at any; the catalogue, which asks the class, names them."""

    def __get__(self, method: Sajjad | None, owner: type[Sajjad]) -> tuple[str, ...]:
        return ("calibration-data",) if method is None or method.strategy == "contribution" else ()


@register
class Sajjad(Compressor):
    """Drops whole blocks by a simple rule (by default the topmost), to be fine-tuned afterwards."""

    name = "sajjad"
    title = "On the Effect of Dropping Layers of Pre-trained Transformer Models"
    year = 2020
    arxiv = "2004.03844"
    axis = "depth"
    unit = "blocks"
    scope = "global"
    needs: ClassVar[Any] = _Needs()

    strategy: Strategy = Field(
        "top",
        description="Which blocks go: top, bottom, symmetric (the middle), odd-alternate or even-alternate (every "
        "second from the top, counted from 1), parameter (by their weights), contribution (those that turn the stream "
        "least).",
    )
    direction: Literal["lowest", "highest"] = Field(
        "lowest", description="With strategy parameter: whether the lowest or the highest scores go."
    )
    statistic: Literal["magnitude", "variance"] = Field(
        "magnitude", description="With strategy parameter: the mean absolute weight of a block, or their variance."
    )
    threshold: float | None = Field(
        None,
        ge=-1,
        lt=1,
        description="With strategy contribution: only blocks with a larger similarity go (the authors: 0.95, 0.925, "
        "0.9), and no more than keep allows.",
    )

    @model_validator(mode="after")
    def _fields_of_the_strategy(self) -> Sajjad:
        owners = {"direction": "parameter", "statistic": "parameter", "threshold": "contribution"}
        for field, owner in owners.items():
            if self.strategy != owner and getattr(self, field) != type(self).model_fields[field].default:
                raise RecipeError(f"{self.name}: {field} goes with strategy {owner}, not with {self.strategy}.")
        return self

    def applies(self, part: Block) -> bool:
        """Every block may go."""
        return True

    def observe(self, view: View) -> list[Observer]:
        """Watch the stream around the block, if the strategy asks."""
        return [SentenceSimilarity()] if self.strategy == "contribution" else []

    def score(self, view: View, seen: Scores, seed: int) -> dict[str, Tensor]:
        """Return what the strategy ranks blocks by: the larger, the sooner a block goes."""
        if self.strategy == "contribution":
            return {"block": seen["cosine"] / seen["sentences"].clamp(min=1)}
        if self.strategy == "parameter":
            value = _of_weights(view.module, self.statistic)
            return {"block": -value if self.direction == "lowest" else value}
        return {"block": torch.tensor(0.0)}

    def placeholder(self, part: Block) -> dict[str, Tensor]:
        """Scores for a plan; under a threshold every second block is surely above it, and the others may be."""
        return {"block": torch.tensor(2.0 if self.threshold is not None and part.index % 2 else 0.0)}

    def decide(self, blocks: Sequence[Block], scores: Mapping[int, Scores]) -> list[Edit]:
        """Drop as many blocks as the budget says; with a threshold, perhaps fewer.

        Raises
        ------
        BudgetError
            If alternate blocks are too few, or no block is above the threshold.
        """
        count = budget.removed(len(blocks), self.keep)
        if not count:
            return []
        if self.strategy in ("parameter", "contribution"):
            values = torch.stack([scores[block.index]["block"].double() for block in blocks])
            if self.threshold is not None:
                above = int((values > self.threshold).sum())
                if not above:
                    raise BudgetError(
                        f"{self.name}: no block's similarity is above the threshold {self.threshold:g}, the largest is "
                        f"{float(values.max()):.4f}; lower the threshold."
                    )
                count = min(count, above)
            gone: Sequence[int] = budget.top(values, count)
        else:
            gone = by_position(self.strategy, len(blocks), count)
        return [DropBlock(layer=blocks[i].index) for i in gone]


def by_position(strategy: Strategy, layers: int, count: int) -> list[int]:
    """Return which ``count`` of ``layers`` blocks go, counted from 0, ascending.

    Raises
    ------
    BudgetError
        If there are fewer alternate blocks than are to go.
    """
    if strategy == "top":
        return list(range(layers - count, layers))
    if strategy == "bottom":
        return list(range(count))
    if strategy == "symmetric":
        top = (layers - count) // 2
        return list(range(layers - count - top, layers - top))
    # The layers that the paper calls odd are 0, 2, 4, ... here.
    alternate = list(range(0 if strategy == "odd-alternate" else 1, layers, 2))
    if count > len(alternate):
        raise BudgetError(
            f"{strategy} can drop {len(alternate)} of {layers} blocks, but {count} are to go; keep at least "
            f"{1 - len(alternate) / layers:.3g}, or take another strategy."
        )
    return alternate[len(alternate) - count :]


def _of_weights(module: nn.Module, statistic: str) -> Tensor:
    """Return the mean absolute value, or the variance, of all weights of a block together."""
    parts = [p.detach() for p in module.parameters()]
    number = sum(p.numel() for p in parts)
    if statistic == "magnitude":
        return torch.stack([p.abs().sum(dtype=torch.float64) for p in parts]).sum().cpu() / number
    mean = torch.stack([p.sum(dtype=torch.float64) for p in parts]).sum() / number
    return torch.stack([(p.double() - mean).square().sum() for p in parts]).sum().cpu() / number


class SentenceSimilarity(Observer):
    """Cosine between what enters and what leaves a block, at one token of each sentence.

    Gives sums ``cosine`` and ``sentences``. The token is the last real one, or the first where attention is not causal.
    """

    def attach(self, view: View) -> list[Any]:
        """Hook the block."""
        attention = view.part.attention
        inner = view.child(attention.path).modules() if attention is not None else ()
        causal = all(getattr(module, "is_causal", True) for module in inner)
        seen: list[Tensor] = []

        def enter(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            seen.append(args[0] if args else kwargs["hidden_states"])

        def leave(_: nn.Module, __: Any, output: Any) -> None:
            before, after = seen.pop(), output[0] if isinstance(output, tuple) else output
            rows = torch.arange(len(before), device=before.device)
            at = self._token(before, causal)
            cosines = F.cosine_similarity(before[rows, at].float(), after[rows, at].float(), dim=-1, eps=1e-12)
            self.add("cosine", cosines.sum())
            self.add("sentences", torch.tensor(float(len(rows))))

        return [
            view.module.register_forward_pre_hook(enter, with_kwargs=True),
            view.module.register_forward_hook(leave),
        ]

    def _token(self, hidden: Tensor, causal: bool) -> Tensor:
        """Return the place of each row's token, ``[B]``; ``hidden`` is ``[B, T, D]``."""
        batch, length, _ = hidden.shape
        real = torch.ones(batch, length, device=hidden.device) if self.valid is None else self.valid.float()
        order = torch.arange(1, length + 1, device=hidden.device)
        return (real * (order if causal else order.flip(0))).argmax(1)
