"""Faults planted into the product itself: each is caught by audit, gate or proof, and no folder appears."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import last_sentence, write_recipe

from paredown.errors import GateError, NothingTouchedError, ProofError

RANDOM = {"method": "random-experts", "keep": 0.5}


@pytest.fixture
def recipe(moe_folder, text_file, tmp_path_factory):
    return write_recipe(tmp_path_factory.mktemp("recipe") / "recipe.yaml", moe_folder, text_file, RANDOM)


def caught(warm, recipe, place, plant, code, *words):
    """Return the sentence of a run that must fail, having seen that it leaves nothing."""
    ended = warm.run("run", recipe, "--out", place / "smaller", *words, plant=f"plants:{plant}")
    said = last_sentence(ended, code)
    left = [path.name for path in place.iterdir()]
    assert left == (["smaller.partial"] if code == GateError.exit_code else [])
    return said


def test_without_a_fault_the_run_passes(warm, recipe, tmp_path):
    ended = warm.run("run", recipe, "--out", tmp_path / "smaller")
    assert ended.code == 0, ended.err
    assert [path.name for path in tmp_path.iterdir()] == ["smaller"]


def test_experts_skipped(warm, recipe, tmp_path):
    said = caught(warm, recipe, tmp_path, "experts_skipped", ProofError.exit_code)
    assert "surgery left layer 0 with other units than keep_experts names" in said


def test_experts_skipped_and_nobody_audits(warm, recipe, tmp_path):
    said = caught(warm, recipe, tmp_path, "experts_skipped_unaudited", NothingTouchedError.exit_code)
    assert "left every weight as it was" in said


def test_router_rows_permuted(warm, recipe, tmp_path):
    said = caught(warm, recipe, tmp_path, "router_permuted", ProofError.exit_code)
    assert "surgery left layer 0 with other units than keep_experts names" in said


@pytest.fixture(scope="module")
def sharp(moe_folder, tmp_path_factory):
    """A model in which it matters much which expert a token goes to."""
    folder = tmp_path_factory.mktemp("sharp") / "model"
    folder.mkdir()
    for file in moe_folder.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    weights = load_file(folder / "model.safetensors")
    for name, tensor in weights.items():
        if name.endswith("mlp.gate.weight"):
            tensor *= 8
        elif ".experts." in name:
            tensor *= 3
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def test_router_rows_permuted_and_nobody_audits_so_the_gate_stops(warm, sharp, text_file, tmp_path):
    # DERN at a high keep drops what the router hardly uses: an honest run loses little, a permuted router a lot.
    step = {"method": "dern", "keep": 0.875, "alpha": 2.0}
    recipe = write_recipe(tmp_path / "recipe.yaml", sharp, text_file, step, gate="kl:100")
    place = tmp_path / "place"
    place.mkdir()
    honest = warm.run("run", recipe, "--out", place / "smaller")
    assert honest.code == 0, honest.err
    loss = json.loads((place / "smaller" / "paredown" / "run.json").read_text())["gate"]["value"]
    assert loss > 0
    other = tmp_path / "other"
    other.mkdir()
    said = caught(warm, recipe, other, "router_permuted_unaudited", GateError.exit_code, "--gate", f"kl:{2 * loss}")
    assert "stopped by the gate" in said
    assert "nothing was written" in said


@pytest.mark.parametrize(
    ("plant", "said"),
    [
        ("norm_dropped", "does not open again (1 weights that config.json"),
        ("norm_perturbed", "its logits differ by up to"),
        ("norm_not_finite", "some weights are not finite numbers"),
        ("tensor_left_over", "model.layers.9.extra"),
        ("tensor_halved", "bytes of weights where the plan said"),
        ("bytes_misplanned", "bytes of weights where the plan said"),
        ("config_left_behind", "has the shape"),
    ],
)
def test_a_result_that_is_not_the_model_in_memory(warm, recipe, tmp_path, plant, said):
    sentence = caught(warm, recipe, tmp_path, plant, ProofError.exit_code)
    assert said in sentence
    assert sentence.endswith("it was not given its final name.")


def test_plants_bear_on_weights_that_matter(moe_folder):
    # If the norm that the plants spoil were a bystander, these tests would pass by accident.
    from plants import NORM
    from transformers import AutoModelForCausalLM

    hf = AutoModelForCausalLM.from_pretrained(moe_folder)
    ids = torch.arange(10).view(1, -1)
    with torch.no_grad():
        before = hf(ids).logits
        hf.get_parameter(NORM).add_(0.5)
        assert not torch.allclose(hf(ids).logits, before, atol=1e-2)
