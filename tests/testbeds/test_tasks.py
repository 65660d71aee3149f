"""The generators of the recall task and the mosaic task."""

from __future__ import annotations

import numpy as np
import pytest

from paredown.testbeds import corpus, mosaic, tasks

FILLER = ["The garden was silent. Nobody walked there before noon, and after noon nobody spoke. " * 30]


@pytest.fixture(scope="module")
def tokenizer():
    return corpus.train_tokenizer([*FILLER, "The secret number of is row column none 0123456789"], vocabulary=400)


def test_recall_items_have_the_length_and_hold_the_fact(tokenizer) -> None:
    items = tasks.recall_items(tokenizer, FILLER, length=200, count=30)
    for item in items:
        assert len(item.prompt) == 200
        assert tokenizer.decode(item.prompt).endswith(f"\n{item.question}")
        assert f"{item.question} {item.reply}." in item.text
        assert tokenizer.decode(item.answer).strip() == item.reply
        assert item.text.count("The secret number of") == 4
    assert min(item.depth for item in items) < 0.2
    assert max(item.depth for item in items) > 0.8


def test_recall_items_depend_on_the_seed_alone(tokenizer) -> None:
    first = tasks.recall_items(tokenizer, FILLER, length=128, count=5, seed=3)
    assert first == tasks.recall_items(tokenizer, FILLER, length=128, count=5, seed=3)
    assert first != tasks.recall_items(tokenizer, FILLER, length=128, count=5, seed=4)


def test_recall_needs_enough_filler(tokenizer) -> None:
    with pytest.raises(ValueError, match="the filler has"):
        tasks.recall_items(tokenizer, ["too short"], length=128)


def test_training_rows_weigh_every_answer(tokenizer) -> None:
    writer = tasks.FactWriter(tokenizer, tasks.names_in(FILLER))
    window = np.array(tokenizer.encode(FILLER[0], add_special_tokens=False)[:257], dtype=np.int64)
    ids, weights = writer.training_row(window, 5, np.random.default_rng(0))
    assert len(ids) == len(weights) == 257
    answers = tokenizer.decode([token for token, weight in zip(ids, weights, strict=True) if weight == 6.0])
    numbers = [line.strip(" .") for line in answers.strip().split("\n")]
    text = tokenizer.decode(ids)
    assert len(numbers) == 5
    assert all(text.count(f" {number}.") >= 2 for number in numbers)


def test_mosaics_show_what_their_labels_say() -> None:
    digits = np.stack([np.full((28, 28), 20 * label + 10, dtype=np.uint8) for label in range(10)])
    made = mosaic.make(digits, np.arange(10), 50, np.random.default_rng(0))
    cells = made.pixels.reshape(50, 3, 28, 3, 28)[:, :, 14, :, 14].reshape(50, 9)
    np.testing.assert_array_equal(np.where(cells == 0, mosaic.EMPTY, (cells - 10) // 20), made.labels)
    filled = (made.labels != mosaic.EMPTY).sum(axis=1)
    assert filled.min() >= 2
    assert filled.max() == 9
    assert made.image(0).size == (84, 84)
    assert made.presence()[0].tolist() == [float(digit in made.labels[0]) for digit in range(10)]


def test_mosaics_depend_on_the_seed_alone() -> None:
    digits = np.random.default_rng(0).integers(0, 255, size=(20, 28, 28), dtype=np.uint8)
    labels = np.arange(20) % 10
    first, again, other = (mosaic.make(digits, labels, 8, np.random.default_rng(seed), shift=2) for seed in (1, 1, 2))
    np.testing.assert_array_equal(first.pixels, again.pixels)
    np.testing.assert_array_equal(first.labels, again.labels)
    assert (first.pixels != other.pixels).any()


def test_a_shift_moves_a_digit_and_loses_nothing() -> None:
    digits = np.zeros((1, 28, 28), dtype=np.uint8)
    digits[0, 10:14, 10:14] = 200
    made = mosaic.make(digits, np.array([5]), 20, np.random.default_rng(0), shift=2)
    cells = made.pixels.reshape(20, 3, 28, 3, 28).transpose(0, 1, 3, 2, 4).reshape(20, 9, -1)
    np.testing.assert_array_equal((cells > 0).sum(axis=2), np.where(made.labels == 5, 16, 0))


def test_questions_and_geometry() -> None:
    assert mosaic.question(5) == "row 2 column 3?"
    assert mosaic.answer(mosaic.EMPTY) == " none"
    patches = mosaic.SHAPE.cell_of_patch()
    assert patches.shape == (144,) == (mosaic.SHAPE.visual_tokens,)
    assert np.bincount(patches).tolist() == [16] * 9
    assert patches[4] == 1
    assert patches[12 * 4] == 3
