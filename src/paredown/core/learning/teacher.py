"""What the dense model says about each token, kept, so that many students can be held against it.

- ``Teacher.collect`` runs the dense model once. It keeps all logits (fp32 where they are few, else fp16), or the
  ``top`` largest of each token: then both sides are renormalised over these, as EvoPress and others do.
- A row of ``T`` tokens has ``T - 1`` predictions: the last position says something about a token that is not there.
- With a folder the logits lie on disk, a file for a few rows, and are mapped into memory; a collection that was killed
  goes on, and one of another model or other rows is refused.
- Logits are stored less the largest of their token, which changes no probability: fp16 is then finest where the
  probability lies, and cannot overflow.
- Softmax and KL are computed in fp32, a few tokens at a time, also backwards: with a vocabulary of 128k the logits of
  one long row in fp32 would take gigabytes for each of several intermediate results.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from paredown.core import audit, forward
from paredown.core.durable import write_json, write_tensors
from paredown.errors import BudgetError, OutputError, UsageError

Progress = Callable[[int, int, str], None]
Kind = Literal["kl", "ppl"]

SMALL = 2**28
"""Bytes of logits up to which they are kept in fp32."""
AT_ONCE = 2**24
"""Logits that are turned into probabilities together: 64 MiB in fp32."""
RUN_AT_ONCE = 2**27
"""Logits that a forward pass may return."""
_ABOUT = "teacher.json"


class Teacher:
    """The dense model's logits for the rows it was collected on. Made by :meth:`collect`.

    Attributes
    ----------
    ids : ``[N, T]``, the rows
    mask : ``[N, T]`` bool, which tokens are real; None when all are
    vocabulary : how many logits the model gives
    top : how many of them are kept for each token; None for all
    """

    def __init__(
        self, ids: Tensor, mask: Tensor | None, vocabulary: int, top: int | None, parts: Sequence[_Part], step: int
    ) -> None:
        self.ids, self.mask, self.vocabulary, self.top = ids, mask, vocabulary, top
        self._parts, self._step = parts, step

    @classmethod
    def collect(
        cls,
        hf: nn.Module,
        ids: Tensor,
        mask: Tensor | None = None,
        *,
        top: int | None = None,
        batch: int = 4,
        folder: str | Path | None = None,
        progress: Progress | None = None,
    ) -> Teacher:
        """Run the dense model over ``ids`` and keep what it says.

        Parameters
        ----------
        hf : a causal language model, left as it is
        ids : tokens ``[N, T]``
        mask : real tokens ``[N, T]``, or None when all are real
        top : keep this many logits of each token and renormalise; None, or as many as there are, keeps all
        batch : rows run together, fewer where their logits would be many
        folder : where the logits go; None keeps them in memory
        progress : called as ``progress(done, total, text)``, in rows

        Raises
        ------
        BudgetError
            If ``top`` is below 1.
        UsageError
            If rows have no second token, or the model gives no logits.
        OutputError
            If the folder holds the logits of another model or of other rows.
        """
        if top is not None and top < 1:
            raise BudgetError(f"a teacher keeps at least one logit of each token, not {top}; choose top=1 or more.")
        if ids.ndim != 2 or not len(ids) or ids.shape[1] < 2:
            raise UsageError(f"a teacher needs rows of two tokens or more, not ids of shape {list(ids.shape)}.")
        ids = ids.cpu()
        mask = None if mask is None or bool(mask.all()) else mask.bool().cpu()
        place = None if folder is None else Path(folder)
        vocabulary = _vocabulary(hf, ids)
        top = None if top is None or top >= vocabulary else top
        step = max(1, min(batch, len(ids), RUN_AT_ONCE // (ids.shape[1] * vocabulary)))
        dtype = _dtype(len(ids) * (ids.shape[1] - 1) * (top or vocabulary))
        if place is not None:
            _claim(place, _about(hf, ids, mask, top, step, dtype))
        parts: list[_Part] = []
        for start in range(0, len(ids), step):
            if progress is not None:
                progress(start, len(ids), "teacher")
            file = None if place is None else place / f"logits-{start // step:05d}.safetensors"
            if file is None or not file.exists():
                rows = slice(start, start + step)
                with torch.no_grad():
                    said = forward.logits(hf, ids[rows], None if mask is None else mask[rows])
                found = _shorten(said[:, :-1], top, dtype)
                if file is None:
                    parts.append(_Part(found))
                    continue
                write_tensors(file, found)
            parts.append(_Part(_mapped(file)))
        if progress is not None:
            progress(len(ids), len(ids), "teacher")
        return cls(ids, mask, vocabulary, top, parts, step)

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def fingerprint(self) -> str:
        """The sha256 of rows and mask."""
        return _digest(self.ids, self.mask)

    def counts(self, rows: Sequence[int] | slice, length: int | None = None) -> Tensor:
        """Return ``[B, T-1]`` bool: which predictions are of a real token, made at a real token."""
        numbers = self._numbers(rows)
        return real_predictions(self.ids[numbers, :length], None if self.mask is None else self.mask[numbers, :length])

    def kl(self, logits: Tensor, rows: Sequence[int] | slice) -> Tensor:
        """Return KL(teacher || student) of each prediction, in nats, differentiable in the student's logits.

        Parameters
        ----------
        logits : the student's, ``[B, t, V]``; ``t`` may be shorter than the teacher's rows, which are cut likewise
        rows : which ``B`` rows of the teacher these are

        Returns
        -------
        ``[B, t-1]`` fp32 on the device of ``logits``; 0 where a prediction is about padding.

        Raises
        ------
        UsageError
            If shapes do not fit, or the vocabularies differ.
        """
        numbers = self._numbers(rows)
        if logits.ndim != 3 or len(logits) != len(numbers) or not 2 <= logits.shape[1] <= self.ids.shape[1]:
            wanted = [len(numbers), self.ids.shape[1], self.vocabulary]
            raise UsageError(f"the teacher needs logits of shape {wanted}, not {list(logits.shape)}.")
        if logits.shape[2] != self.vocabulary:
            raise UsageError(
                f"the teacher knows {self.vocabulary} tokens and the student {logits.shape[2]}; they need one "
                "vocabulary."
            )
        length = logits.shape[1] - 1
        chunk = max(1, AT_ONCE // self.vocabulary)
        found = []
        for row, number in zip(logits, numbers, strict=True):
            pieces = []
            for start in range(0, length, chunk):
                stop = min(start + chunk, length)
                said, chosen = (None if t is None else t.to(logits.device) for t in self._said(number, start, stop))
                pieces.append(_again(_kl, row[start:stop], said, chosen))
            found.append(torch.cat(pieces))
        values = torch.stack(found)
        if self.mask is None:
            return values
        return values.masked_fill(~self.counts(numbers, length + 1).to(values.device), 0.0)

    def log_probabilities(self, rows: Sequence[int] | slice) -> Tensor:
        """Return the teacher's log probabilities ``[B, T-1, V]``, fp32; tokens that were not kept have ``-inf``."""
        found = []
        for number in self._numbers(rows):
            said, chosen = self._said(number, 0, self.ids.shape[1] - 1)
            assert said is not None
            known = functional.log_softmax(said.float(), dim=-1)
            if chosen is not None:
                known = known.new_full((len(known), self.vocabulary), -math.inf).scatter(1, chosen.long(), known)
            found.append(known)
        return torch.stack(found)

    def _numbers(self, rows: Sequence[int] | slice) -> list[int]:
        return list(range(len(self.ids))[rows]) if isinstance(rows, slice) else [int(row) for row in rows]

    def _said(self, row: int, start: int, stop: int) -> tuple[Tensor | None, Tensor | None]:
        part, at = self._parts[row // self._step], row % self._step
        return part.values[at, start:stop], None if part.chosen is None else part.chosen[at, start:stop]


class _Part:
    """The logits of a few rows: ``values [b, T-1, K]`` and, where they are not all, which they are."""

    def __init__(self, tensors: dict[str, Tensor]) -> None:
        self.values = tensors["values"]
        self.chosen = tensors.get("chosen")


def fitness(
    hf: nn.Module,
    teacher: Teacher | None,
    ids: Tensor,
    rows: Sequence[int] | slice,
    kind: Kind = "kl",
    batch: int = 4,
    *,
    mask: Tensor | None = None,
    last: int | None = None,
) -> float:
    """Return how far a student is from its teacher, or from the text, as a mean over predictions; less is better.

    Parameters
    ----------
    hf : the student, run without gradients and without cache
    teacher : needed for ``kl``
    ids : tokens ``[N, T]``, those of the teacher
    rows : which of them to use
    kind : ``kl`` (nats a token) or ``ppl`` (perplexity)
    batch : rows run together, fewer where their logits would be many
    mask : real tokens ``[N, T]``; the teacher's where there is one
    last : use this many tokens of the last row, so that a sample has an exact size

    Raises
    ------
    UsageError
        If ``kl`` is asked for without a teacher, or not one prediction is left.
    """
    if kind == "kl" and teacher is None:
        raise UsageError("fitness by KL needs a teacher; collect one, or use ppl.")
    mask = teacher.mask if mask is None and teacher is not None else mask
    numbers = list(range(len(ids))[rows]) if isinstance(rows, slice) else [int(row) for row in rows]
    total, count = 0.0, 0
    vocabulary = _vocabulary(hf, ids) if teacher is None else teacher.vocabulary
    batch = max(1, min(batch, RUN_AT_ONCE // (ids.shape[1] * vocabulary)))
    for some, length in _batches(numbers, ids.shape[1], batch, last):
        part = ids[some, :length]
        real = None if mask is None else mask[some, :length]
        with torch.no_grad():
            logits = forward.logits(hf, part, real)
            if kind == "kl":
                assert teacher is not None
                values = teacher.kl(logits, some)
            else:
                values = _nll(logits[:, :-1], part[:, 1:].to(logits.device))
        counted = real_predictions(part, real)
        total += float(values.double().cpu()[counted].sum())
        count += int(counted.sum())
    if not count:
        raise UsageError("fitness needs at least one prediction; give rows of two real tokens or more.")
    mean = total / count
    return mean if kind == "kl" else math.exp(min(mean, 700.0))


def real_predictions(ids: Tensor, mask: Tensor | None) -> Tensor:
    """Return ``[B, T-1]`` bool: which predictions are of a real token, made at a real token."""
    if mask is None:
        return torch.ones(len(ids), ids.shape[1] - 1, dtype=torch.bool)
    return mask[:, :-1].bool().cpu() & mask[:, 1:].bool().cpu()


def _batches(numbers: Sequence[int], length: int, batch: int, last: int | None) -> list[tuple[list[int], int]]:
    """Divide rows into batches of one length; a last row that is cut runs alone."""
    cut = last is not None and last < length
    whole = numbers[:-1] if cut else numbers
    found = [(list(whole[start : start + batch]), length) for start in range(0, len(whole), batch)]
    # One token alone predicts nothing.
    return [*found, (list(numbers[-1:]), last)] if cut and last is not None and last >= 2 else found


def _kl(logits: Tensor, said: Tensor, chosen: Tensor | None) -> Tensor:
    """Return KL ``[n]`` from the student's logits ``[n, V]`` and the teacher's ``[n, K]``."""
    if chosen is not None:
        logits = logits.gather(1, chosen.long())
    student = functional.log_softmax(logits.float(), dim=-1)
    teacher = functional.log_softmax(said.float(), dim=-1)
    share = teacher.exp()
    # What the teacher rules out costs nothing, also where the student rules it out: 0 * (-inf + inf) would be nan.
    difference = torch.where(share > 0, teacher - student, torch.zeros_like(student))
    return (share * difference).sum(-1)


def _nll(logits: Tensor, wanted: Tensor) -> Tensor:
    """Return the negative log-likelihood ``[B, t]`` in fp32, a few tokens at a time."""
    chunk = max(1, AT_ONCE // logits.shape[2])
    rows = []
    for row, right in zip(logits, wanted, strict=True):
        pieces = zip(row.split(chunk), right.split(chunk), strict=True)
        rows.append(torch.cat([functional.cross_entropy(a.float(), b, reduction="none") for a, b in pieces]))
    return torch.stack(rows)


def _again(function: Callable[..., Tensor], logits: Tensor, *others: Tensor | None) -> Tensor:
    """Call a function; where gradients are wanted, compute it again backwards instead of keeping fp32 copies."""
    if not (torch.is_grad_enabled() and logits.requires_grad):
        return function(logits, *others)
    again: Any = checkpoint(function, logits, *others, use_reentrant=False, preserve_rng_state=False)
    assert isinstance(again, Tensor)
    return again


def _vocabulary(hf: nn.Module, ids: Tensor) -> int:
    """Return how many logits the model gives, which may be more than its tokenizer has tokens."""
    with torch.no_grad():
        return int(forward.logits(hf, ids[:1, :2]).shape[-1])


def _dtype(count: int) -> torch.dtype:
    return torch.float32 if 4 * count <= SMALL else torch.float16


def _shorten(logits: Tensor, top: int | None, dtype: torch.dtype) -> dict[str, Tensor]:
    """Return what is kept of logits ``[b, t, V]``."""
    found: dict[str, list[Tensor]] = {"values": []} if top is None else {"values": [], "chosen": []}
    for row in logits:
        values = row.float()
        if top is not None:
            values, chosen = values.topk(top, dim=-1)
            found["chosen"].append(chosen.to(torch.int32).cpu())
        values = values - values.amax(-1, keepdim=True)
        found["values"].append(values.to(dtype).cpu())
    return {name: torch.stack(tensors) for name, tensors in found.items()}


def _mapped(file: Path) -> dict[str, Tensor]:
    try:
        with safe_open(file, framework="pt") as opened:
            return {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118, no mapping
    except (SafetensorError, OSError) as error:
        raise OutputError(f"{file} cannot be read ({error}); delete its folder and start again.") from None


def _about(
    hf: nn.Module, ids: Tensor, mask: Tensor | None, top: int | None, step: int, dtype: torch.dtype
) -> dict[str, Any]:
    weights = json.dumps(audit.digests(hf), sort_keys=True)
    return {
        "model": hashlib.sha256(weights.encode()).hexdigest(),
        "rows": _digest(ids, mask),
        "top": top,
        "step": step,
        "dtype": str(dtype),
    }


def _claim(folder: Path, about: dict[str, Any]) -> None:
    """Make sure that the folder's logits, if there are any, are those that are wanted."""
    noted = folder / _ABOUT
    try:
        known = json.loads(noted.read_text(encoding="utf-8"))
    except FileNotFoundError:
        folder.mkdir(parents=True, exist_ok=True)
        write_json(noted, about)
        return
    except ValueError:
        known = None
    if known != about:
        raise OutputError(
            f"{folder} holds a teacher of another model or of other rows; choose another folder or empty it."
        )


def _digest(ids: Tensor, mask: Tensor | None) -> str:
    found = hashlib.sha256(repr(tuple(ids.shape)).encode())
    for tensor in (ids, mask):
        if tensor is not None:
            found.update(np.ascontiguousarray(tensor.numpy().astype("<i8")).tobytes())
    return found.hexdigest()
