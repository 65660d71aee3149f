"""What the dense model says, kept: exact KL, padding, sparse logits, files that are refused or taken up again."""

from __future__ import annotations

import math

import families
import pytest
import torch
from torch.nn import functional

from paredown.core.learning import teacher as teachers
from paredown.core.learning.teacher import Teacher, fitness, real_predictions
from paredown.errors import BudgetError, OutputError, UsageError

IDS = torch.randint(3, families.VOCAB, (5, 9), generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def dense():
    return families.llama()


@pytest.fixture(scope="module")
def student():
    model = families.llama()
    with torch.no_grad():
        model.model.layers[1].mlp.down_proj.weight.mul_(0.2)
    return model


def logits(model, ids=IDS, mask=None):
    with torch.no_grad():
        return model(input_ids=ids, attention_mask=mask, use_cache=False).logits


def plain(dense, student, ids=IDS):
    """KL in fp64, all at once."""
    p, q = (functional.log_softmax(logits(m, ids)[:, :-1].double(), -1) for m in (dense, student))
    return (p.exp() * (p - q)).sum(-1)


def test_kl_is_that_of_the_definition(dense, student):
    teacher = Teacher.collect(dense, IDS, batch=2)
    torch.testing.assert_close(
        teacher.kl(logits(student), slice(None)).double(), plain(dense, student), rtol=1e-4, atol=1e-6
    )
    assert float(teacher.kl(logits(dense), slice(None)).abs().max()) < 1e-6
    some = [3, 0]
    torch.testing.assert_close(teacher.kl(logits(student)[some], some), teacher.kl(logits(student), slice(None))[some])
    # A shorter student is held against the beginning of the rows.
    torch.testing.assert_close(
        teacher.kl(logits(student)[:, :4], slice(None)), teacher.kl(logits(student), slice(None))[:, :3]
    )


def test_few_tokens_at_a_time_change_nothing_also_backwards(dense, student, monkeypatch):
    teacher = Teacher.collect(dense, IDS)
    found = []
    for at_once in (teachers.AT_ONCE, 3 * families.VOCAB):
        monkeypatch.setattr(teachers, "AT_ONCE", at_once)
        own = logits(student).requires_grad_()
        values = teacher.kl(own, slice(None))
        values.sum().backward()
        found.append((values.detach(), own.grad))
    torch.testing.assert_close(found[0], found[1], rtol=0, atol=0)
    own = logits(student)
    wanted = functional.softmax(own[:, :-1], -1) - functional.softmax(logits(dense)[:, :-1], -1)
    torch.testing.assert_close(found[0][1][:, :-1], wanted, rtol=1e-4, atol=1e-6)
    assert not found[0][1][:, -1].any()  # the last position predicts a token that is not there


def test_the_largest_logits_are_renormalised_on_both_sides(dense, student):
    teacher = Teacher.collect(dense, IDS, top=7)
    said, chosen = logits(dense)[:, :-1].topk(7)
    p = functional.log_softmax(said, -1)
    q = functional.log_softmax(logits(student)[:, :-1].gather(2, chosen), -1)
    torch.testing.assert_close(
        teacher.kl(logits(student), slice(None)), (p.exp() * (p - q)).sum(-1), rtol=1e-4, atol=1e-6
    )
    known = teacher.log_probabilities(slice(None))
    assert known.shape == (5, 8, families.VOCAB)
    torch.testing.assert_close(known.exp().sum(-1), torch.ones(5, 8))
    assert torch.equal(known.isfinite().sum(-1), torch.full((5, 8), 7))
    full = Teacher.collect(dense, IDS, top=families.VOCAB)
    assert full.top is None
    torch.testing.assert_close(full.log_probabilities([2])[0], functional.log_softmax(logits(dense)[2, :-1], -1))


def test_half_precision_is_fine_where_the_probability_lies(dense, student, monkeypatch):
    monkeypatch.setattr(teachers, "SMALL", 0)
    teacher = Teacher.collect(dense, IDS)
    assert teacher._said(0, 0, 1)[0].dtype == torch.float16
    torch.testing.assert_close(
        teacher.kl(logits(student), slice(None)).double(), plain(dense, student), rtol=2e-3, atol=2e-5
    )


def test_tokens_that_both_rule_out_are_no_nan():
    class Fixed(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = torch.nn.Parameter(torch.zeros(()))

        def forward(self, input_ids, use_cache):
            row = torch.tensor([0.0, 1.0, -math.inf, 70000.0])
            return type("Output", (), {"logits": row.expand(*input_ids.shape, 4)})()

    ids = torch.ones(1, 3, dtype=torch.long)
    teacher = Teacher.collect(Fixed(), ids)
    assert torch.equal(teacher.kl(Fixed()(ids, use_cache=False).logits, slice(None)), torch.zeros(1, 2))


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_counts_for_nothing(dense, student, side):
    mask = torch.ones_like(IDS)
    mask[0, : 3 if side == "left" else None] = 0
    if side == "right":
        mask[0] = 1
        mask[0, -3:] = 0
    teacher = Teacher.collect(dense, IDS, mask)
    values = teacher.kl(logits(student, mask=mask), slice(None))
    counted = teacher.counts(slice(None))
    assert int(counted.sum()) == 4 * 8 + 5
    assert not values[~counted].any()
    mean = float(values.double()[counted].mean())
    assert fitness(student, teacher, IDS, slice(None)) == pytest.approx(mean, rel=1e-5)
    other = IDS.clone()
    other[mask == 0] = 5
    assert fitness(student, Teacher.collect(dense, other, mask), other, slice(None)) == pytest.approx(mean, rel=1e-4)


def test_fitness_is_a_mean_over_predictions_with_a_last_row_cut(dense, student):
    teacher = Teacher.collect(dense, IDS)
    values = teacher.kl(logits(student), slice(None)).double()
    got = fitness(student, teacher, IDS, [4, 1, 2], batch=2, last=4)
    assert got == pytest.approx(float(torch.cat([values[4], values[1], values[2, :3]]).mean()), rel=1e-5)
    own = functional.log_softmax(logits(student)[:, :-1].double(), -1).gather(2, IDS[:, 1:, None])
    assert fitness(student, None, IDS, slice(None), "ppl") == pytest.approx(math.exp(-float(own.mean())), rel=1e-5)
    assert fitness(dense, teacher, IDS, slice(None)) < 1e-6  # sparsity 0 gives KL 0 within rounding
    with pytest.raises(UsageError, match="needs a teacher"):
        fitness(student, None, IDS, [0])


def test_a_folder_is_taken_up_again_and_refused_to_others(dense, student, tmp_path):
    there = tmp_path / "teacher"

    def stop(done, total, text):
        if done == 4:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        Teacher.collect(dense, IDS, batch=2, folder=there, progress=stop)
    written = sorted(there.glob("*.safetensors"))
    assert [file.name for file in written] == ["logits-00000.safetensors", "logits-00001.safetensors"]
    before = [file.stat().st_mtime_ns for file in written]
    teacher = Teacher.collect(dense, IDS, batch=2, folder=there)
    assert [file.stat().st_mtime_ns for file in written] == before
    memory = Teacher.collect(dense, IDS, batch=2)
    assert torch.equal(teacher.log_probabilities(slice(None)), memory.log_probabilities(slice(None)))
    for other in ((student, IDS), (dense, IDS.flip(0))):
        with pytest.raises(OutputError, match="another"):
            Teacher.collect(*other, batch=2, folder=there)
    with pytest.raises(OutputError, match="another"):
        Teacher.collect(dense, IDS, batch=2, top=3, folder=there)


def test_what_does_not_fit_is_refused(dense):
    teacher = Teacher.collect(dense, IDS)
    with pytest.raises(UsageError, match="logits of shape"):
        teacher.kl(logits(dense)[:2], slice(None))
    with pytest.raises(UsageError, match="one vocabulary"):
        teacher.kl(logits(dense)[..., :-1], slice(None))
    with pytest.raises(BudgetError, match="top=1"):
        Teacher.collect(dense, IDS, top=0)
    with pytest.raises(UsageError, match="two tokens"):
        Teacher.collect(dense, IDS[:, :1])
    assert real_predictions(IDS, None).all()
