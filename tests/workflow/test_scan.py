"""A scan finds the redundancy that was planted, and its numbers are those of plain hooks on the model in memory."""

from __future__ import annotations

import json
from collections import defaultdict
from pathlib import Path

import families
import numpy as np
import pytest
import torch
from transformers import PreTrainedModel

from paredown.core import surgery
from paredown.core.calibration import Batch
from paredown.core.checkpoint import Model
from paredown.core.edits import DropSublayer, KeepExpertNeurons
from paredown.core.sequential import OnDisk
from paredown.errors import DataError, OutputError
from paredown.workflow import scan as scan_module
from paredown.workflow.scan import scan
from paredown.workflow.scanned import ScanRecord
from paredown.workflow.views.base import budget, carrying
from paredown.workflow.views.spectrum import Spectrum, singular_values

ROWS, LENGTH = 5, 12
DEPTH = ("contribution", "skip-effect", "linear-term", "lens")


def tokens(rows: int = ROWS, length: int = LENGTH) -> Batch:
    ids = torch.randint(3, 90, (rows, length), generator=torch.Generator().manual_seed(1))
    return Batch(ids, None, "random", "none", 0, rows)


def saved(model: PreTrainedModel, folder: Path) -> Path:
    model.save_pretrained(folder)
    return folder


def rows(record: ScanRecord, name: str, part: str | None = None):
    view = record.view(name)
    assert view is not None, [one.name for one in record.views]
    return [row for row in view.rows if part is None or row.part == part]


def comparable(record: ScanRecord) -> dict:
    """All of a record but times and memory."""
    kept = record.model_dump(exclude={"created", "seconds", "seconds_by_stage", "peak_memory_bytes"})
    for view in kept["views"]:
        del view["seconds"]
    return kept


# ---- equal to brute force --------------------------------------------------------------------------------------------


class Taps:
    """Everything that enters and leaves some modules while the whole model runs once."""

    def __init__(self, model: PreTrainedModel, paths: list[str]) -> None:
        self.inputs: dict[str, tuple] = {}
        self.outputs: dict[str, torch.Tensor] = {}
        handles = [model.get_submodule(path).register_forward_hook(self._hook(path)) for path in paths]
        with torch.no_grad():
            model(input_ids=tokens().input_ids, use_cache=False)
        for handle in handles:
            handle.remove()

    def _hook(self, path: str):
        def hook(_, args, output):
            self.inputs[path] = args
            self.outputs[path] = output[0] if isinstance(output, tuple) else output

        return hook


def cosine(a: torch.Tensor, b: torch.Tensor) -> float:
    a, b = a.double().flatten(0, -2), b.double().flatten(0, -2)
    return float(np.mean([float(x @ y / (x.norm() * y.norm())) for x, y in zip(a, b, strict=True)]))


def levels(energy: np.ndarray) -> list[float]:
    ordered = np.sort(energy)[::-1]
    found = []
    for share in (0.5, 0.9, 0.99):
        count = 1
        while ordered[:count].sum() < share * ordered.sum() * (1 - 1e-9):
            count += 1
        found.append(count / len(ordered))
    return found


@pytest.fixture(scope="module")
def dense(tmp_path_factory):
    model = families.llama()
    return model, scan(saved(model, tmp_path_factory.mktemp("llama")), tokens())


@pytest.fixture(scope="module")
def sparse(tmp_path_factory):
    model = families.qwen2_moe()
    return model, scan(saved(model, tmp_path_factory.mktemp("moe")), tokens())


@pytest.mark.parametrize("kind", ["dense", "sparse"])
def test_the_stream_turns_as_much_as_between_the_norms(kind, request):
    model, record = request.getfixturevalue(kind)
    depth = range(model.config.num_hidden_layers)
    names = [f"model.layers.{i}{leaf}" for i in depth for leaf in ("", ".post_attention_layernorm")]
    taps = Taps(model, names)
    for i, row in enumerate(rows(record, "stream-similarity")):
        start, end = taps.inputs[f"model.layers.{i}"][0], taps.outputs[f"model.layers.{i}"]
        (middle,) = taps.inputs[f"model.layers.{i}.post_attention_layernorm"]
        assert row.values["attention"] == pytest.approx(cosine(start, middle), abs=1e-5)
        assert row.values["mlp"] == pytest.approx(cosine(middle, end), abs=1e-5)
        assert row.values["block"] == pytest.approx(cosine(start, end), abs=1e-5)


