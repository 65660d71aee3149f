"""What each testbed is trained on: batches made on the fly and the loss over them.

Every batch is a function of (seed, step) alone.  A resumed run therefore needs no state of a random generator and sees
exactly the batches that an undisturbed one would have seen.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from paredown.errors import DataError
from paredown.testbeds import mosaic, tasks
from paredown.testbeds.corpus import Tokens

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerFast

LENGTHS = (128, 256, 512)
"""Sequence lengths, mixed from the first step to the last: a model moved on to long ones forgets the short ones."""


class Objective(Protocol):
    """A source of losses."""

    extra: nn.Module
    """Parameters that are trained along but do not belong to the shipped model (may be empty)."""

    def loss(self, model: PreTrainedModel, rng: np.random.Generator, progress: float) -> tuple[Tensor, int]:
        """Return the loss over one fresh batch and the number of tokens in it; `progress` runs from 0 to 1."""
        ...

    def rate(self, parameter: str, progress: float) -> float:
        """Return the factor on the learning rate of a parameter at this point."""
        ...


def weighted_cross_entropy(logits: Tensor, targets: Tensor, weights: Tensor) -> Tensor:
    """Return the weighted mean cross entropy; `logits` is ``[B, T, V]``, the others are ``[B, T]``."""
    each = F.cross_entropy(logits.float().flatten(0, 1), targets.flatten(), reduction="none")
    return (each * weights.flatten()).sum() / weights.sum()


def on_device(model: PreTrainedModel, array: npt.NDArray[Any]) -> Tensor:
    """Move an array to where the model is."""
    return torch.from_numpy(np.ascontiguousarray(array)).to(model.device)


def _next_tokens(model: Any, tokens: Tensor, weights: Tensor) -> Tensor:
    """Return the loss over all tokens ``[B, T]`` but the first; with load balancing where the model has routers."""
    routed = hasattr(model.config, "num_experts")
    output = model(tokens[:, :-1], **({"output_router_logits": True} if routed else {}))
    loss = weighted_cross_entropy(output.logits, tokens[:, 1:], weights[:, 1:])
    return loss + model.config.router_aux_loss_coef * output.aux_loss if routed else loss


class PlainText:
    """Next-token prediction on windows of text."""

    def __init__(self, stream: Tokens, tokens_per_step: int = 4096, lengths: tuple[int, ...] = LENGTHS) -> None:
        self.stream, self.tokens_per_step, self.lengths = stream, tokens_per_step, lengths
        self.extra: nn.Module = nn.Module()

    def rate(self, parameter: str, progress: float) -> float:
        return 1.0

    def loss(self, model: PreTrainedModel, rng: np.random.Generator, progress: float) -> tuple[Tensor, int]:
        length = int(rng.choice(self.lengths))
        count = max(1, self.tokens_per_step // length)
        starts = rng.integers(0, len(self.stream) - length - 1, size=count)
        rows = np.stack([self.stream[start : start + length + 1] for start in starts]).astype(np.int64)
        tokens = on_device(model, rows)
        weights = torch.ones_like(tokens, dtype=torch.float32)
        return _next_tokens(model, tokens, weights), rows.shape[0] * length


class Recall:
    """Three quarters planted facts with a question for each, a tenth repeated passages, the rest plain text."""

    def __init__(
        self,
        stream: Tokens,
        tokenizer: PreTrainedTokenizerFast,
        names: list[str],
        tokens_per_step: int = 4096,
        lengths: tuple[int, ...] = LENGTHS,
    ) -> None:
        self.stream, self.tokens_per_step, self.lengths = stream, tokens_per_step, lengths
        self.writer = tasks.FactWriter(tokenizer, names)
        self.extra: nn.Module = nn.Module()

    def rate(self, parameter: str, progress: float) -> float:
        return 1.0

    def _row(self, rng: np.random.Generator, length: int) -> tuple[list[int], list[float]]:
        kind = rng.random()
        start = int(rng.integers(0, len(self.stream) - length - 1))
        window = self.stream[start : start + length + 1].astype(np.int64)
        if kind < 0.75:
            return self.writer.training_row(window, int(rng.integers(2, max(3, length // 24 + 1))), rng)
        if kind < 0.85:
            half = int(rng.integers(16, length // 2))
            return np.resize(window[:half], length + 1).tolist(), [0.5] * half + [1.0] * (length + 1 - half)
        return window.tolist(), [1.0] * (length + 1)

    def loss(self, model: PreTrainedModel, rng: np.random.Generator, progress: float) -> tuple[Tensor, int]:
        length = int(rng.choice(self.lengths))
        rows = [self._row(rng, length) for _ in range(max(1, self.tokens_per_step // length))]
        tokens = on_device(model, np.array([row[0] for row in rows], dtype=np.int64))
        weights = on_device(model, np.array([row[1] for row in rows], dtype=np.float32))
        return _next_tokens(model, tokens, weights), len(rows) * length


class MosaicHeads(nn.Module):
    """Heads that give the inner layers something to learn; dropped when the model is shipped.

    ``presence`` reads from CLS which digits occur; ``digit`` and ``cell`` read from each patch what lies in its cell
    and which cell that is, which keeps both facts in the features that the language model gets.
    ``asked`` reads, in the middle of the language model, which cell the question names: to look there is the second of
    two steps, and without help with the first neither is found in the time of a short run.
    """

    def __init__(self, width: int, text_width: int, cells: int) -> None:
        super().__init__()
        self.presence = nn.Linear(width, 10)
        self.digit = nn.Linear(width, len(mosaic.ANSWERS))
        self.cell = nn.Linear(width, cells)
        self.asked = nn.Linear(text_width, cells)


class MosaicQuestions:
    """First the tower alone learns to see, then the whole model learns to answer a question about every cell.

    Parameters
    ----------
    digits, labels
        ``[N, 28, 28]`` and ``[N]``: handwritten digits.
    tokenizer
        The tokenizer of the language model.
    width, text_width
        Widths of the vision tower and of the language model.
    batch
        Mosaics in a step (twice as many while the tower learns alone).
    seeing
        Share of the run in which the tower learns alone.
    """

    def __init__(
        self,
        digits: npt.NDArray[np.uint8],
        labels: npt.NDArray[np.integer],
        tokenizer: PreTrainedTokenizerFast,
        width: int,
        text_width: int,
        batch: int = 16,
        seeing: float = 0.2,
    ) -> None:
        self.digits, self.labels, self.batch, self.seeing = digits, labels, batch, seeing
        self.shape = mosaic.SHAPE
        self.heads = MosaicHeads(width, text_width, self.shape.cells)
        self.extra: nn.Module = self.heads
        self.patch_cell = self.shape.cell_of_patch()

        def encode(text: str) -> list[int]:
            return list(tokenizer.encode(text, add_special_tokens=False))

        self.image_ids = encode("<|image|>") * self.shape.visual_tokens + encode("\n")
        self.questions = [encode(mosaic.question(cell)) for cell in range(self.shape.cells)]
        self.answers = [encode(mosaic.answer(label) + "\n") for label in range(len(mosaic.ANSWERS))]

    def rate(self, parameter: str, progress: float) -> float:
        tower = "vision_tower" in parameter or parameter.startswith("extra.")
        if progress < self.seeing:
            return 1.0 if tower else 0.0
        # The language model starts here, long after the warm-up of the schedule: it gets one of its own.
        return 0.3 if tower else min(1.0, (progress - self.seeing) / 0.02)

    def loss(self, model: Any, rng: np.random.Generator, progress: float) -> tuple[Tensor, int]:
        seeing = progress < self.seeing
        made = mosaic.make(self.digits, self.labels, self.batch * (2 if seeing else 1), rng, shift=2)
        pixels = on_device(model, made.pixels).float()[:, None].expand(-1, 3, -1, -1) / 127.5 - 1.0
        seen = model.model.vision_tower(pixels, output_hidden_states=True)
        loss = self._seeing_loss(model, seen, made)
        tokens = made.labels.shape[0] * (self.shape.visual_tokens + 1)
        if not seeing:
            answering, read = self._answering_loss(model, seen.hidden_states, made, rng)
            loss, tokens = 0.5 * loss + answering, tokens + read
        return loss, tokens

    def _seeing_loss(self, model: Any, seen: Any, made: mosaic.Mosaics) -> Tensor:
        heads = self.heads
        patches = seen.hidden_states[model.config.vision_feature_layer][:, 1:]  # [B, visual tokens, width]
        digit = on_device(model, made.labels[:, self.patch_cell])
        cell = on_device(model, np.broadcast_to(self.patch_cell, (len(made.labels), len(self.patch_cell))))
        presence = F.binary_cross_entropy_with_logits(
            heads.presence(seen.pooler_output).float(), on_device(model, made.presence())
        )
        return (
            presence
            + F.cross_entropy(heads.digit(patches).float().flatten(0, 1), digit.flatten())
            + 0.2 * F.cross_entropy(heads.cell(patches).float().flatten(0, 1), cell.flatten())
        )

    def _answering_loss(
        self, model: Any, hidden: Any, made: mosaic.Mosaics, rng: np.random.Generator
    ) -> tuple[Tensor, int]:
        rows: list[list[int]] = []
        weights: list[list[float]] = []
        cells: list[list[int]] = []  # the cell that an answer token is about; elsewhere what cross entropy ignores
        for labels in made.labels:
            rows.append(list(self.image_ids))
            weights.append([0.0] * len(self.image_ids))
            cells.append([-100] * len(self.image_ids))
            for cell in rng.permutation(self.shape.cells):
                told, asked = self.answers[labels[cell]], self.questions[cell]
                rows[-1] += asked + told
                weights[-1] += [0.02] * len(asked) + [1.0] * len(told)
                cells[-1] += [-100] * len(asked) + [int(cell)] * len(told)
        width = max(map(len, rows))
        pad = int(model.config.text_config.pad_token_id)
        tokens = on_device(model, np.array([row + [pad] * (width - len(row)) for row in rows], dtype=np.int64))
        weight = on_device(model, np.array([row + [0.0] * (width - len(row)) for row in weights], dtype=np.float32))
        cell_asked = on_device(model, np.array([row + [-100] * (width - len(row)) for row in cells], dtype=np.int64))
        features = model.model.multi_modal_projector(hidden[model.config.vision_feature_layer][:, 1:])
        embedded = model.get_input_embeddings()(tokens)
        # The placeholders are a prefix of fixed length, so the features replace them by position.
        count = self.shape.visual_tokens
        embedded = torch.cat([features.to(embedded.dtype), embedded[:, count:]], dim=1)
        read = model.model.language_model(inputs_embeds=embedded[:, :-1], output_hidden_states=True)
        # Only the text positions: most of the sequence is image.
        logits = model.lm_head(read.last_hidden_state[:, count:])
        loss = weighted_cross_entropy(logits, tokens[:, count + 1 :], weight[:, count + 1 :])
        middle = self.heads.asked(read.hidden_states[len(read.hidden_states) // 2][:, count:]).float()
        loss = loss + 0.3 * F.cross_entropy(middle.flatten(0, 1), cell_asked[:, count + 1 :].flatten())
        return loss, tokens.numel()


def mnist(folder: Path, part: str) -> tuple[npt.NDArray[np.uint8], npt.NDArray[np.integer]]:
    """Return digits ``[N, 28, 28]`` and labels ``[N]`` of a part (``train`` or ``test``) of an ``.npz`` with MNIST."""
    found = sorted(folder.rglob("mnist*.npz"))
    if not found:
        raise DataError(f"no mnist*.npz under {folder}: the vlm testbed needs its digits")
    with np.load(found[0], allow_pickle=False) as arrays:
        return arrays[f"x_{part}"], arrays[f"y_{part}"]
