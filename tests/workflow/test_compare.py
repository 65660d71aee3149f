"""A comparison pairs what belongs together, goes on after a kill, and says no more than its intervals do."""

from __future__ import annotations

import dataclasses
import json

import numpy as np
import pytest

from paredown import registry
from paredown.errors import BudgetError, DataError, OutputError, RecipeError, UsageError
from paredown.workflow import compare as comparing
from paredown.workflow.compare import compare
from paredown.workflow.measured import Cell, CompareRecord

OPTIONS = {"length": 16, "sequences": 12, "calibration_sequences": 4, "device": "cpu"}


@pytest.fixture
def folder(checkpoint_folder):
    return checkpoint_folder(seed=0)


def run(folder, text_file, methods=("llm-drop", "random"), keeps=(0.75, 0.5), seeds=2, **options):
    return compare(folder, methods, keeps, seeds, text_file, **(OPTIONS | options))


def without_times(record):
    plain = record.model_dump(exclude={"created", "seconds"})
    for entry in (*plain["rows"], *plain["cells"]):
        entry.pop("seconds")
    return plain


# --- rows from cells --------------------------------------------------------------------------------------------------


def cells(method, shift, *, keep=0.5, seeds=5, items=40, noise=0.1, seed=0):
    """Make cells in which every method sees the same hard and easy rows."""
    rng = np.random.default_rng(seed)
    hard = np.random.default_rng(99).normal(3, 1, size=items)
    return [
        Cell(
            method=method,
            keep=keep,
            seed=number,
            fields={},
            nll=(hard + shift + noise * rng.normal() + noise * rng.normal(size=items)).tolist(),
            kl=np.abs(shift + 1 + 0.01 * rng.normal(size=items)).tolist(),
            parameters=10,
            bytes_weights=20,
            seconds=1.0,
            warnings=[],
        )
        for number in range(seeds)
    ]


@pytest.mark.parametrize(
    ("shift", "verdict"), [(-0.5, "beats random"), (0.0, "no difference shown"), (0.5, "worse than random")]
)
def test_verdicts_follow_the_interval_of_the_paired_difference(shift, verdict):
    made = [*cells("ours", 1 + shift, seed=1), *cells("random-things", 1.0, seed=2)]
    ours, control = comparing.rows(made, [("ours", 0.5, "random-things"), ("random-things", 0.5, None)], "ppl")
    assert ours.verdict == verdict
    assert ours.difference.mean == pytest.approx(shift, abs=0.15)
    # The rows differ by far more than the methods: unpaired, nothing could be said.
    assert ours.perplexity.low < control.perplexity.high
    assert control.perplexity.low < ours.perplexity.high
    assert control.verdict is control.difference is None


def test_few_seeds_that_disagree_show_nothing():
    mixed = [cell for shift, number in ((-0.8, 0), (0.5, 1)) for cell in cells("ours", shift)[number : number + 1]]
    made = [*mixed, *cells("random-things", 0.0, seeds=2)]
    [row] = comparing.rows(made, [("ours", 0.5, "random-things")], "ppl")
    assert row.difference.low < 0 < row.difference.high
    assert row.verdict == "no difference shown"


def test_the_metric_decides_what_is_compared():
    made = [*cells("ours", -0.5), *cells("random-things", 0.0)]
    lines = [("ours", 0.5, "random-things")]
    assert comparing.rows(made, lines, "kl")[0].difference.mean == pytest.approx(-0.5, abs=0.02)
    worse_kl = [cell.model_copy(update={"kl": [9.0] * 40}) for cell in made[:5]]
    assert comparing.rows([*worse_kl, *made[5:]], lines, "kl")[0].verdict == "worse than random"
    assert comparing.rows([*worse_kl, *made[5:]], lines, "ppl")[0].verdict == "beats random"


def test_budgets_are_not_mixed():
    made = [*cells("ours", 0.0, keep=0.5), *cells("ours", 5.0, keep=0.25)]
    half, quarter = comparing.rows(made, [("ours", 0.5, None), ("ours", 0.25, None)], "ppl")
    assert quarter.perplexity.mean > 50 * half.perplexity.mean


# --- what stands for random -------------------------------------------------------------------------------------------


def plans(methods, keeps=(0.5,), fields=None):
    return [(plan.method, plan.keep, plan.control) for plan in comparing._plans(methods, list(keeps), fields or {})]


def test_random_is_the_control_of_each_methods_unit():
    assert plans(["dern", "llm-drop-blocks", "random"]) == [
        ("dern", 0.5, "random-experts"),
        ("llm-drop-blocks", 0.5, "random-blocks"),
        ("random-experts", 0.5, None),
        ("random-blocks", 0.5, None),
    ]


