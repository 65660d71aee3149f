"""TrimLLM: which sub-layer goes, what is trained, and that a killed run ends as one that was not."""

from __future__ import annotations

from typing import Any

import families
import matrix
import pytest
import torch
from torch import Tensor

from paredown.core.calibration import Batch
from paredown.core.checkpoint import Model
from paredown.core.depth import bypass
from paredown.core.depth.bypass import Effect
from paredown.core.depth.gates import Unit, units
from paredown.errors import DataError, OutputError
from paredown.methods.depth.trimllm import RandomTrimLLM, TrimLLM, choose

SHORT: dict[str, Any] = {"steps": 2, "final_steps": 1, "lr": 1e-2, "batch": 2}


def model(family: str = "llama", dtype: torch.dtype = torch.float32) -> Model:
    return Model.of(families.FAMILIES[family]().to(dtype))


def state(found: Model) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in found.hf.state_dict().items()}


def same(a: Model, b: Model) -> bool:
    x, y = a.hf.state_dict(), b.hf.state_dict()
    return list(x) == list(y) and all(torch.equal(x[name], y[name]) for name in x)


# Card: ties.

EFFECTS: dict[Unit, Effect] = {
    (0, "attention"): Effect(2.0, 0.5),
    (0, "mlp"): Effect(2.0, 0.5),
    (1, "attention"): Effect(2.0, 0.5),
    (1, "mlp"): Effect(2.0, 0.5),
}
NORMS: dict[Unit, float] = {(0, "attention"): 1.0, (0, "mlp"): 2.0, (1, "attention"): 9.0, (1, "mlp"): 4.0}


def test_among_equals_the_mlp_with_the_largest_norm_goes():
    assert choose(EFFECTS, NORMS) == (1, "mlp")
    assert choose(EFFECTS, NORMS, tie="naive") == (0, "mlp")
    # Strictly better, by however little: the attention, again the one with the largest norm.
    better = EFFECTS | {(0, "attention"): Effect(2.0, 0.5001), (1, "attention"): Effect(2.0, 0.5001)}
    assert choose(better, NORMS) == (1, "attention")
    assert choose(better, NORMS, tie="naive") == (0, "attention")
    # The norm decides between equals only.
    better |= {(0, "attention"): Effect(2.0, 0.6)}
    assert choose(better, NORMS) == (0, "attention")


def test_by_the_loss_the_least_goes():
    """The published code takes the largest perplexity, which is the worst choice."""
    effects = EFFECTS | {(0, "mlp"): Effect(1.0, 0.1), (1, "attention"): Effect(3.0, 0.9)}
    assert choose(effects, NORMS, by="loss") == (0, "mlp")
    assert choose(effects, NORMS, by="accuracy") == (1, "attention")


def test_the_smooth_mix():
    # Written out: a = 50 for all but one, d = 0.
    effects = EFFECTS | {(0, "mlp"): Effect(2.0, 0.9)}
    scores = {
        unit: (100 - 100 * effects[unit].accuracy) / (1 + 100 * effects[unit].accuracy) + 100 / NORMS[unit]
        for unit in effects
    }
    assert min(("attention", "mlp"), key=lambda kind: min(s for u, s in scores.items() if u[1] == kind)) == "attention"
    assert choose(effects, NORMS, tie="smooth") == (1, "attention")
    level = dict.fromkeys(NORMS, 1.0)
    assert choose(effects, level, tie="smooth") == (0, "mlp")
    assert choose(EFFECTS, level, tie="smooth") == (0, "mlp")
    # A large d leaves the norm alone to decide.
    spread = dict.fromkeys(NORMS, 1.0) | {(1, "attention"): 1.5}
    worst = EFFECTS | {(1, "attention"): Effect(9.0, 0.0)}
    assert choose(worst, spread, tie="smooth") == (0, "mlp")
    assert choose(worst, spread, tie="smooth", mix=1e6) == (1, "attention")


def test_when_one_kind_is_used_up_the_other_goes():
    assert choose({(1, "attention"): Effect(1, 0.1)}, NORMS) == (1, "attention")
    assert choose({(1, "mlp"): Effect(1, 0.1)}, NORMS) == (1, "mlp")


# The rounds.


