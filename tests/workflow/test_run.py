"""What a run leaves behind when all goes well."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys

import families
import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import result, write_recipe

import paredown
from paredown.core import files
from paredown.workflow.record import RunRecord

HALF = {"method": "random-experts", "keep": 0.5}
DERN = {"method": "dern", "keep": 0.5, "alpha": -1.0}
DROP = {"method": "llm-drop", "keep": 0.75, "part": "attention"}


@pytest.fixture(scope="module")
def ran(warm, moe_folder, text_file, tmp_path_factory):
    """Run steps once; returns folder and what was said. To be read only."""
    known = {}

    def run(*steps, model=moe_folder, name="smaller", **more):
        key = json.dumps([steps, str(model), name, more], sort_keys=True, default=str)
        if key not in known:
            place = tmp_path_factory.mktemp("run")
            recipe = write_recipe(place / "recipe.yaml", model, text_file, *steps, **more)
            ended = warm.run("run", recipe, "--out", place / name)
            assert ended.code == 0, ended.err
            assert sorted(path.name for path in place.iterdir()) == ["recipe.yaml", name]
            known[key] = place / name, ended
        return known[key]

    return run


def record(out) -> RunRecord:
    return RunRecord.model_validate_json((out / "paredown" / "run.json").read_text())


def test_the_record_says_what_was_done(ran, moe_folder, text_file):
    out, _ = ran(HALF, gate="kl:50")
    found = record(out)
    (step,) = found.steps
    assert found.model == str(moe_folder)
    assert (step.method, step.keep, step.index, step.seed) == ("random-experts", 0.5, 1, 0)
    # The dense layer is no place to remove experts from.
    assert [(c.layer, c.before, c.after) for c in step.changes] == [(0, 8, 4), (2, 8, 4), (3, 8, 4)]
    assert all(len(set(c.kept)) == 4 and c.kept == sorted(c.kept) for c in step.changes)
    assert (step.plan.exact, step.plan.uniform, found.uniform) == (True, True, True)
    before, after = load_file(moe_folder / files.SINGLE), load_file(out / files.SINGLE)
    assert found.size_before.parameters == sum(t.numel() for t in before.values()) == step.plan.parameters_before
    assert found.size_after.parameters == sum(t.numel() for t in after.values()) == step.plan.parameters_after
    assert found.size_after.bytes_weights == step.plan.bytes_after
    assert found.size_after.bytes_disk == (out / files.SINGLE).stat().st_size
    assert found.gate.kind == "kl"
    assert found.gate.passed
    assert 0 < found.gate.value < 50
    assert {score.name for score in found.scores} >= {"perplexity", "KL to the original"}
    assert found.proof.passed
    assert found.proof.max_abs_logit_difference == 0.0
    assert found.proof.generated
    assert found.proof.bytes_match_plan
    assert found.recipe["steps"] == [HALF]
    assert found.recipe["data"]["calibration"] == str(text_file)
    assert found.versions["torch"] == torch.__version__
    assert found.resumed == 0
    assert found.seconds > 0


def test_touched_share_counts_what_surgery_changed(ran, moe_folder):
    out, _ = ran(HALF, gate="kl:50")
    sizes = {name: info.numel for name, info in files.headers(moe_folder).items()}
    # Experts and routers of three layers are cut; nothing else is.
    touched = sum(n for name, n in sizes.items() if ".experts." in name or name.endswith("mlp.gate.weight"))
    assert record(out).steps[0].touched_share == pytest.approx(touched / sum(sizes.values()))
    # llm-drop with one of four attentions: all that went was touched, and no more.
    out, _ = ran(DROP)
    gone = set(sizes) - set(files.headers(out))
    assert record(out).steps[0].touched_share == pytest.approx(sum(sizes[n] for n in gone) / sum(sizes.values()))


def test_what_was_not_to_be_touched_is_bit_identical(ran, moe_folder):
    out, _ = ran(HALF, gate="kl:50")
    before, after = load_file(moe_folder / files.SINGLE), load_file(out / files.SINGLE)
    kept = {change.layer: change.kept for change in record(out).steps[0].changes}
    for name, tensor in after.items():
        parts = name.split(".")
        if name.endswith("mlp.gate.weight"):
            assert torch.equal(tensor, before[name][kept[int(parts[2])]])
        elif ".experts." in name:
            parts[5] = str(kept[int(parts[2])][int(parts[5])])
            assert torch.equal(tensor, before[".".join(parts)])
        else:
            assert torch.equal(tensor, before[name])


def test_the_same_recipe_gives_the_same_bytes_and_another_seed_others(ran):
    first, _ = ran(DERN)
    second, _ = ran(DERN, gate="ppl:9999")
    weights = [path for path in result(first) if not path.startswith(("paredown", "README"))]
    assert "model.safetensors" in weights
    assert all((first / path).read_bytes() == (second / path).read_bytes() for path in weights)
    chance, _ = ran(HALF, gate="kl:50")
    other, _ = ran(HALF, seed=1)
    assert (chance / files.SINGLE).read_bytes() != (other / files.SINGLE).read_bytes()


def test_two_steps(ran):
    out, said = ran(DERN, DROP)
    found = record(out)
    assert [step.method for step in found.steps] == ["dern", "llm-drop"]
    assert found.steps[1].parameters_before == found.steps[0].parameters_after
    assert not found.uniform
    assert "paredown.load" in found.how_to_load
    assert "plan, step 2" in said.err
    assert {path.name for path in (out / "paredown").iterdir()} >= {"step-1.json", "step-2.json", "report.html"}
    model = paredown.load(out)
    assert [block.experts.count for block in model.anatomy.language.blocks if block.experts] == [4, 4, 4]
    assert sum(block.attention is None for block in model.anatomy.language.blocks) == 1
    assert model.parameters() == found.size_after.parameters
    ids = torch.arange(3, 23).view(1, -1)
    with torch.no_grad():
        assert torch.isfinite(model.hf(ids).logits).all()


@pytest.mark.slow
def test_a_uniform_result_opens_in_plain_transformers_without_paredown(ran, tmp_path):
    out, _ = ran(HALF, gate="kl:50")
    code = (
        "import sys, torch\nfrom transformers import AutoModelForCausalLM, AutoTokenizer\n"
        "from safetensors.torch import save_file\n"
        "class Refuse:\n"
        "    def find_spec(self, name, *_):\n"
        "        assert name.split('.')[0] != 'paredown', 'paredown was imported'\n"
        "sys.meta_path.insert(0, Refuse())\n"
        "hf = AutoModelForCausalLM.from_pretrained(sys.argv[1]).eval()\n"
        "ids = AutoTokenizer.from_pretrained(sys.argv[1])('w1 w5 w9 w2 w2', return_tensors='pt').input_ids\n"
        "with torch.no_grad(): save_file({'ids': ids, 'logits': hf(ids).logits}, sys.argv[2])\n"
        "assert 'paredown' not in sys.modules\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(out), str(tmp_path / "logits")], capture_output=True, text=True, check=False,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    theirs = load_file(tmp_path / "logits")
    with torch.no_grad():
        assert torch.equal(paredown.load(out).hf(theirs["ids"]).logits, theirs["logits"])


def test_data_from_the_command_line(warm, moe_folder, text_file, tmp_path):
    words = ("--method", "dern", "--keep", "0.5", "--gate", "none", "--data", text_file)
    ended = warm.run("run", moe_folder, *words, "--out", tmp_path / "smaller")
    assert ended.code == 0, ended.err
    data = record(tmp_path / "smaller").steps[0].data
    assert data["name"] == text_file.name
    assert data["tokens"] == data["sequences"] * data["length"] > 0


def test_a_hub_id_from_the_local_cache(moe_folder, text_file, tmp_path, monkeypatch):
    from warm import Warm

    cached = tmp_path / "hf" / "hub" / "models--some-org--some-model"
    shutil.copytree(moe_folder, cached / "snapshots" / ("0" * 40))
    (cached / "refs").mkdir()
    (cached / "refs" / "main").write_text("0" * 40)
    # The hub library reads these once, when it is imported.
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    monkeypatch.delenv("HF_HUB_CACHE", raising=False)
    monkeypatch.chdir(tmp_path)
    process = Warm()
    try:
        recipe = write_recipe(tmp_path / "recipe.yaml", "some-org/some-model", text_file, HALF)
        ended = process.run("run", recipe, "--out", tmp_path / "smaller")
        assert ended.code == 0, ended.err
        assert record(tmp_path / "smaller").model == "some-org/some-model"
        missing = process.run("run", "some-org/other", "--method", "dern", "--keep", "0.5", "--out", tmp_path / "x")
        assert missing.code == 1
        assert missing.err.count("\n") == 1
        assert "the hub did not give a model of that name" in missing.err
    finally:
        process.close()


def test_tied_embeddings_stay_tied(ran, moe_folder, tmp_path_factory):
    model = tmp_path_factory.mktemp("tied") / "model"
    families.llama().save_pretrained(model)
    files.copy_extras(moe_folder, model)
    out, _ = ran({"method": "llm-drop-blocks", "keep": 0.5}, model=model)
    assert "lm_head.weight" not in files.headers(out)
    assert json.loads((out / "config.json").read_text())["tie_word_embeddings"] is True
    hf = paredown.load(out).hf
    assert hf.lm_head.weight is hf.model.embed_tokens.weight
    assert len(hf.model.layers) == 2


def test_tensors_that_the_architecture_does_not_know_are_told_and_left_out(ran, moe_folder, tmp_path_factory):
    model = tmp_path_factory.mktemp("more") / "model"
    shutil.copytree(moe_folder, model)
    more = {**load_file(model / files.SINGLE), "mtp.layers.0.weight": torch.ones(3), "mtp.norm": torch.ones(2)}
    save_file(more, model / files.SINGLE, metadata={"format": "pt"})
    out, said = ran(HALF, model=model)
    note = "2 tensors are not part of the architecture and will be left out."
    assert note in record(out).steps[0].plan.notes
    assert note.rstrip(".") in said.err
    assert not any(name.startswith("mtp") for name in files.headers(out))


def test_the_generation_config_is_kept_byte_for_byte(ran, moe_folder, tmp_path_factory):
    # save_pretrained would refuse this one, which is like those of many well-known models.
    model = tmp_path_factory.mktemp("generation") / "model"
    shutil.copytree(moe_folder, model)
    (model / "generation_config.json").write_text('{"do_sample": false, "temperature": 0.6, "eos_token_id": 2}')
    out, _ = ran(HALF, model=model)
    assert (out / "generation_config.json").read_bytes() == (model / "generation_config.json").read_bytes()
