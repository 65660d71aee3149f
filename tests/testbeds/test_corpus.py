"""Reading folders of text, the split, the tokenizer."""

from __future__ import annotations

import gzip
import json
import lzma
from pathlib import Path

import numpy as np
import pytest

from paredown.errors import DataError
from paredown.testbeds import corpus

TEXT = "It was the best of times.\nIt was the worst of times, in 1859."


def _folder(tmp_path: Path) -> Path:
    record = json.dumps({"id": 7, "title": "A tale", "text": TEXT}) + "\n\n"
    story = json.dumps({"story": TEXT + " Twice."}) + "\n"
    (tmp_path / "plain").mkdir()
    (tmp_path / "plain" / "a.jsonl").write_text(record, encoding="utf-8")
    (tmp_path / "plain" / "b.txt").write_text(TEXT, encoding="utf-8")
    (tmp_path / "packed").mkdir()
    with gzip.open(tmp_path / "packed" / "c.jsonl.gz", "wt", encoding="utf-8") as file:
        file.write(story)
    with lzma.open(tmp_path / "packed" / "d.jsonl.xz", "wt", encoding="utf-8") as file:
        file.write(record)
    with gzip.open(tmp_path / "packed" / "e.txt.gz", "wt", encoding="utf-8") as file:
        file.write(TEXT)
    (tmp_path / "packed" / "notes.md").write_text("no data", encoding="utf-8")
    return tmp_path


def test_every_kind_of_file_is_read(tmp_path: Path) -> None:
    found = list(corpus.read(_folder(tmp_path)))
    assert sorted(document.text for document in found) == [TEXT] * 4 + [TEXT + " Twice."]
    assert {document.source for document in found} == {
        "plain: 7 A tale",
        "plain: b.txt",
        "packed: c.jsonl.gz",
        "packed: 7 A tale",
        "packed: e.txt.gz",
    }


def test_only_and_longest(tmp_path: Path) -> None:
    found = list(corpus.read(_folder(tmp_path), only=["plain"], longest=6))
    assert [document.text for document in found] == ["It was", "It was"]


def test_equal_texts_stand_on_the_same_side_even_when_cut(tmp_path: Path) -> None:
    for number in range(200):
        (tmp_path / f"{number:03}.txt").write_text(f"document number {number} " * 5, encoding="utf-8")
    whole = [document.heldout for document in corpus.read(tmp_path)]
    assert 0 < sum(whole) < 30
    assert whole == [document.heldout for document in corpus.read(tmp_path, longest=4)]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("x.jsonl", b'{"body": "no text"}\n', "line 1: no text"),
        ("x.jsonl", b"[1, 2]\n", "line 1: no text"),
        ("x.jsonl", b"{broken\n", "cannot be read"),
        ("x.jsonl.gz", b"not gzip", "cannot be read"),
        ("x.jsonl.xz", b"not xz", "cannot be read"),
        ("x.txt", b"\xff\xfe\xfa", "cannot be read"),
        ("x.csv", b"a,b", "no text under"),
    ],
)
def test_bad_data_is_named(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=message):
        list(corpus.read(tmp_path))


def test_tokenizer_keeps_digits_apart_and_texts_come_back() -> None:
    tokenizer = corpus.train_tokenizer([TEXT] * 20, vocabulary=300)
    ids = tokenizer.encode("in 1859.", add_special_tokens=False)
    assert [tokenizer.decode([token]) for token in ids][-5:] == ["1", "8", "5", "9", "."]
    assert tokenizer.decode(ids) == "in 1859."
    assert tokenizer.convert_tokens_to_ids("<|image|>") == 2


def test_prepare_encodes_once_and_keeps_the_split(tmp_path: Path) -> None:
    data, out = tmp_path / "data", tmp_path / "out"
    data.mkdir()
    for number in range(100):
        (data / f"{number}.txt").write_text(f"text {number}\n\nand more\n", encoding="utf-8")
    tokenizer = corpus.train_tokenizer(["text and more 0123456789"], vocabulary=300)
    train, heldout = corpus.prepare(data, out, tokenizer)
    assert train.dtype == np.uint16
    ends = [int((side == tokenizer.eos_token_id).sum()) for side in (train, heldout)]
    assert sum(ends) == 100
    assert ends[1] == sum(document.heldout for document in corpus.read(data))
    before = (out / "train.bin").stat().st_mtime_ns
    again, _ = corpus.prepare(data, out, tokenizer)
    assert (out / "train.bin").stat().st_mtime_ns == before
    np.testing.assert_array_equal(train, again)