def test_neurons_of_a_dense_mlp(dense):
    model, record = dense
    taps = Taps(model, [f"model.layers.{i}.mlp.down_proj" for i in range(3)])
    for i, row in enumerate(rows(record, "neuron-energy", "MLP")):
        (inner,) = taps.inputs[f"model.layers.{i}.mlp.down_proj"]
        down = model.model.layers[i].mlp.down_proj.weight.detach()
        # Energy of each neuron's own contribution to the stream, vector by vector.
        added = inner.flatten(0, 1).unsqueeze(-1) * down.T
        energy = added.square().sum((0, 2)).double().numpy()
        assert [row.values[k] for k in ("half", "most", "nearly_all")] == pytest.approx(levels(energy), abs=1e-5)
        curve = np.cumsum(np.sort(energy)[::-1]) / energy.sum()
        assert row.series["curve"][4] == pytest.approx(curve[int(np.ceil(48 * 0.25)) - 1], rel=1e-4)
        assert row.series["curve"][-1] == pytest.approx(1)


def test_neurons_and_use_of_experts(sparse):
    model, record = sparse
    paths = [f"model.layers.{i}.mlp.{leaf}" for i in range(3) for leaf in ("experts", "shared_expert.down_proj")]
    paths += [f"model.layers.{i}.mlp.shared_expert_gate" for i in range(3)]
    taps = Taps(model, paths)
    for i, row in enumerate(rows(record, "expert-use")):
        experts = model.model.layers[i].mlp.experts
        hidden, index, weights = taps.inputs[f"model.layers.{i}.mlp.experts"]
        seen, mass = np.zeros(8), np.zeros(8)
        energy = np.zeros((8, experts.down_proj.shape[2]))
        first = []
        with torch.no_grad():
            for t in range(len(hidden)):
                first.append(float(weights[t].max() / weights[t].sum()))
                for e, w in zip(index[t].tolist(), weights[t].tolist(), strict=True):
                    seen[e] += 1
                    mass[e] += w
                    gate, up = (experts.gate_up_proj[e] @ hidden[t]).chunk(2)
                    phi = torch.nn.functional.silu(gate) * up * w
                    energy[e] += (phi.square() * experts.down_proj[e].square().sum(0)).double().numpy()
        assert row.series["tokens"] == pytest.approx(seen / seen.sum(), abs=1e-5)
        assert row.series["mass"] == pytest.approx(mass / mass.sum(), abs=1e-5)
        assert row.units["never"] == np.flatnonzero(seen == 0).tolist()
        assert row.values["confidence"] == pytest.approx(np.mean(first), abs=1e-5)
        load = seen[seen > 0] / seen.sum()
        assert row.values["entropy"] == pytest.approx(-(load * np.log(load)).sum() / np.log(8), abs=1e-5)
        assert row.values["for_90"] / 8 == levels(mass)[1]
        routed = rows(record, "neuron-energy", "routed experts")[i]
        found = [routed.values[k] for k in ("half", "most", "nearly_all")]
        assert found == pytest.approx(levels(energy.flatten()), abs=1e-5)
        assert routed.values["silent"] == (energy == 0).sum()
        shared = rows(record, "neuron-energy", "shared expert")[i]
        (inner,) = taps.inputs[f"model.layers.{i}.mlp.shared_expert.down_proj"]
        gate = torch.sigmoid(taps.outputs[f"model.layers.{i}.mlp.shared_expert_gate"])
        down = model.model.layers[i].mlp.shared_expert.down_proj.weight.detach()
        wanted = ((inner * gate).flatten(0, -2).square().sum(0) * down.square().sum(0)).double().numpy()
        found = [shared.values[k] for k in ("half", "most", "nearly_all")]
        assert found == pytest.approx(levels(wanted), abs=1e-5)


def test_heads_add_what_their_slices_of_the_output_projection_add(dense):
    model, record = dense
    taps = Taps(model, [f"model.layers.{i}.self_attn.o_proj" for i in range(3)])
    for i, row in enumerate(rows(record, "head-importance")):
        (inner,) = taps.inputs[f"model.layers.{i}.self_attn.o_proj"]
        weight = model.model.layers[i].self_attn.o_proj.weight.detach()
        energy = np.array(
            [float((inner[..., h * 8 : h * 8 + 8] @ weight[:, h * 8 : h * 8 + 8].T).square().sum()) for h in range(4)]
        )
        assert row.series["heads"] == pytest.approx(energy / energy.sum(), abs=1e-5)
        assert row.series["by_group"] == pytest.approx(energy.reshape(2, 2).sum(1) / energy.sum(), abs=1e-5)
        assert row.values["least"] == pytest.approx(min(energy / energy.sum()), abs=1e-5)


