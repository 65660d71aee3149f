"""The common matrix of policies: every policy of the registry, on the families it is made for.

A new policy is in it by being registered. `FIELDS` names fields that small models and short prompts need.
"""

from __future__ import annotations

import contextlib
import functools
import tempfile
from typing import Any

import families
import pytest
import torch

from paredown import registry
from paredown.core.attach import attach, wrap
from paredown.core.cache import nbytes
from paredown.core.calibration import Batch
from paredown.core.method import Policy

PROMPT = 40
# What short prompts and small models need: windows, pages and groups that fit into forty tokens of a few channels.
FIELDS: dict[str, dict[str, Any]] = {
    "duo-attention": {"sink": 2, "recent": 6},
    "random-heads": {"sink": 2, "recent": 6},
    "lococo": {"slots": 16, "blend": 0, "slack": 4},
    "delta": {"page": 4, "recent": 1},
    "think": {"window": 8, "recent": 8},
    "random-channels": {"recent": 8},
    "mustafar": {"window": 8},
    "random-elements": {"window": 8},
}
# What must learn before it can run: on random rows, a step or none.
LEARNS: dict[str, dict[str, Any]] = {
    "read-me": {"experts": 3, "steps": 2, "batch": 4, "width": 16},
    "rmoe": {"steps": 2, "batch": 4, "width": 16, "lr": 0.05},
    "random-routers": {"steps": 2, "batch": 4, "width": 16, "lr": 0.05},
    "gamma-mod": {"steps": 2, "batch": 4, "recent": 4, "samples": 2},
    "random-tokens-a-layer": {"recent": 4, "samples": 2},
}
TEXT = ("llama", "qwen3", "mistral", "gemma3", "qwen3_moe")
# Families of policies that act on what not all models have.
ONLY: dict[str, tuple[str, ...]] = {
    "read-me": ("llama", "qwen3", "mistral", "gemma3"),
    "random-channel-experts": ("llama", "qwen3", "mistral", "gemma3"),
    "rmoe": families.MOE,
    "random-routers": families.MOE,
}
IMAGES = ("llava", "llava_next", "qwen2_vl", "internvl")


def policies() -> list[str]:
    return [e.name for e in registry.entries() if e.kind == "policy" and e.module.startswith("paredown.")]


def cases() -> list[tuple[str, str]]:
    found = []
    for name in policies():
        for family in ONLY.get(name, IMAGES if registry.entry(name).axis == "vision" else TEXT):
            found.append((name, family))
    return found


def build(family: str) -> Any:
    hf = families.FAMILIES[family]()
    if family == "mistral":  # as released today: no window; with one, no layer has a cache that grows
        hf.config.sliding_window = None
    return hf


def made(name: str, family: str, keep: float = 0.5, **fields: Any) -> Policy:
    given = {**FIELDS.get(name, {}), **fields}
    if name == "duo-attention":  # every other head keeps all, as gates would say it
        hf = build(family)
        kinds = getattr(hf.config, "layer_types", None) or [""] * hf.config.num_hidden_layers
        heads = [0 if kind.startswith("sliding") and family != "mistral" else 2 for kind in kinds]
        given["heads"] = [[float(head % 2) for head in range(count)] for count in heads]
    if name in LEARNS and keep < 1:
        return learned(name, family, keep, tuple(given.items()))
    policy = registry.create(name, keep=keep, **given)
    assert isinstance(policy, Policy)
    return policy


_LEARNED = tempfile.TemporaryDirectory(prefix="paredown-tests-")


@functools.cache
def learned(name: str, family: str, keep: float, given: tuple[tuple[str, Any], ...]) -> Policy:
    policy = registry.create(name, keep=keep, **{**LEARNS[name], **dict(given)})
    assert isinstance(policy, Policy)
    rows = torch.randint(3, families.VOCAB, (8, 24), generator=torch.Generator().manual_seed(5))
    folder = f"{_LEARNED.name}/{name}-{family}-{keep}"
    return policy.prepare(wrap(build(family)), Batch(rows, None, "random", "", 0, 8), folder=folder)


