"""The model card that lies next to the weights: Markdown with the header that the Hugging Face hub reads.

The card is part of a run's output, whose bytes must not depend on when, where or in how many attempts the run was
done. So it shows nothing but what recipe, seed and versions determine: no times, speeds, memory, dates, hardware,
command or folder.
"""

from __future__ import annotations

import re
from functools import cache
from typing import Any

import yaml
from jinja2 import Environment, PackageLoader, StrictUndefined

from paredown.report import ledger, words
from paredown.workflow.record import RunRecord, Score, StepRecord

_STEADY_VERSIONS = ("torch", "transformers")
# Model families by the start of their name; the first list that matches wins, and no match means no pipeline tag.
_PIPELINES = (
    (
        "image-text-to-text",
        ("llava", "qwen2_vl", "qwen2_5_vl", "qwen3_vl", "internvl", "mllama", "idefics", "paligemma"),
    ),
    (
        "text-generation",
        (
            *("llama", "mistral", "mixtral", "ministral", "qwen", "gemma", "gpt", "phi", "deepseek", "olmo", "granite"),
            *(
                "falcon",
                "opt",
                "bloom",
                "stablelm",
                "starcoder",
                "smollm",
                "cohere",
                "glm",
                "ernie",
                "exaone",
                "hunyuan",
            ),
        ),
    ),
)
_CLASSES = {"text-generation": "AutoModelForCausalLM", "image-text-to-text": "AutoModelForImageTextToText"}


class _Markdown(str):
    """Text that is Markdown already; everything else that a template prints is escaped."""

    __slots__ = ()


def render(record: RunRecord) -> str:
    """Write the model card of a run.

    Parameters
    ----------
    record
        What the run left behind; nothing else is read.

    Returns
    -------
    str
        A YAML header and Markdown, the same bytes for a resumed and an undisturbed run. Texts of the record are
        escaped, so that none of them can become markup.
    """
    pipeline = _pipeline(record.family)
    base = words.hub_id(record.model)
    header: dict[str, Any] = {} if base is None else {"base_model": base}
    acting = words.policies(record)
    header["library_name"] = "transformers" if record.uniform and not acting else "paredown"
    if pipeline is not None:
        header["pipeline_tag"] = pipeline
    header["tags"] = list(
        dict.fromkeys(
            [
                "paredown",
                *(["pruned"] if len(acting) < len(record.steps) else []),
                *(words.line(step.axis) for step in record.steps),
            ]
        )
    )
    context: dict[str, Any] = {
        "record": record,
        "header": _Markdown(
            yaml.safe_dump(header, sort_keys=False, allow_unicode=True, default_flow_style=False).rstrip()
        ),
        "name": words.short_name(record.model),
        "base": _link(base),
        "methods": words.joined(
            list(dict.fromkeys(words.line(step.method) for step in record.steps if step.kind != "policy"))
        ),
        "policies": words.joined(acting),
        "removed": words.joined(words.removed(record)),
        "steps": [_step(step) for step in record.steps],
        "sizes": _sizes(record),
        "ledger": [row[:5] for row in ledger.rows(record)],  # not the time: a resumed run has the same card
        "ledger_heads": ledger.HEADS[:5],
        "scores": [_score(words.in_percent(score)) for score in record.scores],
        "class_name": _CLASSES.get(pipeline or "", "AutoModel"),
        "versions": [(name, record.versions[name]) for name in _STEADY_VERSIONS if name in record.versions],
        "citations": _citations(record),
    }
    return _environment().get_template("card.md.j2").render(context)


def escape(text: str) -> str:
    """Text as Markdown that shows it literally, on one line, also inside a table."""
    text = words.line(text).replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    text = re.sub(r"([\\`*_\[\]|#~!$])", r"\\\1", text)
    return re.sub(r"(?i)\b(https?|ftp|www)([:.])", r"\1\\\2", text)  # no automatic links


def code(text: str) -> _Markdown:
    """Text as a code span that holds whatever it contains, also inside a table."""
    text = words.line(text).replace("|", "¦")
    fence = "`" * (1 + max((len(run) for run in re.findall("`+", text)), default=0))
    pad = " " if "`" in text else ""
    return _Markdown(f"{fence}{pad}{text}{pad}{fence}")


