"""Text in, token streams out: a folder of ``.jsonl`` or ``.txt`` files, split by document, encoded once, kept on disk.

A document is held out when the hash of its text says so.  The split therefore depends neither on the order of the files
nor on which other files lie beside them, and a document that two files share never stands on both sides.
"""

from __future__ import annotations

import gzip
import hashlib
import json
import lzma
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, cast

import numpy as np
import numpy.typing as npt

from paredown.errors import DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

TEXT_FIELDS = ("text", "story")
"""Fields of a JSON line that may hold the text, the first found wins."""
SUFFIXES = (".jsonl", ".jsonl.gz", ".jsonl.xz", ".txt", ".txt.gz", ".txt.xz")
HELDOUT_SHARE = 1 / 32
Tokens = npt.NDArray[np.uint16]


@dataclass(frozen=True)
class Document:
    """One text and where it came from.

    Attributes
    ----------
    text
        The text, cut where the reader was told to cut.
    source
        What to cite: the file's folder, and the record's ``id`` and ``title`` where it has them.
    heldout
        Whether this document is never trained on.
    """

    text: str
    source: str
    heldout: bool

    @classmethod
    def of(cls, text: str, source: str, longest: int | None = None) -> Document:
        """Decide on which side the whole text stands, then keep its first `longest` characters."""
        digest = hashlib.sha256(text.encode("utf-8")).digest()
        return cls(text[:longest], source, int.from_bytes(digest[:8], "big") < HELDOUT_SHARE * 2**64)


def _open(path: Path) -> IO[str]:
    if path.suffix == ".gz":
        return cast("IO[str]", gzip.open(path, "rt", encoding="utf-8"))
    if path.suffix == ".xz":
        return cast("IO[str]", lzma.open(path, "rt", encoding="utf-8"))
    return path.open(encoding="utf-8")


def _citation(path: Path, record: dict[str, Any]) -> str:
    parts = [str(record[key]) for key in ("id", "title") if record.get(key) not in (None, "")]
    return " ".join([f"{path.parent.name}:", *parts]) if parts else f"{path.parent.name}: {path.name}"


def read_file(path: Path, *, longest: int | None = None) -> Iterator[Document]:
    """Yield the documents of one file: a line each for ``.jsonl*``, the whole file for ``.txt*``."""
    try:
        with _open(path) as lines:
            if ".txt" in path.suffixes:
                yield Document.of(lines.read(), f"{path.parent.name}: {path.name}", longest)
                return
            for number, line in enumerate(lines, 1):
                if line.strip():
                    record = json.loads(line)
                    yield Document.of(_text_of(record, f"{path}, line {number}"), _citation(path, record), longest)
    except (OSError, EOFError, UnicodeDecodeError, json.JSONDecodeError, lzma.LZMAError) as error:
        raise DataError(f"{path} cannot be read as text: {error}") from error


def _text_of(record: Any, where: str) -> str:
    fields = record if isinstance(record, dict) else {}
    for field in TEXT_FIELDS:
        if isinstance(fields.get(field), str):
            return cast("str", fields[field])
    raise DataError(f"{where}: no text in any of the fields {', '.join(TEXT_FIELDS)}")


def text_files(folder: Path) -> list[Path]:
    """Return the text files under `folder`, sorted, those in sub-folders too."""
    found = sorted(path for path in folder.rglob("*") if path.is_file() and path.name.endswith(SUFFIXES))
    if not found:
        raise DataError(f"no text under {folder}: looked for files ending in {', '.join(SUFFIXES)}")
    return found


def read(folder: Path, *, only: Iterable[str] = (), longest: int | None = None) -> Iterator[Document]:
    """Yield every document under `folder`.

    Parameters
    ----------
    folder
        Any folder of text files.
    only
        Names of sub-folders to read; empty means all.
    longest
        Characters to keep of one document, so that a few novels do not outweigh everything else.
    """
    for root in [folder / name for name in only] or [folder]:
        for path in text_files(root):
            yield from read_file(path, longest=longest)


def encode(texts: Iterable[str], tokenizer: PreTrainedTokenizerFast) -> Tokens:
    """Encode texts into one stream, an end-of-text token after each.

    Parameters
    ----------
    texts
        The documents.
    tokenizer
        A fast tokenizer with at most 65,536 tokens.

    Returns
    -------
    numpy.ndarray
        ``[N]`` token ids, uint16: two bytes a token on disk, read back through a memory map.
    """
    backend, end = tokenizer.backend_tokenizer, tokenizer.eos_token_id
    pieces: list[Tokens] = []
    for text in texts:
        # Paragraph by paragraph: encode_batch spreads them over the cores, and no piece is long enough to be slow.
        paragraphs = [paragraph + "\n" for paragraph in text.split("\n") if paragraph.strip()]
        pieces.extend(
            np.asarray(item.ids, dtype=np.uint16)
            for item in backend.encode_batch_fast(paragraphs, add_special_tokens=False)
        )
        pieces.append(np.asarray([end], dtype=np.uint16))
    return np.concatenate(pieces) if pieces else np.zeros(0, dtype=np.uint16)


def train_tokenizer(texts: Iterable[str], vocabulary: int = 2048) -> PreTrainedTokenizerFast:
    """Train a byte-level BPE tokenizer in which every digit is a token of its own.

    Digits stay apart so that a three-digit answer is three predictions, each of which a cache method can spoil.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    backend.decoder = decoders.ByteLevel()
    backend.train_from_iterator(
        texts,
        trainers.BpeTrainer(
            vocab_size=vocabulary,
            special_tokens=["<|endoftext|>", "<|pad|>", "<|image|>", "<|user|>", "<|assistant|>"],
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<|endoftext|>", eos_token="<|endoftext|>", pad_token="<|pad|>"
    )


def prepare(
    folder: Path, out: Path, tokenizer: PreTrainedTokenizerFast, *, only: Iterable[str] = (), longest: int = 250_000
) -> tuple[Tokens, Tokens]:
    """Encode a folder into ``train.bin`` and ``heldout.bin`` under `out`, or open what a former call left there.

    Returns
    -------
    tuple of numpy.ndarray
        ``[N_train]`` and ``[N_heldout]`` token ids, memory-mapped.
    """
    paths = {False: out / "train.bin", True: out / "heldout.bin"}
    if not all(path.exists() for path in paths.values()):
        out.mkdir(parents=True, exist_ok=True)
        texts: dict[bool, list[str]] = {False: [], True: []}
        for document in read(folder, only=only, longest=longest):
            texts[document.heldout].append(document.text)
        for side, path in paths.items():
            part = path.with_suffix(".part")
            encode(texts[side], tokenizer).tofile(part)
            part.rename(path)  # a killed run must not leave half a stream under the final name
    train, heldout = (np.memmap(paths[side], dtype=np.uint16, mode="r") for side in (False, True))
    return train, heldout
