"""Text in, rows out: every file type, every way a file can be wrong, and rows that depend on seed and text alone."""

from __future__ import annotations

import gzip
import json
import lzma
import sys
from types import SimpleNamespace

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from paredown.core import calibration
from paredown.errors import DataError

WORDS = [f"w{i}" for i in range(60)]


def make_tokenizer(*, bos: bool = False) -> PreTrainedTokenizerFast:
    vocabulary = {word: i for i, word in enumerate(["<s>", "</s>", "<unk>", *WORDS])}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    if bos:
        backend.post_processor = processors.TemplateProcessing("<s> $A", special_tokens=[("<s>", 0)])
    return PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>", unk_token="<unk>")


@pytest.fixture(scope="module")
def tokenizer():
    return make_tokenizer()


def texts(*documents: str) -> calibration.Texts:
    return calibration.Texts("given", documents, "0")


def story(number: int, words: int = 40) -> str:
    return " ".join(WORDS[(number * 7 + i * i) % len(WORDS)] for i in range(words))


def read(path, split="all"):
    return calibration.read(path, model_ref="some/model", split=split)


def packed(path, data: bytes):
    path.write_bytes({".gz": gzip.compress, ".xz": lzma.compress}.get(path.suffix, bytes)(data))
    return path


# --- reading ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["a.txt", "a.md", "a.txt.gz", "a.txt.xz"])
def test_a_text_file_is_one_document(tmp_path, name):
    found = read(packed(tmp_path / name, "\ufeffone\r\ntwo é".encode()))
    assert found.texts == ("one\ntwo é",)
    assert found.name == name


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz", "a.jsonl.xz"])
@pytest.mark.parametrize("field", calibration.TEXT_FIELDS)
def test_each_json_line_is_a_document(tmp_path, name, field):
    lines = [json.dumps({"id": 3, field: "one"}), "", json.dumps({field: " \n"}), json.dumps({field: "two"})]
    assert read(packed(tmp_path / name, "\n".join(lines).encode())).texts == ("one", "two")


def test_a_lone_surrogate_in_json_does_no_harm(tmp_path):
    found = read(packed(tmp_path / "a.jsonl", b'{"text": "a \\ud800 b"}'))
    assert found.texts == ("a ? b",)


def test_a_folder_is_all_its_files_in_order(tmp_path):
    (tmp_path / "deep").mkdir()
    (tmp_path / "deep" / "b.txt").write_text("second")
    (tmp_path / "a.jsonl").write_text('{"text": "first"}\n')
    (tmp_path / "picture.png").write_bytes(b"\x89PNG\0")
    assert read(tmp_path).texts == ("first", "second")


def test_the_digest_tells_documents_apart(tmp_path):
    one = read(packed(tmp_path / "a.jsonl", b'{"text": "ab"}\n{"text": "c"}')).sha256
    other = read(packed(tmp_path / "b.jsonl", b'{"text": "a"}\n{"text": "bc"}')).sha256
    again = read(packed(tmp_path / "c.jsonl.gz", b'{"text": "ab"}\n{"text": "c"}')).sha256
    assert one == again != other


def test_parquet_files_are_read(tmp_path):
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    path = tmp_path / "a.parquet"
    parquet.write_table(pyarrow.table({"id": [1, 2, 3], "text": ["one", None, "two"]}), path)
    assert read(path).texts == ("one", "two")
    parquet.write_table(pyarrow.table({"id": [1]}), path)
    with pytest.raises(DataError, match="has no text"):
        read(path)
    path.write_bytes(b"PAR1 no such thing")
    with pytest.raises(DataError, match="cannot be read"):
        read(path)


@pytest.mark.parametrize(("source", "module"), [("a.parquet", "pyarrow"), ("some-org/some-data", "datasets")])
def test_a_missing_extra_is_told_in_one_sentence(tmp_path, monkeypatch, source, module):
    monkeypatch.setitem(sys.modules, module, None)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a.parquet").write_bytes(b"PAR1")
    with pytest.raises(DataError, match=r"paredown\[data\]"):
        read(source)


def fake_datasets(splits, rows):
    return SimpleNamespace(
        get_dataset_split_names=lambda repository, config: splits,
        load_dataset=lambda repository, config, split, streaming: [
            {"text": f"{repository} {config} {split} {i}"} for i in range(rows)
        ],
    )


@pytest.mark.parametrize(
    ("splits", "split", "chosen"),
    [
        (["train", "test"], "calibration", "train"),
        (["train", "test"], "heldout", "test"),
        (["train", "validation"], "all", "validation"),
        (["odd"], "calibration", "odd"),
    ],
)
def test_a_hub_data_set_gives_the_split_that_fits(monkeypatch, splits, split, chosen):
    monkeypatch.setitem(sys.modules, "datasets", fake_datasets(splits, 20))
    found = read("org/data:small", split)
    assert found.name == f"org/data:small ({chosen})"
    assert all(text.startswith(f"org/data small {chosen} ") for text in found.texts)
    assert (len(found.texts) == 20) == (len(splits) > 1)


