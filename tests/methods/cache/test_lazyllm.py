"""LazyLLM: every check of its card."""

from __future__ import annotations

from typing import Any

import families
import pytest
import torch
from torch import Tensor
from transformers import DynamicCache

import paredown
from paredown.core.attach import attach, wrap
from paredown.core.cache import nbytes
from paredown.errors import ArchitectureError, PolicyError
from paredown.methods.cache import lazyllm as module
from paredown.methods.cache.lazyllm import LazyLLM, importance, least, schedule
from paredown.testbeds import heldout_texts
from paredown.testbeds.tasks import recall_items

FAMILIES = ("llama", "qwen3", "mistral", "gemma3", "qwen3_moe")
RATES = {3: (0.3, 0.5, 0.0), 4: (0.3, 0.0, 0.5, 0.0)}
LENGTH, STEPS = 20, 6


def tokens(batch: int = 1, length: int = LENGTH, seed: int = 0) -> Tensor:
    return torch.randint(3, families.VOCAB, (batch, length), generator=torch.Generator().manual_seed(seed))


def rates(hf: Any) -> tuple[float, ...]:
    return RATES[hf.config.num_hidden_layers]


def generated(hf: Any, ids: Tensor, **options: Any) -> Any:
    with torch.no_grad():
        return hf.generate(
            input_ids=ids,
            max_new_tokens=STEPS,
            do_sample=False,
            eos_token_id=None,
            pad_token_id=0,
            return_dict_in_generate=True,
            output_logits=True,
            **options,
        )


def stores(cache: Any) -> list[Any]:
    return [layer.stores[0] for layer in cache.layers]


def read(store: Any, row: int = 0) -> list[int]:
    """Positions of which a layer holds keys and values."""
    held = store.entries
    if held.positions is None:
        return list(range(held.length))
    return [p for p in held.positions[row].tolist() if p >= 0]


def waiting(store: Any, row: int = 0) -> list[int]:
    return [] if store.waiting is None else [p for p in store.waiting_rows[row].tolist() if p >= 0]


@pytest.mark.parametrize("family", FAMILIES)
def test_rates_0_give_the_models_own_logits_and_nothing_waits(family, monkeypatch):
    """Card: all rates 0: logits identical to the plain model at every step of generation, Aux stays empty."""
    hf, ids = families.FAMILIES[family](), tokens()
    expected = generated(hf, ids)
    nothing = LazyLLM(rates=(0.0,) * hf.config.num_hidden_layers)
    assert nothing.inert
    monkeypatch.setattr(LazyLLM, "inert", False)
    with attach(hf, nothing):
        found = generated(hf, ids)
    assert all(waiting(store) == [] for store in stores(found.past_key_values))
    for one, other in zip(found.logits, expected.logits, strict=True):
        torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("family", FAMILIES)
def test_rate_1_keeps_only_the_newest_token(family):
    """Card: rate 1 keeps only the newest token in later layers and still runs; the newest token is never pruned."""
    hf = families.FAMILIES[family]()
    depth = hf.config.num_hidden_layers
    with attach(hf, LazyLLM(rates=(1.0,) * depth)) as it, torch.no_grad():
        cache = hf(tokens(), use_cache=True).past_key_values
        assert [read(store) for store in stores(cache)[1:]] == [[LENGTH - 1]] * (depth - 1)
        out = hf(torch.tensor([[5]]), past_key_values=cache)
        assert torch.isfinite(out.logits).all()
        assert it.runtimes[0].evaluated[-1] == 2