def test_one_scan_of_all_that_is_kept_before_each_drop(monkeypatch):
    # Card: number of scans per step = number of kept sub-layers; min(e, budget) dropped, no duplicates.
    scanned: list[tuple[int, int]] = []
    before = bypass.scan

    def counting(*args: Any, **kwargs: Any) -> Any:
        found = before(*args, **kwargs)
        scanned.append((len(found), len(args[4])))
        return found

    monkeypatch.setattr(bypass, "scan", counting)
    found = model()
    outcome = TrimLLM(keep=0.5, **SHORT).compress(found, matrix.batch(8))
    assert scanned == [(6, 0), (6, 0), (5, 1), (4, 2)]  # one before all, for the sparse update
    dropped = [tuple(unit) for unit in outcome.coverage["dropped"]]
    assert len(set(dropped)) == len(dropped) == 3
    assert sorted(dropped) == [(edit.layer, edit.part) for edit in outcome.edits]
    assert len(units(found.anatomy.language.blocks)) == 3


@pytest.mark.parametrize("family", ["llama", "gemma3", "phi", "qwen3_moe_mixed"])
@pytest.mark.parametrize("keep", [0.5, 0.3])
def test_what_was_dropped_is_deleted_and_the_result_opens(tmp_path, family, keep):
    from paredown.core import checkpoint

    found = model(family)
    count = len(units(found.anatomy.language.blocks))
    outcome = TrimLLM(keep=keep, **SHORT).compress(found, matrix.batch(8))
    assert len(outcome.edits) == matrix.removed(count, keep)
    assert sum(p.numel() for p in found.hf.parameters()) < sum(p.numel() for p in model(family).hf.parameters())
    found.save(tmp_path / "out")
    again = checkpoint.load(tmp_path / "out", dtype=torch.float32)
    given = {"input_ids": matrix.batch(2).input_ids}
    torch.testing.assert_close(families.logits(again.hf, given), families.logits(found.hf, given), atol=1e-5, rtol=0)


def test_deletion_leaves_the_model_as_it_was_trained(monkeypatch):
    from paredown.methods.depth import trimllm

    seen: list[Tensor] = []
    given = {"input_ids": matrix.batch(2).input_ids}
    before = trimllm._Work.carry_out

    def looking(self: Any) -> None:
        before(self)
        seen.append(families.logits(self.model.hf, given))

    monkeypatch.setattr(trimllm._Work, "carry_out", looking)
    found = model()
    TrimLLM(keep=0.5, **SHORT).compress(found, matrix.batch(8))
    assert torch.equal(seen[0], families.logits(found.hf, given))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_frozen_blocks_stay_bit_for_bit(dtype):
    # Card: frozen blocks have bit-identical weights after training, trainable ones changed.
    found = model("qwen3", dtype)
    before = state(found)
    outcome = TrimLLM(keep=0.8, frozen=0.67, **SHORT).compress(found, matrix.batch(8))
    frozen = outcome.coverage["frozen_blocks"]
    assert len(frozen) == 2
    for name, tensor in found.hf.state_dict().items():
        assert tensor.dtype == dtype
        still = any(f".layers.{i}." in name for i in frozen)
        assert torch.equal(tensor, before[name]) is still, name


def test_keep_one_does_nothing():
    found = model()
    outcome = TrimLLM(keep=1.0, **SHORT).compress(found, matrix.batch(8))
    assert not outcome.edits
    assert same(found, model())


def test_the_scan_set_is_not_trained_on(monkeypatch):
    from paredown.core.learning import healing

    trained: list[Tensor] = []
    scanned: list[Tensor] = []
    heal, scan = healing.heal, bypass.scan

    def healing_rows(found: Model, data: Batch, **options: Any) -> Any:
        trained.append(data.input_ids)
        return heal(found, data, **options)

    def scanning_rows(found: Model, gates: Any, data: Batch, *rest: Any, **options: Any) -> Any:
        scanned.append(data.input_ids)
        return scan(found, gates, data, *rest, **options)

    monkeypatch.setattr(healing, "heal", healing_rows)
    monkeypatch.setattr(bypass, "scan", scanning_rows)
    TrimLLM(keep=0.7, **SHORT).compress(model(), matrix.batch(9))
    rows = {tuple(row.tolist()) for ids in trained for row in ids}
    looked = {tuple(row.tolist()) for ids in scanned for row in ids}
    assert (len(rows), len(looked)) == (7, 2)
    assert not rows & looked
    with pytest.raises(DataError, match="two at least"):
        TrimLLM(keep=0.5, **SHORT).compress(model(), matrix.batch(1))