def test_a_hub_data_set_with_one_split_is_divided(monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", fake_datasets(["train"], 200))
    sides = [set(read("org/data", split).texts) for split in ("calibration", "heldout")]
    assert not sides[0] & sides[1]
    assert len(sides[0] | sides[1]) == 200


def test_a_hub_data_set_that_fails_is_a_data_error(monkeypatch):
    def fail(*_):
        raise RuntimeError("no connection\nmany\nlines")

    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(get_dataset_split_names=fail))
    with pytest.raises(DataError, match=r"org/data.*\(no connection\)") as caught:
        read("org/data")
    assert "\n" not in str(caught.value)


def test_no_data_and_no_testbed_asks_for_data():
    with pytest.raises(DataError, match="--data"):
        calibration.read(None, model_ref="some/model", split="calibration")


@pytest.mark.parametrize(("split", "expected"), [("calibration", "cal"), ("heldout", "held"), ("all", "held")])
def test_a_testbed_brings_its_own_samples(monkeypatch, split, expected):
    from paredown import testbeds

    monkeypatch.setattr(testbeds, "calibration_texts", lambda name: [f"cal {name}"])
    monkeypatch.setattr(testbeds, "heldout_texts", lambda name: [f"held {name}", " "])
    for source, ref in ((None, "testbed:lm"), ("testbed:lm", "some/model")):
        assert calibration.read(source, model_ref=ref, split=split).texts == (f"{expected} lm",)


# --- hostile files ----------------------------------------------------------------------------------------------------

HOSTILE = {
    "empty.txt": (b"", "holds no text"),
    "blank.txt": (b" \n\t\n", "holds no text"),
    "junk.txt": (bytes(range(256)) * 4, "is not UTF-8"),
    "zeros.txt": (b"abc\0def", "is binary"),
    "junk.jsonl": (b"\x93NUMPY\xff\xfe", "is not UTF-8"),
    "empty.jsonl": (b"\n\n", "holds no text"),
    "broken.jsonl": (b'{"text": "fine"}\n\n{"text": "cut', "line 3 of .*broken.jsonl.*is not JSON"),
    "list.jsonl": (b'{"text": "fine"}\n["text"]\n', "line 2 of .*list.jsonl.*not a JSON object"),
    "fieldless.jsonl": (b'{"text": "fine"}\n{"txt": "oops"}\n', "line 2 of .*fieldless.jsonl.*has no text"),
    "number.jsonl": (b'{"text": 5}\n', "line 1 of .*number.jsonl.*has no text"),
    "deep.jsonl": (b"[" * 100_000 + b"\n", "line 1 of .*deep.jsonl"),
    "cut.txt.gz": (gzip.compress(b"some text" * 99)[:-12], "cannot be read"),
    "fake.txt.gz": (b"no gzip at all", "cannot be read"),
    "fake.jsonl.xz": (b"no xz at all", "cannot be read"),
    "weights.bin": (b"text in a strange place", "of no known type"),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_files_are_one_sentence_that_names_the_file(tmp_path, name):
    data, message = HOSTILE[name]
    path = tmp_path / name
    path.write_bytes(data)
    with pytest.raises(DataError, match=message) as caught:
        read(path)
    assert name in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("source", ["gone.txt", "./gone", "a b c", "/no/such/place", "x" * 5000, "nul\0byte"])
def test_a_path_that_is_not_there_is_not_looked_up_on_the_hub(monkeypatch, tmp_path, source):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace())  # a call to it would be another error
    with pytest.raises(DataError, match=r"no file or folder|cannot be read"):
        read(source)


def test_an_empty_folder_is_told(tmp_path):
    with pytest.raises(DataError, match="holds no data"):
        read(tmp_path)


def test_reading_ends_at_the_limit(tmp_path, monkeypatch):
    monkeypatch.setattr(calibration, "LONGEST_READ", 2**20)
    found = read(packed(tmp_path / "bomb.txt.gz", b"a " * 2**21))
    assert sum(map(len, found.texts)) == 2**20
    assert found.notes == ("Only the first 1 Mi characters of 'bomb.txt.gz' were read.",)
    lines = b'{"text": "%s"}\n' % (b"a" * 2**18) * 9
    found = read(packed(tmp_path / "many.jsonl", lines))
    assert sum(map(len, found.texts)) == 2**20
    assert len(found.notes) == 1


# --- splitting --------------------------------------------------------------------------------------------------------


def sides(path):
    return [read(path, split).texts for split in ("calibration", "heldout")]


def test_calibration_and_heldout_share_no_document(tmp_path):
    documents = [story(i) for i in range(50)]
    lines = [json.dumps({"text": text}) for text in [*documents, *documents[:20]]]
    path = packed(tmp_path / "a.jsonl", "\n".join(lines).encode())
    ours, theirs = sides(path)
    assert not set(ours) & set(theirs)
    assert set(ours) | set(theirs) == set(documents)
    assert 0.15 < sum(map(len, theirs)) / sum(map(len, ours + theirs)) < 0.4
    moved = packed(tmp_path / "b.jsonl", "\n".join(reversed(lines)).encode())
    assert [set(side) for side in sides(moved)] == [set(ours), set(theirs)]


