"""Blocks fused into one wide block compute what they compute side by side, in memory and from disk."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from copy import deepcopy
from typing import Any

import families
import pytest
import torch
import transformers as tf
from torch import Tensor, nn

import paredown
from paredown.core import surgery
from paredown.core.checkpoint import Model
from paredown.core.depth import fusion
from paredown.core.edits import DropBlock, FuseBlocks, KeepHeads, KeepNeurons
from paredown.errors import ArchitectureError, BudgetError

_SIX: dict[str, Any] = {**families._GQA, "num_hidden_layers": 6}
# RMSNorm and LayerNorm, gains stored less one, grouped queries, with and without biases and gates, scaled residuals.
BUILD: dict[str, Callable[[], Any]] = {
    "llama": lambda: tf.LlamaForCausalLM(tf.LlamaConfig(**_SIX)),
    "llama-biases": lambda: tf.LlamaForCausalLM(tf.LlamaConfig(**_SIX, attention_bias=True, mlp_bias=True)),
    "qwen2": lambda: tf.Qwen2ForCausalLM(tf.Qwen2Config(**_SIX)),
    "mistral": lambda: tf.MistralForCausalLM(tf.MistralConfig(**_SIX, sliding_window=6)),
    "gemma": lambda: tf.GemmaForCausalLM(tf.GemmaConfig(**_SIX, head_dim=16)),
    "granite": lambda: tf.GraniteForCausalLM(tf.GraniteConfig(**_SIX, residual_multiplier=0.3)),
    "arcee": lambda: tf.ArceeForCausalLM(tf.ArceeConfig(**_SIX)),
    "starcoder2": lambda: tf.Starcoder2ForCausalLM(
        tf.Starcoder2Config(**_SIX, use_bias=True, residual_dropout=0.0, embedding_dropout=0.0)
    ),
}
RUNS = ([(1, 2)], [(0, 2), (2, 2), (4, 2)], [(0, 2), (3, 3)], [(0, 6)])


def model(name: str) -> Model:
    return Model.of(families._seeded(BUILD[name]))


def ids(batch: int = 2, length: int = 12) -> Tensor:
    return torch.randint(3, families.VOCAB, (batch, length), generator=torch.Generator().manual_seed(3))


@torch.no_grad()
def logits(found: Model, **more: Any) -> Tensor:
    out: Tensor = found.hf(input_ids=ids(), use_cache=False, **more).logits
    return out


def fused(found: Model, runs: Sequence[tuple[int, int]]) -> Model:
    done = deepcopy(found)
    edits = [FuseBlocks(layer=start, count=count) for start, count in runs]
    done.anatomy = surgery.apply_model(done.hf, done.anatomy, edits)
    return done


def side_by_side(found: Model, runs: Sequence[tuple[int, int]], order: Callable[[Any], Any] = list) -> Tensor:
    """Return the logits of the two-stage form, run module by module: nothing is fused."""
    parts = found.anatomy.language.blocks
    blocks = [found.hf.get_submodule(part.path) for part in parts]
    scale = getattr(found.config, "residual_multiplier", 1.0)
    forwards: dict[int, Any] = {}
    for start, count in runs:
        run = order([(blocks[i], parts[i]) for i in range(start, start + count)])

        def forward(h: Tensor, run: Any = run, **told: Any) -> Tensor:
            middle = h
            for block, part in run:
                normed = block.get_submodule(part.attention.norms[0])(h)
                middle = middle + scale * block.get_submodule(part.attention.path)(hidden_states=normed, **told)[0]
            out = middle
            for block, part in run:
                normed = block.get_submodule(part.mlp.norms[0])(middle)
                out = out + scale * block.get_submodule(part.mlp.path)(normed)
            return out

        forwards |= {i: lambda h, **_: h for i in range(start, start + count)}
        forwards[start] = forward
    with fusion.replaced(found.hf, found.anatomy.language, forwards):
        return logits(found)


@pytest.mark.parametrize("runs", RUNS, ids=str)
@pytest.mark.parametrize("name", BUILD)
def test_fused_is_side_by_side_and_comes_back_from_disk(name, runs, tmp_path):
    dense = model(name)
    before, parameters = logits(dense), dense.parameters()
    done = fused(dense, runs)
    wanted = side_by_side(dense, runs)
    torch.testing.assert_close(logits(done), wanted, atol=1e-5, rtol=1e-5)
    assert float((wanted - before).abs().max()) > 1e-3
    # Only norms, and biases of which one is the sum, are fewer.
    gone = sum(count - 1 for _, count in runs)
    block = dense.hf.get_submodule(dense.anatomy.language.blocks[0].path)
    summed = {id(p) for n, p in block.named_parameters() if n.endswith("o_proj.bias") or n.endswith(_DOWN)}
    few = sum(p.numel() for n, p in block.named_parameters() if "norm" in n or id(p) in summed)
    assert parameters - done.parameters() == gone * few
    blocks = done.anatomy.language.blocks
    assert len(blocks) == done.config.num_hidden_layers == 6 - gone
    assert [b.attention.heads // b.attention.kv_heads for b in blocks] == [2] * len(blocks)
    done.save(tmp_path)
    loaded = paredown.load(tmp_path)
    assert torch.equal(logits(loaded), logits(done))
    assert loaded.anatomy.language.blocks == blocks


_DOWN = ("down_proj.bias", "c_proj.bias")


@pytest.mark.parametrize("name", ["llama", "qwen2", "starcoder2"])
def test_alike_blocks_open_in_plain_transformers(name, tmp_path):
    done = fused(model(name), [(0, 2), (2, 2), (4, 2)])
    assert surgery.loads_in(done.config) == "transformers"
    assert (done.config.num_attention_heads, done.config.head_dim, done.config.intermediate_size) == (8, 8, 96)
    done.save(tmp_path)
    loaded, report = type(done.hf).from_pretrained(tmp_path, output_loading_info=True)
    assert not report["missing_keys"]
    assert not report["mismatched_keys"]
    assert torch.equal(loaded.eval()(input_ids=ids(), use_cache=False).logits.detach(), logits(done))


def test_without_the_gains_it_would_be_another_model():
    """Forgetting to fold the norms' gains fails the comparison above (card)."""
    dense, runs = model("llama"), [(1, 3)]
    for block in dense.hf.model.layers:
        for norm in (block.input_layernorm, block.post_attention_layernorm):
            assert float((norm.weight.detach() - 1).abs().max()) > 0.05
    wrong = deepcopy(dense)
    for block in wrong.hf.model.layers[1:4]:
        for norm in (block.input_layernorm, block.post_attention_layernorm):
            nn.init.ones_(norm.weight)
    assert float((logits(fused(wrong, runs)) - side_by_side(dense, runs)).abs().max()) > 1e-3


