"""A run that is killed with SIGKILL, whenever that is, goes on with ``--resume`` and gives the same bytes."""

from __future__ import annotations

import random
import shutil
from dataclasses import dataclass
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file
from tiny import last_sentence, result, sentence, tree, write_recipe

KILLED = -9
DERN = {"method": "dern", "keep": 0.5, "alpha": -1.0}
DROP = {"method": "llm-drop", "keep": 0.75, "part": "joint"}
RECIPES = {"one pass": [DERN], "two passes": [DROP], "two steps": [DERN, DROP]}


@dataclass(frozen=True)
class Undisturbed:
    """A run that nobody killed."""

    recipe: Path
    out: Path
    files: dict[str, str]
    changes: int
    seconds: float

    def resume(self, warm, place: Path, *words: str, **options):
        return warm.run("run", self.recipe, "--out", place / "smaller", *words, under=place, **options)


@pytest.fixture(scope="session")
def undisturbed(warm, moe_folder, text_file, tmp_path_factory):
    known: dict[str, Undisturbed] = {}

    def get(name: str) -> Undisturbed:
        if name not in known:
            place = tmp_path_factory.mktemp("undisturbed")
            recipe = write_recipe(place / "recipe.yaml", moe_folder, text_file, *RECIPES[name])
            out = place / "run" / "smaller"
            out.parent.mkdir()
            ended = warm.run("run", recipe, "--out", out, under=out.parent)
            assert ended.code == 0, ended.err
            known[name] = Undisturbed(recipe, out, result(out), ended.changes, ended.seconds)
        return known[name]

    return get


def ends_well(whole: Undisturbed, warm, place: Path, *words: str) -> None:
    ended = whole.resume(warm, place, "--resume", *words)
    assert ended.code == 0, ended.err
    assert result(place / "smaller") == whole.files
    assert [path.name for path in place.iterdir()] == ["smaller"]


def test_the_whole_run_is_what_is_compared(undisturbed):
    whole = undisturbed("one pass")
    assert {"model.safetensors", "config.json", "README.md", "tokenizer.json", "paredown/run.json"} <= set(whole.files)
    assert whole.changes > 60
    assert [path.name for path in whole.out.parent.iterdir()] == ["smaller"]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["one pass", "two passes"])
def test_killed_at_random_changes(undisturbed, warm, tmp_path, name):
    # One in each of ten equal parts of the run, so that every stage is hit: blocks, assembling, publishing.
    whole = undisturbed(name)
    draw = random.Random(f"changes {name}")
    for tenth in range(10):
        moment = 1 + int(whole.changes * (tenth + draw.random()) / 10)
        place = tmp_path / f"{moment}"
        place.mkdir()
        assert whole.resume(warm, place, die_at=moment).code == KILLED
        ends_well(whole, warm, place)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["one pass", "two passes"])
def test_killed_at_random_times(undisturbed, warm, tmp_path, name):
    whole = undisturbed(name)
    draw = random.Random(f"times {name}")
    killed = 0
    for fifth in range(5):
        place = tmp_path / f"{fifth}"
        place.mkdir()
        ended = whole.resume(warm, place, die_after=whole.seconds * (fifth + draw.random()) / 5)
        # A machine that is less busy than before may be done by then.
        assert ended.code in (KILLED, 0)
        killed += ended.code == KILLED
        ends_well(whole, warm, place)
    assert killed >= 2


@pytest.mark.slow
def test_killed_again_and_again(undisturbed, warm, tmp_path):
    whole = undisturbed("two steps")
    draw = random.Random(3)
    deaths = 0
    while True:
        ended = whole.resume(warm, tmp_path, "--resume", die_at=draw.randint(12, 40))
        if ended.code == 0:
            break
        assert ended.code == KILLED, ended.err
        deaths += 1
        assert deaths < 60
    assert deaths >= 4
    assert result(tmp_path / "smaller") == whole.files
    assert [path.name for path in tmp_path.iterdir()] == ["smaller"]


@pytest.fixture(scope="session")
def judged(undisturbed, warm, tmp_path_factory):
    """A journal in which all blocks are done: the gate stopped the run there."""
    whole = undisturbed("one pass")
    place = tmp_path_factory.mktemp("judged")
    ended = whole.resume(warm, place, "--gate", "ppl:0.0001")
    last_sentence(ended, 3)
    assert [path.name for path in place.iterdir()] == ["smaller.partial"]
    return place


def test_a_gate_keeps_the_work_and_a_wider_one_ends_it_without_opening_a_block(judged, undisturbed, warm, tmp_path):
    place = tmp_path / "place"
    shutil.copytree(judged, place)
    whole = undisturbed("one pass")
    ended = whole.resume(warm, place, "--resume", "--gate", "none", plant="plants:no_blocks")
    assert ended.code == 0, ended.err
    assert result(place / "smaller") == whole.files
    # The plant would have been felt:
    place = tmp_path / "other"
    place.mkdir()
    assert "a block was opened" in whole.resume(warm, place, plant="plants:no_blocks").err


