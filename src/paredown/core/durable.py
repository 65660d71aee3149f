"""Files that are whole or not there: written aside, flushed to disk, then given their name."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor


def write_tensors(file: Path, tensors: dict[str, Tensor], note: dict[str, str] | None = None) -> None:
    """Write a safetensors file whole or not at all."""
    aside = file.with_suffix(".writing")
    try:
        save_file({k: v.detach().cpu().contiguous() for k, v in tensors.items()}, aside, metadata=note)
    except SafetensorError as error:
        raise OSError(0, str(error), str(aside)) from None
    _settle(aside, file)


def write_text(file: Path, text: str) -> None:
    """Write a text file whole or not at all."""
    aside = file.with_suffix(file.suffix + ".writing")
    aside.write_text(text, encoding="utf-8")
    _settle(aside, file)


def write_json(file: Path, content: Any) -> None:
    """Write JSON whole or not at all; the same content gives the same bytes."""
    write_text(file, json.dumps(content, indent=1, sort_keys=True, ensure_ascii=False) + "\n")


def _settle(aside: Path, file: Path) -> None:
    with aside.open("rb+") as opened:
        os.fsync(opened.fileno())
    # replace() and not rename(): where the file is there already, rename() fails on Windows.
    aside.replace(file)
