"""Recipes that end in policies: what the plan says, what the folder holds, what is judged and what is proven."""

from __future__ import annotations

import json

import pytest
import torch
import yaml
from tiny import last_sentence, result, sentence, write_recipe

import paredown
from paredown.core import files, policy_file
from paredown.errors import PolicyError, RecipeError
from paredown.methods.cache.streaming import Streaming
from paredown.workflow import plan as planning
from paredown.workflow import recipe as recipes
from paredown.workflow.record import read_record

STREAMING = {"method": "streaming", "keep": 0.5, "sink": 2}
HALF = {"method": "random-experts", "keep": 0.5}


@pytest.fixture(scope="module")
def ran(warm, moe_folder, text_file, tmp_path_factory):
    """Run steps once; returns folder and what was said. To be read only."""
    known = {}

    def run(*steps, **more):
        key = json.dumps([steps, more], sort_keys=True)
        if key not in known:
            place = tmp_path_factory.mktemp("run")
            recipe = write_recipe(place / "recipe.yaml", moe_folder, text_file, *steps, **more)
            ended = warm.run("run", recipe, "--out", place / "out")
            assert ended.code == 0, ended.err
            assert sorted(path.name for path in place.iterdir()) == ["out", "recipe.yaml"]
            known[key] = place / "out", ended
        return known[key]

    return run


def recipe_of(model, data, *steps):
    return recipes.check({"model": str(model), "data": {"calibration": str(data), "length": 32}, "steps": list(steps)})


def test_policies_come_last(moe_folder, text_file):
    with pytest.raises(RecipeError, match="put policies last"):
        planning.plan(recipe_of(moe_folder, text_file, STREAMING, HALF), rehearse=False)


def test_two_on_one_place_are_told_by_the_plan(moe_folder, text_file, monkeypatch):
    with pytest.raises(RecipeError, match="name each once"):
        planning.plan(recipe_of(moe_folder, text_file, STREAMING, STREAMING), rehearse=False)
    other = type("Other", (Streaming,), {"name": "other"})
    both = lambda self: [Streaming(keep=0.5), other(keep=0.5)]  # noqa: E731
    monkeypatch.setattr(recipes.Recipe, "methods", both)
    with pytest.raises(PolicyError, match="cannot run together"):
        planning.plan(recipe_of(moe_folder, text_file, STREAMING), rehearse=False)


def test_the_plan_says_what_a_policy_does_not(moe_folder, text_file):
    [alone] = planning.plan(recipe_of(moe_folder, text_file, STREAMING), rehearse=False)
    assert alone.bytes_before == alone.bytes_after
    assert "copied as it is" in " ".join(alone.notes)
    assert "cached tokens" in alone.notes[0]
    weights, acting = planning.plan(recipe_of(moe_folder, text_file, HALF, STREAMING), rehearse=False)
    assert acting.bytes_before == acting.bytes_after == weights.bytes_after < weights.bytes_before
    assert "copied" not in " ".join(acting.notes)


def test_a_recipe_of_policies_alone_copies_the_checkpoint(ran, moe_folder):
    out, said = ran(STREAMING)
    assert files.fingerprint(out) == files.fingerprint(moe_folder)
    raw = yaml.safe_load((out / "policy.yaml").read_text())
    assert raw == {
        "format": 1,
        "policies": [{"method": "streaming", "fields": {"keep": 0.5, "sink": 2}, "files": {}}],
    }
    found = read_record(out)
    [step] = found.steps
    assert (step.kind, step.changes, step.touched_share) == ("policy", [], 0.0)
    assert found.proof.max_abs_logit_difference == 0.0
    assert found.proof.generated
    assert any("byte for byte" in check for check in found.proof.checks)
    assert any("attached streaming" in check for check in found.proof.checks)
    assert "no weight is changed" in said.out
    card, html = (out / "README.md").read_text(), (out / "paredown" / "report.html").read_text()
    assert "streaming acts on it while it runs" in card
    assert "paredown.load" in card
    assert "library_name: paredown" in card
    assert "Paredown changed no weight." in html
    assert "acts while the model runs" in html


def test_the_gate_judges_the_policy_at_work(ran, moe_folder, text_file):
    out, _ = ran(STREAMING)
    text, divergence = read_record(out).scores
    assert text.before.mean != text.after.mean
    assert divergence.after.mean > 0


def test_loaded_again_it_runs_under_its_policies(ran):
    out, _ = ran(STREAMING)
    model = paredown.load(out)
    assert model.policies == (Streaming(keep=0.5, sink=2),)
    with torch.no_grad():
        cache = model.hf(torch.arange(2, 22)[None], use_cache=True).past_key_values
    assert cache.layers[0].stores[0].entries.length == 10
    assert paredown.load(out, policies=False).policies == ()


