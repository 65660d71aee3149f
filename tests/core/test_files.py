"""Headers, shards and folders; what hostile files do to a run is shown in tests/workflow/test_hostile.py."""

from __future__ import annotations

import json
import struct
from pathlib import Path

import families
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from paredown.core import files
from paredown.errors import CheckpointError, ModelNotFoundError, ParedownError


@pytest.fixture
def tensors():
    draw = torch.Generator().manual_seed(0)
    return {
        "a": torch.randn(3, 4, generator=draw),
        "b": torch.randn(5, generator=draw).bfloat16(),
        "c": torch.arange(6).view(2, 3),
        "d": torch.tensor(2.5, dtype=torch.float16),
        "e": torch.zeros(0, 4),
        "f": torch.tensor([True, False]),
    }


def write(folder: Path, tensors, name=files.SINGLE) -> Path:
    folder.mkdir(exist_ok=True)
    save_file(tensors, folder / name)
    (folder / "config.json").write_text("{}")
    return folder


def test_headers_say_what_safetensors_says(tmp_path, tensors):
    found = files.headers(write(tmp_path / "m", tensors))
    assert found.keys() == tensors.keys()
    raw = (tmp_path / "m" / files.SINGLE).read_bytes()
    for name, tensor in tensors.items():
        info = found[name]
        assert info.shape == tuple(tensor.shape)
        assert (info.numel, info.nbytes) == (tensor.numel(), tensor.numel() * tensor.element_size())
        assert raw[info.start : info.end] == bytes(tensor.contiguous().view(-1).view(torch.uint8).tolist())


def test_the_single_file_goes_before_an_index_as_in_transformers(tmp_path, tensors):
    folder = write(tmp_path / "m", tensors)
    (folder / files.INDEX).write_text('{"weight_map": {"x": "nowhere.safetensors"}}')
    assert files.weight_files(folder) == [folder / files.SINGLE]
    assert files.headers(folder).keys() == tensors.keys()


def test_assembled_files_hold_every_bit(tmp_path, tensors):
    save_file({n: tensors[n] for n in "abc"}, tmp_path / "one.safetensors")
    save_file({n: tensors[n] for n in "def"}, tmp_path / "two.safetensors")
    out = tmp_path / "out"
    out.mkdir()
    assert files.assemble([tmp_path / "one.safetensors", tmp_path / "two.safetensors"], out) == [out / files.SINGLE]
    found = load_file(out / files.SINGLE)
    assert found.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert found[name].dtype == tensor.dtype
        assert torch.equal(found[name], tensor)
    with safe_open(out / files.SINGLE, framework="pt") as opened:
        assert opened.metadata() == {"format": "pt"}


def test_assembling_twice_gives_the_same_bytes(tmp_path, tensors):
    save_file(tensors, tmp_path / "part.safetensors")
    for name in ("x", "y"):
        (tmp_path / name).mkdir()
        files.assemble([tmp_path / "part.safetensors"], tmp_path / name, max_shard_bytes=40)
    for file in (tmp_path / "x").iterdir():
        assert file.read_bytes() == (tmp_path / "y" / file.name).read_bytes()


@settings(max_examples=40, deadline=None)
@given(sizes=st.lists(st.integers(0, 30), min_size=1, max_size=12), limit=st.integers(1, 200))
def test_shards_keep_to_their_size(tmp_path_factory, sizes, limit):
    folder = tmp_path_factory.mktemp("shards")
    tensors = {f"t{i:02d}": torch.full((n,), float(i)) for i, n in enumerate(sizes)}
    save_file(tensors, folder / "part.safetensors")
    out = folder / "out"
    out.mkdir()
    written = files.assemble([folder / "part.safetensors"], out, max_shard_bytes=limit)
    found = files.headers(out)
    assert found.keys() == tensors.keys()
    for file in written:
        inside = [info.nbytes for info in found.values() if info.file == file]
        assert sum(inside) <= limit or sum(n > 0 for n in inside) == 1
    if len(written) > 1:
        index = json.loads((out / files.INDEX).read_text())
        assert index["metadata"]["total_size"] == sum(4 * n for n in sizes)
        assert index["weight_map"] == {name: info.file.name for name, info in sorted(found.items())}
    assert all(torch.equal(load_file(info.file)[name], tensors[name]) for name, info in found.items())


def test_a_sharded_model_opens_in_transformers_with_the_same_logits(tmp_path):
    hf = families.llama()
    hf.save_pretrained(tmp_path / "whole")
    out = tmp_path / "sharded"
    out.mkdir()
    written = files.assemble([tmp_path / "whole" / files.SINGLE], out, max_shard_bytes=20_000)
    assert len(written) > 3
    (out / "config.json").write_bytes((tmp_path / "whole" / "config.json").read_bytes())
    given_ = families.inputs("llama")
    assert torch.equal(
        families.logits(AutoModelForCausalLM.from_pretrained(out).eval(), given_), families.logits(hf, given_)
    )


