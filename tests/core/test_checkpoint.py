"""Models, skeletons and single blocks: what a skeleton fills from disk is what transformers loads."""

from __future__ import annotations

import json

import families
import pytest
import torch
from safetensors.torch import load_file, save_file

from paredown.core import checkpoint, files
from paredown.errors import CheckpointError


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """Save a family's model once and return its folder. To be read only."""
    known = {}

    def get(name):
        if name not in known:
            known[name] = tmp_path_factory.mktemp(name)
            families.FAMILIES[name]().save_pretrained(known[name])
        return known[name]

    return get


def on_meta(hf):
    """Names of parameters without data; tied ones once, wherever they are tied to."""
    return {n for n, p in hf.named_parameters() if p.device.type == "meta" and n not in hf.all_tied_weights_keys}


@pytest.mark.parametrize("name", families.DECODERS)
def test_a_skeleton_that_is_filled_is_the_model(saved, name):
    skeleton = checkpoint.skeleton(saved(name))
    assert not skeleton.unknown
    assert all(p.device.type == "meta" for p in skeleton.hf.parameters())
    skeleton.fill(("",))
    assert not on_meta(skeleton.hf)
    whole = checkpoint.load(saved(name))
    theirs = whole.hf.state_dict()
    for key, tensor in skeleton.hf.state_dict().items():
        assert torch.equal(tensor, theirs[key]), key
    given = families.inputs(name)
    assert torch.equal(families.logits(skeleton.hf, given), families.logits(whole.hf, given))


@pytest.mark.parametrize("name", ["llama", "qwen3_moe_mixed", "deepseek_v3"])
def test_blocks_come_and_go_alone(saved, name):
    skeleton = checkpoint.skeleton(saved(name))
    path = skeleton.model.anatomy.language.blocks[1].path
    every = on_meta(skeleton.hf)
    skeleton.fill((path,))
    assert every - on_meta(skeleton.hf) == {n for n in every if n.startswith(path + ".")}
    skeleton.empty(path)
    assert on_meta(skeleton.hf) == every


@pytest.mark.parametrize("name", families.MOE)
def test_what_goes_to_disk_has_the_names_and_bits_it_came_with(saved, name):
    skeleton = checkpoint.skeleton(saved(name))
    on_disk = load_file(saved(name) / files.SINGLE)
    for block in skeleton.model.anatomy.language.blocks:
        skeleton.fill((block.path,))
        state = skeleton.hf.get_submodule(block.path).state_dict()
        for key, tensor in skeleton.disk_names({f"{block.path}.{n}": t for n, t in state.items()}).items():
            assert torch.equal(tensor, on_disk.pop(key)), key
        skeleton.empty(block.path)
    assert not any(".layers." in key for key in on_disk)


def test_the_order_in_which_blocks_are_read_does_not_matter(saved):
    # A resumed run begins somewhere in the middle.
    skeleton = checkpoint.skeleton(saved("qwen3_moe_mixed"))
    last = skeleton.model.anatomy.language.blocks[-1].path
    skeleton.fill((last,))
    state = {f"{last}.{n}": t for n, t in skeleton.hf.get_submodule(last).state_dict().items()}
    on_disk = load_file(saved("qwen3_moe_mixed") / files.SINGLE)
    names = skeleton.disk_names(state)
    assert names.keys() == {n for n in on_disk if n.startswith(last + ".")}
    assert all(torch.equal(tensor, on_disk[n]) for n, tensor in names.items())


def test_rotary_tables_are_real(saved):
    skeleton = checkpoint.skeleton(saved("llama"))
    table = skeleton.hf.model.rotary_emb.inv_freq
    assert table.device.type == "cpu"
    assert torch.equal(table, checkpoint.load(saved("llama")).hf.model.rotary_emb.inv_freq)


def test_save_and_load(saved, tmp_path):
    model = checkpoint.load(saved("qwen3_moe"))
    model.save(tmp_path / "again")
    assert (tmp_path / "again" / files.SINGLE).is_file()
    given = families.inputs("qwen3_moe")
    again = checkpoint.load(tmp_path / "again")
    assert torch.equal(families.logits(again.hf, given), families.logits(model.hf, given))
    assert again.parameters() == model.parameters() == sum(p.numel() for p in model.hf.parameters())


