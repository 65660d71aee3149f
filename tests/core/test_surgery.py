"""Surgery computes what taking the units away by other means computes."""

from __future__ import annotations

import copy
from collections.abc import Callable

import families
import pytest
import torch
from families import DECODERS, FAMILIES, MOE, VLMS, inputs, logits
from torch import nn
from torch.nn import functional
from transformers import PreTrainedModel

from paredown.core import anatomy, surgery
from paredown.core.anatomy import Anatomy, Block
from paredown.core.edits import (
    DropBlock,
    DropSublayer,
    Edit,
    KeepExpertNeurons,
    KeepExperts,
    KeepHeads,
    KeepNeurons,
)
from paredown.errors import ArchitectureError, BudgetError

HEADS = [name for name in FAMILIES if name not in ("deepseek_v3", "olmoe")]
DENSE = [name for name in FAMILIES if name not in MOE or name in ("deepseek_v3", "qwen3_moe_mixed")]
SUBLAYERS = [name for name in FAMILIES if name != "bert"]
KEPT_EXPERTS = (0, 2, 5, 7)


def _zero(module: nn.Module, path: str, columns: list[int] | slice = slice(None)) -> None:
    """Zero columns of a projection; all columns and the bias by default."""
    linear = module.get_submodule(path)
    with torch.no_grad():
        linear.weight[:, columns] = 0
        if columns == slice(None) and getattr(linear, "bias", None) is not None:
            linear.bias.zero_()


def _compare(name: str, edits: Callable[[Anatomy], list[Edit]], reference: Callable[[PreTrainedModel], None]) -> None:
    """Check that editing a model equals changing the whole model by ``reference``, and that both did something."""
    given = inputs(name)
    model, other = FAMILIES[name](), FAMILIES[name]()
    before, size = logits(model, given), model.num_parameters()
    found = anatomy.find(model)
    surgery.apply_model(model, found, edits(found))
    reference(other)
    after = logits(model, given)
    assert torch.allclose(after, logits(other, given), atol=1e-5, rtol=0)
    assert (after - before).abs().max() > 1e-3
    assert model.num_parameters() < size


def _blocks(model: PreTrainedModel) -> list[tuple[nn.Module, Block]]:
    return [(anatomy.resolve(model, part.path), part) for part in anatomy.find(model).language.blocks]


@pytest.mark.parametrize("name", FAMILIES)
def test_keeping_everything_changes_no_bit(name: str) -> None:
    model = FAMILIES[name]()
    before = logits(model, inputs(name))
    found = anatomy.find(model)
    edits: list[Edit] = []
    for part in found.language.blocks:
        assert part.attention is not None
        if name in HEADS:
            edits.append(KeepHeads(layer=part.index, keep=tuple(range(part.attention.kv_heads))))
        if part.mlp is not None:
            edits.append(KeepNeurons(layer=part.index, keep=tuple(range(part.mlp.width))))
        if part.experts is not None:
            experts = part.experts
            edits.append(KeepExperts(layer=part.index, keep=tuple(range(experts.count)), top_k=experts.top_k))
            edits.append(KeepExpertNeurons(layer=part.index, keep=(tuple(range(experts.width)),) * experts.count))
    config = model.config.to_dict()
    after = surgery.apply_model(model, found, edits)
    assert torch.equal(logits(model, inputs(name)), before)
    assert after == found
    assert model.config.to_dict() == config
    assert surgery.loads_in(model.config) == "transformers"


@pytest.mark.parametrize("part", ["attention", "mlp"])
@pytest.mark.parametrize("name", SUBLAYERS)
def test_a_dropped_sublayer_equals_zeroed_outputs(name: str, part: str) -> None:
    def reference(model: PreTrainedModel) -> None:
        block, found = _blocks(model)[1]
        if part == "attention":
            assert found.attention is not None
            _zero(block, found.attention.o)
        elif found.mlp is not None:
            _zero(block, found.mlp.down)
        else:
            assert found.experts is not None
            with torch.no_grad():
                block.get_submodule(found.experts.experts).down_proj.zero_()
            if found.experts.shared is not None:
                _zero(block, found.experts.shared.down)

    _compare(name, lambda _: [DropSublayer(layer=1, part=part)], reference)


