"""gamma-MoD: in layers whose attention maps have low rank, half of the prompt goes round the layer.

Source: "gamma-MoD: Exploring Mixture-of-Depth Adaptation for Multimodal Large Language Models", 2024, arXiv 2410.13859;
official code Yaxin9Luo/Gamma-MOD. Different here, on purpose:

- ARank really chooses the layers (the published mode is a fixed list, and the rank is only printed, of the first sample
  of a batch). Ties convert the deeper layer first (inferred).
- The number of chosen tokens is exact: ``k = n - floor((1 - capacity) * P)``. The published float formula rounds up by
  one now and then.
- Positions stay as they are. The published code numbers the chosen tokens anew in each layer, so that distances
  shrink; weights that were trained that way need it, and it is left out.
- The prefix that may be skipped comes from where the image tokens are, not from a fixed length.
- Thresholds of the prompt are set for each layer, from calibration data, to the share that is asked for; the published
  0.005 keeps nearly everything that the router has not strongly rejected.
- The model stays frozen and the router alone is trained; the paper trains all weights. A recipe can do that in a step
  of its own, ``{method: healing, under: gamma-mod}``, with the policy behind it.
- What the MLP adds to a token that enters is therefore not multiplied by the router's chance ``p``, which nothing in a
  frozen model makes up for: it is multiplied by ``1 + (p - p)``, of which the second p has no gradient. The router
  learns as it would, and the model reads what it is used to. ``weighted`` is the published form.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from paredown.core import budget, draws, forward
from paredown.core.attach import attach_runtimes
from paredown.core.calibration import Batch
from paredown.core.checkpoint import Model
from paredown.core.depth.around import Around, convertible, decoding, skipped
from paredown.core.learning import learned, training
from paredown.core.learning.objective import text_loss
from paredown.core.learning.teacher import Teacher
from paredown.core.looking.rank import attention_ranks
from paredown.core.method import Place, Policy, Progress, register
from paredown.core.runtime import Pass, Runtime
from paredown.core.stream import Stream
from paredown.errors import ArchitectureError, BudgetError, DataError, PolicyError

_FILE = "router.safetensors"
_ROUNDS = 3
"""Passes over the rows that thresholds are set on: what a layer reads depends on the thresholds before it."""
TUNED_ROWS = 16


@register
class GammaMoD(Policy):
    """Lead tokens of the prompt around layers whose attention maps have low rank, as one shared router decides.

    ``keep`` is the mean share over all layers of the prompt's tokens that may be skipped: ``converted`` of the layers
    let a share ``capacity`` of them in, which is solved for ``keep`` where it is not given. Never skipped are the first
    ``sink`` tokens and what follows the last image; in a prompt without images, its last ``recent`` tokens. A token
    that skips a layer leaves no keys and values there. Tokens that come one by one skip layers where the router gives
    them less than ``decode``.

    ``prepare`` ranks attention maps to choose the layers, trains the router beside the frozen model and sets the
    thresholds; all from text, also for models with images.
    """

    name: ClassVar[str] = "gamma-mod"
    title: ClassVar[str] = "gamma-MoD: Exploring Mixture-of-Depth Adaptation for Multimodal Large Language Models"
    year: ClassVar[int | None] = 2024
    arxiv: ClassVar[str | None] = "2410.13859"
    axis: ClassVar = "depth"
    unit: ClassVar[str] = "tokens a layer"
    needs: ClassVar[tuple[str, ...]] = ("calibration-data", "training")
    places: ClassVar[frozenset[Place]] = frozenset({"token stream"})

    converted: float = Field(0.875, gt=0, le=1, description="Share of the layers that tokens may skip.")
    capacity: float | None = Field(
        None, ge=0, le=1, description="Share of the tokens that these layers let in; by default solved for keep."
    )
    layers: tuple[int, ...] | None = Field(None, description="The layers; made by prepare from ARank if not given.")
    sink: int = Field(1, ge=0, description="First tokens that skip no layer.")
    recent: int = Field(16, ge=1, description="Last tokens of a prompt without images that skip no layer.")
    samples: int = Field(16, ge=1, description="Calibration rows whose attention maps are ranked.")
    length: int = Field(256, ge=2, description="Tokens of each that are ranked.")
    ranks: tuple[float | None, ...] = Field((), description="ARank of each layer; made by prepare.")
    measured: tuple[tuple[str, float], ...] = Field((), description="Shares and losses; made by prepare.")

    decode: float = Field(0.5, ge=0, le=1, description="Tokens that come one by one skip below this.")
    weighted: bool = Field(False, description="Multiply what MLPs add by the router's chance, as published.")
    steps: int = Field(300, ge=0, description="Training steps of the router.")
    lr: float = Field(3e-3, gt=0, description="Learning rate of the router.")
    batch: int = Field(4, ge=1, description="Rows in a training step.")
    lm: float = Field(1.0, ge=0, description="Weight of the next-token loss.")
    distil: float = Field(0.0, ge=0, description="Weight of the KL to the logits of the model without skipping.")
    auxiliary: float = Field(0.01, ge=0, description="Weight of the router's loss on which tokens were chosen.")
    thresholds: tuple[float, ...] | None = Field(
        None, description="What a token of the prompt must exceed, one for each converted layer; made by prepare."
    )
    weights: str | None = Field(None, description="File of the router; made by prepare.")

    @property
    def inert(self) -> bool:
        return self.keep == 1 if self.capacity is None else self.capacity == 1

    def room(self, model: Model) -> tuple[int, float]:
        """Return how many layers are converted, and the share of tokens that each of them lets in.

        Raises
        ------
        ArchitectureError
            If no layer can be skipped.
        BudgetError
            If ``keep`` cannot be met.
        """
        able = convertible(model)
        depth = len(model.anatomy.language.blocks)
        if not able:
            raise ArchitectureError(
                f"no layer of {type(model.hf).__name__} has a norm, attention and an MLP that tokens could skip."
            )
        count = min(len(able), budget.floored(depth, self.converted, least=1))
        if self.layers is not None:
            if bad := [layer for layer in self.layers if layer not in able]:
                raise PolicyError(f"{self.name}: layer {bad[0]} cannot be skipped; choose among {able}.")
            count = len(set(self.layers))
        if self.capacity is not None or not count:
            return count, 1.0 if self.capacity is None else self.capacity
        capacity = 1 - (1 - self.keep) * depth / count
        if capacity < 0:
            raise BudgetError(
                f"{self.name} cannot keep a mean of {self.keep:g} over {depth} layers of which tokens skip {count}; "
                f"keep {1 - count / depth:.3g} or more, or convert more layers."
            )
        return count, capacity

    def chosen(self, model: Model, data: Batch | None) -> tuple[tuple[int, ...], tuple[float | None, ...]]:
        """Return the layers of lowest ARank, ascending, and the ranks; layers that were given stay."""
        count, _ = self.room(model)
        if self.layers is not None:
            return tuple(sorted(set(self.layers))), self.ranks
        if data is None:
            raise DataError(f"{self.name} ranks attention maps; give it calibration data, or layers.")
        ranks = attention_ranks(model, data, samples=self.samples, length=self.length)
        known = [(rank, -layer) for layer in convertible(model) if (rank := ranks[layer]) is not None]
        return tuple(sorted(-layer for _, layer in sorted(known)[:count])), ranks

    def runtime(self, model: Model) -> Around:
        if self.layers is None or self.weights is None or self.thresholds is None:
            raise PolicyError(
                f"{self.name} has not chosen layers of {type(model.hf).__name__} and trained its router yet; call "
                "prepare with calibration data first."
            )
        self.room(model)
        layers = sorted(set(self.layers))
        if len(self.thresholds) != len(layers):
            raise PolicyError(
                f"{self.name} was given {len(self.thresholds)} thresholds for {len(layers)} layers; give one for each."
            )
        router = _fresh(model)
        learned.restore(
            router,
            self.weights,
            device=str(model.hf.device),
            unreadable=f"{self.weights} holds no router that can be read ({{}}); prepare it again.",
            foreign=f"the router in {self.weights} was trained for another model; prepare it again.",
        )
        thresholds = dict(zip(layers, self.thresholds, strict=True))
        return Skips(self, model, thresholds, router)

    def learning(self, model: Model) -> Runtime:
        """Choose by number, as the router was trained, and leave the router as it is."""
        runtime = self.runtime(model)
        assert isinstance(runtime, Skips)
        runtime.router.requires_grad_(False)
        runtime.by_count = True
        return runtime

    def prepare(
        self,
        model: Model,
        data: Batch | None,
        *,
        seed: int = 0,
        folder: str | None = None,
        progress: Progress | None = None,
    ) -> GammaMoD:
        """Return the policy with layers, router and thresholds. What was given stays."""
        if self.inert or (self.layers is not None and self.weights is not None and self.thresholds is not None):
            return self
        data = learned.text(self.name, data)
        folder = learned.place(self.name, folder, what="router")
        layers, ranks = self.chosen(model, data)
        told = self.model_copy(update={"layers": layers, "ranks": ranks})
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            router = _fresh(model)
        runtime = Skips(told, model, dict.fromkeys(layers, 0.0), router)
        task = Training(told, runtime, data, progress)
        settings = training.Settings(steps=self.steps, lr=self.lr, batch=self.batch, seed=seed, clip=1.0)
        with attach_runtimes(model, [runtime]):
            fitted = learned.fit(task, range(len(data)), settings, folder=folder, progress=progress, what=self.name)
            measured = runtime.tune(data) | learned.ends(fitted.losses)
        weights = learned.keep(router.state_dict(), folder, _FILE)
        thresholds = tuple(runtime.thresholds[layer] for layer in layers)
        update = {"weights": weights, "thresholds": thresholds, "measured": tuple(measured.items())}
        return told.model_copy(update=update)


@register
class RandomTokensALayer(GammaMoD):
    """Lead randomly chosen tokens of the prompt around the layers of lowest ARank, exactly as many as asked for.

    A control for ``gamma-mod``: same layers, same number, another draw in each layer. Nothing is trained, MLPs count
    in full, and tokens that come one by one skip nothing.
    """

    name: ClassVar[str] = "random-tokens-a-layer"
    title: ClassVar[str] = "Random control: tokens a layer"
    year: ClassVar[int | None] = None
    arxiv: ClassVar[str | None] = None
    needs: ClassVar[tuple[str, ...]] = ("calibration-data",)
    control: ClassVar[bool] = True

    seed: int = Field(0, ge=0, description="What the choice is drawn with; each prompt has its own draw.")

    def runtime(self, model: Model) -> Around:
        if self.layers is None:
            raise PolicyError(
                f"{self.name} has not chosen layers of {type(model.hf).__name__} yet; call prepare with calibration "
                "data first, or give it layers."
            )
        self.room(model)
        return _Drawn(self, model, tuple(sorted(set(self.layers))))

    def learning(self, model: Model) -> Runtime:
        return self.runtime(model)

    def prepare(
        self,
        model: Model,
        data: Batch | None,
        *,
        seed: int = 0,
        folder: str | None = None,
        progress: Progress | None = None,
    ) -> RandomTokensALayer:
        """Return the policy with its layers."""
        if self.inert or self.layers is not None:
            return self
        layers, ranks = self.chosen(model, data)
        return self.model_copy(update={"layers": layers, "ranks": ranks})


def _fresh(model: Model) -> nn.Linear:
    """Return a router ``d -> 2``: the second logit says that a token enters."""
    router = nn.Linear(model.anatomy.language.hidden_size, 2, bias=False)
    nn.init.normal_(router.weight, std=0.02)
    return router.to(model.hf.device)


@dataclass(frozen=True)
class Heard:
    """What the router said in a layer: logits ``[B, n, 2]``; which rows went round, could have, and are real."""

    logits: Tensor
    gone: Tensor
    free: Tensor
    real: Tensor


class Skips(Around):
    """Leads tokens around layers as the router says.

    Parameters
    ----------
    thresholds : for each converted layer, what a token of the prompt must exceed

    Attributes
    ----------
    by_count : choose by number, as in training, and not by thresholds
    heard : by layer, of the last pass; while ``listening``
    """

    policy: GammaMoD

    def __init__(self, policy: GammaMoD, model: Model, thresholds: dict[int, float], router: nn.Linear) -> None:
        super().__init__(policy, model, list(thresholds), sink=policy.sink, recent=policy.recent)
        self.thresholds, self.router = thresholds, router
        _, self.capacity = policy.room(model)
        self.by_count = self.listening = False
        self.heard: dict[int, Heard] = {}

    def begin(self, now: Pass) -> None:
        self.heard = {}

    def judge(self, layer: int, stream: Stream, free: Tensor) -> tuple[Tensor, Tensor | None]:
        # In fp32: in bf16 chances near a threshold are coarse.
        logits = self.router(self.norms[layer](stream.hidden).float())
        chance = logits.softmax(-1)[..., 1]
        gone = self.gone(layer, stream, chance, free)
        if self.listening:
            self.heard[layer] = Heard(logits, gone, free, stream.real())
        if self.policy.weighted:
            return gone, chance
        # A factor of one does nothing but carry the gradient.
        return gone, 1 + (chance - chance.detach()) if chance.requires_grad else None

    def gone(self, layer: int, stream: Stream, chance: Tensor, free: Tensor) -> Tensor:
        """Return which rows go round the layer."""
        assert stream.now is not None
        if self.by_count:
            return skipped(chance.detach(), free, self.capacity)
        if decoding(stream.now):
            return free & (chance < self.policy.decode)
        return free & (chance <= self.thresholds[layer])

    def listen(self, some: Batch) -> tuple[Tensor, dict[int, Heard]]:
        """Read rows; return the logits and what the router said."""
        self.listening = True
        try:
            return forward.logits(self.model.hf, some.input_ids, some.attention_mask), self.heard
        finally:
            self.listening, self.heard = False, {}

    @torch.no_grad()
    def tune(self, data: Batch) -> dict[str, float]:
        """Set the thresholds so that each layer lets the wanted share in, and return the shares that came of it."""
        self.by_count = True
        for turn in range(_ROUNDS + 1):
            pooled: dict[int, list[Tensor]] = {layer: [] for layer in self.thresholds}
            entered = offered = above = tokens = 0
            for start in range(0, min(TUNED_ROWS, len(data)), self.policy.batch):
                some = data.take(slice(start, start + self.policy.batch))
                for layer, one in self.listen(some)[1].items():
                    chance = one.logits.softmax(-1)[..., 1]
                    pooled[layer].append(chance[one.free].cpu())
                    entered, offered = entered + int((one.free & ~one.gone).sum()), offered + int(one.free.sum())
                    above += int((chance[one.real] >= self.policy.decode).sum())
                    tokens += int(one.real.sum())
            self.by_count = False
            if turn < _ROUNDS:
                self.thresholds = {layer: _cut(torch.cat(pooled[layer]), self.capacity) for layer in pooled}
        share = entered / max(1, offered)
        part = len(self.thresholds) / len(self.model.anatomy.language.blocks)
        return {
            "share in converted layers": share,
            "share over all layers": 1 - part * (1 - share),
            "share above the decode threshold": above / max(1, tokens),
        }


def _cut(chances: Tensor, capacity: float) -> float:
    """Return the threshold that ``floor((1 - capacity) * n)`` of ``n`` numbers do not exceed."""
    count = budget.removed(len(chances), capacity)
    return float(chances.sort().values[count - 1]) if count else -1.0


class _Drawn(Around):
    policy: RandomTokensALayer

    def __init__(self, policy: RandomTokensALayer, model: Model, layers: tuple[int, ...]) -> None:
        super().__init__(policy, model, layers, sink=policy.sink, recent=policy.recent)
        _, self.capacity = policy.room(model)

    def judge(self, layer: int, stream: Stream, free: Tensor) -> tuple[Tensor, Tensor | None]:
        assert stream.now is not None
        if decoding(stream.now):
            return torch.zeros_like(free), None
        salt = draws.salt(stream.now, self.policy.seed * 10_007 + layer, free.device)[:, None]
        # 53 bits, as many as a double holds exactly.
        return skipped((draws.mixed(self.order(stream) + salt) >> 11).double(), free, self.capacity), None


class Training(training.Task[int]):
    """Next-token loss under masked routing, KL to the model without skipping, and the router's own loss."""

    def __init__(self, policy: GammaMoD, runtime: Skips, data: Batch, progress: Progress | None) -> None:
        super().__init__(runtime.model.hf, runtime.router)
        self.policy, self.runtime, self.data = policy, runtime, data
        self.teacher: Teacher | None = None
        if policy.distil and policy.steps:
            ids, mask = data.input_ids, data.attention_mask
            self.teacher = Teacher.collect(runtime.model.hf, ids, mask, batch=policy.batch, progress=progress)

    def loss(self, rows: list[int]) -> Tensor:
        """Return the loss of some rows."""
        some = self.data.take(rows)
        self.runtime.by_count = True
        logits, heard = self.runtime.listen(some)
        self.runtime.by_count = False
        policy = self.policy
        total = text_loss(logits, some, rows, lm=policy.lm, teacher=self.teacher, distil=policy.distil)
        for one in heard.values():
            chosen = F.cross_entropy(one.logits[one.real], (~one.gone[one.real]).long())
            total = total + policy.auxiliary * chosen
        return total
