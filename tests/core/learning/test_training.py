"""Training a few parameters beside a frozen base."""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from paredown.core.learning.training import Fitted, Group, Settings, Task, fit, linear
from paredown.errors import OutputError, UsageError


class Scales(Task[Tensor]):
    """Learns a factor for each output of a frozen layer; its loss draws noise, as dropout would."""

    def __init__(self, noise: float = 0.1) -> None:
        generator = torch.Generator().manual_seed(0)
        base = nn.Sequential(nn.Linear(3, 3), nn.Dropout(0.5))
        with torch.no_grad():
            base[0].weight.copy_(torch.randn(3, 3, generator=generator))
            base[0].bias.copy_(torch.randn(3, generator=generator))
        super().__init__(base, nn.ParameterDict({"a": nn.Parameter(torch.zeros(3)), "b": nn.Parameter(torch.zeros(3))}))
        self.noise = noise
        self.seen: list[list[float]] = []
        self.modes: set[bool] = set()

    def loss(self, rows: list[Tensor]) -> Tensor:
        self.seen.append([float(row[0]) for row in rows])
        self.modes |= {module.training for module in self.base.modules()}
        x = torch.stack(rows)
        wanted = x + self.noise * torch.randn(3)
        return ((self.base(x) * self.learned["a"] + self.learned["b"] - wanted) ** 2).mean()


ROWS = list(torch.randn(7, 3, generator=torch.Generator().manual_seed(1)))
SETTINGS = Settings(steps=30, lr=0.05, batch=2, accumulate=2, save_every=10)


def weights(task: Task[Tensor]) -> Tensor:
    return torch.cat([parameter.detach() for parameter in task.learned.parameters()])


@pytest.fixture(scope="module")
def undisturbed() -> tuple[Tensor, Fitted]:
    task = Scales()
    fitted = fit(task, ROWS, SETTINGS)
    return weights(task), fitted


def test_the_loss_falls_and_the_seed_decides(undisturbed):
    learned, fitted = undisturbed
    assert len(fitted.losses) == SETTINGS.steps
    assert np.mean(fitted.losses[-5:]) < 0.8 * np.mean(fitted.losses[:5])
    again = Scales()
    assert fit(again, ROWS, SETTINGS).losses == fitted.losses
    assert torch.equal(weights(again), learned)
    other = Scales()
    fit(other, ROWS, Settings(steps=30, lr=0.05, batch=2, accumulate=2, seed=1))
    assert not torch.equal(weights(other), learned)


@pytest.mark.parametrize("at", [7, 10, 27])
def test_a_killed_run_goes_on_to_the_same_weights(tmp_path, undisturbed, at):
    def kill(step: int, total: int, text: str) -> None:
        if step == at:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fit(Scales(), ROWS, SETTINGS, folder=tmp_path, progress=kill)
    task = Scales()
    fitted = fit(task, ROWS, SETTINGS, folder=tmp_path)
    assert fitted.resumed_from == (at - 1) // 10 * 10
    assert torch.equal(weights(task), undisturbed[0])
    assert fitted.losses == undisturbed[1].losses


def test_a_finished_run_is_not_run_again(tmp_path, undisturbed):
    fit(Scales(), ROWS, SETTINGS, folder=tmp_path)
    task = Scales()
    fitted = fit(task, ROWS, SETTINGS, folder=tmp_path)
    assert fitted.resumed_from == SETTINGS.steps
    assert not task.seen
    assert torch.equal(weights(task), undisturbed[0])


def test_a_half_written_checkpoint_is_passed_over(tmp_path, undisturbed):
    def kill(step: int, total: int, text: str) -> None:
        if step == 15:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fit(Scales(), ROWS, SETTINGS, folder=tmp_path, progress=kill)
    broken = tmp_path / "checkpoint-20"
    broken.mkdir()
    (broken / "trainer_state.json").write_text('{"global_st')
    task = Scales()
    assert fit(task, ROWS, SETTINGS, folder=tmp_path).resumed_from == 10
    assert torch.equal(weights(task), undisturbed[0])


