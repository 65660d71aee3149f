"""Data in, batches out: read text from wherever it is, cut it into rows of tokens; deterministic throughout.

- Rows are full: documents follow each other with an end-of-text token after each, so nothing is padded.
- A file that serves both calibration and the gate is split by the hash of its documents: what a method looks at is
  never what it is judged on.
- Everything that can be wrong with a file is a `DataError` that names the file and the line.
"""

from __future__ import annotations

import gzip
import hashlib
import json
import lzma
import re
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import IO, Any, Literal, cast

import numpy as np
import torch
from torch import Tensor

from paredown.errors import DataError

Split = Literal["calibration", "heldout", "all"]

TEXT_FIELDS = ("text", "content", "story")
"""Fields of a JSON line or a table that may hold the text; the first found wins."""
PLAIN = (".txt", ".md")
SUFFIXES = (*(stem + packed for stem in (*PLAIN, ".jsonl") for packed in ("", ".gz", ".xz")), ".parquet")
LONGEST_READ = 64 * 2**20
"""Characters read of one source: far more than any calibration needs, and an end to files that unpack without one."""
HELDOUT_SHARE = 0.25
_PIECE = 16_384
_SPARE = 4
_HUB_ID = re.compile(r"[\w.-]+(/[\w.-]+)?(:[\w.-]+)?")
_BROKEN = (OSError, EOFError, zlib.error, lzma.LZMAError, UnicodeDecodeError)


@dataclass(frozen=True)
class Texts:
    """Documents and where they came from.

    Attributes
    ----------
    name
        What the user calls them: a file's name, a data set's id, ``testbed:NAME``.
    texts
        The documents; none is empty.
    sha256
        Of all documents in this order.
    notes
        What the user should know, one sentence each.
    """

    name: str
    texts: tuple[str, ...]
    sha256: str
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Batch:
    """Rows of tokens.

    Attributes
    ----------
    input_ids
        ``[N, T]``, int64, on the CPU.
    attention_mask
        ``[N, T]``, or None where every token counts, as in all that `tokenize` makes.
    name, sha256
        Of the texts.
    seed
        What the rows were drawn with.
    available
        Rows that the draw could choose from; as many as there are rows means that every seed sees the same ones.
    notes
        What the user should know, one sentence each.
    """

    input_ids: Tensor
    attention_mask: Tensor | None
    name: str
    sha256: str
    seed: int
    available: int
    notes: tuple[str, ...] = ()

    def __len__(self) -> int:
        return int(self.input_ids.shape[0])

    def take(self, rows: slice | list[int]) -> Batch:
        """Return some of the rows."""
        mask = None if self.attention_mask is None else self.attention_mask[rows]
        return replace(self, input_ids=self.input_ids[rows], attention_mask=mask)

    @property
    def tokens(self) -> int:
        """Tokens that count."""
        return int(self.input_ids.numel() if self.attention_mask is None else self.attention_mask.sum())

    @property
    def fingerprint(self) -> str:
        """The sha256 of shape and token ids: equal fingerprints mean equal work."""
        ids = np.ascontiguousarray(self.input_ids.numpy().astype("<i8"))
        return hashlib.sha256(repr(ids.shape).encode() + ids.tobytes()).hexdigest()

    def record(self) -> dict[str, Any]:
        """Return what a run's record says about this batch."""
        return {
            "name": self.name,
            "sha256": self.sha256,
            "fingerprint": self.fingerprint,
            "sequences": len(self),
            "length": int(self.input_ids.shape[1]),
            "tokens": self.tokens,
            "seed": self.seed,
            "available": self.available,
            "notes": list(self.notes),
        }


