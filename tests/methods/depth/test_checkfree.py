"""CheckFree: the formula, what a recovery touches, swaps, and that a rebuilt stage recovers."""

from __future__ import annotations

from copy import deepcopy
from typing import Any

import families
import pytest
import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainerCallback, TrainingArguments
from transformers.trainer_callback import PrinterCallback

from paredown.core.calibration import Batch
from paredown.core.checkpoint import Model, quiet
from paredown.core.depth import rebuild
from paredown.core.depth.rebuild import Stages, share_of_next, weighted_mean
from paredown.core.learning.training import _around
from paredown.errors import ArchitectureError, DataError, UsageError
from paredown.methods.depth.checkfree import CheckFree, CheckFreeProbe, RandomCheckFree

VOCAB = 48


def tiny(layers: int = 8, seed: int = 0) -> Model:
    config = LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=layers,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=64,
        # Blocks this narrow would begin as next to nothing with the usual 0.02, which the paper has at width 512.
        initializer_range=0.02 * (512 / 32) ** 0.5,
    )
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return Model.of(LlamaForCausalLM(config))


def text(rows: int, length: int = 24, seed: int = 0) -> Tensor:
    """A language: the next token follows from the last two, most of the time."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(0, VOCAB, (rows, length), generator=generator)
    for t in range(2, length):
        told = (3 * ids[:, t - 1] + 5 * ids[:, t - 2] + 1) % VOCAB
        sure = torch.rand(rows, generator=generator) < 0.95
        ids[:, t] = torch.where(sure, told, ids[:, t])
    return ids


def train(
    model: Model, steps: int, callbacks: list[Any], *, accumulate: int = 1, clip: float = 1.0, **more: Any
) -> Any:
    ids = text(2048)
    arguments = TrainingArguments(
        output_dir="none",
        max_steps=steps,
        per_device_train_batch_size=16,
        gradient_accumulation_steps=accumulate,
        learning_rate=more.pop("lr", 3e-3),
        lr_scheduler_type=more.pop("schedule", "constant"),
        max_grad_norm=clip,
        save_strategy="no",
        logging_strategy="no",
        report_to="none",
        disable_tqdm=True,
        use_cpu=True,
        dataloader_pin_memory=False,
        seed=more.pop("seed", 0),
    )
    rows = [{"input_ids": row, "labels": row} for row in ids]
    with _around(), quiet():
        trainer = Trainer(model=model.hf, args=arguments, train_dataset=rows, callbacks=callbacks, **more)
        trainer.remove_callback(PrinterCallback)
        trainer.train()
    model.hf.eval()
    return trainer


def loss(model: Model) -> float:
    ids = text(64, seed=99)
    with torch.no_grad():
        return float(model.hf(input_ids=ids, labels=ids).loss)


def at(step: int, act: Any) -> Any:
    """Return a callback that does something at the end of a step, before those behind it in the list."""

    class Then(TrainerCallback):  # type: ignore[misc]
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if state.global_step == step:
                act(kwargs)

    return Then()


# Card: the formula.


def test_the_mean_is_that_of_the_paper():
    generator = torch.Generator().manual_seed(0)
    before = {"w": torch.randn(5, 4, generator=generator), "b": torch.randn(4, generator=generator)}
    after = {"w": torch.randn(5, 4, generator=generator), "b": torch.randn(4, generator=generator)}
    norm_before, norm_after = 0.3, 1.7
    a, b = norm_after + 1e-4, norm_before + 1e-4
    found = weighted_mean(before, after, share_of_next(norm_before, norm_after))
    for name in before:
        wanted = (a * after[name].double() + b * before[name].double()) / (a + b)
        torch.testing.assert_close(found[name].double(), wanted, atol=1e-7, rtol=1e-7)
        assert found[name].dtype == before[name].dtype
    plain = weighted_mean(before, after, share_of_next(2.0, 2.0))
    torch.testing.assert_close(plain["w"], (before["w"] + after["w"]) / 2, atol=1e-7, rtol=0)
    same = weighted_mean(before, before, share_of_next(0.1234, 5.678))
    assert all(torch.equal(same[name], before[name]) for name in before)
    half = {name: tensor.bfloat16() for name, tensor in before.items()}
    assert all(torch.equal(tensor, half[name]) for name, tensor in weighted_mean(half, half, 0.37).items())
    counts = weighted_mean({"n": torch.tensor(3)}, {"n": torch.tensor(8)}, 0.5)
    assert counts["n"] == 3


def test_which_stages_are_means_and_which_copies_follows_from_n():
    model = tiny(12)
    for n in (3, 4, 6, 12):
        method = CheckFree(stages=n)
        stages = method.cut(model)
        words = [method.rebuild(stages, stage, [1.0] * (n + 1)) for stage in range(1, n + 1)]
        assert words[0] == "copy of stage 2"
        assert words[-1] == f"copy of stage {n - 1}"
        assert words[1:-1] == [f"0.5 of stage {i - 1} and 0.5 of stage {i + 1}" for i in range(2, n)]
        if n < 4:
            with pytest.raises(UsageError, match="four stages"):
                CheckFree(stages=n, swaps=True).cut(model)
            continue
        plus = CheckFree(stages=n, swaps=True)
        words = [plus.rebuild(stages, stage, [1.0] * (n + 1)) for stage in range(1, n + 1)]
        assert words[:2] == ["copy of stage 2", "copy of stage 1"]
        assert words[-2:] == [f"copy of stage {n}", f"copy of stage {n - 1}"]
        assert all(" and " in word for word in words[2:-2])


def test_gradient_norms_weigh_the_neighbours():
    stages = Stages(tiny(4), 4)
    norms = [9.0, 1.0, 5.0, 3.0, 7.0]
    assert CheckFree().rebuild(stages, 2, norms) == "0.25 of stage 1 and 0.75 of stage 3"
    assert CheckFree(weights="squared").rebuild(stages, 2, norms) == "0.1 of stage 1 and 0.9 of stage 3"
    assert CheckFree(weights="equal").rebuild(stages, 2, norms) == "0.5 of stage 1 and 0.5 of stage 3"
    assert CheckFree(inner="copy").rebuild(stages, 2, norms) == "copy of stage 1"


def test_layers_go_with_layers_of_the_same_place():
    model = tiny(8)
    layers = model.hf.model.layers
    known = [deepcopy(layer.state_dict()) for layer in layers]
    stages = Stages(model, 4)
    stages.average(2, 0.25)
    for i in (2, 3):
        for name, tensor in layers[i].state_dict().items():
            wanted = 0.75 * known[i - 2][name] + 0.25 * known[i + 2][name]
            torch.testing.assert_close(tensor, wanted, atol=1e-7, rtol=0)
    for i in (0, 1, 4, 5, 6, 7):
        assert all(torch.equal(tensor, known[i][name]) for name, tensor in layers[i].state_dict().items())


def test_the_control_draws_new_weights_by_its_seed():
    drawn = []
    for seed in (0, 0, 1):
        model = tiny(4)
        known = [deepcopy(layer.state_dict()) for layer in model.hf.model.layers]
        method = RandomCheckFree(seed=seed)
        assert method.rebuild(method.cut(model), 2, [1.0] * 5) == "random weights"
        drawn.append(model.hf.model.layers[1].mlp.up_proj.weight.detach().clone())
        assert not torch.equal(drawn[-1], known[1]["mlp.up_proj.weight"])
        assert float(drawn[-1].std()) == pytest.approx(0.08, rel=0.1)
        assert torch.equal(model.hf.model.layers[0].mlp.up_proj.weight, known[0]["mlp.up_proj.weight"])
    assert torch.equal(drawn[0], drawn[1])
    assert not torch.equal(drawn[0], drawn[2])
    assert RandomCheckFree.unit == CheckFree.unit


# Card: what a recovery touches.


def test_only_the_lost_stage_is_touched_and_its_moments_are_gone():
    model, method = tiny(8), CheckFree(scale=1.2)
    (recovery,) = method.callbacks(model)
    seen: dict[str, Any] = {}

    def before(kwargs: Any) -> None:
        optimiser = kwargs["optimizer"].optimizer
        seen["weights"] = {n: p.detach().clone() for n, p in model.hf.named_parameters()}
        seen["moments"] = {p: {k: v.clone() for k, v in s.items()} for p, s in optimiser.state.items()}
        recovery.lose(2)

    def after(kwargs: Any) -> None:
        optimiser = kwargs["optimizer"].optimizer
        lost = {id(p) for p in recovery.stages.parameters(2)}
        for name, parameter in model.hf.named_parameters():
            assert torch.isfinite(parameter).all()
            assert parameter.shape == seen["weights"][name].shape
            if id(parameter) in lost:
                assert parameter not in optimiser.state
                continue
            assert torch.equal(parameter, seen["weights"][name])
            assert all(torch.equal(v, optimiser.state[parameter][k]) for k, v in seen["moments"][parameter].items())
        seen["norms"] = list(recovery.norms)
        share = share_of_next(recovery.norms[1], recovery.norms[3])
        for lost_block, (first, last) in zip(
            recovery.stages.blocks(2),
            zip(recovery.stages.blocks(1), recovery.stages.blocks(3), strict=True),
            strict=True,
        ):
            wanted = weighted_mean(first.state_dict(), last.state_dict(), share)
            assert all(torch.equal(wanted[n], t) for n, t in lost_block.state_dict().items())
        seen["checked"] = True

    trainer = train(model, 7, [at(4, before), recovery, at(4, after)], schedule="inverse_sqrt")
    assert trainer.lr_scheduler.get_last_lr()[0] < 3e-3
    assert seen["checked"]
    assert [entry[:2] for entry in recovery.history] == [(4, 2)]
    groups = trainer.optimizer.optimizer.param_groups
    rates = {id(p): group["lr"] for group in groups for p in group["params"]}
    assert len(rates) == len(list(model.hf.parameters()))
    lost = {id(p) for p in recovery.stages.parameters(2)}
    # The schedule goes on for all; the lost stage has 1.2 times the rate.
    first = {rate for key, rate in rates.items() if key not in lost}
    assert len(first) == 1
    assert rates == pytest.approx({key: (1.2 if key in lost else 1) * max(first) for key in rates})


def test_a_stage_lost_twice_is_scaled_once_and_the_ends_keep_their_weights():
    model, method = tiny(4), CheckFree(scale=1.5)
    (recovery,) = method.callbacks(model)
    ends: dict[str, Any] = {}

    def third(kwargs: Any) -> None:
        ends["before"] = [p.detach().clone() for p in recovery.stages.parameters(0)]
        recovery.lose(0)
        recovery.lose(3)

    def checked(kwargs: Any) -> None:
        optimiser = kwargs["optimizer"].optimizer
        own = recovery.stages.parameters(0)
        assert all(torch.equal(a, b) for a, b in zip(ends["before"], own, strict=True))
        assert not any(p in optimiser.state for p in own)

    trainer = train(model, 5, [at(2, lambda _: recovery.lose(3)), at(3, third), recovery, at(3, checked)])
    groups = trainer.optimizer.optimizer.param_groups
    rates = {id(p): group["lr"] for group in groups for p in group["params"]}
    assert [rates[id(p)] for p in recovery.stages.parameters(3)] == pytest.approx([4.5e-3] * 9)
    assert [rates[id(p)] for p in recovery.stages.parameters(1)] == [3e-3] * 9
    assert [entry[1] for entry in recovery.history] == [3, 0, 3]


def test_norms_are_those_of_the_whole_step_before_or_after_clipping():
    model = tiny(4)
    found: dict[str, list[float]] = {}
    for when in ("before", "after"):
        copy = deepcopy(model)
        (recovery,) = CheckFree(norms=when).callbacks(copy)
        assert recovery.norms == [1.0] * 5
        train(copy, 1, [recovery], accumulate=2, clip=0.01)
        found[when] = recovery.norms
    # The gradient of the mean over both micro-batches, without a Trainer.
    seen: list[Tensor] = []
    copy = deepcopy(model)
    handle = copy.hf.register_forward_pre_hook(
        lambda _, args, kwargs: seen.append(kwargs["input_ids"]), with_kwargs=True
    )
    train(copy, 1, [], accumulate=2, clip=0.01)
    handle.remove()
    ids = torch.cat(seen)
    model.hf(input_ids=ids, labels=ids).loss.backward()
    wanted = [sum(float(p.grad.pow(2).sum()) for p in Stages(model, 4).parameters(i)) ** 0.5 for i in range(5)]
    assert found["before"] == pytest.approx(wanted, rel=1e-4)
    total = sum(x * x for x in found["after"]) ** 0.5
    assert total == pytest.approx(0.01, rel=1e-3)
    assert found["after"] == pytest.approx([x * total / sum(y * y for y in wanted) ** 0.5 for x in wanted], rel=1e-3)


def test_losses_by_lot_depend_on_the_seed_alone():
    lots = []
    for seed in (0, 0, 1):
        model = tiny(4)
        (recovery,) = CheckFree(failures=0.3, seed=seed).callbacks(model)
        train(model, 12, [recovery])
        lots.append([entry[:2] for entry in recovery.history])
        assert torch.isfinite(next(model.hf.parameters())).all()
    assert lots[0] == lots[1] != lots[2]
    assert lots[0]


def test_what_cannot_be_rebuilt_is_told():
    with pytest.raises(UsageError, match=r"8 blocks cannot be cut into 5 equal stages.*choose one of 4, 8"):
        CheckFree(stages=5).callbacks(tiny(8))
    with pytest.raises(ArchitectureError, match="another kind"):
        CheckFree(stages=4).callbacks(Model.of(families.qwen3_moe_mixed()))
    with pytest.raises(ArchitectureError, match="block 1 of"):
        CheckFree(stages=4).callbacks(Model.of(families.gemma3()))  # sliding and full attention
    (recovery,) = CheckFree().callbacks(tiny(4))
    with pytest.raises(UsageError, match="no stage 5"):
        recovery.lose(5)
    recovery.lose(2)
    recovery.lose(2)
    with pytest.raises(UsageError, match="stages 2 and 3 were lost in one step"):
        recovery.lose(3)
    recovery.lose(4)


# Card: swaps.


def test_swapped_stages_run_once_each_and_all_learn():
    model, method = tiny(8), CheckFree(stages=4, swaps=True)
    order: list[int] = []
    for i, layer in enumerate(model.hf.model.layers):
        layer.register_forward_pre_hook(lambda *_, number=i: order.append(number))
    ids = text(2)
    model.hf.train()
    with method.wrap(model):
        plain = model.hf(input_ids=ids, labels=ids).loss
        assert order == list(range(8))
        order.clear()
        model.hf(input_ids=ids, labels=ids).loss.backward()
        assert order == [2, 3, 0, 1, 6, 7, 4, 5]
        assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in model.hf.parameters())
        order.clear()
        model.hf.eval()
        with torch.no_grad():
            evaluated = model.hf(input_ids=ids, labels=ids).loss
        assert order == list(range(8))
        assert torch.equal(evaluated, plain)
        model.hf.train()
        order.clear()
        with pytest.raises(ValueError, match="input_ids"):
            model.hf(input_ids=None)
    assert [layer.self_attn.layer_idx for layer in model.hf.model.layers] == list(range(8))
    order.clear()
    model.hf(input_ids=ids)
    model.hf(input_ids=ids)
    assert order == [*range(8), *range(8)]


# Card: recovery. Five seeds on real text, against a new start too, stand in the benchmark: in models as small as these
# a block of random weights does little harm.


def test_a_mean_is_a_better_start_than_a_copy_and_both_recover():
    at_once: dict[str, float] = {}
    later: dict[str, float] = {}
    for name, method in (("mean", CheckFree()), ("copy", CheckFree(inner="copy"))):
        model = tiny(4)
        (recovery,) = method.callbacks(model)

        def note(_: Any, *, key: str = name, found: Model = model) -> None:
            found.hf.eval()
            at_once[key] = loss(found)
            found.hf.train()

        train(model, 190, [at(150, lambda _, r=recovery: r.lose(3)), recovery, at(150, note)], lr=5e-3)
        later[name] = loss(model)
    assert at_once["mean"] < at_once["copy"]
    assert all(later[name] < at_once[name] for name in later)


def test_a_first_stage_that_was_swapped_is_better_replaced_by_the_second():
    rise = []
    for swaps in (False, True):
        model, method = tiny(4), CheckFree(swaps=swaps)
        with method.wrap(model):
            train(model, 150, [], lr=5e-3)
        before = loss(model)
        method.rebuild(method.cut(model), 1, [1.0] * 5)
        rise.append(loss(model) - before)
    assert rise[1] < 0.7 * rise[0]


# The probe.


def batch(rows: int = 4, length: int = 12) -> Batch:
    return Batch(text(rows, length, seed=3), None, "made", "", 0, rows)


def planted(layer: int = 2) -> Model:
    model = tiny(5, seed=2)
    with torch.no_grad():
        for parameter in model.hf.parameters():
            parameter.mul_(3)
    blocks = model.hf.model.layers
    mean = weighted_mean(blocks[layer - 1].state_dict(), blocks[layer + 1].state_dict(), 0.5)
    rebuild.put(blocks[layer], mean)
    return model


def test_a_planted_mean_is_found():
    # Card: layer i = mean of its neighbours: KL 0 for i, above 0 elsewhere.
    model, data = planted(), batch()
    before = {name: tensor.clone() for name, tensor in model.hf.state_dict().items()}
    rows = CheckFreeProbe().measure(model, data)
    assert [row["layer"] for row in rows] == list(range(5))
    assert len({tuple(row) for row in rows}) == 1
    assert rows[2]["kl_mean"] == 0
    assert rows[2]["distance_mean"] == 0
    assert rows[2]["best"] == "mean"
    assert all(rows[i]["kl_mean"] > 1e-4 and rows[i]["distance_mean"] > 0.1 for i in (1, 3))
    assert all(row["kl_drop"] > 1e-4 for row in rows)
    assert rows[0]["kl_mean"] is None
    assert rows[0]["kl_before"] is None
    assert rows[4]["kl_after"] is None
    assert all(torch.equal(before[name], tensor) for name, tensor in model.hf.state_dict().items())


def test_options_are_what_they_say():
    model, data = planted(), batch()
    row = CheckFreeProbe().measure(model, data)[3]
    ids = data.input_ids

    def kl(other: Model) -> float:
        p, q = (families.logits(m.hf, {"input_ids": ids})[:, :-1].log_softmax(-1) for m in (model, other))
        return float((p.exp() * (p - q)).sum(-1).mean())

    model.hf.config.use_cache = False  # layers below are deleted without renumbering

    copied, dropped = deepcopy(model), deepcopy(model)
    copied.hf.model.layers[3].load_state_dict(model.hf.model.layers[4].state_dict())
    assert row["kl_after"] == pytest.approx(kl(copied), rel=1e-4)
    del dropped.hf.model.layers[3]
    dropped.hf.config.num_hidden_layers = 4
    assert row["kl_drop"] == pytest.approx(kl(dropped), rel=1e-4)


def test_without_data_weights_are_compared():
    rows = CheckFreeProbe().measure(planted(), None)
    assert all(row["kl_drop"] is None and row["kl_mean"] is None for row in rows)
    assert rows[2]["best"] == "mean"
    with pytest.raises(DataError, match="weights=equal"):
        CheckFreeProbe(weights="gradients").measure(planted(), None)


def test_only_like_blocks_stand_in_for_each_other():
    data = Batch(matrix_ids(), None, "random", "", 0, 4)
    rows = CheckFreeProbe().measure(Model.of(families.qwen3_moe_mixed()), data)  # the second block is dense
    assert [(row["kl_before"] is not None, row["kl_after"] is not None) for row in rows] == [
        (False, False),
        (False, False),
        (False, True),
        (True, False),
    ]
    assert all(row["kl_drop"] is not None for row in rows)
    rows = CheckFreeProbe().measure(Model.of(families.gemma3()), None)  # sliding and full in turns
    assert all(row["distance_before"] is None for row in rows)


def test_gradients_weigh_the_mean_and_leave_nothing_behind():
    model, data = planted(), batch()
    grads = [p.grad for p in model.hf.parameters()]
    norms = rebuild.gradient_norms(model, data, batch=3)
    assert [p.grad for p in model.hf.parameters()] == grads
    assert all(p.requires_grad for p in model.hf.parameters())
    copy = deepcopy(model)
    copy.hf(input_ids=data.input_ids, labels=data.input_ids).loss.backward()
    wanted = [sum(float(p.grad.pow(2).sum()) for p in layer.parameters()) ** 0.5 for layer in copy.hf.model.layers]
    assert norms == pytest.approx(wanted, rel=1e-4)
    row = CheckFreeProbe(weights="gradients").measure(model, data)[3]
    blocks = model.hf.model.layers
    share = share_of_next(norms[2], norms[4])
    mean = weighted_mean(blocks[2].state_dict(), blocks[4].state_dict(), share)
    assert row["distance_mean"] == pytest.approx(rebuild.distance(blocks[3].state_dict(), mean))


def matrix_ids() -> Tensor:
    return torch.randint(3, 90, (4, 10), generator=torch.Generator().manual_seed(0))
