"""Blocks that share weights: in memory, in files, one block at a time, under an optimiser, with a cache."""

from __future__ import annotations

import gc
import json
from copy import deepcopy
from pathlib import Path
from typing import Any

import families
import pytest
import torch
import transformers as tf
from safetensors import safe_open

import paredown
from paredown.core import checkpoint, surgery
from paredown.core.checkpoint import Model
from paredown.core.depth import sharing
from paredown.core.depth.lowrank import DeltaLinear, factors, started
from paredown.core.edits import ChangeWeights, DropBlock, Edit, KeepNeurons, ShareBlock
from paredown.core.roles import Shared
from paredown.core.sequential import OnDisk, Stream
from paredown.errors import ArchitectureError, BudgetError, CheckpointError
from paredown.methods.depth.llm_drop import RandomBlocks
from paredown.workflow.plan import tensors

NAMES = (
    "llama",
    "qwen3",
    "mistral",
    "gemma3",
    "gpt_neox",
    "phi",
    "mixtral",
    "qwen3_moe",
    "deepseek_v3",
    "bert",
    "llava",
)
NO_DELTAS = ("mixtral", "qwen3_moe", "deepseek_v3")


def edits(name: str, *, norms: bool = True, rank: int = 4) -> list[Edit]:
    """Let the last layer share; where the first layers are not of its kind (DeepSeek), with its neighbour."""
    if name == "deepseek_v3":
        return [ShareBlock(layer=3, source=1, norms=norms)]
    rank, last = 0 if name in NO_DELTAS else rank, 3 if name == "gemma3" else 2
    return [DropBlock(layer=1), ShareBlock(layer=last, source=0, rank=rank, norms=norms)]


def shared(name: str, **how: Any) -> Model:
    model = Model.of(families.FAMILIES[name]())
    sharing.share(model, edits(name, **how))
    return model


def ties(model: Model) -> dict[str, str]:
    """Return the ties between blocks, without those of the embedding."""
    found: Any = model.hf.all_tied_weights_keys
    return {target: source for target, source in found.items() if ".layers." in target or ".layer." in target}


def deep(layers: int = 4, seed: int = 0, **more: Any) -> Model:
    """A llama with every bias."""
    config = tf.LlamaConfig(
        **{**families._GQA, "num_hidden_layers": layers}, attention_bias=True, mlp_bias=True, **more
    )
    return Model.of(families._seeded(lambda: tf.LlamaForCausalLM(config)))


@pytest.mark.parametrize("norms", [True, False], ids=["own norms", "shared norms"])
@pytest.mark.parametrize("name", NAMES)
def test_shared_weights_survive_saving_and_loading(name: str, norms: bool, tmp_path: Path) -> None:
    model = shared(name, norms=norms)
    given = families.inputs(name)
    expected = families.logits(model.hf, given)
    model.save(tmp_path)
    loaded = paredown.load(tmp_path)
    assert torch.equal(families.logits(loaded.hf, given), expected)
    assert loaded.anatomy == model.anatomy
    last = loaded.anatomy.language.blocks[-1]
    rank = 0 if name in NO_DELTAS else 4
    assert last.shared == Shared(1 if name == "deepseek_v3" else 0, rank, norms)
    # Pointers are equal, on both sides.
    for one in (model, loaded):
        assert ties(one)
        for target, source in ties(one).items():
            assert one.hf.get_parameter(target) is one.hf.get_parameter(source)
    # Each stands in the file once, and is counted once.
    held = _stored(tmp_path)
    assert not held & {key for target in ties(loaded) for key in (target,)}
    size = sum(t.numel() for t in tensors(model).values())
    assert size == sum(t.numel() for t in tensors(loaded).values()) == _elements(tmp_path)
    assert model.parameters() == loaded.parameters() == sum(p.numel() for p in model.hf.parameters())
    # Own: the layer's number, norms, deltas.
    block = model.hf.get_submodule(model.anatomy.language.blocks[-1].path)
    numbers = {m.layer_idx for m in block.modules() if isinstance(getattr(m, "layer_idx", None), int)}
    assert numbers <= {len(model.anatomy.language.blocks) - 1}


