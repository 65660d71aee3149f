"""Depth-wise batching: tokens at mixed loops of a recursive model."""

from __future__ import annotations

from collections.abc import Sequence
from copy import deepcopy
from typing import Any

import families
import pytest
import torch
import transformers as tf

from paredown.core.checkpoint import Model
from paredown.core.depth import sharing
from paredown.core.depth.depthwise import Token, depthwise
from paredown.core.edits import ShareBlock
from paredown.errors import ArchitectureError


def looped(family: str, loops: int, **how: Any) -> Model:
    """Return a model of six layers whose blocks are loops, with deltas that hold what each had before."""
    built = {"qwen3": (tf.Qwen3Config, tf.Qwen3ForCausalLM, {"head_dim": 8}),
             "llama": (tf.LlamaConfig, tf.LlamaForCausalLM, {"attention_bias": True, "mlp_bias": True}),
             "mistral": (tf.MistralConfig, tf.MistralForCausalLM, {"sliding_window": 4})}[family]  # fmt: skip
    config: Any = built[0](**{**families._GQA, "num_hidden_layers": 6}, **built[2])
    model = Model.of(families._seeded(lambda: built[1](config)))
    unique = 6 // loops
    sharing.share(model, [ShareBlock(layer=i, source=i % unique, rank=3, **how) for i in range(6)])
    return model


def rows(counts: Sequence[int]) -> list[torch.Tensor]:
    ids = torch.randint(3, 90, (len(counts), max(counts)), generator=torch.Generator().manual_seed(1))
    return [row[:n] for row, n in zip(ids, counts, strict=True)]


def _loops(batch: Sequence[Token]) -> list[int]:
    return [token.loop for token in batch]


@pytest.mark.parametrize("norms", [True, False])
@pytest.mark.parametrize(("family", "loops"), [("qwen3", 2), ("qwen3", 3), ("llama", 2), ("mistral", 6)])
def test_a_batch_of_tokens_at_mixed_loops_is_the_sequential_run(family: str, loops: int, norms: bool) -> None:
    model, texts = looped(family, loops, norms=norms), rows((9, 4, 7, 9, 5))
    ticks: list[list[int]] = []
    found = depthwise(model, [row.tolist() for row in texts], width=4, watch=lambda batch: ticks.append(_loops(batch)))
    for row, hidden in zip(texts, found, strict=True):
        with torch.no_grad():
            expected = model.hf.model(input_ids=row[None], use_cache=False).last_hidden_state[0]
        torch.testing.assert_close(hidden, expected, atol=1e-5, rtol=1e-5)
    assert any(len(set(told)) > 1 for told in ticks), "tokens at different loops shared a tick"
    assert max(map(len, ticks)) == 4
    assert sum(map(len, ticks)) == loops * sum(map(len, texts)), "each token passes the stack once for each loop"


def test_tokens_that_leave_make_room() -> None:
    model, texts = looped("qwen3", 3), rows((6, 6, 6))
    ticks: list[list[int]] = []
    found = depthwise(
        model,
        [row.tolist() for row in texts],
        width=2,
        leave=lambda token, hidden: token.position % 2 == 0,
        watch=lambda batch: ticks.append(_loops(batch)),
    )
    # Half of the tokens run one loop, the others three.
    assert sum(map(len, ticks)) == 9 * 1 + 9 * 3
    assert [len(hidden) for hidden in found] == [6, 6, 6]
    # The first token's state is that after one loop.
    short = deepcopy(model)
    short.hf.model.layers = short.hf.model.layers[:2]
    with torch.no_grad():
        expected = short.hf.model(input_ids=texts[0][None, :1], use_cache=False).last_hidden_state[0]
    torch.testing.assert_close(found[0][:1], expected, atol=1e-5, rtol=1e-5)


def test_a_model_without_loops_is_refused() -> None:
    with pytest.raises(ArchitectureError, match="no loops"):
        depthwise(Model.of(families.qwen3()), [[3, 4]], width=2)
