"""Linear readouts by their own definitions, and labelled texts from files and from data."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch

from paredown.core.calibration import Batch
from paredown.core.looking import labelled, readout
from paredown.errors import DataError


def data(count: int = 200, width: int = 5, seed: int = 0):
    generator = torch.Generator().manual_seed(seed)
    z = torch.randn(count, width, generator=generator)
    labels = (z[:, 0] + 0.5 * torch.randn(count, generator=generator) > 0).long()
    return z, labels


@pytest.mark.parametrize("standardise", [False, True])
def test_the_fit_is_the_minimum_of_its_objective(standardise):
    z, labels = data()
    probe = readout.fit(z, labels, 3.0, standardise=standardise)
    x = (z.double() - probe.mean) / probe.scale
    if standardise:
        assert torch.allclose(x.std(0, correction=0), torch.ones(5).double())
    else:
        assert torch.equal(x, z.double())
    # The gradient of sum of losses + penalty / 2 |w|^2 is zero; that of the bias has no penalty.
    off = torch.sigmoid(x @ probe.weight + probe.bias) - labels.double()
    assert (x.T @ off + 3.0 * probe.weight).abs().max() < 1e-4
    assert abs(float(off.sum())) < 1e-4
    again = readout.fit(z, labels, 3.0, standardise=standardise)
    assert torch.equal(again.weight, probe.weight)


def test_features_on_another_scale_make_no_difference_once_standardised():
    z, labels = data()
    scaled = z * torch.tensor([1e3, 1e-3, 1, 10, 0.1]) + 7
    one, other = (readout.fit(v, labels, 1.0).scores(v) for v in (z, scaled))
    assert torch.allclose(one, other, atol=1e-3)
    constant = torch.cat([z, torch.full((200, 1), 5.0)], 1)
    assert readout.fit(constant, labels, 1.0).scores(constant).isfinite().all()


def test_numbers_by_hand():
    scores, labels = torch.tensor([2.0, -1.0, 0.5, -3.0, 0.5]), torch.tensor([1, 1, 0, 0, 1])
    assert readout.accuracy(scores, labels) == pytest.approx(3 / 5)
    assert readout.f1(scores, labels) == pytest.approx(2 * 2 / (3 + 3))
    pairs = [(a > b) + 0.5 * (a == b) for a in (2.0, -1.0, 0.5) for b in (0.5, -3.0)]
    assert readout.auc(scores, labels) == pytest.approx(np.mean(pairs))
    assert readout.f1(-scores.abs(), labels) == 0


def test_points_of_curves_made_by_hand():
    """Card: step curve, flat curve, slow ramp."""
    step = [0.5, 0.5, 0.5, 0.9, 0.9, 0.9, 0.9, 0.9]
    assert readout.jumping(step) == 4 / 8
    assert readout.converging(step) == 5 / 8
    assert readout.depth(step, 0.01) == 4
    flat = [0.8] * 5
    assert readout.jumping(flat) is None
    assert readout.converging(flat) == 1 / 5
    assert readout.depth(flat, 0.01) == 1
    ramp = [0.5 + 0.02 * i for i in range(10)]
    assert readout.jumping(ramp) is None
    assert readout.depth(ramp, 0.01) == 10
    # 0.54 / 0.52 is the first, 0.66 / 0.64 the last of 3 % or more: behind block 9.
    assert readout.converging(ramp) == 1.0
    assert readout.converging([0.5, 0.6, 0.5]) == 1.0


def test_the_interval_of_a_depth_covers_what_chance_allows():
    generator = torch.Generator().manual_seed(0)
    sure = torch.tensor([[0, 0, 1, 1]] * 2 + [[1, 1, 1, 1]] * 2).bool().repeat(1, 20)
    assert readout.depth_interval(sure, torch.arange(80), 0.01, 200, generator) == [3, 3]
    near = torch.rand(6, 80, generator=generator) < torch.tensor([0.5, 0.8, 0.81, 0.82, 0.82, 0.82])[:, None]
    low, high = readout.depth_interval(near, torch.arange(80), 0.01, 200, generator)
    assert 2 <= low < high <= 6


def test_rows_stay_on_one_side_and_single_texts_keep_their_shares():
    generator = torch.Generator().manual_seed(0)
    labels = torch.tensor([0, 1] * 30)
    groups = torch.arange(20).repeat_interleave(3)
    train = readout.divide(labels, groups, 0.6, generator)
    assert int(train.sum()) == 36
    assert all(len(set(train[groups == g].tolist())) == 1 for g in range(20))
    rare = torch.tensor([1] * 10 + [0] * 50)
    train = readout.divide(rare, torch.arange(60), 0.6, generator)
    assert (int(train[rare == 1].sum()), int(train[rare == 0].sum())) == (6, 30)
    with pytest.raises(DataError, match="both labels"):
        readout.divide(torch.tensor([1] + [0] * 9), torch.arange(10), 0.6, generator)


def test_the_penalty_is_chosen_inside_the_training_part():
    z, labels = data(80, 60)
    chosen = readout.search(z, labels, torch.arange(80), (1e-3, 1e3)).penalty
    assert chosen == 1e3
    easy, sure = data(400, 2)[0], None
    sure = (easy[:, 0] > 0).long()
    assert readout.search(easy, sure, torch.arange(400), (1e-3, 1e3)).penalty == 1e-3
    assert readout.search(z, labels, torch.arange(80), (2.0,)).penalty == 2.0


def rows(ids) -> Batch:
    return Batch(ids, None, "x", "", 0, len(ids))


def test_tasks_that_data_answer_themselves():
    ids = torch.randint(0, 12, (6, 40), generator=torch.Generator().manual_seed(0))
    ids[:, ::2] = 3
    for task in ("next", "repeat"):
        found = labelled.derive(rows(ids), task, 5, torch.Generator().manual_seed(1))
        assert found.positions.shape == (6, 5)
        assert int(found.positions.min()) >= 10
        assert int(found.positions.max()) <= 38
        assert torch.equal(found.groups, torch.arange(6).repeat_interleave(5))
        for (row, at), label in zip(
            [(r, int(t)) for r, places in enumerate(found.positions) for t in places], found.labels, strict=True
        ):
            if task == "next":
                assert int(label) == int(ids[row, at + 1] == 3)
            else:
                assert int(label) == int(ids[row, at] in ids[row, :at])
    assert labelled.derive(rows(ids), "next", 99, torch.Generator()).positions.shape == (6, 29)
    with pytest.raises(DataError, match="longer rows"):
        labelled.derive(rows(ids[:, :1]), "next", 5, torch.Generator())
    padded = Batch(ids, torch.zeros_like(ids), "x", "", 0, 6)
    with pytest.raises(DataError, match="padded rows"):
        labelled.derive(padded, "next", 5, torch.Generator())


def test_noise_stands_before_and_moves_what_is_asked():
    ids = torch.arange(5, 25).view(2, 10)
    examples = labelled.Labelled(ids, torch.ones_like(ids), torch.tensor([[3], [9]]), torch.tensor([0, 1]), ("a", "b"))
    found = labelled.with_noise(examples, 4, torch.Generator().manual_seed(0))
    assert torch.equal(found.ids[:, 4:], ids)
    assert torch.equal(found.ids.gather(1, found.positions), ids.gather(1, examples.positions))
    assert set(found.ids[:, :4].flatten().tolist()) <= set(range(5, 25))
    assert not torch.equal(found.ids[0, :4] + 10, found.ids[1, :4])


class Characters:
    """A tokenizer of characters."""

    def __call__(self, text, verbose=False):
        return {"input_ids": [ord(c) % 90 + 3 for c in text]}


def test_labelled_texts_from_files(tmp_path):
    told = [('good, "quoted"', "yes"), ("bad", "no"), ("longer than the others", "yes")]
    table, lines = tmp_path / "a.csv", tmp_path / "a.jsonl"
    table.write_text('text,label\n"good, ""quoted""",yes\nbad,no\nlonger than the others,yes\n', encoding="utf-8")
    lines.write_text("\n".join(json.dumps({"text": t, "label": n}) for t, n in told), encoding="utf-8")
    assert labelled.read(table) == labelled.read(lines) == told
    found = labelled.encode(Characters(), told, "Is it? {text}!", 12, "a.csv")
    assert found.names == ("no", "yes")
    assert found.labels.tolist() == [1, 0, 1]
    assert found.positions.flatten().tolist() == [11, 10, 11]
    assert int(found.ids[1, 10]) == ord("!") % 90 + 3
    assert found.mask.sum(1).tolist() == [12, 11, 12]
    left = torch.tensor([[0, 1, 1], [1, 1, 0]])
    assert labelled.last(left).flatten().tolist() == [2, 1]


@pytest.mark.parametrize(
    ("name", "text", "match"),
    [
        ("a.txt", "x", "no known type"),
        ("a.csv", "text,other\nx,1\n", "line 2"),
        ("a.jsonl", '{"text": "x", "label": 1}\nnot json\n', "line 2"),
        ("a.jsonl", '{"text": "", "label": 1}\n', "needs a text and a label"),
    ],
)
def test_files_that_will_not_do(tmp_path, name, text, match):
    file = tmp_path / name
    file.write_text(text, encoding="utf-8")
    with pytest.raises(DataError, match=match):
        labelled.read(file)
    with pytest.raises(DataError, match="cannot be read"):
        labelled.read(tmp_path / "none.csv")


def test_a_concept_has_two_labels():
    with pytest.raises(DataError, match="3 different labels"):
        labelled.encode(Characters(), [("a", "x"), ("b", "y"), ("c", "z")], "{text}", 5, "a.csv")
    with pytest.raises(DataError, match="must hold"):
        labelled.encode(Characters(), [("a", "x"), ("b", "y")], "text", 5, "a.csv")
    with pytest.raises(DataError, match="no tokenizer"):
        labelled.encode(None, [("a", "x"), ("b", "y")], "{text}", 5, "a.csv")
