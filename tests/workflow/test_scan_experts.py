"""Scan views of experts that go together, and of those that the router cannot tell apart."""

from __future__ import annotations

from itertools import combinations
from pathlib import Path
from typing import Any

import families
import numpy as np
import pytest
import torch
from transformers import PreTrainedModel

from paredown.core.calibration import Batch
from paredown.workflow.scan import scan
from paredown.workflow.scanned import ScanRecord


def tokens() -> Batch:
    ids = torch.randint(3, 90, (6, 16), generator=torch.Generator().manual_seed(1))
    return Batch(ids, None, "random", "none", 0, 6)


def scanned(model: PreTrainedModel, folder: Path) -> ScanRecord:
    model.save_pretrained(folder)
    return scan(folder, tokens())


def rows(record: ScanRecord, name: str) -> list[Any]:
    view = record.view(name)
    assert view is not None
    return view.rows


def test_experts_that_go_together_are_counted(tmp_path):
    model = families.qwen3_moe()
    record = scanned(model, tmp_path)
    chosen: list[Any] = []
    handles = [
        layer.mlp.gate.register_forward_hook(lambda _, __, out: chosen.append(out[2].tolist()))
        for layer in model.model.layers
    ]
    with torch.no_grad():
        model(input_ids=tokens().input_ids)
    for handle in handles:
        handle.remove()
    for row, picks in zip(rows(record, "expert-coactivation"), chosen, strict=True):
        together, seen = np.zeros((8, 8)), np.zeros(8)
        for pick in picks:
            for e in pick:
                seen[e] += 1
            for a, b in combinations(pick, 2):
                together[a, b] += 1
                together[b, a] += 1
        assert row.values["closest"] == pytest.approx(together.max() / len(picks), rel=1e-5)
        a, b = divmod(int(together.argmax()), 8)
        assert row.values["lift"] == pytest.approx(together[a, b] * len(picks) / (seen[a] * seen[b]), rel=1e-5)
        pairs = np.sort(together[np.triu_indices(8, 1)])[::-1]
        assert row.values["never"] == pytest.approx((pairs == 0).mean(), rel=1e-5)
        count = 1 + int((pairs.cumsum() < 0.9 * pairs.sum() - 1e-9).sum())
        assert row.values["pairs_90"] == pytest.approx(count / 28, rel=1e-5)
        assert row.series["with_partner"] == pytest.approx((together.max(1) / np.maximum(seen, 1)).tolist(), rel=1e-5)
        assert row.units["partner"] == together.argmax(1).tolist()


def test_experts_alike_to_the_router_are_found_and_one_threshold_spares_the_others(tmp_path):
    model = families.qwen3_moe()
    with torch.no_grad():
        router = model.model.layers[1].mlp.gate.weight
        router[3:] = router[3] + 0.01 * router[3:]
    record = scanned(model, tmp_path)
    view = record.view("expert-linkage")
    first, alike, last = rows(record, "expert-linkage")
    assert alike.values["near"] == 4
    assert alike.values["closest"] < 0.05 < 0.3 < first.values["closest"]
    assert alike.values["keeps_75"] == 4
    assert first.values["keeps_75"] + last.values["keeps_75"] == 14
    assert sum(row.values["keeps_50"] for row in (first, alike, last)) == 12
    assert alike.series["merges"] == sorted(alike.series["merges"])
    assert len(alike.series["merges"]) == 7
    assert "75 %" in view.reading
    # Every method that removes experts acts on it; none of them is a control.
    assert "dern" in {one.name for one in view.methods}
    assert not any(one.name.startswith("random") for one in view.methods)


def test_ties_are_told_and_no_number_is_made_up(tmp_path):
    model = families.mixtral()
    with torch.no_grad():
        for layer in model.model.layers:
            layer.mlp.gate.weight[:] = torch.eye(8, 32)
    record = scanned(model, tmp_path)
    view = record.view("expert-linkage")
    assert all(row.values["keeps_50"] is None for row in view.rows)
    assert any("Ties" in note for note in view.notes)
    assert view.suggests == []


def test_without_data_the_router_alone_is_looked_at(tmp_path):
    families.qwen2_moe().save_pretrained(tmp_path)
    names = {view.name for view in scan(tmp_path).views}
    assert "expert-linkage" in names
    assert "expert-coactivation" not in names
