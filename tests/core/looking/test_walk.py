"""Walking by hand gives what the model gives, says rightly what is added, and leaves the model alone."""

from __future__ import annotations

from copy import deepcopy

import families
import pytest
import torch
from torch import nn

from paredown.core import checkpoint
from paredown.core.anatomy import Anatomy
from paredown.core.calibration import Batch
from paredown.core.checkpoint import Model
from paredown.core.looking.skips import Skips
from paredown.core.looking.walk import Tokens, Walk, plain, relative, sample, walk
from paredown.core.sequential import OnDisk, Resident
from paredown.errors import ArchitectureError, DataError

IDS = families.inputs("llama")["input_ids"]


def walked(model: Model, ids=IDS, mask=None):
    source = Resident(model)
    pairs = list(walk(source, ids, mask, model.anatomy.language.blocks))
    return pairs[-1][0], [step for _, step in pairs]


@pytest.mark.parametrize("family", [*families.DECODERS, "llava", "qwen2_vl"])
def test_what_is_added_sums_up_to_the_last_stream_and_gives_the_models_output(family):
    """Card: h_L = h_0 + sum (a_l + m_l), to 1e-5; the hooks read the right tensors."""
    model = Model.of(families.FAMILIES[family]())
    ids = families.inputs("llama")["input_ids"]
    before = model.hf.config._attn_implementation
    found, steps = walked(model, ids)
    total = steps[0].before.clone()
    for step in steps:
        total += step.attention + step.mlp
    assert torch.allclose(total, found.hidden, rtol=1e-5, atol=1e-5 * float(total.abs().max()))
    logits = families.logits(model.hf, {"input_ids": ids})
    assert torch.allclose(found.logits(found.hidden), logits, atol=1e-4)
    assert model.hf.config._attn_implementation == before
    assert not model.hf._forward_hooks


def test_a_model_on_disk_walks_alike_one_block_at_a_time(tmp_path):
    model = Model.of(families.qwen3_moe_mixed())
    model.hf.save_pretrained(tmp_path)
    found, steps = walked(model)
    source = OnDisk(checkpoint.skeleton(tmp_path))
    with source.open_ends(head=False):
        other = Walk(source, IDS)
    for part, known in zip(source.model.anatomy.language.blocks, steps, strict=True):
        with other.step(source.open(part.index)) as step:
            assert torch.allclose(step.after, known.after, atol=1e-6)
        source.close(part.index)
    with source.open_ends(head=True):
        assert torch.allclose(other.logits(other.hidden), found.logits(found.hidden), atol=1e-5)


def test_weights_in_bf16_are_walked_in_fp32_and_stay_as_they_are():
    hf = families.llama().bfloat16()
    model = Model.of(hf)
    exact = Model.of(deepcopy(hf).float())
    found, steps = walked(model)
    other, _ = walked(exact)
    assert found.exact
    assert found.hidden.dtype == torch.float32
    # Rotary tables come from the model and are bf16 there; nothing else is.
    assert torch.allclose(found.hidden, other.hidden, rtol=2e-2, atol=2e-2)
    assert found.logits(found.hidden).dtype == torch.float32
    assert all(p.dtype == torch.bfloat16 for p in hf.parameters())
    assert all(p.dtype == torch.float32 for p in steps[0].view.module.parameters())


@pytest.mark.parametrize(
    ("family", "width", "near"),
    [("llama", 4e-3, 1e-4), ("gemma3", 4e-3, 1e-4), ("gpt_neox", 4e-3, 1e-4), ("qwen2_moe", 1e-4, 1e-3)],
)
def test_derivatives_are_those_of_small_steps(family, width, near):
    """Card: jvp against central finite differences, to 1e-4; of fourth order, as norms and softmax stay in fp32.

    A router's choice must not flip within a step, so steps are smaller there, and their rounding larger.
    """
    model = Model.of(families.FAMILIES[family]().double())
    for _, step in walk(Resident(model), IDS, None, model.anatomy.language.blocks):
        tangent = torch.randn(step.before.shape, generator=torch.Generator().manual_seed(1)).double()
        out, along = step.push(step.before, tangent)
        one, two = (
            (step.run(step.before + w * tangent) - step.run(step.before - w * tangent)) / (2 * w)
            for w in (width, 2 * width)
        )
        assert torch.allclose(out, step.after, atol=1e-6)
        assert float((along - (4 * one - two) / 3).norm() / along.norm()) < near


