"""What is published about time and memory can be read, can be measured again, and is what the page says."""

from __future__ import annotations

import re
from typing import Any

import pytest
from benchmarks.common import RESULTS, Spread, commit, ratios

from benchmarks import models, policies, quality, run, tables, watched
from paredown import registry
from paredown.core import checkpoint
from paredown.workflow.measured import PolicyComparison

FILES = [file for file in sorted(RESULTS.glob("*.json")) if file.stem in tables.TYPES]


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_result_files_say_how_to_get_them_again(file):
    found = tables.TYPES[file.stem].model_validate_json(file.read_text(encoding="utf-8"))
    assert found.benchmark == file.stem
    assert found.command == f"python -m benchmarks.run {file.stem}"
    assert re.fullmatch(r"[0-9a-f]{12}", found.commit)
    assert "cores" in found.hardware
    assert found.rows
    assert {"torch", "transformers", "paredown"} <= found.versions.keys()


@pytest.mark.parametrize("file", sorted(RESULTS.glob("*/*.json")), ids=lambda file: file.stem)
def test_results_of_methods_belong_to_methods(file):
    found = quality.Published.model_validate_json(file.read_text(encoding="utf-8"))
    entry = next(e for e in registry.entries() if e.name == file.stem)
    assert entry.axis == file.parent.name
    assert re.match(r"[0-9a-f]{7,}", found.commit)


def test_every_benchmark_has_a_result():
    assert {file.stem for file in FILES} == set(run.BENCHMARKS) == set(tables.TYPES)


def test_the_page_is_what_the_results_say():
    assert tables.PAGE.read_text(encoding="utf-8") == tables.page(), "run `python -m benchmarks.tables`"


@pytest.mark.parametrize("file", quality.experiments(), ids=lambda file: file.stem)
def test_experiments_name_methods_of_their_axis(file):
    entry = next(e for e in registry.entries() if e.name == file.stem)
    assert entry.axis == file.parent.name
    runs: list[Any] = list(policies.read(file).runs) if policies.is_policy(file.stem) else [quality.read(file)]
    for spec in runs:
        assert spec.seeds >= 5
        for keep in spec.keeps:
            registry.create(file.stem, keep=keep, **spec.fields)


def test_a_checkpoint_built_shard_by_shard_is_whole(tmp_path):
    config = models.moe(hidden=32, layers=2, width=16, experts=4, top_k=2, heads=4, vocabulary=2048)
    nbytes = models.write_checkpoint(config, tmp_path / "model")
    loaded = checkpoint.load(tmp_path / "model")
    assert nbytes == sum(p.numel() * p.element_size() for p in loaded.hf.parameters())
    assert models.block_bytes(config)[0] > 0


def test_a_watched_process_is_measured_from_outside():
    code = "import json; held = bytearray(90_000_000); print(json.dumps({'length': len(held)}))"
    seen = watched.watch(code + "; import time; time.sleep(0.3)")
    assert seen.said == {"length": 90_000_000}
    assert seen.peak > 90_000_000


def test_ratios_are_taken_pair_by_pair():
    assert ratios([2.0, 9.0, 4.0], [1.0, 3.0, 4.0]) == Spread(median=2.0, low=1.0, high=3.0, n=3)


def test_the_commit_is_read_without_git(tmp_path):
    assert commit(tmp_path) == "unknown"
    (tmp_path / ".git").mkdir()
    (tmp_path / ".git/HEAD").write_text("ref: refs/heads/main\n")
    (tmp_path / ".git/packed-refs").write_text("# pack-refs\n" + "a" * 40 + " refs/heads/main\n")
    assert commit(tmp_path) == "a" * 12
    (tmp_path / ".git/refs/heads").mkdir(parents=True)
    (tmp_path / ".git/refs/heads/main").write_text("b" * 40 + "\n")
    assert commit(tmp_path) == "b" * 12


def test_measuring_on_one_model_again_leaves_the_other_runs_as_they_are(monkeypatch):
    file = next(file for file in quality.experiments() if file.stem == "mustafar")
    earlier = policies.PolicyResult.model_validate_json(
        (RESULTS / "cache" / "mustafar.json").read_text(encoding="utf-8")
    )
    asked = []

    def compare(method: str, again: policies.Run) -> Any:
        asked.append(again.model)
        told = next(one for one in earlier.outcomes if one.run == again)
        return PolicyComparison.model_construct(
            original=told.original, rows=told.rows[:1], notes=[], seconds=1.0, versions={}, created="now"
        )

    monkeypatch.setattr(policies, "_compare", compare)
    found = policies.measure(file, earlier=earlier, on="testbed:lm")
    assert asked == ["testbed:lm"]
    for old, new in zip(earlier.outcomes, found.outcomes, strict=True):
        if old.run.model == "testbed:lm":
            assert new.rows == old.rows[:1]
            assert new.commit is None
        else:
            assert new.rows == old.rows
            assert new.commit == (old.commit or earlier.commit)
    assert found.commit == commit()
    with pytest.raises(SystemExit, match="nothing on testbed:vlm"):
        policies.measure(file, earlier=earlier, on="testbed:vlm")
