"""Concept depth: the card's checks."""

from __future__ import annotations

import json

import families
import pytest
import torch

from paredown.core import calibration, checkpoint, surgery
from paredown.core.checkpoint import Model
from paredown.core.compression import observed
from paredown.core.edits import DropBlock
from paredown.core.looking.labelled import Labelled
from paredown.core.looking.readout import Vectors
from paredown.errors import DataError
from paredown.methods.analysis.concept_depth import ConceptDepth, rounded


def batch(rows: int = 24, length: int = 24) -> calibration.Batch:
    ids = torch.randint(3, 90, (rows, length), generator=torch.Generator().manual_seed(1))
    return calibration.Batch(ids, None, "random", "", 0, rows)


def planted(model: Model, block: int) -> Labelled:
    """Let a block write, along one direction, whether the row begins with a large token; no other block looks back."""
    count = 200
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(3, 90, (count, 6), generator=generator)
    labels = torch.randint(0, 2, (count,), generator=generator)
    direction = torch.randn(32, generator=generator) * 3

    def write(_, __, output):
        hidden = output[0] if isinstance(output, tuple) else output
        rows = state["done"], state["done"] + len(hidden)
        state["done"] = rows[1] % count
        signs = (2 * labels[rows[0] : rows[1]] - 1).float()
        added = hidden + signs[:, None, None] * direction
        return (added, *output[1:]) if isinstance(output, tuple) else added

    state = {"done": 0}
    model.hf.get_submodule(model.anatomy.language.blocks[block].path).register_forward_hook(write)
    return Labelled(ids, None, torch.full((count, 1), 5), labels, ("no", "yes"))


@pytest.mark.parametrize("block", [0, 1, 3])
def test_a_planted_concept_is_found_where_it_was_planted(block, monkeypatch):
    """Card: accuracy is chance before block k and 1 from there on; d = k exactly."""
    model = Model.of(families.gemma3())
    examples = planted(model, block)
    monkeypatch.setattr(ConceptDepth, "examples", lambda *_: examples)
    found = ConceptDepth().measure(model, None)
    curve = [row["accuracy"] for row in found[1:]]
    assert all(value < 0.7 for value in curve[:block])
    assert all(value > 0.97 for value in curve[block:])
    assert (found[0]["depth"], found[0]["depth_low"], found[0]["depth_high"]) == (block + 1,) * 3
    if block:
        assert found[0]["jumping"] == (block + 1) / 4
    # The norm before the MLP lies inside the block, before the concept is written.
    inner = ConceptDepth(where="norm").measure(model, None)
    assert inner[block + 1]["accuracy"] < 0.7
    if block < 3:
        assert inner[0]["depth"] == block + 2


def test_shuffled_labels_are_read_by_nobody():
    """Card: accuracy within sampling error of one half at all layers (leakage test)."""
    model = Model.of(families.llama())
    method = ConceptDepth()
    examples = method.examples(model, batch(60))
    order = torch.randperm(len(examples.labels), generator=torch.Generator().manual_seed(3))
    shuffled = Labelled(examples.ids, None, examples.positions, examples.labels[order], examples.names)
    probes, held = method.learn(model, shuffled)
    chance = max(float(shuffled.labels[held].float().mean()), 1 - float(shuffled.labels[held].float().mean()))
    error = 0.5 / int(held.sum()) ** 0.5
    for _, scores, labels in probes:
        assert float(((scores > 0) == (labels == 1)).float().mean()) < chance + 3 * error


def vectors(model: Model, ids, mask, positions, where="stream"):
    data = calibration.Batch(ids, mask, "x", "", 0, len(ids))
    blocks = [block.index for block in model.anatomy.language.blocks]
    found = observed(ConceptDepth(), model, data, blocks, lambda _: [Vectors(positions, where)])
    return [seen["vectors"] for _, seen in found]


@pytest.mark.parametrize("family", ["llama", "mistral", "gpt_neox", "qwen3_moe_mixed"])
def test_vectors_are_those_of_the_models_hidden_states(family):
    """Card: z from hooks == z from one forward with output_hidden_states, for the stream."""
    model = Model.of(families.FAMILIES[family]())
    ids = batch(3).input_ids
    positions = torch.tensor([[4, 23], [0, 7], [22, 3]])
    with torch.no_grad():
        states = model.hf(input_ids=ids, output_hidden_states=True).hidden_states
    for found, state in zip(vectors(model, ids, None, positions)[:-1], states[1:-1], strict=True):
        wanted = torch.stack([state[r, t] for r, places in enumerate(positions) for t in places])
        assert torch.allclose(found, wanted, atol=1e-5)


def test_neither_padding_nor_batches_change_a_vector(monkeypatch):
    """Card: right against left padding and batch 1 against 8, identical to 1e-5."""
    model = Model.of(families.qwen3())
    lengths = [5, 9, 12, 7, 3, 12, 10, 8]
    right, left = torch.zeros(8, 12).long(), torch.zeros(8, 12).long()
    masks = [torch.zeros_like(right), torch.zeros_like(right)]
    alone = []
    for i, n in enumerate(lengths):
        row = torch.randint(3, 90, (n,), generator=torch.Generator().manual_seed(i))
        right[i, :n], left[i, 12 - n :] = row, row
        masks[0][i, :n], masks[1][i, 12 - n :] = 1, 1
        alone.append(vectors(model, row[None], None, torch.tensor([[n - 1]])))
    ends = torch.tensor(lengths)[:, None] - 1
    one, other = vectors(model, right, masks[0], ends), vectors(model, left, masks[1], torch.full((8, 1), 11))
    monkeypatch.setattr("paredown.core.compression.TOKENS_AT_ONCE", 24)
    few = vectors(model, right, masks[0], ends)
    for layer in range(3):
        single = torch.cat([found[layer] for found in alone])
        for found in (one, other, few):
            assert torch.allclose(found[layer], single, atol=1e-5)