def given(family: str, *, batch: int = 2, seed: int = 0) -> dict[str, Any]:
    """Return a left-padded batch: the second row has 7 tokens fewer."""
    if family in IMAGES:
        told = families.inputs(family, batch=batch, length=PROMPT, seed=seed)
    else:
        draw = torch.Generator().manual_seed(seed)
        told = {"input_ids": torch.randint(3, families.VOCAB, (batch, PROMPT), generator=draw)}
    return told


def run(hf: Any, told: dict[str, Any], **more: Any) -> Any:
    options = {"max_new_tokens": 5, "do_sample": False, "eos_token_id": None, "pad_token_id": 0, **more}
    with torch.no_grad():
        return hf.generate(**told, **options, return_dict_in_generate=True, output_logits=True)


def footprint(hf: Any) -> Any:
    weights = [(name, tensor.clone()) for name, tensor in hf.state_dict().items()]
    hooks = [(len(m._forward_hooks), len(m._forward_pre_hooks)) for m in hf.modules()]
    names = [m.config._attn_implementation for m in hf.modules() if hasattr(m, "config")]
    return weights, hooks, names, [sorted(vars(m)) for m in hf.modules()]


def same(before: Any, after: Any) -> None:
    for (name, one), (_, other) in zip(before[0], after[0], strict=True):
        assert torch.equal(one, other), name
    assert before[1:] == after[1:]


@pytest.mark.parametrize(("name", "family"), cases())
class TestEveryPolicy:
    def test_keep_1_leaves_every_bit(self, name, family):
        hf, told = build(family), given(family)
        expected = run(hf, told)
        with attach(hf, made(name, family, keep=1.0)):
            found = run(hf, told)
        assert torch.equal(found.sequences, expected.sequences)
        assert all(torch.equal(a, b) for a, b in zip(found.logits, expected.logits, strict=True))

    def test_the_model_is_left_as_it_was(self, name, family):
        hf, told = build(family), given(family)
        run(hf, told)  # transformers installs hooks of its own at the first pass
        before = footprint(hf)
        with attach(hf, made(name, family)):
            run(hf, told)
        same(before, footprint(hf))
        with contextlib.suppress(RuntimeError), attach(hf, made(name, family)):
            run(hf, told)
            raise RuntimeError
        same(before, footprint(hf))

    def test_the_policy_changes_what_it_should_and_always_alike(self, name, family):
        hf, told = build(family), given(family)
        plain = run(hf, told)
        with attach(hf, made(name, family)):
            one, other = run(hf, told), run(hf, told)
        assert all(torch.equal(a, b) for a, b in zip(one.logits, other.logits, strict=True))
        assert all(torch.isfinite(a).all() for a in one.logits)
        assert any(not torch.equal(a, b) for a, b in zip(one.logits, plain.logits, strict=True))

    def test_a_padded_batch_is_its_rows(self, name, family):
        hf, told = build(family), given(family)
        width = told["input_ids"].shape[1] if family in IMAGES else 0
        rows = [{k: v[i : i + 1] for k, v in told.items()} for i in range(2)] if not width else None
        if rows is None:
            pytest.skip("images: see tests/core/test_visual.py")
        rows[1] = {k: v[:, 7:] for k, v in rows[1].items()}
        mask = torch.ones_like(told["input_ids"])
        mask[1, :7] = 0
        with attach(hf, made(name, family)):
            both = run(hf, {**told, "attention_mask": mask})
            alone = [run(hf, row) for row in rows]
        for index in range(2):
            for one, other in zip(both.logits, alone[index].logits, strict=True):
                torch.testing.assert_close(one[index], other[0], atol=5e-4, rtol=5e-3)

    def test_beams_and_samples_run(self, name, family):
        hf, told = build(family), given(family)
        with attach(hf, made(name, family)):
            beams = run(hf, told, num_beams=3)
            assert beams.sequences.shape == (2, told["input_ids"].shape[1] + 5)
            one = {k: v[:1] for k, v in told.items()} if family not in IMAGES else None
            if one is not None:
                alone = run(hf, one, num_beams=3)
                assert torch.equal(alone.sequences[0], beams.sequences[0])
            run(hf, told, do_sample=True, num_return_sequences=2)

    def test_a_prompt_may_come_in_chunks_and_turns(self, name, family):
        if family in IMAGES:
            pytest.skip("transformers reads prompts with images in one piece")
        hf, told = build(family), given(family)
        with attach(hf, made(name, family)) as it:
            found = run(hf, told, prefill_chunk_size=16)
            assert all(torch.isfinite(a).all() for a in found.logits)
            again = torch.cat([found.sequences, told["input_ids"][:, :9]], 1)
            more = run(hf, {"input_ids": again}, past_key_values=found.past_key_values)
            assert more.past_key_values.get_seq_length() == again.shape[1] + 4
            assert it.nbytes() == nbytes(found.past_key_values) > 0

    def test_a_prompt_shorter_than_any_window_runs(self, name, family):
        if family in IMAGES:
            pytest.skip("images fix the length")
        hf = build(family)
        with attach(hf, made(name, family)):
            for length in (1, 2, 3):
                found = run(hf, {"input_ids": torch.full((1, length), 5)})
                assert all(torch.isfinite(a).all() for a in found.logits)

    def test_gradients_are_not_asked_for(self, name, family):
        hf, told = build(family), given(family)
        with attach(hf, made(name, family)):
            cache = run(hf, told).past_key_values
        held = [t for layer in cache.layers if hasattr(layer, "stores") for s in layer.stores for t in s.tensors()]
        assert not any(t.requires_grad for t in held)


