"""RMoE: the checks of its card, and of the errata."""

from __future__ import annotations

import families
import pytest
import running
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file

from paredown import registry
from paredown.core import calibration, checkpoint
from paredown.core.attach import attach, attach_runtimes, wrap
from paredown.core.calibration import Batch
from paredown.core.checkpoint import Model
from paredown.core.experts import routing
from paredown.core.learning.teacher import Teacher, fitness
from paredown.core.runtime import Runtime
from paredown.errors import ArchitectureError, DataError, PolicyError
from paredown.methods.experts.rmoe import Correction, RandomRouters, RMoE, Routers, _Training

SMALL = {"width": 8, "batch": 2, "steps": 0}


def text(rows=4, length=24, seed=3):
    return Batch(running.ids(rows, length, seed), None, "random", "", 0, rows)


def trained(hf, folder, *, noise=0.0, cls=RMoE, **fields):
    """Return a prepared policy; ``noise`` makes what is read from the memory more than nothing."""
    policy = cls(**{**SMALL, **fields}).prepare(wrap(hf), text(), folder=str(folder))
    if noise:
        draw = torch.Generator().manual_seed(1)
        state = load_file(policy.weights)
        save_file({k: v + noise * torch.randn(v.shape, generator=draw) for k, v in state.items()}, policy.weights)
    return policy


def logits(hf, tokens, *policies, mask=None):
    with attach(hf, *policies), torch.no_grad():
        return hf(input_ids=tokens, attention_mask=mask, use_cache=False).logits


def routers(model, policy):
    return Routers(policy, model, policy._load(model, policy.weights))


class Memories(Routers):
    """Notes the memory after each layer."""

    def __init__(self, policy, model):
        super().__init__(policy, model, policy._load(model, policy.weights))
        self.seen = {}

    def route(self, layer, hidden, logits, now, rows):
        out = super().route(layer, hidden, logits, now, rows)
        self.seen[layer] = now.memo["rmoe.memory"].clone()
        return out


