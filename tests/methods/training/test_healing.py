"""The healing step: what it trains, who teaches it, and what it says about it."""

from __future__ import annotations

import dataclasses
from typing import Any

import families
import matrix
import pytest
import torch
from pydantic import ValidationError
from torch import Tensor

from paredown import registry
from paredown.core.checkpoint import Model
from paredown.core.edits import ChangeWeights
from paredown.core.learning import training
from paredown.core.method import Policy
from paredown.errors import PolicyError, RecipeError
from paredown.methods.training.healing import Healing

SHORT: dict[str, Any] = {"steps": 3, "lr": 1e-2, "batch": 2}


def model(family: str = "llama") -> Model:
    return Model.of(families.FAMILIES[family]())


def state(found: Model) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in found.hf.state_dict().items()}


def test_it_trains_although_it_keeps_everything():
    found, data = model(), matrix.batch(8)
    before = state(found)
    outcome = Healing(steps=30, lr=3e-3, batch=8).compress(found, data)
    losses = outcome.coverage["losses"]
    assert len(losses) == 30
    assert losses[-1] < 0.8 * losses[0]
    assert outcome.touched_share > 0.99
    assert [edit.layer for edit in outcome.edits] == [0, 1, 2]
    for edit in outcome.edits:
        assert isinstance(edit, ChangeWeights)
        own = [tensor for name, tensor in before.items() if f".layers.{edit.layer}." in name]
        assert edit.before == edit.after == sum(map(Tensor.numel, own))
        assert edit.unit == "trained weights"
    assert [tensor.shape for tensor in before.values()] == [tensor.shape for tensor in state(found).values()]


def test_keep_is_no_budget():
    assert Healing().keep == 1
    with pytest.raises(ValidationError):
        Healing(keep=0.5)
    blocks = model().anatomy.language.blocks
    assert len(Healing().foretell(blocks)) == len(blocks)
    assert Healing(steps=200, batch=4).passes(blocks) == pytest.approx(37.5)


@pytest.mark.parametrize("loss", ["distil", "hidden"])
def test_the_first_model_of_the_recipe_teaches(loss):
    def hurt() -> Model:
        found = model()
        with torch.no_grad():
            found.hf.model.layers[1].mlp.down_proj.weight.zero_()
        return found

    data = matrix.batch(8)
    given = {"input_ids": data.input_ids}
    wanted = families.logits(model().hf, given)
    found = hurt()
    # All rows in each step: the loss then falls from step to step.
    method = Healing(steps=25, lr=3e-3, batch=8, lm=0.0, keep_zeros=False, **{loss: 1.0})
    outcome = method.compress(found, data, original=model)
    assert outcome.coverage["losses"][-1] < 0.5 * outcome.coverage["losses"][0]
    apart = [(families.logits(m.hf, given) - wanted).pow(2).mean() for m in (hurt(), found)]
    assert apart[1] < 0.6 * apart[0]


def test_the_easiest_blocks_to_miss_are_frozen():
    found = model("qwen3")
    with torch.no_grad():  # block 1 adds nothing, and the others learn to be needed
        found.hf.model.layers[1].mlp.down_proj.weight.zero_()
        found.hf.model.layers[1].self_attn.o_proj.weight.zero_()
    Healing(steps=30, lr=3e-3, batch=8).compress(found, matrix.batch(8))
    before = state(found)
    outcome = Healing(frozen=0.34, keep_zeros=False, **SHORT).compress(found, matrix.batch(8))
    assert outcome.coverage["frozen_blocks"] == [1]
    for name, tensor in found.hf.state_dict().items():
        assert torch.equal(tensor, before[name]) is (".layers.1." in name), name
    assert [edit.layer for edit in outcome.edits] == [0, 2]


def test_what_was_pruned_stays_pruned():
    found = model()
    weight = found.hf.model.layers[0].mlp.up_proj.weight
    with torch.no_grad():
        weight[:, ::2] = 0
    Healing(**SHORT).compress(found, matrix.batch(8))
    assert not weight[:, ::2].any()
    assert weight.any()


def test_norms_or_adapters_alone():
    found = model("qwen3")
    before = state(found)
    Healing(trainable="norms", **SHORT).compress(found, matrix.batch(8))
    assert all(torch.equal(t, before[n]) is ("norm" not in n) for n, t in found.hf.state_dict().items())
    found = model("qwen3")
    Healing(adapter_rank=2, **SHORT).compress(found, matrix.batch(8))
    assert all(torch.equal(t, before[n]) is ("proj" not in n) for n, t in found.hf.state_dict().items())


def test_rows_that_come_too_often_are_told():
    outcome = Healing(steps=9, batch=4).compress(model(), matrix.batch(8))
    assert outcome.warnings == ["each of the 8 rows was trained on about 4 times; give more text, or fewer steps."]
    assert not Healing(steps=8, batch=4).compress(model(), matrix.batch(8)).warnings


