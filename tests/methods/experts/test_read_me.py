"""Read-ME: the checks of its card, on models small enough to be exact."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import families
import pytest
import running
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import DynamicCache

from paredown.core.attach import attach, attach_runtimes, wrap
from paredown.core.calibration import Batch
from paredown.core.experts import channels, domains
from paredown.core.experts.channels import Bank, Groups
from paredown.core.experts.pregate import Memory, Router, preferences
from paredown.core.runtime import Feed, Pass
from paredown.errors import ArchitectureError, DataError, PolicyError
from paredown.methods.cache.lazyllm import LazyLLM
from paredown.methods.cache.think import ThinK
from paredown.methods.experts.random_channel_experts import RandomChannelExperts
from paredown.methods.experts.read_me import ReadMe

HALF = 32
SMALL = {"experts": 2, "steps": 3, "batch": 4, "width": 16}


def text(rows: int = 8, length: int = 24, seed: int = 5) -> Batch:
    return Batch(running.ids(rows, length, seed), None, "random", "", 0, rows)


def learned(hf: Any, folder: Path, data: Batch | None = None, **fields: Any) -> ReadMe:
    return ReadMe(**{**SMALL, **fields}).prepare(wrap(hf), data or text(), folder=str(folder))


def two_languages(length: int = 24, rows: int = 6, seed: int = 0) -> torch.Tensor:
    """Return rows of which the first half is of one language, tokens 3..HALF-1, the second of another."""
    draw = torch.Generator().manual_seed(seed)
    one = torch.randint(3, HALF, (rows // 2, length), generator=draw)
    return torch.cat([one, torch.randint(HALF, 2 * HALF, (rows // 2, length), generator=draw)])


def planted() -> Any:
    """Return a Llama in which half of each MLP's channels answer to one language and half to the other."""
    hf = copy.deepcopy(families.llama())
    with torch.no_grad():
        table = hf.get_input_embeddings().weight
        table[:HALF, 0] += 4
        table[HALF:, 1] += 4
        for layer in hf.model.layers:
            # What blocks add must not touch the languages' directions.
            for linear in (layer.mlp.down_proj, layer.self_attn.o_proj):
                linear.weight[:2], linear.bias[:2] = 0, 0
            width = layer.mlp.up_proj.weight.shape[0]
            for linear in (layer.mlp.up_proj, layer.mlp.gate_proj):
                linear.weight.mul_(0.05)
                linear.bias.zero_()
                linear.weight[:, :2] = 0
                linear.weight[: width // 2, 0] = 1.5
                linear.weight[width // 2 :, 1] = 1.5
    return hf


def masked(hf: Any, masks: dict[int, torch.Tensor], experts: torch.Tensor) -> Any:
    """Return hooks under which the dense model runs with what other channels give set to zero."""

    def hook(mask: torch.Tensor) -> Any:
        return lambda _, args: (args[0] * mask[experts],)

    return [
        layer.mlp.down_proj.register_forward_pre_hook(hook(masks[index].float()))
        for index, layer in enumerate(hf.model.layers)
    ]


def kl(hf: Any, ids: torch.Tensor, masks: dict[int, torch.Tensor], experts: torch.Tensor) -> float:
    with torch.no_grad():
        dense = hf(ids).logits.log_softmax(-1)
        handles = masked(hf, masks, experts)
        cut = hf(ids).logits.log_softmax(-1)
        for handle in handles:
            handle.remove()
    return float((dense.exp() * (dense - cut)).sum(-1).mean())


class TestEverythingKept:
    def test_experts_of_all_channels_are_the_dense_model(self, tmp_path):
        # Card: remain = 1.0: residual = everything, all experts equal the dense FFN, for any router.
        hf, ids = families.llama(), running.ids(2, 20)
        policy = learned(hf, tmp_path, experts=3)
        state = load_file(policy.weights)
        save_file({k: torch.ones_like(v) if k.startswith("masks.") else v for k, v in state.items()}, policy.weights)
        masks, router = policy.load(wrap(hf))
        assert all(bool(channels.divided(mask)[0].all()) for mask in masks.values())
        with torch.no_grad():
            expected = hf(ids).logits
        with torch.no_grad():
            router.head.weight.normal_()
        for form in ("fused", "separate"):
            with attach(hf, policy.model_copy(update={"form": form})), torch.no_grad():
                torch.testing.assert_close(hf(ids).logits, expected, atol=1e-6, rtol=1e-5)

    def test_keep_1_needs_nothing_and_learns_nothing(self):
        policy = ReadMe(keep=1)
        assert policy.prepare(wrap(families.llama()), None) is policy


class TestFirst:
    def test_channels_may_be_those_of_the_model_that_a_recipe_began_with(self, tmp_path):
        first, later = families.llama(), families.llama()
        with torch.no_grad():
            for layer in later.model.layers:
                layer.mlp.up_proj.weight.copy_(layer.mlp.up_proj.weight.flip(0))
        wrap(first).save(tmp_path / "first")
        model = wrap(later)
        model.original = tmp_path / "first"
        masks = {}
        for name, hf, fields in (("first", first, {}), ("own", later, {}), ("taken", later, {"channels_of": "first"})):
            policy = ReadMe(**SMALL, **fields).prepare(
                wrap(hf) if name == "first" else model, text(), folder=str(tmp_path / name)
            )
            masks[name] = policy.load(model)[0]
        for layer, mask in masks["first"].items():
            assert torch.equal(mask, masks["taken"][layer])
            assert not torch.equal(mask, masks["own"][layer])

    def test_a_first_model_of_other_sizes_is_refused(self, tmp_path):
        shorter = families.llama()
        shorter.model.layers = shorter.model.layers[:-1]
        shorter.config.num_hidden_layers -= 1
        wrap(shorter).save(tmp_path / "first")
        model = wrap(families.llama())
        model.original = tmp_path / "first"
        with pytest.raises(PolicyError, match="set channels_of=model"):
            ReadMe(**SMALL, channels_of="first").prepare(model, text(), folder=str(tmp_path / "kept"))


class TestConversion:
    @pytest.mark.parametrize("family", ["llama", "gemma3"])
    def test_the_form_that_learns_says_the_same_and_gradients_reach_the_model(self, family, tmp_path):
        hf, ids = families.FAMILIES[family](), running.ids(2, 20)
        policy = learned(hf, tmp_path, keep=0.4)
        with attach(hf, policy), torch.no_grad():
            expected = hf(ids).logits
        with attach_runtimes(wrap(hf), [policy.learning(wrap(hf))]):
            found = hf(ids, use_cache=False).logits
            found.sum().backward()
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
        masks, _ = policy.load(wrap(hf))
        for layer, mask in masks.items():
            part = wrap(hf).anatomy.language.blocks[layer]
            down: Any = hf.get_submodule(f"{part.path}.{part.mlp.down}")
            reached = down.weight.grad.abs().sum(0) > 0
            assert reached.any()
            assert not reached[~mask.any(0)].any()
            assert not down._forward_pre_hooks

    @pytest.mark.parametrize("family", ["llama", "gemma3", "gpt_neox"])
    def test_masked_fused_and_separate_are_one(self, family):
        # Card: masked dense == converted experts (fused) == residual + own (separate), to 1e-5; biases counted once.
        hf = families.FAMILIES[family]()
        part = wrap(hf).anatomy.language.blocks[1]
        block, mlp = hf.get_submodule(part.path), part.mlp
        draw = torch.Generator().manual_seed(1)
        masks = channels.strongest(torch.rand(3, mlp.width, generator=draw), mlp.width // 2)
        masks[:, :5] = True
        hidden, experts = torch.randn(40, 32, generator=draw), torch.randint(0, 3, (40,), generator=draw)
        handle = block.get_submodule(mlp.down).register_forward_pre_hook(lambda _, args: (args[0] * masks[experts],))
        with torch.no_grad():
            expected = block.get_submodule(mlp.path)(hidden)
            handle.remove()
            groups = Groups(experts, 3)
            fused, separate = Bank(block, part, masks), Bank(block, part, masks, separate=True)
            torch.testing.assert_close(fused(hidden, groups), expected, atol=1e-5, rtol=1e-5)
            torch.testing.assert_close(separate(hidden, groups), expected, atol=1e-5, rtol=1e-5)
            assert separate.nbytes < fused.nbytes
            # One token, one expert: the path without sorting.
            alone = fused(hidden[:1], Groups(experts[:1], 3))
            torch.testing.assert_close(alone, expected[:1], atol=1e-5, rtol=1e-5)

    def test_the_whole_model_runs_as_if_masked(self, tmp_path):
        hf, ids = families.qwen3(), running.ids(2, 20)
        policy = learned(hf, tmp_path, experts=3)
        runtime = policy.runtime(wrap(hf))
        masks, _ = policy.load(wrap(hf))
        handles = masked(hf, masks, runtime.decide(ids))
        with torch.no_grad():
            expected = hf(ids).logits
        for handle in handles:
            handle.remove()
        for form in ("fused", "separate"):
            with attach(hf, policy.model_copy(update={"form": form})), torch.no_grad():
                torch.testing.assert_close(hf(ids).logits, expected, atol=2e-5, rtol=1e-4)


class TestMasks:
    def test_sizes_are_exact(self, tmp_path):
        # Card: residual AND own is empty; |residual| + |own| == k exactly for each domain.
        hf = families.llama()
        for keep, count in ((0.5, 24), (0.3, 14), (0.75, 36)):
            masks, _ = learned(hf, tmp_path / str(keep), keep=keep, experts=3, steps=0).load(wrap(hf))
            for mask in masks.values():
                residual, own = channels.divided(mask)
                assert not (residual & own).any()
                assert (residual.sum() + own.sum(1)).tolist() == [count] * 3

    def test_ties_cost_nothing_and_go_to_the_lower_index(self):
        # The released comparison, strictly above the k-th value, keeps 1 and 0 of these.
        means = torch.tensor([[3.0, 2, 2, 2, 1], [1, 1, 1, 1, 1]])
        assert channels.strongest(means, 3).int().tolist() == [[1, 1, 1, 0, 0], [1, 1, 1, 0, 0]]
        assert (means > means.sort(descending=True).values[:, 2:3]).sum(1).tolist() == [1, 0]

    def test_means_are_those_of_real_tokens_of_each_domain(self):
        hf, ids = families.llama(), running.ids(4, 12)
        mask = running.padded(ids, (12, 9, 12, 5))
        seen = []
        handle = hf.model.layers[1].mlp.down_proj.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
        with torch.no_grad():
            hf(ids, attention_mask=mask)
        handle.remove()
        means = channels.domain_means(wrap(hf), ids, mask, torch.tensor([0, 1, 1, 0]), 2)[1]
        for domain, rows in ((0, [0, 3]), (1, [1, 2])):
            told = seen[0].abs()[rows][mask[rows].bool()].mean(0)
            torch.testing.assert_close(means[domain].float(), told, atol=1e-6, rtol=1e-5)


class TestRouter:
    def made(self, layers: int, seed: int = 0) -> Router:
        torch.manual_seed(seed)
        return Router(torch.randn(128, 32), 4, width=32, layers=layers, heads=2).eval()

    @pytest.mark.parametrize("layers", [1, 2, 3])
    def test_no_expert_depends_on_later_tokens(self, layers):
        # Card: changing token t+1 never changes the expert of tokens <= t.
        router, ids = self.made(layers), running.ids(1, 30)
        before = router(ids)
        changed = ids.clone()
        changed[0, 12] = (ids[0, 12] + 7) % 100 + 3
        after = router(changed)
        assert torch.equal(before[:, :12], after[:, :12])
        # And some later tokens do read it.
        assert ((before[:, 12:] - after[:, 12:]).abs().amax(-1) > 1e-3).sum() > 1

    @pytest.mark.parametrize("layers", [1, 2, 3])
    @pytest.mark.parametrize("counts", [(30, 30), (30, 17)])
    def test_at_once_in_pieces_and_token_by_token(self, layers, counts):
        # Card: decisions can be computed once for the prompt and equal the token-by-token decisions. The released
        # router fails this with two layers; and its empty cache with one.
        router, ids = self.made(layers), running.ids(2, 30)
        real = running.padded(ids, counts).bool()
        whole = router(ids, real)
        for cuts in ([10, 11, 12, 25, 30], list(range(1, 31))):
            memory, told, start = Memory(layers), [], 0
            for stop in cuts:
                told.append(router(ids[:, start:stop], real[:, start:stop], memory))
                start = stop
            torch.testing.assert_close(torch.cat(told, 1)[real], whole[real], atol=1e-4, rtol=1e-4)
        for row, count in enumerate(counts):
            alone = router(ids[row : row + 1, -count:])
            torch.testing.assert_close(whole[row, -count:], alone[0], atol=1e-4, rtol=1e-4)

    def test_it_starts_from_the_models_embedding(self):
        table = torch.randn(128, 32)
        router = Router(table, 4, width=20, layers=1, heads=2)
        assert router.embedding.weight.shape == (128, 20)
        assert torch.equal(router.embedding.weight, table[:, :20])

    def test_targets_are_the_published_losses(self):
        draw = torch.Generator().manual_seed(3)
        inner = torch.randn(2, 5, 40, generator=draw)
        own = torch.zeros(3, 40, dtype=torch.bool)
        for expert, start in enumerate((0, 8, 17)):
            own[expert, start : start + 11] = True
        said = torch.randn(2, 5, 3, generator=draw)
        loss = torch.zeros(())
        for token, logits in zip(inner.abs().view(-1, 40), said.view(-1, 3), strict=True):
            ordered = token.sort(descending=True).values
            activity = sum((token > ordered[rank]).float() for rank in (2, 4, 6, 8, 10)) / 33
            affinity = own.float() @ activity
            affinity = 10 * (affinity - affinity.mean())
            hard = nn.functional.cross_entropy(logits, affinity.argmax(), label_smoothing=0.5)
            soft = -(affinity.softmax(0) * logits.log_softmax(0)).sum()
            loss += (0.75 * hard + 0.25 * soft) / 10
        told = preferences(inner, own)
        torch.testing.assert_close(told.sum(-1), torch.ones(2, 5))
        torch.testing.assert_close(-(told * said.log_softmax(-1)).sum(-1).mean(), loss, atol=1e-6, rtol=1e-5)
        assert not torch.equal(preferences(inner, own, signed=True), told)
        assert preferences(inner, torch.zeros_like(own)) is None


class TestAtWork:
    @pytest.mark.parametrize("family", ["llama", "qwen3", "gemma3"])
    def test_families(self, family, tmp_path):
        running.check_family(family, learned(running.built(family), tmp_path, experts=3))

    @pytest.mark.parametrize("layers", [1, 2])
    def test_experts_of_a_sequence_do_not_depend_on_how_it_is_read(self, layers, tmp_path):
        hf, ids = families.llama(), running.ids(2, 24)
        policy = learned(hf, tmp_path, experts=4, layers=layers)
        expected = policy.runtime(wrap(hf)).decide(ids)
        assert len(expected.unique()) > 1
        for cuts in ((24,), (7, 15, 24), tuple(range(1, 25))):
            with policy.attach(hf):
                _, cache = running.passes(hf, ids, cuts)
            assert torch.equal(cache.layers[-1].companion.experts, expected)

    def test_a_cache_may_be_cropped_and_its_rows_chosen(self, tmp_path):
        hf, ids = families.llama(), running.ids(3, 24)
        with learned(hf, tmp_path, experts=4).attach(hf) as it:
            expected, _ = running.passes(hf, ids[[2, 0]], (24,))
            other = torch.cat([ids[:, :10], running.ids(3, 8, seed=9)], 1)
            _, cache = running.passes(hf, other, (18,))
            cache.crop(-8)
            cache.batch_select_indices(torch.tensor([2, 0]))
            told, cache = running.passes(hf, ids[[2, 0], 10:], (14,), cache=cache)
            torch.testing.assert_close(told, expected[:, 10:], atol=2e-5, rtol=1e-4)
            assert cache.get_seq_length() == 24
            assert it.nbytes() > sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers[:-1])
            cache.reset()
            assert cache.layers[-1].companion.length == 0

    def test_a_filled_cache_of_the_model_alone_is_refused(self, tmp_path):
        hf, ids = families.llama(), running.ids(1, 8)
        _, cache = running.passes(hf, ids, (8,))
        with learned(hf, tmp_path).attach(hf), pytest.raises(PolicyError, match="start a new one"):
            running.passes(hf, ids, (8,), cache=cache)

    def test_a_cache_that_only_slides_goes_too(self, tmp_path):
        # No layer of this model has a cache that grows; the experts are remembered all the same.
        hf, ids = families.mistral(), running.ids(1, 20)
        policy = learned(hf, tmp_path, experts=3)
        with policy.attach(hf):
            whole, _ = running.passes(hf, ids, (20,))
            stepwise, cache = running.passes(hf, ids, running.steps(20, 9), cache=DynamicCache(config=hf.config))
        torch.testing.assert_close(stepwise, whole, atol=2e-5, rtol=1e-4)
        assert len(cache.layers) == 4

    def test_embeddings_are_refused(self, tmp_path):
        hf, ids = families.llama(), running.ids(1, 8)
        with learned(hf, tmp_path).attach(hf), pytest.raises(PolicyError, match="token ids"):
            hf(inputs_embeds=hf.get_input_embeddings()(ids))

    def test_tokens_that_left_or_came_back_keep_their_expert(self, tmp_path):
        hf, ids = families.llama(), running.ids(2, 12)
        runtime = learned(hf, tmp_path, experts=4).runtime(wrap(hf))
        now = Pass(batch=2, length=4, past=8, padding=None, cache=None, ids=ids[:, 8:])
        now.companions[runtime] = held = runtime.companion()
        held.add(runtime.decide(ids[:, :8], None, held))
        runtime.begin(now)
        rows = torch.tensor([[9, 2, -1], [8, 11, 0]])
        hidden = torch.randn(2, 3, 32)
        module = hf.model.layers[1].mlp
        told = runtime.feed(Feed(1, module, module.forward, hidden, now, rows))
        experts = runtime.decide(ids)
        for row, column in ((0, 0), (0, 1), (1, 0), (1, 1), (1, 2)):
            expert = runtime.banks[1].experts[int(experts[row, rows[row, column]])]
            torch.testing.assert_close(told[row, column], expert(hidden[row, column]), atol=1e-5, rtol=1e-4)

    def test_it_goes_with_policies_of_the_cache_and_of_the_stream(self, tmp_path):
        hf, ids = families.llama(), running.ids(2, 24)
        policy = learned(hf, tmp_path, experts=3)
        mask = running.padded(ids, (24, 17))
        for other in (ThinK(window=4, recent=4), LazyLLM(keep=0.6)):
            with attach(hf, policy, other):
                whole, _ = running.passes(hf, ids, running.steps(24, 16), mask)
                alone, _ = running.passes(hf, ids[1:, -17:], running.steps(17, 9))
                torch.testing.assert_close(whole[1, -1], alone[0, -1], atol=5e-4, rtol=5e-3)
        with (
            pytest.raises(PolicyError, match="both decide on the channels"),
            attach(hf, policy, RandomChannelExperts()),
        ):
            pass


class TestPlantedDomains:
    def test_the_planted_channels_are_found(self):
        hf, ids = planted(), two_languages()
        means = channels.domain_means(wrap(hf), ids, None, torch.tensor([0, 0, 0, 1, 1, 1]), 2)
        for mean in means.values():
            masks = channels.strongest(mean, 24)
            assert masks[0, :24].all()
            assert masks[1, 24:].all()

    def test_own_domain_beats_random_and_swapped_channels_before_training(self):
        # Card: experts cut by domain beat random masks of equal size and swapped masks; swapped fails if mixed up.
        hf, ids = planted(), two_languages()
        labels = torch.tensor([0, 0, 0, 1, 1, 1])
        means = channels.domain_means(wrap(hf), ids, None, labels, 2)
        fresh = two_languages(seed=1)
        experts = labels[:, None].expand(fresh.shape)
        masks = {layer: channels.strongest(mean, 24) for layer, mean in means.items()}
        own = kl(hf, fresh, masks, experts)
        assert 3 * own < kl(hf, fresh, masks, 1 - experts)
        for seed in range(5):
            draw = torch.Generator().manual_seed(seed)
            drawn = {layer: channels.strongest(torch.rand(2, 48, generator=draw), 24) for layer in masks}
            assert 3 * own < kl(hf, fresh, drawn, experts)

    def test_prepare_finds_languages_and_learns_to_tell_them(self, tmp_path):
        hf = planted()
        rows = two_languages(rows=16)
        fresh = two_languages(seed=1)
        policy = learned(hf, tmp_path, Batch(rows, None, "two", "", 0, 16), steps=40, batch=8, lr=0.01)
        experts = policy.runtime(wrap(hf)).decide(fresh)
        right = (experts == experts[0, 0]) == (fresh < HALF)
        assert float(right.float().mean()) > 0.97
        control = RandomChannelExperts(experts=2)
        with torch.no_grad():
            dense = hf(fresh).logits.log_softmax(-1)
            found = []
            for one in (policy, control):
                with attach(hf, one):
                    found.append(float((dense.exp() * (dense - hf(fresh).logits.log_softmax(-1))).sum(-1).mean()))
        assert 3 * found[0] < found[1]


class TestPrepare:
    def test_rows_of_two_languages_are_two_domains(self):
        told = domains.found(wrap(planted()), Batch(two_languages(rows=10), None, "", "", 0, 10), 2).tolist()
        assert told in ([0] * 5 + [1] * 5, [1] * 5 + [0] * 5)

    def test_clusters_never_are_empty_and_need_different_points(self):
        draw = torch.Generator().manual_seed(0)
        for count in (1, 2, 5, 9):
            assert len(domains.clusters(torch.randn(9, 4, generator=draw), count).unique()) == count
        with pytest.raises(DataError, match="1 different rows of data cannot form 2 domains"):
            domains.clusters(torch.ones(9, 4), 2)

    def test_domains_may_be_named(self, tmp_path):
        from paredown.core import checkpoint

        model = checkpoint.load("testbed:lm", dtype="float32")
        for name, words in (("a", "the cat sat on a mat. "), ("b", "1 + 1 = 2, 2 + 2 = 4; ")):
            (tmp_path / f"{name}.txt").write_text(words * 400)
        sources = (str(tmp_path / "a.txt"), str(tmp_path / "b.txt"))
        policy = ReadMe(domains=sources, rows=2, steps=1, batch=2, width=16)
        data = Batch(running.ids(2, 32), None, "", "", 0, 2)
        ready = policy.prepare(model, data, folder=str(tmp_path / "out"))
        masks, router = ready.load(model)
        assert router.head.out_features == 2
        assert not torch.equal(masks[3][0], masks[3][1])
        with pytest.raises(DataError, match="no file or folder"):
            policy.model_copy(update={"domains": ("/none.txt", *sources)}).prepare(model, data, folder=str(tmp_path))

    def test_the_model_stays_and_the_same_comes_out_twice(self, tmp_path):
        hf = families.llama()
        before = {name: tensor.clone() for name, tensor in hf.state_dict().items()}
        files = [load_file(learned(hf, tmp_path / name).weights) for name in "ab"]
        assert files[0].keys() == files[1].keys()
        assert all(torch.equal(files[0][name], files[1][name]) for name in files[0])
        assert all(torch.equal(before[name], tensor) for name, tensor in hf.state_dict().items())
        assert not any("forward" in vars(module) for module in hf.modules())
        assert sorted(path.name for path in (tmp_path / "a").iterdir()) == ["read-me.safetensors"]

    def test_experts_that_are_all_the_same_need_no_router(self, tmp_path):
        hf = families.llama()
        policy = learned(hf, tmp_path, experts=1)
        assert policy.load(wrap(hf))[1].head.out_features == 1
        with policy.attach(hf), torch.no_grad():
            assert torch.isfinite(hf(running.ids()).logits).all()

    def test_what_is_missing_is_told(self, tmp_path):
        hf = families.llama()
        with pytest.raises(PolicyError, match="no experts for LlamaForCausalLM yet"):
            ReadMe().runtime(wrap(hf))
        with pytest.raises(DataError, match="give it calibration data"):
            ReadMe().prepare(wrap(hf), None, folder=str(tmp_path))
        with pytest.raises(PolicyError, match="give prepare a folder"):
            ReadMe().prepare(wrap(hf), text())
        (tmp_path / "torn.safetensors").write_bytes(b"torn")
        with pytest.raises(PolicyError, match="holds no experts that can be read"):
            ReadMe(weights=str(tmp_path / "torn.safetensors")).runtime(wrap(hf))
        policy = learned(hf, tmp_path / "ready")
        with pytest.raises(PolicyError, match="with other fields"):
            policy.model_copy(update={"layers": 1}).runtime(wrap(hf))
        with pytest.raises(PolicyError, match="chosen for another model"):
            policy.runtime(wrap(families.FAMILIES["gemma3"]()))
        with pytest.raises(ArchitectureError, match="has no dense MLP"):
            RandomChannelExperts().runtime(wrap(families.FAMILIES["mixtral"]()))


class TestControl:
    def test_it_draws_as_many_channels_and_is_known_as_the_control(self):
        model = wrap(families.llama())
        one, other = RandomChannelExperts(keep=0.3, experts=3), RandomChannelExperts(keep=0.3, experts=3, seed=1)
        banks = [policy.runtime(model).banks for policy in (one, one, other)]  # type: ignore[attr-defined]
        weights = [bank[0].experts[1].up_proj.weight for bank in banks]
        assert weights[0].shape == (14, 32)
        assert torch.equal(weights[0], weights[1])
        assert not torch.equal(weights[0], weights[2])
        assert (RandomChannelExperts.unit, RandomChannelExperts.kind) == (ReadMe.unit, ReadMe.kind)
