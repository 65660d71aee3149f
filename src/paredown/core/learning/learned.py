"""Policies that learn: what they ask for, where their training stands, and the file of what they have learned."""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from paredown.core.learning import training
from paredown.errors import DataError, PolicyError

if TYPE_CHECKING:
    from paredown.core.calibration import Batch
    from paredown.core.method import Progress


def text(name: str, data: Batch | None) -> Batch:
    """Return the text that the policy ``name`` learns from.

    Raises
    ------
    DataError
        If there is none.
    """
    if data is None:
        raise DataError(f"{name} learns from text; give it calibration data.")
    return data


def place(name: str, folder: str | None, *, what: str) -> str:
    """Return the folder in which the policy ``name`` keeps ``what``.

    Raises
    ------
    PolicyError
        If there is none.
    """
    if folder is None:
        raise PolicyError(f"{name} keeps its {what} in a file; give prepare a folder.")
    return folder


def fit(
    task: training.Task[training.Row],
    rows: Sequence[training.Row],
    settings: training.Settings,
    *,
    folder: str,
    progress: Progress | None,
    what: str,
) -> training.Fitted:
    """Train as :func:`training.fit` does, with checkpoints that :func:`keep` lets go of."""
    return training.fit(task, rows, settings, folder=_under_way(folder), progress=progress, what=what)


def keep(tensors: Mapping[str, Tensor], folder: str | Path, name: str) -> str:
    """Write what was learned to ``folder / name``, let go of the training's checkpoints, and return the file's path."""
    place = Path(folder) / name
    place.parent.mkdir(parents=True, exist_ok=True)
    save_file({key: tensor.detach().cpu().contiguous() for key, tensor in tensors.items()}, place)
    # Checkpoints know shapes and settings, not the text: other data must not find them.
    shutil.rmtree(_under_way(folder), ignore_errors=True)
    return str(place)


def _under_way(folder: str | Path) -> Path:
    return Path(folder) / "training"


def ends(losses: Sequence[float]) -> dict[str, float]:
    """Return the mean loss of the first tenth of the steps and of the last, by name; nothing if there were none."""
    if not losses:
        return {}
    tenth = max(1, len(losses) // 10)
    return {"loss at first": sum(losses[:tenth]) / tenth, "loss at last": sum(losses[-tenth:]) / tenth}


def restore(module: nn.Module, file: str | Path, *, device: str, unreadable: str, foreign: str) -> None:
    """Read a module's weights from a file and freeze them.

    Parameters
    ----------
    unreadable : what to say where the file cannot be read; ``{}`` stands for the reason
    foreign : what to say where it holds the weights of another module

    Raises
    ------
    PolicyError
        In one of the two sentences.
    """
    try:
        module.load_state_dict(load_file(file, device=device))
    except (OSError, SafetensorError) as error:
        raise PolicyError(unreadable.replace("{}", str(error))) from None
    except RuntimeError:
        raise PolicyError(foreign) from None
    module.requires_grad_(False)
