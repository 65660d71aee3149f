"""CAMERA-Q: the budget in bits, who gets which width, and that it beats chance and equal widths."""

from __future__ import annotations

from typing import Any

import matrix
import pytest
import torch
from pydantic import ValidationError
from torch import Tensor

import paredown
from paredown.core import calibration, energy
from paredown.errors import BudgetError
from paredown.methods.experts.camera import CameraP
from paredown.methods.experts.camera_q import CameraQ, RandomBits, UniformBits
from paredown.workflow import evaluate


def test_the_published_shares_are_the_default():
    """Widths 8, 4, 2 with shares 0.1, 0.3, 0.6: 3.2 bits, a fifth of 16."""
    assert CameraQ().shares(1000) == [(8, 100), (4, 300), (2, 600)]
    assert CameraQ(bits=(3, 2, 1), keep=2.25 / 16, top=0.35).shares(1000) == [(3, 350), (2, 550), (1, 100)]


@pytest.mark.parametrize("bits", [(8, 4, 2), (3, 2, 1), (16, 8, 3), (4, 3, 2)])
@pytest.mark.parametrize("top", [0.0, 0.1, 0.5, 1.0])
@pytest.mark.parametrize("count", [7, 96, 1000])
def test_the_average_is_met(bits, top, count):
    """Never above the budget, and below it by less than the largest step between two widths."""
    wide, middle, narrow = bits
    for sixteenth in torch.linspace(narrow, wide, 9).tolist():
        keep = round(sixteenth / 16, 6)
        if not narrow <= keep * 16 <= wide:
            continue
        shares = CameraQ(bits=bits, top=top, keep=keep).shares(count)
        assert [width for width, _ in shares] == list(bits)
        assert sum(many for _, many in shares) == count
        assert min(many for _, many in shares) >= 0
        total = sum(width * many for width, many in shares)
        budget = keep * 16 * count
        assert budget - max(wide - middle, middle - narrow) - 1 < total <= budget + 1e-6, (sixteenth, shares)


def test_keep_one_changes_nothing_and_what_widths_cannot_give_is_told():
    model, before = matrix.model("qwen3_moe"), matrix.model("qwen3_moe")
    assert CameraQ(keep=1).compress(model, matrix.batch()).edits == []
    now, was = model.hf.state_dict(), before.hf.state_dict()
    assert all(torch.equal(now[k], was[k]) for k in was)
    with pytest.raises(BudgetError, match=r"means 9.6 bits on average.*keep from 0.125 to 0.5"):
        CameraQ(keep=0.6).compress(model, matrix.batch())
    with pytest.raises(BudgetError, match="less than one bit"):
        UniformBits(keep=0.05).compress(model, matrix.batch())
    with pytest.raises(ValidationError, match="three falling numbers"):
        CameraQ(bits=(2, 4, 8))


def levels(row: Tensor) -> int:
    return len(row.unique())


@pytest.mark.parametrize("family", ["qwen3_moe", "qwen2_moe"])
def test_a_neurons_three_vectors_share_the_width_that_its_energy_earns(family):
    """First layer: rows of gate and up, and columns of down within each row, have the levels of the neuron's width."""
    method = CameraQ(bits=(16, 3, 1), keep=0.2, top=0.1)
    model, before = matrix.model(family), matrix.model(family)
    seen, _ = matrix.scores(CameraP(keep=0.9, form="ragged"), matrix.model(family), matrix.batch())
    method.compress(model, matrix.batch())
    part = model.anatomy.language.blocks[0].experts
    listed = torch.cat([*([seen[0]["shared"]] if part.shared else []), seen[0]["score"].flatten()])
    order = sorted(range(len(listed)), key=lambda i: (-float(listed[i]), i))
    width = {}
    for bits, many in method.shares(len(listed)):
        for i in order[:many]:
            width[i] = bits
        order = order[many:]
    first = part.shared.width if part.shared else 0
    now, was = (m.hf.model.layers[0].mlp for m in (model, before))
    for i, bits in width.items():
        if i < first:
            pairs = [(getattr(m.shared_expert, n).weight[i] for m in (now, was)) for n in ("gate_proj", "up_proj")]
        else:
            e, j = divmod(i - first, part.width)
            pairs = [(m.experts.gate_up_proj[e, k] for m in (now, was)) for k in (j, part.width + j)]
            column, old = (m.experts.down_proj[e, :, j] for m in (now, was))
            assert torch.equal(column, old) == (bits == 16)
        for row, old in pairs:
            assert torch.equal(row, old) == (bits == 16)
            assert bits == 16 or levels(row) <= 2**bits
    for e in range(part.count):
        for bits in (3, 1):
            columns = [i - first - e * part.width for i, b in width.items() if b == bits and i >= first]
            columns = [j for j in columns if 0 <= j < part.width]
            for row in now.experts.down_proj[e][:, columns] if columns else ():
                assert levels(row) <= 2**bits


