"""LLM-Drop: every check of its card."""

from __future__ import annotations

import functools
from collections.abc import Callable
from copy import deepcopy
from typing import Any

import families
import matrix
import pytest
import torch
import torch.nn.functional as F
import transformers as tf

import paredown
from paredown.core import surgery
from paredown.core.checkpoint import Model
from paredown.core.edits import DropBlock, DropSublayer
from paredown.core.method import Compressor
from paredown.errors import ArchitectureError, BudgetError, DataError
from paredown.methods.depth.llm_drop import LLMDrop, LLMDropBlocks, RandomBlocks, RandomSublayers

LAYERS = 6


@functools.cache
def _deep() -> tf.PreTrainedModel:
    config = tf.LlamaConfig(
        vocab_size=families.VOCAB,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=LAYERS,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=128,
        attention_bias=True,
        mlp_bias=True,
        bos_token_id=1,
        eos_token_id=None,
        pad_token_id=0,
    )
    return families._seeded(lambda: tf.LlamaForCausalLM(config))


def deep() -> Model:
    """A llama of six layers; every bias is there and not zero."""
    return Model.of(deepcopy(_deep()))


def hidden_states(model: Model, ids: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """What enters each block, and what leaves the last one before the final norm."""
    seen: list[torch.Tensor] = []
    blocks = [model.hf.get_submodule(b.path) for b in model.anatomy.language.blocks]
    handles = [
        b.register_forward_pre_hook(
            lambda _, args, kw: seen.append(args[0] if args else kw["hidden_states"]), with_kwargs=True
        )
        for b in blocks
    ]
    handles.append(blocks[-1].register_forward_hook(lambda _, __, out: seen.append(_tensor(out))))
    with torch.no_grad():
        model.hf(input_ids=ids)
    for handle in handles:
        handle.remove()
    return tuple(seen)


def _tensor(output: Any) -> torch.Tensor:
    return output[0] if isinstance(output, tuple) else output


def similarity(x: torch.Tensor, y: torch.Tensor) -> float:
    """Return the mean over tokens of the cosine, in double precision."""
    return float(F.cosine_similarity(x.double(), y.double(), dim=-1).mean())


@pytest.mark.parametrize("family", matrix.FAMILIES["depth"])
def test_streamed_similarity_is_that_of_one_full_forward_with_hooks(family):
    ids = matrix.batch().input_ids
    model = matrix.model(family)
    states, added = hidden_states(model, ids), {}
    handles = []
    for block in model.anatomy.language.blocks:
        for kind, part in (("attention", block.attention), ("mlp", block.mlp or block.experts)):
            module = model.hf.get_submodule(f"{block.path}.{part.contribution}")
            handles.append(module.register_forward_hook(functools.partial(_note, added, (block.index, kind))))
    with torch.no_grad():
        model.hf(input_ids=ids)
    for handle in handles:
        handle.remove()
    sub, _ = matrix.scores(LLMDrop(keep=0.5, part="joint"), matrix.model(family), matrix.batch())
    whole, _ = matrix.scores(LLMDropBlocks(keep=0.5), matrix.model(family), matrix.batch())
    for block in model.anatomy.language.blocks:
        i, h = block.index, states[block.index]
        a, m = added[i, "attention"].reshape(h.shape), added[i, "mlp"].reshape(h.shape)
        between = h + a if block.residual == "pre" else h
        torch.testing.assert_close(states[i + 1], between + m if block.residual == "pre" else h + a + m)
        assert float(sub[i]["attention"]) == pytest.approx(similarity(h, h + a), abs=1e-5)
        assert float(sub[i]["mlp"]) == pytest.approx(similarity(between, between + m), abs=1e-5)
        assert float(whole[i]["block"]) == pytest.approx(similarity(h, states[i + 1]), abs=1e-5)


def _note(added: dict[Any, torch.Tensor], key: Any, _: Any, __: Any, output: Any) -> None:
    added[key] = _tensor(output)


def test_a_family_that_scales_what_it_adds_is_measured_as_it_is():
    """Granite adds 0.2 times the sub-layer; the stream between the two is read from the model, not computed."""
    config = tf.GraniteConfig(**families._GQA, residual_multiplier=0.2)
    built = families._seeded(lambda: tf.GraniteForCausalLM(config))
    model, ids = Model.of(deepcopy(built)), matrix.batch().input_ids
    states = hidden_states(model, ids)
    found, _ = matrix.scores(LLMDrop(keep=0.5, part="joint"), Model.of(deepcopy(built)), matrix.batch())
    for block in model.anatomy.language.blocks:
        middle: list[torch.Tensor] = []
        norm = model.hf.get_submodule(f"{block.path}.post_attention_layernorm")
        handle = norm.register_forward_pre_hook(lambda _, args, seen=middle: seen.append(args[0]))
        with torch.no_grad():
            model.hf(input_ids=ids)
        handle.remove()
        i = block.index
        assert float(found[i]["attention"]) == pytest.approx(similarity(states[i], middle[0]), abs=1e-5)
        assert float(found[i]["mlp"]) == pytest.approx(similarity(middle[0], states[i + 1]), abs=1e-5)


@pytest.mark.parametrize("part", ["attention", "mlp"])
@pytest.mark.parametrize("layer", [0, 3, 5])
def test_a_planted_weak_sublayer_goes_first(part, layer):
    model = deep()
    block = model.anatomy.language.blocks[layer]
    out = model.hf.get_submodule(f"{block.path}.{block.attention.o if part == 'attention' else block.mlp.down}")
    with torch.no_grad():
        out.weight *= 1e-4
        out.bias *= 1e-4
    outcome = LLMDrop(keep=0.8, part=part).compress(model, matrix.batch())
    assert outcome.edits == [DropSublayer(layer=layer, part=part)]


@pytest.mark.parametrize("part", ["attention", "mlp", "joint"])
@pytest.mark.parametrize("family", ["llama", "gemma3", "qwen3_moe_mixed", "deepseek_v3", "phi"])
def test_dropped_is_the_same_as_zeroed(part, family):
    """Zeroing the last projection, bias included, of the dense model; feeding the normed stream on would fail this."""
    dropped, zeroed = matrix.model(family), matrix.model(family)
    outcome = LLMDrop(keep=0.5, part=part).compress(dropped, matrix.batch())
    with torch.no_grad():
        for edit in outcome.edits:
            block = zeroed.anatomy.language.blocks[edit.layer]
            module = zeroed.hf.get_submodule(block.path)
            if edit.part == "attention":
                ends = [block.attention.o]
            elif block.mlp is not None:
                ends = [block.mlp.down]
            else:
                shared = block.experts.shared
                ends = [shared.down] if shared is not None else []
                module.get_submodule(block.experts.experts).down_proj.zero_()
            for end in ends:
                for parameter in module.get_submodule(end).parameters():
                    parameter.zero_()
            contribution = (block.attention if edit.part == "attention" else block.mlp or block.experts).contribution
            norm = module.get_submodule(contribution)
            assert _gives_zero_for_zero(norm, family, contribution)
    given = families.inputs(family)
    torch.testing.assert_close(
        families.logits(dropped.hf, given), families.logits(zeroed.hf, given), atol=1e-6, rtol=1e-6
    )
    assert not torch.allclose(families.logits(dropped.hf, given), families.logits(matrix.model(family).hf, given))


def _gives_zero_for_zero(norm: torch.nn.Module, family: str, path: str) -> bool:
    """Where a norm follows the sub-layer (Gemma), zero in must be zero out, or the comparison would prove nothing."""
    if family != "gemma3":
        return "norm" not in path
    return not norm(torch.zeros(1, 32)).any()


def test_feeding_the_normed_stream_on_would_be_another_model():
    """The wrong reading, in which the norm stays and its output goes on, is told apart by the test above."""
    dropped, wrong, seen = deep(), deep(), {}
    surgery.apply_model(dropped.hf, dropped.anatomy, [DropSublayer(layer=2, part="attention")])
    block = wrong.hf.get_submodule(wrong.anatomy.language.blocks[2].path)
    block.register_forward_pre_hook(lambda _, args: seen.update(stream=args[0]))
    block.self_attn.forward = lambda hidden_states, **_: (hidden_states - seen["stream"], None)
    given = families.inputs("llama")
    assert float((families.logits(dropped.hf, given) - families.logits(wrong.hf, given)).abs().max()) > 1e-2


@pytest.mark.parametrize("edits", [[0], [0, 1], [2, 4], [5]])
@pytest.mark.parametrize("padded", [False, True])
def test_generating_with_the_cache_is_generating_without(edits, padded):
    """Greedy, 20 tokens, batch 2 with left padding too, also when the first layer's attention is gone."""
    model = deep()
    model.anatomy = surgery.apply_model(
        model.hf, model.anatomy, [DropSublayer(layer=i, part="attention") for i in edits]
    )
    ids = torch.randint(3, 90, (2, 9), generator=torch.Generator().manual_seed(4))
    mask = torch.ones_like(ids)
    if padded:
        ids[1, :4], mask[1, :4] = 0, 0
    # Without a ban on repetition so small a model says one word for ever.
    common: dict[str, Any] = {"do_sample": False, "max_new_tokens": 20, "min_new_tokens": 20, "pad_token_id": 0}
    with torch.no_grad():
        cached = model.hf.generate(
            ids,
            attention_mask=mask,
            use_cache=True,
            no_repeat_ngram_size=1,
            return_dict_in_generate=True,
            output_logits=True,
            **common,
        )
        plain, seen = ids, mask
        for step in range(20):
            positions = (seen.cumsum(-1) - 1).clamp(min=0)
            last = model.hf(input_ids=plain, attention_mask=seen, position_ids=positions, use_cache=False).logits[:, -1]
            torch.testing.assert_close(cached.logits[step], last, atol=1e-5, rtol=1e-5)
            plain = torch.cat([plain, last.scatter(1, plain, -torch.inf).argmax(-1, keepdim=True)], dim=1)
            seen = torch.cat([seen, torch.ones_like(seen[:, :1])], dim=1)
    assert cached.sequences.shape == (2, 29)
    assert torch.equal(cached.sequences, plain)
    steps = torch.stack(cached.logits)
    assert float((steps[1:] - steps[:-1]).abs().amax((1, 2)).min()) > 1e-3, "logits that never change prove nothing"
    assert float((steps[:, 0] - steps[:, 1]).abs().amax(1).min()) > 1e-3, "two rows alike would hide a mix-up"


@pytest.mark.parametrize("gone", [[0], [1, 4], [0, 1, 2, 3, 4]])
def test_the_cache_holds_keys_of_the_kept_layers_only(gone):
    model = deep()
    surgery.apply_model(model.hf, model.anatomy, [DropSublayer(layer=i, part="attention") for i in gone])
    cache = tf.DynamicCache(config=model.config)
    with torch.no_grad():
        model.hf(input_ids=matrix.batch().input_ids, past_key_values=cache, use_cache=True)
    filled = [i for i, layer in enumerate(cache.layers) if layer.keys is not None and layer.keys.numel()]
    assert filled == [i for i in range(LAYERS) if i not in gone]
    assert len(filled) == LAYERS - len(gone)
    assert cache.get_seq_length() == 12


@pytest.mark.parametrize("keep", [0.83, 0.7, 0.5, 0.34, 0.01])
def test_consecutive_blocks_are_the_best_window_by_brute_force(keep):
    """Every start is looked at, the last one (the official search never does) included."""
    n = matrix.removed(LAYERS, keep)
    assert n
    states = hidden_states(deep(), matrix.batch().input_ids)
    windows = [similarity(states[i], states[i + n]) for i in range(LAYERS - n + 1)]
    outcome = LLMDropBlocks(keep=keep, consecutive=True).compress(deep(), matrix.batch())
    start = max(range(len(windows)), key=lambda i: (windows[i], -i))
    assert [e.layer for e in outcome.edits] == list(range(start, start + n))


@pytest.mark.parametrize("start", [0, 2, 4])
def test_a_planted_window_is_found_wherever_it_lies(start):
    """The last start too: both blocks there add almost nothing."""
    model = deep()
    with torch.no_grad():
        for layer in (start, start + 1):
            block = model.anatomy.language.blocks[layer]
            for path in (block.attention.o, block.mlp.down):
                for parameter in model.hf.get_submodule(f"{block.path}.{path}").parameters():
                    parameter.mul_(1e-4)
    outcome = LLMDropBlocks(keep=0.66, consecutive=True).compress(model, matrix.batch())
    assert outcome.edits == [DropBlock(layer=start), DropBlock(layer=start + 1)]


def test_single_blocks_are_those_with_the_largest_similarity():
    states = hidden_states(deep(), matrix.batch().input_ids)
    values = [similarity(states[i], states[i + 1]) for i in range(LAYERS)]
    outcome = LLMDropBlocks(keep=0.5).compress(deep(), matrix.batch())
    best = sorted(range(LAYERS), key=lambda i: -values[i])[:3]
    assert [e.layer for e in outcome.edits] == sorted(best)


def test_dropping_blocks_is_running_the_others():
    model = deep()
    outcome = LLMDropBlocks(keep=0.5).compress(model, matrix.batch())
    gone = {e.layer for e in outcome.edits}
    plain = deep()
    plain.hf.model.layers = torch.nn.ModuleList(b for i, b in enumerate(plain.hf.model.layers) if i not in gone)
    given = families.inputs("llama")
    assert torch.equal(families.logits(model.hf, given), families.logits(plain.hf, given))
    assert model.config.num_hidden_layers == LAYERS - len(gone)
    assert [b.self_attn.layer_idx for b in model.hf.model.layers] == list(range(3))


def test_joint_takes_the_best_of_one_list():
    found, edits = matrix.scores(LLMDrop(keep=0.6, part="joint"), deep(), matrix.batch())
    listed = [(float(found[i][kind]), kind, i) for kind in ("attention", "mlp") for i in range(LAYERS)]
    best = sorted(listed, key=lambda item: -item[0])[: matrix.removed(2 * LAYERS, 0.6)]
    assert {(e.part, e.layer) for e in edits} == {(kind, i) for _, kind, i in best}
    assert len(edits) == 4


@pytest.mark.parametrize(
    ("method", "wanted"),
    [
        (LLMDrop(keep=0.5), [("attention", 0), ("attention", 1), ("attention", 2)]),
        (LLMDrop(keep=0.34, part="joint"), [("attention", i) for i in range(6)] + [("mlp", 0)]),
        (LLMDropBlocks(keep=0.5), [(None, 0), (None, 1), (None, 2)]),
        (LLMDropBlocks(keep=0.5, consecutive=True), [(None, 0), (None, 1), (None, 2)]),
    ],
    ids=["attention", "joint", "blocks", "window"],
)
def test_ties_take_the_lower_layer_and_attention_before_mlp(method, wanted):
    blocks = deep().anatomy.language.blocks
    alike = {name: torch.tensor(0.5) for name in ("attention", "mlp", "block", "window")}
    edits = method.decide(blocks, {b.index: alike for b in blocks})
    assert sorted((getattr(e, "part", None) or "", e.layer) for e in edits) == sorted((k or "", i) for k, i in wanted)


def test_similarity_does_not_depend_on_the_batch():
    """The official hook takes the first row of a batch only; here all rows count, in any cut."""
    rows = matrix.batch().input_ids
    together, _ = matrix.scores(LLMDrop(keep=0.5, part="joint"), deep(), matrix.of(rows, None))
    apart = matrix.rows_apart(list(rows), lookback=0)
    single, _ = matrix.scores(LLMDrop(keep=0.5, part="joint"), deep(), None, stream=apart)
    first, _ = matrix.scores(LLMDrop(keep=0.5, part="joint"), deep(), matrix.of(rows[:1], None))
    for layer, values in together.items():
        for name, value in values.items():
            assert float(value) == pytest.approx(float(single[layer][name]), abs=1e-6)
            assert float(value) != pytest.approx(float(first[layer][name]), abs=1e-6)


@pytest.mark.parametrize(
    "method", [LLMDrop(keep=0.5), LLMDrop(keep=0.5, part="joint"), LLMDropBlocks(keep=0.5)], ids=str
)
def test_the_config_comes_back_from_disk_and_so_do_the_logits(method, tmp_path):
    model = deep()
    outcome = method.compress(model, matrix.batch())
    given = families.inputs("llama")
    before = families.logits(model.hf, given)
    model.save(tmp_path)
    loaded = paredown.load(tmp_path)
    assert torch.equal(families.logits(loaded.hf, given), before)
    gone = [] if isinstance(method, LLMDropBlocks) else [(e.layer, e.part) for e in outcome.edits]
    blocks = loaded.anatomy.language.blocks
    assert [(b.index, "attention") for b in blocks if b.attention is None] == [g for g in gone if g[1] == "attention"]
    assert [(b.index, "mlp") for b in blocks if b.mlp is None] == [g for g in gone if g[1] == "mlp"]


def test_a_second_step_measures_behind_the_first():
    """The iterative form as a recipe with two steps: what lost its attention still runs its MLP."""
    model = deep()
    first = LLMDrop(keep=0.8).compress(model, matrix.batch()).edits
    states = hidden_states(model, matrix.batch().input_ids)
    found, second = matrix.scores(LLMDrop(keep=0.8), model, matrix.batch())
    assert set(found) == set(range(LAYERS)) - {first[0].layer}
    assert len(second) == 1
    assert second[0].layer != first[0].layer
    gone = first[0].layer
    block = model.anatomy.language.blocks[gone]
    module = model.hf.get_submodule(block.path)
    with torch.no_grad():
        ran = states[gone] + module.mlp(module.post_attention_layernorm(states[gone]))
    torch.testing.assert_close(states[gone + 1], ran)


def test_at_least_one_block_stays():
    for method in (LLMDropBlocks, RandomBlocks):
        model = deep()
        method(keep=0.001).compress(model, matrix.batch())
        assert model.config.num_hidden_layers == 1
        assert torch.isfinite(families.logits(model.hf, families.inputs("llama"))).all()


@pytest.mark.parametrize("build", [lambda: LLMDrop(keep=0.5), lambda: LLMDropBlocks(keep=0.5)], ids=["parts", "blocks"])
def test_without_data_one_sentence(build: Callable[[], Compressor]):
    with pytest.raises(DataError, match="--data"):
        build().compress(deep(), None)


def test_where_the_norm_comes_after_the_addition_sublayers_stay():
    with pytest.raises(ArchitectureError, match="removes sub-layers, and BertForMaskedLM has none"):
        RandomSublayers(keep=0.5).compress(matrix.model("bert"), None)


def test_a_budget_that_is_no_share_is_refused():
    blocks = deep().anatomy.language.blocks
    bad = {b.index: {"attention": torch.tensor(float("nan"))} for b in blocks}
    with pytest.raises(BudgetError, match="not a number"):
        LLMDrop(keep=0.5).decide(blocks, bad)
