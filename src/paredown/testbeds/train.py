"""Train a testbed: ``python -m paredown.testbeds.train NAME --data DIR``.

The run keeps its own checkpoints (weights, optimiser, step, time spent) and ``--resume`` goes on from the last one.
Batches depend on the step alone, so with ``--steps`` a resumed run ends with the same weights as one never stopped.

All but ``vlm`` need text; ``vlm`` needs an ``mnist*.npz`` with ``x_train``, ``y_train``, ``x_test`` and
``y_test``.  On a CPU give ``vlm`` a trained ``recall`` model as ``--init``: its attention can already read a question.
"""

from __future__ import annotations

import argparse
import math
import os
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from paredown.testbeds import NAMES, RECALLING, corpus, growth, objectives, publish, shapes, tasks

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerFast

PEAK_RATE = {"lm": 2e-3, "moe": 3e-3, "recall": 2e-3, "recall-moe": 2e-3, "vlm": 2e-3}
TOKENS_PER_STEP = {"lm": 2048, "moe": 4096, "recall": 2048, "recall-moe": 2048}
"""Small batches: what counts in an hour on a CPU is the number of steps. Experts see an eighth of the tokens each."""
WARMUP_STEPS = 100


@dataclass
class Progress:
    """How far a run has come; stored in each checkpoint and, at the end, next to the weights."""

    step: int = 0
    tokens: int = 0
    seconds: float = 0.0
    loss: float = math.nan


@dataclass(frozen=True)
class Schedule:
    """When a run ends: after `steps` steps, or after `minutes` of training if `steps` is None."""

    minutes: float = 30.0
    steps: int | None = None

    def fraction(self, progress: Progress) -> float:
        """Return how much of the run is done, 0 to 1."""
        done = progress.step / self.steps if self.steps is not None else progress.seconds / (60 * self.minutes)
        return min(1.0, done)

    def rate(self, progress: Progress) -> float:
        """Return the learning rate relative to its peak: linear warm-up, then a half cosine down to 1 %."""
        warm = min(1.0, (progress.step + 1) / WARMUP_STEPS)
        return warm * (0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * self.fraction(progress))))


class Trainer:
    """The loop of all testbeds.

    Parameters
    ----------
    model
        What is trained, in float32.
    objective
        Batches and loss.
    schedule
        When to stop, and the learning rate until then.
    folder
        Where checkpoints and the log go.
    peak_rate
        The highest learning rate.
    seed
        Seed of the batches.
    about
        What to note down next to the weights: data, hardware, where the weights started.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        objective: objectives.Objective,
        schedule: Schedule,
        folder: Path,
        *,
        peak_rate: float = 3e-3,
        seed: int = 0,
        about: dict[str, str] | None = None,
    ) -> None:
        self.model, self.objective, self.schedule = model, objective, schedule
        self.folder, self.peak_rate, self.seed = folder, peak_rate, seed
        self.about = about or {}
        self.progress = Progress()
        self.objective.extra.to(model.device)
        self.named = [*model.named_parameters(), *((f"extra.{k}", p) for k, p in objective.extra.named_parameters())]
        # One group a parameter: the objective may give each its own rate. Vectors (norms, biases) do not decay.
        groups = [{"params": [p], "name": name, "weight_decay": 0.1 if p.ndim > 1 else 0.0} for name, p in self.named]
        self.optimiser = torch.optim.AdamW(groups, lr=peak_rate, betas=(0.9, 0.95))

    @property
    def checkpoint(self) -> Path:
        """The file a run goes on from."""
        return self.folder / "checkpoint.pt"

    def save(self) -> None:
        """Write a checkpoint; the old one stays until the new one is whole."""
        self.folder.mkdir(parents=True, exist_ok=True)
        part = self.checkpoint.with_suffix(".part")
        state = {
            "model": self.model.state_dict(),
            "extra": self.objective.extra.state_dict(),
            "optimiser": self.optimiser.state_dict(),
            "progress": asdict(self.progress),
            "about": self.about,
        }
        torch.save(state, part)
        part.replace(self.checkpoint)

    def resume(self) -> bool:
        """Go on from the checkpoint, if there is one."""
        if not self.checkpoint.exists():
            return False
        state = torch.load(self.checkpoint, map_location=self.model.device, weights_only=True)
        self.model.load_state_dict(state["model"])
        self.objective.extra.load_state_dict(state["extra"])
        self.optimiser.load_state_dict(state["optimiser"])
        self.progress = Progress(**state["progress"])
        return True

    def step(self) -> float:
        """Take one step and return its loss."""
        progress = self.progress
        done, rate = self.schedule.fraction(progress), self.peak_rate * self.schedule.rate(progress)
        for group in self.optimiser.param_groups:
            group["lr"] = rate * self.objective.rate(group["name"], done)
        rng = np.random.default_rng((self.seed, progress.step))
        with torch.autocast(self.model.device.type, torch.bfloat16):
            loss, tokens = self.objective.loss(self.model, rng, done)
        self.optimiser.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_([p for _, p in self.named], 1.0)
        self.optimiser.step()
        progress.step += 1
        progress.tokens += tokens
        progress.loss = loss.item()
        return progress.loss

    def run(self, *, save_every: float = 180.0, log_every: int = 50, stop_at: int | None = None) -> Progress:
        """Train until the schedule ends (or up to step `stop_at`), saving every `save_every` seconds."""
        self.model.train()
        progress, saved = self.progress, time.monotonic()
        smooth = progress.loss
        while self.schedule.fraction(progress) < 1.0 and (stop_at is None or progress.step < stop_at):
            began = time.monotonic()
            loss = self.step()
            smooth = loss if math.isnan(smooth) else 0.97 * smooth + 0.03 * loss
            progress.seconds += time.monotonic() - began
            if progress.step % log_every == 0:
                done, speed = self.schedule.fraction(progress), progress.tokens / max(progress.seconds, 1e-9)
                print(f"step {progress.step} {done:6.1%} loss {smooth:.4f} {speed:.0f} tokens/s", flush=True)
            if time.monotonic() - saved > save_every:
                self.save()
                saved = time.monotonic()
        self.save()
        return progress


def make_objective(
    name: str, data: Path, folder: Path, tokenizer: PreTrainedTokenizerFast, only: list[str]
) -> objectives.Objective:
    """Read the data of a testbed and return what it is trained on."""
    if name == "vlm":
        digits, labels = objectives.mnist(data, "train")
        widths = shapes.VISION_SIZE["hidden_size"], shapes.SIZES["vlm"]["hidden_size"]
        return objectives.MosaicQuestions(digits, labels, tokenizer, *widths)
    train, _ = corpus.prepare(data, folder / "tokens", tokenizer, only=only)
    if name in RECALLING:
        names = tasks.names_in([tokenizer.decode(train[:400_000])])
        return objectives.Recall(train, tokenizer, names, TOKENS_PER_STEP[name])
    return objectives.PlainText(train, TOKENS_PER_STEP[name])


def load_tokenizer(tokenizer: Path | None, data: Path, folder: Path, only: list[str]) -> PreTrainedTokenizerFast:
    """Open a tokenizer, or train one on the data and keep it in the run's folder."""
    from transformers import PreTrainedTokenizerFast

    place = tokenizer or folder / "tokenizer"
    if tokenizer is None and not place.exists():
        sample = (doc.text for doc in corpus.read(data, only=only, longest=100_000) if not doc.heldout)
        corpus.train_tokenizer(sample).save_pretrained(place)
    return PreTrainedTokenizerFast.from_pretrained(place)


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(prog="python -m paredown.testbeds.train", description=__doc__)
    parser.add_argument("name", choices=NAMES)
    parser.add_argument(
        "--data", type=Path, required=True, help="folder of text (.jsonl, .txt; .gz and .xz too) or mnist*.npz"
    )
    parser.add_argument("--only", nargs="*", default=[], help="sub-folders of DATA to read (default: all)")
    parser.add_argument(
        "--out", type=Path, default=Path("runs/testbeds"), help="folder of the run (default: runs/testbeds)"
    )
    parser.add_argument("--minutes", type=float, default=30.0, help="minutes of training (default: 30)")
    parser.add_argument("--steps", type=int, help="steps instead of minutes: exactly repeatable")
    parser.add_argument("--init", type=Path, help="start from these weights; vlm may start from a text model")
    parser.add_argument("--tokenizer", type=Path, help="an existing tokenizer; without one, one is trained on DATA")
    parser.add_argument("--resume", action="store_true", help="go on from the last checkpoint in OUT")
    parser.add_argument("--threads", type=int, help="CPU threads")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--note", default="", help="a sentence for the card about how the run came about")
    return parser.parse_args(arguments)