def test_an_operation_without_a_forward_rule_is_differentiated_backwards(monkeypatch):
    model = Model.of(families.llama().double())
    found = None

    class Odd(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x * 1.0

        @staticmethod
        def backward(ctx, gradient):
            return gradient

    for _, step in walk(Resident(model), IDS, None, model.anatomy.language.blocks):
        tangent = torch.ones_like(step.before)
        known = step.push(step.before, tangent)
        run = step.run
        monkeypatch.setattr(step, "run", lambda hidden, run=run: Odd.apply(run(hidden)))
        found = step.push(step.before, tangent)
        assert torch.allclose(found[0], known[0])
        assert torch.allclose(found[1], known[1], atol=1e-5)
    assert found is not None


@pytest.mark.parametrize("side", ["right", "left"])
def test_padding_changes_nothing_that_counts(side):
    model = Model.of(families.llama())
    pad = torch.full((2, 3), 7)
    ones, zeros = torch.ones_like(IDS), torch.zeros_like(pad)
    ids = torch.cat([IDS, pad] if side == "right" else [pad, IDS], 1)
    mask = torch.cat([ones, zeros] if side == "right" else [zeros, ones], 1)
    found, _ = walked(model, ids, mask)
    known, _ = walked(model)
    at = slice(0, 12) if side == "right" else slice(3, None)
    assert torch.allclose(found.hidden[:, at], known.hidden, atol=1e-4)
    assert torch.equal(found.counted[:, at], known.counted)
    assert int(found.counted.sum()) == 2 * 11


def test_a_skip_is_the_model_without_the_block_but_for_the_first_token():
    model = Model.of(families.gemma3())
    skips = Skips()
    for found, step in walk(Resident(model), IDS, None, model.anatomy.language.blocks):
        skips.follow(found, step)
    skips.close(found)
    clean = families.logits(model.hf, {"input_ids": IDS}).softmax(-1)
    block = model.hf.get_submodule(model.anatomy.language.blocks[1].path)

    def bypass(_, args, kwargs, output):
        hidden = args[0] if args else kwargs["hidden_states"]
        kept = output[0] if isinstance(output, tuple) else output
        return torch.cat([kept[:, :1], hidden[:, 1:]], 1)

    handle = block.register_forward_hook(bypass, with_kwargs=True)
    other = families.logits(model.hf, {"input_ids": IDS}).softmax(-1)
    handle.remove()
    wanted = (clean - other).norm(dim=-1)[:, 1:].mean()
    assert skips.distance[1].mean == pytest.approx(float(wanted), rel=1e-3)


def test_the_choice_of_kernels_is_put_back_after_an_error():
    hf = families.mixtral()
    before = hf.config._attn_implementation, hf.config._experts_implementation
    with plain(hf):
        assert hf.config._attn_implementation == "eager"
        assert hf.config._experts_implementation == "eager"
    with pytest.raises(ZeroDivisionError), plain(hf):
        _ = 1 / 0
    assert (hf.config._attn_implementation, hf.config._experts_implementation) == before


def test_a_stream_that_is_normalised_itself_is_refused():
    with pytest.raises(ArchitectureError, match="normalises the stream itself"):
        Walk(Resident(Model.of(families.bert())), IDS)


def test_a_family_whose_parts_do_not_sum_up_is_refused():
    model = Model.of(families.llama())

    class Twice(nn.Module):
        def __init__(self, inner):
            super().__init__()
            self.inner = inner

        def forward(self, *args, **kwargs):
            return self.inner(*args, **kwargs)

    block = model.hf.model.layers[1]
    run = block.forward
    block.forward = lambda *a, **k: run(*a, **k) * 1.5
    with pytest.raises(ArchitectureError, match="layer 1"):
        walked(model)
    assert isinstance(model.anatomy, Anatomy)


def test_numbers_of_tokens_are_means_of_rows_and_quantiles_of_all():
    tokens = Tokens()
    tokens.add(torch.tensor([[9.0, 1.0, 3.0], [9.0, 5.0, 9.0]]), torch.tensor([[0, 1, 1], [0, 1, 0]]).bool())
    assert tokens.mean == pytest.approx((2 + 5) / 2)
    assert tokens.largest == 5
    assert tokens.quantile(0.5) == 3
    # A token to which nothing is added does not blow up.
    reference = torch.tensor([[[1.0], [1.0], [0.0]]])
    found = relative(torch.ones(1, 3, 1), reference, torch.ones(1, 3, dtype=torch.bool))
    assert found[0].tolist() == pytest.approx([1, 1, 1 / (0.01 * 2 / 3)])


def test_a_sample_is_cut_and_comes_a_few_rows_at_a_time():
    batch = Batch(torch.zeros(9, 400, dtype=torch.int64), torch.ones(9, 400, dtype=torch.int64), "x", "", 0, 9)
    found = sample(batch, 5, 250)
    assert [tuple(ids.shape) for ids, _ in found] == [(2, 250), (2, 250), (1, 250)]
    assert all(mask is not None and mask.shape == ids.shape for ids, mask in found)
    with pytest.raises(DataError, match="rows of 5 tokens"):
        sample(batch, 5, 5)
