"""DELTA: every check of its card."""

from __future__ import annotations

from typing import Any

import families
import pytest
import torch
from torch import Tensor

import paredown
from paredown.core.attach import attach, attach_runtimes, wrap
from paredown.core.attention import compute, visible
from paredown.core.runtime import Runtime
from paredown.errors import ArchitectureError, PolicyError
from paredown.methods.cache import delta as module
from paredown.methods.cache.delta import DELTA, chosen_pages, default_full, roles
from paredown.testbeds import heldout_texts
from paredown.testbeds.tasks import recall_items

FAMILIES = ("llama", "qwen3", "gemma3", "qwen3_moe")
LENGTH, PAGE = 27, 4


def tokens(batch: int = 1, length: int = LENGTH, seed: int = 0) -> Tensor:
    return torch.randint(3, families.VOCAB, (batch, length), generator=torch.Generator().manual_seed(seed))


def generated(hf: Any, ids: Tensor, steps: int = 6, **options: Any) -> Any:
    with torch.no_grad():
        return hf.generate(
            input_ids=ids,
            max_new_tokens=steps,
            do_sample=False,
            eos_token_id=None,
            pad_token_id=0,
            return_dict_in_generate=True,
            output_logits=True,
            **options,
        )


def same(one: Any, other: Any) -> None:
    for a, b in zip(one.logits, other.logits, strict=True):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("family", FAMILIES)
def test_enough_pages_or_full_layers_alone_change_nothing(family):
    """Card: budget >= number of pages: outputs identical at every step; all layers listed as full: identical always."""
    hf, ids = families.FAMILIES[family](), tokens()
    expected = generated(hf, ids)
    with attach(hf, DELTA(page=PAGE, budget=9, recent=2)) as it:
        same(generated(hf, ids), expected)
        assert it.runtimes[0].read == it.runtimes[0].whole > 0
    every = tuple(module._growing(wrap(hf)))
    with attach(hf, DELTA(page=PAGE, budget=2, recent=1, full=every)):
        same(generated(hf, ids), expected)


