"""Make a testbed's folder from a training run: ``python -m paredown.testbeds.publish NAME --run RUN --data DIR``.

Works on a run that is still going, from its last checkpoint.  `paredown.testbeds.score` fills in what was measured.
"""

from __future__ import annotations

import argparse
import hashlib
import itertools
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from paredown.testbeds import NAMES, corpus, mosaic, objectives, shapes

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

CALIBRATION_DIGITS, HELDOUT_DIGITS = 500, 1000
MOSAICS = 64
"""Mosaics listed in each sample file of ``vlm``; more are made on demand from the digits."""


@dataclass(frozen=True)
class Passage:
    """A piece of a document and where it came from."""

    text: str
    source: str


def passages(document: corpus.Document, size: int) -> Iterator[Passage]:
    """Yield pieces of about `size` characters that end where a paragraph ends.

    The first piece of a longer document is left out: it is mostly title page and table of contents.
    """
    pieces, current = [], ""
    for paragraph in document.text.lstrip("\ufeff").split("\n"):
        if not paragraph.strip():
            continue
        current += paragraph.strip() + "\n"
        if len(current) >= size:
            pieces.append(current)
            current = ""
    if len(current) >= size // 4:
        pieces.append(current)
    yield from (Passage(piece, document.source) for piece in (pieces[1:] if len(pieces) > 4 else pieces))


def sample(documents: Sequence[corpus.Document], size: int, characters: int) -> list[Passage]:
    """Choose passages, an equal share from each source folder, until there are about `characters` characters.

    Within a folder the documents come in the order of their hashes, one passage each before any gives a second.
    """
    folders: dict[str, list[corpus.Document]] = {}
    for document in sorted(documents, key=lambda doc: hashlib.sha256(doc.text.encode("utf-8")).digest()):
        folders.setdefault(document.source.split(":")[0], []).append(document)
    chosen: list[Passage] = []
    for folder in sorted(folders):
        rounds = itertools.zip_longest(*(list(passages(document, size)) for document in folders[folder][:400]))
        left = characters / len(folders)
        for passage in itertools.chain.from_iterable(rounds):
            if passage is None:
                continue
            if left <= 0:
                break
            chosen.append(passage)
            left -= len(passage.text)
    return chosen


def _write_lines(file: Path, records: Sequence[dict[str, Any]]) -> None:
    file.write_text("".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records), encoding="utf-8")


def _folders(sources: Sequence[str]) -> set[str]:
    return {source.split(":")[0] for source in sources}


def write_text_samples(data: Path, to: Path, only: Sequence[str], judging: Sequence[str]) -> list[str]:
    """Write ``calibration.jsonl`` and ``heldout.jsonl`` of a text testbed and return the sources to cite.

    Parameters
    ----------
    data, only
        What the run was trained on.
    to
        The testbed's folder.
    judging
        How the sources of held-out passages may begin; empty means as any.  So a model that started from another one is
        judged on documents that neither was trained on.
    """
    documents = list(corpus.read(data, only=only, longest=250_000))
    calibration = sample([doc for doc in documents if not doc.heldout], 1500, 100_000)
    if only and (more := sorted(_folders(judging) - set(only))):
        documents += corpus.read(data, only=more, longest=250_000)
    judged = [doc for doc in documents if doc.heldout and doc.source.startswith(tuple(judging) or "")]
    heldout = sample(judged, 4000, 200_000)
    for file, chosen in (("calibration.jsonl", calibration), ("heldout.jsonl", heldout)):
        _write_lines(to / file, [{"text": passage.text, "source": passage.source} for passage in chosen])
    cited = [f"calibration: {source}" for source in sorted({passage.source for passage in calibration})]
    return cited + [f"held out: {source}" for source in sorted({passage.source for passage in heldout})]


def _mosaic_records(digits: npt.NDArray[np.uint8], labels: npt.NDArray[np.integer], seed: int) -> list[dict[str, Any]]:
    """Describe mosaics as text: which digit (an index into the ``.npz``, -1 for none) lies in each cell, answers."""
    rng = np.random.default_rng(seed)
    records = []
    for _ in range(MOSAICS):
        present = rng.permutation(mosaic.SHAPE.cells) < rng.integers(2, mosaic.SHAPE.cells + 1)
        chosen = np.where(present, rng.integers(0, len(digits), size=mosaic.SHAPE.cells), -1)
        told = [mosaic.EMPTY if index < 0 else int(labels[index]) for index in chosen]
        cell = int(rng.choice(np.flatnonzero(present)))
        lines = "\n".join(mosaic.question(at) + mosaic.answer(told[at]) for at in rng.permutation(mosaic.SHAPE.cells))
        records.append(
            {
                "text": f"<|image|>\n{lines}\n",
                "digits": chosen.tolist(),
                "question": mosaic.question(cell),
                "answer": mosaic.answer(told[cell]).strip(),
            }
        )
    return records