def test_a_dropped_sublayer_leaves_no_weight_of_its_own() -> None:
    model = families.gemma3()
    found = anatomy.find(model)
    after = surgery.apply_model(model, found, [DropSublayer(layer=1, part="attention")])
    names = {name for name, _ in model.model.layers[1].named_parameters()}
    assert names == {
        "mlp.gate_proj.weight",
        "mlp.up_proj.weight",
        "mlp.down_proj.weight",
        "pre_feedforward_layernorm.weight",
        "post_feedforward_layernorm.weight",
    }
    assert after.language.blocks[1].attention is None


@pytest.mark.parametrize("name", SUBLAYERS)
def test_a_block_without_sublayers_is_the_identity(name: str) -> None:
    edits = [DropSublayer(layer=1, part="attention"), DropSublayer(layer=1, part="mlp")]
    _compare(name, lambda _: edits, lambda model: _make_identity(model, 1))


def _make_identity(model: PreTrainedModel, index: int, tower: str = "language") -> None:
    # The module stays what it is: transformers records hidden states by the class of the block.
    path = getattr(anatomy.find(model), tower).blocks[index].path
    anatomy.resolve(model, path).forward = lambda hidden_states, *_, **__: hidden_states


@pytest.mark.parametrize("name", FAMILIES)
def test_a_dropped_block_equals_the_identity(name: str) -> None:
    _compare(name, lambda _: [DropBlock(layer=1)], lambda model: _make_identity(model, 1))


def test_blocks_are_renumbered() -> None:
    model = families.qwen3_moe_mixed()
    found = anatomy.find(model)
    after = surgery.apply_model(model, found, [DropBlock(layer=0)])
    assert [block.index for block in after.language.blocks] == [0, 1, 2]
    assert [layer.self_attn.layer_idx for layer in model.model.layers] == [0, 1, 2]
    assert model.config.mlp_only_layers == [0]
    assert after.language.blocks[0].mlp is not None


@pytest.mark.parametrize("name", DENSE)
def test_kept_neurons_equal_zeroed_neurons(name: str) -> None:
    def gone(part: Block) -> list[int]:
        assert part.mlp is not None
        return [i for i in range(part.mlp.width) if i % 3 == part.index % 3]

    def edits(found: Anatomy) -> list[Edit]:
        dense = [part for part in found.language.blocks if part.mlp is not None]
        return [
            KeepNeurons(
                layer=part.index, keep=tuple(sorted(set(range(part.mlp.width)) - set(gone(part)), reverse=True))
            )
            for part in dense
        ]

    def reference(model: PreTrainedModel) -> None:
        for block, part in _blocks(model):
            if part.mlp is not None:
                _zero(block, part.mlp.down, gone(part))

    _compare(name, edits, reference)


