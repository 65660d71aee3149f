"""RMoE: routers that remember, from layer to layer, where a token went before.

Source: "Layerwise Recurrent Router for Mixture-of-Experts", 2024, arXiv 2408.06793; official code qiuzh20/RMoE. The
paper trains models with such routers from scratch. The retrofit on a trained model is (inferred) here throughout:

- The recurrent router is a correction: ``logits = G h + W2 r_l`` with ``r_l = GRU(W1_l h, r_{l-1})`` and ``W2 = 0`` at
  the start, where every bit is the old model's. The host's own rules make choices and weights of the logits: groups,
  correction bias and normalisation stay as they are.
- Layers without experts, and routers that stay, carry ``r`` along unchanged.
- What is trained is the correction alone, with KL to a teacher, the next-token loss and the balance loss. The paper's
  loss is the last two. All of it is fp32, since small differences flip a choice.
- The published cell hands its config to ``nn.Module``, which fails, and its first-layer weights are never initialised;
  nothing of that is taken over.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from paredown.core import budget, checkpoint, forward
from paredown.core.attach import attach_runtimes
from paredown.core.calibration import Batch
from paredown.core.checkpoint import Model
from paredown.core.experts import routing
from paredown.core.learning import learned, training
from paredown.core.learning.objective import text_loss
from paredown.core.learning.teacher import Teacher
from paredown.core.method import Place, Policy, Progress, register
from paredown.core.runtime import Pass, Runtime
from paredown.errors import ArchitectureError, PolicyError

_FILE = "routers.safetensors"
_MEMORY = "rmoe.memory"
MEASURED_ROWS = 8
"""Calibration rows on which entropy and mutual information are measured."""


@register
class RMoE(Policy):
    """Give routers a memory of where each token was sent in the layers below, trained beside the frozen model.

    Nothing is removed: it is a repair for routers whose experts were dropped or merged, or a router replacement. One
    recurrent cell serves all layers, token by token, from the first layer with experts to the last; nothing is handed
    from one position to the next, so caches and generation stay as they are. ``keep`` is the share of routers that stay
    as they are (the lowest). ``prepare`` trains the correction and writes it to a file; with ``steps=0`` it is zero and
    every bit stays. ``cell="linear"`` trains the linear routers instead.

    In a recipe the teacher is the model that the recipe began with; else it is the model as it is, and the next-token
    loss leads.
    """

    name: ClassVar[str] = "rmoe"
    title: ClassVar[str] = "Layerwise Recurrent Router for Mixture-of-Experts"
    year: ClassVar[int | None] = 2024
    arxiv: ClassVar[str | None] = "2408.06793"
    axis: ClassVar = "experts"
    unit: ClassVar[str] = "routers"
    needs: ClassVar[tuple[str, ...]] = ("calibration-data", "training")
    places: ClassVar[frozenset[Place]] = frozenset({"routers"})
    learns_memory: ClassVar[bool] = True
    """Whether the memory is trained, or only what is read from it."""

    keep: float = Field(0.0, ge=0, le=1, description="Share of the routers that stay as they are; 1 changes nothing.")
    cell: Literal["gru", "rnn", "linear"] = Field(
        "gru", description="Recurrent cell; linear has no memory and trains the old routers."
    )
    width: int = Field(256, ge=1, description="Dimensions of the memory.")
    steps: int = Field(500, ge=0, description="Training steps.")
    lr: float = Field(1e-3, gt=0, description="Learning rate.")
    batch: int = Field(4, ge=1, description="Rows in a training step.")
    balance: float = Field(0.001, ge=0, description="Weight of the pooled balance loss, which is k at best.")
    distil: float = Field(1.0, ge=0, description="Weight of the KL to the teacher's logits.")
    lm: float | None = Field(
        None, ge=0, description="Weight of the next-token loss; by default 1 where no other model teaches, else 0."
    )
    teacher: str | None = Field(
        None, description="Model whose logits teach; by default the recipe's first one, else the model as it is."
    )
    weights: str | None = Field(None, description="File of the trained correction; made by prepare.")
    measured: tuple[tuple[str, float], ...] = Field(
        (), description="Load entropy, mutual information of adjacent layers and losses; made by prepare."
    )

    def runtime(self, model: Model) -> Runtime:
        if self.weights is None:
            raise PolicyError(
                f"{self.name} has trained no routers for {type(model.hf).__name__} yet; call prepare with calibration "
                "data first."
            )
        return Routers(self, model, self._load(model, Path(self.weights)))

    def prepare(
        self,
        model: Model,
        data: Batch | None,
        *,
        seed: int = 0,
        folder: str | None = None,
        progress: Progress | None = None,
    ) -> RMoE:
        """Return the policy with a trained correction. Weights that were given stay."""
        if self.inert or self.weights is not None:
            return self
        data = learned.text(self.name, data)
        folder = learned.place(self.name, folder, what="routers")
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            correction = self._fresh(model)
        runtime = Routers(self, model, correction)
        sample = data.take(slice(MEASURED_ROWS))
        before = _spread(model, sample)
        task = _Training(self, runtime, data, self._taught(model, data, progress))
        settings = training.Settings(steps=self.steps, lr=self.lr, batch=self.batch, seed=seed, clip=1.0)
        with attach_runtimes(model, [runtime]):
            fitted = learned.fit(task, range(len(data)), settings, folder=folder, progress=progress, what=self.name)
            after = _spread(model, sample)
        weights = learned.keep(correction.state_dict(), folder, _FILE)
        told = {f"{what} before": value for what, value in before.items()}
        told |= {f"{what} after": value for what, value in after.items()}
        told |= learned.ends(fitted.losses)
        return self.model_copy(update={"weights": weights, "measured": tuple(told.items())})

    def changed(self, model: Model) -> list[int]:
        """Return the layers whose routers are corrected: the highest, all but the share that stays.

        Raises
        ------
        ArchitectureError
            If the model has no routed experts.
        """
        found = routing.layers(model)
        if not found:
            raise ArchitectureError(
                f"{self.name} trains {self.unit} of experts, and {type(model.hf).__name__} has none; `paredown scan` "
                "shows what it has."
            )
        return found[len(found) - budget.removed(len(found), self.keep) :]

    def _fresh(self, model: Model) -> Correction:
        sizes = {}
        for layer in self.changed(model):
            weight: Any = routing.router(model, layer).weight
            sizes[layer] = (int(weight.shape[1]), int(weight.shape[0]))
        return Correction(sizes, self.width, self.cell).to(model.hf.device)

    def _load(self, model: Model, place: Path) -> Correction:
        with torch.random.fork_rng():
            correction = self._fresh(model)
        learned.restore(
            correction,
            place,
            device=str(model.hf.device),
            unreadable=f"{place} holds no routers that can be read ({{}}); prepare them again.",
            foreign=f"the routers in {place} were trained for another model, cell, width or keep; prepare them again.",
        )
        return correction

    def _taught(self, model: Model, data: Batch, progress: Progress | None) -> Teacher | None:
        if not self.distil or not self.steps:
            return None
        ref = self._another(model)
        if ref is None:
            return Teacher.collect(model.hf, data.input_ids, data.attention_mask, batch=self.batch, progress=progress)
        other = checkpoint.load(ref, dtype=model.hf.dtype, device=str(model.hf.device), policies=False)
        if other.hf.config.get_text_config().vocab_size != model.hf.config.get_text_config().vocab_size:
            raise PolicyError(f"the teacher {ref} has another vocabulary than the model; name one with the same.")
        return Teacher.collect(other.hf, data.input_ids, data.attention_mask, batch=self.batch, progress=progress)

    def _another(self, model: Model) -> str | Path | None:
        return model.original if self.teacher is None else self.teacher

    def next_token(self, model: Model) -> float:
        """Return the weight of the next-token loss."""
        if self.lm is not None:
            return self.lm
        return 1.0 if self._another(model) is None or not self.distil else 0.0


@register
class RandomRouters(RMoE):
    """Give routers a memory that stays as it was drawn, and train only what is read from it.

    A control for ``rmoe``: same cell, same training, same steps. What it does not do is learn what to remember.
    """

    name: ClassVar[str] = "random-routers"
    title: ClassVar[str] = "Random control: routers with a memory that is not trained"
    year: ClassVar[int | None] = None
    arxiv: ClassVar[str | None] = None
    control: ClassVar[bool] = True
    learns_memory: ClassVar[bool] = False


class Correction(nn.Module):
    """What is added to the logits of some layers' routers, in fp32; zero at first.

    Parameters
    ----------
    sizes : for each layer, what its router reads (``d``) and its experts (``E``)
    width : dimensions ``p`` of the memory
    cell : ``gru``, ``rnn``, or ``linear`` for none
    """

    def __init__(self, sizes: dict[int, tuple[int, int]], width: int, cell: str) -> None:
        super().__init__()
        self.width = width
        self.cell: nn.GRUCell | nn.RNNCell | None = None
        self.read = nn.ModuleDict()
        if cell != "linear":
            self.cell = nn.GRUCell(width, width) if cell == "gru" else nn.RNNCell(width, width)
            self.read.update({str(layer): nn.Linear(d, width, bias=False) for layer, (d, _) in sizes.items()})
        self.write = nn.ModuleDict(
            {str(i): nn.Linear(d if cell == "linear" else width, e, bias=False) for i, (d, e) in sizes.items()}
        )
        for parameter in self.write.parameters():
            nn.init.zeros_(parameter)

    def forward(self, layer: int, hidden: Tensor, memory: Tensor) -> tuple[Tensor, Tensor]:
        """Return what is added, ``[n, E]``, and the memory after the layer, from ``[n, d]`` and ``[n, p]``."""
        write, hidden = self.write[str(layer)], hidden.float()
        if self.cell is None:
            return write(hidden), memory
        memory = self.cell(self.read[str(layer)](hidden), memory)
        return write(memory), memory


class Routers(Runtime):
    """Adds a correction to routers.

    Attributes
    ----------
    heard : the logits of all layers of the last pass, while ``listening``
    """

    policy: RMoE

    def __init__(self, policy: RMoE, model: Model, correction: Correction) -> None:
        super().__init__(policy, model)
        self.correction = correction
        self.layers = set(policy.changed(model))
        self.listening, self.heard = False, list[Tensor]()

    def begin(self, now: Pass) -> None:
        self.heard = []

    def route(self, layer: int, hidden: Tensor, logits: Tensor, now: Pass, rows: Tensor | None) -> Tensor:
        if layer in self.layers:
            added, memory = self.correction(layer, hidden, self._memory(now, rows, hidden))
            self._keep(now, rows, memory)
            logits = logits + added.to(logits.dtype)
        if self.listening:
            self.heard.append(logits)
        return logits

    def _memory(self, now: Pass, rows: Tensor | None, hidden: Tensor) -> Tensor:
        """Return the rows' memory ``[B * n, p]``; zero at the first layer, and for tokens of earlier passes."""
        width = self.correction.width
        held: Tensor | None = now.memo.get(_MEMORY)
        if held is None:
            held = now.memo[_MEMORY] = hidden.new_zeros((now.batch, now.length, width), dtype=torch.float32)
        if rows is None:
            return held.reshape(-1, width)
        at = rows - now.past
        found = held.gather(1, at.clamp_min(0)[..., None].expand(-1, -1, width))
        return found.masked_fill((at < 0)[..., None], 0.0).reshape(-1, width)

    def _keep(self, now: Pass, rows: Tensor | None, memory: Tensor) -> None:
        if rows is None:
            now.memo[_MEMORY] = memory.view(now.batch, now.length, -1)
            return
        at = rows - now.past
        batch = torch.arange(now.batch, device=rows.device)[:, None].expand_as(at)
        held = now.memo[_MEMORY].clone()
        held[batch[at >= 0], at[at >= 0]] = memory.view(*rows.shape, -1)[at >= 0]
        now.memo[_MEMORY] = held


