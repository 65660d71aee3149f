"""Watch a training for lost pipeline stages, rebuild them, and let stages learn each other's work."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import TrainerCallback

from paredown.core.anatomy import resolve
from paredown.core.checkpoint import Model
from paredown.core.depth.rebuild import Stages
from paredown.errors import UsageError


@contextmanager
def swapping(model: Model, runs: Sequence[tuple[Sequence[int], Sequence[int]]]) -> Iterator[None]:
    """Let pairs of equal runs of blocks change places in every odd pass of the training; never in evaluation mode."""
    layers = resolve(model.hf, model.anatomy.language.layers)
    assert isinstance(layers, nn.ModuleList)
    plain, other = list(layers), list(layers)
    for first, second in runs:
        for i, j in zip(first, second, strict=True):
            other[i], other[j] = plain[j], plain[i]
    passes = 0

    def put(blocks: list[nn.Module]) -> None:
        for i, block in enumerate(blocks):
            layers[i] = block

    def before(module: nn.Module, args: Any) -> None:
        nonlocal passes
        if module.training:
            put(other if passes % 2 else plain)
            passes += 1

    def after(module: nn.Module, args: Any, output: Any) -> None:
        # At once: whoever saves or counts the blocks must find them in their places.
        put(plain)

    handles = [model.hf.register_forward_pre_hook(before), model.hf.register_forward_hook(after, always_call=True)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


class Recovery(TrainerCallback):  # type: ignore[misc]
    """Watches gradients while ``transformers.Trainer`` trains, and rebuilds stages that are lost.

    For one process that holds the whole model, not sharded. A rebuilt stage has its own group in the optimiser, so a
    Trainer that resumes from a checkpoint written behind a loss must be given such groups.

    Parameters
    ----------
    stages : of the model that is trained
    rebuild : gives a stage new weights, from its number and the norms of all stages; says how it did
    scale : factor on the learning rate of a stage that was rebuilt
    failures : probability that a step loses one of the stages 1 to n, to simulate it
    seed : fixes which one when
    clipped : take norms behind the Trainer's clipping, not before it

    Attributes
    ----------
    norms : of each stage's gradient at the last step, stage 0 first; 1 before the first
    history : step, stage and how it was rebuilt
    """

    def __init__(
        self,
        stages: Stages,
        rebuild: Callable[[int, list[float]], str],
        scale: float = 1.1,
        *,
        failures: float = 0.0,
        seed: int = 0,
        clipped: bool = False,
    ) -> None:
        self.stages, self.rebuild, self.scale = stages, rebuild, scale
        self.failures, self.seed, self._before = failures, seed, not clipped
        self.norms = [1.0] * (stages.n + 1)
        self.history: list[tuple[int, int, str]] = []
        self._lost: list[int] = []
        self._squares: dict[int, Tensor] = {}
        self._handles: list[Any] = []

    def lose(self, stage: int) -> None:
        """Say that a stage is lost: it is rebuilt at the end of the step.

        Raises
        ------
        UsageError
            If there is no such stage, or one beside it was lost in the same step.
        """
        self.stages.numbers(stage)
        if beside := [other for other in self._lost if other and stage and abs(other - stage) == 1]:
            raise UsageError(
                f"stages {min(stage, *beside)} and {max(stage, *beside)} were lost in one step and cannot be rebuilt "
                "from each other; go back to a checkpoint."
            )
        if stage not in self._lost:
            self._lost.append(stage)

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Watch every gradient as it is accumulated, that is before it is clipped."""

        def watch(parameter: Tensor) -> None:
            if parameter.grad is not None:
                self._squares[id(parameter)] = parameter.grad.detach().float().pow(2).sum()

        if self._before:
            watched = [p for stage in range(self.stages.n + 1) for p in self.stages.parameters(stage)]
            hooked: list[Any] = [p for p in watched if p.requires_grad]
            self._handles = [p.register_post_accumulate_grad_hook(watch) for p in hooked]

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Take the norms of this step."""
        for stage in range(self.stages.n + 1):
            parameters = [p for p in self.stages.parameters(stage) if p.grad is not None]
            if self._before:
                squares = [self._squares[id(p)] for p in parameters if id(p) in self._squares]
            else:
                squares = [p.grad.detach().float().pow(2).sum() for p in parameters if p.grad is not None]
            self.norms[stage] = float(torch.stack(squares).sum().sqrt()) if squares else 0.0
        self._squares.clear()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Rebuild what was lost in this step, or is lost by lot."""
        if self.failures:
            generator = torch.Generator().manual_seed(self.seed * 1_000_003 + state.global_step)
            if float(torch.rand((), generator=generator)) < self.failures and not self._lost:
                self.lose(1 + int(torch.randint(self.stages.n, (), generator=generator)))
        for stage in sorted(self._lost):
            self.recover(stage, kwargs["optimizer"], kwargs.get("lr_scheduler"), step=state.global_step)
        self._lost.clear()

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Stop watching."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    def recover(self, stage: int, optimiser: Any, scheduler: Any = None, *, step: int = 0) -> None:
        """Rebuild a stage now: weights, fresh moments, its own learning rate."""
        how = "replica"
        if stage:
            self.stages.wipe(stage)
            how = self.rebuild(stage, self.norms)
        # accelerate wraps both.
        optimiser = getattr(optimiser, "optimizer", optimiser)
        scheduler = getattr(scheduler, "scheduler", scheduler)
        for parameter in self.stages.parameters(stage):
            optimiser.state.pop(parameter, None)
        if stage:
            _rescale(optimiser, scheduler, self.stages.parameters(stage), stage, self.scale)
        self.history.append((step, stage, how))


def _rescale(optimiser: Any, scheduler: Any, parameters: list[nn.Parameter], stage: int, scale: float) -> None:
    """Give parameters groups of their own at ``scale`` times the rate, now and wherever the schedule takes it."""
    wanted = {id(p) for p in parameters}
    for index, group in enumerate(list(optimiser.param_groups)):
        own = [p for p in group["params"] if id(p) in wanted]
        if not own or group.get("rebuilt") == stage:
            continue
        group["params"] = [p for p in group["params"] if id(p) not in wanted]
        added = {k: v for k, v in group.items() if k != "params"} | {"params": own, "rebuilt": stage}
        for rate in ("lr", "initial_lr"):
            if rate in added:
                added[rate] = added[rate] * scale
        optimiser.add_param_group(added)
        if scheduler is not None and hasattr(scheduler, "base_lrs"):
            if not hasattr(scheduler, "lr_lambdas"):
                raise UsageError(
                    f"Paredown cannot give a stage its own rate under a {type(scheduler).__name__}; use one of "
                    "transformers' schedules, or a LambdaLR."
                )
            scheduler.base_lrs.append(scheduler.base_lrs[index] * scale)
            scheduler.lr_lambdas.append(scheduler.lr_lambdas[index])
            scheduler._last_lr.append(added["lr"])