def test_spectra(dense):
    model, record = dense
    row = rows(record, "spectrum", "mlp.down_proj")[1]
    values = np.linalg.svd(model.model.layers[1].mlp.down_proj.weight.detach().double().numpy(), compute_uv=False)
    energy, share = values**2, values / values.sum()
    assert row.count == 32
    assert row.values["stable"] == pytest.approx(energy.sum() / energy[0], rel=1e-4)
    assert row.values["effective"] == pytest.approx(np.exp(-(share * np.log(share)).sum()), rel=1e-4)
    assert [row.values["rank_90"], row.values["rank_99"]] == pytest.approx(levels(energy)[1:], abs=1e-5)
    assert row.values["factors"] == pytest.approx(levels(energy)[2] * 32 * (32 + 48) / (32 * 48), rel=1e-4)
    assert {r.part for r in rows(record, "spectrum")} == {
        *(f"self_attn.{p}_proj" for p in "qkvo"),
        *(f"mlp.{p}_proj" for p in ("gate", "up", "down")),
    }


def test_singular_values_of_large_matrices_come_out_the_same(monkeypatch):
    low = torch.randn(40, 6, generator=torch.Generator().manual_seed(0))
    weight = low @ torch.randn(6, 25, generator=torch.Generator().manual_seed(1))
    direct = singular_values(weight)
    monkeypatch.setattr("paredown.workflow.views.spectrum.DIRECT", 8)
    for matrix in (weight, weight.T):
        assert singular_values(matrix)[:6] == pytest.approx(direct[:6], rel=1e-3)
        assert singular_values(matrix)[6:].max() == 0
    assert Spectrum()._numbers(torch.zeros(4, 4))["rank_99"] == 0


def test_similarity_of_experts_by_hand(sparse):
    model, record = sparse
    for i, row in enumerate(rows(record, "expert-similarity")):
        experts = model.model.layers[i].mlp.experts
        up, down = experts.gate_up_proj.detach().chunk(2, dim=1)[1], experts.down_proj.detach().transpose(1, 2)
        up, down = (t / t.norm(dim=-1, keepdim=True) for t in (up, down))
        best = np.full((8, 8), -2.0)
        for e in range(8):
            for f in set(range(8)) - {e}:
                pairs = (up[e] @ up[f].T + down[e] @ down[f].T) / 2
                best[e, f] = float(pairs.max(dim=1).values.mean())
        assert row.series["by_weights"] == pytest.approx(best.max(1), abs=1e-5)
        assert row.units["twin"] == best.argmax(1).tolist()


# ---- what was planted is found ---------------------------------------------------------------------------------------


def test_two_experts_that_differ_in_the_order_of_their_neurons_are_twins(tmp_path):
    model = families.qwen3_moe()
    experts = model.model.layers[1].mlp.experts
    with torch.no_grad():
        gate, up = experts.gate_up_proj[2].chunk(2)
        order = torch.randperm(len(gate), generator=torch.Generator().manual_seed(0))
        experts.gate_up_proj[5] = torch.cat([gate[order], up[order]])
        experts.down_proj[5] = experts.down_proj[2][:, order]
    record = scan(saved(model, tmp_path), tokens())
    row = rows(record, "expert-similarity")[1]
    for series, twins in (("by_weights", "twin"), ("by_output", "output_twin")):
        assert row.series[series][2] == pytest.approx(1, abs=1e-5)
        assert row.series[series][5] == pytest.approx(1, abs=1e-5)
        assert (row.units[twins][2], row.units[twins][5]) == (5, 2)
        assert max(v for e, v in enumerate(row.series[series]) if e not in (2, 5)) < 0.9
    assert max(rows(record, "expert-similarity")[0].series["by_weights"]) < 0.9
    view = record.view("expert-similarity")
    assert "experts 2 and 5 of layer 1" in view.reading
    # Layer 0 has no twins, so the same keep in every layer can be none below 1.
    assert view.suggests == []


def test_an_attention_that_adds_next_to_nothing(tmp_path):
    model = families.qwen3()
    with torch.no_grad():
        model.model.layers[1].self_attn.o_proj.weight.mul_(1e-4)
    record = scan(saved(model, tmp_path), tokens())
    similar = [row.values["attention"] for row in rows(record, "stream-similarity")]
    assert similar[1] > 0.99999
    assert max(similar[0], similar[2]) < 0.98
    view = record.view("stream-similarity")
    assert {s.unit: s.keep for s in view.suggests}["attention sub-layers"] == 0.67
    assert "llm-drop" in {method.name for method in view.methods}
    assert not any(method.name.startswith("random") for method in view.methods)
    # There are no experts here, so nothing that removes their neurons is offered.
    assert not any("expert" in method.unit for method in record.view("neuron-energy").methods)