@pytest.mark.parametrize("family", FAMILIES)
def test_a_token_is_read_waits_or_was_never_there(family):
    """Card: each token is in exactly one of {KV[l+1], Aux[l], never reached layer l}; nothing is computed twice."""
    hf, ids = families.FAMILIES[family](), tokens()
    depth = hf.config.num_hidden_layers
    came_back = False
    with attach(hf, LazyLLM(rates=rates(hf))) as it, torch.no_grad():
        cache, step = DynamicCache(config=hf.config), ids
        for _ in range(STEPS):
            before = [set(waiting(store)) for store in stores(cache)] if cache.get_seq_length() else [set()] * depth
            out = hf(step, past_key_values=cache)
            step = out.logits[:, -1:].argmax(-1)
            held = stores(cache)
            seen = cache.get_seq_length()
            for layer in range(depth - 1):
                here, above, parked = read(held[layer]), read(held[layer + 1]), waiting(held[layer])
                assert sorted(above + parked) == sorted(here)  # no position twice, none lost
                came_back |= bool(before[layer] - set(parked))
            # Total evaluations <= L * (prompt + generated), and each is one entry of keys and values.
            assert it.runtimes[0].evaluated == [len(read(store)) for store in held]
            assert held[0].entries.length == seen
        assert it.nbytes() == nbytes(cache)
    # Behind a window no token is ever more important than those in it.
    assert came_back or family == "mistral"


def test_after_the_first_pass_evaluations_are_the_kept_counts():
    """Card: after the first token they equal the sum of kept counts; ``keep`` is their mean share."""
    for keep, length in ((0.5, 40), (0.8, 33), (0.4, 57)):
        hf = families.llama()
        with attach(hf, LazyLLM(keep=keep)) as it, torch.no_grad():
            hf(tokens(length=length), use_cache=True)
            runtime: Any = it.runtimes[0]
        left, expected = length, []
        for rate in runtime.rates:
            expected.append(left)
            left -= min(int(rate * left), left - 1)
        assert runtime.evaluated == expected
        assert abs(sum(expected) / (3 * length) - keep) < 1 / length


@pytest.mark.parametrize("layers", [2, 3, 4, 6, 28, 80])
def test_the_schedule_meets_keep_and_cuts_deep(layers):
    for keep in (0.3, 0.5, 0.6, 0.75, 0.9):
        if keep * layers <= 1:
            with pytest.raises(PolicyError, match="keep must be above"):
                schedule(keep, layers)
            continue
        shares, left = [], 1.0
        for rate in schedule(keep, layers):
            shares.append(left)
            left *= 1 - rate
        assert sum(shares) / layers == pytest.approx(keep, abs=1e-9)
        assert shares == sorted(shares, reverse=True)


def explicit(hf: Any, ids: Tensor, chosen: list[Tensor]) -> tuple[Tensor, list[Tensor]]:
    """The same computation, naively: layer by layer on the tokens ``chosen[l]``, sorted by position, no cache."""
    body = hf.model
    hidden = body.embed_tokens(ids)
    cos, sin = body.rotary_emb(hidden, torch.arange(ids.shape[1])[None])
    whole, states = hidden, []
    for layer, at in zip(body.layers, chosen, strict=True):
        mask = (at[None] <= at[:, None])[None, None]
        out = layer(whole[:, at], attention_mask=mask, position_embeddings=(cos[:, at], sin[:, at]))
        whole = whole.clone()
        whole[:, at] = out
        states.append(whole)
    return hf.lm_head(body.norm(whole[:, -1:])), states


