"""The shipped testbeds: plain transformers loads them, they are small, and they know what their cards say."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoProcessor,
    AutoTokenizer,
)

from paredown import testbeds
from paredown.errors import ModelNotFoundError
from paredown.testbeds import corpus, score, tasks

CLASSES = {
    "lm": "LlamaForCausalLM",
    "moe": "Qwen3MoeForCausalLM",
    "recall": "LlamaForCausalLM",
    "recall-moe": "MixtralForCausalLM",
    "vlm": "LlavaForConditionalGeneration",
}
BIGRAM = {"lm": 0.65, "moe": 0.65, "recall": 0.85, "recall-moe": 0.85}
"""Which share of a bigram model's perplexity each stays below."""
FILES = ("calibration.jsonl", "card.md", "config.json", "generation_config.json", "heldout.jsonl", "model.safetensors")
FILES += ("PROVENANCE.md", "scores.json", "tokenizer.json", "tokenizer_config.json", "training.json")


def _load(name: str):
    auto = AutoModelForImageTextToText if name == "vlm" else AutoModelForCausalLM
    return auto.from_pretrained(testbeds.path(name), dtype=torch.float32).eval()


def _scores(name: str) -> dict:
    return json.loads((testbeds.path(name) / "scores.json").read_text(encoding="utf-8"))