def test_without_random_nothing_is_held_against_it():
    assert plans(["dern"], (0.75, 0.5)) == [("dern", 0.75, None), ("dern", 0.5, None)]


def test_a_control_named_in_full_is_not_run_twice():
    assert plans(["random-experts", "dern", "random"]) == [
        ("random-experts", 0.5, None),
        ("dern", 0.5, "random-experts"),
    ]


def test_a_control_gets_the_fields_it_shares():
    made = comparing._plans(["llm-drop", "random"], [0.5], {"llm-drop": {"part": "mlp"}})
    assert [plan.made.part for plan in made] == ["mlp", "mlp"]


@pytest.mark.parametrize(
    ("methods", "fields", "error"),
    [
        (["random"], {}, UsageError),
        (["no-such-method"], {}, UsageError),
        (["dern"], {"camera-p": {"form": "ragged"}}, UsageError),
        (["dern"], {"dern": {"alpfa": 1}}, RecipeError),
        (["random-sublayers", "llm-drop", "random"], {"llm-drop": {"part": "mlp"}}, UsageError),
    ],
)
def test_methods_that_do_not_fit_are_refused(methods, fields, error):
    with pytest.raises(error) as caught:
        comparing._plans(methods, [0.5], fields)
    assert "\n" not in str(caught.value)


# --- whole comparisons ------------------------------------------------------------------------------------------------


def test_a_comparison(folder, text_file):
    told = []
    record = run(folder, text_file, progress=lambda *step: told.append(step))
    assert [(row.method, row.keep, row.control) for row in record.rows] == [
        ("llm-drop", 0.75, "random-sublayers"),
        ("llm-drop", 0.5, "random-sublayers"),
        ("random-sublayers", 0.75, None),
        ("random-sublayers", 0.5, None),
    ]
    assert [(cell.method, cell.keep, cell.seed) for cell in record.cells[:4]] == [
        ("llm-drop", keep, seed) for keep in (0.75, 0.5) for seed in (0, 1)
    ]
    for cell in record.cells:
        assert len(cell.nll) == len(cell.kl) == 12
        assert 0 < cell.parameters < record.size.parameters
        assert cell.bytes_weights == 4 * cell.parameters
        assert min(cell.kl) > 0
    for row in record.rows:
        assert row.perplexity.low < row.perplexity.mean < row.perplexity.high
        assert row.kl.low >= 0
    for row in record.rows[:2]:
        assert row.verdict in {"beats random", "no difference shown", "worse than random"}
        assert row.difference.low < row.difference.high
    assert told[0] == (0, 8, "cells")
    assert told[-1] == (8, 8, "cells")
    assert record.metric == "ppl"
    assert CompareRecord.model_validate_json(record.model_dump_json()) == record
    assert without_times(run(folder, text_file)) == without_times(record)


def test_keeping_everything_costs_nothing(folder, text_file):
    record = run(folder, text_file, keeps=(1.0,), seeds=1)
    ours, control = record.rows
    assert ours.kl.mean == control.kl.mean == 0
    assert ours.perplexity.mean == pytest.approx(record.original.mean)
    assert ours.difference.mean == 0
    assert ours.verdict is None  # one draw at random is not enough for one
    assert ours.parameters == record.size.parameters
    assert any("no verdict" in note for note in record.notes)


def test_seeds_draw_their_own_calibration_rows_and_share_the_heldout_ones(folder, text_file, monkeypatch):
    seen = []

    def cell(ref, plan, seed, sample, heldout, *_):
        seen.append((plan.method, seed, sample.fingerprint, heldout.sum().item()))
        return cells(plan.method, 0.0, seeds=seed + 1, items=12)[seed]

    monkeypatch.setattr(comparing, "_cell", cell)
    run(folder, text_file, keeps=(0.5,), seeds=3)
    by_seed = {seed: {entry[2] for entry in seen if entry[1] == seed} for seed in range(3)}
    assert all(len(prints) == 1 for prints in by_seed.values())
    assert len(set.union(*by_seed.values())) == 3
    assert len({entry[3] for entry in seen}) == 1


def test_calibration_data_that_all_seeds_share_are_noted(folder, text_file):
    record = run(folder, text_file, keeps=(0.5,), calibration_sequences=5000)
    assert any("all seeds saw the same ones" in note for note in record.notes)


class KilledError(BaseException):
    """What a kill looks like from inside: nothing that cleans up runs after it."""


def counted(monkeypatch, *, most=10**6):
    """Count the cells that are computed, and die instead of computing one more than ``most``."""
    done = []
    real = comparing._cell

    def cell(ref, plan, seed, *rest):
        if len(done) == most:
            raise KilledError
        done.append((plan.method, plan.keep, seed))
        return real(ref, plan, seed, *rest)

    monkeypatch.setattr(comparing, "_cell", cell)
    return done


