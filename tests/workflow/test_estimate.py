"""The rehearsal: follows depth and data, keeps within memory's arithmetic, and leaves the skeleton as it was."""

from __future__ import annotations

import json

import pytest
import torch
from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

from paredown import registry
from paredown.core import checkpoint
from paredown.core.compression import TOKENS_AT_ONCE
from paredown.core.edits import DropBlock
from paredown.workflow import estimate, plan, recipe

from .conftest import write_tokenizer

METHODS = [
    ("llm-drop", {}), ("llm-drop-blocks", {}), ("llm-drop-blocks", {"consecutive": True}), ("random-blocks", {}),
]  # fmt: skip
EXPERTS = [("dern", {}), ("camera-p", {}), ("camera-p", {"form": "ragged"}), ("random-experts", {})]


@pytest.fixture(scope="module")
def moe_folder(tmp_path_factory):
    """Write a tiny mixture of experts."""
    config = Qwen3MoeConfig(
        vocab_size=64, hidden_size=32, num_hidden_layers=2, num_experts=4, num_experts_per_tok=2,
        moe_intermediate_size=16, intermediate_size=32, num_attention_heads=4, num_key_value_heads=2, head_dim=8,
        max_position_embeddings=64, pad_token_id=None,
    )  # fmt: skip
    folder = tmp_path_factory.mktemp("moe")
    torch.manual_seed(0)
    Qwen3MoeForCausalLM(config).save_pretrained(folder)
    write_tokenizer(folder)
    return folder


def asked(folder, text_file, *, method="llm-drop", sequences=8, heldout=4, length=32, **fields):
    """Return a checked recipe of one step."""
    data = {"calibration": str(text_file), "sequences": sequences, "heldout_sequences": heldout, "length": length}
    step = {"method": method, "keep": 0.5, **fields}
    return recipe.check({"model": str(folder), "gate": "none", "data": data, "steps": [step]})


def rehearsal(folder, text_file, **options):
    """Return a rehearsal that has not begun."""
    wanted = asked(folder, text_file, **options)
    return estimate._Rehearsal(checkpoint.skeleton(folder), wanted.methods()[0], wanted, ())


@pytest.fixture
def steady(monkeypatch):
    """Let every measurement come out the same, so that only the arithmetic is left."""
    cost = estimate._Cost(
        start=0.5, dense=1.0, observe=2.0, after=1.0, replay=0.0, cut=0.25, transient=1000,
        bytes_before=100, bytes_after=50,
    )  # fmt: skip
    monkeypatch.setattr(estimate._Rehearsal, "_blocks", lambda self: dict.fromkeys(range(len(self.tower.blocks)), cost))
    monkeypatch.setattr(estimate._Rehearsal, "_head", lambda self: (0.0, 0))
    monkeypatch.setattr(estimate._Rehearsal, "_loading", lambda self: (0.0, 0.0, 0.0))
    monkeypatch.setattr(estimate._Rehearsal, "_disk", lambda self: estimate._Disk(0.0, 0.0, 0.0))
    monkeypatch.setattr(estimate, "resident_memory", lambda: 10_000)


@pytest.mark.parametrize(("method", "fields"), METHODS)
def test_dense_models_are_foretold(checkpoint_folder, text_file, method, fields):
    (planned,) = plan.plan(asked(checkpoint_folder(), text_file, method=method, **fields))
    assert planned.seconds > 0
    assert planned.peak_memory_bytes > planned.bytes_before
    assert not any("foretold" in note for note in planned.notes)


@pytest.mark.parametrize(("method", "fields"), EXPERTS)
def test_experts_are_foretold(moe_folder, text_file, method, fields):
    (planned,) = plan.plan(asked(moe_folder, text_file, method=method, **fields))
    assert planned.seconds > 0
    assert planned.peak_memory_bytes > planned.bytes_before
    assert not any("foretold" in note for note in planned.notes)


