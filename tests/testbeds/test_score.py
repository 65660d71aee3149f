"""Perplexities and n-gram figures against hand calculation."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from paredown.testbeds import score


def test_ngrams_by_hand() -> None:
    stream = np.array([0, 1, 0, 1, 0, 2], dtype=np.uint16)
    grams = score.NGrams(stream, 3)
    np.testing.assert_allclose(grams.unigram, np.array([4, 3, 2]) / 9)
    tokens = np.array([0, 1, 0])
    assert grams.unigram_perplexity(tokens) == pytest.approx(math.sqrt(9 / 3 * 9 / 4))
    prior = score.PRIORS[0]  # the smallest one is best where the counts predict well
    first, second = (2 + prior / 3) / (3 + prior), (2 + prior * 4 / 9) / (2 + prior)
    assert grams.bigram_perplexity(tokens) == pytest.approx(1 / math.sqrt(first * second))


def test_a_bigram_is_no_worse_than_a_unigram_on_its_own_text() -> None:
    stream = np.random.default_rng(0).integers(0, 50, size=5000).astype(np.uint16)
    grams = score.NGrams(stream, 50)
    tokens = stream.astype(np.int64)
    assert grams.bigram_perplexity(tokens) <= grams.unigram_perplexity(tokens)


@pytest.mark.parametrize("length", [2, 17, 64, 65, 100])
def test_every_token_is_predicted_once(length: int) -> None:
    torch.manual_seed(0)
    size = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=50, **size)).eval()
    with torch.no_grad():
        model.lm_head.weight.zero_()  # uniform predictions: the perplexity is the vocabulary, however the text is cut
    tokens = np.random.default_rng(0).integers(0, 50, size=length)
    assert score.perplexity(model, tokens, context=16, batch_size=2) == pytest.approx(50.0, rel=1e-5)