def test_importing_is_cheap() -> None:
    code = (
        "import sys, paredown.testbeds as t; t.path('moe'); sys.exit('torch' in sys.modules or 'numpy' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@pytest.mark.parametrize("name", ["nothing", "../moe", "", "testbed:moe"])
def test_an_unknown_name_is_refused_with_those_that_exist(name: str) -> None:
    with pytest.raises(ModelNotFoundError, match="lm, moe, recall, recall-moe, vlm"):
        testbeds.path(name)


@pytest.mark.parametrize("name", testbeds.NAMES)
def test_the_folder_is_complete_and_the_model_is_of_its_class(name: str) -> None:
    folder = testbeds.path(name)
    assert all((folder / file).is_file() for file in FILES)
    model = _load(name)
    assert type(model).__name__ == CLASSES[name]
    assert sum(parameter.numel() for parameter in model.parameters()) == _scores(name)["parameters"]
    assert all(torch.isfinite(parameter).all() for parameter in model.parameters())
    assert json.loads((folder / "config.json").read_text())["dtype"] == "bfloat16"
    assert not json.loads((folder / "config.json").read_text()).get("output_router_logits", False)


def test_all_files_together_stay_small() -> None:
    sizes = [
        file.stat().st_size for name in testbeds.NAMES for file in testbeds.path(name).rglob("*") if file.is_file()
    ]
    assert sum(sizes) < 40_000_000


@pytest.mark.parametrize("name", testbeds.NAMES)
def test_no_path_of_a_machine_is_shipped(name: str) -> None:
    for file in testbeds.path(name).iterdir():
        if file.suffix in {".json", ".md"}:
            text = file.read_text(encoding="utf-8")
            assert str(Path(__file__).resolve().parents[2]) not in text
            assert not re.search(r"(?<![\w.:/-])/(home|root|mnt|tmp|work|data)/", text)


@pytest.mark.parametrize("name", ["lm", "moe", *testbeds.RECALLING])
def test_samples_suffice_and_do_not_overlap(name: str) -> None:
    tokenizer = AutoTokenizer.from_pretrained(testbeds.path(name))
    assert len(corpus.encode(testbeds.calibration_texts(name), tokenizer)) > 128 * 128
    assert sum(map(len, testbeds.heldout_texts(name))) > 150_000
    assert not set(testbeds.calibration_texts(name)) & set(testbeds.heldout_texts(name))
    provenance = (testbeds.path(name) / "PROVENANCE.md").read_text(encoding="utf-8")
    for line in (testbeds.path(name) / "heldout.jsonl").read_text(encoding="utf-8").splitlines():
        assert json.loads(line)["source"] in provenance


@pytest.mark.parametrize(("name", "share_of_bigram"), list(BIGRAM.items()))
def test_prose_is_predicted_far_better_than_by_a_bigram(name: str, share_of_bigram: float) -> None:
    tokenizer = AutoTokenizer.from_pretrained(testbeds.path(name))
    known = _scores(name)
    tokens = corpus.encode(testbeds.heldout_texts(name)[::4], tokenizer).astype(np.int64)[:6000]
    measured = score.perplexity(_load(name), tokens)
    assert measured < share_of_bigram * known["bigram_perplexity"] < known["unigram_perplexity"]
    assert measured == pytest.approx(known["perplexity"], rel=0.25)


@pytest.mark.parametrize("name", testbeds.RECALLING)
@pytest.mark.parametrize("length", score.RECALL_LENGTHS)
def test_recall_finds_planted_facts(name: str, length: int) -> None:
    tokenizer = AutoTokenizer.from_pretrained(testbeds.path(name))
    hits = tasks.recall_accuracy(_load(name), tokenizer, testbeds.heldout_texts(name), length=length, count=40, seed=5)
    assert hits.shape == (40,)
    assert hits.mean() >= 0.85


def test_decoding_through_the_cache_gives_the_same_answers() -> None:
    tokenizer = AutoTokenizer.from_pretrained(testbeds.path("recall"))
    model, texts = _load("recall"), testbeds.heldout_texts("recall")
    both = [tasks.recall_accuracy(model, tokenizer, texts, length=256, count=10, generate=way) for way in (False, True)]
    np.testing.assert_array_equal(*both)


def test_a_recall_model_without_its_first_block_forgets() -> None:
    """The score must be one that compression can destroy."""
    tokenizer = AutoTokenizer.from_pretrained(testbeds.path("recall"))
    model = _load("recall")
    model.model.layers = model.model.layers[1:]
    for index, layer in enumerate(model.model.layers):
        layer.self_attn.layer_idx = index
    model.config.num_hidden_layers -= 1
    hits = tasks.recall_accuracy(model, tokenizer, testbeds.heldout_texts("recall"), length=256, count=20)
    assert hits.mean() < 0.3


def test_a_recall_model_without_experts_forgets() -> None:
    """It must lean on them: what they add is no decoration."""
    tokenizer = AutoTokenizer.from_pretrained(testbeds.path("recall-moe"))
    model = _load("recall-moe")
    with torch.no_grad():
        for layer in model.model.layers:
            layer.mlp.experts.down_proj.zero_()
    hits = tasks.recall_accuracy(model, tokenizer, testbeds.heldout_texts("recall-moe"), length=256, count=20)
    assert hits.mean() < 0.3


def test_vlm_reads_one_cell() -> None:
    folder, model = testbeds.path("vlm"), _load("vlm")
    digits, labels = testbeds.heldout_digits()
    assert digits.shape == (len(labels), 28, 28)
    assert len(labels) >= 300
    hits = tasks.mosaic_accuracy(model, AutoProcessor.from_pretrained(folder), digits, labels, count=60, seed=5)
    assert hits.mean() >= 0.8


def test_vlm_answers_through_generate_and_sees_the_image() -> None:
    folder, model = testbeds.path("vlm"), _load("vlm")
    processor = AutoProcessor.from_pretrained(folder)
    digits, labels = testbeds.heldout_digits()
    both = [tasks.mosaic_accuracy(model, processor, digits, labels, count=10, generate=way) for way in (False, True)]
    np.testing.assert_array_equal(*both)
    wrong = tasks.mosaic_accuracy(model, processor, np.zeros_like(digits), labels, count=20)
    assert wrong.mean() < 0.4


def test_vlm_has_a_cls_token_and_enough_visual_tokens() -> None:
    folder, model = testbeds.path("vlm"), _load("vlm")
    vision = model.config.vision_config
    assert (vision.image_size // vision.patch_size) ** 2 >= 144
    assert model.config.vision_feature_select_strategy == "default"
    images = AutoProcessor.from_pretrained(folder).image_processor(
        np.zeros((84, 84, 3), dtype=np.uint8), return_tensors="pt"
    )
    seen = model.model.vision_tower(images["pixel_values"], output_hidden_states=True)
    assert seen.hidden_states[-1].shape[1] == 145
    known = _scores("vlm")
    assert known["cls_presence_each_digit"] > known["cls_presence_constant_guess"] + 0.3


@pytest.mark.parametrize("name", ["calibration", "heldout"])
def test_vlm_samples_say_what_lies_in_each_cell(name: str) -> None:
    _, labels = testbeds.heldout_digits() if name == "heldout" else testbeds.calibration_digits()
    for line in (testbeds.path("vlm") / f"{name}.jsonl").read_text(encoding="utf-8").splitlines():
        record = json.loads(line)
        assert len(record["digits"]) == 9
        for cell, index in enumerate(record["digits"]):
            told = "none" if index < 0 else str(labels[index])
            assert f"row {cell // 3 + 1} column {cell % 3 + 1}? {told}\n" in record["text"]
        assert f"{record['question']} {record['answer']}\n" in record["text"]
