"""Write what follows from the code: the catalogue, a page for each method, the command line's help, recipes' schema.

    python tools/build_docs.py            write
    python tools/build_docs.py --check    change nothing; exit 1 and name the pages that are stale

Nobody edits these pages by hand: names, fields and sources come from the registry, help from the commands, measured
lines from ``benchmarks/results/<axis>/<method>.json`` where such a file exists.
"""

from __future__ import annotations

import argparse
import json
import sys
from itertools import groupby
from pathlib import Path
from typing import Any

import typer

from paredown import registry
from paredown.commands import app
from paredown.commands.methods import needs, type_name
from paredown.registry import Entry

ROOT = Path(__file__).resolve().parent.parent
BEGIN = "<!-- catalogue: written by `make docs` -->"
END = "<!-- end of catalogue -->"
NOTE = "<!-- Written by `make docs`; change the code, not this page. -->"
WIDTH = 100
PUBLISHED = ("summary", "command", "commit", "seeds", "hardware")
"""Keys that a result must have before its number is published."""


def build(root: Path = ROOT) -> dict[Path, str]:
    """Return the generated files, by path below ``root``."""
    entries = registry.entries()
    pages = {
        Path("docs/cli.md"): command_line(),
        Path("docs/recipe.schema.json"): schema(),
        Path("docs/methods/index.md"): index(entries),
        Path("src/paredown/methods/measured.json"): published(entries, root),
    }
    for entry in entries:
        pages[Path(f"docs/methods/{entry.name}.md")] = method_page(entry, measured(entry, root))
    pages[Path("README.md")] = readme((root / "README.md").read_text(encoding="utf-8"), entries, root)
    return pages


def stale(root: Path = ROOT) -> list[Path]:
    """Return the paths whose file is missing, differs, or belongs to no method any more."""
    pages = build(root)
    wrong = [path for path, text in pages.items() if _read(root / path) != text]
    return sorted(wrong + orphans(root, pages))


def orphans(root: Path, pages: dict[Path, str]) -> list[Path]:
    """Return pages of methods that are gone."""
    there = {path.relative_to(root) for path in (root / "docs/methods").glob("*.md")}
    return sorted(there - set(pages))


def readme(text: str, entries: tuple[Entry, ...], root: Path) -> str:
    """Put the catalogue between its marks."""
    if text.count(BEGIN) != 1 or text.count(END) != 1 or text.index(BEGIN) > text.index(END):
        raise SystemExit(f"error: README.md needs the line {BEGIN} once and {END} once after it")
    before, rest = text.split(BEGIN)
    after = rest.split(END)[1]
    return f"{before}{BEGIN}\n\n{catalogue(entries, root)}\n{END}{after}"


def catalogue(entries: tuple[Entry, ...], root: Path) -> str:
    """Return the README's catalogue: a table an axis, a line a method."""
    parts = []
    for axis, group in groupby(entries, key=lambda entry: entry.axis):
        parts.append(f"**{axis}**\n")
        parts.append("| method | unit | source | measured |\n| --- | --- | --- | --- |")
        for entry in group:
            result = measured(entry, root)
            link = f"[{entry.name}](docs/methods/{entry.name}.md)"
            cells = (link, entry.unit, source(entry), headline(result["summary"]) if result else "")
            parts.append(_row(cells))
        parts.append("")
    return "\n".join(parts)


def headline(summary: str) -> str:
    """Return what was measured first; the method's page has the rest."""
    first, more, _ = summary.partition(". testbed:")
    return f"{first}. (And more.)" if more else summary


def index(entries: tuple[Entry, ...]) -> str:
    """Return the list of all pages."""
    lines = [NOTE, "", "# Methods", "", "| axis | method | what it does |", "| --- | --- | --- |"]
    lines += [_row((entry.axis, f"[{entry.name}]({entry.name}.md)", entry.summary)) for entry in entries]
    return "\n".join(lines) + "\n"


def method_page(entry: Entry, result: dict[str, Any] | None) -> str:
    """Return one method's page."""
    facts = [
        ("axis", entry.axis),
        ("unit", entry.unit),
        ("kind", entry.kind + (" (a control: what others are compared with)" if entry.control else "")),
        ("needs", needs(entry)),
        ("source", source(entry)),
        ("code", f"`src/{entry.module.replace('.', '/')}.py`"),
    ]
    lines = [NOTE, "", f"# {entry.name}", "", entry.summary, "", "| | |", "| --- | --- |"]
    lines += [_row(fact) for fact in facts]
    if entry.fields:
        lines += ["", "## Fields", "", "| field | type | default | meaning |", "| --- | --- | --- | --- |"]
        lines += [
            _row(
                (
                    f"`{field.name}`",
                    type_name(field.type),
                    "required" if field.required else f"`{json.dumps(field.default)}`",
                    field.description,
                )
            )
            for field in entry.fields
        ]
    lines += ["", "## Use", "", *_use(entry)]
    if result:
        lines += ["", "## Measured", "", result["summary"], "", "```", result["command"], "```", ""]
        lines += [f"Commit {result['commit']}, seeds {result['seeds']}, {result['hardware']}."]
    return "\n".join(lines) + "\n"


