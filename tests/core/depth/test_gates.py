"""Gates: a unit that is gated to 0 is as good as deleted, one at 1 untouched, and all between scales what it adds."""

from __future__ import annotations

from copy import deepcopy

import families
import pytest
import torch
from torch import Tensor

from paredown.core import surgery
from paredown.core.checkpoint import Model
from paredown.core.depth.gates import Unit, gated, units
from paredown.core.edits import DropBlock, DropSublayer, Edit
from paredown.errors import ArchitectureError

IDS = torch.randint(3, 90, (2, 9), generator=torch.Generator().manual_seed(3))


def logits(model: Model) -> Tensor:
    with torch.no_grad():
        found = model.hf(input_ids=IDS, use_cache=False).logits
    assert isinstance(found, Tensor)
    return found


@pytest.mark.parametrize("family", families.DECODERS)
@pytest.mark.parametrize("kind", ["attention", "mlp", "block"])
def test_a_gate_at_zero_is_a_deletion_bit_for_bit(family: str, kind: str) -> None:
    whole = Model.of(families.FAMILIES[family]())
    listed = units(whole.anatomy.language.blocks, [kind])  # type: ignore[list-item]
    before = logits(whole)
    for unit in listed[:2]:
        edit: Edit = DropBlock(layer=unit[0]) if kind == "block" else DropSublayer(layer=unit[0], part=kind)  # type: ignore[arg-type]
        cut = Model.of(deepcopy(whole.hf))
        try:
            cut.anatomy = surgery.apply_model(cut.hf, cut.anatomy, [edit])
        except ArchitectureError:
            pytest.skip("blocks of this family cannot go")
        with gated(whole) as gates:
            gates.drop([unit])
            off = logits(whole)
            gates.set({unit: 1.0})
            assert torch.equal(logits(whole), before)
        assert torch.equal(off, logits(cut))
        assert not torch.equal(off, before)
    assert torch.equal(logits(whole), before)


@pytest.mark.parametrize("family", families.DECODERS)
def test_a_factor_scales_what_a_unit_adds(family: str) -> None:
    model = Model.of(families.FAMILIES[family]())
    every: list[Unit] = units(model.anatomy.language.blocks, ["attention", "mlp"])
    whole = logits(model)
    with gated(model) as gates:
        gates.drop(every)
        nothing = logits(model)
        gates.set({unit: torch.tensor(0.0) for unit in every})
        # Norms run on what is then multiplied by zero: equal, not merely near.
        torch.testing.assert_close(logits(model), nothing)
        gates.set({unit: torch.tensor(1.0) for unit in every})
        assert torch.equal(logits(model), whole)
        blocks = {(block.index, "block"): torch.tensor(0.0) for block in model.anatomy.language.blocks}
        gates.set(blocks)  # type: ignore[arg-type]
        torch.testing.assert_close(logits(model), nothing)
    assert not any("forward" in vars(module) for module in model.hf.modules())


def test_learned_factors_get_gradients() -> None:
    model = Model.of(families.FAMILIES["llama"]())
    model.hf.requires_grad_(False)
    factors = {(0, "block"): torch.tensor(0.7, requires_grad=True), (1, "mlp"): torch.tensor(0.3, requires_grad=True)}
    with gated(model) as gates:
        gates.set(factors)  # type: ignore[arg-type]
        model.hf(input_ids=IDS, use_cache=False).logits.square().mean().backward()
    assert all(factor.grad is not None and float(factor.grad) != 0 for factor in factors.values())


def test_unknown_units_are_refused_and_the_model_is_left_as_it_was() -> None:
    model = Model.of(families.FAMILIES["llama"]())
    with gated(model) as gates:
        gates.drop([(0, "attention")])
        with pytest.raises(ArchitectureError, match="layer 9"):
            gates.drop([(9, "mlp")])
    assert not any("forward" in vars(module) for module in model.hf.modules())
    bert = Model.of(families.FAMILIES["bert"]())
    with pytest.raises(ArchitectureError), gated(bert) as gates:
        gates.drop([(0, "attention")])
