"""CheckFree: a stage is lost in the middle of a training, and the loss at once and fifty steps later."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainerCallback, TrainingArguments
from transformers.trainer_callback import PrinterCallback

from benchmarks.common import Frozen, Result, Spread, result, rows_of, say
from paredown.core import checkpoint
from paredown.core.checkpoint import Model, quiet
from paredown.methods.depth.checkfree import CheckFree, RandomCheckFree

QUESTION = "How much does a model lose with a pipeline stage, and how much of it is there again after 50 steps?"
GOAL = "the weighted mean below a new start, at once and later, in all five seeds"
BED, LENGTH, ROWS, HELD = "testbed:lm", 64, 512, 32
WIDTH, LAYERS, STAGES, BATCH = 64, 8, 4, 16
AFTER, SEEDS = 50, 5
Method = CheckFree | RandomCheckFree
ARMS: dict[str, Method] = {
    "weighted mean": CheckFree(stages=STAGES),
    "plain mean": CheckFree(stages=STAGES, weights="equal"),
    "copy of the stage before": CheckFree(stages=STAGES, inner="copy"),
    "random weights": RandomCheckFree(stages=STAGES),
}


@dataclass(frozen=True)
class Start:
    """What is trained when a stage is lost: from which weights, for how many steps before, at which rate."""

    title: str
    stages: tuple[int, ...]
    before: int
    rate: float
    trained: bool = False
    swaps: bool = False

    def model(self, seed: int) -> Model:
        """Return it as it is before the training."""
        return _trained() if self.trained else _fresh(seed)


STARTS = (
    Start("from nothing", (1,), 300, 2e-3),
    Start("from nothing, with swaps", (1,), 300, 2e-3, swaps=True),
    Start(BED, (1, 2, 3), 50, 2e-4, trained=True),
)


class RecoveryRow(Frozen):
    """One way to recover one stage: losses in nats a token on held-out text, over all seeds.

    ``below_random`` counts the seeds in which it ends below a start with random weights, at once and later.
    """

    trained: str
    stage: int
    recovery: str
    before: Spread
    at_once: Spread
    later: Spread
    below_random: tuple[int, int] | None


def measure() -> Result[RecoveryRow]:
    """Train, lose, recover, for each seed; each way to recover starts from the same weights and optimiser."""
    began = time.perf_counter()
    train, held = _text()
    found: dict[tuple[str, int, str], list[tuple[float, float, float]]] = {}
    for seed in range(SEEDS):
        for start in STARTS:
            with tempfile.TemporaryDirectory(prefix="paredown-checkfree-") as folder:
                model, watcher = start.model(seed), CheckFree(stages=STAGES, swaps=start.swaps)
                (recovery,) = watcher.callbacks(model)
                _train(model, watcher, [recovery], train, start, start.before, Path(folder), seed)
                before = _loss(model, held)
                for stage in start.stages:
                    # The first stage has one neighbour: there is no mean of two.
                    arms = (
                        ARMS
                        if stage > 1
                        else {"copy of the stage behind": watcher, "random weights": ARMS["random weights"]}
                    )
                    for name, method in arms.items():
                        losses = _recovered(
                            start, method, watcher, stage, recovery.norms, train, held, Path(folder), seed
                        )
                        found.setdefault((start.title, stage, name), []).append((before, *losses))
        say(f"checkfree: seed {seed} done")
    rows = []
    for (trained, stage, name), seeds in found.items():
        random = found[trained, stage, "random weights"]
        wins = tuple(sum(own[i] < other[i] for own, other in zip(seeds, random, strict=True)) for i in (1, 2))
        rows.append(
            RecoveryRow(
                trained=trained,
                stage=stage,
                recovery=name,
                before=Spread.of([losses[0] for losses in seeds]),
                at_once=Spread.of([losses[1] for losses in seeds]),
                later=Spread.of([losses[2] for losses in seeds]),
                below_random=None if name == "random weights" else (wins[0], wins[1]),
            )
        )
    notes = [
        f"Four stages. From nothing: a Llama of {LAYERS} layers, width {WIDTH}, {STARTS[0].before} steps at a rate of "
        f"{STARTS[0].rate:g}. {BED}: trained on for {STARTS[-1].before} steps at {STARTS[-1].rate:g}. {BATCH} rows of "
        f"{LENGTH} tokens a step, of the text of {BED}; {SEEDS} seeds; losses on {HELD} held-out rows.",
        "Random weights have a deviation of 0.02 * sqrt(512 / width): that of the paper's smallest model at its width.",
        f"`later` is {AFTER} steps after the loss, at the same constant rate; a rebuilt stage has 1.1 times that.",
    ]
    return result("checkfree-recovery", QUESTION, GOAL, rows, began, notes)


def _text() -> tuple[Tensor, Tensor]:
    model = checkpoint.load(BED, dtype=torch.float32, policies=False)
    data = rows_of(model, BED, "calibration", length=LENGTH, sequences=ROWS)
    return data.input_ids, rows_of(model, BED, "heldout", length=LENGTH, sequences=HELD).input_ids


def _deviation(width: int) -> float:
    return float(0.02 * (512 / width) ** 0.5)


def _trained() -> Model:
    model = checkpoint.load(BED, dtype=torch.float32, policies=False)
    model.config.initializer_range = _deviation(model.config.hidden_size)
    return model


def _fresh(seed: int) -> Model:
    vocabulary = int(checkpoint.load(BED, policies=False).config.vocab_size)
    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=WIDTH,
        intermediate_size=4 * WIDTH,
        num_hidden_layers=LAYERS,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=LENGTH,
        initializer_range=_deviation(WIDTH),
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=None,
    )
    torch.manual_seed(seed)
    return Model.of(LlamaForCausalLM(config))


def _train(
    model: Model,
    method: Method,
    callbacks: Sequence[TrainerCallback],
    ids: Tensor,
    start: Start,
    steps: int,
    folder: Path,
    seed: int,
    resume: Path | None = None,
) -> None:
    arguments = TrainingArguments(
        output_dir=str(folder),
        max_steps=steps,
        per_device_train_batch_size=BATCH,
        learning_rate=start.rate,
        lr_scheduler_type="constant",
        save_strategy="no" if resume else "steps",
        save_steps=steps,
        logging_strategy="no",
        report_to="none",
        disable_tqdm=True,
        use_cpu=True,
        dataloader_pin_memory=False,
        seed=seed,
    )
    rows: Any = [{"input_ids": row, "labels": row} for row in ids]
    with quiet(), method.wrap(model) if isinstance(method, CheckFree) else nullcontext():
        trainer = Trainer(model=model.hf, args=arguments, train_dataset=rows, callbacks=list(callbacks))
        trainer.remove_callback(PrinterCallback)
        trainer.train(resume_from_checkpoint=None if resume is None else str(resume))
    model.hf.eval()


def _recovered(
    start: Start,
    method: Method,
    watcher: CheckFree,
    stage: int,
    norms: list[float],
    ids: Tensor,
    held: Tensor,
    folder: Path,
    seed: int,
) -> tuple[float, float]:
    """Go on from the checkpoint, with the stage lost at its first step; the loss at once and at the end."""
    model = start.model(seed)
    (recovery,) = method.callbacks(model)
    recovery.norms = list(norms)
    at_once: list[float] = []

    class Lose(TrainerCallback):  # type: ignore[misc]
        def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if not at_once:
                recovery.recover(stage, kwargs["optimizer"], kwargs["lr_scheduler"], step=state.global_step)
                at_once.append(_loss(model, held))
                model.hf.train()

    resume = folder / f"checkpoint-{start.before}"
    _train(model, watcher, [Lose(), recovery], ids, start, start.before + AFTER, folder, seed, resume)
    return at_once[0], _loss(model, held)


@torch.no_grad()
def _loss(model: Model, ids: Tensor) -> float:
    model.hf.eval()
    run: Any = model.hf
    return float(run(input_ids=ids, labels=ids).loss)
