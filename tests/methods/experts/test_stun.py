"""STUN, first stage: every check of its card."""

from __future__ import annotations

from copy import deepcopy
from typing import Any

import families
import matrix
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import paredown
from paredown.core import surgery
from paredown.core.checkpoint import Model
from paredown.core.edits import KeepExperts
from paredown.core.experts.linkage import Linkage, cluster
from paredown.errors import ArchitectureError, BudgetError
from paredown.methods.experts.random_experts import RandomExperts
from paredown.methods.experts.stun import Stun, _nearest


def experts_of(model: Any, layer: int) -> tuple[Any, Any]:
    """Return a layer's experts and router."""
    block = model.anatomy.language.blocks[layer]
    module = model.hf.get_submodule(block.path)
    return module.get_submodule(block.experts.experts), module.get_submodule(block.experts.router)


def counts(edits: Any, layers: int = 3, experts: int = 8) -> list[int]:
    kept = {e.layer: len(e.keep) for e in edits}
    return [kept.get(layer, experts) for layer in range(layers)]


@pytest.mark.parametrize("linkage", ["official", "complete"])
@pytest.mark.parametrize("keep", [0.875, 0.75, 0.5, 0.3])
def test_the_total_is_that_of_the_control(keep: float, linkage: Linkage):
    """The card: the target is met exactly; here it is also what random experts leave."""
    outcome = Stun(keep=keep, linkage=linkage).compress(matrix.model("qwen3_moe"), matrix.batch())
    control = RandomExperts(keep=keep).compress(matrix.model("qwen3_moe"), None)
    assert sum(counts(outcome.edits)) == sum(counts(control.edits)) == 3 * (8 - matrix.removed(8, keep))
    for edit in outcome.edits:
        assert len(edit.keep) == len(edit.clusters)
        assert sorted(i for members in edit.clusters for i in members) == list(range(8))
        assert all(kept in members for kept, members in zip(edit.keep, edit.clusters, strict=True))
        assert list(edit.keep) == sorted(edit.keep)
        assert len(edit.keep) >= edit.top_k == 2


def test_layers_keep_different_numbers_and_open_with_paredown(tmp_path):
    model = matrix.model("qwen3_moe")
    with torch.no_grad():
        _, router = experts_of(model, 1)
        router.weight[:5] = router.weight[0] + 0.01 * router.weight[:5]
    outcome = Stun(keep=0.75).compress(model, matrix.batch())
    assert counts(outcome.edits)[1] == 4
    assert sum(counts(outcome.edits)) == 18
    assert surgery.loads_in(model.config) == "paredown.load"
    model.save(tmp_path)
    loaded = paredown.load(tmp_path).hf
    inputs = families.inputs("qwen3_moe")
    assert torch.equal(families.logits(loaded, inputs), families.logits(model.hf, inputs))


def test_uniform_opens_in_plain_transformers():
    model = matrix.model("qwen3_moe")
    outcome = Stun(keep=0.5, uniform=True).compress(model, matrix.batch())
    assert counts(outcome.edits) == [4, 4, 4]
    assert surgery.loads_in(model.config) == "transformers"