def test_the_folder_of_another_run_is_refused(tmp_path):
    fit(Scales(), ROWS, SETTINGS, folder=tmp_path)
    with pytest.raises(OutputError, match="another run"):
        fit(Scales(), ROWS, Settings(steps=30, lr=0.01, batch=2, accumulate=2), folder=tmp_path)


def test_without_a_folder_nothing_is_written_and_nothing_is_said(tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    fit(Scales(), ROWS, SETTINGS)
    assert not list(tmp_path.iterdir())
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("fails", [False, True])
def test_everything_around_is_as_it_was(fails):
    task = Scales()
    task.base.train()
    task.base[1].eval()
    task.base[0].bias.requires_grad_(False)
    task.learned.eval()
    before = {name: tensor.clone() for name, tensor in task.base.state_dict().items()}
    torch.manual_seed(5)
    random.seed(5)
    np.random.seed(5)
    states = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist()

    def stop(step: int, total: int, text: str) -> None:
        if fails and step == 3:
            raise RuntimeError("stop")

    if fails:
        with pytest.raises(RuntimeError, match="stop"):
            fit(task, ROWS, SETTINGS, progress=stop)
    else:
        fit(task, ROWS, SETTINGS, progress=stop)
    assert task.modes == {False}, "the base must be in evaluation mode while training"
    assert [module.training for module in task.base.modules()] == [True, True, False]
    assert not task.learned.training
    assert [p.requires_grad for p in task.base.parameters()] == [True, False]
    assert all(p.grad is None for p in [*task.base.parameters(), *task.learned.parameters()])
    assert all(torch.equal(before[name], tensor) for name, tensor in task.base.state_dict().items())
    assert torch.equal(states[0], torch.get_rng_state())
    assert states[1] == random.getstate()
    assert states[2] == np.random.get_state()[1].tolist()


def test_it_trains_where_gradients_are_off(undisturbed):
    task = Scales()
    with torch.no_grad():
        fit(task, ROWS, SETTINGS)
    assert torch.equal(weights(task), undisturbed[0])


def test_losses_that_are_yielded_add_up_and_each_is_propagated_before_the_next():
    log: list[str] = []

    class Chunks(Scales):
        def loss(self, rows: list[Tensor]) -> Iterator[Tensor]:  # type: ignore[override]
            for row in rows:
                grad = self.learned["a"].grad
                log.append("none" if grad is None else "some")
                yield ((self.base(row) * self.learned["a"] - row) ** 2).mean() / len(rows)

    class Once(Scales):
        def loss(self, rows: list[Tensor]) -> Tensor:
            x = torch.stack(rows)
            return ((self.base(x) * self.learned["a"] - x) ** 2).mean()

    chunks, once = Chunks(), Once()
    settings = Settings(steps=5, lr=0.1, batch=3)
    first, second = fit(chunks, ROWS, settings), fit(once, ROWS, settings)
    torch.testing.assert_close(weights(chunks), weights(once))
    assert first.losses == pytest.approx(second.losses)
    assert log == ["none", "some", "some"] * 5


def test_accumulation_is_the_mean_over_a_larger_batch():
    small, large = Scales(noise=0.0), Scales(noise=0.0)
    fit(small, ROWS, Settings(steps=6, lr=0.1, batch=1, accumulate=4))
    fit(large, ROWS, Settings(steps=6, lr=0.1, batch=4))
    torch.testing.assert_close(weights(small), weights(large))
    assert [row for four in large.seen for row in four] == [row for one in small.seen for row in one]


def test_each_row_comes_once_before_any_comes_twice():
    task = Scales()
    fit(task, ROWS, Settings(steps=14, lr=0.1))
    turns = [row for rows in task.seen for row in rows]
    assert sorted(turns[:7]) == sorted(turns[7:]) == sorted(float(row[0]) for row in ROWS)
    assert turns[:7] != turns[7:]


def test_groups_have_their_own_rate_and_decay():
    class Apart(Scales):
        def groups(self) -> list[Group]:
            return [Group([self.learned["a"]], rate=0.0), Group([self.learned["b"]], rate=2.0, decay=0.5)]

        def loss(self, rows: list[Tensor]) -> Tensor:
            return 0 * self.learned["b"].sum() + self.learned["a"].sum()

    task = Apart()
    with torch.no_grad():
        task.learned["b"].fill_(1.0)
    fit(task, ROWS, Settings(steps=1, lr=0.1))
    assert torch.equal(task.learned["a"], torch.zeros(3))
    torch.testing.assert_close(task.learned["b"].detach(), torch.full((3,), 1 - 0.1 * 2 * 0.5))


def test_the_schedule_is_a_function_of_progress():
    asked: list[float] = []

    def schedule(progress: float) -> float:
        asked.append(progress)
        return linear(progress)

    class Push(Scales):
        def loss(self, rows: list[Tensor]) -> Tensor:
            return self.learned["a"].sum()  # Adam moves by the rate, whatever the gradient's size

    task = Push()
    fit(task, ROWS, Settings(steps=4, lr=0.1, schedule=schedule))
    torch.testing.assert_close(task.learned["a"].detach(), torch.full((3,), -0.1 * (1 + 0.75 + 0.5 + 0.25)))
    assert min(asked) == 0
    assert sorted(set(asked))[:4] == [0, 0.25, 0.5, 0.75]


def test_parameters_are_projected_after_each_step(tmp_path):
    class Clamped(Scales):
        def loss(self, rows: list[Tensor]) -> Tensor:
            assert float(self.learned["a"].detach().min()) >= -0.03
            return self.learned["a"].sum()

        def project(self) -> None:
            self.learned["a"].clamp_(min=-0.03)

    task = Clamped()
    fit(task, ROWS, Settings(steps=5, lr=0.02, save_every=5), folder=tmp_path)
    assert torch.equal(task.learned["a"], torch.full((3,), -0.03))
    # What is saved is projected too.
    again = Clamped()
    fit(again, ROWS, Settings(steps=5, lr=0.02, save_every=5), folder=tmp_path)
    assert torch.equal(again.learned["a"], task.learned["a"])


def test_parts_of_the_base_may_be_learned():
    """LoCoCo tunes norms and embeddings along."""
    task = Scales()
    task.learned["bias"] = task.base[0].bias
    before = task.base[0].bias.detach().clone()
    fit(task, ROWS, SETTINGS)
    assert not torch.equal(task.base[0].bias, before)
    assert task.base[0].weight.grad is None


def test_a_loss_that_is_not_a_number_is_told(tmp_path):
    class Broken(Scales):
        def loss(self, rows: list[Tensor]) -> Tensor:
            return self.learned["a"].sum() * float("nan")

    with pytest.raises(UsageError, match="step 1; choose a smaller learning rate"):
        fit(Broken(), ROWS, SETTINGS)


def test_no_rows_or_no_parameters_are_told(tmp_path: Path):
    with pytest.raises(UsageError, match="at least one row"):
        fit(Scales(), [], SETTINGS)
    with pytest.raises(UsageError, match="one parameter"):
        fit(Task(nn.Linear(2, 2), nn.Module()), ROWS, SETTINGS)


def test_rows_are_looked_up_only_when_their_turn_comes(tmp_path):
    class Lazy:
        asked: list[int] = []

        def __len__(self) -> int:
            return 100

        def __getitem__(self, index: int) -> Tensor:
            self.asked.append(index)
            return ROWS[index % 7]

    def kill(step: int, total: int, text: str) -> None:
        if step == 12:
            raise KeyboardInterrupt

    lazy = Lazy()
    with pytest.raises(KeyboardInterrupt):
        fit(Scales(), lazy, Settings(steps=20, lr=0.1, save_every=10), folder=tmp_path, progress=kill)  # type: ignore[arg-type]
    first = list(lazy.asked)
    lazy.asked.clear()
    fit(Scales(), lazy, Settings(steps=20, lr=0.1, save_every=10), folder=tmp_path)  # type: ignore[arg-type]
    assert len(lazy.asked) == 10, "rows of steps that are done must not be made again"
    assert lazy.asked[:2] == first[10:12]