@pytest.fixture
def spoilt(saved, tmp_path):
    """Return a copy of a family's folder after its tensors and config were changed."""

    def make(name, *, tensors=None, **config):
        folder = tmp_path / name
        folder.mkdir()
        known = load_file(saved(name) / files.SINGLE)
        save_file((tensors or (lambda t: t))(known), folder / files.SINGLE, metadata={"format": "pt"})
        content = json.loads((saved(name) / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps({**content, **config}))
        return folder

    return make


@pytest.mark.parametrize("opened", [checkpoint.skeleton, checkpoint.load])
def test_a_missing_weight_is_named(spoilt, opened):
    folder = spoilt("qwen3", tensors=lambda t: {n: v for n, v in t.items() if n != "model.norm.weight"})
    with pytest.raises(CheckpointError, match=r"model\.norm\.weight"):
        opened(folder)


@pytest.mark.parametrize("opened", [checkpoint.skeleton, checkpoint.load])
def test_a_shape_at_odds_with_the_config_is_named(spoilt, opened):
    with pytest.raises(CheckpointError, match=r"config"):
        opened(spoilt("qwen3", intermediate_size=64))


def test_nan_is_found_when_a_block_is_read_and_when_all_is(spoilt):
    def spoil(tensors):
        tensors["model.layers.1.mlp.up_proj.weight"][2, 3] = float("nan")
        return tensors

    folder = spoilt("qwen3", tensors=spoil)
    skeleton = checkpoint.skeleton(folder)
    skeleton.fill(("model.layers.0",))
    for read in (lambda: skeleton.fill(("model.layers.1",)), lambda: checkpoint.load(folder)):
        with pytest.raises(CheckpointError, match=r"layers\.1\.mlp\.up_proj\.weight in .* holds 1 values"):
            read()


def test_large_numbers_are_still_numbers(tmp_path):
    checkpoint.check_finite(tmp_path, "x", torch.full((4,), 3e38))
    checkpoint.check_finite(tmp_path, "x", torch.tensor([1, 2]))
    with pytest.raises(CheckpointError, match="holds 2 values"):
        checkpoint.check_finite(tmp_path, "x", torch.tensor([1.0, float("inf"), float("-inf")]))


def test_tied_in_the_config_but_not_on_disk(spoilt):
    def untie(tensors):
        return {**tensors, "lm_head.weight": tensors["model.embed_tokens.weight"] + 1}

    with pytest.raises(CheckpointError, match="two different tensors; set tie_word_embeddings to false"):
        checkpoint.skeleton(spoilt("llama", tensors=untie))


def test_tied_and_written_twice(spoilt):
    folder = spoilt("llama", tensors=lambda t: {**t, "lm_head.weight": t["model.embed_tokens.weight"].clone()})
    skeleton = checkpoint.skeleton(folder)
    skeleton.fill(("",))
    assert skeleton.hf.lm_head.weight is skeleton.hf.model.embed_tokens.weight


def test_more_layers_than_tensors(spoilt):
    with pytest.raises(CheckpointError, match=r"asks for 1000000000 layers \(num_hidden_layers\)"):
        checkpoint.skeleton(spoilt("qwen3", num_hidden_layers=10**9))


def test_tensors_that_are_not_known_are_listed(spoilt):
    folder = spoilt("qwen3", tensors=lambda t: {**t, "mtp.x": torch.ones(2), "model.layers.7.y": torch.ones(2)})
    assert checkpoint.skeleton(folder).unknown == ("model.layers.7.y", "mtp.x")


def test_quiet_puts_things_back():
    from transformers.utils import logging

    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    with checkpoint.quiet():
        assert logging.get_verbosity() == logging.ERROR
        assert not logging.is_progress_bar_enabled()
    assert (logging.get_verbosity(), logging.is_progress_bar_enabled()) == (level, bars)


def test_below():
    assert checkpoint.below("a.b.c", ("a.b",))
    assert checkpoint.below("a.b", ("a.b",))
    assert checkpoint.below("anything", ("",))
    assert not checkpoint.below("a.bc", ("a.b",))
    assert not checkpoint.below("a", ())
