"""Healing: which weights are trained, by which loss, and that nothing else changes."""

from __future__ import annotations

import importlib.util
from copy import deepcopy
from typing import Any

import families
import pytest
import torch
from torch import Tensor

from paredown.core.calibration import Batch
from paredown.core.checkpoint import Model
from paredown.core.learning.healing import heal, last_hidden, parameters
from paredown.core.learning.teacher import Teacher
from paredown.errors import ArchitectureError, OutputError, UsageError


def model(family: str = "llama", dtype: torch.dtype = torch.float32) -> Model:
    return Model.of(families.FAMILIES[family]().to(dtype))


def batch(rows: int = 6, length: int = 10, mask: Tensor | None = None, seed: int = 1) -> Batch:
    ids = torch.randint(3, 90, (rows, length), generator=torch.Generator().manual_seed(seed))
    return Batch(ids, mask, "random", "", seed, rows)


def state(found: Model) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in found.hf.state_dict().items()}


def changed(before: dict[str, Tensor], found: Model) -> set[str]:
    return {name for name, tensor in found.hf.state_dict().items() if not torch.equal(before[name], tensor)}


def same(a: Model, b: Model) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a.hf.state_dict().values(), b.hf.state_dict().values(), strict=True))


def test_the_next_token_loss_falls_and_the_model_is_left_as_it_should_be():
    found, data = model(), batch()
    names = list(found.hf.state_dict())
    found.hf.model.norm.weight.requires_grad_(False)
    fitted = heal(found, data, steps=40, lr=3e-3, batch=6)
    assert len(fitted.losses) == 40
    assert fitted.losses[-1] < 0.6 * fitted.losses[0]
    assert not any(module.training for module in found.hf.modules())
    assert [n for n, p in found.hf.named_parameters() if not p.requires_grad] == ["model.norm.weight"]
    assert all(p.grad is None for p in found.hf.parameters())
    assert list(found.hf.state_dict()) == names
    with torch.no_grad():
        out = found.hf(input_ids=data.input_ids, labels=data.input_ids)
    assert float(out.loss) < fitted.losses[-1] * 1.05


def test_shared_tensors_are_trained_once_and_stay_shared():
    found = model("llama")
    chosen = parameters(found, "all")
    assert len(chosen) == len(list(found.hf.parameters()))
    assert found.hf.lm_head.weight is found.hf.model.embed_tokens.weight
    heal(found, batch(), steps=2, lr=1e-2)
    assert found.hf.lm_head.weight is found.hf.model.embed_tokens.weight
    assert torch.equal(found.hf.lm_head.weight, found.hf.model.embed_tokens.weight)


@pytest.mark.parametrize(
    ("trainable", "expected"),
    [
        ("norms", lambda name: "norm" in name),
        ("blocks", lambda name: ".layers." in name),
        ([1], lambda name: ".layers.1." in name),
        (lambda name: name.endswith("mlp.up_proj.weight"), lambda name: name.endswith("mlp.up_proj.weight")),
        ("all", lambda name: True),
    ],
)
@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma3"])
def test_only_what_was_chosen_changes(family, trainable, expected):
    found = model(family)
    before = state(found)
    heal(found, batch(), steps=2, lr=1e-2, trainable=trainable)
    wanted = {name for name in before if expected(name)}
    # Key biases shift all logits of a query alike: their gradient is zero, but for rounding.
    assert {n for n in wanted ^ changed(before, found) if not n.endswith("k_proj.bias")} == set()


def test_the_vision_tower_and_the_projector_stay():
    found = model("llava")
    names = parameters(found, "all")
    assert names
    assert not [name for name in names if "vision" in name or "projector" in name]
    before = state(found)
    heal(found, batch(), steps=1, lr=1e-2)
    assert {n for n in changed(before, found) if "vision" in n or "projector" in n} == set()


@pytest.mark.parametrize("rank", [0, 4])
@pytest.mark.parametrize("at", [3, 5, 8])
def test_a_killed_run_goes_on_to_the_same_weights(tmp_path, rank, at):
    options: dict[str, Any] = {"steps": 8, "lr": 1e-2, "batch": 2, "adapter_rank": rank, "save_every": 2, "seed": 3}
    undisturbed = model()
    heal(undisturbed, batch(), **options)

    def kill(step: int, total: int, text: str) -> None:
        if step == at:
            raise KeyboardInterrupt

    first = model()
    with pytest.raises(KeyboardInterrupt):
        heal(first, batch(), **options, folder=tmp_path, progress=kill)
    assert type(first.hf.model.layers[0].mlp.up_proj) is torch.nn.Linear, "adapters must be gone after a fault"
    again = model()
    fitted = heal(again, batch(), **options, folder=tmp_path)
    assert fitted.resumed_from == (at - 1) // 2 * 2
    assert same(again, undisturbed)


