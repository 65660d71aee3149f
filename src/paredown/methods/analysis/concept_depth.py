"""Concept depth: from which block on a concept can be read off the last token by a linear probe.

Source: "Exploring Concept Depth: How Large Language Models Acquire Knowledge at Different Layers?", 2024, arXiv
2404.07066; official code Luckfort/CD. Logistic regression a block, 60 % of the examples train it:

- accuracy, F1 and AUC on the rest; jumping point: first ``a_l >= 1.1 a_{l-1}`` (recalled); converging point: behind the
  last change of 3 % or more (inferred; read literally the paper's maximum is always near the end)
- task depth (inferred): fewest blocks within ``delta`` of the best, with a bootstrap interval over held-out rows
- variants: random tokens before the text, or weights rounded to 8 or 16 bits, to compare the points with

Different here, on purpose: the stream behind a block is read (the official code reads the norm before the MLP:
``where="norm"``), features are standardised, the penalty is searched for inside the training part, each task has its
own prompt (the script's sentiment prompt overwrites all others), noise is random, and labels keep their names.
That something can be read does not mean that it is used: take the depth as a suggestion.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from paredown.core.calibration import Batch
from paredown.core.checkpoint import Model
from paredown.core.compression import observed
from paredown.core.looking import labelled, readout
from paredown.core.looking.labelled import Labelled, Task
from paredown.core.looking.readout import Readout, Where
from paredown.core.method import Probe, register
from paredown.errors import DataError

NOTE = (
    "That a concept can be read after {0} of {1} blocks does not mean that later blocks do nothing for it. For "
    "classification, cut the model there and keep the probe as its head; for generation this is an upper bound on how "
    "many top blocks may go, to be checked by the divergence of the output."
)
SPLIT_SEED = 42


@register
class ConceptDepth(Probe):
    """Shows from which block on a concept (of labelled texts, or of the calibration text) can be read linearly."""

    name: ClassVar[str] = "concept-depth"
    title: ClassVar[str] = "Exploring Concept Depth: How Large Language Models Acquire Knowledge at Different Layers?"
    year: ClassVar[int | None] = 2024
    arxiv: ClassVar[str | None] = "2404.07066"
    axis: ClassVar = "analysis"
    unit: ClassVar[str] = "blocks"
    needs: ClassVar[tuple[str, ...]] = ("calibration-data",)

    labels: str = Field("", description="A .csv or .jsonl file with text and label; empty makes a task of the data.")
    prompt: str = Field("{text}", description="What each labelled text is put into, as {text}.")
    longest: int = Field(256, ge=1, description="Tokens of a labelled text; longer ones lose their beginning.")
    task: Task = Field("next", description="Without labels: next (is a common token next) or repeat (is this one old).")
    places: int = Field(32, ge=1, description="Without labels: places asked at in each row, at most.")
    where: Where = Field("stream", description="What is read: the stream behind a block, or the norm before its MLP.")
    standardise: bool = Field(True, description="Give features mean 0 and variance 1; the official code does not.")
    penalties: tuple[float, ...] = Field((1.0, 30.0, 1000.0), min_length=1, description="Penalties tried (1 is usual).")
    delta: float = Field(0.01, ge=0, lt=1, description="How near to the best accuracy counts as there.")
    draws: int = Field(500, ge=1, description="Bootstrap draws for the interval of the depth.")
    noise: int = Field(0, ge=0, description="Random tokens before each text, in a second measurement.")
    bits: Literal[0, 8, 16] = Field(0, description="Bits that block weights are rounded to in it; 0 leaves them alone.")

    @property
    def reads_data(self) -> bool:
        """Labelled texts need no others."""
        return not self.labels

    def measure(self, model: Model, data: Batch | None, *, seed: int = 0) -> list[dict[str, Any]]:
        """Return a row for the whole model (``layer`` is ``"all"``) and one for each block.

        - blocks: ``accuracy``, ``f1`` (of the second label), ``auc`` on held-out examples, ``penalty``; ``*_varied``
          the same under noise and rounding, if either was asked for.
        - ``"all"``: the best of these; ``jumping``, ``converging`` (shares of the depth; None: no jump), ``depth`` with
          ``depth_low`` and ``depth_high`` (blocks), the same ``_varied``; ``keep`` (depth as a share of all blocks),
          ``labels``, ``examples``, ``held_out``, ``chance`` (share of the commoner label) and ``note``.
        """
        examples = self.examples(model, data, seed)
        probes, held = self.learn(model, examples, seed=seed)
        rows = [self._row(i, *one) for i, one in enumerate(probes)]
        groups = examples.groups[held]
        whole = self._whole(rows, probes, groups, seed)
        if self.noise or self.bits:
            generator = torch.Generator().manual_seed(seed)
            noisy = labelled.with_noise(examples, self.noise, generator) if self.noise else examples
            with rounded(model, self.bits):
                probes, _ = self.learn(model, noisy, seed=seed)
            varied = [self._row(i, *one) for i, one in enumerate(probes)]
            for row, other in zip((whole, *rows), (self._whole(varied, probes, groups, seed), *varied), strict=True):
                row |= {f"{key}_varied": value for key, value in other.items() if key != "layer"}
        else:
            for row in (whole, *rows):
                row |= {f"{key}_varied": None for key in list(row) if key != "layer"}
        depth, blocks = whole["depth"], len(rows)
        total = examples.labels
        whole |= {
            "keep": depth / blocks,
            "labels": list(examples.names),
            "examples": len(total),
            "held_out": int(held.sum()),
            "chance": float(max(total[held].float().mean(), 1 - total[held].float().mean())),
            "note": NOTE.format(depth, blocks),
        }
        keys = list(dict.fromkeys(key for row in (whole, *rows) for key in row))
        return [{key: row.get(key) for key in keys} for row in (whole, *rows)]

    def examples(self, model: Model, data: Batch | None, seed: int = 0) -> Labelled:
        """Return what is asked: the file's texts, or places in the calibration data."""
        if self.labels:
            texts = labelled.read(self.labels)
            return labelled.encode(model.tokenizer, texts, self.prompt, self.longest, self.labels)
        if data is None:
            raise DataError(f"{self.name} needs texts: name a file with labels, or give calibration data with --data.")
        return labelled.derive(data, self.task, self.places, torch.Generator().manual_seed(seed))

    def learn(
        self, model: Model, examples: Labelled, *, seed: int = 0
    ) -> tuple[list[tuple[Readout, Tensor, Tensor]], Tensor]:
        """Fit a probe behind each block.

        Returns
        -------
        For each block its probe, and scores and labels of the held-out examples; and which examples those are, ``[n]``.
        """
        labels, groups = examples.labels, examples.groups
        train = readout.divide(labels, groups, 0.6, torch.Generator().manual_seed(SPLIT_SEED + seed))
        blocks = [block.index for block in model.anatomy.language.blocks]
        found = []
        for _, seen in observed(
            self, model, examples.batch(), blocks, lambda _: [readout.Vectors(examples.positions, self.where)]
        ):
            z = seen["vectors"]
            probe = readout.search(z[train], labels[train], groups[train], self.penalties, standardise=self.standardise)
            found.append((probe, probe.scores(z[~train]), labels[~train]))
        return found, ~train

    def _row(self, layer: int, probe: Readout, scores: Tensor, labels: Tensor) -> dict[str, Any]:
        numbers = {name: getattr(readout, name)(scores, labels) for name in ("accuracy", "f1", "auc")}
        return {"layer": layer, **numbers, "penalty": probe.penalty}

    def _whole(
        self, rows: list[dict[str, Any]], probes: list[tuple[Readout, Tensor, Tensor]], groups: Tensor, seed: int
    ) -> dict[str, Any]:
        curve = [row["accuracy"] for row in rows]
        correct = torch.stack([(scores > 0) == (labels == 1) for _, scores, labels in probes])
        low, high = readout.depth_interval(
            correct, groups, self.delta, self.draws, torch.Generator().manual_seed(SPLIT_SEED + seed)
        )
        return {
            "layer": "all",
            **{name: max(row[name] for row in rows) for name in ("accuracy", "f1", "auc")},
            "penalty": None,
            "jumping": readout.jumping(curve),
            "converging": readout.converging(curve),
            "depth": readout.depth(curve, self.delta),
            "depth_low": low,
            "depth_high": high,
        }


@contextmanager
def rounded(model: Model, bits: int) -> Iterator[None]:
    """Let the matrices of all blocks be rounded inside the ``with`` block: bf16, or 8 bits a row; 0 changes nothing."""
    kept: list[tuple[Tensor, Tensor]] = []
    try:
        for block in model.anatomy.language.blocks if bits else ():
            for parameter in model.hf.get_submodule(block.path).parameters():
                if parameter.ndim > 1:
                    weight = parameter.data
                    kept.append((weight, weight.clone()))
                    if bits == 16:
                        weight.copy_(weight.bfloat16())
                    else:
                        step = (weight.float().abs().amax(-1, keepdim=True) / 127).clamp(min=1e-30)
                        weight.copy_((weight.float() / step).round() * step)
        yield
    finally:
        for weight, before in kept:
            weight.copy_(before)
