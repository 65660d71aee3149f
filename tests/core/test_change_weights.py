"""Changes in place: shapes, anatomy and config stay, the change is counted, and the report does not call it removal."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import families
import torch

from paredown.core import edits, surgery
from paredown.core.checkpoint import Model
from paredown.core.compression import cut
from paredown.core.edits import ChangeWeights, KeepExperts
from paredown.core.effects import edited
from paredown.core.method import Compressor, View
from paredown.core.sequential import Resident
from paredown.report import words
from paredown.workflow import plan


class Halving(Compressor):
    """Halves one matrix."""

    name = "halving"
    title = "Halving"
    axis = "weights"
    unit = "weights"

    def rewrite(self, view: View, edits: Any, scores: Any) -> str | None:
        with torch.no_grad():
            view.child("self_attn.o_proj").weight.mul_(0.5)
        return None


EDIT = ChangeWeights(layer=1, unit="weights", before=100, after=40, detail={"what": "o_proj"})


def test_it_is_data_like_any_edit():
    assert edits.from_json(edits.to_json([EDIT])) == [EDIT]


def test_the_anatomy_the_config_and_the_shapes_stay():
    model = Model.of(families.llama())
    shapes = {k: v.shape for k, v in model.hf.state_dict().items()}
    part = model.anatomy.language.blocks[1]
    assert edited(part, [EDIT]) == part
    config = model.config.to_dict()
    assert surgery.apply_model(model.hf, model.anatomy, [EDIT]) == model.anatomy
    assert model.config.to_dict() == config
    assert {k: v.shape for k, v in model.hf.state_dict().items()} == shapes
    skeleton = Model.of(families.llama().to("meta"))
    assert surgery.apply_model(skeleton.hf, skeleton.anatomy, [EDIT]) == skeleton.anatomy


def test_what_was_changed_is_counted():
    model = Model.of(families.llama())
    view = Resident(model).open(1)
    after, touched, _ = cut(Halving(), view, [EDIT], {})
    assert touched == view.child("self_attn.o_proj").weight.numel()
    assert after.part == view.part


def test_it_goes_together_with_edits_that_cut():
    model = Model.of(families.qwen3_moe())
    keep = KeepExperts(layer=1, keep=(0, 2, 5), top_k=2)
    anatomy = surgery.apply_model(model.hf, model.anatomy, [EDIT, keep])
    assert anatomy.language.blocks[1].experts.count == 3


def test_the_report_tells_what_stayed_and_removes_nothing():
    one = plan._describe(EDIT, Model.of(families.llama()).anatomy.language.blocks[1])
    assert (one["unit"], one["before"], one["after"], one["kept"]) == ("weights", 100, 40, None)
    step = SimpleNamespace(changes=[SimpleNamespace(**one, layer=1)])
    assert words.removed(SimpleNamespace(steps=[step])) == []  # type: ignore[arg-type]
    del one["detail"]["in_place"]
    assert words.removed(SimpleNamespace(steps=[step])) == ["60 of 100 weights"]  # type: ignore[arg-type]