def read(source: str | Path | None, *, model_ref: str, split: Split) -> Texts:
    """Read documents.

    Parameters
    ----------
    source
        A file (``.txt``, ``.md``, ``.jsonl``, each also with ``.gz`` or ``.xz``; ``.parquet``), a folder of such
        files, a hub data set as ``ID`` or ``ID:CONFIG``, ``testbed:NAME``, or None for the testbed's own sample.
    model_ref
        The model that the data is for, as the user named it.
    split
        ``calibration`` and ``heldout`` never share a document: they are two samples of a testbed, two splits of a hub
        data set or, in a file, three quarters and one quarter by the hash of each document. ``all`` is all of a file;
        of a testbed or data set the part that is meant for evaluation.

    Raises
    ------
    DataError
        If there is nothing to read, or it cannot be read.
    """
    if source is None:
        if not model_ref.startswith("testbed:"):
            raise DataError(
                f"{model_ref!r} brings no data of its own: pass --data with a .txt, .jsonl or .parquet file, "
                "a folder of them, or a hub data set id"
            )
        return _testbed(model_ref, split)
    name = str(source)
    if name.startswith("testbed:"):
        return _testbed(name, split)
    path = Path(source).expanduser()
    try:
        exists = path.exists()
    except (OSError, ValueError) as error:
        raise DataError(f"data {name!r} cannot be read: {_reason(error)}") from error
    if not exists:
        if _looks_like_path(name):
            raise DataError(f"no file or folder {name!r}: give --data an existing one, or a hub data set id")
        return _hub(name, split)
    notes: list[str] = []
    texts = _limited(_documents(path), path.name, notes)
    if not texts:
        raise DataError(f"{name!r} holds no text: give --data a file with some")
    return _made(path.name, _part(texts, split, name), notes)


def tokenize(
    tokenizer: Any,
    texts: Texts,
    *,
    length: int = 512,
    sequences: int = 64,
    seed: int = 0,
    what: str = "calibration",
    max_positions: int | None = None,
    vocabulary: int | None = None,
) -> Batch:
    """Pack documents into rows of tokens.

    Documents are put in an order drawn from the seed and encoded one after the other, an end-of-text token after each,
    until they fill four times the rows wanted or end. The stream is cut into rows, of which the seed draws
    ``sequences``. Where the tokenizer begins a text with a token of its own (``<bos>``), each row begins with it.

    Parameters
    ----------
    tokenizer
        A Hugging Face tokenizer.
    texts
        What `read` returned.
    length
        Tokens of a row, at most ``max_positions``.
    sequences
        Rows wanted; fewer come back, with a note, where the texts hold fewer.
    seed
        Another seed draws other rows of the same texts.
    what
        What the rows are for; appears in messages.
    max_positions, vocabulary
        Of the model, see `for_model`.

    Raises
    ------
    DataError
        If there is not one full row, or the tokenizer makes tokens that the model does not have.
    """
    if tokenizer is None:
        raise DataError(
            f"the model has no tokenizer to encode the {what} data with: put tokenizer files next to its config"
        )
    notes = list(texts.notes)
    if max_positions is not None and length > max_positions:
        notes.append(f"Rows were shortened from {length} to the model's {max_positions} positions.")
        length = max_positions
    if length < 2 or sequences < 1:
        raise DataError(
            f"{what} data needs rows of 2 tokens or more and at least 1 row, not {sequences} rows of {length}"
        )
    rng = np.random.default_rng(seed)
    pieces = [piece for text in texts.texts for piece in _pieces(text)]
    start, end = _start_token(tokenizer), tokenizer.eos_token_id
    body = length - (start is not None)
    wanted = _SPARE * sequences * body
    stream: list[int] = []
    for index in rng.permutation(len(pieces)):
        stream += tokenizer(pieces[index], add_special_tokens=False, verbose=False)["input_ids"]
        if end is not None:
            stream.append(int(end))
        if len(stream) >= wanted:
            break
    available = len(stream) // body
    if available == 0:
        raise DataError(
            f"the {what} data {texts.name!r} gives {len(stream)} tokens and one row takes {body}: "
            "give more text or shorter rows"
        )
    if available < sequences:
        notes.append(f"The {what} data {texts.name!r} fills {available} rows of {length} tokens, not {sequences}.")
    rows = torch.tensor(stream[: available * body], dtype=torch.int64).view(available, body)
    rows = rows[torch.from_numpy(np.sort(rng.permutation(available)[:sequences]))]
    if start is not None:
        rows = torch.cat([torch.full((len(rows), 1), start, dtype=torch.int64), rows], dim=1)
    if vocabulary is not None and (largest := int(rows.max())) >= vocabulary:
        raise DataError(
            f"the tokenizer makes token {largest} but the model has only {vocabulary}: "
            "use the tokenizer that belongs to the model"
        )
    return Batch(rows.contiguous(), None, texts.name, texts.sha256, seed, available, tuple(notes))


def for_model(
    model: Any, texts: Texts, *, length: int = 512, sequences: int = 64, seed: int = 0, what: str = "calibration"
) -> Batch:
    """`tokenize` for a `checkpoint.Model`, within its positions and its vocabulary."""
    config = model.hf.config.get_text_config()
    return tokenize(
        model.tokenizer,
        texts,
        length=length,
        sequences=sequences,
        seed=seed,
        what=what,
        max_positions=getattr(config, "max_position_embeddings", None),
        vocabulary=getattr(config, "vocab_size", None),
    )