@pytest.mark.parametrize("name", HEADS)
def test_kept_heads_equal_zeroed_heads(name: str) -> None:
    def kept(part: Block) -> tuple[int, ...]:
        assert part.attention is not None
        return (1,) if part.attention.kv_heads == 2 else (3, 0)

    def reference(model: PreTrainedModel) -> None:
        for block, part in _blocks(model):
            attention = part.attention
            assert attention is not None
            ratio, size = attention.heads // attention.kv_heads, attention.head_dim
            gone = [head for head in range(attention.heads) if head // ratio not in kept(part)]
            _zero(block, attention.o, [head * size + i for head in gone for i in range(size)])

    _compare(name, lambda found: [KeepHeads(layer=b.index, keep=kept(b)) for b in found.language.blocks], reference)


def _mask_router(router: nn.Module, gone: list[int], top_k: int, family: str) -> None:
    """Give a router a forward of its own, written from the papers, in which removed experts cannot be chosen."""

    def softmax_routing(hidden: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        scores = hidden.reshape(-1, hidden.shape[-1]) @ router.weight.T
        scores[:, gone] = -torch.inf
        chances = scores.exp() / scores.exp().sum(-1, keepdim=True)
        weights, chosen = chances.sort(dim=-1, descending=True)
        weights, chosen = weights[:, :top_k], chosen[:, :top_k]
        if family == "mixtral" or router.norm_topk_prob:
            weights = weights / weights.sum(-1, keepdim=True)
        return scores, weights, chosen

    def group_routing(hidden: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        scores = hidden.reshape(-1, hidden.shape[-1]) @ router.weight.T
        scores[:, gone] = -torch.inf
        affinity = 1 / (1 + (-scores).exp())
        biased = affinity + router.e_score_correction_bias
        biased[:, gone] = -torch.inf
        grouped = biased.unflatten(-1, (router.num_group, -1))
        best_two = grouped.sort(dim=-1, descending=True)[0][..., :2].sum(-1)
        order = best_two.sort(dim=-1, descending=True)[1]
        for token, closed in enumerate(order[:, router.topk_group :].tolist()):
            grouped[token, closed] = -torch.inf
        chosen = grouped.flatten(-2).sort(dim=-1, descending=True)[1][:, :top_k]
        weights = affinity.gather(1, chosen)
        weights = weights / weights.sum(-1, keepdim=True)
        return scores, weights * router.routed_scaling_factor, chosen

    router.forward = group_routing if family == "deepseek_v3" else softmax_routing


@pytest.mark.parametrize("top_k", [2, 1])
@pytest.mark.parametrize("name", MOE)
def test_kept_experts_equal_masked_router(name: str, top_k: int) -> None:
    def reference(model: PreTrainedModel) -> None:
        for block, part in _blocks(model):
            if part.experts is not None:
                gone = sorted(set(range(part.experts.count)) - set(KEPT_EXPERTS))
                _mask_router(block.get_submodule(part.experts.router), gone, top_k, name)

    def edits(found: Anatomy) -> list[Edit]:
        sparse = [part for part in found.language.blocks if part.experts is not None]
        return [KeepExperts(layer=part.index, keep=KEPT_EXPERTS, top_k=top_k) for part in sparse]

    _compare(name, edits, reference)


@pytest.mark.parametrize("name", MOE)
def test_the_reference_router_is_the_familys(name: str) -> None:
    model = FAMILIES[name]()
    before = logits(model, inputs(name))
    for block, part in _blocks(model):
        if part.experts is not None:
            _mask_router(block.get_submodule(part.experts.router), [], 2, name)
    assert torch.allclose(logits(model, inputs(name)), before, atol=1e-5, rtol=0)


@pytest.mark.parametrize("ragged", [False, True])
@pytest.mark.parametrize("name", MOE)
def test_kept_expert_neurons_equal_zeroed_neurons(name: str, ragged: bool) -> None:
    def kept(part: Block, e: int) -> tuple[int, ...]:
        assert part.experts is not None
        width = part.experts.width
        return tuple(range(e, width)) if ragged and e else tuple((e + 3 * i) % width for i in range(width // 3))

    def edits(found: Anatomy) -> list[Edit]:
        sparse = [part for part in found.language.blocks if part.experts is not None]
        return [
            KeepExpertNeurons(layer=part.index, keep=tuple(kept(part, e) for e in range(part.experts.count)))
            for part in sparse
        ]

    def reference(model: PreTrainedModel) -> None:
        for block, part in _blocks(model):
            if part.experts is not None:
                down = block.get_submodule(part.experts.experts).down_proj
                for e in range(part.experts.count):
                    gone = sorted(set(range(part.experts.width)) - set(kept(part, e)))
                    with torch.no_grad():
                        down[e][:, gone] = 0

    _compare(name, edits, reference)


@pytest.mark.parametrize("name", ["qwen2_moe", "deepseek_v3"])
def test_shared_experts_are_cut_too(name: str) -> None:
    def edits(found: Anatomy) -> list[Edit]:
        part = found.language.blocks[-1]
        assert part.experts is not None
        assert part.experts.shared is not None
        whole = (tuple(range(part.experts.width)),) * part.experts.count
        return [KeepExpertNeurons(layer=part.index, keep=whole, shared=tuple(range(3, part.experts.shared.width)))]

    def reference(model: PreTrainedModel) -> None:
        block, part = _blocks(model)[-1]
        assert part.experts is not None
        assert part.experts.shared is not None
        _zero(block, part.experts.shared.down, [0, 1, 2])

    _compare(name, edits, reference)


def test_an_expert_without_neurons_returns_zeros() -> None:
    model = families.qwen3_moe()
    found = anatomy.find(model)
    widths = (0, 24, 3, 0, 7, 24, 1, 24)
    keep = tuple(tuple(range(width)) for width in widths)
    after = surgery.apply_model(model, found, [KeepExpertNeurons(layer=1, keep=keep)])
    experts = model.model.layers[1].mlp.experts
    hidden = torch.randn(5, 32)
    out = experts(hidden, torch.zeros(5, 1, dtype=torch.long), torch.ones(5, 1))
    assert torch.equal(out, torch.zeros(5, 32))
    assert after.language.blocks[1].experts.widths == widths
    assert after.language.blocks[1].experts.width == 24


def test_edits_of_one_layer_apply_in_order() -> None:
    model, other = families.qwen3_moe(), families.qwen3_moe()
    found = anatomy.find(model)
    narrow = tuple(tuple(range(e + 1)) for e in range(4))
    surgery.apply_model(
        model, found, [KeepExperts(layer=0, keep=(6, 4, 2, 0), top_k=2), KeepExpertNeurons(layer=0, keep=narrow)]
    )
    wide = tuple(tuple(range({6: 1, 4: 2, 2: 3, 0: 4}.get(e, 5))) for e in range(8))
    surgery.apply_model(
        other, found, [KeepExpertNeurons(layer=0, keep=wide), KeepExperts(layer=0, keep=(6, 4, 2, 0), top_k=2)]
    )
    assert model.model.layers[0].mlp.experts.widths == (1, 2, 3, 4)
    assert torch.equal(logits(model, inputs("qwen3_moe")), logits(other, inputs("qwen3_moe")))


def test_one_block_alone_can_be_edited() -> None:
    model, other = families.llama(), families.llama()
    found = anatomy.find(model)
    edits: list[Edit] = [KeepNeurons(layer=1, keep=(1, 5, 9)), KeepHeads(layer=1, keep=(0,))]
    part = surgery.apply(model.model.layers[1], found.language.blocks[1], edits)
    whole = surgery.apply_model(other, found, edits)
    assert part == whole.language.blocks[1]
    assert torch.equal(logits(model, inputs("llama")), logits(other, inputs("llama")))


def test_blocks_edited_one_by_one_and_settled_equal_the_whole_model() -> None:
    model, other = families.qwen3_moe_mixed(), families.qwen3_moe_mixed()
    found = anatomy.find(model)
    edits: list[Edit] = [
        DropBlock(layer=2),
        KeepNeurons(layer=1, keep=(4, 2)),
        KeepExperts(layer=3, keep=(7, 1, 2), top_k=2),
    ]
    for layer in (1, 3):
        part = found.language.blocks[layer]
        surgery.apply(model.model.layers[layer], part, [edit for edit in edits if edit.layer == layer])
    assert surgery.settle(model, found, edits) == surgery.apply_model(other, found, edits)
    assert model.config.to_dict() == other.config.to_dict()
    assert torch.equal(logits(model, inputs("qwen3_moe")), logits(other, inputs("qwen3_moe")))


@pytest.mark.parametrize("name", FAMILIES)
def test_meta_foretells_shapes_and_types(name: str) -> None:
    model = FAMILIES[name]()
    with torch.device("meta"):
        skeleton = type(model)(copy.deepcopy(model.config))
    found = anatomy.find(model)
    part = found.language.blocks[-1]
    edits: list[Edit] = [DropBlock(layer=0)]
    if name != "bert":
        edits.append(DropSublayer(layer=1, part="attention"))
    if part.mlp is not None:
        edits.append(KeepNeurons(layer=part.index, keep=(2, 4, 8)))
    if part.experts is not None:
        edits.append(KeepExperts(layer=part.index, keep=KEPT_EXPERTS, top_k=1))
        edits.append(KeepExpertNeurons(layer=part.index, keep=((0, 1), (2,), (), (3, 4, 5))))
    if name in HEADS:
        edits.append(KeepHeads(layer=part.index, keep=(0,)))
    real, foretold = surgery.apply_model(model, found, edits), surgery.apply_model(skeleton, found, edits)
    assert real == foretold

    def shapes(hf: PreTrainedModel) -> dict[str, tuple[torch.Size, torch.dtype]]:
        return {key: (value.shape, value.dtype) for key, value in hf.state_dict().items()}

    assert shapes(model) == shapes(skeleton)
    assert all(parameter.is_meta for parameter in skeleton.parameters())


@pytest.mark.parametrize("name", VLMS)
def test_the_vision_tower_can_be_edited(name: str) -> None:
    model, other = FAMILIES[name](), FAMILIES[name]()
    given = inputs(name)
    before = logits(model, given)
    found = anatomy.find(model)
    assert found.vision is not None
    text = model.config.text_config.to_dict()
    edits: list[Edit] = []
    for part in found.vision.blocks:
        assert part.mlp is not None
        edits.append(KeepNeurons(layer=part.index, keep=tuple(range(0, part.mlp.width, 2))))
        edits.append(KeepHeads(layer=part.index, keep=(2, 1)))
        block = other.get_submodule(part.path)
        _zero(block, part.mlp.down, list(range(1, part.mlp.width, 2)))
        _zero(block, part.attention.o, [*range(8), *range(24, 32)])
    after = surgery.apply_model(model, found, edits, tower="vision")
    assert torch.allclose(logits(model, given), logits(other, given), atol=1e-5, rtol=0)
    assert (logits(model, given) - before).abs().max() > 1e-4
    assert after.vision.blocks[0].attention.heads == 2
    assert after.language == found.language
    assert model.config.text_config.to_dict() == text


@pytest.mark.parametrize("name", VLMS)
def test_vision_sublayers_and_blocks_can_go(name: str) -> None:
    model, other = FAMILIES[name](), FAMILIES[name]()
    given = inputs(name)
    found = anatomy.find(model)
    edits = [DropSublayer(layer=0, part="attention"), DropBlock(layer=1)]
    surgery.apply_model(model, found, edits, tower="vision")
    block, part = other.get_submodule(found.vision.blocks[0].path), found.vision.blocks[0]
    _zero(block, part.attention.o)
    _make_identity(other, 1, "vision")
    assert torch.allclose(logits(model, given), logits(other, given), atol=1e-5, rtol=0)


def test_ties_settings_and_generation_config_stay() -> None:
    model = families.llama()
    model.set_attn_implementation("eager")
    model.generation_config.max_new_tokens = 7
    model.model.layers[0].mlp.up_proj.weight.requires_grad_(False)
    surgery.apply_model(model, anatomy.find(model), [KeepNeurons(layer=0, keep=(0, 1)), DropBlock(layer=2)])
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert model.config._attn_implementation == "eager"
    assert model.generation_config.max_new_tokens == 7
    assert not model.model.layers[0].mlp.up_proj.weight.requires_grad
    assert model.model.layers[0].mlp.down_proj.weight.requires_grad
    assert model.model.config is model.config
    assert model.model.layers[0].self_attn.config is model.config


def test_numbers_of_the_modules_follow() -> None:
    model = families.deepseek_v3()
    found = anatomy.find(model)
    edits: list[Edit] = []
    for layer in (1, 2, 3):
        edits.append(KeepExperts(layer=layer, keep=KEPT_EXPERTS, top_k=1))
        edits.append(KeepExpertNeurons(layer=layer, keep=((0, 1, 2, 5),) * 4, shared=(0, 1, 2, 3)))
    surgery.apply_model(model, found, edits)
    moe = model.model.layers[2].mlp
    assert (moe.gate.num_experts, moe.gate.top_k, moe.experts.num_experts, moe.experts.intermediate_dim) == (4, 1, 4, 4)
    assert moe.gate.e_score_correction_bias.shape == (4,)
    assert moe.shared_experts.intermediate_size == 4
    config = model.config
    assert (config.n_routed_experts, config.num_experts_per_tok, config.moe_intermediate_size) == (4, 1, 4)
    assert config.n_shared_experts == 1


REFUSED: list[tuple[str, list[Edit], type[Exception], str]] = [
    ("deepseek_v3", [KeepHeads(layer=0, keep=(0,))], ArchitectureError, "latent attention"),
    ("olmoe", [KeepHeads(layer=0, keep=(0,))], ArchitectureError, "normalised over all heads"),
    ("bert", [DropSublayer(layer=0, part="attention")], ArchitectureError, "after the addition"),
    ("bert", [DropSublayer(layer=0, part="mlp")], ArchitectureError, "after the addition"),
    ("deepseek_v3", [KeepExperts(layer=1, keep=(0, 1, 2, 4), top_k=2)], BudgetError, "groups that must lose equally"),
    ("deepseek_v3", [KeepExperts(layer=1, keep=(0, 4), top_k=1)], BudgetError, "keep at least 2"),
    ("deepseek_v3", [KeepExperts(layer=1, keep=(4, 5, 0, 1), top_k=2)], BudgetError, "group by group"),
    ("deepseek_v3", [KeepExperts(layer=0, keep=(0, 4), top_k=1)], BudgetError, "layer 0 has no experts"),
    ("mixtral", [KeepExperts(layer=1, keep=(3,), top_k=2)], BudgetError, "each token uses 2"),
    ("mixtral", [KeepExperts(layer=1, keep=(3, 4, 5), top_k=3)], BudgetError, "top_k must be from 1 to 2"),
    ("mixtral", [KeepExperts(layer=1, keep=(3, 3, 5), top_k=2)], BudgetError, "listed twice"),
    ("mixtral", [KeepExperts(layer=1, keep=(3, 8), top_k=2)], BudgetError, "from 0 to 7"),
    ("mixtral", [KeepExpertNeurons(layer=1, keep=((0,),) * 7)], BudgetError, "one list for each expert"),
    ("mixtral", [KeepExpertNeurons(layer=1, keep=((),) * 8)], BudgetError, "keep at least 1"),
    ("mixtral", [KeepExpertNeurons(layer=1, keep=((0, 1, 2, 3),) * 8, shared=(0,))], BudgetError, "no shared expert"),
    ("mixtral", [KeepExpertNeurons(layer=1, keep=((0, 1, 2),) * 8)], BudgetError, "multiple of 4"),
    ("mixtral", [KeepNeurons(layer=1, keep=(0,))], BudgetError, "no dense MLP"),
    ("llama", [KeepNeurons(layer=1, keep=())], BudgetError, "keep at least 1"),
    ("llama", [KeepNeurons(layer=1, keep=(-1, 2))], BudgetError, "from 0 to 47"),
    ("llama", [KeepHeads(layer=1, keep=(2,))], BudgetError, "from 0 to 1"),
    ("llama", [KeepHeads(layer=3, keep=(0,))], BudgetError, "layers 0 to 2"),
    ("llama", [DropBlock(layer=0), DropBlock(layer=1), DropBlock(layer=2)], BudgetError, "keep at least one"),
    ("llama", [DropSublayer(layer=1, part="mlp"), KeepNeurons(layer=1, keep=(0,))], BudgetError, "no dense MLP"),
]


@pytest.mark.parametrize(("name", "edits", "error", "says"), REFUSED)
def test_what_is_not_allowed_is_refused_before_anything_changes(
    name: str, edits: list[Edit], error: type[Exception], says: str
) -> None:
    model = FAMILIES[name]()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    config = model.config.to_dict()
    allowed: list[Edit] = [DropSublayer(layer=2, part="mlp")] if name != "bert" else [KeepNeurons(layer=2, keep=(0,))]
    with pytest.raises(error, match=says) as caught:
        surgery.apply_model(model, anatomy.find(model), [*allowed, *edits])
    assert "\n" not in str(caught.value)
    after = model.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(value, after[key]) for key, value in before.items())
    assert model.config.to_dict() == config


def test_a_missing_tower_is_named() -> None:
    model = families.llama()
    with pytest.raises(ArchitectureError, match="no vision tower"):
        surgery.apply_model(model, anatomy.find(model), [KeepNeurons(layer=0, keep=(0,))], tower="vision")


def test_fused_rows_of_unknown_order_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    from paredown.core import architectures

    monkeypatch.delitem(architectures.FUSED_ORDER, "gpt_neox")
    model = families.gpt_neox()
    with pytest.raises(ArchitectureError, match="FUSED_ORDER"):
        surgery.apply_model(model, anatomy.find(model), [KeepHeads(layer=0, keep=(0,))])


def test_experts_with_a_gating_of_their_own_cannot_be_ragged() -> None:
    model = families.mixtral()
    experts = model.model.layers[0].mlp.experts
    own = type("OwnGating", (type(experts),), {"_apply_gate": lambda self, x: functional.relu(x.chunk(2, -1)[0])})
    experts.__class__ = own
    keep = ((0, 1), *((0,),) * 7)
    with pytest.raises(ArchitectureError, match="gates its experts in its own way"):
        surgery.apply_model(model, anatomy.find(model), [KeepExpertNeurons(layer=0, keep=keep)])


@pytest.mark.parametrize("name", DECODERS)
def test_bfloat16_stays_bfloat16(name: str) -> None:
    model = FAMILIES[name]().to(torch.bfloat16)
    found = anatomy.find(model)
    part = found.language.blocks[-1]
    edit: Edit
    if part.experts is not None:
        edit = KeepExpertNeurons(layer=part.index, keep=((0, 1), *((0,),) * 7))
    else:
        edit = KeepNeurons(layer=part.index, keep=(0, 1))
    types = {key: value.dtype for key, value in model.state_dict().items() if f"{part.path}." not in key}
    surgery.apply_model(model, found, [edit])
    after = model.state_dict()
    assert all(after[key].dtype == dtype for key, dtype in types.items())
    assert all(value.dtype == torch.bfloat16 for value in anatomy.resolve(model, part.path).parameters())
    assert logits(model, inputs(name)).dtype == torch.bfloat16