def write_mosaic_samples(data: Path, to: Path) -> list[str]:
    """Write the digits and the questions of the ``vlm`` testbed and return the sources to cite."""
    for file, part, count, seed in (
        ("calibration", "train", CALIBRATION_DIGITS, 1),
        ("heldout", "test", HELDOUT_DIGITS, 2),
    ):
        digits, labels = objectives.mnist(data, part)
        digits, labels = digits[:count], labels[:count].astype(np.uint8)
        np.savez_compressed(to / f"{file}_digits.npz", digits=digits, labels=labels)
        _write_lines(to / f"{file}.jsonl", _mosaic_records(digits, labels, seed))
    return [
        f"calibration: training digits 0 to {CALIBRATION_DIGITS - 1} of MNIST",
        f"held out: test digits 0 to {HELDOUT_DIGITS - 1} of MNIST",
    ]


def write_provenance(name: str, data: Path, to: Path, only: Sequence[str], cited: Sequence[str]) -> None:
    """Write ``PROVENANCE.md``: what each data folder says of itself, and each document of which a part is shipped."""
    judging = _folders([source.removeprefix("held out: ") for source in cited if source.startswith("held out: ")])
    more = sorted(part for part in judging - set(only) if (data / part).is_dir())
    folders = [data / part for part in (*only, *more)] if only else [data]
    parts = [
        f"# Where the data of testbed `{name}` came from",
        f"Weights and tokenizer were trained on {', '.join(only) or data.name}; the samples are cut from these:",
    ]
    for folder in folders:
        note = folder / "PROVENANCE.md"
        said = note.read_text(encoding="utf-8") if note.is_file() else ""
        about = said.split("\n## ")[0].strip().removeprefix(f"# {folder.name}").strip()
        parts.append(f"## {folder.name}\n\n{about}" if about else f"## {folder.name}")
    parts.append("## Documents of which a part is in this folder\n\n" + "\n".join(f"- {source}" for source in cited))
    (to / "PROVENANCE.md").write_text("\n\n".join(parts) + "\n", encoding="utf-8")


def write_model(name: str, run: Path, tokenizer: PreTrainedTokenizerFast, to: Path) -> None:
    """Write the weights of the run's last checkpoint in bfloat16, with config, tokenizer and ``training.json``."""
    import torch
    from safetensors.torch import save_file

    state = torch.load(run / name / "checkpoint.pt", map_location="cpu", weights_only=True)
    model: Any = shapes.build(name, tokenizer)
    model.load_state_dict(state["model"])
    model.to(torch.bfloat16).save_pretrained(to)
    (to / "model.safetensors").chmod(0o644)  # saving makes it readable by its owner alone, a package must not be
    if name == "vlm":
        shapes.build_processor(tokenizer, mosaic.SHAPE).save_pretrained(to)
        heads = {key: value.to(torch.bfloat16) for key, value in state["extra"].items() if key.startswith("presence.")}
        save_file(heads, to / "presence_head.safetensors")
    else:
        tokenizer.save_pretrained(to)
    about = {**state.get("about", {}), **state["progress"]}
    (to / "training.json").write_text(json.dumps(about, indent=2) + "\n", encoding="utf-8")


def main(arguments: list[str] | None = None) -> None:
    """Make or renew the folder of one testbed."""
    parser = argparse.ArgumentParser(prog="python -m paredown.testbeds.publish", description=__doc__)
    parser.add_argument("name", choices=NAMES)
    parser.add_argument("--data", type=Path, required=True, help="the folder that the run was trained on")
    parser.add_argument("--only", nargs="*", default=[], help="sub-folders of DATA, as in the training command")
    parser.add_argument(
        "--heldout",
        nargs="*",
        default=[],
        help="how the sources of held-out text may begin, e.g. FOLDER or 'FOLDER: ID'",
    )
    parser.add_argument(
        "--run", type=Path, default=Path("runs/testbeds"), help="folder of the run (default: runs/testbeds)"
    )
    parser.add_argument("--tokenizer", type=Path, help="the tokenizer of the run, if it was given one")
    parser.add_argument(
        "--to", type=Path, default=Path(__file__).parent, help="where folder NAME goes (default: this package)"
    )
    options = parser.parse_args(arguments)
    from transformers import PreTrainedTokenizerFast

    to: Path = options.to / options.name
    to.mkdir(parents=True, exist_ok=True)
    tokenizer = PreTrainedTokenizerFast.from_pretrained(options.tokenizer or options.run / "tokenizer")
    write_model(options.name, options.run, tokenizer, to)
    if options.name == "vlm":
        cited = write_mosaic_samples(options.data, to)
    else:
        cited = write_text_samples(options.data, to, options.only, options.heldout)
    write_provenance(options.name, options.data, to, options.only, cited)


if __name__ == "__main__":
    main()