@pytest.mark.parametrize("linkage", ["official", "complete"])
def test_a_duplicate_merges_first_and_costs_no_more_than_its_share_of_the_softmax(linkage):
    """Reference: the same model in which the router never chooses the duplicate."""
    model, masked = matrix.model("qwen3_moe"), matrix.model("qwen3_moe")
    for one in (model, masked):
        experts, router = experts_of(one, 1)
        with torch.no_grad():
            for tensor in (experts.gate_up_proj, experts.down_proj, router.weight):
                tensor[6] = tensor[2]
    found, _ = matrix.scores(Stun(keep=0.5), _copy(model), matrix.batch())
    members = cluster([found[i]["distance"] for i in range(3)], 23, least=[2] * 3, linkage=linkage)
    assert members[1] == ((0,), (1,), (2, 6), (3,), (4,), (5,), (7,))
    assert [len(one) for one in members] == [8, 7, 8]
    edit = KeepExperts(layer=1, keep=(0, 1, 2, 3, 4, 5, 7), top_k=2, clusters=members[1])
    model.anatomy = surgery.apply_model(model.hf, model.anatomy, [edit])
    _, router = experts_of(masked, 1)

    def forward(hidden: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        logits = F.linear(hidden.reshape(-1, hidden.shape[-1]), router.weight)
        logits[:, 6] = -torch.inf
        weights, index = logits.softmax(-1).topk(2)
        return logits, weights / weights.sum(-1, keepdim=True), index

    router.forward = forward
    inputs = families.inputs("qwen3_moe")
    difference = families.logits(model.hf, inputs) - families.logits(masked.hf, inputs)
    assert float(difference.abs().max()) < 1e-5


def _copy(model: Any) -> Model:
    return Model.of(deepcopy(model.hf))


def test_the_distance_is_the_formula():
    model = matrix.model("qwen3_moe")
    for fields in (
        {"router": 1.0, "coactivation": 0.0, "normalise": False},
        {"router": 1.0, "coactivation": 0.0},
        {"router": 0.0, "coactivation": 1.0},
        {"router": 0.5, "coactivation": 2.0, "normalise": False},
    ):
        method = Stun(keep=0.5, **fields)
        found, _ = matrix.scores(
            method.model_copy(update={"router": method.router + 1e-9}), _copy(model), matrix.batch()
        )
        chosen: list[Tensor] = []
        _, router = experts_of(model, 0)
        handle = router.register_forward_hook(lambda _, __, out, chosen=chosen: chosen.append(out[2]))
        with torch.no_grad():
            model.hf(input_ids=matrix.batch().input_ids)
        handle.remove()
        together = torch.zeros(8, 8)
        for a, b in chosen[0].tolist():
            together[a, b] += 1
            together[b, a] += 1
        rows = router.weight.detach().double()
        for i in range(8):
            for j in range(8):
                apart = float((rows[i] - rows[j]).norm())
                if method.normalise:
                    apart /= float(rows.square().sum().sqrt())
                # The mean is over all entries, the zero diagonal included.
                wanted = method.router * apart - method.coactivation * float(together[i, j]) / float(
                    together.sum() / 64
                )
                assert float(found[0]["distance"][i, j]) == pytest.approx(wanted, abs=1e-6), (fields, i, j)


def test_ties_prevent_the_target_and_are_told():
    model = matrix.model("qwen3_moe")
    with torch.no_grad():
        for layer in range(3):
            experts_of(model, layer)[1].weight[:] = torch.eye(8, 32)
    with pytest.raises(BudgetError, match=r"12 clusters cannot be reached: .* tie at one distance"):
        Stun(keep=0.5).compress(model, matrix.batch())


def test_the_representative_is_the_member_nearest_to_the_mean_and_the_lower_of_two():
    """In a pair both are equally near; the official choice is decided by rounding."""
    model = matrix.model("qwen3_moe")
    experts, _ = experts_of(model, 0)
    assert all(_nearest(experts, (a, b)) == a for a in range(8) for b in range(a + 1, 8))
    flat = torch.cat([experts.gate_up_proj.flatten(1), experts.down_proj.flatten(1)], 1).detach().double()
    chosen = set()
    for members in ((0, 1, 2), (3, 5, 7), (1, 2, 4, 6), tuple(range(8))):
        apart = (flat[list(members)] - flat[list(members)].mean(0)).norm(dim=1)
        assert _nearest(experts, members) == members[int(apart.argmin())]
        chosen.add(_nearest(experts, members) == members[0])
    assert False in chosen
    with torch.no_grad():
        experts.gate_up_proj[5], experts.down_proj[5] = experts.gate_up_proj[3], experts.down_proj[3]
    assert _nearest(experts, (3, 5, 7)) == 3


def test_the_kept_weights_and_router_rows_are_untouched_unless_kappa_says_so():
    for kappa in (0, 8):
        model, before = matrix.model("qwen3_moe"), matrix.model("qwen3_moe")
        outcome = Stun(keep=0.5, kappa=kappa).compress(model, matrix.batch())
        for edit in outcome.edits:
            (experts, router), (old, rows) = experts_of(model, edit.layer), experts_of(before, edit.layer)
            for place, (kept, members) in enumerate(zip(edit.keep, edit.clusters, strict=True)):
                source = list(members) if kappa else [kept]
                for now, was in (
                    (experts.gate_up_proj, old.gate_up_proj),
                    (experts.down_proj, old.down_proj),
                    (router.weight, rows.weight),
                ):
                    wanted = was[source].mean(0) if len(source) > 1 else was[source[0]]
                    assert torch.equal(now[place], wanted) or torch.allclose(now[place], wanted, atol=1e-6)
                    if len(source) == 1:
                        assert torch.equal(now[place], was[source[0]])
        assert any(len(m) > 2 for e in outcome.edits for m in e.clusters)


def test_no_layer_falls_below_top_k_unless_it_may():
    def alike() -> Any:
        model = matrix.model("qwen3_moe")
        with torch.no_grad():
            router = experts_of(model, 1)[1]
            router.weight[:] = router.weight[0] + 0.001 * router.weight
        return model

    outcome = Stun(keep=0.5).compress(alike(), matrix.batch())
    assert counts(outcome.edits)[1] == 2
    model = alike()
    outcome = Stun(keep=0.5, lower_top_k=True).compress(model, matrix.batch())
    assert counts(outcome.edits)[1] == 1
    assert {e.layer: e.top_k for e in outcome.edits}[1] == 1
    assert sum(counts(outcome.edits)) == 12
    assert torch.isfinite(families.logits(model.hf, families.inputs("qwen3_moe"))).all()
    with pytest.raises(BudgetError, match="router chooses 2"):
        Stun(keep=0.125).compress(matrix.model("qwen3_moe"), matrix.batch())


def test_groups_lose_equally_and_clusters_stay_within_them():
    model = matrix.model("deepseek_v3")
    outcome = Stun(keep=0.5).compress(model, matrix.batch())
    for edit in outcome.edits:
        assert [sum(e < 4 for e in edit.keep), sum(e >= 4 for e in edit.keep)] == [2, 2]
        assert all(len({i // 4 for i in members}) == 1 for members in edit.clusters)
    assert any("groups must lose equally" in warning for warning in outcome.warnings)


def test_nothing_runs_but_one_pass():
    """No forward is made beyond the one that counts, however many experts there are."""
    model = matrix.model("qwen3_moe")
    calls = []
    for block in model.anatomy.language.blocks:
        model.hf.get_submodule(block.path).register_forward_hook(lambda *_: calls.append(1))
    Stun(keep=0.5).compress(model, matrix.batch())
    assert len(calls) == 3, "one batch, three blocks"


def test_models_without_experts_are_refused():
    with pytest.raises(ArchitectureError, match="removes experts, and LlamaForCausalLM has none"):
        Stun(keep=0.5).compress(matrix.model("llama"), matrix.batch())
