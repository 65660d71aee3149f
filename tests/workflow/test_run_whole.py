"""Runs with steps that work on a whole model: written, proven, told step by step, and resumed with the same bytes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import tiny

import paredown
from paredown.workflow import recipe as recipes
from paredown.workflow.run import run

STEPS: tuple[dict[str, Any], ...] = (
    {"method": "llm-drop", "keep": 0.75, "part": "mlp"},
    {"method": "trimllm", "keep": 0.85, "steps": 2, "final_steps": 2, "batch": 2},
    {"method": "healing", "steps": 3, "batch": 2, "distil": 1.0},
)


@pytest.fixture(scope="module")
def file(checkpoint_folder: Any, text_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("whole")
    return tiny.write_recipe(folder / "recipe.yaml", checkpoint_folder(), text_file, *STEPS)


@pytest.fixture(scope="module")
def done(file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("out") / "small"
    run(recipes.read(file), out, speed=False)
    return out


def test_each_step_is_told_with_what_it_cost(done: Path) -> None:
    record = json.loads((done / "paredown" / "run.json").read_text(encoding="utf-8"))
    assert record["proof"]["passed"]
    assert record["proof"]["max_abs_logit_difference"] == 0
    first, second, third = record["steps"]
    assert [len(step["scores"]) for step in record["steps"]] == [2, 2, 2]
    assert first["bytes_after"] > second["bytes_after"] == third["bytes_after"] == record["size_after"]["bytes_weights"]
    # A step is held against the model before it: what one leaves is what the next begins with.
    for one, other in ((first, second), (second, third)):
        assert one["scores"][0]["after"]["mean"] == pytest.approx(other["scores"][0]["before"]["mean"], rel=1e-6)
    assert third["changes"]
    assert {change["before"] - change["after"] for change in third["changes"]} == {0}
    page, card = (done / "paredown" / "report.html").read_text(), (done / "README.md").read_text()
    for text in (page, card):
        for head in ("Paired difference", "1. llm-drop", "2. trimllm", "3. healing"):
            assert head in text, head
    decided = json.loads((done / "paredown" / "step-2.json").read_text(encoding="utf-8"))
    assert any(edit["op"] == "drop_sublayer" for layer in decided["edits"] for edit in layer)
    assert paredown.load(done).anatomy.language.blocks


class KilledError(Exception):
    """What kills a run in the tests."""


def test_killed_in_each_step_it_goes_on_and_gives_the_same_bytes(file: Path, done: Path, tmp_path: Path) -> None:
    out = tmp_path / "small"
    for word in ("llm-drop", "trimllm", "healing"):
        seen = [0]

        def progress(done: int, total: int, text: str, word: str = word, seen: list[int] = seen) -> None:
            seen[0] += word in text
            if seen[0] == 3:
                raise KilledError

        with pytest.raises(KilledError):
            run(recipes.read(file), out, speed=False, resume=word != "llm-drop", progress=progress)
        assert not out.exists()
    record = run(recipes.read(file), out, speed=False, resume=True)
    assert record.resumed == 3
    assert tiny.result(out) == tiny.result(done)
