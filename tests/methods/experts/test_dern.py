"""DERN: every check of its card."""

from __future__ import annotations

from functools import partial
from typing import Any

import families
import matrix
import pytest
import torch
import torch.nn.functional as F

from paredown.core.compression import InMemory, Job, stream_for
from paredown.core.edits import KeepExperts
from paredown.core.method import View
from paredown.core.sequential import Resident
from paredown.errors import ArchitectureError, BudgetError, DataError
from paredown.methods.experts import dern as module
from paredown.methods.experts.dern import DERN

LAYER = 1


def opened(family: str = "qwen3_moe", layer: int = LAYER) -> tuple[Any, View]:
    model = matrix.model(family)
    return model, Resident(model).open(layer)


def made(view: View) -> tuple[torch.nn.Module, torch.nn.Module]:
    part = view.part.experts
    assert part is not None
    return view.child(part.experts), view.child(part.router)


def given(view: View, *, importance: list[float] | None = None, seed: int = 0) -> dict[str, torch.Tensor]:
    """Scores as the engine would hand them to `rewrite`."""
    part = view.part.experts
    assert part is not None
    generator = torch.Generator().manual_seed(seed)
    return {
        "importance": torch.rand(part.count, generator=generator) + 0.1
        if importance is None
        else torch.tensor(importance),
        "tokens": torch.ones(part.count),
        "response": torch.rand(part.count, part.width, generator=generator),
    }


def expert(module: Any, e: int, x: torch.Tensor) -> torch.Tensor:
    gate, up = F.linear(x, module.gate_up_proj[e]).chunk(2, dim=-1)
    return F.linear(module.act_fn(gate) * up, module.down_proj[e])


@torch.no_grad()
def test_an_expert_is_the_sum_of_its_segments():
    _, view = opened()
    experts, _ = made(view)
    width = experts.down_proj.shape[-1]
    x = torch.randn(7, experts.down_proj.shape[1], generator=torch.Generator().manual_seed(0))
    segments = module._segments(experts.gate_up_proj, experts.down_proj, torch.full((width,), 3), torch.arange(width))
    gate, up, down = segments.chunk(3, dim=1)
    total = sum(torch.outer(experts.act_fn(x @ gate[i]) * (x @ up[i]), down[i]) for i in range(width))
    torch.testing.assert_close(total, expert(experts, 3, x), atol=1e-5, rtol=1e-5)


def _remember(seen: dict[int, Any], layer: int, _: Any, __: Any, output: Any) -> None:
    seen[layer] = output


def test_importance_is_the_mean_weight_really_applied():
    """Against plain hooks on the router, for families that renormalise and for one that does not."""
    for family in ("qwen3_moe", "qwen2_moe", "deepseek_v3"):
        found, _ = matrix.scores(DERN(keep=0.5), matrix.model(family), matrix.batch())
        model, seen = matrix.model(family), {}
        handles = []
        for block in model.anatomy.language.blocks:
            if block.experts is not None:
                router = model.hf.get_submodule(f"{block.path}.{block.experts.router}")

                handles.append(router.register_forward_hook(partial(_remember, seen, block.index)))
        with torch.no_grad():
            model.hf(input_ids=matrix.batch().input_ids)
        for handle in handles:
            handle.remove()
        assert seen.keys() == found.keys()
        for layer, (_, weights, index) in seen.items():
            applied = torch.zeros(len(weights), 8).scatter_(1, index, weights.float())
            torch.testing.assert_close(found[layer]["importance"], applied.mean(0), atol=1e-5, rtol=1e-4)
            if family == "qwen3_moe":
                torch.testing.assert_close(found[layer]["importance"].sum(), torch.tensor(1.0))
            if family == "qwen2_moe":
                assert found[layer]["importance"].sum() < 0.95, "weights are not normalised over the chosen ones here"


@pytest.mark.parametrize("norm_topk_prob", [True, False])
def test_norm_topk_prob_decides_the_importance(norm_topk_prob):
    model = matrix.model("qwen3_moe")
    for block in model.anatomy.language.blocks:
        model.hf.get_submodule(f"{block.path}.{block.experts.router}").norm_topk_prob = norm_topk_prob
    found, _ = matrix.scores(DERN(keep=0.5), model, matrix.batch())
    totals = [float(scores["importance"].sum()) for scores in found.values()]
    assert all(abs(t - 1) < 1e-5 for t in totals) == norm_topk_prob


def test_all_experts_kept_moves_nothing():
    _, view = opened()
    experts, router = made(view)
    before = [p.detach().clone() for p in (*experts.parameters(), *router.parameters())]
    everything = KeepExperts(layer=LAYER, keep=tuple(range(8)), top_k=2)
    DERN(keep=0.5, alpha=-1).rewrite(view, [everything], given(view))
    assert all(torch.equal(a, b) for a, b in zip(before, (*experts.parameters(), *router.parameters()), strict=True))


