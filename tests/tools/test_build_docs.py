"""Generated pages: complete, current, and only published numbers in them."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import pytest

from paredown import registry

ROOT = Path(__file__).parent.parent.parent


@pytest.fixture(scope="module")
def docs():
    spec = importlib.util.spec_from_file_location("build_docs", ROOT / "tools" / "build_docs.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def entry():
    field = registry.FieldEntry("alpha", "float", 0.5, False, "How | how.")
    return registry.Entry(
        name="imagined",
        axis="experts",
        kind="compressor",
        unit="experts",
        title="Imagined Experts",
        year=2026,
        arxiv="2601.00001",
        needs=("calibration-data",),
        control=False,
        summary="Removes what was imagined.",
        module="paredown.methods.experts.imagined",
        fields=(field,),
    )


def test_a_method_page_says_everything(docs, entry):
    page = docs.method_page(entry, None)
    for part in (
        "# imagined",
        "Removes what was imagined.",
        "calibration data",
        "`alpha`",
        "`0.5`",
        "How \\| how.",
    ):
        assert part in page
    assert "[Imagined Experts](https://arxiv.org/abs/2601.00001) (2026)" in page
    assert "src/paredown/methods/experts/imagined.py" in page
    assert "Measured" not in page


def test_a_result_is_shown_only_where_its_file_is(docs, entry, tmp_path):
    assert docs.measured(entry, tmp_path) is None
    path = tmp_path / "benchmarks/results/experts/imagined.json"
    path.parent.mkdir(parents=True)
    result = {"summary": "0.12 [0.08, 0.16] nats better than random", "command": "paredown compare", "commit": "abc"}
    path.write_text(json.dumps(result))
    with pytest.raises(SystemExit, match="seeds, hardware"):
        docs.measured(entry, tmp_path)
    path.write_text(json.dumps({**result, "seeds": 5, "hardware": "2 cores"}))
    assert "0.12 [0.08, 0.16] nats better than random" in docs.method_page(entry, docs.measured(entry, tmp_path))
    assert "0.12 [0.08, 0.16] nats better than random" in docs.catalogue((entry,), tmp_path)


def test_stale_missing_and_orphaned_pages_are_found(docs, tmp_path):
    (tmp_path / "README.md").write_text(f"before\n{docs.BEGIN}\na stale line\n{docs.END}\nafter\n")
    pages = docs.build(tmp_path)
    assert set(docs.stale(tmp_path)) == set(pages)
    for path, text in pages.items():
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).write_text(text)
    assert docs.stale(tmp_path) == []
    (tmp_path / "docs/methods/gone.md").write_text("a method that was removed")
    assert docs.stale(tmp_path) == [Path("docs/methods/gone.md")]
    readme = (tmp_path / "README.md").read_text()
    assert readme.startswith("before\n")
    assert readme.endswith("\nafter\n")
    assert "a stale line" not in readme


def test_a_readme_without_marks_is_told(docs, tmp_path):
    (tmp_path / "README.md").write_text("nothing here")
    with pytest.raises(SystemExit, match="README"):
        docs.build(tmp_path)


def test_help_of_every_command_is_in_the_page(docs):
    from paredown.commands import app

    page = docs.command_line()
    for command in app.registered_commands:
        assert f"## paredown {command.name}\n" in page
    assert "--gate" in page


def test_committed_pages_are_current(docs):
    assert docs.stale() == []


def test_the_recipe_in_the_docs_is_legal():
    import yaml

    from paredown.workflow import recipe

    text = (ROOT / "docs" / "recipes.md").read_text(encoding="utf-8")
    block = text.split("```yaml\n")[1].split("```")[0]
    made = recipe.check(yaml.safe_load(block))
    assert [step.method for step in made.steps] == ["dern", "llm-drop"]
    for key in [*recipe.Recipe.model_fields, *(f"data.{name}" for name in recipe.Data.model_fields)]:
        assert key == "data" or f"`{key}`" in text, key