def test_the_norm_is_what_enters_the_mlp():
    model, seen = Model.of(families.llama()), []
    ids = batch(3).input_ids
    handle = model.hf.model.layers[1].post_attention_layernorm.register_forward_hook(lambda *a: seen.append(a[2]))
    with torch.no_grad():
        model.hf(input_ids=ids)
    handle.remove()
    found = vectors(model, ids, None, torch.full((3, 1), 9), "norm")[1]
    assert torch.allclose(found, seen[0][:, 9], atol=1e-6)


def test_a_model_cut_at_a_depth_reads_what_the_whole_one_reads_there_bit_by_bit():
    """Card: truncated model + probe reproduces the probe's accuracy on the full model's layer d."""
    whole, cut = Model.of(families.gemma3()), Model.of(families.gemma3())
    method = ConceptDepth(task="repeat")
    probes, held = method.learn(whole, method.examples(whole, batch()))
    cut.anatomy = surgery.apply_model(cut.hf, cut.anatomy, [DropBlock(layer=2), DropBlock(layer=3)])
    examples = method.examples(cut, batch())
    again, same = method.learn(cut, examples)
    assert len(again) == 2
    assert torch.equal(held, same)
    assert torch.equal(again[1][1], probes[1][1])
    z = vectors(cut, examples.ids, None, examples.positions)[1]
    assert torch.equal(probes[1][0].scores(z[held]), probes[1][1])


@pytest.mark.parametrize("family", ["llama", "phi", "mixtral", "deepseek_v3"])
def test_the_table_has_a_row_a_block_and_one_for_all(family):
    model = Model.of(families.FAMILIES[family]())
    before = {name: tensor.clone() for name, tensor in model.hf.state_dict().items()}
    method = ConceptDepth(noise=3, bits=8, draws=20, penalties=(10.0,))
    found = method.measure(model, batch())
    depth = len(model.anatomy.language.blocks)
    assert [row["layer"] for row in found] == ["all", *range(depth)]
    assert len({tuple(row) for row in found}) == 1
    assert json.loads(json.dumps(found)) == found
    whole = found[0]
    assert whole["keep"] == whole["depth"] / depth
    assert 0.5 <= whole["chance"] < 1
    assert whole["labels"] == ["a rare token follows", "a common token follows"]
    assert "does not mean" in whole["note"]
    assert all(0 <= row["accuracy_varied"] <= 1 for row in found)
    assert [row["accuracy"] for row in found] != [row["accuracy_varied"] for row in found]
    assert method.measure(model, batch()) == found
    assert all(torch.equal(before[name], tensor) for name, tensor in model.hf.state_dict().items())
    plain = ConceptDepth(draws=20, penalties=(10.0,)).measure(model, batch())
    assert [row["accuracy"] for row in plain] == [row["accuracy"] for row in found]
    assert plain[0]["depth_varied"] is None


def test_rounding_is_undone_also_after_an_error():
    model = Model.of(families.llama())
    weight = model.hf.model.layers[0].mlp.up_proj.weight.detach()
    before = weight.clone()
    with rounded(model, 8):
        assert 0 < float((weight - before).abs().max()) <= float(before.abs().max()) / 200
    with pytest.raises(ZeroDivisionError), rounded(model, 8):
        _ = 1 / 0
    assert torch.equal(weight, before)
    with rounded(model, 16):
        assert torch.equal(weight, before.bfloat16().float())


def test_it_needs_texts_of_some_kind(tmp_path):
    model = Model.of(families.llama())
    with pytest.raises(DataError, match="name a file with labels"):
        ConceptDepth().measure(model, None)
    with pytest.raises(DataError, match="no known type"):
        ConceptDepth(labels=str(tmp_path / "x.txt")).measure(model, None)


def test_labelled_texts_on_a_trained_model(tmp_path):
    """The last real token is what is read, whatever the lengths of texts: which of two words ends them."""
    model = checkpoint.load("testbed:lm")
    texts = calibration.read(None, model_ref="testbed:lm", split="calibration").texts
    file = tmp_path / "words.jsonl"
    with file.open("w", encoding="utf-8") as out:
        for i, text in enumerate(texts):
            words = text.split()[: 4 + i % 7]
            out.write(json.dumps({"text": " ".join([*words, ("he", "she")[i % 2]]), "label": ("m", "f")[i % 2]}) + "\n")
    found = ConceptDepth(labels=str(file), longest=64, draws=50).measure(model, None)
    assert found[0]["labels"] == ["f", "m"]
    assert found[0]["examples"] == len(texts)
    assert found[1]["accuracy"] == found[1]["f1"] == found[1]["auc"] == 1
    assert (found[0]["depth"], found[0]["depth_low"], found[0]["depth_high"]) == (1, 1, 1)
    assert not ConceptDepth(labels=str(file)).reads_data
    assert ConceptDepth().reads_data
