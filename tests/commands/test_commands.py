"""Every command on a real (tiny, random) checkpoint, as a user would call it."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from transformers import AutoConfig

# One worker, so that the whole run is made once.
pytestmark = pytest.mark.xdist_group("commands")

STEP = ("--method", "random-experts", "--keep", "0.5")


@pytest.fixture(scope="session")
def ran(checkpoint, texts, tmp_path_factory) -> tuple[Path, subprocess.CompletedProcess[str]]:
    """What one whole run wrote, speed and memory included, and what it said to pipes. To be read only."""
    out = tmp_path_factory.mktemp("results") / "smaller"
    words = ["run", checkpoint, *STEP, "--data", texts, "--out", out, "--gate", "none"]
    done = subprocess.run(
        [sys.executable, "-m", "paredown", *map(str, words)], capture_output=True, text=True, timeout=600, check=False
    )
    assert done.returncode == 0, done.stderr
    return out, done


@pytest.fixture
def untimed(monkeypatch):
    """Leave speed and memory out: they are measured in fresh processes, which takes its time."""
    monkeypatch.setattr("paredown.workflow.measure.speeds", lambda *args, **kwargs: (None, None))
    monkeypatch.setattr("paredown.workflow.evaluate._costs", lambda *args, **kwargs: [None, None])


def untimed_lines(text: str) -> list[str]:
    return [line for line in text.splitlines() if ": time:" not in line]


def test_run_writes_a_checkpoint_with_report_and_says_what_it_did(ran):
    out, said = ran
    for name in ("config.json", "model.safetensors", "tokenizer.json", "paredown/report.html", "README.md"):
        assert (out / name).is_file(), name
    assert AutoConfig.from_pretrained(out).num_experts == 4
    assert "8 of 16 kept" in said.stdout
    assert "proof: passed" in said.stdout
    assert "plan, step 1: random-experts" in said.stderr
    assert "100 %" in said.stderr


def test_nobody_else_talks_to_the_user(ran):
    _, said = ran
    for noise in ("Warning", "warning:", "Loading weights", "it/s", "transformers.", "Traceback"):
        assert noise not in said.stderr
        assert noise not in said.stdout


def test_show_tells_what_the_run_told(paredown, ran):
    out, said = ran
    shown = paredown("show", out)
    assert shown.code == 0
    assert untimed_lines(shown.out) == untimed_lines(said.stdout)
    assert shown.err == ""
    record = paredown("show", out, "--json").json
    assert record["steps"][0]["method"] == "random-experts"
    assert record["proof"]["passed"] is True


def test_run_does_not_touch_a_folder_that_is_there(paredown, checkpoint, texts, ran):
    out, _ = ran
    before = sorted((path.name, path.stat().st_mtime_ns) for path in out.iterdir())
    again = paredown("run", checkpoint, *STEP, "--data", texts, "--out", out)
    assert again.code == 1
    assert again.err.count("error:") == 1
    assert "--force" in again.err
    assert sorted((path.name, path.stat().st_mtime_ns) for path in out.iterdir()) == before
    assert [path.name for path in out.parent.iterdir()] == [out.name]


@pytest.mark.usefixtures("untimed")
def test_force_replaces_the_folder_with_equal_bytes(paredown, checkpoint, texts, tmp_path, ran):
    out = tmp_path / "smaller"
    shutil.copytree(ran[0], out)
    weights = (out / "model.safetensors").read_bytes()
    (out / "stray.txt").write_text("of an older result")
    again = paredown("run", checkpoint, *STEP, "--data", texts, "--out", out, "--gate", "none", "--force")
    assert again.code == 0, again.err
    assert (out / "model.safetensors").read_bytes() == weights
    assert not (out / "stray.txt").exists()


@pytest.mark.usefixtures("untimed")
def test_run_of_a_recipe_equals_the_run_of_its_step(paredown, checkpoint, texts, tmp_path, ran):
    out, _ = ran
    recipe = tmp_path / "steps.yaml"
    recipe.write_text(
        f"model: {checkpoint}\ndata: {{calibration: {texts}}}\ngate: none\n"
        "steps:\n  - {method: random-experts, keep: 0.5}\n"
    )
    other = tmp_path / "other"
    said = paredown("run", recipe, "--out", other)
    assert said.code == 0, said.err
    assert (other / "model.safetensors").read_bytes() == (out / "model.safetensors").read_bytes()


def test_the_gate_stops_with_code_3_and_nothing_written(paredown, checkpoint, texts, tmp_path):
    out = tmp_path / "smaller"
    said = paredown("run", checkpoint, *STEP, "--data", texts, "--out", out, "--gate", "kl:0.0000001")
    assert said.code == 3
    assert said.err.count("error:") == 1
    assert not out.exists()


def test_plan_foretells_and_writes_nothing(paredown, checkpoint, texts, tmp_path):
    there = sorted(checkpoint.iterdir())
    said = paredown("plan", checkpoint, *STEP, "--data", texts)
    assert said.code == 0, said.err
    assert "random-experts" in said.out
    planned = paredown("plan", checkpoint, *STEP, "--data", texts, "--json").json
    assert [step["method"] for step in planned] == ["random-experts"]
    assert planned[0]["parameters_after"] < planned[0]["parameters_before"]
    assert sorted(checkpoint.iterdir()) == there


def test_plan_json_is_alone_on_standard_output(paredown, checkpoint, texts):
    said = paredown("plan", checkpoint, *STEP, "--data", texts, "--json")
    assert said.out.startswith("[")
    assert said.out.endswith("]\n")


@pytest.mark.parametrize("keep", ["0", "1.5", "nan", "-1"])
def test_impossible_keeps_are_told_in_one_sentence(paredown, checkpoint, texts, tmp_path, keep):
    out = tmp_path / "smaller"
    words = ("run", checkpoint, "--method", "random-experts", "--keep", keep, "--data", texts, "--out", out)
    said = paredown(*words)
    assert said.code == 1
    assert said.out == ""
    assert said.err.startswith("error: ")
    assert said.err.count("\n") == 1
    assert "keep" in said.err
    assert list(tmp_path.iterdir()) == []


def test_unknown_methods_bring_near_matches(paredown):
    for words in (["methods", "dren"], ["plan", "testbed:moe", "--method", "dren", "--keep", "0.5"]):
        said = paredown(*words)
        assert said.code == 2
        assert said.err.count("\n") == 1
        assert "dern" in said.err


def test_unknown_fields_bring_the_legal_ones(paredown, checkpoint):
    said = paredown("plan", checkpoint, "--method", "dern", "--keep", "0.5", "--set", "alpa=1")
    assert said.code == 1
    assert said.err.count("\n") == 1
    assert "alpha" in said.err


@pytest.mark.parametrize("command", [["scan"], ["eval"], ["plan", *STEP], ["show"]])
def test_a_model_that_is_not_there_is_told_in_one_sentence(paredown, tmp_path, command):
    said = paredown(command[0], tmp_path / "nowhere", *command[1:])
    assert said.code == 1
    assert said.out == ""
    assert said.err.startswith("error: ")
    assert said.err.count("\n") == 1
    assert "nowhere" in said.err


def test_methods_lists_and_shows(paredown):
    listed = paredown("methods")
    assert listed.code == 0
    entries = paredown("methods", "--json").json
    assert [entry["name"] for entry in entries]
    for entry in entries:
        assert entry["name"] in listed.out
    one = paredown("methods", "dern")
    assert "2509.10377" in one.out
    assert "alpha" in one.out
    assert paredown("methods", "dern", "--json").json["method"]["name"] == "dern"


@pytest.mark.usefixtures("untimed")
def test_eval_measures_both_models(paredown, checkpoint, texts, ran):
    out, _ = ran
    said = paredown("eval", out, "--against", checkpoint, "--data", texts)
    assert said.code == 0, said.err
    assert "perplexity" in said.out
    record = paredown("eval", out, "--against", checkpoint, "--data", texts, "--json").json
    assert {score["name"] for score in record["scores"]} >= {"perplexity", "KL to the original"}
    assert record["model"]["size"]["parameters"] < record["against"]["size"]["parameters"]


def test_probe_prints_a_row_a_layer_and_refuses_what_is_no_probe(paredown, checkpoint, texts):
    said = paredown("probe", checkpoint, "camera", "--data", texts)
    assert said.code == 0, said.err
    record = paredown("probe", checkpoint, "camera", "--data", texts, "--json").json
    assert len(said.out.splitlines()) == 1 + len(record["rows"])
    assert record["probe"] == "camera"
    assert record["data"]["tokens"] > 0
    wrong = paredown("probe", checkpoint, "dern", "--data", texts)
    assert wrong.code == 2
    assert wrong.err.startswith("error: dern is a compressor and not a probe")


def test_scan_measures_each_layer(paredown, checkpoint, texts):
    said = paredown("scan", checkpoint, "--data", texts)
    assert said.code == 0, said.err
    assert said.out
    assert paredown("scan", checkpoint, "--data", texts, "--json").json


def test_compare_holds_methods_against_random(paredown, checkpoint, texts, tmp_path):
    out = tmp_path / "compared"
    words = ("compare", checkpoint, "--methods", "dern,random", "--keep", "0.5", "--seeds", "2", "--data", texts)
    said = paredown(*words, "--set", "dern.alpha=0.5", "--metric", "kl", "--out", out)
    assert said.code == 0, said.err
    assert "dern" in said.out
    assert "random-experts" in said.out
    record = json.loads((out / "comparison.json").read_text())
    assert {row["method"] for row in record["rows"]} == {"dern", "random-experts"}
    assert (record["seeds"], record["metric"]) == ([0, 1], "kl")
    assert {cell["fields"].get("alpha") for cell in record["cells"]} == {0.5, None}
    assert "| dern" in (out / "comparison.md").read_text()
    assert "<svg" in (out / "comparison.svg").read_text()
    again = paredown(*words, "--set", "dern.alpha=0.5", "--metric", "kl", "--out", out, "--json")
    assert again.json["cells"] == record["cells"], "finished cells are taken from the journal, times included"
