"""``policy.yaml``: written and read back, attached by `load`, and refused where it cannot be trusted."""

from __future__ import annotations

from typing import ClassVar

import families
import pytest
import torch
import yaml
from safetensors.torch import save_file

import paredown
from paredown import registry
from paredown.core import checkpoint, method, policy_file
from paredown.core.method import Policy
from paredown.errors import CheckpointError, PolicyError
from paredown.methods.cache.streaming import Streaming


class Learned(Policy):
    """Has small numbers as a field and large ones in a file."""

    name: ClassVar[str] = "learned"
    title: ClassVar[str] = "Learned"
    axis: ClassVar = "cache"
    unit: ClassVar[str] = "things"

    gates: tuple[tuple[float, ...], ...] = ()
    weights_file: str = ""


@pytest.fixture
def learned(monkeypatch):
    """Register it for one test."""
    monkeypatch.setitem(method._REGISTERED, "learned", Learned)
    entry = registry.entry("streaming")
    mine = type(entry)(**{**entry.__dict__, "name": "learned", "module": "paredown.core.method", "fields": ()})
    known = registry.entries()
    monkeypatch.setattr(registry, "entries", lambda: (*known, mine))
    return Learned


@pytest.fixture
def folder(tmp_path):
    families.llama().save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def test_fields_and_files_come_back(learned, folder, tmp_path):
    file = tmp_path / "gates.safetensors"
    save_file({"w": torch.arange(3.0)}, file)
    policy = learned(keep=0.3, gates=((0.1, 1e-7), (0.25, 1 / 3)), weights_file=str(file))
    policy_file.write(folder, [Streaming(keep=0.5), policy])
    first, second = policy_file.read(folder)
    assert first == Streaming(keep=0.5)
    assert second.gates == policy.gates
    assert second.weights_file == str(folder / "policies" / "2-weights-file.safetensors")
    assert policy_file.identity(second) == policy_file.identity(policy)
    raw = yaml.safe_load((folder / "policy.yaml").read_text())
    assert raw["policies"][1]["files"] == {"weights_file": "policies/2-weights-file.safetensors"}
    assert str(tmp_path) not in (folder / "policy.yaml").read_text()
    save_file({"w": torch.zeros(3)}, file)
    assert policy_file.identity(second) != policy_file.identity(policy)


def test_load_attaches_until_detach_and_without_if_asked(folder):
    ids = torch.arange(2, 22)[None]
    plain = checkpoint.load(folder)
    policy_file.write(folder, [Streaming(keep=0.25, sink=1)])
    model, bare = paredown.load(folder), paredown.load(folder, policies=False)
    assert model.policies == (Streaming(keep=0.25, sink=1),)
    assert bare.policies == ()
    told = [one.generate(ids, max_new_tokens=12, do_sample=False) for one in (plain, bare)]
    assert torch.equal(*told)
    with torch.no_grad(), paredown.attach(bare, Streaming(keep=0.25, sink=1)):
        expected = bare.generate(ids, max_new_tokens=12, do_sample=False)
    hf = model.hf
    assert torch.equal(hf.generate(ids, max_new_tokens=12, do_sample=False), expected)
    with pytest.raises(PolicyError, match="attached"), paredown.attach(model, Streaming(keep=0.5)):
        pass
    model.detach()
    assert model.policies == ()
    assert torch.equal(hf.generate(ids, max_new_tokens=12, do_sample=False), told[0])


def test_policies_stay_when_only_the_hf_model_is_kept(folder):
    import gc

    policy_file.write(folder, [Streaming(keep=0.25, sink=1)])
    hf = paredown.load(folder).hf
    gc.collect()
    with torch.no_grad():
        cache = hf(torch.arange(2, 22)[None], use_cache=True).past_key_values
    assert cache.layers[0].stores[0].entries.length == 5


def test_save_writes_them(folder, tmp_path):
    policy_file.write(folder, [Streaming(keep=0.25)])
    paredown.load(folder).save(tmp_path / "saved")
    assert paredown.load(tmp_path / "saved").policies == (Streaming(keep=0.25),)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("{", "cannot be read"),
        ("[]", "cannot be read"),
        ("format: 1\npolicies: [{method: streaming}]", "cannot be read"),
        ("format: 9\npolicies: []", "format 9"),
        ("format: 1\npolicies: [{method: nothing-such, fields: {}}]", "no method called"),
        ("format: 1\npolicies: [{method: streaming, fields: {keep: 2}}]", "keep"),
        ("format: 1\npolicies: [{method: dern, fields: {keep: 0.5}}]", "no policy"),
        (
            "format: 1\npolicies: [{method: streaming, fields: {}, files: {sink: ../x.safetensors}}]",
            "not in the folder",
        ),
        ("format: 1\npolicies: [{method: streaming, fields: {}, files: {sink: 3}}]", "not in the folder"),
        ("!!python/object/apply:os.system ['true']", "cannot be read"),
    ],
)
def test_what_cannot_be_trusted_is_refused_in_one_sentence(folder, text, says):
    (folder / "policy.yaml").write_text(text)
    with pytest.raises(CheckpointError, match=says) as caught:
        paredown.load(folder)
    assert str(caught.value).count("\n") == 0
    assert paredown.load(folder, policies=False).policies == ()