@pytest.mark.parametrize("other", ["data", "loss", "model"])
def test_the_folder_of_other_work_is_refused(tmp_path, other):
    heal(model(), batch(), steps=2, folder=tmp_path, save_every=1)
    found = model()
    if other == "model":
        with torch.no_grad():
            found.hf.model.norm.weight[0] += 1
    with pytest.raises(OutputError, match="another run"):
        heal(
            found,
            batch(seed=2 if other == "data" else 1),
            steps=2,
            lm=2.0 if other == "loss" else 1.0,
            folder=tmp_path,
            save_every=1,
        )


def test_padding_does_not_count():
    # The same rows, once with padding on the right whose tokens differ from run to run.
    data = batch(length=8)
    plain = model()
    heal(plain, data, steps=3, lr=1e-2, batch=6)
    results = []
    for seed in (5, 6):
        mask = torch.ones(6, 11, dtype=torch.long)
        mask[:, 8:] = 0
        wide = batch(length=11, seed=seed).input_ids
        wide[:, :8] = data.input_ids
        found = model()
        heal(found, Batch(wide, mask, "padded", "", 0, 6), steps=3, lr=1e-2, batch=6)
        results.append(found)
    assert same(*results)
    for a, b in zip(plain.hf.parameters(), results[0].hf.parameters(), strict=True):
        torch.testing.assert_close(a, b, atol=2e-4, rtol=1e-3)


def test_losses_to_a_teacher_and_to_hidden_states_ignore_padding():
    mask = torch.ones(4, 9, dtype=torch.long)
    mask[:, :3] = 0  # left padding
    found, teaching = model(), model("llama")
    with torch.no_grad():
        teaching.hf.model.layers[0].mlp.down_proj.weight.add_(0.2)
    results = []
    for seed in (1, 2):
        data = batch(4, 9, mask)
        data.input_ids[:, :3] = batch(4, 9, seed=seed).input_ids[:, :3]
        teacher = Teacher.collect(teaching.hf, data.input_ids, data.attention_mask)
        states = last_hidden(teaching, data)
        copy = deepcopy(found)
        fitted = heal(copy, data, steps=2, lm=0, distil=1, hidden=1, teacher=teacher, states=states, batch=4)
        results.append((fitted.losses, copy))
    assert results[0][0] == results[1][0]
    assert same(results[0][1], results[1][1])


def test_distillation_brings_the_student_to_its_teacher():
    teaching, student, data = model(), model(), batch()
    with torch.no_grad():
        student.hf.model.layers[1].mlp.down_proj.weight.mul_(0.0)
    teacher = Teacher.collect(teaching.hf, data.input_ids)
    fitted = heal(student, data, steps=40, lr=3e-3, lm=0, distil=1.0, teacher=teacher, batch=6)
    assert fitted.losses[-1] < 0.3 * fitted.losses[0]
    assert heal(teaching, data, steps=1, lr=0, lm=0, distil=1.0, teacher=teacher).losses[0] < 1e-6
    states = last_hidden(model(), data)
    assert heal(model(), data, steps=1, lr=0, lm=0, hidden=1.0, states=states).losses[0] == 0
    fitted = heal(student, data, steps=40, lr=3e-3, lm=0, hidden=1.0, states=states, batch=6)
    assert fitted.losses[-1] < 0.5 * fitted.losses[0]


def test_last_hidden_is_what_the_head_reads():
    found, data = model(), batch()
    with torch.no_grad():
        logits = found.hf(input_ids=data.input_ids).logits
        assert torch.allclose(found.hf.lm_head(last_hidden(found, data, batch=4)), logits, atol=1e-6)