def test_order_within_a_run_does_not_matter():
    dense, runs = model("llama-biases"), [(1, 4)]
    turned = side_by_side(dense, runs, order=lambda run: list(reversed(run)))
    torch.testing.assert_close(turned, side_by_side(dense, runs), atol=2e-6, rtol=1e-5)


def test_the_error_is_of_second_order():
    """With every sub-layer scaled by eps, sequential less parallel falls as its square; a mis-summed one does not."""
    found, once = {}, {}
    for eps in (0.2, 0.1, 0.05, 0.025):
        dense = model("llama-biases")
        dense.hf.double()
        with torch.no_grad():
            for block in dense.hf.model.layers:
                for linear in (block.self_attn.o_proj, block.mlp.down_proj):
                    linear.weight *= eps
                    linear.bias *= eps
        part = dense.anatomy.language.blocks
        h = torch.randn(2, 8, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
        told = {"position_embeddings": dense.hf.model.rotary_emb(h, torch.arange(8)[None])}
        modules = list(dense.hf.model.layers[1:4])
        with torch.no_grad():
            wide = fusion.wide(modules, part[1:4])
            sequential = h
            for module in modules:
                sequential = module(sequential, **told)
            found[eps] = float((wide(h, **told) - sequential).norm())
            once[eps] = float((wide(h, **told) + 0.01 * h - sequential).norm())

    def slope(errors: dict[float, float]) -> float:
        x = torch.tensor(list(errors)).log()
        y = torch.tensor(list(errors.values())).log()
        return float(((x - x.mean()) * (y - y.mean())).sum() / (x - x.mean()).square().sum())

    assert slope(found) == pytest.approx(2.0, abs=0.1)
    assert slope(once) < 1


@pytest.mark.parametrize("name", ["llama-biases", "mistral", "starcoder2"])
def test_cached_decoding_is_one_pass_also_with_padding(name):
    done, tokens = fused(model(name), [(0, 2), (3, 3)]), ids(2, 14)
    mask = torch.ones_like(tokens)
    mask[1, :5] = 0
    where = (mask.cumsum(1) - 1).clamp_min(0)
    with torch.no_grad():
        whole = done.hf(input_ids=tokens, attention_mask=mask, position_ids=where, use_cache=False).logits
        cache, out = None, []
        for start, stop in [(0, 8), *((i, i + 1) for i in range(8, 14))]:
            told = done.hf(
                input_ids=tokens[:, start:stop],
                attention_mask=mask[:, :stop],
                position_ids=where[:, start:stop],
                past_key_values=cache,
                use_cache=True,
            )
            cache = told.past_key_values
            out.append(told.logits)
    found = torch.cat(out, 1)
    torch.testing.assert_close(found[0], whole[0], atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(found[1, 5:], whole[1, 5:], atol=1e-5, rtol=1e-4)
    if name == "llama-biases":
        assert [layer.keys.shape[1] for layer in cache.layers] == [4, 2, 6], "one slot with the heads of the whole run"


def test_nothing_leaks_backwards():
    done = fused(model("llama"), [(0, 3)])
    before = logits(done)
    tokens = ids()
    tokens[:, 7] += 1
    with torch.no_grad():
        after = done.hf(input_ids=tokens, use_cache=False).logits
    assert torch.equal(after[:, :7], before[:, :7])
    assert not torch.equal(after[:, 7:], before[:, 7:])


def test_blocks_of_unequal_width_and_blocks_that_are_fused_already():
    dense = model("llama-biases")
    edits = [KeepHeads(layer=2, keep=(1,)), KeepNeurons(layer=1, keep=tuple(range(20)))]
    dense.anatomy = surgery.apply_model(dense.hf, dense.anatomy, edits)
    done = fused(dense, [(1, 2)])
    torch.testing.assert_close(logits(done), side_by_side(dense, [(1, 2)]), atol=1e-5, rtol=1e-5)
    assert (done.anatomy.language.blocks[1].attention.kv_heads, done.anatomy.language.blocks[1].mlp.width) == (3, 68)
    again = fused(done, [(0, 2)])
    assert again.anatomy.language.blocks[0].attention.kv_heads == 5
    assert torch.isfinite(logits(again)).all()
    torch.testing.assert_close(logits(again), side_by_side(done, [(0, 2)]), atol=1e-5, rtol=1e-5)


def test_a_wide_block_can_be_pruned_like_any_other():
    done = fused(model("llama"), [(1, 2)])
    done.anatomy = surgery.apply_model(done.hf, done.anatomy, [KeepHeads(layer=1, keep=(0, 3)), DropBlock(layer=4)])
    assert done.anatomy.language.blocks[1].attention.kv_heads == 2
    assert torch.isfinite(logits(done)).all()


def test_the_language_part_of_a_vision_model(tmp_path):
    dense = Model.of(families.FAMILIES["llava"]())
    given = families.inputs("llava")
    done = fused(dense, [(1, 2)])
    done.save(tmp_path)
    loaded = paredown.load(tmp_path)
    assert torch.equal(families.logits(loaded.hf, given), families.logits(done.hf, given))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_keeps_its_type(dtype):
    dense = model("llama-biases")
    dense.hf.to(dtype)
    done = fused(dense, [(1, 3)])
    assert {p.dtype for p in done.hf.parameters()} == {dtype}
    torch.testing.assert_close(logits(done).float(), side_by_side(dense, [(1, 3)]).float(), atol=0.05, rtol=0.05)


REFUSED = {
    "qwen3": "normalised with gains of its own",
    "gemma3": "norms behind its sub-layers",
    "phi": "do not follow each other",
    "gpt_neox": "do not follow each other",
    "mixtral": "its router reads the stream",
    "deepseek_v3": "one common projection",
    "bert": "do not follow each other",
}


@pytest.mark.parametrize("family", REFUSED)
def test_families_that_cannot_be_fused_are_told_in_one_sentence(family):
    found = Model.of(families.FAMILIES[family]())
    before = {name: tensor.clone() for name, tensor in found.hf.state_dict().items()}
    with pytest.raises(ArchitectureError, match=REFUSED[family]):
        surgery.apply_model(found.hf, found.anatomy, [FuseBlocks(layer=0, count=2)])
    assert all(torch.equal(tensor, before[name]) for name, tensor in found.hf.state_dict().items())


def test_layers_that_see_other_tokens_or_hold_other_things_are_not_fused():
    config = tf.SmolLM3Config(**_SIX, no_rope_layer_interval=4)
    mixed = Model.of(families._seeded(lambda: tf.SmolLM3ForCausalLM(config)))
    with pytest.raises(ArchitectureError, match="see other tokens"):
        fused(mixed, [(2, 2)])
    fused(mixed, [(0, 3)])
    odd = model("llama")
    odd.hf.model.layers[2].self_attn.sinks = nn.Parameter(torch.zeros(4))
    with pytest.raises(ArchitectureError, match=r"no way to lay its self_attn\.sinks"):
        fused(odd, [(1, 2)])
    lone = Model.of(families._seeded(lambda: tf.StableLmForCausalLM(tf.StableLmConfig(**_SIX))))
    with pytest.raises(ArchitectureError):  # a LayerNorm's bias before projections without one
        fused(lone, [(1, 2)])
    other = model("llama")
    other.hf.model.layers[2].input_layernorm.variance_epsilon = 1e-3
    with pytest.raises(ArchitectureError, match=r"differ in input_layernorm\.variance_epsilon"):
        fused(other, [(1, 2)])


def test_edits_that_do_not_fit_together_are_told():
    dense = model("llama")
    for edits, why in (
        ([FuseBlocks(layer=0, count=2), FuseBlocks(layer=1, count=2)], "edited otherwise"),
        ([FuseBlocks(layer=0, count=2), DropBlock(layer=1)], "edited otherwise"),
        ([FuseBlocks(layer=5, count=2)], "the model ends at 5"),
    ):
        with pytest.raises(BudgetError, match=why):
            surgery.apply_model(dense.hf, dense.anatomy, edits)
    with pytest.raises(BudgetError, match="use apply_model"):
        surgery.apply(dense.hf.model.layers[0], dense.anatomy.language.blocks[0], [FuseBlocks(layer=0, count=2)])
    with pytest.raises(ValueError, match="greater than or equal to 2"):
        FuseBlocks(layer=0, count=1)
    both = deepcopy(dense)
    both.anatomy = surgery.apply_model(both.hf, both.anatomy, [FuseBlocks(layer=0, count=2), DropBlock(layer=3)])
    assert [b.attention.heads for b in both.anatomy.language.blocks] == [8, 4, 4, 4]


def test_a_family_whose_config_cannot_say_it_is_told():
    config = tf.StableLmConfig(**_SIX, use_qkv_bias=False)
    found = Model.of(families._seeded(lambda: tf.StableLmForCausalLM(config)))
    with pytest.raises(ArchitectureError, match="cannot express 8 heads of size 8"):
        surgery.new_config(found.config, found.anatomy, [FuseBlocks(layer=0, count=2)])