@torch.no_grad()
def test_a_first_pass_is_the_same_computation_on_the_kept_tokens():
    hf, ids = families.llama(), tokens()
    with attach(hf, LazyLLM(rates=rates(hf))):
        out = hf(ids, use_cache=True)
    chosen = [torch.tensor(read(store)) for store in stores(out.past_key_values)]
    assert [len(c) for c in chosen] == [20, 14, 7]
    expected, _ = explicit(hf, ids, chosen)
    torch.testing.assert_close(out.logits[:, -1:], expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_tokens_that_come_back_out_of_order_are_as_if_in_order(family, monkeypatch):
    """Card: original positions everywhere: with a layer that revives tokens out of order, output equals the same
    computation on position-sorted tokens; here: all that went comes back, nothing more goes, so the next step's
    first layers must equal the plain model's.
    """
    hf, ids = families.FAMILIES[family](), tokens()
    depth = hf.config.num_hidden_layers
    only_first = (0.5,) + (0.0,) * (depth - 1)
    plain = hf(torch.cat([ids, torch.tensor([[7]])], 1), output_hidden_states=True, use_cache=True)
    odd = (torch.arange(LENGTH) % 2 == 1)[None] & (torch.arange(LENGTH) < LENGTH - 1)
    cuts = {LENGTH: odd, LENGTH + 1: torch.zeros(1, LENGTH + 1, dtype=torch.bool)}
    monkeypatch.setattr(module, "least", lambda scores, selected, newest, rate: cuts[selected.shape[1]])
    with attach(hf, LazyLLM(rates=only_first)):
        cache = hf(ids, use_cache=True).past_key_values
        assert waiting(stores(cache)[0]) == list(range(1, LENGTH - 1, 2))
        hf(torch.tensor([[7]]), past_key_values=cache)
    held = stores(cache)[1].entries
    assert held.positions[0].tolist() != sorted(held.positions[0].tolist())
    assert waiting(stores(cache)[0]) == []
    order = held.positions[0].argsort()
    # Layer 1 reads what layer 0 made, which no cut has touched: its keys are the plain model's, at their positions.
    own = plain.past_key_values.layers[1]
    last = own.keys.shape[2]  # a window keeps the latest alone
    torch.testing.assert_close(held.keys[:, :, order][:, :, -last:], own.keys, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(held.values[:, :, order][:, :, -last:], own.values, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("family", ["llama", "gemma3", "mistral"])
@torch.no_grad()
def test_what_came_back_sees_what_stands_before_it_and_in_its_window(family, monkeypatch):
    """A token that comes back into a layer alone with the newest gives the numbers of a full mask, also in a window."""
    hf, ids = families.FAMILIES[family](), tokens()
    depth = hf.config.num_hidden_layers
    more = torch.tensor([[7]])
    plain = hf(torch.cat([ids, more], 1), output_hidden_states=True)
    gone = torch.zeros(1, LENGTH, dtype=torch.bool)
    gone[:, 3] = gone[:, 15] = True
    cuts = {LENGTH: gone, LENGTH + 1: torch.zeros(1, LENGTH + 1, dtype=torch.bool)}
    monkeypatch.setattr(module, "least", lambda scores, selected, newest, rate: cuts[selected.shape[1]])
    states: dict[int, Tensor] = {}

    with attach(hf, LazyLLM(rates=(0.5,) + (0.0,) * (depth - 1))) as it:
        cache = hf(ids, use_cache=True).past_key_values
        block = hf.get_submodule(it.model.anatomy.language.blocks[1].path)
        handle = block.register_forward_hook(
            lambda m, a, out: states.update({1: out if torch.is_tensor(out) else out[0]})
        )
        hf(more, past_key_values=cache)
        handle.remove()
    assert states[1].shape[1] == 3  # the newest, 3 and 15
    expected = plain.hidden_states[2][:, [LENGTH, 3, 15]] if depth > 2 else None
    assert expected is not None
    torch.testing.assert_close(states[1], expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("family", FAMILIES)
def test_rows_of_a_padded_batch_are_pruned_alone(family):
    """Card's pitfall: per-row pruning needs ragged indices, padding is pruned first."""
    hf, ids = families.FAMILIES[family](), tokens(batch=3)
    mask = torch.ones_like(ids)
    mask[1, :7], mask[2, :13] = 0, 0
    with attach(hf, LazyLLM(rates=rates(hf))):
        both = generated(hf, ids, attention_mask=mask)
        for row, pad in enumerate((0, 7, 13)):
            alone = generated(hf, ids[row : row + 1, pad:])
            for one, other in zip(both.logits, alone.logits, strict=True):
                torch.testing.assert_close(one[row], other[0], atol=1e-4, rtol=1e-4)
            for one, other in zip(stores(both.past_key_values), stores(alone.past_key_values), strict=True):
                real = {p - pad for p in read(one, row) if p >= pad}
                assert real == set(read(other))
                assert {p - pad for p in waiting(one, row)} == set(waiting(other))


def test_beams_carry_what_waits():
    hf, ids = families.llama(), tokens(batch=2)
    with attach(hf, LazyLLM(rates=rates(hf))):
        both = generated(hf, ids, num_beams=3)
        alone = generated(hf, ids[1:], num_beams=3)
    assert torch.equal(both.sequences[1], alone.sequences[0])


@torch.no_grad()
def test_without_revival_nothing_waits_or_returns():
    hf, ids = families.llama(), tokens()
    with attach(hf, LazyLLM(rates=rates(hf), revive=False)):
        cache = generated(hf, ids).past_key_values
    held = stores(cache)
    assert all(waiting(store) == [] for store in held)
    assert len([p for p in read(held[-1]) if p < LENGTH]) == 7


@torch.no_grad()
def test_a_cropped_cache_goes_on():
    hf, ids = families.llama(), tokens()
    with attach(hf, LazyLLM(rates=rates(hf))):
        cache = generated(hf, ids).past_key_values
        cache.crop(LENGTH)
        for store in stores(cache):
            assert max(read(store) + waiting(store)) < LENGTH
        assert torch.isfinite(hf(torch.tensor([[9]]), past_key_values=cache).logits).all()


@torch.no_grad()
def test_a_pass_without_a_cache_is_cut_too():
    hf, ids = families.llama(), tokens()
    with attach(hf, LazyLLM(rates=rates(hf))) as it:
        one = hf(ids, use_cache=False).logits[:, -1]
        assert it.runtimes[0].evaluated == [20, 14, 7]
        torch.testing.assert_close(one, hf(ids, use_cache=True).logits[:, -1])


def test_importance_is_the_mean_over_query_heads_of_the_newest_rows():
    """Card: s_i = mean over heads of A[h, last, i]; the option averages the last few rows."""
    hf, ids = families.llama(), tokens()
    seen: dict[str, Any] = {}

    def spy(call: Any, keys: Tensor, positions: Any, rows: int) -> Tensor:
        seen[call.layer] = {rows: importance(call, keys, positions, rows) for rows in (1, 4)}
        return seen[call.layer][1]

    hf.set_attn_implementation("eager")
    with torch.no_grad():
        maps = hf(ids, output_attentions=True).attentions
    with pytest.MonkeyPatch.context() as patch, attach(hf, LazyLLM(rates=(0.5, 0.0, 0.0))), torch.no_grad():
        patch.setattr(module, "importance", spy)
        hf(ids, use_cache=True)
    torch.testing.assert_close(seen[0][1], maps[0][:, :, -1].mean(1), atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(seen[0][4], maps[0][:, :, -4:].mean((1, 2)), atol=1e-6, rtol=1e-5)


def test_what_goes_is_counted_exactly():
    """Card: prune the floor(rate * n) lowest; ERRATA 2: min(floor(rate * n), n - 1), the newest never."""
    scores = torch.rand(2, 100, generator=torch.Generator().manual_seed(0))
    scores[0, 99] = 0.0
    scores[1, :20] = -1.0
    selected = torch.ones(2, 100, dtype=torch.bool)
    newest = torch.tensor([99, 99])
    for rate, counts in ((0.29, (29, 23)), (0.0, (0, 0)), (1.0, (99, 79)), (0.7, (70, 56))):
        gone = least(scores, selected, newest, rate)
        assert tuple(gone.sum(1).tolist()) == counts
        assert not gone[:, 99].any()
        assert not gone[1, :20].any()
        if 0 < rate < 1:
            assert scores[0, :99][gone[0, :99]].max() <= scores[0, :99][~gone[0, :99]].min()
    same = least(torch.ones(1, 10), torch.ones(1, 10, dtype=torch.bool), torch.tensor([9]), 0.3)
    assert same[0].nonzero().flatten().tolist() == [0, 1, 2]  # of equals the oldest goes


def test_what_does_not_fit_is_refused():
    hf = families.llama()
    for wrong, why in (((0.1, 0.1), "2 rates for 3 layers"), ((0.1, 2.0, 0.0), "not between 0 and 1")):
        with pytest.raises(PolicyError, match=why), attach(hf, LazyLLM(rates=wrong)):
            pass
    hf.config.layer_types = ["full_attention", "chunked_attention", "full_attention"]
    with pytest.raises(ArchitectureError, match="chunked_attention"):
        LazyLLM().runtime(wrap(hf))


@pytest.fixture(scope="module")
def recall() -> Any:
    """The recall testbed and questions of one length: texts ``[N, 256 - q]``, questions ``[N, q]``, answers."""
    model = paredown.load("testbed:recall", dtype="float32")
    drawn = recall_items(model.tokenizer, heldout_texts("recall"), length=256, count=160, seed=3)
    lengths = [len(model.tokenizer.encode("\n" + item.question, add_special_tokens=False)) for item in drawn]
    common = max(set(lengths), key=lengths.count)
    items = [item for item, length in zip(drawn, lengths, strict=True) if length == common][:48]
    prompts = torch.tensor([item.prompt for item in items])
    return model, prompts[:, :-common], prompts[:, -common:], torch.tensor([item.answer for item in items])


@torch.inference_mode()
def answered(recall: Any, policy: LazyLLM | None, *, later: bool) -> float:
    """Return the share of right answers, the question being read with the text or ``later``, token by token."""
    model, texts, questions, answers = recall
    follow = torch.cat([questions, answers[:, :-1]], dim=1) if later else answers[:, :-1]
    told = []
    with attach(model, *([] if policy is None else [policy])):
        out = model.hf(texts if later else torch.cat([texts, questions], 1), use_cache=True)
        for step in range(follow.shape[1] + 1):
            told.append(out.logits[:, -1].argmax(-1))
            if step < follow.shape[1]:
                out = model.hf(follow[:, step : step + 1], past_key_values=out.past_key_values)
    right = torch.stack(told[-answers.shape[1] :], dim=1) == answers
    return float(right.all(1).float().mean())


# Where a small model of four layers looks a fact up is its third layer; half of the text goes before it.
HALF = (0.0, 0.5, 0.0, 0.0)


def test_importance_keeps_a_planted_fact_that_chance_loses(recall, monkeypatch):
    """Card: last-query importance keeps the needle at 50% while random pruning loses it (5 seeds)."""
    assert answered(recall, None, later=False) > 0.9
    kept = answered(recall, LazyLLM(rates=HALF), later=False)
    judged = importance
    lost = []
    for seed in range(5):
        draw = torch.Generator().manual_seed(seed)

        def chance(call: Any, keys: Tensor, positions: Any, rows: int, draw: Any = draw) -> Tensor:
            found = judged(call, keys, positions, rows)
            return torch.where(found >= 0, torch.rand(found.shape, generator=draw), found)

        monkeypatch.setattr(module, "importance", chance)
        lost.append(answered(recall, LazyLLM(rates=HALF), later=False))
    assert kept > max(lost) + 0.2


def test_a_later_question_needs_what_was_put_off(recall, monkeypatch):
    """Card: a later question about a pruned sentence is answered after revival but not when Aux is disabled."""
    _, texts, questions, _ = recall
    width = questions.shape[1]
    judged = importance

    def ashamed(call: Any, keys: Tensor, positions: Any, rows: int) -> Tensor:
        """While the text is read, the sentence that will be asked for is worth nothing; later all is judged as ever."""
        found = judged(call, keys, positions, rows)
        if call.now.past == 0:
            for row, text, question in zip(found, texts, questions, strict=True):
                start = int((text.unfold(0, width, 1) == question).all(1).nonzero()[0])
                row[start : start + width + 4] = 0.0
        return found

    monkeypatch.setattr(module, "importance", ashamed)
    quarter = (0.0, 0.25, 0.0, 0.0)
    assert answered(recall, LazyLLM(rates=quarter), later=True) > 0.7
    assert answered(recall, LazyLLM(rates=quarter, revive=False), later=True) < 0.2
