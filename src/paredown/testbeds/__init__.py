"""Small, really trained models in the box, to try methods on without a download.

`lm`
    Llama architecture; prose.
`moe`
    Qwen3-MoE architecture, 16 experts a layer, top-2; prose.
`recall`
    Llama architecture; finds facts planted in up to 512 tokens of prose.
`recall-moe`
    Mixtral architecture, 8 experts a layer, top-2; the same task.
`vlm`
    LLaVA architecture with a CLIP tower; says which digit lies in a named cell of a mosaic.

Each folder holds the weights, the tokenizer, ``calibration.jsonl``, ``heldout.jsonl``, what was measured (``card.md``,
``scores.json``) and where the data came from (``PROVENANCE.md``).  Importing this module imports neither torch nor
transformers.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

__all__ = ["NAMES", "RECALLING", "calibration_digits", "calibration_texts", "heldout_digits", "heldout_texts", "path"]

NAMES = ("lm", "moe", "recall", "recall-moe", "vlm")
RECALLING = ("recall", "recall-moe")
"""Those that find planted facts."""


def path(name: str) -> Path:
    """Return the folder of a testbed.

    Raises
    ------
    paredown.errors.ModelNotFoundError
        If there is no testbed of this name.
    """
    folder = Path(__file__).parent / name
    if name not in NAMES or not (folder / "config.json").is_file():
        from paredown.errors import ModelNotFoundError

        there = ", ".join(known for known in NAMES if (Path(__file__).parent / known / "config.json").is_file())
        raise ModelNotFoundError(f"there is no testbed {name!r}; the testbeds are {there}")
    return folder


def _texts(file: Path) -> list[str]:
    with file.open(encoding="utf-8") as lines:
        return [json.loads(line)["text"] for line in lines]


def calibration_texts(name: str) -> list[str]:
    """Return texts of the kind that a testbed was trained on, for methods to look at."""
    return _texts(path(name) / "calibration.jsonl")


def heldout_texts(name: str) -> list[str]:
    """Return texts that a testbed has never seen; for ``vlm`` these are prompts, each about one mosaic."""
    return _texts(path(name) / "heldout.jsonl")


def _digits(file: Path) -> tuple[npt.NDArray[np.uint8], npt.NDArray[np.uint8]]:
    import numpy as np

    with np.load(file, allow_pickle=False) as arrays:
        return arrays["digits"], arrays["labels"]


def calibration_digits() -> tuple[npt.NDArray[np.uint8], npt.NDArray[np.uint8]]:
    """Return handwritten digits ``[N, 28, 28]`` and their labels ``[N]`` that ``vlm`` was trained on."""
    return _digits(path("vlm") / "calibration_digits.npz")


def heldout_digits() -> tuple[npt.NDArray[np.uint8], npt.NDArray[np.uint8]]:
    """Return handwritten digits ``[N, 28, 28]`` and their labels ``[N]`` that ``vlm`` has never seen."""
    return _digits(path("vlm") / "heldout_digits.npz")