@pytest.mark.parametrize("length", [60, 50_000])
def test_one_long_or_short_text_is_divided_too(tmp_path, length):
    text = " ".join(f"word{i}" for i in range(length))
    ours, theirs = sides(packed(tmp_path / "a.txt", text.encode()))
    words = [word for side in (ours, theirs) for piece in side for word in piece.split()]
    assert sorted(words) == sorted(text.split())
    assert 0.1 < len("".join(theirs)) / len(text) < 0.45


def test_one_word_cannot_be_divided(tmp_path):
    path = packed(tmp_path / "a.txt", b"word")
    assert read(path).texts == ("word",)
    for split in ("calibration", "heldout"):
        with pytest.raises(DataError, match="too short to set a held-out part aside"):
            read(path, split)


# --- rows -------------------------------------------------------------------------------------------------------------


def test_rows_are_full_and_documents_end(tokenizer):
    batch = calibration.tokenize(tokenizer, texts(*(story(i) for i in range(30))), length=16, sequences=10)
    assert batch.input_ids.shape == (10, 16)
    assert batch.input_ids.dtype == torch.int64
    assert batch.attention_mask is None
    assert batch.tokens == 160
    assert batch.notes == ()
    assert (batch.input_ids == tokenizer.eos_token_id).any()
    assert not (batch.input_ids == tokenizer.unk_token_id).any()


def test_packing_loses_and_invents_no_token(tokenizer):
    documents = [story(i, 15) for i in range(8)]
    batch = calibration.tokenize(tokenizer, texts(*documents), length=16, sequences=8)
    rows = sorted(tokenizer.decode(row) for row in batch.input_ids)
    assert rows == sorted(f"{text} </s>" for text in documents)


def test_same_seed_same_rows_and_other_seeds_other_rows(tokenizer):
    given = texts(*(story(i) for i in range(200)))
    first, again, other = (
        calibration.tokenize(tokenizer, given, length=16, sequences=8, seed=seed) for seed in (1, 1, 2)
    )
    assert torch.equal(first.input_ids, again.input_ids)
    assert first.fingerprint == again.fingerprint != other.fingerprint
    assert first.available >= 32


def test_each_row_starts_as_the_tokenizer_starts_a_text():
    tokenizer = make_tokenizer(bos=True)
    batch = calibration.tokenize(tokenizer, texts(*(story(i) for i in range(30))), length=16, sequences=4)
    assert batch.input_ids.shape == (4, 16)
    assert (batch.input_ids[:, 0] == tokenizer.bos_token_id).all()
    assert not (batch.input_ids[:, 1:] == tokenizer.bos_token_id).any()


def test_fewer_rows_than_asked_are_noted(tokenizer):
    batch = calibration.tokenize(tokenizer, texts(story(0, 50)), length=16, sequences=8)
    assert len(batch) == batch.available == 3
    assert batch.notes == ("The calibration data 'given' fills 3 rows of 16 tokens, not 8.",)
    assert batch.record()["sequences"] == 3


def test_rows_are_no_longer_than_the_model_has_positions(tokenizer):
    given = texts(*(story(i) for i in range(30)))
    config = SimpleNamespace(max_position_embeddings=12, vocab_size=63)
    model = SimpleNamespace(
        hf=SimpleNamespace(config=SimpleNamespace(get_text_config=lambda: config)), tokenizer=tokenizer
    )
    batch = calibration.for_model(model, given, length=512, sequences=4)
    assert batch.input_ids.shape == (4, 12)
    assert batch.notes == ("Rows were shortened from 512 to the model's 12 positions.",)


@pytest.mark.parametrize("document", ["word", "w1", story(0, 14)])
def test_too_little_text_for_one_row_is_an_error(tokenizer, document):
    with pytest.raises(DataError, match=r"the held-out data 'given' gives \d+ tokens and one row takes 16"):
        calibration.tokenize(tokenizer, texts(document), length=16, what="held-out")


def test_a_foreign_tokenizer_is_an_error(tokenizer):
    with pytest.raises(DataError, match="the model has only 20"):
        calibration.tokenize(tokenizer, texts(story(0, 400)), length=16, vocabulary=20)


def test_no_tokenizer_is_an_error():
    with pytest.raises(DataError, match="no tokenizer"):
        calibration.tokenize(None, texts(story(0)))


@pytest.mark.parametrize(("length", "sequences"), [(1, 4), (0, 4), (16, 0), (-3, 4)])
def test_rows_that_cannot_be_are_an_error(tokenizer, length, sequences):
    with pytest.raises(DataError, match="needs rows of 2 tokens or more"):
        calibration.tokenize(tokenizer, texts(story(0)), length=length, sequences=sequences)
