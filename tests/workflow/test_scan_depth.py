"""Views of depth: what was planted is found, numbers are those of the model in memory, and nothing else changes."""

from __future__ import annotations

from pathlib import Path

import families
import pytest
import torch
from transformers import PreTrainedModel

from paredown import registry
from paredown.core.calibration import Batch
from paredown.core.checkpoint import Model
from paredown.core.depth.gates import gated
from paredown.core.sequential import OnDisk
from paredown.errors import ArchitectureError
from paredown.report import scanned, scanpage
from paredown.workflow import scan as scan_module
from paredown.workflow.scan import scan
from paredown.workflow.scanned import ScanRecord

VIEWS = ("contribution", "skip-effect", "linear-term", "lens")


def tokens(rows: int = 6, length: int = 16) -> Batch:
    ids = torch.randint(3, 90, (rows, length), generator=torch.Generator().manual_seed(1))
    return Batch(ids, None, "random", "none", 0, rows)


def saved(model: PreTrainedModel, folder: Path) -> Path:
    model.save_pretrained(folder)
    return folder


def rows(record: ScanRecord, name: str):
    view = record.view(name)
    assert view is not None, [one.name for one in record.views]
    return view.rows


@pytest.fixture(autouse=True)
def _all_rows(monkeypatch):
    """Let four rows walk, whatever that costs beside so few data."""
    monkeypatch.setattr(scan_module, "WALK_SHARE", 100.0)


@pytest.mark.parametrize("family", ["llama", "phi", "gemma3", "qwen3_moe_mixed"])
def test_numbers_are_those_of_hooks_and_gates_on_the_model_in_memory(family, tmp_path):
    model = Model.of(families.FAMILIES[family]())
    record = scan(saved(model.hf, tmp_path), tokens())
    blocks = model.anatomy.language.blocks
    ids = tokens().input_ids[:4]
    entered, left = {}, {}

    def hook(index):
        def take(_, args, kwargs, output):
            entered[index] = args[0] if args else kwargs["hidden_states"]
            left[index] = output[0] if isinstance(output, tuple) else output

        return take

    handles = [model.hf.get_submodule(b.path).register_forward_hook(hook(b.index), with_kwargs=True) for b in blocks]
    clean = families.logits(model.hf, {"input_ids": ids}).log_softmax(-1)
    before, after = dict(entered), dict(left)
    for handle in handles:
        handle.remove()
    for block, row in zip(blocks, rows(record, "contribution"), strict=True):
        ratio = (after[block.index] - before[block.index]).norm(dim=-1) / before[block.index].norm(dim=-1)
        assert row.values["block"] == pytest.approx(float(ratio[:, 1:].mean()), rel=1e-4)
        assert row.values["high"] == pytest.approx(float(ratio[:, 1:].double().quantile(0.95)), rel=1e-4)
    # Bypassing the block by gates differs at the first token alone, which the scan leaves in place.
    for block, row in zip(blocks, rows(record, "skip-effect"), strict=True):
        factor = torch.zeros(1, ids.shape[1], 1)
        factor[:, 0] = 1
        with gated(model) as gates, torch.no_grad():
            gates.set({(block.index, "block"): factor})
            other = model.hf(input_ids=ids, use_cache=False).logits.log_softmax(-1)
        divergence = (clean.exp() * (clean - other)).sum(-1)[:, 1:].mean()
        assert row.values["output"] == pytest.approx(float(divergence), rel=1e-3, abs=1e-6)
        assert row.series["effects"][: block.index] == [0] * block.index
    lens = rows(record, "lens")
    assert lens[-1].values["divergence"] == 0
    assert lens[-1].values["top5"] == 1
    assert all(0 <= row.values["concept"] <= 1 for row in lens)
    runs = rows(record, "linear-term")
    assert [row.layer for row in runs] == list(range(len(blocks) - 1))
    assert len(runs[0].series["second_by_length"]) == len(blocks) - 1


def test_a_block_that_adds_nothing_is_named_and_may_go(tmp_path):
    model = families.llama()
    with torch.no_grad():
        for part in (model.model.layers[1].self_attn.o_proj, model.model.layers[1].mlp.down_proj):
            part.weight.zero_()
            part.bias.zero_()
    record = scan(saved(model, tmp_path), tokens())
    assert rows(record, "contribution")[1].values["block"] == 0
    assert "1 (0)" in record.view("contribution").reading
    skip = rows(record, "skip-effect")
    assert skip[1].values["output"] == skip[1].values["later"] == skip[1].values["direct"] == 0
    assert skip[0].values["output"] > 0
    view = record.view("skip-effect")
    assert {(s.unit, s.keep) for s in view.suggests} == {("blocks", 0.67)}
    assert rows(record, "linear-term")[1].values["second"] == 0
    assert rows(record, "lens")[1].values["divergence"] == rows(record, "lens")[0].values["divergence"]


def test_methods_that_act_come_from_the_registry(tmp_path):
    record = scan(saved(families.qwen3(), tmp_path), tokens())
    known = {entry.name: entry for entry in registry.entries()}
    for name in VIEWS:
        acting = record.view(name).methods
        assert acting
        for method in acting:
            assert not known[method.name].control
            assert known[method.name].kind != "probe"
    assert "llm-drop-blocks" in {method.name for method in record.view("skip-effect").methods}


def test_few_rows_walk_where_the_model_is_deep(tmp_path, monkeypatch):
    folder = saved(families.qwen3(), tmp_path)
    monkeypatch.setattr(scan_module, "WALK_SHARE", 0.25)
    monkeypatch.setattr(scan_module, "WALK_LENGTH", 8)
    record = scan(folder, tokens(8, 16))
    (told,) = {note for name in VIEWS for note in record.view(name).notes if "passes" in note}
    # 0.25 * 8 * 16 / (3 blocks * 8 tokens) is one row.
    assert "1 x 8 tokens" in told
    assert "about 0.94 passes" in told
    assert "Of 7 tokens" in " ".join(record.view("lens").notes)


def test_a_family_that_cannot_be_taken_apart_is_scanned_without(tmp_path, monkeypatch):
    def refuse(self):
        raise ArchitectureError("this one cannot be taken apart.")

    monkeypatch.setattr("paredown.core.looking.walk.Step._check", refuse)
    record = scan(saved(families.llama(), tmp_path), tokens())
    assert any("Views of depth were left out" in note for note in record.notes)
    assert not any(record.view(name) for name in VIEWS)
    assert record.view("stream-similarity") is not None


def test_one_block_is_in_memory_while_rows_walk(tmp_path, monkeypatch):
    resident = []

    class Watching(OnDisk):
        def close(self, index):
            hf, blocks = self.model.hf, self.model.anatomy.language.blocks
            resident.append(
                [b.index for b in blocks if any(not p.is_meta for p in hf.get_submodule(b.path).parameters())]
            )
            super().close(index)

    monkeypatch.setattr(scan_module, "OnDisk", Watching)
    scan(saved(families.qwen3_moe_mixed(), tmp_path), tokens())
    assert resident == [[0], [1], [2], [3]]


def test_every_view_is_drawn(tmp_path):
    record = scan(saved(families.phi(), tmp_path), tokens())
    page = scanpage.render(record)
    for name in VIEWS:
        section = page.split(f'<section id="{name}">')[1].split("</section>")[0]
        assert section.count("<svg") >= len(rows(record, name))
        assert "nan" not in section
    text = "\n".join(scanned.lines(record))
    assert all(f"{name}: " in text for name in VIEWS)