def start_from(model: Any, folder: Path) -> None:
    """Take over the weights of an earlier model.

    One of the same architecture may be smaller; a model with experts makes them of a dense one's MLPs; ``vlm`` takes a
    text model as its language model.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    earlier: Any
    if AutoConfig.from_pretrained(folder).model_type == model.config.model_type:
        earlier = type(model).from_pretrained(folder, dtype=torch.float32)
        growth.grow(model, earlier)
    else:
        earlier = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        if hasattr(model.config, "num_experts"):
            growth.split(model, earlier)
        else:
            model.model.language_model.load_state_dict(earlier.model.state_dict())


def describe(options: argparse.Namespace) -> dict[str, str]:
    """Return what the card says about a run, without any path."""
    cores, threads = os.cpu_count(), torch.get_num_threads()
    cpu = f"{cores}-core CPU, {threads} thread{'s' if threads > 1 else ''}"
    return {
        "data": "mnist" if options.name == "vlm" else ", ".join(options.only) or options.data.name,
        "init": "random weights" if options.init is None else f"an earlier {options.init.name}",
        "hardware": torch.cuda.get_device_name() if torch.cuda.is_available() else cpu,
        "note": options.note,
    }


def main(arguments: list[str] | None = None) -> None:
    """Train one testbed and leave its weights in ``OUT/NAME/model``."""
    options = parse(arguments)
    if options.threads:
        torch.set_num_threads(options.threads)
    torch.manual_seed(options.seed)
    folder: Path = options.out / options.name
    tokenizer = load_tokenizer(options.tokenizer, options.data, options.out, options.only)
    objective = make_objective(options.name, options.data, options.out, tokenizer, options.only)
    model: Any = shapes.build(options.name, tokenizer)
    if options.init is not None:
        start_from(model, options.init)
    model.to("cuda" if torch.cuda.is_available() else "cpu")
    schedule = Schedule(options.minutes, options.steps)
    trainer = Trainer(
        model,
        objective,
        schedule,
        folder,
        peak_rate=PEAK_RATE[options.name],
        seed=options.seed,
        about=describe(options),
    )
    if options.resume:
        trainer.resume()
    trainer.run()
    publish.write_model(options.name, options.out, tokenizer, folder / "model")


if __name__ == "__main__":
    main()
