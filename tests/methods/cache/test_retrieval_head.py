"""Retrieval heads: the table, and the card's checks on a trained model (those of the score are in tests/core)."""

from __future__ import annotations

from typing import Any

import families
import numpy as np
import pytest
import torch

from paredown.core import calibration, checkpoint, retrieval
from paredown.core.retrieval import Planter, ablate, copies
from paredown.errors import DataError
from paredown.methods.cache.retrieval_head import RetrievalHead

TEMPLATE = "\nThe secret number of {name} is {value}.\n"


def rows(count: int = 6, length: int = 40) -> calibration.Batch:
    ids = torch.randint(3, families.VOCAB, (count, length), generator=torch.Generator().manual_seed(0))
    return calibration.Batch(ids, None, "random", "", 0, count)


@pytest.mark.parametrize("family", ["llama", "qwen3", "mistral", "gemma3", "mixtral"])
def test_the_table_has_a_row_for_each_head_and_says_which_layers_have_a_window(family):
    model = checkpoint.Model.of(families.FAMILIES[family]())
    before = {name: tensor.clone() for name, tensor in model.hf.state_dict().items()}
    method = RetrievalHead(lengths=2, depths=2, longest=4)
    found = method.measure(model, rows())
    assert [(row["layer"], row["head"]) for row in found] == [
        (layer, head) for layer in range(len(model.anatomy.language.blocks)) for head in range(4)
    ]
    assert {row["kv_head"] for row in found} == set(range(model.anatomy.language.blocks[0].attention.kv_heads))
    slides = {"mistral": {0, 1, 2}, "gemma3": {0, 2}}.get(family, set())
    assert {row["layer"] for row in found if row["sliding"]} == slides
    assert all(0 <= row["score"] <= 1 and 0 <= row["frequency"] <= 1 for row in found)
    # Running twice gives identical numbers (greedy); the model is left alone.
    assert method.measure(model, rows()) == found
    assert all(torch.equal(before[name], tensor) for name, tensor in model.hf.state_dict().items())


def test_it_needs_data():
    with pytest.raises(DataError, match="calibration data"):
        RetrievalHead().measure(checkpoint.Model.of(families.llama()), None)


def trained() -> tuple[checkpoint.Model, calibration.Batch]:
    model = checkpoint.load("testbed:recall", dtype="float32")
    texts = calibration.read(None, model_ref="testbed:recall", split="calibration")
    return model, calibration.for_model(model, texts, length=256, sequences=32, seed=0)


def of_top(found: list[dict[str, Any]], count: int) -> list[tuple[int, int]]:
    ordered = sorted(found, key=lambda row: -row["score"])
    return [(row["layer"], row["head"]) for row in ordered[:count]]


def by_layer(heads: list[tuple[int, int]]) -> dict[int, list[int]]:
    return {layer: [h for at, h in heads if at == layer] for layer, _ in heads}


@pytest.mark.slow
def test_the_strongest_heads_are_found_from_any_needles_and_are_needed():
    """The card: other needles give the same top heads; without them copying fails, without as many others not."""
    model, data = trained()
    method = RetrievalHead(template=TEMPLATE, key=3, lengths=2, depths=8)
    found, other = method.measure(model, data, seed=0), method.measure(model, data, seed=1)
    top = of_top(found, 3)
    assert set(top) == set(of_top(other, 3))
    assert min(row["score"] for row in found if (row["layer"], row["head"]) in top) > 0.3
    # Fewer than a fifth of the heads of this small model (the paper: 5 %) retrieve.
    assert sum(row["score"] >= 0.1 for row in found) <= 5
    needles = Planter(data, model.tokenizer, TEMPLATE).grid([256], 20, 3, 2)
    assert copies(model, needles).counted >= 18
    for how in ("zero", "uniform"):
        with ablate(model, by_layer(top), how=how):  # type: ignore[arg-type]
            without = answered(model, needles)
        assert without <= 6, how
        rest = [(row["layer"], row["head"]) for row in found if row["score"] < 0.05]
        lost = []
        for seed in range(5):
            drawn = np.random.default_rng(seed).choice(len(rest), size=len(top), replace=False)
            with ablate(model, by_layer([rest[i] for i in drawn]), how=how):  # type: ignore[arg-type]
                lost.append(answered(model, needles))
        assert np.mean(lost) > without + 6, (how, lost)


def answered(model: checkpoint.Model, needles: list[retrieval.Needle]) -> int:
    """Return how many keys the model gives in full."""
    hits = 0
    for needle in needles:
        ids = torch.tensor([[*needle.prompt, *needle.answer]])
        with torch.no_grad():
            said = model.hf(input_ids=ids).logits[0, len(needle.prompt) - 1 : -1].argmax(-1)
        hits += said.tolist() == list(needle.answer)
    return hits