@cache
def _environment() -> Environment:
    environment = Environment(
        loader=PackageLoader("paredown.report"),
        autoescape=False,  # Markdown, not HTML: `finalize` escapes instead
        finalize=lambda value: value if isinstance(value, _Markdown) else escape(str(value)),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.globals.update({"w": words, "code": code})
    return environment


def _pipeline(family: str) -> str | None:
    name = family.lower().replace("-", "_")
    for tag, starts in _PIPELINES:
        if name.startswith(starts):
            return tag
    return None


def _link(base: str | None) -> _Markdown | None:
    return None if base is None else _Markdown(f"[{escape(base)}](https://huggingface.co/{base})")


def _steady(value: Any) -> Any:
    """A value without folders: paths differ between machines and tell more than a card should."""
    if isinstance(value, str) and (value.startswith(("/", "~", ".", "\\")) or re.match(r"[A-Za-z]:\\", value)):
        return words.short_name(value)
    return value


def _step(step: StepRecord) -> dict[str, Any]:
    id_ = words.arxiv(step)
    data = {key: _steady(value) for key, value in step.data.items() if isinstance(value, (str, int, float, bool))}
    return {
        "step": step,
        "paper": None if id_ is None else _Markdown(f"[arXiv:{id_}](https://arxiv.org/abs/{id_})"),
        "fields": [(words.label(key), _steady(value)) for key, value in step.fields.items()],
        "data": [(words.label(key), value) for key, value in data.items() if "second" not in key and "time" not in key],
        "changes": [_change(name, changes) for name, changes in words.by_unit(step.changes).items()],
    }


def _change(name: str, changes: list[Any]) -> str:
    before, after = sum(one.before for one in changes), sum(one.after for one in changes)
    gone = [one.layer for one in changes if one.after < one.before]
    if all(one.before <= 1 for one in changes):
        return (
            f"{words.count(len(gone))} {words.unit(name, len(gone))} removed, in layers {words.ranges(gone) or 'none'}"
        )
    several, layers = words.unit(name, 2), words.count(len(changes))
    if len({(one.before, one.after) for one in changes}) == 1:
        kept = f"{words.count(changes[0].after)} of {words.count(changes[0].before)} {several} kept"
        return f"{kept} in each of {layers} layers"
    fewest, most = (words.count(pick(one.after for one in changes)) for pick in (min, max))
    kept = f"{words.count(after)} of {words.count(before)} {several} kept in {layers} layers"
    return f"{kept}, between {fewest} and {most} a layer"


def _sizes(record: RunRecord) -> list[tuple[str, str, str, str]]:
    before, after = record.size_before, record.size_after
    found: list[tuple[str, Any, int, int]] = [
        ("Parameters", words.many, before.parameters, after.parameters),
        ("Weights", words.size, before.bytes_weights, after.bytes_weights),
        ("Weight files on disk", words.size, before.bytes_disk, after.bytes_disk),
    ]
    return [(name, show(old), show(new), words.change(old, new)) for name, show, old, new in found]


def _score(score: Score) -> tuple[str, str, str, str]:
    unit = words.score_unit(score)
    name = f"{words.line(score.name)}{f' ({unit})' if unit else ''}"
    before = "not measured" if score.before is None else f"{words.mean(score.before)} {words.bounds(score.before)}"
    after = f"{words.mean(score.after)} {words.bounds(score.after)}"
    if score.difference is None:
        return name, before, after, words.reading(score)
    moved = f"{words.mean(score.difference, signed=True)} {words.bounds(score.difference, signed=True)}"
    moved = f"{moved} {words.difference_unit(score)}".rstrip()
    return name, before, after, f"{moved}: {words.reading(score)}"


def _citations(record: RunRecord) -> list[_Markdown]:
    """One BibTeX entry a paper, inside a code block: backslashes and braces of titles are taken out."""
    entries: dict[str, _Markdown] = {}
    for step in record.steps:
        title = re.sub(r"[\\{}`~]", "", words.line(step.title))
        id_, year = words.arxiv(step), words.year(step)
        if not title or (id_ is None and year is None):
            continue  # a control such as `random` has no paper
        key = re.sub(r"[^a-z0-9]+", "-", words.line(step.method).lower()).strip("-") or "method"
        lines = [f"@article{{{key},", f"  title = {{{title}}},"]
        lines += [f"  journal = {{arXiv preprint arXiv:{id_}}},"] if id_ else []
        lines += [f"  year = {{{year}}},"] if year else []
        entries.setdefault(id_ or title, _Markdown("\n".join([*lines, "}"])))
    return list(entries.values())
