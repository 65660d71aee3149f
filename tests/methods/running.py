"""What tests of policies do with a model: read tokens in passes, generate, pad."""

from __future__ import annotations

import functools
from typing import Any

import families
import torch
import transformers as tf
from torch import Tensor

from paredown import testbeds
from paredown.core import checkpoint
from paredown.core.attach import attach
from paredown.testbeds import tasks

FAMILIES = ("llama", "qwen3", "mistral", "gemma3", "mixtral", "qwen3_moe")
"""Families that every policy of the cache is tried on."""


def built(family: str) -> Any:
    """Return a model of the zoo; Mistral without its window, under which no cache grows."""
    if family == "mistral":
        return families._seeded(lambda: tf.MistralForCausalLM(tf.MistralConfig(**families._GQA, sliding_window=None)))
    return families.FAMILIES[family]()


def ids(batch: int = 2, length: int = 24, seed: int = 0) -> Tensor:
    """Return random tokens ``[batch, length]``, none of them special."""
    return torch.randint(3, families.VOCAB, (batch, length), generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def passes(hf: Any, tokens: Tensor, cuts: tuple[int, ...], mask: Tensor | None = None, cache: Any = None) -> Any:
    """Read ``tokens`` in passes that end at ``cuts``; return the logits of all tokens and the cache."""
    out, start = [], 0
    for stop in cuts:
        given = {}
        if mask is not None:
            where = (mask.cumsum(1) - 1).clamp_min(0)[:, start:stop]
            given = {"attention_mask": mask[:, :stop], "position_ids": where}
        told = hf(input_ids=tokens[:, start:stop], past_key_values=cache, use_cache=True, **given)
        cache, start = told.past_key_values, stop
        out.append(told.logits)
    return torch.cat(out, 1), cache


def generate(hf: Any, tokens: Tensor, **more: Any) -> Tensor:
    """Generate 8 tokens greedily, unless told otherwise."""
    told = {"max_new_tokens": 8, "do_sample": False, "eos_token_id": None, "pad_token_id": 0, **more}
    with torch.no_grad():
        out: Tensor = hf.generate(tokens, **told)
    return out


def padded(tokens: Tensor, counts: tuple[int, ...]) -> Tensor:
    """Return a mask under which row ``i`` is its last ``counts[i]`` tokens."""
    mask = torch.zeros_like(tokens)
    for row, count in enumerate(counts):
        mask[row, tokens.shape[1] - count :] = 1
    return mask


def steps(length: int, prompt: int) -> tuple[int, ...]:
    """Return the ends of passes: the prompt at once, then token by token."""
    return (prompt, *range(prompt + 1, length + 1))


def check_family(family: str, policy: Any) -> None:
    """Generate under ``policy``: a padded batch is its rows alone, beams follow their rows, chunks and turns run."""
    hf = built(family)
    tokens = ids(2, 24)
    mask = padded(tokens, (24, 17))
    with policy.attach(hf):
        whole, _ = passes(hf, tokens, steps(24, 16), mask)
        for row, count in enumerate((24, 17)):
            alone, _ = passes(hf, tokens[row : row + 1, -count:], steps(count, count - 8))
            torch.testing.assert_close(whole[row, -count:], alone[0], atol=3e-5, rtol=1e-3)
        out = generate(hf, tokens, attention_mask=mask)
        single = generate(hf, tokens[1:, -17:])
        assert torch.equal(out[1, 24:], single[0, 17:])
        beams = generate(hf, tokens, attention_mask=mask, num_beams=3)
        single = generate(hf, tokens[1:, -17:], num_beams=3)
        assert torch.equal(beams[1, 24:], single[0, 17:])
        assert generate(hf, tokens, prefill_chunk_size=7).shape == (2, 32)
        # A second turn on a kept cache.
        _, cache = passes(hf, tokens, (20, 21, 22))
        logits, cache = passes(hf, tokens, (10, 11), cache=cache)
        assert cache.get_seq_length() == 33
        assert torch.isfinite(logits).all()


@functools.cache
def recalls(count: int) -> tuple[Any, tuple[tuple[Tensor, int], ...]]:
    """Return the testbed and rows ``[1, T]`` of text, question and answer, with the text's length."""
    model = checkpoint.load("testbed:recall", dtype="float32")
    rows = []
    for item in tasks.recall_items(model.tokenizer, testbeds.heldout_texts("recall"), length=512, count=count):
        question = model.tokenizer.encode("\n" + item.question, add_special_tokens=False)
        rows.append((torch.tensor([item.prompt + item.answer]), len(item.prompt) - len(question)))
    return model, tuple(rows)


def replayed(count: int, *policies: Any) -> tuple[Tensor, float]:
    """Read each text at once, question and answer token by token; return logits of the latter and the share of hits."""
    model, rows = recalls(count)
    out, hits = [], 0
    with attach(model, *policies):
        for tokens, length in rows:
            logits, _ = passes(model.hf, tokens, steps(tokens.shape[1], length))
            told = logits[0, length:]
            answer = tokens[0, 512:]
            hits += int(torch.equal(told[-len(answer) - 1 : -1].argmax(-1), answer))
            out.append(told)
    return torch.cat(out), hits / count