def test_bf16_is_trained_in_fp32_and_rounded_once():
    narrow, wide = model(dtype=torch.bfloat16), model(dtype=torch.bfloat16)
    wide.hf.float()
    before = state(narrow)
    options: dict[str, Any] = {"steps": 20, "lr": 1e-5, "trainable": [0], "batch": 6}
    heal(narrow, batch(), **options)
    heal(wide, batch(), **options)
    for name, tensor in narrow.hf.state_dict().items():
        assert tensor.dtype == torch.bfloat16
        assert torch.equal(tensor, wide.hf.state_dict()[name].bfloat16())
    # Twenty steps of 1e-5 are each too small for bf16 and together are not.
    assert changed(before, narrow)
    assert all(".layers.0." in name for name in changed(before, narrow))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_adapters_are_merged_exactly_and_leave_no_trace(dtype):
    found, data = model(dtype=dtype), batch()
    before, classes = state(found), [type(m) for m in found.hf.modules()]
    attributes = set(vars(found.hf))
    fitted = heal(found, data, steps=30, lr=1e-2, adapter_rank=3, trainable=[0, 2], batch=6)
    assert fitted.losses[-1] < 0.9 * fitted.losses[0]
    assert [type(m) for m in found.hf.modules()] == classes
    assert set(vars(found.hf)) == attributes
    assert all(p.dtype == dtype and p.requires_grad for p in found.hf.parameters())
    touched = changed(before, found)
    assert touched
    assert all((".layers.0." in n or ".layers.2." in n) and n.endswith("proj.weight") for n in touched)
    if dtype == torch.float32:
        for name in touched:
            rank = torch.linalg.matrix_rank(found.hf.state_dict()[name] - before[name], rtol=1e-3)
            assert int(rank) <= 3, name
        # The loss of one more step is that of the adapters at work: what was merged is what was trained.
        tail = heal(deepcopy(found), data, steps=1, lr=0, batch=6).losses[0]
        again = model()
        whole = heal(again, data, steps=31, lr=1e-2, adapter_rank=3, trainable=[0, 2], batch=6,
                     schedule=lambda progress: 1 - progress * 31 / 30)  # fmt: skip
        assert tail == pytest.approx(whole.losses[-1], rel=1e-5)


def test_one_weight_in_two_places_gets_one_adapter():
    for shares_module in (True, False):
        found = model()
        layers = found.hf.model.layers
        if shares_module:
            layers[2].mlp.up_proj = layers[0].mlp.up_proj
        else:
            layers[2].mlp.up_proj.weight = layers[0].mlp.up_proj.weight
        before = state(found)
        heal(found, batch(), steps=3, lr=1e-2, adapter_rank=2)
        assert layers[2].mlp.up_proj.weight is layers[0].mlp.up_proj.weight
        assert (layers[2].mlp.up_proj is layers[0].mlp.up_proj) is shares_module
        difference = layers[0].mlp.up_proj.weight.detach() - before["model.layers.0.mlp.up_proj.weight"]
        assert 0 < int(torch.linalg.matrix_rank(difference, rtol=1e-3)) <= 2


def test_pruned_weights_stay_zero_if_asked():
    def pruned() -> Model:
        found = model()
        with torch.no_grad():
            found.hf.model.layers[0].mlp.up_proj.weight[:, ::2] = 0
        return found

    def weight(found: Model) -> Tensor:
        return found.hf.model.layers[0].mlp.up_proj.weight.detach()

    found = pruned()
    heal(found, batch(), steps=3, lr=1e-2, keep_zeros=True)
    assert not weight(found)[:, ::2].any()
    assert not torch.equal(weight(found), weight(pruned()))
    grown = pruned()
    heal(grown, batch(), steps=3, lr=1e-2)
    assert weight(grown)[:, ::2].any()
    with pytest.raises(UsageError, match=r"fill the zeros of model\.layers\.0\.mlp\.up_proj"):
        heal(pruned(), batch(), steps=3, adapter_rank=2, keep_zeros=True)


def test_what_cannot_be_is_told(monkeypatch):
    data = batch()
    with pytest.raises(ArchitectureError, match="BertForMaskedLM"):
        heal(model("bert"), data, steps=1)
    with pytest.raises(UsageError, match="needs a loss"):
        heal(model(), data, steps=1, lm=0)
    with pytest.raises(UsageError, match="distil=0"):
        heal(model(), data, steps=1, distil=1)
    with pytest.raises(UsageError, match="hidden=0"):
        heal(model(), data, steps=1, hidden=1)
    with pytest.raises(UsageError, match="3 blocks and no block 7"):
        heal(model(), data, steps=1, trainable=[0, 7])
    with pytest.raises(UsageError, match="two tokens"):
        heal(model(), batch(length=1), steps=1)
    with pytest.raises(UsageError, match="knows 4 rows"):
        heal(model(), data, steps=1, distil=1, teacher=Teacher.collect(model().hf, batch(4).input_ids))
    known = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *a: None if name == "peft" else known(name, *a))
    with pytest.raises(UsageError, match=r"needs peft; pip install 'paredown\[heal\]'"):
        heal(model(), data, steps=1, adapter_rank=2)


def test_no_steps_do_nothing(tmp_path):
    found = model()
    before = state(found)
    assert heal(found, batch(), steps=0, folder=tmp_path).losses == ()
    assert not changed(before, found)
    assert not list(tmp_path.iterdir())