@pytest.mark.parametrize("method", ["dern", "llm-drop"])
def test_the_skeleton_stays_on_meta_and_as_it_was(moe_folder, text_file, method):
    skeleton = checkpoint.skeleton(moe_folder)
    wanted = asked(moe_folder, text_file, method=method)
    before = {name: (p.shape, p.dtype, p.device) for name, p in skeleton.hf.named_parameters()}
    modules = {name: type(module) for name, module in skeleton.hf.named_modules()}
    config = json.dumps(skeleton.model.config.to_dict(), sort_keys=True, default=str)
    tied = skeleton.hf.all_tied_weights_keys
    estimate.rehearse(skeleton, wanted.methods()[0], wanted)
    assert {name: (p.shape, p.dtype, p.device) for name, p in skeleton.hf.named_parameters()} == before
    assert all(p.device.type == "meta" for p in skeleton.hf.parameters())
    assert {name: type(module) for name, module in skeleton.hf.named_modules()} == modules
    assert json.dumps(skeleton.model.config.to_dict(), sort_keys=True, default=str) == config
    assert skeleton.hf.all_tied_weights_keys == tied


def test_time_follows_depth_and_data(checkpoint_folder, text_file, steady):
    def seconds(layers, **options):
        return rehearsal(checkpoint_folder(layers=layers), text_file, **options).forecast().seconds

    # Twice the depth: everything but the start of the streams doubles.
    rows = TOKENS_AT_ONCE // 32
    start = 0.5 * (8 + 2 * 4) / rows
    assert seconds(8) - start == pytest.approx(2 * (seconds(4) - start))
    # Ten times the calibration data: only what calibration takes grows.
    more = seconds(4, sequences=80) - seconds(4, sequences=8)
    assert more == pytest.approx(72 / rows * (0.5 + 4 * 2.0))
    assert seconds(4, heldout=8) > seconds(4, heldout=4)


def test_memory_follows_data_and_not_depth(checkpoint_folder, text_file, steady):
    def peak(layers=4, **options):
        return rehearsal(checkpoint_folder(layers=layers), text_file, **options).forecast().peak_memory_bytes

    assert peak(layers=8) == peak(layers=4)
    # One hidden state of fp32 for each calibration token, two for each held-out one.
    assert peak(sequences=24) - peak(sequences=8) == 16 * 32 * 32 * 4
    assert peak(heldout=6) - peak(heldout=4) == 2 * 2 * 32 * 32 * 4
    assert peak(method="llm-drop-blocks", consecutive=True) - peak() == 8 * 2 * 32 * 32 * 4


def test_methods_that_look_at_no_data_need_none(checkpoint_folder, text_file, steady):
    found = rehearsal(checkpoint_folder(), text_file, method="random-sublayers")
    assert found.calibration_rows == 0
    assert found.forecast().peak_memory_bytes < rehearsal(checkpoint_folder(), text_file).forecast().peak_memory_bytes


def test_blocks_that_go_cost_no_passes_afterwards(checkpoint_folder, text_file):
    wanted = asked(checkpoint_folder(), text_file, method="llm-drop-blocks")
    skeleton = checkpoint.skeleton(checkpoint_folder())
    found = estimate._Rehearsal(skeleton, wanted.methods()[0], wanted, [DropBlock(layer=1)])
    costs = found._blocks()
    assert (costs[1].after, costs[1].bytes_after) == (0.0, 0)
    assert costs[0].after > 0
    assert costs[0].bytes_after == costs[0].bytes_before


def test_blocks_of_one_kind_are_rehearsed_once(checkpoint_folder, text_file, monkeypatch):
    seen = []
    real = estimate._Rehearsal._block
    monkeypatch.setattr(
        estimate._Rehearsal, "_block", lambda self, block: seen.append(block.index) or real(self, block)
    )
    costs = rehearsal(checkpoint_folder(layers=8), text_file)._blocks()
    assert seen == [0]
    assert set(costs) == set(range(8))


def test_what_cannot_be_rehearsed_is_said(checkpoint_folder, text_file, monkeypatch):
    def broken(self, view):
        raise RuntimeError("no")

    monkeypatch.setattr(type(registry.create("llm-drop")), "observe", broken)
    (planned,) = plan.plan(asked(checkpoint_folder(), text_file))
    assert (planned.seconds, planned.peak_memory_bytes) == (0.0, 0)
    assert planned.notes == [
        "which layers go depends on the data; those shown stand for as many others.",
        "peak memory and time could not be foretold (RuntimeError).",
    ]
