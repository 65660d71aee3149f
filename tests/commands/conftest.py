"""A checkpoint and a text file as a user would have them, and the command line called as a user would."""

from __future__ import annotations

import json
import os
import random
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

from paredown.commands import main


@dataclass(frozen=True)
class Result:
    """What a call printed, and its exit code."""

    code: int
    out: str
    err: str

    @property
    def json(self) -> object:
        """The whole of standard output as one JSON document."""
        return json.loads(self.out)


Paredown = Callable[..., Result]


@pytest.fixture
def paredown(capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Paredown:
    """Call the command line in this process; file descriptors are captured, so libraries' noise would be seen too."""
    monkeypatch.setattr(os, "environ", os.environ.copy())

    def call(*words: object) -> Result:
        capfd.readouterr()
        code = main([str(word) for word in words])
        return Result(code, *capfd.readouterr())

    return call


@pytest.fixture(scope="session")
def texts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file of documents with some structure, enough for a few rows of tokens."""
    return write_texts(tmp_path_factory.mktemp("data") / "texts.jsonl")


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny random Qwen3-MoE checkpoint with a byte-level tokenizer."""
    return write_checkpoint(tmp_path_factory.mktemp("models") / "tiny-moe")


def write_texts(path: Path) -> Path:
    """Write documents that are drawn from a few phrases."""
    phrases = ("the river", "ran past", "old mills", "where bread", "was made", "by those", "who came in time")
    draw = random.Random(0)
    documents = [" ".join(draw.choice(phrases) for _ in range(30)) for _ in range(120)]
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in documents), encoding="utf-8")
    return path


def write_checkpoint(folder: Path) -> Path:
    """Write weights, config and tokenizer."""
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast, Qwen3MoeConfig, Qwen3MoeForCausalLM

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: i for i, token in enumerate(["<pad>", "<s>", "</s>", *alphabet])}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<s>", eos_token="</s>"
    ).save_pretrained(folder)
    config = Qwen3MoeConfig(
        vocab_size=len(vocabulary),
        hidden_size=32,
        intermediate_size=48,
        moe_intermediate_size=16,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        num_experts=8,
        num_experts_per_tok=2,
        norm_topk_prob=True,
        max_position_embeddings=64,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        Qwen3MoeForCausalLM(config).eval().save_pretrained(folder)
    return folder
