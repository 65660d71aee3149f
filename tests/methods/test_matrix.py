"""The house tests: what every method promises, by being listed in the registry."""

from __future__ import annotations

import gc
import hashlib
import json
import os
from pathlib import Path
from typing import Any

import families
import matrix
import pytest
import torch
import transformers
from matrix import Case
from safetensors.torch import load_file

import paredown
from paredown import registry
from paredown.core import audit, checkpoint, surgery
from paredown.core.compression import Job, stream_for
from paredown.core.sequential import OnDisk
from paredown.workflow.journal import StepKeeper

CASES = matrix.cases()
ONE_EACH = matrix.one_family_each()
every = pytest.mark.parametrize("case", CASES, ids=str)
once = pytest.mark.parametrize("case", ONE_EACH, ids=str)


def compressed(case: Case, keep: float | None = None, *, seed: int = 0) -> tuple[checkpoint.Model, Any]:
    """Return a model that the case's method has compressed, and the outcome."""
    model = matrix.model(case.family)
    return model, case.method(keep).compress(model, matrix.batch(), seed=seed)


def logits(model: checkpoint.Model, family: str) -> torch.Tensor:
    """Run a family's inputs."""
    return families.logits(model.hf, families.inputs(family))


def test_every_compressor_is_in_the_matrix():
    assert {case.name for case in CASES} == set(matrix.names())
    assert set(matrix.FIELDS) <= set(matrix.names()), "FIELDS names a method that is gone"
    for name, listed in matrix.FIELDS.items():
        assert {} in listed, f"{name} must be tested with its defaults too"


def test_an_unlisted_method_would_be_tested_with_its_defaults(monkeypatch):
    matrix.cases.cache_clear()
    monkeypatch.delitem(matrix.FIELDS, "dern")
    monkeypatch.delitem(matrix.FAMILIES, "experts")
    try:
        found = [case for case in matrix.cases() if case.name == "dern"]
    finally:
        matrix.cases.cache_clear()
    assert {case.family for case in found} == set(families.MOE)
    assert all(dict(case.fields) == {} for case in found)


@every
def test_keep_one_changes_nothing(case):
    model = matrix.model(case.family)
    before, config = logits(model, case.family), model.config.to_dict()
    outcome = case.method(1.0).compress(model, matrix.batch())
    assert outcome.edits == []
    assert outcome.touched_share == 0
    assert torch.equal(logits(model, case.family), before)
    assert model.config.to_dict() == config


@every
def test_the_budget_is_met_exactly(case):
    for keep in case.keeps:
        method = case.method(keep)
        blocks = matrix.anatomy(case.family).language.blocks
        model, outcome = compressed(case, keep)
        wanted = matrix.expected(method, blocks)
        assert matrix.in_edits(method, blocks, outcome.edits) == wanted
        assert matrix.in_weights(method, blocks, model.hf.state_dict()) == wanted
        assert 0 < outcome.touched_share <= 1


@once
def test_the_seed_fixes_the_choice(case):
    entry = registry.entry(case.name)
    found = [compressed(case, seed=seed) for seed in (0, 0, 1, 2, 3, 4)]
    assert found[0][1].edits == found[1][1].edits
    if entry.control and entry.name.startswith("random"):
        # What is changed in place shows in the weights alone.
        drawn = {json.dumps([e.model_dump() for e in o.edits]) + str(audit.digests(m.hf)) for m, o in found}
        assert len(drawn) > 1, "a control must draw"


@pytest.mark.parametrize("case", [c for c in CASES if "calibration-data" in registry.entry(c.name).needs], ids=str)
def test_padding_does_not_count(case):
    """A batch with padding gives the scores that its rows give one by one."""
    ids, lengths = matrix.batch(rows=4, length=14).input_ids, (9, 14, 11, 10)
    method = case.method()
    lookback = getattr(method, "lookback", lambda _: 0)(matrix.anatomy(case.family).language.blocks)
    rows = [row[:n] for row, n in zip(ids, lengths, strict=True)]
    alone, edits = matrix.scores(
        method, matrix.model(case.family), None, stream=matrix.rows_apart(rows, lookback=lookback)
    )
    for side in ("right", "left"):
        padded, mask = torch.zeros_like(ids), torch.zeros_like(ids)
        for i, row in enumerate(rows):
            place = slice(0, len(row)) if side == "right" else slice(ids.shape[1] - len(row), None)
            padded[i, place], mask[i, place] = row, 1
        together, edits_together = matrix.scores(method, matrix.model(case.family), matrix.of(padded, mask))
        assert together.keys() == alone.keys()
        # Rounding makes steps of differences in the last digits, and later layers see those.
        looked = list(alone)[:1] if method.unit == "expert bits" else list(alone)
        for layer, known in ((layer, alone[layer]) for layer in looked):
            for name, values in known.items():
                scale = max(1.0, float(values.abs().max()))
                difference = float((values - together[layer][name]).abs().max())
                assert difference <= 1e-5 * scale, f"{side}: {name} of layer {layer} differs by {difference:.2g}"
        assert edits_together == edits