@pytest.mark.parametrize("name", NAMES)
def test_plain_transformers_fails_instead_of_inventing_weights(name: str, tmp_path: Path) -> None:
    model = shared(name)
    model.save(tmp_path)
    with pytest.raises(RuntimeError):
        type(model.hf).from_pretrained(tmp_path)


@pytest.mark.parametrize("name", NAMES)
def test_one_block_at_a_time_from_disk(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Opening a block reads what it shares, closing it leaves nothing behind, in whatever order."""
    monkeypatch.setattr(gc, "collect", lambda: 0)
    shared(name).save(tmp_path)
    whole, skeleton = paredown.load(tmp_path), checkpoint.skeleton(tmp_path)
    assert skeleton.model.anatomy == whole.anatomy
    assert skeleton.model.parameters() == whole.parameters()
    source = OnDisk(skeleton)
    blocks = skeleton.model.anatomy.language.blocks
    for part in (*blocks, *reversed(blocks)):
        view = source.open(part.index)
        wanted = dict(whole.hf.get_submodule(part.path).named_parameters(remove_duplicate=False))
        for key, parameter in view.module.named_parameters(remove_duplicate=False):
            assert torch.equal(parameter, wanted[key])
        resident = {n for n, p in skeleton.hf.named_parameters(remove_duplicate=False) if not p.is_meta}
        assert all(n.startswith(f"{part.path}.") for n in resident)
        source.close(part.index)
        assert all(p.is_meta for p in skeleton.hf.parameters())


@pytest.mark.parametrize("name", ["llama", "qwen3_moe"])
def test_streamed_logits_are_those_of_the_model_in_memory(name: str, tmp_path: Path) -> None:
    shared(name).save(tmp_path)
    whole, source = paredown.load(tmp_path), OnDisk(checkpoint.skeleton(tmp_path))
    ids = families.inputs(name)["input_ids"]
    stream = Stream("test", ids, batch_size=2)
    with source.open_ends(head=False):
        stream.start(source)
    for part in source.model.anatomy.language.blocks:
        stream.advance(source.open(part.index), index=part.index)
        source.close(part.index)
    with source.open_ends(head=True):
        logits = torch.cat(list(stream.logits(source, 2)))
    torch.testing.assert_close(logits, families.logits(whole.hf, {"input_ids": ids}))


def test_two_blocks_open_at_once_hold_the_tensors_they_share(tmp_path: Path) -> None:
    shared("qwen3").save(tmp_path)
    skeleton = checkpoint.skeleton(tmp_path)
    source, name = OnDisk(skeleton), "mlp.up_proj.weight"
    first, last = source.open(0).module, source.open(1).module
    assert torch.equal(first.get_parameter(name), last.get_parameter(name))
    source.close(0)
    assert first.get_parameter(name).is_meta
    assert not last.get_parameter(name).is_meta
    source.close(1)
    assert all(p.is_meta for p in skeleton.hf.parameters())


def test_a_whole_skeleton_filled_is_the_model(tmp_path: Path) -> None:
    shared("llama").save(tmp_path)
    skeleton, whole = checkpoint.skeleton(tmp_path), paredown.load(tmp_path)
    skeleton.fill(("",))
    given = families.inputs("llama")
    assert torch.equal(families.logits(skeleton.hf, given), families.logits(whole.hf, given))
    for target, source in ties(skeleton.model).items():
        assert skeleton.hf.get_parameter(target) is skeleton.hf.get_parameter(source)


def test_one_optimiser_step_changes_all_uses_and_is_the_sum_of_their_gradients() -> None:
    model = Model.of(families.qwen3())
    sharing.share(model, [ShareBlock(layer=i, source=0, rank=2) for i in (0, 1, 2)])
    ids = families.inputs("qwen3")["input_ids"]
    # The same network with weights that only look alike.
    apart = deepcopy(model.hf)
    for target in ties(model):
        owner, _, leaf = target.rpartition(".")
        module = apart.get_submodule(owner)
        module._parameters[leaf] = torch.nn.Parameter(module._parameters[leaf].detach().clone())
    for hf in (model.hf, apart):
        hf(input_ids=ids, labels=ids).loss.backward()
    name = "model.layers.{}.mlp.down_proj.weight"
    summed = sum(apart.get_parameter(name.format(i)).grad for i in range(3))
    one = model.hf.get_parameter(name.format(0))
    torch.testing.assert_close(one.grad, summed)
    before = one.detach().clone()
    optimiser = torch.optim.SGD(model.hf.parameters(), lr=0.1)
    assert sum(p is one for group in optimiser.param_groups for p in group["params"]) == 1
    optimiser.step()
    for i in range(3):
        torch.testing.assert_close(model.hf.get_parameter(name.format(i)).detach(), before - 0.1 * summed)


@pytest.mark.parametrize("name", ["llama", "gemma3", "gpt_neox", "mixtral"])
def test_every_block_has_a_slot_of_its_own_in_the_cache(name: str) -> None:
    """Cached decoding is uncached decoding, with as many slots as blocks and not as unique ones."""
    model, ids = shared(name), families.inputs(name, length=10)["input_ids"]
    whole = families.logits(model.hf, {"input_ids": ids})
    with torch.no_grad():
        out = model.hf(input_ids=ids[:, :4], use_cache=True)
        found = [out.logits]
        for step in range(4, 10):
            out = model.hf(input_ids=ids[:, step : step + 1], past_key_values=out.past_key_values, use_cache=True)
            found.append(out.logits)
    torch.testing.assert_close(torch.cat(found, 1), whole, atol=1e-4, rtol=1e-4)
    layers = out.past_key_values.layers
    assert len(layers) == len(model.anatomy.language.blocks)
    assert not torch.equal(layers[0].keys, layers[-1].keys)


@pytest.mark.parametrize("name", ["llama", "qwen3", "gemma3", "gpt_neox", "phi"])
def test_full_rank_is_the_model_as_it_was(name: str) -> None:
    model, given = Model.of(families.FAMILIES[name]()), families.inputs(name)
    before = families.logits(model.hf, given)
    sharing.share(model, [ShareBlock(layer=2, source=0, rank=1000)])
    torch.testing.assert_close(families.logits(model.hf, given), before, atol=1e-4, rtol=1e-4)


def test_copies_that_share_are_bit_for_bit_the_same() -> None:
    model, given = Model.of(families.qwen3()), families.inputs("qwen3")
    model.hf.model.layers[2].load_state_dict(model.hf.model.layers[0].state_dict())
    before = families.logits(model.hf, given)
    sharing.share(model, [ShareBlock(layer=2, source=0)])
    assert torch.equal(families.logits(model.hf, given), before)


def test_parameters_are_those_of_the_parents_and_what_children_own() -> None:
    model = deep(4)
    block = model.hf.model.layers[0]
    matrices = sum(p.numel() for p in block.parameters() if p.dim() > 1)
    vectors = sum(p.numel() for p in block.parameters() if p.dim() == 1)
    deltas = sum(3 * sum(p.shape) for p in block.parameters() if p.dim() > 1)
    ends = model.parameters() - 4 * (matrices + vectors)
    sharing.share(model, [ShareBlock(layer=i, source=i - i % 2, rank=3) for i in (1, 3)])
    assert model.parameters() == ends + 2 * matrices + 4 * vectors + 2 * deltas


def test_sources_move_with_the_blocks_that_stay(tmp_path: Path) -> None:
    model = deep(6)
    sharing.share(
        model, [DropBlock(layer=0), DropBlock(layer=3), ShareBlock(layer=2, source=1), ShareBlock(layer=5, source=4)]
    )
    assert [block.shared for block in model.anatomy.language.blocks] == [None, Shared(0), None, Shared(2)]
    model.save(tmp_path)
    written = json.loads((tmp_path / "config.json").read_text())["per_layer_config"]
    assert {i: one["shared_with"] for i, one in written.items() if one["shared_with"] is not None} == {"1": 0, "3": 2}
    assert paredown.load(tmp_path).anatomy == model.anatomy


def test_a_narrow_source_lends_its_width(tmp_path: Path) -> None:
    """The child's dead size is replaced by that of its source, not by the global one."""
    model = deep(4)
    cut: list[Edit] = [KeepNeurons(layer=i, keep=tuple(range(8))) for i in (1, 3)]
    model.anatomy = surgery.apply_model(model.hf, model.anatomy, cut)
    sharing.share(model, [ShareBlock(layer=3, source=1, rank=2)])
    model.save(tmp_path)
    loaded, given = paredown.load(tmp_path), families.inputs("llama")
    assert loaded.hf.model.layers[3].mlp.up_proj.weight.shape[0] == 8
    assert torch.equal(families.logits(loaded.hf, given), families.logits(model.hf, given))
    assert checkpoint.skeleton(tmp_path).model.anatomy == model.anatomy


def test_fewer_tensors_than_layers(tmp_path: Path) -> None:
    model = deep(40, hidden_act="silu")
    sharing.share(model, [ShareBlock(layer=i, source=0, norms=False) for i in range(1, 40)])
    model.save(tmp_path)
    assert len(_stored(tmp_path)) < 40
    assert len(paredown.load(tmp_path).anatomy.language.blocks) == 40
    assert len(checkpoint.skeleton(tmp_path).model.anatomy.language.blocks) == 40


@pytest.mark.parametrize(
    ("wrong", "text"),
    [
        ([ShareBlock(layer=0, source=2)], "name an earlier layer"),
        ([ShareBlock(layer=2, source=1), DropBlock(layer=1)], "name an earlier layer that stays"),
        ([ShareBlock(layer=1, source=0), ShareBlock(layer=2, source=1)], "which uses those of layer 0"),
        ([ShareBlock(layer=1, source=1, rank=2)], "with no other layer"),
    ],
)
def test_blocks_that_cannot_share_are_refused(wrong: list[Edit], text: str) -> None:
    model = deep(3)
    before = {name: t.clone() for name, t in model.hf.state_dict().items()}
    with pytest.raises(BudgetError, match=text):
        sharing.share(model, wrong)
    assert all(torch.equal(t, before[name]) for name, t in model.hf.state_dict().items())


def test_unlike_blocks_and_experts_with_deltas_are_refused() -> None:
    model = Model.of(families.qwen3_moe_mixed())
    with pytest.raises(ArchitectureError, match="layer 1 cannot share the weights of layer 0"):
        sharing.share(model, [ShareBlock(layer=1, source=0)])
    with pytest.raises(ArchitectureError, match="set rank=0"):
        sharing.share(model, [ShareBlock(layer=2, source=0, rank=2)])
    assert all(block.shared is None for block in model.anatomy.language.blocks)


def test_what_shares_is_not_cut_again() -> None:
    model = shared("llama")
    with pytest.raises(ArchitectureError, match="shares weights with other layers"):
        RandomBlocks(keep=0.5).compress(model, None)
    with pytest.raises(ArchitectureError, match="heal behind it"):
        surgery.apply_model(model.hf, model.anatomy, [DropBlock(layer=1)])
    # Weights that are changed in place leave shapes and ties as they are.
    known = model.anatomy
    assert surgery.apply_model(model.hf, known, [ChangeWeights(layer=0, unit="weights", before=1, after=1)]) == known


@pytest.mark.parametrize(
    ("layer", "key", "value"),
    [("1", "shared_with", 5), ("1", "shared_with", 1.5), ("1", "shared_with", -1), ("1", "shared_rank", -2)],
)
def test_a_config_that_lies_about_sharing_is_told(layer: str, key: str, value: Any, tmp_path: Path) -> None:
    shared("qwen3").save(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config["per_layer_config"][layer][key] = value
    (tmp_path / "config.json").write_text(json.dumps(config))
    for read in (paredown.load, checkpoint.skeleton):
        with pytest.raises(CheckpointError):
            read(tmp_path)


# Deltas.


def test_the_delta_of_a_rank_is_the_best_there_is() -> None:
    """SVD optimality: what is missing is the root of the discarded singular values' squares, and never rises."""
    matrix = torch.randn(24, 40, generator=torch.Generator().manual_seed(0))
    values, before = torch.linalg.svdvals(matrix), float("inf")
    for rank in (1, 2, 5, 11, 23, 24, 100):
        a, b = factors(matrix, rank)
        assert a.shape == (min(rank, 24), 40)
        missing = float(torch.linalg.norm(matrix - b @ a))
        assert missing == pytest.approx(float(values[rank:].square().sum().sqrt()), abs=1e-4)
        assert missing <= before + 1e-5
        before = missing


def test_large_matrices_get_nearly_the_best(monkeypatch: pytest.MonkeyPatch) -> None:
    generator = torch.Generator().manual_seed(0)
    matrix = torch.randn(96, 6, generator=generator) @ torch.randn(6, 80, generator=generator)
    matrix += 0.01 * torch.randn(96, 80, generator=generator)
    exact = factors(matrix, 6)
    monkeypatch.setattr("paredown.core.depth.lowrank.EXACT", 32)
    state = torch.random.get_rng_state()
    again = factors(matrix, 6)
    assert torch.equal(torch.random.get_rng_state(), state)
    assert not torch.equal(again[0], exact[0])
    best, near = (float(torch.linalg.norm(matrix - b @ a)) for a, b in (exact, again))
    assert near == pytest.approx(best, rel=1e-3)


def test_a_delta_that_begins_as_zero_adds_nothing_and_can_learn() -> None:
    a, b = started(torch.randn(6, 8), 3, "zero", torch.Generator().manual_seed(0))
    assert not b.any()
    assert a.any()
    assert float(a.abs().max()) <= 8**-0.5


def test_a_linear_layer_with_a_delta() -> None:
    linear = torch.nn.Linear(5, 7)
    delta, x = DeltaLinear(linear, 9), torch.randn(3, 5)
    assert delta.delta_a.shape == (5, 5)
    assert torch.equal(delta(x), linear(x))
    with torch.no_grad():
        delta.delta_a.normal_()
        delta.delta_b.normal_()
    torch.testing.assert_close(delta(x), x @ delta.dense().T + linear.bias)
    assert delta.weight is linear.weight
    assert "rank=5" in repr(delta)


def test_the_mean_of_equal_tensors_is_the_tensor() -> None:
    blocks = [torch.nn.Linear(4, 4) for _ in range(3)]
    for block in blocks[1:]:
        block.load_state_dict(blocks[0].state_dict())
    assert torch.equal(sharing.average(blocks, ["weight"])["weight"], blocks[0].weight)
    with torch.no_grad():
        blocks[2].weight += 3
    torch.testing.assert_close(sharing.average(blocks, ["weight"])["weight"], blocks[0].weight + 1)


def _stored(folder: Path) -> set[str]:
    with safe_open(folder / "model.safetensors", framework="pt") as opened:
        return set(opened.keys())


def _elements(folder: Path) -> int:
    with safe_open(folder / "model.safetensors", framework="pt") as opened:
        return sum(opened.get_tensor(name).numel() for name in opened.keys())  # noqa: SIM118, no mapping