class _Training(training.Task[int]):
    """KL to the teacher, next-token loss and balance loss, on rows of the calibration data."""

    def __init__(self, policy: RMoE, runtime: Routers, data: Batch, teacher: Teacher | None) -> None:
        super().__init__(runtime.model.hf, runtime.correction)
        self.hf: Any = runtime.model.hf
        self.policy, self.runtime, self.data, self.teacher = policy, runtime, data, teacher
        self.lm = policy.next_token(runtime.model)

    def groups(self) -> Sequence[training.Group]:
        correction = self.runtime.correction
        return [training.Group(list((correction if self.policy.learns_memory else correction.write).parameters()))]

    def loss(self, rows: list[int]) -> Tensor:
        some = self.data.take(rows)
        self.runtime.listening = True
        try:
            logits = forward.logits(self.hf, some.input_ids, some.attention_mask)
        finally:
            self.runtime.listening = False
        heard, self.runtime.heard = self.runtime.heard, []
        top_k = max(part.experts.top_k for part in self.runtime.model.anatomy.language.blocks if part.experts)
        real = None if some.attention_mask is None else some.attention_mask.flatten().bool().to(logits.device)
        text = text_loss(logits, some, rows, lm=self.lm, teacher=self.teacher, distil=self.policy.distil)
        return text + self.policy.balance * routing.balance(heard, top_k, real)


def _spread(model: Model, data: Batch) -> dict[str, float]:
    sent = routing.traffic(model, data.input_ids, data.attention_mask)
    return dict(zip(("load entropy", "mutual information"), routing.spread(model, sent), strict=True))
