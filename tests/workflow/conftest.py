"""Checkpoint folders as a user would have them: tiny, random, with a tokenizer, next to a text file."""

from __future__ import annotations

import json
import random
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

# pytest's importlib mode knows no siblings: warm.py, tiny.py and plants.py lie here, the zoo beside the core's tests.
for _folder in (Path(__file__).parent, Path(__file__).parents[1] / "core"):
    if str(_folder) not in sys.path:
        sys.path.insert(0, str(_folder))

WORDS = [f"w{i}" for i in range(60)]
VOCABULARY = 64


def write_tokenizer(folder: Path, words: list[str] = WORDS) -> None:
    """Write a tokenizer in which each word is a token."""
    vocabulary = {word: i for i, word in enumerate(["<s>", "</s>", "<unk>", *words])}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    ).save_pretrained(folder)


def tiny_llama(seed: int = 0, layers: int = 4, positions: int = 64, vocabulary: int = VOCABULARY) -> LlamaForCausalLM:
    """Build a random Llama whose sub-layers matter: with the usual small weights all of them would be near identity."""
    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=positions,
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=None,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        hf = LlamaForCausalLM(config).eval()
        with torch.no_grad():
            for parameter in hf.parameters():
                if parameter.dim() > 1:
                    parameter.mul_(4.0)
    return hf


@pytest.fixture(scope="session")
def checkpoint_folder(tmp_path_factory) -> Callable[..., Path]:
    """Write a tiny Llama and return its folder; equal arguments share one."""
    made: dict[str, Path] = {}

    def write(*, words: list[str] = WORDS, tokenizer: bool = True, **options: int) -> Path:
        key = json.dumps([words, tokenizer, options], sort_keys=True)
        if key not in made:
            folder = tmp_path_factory.mktemp("model")
            tiny_llama(**options).save_pretrained(folder)
            if tokenizer:
                write_tokenizer(folder, words)
            made[key] = folder
        return made[key]

    return write


@pytest.fixture(scope="session")
def text_file(tmp_path_factory) -> Path:
    """Write 300 documents of 40 words."""
    rng = random.Random(0)
    path = tmp_path_factory.mktemp("text") / "stories.jsonl"
    lines = [json.dumps({"text": " ".join(rng.choices(WORDS, k=40))}) for _ in range(300)]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


@pytest.fixture(scope="session")
def warm() -> Iterator[object]:
    """A process that has imported everything and runs the command line in forks of itself."""
    from warm import Warm

    process = Warm()
    yield process
    process.close()


@pytest.fixture(scope="session")
def moe_folder(tmp_path_factory) -> Path:
    """A tiny random Qwen3-MoE with a dense layer between sparse ones, and a tokenizer. To be read only."""
    import families

    folder = tmp_path_factory.mktemp("moe") / "tiny-moe"
    families.qwen3_moe_mixed().save_pretrained(folder)
    write_tokenizer(folder)
    return folder
