"""DuoAttention: the checks of its card, and random heads, which share everything but the choice."""

from __future__ import annotations

from typing import Any

import families
import numpy as np
import pytest
import running
import torch
from torch import Tensor

from paredown.core import calibration, checkpoint, heads, retrieval
from paredown.core.attach import attach, wrap
from paredown.core.cache import nbytes
from paredown.errors import ArchitectureError, DataError, PolicyError
from paredown.methods.cache.duo_attention import Distill, DuoAttention, Gates, Passkeys, plateau
from paredown.methods.cache.random_heads import RandomHeads

TABLE = ((0.1, 0.9), (0.8, 0.7), (0.2, 0.3))  # keep 0.5 keeps 1 of layer 0 and both of layer 1
FULL = ((1,), (0, 1), ())


def duo(**fields: Any) -> DuoAttention:
    return DuoAttention(**{"keep": 0.5, "sink": 2, "recent": 4, "heads": TABLE, **fields})


def rows(count: int = 8, length: int = 48, seed: int = 0) -> calibration.Batch:
    ids = torch.randint(3, families.VOCAB, (count, length), generator=torch.Generator().manual_seed(seed))
    return calibration.Batch(ids, None, "random", "", seed, count)


def reference(hf: Any, tokens: Tensor, cuts: tuple[int, ...], sink: int, recent: int) -> Tensor:
    """Read densely under a mask for each head: what a chunk sees of earlier ones is their sink and latest tokens."""
    length = tokens.shape[1]
    full = torch.ones(length, length, dtype=torch.bool).tril()
    streaming = full.clone()
    for start, stop in zip((0, *cuts[:-1]), cuts, strict=True):
        # The card's check 3 as corrected: the whole chunk up to itself, and sink + recent of what came before it.
        key = torch.arange(length)
        hidden = (key >= sink) & (key < start - recent) if start > sink + recent else torch.zeros(length).bool()
        streaming[start:stop] &= ~hidden
    handles = []
    for layer, block in enumerate(hf.model.layers):
        by_head = [full if head // 2 in FULL[layer] else streaming for head in range(4)]
        bias = torch.where(torch.stack(by_head), 0.0, torch.finfo(torch.float32).min)[None]

        def hook(module: Any, args: Any, kwargs: Any, bias: Tensor = bias) -> Any:
            return args, {**kwargs, "attention_mask": bias}

        handles.append(block.self_attn.register_forward_pre_hook(hook, with_kwargs=True))
    with torch.no_grad():
        out: Tensor = hf(input_ids=tokens, use_cache=False).logits
    for handle in handles:
        handle.remove()
    return out


@pytest.mark.parametrize("chunk", [1, 7, 64])
def test_streaming_equals_a_dense_masked_reference(chunk):
    """Check 3, with the correction of what later chunks see: prefill by chunks of 1, 7 and 64, then token by token."""
    hf = families.llama()
    tokens = running.ids(2, 90)
    read = (*range(chunk, 80, chunk), 80)
    cuts = (*read, *range(81, 91))
    with duo().attach(hf):
        found, _ = running.passes(hf, tokens, cuts)
    torch.testing.assert_close(found, reference(hf, tokens, cuts, 2, 4), atol=2e-5, rtol=1e-4)


def test_keep_one_and_short_sequences_are_identical():
    """Check 1: at sparsity 0, and while nothing exceeds sink + recent, nothing changes."""
    hf = families.llama()
    tokens = running.ids(2, 20)
    plain, _ = running.passes(hf, tokens, running.steps(20, 8))
    with DuoAttention(keep=1).attach(hf):
        found, _ = running.passes(hf, tokens, running.steps(20, 8))
    assert torch.equal(found, plain)
    with duo(sink=4, recent=16).attach(hf):
        found, _ = running.passes(hf, tokens, running.steps(20, 8))
    torch.testing.assert_close(found, plain, atol=1e-5, rtol=1e-4)
    with duo(sink=4, recent=8).attach(hf):
        found, _ = running.passes(hf, tokens, running.steps(20, 8))
    torch.testing.assert_close(found[:, :12], plain[:, :12], atol=1e-5, rtol=1e-4)
    assert not torch.allclose(found, plain, atol=1e-3)


def test_bytes_follow_the_formula_and_streaming_caches_do_not_grow():
    """Check 4: full heads hold all tokens, the others sink + recent and the newest; ten times longer is no more."""
    hf = families.llama()
    with duo().attach(hf) as attachment:
        _, cache = running.passes(hf, running.ids(2, 40), (40,))
        each = 2 * 2 * 8 * 4  # K and V, 2 rows, 8 channels, 4 bytes
        # Layer 0 has one head of either kind, layer 1 two full ones (left to the model), layer 2 two streaming ones.
        assert nbytes(cache) == attachment.nbytes() == each * (3 * 40 + 3 * (2 + 4 + 1))

        def streaming() -> list[int]:
            stores = [s for layer in (0, 2) for s in cache.layers[layer].stores if isinstance(s, heads.RingStore)]
            return [t.untyped_storage().nbytes() for store in stores for t in store.tensors()]

        before = streaming()
        assert len(before) == 4
        running.passes(hf, running.ids(2, 400), tuple(range(1, 401)), cache=cache)
        assert streaming() == before
        assert cache.get_seq_length() == 440


@pytest.mark.parametrize("family", running.FAMILIES)
def test_families(family):
    hf = running.built(family)
    counts = heads.shape(wrap(hf))
    drawn = torch.rand(sum(counts), generator=torch.Generator().manual_seed(3))
    running.check_family(family, DuoAttention(keep=0.4, sink=2, recent=5, heads=heads.table(drawn, counts)))


def test_it_needs_numbers_and_they_must_fit():
    hf = families.llama()
    with pytest.raises(PolicyError, match="call prepare"), DuoAttention(keep=0.5).attach(hf):
        pass
    with pytest.raises(PolicyError, match=r"\[2, 2, 2\]"), duo(heads=((1.0,), (0.5,))).attach(hf):
        pass
    with pytest.raises(ArchitectureError, match="MistralForCausalLM"), duo().attach(families.mistral()):
        pass
    assert not hf.model.layers[0].self_attn._forward_hooks


def test_random_heads_keep_as_many_and_follow_their_seed():
    model = wrap(families.llama())
    drawn = [RandomHeads(keep=0.5, seed=seed).runtime(model).full for seed in range(8)]
    assert {sum(map(len, full)) for full in drawn} == {3}
    assert len(set(drawn)) > 3
    assert RandomHeads(keep=0.5, seed=2).runtime(model).full == drawn[2]
    # The same heads are the same policy.
    hf, tokens = families.llama(), running.ids(2, 30)
    scores = tuple(tuple(float(h in full) for h in range(2)) for full in drawn[2])
    out = []
    for policy in (RandomHeads(keep=0.5, seed=2, sink=2, recent=4), duo(heads=scores)):
        with attach(hf, policy):
            out.append(running.passes(hf, tokens, running.steps(30, 20))[0])
    assert torch.equal(out[0], out[1])


# Training.


def distill(reg: float = 0.05, sink: int = 2, recent: int = 6) -> tuple[Distill, list[Any]]:
    model = wrap(families.llama())
    data = Passkeys(retrieval.Planter(rows(), None), 48, 2, 4, 0, 4)
    return Distill(model, Gates(model, heads.shape(model)), sink, recent, reg), [data[0], data[1]]


def test_open_gates_cost_nothing_and_the_regulariser_pulls_evenly():
    """Check 2: alpha = 1 gives distillation loss exactly 0; the gradient of the reg term alone is reg / numel."""
    task, texts = distill()
    assert float(task.distance(texts).detach()) == 0
    task.loss([texts[0]]).backward()
    pulled = task.reg * task.gates.mean_size()
    gradient = torch.autograd.grad(pulled, list(task.gates.parameters()))
    torch.testing.assert_close(torch.cat(gradient), torch.full((6,), 0.05 / 6))


def test_closed_gates_are_streaming_attention():
    """The learner at gate 0 is the exact token mask in every head; ERRATA 1: full attention is the teacher's."""
    task, texts = distill()
    with torch.no_grad():
        for gate in task.gates.parameters():
            gate.fill_(0.0)
    hf = task.model.hf
    ids = torch.tensor([row for row, _ in texts])
    at = torch.arange(ids.shape[1])
    seen = heads.streaming_mask(at, at, 2, 6)
    assert seen[20].nonzero()[:, 0].tolist() == [0, 1, 15, 16, 17, 18, 19, 20]
    masked = torch.where(seen, 0.0, torch.finfo(torch.float32).min)[None, None].expand(2, 1, -1, -1)
    with torch.no_grad():
        wanted = hf.model(input_ids=ids, attention_mask=masked, use_cache=False).last_hidden_state
        full = hf.model(input_ids=ids, use_cache=False).last_hidden_state
        places = [(i, p) for i, (_, where) in enumerate(texts) for p in where]
        index = tuple(torch.tensor(places).T)
        expected = (wanted[index] - full[index]).pow(2).mean()
        torch.testing.assert_close(task.distance(texts), expected)


def test_the_open_branch_is_the_teachers_output():
    """ERRATA 1: out = gate * full(teacher) + (1 - gate) * streaming(learner); the teacher carries no gradient."""
    task, texts = distill()
    with torch.no_grad():
        task.gates.gates["0"].fill_(0.0)  # the learner's stream differs from layer 1 on; open gates bring it back
    calls: dict[tuple[int, bool], Tensor] = {}
    plain = task.attention

    def spy(seat: Any, call: Any) -> Tensor:
        out = plain(seat, call)
        calls[seat.layer, task.teaching] = out
        return out

    task.attention = spy  # type: ignore[method-assign]
    task.distance(texts)
    assert not torch.equal(calls[0, True], calls[0, False])
    for layer in (1, 2):
        assert torch.equal(calls[layer, True], calls[layer, False])
    assert not calls[1, True].requires_grad


def test_preparing_leaves_the_model_alone_and_is_repeatable(tmp_path):
    model = checkpoint.Model.of(families.llama())
    before = {name: tensor.clone() for name, tensor in model.hf.state_dict().items()}
    policy = DuoAttention(sink=2, recent=6, steps=5, passkeys=2)
    prepared = policy.prepare(model, rows(), seed=3, folder=str(tmp_path))
    assert prepared.heads is not None
    assert tuple(map(len, prepared.heads)) == (2, 2, 2)
    assert all(0 <= gate <= 1 for layer in prepared.heads for gate in layer)
    assert any(gate < 1 for layer in prepared.heads for gate in layer)
    assert policy.prepare(model, rows(), seed=3).heads == prepared.heads
    assert policy.prepare(model, rows(), seed=4).heads != prepared.heads
    assert prepared.prepare(model, None) is prepared
    assert all(torch.equal(before[name], tensor) for name, tensor in model.hf.state_dict().items())
    assert all(parameter.requires_grad for parameter in model.hf.parameters())
    assert DuoAttention(**prepared.model_dump()) == prepared
    with prepared.attach(model):
        running.generate(model.hf, running.ids(1, 20))
    with pytest.raises(DataError, match="calibration data"):
        policy.prepare(model, None)


@pytest.mark.parametrize("family", ["qwen3", "gemma3", "mixtral", "gpt_neox", "eager llama"])
def test_gates_are_learned_in_every_family(family):
    model = checkpoint.Model.of(families.FAMILIES[family.split()[-1]]())
    if family.startswith("eager"):
        model.hf.set_attn_implementation("eager")
    counts = heads.shape(model)
    task = Distill(model, Gates(model, counts), 2, 6, 0.0)
    assert float(task.distance([Passkeys(retrieval.Planter(rows(), None), 48, 2, 4, 0, 4)[0]]).detach()) == 0
    prepared = DuoAttention(sink=2, recent=6, steps=3, passkeys=2).prepare(model, rows())
    assert prepared.heads is not None
    assert tuple(map(len, prepared.heads)) == counts
    assert all(gate < 1 for layer in prepared.heads for gate in layer)


def test_an_untrained_model_copies_nothing_and_that_is_told():
    model = checkpoint.Model.of(families.llama())
    with pytest.raises(DataError, match="use selector='gates'"):
        DuoAttention(selector="retrieval").prepare(model, rows())


def test_passkeys_stand_in_the_text_and_are_asked_for_in_order():
    data = Passkeys(retrieval.Planter(rows(), None), 96, 3, 4, 7, 5)
    row, places = data[2]
    assert data[2] == (row, places)
    assert data[3][0] != row
    assert len(row) == 96
    # What is labelled: each key, and the token before it. Each key was said before, behind the same marker.
    runs = np.split(np.array(places), np.flatnonzero(np.diff(places) != 1) + 1)
    assert [len(run) for run in runs] == [5, 5, 5]
    found = []
    for run in runs:
        said = row[run[0] - 2 : run[-1] + 1]
        found.append(next(i for i in range(96) if row[i : i + len(said)] == said))
        assert found[-1] < 96 - 3 * 7
    assert found == sorted(found)


def test_the_rate_rises_and_falls():
    assert [round(plateau(p), 3) for p in (0, 0.1, 0.2, 0.5, 0.8, 0.9, 0.99)] == [0.1, 0.5, 1, 1, 1, 0.5, 0.1]


# On a trained model.

TEMPLATE = "\nThe secret number of {name} is {value}.\n"
WINDOW = {"sink": 4, "recent": 60}


def recall_of(model: checkpoint.Model, policy: Any, items: Any) -> np.ndarray:
    """Return the loss of each answer: the text in one pass, then question and answer token by token."""
    out = []
    for item in items:
        question = len(model.tokenizer.encode("\n" + item.question, add_special_tokens=False))
        ids = torch.tensor([item.prompt + item.answer])
        text = len(item.prompt) - question
        with attach(model, policy):
            logits, _ = running.passes(model.hf, ids, (text, *range(text + 1, ids.shape[1] + 1)))
        told = logits[0, len(item.prompt) - 1 : -1].log_softmax(-1)
        out.append(-float(told.gather(1, ids[0, len(item.prompt) :, None]).sum()))
    return np.array(out)


@pytest.mark.slow
def test_learned_heads_beat_random_ones_on_planted_facts():
    """Check 5, on a trained model: half of the heads stream; the learned choice against five random ones, paired.

    Of the eight KV heads two are needed, so a random half holds both in one draw of five and is as good then.
    """
    from paredown.testbeds import heldout_texts, tasks

    model = checkpoint.load("testbed:recall", dtype="float32")
    texts = calibration.read(None, model_ref="testbed:recall", split="calibration")
    data = calibration.for_model(model, texts, length=384, sequences=64, seed=0)
    learned = DuoAttention(template=TEMPLATE, key=3, steps=250, reg=0.02, **WINDOW).prepare(model, data)
    assert learned.heads is not None
    # What taking one head after the other away shows, and no score was told.
    assert {1} <= set(heads.best(learned.heads, 0.5)[1]) & set(heads.best(learned.heads, 0.5)[2])
    items = tasks.recall_items(model.tokenizer, heldout_texts("recall"), length=512, count=20, seed=3)
    ours, full = recall_of(model, learned, items), recall_of(model, DuoAttention(keep=1), items)
    random = [recall_of(model, RandomHeads(seed=seed, **WINDOW), items) for seed in range(5)]
    assert ours.mean() < np.mean(random) - 1
    assert sum(ours.mean() < other.mean() for other in random) >= 4
    assert ours.mean() < min(other.mean() for other in random) + 0.3
    assert ours.mean() < full.mean() + 0.3