def test_an_expert_that_the_router_never_chooses(tmp_path):
    model = families.deepseek_v3()
    gate = model.model.layers[2].mlp.gate
    with torch.no_grad():
        gate.e_score_correction_bias[3] = -100.0
    record = scan(saved(model, tmp_path), tokens())
    row = next(row for row in rows(record, "expert-use") if row.layer == 2)
    assert 3 in row.units["never"]
    assert row.series["mass"][3] == 0
    assert row.values["unseen"] == len(row.units["never"])
    routed = next(r for r in rows(record, "neuron-energy", "routed experts") if r.layer == 2)
    assert routed.values["silent"] >= 16
    offered = {method.name for method in record.view("neuron-energy").methods}
    assert "camera-p" in offered
    assert "never chosen" in record.view("expert-use").reading


def test_a_weight_of_low_rank_and_a_layer_of_few_neurons_and_heads(tmp_path):
    model = families.llama()
    with torch.no_grad():
        part = model.model.layers[0]
        first, second = torch.randn(48, 3), torch.randn(3, 32)
        part.mlp.up_proj.weight.copy_(first @ second)
        part.mlp.down_proj.weight[:, 6:] = 0
        part.self_attn.o_proj.weight[:, 16:] = 0
    record = scan(saved(model, tmp_path), tokens())
    low = rows(record, "spectrum", "mlp.up_proj")
    assert low[0].values["rank_99"] <= 3 / 32 < 0.5 < low[1].values["rank_99"]
    assert low[0].values["factors"] < 0.2
    assert low[0].values["effective"] < 3.2
    neurons = rows(record, "neuron-energy")
    assert neurons[0].values["nearly_all"] <= 6 / 48
    assert neurons[0].values["silent"] == 42
    heads = rows(record, "head-importance")[0]
    assert heads.series["heads"][2:] == [0, 0]
    assert heads.values["groups_99"] == 1
    assert rows(record, "head-importance")[1].values["groups_99"] == 2


# ---- every family, one block at a time -------------------------------------------------------------------------------


@pytest.mark.parametrize("family", families.FAMILIES)
def test_every_family_is_scanned(family, tmp_path):
    model = families.FAMILIES[family]()
    record = scan(saved(model, tmp_path), tokens())
    names = {view.name for view in record.views}
    wanted = {"spectrum"}
    if family not in families.ENCODERS:
        wanted |= {"stream-similarity", "neuron-energy", "head-importance", *DEPTH}
    if family in families.MOE:
        wanted |= {"expert-use", "expert-similarity", "expert-coactivation", "expert-linkage"}
    assert names == wanted
    assert record.parameters == sum(p.numel() for p in model.parameters())
    assert ScanRecord.model_validate_json(record.model_dump_json()) == record
    for view in record.views:
        keys = {kind: {c.key for c in view.columns if c.kind == kind} for kind in ("value", "series", "units")}
        for row in view.rows:
            assert set(row.values) == keys["value"]
            assert set(row.series) <= keys["series"]
            assert set(row.units) <= keys["units"]
        assert view.reading
        assert all(0 < s.keep < 1 for s in view.suggests)
    for name, series in (("expert-use", ("mass", "tokens")), ("head-importance", ("heads", "by_group"))):
        for row in rows(record, name) if name in names else ():
            for key in series:
                assert sum(row.series[key]) == pytest.approx(1, abs=1e-4)
    if family in families.ENCODERS:
        assert any("weights" in note for note in record.notes)
    if family in families.VLMS:
        assert {row.tower for row in rows(record, "spectrum")} == {"language", "vision"}
        assert any("vision tower" in note for note in record.notes)


def test_one_block_is_in_memory_at_a_time(tmp_path, monkeypatch):
    resident: list[list[int]] = []

    class Watching(OnDisk):
        def open(self, index):
            view = super().open(index)
            blocks = self.model.anatomy.language.blocks
            hf = self.model.hf
            resident.append(
                [b.index for b in blocks if any(not p.is_meta for p in hf.get_submodule(b.path).parameters())]
            )
            return view

    monkeypatch.setattr(scan_module, "OnDisk", Watching)
    scan(saved(families.qwen3_moe_mixed(), tmp_path), tokens())
    assert resident == [[0], [1], [2], [3]]


