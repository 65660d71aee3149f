"""BlockPruner: the order of drops against a plain search, and what the paper's loop promises."""

from __future__ import annotations

from copy import deepcopy

import families
import matrix
import pytest
import torch
import torch.nn.functional as F

from paredown.core import surgery
from paredown.core.checkpoint import Model
from paredown.core.depth.gates import units
from paredown.core.edits import DropSublayer
from paredown.errors import ArchitectureError
from paredown.methods.depth.blockpruner import BlockPruner


def loss(model: Model, ids: torch.Tensor) -> float:
    with torch.no_grad():
        logits = model.hf(input_ids=ids, use_cache=False).logits
    return float(F.cross_entropy(logits[:, :-1].flatten(0, 1).float(), ids[:, 1:].flatten()))


@pytest.mark.parametrize("part", ["joint", "attention", "mlp"])
def test_the_order_is_that_of_a_plain_greedy_search(part: str) -> None:
    """Delete for good, measure the perplexity, take the best, and again: the loop of the paper, written out."""
    model, data = matrix.model("llama"), matrix.batch()
    kinds = ["attention", "mlp"] if part == "joint" else [part]
    listed = [unit for kind in kinds for unit in units(model.anatomy.language.blocks, [kind])]  # type: ignore[list-item]
    gone: list[tuple[int, str]] = []
    for _ in range(len(listed) // 2):
        losses = {}
        for unit in listed:
            if unit in gone:
                continue
            cut = Model.of(deepcopy(model.hf))
            edits = [DropSublayer(layer=i, part=kind) for i, kind in [*gone, unit]]  # type: ignore[arg-type]
            cut.anatomy = surgery.apply_model(cut.hf, cut.anatomy, edits)
            losses[unit] = loss(cut, data.input_ids)
        gone.append(min(losses, key=losses.__getitem__))
    method = BlockPruner(keep=0.5, part=part)  # type: ignore[arg-type]
    outcome = method.compress(model, data)
    rounds = outcome.coverage["rounds"]
    assert [(one["layer"], one["part"]) for one in rounds] == gone
    assert rounds[-1]["loss"] == pytest.approx(loss(model, data.input_ids), abs=1e-5)
    assert {(e.layer, e.part) for e in outcome.edits} == set(gone)  # type: ignore[union-attr]


def test_a_smaller_budget_is_the_beginning_of_a_larger_one() -> None:
    model, data = matrix.model("llama"), matrix.batch(rows=8)
    half = BlockPruner(keep=0.5).compress(Model.of(deepcopy(model.hf)), data).coverage["rounds"]
    few = BlockPruner(keep=0.83).compress(Model.of(deepcopy(model.hf)), data).coverage["rounds"]
    assert few == half[:1]
    assert len(half) == 3


def test_a_planted_sublayer_goes_first() -> None:
    model, data = matrix.model("llama"), matrix.batch()
    with torch.no_grad():
        model.hf.get_submodule("model.layers.1.mlp.down_proj").weight.zero_()
        model.hf.get_submodule("model.layers.1.mlp.down_proj").bias.zero_()
    before = loss(model, data.input_ids)
    rounds = BlockPruner(keep=0.83).compress(model, data).coverage["rounds"]
    # Nothing is lost without it; another may even be in the way, in a model of random weights.
    assert rounds[0]["loss"] <= before + 1e-6
    if rounds[0]["loss"] > before - 1e-6:
        assert (rounds[0]["layer"], rounds[0]["part"]) == (1, "mlp")


def test_norms_in_the_stream_are_refused() -> None:
    with pytest.raises(ArchitectureError):
        BlockPruner(keep=0.5).compress(Model.of(families.FAMILIES["bert"]()), matrix.batch())
