"""What it costs to run a few blocks side by side instead of one after the other, measured without building the model.

For a run of blocks and calibration text: the *local error* ``mean ||y - x_out|| / ||x_out - x||`` over tokens, where
``x`` enters the run, ``x_out`` leaves it as it is and ``y`` leaves the wide block that would stand for it (see
`fusion`); and the KL of the whole model's predictions to those of the teacher. A batch passes the blocks before a run
once for all runs.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from paredown.core.checkpoint import Model
from paredown.core.depth import fusion
from paredown.core.learning.teacher import Teacher, real_predictions


@dataclass(frozen=True)
class Damage:
    """What running blocks side by side did: ``error`` at the run, ``kl`` of the whole model (nats a token)."""

    error: float
    kl: float


class Rehearsal:
    """A model whose chosen runs act as if they were fused.

    Parameters
    ----------
    model : left as it is
    ids, mask : calibration rows ``[N, T]``; the mask may be None
    teacher : the logits to which the KL is taken; None measures local errors alone
    batch : rows run together
    """

    def __init__(self, model: Model, ids: Tensor, mask: Tensor | None, teacher: Teacher | None, batch: int) -> None:
        self.model, self.ids, self.mask, self.teacher, self.batch = model, ids, mask, teacher, batch
        self.chosen: dict[range, nn.Module] = {}
        tower = model.anatomy.language
        self._parts = tower.blocks
        self._modules = [model.hf.get_submodule(part.path) for part in tower.blocks]

    def wide(self, run: range) -> nn.Module:
        """Return the wide block that would stand for a run."""
        return fusion.wide([self._modules[i] for i in run], [self._parts[i] for i in run])

    def choose(self, run: range) -> None:
        """Let a run act fused from now on."""
        self.chosen[run] = self.wide(run)

    @torch.no_grad()
    def measure(self, runs: Sequence[range], tell: Callable[[int, int], None] | None = None) -> dict[range, Damage]:
        """Return the damage of each run beside those that are chosen; none of ``runs`` may touch these.

        ``range(0)``, the empty run, stands for the model with the chosen runs alone.
        """
        errors, divergences = dict.fromkeys(runs, 0.0), dict.fromkeys(runs, 0.0)
        tokens, predictions = 0.0, 0
        starts = range(0, len(self.ids), self.batch)
        for done, start in enumerate(starts):
            if tell is not None:
                tell(done, len(starts))
            rows = list(range(start, min(start + self.batch, len(self.ids))))
            real = None if self.mask is None else self.mask[rows].bool()
            states, calls, logits = self._pass(rows)
            tokens += len(rows) * self.ids.shape[1] if real is None else float(real.sum())
            predictions += int(real_predictions(self.ids[rows], real).sum())
            for run in runs:
                if not run:
                    divergences[run] += self._divergence(logits, rows)
                    continue
                out = _stream(self.wide(run)(states[run.start], **calls[run.start]))
                errors[run] += _relative(states[run.start], states[run.stop], out, real)
                if self.teacher is not None:
                    divergences[run] += self._divergence(self._rest(rows, run, out), rows)
        return {run: Damage(errors[run] / max(tokens, 1), divergences[run] / max(predictions, 1)) for run in runs}

    def _divergence(self, logits: Tensor, rows: list[int]) -> float:
        return 0.0 if self.teacher is None else float(self.teacher.kl(logits, rows).double().sum())

    def _pass(self, rows: list[int]) -> tuple[list[Tensor], list[dict[str, Any]], Tensor]:
        """Run the model with its chosen runs; return what enters each block (and leaves the last), and the logits."""
        states: list[Tensor] = []
        calls: list[dict[str, Any]] = []

        def enter(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            states.append(args[0] if args else kwargs["hidden_states"])
            calls.append({name: value for name, value in kwargs.items() if name != "hidden_states"})

        handles = [module.register_forward_pre_hook(enter, with_kwargs=True) for module in self._modules]
        handles.append(self._modules[-1].register_forward_hook(lambda _, __, out: states.append(_stream(out))))
        try:
            logits = self._logits(rows, {})
        finally:
            for handle in handles:
                handle.remove()
        return states, calls, logits

    def _rest(self, rows: list[int], run: range, out: Tensor) -> Tensor:
        """Return the logits when ``out`` leaves the run; what comes before it is not computed again."""
        before = dict.fromkeys(range(run.stop - 1), _pass_on)
        return self._logits(rows, {**before, run.stop - 1: lambda *_, **__: out})

    def _logits(self, rows: list[int], others: Mapping[int, Any]) -> Tensor:
        forwards: dict[int, Any] = {}
        for run, module in self.chosen.items():
            forwards |= dict.fromkeys(run, _pass_on)
            forwards[run.start] = module.forward
        device = next(self.model.hf.parameters()).device
        told: dict[str, Any] = {"input_ids": self.ids[rows].to(device), "use_cache": False}
        if self.mask is not None:
            told["attention_mask"] = self.mask[rows].long().to(device)
        with fusion.replaced(self.model.hf, self.model.anatomy.language, {**forwards, **others}):
            logits = self.model.hf(**told).logits
        assert isinstance(logits, Tensor)
        return logits


def _stream(output: Any) -> Tensor:
    hidden = output[0] if isinstance(output, tuple) else output
    assert isinstance(hidden, Tensor)
    return hidden


def _pass_on(*args: Any, **kwargs: Any) -> Any:
    return args[0] if args else kwargs["hidden_states"]


def _relative(start: Tensor, end: Tensor, out: Tensor, real: Tensor | None) -> float:
    """Return the sum over real tokens of ``||out - end|| / ||end - start||``."""
    moved = (end.float() - start.float()).norm(dim=-1).clamp_min(1e-12)
    ratio = (out.float() - end.float()).norm(dim=-1) / moved
    return float((ratio if real is None else ratio[real.to(ratio.device)]).double().sum())
