"""CAMERA, as CAMERA-P and as a ranking: every check of its card."""

from __future__ import annotations

from typing import Any

import families
import matrix
import pytest
import torch
import torch.nn.functional as F

from paredown.core import energy, surgery
from paredown.core.edits import KeepExpertNeurons
from paredown.errors import ArchitectureError, BudgetError, DataError
from paredown.methods.experts.camera import CameraP, RandomNeurons
from paredown.methods.experts.camera_ranking import Camera

FAMILIES = ("mixtral", "qwen2_moe", "qwen3_moe", "deepseek_v3")


def entering(model: Any, layer: int, ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return what enters and what leaves a layer's experts part in a plain forward, ``[tokens, H]``."""
    block = model.anatomy.language.blocks[layer]
    seen = {}

    def hook(_: Any, args: Any, output: Any) -> None:
        seen["x"], seen["y"] = args[0].flatten(0, -2), output.flatten(0, -2)

    handle = model.hf.get_submodule(f"{block.path}.{block.experts.path}").register_forward_hook(hook)
    with torch.no_grad():
        model.hf(input_ids=ids)
    handle.remove()
    return seen["x"], seen["y"]


@torch.no_grad()
def micro(model: Any, layer: int, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return every micro-expert's ``phi [tokens, n]`` and ``down [n, H]``, by the card's formula; the shared first."""
    block = model.anatomy.language.blocks[layer]
    part = block.experts
    module = model.hf.get_submodule(block.path)
    experts = module.get_submodule(part.experts)
    _, weights, index = module.get_submodule(part.router)(x)
    applied = torch.zeros(len(x), part.count).scatter_(1, index, weights.float())
    phi, down = [], []
    if part.shared is not None:
        gate, up = (module.get_submodule(p).weight for p in (part.shared.gate, part.shared.up))
        scale = torch.sigmoid(module.get_submodule(part.shared_gate)(x)) if part.shared_gate else torch.ones(len(x), 1)
        phi.append(scale * F.silu(x @ gate.T) * (x @ up.T))
        down.append(module.get_submodule(part.shared.down).weight.T)
    for e in range(part.count):
        gate, up = experts.gate_up_proj[e].chunk(2)
        phi.append(applied[:, e : e + 1] * F.silu(x @ gate.T) * (x @ up.T))
        down.append(experts.down_proj[e].T)
    return torch.cat(phi, 1), torch.cat(down)


def layer_of(family: str) -> int:
    """The first layer with experts."""
    return next(b.index for b in matrix.anatomy(family).language.blocks if b.experts)


def scored(family: str, peak_share: float) -> tuple[Any, torch.Tensor]:
    """The first expert layer's energies as the method takes them, the shared expert first, flat."""
    model = matrix.model(family)
    found, _ = matrix.scores(CameraP(keep=0.99, form="ragged", peak_share=peak_share), model, matrix.batch())
    scores = found[layer_of(family)]
    return scores, torch.cat([*([scores["shared"]] if "shared" in scores else []), scores["score"].flatten()])


@pytest.mark.parametrize("family", FAMILIES)
def test_micro_experts_add_up_to_the_layer(family):
    """With the routing weight really applied, renormalised or not; shared experts included."""
    model, layer = matrix.model(family), layer_of(family)
    x, y = entering(model, layer, matrix.batch().input_ids)
    phi, down = micro(model, layer, x)
    torch.testing.assert_close(phi @ down, y, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("peak_share", [0.0, 0.9, 1.0])
def test_the_energy_is_the_formula(family, peak_share):
    model, layer = matrix.model(family), layer_of(family)
    x, _ = entering(model, layer, matrix.batch().input_ids)
    phi, down = micro(model, layer, x)
    squares = phi.double().square()
    wanted = ((1 - peak_share) * squares.sum(0) + peak_share * squares.amax(0)) * down.double().square().sum(1)
    _, found = scored(family, peak_share)
    torch.testing.assert_close(found.double(), wanted, atol=1e-7 * float(wanted.max()), rtol=1e-4)


@pytest.mark.parametrize("family", ["qwen3_moe", "qwen2_moe"])
def test_energy_is_the_change_of_the_layer_when_one_neuron_is_zeroed(family):
    """Brute force, a = 0: the squared Frobenius norm of the change of the real layer's output."""
    model, layer = matrix.model(family), layer_of(family)
    block = model.anatomy.language.blocks[layer]
    part, module = block.experts, model.hf.get_submodule(block.path)
    x, y = entering(model, layer, matrix.batch().input_ids)
    scores, _ = scored(family, 0.0)
    owner, experts = module.get_submodule(part.path), module.get_submodule(part.experts)
    places = [(e, i) for e in range(part.count) for i in range(0, part.width, 5)]
    with torch.no_grad():
        for e, i in places:
            column = experts.down_proj[e, :, i].clone()
            experts.down_proj[e, :, i] = 0
            change = (owner(x[None]).flatten(0, -2) - y).double().square().sum()
            experts.down_proj[e, :, i] = column
            assert float(scores["score"][e, i]) == pytest.approx(float(change), rel=1e-3, abs=1e-7), (e, i)
        if part.shared is not None:
            weight = module.get_submodule(part.shared.down).weight
            for i in range(0, part.shared.width, 5):
                column = weight[:, i].clone()
                weight[:, i] = 0
                change = (owner(x[None]).flatten(0, -2) - y).double().square().sum()
                weight[:, i] = column
                assert float(scores["shared"][i]) == pytest.approx(float(change), rel=1e-3, abs=1e-7), i


@pytest.mark.parametrize("norm_topk_prob", [True, False])
def test_norm_topk_prob_is_followed(norm_topk_prob):
    model = matrix.model("qwen3_moe")
    for block in model.anatomy.language.blocks:
        model.hf.get_submodule(f"{block.path}.{block.experts.router}").norm_topk_prob = norm_topk_prob
    x, y = entering(model, 0, matrix.batch().input_ids)
    phi, down = micro(model, 0, x)
    torch.testing.assert_close(phi @ down, y, atol=1e-5, rtol=1e-4)
    found, _ = matrix.scores(CameraP(keep=0.99, form="ragged", peak_share=0.0), model, matrix.batch())
    wanted = phi.square().sum(0) * down.square().sum(1)
    torch.testing.assert_close(found[0]["score"].flatten(), wanted, atol=1e-6 * float(wanted.max()), rtol=1e-4)


@pytest.mark.parametrize("form", ["uniform", "ragged"])
def test_the_ranking_does_not_depend_on_scale(form):
    """An up row times c, its down column divided by c: a magnitude score on one matrix would change."""
    plain, scaled = matrix.model("qwen3_moe"), matrix.model("qwen3_moe")
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for block in scaled.anatomy.language.blocks:
            experts = scaled.hf.get_submodule(f"{block.path}.{block.experts.experts}")
            c = 2.0 ** torch.randint(-4, 5, (8, block.experts.width), generator=generator)
            experts.gate_up_proj[:, block.experts.width :] *= c[:, :, None]
            experts.down_proj /= c[:, None, :]
            magnitude = experts.down_proj.square().sum(1).flatten().argsort()
            before = plain.hf.get_submodule(f"{block.path}.{block.experts.experts}").down_proj
            assert not torch.equal(magnitude, before.square().sum(1).flatten().argsort())
    method = CameraP(keep=0.5, form=form)
    assert method.compress(scaled, matrix.batch()).edits == method.compress(plain, matrix.batch()).edits


@pytest.mark.parametrize("family", ["qwen3_moe", "qwen2_moe", "deepseek_v3"])
@pytest.mark.parametrize("form", ["uniform", "ragged"])
def test_masked_and_physical_form_give_the_same_logits(family, form):
    masked, cut = matrix.model(family), matrix.model(family)
    outcome = CameraP(keep=0.5, form=form).compress(cut, matrix.batch())
    with torch.no_grad():
        for edit in outcome.edits:
            block = masked.anatomy.language.blocks[edit.layer]
            part, module = block.experts, masked.hf.get_submodule(block.path)
            experts = module.get_submodule(part.experts)
            for e, kept in enumerate(edit.keep):
                gone = sorted(set(range(part.width)) - set(kept))
                experts.gate_up_proj[e, gone] = 0
                experts.gate_up_proj[e, [part.width + i for i in gone]] = 0
                experts.down_proj[e][:, gone] = 0
            if edit.shared is not None:
                gone = sorted(set(range(part.shared.width)) - set(edit.shared))
                assert form == "ragged" or gone
                module.get_submodule(part.shared.down).weight[:, gone] = 0
    given = families.inputs(family)
    difference = (families.logits(masked.hf, given) - families.logits(cut.hf, given)).abs().max()
    assert float(difference) < 1e-5
    untouched = families.logits(matrix.model(family).hf, given)
    assert float((untouched - families.logits(cut.hf, given)).abs().max()) > 1e-3


@pytest.mark.parametrize("family", FAMILIES)
def test_ragged_takes_the_weakest_of_one_list_the_shared_expert_first(family):
    """The first layer's choice is that of a plain sort over the shared expert's and all experts' neurons."""
    scores, listed = scored(family, 0.9)
    outcome = CameraP(keep=0.7, form="ragged").compress(matrix.model(family), matrix.batch())
    edit = next(e for e in outcome.edits if e.layer == layer_of(family))
    n, values = listed.numel(), listed.tolist()
    gone = set(sorted(range(n), key=lambda i: (values[i], i))[: matrix.removed(n, 0.7)])
    first = len(scores["shared"]) if "shared" in scores else 0
    width = scores["score"].shape[1]
    assert edit.keep == tuple(
        tuple(i for i in range(width) if first + e * width + i not in gone) for e in range(len(scores["score"]))
    )
    assert edit.shared == (tuple(i for i in range(first) if i not in gone) if first else None)
    assert len({len(kept) for kept in edit.keep}) > 1, "one list spreads unevenly"


@pytest.mark.parametrize("family", FAMILIES)
def test_uniform_keeps_one_width_and_opens_in_plain_transformers(family):
    model = matrix.model(family)
    outcome = CameraP(keep=0.5).compress(model, matrix.batch())
    assert {len(kept) for e in outcome.edits for kept in e.keep} == {
        matrix.anatomy(family).language.blocks[-1].experts.width // 2
    }
    assert surgery.is_uniform(model.config)
    scores, _ = scored(family, 0.9)
    for kept, row in zip(outcome.edits[0].keep, scores["score"].tolist(), strict=True):
        best = sorted(range(len(row)), key=lambda i: (-row[i], -i))[: len(kept)]
        assert sorted(best) == list(kept)


@pytest.mark.parametrize("keep", [0.8, 0.7, 0.6, 0.34])
def test_a_multiple_of_the_experts_width_stays_in_deepseeks_shared_expert(keep):
    """Its config knows the shared width as a number of experts; anything else would not open in transformers."""
    model = matrix.model("deepseek_v3")
    CameraP(keep=keep).compress(model, matrix.batch())
    assert surgery.is_uniform(model.config)
    assert model.config.n_shared_experts == 2
    part = model.anatomy.language.blocks[-1].experts
    assert part.shared.width == 2 * part.width
    assert part.width % 4 == 0, "grouped matrix products need rows of whole 16 bytes"
    assert torch.isfinite(families.logits(model.hf, families.inputs("deepseek_v3"))).all()


def test_ties_take_the_lower_index():
    part = matrix.anatomy("qwen3_moe").language.blocks[0]
    scores = {0: {"score": torch.zeros(8, part.experts.width), "tokens": torch.zeros(8)}}
    (edit,) = CameraP(keep=0.5).decide([part], scores)
    half = part.experts.width // 2
    assert edit.keep == (tuple(range(half, 2 * half)),) * 8
    (edit,) = CameraP(keep=0.5, form="ragged").decide([part], scores)
    # All are alike; the one that must stay in any case is the first.
    assert [len(kept) for kept in edit.keep] == [1, 0, 0, 0, half * 2 - 1, half * 2, half * 2, half * 2]
    assert edit.keep[4] == tuple(range(1, 2 * half))


@pytest.mark.parametrize("family", ["qwen2_moe", "deepseek_v3"])
def test_however_little_stays_the_layer_can_be_built(family):
    """The control draws at random: without a rule the shared expert, or all experts, would come out empty."""
    block = matrix.anatomy(family).language.blocks[-1]
    part = block.experts
    n = part.count * part.width + part.shared.width
    for seed in range(40):
        generator = torch.Generator().manual_seed(seed)
        scores = {
            "score": torch.rand(part.count, part.width, generator=generator),
            "shared": torch.rand(part.shared.width, generator=generator),
        }
        method = RandomNeurons(keep=0.02, form="ragged")
        (edit,) = method.decide([block], {block.index: scores})
        assert edit.shared
        assert any(edit.keep)
        assert sum(map(len, edit.keep)) + len(edit.shared) == n - matrix.removed(n, 0.02)


def test_an_expert_without_neurons_returns_nothing_and_keeps_its_place():
    model = matrix.model("qwen3_moe")
    block = model.anatomy.language.blocks[0]
    with torch.no_grad():
        model.hf.get_submodule(f"{block.path}.{block.experts.experts}").down_proj[3] *= 1e-4
    outcome = CameraP(keep=0.8, form="ragged").compress(model, matrix.batch())
    assert outcome.edits[0].keep[3] == ()
    assert model.anatomy.language.blocks[0].experts.count == 8
    assert torch.isfinite(families.logits(model.hf, families.inputs("qwen3_moe"))).all()


def test_later_layers_are_observed_behind_the_pruned_ones():
    """Layer 1 is scored on what the pruned layer 0 puts out: a plain forward of a half-pruned model tells the same."""
    method = CameraP(keep=0.5)
    found, edits = matrix.scores(method, matrix.model("qwen3_moe"), matrix.batch())
    model = matrix.model("qwen3_moe")
    model.anatomy = surgery.apply_model(model.hf, model.anatomy, [e for e in edits if e.layer == 0])
    for behind, same in ((model, True), (matrix.model("qwen3_moe"), False)):
        x, _ = entering(behind, 1, matrix.batch().input_ids)
        phi, down = micro(behind, 1, x)
        squares = phi.square()
        wanted = (0.1 * squares.sum(0) + 0.9 * squares.amax(0)) * down.square().sum(1)
        close = torch.allclose(found[1]["score"].flatten(), wanted, atol=1e-5 * float(wanted.max()), rtol=1e-3)
        assert close == same


def test_experts_that_saw_nothing_are_told():
    outcome = CameraP(keep=0.5).compress(matrix.model("qwen3_moe"), matrix.of(torch.tensor([[5, 6]]), None))
    assert outcome.coverage["experts_never_seen"]
    assert "saw no calibration token" in outcome.warnings[0]
    assert CameraP(keep=0.5).compress(matrix.model("qwen3_moe"), matrix.batch(64, 24)).warnings == []


def test_dense_layers_are_left_alone():
    outcome = CameraP(keep=0.5).compress(matrix.model("qwen3_moe_mixed"), matrix.batch())
    assert [e.layer for e in outcome.edits] == [0, 2, 3]


def test_what_cannot_be_done_is_one_sentence():
    with pytest.raises(ArchitectureError, match="removes expert neurons, and LlamaForCausalLM has none"):
        CameraP(keep=0.5).compress(matrix.model("llama"), matrix.batch())
    with pytest.raises(DataError, match="--data"):
        CameraP(keep=0.5).compress(matrix.model("qwen3_moe"), None)
    model = matrix.model("qwen3_moe")
    CameraP(keep=0.6, form="ragged").compress(model, matrix.batch())
    with pytest.raises(ArchitectureError, match="unequal width"):
        CameraP(keep=0.5).compress(model, matrix.batch())
    whole = [tuple(range(24))] * 8
    with pytest.raises(BudgetError, match="multiple of 4"):
        surgery.apply_model(
            matrix.model("qwen3_moe").hf,
            matrix.anatomy("qwen3_moe"),
            [KeepExpertNeurons(layer=0, keep=tuple(kept[:6] for kept in whole))],
        )


# The ranking.


def test_the_ranking_adds_up():
    model = matrix.model("qwen2_moe")
    rows = Camera().measure(model, matrix.batch())
    blocks = model.anatomy.language.blocks
    assert [(r["layer"], r["expert"]) for r in rows] == [
        (b.index, e) for b in blocks for e in ("all", "shared", *range(8))
    ]
    for block in blocks:
        mine = [r for r in rows if r["layer"] == block.index]
        whole, parts = mine[0], mine[1:]
        assert whole["energy_share"] == pytest.approx(1)
        assert sum(r["energy_share"] for r in parts) == pytest.approx(1)
        assert whole["neurons"] == sum(r["neurons"] for r in parts) == 8 * 24 + 40
        assert whole["tokens"] == matrix.batch().input_ids.numel()
        assert sum(r["tokens"] for r in parts[1:]) == 2 * whole["tokens"]
        for row in mine:
            assert 0 <= row["neurons_50"] <= row["neurons_90"] <= row["neurons_99"] <= row["neurons"]
            assert row["unseen"] == (row["tokens"] == 0)


def test_the_ranking_counts_neurons_as_a_plain_sort_does():
    """On the first layer, where the compressor sees the same dense input, against its scores."""
    scores, _ = scored("qwen3_moe", 0.9)
    rows = {r["expert"]: r for r in Camera().measure(matrix.model("qwen3_moe"), matrix.batch()) if r["layer"] == 0}
    for expert, values in [("all", scores["score"].flatten()), *enumerate(scores["score"])]:
        for share in (50, 90, 99):
            total, count, reached = float(values.double().sum()), 0, 0.0
            for value in sorted(values.double().tolist(), reverse=True):
                if reached >= share / 100 * total:
                    break
                reached, count = reached + value, count + 1
            assert rows[expert][f"neurons_{share}"] == count


def test_unseen_experts_carry_nothing():
    rows = Camera().measure(matrix.model("qwen3_moe"), matrix.of(torch.tensor([[5, 6]]), None))
    unseen = [r for r in rows if r["unseen"]]
    assert unseen
    assert all(r["energy_share"] == 0 and r["neurons_99"] == 0 for r in unseen)


def test_carriers():
    values = torch.tensor([1.0, 5.0, 3.0, 1.0])
    assert [energy.carriers(values, s) for s in (0.5, 0.8, 0.81, 1.0)] == [1, 2, 3, 4]
    assert energy.carriers(torch.zeros(3), 0.5) == 0


def test_the_ranking_refuses_in_one_sentence():
    with pytest.raises(ArchitectureError, match="camera looks at expert neurons, and LlamaForCausalLM has none"):
        Camera().measure(matrix.model("llama"), matrix.batch())
    with pytest.raises(DataError, match="--data"):
        Camera().measure(matrix.model("qwen3_moe"), None)