def plant_twin(view: View, a: int, b: int, *, noise: float = 0.0) -> torch.Tensor:
    """Make expert ``b`` a permuted copy of ``a``; return the permutation."""
    experts, _ = made(view)
    width = experts.down_proj.shape[-1]
    order = torch.randperm(width, generator=torch.Generator().manual_seed(5))
    with torch.no_grad():
        gate, up = experts.gate_up_proj[a].chunk(2)
        experts.gate_up_proj[b] = torch.cat([gate[order], up[order]])
        experts.down_proj[b] = experts.down_proj[a][:, order]
        experts.gate_up_proj[b] += noise * torch.randn_like(experts.gate_up_proj[b])
        experts.down_proj[b] += noise * torch.randn_like(experts.down_proj[b])
    return order


@pytest.mark.parametrize("noise", [0.0, 1e-4])
def test_a_planted_twin_is_found_and_taken_in(noise):
    torch.manual_seed(0)
    _, view = opened()
    twin, b = 2, 6
    order = plant_twin(view, twin, b, noise=noise)
    experts, router = made(view)
    old = {n: p.detach().clone() for n, p in experts.named_parameters()}
    rows = router.weight.detach().clone()
    kept = [0, 1, 2, 3, 4, 5, 7]

    owner, similarity = module._nearest(experts.gate_up_proj.detach(), experts.down_proj.detach(), [b], kept)
    assert owner.tolist() == [[kept.index(twin)] * len(order)]
    assert float(similarity.min()) > 0.999

    # The twin answers, the copy that goes saw nothing: all the twin's own neurons begin a cluster.
    scores = given(view)
    scores["response"][b] = 0
    DERN(keep=0.875).rewrite(view, [KeepExperts(layer=LAYER, keep=tuple(kept), top_k=2)], scores)
    tolerance = 1e-5 if noise == 0 else 3e-3
    for name, now in experts.named_parameters():
        torch.testing.assert_close(now, old[name], atol=tolerance, rtol=tolerance)
    # A mean of whole matrices, the wrong implementation, is far from the twin.
    averaged = (old["down_proj"][twin] + old["down_proj"][b]) / 2
    assert float((averaged - old["down_proj"][twin]).abs().max()) > 10 * tolerance
    # Only the router's row of the twin has changed, by the whole row of its copy.
    wanted = rows.clone()
    wanted[twin] += rows[b]
    torch.testing.assert_close(router.weight.detach(), wanted)