class _Masked(Runtime):
    """DELTA's sparse layers, done densely: a mask hides the pages that ``inner`` did not choose."""

    def __init__(self, policy: DELTA, model: Any) -> None:
        super().__init__(policy, model)
        self.inner = policy.runtime(model)
        self.seen: list[list[int]] = []

    def touches(self, layer: int, window: int | None) -> bool:
        return self.inner.touches(layer, window)

    def attend(self, call: Any) -> Tensor | None:
        plan = call.now.memo.get("delta")
        if self.inner.roles[call.layer] != "sparse" or plan is None:
            return self.inner.attend(call)
        store = call.cached.parts[0][1]
        store.extend(call)
        held = store.entries
        mask = torch.zeros(call.now.batch, held.length, dtype=torch.bool)
        for row, index in zip(mask, plan.index, strict=True):
            row[index[index >= 0]] = True
        self.seen.append(plan.index[-1].tolist())
        dense = visible(call, held.positions, held.length).mask
        assert dense is None or dense.dtype == torch.bool
        hidden = mask[:, None, None] if dense is None else mask[:, None, None] & dense
        return compute(call, held.keys, held.values, module.Visible(hidden))


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("padded", [False, True])
def test_chosen_pages_are_dense_attention_under_a_mask(family, padded):
    """Card: sparse attention on the chosen pages equals dense attention with a mask, partial last page included."""
    hf, ids = families.FAMILIES[family](), tokens(batch=2)
    mask = torch.ones_like(ids)
    mask[1, : 7 if padded else 0] = 0
    policy = DELTA(page=PAGE, budget=4, recent=2)
    with attach(hf, policy):
        found = generated(hf, ids, attention_mask=mask)
    masked = _Masked(policy, wrap(hf))
    with attach_runtimes(wrap(hf), [masked]):
        same(generated(hf, ids, attention_mask=mask), found)
    first = 7 if padded else 0
    for step in masked.seen:
        real = [p for p in step if p >= 0]
        assert real == sorted(real)
        assert len({(p - first) // PAGE for p in real}) == 4
        assert min(real) >= first


def test_pages_are_chosen_exactly():
    """Card: exactly min(budget, pages), the last L always, ascending, deterministic; ERRATA 2, 3."""
    scores = torch.rand(3, 10, generator=torch.Generator().manual_seed(0)) * 5
    scores[1, 2] = torch.nan
    pages, budgets = torch.tensor([[10], [7], [2]]), torch.tensor([[4], [4], [4]])
    chosen = chosen_pages(scores, pages, budgets, 2)
    assert chosen.sum(1).tolist() == [4, 4, 2]
    assert chosen[0, 8:].all()
    assert chosen[1, 5:7].all()
    assert not chosen[1, 7:].any()
    assert not chosen[1, 2]
    best = scores[0, :8].topk(2).indices
    assert chosen[0, best].all()
    assert torch.equal(chosen, chosen_pages(scores, pages, budgets, 2))
    # More recent pages than budget: the latest, and no inner one is lost.
    tight = chosen_pages(scores, pages, budgets, 8)
    assert tight[0].nonzero().flatten().tolist() == [6, 7, 8, 9]
    # Equal scores above 1: the older page wins.
    level = chosen_pages(torch.full((1, 10), 3.7), torch.tensor([[10]]), torch.tensor([[5]]), 1)
    assert level[0].nonzero().flatten().tolist() == [0, 1, 2, 3, 9]


def test_page_scores_are_those_of_a_naive_softmax(monkeypatch):
    """Card: scores match a naive softmax/max/sum; permuting query heads changes nothing; sum between 1 and H."""
    hf, ids = families.qwen3(), tokens(batch=2)
    mask = torch.ones_like(ids)
    mask[1, :6] = 0
    seen = []
    real = module.page_scores

    def spy(call: Any, held: Any, page: int) -> Any:
        found = real(call, held, page)
        naive = torch.zeros_like(found[0])
        heads = call.query.shape[1]
        for row, start in enumerate((0, 6)):
            keys = held.keys[row, :, start:].repeat_interleave(heads // held.keys.shape[1], 0)
            weights = ((call.query[row] @ keys.transpose(-1, -2))[:, 0] * call.scaling).softmax(-1)
            for token, value in enumerate(weights.amax(0)):
                naive[row, token // page] += value
        torch.testing.assert_close(found[0], naive)
        order = torch.tensor([1, 0, 3, 2])  # within the groups
        kept, call.query = call.query, call.query[:, order]
        torch.testing.assert_close(real(call, held, page)[0], found[0])
        call.query = kept
        assert ((found[0].sum(1) >= 1 - 1e-5) & (found[0].sum(1) <= heads)).all()
        seen.append(found[0].shape[1])
        return found

    monkeypatch.setattr(module, "page_scores", spy)
    with attach(hf, DELTA(page=PAGE, budget=3, recent=1)):
        generated(hf, ids, attention_mask=mask)
    assert seen == [7, 8, 8, 8, 8]


@pytest.mark.parametrize("keep", [0.3, 0.5, 0.9])
def test_reads_are_counted(keep):
    """Card: reads per step = full_layers * T + sparse_layers * min(T, budget * page), partial last page apart."""
    hf, length, steps = families.llama(), 24, 5
    with attach(hf, DELTA(keep=keep, page=PAGE, recent=2)) as it:
        generated(hf, tokens(length=length), steps=steps)
        runtime: Any = it.runtimes[0]
    expected = whole = 0
    for total in range(length + 1, length + steps):
        pages = -(-total // PAGE)
        budget = -int(-keep * pages // 1)
        expected += total + 2 * min(total, budget * PAGE - (-total % PAGE))
        whole += 3 * total
    assert (runtime.read, runtime.whole) == (expected, whole)


@pytest.mark.parametrize("family", FAMILIES)
def test_rows_of_a_padded_batch_have_their_own_pages(family):
    """Card's pitfall: pages are relative to the row's first real token, padding is no page."""
    hf, ids = families.FAMILIES[family](), tokens(batch=3)
    mask = torch.ones_like(ids)
    mask[1, :7], mask[2, :18] = 0, 0
    for policy in (DELTA(keep=0.5, page=PAGE, recent=2), DELTA(budget=4, page=PAGE, recent=2)):
        with attach(hf, policy) as it:
            both = generated(hf, ids, attention_mask=mask)
            read = it.runtimes[0].read
            for row, pad in enumerate((0, 7, 18)):
                alone = generated(hf, ids[row : row + 1, pad:])
                for one, other in zip(both.logits, alone.logits, strict=True):
                    torch.testing.assert_close(one[row], other[0], atol=1e-4, rtol=1e-4)
            assert it.runtimes[0].read == 2 * read


def test_nothing_is_let_go_and_long_passes_read_all():
    """Card's pitfalls: memory is not reduced; prompts are read as ever; windows are left alone."""
    hf, ids = families.gemma3(), tokens()
    plain = generated(hf, ids, steps=1)
    with attach(hf, DELTA(keep=0.3, page=PAGE, recent=1)) as it:
        found = generated(hf, ids, steps=1)
        same(found, plain)
        layers = found.past_key_values.layers
        assert [layers[i].stores[0].entries.length for i in (1, 3)] == [LENGTH, LENGTH]
        assert not hasattr(layers[0], "stores")
        with torch.no_grad():
            more = hf(tokens(length=5, seed=1), past_key_values=found.past_key_values).logits
        assert it.runtimes[0].read == 0
    with torch.no_grad():
        whole = hf(torch.cat([ids, tokens(length=5, seed=1)], 1)).logits[:, -5:]
    torch.testing.assert_close(more, whole, atol=1e-5, rtol=1e-5)


def test_default_layers_are_the_papers():
    assert default_full(list(range(28))) == [0, 1, 2, 14, 22]
    assert default_full([0, 1]) == [0]
    assert default_full([5, 11, 17, 23]) == [5, 17]
    found = roles(DELTA(), wrap(families.llama()))
    assert found == {0: "select", 1: "sparse", 2: "sparse"}
    hf = families.gemma3()
    assert roles(DELTA(full=(1,)), wrap(hf)) == {1: "select", 3: "sparse"}


def test_layers_that_do_not_fit_are_refused():
    """Card's pitfall: require layer 0 full."""
    model = wrap(families.llama())
    with pytest.raises(PolicyError, match="layer 0 to be full"):
        DELTA(full=(1,)).runtime(model)
    with pytest.raises(PolicyError, match="cannot make layer 7"):
        DELTA(full=(0, 7)).runtime(model)
    with pytest.raises(ArchitectureError, match="0 layers"):
        DELTA().runtime(wrap(families.mistral()))


@torch.inference_mode()
def right(model: Any, items: Any, *policies: Any) -> float:
    """Return the share of questions answered, each answer token read alone."""
    prompts = torch.tensor([item.prompt for item in items])
    answers = torch.tensor([item.answer for item in items])
    told = []
    with attach(model, *policies):
        # The last token of the prompt is a step too: all of an answer comes from steps that read few pages.
        out = model.hf(prompts[:, :-1], use_cache=True)
        for token in torch.cat([prompts[:, -1:], answers[:, :-1]], 1).T:
            out = model.hf(token[:, None], past_key_values=out.past_key_values)
            told.append(out.logits[:, -1].argmax(-1))
    return float((torch.stack(told, 1) == answers).all(1).float().mean())


def test_pages_with_a_planted_fact_are_found(monkeypatch):
    """Card: recalled at a budget where recency-only and random pages fail."""
    model = paredown.load("testbed:recall", dtype="float32")
    drawn = recall_items(model.tokenizer, heldout_texts("recall"), length=512, count=80, seed=5)
    items = [item for item in drawn if item.depth < 0.4][:32]  # facts further back than the latest half
    # Half of the pages, chosen by the first layer: the model looks facts up in its third, which is sparse then.
    policy = DELTA(page=8, budget=32, recent=4, full=(0,))
    found = right(model, items, policy)
    assert found > 0.5
    assert right(model, items, policy.model_copy(update={"recent": 32})) < found - 0.4
    real = module.page_scores
    for seed in range(2):
        draw = torch.Generator().manual_seed(seed)

        def chance(call: Any, held: Any, page: int, draw: Any = draw) -> Any:
            scores, seen = real(call, held, page)
            return torch.rand(scores.shape, generator=draw), seen

        monkeypatch.setattr(module, "page_scores", chance)
        assert right(model, items, policy) < found - 0.4
