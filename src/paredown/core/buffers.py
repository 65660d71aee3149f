"""Buffers that no checkpoint holds: they are computed when a skeleton is built."""

from __future__ import annotations

import torch
from transformers import PreTrainedModel


def real_buffers(hf: PreTrainedModel) -> None:
    """Compute non-persistent buffers (rotary tables): they are in no checkpoint."""
    owners = set()
    for name, buffer in list(hf.named_non_persistent_buffers()):
        path, _, leaf = name.rpartition(".")
        owner = hf.get_submodule(path)
        owner._buffers[leaf] = torch.empty_like(buffer, device="cpu")
        owners.add(path)
    for path in sorted(owners):
        owner = hf.get_submodule(path)
        real = {n: b for n, b in owner._buffers.items() if b is not None and b.device.type != "meta"}
        # What initialisation does to parameters is lost on the meta device: only the buffers become real.
        _owner_model(hf, path)._init_weights(owner)
        assert all(owner._buffers[n] is not None for n in real)


def _owner_model(hf: PreTrainedModel, path: str) -> PreTrainedModel:
    """Return the innermost pretrained sub-model around a module: its ``_init_weights`` knows it."""
    parts = path.split(".")
    for end in range(len(parts), 0, -1):
        candidate = hf.get_submodule(".".join(parts[:end]))
        if isinstance(candidate, PreTrainedModel):
            return candidate
    return hf