def test_later_layers_are_seen_behind_rounded_ones():
    rounded, _ = matrix.scores(CameraQ(keep=0.125), matrix.model("qwen3_moe"), matrix.batch())
    plain, _ = matrix.scores(CameraQ(keep=0.5), matrix.model("qwen3_moe"), matrix.batch())
    assert torch.equal(rounded[0]["score"], plain[0]["score"])
    assert not torch.allclose(rounded[1]["score"], plain[1]["score"], rtol=1e-2)


def test_moments_are_used_up_and_not_kept():
    found, _ = matrix.scores(CameraQ(), matrix.model("qwen2_moe"), matrix.batch())
    assert all(set(scores) == {"score", "tokens"} for scores in found.values())


def test_equal_bits_lie_evenly_over_experts():
    assert UniformBits(keep=0.25).shares(96) == [(4, 96)]
    method = UniformBits(keep=3.5 / 16)
    assert method.shares(192) == [(4, 96), (3, 96)]
    model = matrix.model("qwen3_moe")
    found, _ = matrix.scores(method, model, matrix.batch())
    best = found[0]["score"].sort(descending=True).indices[:96]
    per_expert = torch.bincount(best // model.anatomy.language.blocks[0].experts.width, minlength=8)
    assert int(per_expert.max() - per_expert.min()) <= 2


def test_experts_that_saw_nothing_are_rounded_plainly():
    model = matrix.model("qwen3_moe")
    outcome = CameraQ().compress(model, matrix.of(torch.tensor([[5, 6]]), None))
    assert outcome.coverage["experts_never_seen"]
    assert all(torch.isfinite(p).all() for p in model.hf.parameters())
    assert any("no byte is saved until they are packed" in warning for warning in outcome.warnings)


def test_the_energy_is_that_of_camera(monkeypatch):
    called: list[Any] = []
    original = energy.of_experts
    monkeypatch.setattr(energy, "of_experts", lambda *args: called.append(args[2]) or original(*args))
    CameraQ(peak_share=0.7).compress(matrix.model("qwen3_moe"), matrix.batch())
    assert called == [0.7] * 3


def test_it_diverges_less_than_equal_and_than_random_widths_at_the_same_average():
    """The card, on the trained testbed, at 2 bits."""
    ref = "testbed:moe"
    original = paredown.load(ref, dtype="float32")

    def rows(split: Any, count: int) -> Any:
        texts = calibration.read(None, model_ref=ref, split=split)
        return calibration.for_model(original, texts, length=64, sequences=count)

    heldout, sample = rows("heldout", 8), rows("calibration", 8)
    divergence = {}
    for method in (
        CameraQ(bits=(4, 2, 1), keep=0.125),
        RandomBits(bits=(4, 2, 1), keep=0.125),
        UniformBits(keep=0.125),
    ):
        model = paredown.load(ref, dtype="float32")
        method.compress(model, sample)
        _, _, kl = evaluate.together(original.hf, model.hf, heldout.input_ids)
        divergence[method.name] = float(kl.mean())
    assert divergence["camera-q"] < 0.9 * min(divergence["random-bits"], divergence["uniform-bits"])
