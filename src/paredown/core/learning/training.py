"""Train a few parameters (gates, small convolutions, adapters) beside a base model that stays as it is.

- A :class:`Task` says what is learned and what the loss is; :func:`fit` runs it on ``transformers.Trainer``.
- The Trainer is given the learned module alone. It therefore saves, clips and zeroes nothing else, and neither moves
  the base model nor touches its config.
- Rows are taken in an order that depends on the seed alone, and only when their turn comes: a run that was killed goes
  on with the rows, the weights and the optimiser that it would have had.
- What the Trainer changes around itself (random state, accelerate's singletons) is put back.
"""

from __future__ import annotations

import contextlib
import importlib.util
import json
import math
import random
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Generic, TypeVar

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from paredown.core.checkpoint import quiet
from paredown.core.method import Progress
from paredown.errors import OutputError, UsageError

Row = TypeVar("Row")
_ABOUT = "training.json"
_WEIGHTS = "learned.safetensors"
_STATE = "trainer_state.json"


def constant(progress: float) -> float:
    """Return 1 throughout."""
    return 1.0


def linear(progress: float) -> float:
    """Fall from 1 at the start to 0 at the end."""
    return 1.0 - progress


@dataclass(frozen=True)
class Group:
    """Parameters trained alike: at ``rate`` times the learning rate, with weight decay ``decay`` (None: the run's)."""

    parameters: Sequence[nn.Parameter]
    rate: float = 1.0
    decay: float | None = None


@dataclass(frozen=True)
class Settings:
    """How long and how fast.

    Attributes
    ----------
    steps : optimiser steps
    lr : learning rate of AdamW, before ``schedule`` and a group's own rate
    batch : rows that are handed to the loss together
    accumulate : such batches in a step; their gradients are averaged
    schedule : factor on the learning rate, a function of progress (0 at the first step, towards 1 at the last)
    decay : weight decay of groups that name none
    clip : largest norm of the gradient; 0 for any
    seed : order of the rows, and whatever the loss draws
    save_every : steps between checkpoints, where there is a folder
    """

    steps: int
    lr: float
    batch: int = 1
    accumulate: int = 1
    schedule: Callable[[float], float] = constant
    decay: float = 0.0
    clip: float = 0.0
    betas: tuple[float, float] = (0.9, 0.999)
    seed: int = 0
    save_every: int = 100


@dataclass(frozen=True)
class Fitted:
    """How a run went: the loss of each step (since the very first, if it was resumed) and where it was taken up."""

    losses: tuple[float, ...]
    resumed_from: int = 0


class Task(Generic[Row]):
    """What is learned, and from which loss.

    Parameters
    ----------
    base : the model; in evaluation mode and frozen while training, except for what ``learned`` shares with it
    learned : a module that holds the parameters to be trained
    """

    def __init__(self, base: nn.Module, learned: nn.Module) -> None:
        self.base, self.learned = base, learned

    def groups(self) -> Sequence[Group]:
        """Return the learned parameters, divided by how they are trained; all alike by default."""
        return [Group(list(self.learned.parameters()))]

    def loss(self, rows: list[Row]) -> Tensor | Iterable[Tensor]:
        """Return the loss of ``rows``, or yield several whose sum it is.

        Each that is yielded is propagated back before the next is asked for, so a generator can read a long row chunk
        by chunk with memory for one: it carries over what it detached.
        """
        raise NotImplementedError

    def project(self) -> None:
        """Bring the parameters back to where they may be, after each step; called without gradients."""

    def about(self) -> dict[str, Any]:
        """Return what else two runs must share for one to go on where the other stopped, ready for JSON."""
        return {}


