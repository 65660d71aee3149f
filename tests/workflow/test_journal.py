"""The journal alone: what it takes for its own, what it keeps, what it gives back."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from paredown.core.anatomy import Block
from paredown.core.compression import Point
from paredown.core.durable import write_json, write_tensors, write_text
from paredown.core.edits import DropBlock, KeepExperts
from paredown.core.method import View
from paredown.errors import OutputError
from paredown.workflow.journal import Journal, StepKeeper, check_out

WHO = {"recipe": {"model": "m"}, "model": "abc"}


@pytest.fixture
def journal(tmp_path):
    """Open a journal for ``out``; all are closed in the end."""
    opened = []

    def make(identity=WHO, resume=False, force=False, reads=()):
        opened.append(Journal(tmp_path / "out", identity, resume=resume, force=force, reads=reads))
        return opened[-1]

    yield make
    for one in opened:
        one.release()


def whole(journal, text="result"):
    folder = journal.folder / "whole"
    (folder / "paredown").mkdir(parents=True)
    (folder / "text").write_text(text)
    return folder


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def test_publish_leaves_the_result_alone(journal, tmp_path):
    made = journal()
    assert names(tmp_path) == ["out.partial"]
    made.publish(whole(made))
    assert names(tmp_path) == ["out"]
    assert (tmp_path / "out" / "text").read_text() == "result"
    assert json.loads((tmp_path / "out" / "paredown" / "identity.json").read_text()) == WHO


def test_publish_replaces_with_force_only(journal, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "old").touch()
    with pytest.raises(OutputError, match="exists already"):
        journal()
    made = journal(force=True)
    made.publish(whole(made))
    assert names(tmp_path) == ["out"]
    assert names(tmp_path / "out") == ["paredown", "text"]


def test_discard_leaves_nothing(journal, tmp_path):
    made = journal()
    made.step(1, dict)
    whole(made)
    made.discard()
    assert names(tmp_path) == []
    made.discard()


def test_resume_counts_and_keeps(journal):
    first = journal()
    (first.step(1, dict).folder / "note").write_text("kept")
    first.release()
    second = journal(resume=True)
    assert (second.resumed, second.finished) == (1, False)
    assert (second.folder / "step-1" / "note").read_text() == "kept"
    second.release()
    assert journal(resume=True).resumed == 2


def test_a_fresh_run_forgets_an_older_journal(journal):
    first = journal()
    (first.step(1, dict).folder / "note").touch()
    first.release()
    second = journal()
    assert second.resumed == 0
    assert names(second.folder) == ["lock", "run.json"]


@pytest.mark.parametrize("key", list(WHO))
def test_a_journal_of_another_run_is_refused_and_left_alone(journal, key):
    journal().release()
    with pytest.raises(OutputError, match=f"another {key}"):
        journal({**WHO, key: "other"}, resume=True)
    # The refusal let go of the lock, and changed nothing.
    assert journal(resume=True).resumed == 1


def test_two_runs_do_not_work_in_one_folder(journal):
    pytest.importorskip("fcntl")
    first = journal()
    for resume in (False, True):
        with pytest.raises(OutputError, match="another run is working in"):
            journal(resume=resume)
    assert names(first.folder) == ["lock", "run.json"]
    first.release()
    journal(resume=True)


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"identity": 3}'])
def test_a_damaged_note_is_told(journal, tmp_path, text):
    journal().release()
    (tmp_path / "out.partial" / "run.json").write_text(text)
    with pytest.raises(OutputError, match="is damaged; leave out --resume"):
        journal(resume=True)
    journal()


def test_killed_before_the_first_note(journal, tmp_path):
    (tmp_path / "out.partial").mkdir()
    (tmp_path / "out.partial" / "run.json.writing").touch()
    assert journal(resume=True).resumed == 0


def test_killed_between_the_renames(journal, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "old").touch()
    made = journal(force=True)
    (tmp_path / "out").rename(made.folder / "replaced")
    made.release()
    with pytest.raises(OutputError, match="exists already"):
        journal(resume=True)
    assert names(tmp_path / "out") == ["old"]
    made = journal(resume=True, force=True)
    assert made.resumed == 1
    made.publish(whole(made))
    assert names(tmp_path) == ["out"]
    assert (tmp_path / "out" / "text").exists()


@pytest.mark.parametrize("left", [["run.json", "lock"], ["lock"], []])
def test_killed_while_tidying_up(journal, tmp_path, left):
    made = journal()
    made.publish(whole(made))
    (tmp_path / "out.partial").mkdir()
    for name in left:
        (tmp_path / "out.partial" / name).write_text(json.dumps({"identity": WHO, "resumed": 0}))
    with pytest.raises(OutputError, match="exists already"):
        journal()
    again = journal(resume=True)
    assert again.finished
    again.discard()
    assert names(tmp_path) == ["out"]
    with pytest.raises(OutputError, match="exists already"):
        journal({**WHO, "model": "other"}, resume=True)


@pytest.mark.parametrize("name", ["precious.txt", "step-x", "whole.txt"])
def test_a_folder_that_is_no_journal_is_left_alone(journal, tmp_path, name):
    (tmp_path / "out.partial").mkdir()
    (tmp_path / "out.partial" / name).touch()
    for resume in (False, True):
        with pytest.raises(OutputError, match="it holds something else"):
            journal(resume=resume)
    assert names(tmp_path / "out.partial") == [name]


def test_a_link_that_is_called_like_the_journal_is_left_alone(journal, tmp_path):
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "out.partial").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(OutputError, match="it holds something else"):
        journal()


def test_what_is_read_is_never_replaced(tmp_path, monkeypatch):
    inside = tmp_path / "out" / "deep" / "model"
    inside.mkdir(parents=True)
    with pytest.raises(OutputError, match="which the run needs"):
        check_out(tmp_path / "out", force=True, reads=[inside])
    with pytest.raises(OutputError, match="which the run needs"):
        check_out(inside, force=True, reads=[inside])
    check_out(tmp_path / "out", force=True, reads=[tmp_path / "outer"])
    monkeypatch.chdir(inside)
    with pytest.raises(OutputError, match="which the run needs"):
        check_out(tmp_path / "out", force=True)


# --- steps -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def keeper(tmp_path):
    return StepKeeper(tmp_path, lambda state: {f"disk.{name}": tensor for name, tensor in state.items()})


def view(index):
    block = nn.Linear(2, 2, bias=False)
    part = Block(index, f"model.layers.{index}", "pre", None, None, None)
    return View(block, part, None)


def test_a_point_comes_back_as_it_was(keeper):
    assert keeper.resume() is None
    state = {"after.0": torch.randn(2, 3, dtype=torch.bfloat16), "before.0": torch.randn(2, 3)}
    keeper.commit(Point("edit", 4, state, 1234))
    found = keeper.resume()
    assert (found.phase, found.layer, found.touched) == ("edit", 4, 1234)
    assert found.state.keys() == state.keys()
    for name, tensor in state.items():
        assert found.state[name].dtype == tensor.dtype
        assert torch.equal(found.state[name], tensor)


def test_a_point_without_streams(keeper):
    keeper.commit(Point("look", 0, {}, 0))
    assert keeper.resume().state == {}


def test_scores_and_edits_come_back_as_they_were(keeper):
    assert keeper.scores(3) is None
    assert keeper.edits(3) is None
    scores = {"score": torch.rand(5, dtype=torch.float64), "tokens": torch.tensor([1, 0, 2])}
    keeper.look(3, scores)
    edits = [KeepExperts(layer=3, keep=(0, 2), top_k=1)]
    keeper.cut(3, edits, None)
    assert all(torch.equal(keeper.scores(3)[name], tensor) for name, tensor in scores.items())
    assert keeper.edits(3) == edits
    assert keeper.parts() == []


def test_blocks_behind_a_removed_one_move_up(keeper):
    keeper.cut(0, [], view(0))
    keeper.cut(1, [DropBlock(layer=1)], None)
    keeper.cut(2, [], view(2))
    keeper.cut(10, [], view(10))
    assert [path.name for path in keeper.parts()] == [f"block-{i:05d}.safetensors" for i in (0, 2, 10)]
    assert [list(load_file(path)) for path in keeper.parts()] == [
        ["disk.model.layers.0.weight"],
        ["disk.model.layers.1.weight"],
        ["disk.model.layers.9.weight"],
    ]


# --- files -----------------------------------------------------------------------------------------------------------


def test_files_are_whole_or_not_there(tmp_path, monkeypatch):
    write_text(tmp_path / "a.txt", "old")
    monkeypatch.setattr("os.fsync", lambda _: (_ for _ in ()).throw(OSError(28, "full")))
    for write in (
        lambda: write_text(tmp_path / "a.txt", "new"),
        lambda: write_json(tmp_path / "b.json", {}),
        lambda: write_tensors(tmp_path / "c.safetensors", {"x": torch.ones(2)}),
    ):
        with pytest.raises(OSError, match="full"):
            write()
    assert (tmp_path / "a.txt").read_text() == "old"
    assert not (tmp_path / "b.json").exists()
    assert not (tmp_path / "c.safetensors").exists()


def test_the_same_content_gives_the_same_bytes(tmp_path):
    write_json(tmp_path / "a", {"b": 1, "a": [1.5, "ü"]})
    write_json(tmp_path / "b", {"a": [1.5, "ü"], "b": 1})
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()
    for name in ("x", "y"):
        write_tensors(tmp_path / name, {"b": torch.arange(4.0), "a": torch.ones(2, 2).T}, {"note": "n"})
    assert (tmp_path / "x").read_bytes() == (tmp_path / "y").read_bytes()


def test_a_disk_that_is_full_is_an_oserror(tmp_path):
    with pytest.raises(OSError, match="nowhere"):
        write_tensors(tmp_path / "nowhere" / "x", {"a": torch.ones(2)})