def test_the_cell_is_a_gated_recurrent_unit():
    # Card: reset, z, n and the new state as written there, torch's gate order r, z, n; to 1e-6.
    draw = torch.Generator().manual_seed(0)
    correction = Correction({0: (6, 5)}, 4, "gru")
    with torch.no_grad():
        for parameter in correction.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=draw))
    h, r = torch.randn(7, 6, generator=draw), torch.randn(7, 4, generator=draw)
    x = h @ correction.read["0"].weight.T
    cell = correction.cell
    ar, az, an = cell.weight_ih.chunk(3)
    br, bz, bn = cell.weight_hh.chunk(3)
    (ir, iz, i_n), (hr, hz, hn) = cell.bias_ih.chunk(3), cell.bias_hh.chunk(3)
    reset = torch.sigmoid(x @ ar.T + ir + r @ br.T + hr)
    z = torch.sigmoid(x @ az.T + iz + r @ bz.T + hz)
    n = torch.tanh(x @ an.T + i_n + reset * (r @ bn.T + hn))
    expected = (1 - z) * n + z * r
    added, memory = correction(0, h, r)
    torch.testing.assert_close(memory, expected, atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(added, expected @ correction.write["0"].weight.T, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("cell", ["gru", "rnn", "linear"])
@pytest.mark.parametrize("family", families.MOE)
def test_step_0_is_the_old_model_bit_for_bit(family, cell, tmp_path):
    # Card: retrofit at step 0 (W2 = 0).
    hf, tokens = families.FAMILIES[family](), running.ids()
    policy = trained(hf, tmp_path, cell=cell)
    assert not policy.inert
    assert torch.equal(logits(hf, tokens, policy), logits(hf, tokens))
    assert not torch.equal(logits(hf, tokens, trained(hf, tmp_path, cell=cell, noise=0.5)), logits(hf, tokens))


def test_keep_is_the_share_of_routers_that_stay():
    hf = families.deepseek_v3()  # experts in layers 1 to 3
    model = wrap(hf)
    assert RMoE().changed(model) == [1, 2, 3]
    assert RMoE(keep=0.5).changed(model) == [3]
    assert RMoE(keep=1).inert
    assert RMoE(keep=1).prepare(model, None).weights is None


def test_a_host_without_normalised_weights_stays_so(tmp_path):
    # Card, pitfall: norm_topk_prob follows the host; where it normalises, the top-k weights sum to 1.
    for family, normed in (("qwen3_moe", True), ("qwen2_moe", False)):
        hf, sums = families.FAMILIES[family](), []
        policy = trained(hf, tmp_path, noise=0.5)
        model = wrap(hf)
        handle = routing.router(model, 1).register_forward_hook(lambda _, __, out, s=sums: s.append(out[1].sum(-1)))
        logits(hf, running.ids(), policy)
        handle.remove()
        ones = torch.ones_like(sums[0])
        assert torch.allclose(sums[0], ones, atol=1e-5) is normed


def test_groups_and_correction_bias_are_the_hosts(tmp_path):
    hf, seen = families.deepseek_v3(), []
    policy = trained(hf, tmp_path, noise=0.5)
    router = routing.router(wrap(hf), 2)
    handle = router.register_forward_hook(lambda _, __, out: seen.append(out))
    logits(hf, running.ids(), policy)
    handle.remove()
    said, weights, chosen = seen[0]
    score = said.sigmoid()
    biased = score + router.e_score_correction_bias
    best = biased.view(-1, 2, 4).topk(2, dim=-1).values.sum(-1).argmax(-1)
    assert (chosen // 4 == best[:, None]).all()
    taken = score.gather(1, chosen)
    torch.testing.assert_close(weights, taken / taken.sum(-1, keepdim=True) * router.routed_scaling_factor)


def test_no_state_passes_between_positions(tmp_path):
    # Card: with attention outputs taken from a recorded pass, perturbing a token changes no other position's memory.
    hf, tokens = families.qwen3_moe(), running.ids(1, 12)
    model, other = wrap(hf), running.ids(1, 12)
    other[0, 5] = (other[0, 5] + 1) % families.VOCAB
    policy = trained(hf, tmp_path, noise=0.5)
    kept, playing = {}, []

    def memories(ids):
        runtime, handles = Memories(policy, model), []
        for part in model.anatomy.language.blocks:
            attends = hf.get_submodule(f"{part.path}.self_attn")
            record = lambda _, __, out, i=part.index: kept[i] if playing else kept.__setitem__(i, out)  # noqa: E731
            handles.append(attends.register_forward_hook(record))
        with attach_runtimes(model, [runtime]), torch.no_grad():
            hf(input_ids=ids, use_cache=False)
        for handle in handles:
            handle.remove()
        return runtime.seen

    before = memories(tokens)
    playing.append(True)
    after = memories(other)
    for layer in before:
        same = (before[layer] == after[layer]).all(-1)[0]
        assert same.tolist() == [position != 5 for position in range(12)], layer


@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe_mixed", "deepseek_v3"])
def test_cached_decoding_is_the_full_forward(family, tmp_path):
    # Card: to 1e-5. A memory that leaks between calls fails it.
    hf, tokens = families.FAMILIES[family](), running.ids()
    policy = trained(hf, tmp_path, noise=0.5)
    whole = logits(hf, tokens, policy)
    with attach(hf, policy):
        stepwise, _ = running.passes(hf, tokens, running.steps(24, 10))
        again, _ = running.passes(hf, tokens, (7, 9, 24))
    torch.testing.assert_close(stepwise, whole, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(again, whole, atol=1e-5, rtol=1e-4)


def test_the_memory_of_a_layer_depends_on_the_layers_below(tmp_path):
    # Card: zeroing W1 at one layer changes the logits of the next, also over a layer without experts.
    hf = families.qwen3_moe_mixed()  # layer 1 is dense
    model, policy = wrap(hf), trained(hf, tmp_path, noise=0.5)

    def said(zero):
        correction = policy._load(model, policy.weights)
        if zero:
            correction.read["0"].weight.zero_()
            correction.write["0"].weight.zero_()  # so that layer 0 sends its tokens where it did
        else:
            correction.write["0"].weight.zero_()
        runtime = Routers(policy, model, correction)
        runtime.listening = True
        with attach_runtimes(model, [runtime]), torch.no_grad():
            hf(input_ids=running.ids(), use_cache=False)
            return runtime.heard

    plain, zeroed = said(False), said(True)
    assert len(plain) == 3  # layers 0, 2 and 3
    assert torch.equal(plain[0], zeroed[0])
    assert not torch.allclose(plain[1], zeroed[1])


def test_gradients_reach_the_cell_from_every_layer(tmp_path):
    # Card. Each layer's logits alone reach the cell.
    hf = families.qwen3_moe()
    model, policy = wrap(hf), trained(hf, tmp_path, noise=0.3)
    correction = policy._load(model, policy.weights).requires_grad_(True)
    runtime = Routers(policy, model, correction)
    runtime.listening = True
    with attach_runtimes(model, [runtime]):
        hf(input_ids=running.ids(), use_cache=False)
    for heard in runtime.heard:
        (found,) = torch.autograd.grad(heard.float().square().sum(), correction.cell.weight_ih, retain_graph=True)
        assert float(found.abs().sum()) > 0


def test_padding_and_beams_change_nothing(tmp_path):
    running.check_family("qwen3_moe", trained(running.built("qwen3_moe"), tmp_path, noise=0.5))


def test_rows_that_left_the_stream_keep_their_memory(tmp_path):
    # With tokens led around a layer, each router reads the memory of its own tokens.
    hf, tokens = families.qwen3_moe(), running.ids()
    policy = trained(hf, tmp_path, noise=0.5)

    class Around(Runtime):
        def __init__(self, model):
            self.model = model

        def before(self, layer, stream):
            if layer == 1:
                mask = torch.zeros(stream.hidden.shape[:2], dtype=torch.bool)
                mask[:, 3:9] = True
                stream.around(mask)

    model = wrap(hf)
    runtime = Memories(policy, model)
    with attach_runtimes(model, [Around(model), runtime]), torch.no_grad():
        hf(input_ids=tokens, use_cache=False)
    first, second = runtime.seen[0], runtime.seen[1]
    assert torch.equal(first[:, 3:9], second[:, 3:9])
    assert not torch.isclose(first[:, :3], second[:, :3]).any(-1).all()


def test_the_balance_loss_is_pooled_and_k_at_best():
    # Errata: tokens of all layers are one list, and perfect balance gives k.
    even = torch.zeros(4, 4)
    assert float(routing.balance([even + 1e-6 * torch.eye(4)], 1)) == pytest.approx(1.0, abs=1e-4)
    pairs = torch.tensor([[1.0, 1, 0, 0], [0, 0, 1, 1]]) * 1e-6
    assert float(routing.balance([pairs], 2)) == pytest.approx(2.0, abs=1e-4)
    # One layer sends all to the first, the other all to the second expert: pooled they are half even.
    one, other = torch.tensor([[9.0, 0.0]]), torch.tensor([[0.0, 9.0]])
    assert float(routing.balance([one, other], 1)) == pytest.approx(1.0, abs=1e-3)
    assert float(routing.balance([one], 1)) == pytest.approx(2.0, abs=1e-3)
    real = torch.tensor([True, False])
    both = torch.cat([one, other])
    assert float(routing.balance([both], 1, real)) == pytest.approx(2.0, abs=1e-3)


def test_entropy_and_information():
    assert routing.entropy(torch.tensor([5, 5, 5, 5])) == pytest.approx(1)
    assert routing.entropy(torch.tensor([5, 0, 0, 0])) == 0
    a = torch.arange(8)[:, None] % 4
    assert routing.mutual_information(a, a, (4, 4)) == pytest.approx(torch.tensor(4.0).log().item())
    one, other = torch.arange(16)[:, None] // 4, torch.arange(16)[:, None] % 4
    assert routing.mutual_information(one, other, (4, 4)) == pytest.approx(0, abs=1e-12)


def test_traffic_leaves_padding_out():
    hf = families.qwen3_moe()
    tokens = running.ids(3, 10)
    mask = running.padded(tokens, (10, 4, 7))
    sent = routing.traffic(wrap(hf), tokens, mask, batch=2)
    assert {layer: tuple(index.shape) for layer, index in sent.items()} == dict.fromkeys(range(3), (21, 2))
    alone = routing.traffic(wrap(hf), tokens[1:2, -4:])
    assert torch.equal(sent[1][10:14], alone[1])


@pytest.mark.parametrize("cls", [RMoE, RandomRouters])
def test_training_learns_and_leaves_the_model(cls, tmp_path):
    hf = families.qwen3_moe()
    before = {name: tensor.clone() for name, tensor in hf.state_dict().items()}
    policy = trained(hf, tmp_path, cls=cls, steps=30, lr=0.02)
    told = dict(policy.measured)
    assert told["loss at last"] < told["loss at first"]
    assert 0 < told["load entropy after"] <= 1
    assert told["mutual information before"] >= 0
    assert all(torch.equal(tensor, before[name]) for name, tensor in hf.state_dict().items())
    assert policy.prepare(wrap(hf), None) is policy  # what was given stays
    assert sorted(path.name for path in tmp_path.iterdir()) == ["routers.safetensors"]


def test_the_control_trains_only_what_is_read(tmp_path):
    hf = families.qwen3_moe()
    one = load_file(trained(hf, tmp_path / "0", cls=RandomRouters).weights)
    other = load_file(trained(hf, tmp_path / "1", cls=RandomRouters, steps=3).weights)
    for name in one:
        assert torch.equal(one[name], other[name]) is not name.startswith("write"), name
    assert registry.control_for("rmoe") == "random-routers"


def test_linear_trains_the_old_routers(tmp_path):
    # G h + D h is the old router with the weight G + D.
    hf, tokens = families.mixtral(), running.ids()
    policy = trained(hf, tmp_path, cell="linear", noise=0.1)
    told = logits(hf, tokens, policy)
    for layer, delta in enumerate(load_file(policy.weights).values()):
        router = routing.router(wrap(hf), layer)
        router.weight.data += delta
    torch.testing.assert_close(told, logits(hf, tokens), atol=1e-5, rtol=1e-4)


def test_another_model_teaches(tmp_path):
    hf = families.qwen3_moe()
    original = tmp_path / "original"
    hf.save_pretrained(original)
    model = Model.of(hf)
    registry.create("random-experts", keep=0.5).compress(model, None)
    data = text()
    plain, taught = RMoE(**SMALL), RMoE(**SMALL, teacher=str(original))
    assert (plain.next_token(model), taught.next_token(model)) == (1.0, 0.0)
    model.original = original  # what a recipe tells of its first model
    assert plain.next_token(model) == 0.0
    teacher = plain.model_copy(update={"steps": 1})._taught(model, data, None)
    with torch.no_grad():
        same = checkpoint.load(original).hf(input_ids=data.input_ids, use_cache=False).logits
    assert float(teacher.kl(same, [0, 1, 2, 3]).abs().max()) < 1e-6
    found = RMoE(width=8, batch=2, steps=20, lr=0.02, balance=0).prepare(model, data, folder=str(tmp_path / "r"))
    assert dict(found.measured)["loss at last"] < dict(found.measured)["loss at first"]


def test_padding_does_not_count_in_the_loss(tmp_path):
    hf = families.qwen3_moe()
    tokens = running.ids(2, 10)
    mask = running.padded(tokens, (10, 10))
    wider = torch.cat([torch.full((2, 4), 7), tokens], 1)
    hidden = running.padded(wider, (10, 10))
    policy = trained(hf, tmp_path, noise=0.3)
    losses = []
    for ids, real in ((tokens, mask), (wider, hidden)):
        data = Batch(ids, real, "", "", 0, 2)
        runtime = routers(wrap(hf), policy)
        task = _Training(policy, runtime, data, None)
        with attach_runtimes(wrap(hf), [runtime]):
            losses.append(float(task.loss([0, 1]).detach()))
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)


def test_what_is_wrong_is_said(tmp_path):
    hf = families.qwen3_moe()
    with pytest.raises(ArchitectureError, match="LlamaForCausalLM has none"):
        trained(families.llama(), tmp_path)
    with pytest.raises(PolicyError, match="call prepare"), attach(hf, RMoE()):
        pass
    with pytest.raises(DataError, match="give it calibration data"):
        RMoE().prepare(wrap(hf), None, folder=str(tmp_path))
    with pytest.raises(PolicyError, match="give prepare a folder"):
        RMoE().prepare(wrap(hf), text())
    policy = trained(hf, tmp_path)
    with (
        pytest.raises(PolicyError, match="another model, cell, width or keep"),
        attach(hf, policy.model_copy(update={"width": 9})),
    ):
        pass
    (tmp_path / "broken.safetensors").write_bytes(b"x")
    broken = policy.model_copy(update={"weights": str(tmp_path / "broken.safetensors")})
    with pytest.raises(PolicyError, match="no routers that can be read"), attach(hf, broken):
        pass


def test_a_router_of_an_unknown_kind_is_refused():
    class Odd(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = torch.nn.Parameter(torch.ones(3, 2))

        def forward(self, x):
            return x @ self.weight.T

    odd = Odd()
    with pytest.raises(ArchitectureError, match="Odd computes its logits"), routing.rerouted(odd, lambda _, y: y):
        odd(torch.ones(1, 2))
    assert "forward" not in vars(odd)


@pytest.mark.slow
def test_repair_beats_no_training_on_a_trained_model(tmp_path):
    """Card: half of the experts dropped; both kinds of training beat none. The sign of their difference is no claim."""
    model = checkpoint.load("testbed:moe", dtype="float32")
    splits = {name: calibration.read(None, model_ref="testbed:moe", split=name) for name in ("calibration", "heldout")}
    data, judged = (calibration.for_model(model, t, length=64, sequences=24, seed=0) for t in splits.values())
    teacher = Teacher.collect(model.hf, judged.input_ids)
    registry.create("random-experts", keep=0.5).compress(model, None)
    model.original = model.folder
    none = fitness(model.hf, teacher, judged.input_ids, slice(None))
    for cell in ("linear", "gru"):
        policy = RMoE(cell=cell, width=32, steps=40, lr=3e-3).prepare(model, data, folder=str(tmp_path / cell))
        with attach(model, policy):
            assert fitness(model.hf, teacher, judged.input_ids, slice(None)) < none - 0.1, cell


def test_f_is_torchs():
    # `rerouted` knows a router's map by this function; were it wrapped, nothing would be caught.
    assert F.linear is torch._C._nn.linear
