"""The house tests of methods that search, train or tie in a whole model: what each promises by being listed."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import families
import matrix
import pytest
import torch
import transformers as tf
from safetensors.torch import load_file

import paredown
from paredown import registry
from paredown.core import checkpoint, surgery
from paredown.core.calibration import Batch
from paredown.core.checkpoint import Model
from paredown.core.method import WholeModelCompressor
from paredown.workflow import plan as planning

# Enough work to see that it is done, and little enough for a test; set where a method has such a field.
QUICK: dict[str, Any] = {
    "steps": 3, "drop_steps": 2, "steps_per_drop": 2, "final_steps": 2, "gate_steps": 3, "cure_steps": 2,
    "generations": 2, "offspring": 3, "survivors": (1,), "tokens": (64,), "tokens_per_stage": (64,), "start": 4,
    "samples": 4, "initial": 4, "scan_rows": 4, "batch": 2, "warmup": 0,
}  # fmt: skip
# Budgets that a model of six layers can meet, where one half is not one of them.
KEEPS: dict[str, float] = {}
# Methods whose work is not undone by a keep of one: they only train.
every = pytest.mark.parametrize("name", matrix.whole_names())


def method(name: str, keep: float | None = None, **fields: Any) -> WholeModelCompressor:
    """Build a method with little to do."""
    known = registry.get(name).model_fields
    quick = {key: value for key, value in QUICK.items() if key in known and isinstance(known[key].default, type(value))}
    wanted = KEEPS.get(name, 0.5) if keep is None else keep
    if registry.get(name).trains_always:  # type: ignore[attr-defined]
        wanted = 1.0
    made = registry.create(name, keep=wanted, **(quick | fields))
    assert isinstance(made, WholeModelCompressor)
    return made


_SIZES: dict[str, Any] = {
    "vocab_size": 96, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 6, "num_attention_heads": 4,
    "head_dim": 8, "num_key_value_heads": 2, "max_position_embeddings": 64, "pad_token_id": 0, "bos_token_id": 1,
    "eos_token_id": 2,
}  # fmt: skip


def model(name: str) -> Model:
    """Return a small model of six equal layers that has what the method acts on: dense, or of experts."""
    if registry.entry(name).axis == "experts":
        experts = {"num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
        mixture = tf.Qwen3MoeConfig(**_SIZES | {"num_hidden_layers": 3}, **experts)
        return Model.of(families._seeded(lambda: tf.Qwen3MoeForCausalLM(mixture)))
    return Model.of(families._seeded(lambda: tf.LlamaForCausalLM(tf.LlamaConfig(**_SIZES))))


def data(seed: int = 1) -> Batch:
    return matrix.batch(rows=8, length=16, seed=seed)


def logits(of: Model) -> torch.Tensor:
    ids = torch.randint(3, 90, (2, 12), generator=torch.Generator().manual_seed(5))
    with torch.no_grad():
        found = of.hf(input_ids=ids, use_cache=False).logits
    assert isinstance(found, torch.Tensor)
    return found


@every
def test_keep_one_changes_nothing(name: str) -> None:
    if registry.get(name).trains_always:  # type: ignore[attr-defined]
        pytest.skip("it trains whatever is kept")
    own = model(name)
    before, config = logits(own), own.config.to_dict()
    outcome = method(name, 1.0).compress(own, data())
    assert outcome.edits == []
    assert outcome.touched_share == 0
    assert torch.equal(logits(own), before)
    assert own.config.to_dict() == config


@every
def test_the_plan_foretells_the_size_and_the_result_opens_again(name: str, tmp_path: Path) -> None:
    own, made = model(name), method(name)
    own.save(tmp_path / "source")
    start = paredown.load(tmp_path / "source")
    outcome = made.compress(start, data())
    assert outcome.edits
    assert 0 < outcome.touched_share <= 1
    expected = logits(start)
    assert not torch.equal(expected, logits(own))
    start.save(tmp_path / "result")
    again = paredown.load(tmp_path / "result")
    assert torch.equal(logits(again), expected)
    written = {key: tuple(t.shape) for key, t in load_file(tmp_path / "result" / "model.safetensors").items()}
    skeleton = checkpoint.skeleton(tmp_path / "source")
    foretold = made.foretell(skeleton.model.anatomy.language.blocks)
    skeleton.model.anatomy = surgery.apply_model(skeleton.hf, skeleton.model.anatomy, foretold)
    planned = {key: tuple(t.shape) for key, t in planning.tensors(skeleton.model).items()}
    if made.sizes_vary:
        return
    count = {side: sum(torch.Size(shape).numel() for shape in held.values()) for side, held in
             (("written", written), ("planned", planned))}  # fmt: skip
    assert count["written"] == count["planned"]
    assert surgery.loads_in(skeleton.model.config) == surgery.loads_in(start.config)


@every
def test_cached_decoding_is_one_pass(name: str) -> None:
    own = model(name)
    method(name).compress(own, data())
    ids = torch.randint(3, 90, (2, 10), generator=torch.Generator().manual_seed(6))
    with torch.no_grad():
        whole = own.hf(input_ids=ids, use_cache=False).logits
        first = own.hf(input_ids=ids[:, :6], use_cache=True)
        cache, steps = first.past_key_values, [first.logits[:, -1]]
        for at in range(6, 9):
            out = own.hf(input_ids=ids[:, at : at + 1], past_key_values=cache, use_cache=True)
            cache = out.past_key_values
            steps.append(out.logits[:, -1])
    torch.testing.assert_close(torch.stack(steps, 1), whole[:, 5:9], atol=1e-5, rtol=1e-4)


@every
def test_the_same_seed_gives_the_same_bytes(name: str, tmp_path: Path) -> None:
    digests, choices = [], set()
    for attempt, seed in (("one", 0), ("two", 0), ("three", 1), ("four", 2), ("five", 3)):
        own = model(name)
        outcome = method(name).compress(own, data(), seed=seed)
        # What was changed in place tells of a choice only where weights were taken from other layers.
        told = [e for e in outcome.edits if e.op != "change_weights" or "weights from layers" in e.detail]
        choices.add(str([edit.model_dump() for edit in told]))
        if seed == 0:
            own.save(tmp_path / attempt)
            files = sorted((tmp_path / attempt).iterdir())
            digests.append({f.name: hashlib.sha256(f.read_bytes()).hexdigest() for f in files})
    assert digests[0] == digests[1]
    if registry.entry(name).control:
        assert len(choices) > 1, "a control must draw"


class KilledError(Exception):
    """What kills the work in the tests."""


@every
def test_killed_and_resumed_it_ends_the_same(name: str, tmp_path: Path) -> None:
    whole = model(name)
    known = method(name).compress(whole, data(), folder=tmp_path / "undisturbed").edits
    calls = [0]

    def until(limit: int) -> Any:
        def progress(done: int, total: int, text: str) -> None:
            calls[0] += 1
            if calls[0] >= limit:
                raise KilledError

        return progress

    for limit in (2, 5, 9):
        calls[0] = 0
        try:
            method(name).compress(model(name), data(), folder=tmp_path / "killed", progress=until(limit))
        except KilledError:
            continue
        break
    own = model(name)
    assert method(name).compress(own, data(), folder=tmp_path / "killed").edits == known
    assert torch.equal(logits(own), logits(whole))