def test_a_part_that_shrinks_while_it_is_copied(tmp_path, tensors, monkeypatch):
    save_file(tensors, tmp_path / "part.safetensors")
    known = files._header(tmp_path / "part.safetensors")
    monkeypatch.setattr(files, "_header", lambda _: known)
    (tmp_path / "part.safetensors").write_bytes(b"short")
    with pytest.raises(CheckpointError, match="ended while it was being copied"):
        files.assemble([tmp_path / "part.safetensors"], tmp_path)


@settings(max_examples=150, deadline=None)
@given(raw=st.binary(max_size=80), body=st.binary(max_size=40))
def test_no_bytes_make_a_header_crash(tmp_path_factory, raw, body):
    folder = tmp_path_factory.mktemp("fuzz")
    (folder / files.SINGLE).write_bytes(struct.pack("<Q", len(raw)) + raw + body)
    with pytest.raises(CheckpointError):
        files.headers(folder)


_JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-5, 200) | st.floats() | st.text(max_size=3),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=6,
)


@settings(max_examples=150, deadline=None)
@given(entries=st.dictionaries(st.text(max_size=4), st.fixed_dictionaries(
    {"dtype": st.sampled_from(["F32", "U8", "X"]) | _JSON, "shape": st.lists(st.integers(-1, 4), max_size=2) | _JSON,
     "data_offsets": st.lists(st.integers(-4, 40), min_size=2, max_size=2) | _JSON}) | _JSON, max_size=3))  # fmt: skip
def test_what_we_accept_safetensors_accepts(tmp_path_factory, entries):
    file = tmp_path_factory.mktemp("fuzz") / files.SINGLE
    raw = json.dumps(entries).encode()
    file.write_bytes(struct.pack("<Q", len(raw)) + raw + bytes(16))
    try:
        found = files.headers(file.parent)
    except CheckpointError:
        return
    assert load_file(file).keys() == found.keys()


def test_equal_compares_bytes(tmp_path):
    same, other = torch.randn(4, 3), torch.randn(4, 3)
    save_file({"a": same, "b": same.clone(), "c": other, "d": same.view(3, 4).clone()}, tmp_path / files.SINGLE)
    found = files.headers(tmp_path)
    assert files.equal(found["a"], found["b"])
    assert not files.equal(found["a"], found["c"])
    assert not files.equal(found["a"], found["d"])


def test_fingerprints_tell_models_apart(tmp_path, tensors):
    known = files.fingerprint(write(tmp_path / "m", tensors))
    assert files.fingerprint(write(tmp_path / "n", tensors)) == known
    tensors["a"][0, 0] += 1
    assert files.fingerprint(write(tmp_path / "n", tensors)) != known
    folder = write(tmp_path / "m", {**tensors, "a": tensors["a"] - 0})
    (folder / "config.json").write_text('{"x": 1}')
    assert files.fingerprint(folder) != known


def test_extras_are_copied_and_nothing_else(tmp_path):
    source, out = tmp_path / "source", tmp_path / "out"
    (source / "tokenizer_folder").mkdir(parents=True)
    out.mkdir()
    wanted = [
        "LICENSE",
        "chat_template.jinja",
        "merges.txt",
        "preprocessor_config.json",
        "spiece.model",
        "tokenizer.json",
    ]
    for name in [*wanted, "config.json", "modeling_exotic.py", "pytorch_model.bin", "README.md", "model.safetensors"]:
        (source / name).write_text(name)
    assert files.copy_extras(source, out) == wanted
    assert sorted(path.name for path in out.iterdir()) == wanted


@pytest.mark.parametrize("name", ["a\0b", "x" * 400, "~nobody-at-all/x", "/nowhere", "../x", "a/b/c", ""])
def test_what_is_no_model(name, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises((ModelNotFoundError, CheckpointError)) as caught:
        files.locate(name)
    assert "\n" not in str(caught.value)


def test_a_local_folder_goes_before_a_hub_id(tmp_path, monkeypatch, tensors):
    write(tmp_path / "org", tensors)
    monkeypatch.chdir(tmp_path)
    assert files.locate("org") == Path("org")


def test_testbeds_are_found():
    assert (files.locate("testbed:moe") / "config.json").is_file()
    with pytest.raises(ParedownError, match="there is no testbed"):
        files.locate("testbed:../moe")
