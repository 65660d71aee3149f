"""Scoring states of a running model on text: the judge that searches and allocations ask."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch import nn

from paredown.core import audit
from paredown.core.calibration import Batch
from paredown.core.learning.teacher import Kind, Teacher, fitness
from paredown.core.method import Progress
from paredown.core.search.evolution import Rng, Sample, State
from paredown.errors import DataError

TOKENS_AT_ONCE = 2048
_ROOM = 2**30
"""Bytes of fp16 logits up to which a teacher keeps them all."""
_ENOUGH = 512
"""Logits of a token that do as well as all of them, by the authors of EvoPress."""


class TextJudge:
    """Scores a model that ``put`` brings into a state, by KL from a teacher or by perplexity.

    Parameters
    ----------
    hf : the model that runs
    data : rows of tokens
    teacher : collected on these rows; None for ``ppl``
    kind : ``kl`` or ``ppl``
    put : brings the model into a state
    """

    def __init__(
        self, hf: nn.Module, data: Batch, teacher: Teacher | None, kind: Kind, put: Callable[[State], None]
    ) -> None:
        self.hf, self.data, self.teacher, self.kind, self.put = hf, data, teacher, kind, put
        self.count, self.length = data.input_ids.shape

    def rows(self, tokens: int) -> int:
        """Return how many rows a sample of this size has."""
        tokens = min(tokens, self.count * self.length)
        # One token that is left over predicts nothing.
        return max(1, tokens // self.length + (tokens % self.length > 1))

    def sample(self, tokens: int, rng: Rng) -> Sample:
        """Draw rows without repetition, the last one cut to give exactly ``tokens``; or take all there are."""
        count = self.rows(max(2, tokens))
        if tokens >= self.count * self.length:
            return Sample(tuple(range(self.count)), self.length, self.count * self.length, True)
        drawn = tuple(rng.permutation(self.count)[:count].tolist())
        last = min(self.length, max(2, tokens) - (count - 1) * self.length)
        return Sample(drawn, last, (count - 1) * self.length + last, False)

    def score(self, state: State, sample: Sample) -> float:
        """Bring the model into a state and score it."""
        self.put(state)
        return fitness(
            self.hf,
            self.teacher,
            self.data.input_ids,
            sample.rows,
            self.kind,
            max(1, TOKENS_AT_ONCE // self.length),
            mask=self.data.attention_mask,
            last=sample.last,
        )

    def everything(self) -> Sample:
        """Return all data as one sample."""
        return Sample(tuple(range(self.count)), self.length, self.count * self.length, True)


def teacher_of(
    hf: nn.Module, data: Batch, top: int | None, *, folder: Path | None = None, progress: Progress | None = None
) -> Teacher:
    """Collect a teacher on ``data``; ``top`` None keeps all logits where they take up to 1 GiB, else 512 a token."""
    config: Any = hf.config
    vocabulary = int(config.get_text_config().vocab_size)
    if top is None and 2 * data.input_ids.numel() * vocabulary > _ROOM:
        top = _ENOUGH
    batch = max(1, TOKENS_AT_ONCE // data.input_ids.shape[1])
    return Teacher.collect(
        hf, data.input_ids, data.attention_mask, top=top, batch=batch, folder=folder, progress=progress
    )


def identity(hf: nn.Module, data: Batch, **more: Any) -> dict[str, Any]:
    """Return what scores depend on: weights, rows, and whatever else is named."""
    weights = json.dumps(audit.digests(hf), sort_keys=True)
    mask = data.attention_mask
    padding = None if mask is None else hashlib.sha256(mask.long().numpy().tobytes()).hexdigest()
    return {
        "model": hashlib.sha256(weights.encode()).hexdigest(),
        "data": data.fingerprint,
        "padding": padding,
        **more,
    }


def check_rows(data: Batch | None, what: str) -> Batch:
    """Return the data, or say that there must be some of two tokens a row.

    Raises
    ------
    DataError
        In one sentence.
    """
    if data is None or not len(data) or data.input_ids.shape[1] < 2:
        raise DataError(f"{what} scores models on calibration data; give rows of two tokens or more with --data.")
    return data