@pytest.mark.slow
@pytest.mark.parametrize("force", [False, True])
def test_killed_all_through_publishing(judged, undisturbed, warm, tmp_path, force):
    whole = undisturbed("one pass")
    words = ["--force"] if force else []
    proven = {"plant": "plants:no_proof"}

    def start(place: Path) -> Path:
        shutil.copytree(judged, place)
        if force:
            (place / "smaller").mkdir()
            (place / "smaller" / "precious.txt").write_text("an older result")
        return place

    last = whole.resume(warm, start(tmp_path / "all"), "--resume", *words, **proven).changes
    assert last > 20
    deaths = 0
    # All of them would take minutes; the windows between the renames have tests of their own in test_journal.
    moments = range(1 if force else 2, last + 1, 2 if force else 4)
    for moment in moments:
        place = start(tmp_path / f"{moment}")
        assert whole.resume(warm, place, "--resume", *words, die_at=moment, **proven).code == KILLED
        deaths += 1
        if force:
            # Never are both gone: the older result stands at its place or in the journal, or the new one stands whole.
            old = [place / "smaller" / "precious.txt", place / "smaller.partial" / "replaced" / "precious.txt"]
            assert any(path.exists() for path in old) or (place / "smaller" / "README.md").exists()
        ended = whole.resume(warm, place, "--resume", *words, **proven)
        assert ended.code == 0, ended.err
        assert {**result(place / "smaller"), "paredown/run.json": ""} == {**whole.files, "paredown/run.json": ""}
        assert [path.name for path in place.iterdir()] == ["smaller"]
        shutil.rmtree(place)
    assert deaths == len(moments)


def test_what_was_to_be_replaced_comes_back_when_the_next_run_fails(judged, undisturbed, warm, tmp_path):
    place = tmp_path / "place"
    shutil.copytree(judged, place)
    (place / "smaller.partial" / "replaced").mkdir()
    (place / "smaller.partial" / "replaced" / "precious.txt").write_text("an older result")
    # Killed between the renames, then started afresh with what cannot work.
    ended = undisturbed("one pass").resume(warm, place, "--resume")
    assert "exists already" in sentence(ended)
    assert (place / "smaller" / "precious.txt").read_text() == "an older result"


def test_resume_without_a_journal_starts(undisturbed, warm, tmp_path):
    ends_well(undisturbed("one pass"), warm, tmp_path)


def test_resume_of_a_finished_run_says_again_what_it_did(undisturbed, warm):
    whole = undisturbed("one pass")
    before = tree(whole.out.parent)
    ended = whole.resume(warm, whole.out.parent, "--resume", plant="plants:no_blocks")
    assert ended.code == 0, ended.err
    assert "proof: passed" in ended.out
    assert tree(whole.out.parent) == before
    assert "judged by another gate" in sentence(whole.resume(warm, whole.out.parent, "--resume", "--gate", "kl:9"))
    assert tree(whole.out.parent) == before


@pytest.fixture
def killed(undisturbed, warm, tmp_path):
    """A run that was killed half-way."""
    whole = undisturbed("one pass")
    place = tmp_path / "place"
    place.mkdir()
    assert whole.resume(warm, place, die_at=whole.changes // 2).code == KILLED
    return whole, place


def test_a_journal_is_of_one_recipe_one_model_and_one_sample_of_data(killed, warm, moe_folder, text_file, tmp_path):
    whole, place = killed
    before = tree(place)

    model = tmp_path / "model"
    shutil.copytree(moe_folder, model)
    data = tmp_path / text_file.name
    shutil.copy(text_file, data)
    first = write_recipe(tmp_path / "first.yaml", model, data, DERN)
    other = tmp_path / "other"
    other.mkdir()
    assert warm.run("run", first, "--out", other / "smaller", under=other, die_at=whole.changes // 2).code == KILLED
    theirs = tree(other)

    recipe = write_recipe(tmp_path / "second.yaml", moe_folder, text_file, {**DERN, "keep": 0.75})
    said = sentence(warm.run("run", recipe, "--out", place / "smaller", "--resume"))
    assert "another recipe" in said
    assert "leave out --resume" in said
    assert tree(place) == before

    weights = load_file(model / "model.safetensors")
    weights["model.norm.weight"] += 1
    save_file(weights, model / "model.safetensors", metadata={"format": "pt"})
    assert "(another model)" in sentence(warm.run("run", first, "--out", other / "smaller", "--resume"))
    shutil.copy(moe_folder / "model.safetensors", model)
    data.write_text("\n".join(text_file.read_text().splitlines()[:200]) + "\n")
    assert "data)" in sentence(warm.run("run", first, "--out", other / "smaller", "--resume"))
    data.unlink()
    assert "no file or folder" in sentence(warm.run("run", first, "--out", other / "smaller", "--resume"))
    # Nothing of this took a finished block away.
    assert tree(other) == theirs
    shutil.copy(text_file, data)
    ended = warm.run("run", first, "--out", other / "smaller", "--resume")
    assert ended.code == 0, ended.err
    assert (other / "smaller" / "model.safetensors").read_bytes() == (whole.out / "model.safetensors").read_bytes()


def test_without_resume_a_killed_run_starts_afresh(killed, warm):
    whole, place = killed
    ended = whole.resume(warm, place)
    assert ended.code == 0, ended.err
    assert result(place / "smaller") == whole.files
    assert [path.name for path in place.iterdir()] == ["smaller"]


def test_a_full_disk_keeps_the_work(undisturbed, warm, tmp_path):
    whole = undisturbed("one pass")
    said = last_sentence(whole.resume(warm, tmp_path, plant="plants:disk_full"))
    assert "No space left on device" in said
    assert "--resume" in said
    assert not (tmp_path / "smaller").exists()
    ends_well(whole, warm, tmp_path)
