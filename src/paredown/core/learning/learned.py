"""What a policy has learned, in a file: put there when the training is over, and read back into a module."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from paredown.errors import PolicyError


def under_way(folder: str | Path) -> Path:
    """Return where a training that prepares a policy keeps its checkpoints."""
    return Path(folder) / "training"


def keep(tensors: Mapping[str, Tensor], folder: str | Path, name: str) -> str:
    """Write what was learned to ``folder / name``, let go of the training's checkpoints, and return the file's path."""
    place = Path(folder) / name
    place.parent.mkdir(parents=True, exist_ok=True)
    save_file({key: tensor.detach().cpu().contiguous() for key, tensor in tensors.items()}, place)
    # Checkpoints know shapes and settings, not the text: other data must not find them.
    shutil.rmtree(under_way(folder), ignore_errors=True)
    return str(place)


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