def fit(
    task: Task[Row],
    rows: Sequence[Row],
    settings: Settings,
    *,
    folder: str | Path | None = None,
    progress: Progress | None = None,
    what: str = "training",
) -> Fitted:
    """Train ``task.learned`` in place; the base model is left as it was, also after an exception.

    Parameters
    ----------
    task : parameters and loss
    rows : anything that can be indexed; ``rows[i]`` is asked for when its turn comes, each once before any twice
    settings : how long and how fast
    folder : where checkpoints go, and from where a killed run goes on; None writes nothing at all
    progress : called as ``progress(step, steps, text)`` after each step
    what : what ``text`` begins with

    Raises
    ------
    UsageError
        If there is nothing to learn, accelerate is missing, or the loss is not a number.
    OutputError
        If the folder belongs to another run.
    """
    if settings.steps <= 0:
        return Fitted(())
    if not len(rows) or not any(True for _ in task.learned.parameters()):
        raise UsageError(f"{what} needs at least one row and one parameter; give it data.")
    if importlib.util.find_spec("accelerate") is None:
        raise UsageError(f"{what} runs on transformers' Trainer, which needs accelerate; pip install accelerate.")
    place = None if folder is None else Path(folder)
    with _frozen(task), _around(), quiet(), torch.inference_mode(False), torch.enable_grad():
        trainer = _trainer(task, rows, settings, place, progress, what)
        checkpoint = None if place is None else _last_checkpoint(place, _about(task, rows, settings))
        resumed_from = 0 if checkpoint is None else _step_of(checkpoint)
        trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
        losses = tuple(entry["loss"] for entry in trainer.state.log_history if "loss" in entry)
    return Fitted(losses, resumed_from)


@contextlib.contextmanager
def _frozen(task: Task[Any]) -> Iterator[None]:
    """Freeze the base, put it in evaluation mode and the learned part in training mode; undo it all."""
    learned = {id(parameter) for parameter in task.learned.parameters()}
    parameters = [*task.base.parameters(), *task.learned.parameters()]
    wanted = [(parameter, parameter.requires_grad) for parameter in parameters]
    modes = [(module, module.training) for part in (task.base, task.learned) for module in part.modules()]
    try:
        task.base.eval()
        task.learned.train()
        for parameter in parameters:
            parameter.requires_grad_(id(parameter) in learned)
        yield
    finally:
        for parameter, before in wanted:
            parameter.requires_grad_(before)
            if id(parameter) in learned:
                parameter.grad = None
        for module, training in modes:
            module.training = training


@contextlib.contextmanager
def _around() -> Iterator[None]:
    """Put back random state and what accelerate shares between all its users."""
    from accelerate.state import AcceleratorState, GradientState, PartialState  # type: ignore[import-untyped]

    shared = [kind._shared_state for kind in (PartialState, AcceleratorState, GradientState)]
    before = [dict(state) for state in shared]
    draws, numbers = random.getstate(), np.random.get_state()
    with torch.random.fork_rng():
        try:
            yield
        finally:
            random.setstate(draws)
            np.random.set_state(numbers)
            for state, kept in zip(shared, before, strict=True):
                state.clear()
                state.update(kept)


class _Turns(Dataset[int]):
    """The numbers 0, 1, 2...: the rows themselves are looked up when they are used."""

    def __init__(self, count: int) -> None:
        self.count = count

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> int:
        return index


@dataclass
class _Order:
    """Which row comes when: one permutation after the other, each drawn from the seed and its number."""

    count: int
    seed: int
    round: int = -1
    current: list[int] = field(default_factory=list)

    def __getitem__(self, turn: int) -> int:
        number, at = divmod(turn, self.count)
        if number != self.round:
            self.round = number
            self.current = np.random.default_rng((self.seed, number)).permutation(self.count).tolist()
        return self.current[at]


class _Held(nn.Module):
    """What the Trainer takes for the model: the learned part, which stays on the device where it is."""

    def __init__(self, learned: nn.Module) -> None:
        super().__init__()
        self.learned = learned

    def forward(self) -> None:
        """The loss is the task's business."""

    def to(self, *args: Any, **kwargs: Any) -> _Held:
        """Stay."""
        return self


def _parts(loss: Tensor | Iterable[Tensor]) -> Generator[Tensor, None, None]:
    if isinstance(loss, Tensor):
        yield loss
    else:
        yield from loss