def test_behind_a_compressor(ran):
    out, _ = ran(HALF, STREAMING)
    found = read_record(out)
    assert [step.kind for step in found.steps] == ["compressor", "policy"]
    assert [step.index for step in found.steps] == [1, 2]
    assert found.size_after.bytes_weights == found.steps[0].plan.bytes_after < found.size_before.bytes_weights
    assert found.proof.passed
    assert any("plain transformers" in check for check in found.proof.checks)
    assert any("attached streaming" in check for check in found.proof.checks)
    assert sorted(p.name for p in (out / "paredown").glob("step-*.json")) == ["step-1.json", "step-2.json"]
    assert "random-experts" in (out / "README.md").read_text()


def test_a_failed_gate_is_mended_by_resuming(warm, moe_folder, text_file, tmp_path):
    recipe = write_recipe(tmp_path / "recipe.yaml", moe_folder, text_file, {**STREAMING, "keep": 0.1}, gate="kl:1e-9")
    stopped = warm.run("run", recipe, "--out", tmp_path / "out")
    assert stopped.code == 3
    assert not (tmp_path / "out").exists()
    ended = warm.run("run", recipe, "--out", tmp_path / "out", "--resume", "--gate", "none")
    assert ended.code == 0, ended.err
    assert not (tmp_path / "out.partial").exists()


@pytest.mark.parametrize("share", [0.3, 0.6, 0.9])
def test_killed_and_resumed_gives_the_same(warm, ran, moe_folder, text_file, tmp_path, share):
    out, _ = ran(HALF, STREAMING)
    recipe = write_recipe(tmp_path / "recipe.yaml", moe_folder, text_file, HALF, STREAMING)
    whole = warm.run("run", recipe, "--out", tmp_path / "out", under=tmp_path)
    killed = warm.run("run", recipe, "--out", tmp_path / "again", under=tmp_path, die_at=int(share * whole.changes))
    assert killed.code == -9
    ended = warm.run("run", recipe, "--out", tmp_path / "again", "--resume")
    assert ended.code == 0, ended.err
    ours, theirs = result(tmp_path / "again"), result(out)
    for name in ("paredown/run.json", "paredown/identity.json"):  # hold the output's name
        ours.pop(name), theirs.pop(name)
    assert ours == theirs


def test_a_spoilt_result_gets_no_name(warm, moe_folder, text_file, tmp_path):
    recipe = write_recipe(tmp_path / "recipe.yaml", moe_folder, text_file, STREAMING)
    ended = warm.run("run", recipe, "--out", tmp_path / "out", plant="plants:other_policy")
    assert "under its policies its logits differ" in last_sentence(ended, 4)
    assert [path.name for path in tmp_path.iterdir()] == ["recipe.yaml"]


def test_what_cannot_be_is_told_in_one_sentence(warm, moe_folder, text_file, tmp_path):
    recipe = write_recipe(tmp_path / "recipe.yaml", moe_folder, text_file, STREAMING, HALF)
    assert "put policies last" in sentence(warm.run("run", recipe, "--out", tmp_path / "out"))
    assert [path.name for path in tmp_path.iterdir()] == ["recipe.yaml"]


def test_evaluate_and_generate_use_them(ran, text_file, moe_folder):
    out, _ = ran(STREAMING)
    from paredown.workflow.evaluate import evaluate
    from paredown.workflow.generate import generate

    found = evaluate(out, moe_folder, text_file, length=32, sequences=4, cost=False, device="cpu")
    assert found.model.policies[0]["method"] == "streaming"
    assert found.scores[1].after.mean > 0
    made = generate(out, "w1 w2 w3 w4 w5 w6 w7 w8", max_new_tokens=4, device="cpu")
    plain = generate(moe_folder, "w1 w2 w3 w4 w5 w6 w7 w8", max_new_tokens=4, device="cpu")
    assert made.policies[0]["method"] == "streaming"
    assert plain.policies == []
    assert made.prompt_tokens == plain.prompt_tokens == 8
    assert made.cache_steady_bytes < 0.7 * plain.cache_steady_bytes
    with pytest.raises(PolicyError, match="cannot run together"):
        generate(out, "w1 w2", [Streaming(keep=0.5)], max_new_tokens=4, device="cpu")
    assert policy_file.read(out)[0].sink == 2


def test_policies_that_the_model_brings_are_left_out_and_that_is_said(ran, text_file):
    out, _ = ran(STREAMING)
    first, _ = planning.plan(recipe_of(out, text_file, HALF, {**STREAMING, "keep": 0.75}), rehearse=False)
    assert "The policies that the model brings (streaming) are left out" in first.notes[-1]


def test_the_first_model_of_a_recipe_teaches_what_its_last_step_learns(ran):
    out, _ = ran(HALF, {"method": "rmoe", "steps": 2, "width": 8, "balance": 0.0})
    [policy] = policy_file.read(out)
    told = dict(policy.measured)
    # KL to the original alone: a next-token loss of this model would be several nats.
    assert 0 < told["loss at first"] < 1
    assert (out / "policies" / "1-weights.safetensors").is_file()
    assert read_record(out).proof.max_abs_logit_difference == 0.0