def _made(name: str, texts: Sequence[str], notes: Sequence[str]) -> Texts:
    digest = hashlib.sha256()
    for text in texts:
        digest.update(text.encode("utf-8") + b"\0")
    return Texts(name, tuple(texts), digest.hexdigest(), tuple(notes))


def _testbed(ref: str, split: Split) -> Texts:
    from paredown import testbeds

    name = ref.removeprefix("testbed:")
    texts = testbeds.calibration_texts(name) if split == "calibration" else testbeds.heldout_texts(name)
    return _made(ref, [text for text in texts if text.strip()], [])


def _reason(error: BaseException) -> str:
    """Return the first line of an error, short enough to stand inside a sentence."""
    lines = str(error).strip().splitlines()
    text = (error.strerror if isinstance(error, OSError) and error.strerror else lines[0] if lines else "").rstrip(".")
    return text[:200] or type(error).__name__


def _looks_like_path(name: str) -> bool:
    return name.endswith(SUFFIXES) or name.startswith((".", "/", "~")) or _HUB_ID.fullmatch(name) is None


# --- files -----------------------------------------------------------------------------------------------------------


def _documents(path: Path) -> Iterator[str]:
    if path.is_dir():
        files = sorted(file for file in path.rglob("*") if file.name.endswith(SUFFIXES) and file.is_file())
        if not files:
            raise DataError(f"folder {str(path)!r} holds no data: put files into it that end in {_endings()}")
    else:
        files = [path]
        if not path.name.endswith(SUFFIXES):
            raise DataError(f"data file {str(path)!r} is of no known type: its name must end in {_endings()}")
    for file in files:
        try:
            yield from _file(file)
        except _BROKEN as error:
            kind = "is not UTF-8 text" if isinstance(error, UnicodeDecodeError) else "cannot be read"
            raise DataError(f"data file {str(file)!r} {kind} ({_reason(error)}): repair it or leave it out") from error


def _endings() -> str:
    return ".txt, .md, .jsonl (each also .gz or .xz) or .parquet"


def _file(path: Path) -> Iterator[str]:
    if path.suffix == ".parquet":
        yield from _parquet(path)
        return
    opener = cast(
        "Callable[..., IO[str]]", {".gz": gzip.open, ".xz": lzma.open}.get(path.suffix, open)
    )  # each takes the same arguments
    with opener(path, "rt", encoding="utf-8-sig") as lines:
        if ".jsonl" not in path.suffixes:
            text = lines.read(LONGEST_READ)
            if "\0" in text:
                raise DataError(f"data file {str(path)!r} is binary, not text: repair it or leave it out")
            yield text
            return
        number = 0
        while line := lines.readline(LONGEST_READ):
            number += 1
            if line.strip():
                yield _json_line(line, path, number)


def _json_line(line: str, path: Path, number: int) -> str:
    where = f"line {number} of {str(path)!r}"
    try:
        record = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise DataError(
            f"{where} is not JSON ({_reason(error)}): each line must be one object with a text field"
        ) from error
    if not isinstance(record, dict):
        raise DataError(f"{where} is not a JSON object: each line must be one object with a text field")
    for field in TEXT_FIELDS:
        if isinstance(record.get(field), str):
            # A lone surrogate is legal in JSON and in no text.
            return str(record[field]).encode("utf-8", "replace").decode("utf-8")
    raise DataError(f"{where} has no text: put a string into one of the fields {', '.join(TEXT_FIELDS)}")


def _parquet(path: Path) -> Iterator[str]:
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError as error:
        raise DataError(f"reading {str(path)!r} needs pyarrow: pip install 'paredown[data]'") from error
    try:
        table = parquet.ParquetFile(path)
        field = next((field for field in TEXT_FIELDS if field in table.schema_arrow.names), None)
        if field is None:
            raise DataError(f"{str(path)!r} has no text: name one of its columns {', '.join(TEXT_FIELDS)}")
        for batch in table.iter_batches(columns=[field]):
            for value in batch.column(0).to_pylist():
                if value is not None and not isinstance(value, str):
                    raise DataError(f"column {field!r} of {str(path)!r} holds no text: give one with strings")
                yield value or ""
    except pyarrow.ArrowException as error:
        raise DataError(
            f"data file {str(path)!r} cannot be read ({_reason(error)}): repair it or leave it out"
        ) from error