def _trainer(
    task: Task[Any],
    rows: Sequence[Any],
    settings: Settings,
    folder: Path | None,
    progress: Progress | None,
    what: str,
) -> Any:
    """Return a ``transformers.Trainer`` that is ready to train."""
    # Imported here: it takes a second, and looking at a policy that needs no training should not.
    from safetensors.torch import load_file, save_file
    from transformers import PrinterCallback, Trainer, TrainerCallback, TrainingArguments

    order = _Order(len(rows), settings.seed)

    class Arguments(TrainingArguments):  # type: ignore[misc]
        @property
        def should_save(self) -> bool:
            return folder is not None

    class Learner(Trainer):  # type: ignore[misc]
        spent = 0.0

        def get_train_dataloader(self) -> DataLoader[int]:
            return DataLoader(self.train_dataset, batch_size=settings.batch, collate_fn=list)

        def training_step(self, model: nn.Module, inputs: Any, num_items_in_batch: Any = None) -> Tensor:
            value = 0.0
            for part in _parts(task.loss([rows[order[turn]] for turn in inputs])):
                if part.requires_grad:
                    (part / settings.accumulate).backward()  # type: ignore[no-untyped-call]
                value += float(part.detach())
            if not math.isfinite(value):
                step = self.state.global_step + 1
                raise UsageError(f"the loss of {what} is {value} at step {step}; choose a smaller learning rate.")
            self.spent += value / settings.accumulate
            return torch.tensor(value / settings.accumulate)

        def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
            place = Path(output_dir or self.args.output_dir)
            place.mkdir(parents=True, exist_ok=True)
            state = {name: tensor.contiguous() for name, tensor in task.learned.state_dict().items()}
            save_file(state, place / _WEIGHTS)

        def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
            task.learned.load_state_dict(load_file(Path(resume_from_checkpoint) / _WEIGHTS))

    class Steps(TrainerCallback):  # type: ignore[misc]
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            with torch.no_grad():
                task.project()
            # The Trainer keeps its history in the checkpoint, so a resumed run knows the losses before it.
            state.log_history.append({"loss": learner.spent, "step": state.global_step})
            if progress is not None:
                progress(state.global_step, settings.steps, f"{what}; loss {learner.spent:.4g}")
            learner.spent = 0.0

    groups = [
        {
            "params": list(group.parameters),
            "lr": settings.lr * group.rate,
            "weight_decay": settings.decay if group.decay is None else group.decay,
        }
        for group in task.groups()
    ]
    optimiser = torch.optim.AdamW(groups, lr=settings.lr, betas=settings.betas, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimiser, lambda step: settings.schedule(step / settings.steps))
    arguments = Arguments(
        output_dir=str(folder) if folder is not None else "none",
        max_steps=settings.steps,
        per_device_train_batch_size=settings.batch,
        gradient_accumulation_steps=settings.accumulate,
        max_grad_norm=settings.clip,
        seed=settings.seed,
        save_strategy="no" if folder is None else "steps",
        save_steps=settings.save_every,
        save_total_limit=1,
        logging_strategy="no",
        report_to="none",
        disable_tqdm=True,
        dataloader_pin_memory=False,
        # Only where the Trainer keeps its books: it moves nothing, and makes no replicas on several GPUs.
        use_cpu=True,
    )
    learner = Learner(
        model=_Held(task.learned),
        args=arguments,
        train_dataset=_Turns(settings.steps * settings.accumulate * settings.batch),
        optimizers=(optimiser, schedule),
        callbacks=[Steps()],
    )
    learner.remove_callback(PrinterCallback)
    return learner


# Checkpoints.


def _about(task: Task[Any], rows: Sequence[Any], settings: Settings) -> dict[str, Any]:
    """Return what two runs must share for one to go on where the other stopped."""
    told = {name: value for name, value in asdict(settings).items() if name not in ("schedule", "save_every")}
    shapes = {name: list(tensor.shape) for name, tensor in task.learned.state_dict().items()}
    about: dict[str, Any] = json.loads(json.dumps({**told, "rows": len(rows), "parameters": shapes} | task.about()))
    return about


def _last_checkpoint(folder: Path, about: dict[str, Any]) -> Path | None:
    """Return the folder's last whole checkpoint, or None; note down in a new folder whose it is."""
    noted = folder / _ABOUT
    try:
        known = json.loads(noted.read_text(encoding="utf-8"))
    except FileNotFoundError:
        folder.mkdir(parents=True, exist_ok=True)
        noted.write_text(json.dumps(about), encoding="utf-8")
        return None
    except ValueError:
        known = None
    if known != about:
        raise OutputError(f"{folder} holds the training of another run; choose another folder or empty it.")
    # The state is written last: where it can be read, the checkpoint is whole.
    whole = [place for place in folder.glob("checkpoint-*") if _step_of(place)]
    return max(whole, key=_step_of, default=None)


def _step_of(checkpoint: Path) -> int:
    """Return the step at which a checkpoint was written, 0 if it is not whole."""
    try:
        return int(json.loads((checkpoint / _STATE).read_text(encoding="utf-8"))["global_step"])
    except (OSError, ValueError, KeyError):
        return 0