def test_a_planted_twin_that_is_never_chosen_is_taken_in_end_to_end():
    """The correction bias keeps the copy from ever being chosen and its twin busy; the run must find it by itself."""
    model, view = opened("deepseek_v3", layer=2)
    part = view.part.experts
    assert part is not None
    twin, b = 5, 6
    plant_twin(view, twin, b)
    experts, router = made(view)
    with torch.no_grad():
        router.e_score_correction_bias[b] = -100
        router.e_score_correction_bias[twin] = 2
    old, rows = experts.down_proj.detach().clone(), router.weight.detach().clone()
    keeper, method = InMemory(), DERN(keep=0.75, alpha=0.95)
    Job(method, Resident(model), stream_for(method, model, matrix.batch()), None, keeper).run()
    assert keeper.known_scores[2]["tokens"][b] == 0
    (edit,) = keeper.known_edits[2]
    assert b not in edit.keep
    place = edit.keep.index(twin)
    torch.testing.assert_close(experts.down_proj[place].detach(), old[twin], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(router.weight[place].detach(), rows[twin] + rows[b])
    others = [e for e in edit.keep if e != twin]
    assert torch.equal(router.weight[[edit.keep.index(e) for e in others]], rows[others])


@pytest.mark.parametrize("family", families.MOE)
def test_alpha_above_one_is_plain_dropping_bit_for_bit(family):
    batch = matrix.batch()
    moved, plain = matrix.model(family), matrix.model(family)
    outcome = DERN(keep=0.5, alpha=1.01).compress(moved, batch)

    from paredown.core import surgery

    found, _ = matrix.scores(DERN(keep=0.5, alpha=1.01), matrix.model(family), batch)
    groups = 2 if family == "deepseek_v3" else 1
    edits = []
    for layer, scores in found.items():
        size = 8 // groups
        keep: list[int] = []
        for group in range(groups):
            part = scores["importance"].tolist()[group * size : (group + 1) * size]
            best = sorted(range(size), key=lambda e: (-part[e], e))[: size // 2]
            keep += [group * size + e for e in sorted(best)]
        edits.append(KeepExperts(layer=layer, keep=tuple(keep), top_k=2))
    assert outcome.edits == edits
    layers = ", ".join(str(edit.layer) for edit in edits)
    said = "no neuron of a dropped expert is similar enough to move (alpha 1.01): plain dropping."
    assert f"dern, layers {layers}: {said}" in outcome.warnings
    everything = DERN(keep=0.5, alpha=-1).compress(matrix.model(family), batch)
    assert not any("plain dropping" in warning for warning in everything.warnings)
    surgery.apply_model(plain.hf, plain.anatomy, edits)
    now, wanted = moved.hf.state_dict(), plain.hf.state_dict()
    assert now.keys() == wanted.keys()
    assert all(torch.equal(now[name], wanted[name]) for name in now)


def test_every_dropped_segment_is_counted_once_and_the_router_follows():
    """Brute force over all pairs of segments: owner, count, and the formula for the router's rows."""
    kept, dropped = [1, 2, 4, 7], [0, 3, 5, 6]
    _, view = opened()
    experts, router = made(view)
    gate_up, down = experts.gate_up_proj.detach().clone(), experts.down_proj.detach().clone()
    rows, width = router.weight.detach().clone(), down.shape[-1]
    nearest: dict[tuple[int, int], tuple[float, int]] = {}
    for o in dropped:
        for i in range(width):
            best, to = -2.0, -1
            for r in kept:
                for j in range(width):
                    up = F.cosine_similarity(gate_up[o, width + i], gate_up[r, width + j], dim=0)
                    back = F.cosine_similarity(down[o, :, i], down[r, :, j], dim=0)
                    if float(up + back) / 2 > best:
                        best, to = float(up + back) / 2, r
            nearest[o, i] = best, to
    ordered = sorted(best for best, _ in nearest.values())
    middle = (ordered[len(ordered) // 2 - 1] + ordered[len(ordered) // 2]) / 2
    for alpha, some in ((-1.0, len(ordered)), (middle, len(ordered) // 2), (ordered[-1] + 1e-3, 0)):
        _, view = opened()
        experts, router = made(view)
        moved, thrown = torch.zeros(8, 8), 0
        for (o, _), (best, to) in nearest.items():
            moved[o, to] += best > alpha
            thrown += best <= alpha
        assert float(moved.sum()) == some
        assert some + thrown == len(dropped) * width
        owner, similarity = module._nearest(gate_up, down, dropped, kept)
        for a, o in enumerate(dropped):
            for b, r in enumerate(kept):
                assert int(((owner[a] == b) & (similarity[a] > alpha)).sum()) == int(moved[o, r])
        edit = KeepExperts(layer=LAYER, keep=tuple(kept), top_k=2)
        DERN(keep=0.5, alpha=alpha).rewrite(view, [edit], given(view))
        for r in kept:
            delta = sum(moved[o, r] / width * rows[o] for o in dropped)
            torch.testing.assert_close(router.weight[r].detach(), rows[r] + delta, atol=1e-5, rtol=1e-5)
        for o in dropped:
            assert torch.equal(router.weight[o], rows[o])
            assert torch.equal(experts.down_proj[o], down[o])


@torch.no_grad()
def test_recombination_against_a_plain_implementation():
    """Weighted spherical k-means, written with loops, on an expert that received segments of two others."""
    _, view = opened()
    experts, _ = made(view)
    gate_up, down = experts.gate_up_proj.clone(), experts.down_proj.clone()
    width = down.shape[-1]
    scores = given(view, seed=3)
    received = [(0, 2), (0, 5), (6, 1), (6, 7), (6, 9)]
    rows, columns = DERN(keep=0.5, iterations=4, tolerance=0)._recombine(
        gate_up, down, 3, received, scores["importance"], scores["response"]
    )
    members = [(3, i) for i in range(width)] + received
    vectors = [torch.cat([gate_up[e, i], gate_up[e, width + i], down[e, :, i]]) for e, i in members]
    answers = [float(scores["response"][e, i]) for e, i in members]
    first = sorted(sorted(range(len(members)), key=lambda m: (-answers[m], m))[:width])
    centres = [vectors[m] / vectors[m].norm() for m in first]
    norms = [vectors[m].norm() for m in first]

    def assign():
        return [
            max(range(width), key=lambda c: (float(F.cosine_similarity(v, centres[c], dim=0)), -c)) for v in vectors
        ]

    for _ in range(4):
        label = assign()
        for c in range(width):
            mine = [m for m in range(len(members)) if label[m] == c]
            if mine:
                total = sum(scores["importance"][members[m][0]] * vectors[m] / vectors[m].norm() for m in mine)
                centres[c] = total / total.norm()
    label = assign()
    for c in range(width):
        mine = [m for m in range(len(members)) if label[m] == c]
        if mine:
            norms[c] = torch.stack([vectors[m].norm() for m in mine]).mean()
    wanted = torch.stack([centre * norm for centre, norm in zip(centres, norms, strict=True)])
    found = torch.cat([rows[:width], rows[width:], columns.T], dim=1)
    torch.testing.assert_close(found, wanted, atol=1e-5, rtol=1e-4)
    assert max(label.count(c) for c in range(width)) > 1


def test_the_importance_of_the_origin_weighs():
    _, view = opened()
    experts, _ = made(view)
    results = []
    for weight in (1e-6, 1.0, 1e6):
        scores = given(view)
        scores["importance"][:] = 1.0
        scores["importance"][0] = weight
        with torch.no_grad():
            results.append(
                DERN(keep=0.5)._recombine(
                    experts.gate_up_proj, experts.down_proj, 3, [(0, i) for i in range(6)], *list(scores.values())[::2]
                )[1]
            )
    assert not torch.allclose(results[0], results[1])
    assert not torch.allclose(results[1], results[2])


def test_ties_keep_the_lower_expert():
    _, view = opened()
    scores = {LAYER: {"importance": torch.tensor([0.0, 1, 1, 0, 1, 1, 0, 1])}}
    (edit,) = DERN(keep=0.5).decide([view.part], scores)
    assert edit.keep == (1, 2, 4, 5)


def test_groups_lose_equally_and_the_correction_bias_follows():
    model = matrix.model("deepseek_v3")
    biases = {
        b.index: model.hf.get_submodule(f"{b.path}.{b.experts.router}").e_score_correction_bias.clone()
        for b in model.anatomy.language.blocks
        if b.experts
    }
    outcome = DERN(keep=0.5, alpha=0.0).compress(model, matrix.batch())
    assert len(outcome.edits) == len(biases) == 3
    for edit in outcome.edits:
        assert [sum(e < 4 for e in edit.keep), sum(e >= 4 for e in edit.keep)] == [2, 2]
        block = model.anatomy.language.blocks[edit.layer]
        router = model.hf.get_submodule(f"{block.path}.{block.experts.router}")
        assert torch.equal(router.e_score_correction_bias, biases[edit.layer][list(edit.keep)])
        assert len(biases[edit.layer].unique()) == 8, "biases that are alike would hide a wrong order"


def test_shared_experts_are_untouched():
    model, original = matrix.model("qwen2_moe"), matrix.model("qwen2_moe")
    DERN(keep=0.5, alpha=-1).compress(model, matrix.batch())
    now, before = model.hf.state_dict(), original.hf.state_dict()
    shared = [name for name in before if "shared_expert" in name]
    assert shared
    assert all(torch.equal(now[name], before[name]) for name in shared)
    assert not torch.equal(now[name := "model.layers.0.mlp.gate.weight"], before[name][: len(now[name])])


def test_fewer_experts_than_top_k_are_refused_unless_it_may_fall():
    model = matrix.model("qwen3_moe")
    before = {k: v.clone() for k, v in model.hf.state_dict().items()}
    with pytest.raises(BudgetError, match=r"leaves 1 of 8 experts.*lower_top_k=true"):
        DERN(keep=0.125).compress(model, matrix.batch())
    assert all(torch.equal(v, before[k]) for k, v in model.hf.state_dict().items())
    outcome = DERN(keep=0.125, lower_top_k=True).compress(model, matrix.batch())
    assert {edit.top_k for edit in outcome.edits} == {1}
    assert model.config.num_experts_per_tok == 1
    assert torch.isfinite(families.logits(model.hf, families.inputs("qwen3_moe"))).all()


def test_experts_that_saw_nothing_are_told():
    outcome = DERN(keep=0.5).compress(matrix.model("qwen3_moe"), matrix.of(torch.tensor([[5, 6]]), None))
    assert set(outcome.coverage["experts_never_seen"]) <= {"0", "1", "2"}
    assert outcome.coverage["experts_never_seen"]
    assert "saw no calibration token" in outcome.warnings[0]
    assert DERN(keep=0.5, alpha=-1).compress(matrix.model("qwen3_moe"), matrix.batch(64, 24)).warnings == []


def test_without_data_or_experts_one_sentence():
    with pytest.raises(DataError, match="--data"):
        DERN(keep=0.5).compress(matrix.model("qwen3_moe"), None)
    with pytest.raises(ArchitectureError, match="removes experts, and LlamaForCausalLM has none"):
        DERN(keep=0.5).compress(matrix.model("llama"), matrix.batch())


def test_experts_of_unequal_width_are_refused():
    from paredown.methods.experts.camera import CameraP

    model = matrix.model("qwen3_moe")
    CameraP(keep=0.6, form="ragged").compress(model, matrix.batch())
    with pytest.raises(ArchitectureError, match="unequal width"):
        DERN(keep=0.5).compress(model, matrix.batch())