def _hub(name: str, split: Split) -> Texts:
    try:
        import datasets
    except ImportError as error:
        raise DataError(
            f"no file or folder {name!r}, and reading it as a hub data set needs datasets: pip install 'paredown[data]'"
        ) from error
    repository, _, config = name.partition(":")
    try:
        names: list[str] = datasets.get_dataset_split_names(repository, config or None)
        prefer = ("train", "validation", "test") if split == "calibration" else ("test", "validation", "train")
        chosen = next((part for part in prefer if part in names), names[0])
        rows: Iterable[dict[str, Any]] = datasets.load_dataset(repository, config or None, split=chosen, streaming=True)
        notes: list[str] = []
        texts = _limited(_rows(rows, name), name, notes)
    except DataError:
        raise
    except Exception as error:  # the library raises what its file systems, parsers and servers raise
        raise DataError(
            f"hub data set {name!r} cannot be read ({_reason(error)}): check its id, or pass a local file with --data"
        ) from error
    if not texts:
        raise DataError(f"hub data set {name!r} holds no text: give another")
    other = len(names) > 1 and (split == "calibration") == (chosen == "train") and "train" in names
    return _made(f"{name} ({chosen})", texts if other else _part(texts, split, name), notes)


def _rows(rows: Iterable[dict[str, Any]], name: str) -> Iterator[str]:
    for row in rows:
        text = next((row[field] for field in TEXT_FIELDS if isinstance(row.get(field), str)), None)
        if text is None:
            raise DataError(
                f"hub data set {name!r} has no text: it must have one of the columns {', '.join(TEXT_FIELDS)}"
            )
        yield text


def _limited(texts: Iterable[str], name: str, notes: list[str]) -> list[str]:
    """Return the documents that are not blank, up to `LONGEST_READ` characters of them."""
    kept: list[str] = []
    total = 0
    for text in texts:
        if not text.strip():
            continue
        kept.append(text[: LONGEST_READ - total])
        total += len(text)
        if total >= LONGEST_READ:
            notes.append(f"Only the first {LONGEST_READ // 2**20} Mi characters of {name!r} were read.")
            break
    return kept


# --- splitting -------------------------------------------------------------------------------------------------------


def _pieces(text: str) -> Iterator[str]:
    """Cut a long document at white space, so that drawing and splitting have something to choose from."""
    start = 0
    while len(text) - start > _PIECE:
        cut = max(
            text.rfind("\n", start + _PIECE // 2, start + _PIECE), text.rfind(" ", start + _PIECE // 2, start + _PIECE)
        )
        cut = cut if cut > 0 else start + _PIECE
        yield text[start:cut]
        start = cut
    yield text[start:]


def _part(texts: list[str], split: Split, name: str) -> list[str]:
    """Return one side of a file; a document never stands on both, and where it stands does not depend on its place."""
    if split == "all":
        return texts
    pieces = [piece for text in texts for piece in _pieces(text) if piece.strip()]
    keys = [hashlib.sha256(piece.strip().encode("utf-8")).digest() for piece in pieces]
    order = sorted(set(keys))
    if len(order) == 1:
        sides = _cut_once(pieces[0])
        if not all(side.strip() for side in sides):
            raise DataError(f"{name!r} is too short to set a held-out part aside: give more text")
        return [sides[split == "heldout"]]
    sizes = {key: len(piece) for key, piece in zip(keys, pieces, strict=True)}
    goal = HELDOUT_SHARE * sum(sizes.values())
    heldout: set[bytes] = set()
    for key in order[:-1]:
        if sum(sizes[held] for held in heldout) >= goal:
            break
        heldout.add(key)
    return [piece for key, piece in zip(keys, pieces, strict=True) if (key in heldout) == (split == "heldout")]


def _cut_once(text: str) -> tuple[str, str]:
    """Cut one document at the white space before its last quarter."""
    text = text.strip()
    ends = [match.start() for match in re.finditer(r"\s", text)]
    goal = (1 - HELDOUT_SHARE) * len(text)
    cut = min(ends, key=lambda at: abs(at - goal), default=len(text))
    return text[:cut], text[cut:]


def _start_token(tokenizer: Any) -> int | None:
    """Return the token that the tokenizer puts before every text, if it does: some models are lost without it."""
    first = tokenizer.bos_token_id
    if first is None:
        first = getattr(tokenizer, "cls_token_id", None)
    ids = tokenizer("a", verbose=False)["input_ids"]
    return int(first) if first is not None and len(ids) > 1 and ids[0] == first else None
