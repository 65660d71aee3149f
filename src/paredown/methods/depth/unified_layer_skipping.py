"""Unified Layer Skipping: the same evenly spaced layers run for every token and every sample.

Source: "Accelerating Inference in Large Language Models with a Unified Layer Skipping Strategy", 2024, arXiv
2404.06954; official code Adaxry/Unified_Layer_Skipping (codes/modeling_bloom.py).

Of ``L`` layers ``R = int(L / s)`` run at a speed-up ``s``. The set: ``{0, L-1}``; ``interval = int(L / (R - 1))``; then
``i = 1 .. L-2`` in order, if ``i mod interval == 0``, until there are ``R``. ``spread=even`` is ours:
``round(j (L-1) / (R-1))``, which does not crowd the lower layers when ``R`` does not divide well.

- The policy reads every prompt through all layers; only the token that the model has just said goes through the ``R``.
  Whether a pass reads or decodes is told by its kind, not by whether there is a cache: a prompt in chunks and a further
  turn are read in full.
- A skipped layer's cache takes the new token's keys and values of the nearest layer below that ran: of the newest
  position only (inferred), so that the prompt's own entries stay (the official code copies the whole entry).
- The static form drops the other layers for prompts too, and from the checkpoint.
- Left out: tuning. The authors train with two passes over each example, the prompt through all layers, the answer
  through ``R``; that changes the model, which a policy never does. Heal the static form instead.

Corrected: with ``R = 0`` the official code returns two layers, more than were asked for, and with ``R = 1`` it divides
by zero; both are refused.
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from typing import ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from paredown.core import budget
from paredown.core.anatomy import Block
from paredown.core.checkpoint import Model
from paredown.core.edits import DropBlock, Edit
from paredown.core.method import Compressor, Place, Policy, Scores, View, register
from paredown.core.runtime import Pass, Runtime
from paredown.errors import ArchitectureError, BudgetError

Spread = Literal["paper", "even"]
_SPREAD = "How the layers that run are spread: by the paper's interval, or as evenly as whole numbers allow."


def spaced(layers: int, stay: int, spread: Spread = "paper") -> tuple[int, ...]:
    """Return which ``stay`` of ``layers`` layers run, ascending; always the first and the last.

    Raises
    ------
    BudgetError
        If fewer than two of several layers would stay.
    """
    _check(layers, stay)
    if stay == layers:
        return tuple(range(layers))
    if spread == "even":
        return tuple((2 * j * (layers - 1) + stay - 1) // (2 * (stay - 1)) for j in range(stay))
    interval = layers // (stay - 1)
    inner = [i for i in range(1, layers - 1) if i % interval == 0][: stay - 2]
    return (0, *inner, layers - 1)


def _check(layers: int, stay: int) -> None:
    if stay < min(2, layers):
        raise BudgetError(
            f"{stay} of {layers} layers would run, but the first and the last always do; keep at least "
            f"{2 / layers:.3g}, or ask for a speed-up of {layers / 2:g} at most."
        )


@register
class UnifiedLayerSkipping(Compressor):
    """Drops all blocks but an evenly spaced set that holds the first and the last."""

    name = "unified-layer-skipping"
    title = "Accelerating Inference in Large Language Models with a Unified Layer Skipping Strategy (static form)"
    year = 2024
    arxiv = "2404.06954"
    axis = "depth"
    unit = "blocks"
    scope = "global"

    spread: Spread = Field("paper", description=_SPREAD)

    def applies(self, part: Block) -> bool:
        """Every block may go."""
        return True

    def score(self, view: View, seen: Scores, seed: int) -> dict[str, Tensor]:
        """Nothing is measured."""
        return {"block": torch.tensor(0.0)}

    def placeholder(self, part: Block) -> dict[str, Tensor]:
        """Scores for a plan."""
        return {"block": torch.tensor(0.0)}

    def decide(self, blocks: Sequence[Block], scores: Mapping[int, Scores]) -> list[Edit]:
        """Drop the blocks that are not in the set."""
        stay = set(spaced(len(blocks), budget.kept(len(blocks), self.keep), self.spread))
        return [DropBlock(layer=block.index) for i, block in enumerate(blocks) if i not in stay]


class _Skipping(Policy):
    """What the method and its random control share."""

    axis: ClassVar = "depth"
    unit: ClassVar[str] = "blocks that run at each decoding step"
    places: ClassVar[frozenset[Place]] = frozenset({"token stream"})

    speedup: float | None = Field(
        None, ge=1, description="Wanted speed-up of decoding, instead of keep: int(layers / speedup) blocks run."
    )

    @property
    def inert(self) -> bool:
        """Whether every block runs."""
        return self.keep == 1 if self.speedup is None else self.speedup == 1

    def stay(self, layers: int) -> int:
        """Return how many of ``layers`` blocks run."""
        return budget.kept(layers, self.keep) if self.speedup is None else int(layers / self.speedup)

    def chosen(self, layers: int) -> tuple[int, ...]:
        """Return which of ``layers`` blocks run, ascending.

        Raises
        ------
        BudgetError
            If fewer than two of several would run.
        """
        raise NotImplementedError

    def runtime(self, model: Model) -> Runtime:
        """Skip all other blocks while the model decodes.

        Raises
        ------
        ArchitectureError
            If the model does not decode, or has layers that must see every token.
        BudgetError
            If fewer than two blocks would run.
        """
        return _Skip(self, model)


@register
class UnifiedLayerSkippingDynamic(_Skipping):
    """Reads prompts with all blocks and decodes with an evenly spaced set, the same for all tokens and samples."""

    name: ClassVar[str] = "unified-layer-skipping-dynamic"
    title: ClassVar[str] = "Accelerating Inference in Large Language Models with a Unified Layer Skipping Strategy"
    year: ClassVar[int | None] = 2024
    arxiv: ClassVar[str | None] = "2404.06954"

    spread: Spread = Field("paper", description=_SPREAD)

    def chosen(self, layers: int) -> tuple[int, ...]:
        """Return the evenly spaced set."""
        return spaced(layers, self.stay(layers), self.spread)


@register
class RandomSkipping(_Skipping):
    """Decodes with the first, the last and randomly chosen blocks, as many as the method it controls."""

    name: ClassVar[str] = "random-skipping"
    title: ClassVar[str] = "Random control: blocks that run at each decoding step"
    control: ClassVar[bool] = True

    seed: int = Field(0, ge=0, description="What the blocks are drawn with.")

    def chosen(self, layers: int) -> tuple[int, ...]:
        """Return both ends and a draw from what lies between."""
        stay = self.stay(layers)
        _check(layers, stay)
        if stay == layers:
            return tuple(range(layers))
        inner = random.Random(self.seed).sample(range(1, layers - 1), stay - 2)
        return (0, *sorted(inner), layers - 1)


class _Skip(Runtime):
    """``kept`` are the blocks that run in decoding."""

    policy: _Skipping

    def __init__(self, policy: _Skipping, model: Model) -> None:
        super().__init__(policy, model)
        _decodes(model, policy.name)
        blocks = model.anatomy.language.blocks
        self.kept = frozenset(blocks[i].index for i in policy.chosen(len(blocks)))

    def skips(self, layer: int, now: Pass) -> bool:
        return now.decodes and layer not in self.kept


def _decodes(model: Model, name: str) -> None:
    """Refuse models in which a block cannot be left out for single tokens."""
    config = model.config.get_text_config()
    if model.anatomy.language.name != "language" or not model.hf.can_generate():
        raise ArchitectureError(
            f"{name} acts while a model decodes, and {type(model.hf).__name__} does not; use the static form."
        )
    attending = {"full_attention", "sliding_attention", "chunked_attention"}
    kinds = set(getattr(config, "layer_types", None) or ()) - attending
    shared: int = getattr(config, "num_kv_shared_layers", 0)
    if kinds or shared:
        why = "whose state must see every token" if kinds else "that read the keys of earlier ones"
        raise ArchitectureError(
            f"{type(model.hf).__name__} has layers {why}, so none can be skipped while it decodes; use another axis."
        )