def _use(entry: Entry) -> list[str]:
    """Return the shortest way to use a method of this kind."""
    keep = next((field.default for field in entry.fields if field.name == "keep"), None) or 0.5
    if entry.kind == "compressor":
        return ["```", f"paredown run MODEL --method {entry.name} --keep {keep:g} --out DIR", "```"]
    if entry.kind == "policy":
        return ["```", f"paredown generate MODEL --policy {entry.name} --keep {keep:g} --prompt-file FILE", "```"]
    if entry.kind == "probe":
        return ["```", f"paredown probe MODEL {entry.name}", "```"]
    return [
        "```python",
        f'method = paredown.method("{entry.name}")',
        "with method.wrap(model):",
        "    transformers.Trainer(model.hf, callbacks=method.callbacks(model), ...).train()",
        "```",
    ]


def measured(entry: Entry, root: Path) -> dict[str, Any] | None:
    """Read a method's published result, if it has one."""
    path = root / "benchmarks" / "results" / entry.axis / f"{entry.name}.json"
    if not path.is_file():
        return None
    result: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    missing = [key for key in PUBLISHED if not result.get(key)]
    if missing:
        raise SystemExit(f"error: {path.relative_to(root)} cannot be published without: {', '.join(missing)}")
    return result


def published(entries: tuple[Entry, ...], root: Path) -> str:
    """Return the results that an installed package shows."""
    results = {entry.name: measured(entry, root) for entry in entries}
    kept = {name: {key: result[key] for key in PUBLISHED} for name, result in sorted(results.items()) if result}
    return json.dumps(kept, indent=1, ensure_ascii=False) + "\n"


def source(entry: Entry) -> str:
    """Return title and year, linked to the paper where it is on arXiv."""
    year = f" ({entry.year})" if entry.year else ""
    if entry.arxiv:
        return f"[{entry.title}](https://arxiv.org/abs/{entry.arxiv}){year}"
    return f"{entry.title}{year}"


def command_line() -> str:
    """Return the help of every command, as a terminal of fixed width shows it."""
    group: Any = typer.main.get_command(app)
    settings = {**group.context_settings, "terminal_width": WIDTH, "max_content_width": WIDTH}
    root = group.context_class(group, info_name="paredown", **settings)
    lines = [NOTE, "", "# Command line", "", "```", group.get_help(root).rstrip(), "```"]
    for name, command in group.commands.items():
        context = command.context_class(command, info_name=name, parent=root, **settings)
        lines += ["", f"## paredown {name}", "", "```", command.get_help(context).rstrip(), "```"]
    lines += [
        "",
        "## Exit codes",
        "",
        "| code | meaning |",
        "| --- | --- |",
        "| 0 | done |",
        "| 1 | something given cannot be used; the message says what and how to mend it |",
        "| 2 | options that cannot be read or do not fit together |",
        "| 3 | stopped by the gate: quality fell by more than allowed, nothing was written |",
        "| 4 | proof failed: the written result is not the model that was in memory |",
        "| 130 | interrupted |",
    ]
    return "\n".join(lines) + "\n"


def schema() -> str:
    """Return the JSON schema of recipes, for editors."""
    from paredown.workflow.recipe import Recipe

    return json.dumps(Recipe.model_json_schema(), indent=2) + "\n"


def _row(cells: tuple[str, ...]) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|").replace("\n", " ") for cell in cells) + " |"


def _read(path: Path) -> str | None:
    return path.read_text(encoding="utf-8") if path.is_file() else None


def main() -> int:
    """Write the pages, or with ``--check`` say which are stale."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", maxsplit=1)[0])
    parser.add_argument("--check", action="store_true", help="change nothing; exit 1 if a page is stale")
    if parser.parse_args().check:
        wrong = stale()
        for path in wrong:
            print(f"stale: {path} (run `make docs`)", file=sys.stderr)
        return 1 if wrong else 0
    pages = build()
    for path, text in pages.items():
        if _read(ROOT / path) != text:
            (ROOT / path).parent.mkdir(parents=True, exist_ok=True)
            (ROOT / path).write_text(text, encoding="utf-8")
            print(f"wrote {path}")
    for path in orphans(ROOT, pages):
        (ROOT / path).unlink()
        print(f"removed {path}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