def test_a_killed_step_goes_on(tmp_path):
    method = Healing(distil=1.0, frozen=0.34, **SHORT)
    undisturbed = model()
    method.compress(undisturbed, matrix.batch(8), seed=2, original=model)

    def kill(done: int, total: int, text: str) -> None:
        if text.startswith("healing") and done == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        method.compress(model(), matrix.batch(8), seed=2, original=model, folder=tmp_path, progress=kill)
    again = model()
    method.compress(again, matrix.batch(8), seed=2, original=model, folder=tmp_path)
    known = undisturbed.hf.state_dict()
    assert all(torch.equal(known[name], tensor) for name, tensor in again.hf.state_dict().items())


UNDER = {"experts": 2, "steps": 4, "batch": 4, "width": 16}


@pytest.mark.parametrize(
    ("policy", "fields"),
    [
        ("read-me", {**UNDER, "keep": 0.5, "channels_of": "first"}),
        ("random-channel-experts", {"keep": 0.5, "experts": 2}),
        ("gamma-mod", {"keep": 0.6, "converted": 0.67, "steps": 4, "recent": 1, "samples": 4}),
        ("random-tokens-a-layer", {"keep": 0.6, "converted": 0.67, "recent": 1, "samples": 4}),
    ],
)
def test_a_model_learns_to_do_with_what_a_policy_leaves(policy, fields, tmp_path):
    data = matrix.batch(8)
    healed, plain = model(), model()
    common: dict[str, Any] = {"steps": 30, "lr": 3e-3, "batch": 8}
    step = Healing(**common, under=policy, fields=fields)
    outcome = step.compress(healed, data)
    Healing(**common).compress(plain, data)
    made = step.policy()
    assert made is not None
    model().save(tmp_path / "first")
    losses = []
    for number, found in enumerate((model(), plain, healed)):
        found.original = tmp_path / "first"
        ready = made.prepare(found, data, folder=str(tmp_path / str(number)))
        with ready.attach(found), torch.no_grad():
            losses.append(float(found.hf(input_ids=data.input_ids, labels=data.input_ids).loss))
    untouched, without, under = losses
    assert under < without < untouched
    assert outcome.coverage["losses"][-1] < 0.85 * outcome.coverage["losses"][0]
    assert "prepare" in outcome.seconds_by_stage


def test_what_no_expert_of_a_token_has_is_not_trained():
    """Masked channels get no gradient: with one expert for all, the others' weights stay bit for bit."""
    found, data = model(), matrix.batch(4)
    before = state(found)
    fields = {"keep": 0.5, "experts": 1}
    Healing(**SHORT, under="random-channel-experts", fields=fields).compress(found, data)
    policy = registry.create("random-channel-experts", **fields)
    assert isinstance(policy, Policy)
    runtime: Any = policy.learning(found)
    for layer, live in runtime.live.items():
        own = live.masks[0]
        moved = found.hf.model.layers[layer].mlp.up_proj.weight != before[f"model.layers.{layer}.mlp.up_proj.weight"]
        assert moved[own].any(1).all()
        assert not moved[~own].any()


def test_the_policy_is_taken_off_again_and_a_killed_run_goes_on_alike(tmp_path, monkeypatch):
    data = matrix.batch(8)
    step = Healing(steps=6, lr=1e-2, batch=2, under="read-me", fields={**UNDER, "keep": 0.5})
    whole = model()
    step.compress(whole, data, folder=tmp_path / "whole")
    assert not whole.hf.__dict__.get("_paredown_attachment")
    fit = training.fit

    def killed(*args: Any, **told: Any) -> Any:
        if told.get("what") == "healing":
            settings = dataclasses.replace(args[2], save_every=2)
            seen = told["progress"]

            def stop(done: int, total: int, text: str) -> None:
                if done >= 4:
                    raise KeyboardInterrupt
                if seen is not None:
                    seen(done, total, text)

            return fit(*args[:2], settings, **{**told, "progress": stop})
        return fit(*args, **told)

    again = model()
    with monkeypatch.context() as patch:
        patch.setattr(training, "fit", killed)
        with pytest.raises(KeyboardInterrupt):
            step.compress(again, data, folder=tmp_path / "again")
    fresh = model()
    outcome = step.compress(fresh, data, folder=tmp_path / "again")
    assert len(outcome.coverage["losses"]) == 6
    for name, tensor in whole.hf.state_dict().items():
        assert torch.equal(tensor, fresh.hf.state_dict()[name]), name


def test_what_cannot_be_trained_under_is_refused():
    for wrong, told in (({"fields": {"keep": 0.5}}, "name one"), ({"under": "read-me", "adapter_rank": 2}, "set adap")):
        with pytest.raises(ValidationError, match=told):
            Healing(**wrong)
    found, data = model(), matrix.batch(8)
    before = state(found)
    for under, told in (("think", "no form that gradients pass"), ("llm-drop", "name a policy")):
        step = Healing(**SHORT, under=under, fields={"keep": 0.5})
        with pytest.raises(RecipeError, match=told):
            step.foretell(found.anatomy.language.blocks)
        with pytest.raises(RecipeError, match=told):
            step.compress(found, data)
    with pytest.raises(PolicyError, match="no model can be trained under think"):
        registry.create("think", keep=0.5).learning(found)
    assert all(torch.equal(tensor, before[name]) for name, tensor in state(found).items())
    assert Healing(**SHORT, under="read-me", fields={"keep": 1}).policy() is None
