"""Texts with labels: read from a file, or made of calibration data, and turned into rows of tokens and positions."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from paredown.core.calibration import Batch
from paredown.errors import DataError

Task = Literal["next", "repeat"]
"""Tasks that calibration data answer themselves. ``next``: whether a common token follows (one of those that make up
half of all tokens). ``repeat``: whether the last token stood in the row before."""


@dataclass(frozen=True)
class Labelled:
    """Examples: positions in rows, each with a label.

    Attributes
    ----------
    ids, mask
        ``[N, T]``; texts of unequal length are padded on the right.
    positions
        ``[N, P]``: where the vectors are taken; causal models see nothing after them.
    labels
        ``[N * P]`` of 0 and 1.
    names
        What the labels 0 and 1 are called.
    """

    ids: Tensor
    mask: Tensor | None
    positions: Tensor
    labels: Tensor
    names: tuple[str, str]

    @property
    def groups(self) -> Tensor:
        """The row of each example, ``[N * P]``: neighbours must not lie on both sides of a split."""
        return torch.arange(len(self.ids)).repeat_interleave(self.positions.shape[1])

    def batch(self) -> Batch:
        """Return the rows as a batch."""
        return Batch(self.ids, self.mask, "labelled texts", "", 0, len(self.ids))


def read(path: str | Path) -> list[tuple[str, str]]:
    """Read texts and labels from a ``.csv`` file with these two columns, or ``.jsonl`` with these two fields.

    Raises
    ------
    DataError
        Naming the file and the line.
    """
    file = Path(path).expanduser()
    if file.suffix not in (".csv", ".jsonl"):
        raise DataError(f"labels {str(path)!r} are of no known type: give a .csv or .jsonl file with text and label.")
    found = []
    try:
        with file.open(encoding="utf-8-sig", newline="") as lines:
            for number, record in _records(lines, file):
                text, label = record.get("text"), record.get("label")
                if not isinstance(text, str) or not text.strip() or label is None or label == "":
                    raise DataError(
                        f"line {number} of {str(path)!r} needs a text and a label, as fields of these names."
                    )
                found.append((text, str(label)))
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise DataError(f"labels {str(path)!r} cannot be read ({reason}); give a .csv or .jsonl file.") from None
    return found


def _records(lines: Any, file: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    if file.suffix == ".csv":
        reader = csv.DictReader(lines)
        for row in reader:
            yield reader.line_num, row
        return
    for number, line in enumerate(lines, 1):
        if line.strip():
            try:
                record = json.loads(line)
            except ValueError:
                record = None
            if not isinstance(record, dict):
                raise DataError(f"line {number} of {str(file)!r} is not a JSON object with text and label.")
            yield number, record


def encode(tokenizer: Any, texts: list[tuple[str, str]], prompt: str, length: int, what: str) -> Labelled:
    """Turn labelled texts into rows; the vector is that of the last real token.

    Parameters
    ----------
    prompt : holds ``{text}``
    length : longer rows lose their beginning: what is asked stands at the end
    what : the file, for messages

    Raises
    ------
    DataError
        If there are not two labels, or there is no tokenizer.
    """
    names = sorted({label for _, label in texts})
    if len(names) != 2:
        raise DataError(f"{what!r} has {len(names)} different labels, and a concept has two; merge or leave out some.")
    if "{text}" not in prompt:
        raise DataError("the prompt must hold {text}, where each text is put in.")
    if tokenizer is None:
        raise DataError("the model has no tokenizer to encode labelled texts with; put its files next to its config.")
    rows = [tokenizer(prompt.replace("{text}", text), verbose=False)["input_ids"][-length:] for text, _ in texts]
    if any(not row for row in rows):
        raise DataError(f"{what!r} holds a text without a single token; leave it out.")
    longest = max(map(len, rows))
    ids, mask = torch.zeros(len(rows), longest, dtype=torch.int64), torch.zeros(len(rows), longest, dtype=torch.int64)
    for i, row in enumerate(rows):
        ids[i, : len(row)], mask[i, : len(row)] = torch.tensor(row), 1
    labels = torch.tensor([names.index(label) for _, label in texts])
    return Labelled(ids, mask, last(mask), labels, (names[0], names[1]))


def last(mask: Tensor) -> Tensor:
    """Return the position of the last real token of each row, ``[N, 1]``, wherever the padding stands."""
    positions = torch.arange(mask.shape[1])
    return (positions * mask.bool()).amax(1, keepdim=True)


def derive(data: Batch, task: Task, count: int, generator: torch.Generator) -> Labelled:
    """Make a task of calibration data: up to ``count`` positions of each row, in its later three quarters.

    Raises
    ------
    DataError
        If the rows are padded, or too short.
    """
    ids = data.input_ids
    length = ids.shape[1]
    if data.attention_mask is not None and not bool(data.attention_mask.all()):
        raise DataError("padded rows make no task of their own; give labelled texts, or rows without padding.")
    room = length - 1 - length // 4
    if room < 1:
        raise DataError(f"rows of {length} tokens have no place to ask at; give longer rows.")
    count = min(count, room)
    chosen = torch.stack([torch.randperm(room, generator=generator)[:count].sort().values for _ in range(len(ids))])
    positions = chosen + length // 4
    if task == "next":
        names = ("a rare token follows", "a common token follows")
        counts = ids.flatten().bincount().sort(descending=True)
        common = counts.indices[: 1 + int((counts.values.cumsum(0) < ids.numel() / 2).sum())]
        labels = torch.isin(ids.gather(1, positions + 1), common)
    else:
        names = ("the token is new in the row", "the token stood in the row before")
        before = torch.arange(length) < positions[..., None]
        labels = ((ids[:, None] == ids.gather(1, positions)[..., None]) & before).any(-1)
    return Labelled(ids, None, positions, labels.flatten().long(), names)


def with_noise(examples: Labelled, count: int, generator: torch.Generator) -> Labelled:
    """Return the examples with ``count`` random tokens before each row, drawn from those that occur."""
    known = examples.ids if examples.mask is None else examples.ids[examples.mask.bool()]
    vocabulary = torch.unique(known)
    drawn = vocabulary[torch.randint(len(vocabulary), (len(examples.ids), count), generator=generator)]
    mask = examples.mask
    if mask is not None:
        mask = torch.cat([torch.ones_like(drawn), mask], 1)
    ids = torch.cat([drawn, examples.ids], 1)
    return Labelled(ids, mask, examples.positions + count, examples.labels, examples.names)
