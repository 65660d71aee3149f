"""``paredown generate``: text as it comes, one line of facts, and what is refused."""

from __future__ import annotations

import re

import numpy as np
import pytest

PROMPT = ("--prompt", "the river ran past", "--max-new-tokens", "6")


def test_text_on_standard_output_and_facts_on_standard_error(paredown, checkpoint):
    done = paredown("generate", checkpoint, *PROMPT, "--policy", "streaming", "--keep", "0.5")
    assert done.code == 0, done.err
    assert done.out.endswith("\n")
    assert done.err.count("\n") == 1
    assert re.match(
        r"18 prompt tokens, first token after [\d.]+ m?s, \d new tokens? at [\d,.]+ tokens/s, "
        r"key-value cache [\d.,]+ \w+ at most, [\d.,]+ \w+ at the end, under streaming$",
        done.err.strip(),
    ), done.err


def test_json_holds_the_same_and_nothing_is_streamed(paredown, checkpoint, tmp_path):
    plain = paredown("generate", checkpoint, *PROMPT, "--json").json
    (tmp_path / "prompt.txt").write_text("the river ran past")
    words = ("--prompt-file", tmp_path / "prompt.txt", "--max-new-tokens", 6, "--json")
    half = paredown("generate", checkpoint, *words, "--policy", "streaming", "--set", "keep=0.5").json
    assert plain["prompt_tokens"] == half["prompt_tokens"] == 18
    assert plain["new_tokens"] == 6
    # Keys and values, 2 layers, 2 heads of 8, float32; the last token is not read.
    assert plain["cache_steady_bytes"] == plain["cache_peak_bytes"] == 2 * 2 * 2 * 8 * 4 * (18 + 5)
    assert half["cache_steady_bytes"] < plain["cache_steady_bytes"]
    assert half["policies"] == [{"method": "streaming", "fields": {"keep": 0.5, "sink": 4}}]
    inert = paredown("generate", checkpoint, *words, "--policy", "streaming", "--keep", "1").json
    assert inert["text"] == plain["text"]


def test_the_seed_fixes_what_is_drawn(paredown, checkpoint):
    words = ("generate", checkpoint, "--prompt", "the", "--max-new-tokens", 20, "--temperature", "1.5", "--json")
    first, again, other = (paredown(*words, "--seed", seed).json["text"] for seed in (1, 1, 2))
    assert first == again != other


def test_an_image_is_seen(paredown, tmp_path):
    from PIL import Image

    from paredown import testbeds
    from paredown.testbeds import mosaic

    made = mosaic.make(*testbeds.heldout_digits(), 1, np.random.default_rng(0))
    made.image(0).save(tmp_path / "mosaic.png")
    cell = int(np.flatnonzero(made.labels[0] != mosaic.EMPTY)[0])
    words = ("--image", tmp_path / "mosaic.png", "--prompt", mosaic.question(cell), "--max-new-tokens", 1, "--json")
    seen = paredown("generate", "testbed:vlm", *words).json
    assert seen["prompt_tokens"] > 144
    Image.new("RGB", (84, 84)).save(tmp_path / "mosaic.png")
    assert paredown("generate", "testbed:vlm", *words).json["text"] != seen["text"]


@pytest.mark.parametrize(
    ("words", "says", "code"),
    [
        ((), "say what to go on from", 2),
        ((*PROMPT, "--prompt-file", "x"), "given twice", 2),
        (("--prompt-file", "nowhere.txt"), "cannot be read", 1),
        (("--prompt", ""), "prompt is empty", 2),
        ((*PROMPT, "--keep", "0.5"), "name one with --policy", 2),
        ((*PROMPT, "--policy", "dern"), "not a policy", 2),
        ((*PROMPT, "--policy", "streaming", "--keep", "2"), "keep", 1),
        ((*PROMPT, "--image", "x.png"), "cannot see", 2),
        (("--prompt", "the", "--max-new-tokens", "500"), "more than the 64 positions", 2),
    ],
)
def test_what_cannot_be_is_one_sentence(paredown, checkpoint, words, says, code):
    done = paredown("generate", checkpoint, *words)
    assert done.code == code, done.err
    assert says in done.err
    assert done.out == ""
    assert done.err.startswith("error: ")
    assert done.err.count("\n") == 1


def test_no_tokenizer(paredown, checkpoint, tmp_path):
    import shutil

    shutil.copytree(checkpoint, tmp_path / "bare", ignore=shutil.ignore_patterns("tokenizer*", "special*"))
    assert "has no tokenizer" in paredown("generate", tmp_path / "bare", *PROMPT).err


def test_eval_and_compare_under_a_policy(paredown, checkpoint, texts, monkeypatch, tmp_path):
    monkeypatch.setattr("paredown.workflow.evaluate._costs", lambda *args, **kwargs: [None, None])
    words = ("eval", checkpoint, "--policy", "streaming", "--keep", "0.5", "--against", checkpoint, "--data", texts)
    found = paredown(*words, "--json")
    assert found.code == 0, found.err
    assert found.json["model"]["policies"][0]["method"] == "streaming"
    assert found.json["scores"][0]["difference"]["n"] > 1
    assert "second half alone" in paredown(*words).out
    words = ("compare", checkpoint, "--methods", "streaming", "--keep", "0.5", "--seeds", "2", "--data", texts)
    found = paredown(*words, "--task", "ppl", "--out", tmp_path / "out")
    assert found.code == 0, found.err
    assert "KV bytes" in found.out
    assert "streaming" in (tmp_path / "out" / "comparison.md").read_text()
    assert (tmp_path / "out" / "comparison.svg").read_text().startswith("<?xml")
    assert "none of recall, vqa, ppl" in paredown(*words, "--task", "sums").err