@every
def test_saved_and_loaded_it_is_the_same_model(case, tmp_path):
    model, outcome = compressed(case)
    expected = logits(model, case.family)
    model.save(tmp_path)
    config = transformers.AutoConfig.from_pretrained(tmp_path)
    if surgery.is_uniform(config):
        cls = type(model.hf)
        loaded, report = cls.from_pretrained(tmp_path, output_loading_info=True)
        wrong = {k: report[k] for k in ("missing_keys", "unexpected_keys", "mismatched_keys") if report[k]}
        assert not wrong
    else:
        loaded = paredown.load(tmp_path).hf
    loaded = loaded.eval()
    shapes = {name: tuple(t.shape) for name, t in model.hf.state_dict().items()}
    assert {name: tuple(t.shape) for name, t in loaded.state_dict().items()} == shapes
    assert torch.equal(families.logits(loaded, families.inputs(case.family)), expected)
    assert outcome.edits


@once
def test_uniform_results_open_in_plain_transformers(case):
    model, _ = compressed(case)
    loader = surgery.loads_in(model.config)
    needs_paredown = case.fields.get("form") == "ragged" or registry.entry(case.name).unit == "sub-layers"
    assert loader == ("paredown.load" if needs_paredown else "transformers")


@once
def test_the_same_run_gives_the_same_bytes(case, tmp_path):
    digests = []
    for attempt in ("one", "two"):
        model, _ = compressed(case)
        model.save(tmp_path / attempt)
        files = sorted((tmp_path / attempt).iterdir())
        digests.append({f.name: hashlib.sha256(f.read_bytes()).hexdigest() for f in files})
    assert digests[0] == digests[1]
    assert {"config.json", "model.safetensors"} <= digests[0].keys()


class KilledError(Exception):
    """What kills a run in the tests."""


@once
def test_from_disk_it_is_the_same_as_in_memory(case, tmp_path, monkeypatch):
    # What survives a power cut is not looked at here, nor how much memory is held; both cost most of the time.
    monkeypatch.setattr(os, "fsync", lambda _: None)
    monkeypatch.setattr(gc, "collect", lambda: 0)
    source = tmp_path / "source"
    matrix.model(case.family).save(source)
    # Both start from the file, so that alignment in memory is the only difference.
    model = paredown.load(source)
    outcome = case.method().compress(model, matrix.batch())
    model.save(tmp_path / "memory")
    known = load_file(tmp_path / "memory" / "model.safetensors")

    edits, blocks = _from_disk(case, source, tmp_path / "disk")
    assert edits == outcome.edits
    assert blocks
    stack = matrix.anatomy(case.family).language.layers + "."
    in_blocks = {name for name in known if name.startswith(stack)}
    assert blocks.keys() == in_blocks
    for name, tensor in blocks.items():
        assert torch.equal(tensor, known[name]), name

    # Killed twice and begun again, it ends the same.
    resumed, again, killed = None, {}, 0
    for stop in (1, 4, None):
        try:
            resumed, again = _from_disk(case, source, tmp_path / "resumed", stop=stop)
            break
        except KilledError:
            killed += 1
    assert killed
    assert resumed == outcome.edits
    assert again.keys() == blocks.keys()
    assert all(torch.equal(again[name], tensor) for name, tensor in blocks.items())


def _from_disk(
    case: Case, source: Path, work: Path, *, stop: int | None = None
) -> tuple[list[Any], dict[str, torch.Tensor]]:
    """Compress block by block from disk as `workflow.run` does; ``stop`` kills it when that much is done."""
    work.mkdir(exist_ok=True)
    skeleton = checkpoint.skeleton(source)
    keeper = StepKeeper(work, skeleton.disk_names)

    def progress(done: int, total: int, text: str) -> None:
        if stop is not None and done >= stop:
            raise KilledError

    method = case.method()
    stream = stream_for(method, skeleton.model, matrix.batch())
    outcome = Job(method, OnDisk(skeleton), stream, None, keeper, 0, progress).run()
    return outcome.edits, {name: t for part in keeper.parts() for name, t in load_file(part).items()}


@pytest.mark.parametrize("name", matrix.names("probe"))
@pytest.mark.parametrize("family", ["qwen2_moe", "qwen3_moe_mixed", "deepseek_v3"])
def test_a_probe_leaves_the_model_as_it_was(name, family):
    model, probe, sample = matrix.model(family), registry.create(name), matrix.batch(length=64)
    before, state = logits(model, family), {k: v.clone() for k, v in model.hf.state_dict().items()}
    hooks = sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.hf.modules())
    rows = probe.measure(model, sample)
    assert rows
    assert len({tuple(row) for row in rows}) == 1, "all rows have the same keys"
    assert json.loads(json.dumps(rows)) == rows
    assert rows == probe.measure(model, sample)
    assert all(torch.equal(v, state[k]) for k, v in model.hf.state_dict().items())
    assert sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.hf.modules()) == hooks
    assert torch.equal(logits(model, family), before)