def test_a_policy_tells_its_paper_its_unit_and_its_place():
    for name in policies():
        cls = registry.get(name)
        entry = registry.entry(name)
        assert entry.control or (entry.year and entry.arxiv), name
        assert cls.places, name
        assert entry.summary.endswith("."), name


class TestTogether:
    """Visual tokens before the model, key channels, streaming heads: three policies on three places."""

    def policies(self, hf: Any) -> list[Policy]:
        layers = hf.config.get_text_config().num_hidden_layers
        heads = [[0.0, 1.0]] * layers
        return [
            registry.create("hired", keep=0.5),
            registry.create("think", keep=0.5, window=4, recent=2),
            registry.create("duo-attention", keep=0.5, sink=1, recent=2, heads=heads),
        ]  # type: ignore[list-item]

    def test_each_does_its_part(self):
        hf, told = build("llava"), given("llava")
        together = self.policies(hf)
        with attach(hf, *together) as it:
            found = run(hf, told)
            assert all(torch.isfinite(one).all() for one in found.logits)
            assert it.nbytes() == nbytes(found.past_key_values)
            held = found.past_key_values.layers[0]
        # One part for each kind of head: the first growing and thin, of fewer tokens; the second a window.
        (full, growing), (streaming, window) = held.parts
        assert full.tolist() == [1]
        assert streaming.tolist() == [0]
        assert growing.index.shape[-1] == hf.config.text_config.hidden_size // 4 // 2
        assert window.entries.length <= 4
        visual = int((told["input_ids"][0] == hf.config.image_token_id).sum())
        prompt = told["input_ids"].shape[1]
        assert growing.old + growing.entries.length == prompt - visual + visual // 2 + 4
        alone = {}
        for policy in together:
            with attach(hf, policy) as it:
                run(hf, told)
                alone[policy.name] = it.nbytes()
        with attach(hf, *together) as it:
            run(hf, told)
            assert it.nbytes() < min(alone.values())

    def test_order_does_not_matter(self):
        hf, told = build("llava"), given("llava")
        together = self.policies(hf)
        with attach(hf, *together):
            one = run(hf, told)
        with attach(hf, *reversed(together)):
            other = run(hf, told)
        assert all(torch.equal(a, b) for a, b in zip(one.logits, other.logits, strict=True))

    def test_policies_go_on_smaller_weights(self):
        from paredown.core.checkpoint import Model

        model = Model.of(families.FAMILIES["qwen3_moe"]())
        registry.create("random-experts", keep=0.5).compress(model, None)  # type: ignore[attr-defined]
        told = given("qwen3_moe")
        for name in ("think", "streaming", "lazyllm", "delta"):
            with attach(model, made(name, "qwen3_moe")):
                assert all(torch.isfinite(one).all() for one in run(model.hf, told).logits)
        plain = run(model.hf, told)
        with attach(model, made("think", "qwen3_moe", keep=1.0)):
            assert torch.equal(run(model.hf, told).logits[-1], plain.logits[-1])
