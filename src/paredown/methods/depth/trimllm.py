"""TrimLLM: drop sub-layers one by one and train between the drops.

Source: "TrimLLM: Progressive Layer Dropping for Domain-Specific LLMs", 2024, arXiv 2412.11242; official code
snyhlxde1/TrimLLM. One round, until the budget is spent; then ``final_steps`` more of training:

1. Train for ``steps`` (an epoch there).
2. Bypass each kept attention and each kept MLP alone and predict the next tokens of a scan set, which is never trained
   on. ``by``: accuracy as in the paper, or the loss (inferred as the finer option).
3. Best attention and best MLP: the best result without it. Ties: ``activation``, the largest Frobenius norm of the mean
   output; ``naive``, the first; ``smooth``, no ties but the smallest sum (inferred) of
   ``(100 - a) / ((1 + d^2) + (1 + d) a)`` and ``100 * min_j ||x_j|| / ||x_i||``, with the accuracy ``a`` in percent.
4. The attention goes if it is strictly better, else the MLP.

Sparse update: before all, blocks are judged by the sum of the results without their attention and without their MLP;
the share ``frozen`` that is best done without is not trained. Embeddings, final norm and head are trained (ours).

Different from the official code, on purpose: a block without attention is ``h + MLP(norm(h))`` (theirs feeds the
normalised input on as the stream); frozen weights are really frozen; by the loss, the least loss wins (theirs takes the
largest perplexity). The optimiser starts anew after each drop. While the model trains, what was dropped is bypassed; it
is deleted at the end. ``when="once"`` spends the whole budget before any training, one sub-layer after the other, and
then trains for as many steps: what the rounds are to be compared with.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from pydantic import Field
from safetensors.torch import load_file

from paredown.core import budget, surgery
from paredown.core.anatomy import Block
from paredown.core.calibration import Batch
from paredown.core.checkpoint import Model, below
from paredown.core.depth import bypass
from paredown.core.depth.bypass import Effect
from paredown.core.depth.gates import Gates, Unit, drops, gated, units
from paredown.core.durable import write_json, write_tensors
from paredown.core.edits import Edit
from paredown.core.learning import healing, training
from paredown.core.method import WholeModelCompressor, register
from paredown.core.session import Session
from paredown.errors import DataError, OutputError

_STATE = "trimllm.json"


class _Trim(WholeModelCompressor):
    """What the method and its random control share: rounds of training and dropping."""

    axis = "depth"
    unit = "sub-layers, healed"
    needs = ("calibration-data", "training")

    steps: int = Field(50, ge=0, description="Training steps before each drop.")
    final_steps: int = Field(100, ge=0, description="Training steps behind the last drop.")
    lr: float = Field(2e-5, gt=0, description="Learning rate of AdamW; constant, and falling to 0 in the final steps.")
    batch: int = Field(4, ge=1, description="Rows in a step.")
    scan: int = Field(50, ge=1, description="Rows to scan, at most a quarter of all; they are not trained on.")
    frozen: float = Field(0.5, ge=0, lt=1, description="Share of the blocks that is not trained; 0.75 was best there.")
    by: Literal["accuracy", "loss"] = Field("accuracy", description="What a scan measures on the next tokens.")
    when: Literal["rounds", "once"] = Field("rounds", description="Train between the drops, or drop all first.")

    def applies(self, part: Block) -> bool:
        """Whether the block has a residual sub-layer."""
        return bool(units([part]))

    def foretell(self, blocks: Sequence[Block]) -> list[Edit]:
        """Return as many drops as there will be, from the last block on; which they are is not known."""
        listed = units(blocks)
        return drops(listed[len(listed) - budget.removed(len(listed), self.keep) :])

    def passes(self, blocks: Sequence[Block]) -> float:
        """Return the passes of a run on 64 rows, a quarter of them scanned."""
        count = len(units(blocks))
        drops = budget.removed(count, self.keep)
        scans = sum(count - i for i in range(drops)) + (count if self.frozen else 0)
        return scans / 4 + 3 * (drops * self.steps + self.final_steps) * self.batch / 64

    @property
    def sizes_vary(self) -> bool:
        """Attention and MLP are of unequal size, and which of them go shows in the rounds."""
        return True

    def transform(self, model: Model, data: Batch | None, session: Session) -> list[Edit]:
        """Train and drop in turns, then delete what was dropped."""
        if data is None or len(data) < 2:
            raise DataError(f"{self.name} needs rows to train on and others to scan; give it two at least.")
        with healing.widened(model), gated(model) as gates:
            work = _Work(self, model, gates, *_divided(data, self.scan), session)
            work.carry_out()
        edits = drops(work.dropped)
        model.anatomy = surgery.apply_model(model.hf, model.anatomy, edits)
        session.coverage |= {
            "dropped": [list(unit) for unit in work.dropped],
            "frozen_blocks": list(work.frozen),
            "rounds": work.told,
        }
        return edits

    def chosen(self, work: _Work) -> tuple[Unit, dict[str, float]]:
        """Return which of the kept sub-layers goes next, and what is worth knowing about it."""
        raise NotImplementedError


@register
class TrimLLM(_Trim):
    """Drops sub-layers one by one while it trains on the calibration text: each time the one least missed by then.

    Between drops the others take over what is still needed. It is as good as the text is long and like what the model
    is for; knowledge that the text does not ask for goes. Give it rows in the hundreds.
    """

    name = "trimllm"
    title = "TrimLLM: Progressive Layer Dropping for Domain-Specific LLMs"
    year = 2024
    arxiv = "2412.11242"

    tie: Literal["activation", "naive", "smooth"] = Field("activation", description="Which of equals goes.")
    mix: float = Field(0.0, ge=0, description="The d of tie=smooth: the larger, the less the accuracy counts.")

    def chosen(self, work: _Work) -> tuple[Unit, dict[str, float]]:
        """Scan, and return the sub-layer that the model is best without."""
        effects = work.look()
        norms: Mapping[Unit, float] = {}
        if self.tie != "naive":
            norms = bypass.output_norms(work.model, work.scan, work.kept)
        best = choose(effects, norms, by=self.by, tie=self.tie, mix=self.mix)
        return best, {"loss": round(effects[best].loss, 5), "accuracy": round(effects[best].accuracy, 5)}


@register
class RandomTrimLLM(_Trim):
    """Drops randomly chosen sub-layers one by one, with the same training; what TrimLLM must beat."""

    name = "random-trimllm"
    title = "Random control: sub-layers, with training between the drops"
    control: ClassVar[bool] = True

    def chosen(self, work: _Work) -> tuple[Unit, dict[str, float]]:
        """Draw."""
        generator = torch.Generator().manual_seed(work.session.seed * 10_007 + len(work.dropped))
        return work.kept[int(torch.randint(len(work.kept), (), generator=generator))], {}


def choose(
    effects: Mapping[Unit, Effect],
    norms: Mapping[Unit, float],
    *,
    by: str = "accuracy",
    tie: str = "activation",
    mix: float = 0.0,
) -> Unit:
    """Return which sub-layer goes, by the rules in the module's docstring.

    Parameters
    ----------
    effects : how the model does without each candidate; all of them, in the order in which the first is first
    norms : of their mean outputs; needed unless ``tie`` is ``naive``
    """
    if tie == "smooth":
        least = min(norms.values())
        values = {u: -_smooth(100 * effects[u].accuracy, mix) - 100 * least / max(norms[u], 1e-30) for u in effects}
    else:
        values = {unit: effect.score(by) for unit, effect in effects.items()}

    def best(kind: str) -> Unit | None:
        own = [unit for unit in effects if unit[1] == kind]
        highest = max((values[unit] for unit in own), default=0.0)
        tied = [unit for unit in own if values[unit] == highest]
        # max() takes the first of equals.
        return max(tied, key=lambda unit: norms[unit] if tie == "activation" else 0.0) if tied else None

    attention, mlp = best("attention"), best("mlp")
    if attention is None or mlp is None:
        one = attention or mlp
        assert one is not None
        return one
    return attention if values[attention] > values[mlp] else mlp


def _smooth(accuracy: float, d: float) -> float:
    return (100 - accuracy) / ((1 + d * d) + (1 + d) * accuracy)


@dataclass
class _Work:
    """One run: what was dropped so far, and the model trained so far, both also on disk."""

    method: _Trim
    model: Model
    gates: Gates
    train: Batch
    scan: Batch
    session: Session
    dropped: list[Unit] = field(default_factory=list)
    frozen: tuple[int, ...] = ()
    told: list[dict[str, Any]] = field(default_factory=list)
    start: str = ""

    def __post_init__(self) -> None:
        """Count the budget in the model as it is."""
        self.all = units(self.model.anatomy.language.blocks)
        self.budget = budget.removed(len(self.all), self.method.keep)

    @property
    def kept(self) -> list[Unit]:
        """What may still go."""
        return [unit for unit in self.all if unit not in self.dropped]

    def carry_out(self) -> None:
        """Go through the rounds, from where a run that was killed stood."""
        method, once = self.method, self.method.when == "once"
        if not self._resume():
            if method.frozen:
                blocks = self.model.anatomy.language.blocks
                self.frozen = bypass.frozen(blocks, self.look(), method.frozen, method.by)
            self._keep()
        while len(self.dropped) < self.budget:
            if not once:
                self._train(f"round-{len(self.dropped)}", method.steps, training.constant)
            with self.session.timed("scan"):
                unit, about = method.chosen(self)
            self.dropped.append(unit)
            self.told.append({"layer": unit[0], "part": unit[1], **about})
            self.gates.drop(self.dropped)
            self._keep()
        if once:
            self._train("whole", method.steps * self.budget, training.constant)
        self._train("final", method.final_steps, training.linear)

    def look(self) -> dict[Unit, Effect]:
        """Return how the model does without each of those that are kept."""
        title = f"{self.method.name}: scan {len(self.dropped) + 1}"

        def tell(done: int, total: int) -> None:
            self.session.tell(done, total, title)

        return bypass.scan(self.model, self.gates, self.scan, self.kept, self.dropped, tell=tell)

    def trained(self) -> dict[str, torch.nn.Parameter]:
        """Return the weights that are trained: none of frozen blocks, none of what was dropped."""
        blocks = {block.index: block for block in self.model.anatomy.language.blocks}
        still = tuple(blocks[i].path for i in self.frozen)
        for layer, kind in self.dropped:
            block = blocks[layer]
            part: Any = block.attention if kind == "attention" else block.mlp or block.experts
            still += tuple(f"{block.path}.{path}" for path in (part.path, *part.norms))
        every = healing.parameters(self.model, "all")
        return {name: parameter for name, parameter in every.items() if not below(name, still)}

    def _train(self, name: str, steps: int, schedule: Any) -> None:
        place = self.session.place(name)
        with self.session.timed("train"):
            fitted = healing.heal(
                self.model,
                self.train,
                steps=steps,
                lr=self.method.lr,
                batch=self.method.batch,
                trainable=self.trained().__contains__,
                schedule=schedule,
                # Another order of rows in each round, else all rounds would begin with the same few.
                seed=self.session.seed * 10_007 + len(self.dropped),
                folder=place,
                progress=self.session.progress,
                what=f"{self.method.name}, {name}",
            )
        if fitted.losses:
            self.told.append({"trained": name, "loss": round(sum(fitted.losses[-10:]) / len(fitted.losses[-10:]), 5)})

    # What a killed run goes on from: the list of drops, and the weights as they were behind the last one.

    def _about(self) -> dict[str, Any]:
        told = self.method.model_dump(mode="json")
        return {"fields": told, "seed": self.session.seed, "train": self.train.fingerprint, "start": self.start}

    def _keep(self) -> None:
        if (folder := self.session.folder) is None:
            return
        folder.mkdir(parents=True, exist_ok=True)
        number = len(self.dropped)
        if self.method.when == "rounds" and number:
            write_tensors(folder / f"weights-{number}.safetensors", _weights(self.model))
        state = {"dropped": self.dropped, "frozen": self.frozen, "told": self.told, "about": self._about()}
        write_json(folder / _STATE, state)
        for old in [*folder.glob("weights-*.safetensors"), *folder.glob("round-*")]:
            if old.name != f"weights-{number}.safetensors":
                shutil.rmtree(old) if old.is_dir() else old.unlink()

    def _resume(self) -> bool:
        if (folder := self.session.folder) is None:
            return False
        self.start = healing.digest(self.model.hf)
        try:
            known = json.loads((folder / _STATE).read_text(encoding="utf-8"))
        except FileNotFoundError:
            return False
        except ValueError:
            known = {}
        if known.get("about") != self._about():
            raise OutputError(f"{folder} holds the work of another run; choose another folder or empty it.")
        self.dropped = [(layer, kind) for layer, kind in known["dropped"]]
        self.frozen, self.told = tuple(known["frozen"]), known["told"]
        if (file := folder / f"weights-{len(self.dropped)}.safetensors").exists():
            _put_back(self.model, file)
        self.gates.drop(self.dropped)
        return True


def _weights(model: Model) -> dict[str, torch.Tensor]:
    return {name: parameter.detach() for name, parameter in model.hf.named_parameters()}


@torch.no_grad()
def _put_back(model: Model, file: Path) -> None:
    stored = load_file(file)
    for name, parameter in model.hf.named_parameters():
        parameter.copy_(stored[name])


def _divided(data: Batch, scan: int) -> tuple[Batch, Batch]:
    """Return rows to train on and rows to scan, the last ones: they are in no order."""
    count = max(1, min(scan, len(data) // 4))
    return data.take(slice(0, len(data) - count)), data.take(slice(len(data) - count, None))