def test_a_model_that_was_cut_is_scanned_again(tmp_path):
    model = Model.of(families.qwen3_moe())
    ragged = KeepExpertNeurons(layer=1, keep=[tuple(range(e + 1)) if e else () for e in range(8)])
    drops = [DropSublayer(layer=0, part="attention"), DropSublayer(layer=2, part="mlp")]
    surgery.apply_model(model.hf, model.anatomy, [ragged, *drops])
    record = scan(saved(model.hf, tmp_path), tokens())
    similar = rows(record, "stream-similarity")
    assert similar[0].values["attention"] is None
    assert similar[0].values["mlp"] == similar[0].values["block"]
    assert similar[2].values["mlp"] is None
    assert [row.layer for row in rows(record, "head-importance")] == [1, 2]
    assert [row.layer for row in rows(record, "expert-use")] == [0, 1]
    assert [row.layer for row in rows(record, "neuron-energy")] == [0]
    assert any("unequal widths" in note for note in record.view("neuron-energy").notes)
    alike = rows(record, "expert-similarity")[1]
    assert alike.series["by_weights"][0] == alike.series["by_output"][0] == 0
    assert min(alike.series["by_weights"][1:]) > 0


def test_a_scan_gives_the_same_numbers_again(tmp_path, sparse):
    model, record = sparse
    again = scan(saved(model, tmp_path), tokens())
    first, second = comparable(record), comparable(again)
    first["model"] = second["model"] = ""
    assert first == second


def test_padding_counts_for_nothing(tmp_path):
    folder = saved(families.qwen3_moe(), tmp_path)
    plain = tokens()
    ids = torch.cat([plain.input_ids, torch.full((ROWS, 4), 7)], 1)
    mask = torch.cat([torch.ones(ROWS, LENGTH), torch.zeros(ROWS, 4)], 1).long()
    padded = scan(folder, Batch(ids, mask, "random", "none", 0, ROWS))
    record = scan(folder, plain)
    for name in ("expert-use", "stream-similarity", "head-importance", "neuron-energy", "contribution", "skip-effect"):
        for one, other in zip(rows(record, name), rows(padded, name), strict=True):
            assert one.values == pytest.approx(other.values, abs=1e-4)
            for key, series in one.series.items():
                assert series == pytest.approx(other.series[key], abs=1e-4)


# ---- data and files --------------------------------------------------------------------------------------------------


def test_without_data_the_weights_are_still_looked_at(tmp_path):
    record = scan(saved(families.mixtral(), tmp_path))
    assert [view.name for view in record.views] == ["expert-similarity", "expert-linkage", "spectrum"]
    assert record.data == {}
    assert any("--data" in note for note in record.notes)
    row = rows(record, "expert-similarity")[0]
    assert row.values["output_twins"] is None
    assert row.values["twins"] > 0
    assert "by_output" not in row.series


def test_data_without_a_tokenizer_is_told(tmp_path):
    texts = tmp_path / "texts.txt"
    texts.write_text("some words " * 200, encoding="utf-8")
    with pytest.raises(DataError, match="no tokenizer"):
        scan(saved(families.llama(), tmp_path / "model"), texts)


def test_scan_json_and_page_are_written_once(tmp_path):
    folder, out = saved(families.llama(), tmp_path / "model"), tmp_path / "new" / "scan"
    record = scan(folder, tokens(), out=out)
    assert sorted(file.name for file in out.iterdir()) == ["scan.html", "scan.json"]
    assert ScanRecord.model_validate(json.loads((out / "scan.json").read_text(encoding="utf-8"))) == record
    assert (out / "scan.html").read_text(encoding="utf-8").startswith("<!DOCTYPE html>")
    with pytest.raises(OutputError, match="already"):
        scan(folder, tokens(), out=out)
    with pytest.raises(OutputError, match="not a folder"):
        scan(folder, tokens(), out=folder / "config.json")


def test_progress_goes_up_to_the_end(tmp_path):
    told: list[tuple[int, int]] = []
    scan(saved(families.internvl(), tmp_path), tokens(), progress=lambda done, total, _: told.append((done, total)))
    assert told == [(i, 5) for i in range(6)]


def test_carrying_and_budgets():
    assert carrying(torch.tensor([1.0, 1.0, 1.0, 1.0]), 0.5) == 2
    assert carrying(torch.tensor([0.0, 9.0, 1.0]), 0.9) == 1
    assert carrying(torch.tensor([0.0, 8.9, 1.1]), 0.9) == 2
    assert carrying(torch.zeros(3), 0.9) == 0
    counts = defaultdict(int)
    for kept in range(1, 65):
        counts[budget(kept / 64) * 64 >= kept] += 1
    assert dict(counts) == {True: 64}