def test_a_killed_comparison_goes_on_where_it_was(folder, text_file, monkeypatch, tmp_path):
    one_keep = {"keeps": (0.5,)}
    expected = run(folder, text_file, **one_keep)
    journal = tmp_path / "deep" / "journal.jsonl"
    with monkeypatch.context() as patch:
        counted(patch, most=3)
        with pytest.raises(KilledError):
            run(folder, text_file, journal=journal, **one_keep)
    assert len(journal.read_text().splitlines()) == 3
    journal.write_bytes(journal.read_bytes()[:-40])  # the last line was being written
    done = counted(monkeypatch)
    record = run(folder, text_file, journal=journal, **one_keep)
    assert done == [("random-sublayers", 0.5, 0), ("random-sublayers", 0.5, 1)]
    assert without_times(record) == without_times(expected)
    done.clear()
    assert without_times(run(folder, text_file, journal=journal, **one_keep)) == without_times(expected)
    assert done == []


def test_a_journal_serves_only_what_has_not_changed(folder, checkpoint_folder, text_file, monkeypatch, tmp_path):
    journal = tmp_path / "journal.jsonl"
    common = {"keeps": (0.5,), "seeds": 1, "journal": journal}
    done = counted(monkeypatch)
    run(folder, text_file, methods=["llm-drop"], **common)
    for change in (
        {"methods": ["llm-drop"], "fields": {"llm-drop": {"part": "mlp"}}},
        {"methods": ["llm-drop"], "length": 24},
        {"methods": ["llm-drop"], "seeds": [1]},
        {"methods": ["llm-drop"], "keeps": (0.75,)},
        {"methods": ["llm-drop"], "dtype": "bfloat16"},
    ):
        done.clear()
        run(folder, text_file, **(common | change))
        assert len(done) == 1, change
    done.clear()
    run(checkpoint_folder(seed=1), text_file, methods=["llm-drop"], **common)
    assert len(done) == 1
    done.clear()
    monkeypatch.setattr(comparing, "_own_code", lambda: "other code")
    run(folder, text_file, methods=["llm-drop"], **common)
    assert len(done) == 1
    done.clear()
    run(folder, text_file, methods=["llm-drop"], **common)
    assert done == []


def test_a_journal_full_of_junk_is_no_obstacle(folder, text_file, tmp_path):
    journal = tmp_path / "journal.jsonl"
    journal.write_text('junk\n[]\n{"key": "a"}\n{"key": "a", "cell": {"nll": "x"}}\nnull')
    record = run(folder, text_file, methods=["llm-drop"], keeps=(0.5,), seeds=1, journal=journal)
    assert len(record.cells) == 1
    assert json.loads(journal.read_text().splitlines()[-1])["cell"]["method"] == "llm-drop"


@pytest.mark.parametrize("name", [".", "binary"])
def test_a_journal_that_cannot_be_one_is_told_before_the_work(folder, text_file, tmp_path, monkeypatch, name):
    (tmp_path / "binary").write_bytes(b"\xff\xfe\x00")
    done = counted(monkeypatch)
    with pytest.raises(OutputError, match="journal"):
        run(folder, text_file, journal=tmp_path / name)
    assert done == []


@pytest.mark.parametrize("nothing", [{"methods": []}, {"keeps": []}, {"seeds": 0}])
def test_a_comparison_of_nothing_is_refused(folder, text_file, nothing):
    with pytest.raises(UsageError, match="at least one"):
        run(folder, text_file, **nothing)


def test_a_budget_that_cannot_be_is_refused(folder, text_file):
    with pytest.raises((BudgetError, RecipeError)):
        run(folder, text_file, keeps=(1.5,))


def test_data_too_small_for_both_sides_are_told(folder, tmp_path):
    path = tmp_path / "tiny.txt"
    path.write_text("w1 w2 w3")
    with pytest.raises(DataError):
        run(folder, path)


def test_every_method_in_the_catalogue_has_a_control_or_is_one():
    for entry in registry.entries():
        # Healing takes nothing away, so chance has nothing to be held against.
        trains = getattr(registry.get(entry.name), "trains_always", False)
        if entry.kind == "compressor" and not entry.control and not trains:
            assert registry.entry(registry.control_for(entry.name)).control


def test_a_vision_model_needs_text_to_be_judged_by(folder, monkeypatch):
    real = comparing.checkpoint.load

    def load(*arguments, **options):
        model = real(*arguments, **options)
        model.anatomy = dataclasses.replace(model.anatomy, vision=model.anatomy.language)
        return model

    monkeypatch.setattr(comparing.checkpoint, "load", load)
    with pytest.raises(UsageError, match="pass text with --data"):
        run(folder, None)