def test_at_once_drops_all_and_trains_for_as_many_steps(monkeypatch):
    from paredown.core.learning import healing

    log: list[Any] = []
    heal = healing.heal

    def logged(found: Model, data: Batch, **options: Any) -> Any:
        log.append(options["steps"])
        return heal(found, data, **options)

    monkeypatch.setattr(healing, "heal", logged)
    TrimLLM(keep=0.5, **SHORT).compress(model(), matrix.batch(8))
    assert log == [2, 2, 2, 1]
    log.clear()
    outcome = TrimLLM(keep=0.5, when="once", **SHORT).compress(model(), matrix.batch(8))
    assert log == [6, 1]
    assert len(outcome.edits) == 3


def test_the_random_control_draws_by_the_seed_and_scans_only_for_the_sparse_update():
    drawn = {
        tuple(
            map(
                tuple,
                RandomTrimLLM(keep=0.5, **SHORT).compress(model(), matrix.batch(8), seed=seed).coverage["dropped"],
            )
        )
        for seed in range(3)
    }
    assert len(drawn) > 1
    assert RandomTrimLLM.unit == TrimLLM.unit
    assert RandomTrimLLM.control
    shared = set(TrimLLM.model_fields) - {"tie", "mix"}
    assert shared == set(RandomTrimLLM.model_fields)


@pytest.mark.parametrize(
    ("cls", "when", "dtype"),
    [
        (TrimLLM, "rounds", torch.float32),
        (TrimLLM, "rounds", torch.bfloat16),
        (TrimLLM, "once", torch.float32),
        (RandomTrimLLM, "rounds", torch.float32),
    ],
)
def test_a_killed_run_goes_on_to_the_same_model(tmp_path, when, cls, dtype):
    method = cls(keep=0.5, when=when, **SHORT)
    undisturbed = model(dtype=dtype)
    told = method.compress(undisturbed, matrix.batch(8), seed=5)
    calls = 0
    for kills in (4, 21):

        def kill(done: int, total: int, text: str, *, last: int = kills) -> None:
            nonlocal calls
            calls += 1
            if calls == last:
                raise KeyboardInterrupt

        calls = 0
        try:
            again = model(dtype=dtype)
            outcome = method.compress(again, matrix.batch(8), seed=5, folder=tmp_path, progress=kill)
            break
        except KeyboardInterrupt:
            continue
    else:
        again = model(dtype=dtype)
        outcome = method.compress(again, matrix.batch(8), seed=5, folder=tmp_path)
    assert same(again, undisturbed)
    assert outcome.coverage == told.coverage


def test_the_folder_of_another_run_is_refused(tmp_path):
    method = TrimLLM(keep=0.7, **SHORT)
    method.compress(model(), matrix.batch(8), folder=tmp_path)
    with pytest.raises(OutputError, match="another run"):
        method.compress(model(), matrix.batch(8), folder=tmp_path, seed=1)
    with pytest.raises(OutputError, match="another run"):
        TrimLLM(keep=0.5, **SHORT).compress(model(), matrix.batch(8), folder=tmp_path)


@pytest.mark.parametrize("cls", [TrimLLM, RandomTrimLLM])
def test_the_plan_foretells_how_many_go(cls):
    blocks = model().anatomy.language.blocks
    for keep in (1.0, 0.7, 0.5, 0.2):
        method = cls(keep=keep)
        edits = method.foretell(blocks)
        assert len(edits) == matrix.removed(6, keep)
        assert len({(edit.layer, edit.part) for edit in edits}) == len(edits)
        assert method.passes(blocks) > 0


def test_encoders_are_refused():
    from paredown.errors import ArchitectureError

    with pytest.raises(ArchitectureError, match="sub-layers, healed"):
        TrimLLM(keep=0.5).compress(model("bert"), matrix.batch(8))
