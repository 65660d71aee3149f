"""Tensors in files, read at the moment at which they are used, and checked while they are read.

Mapping a file into memory would be shorter, but its pages count as this process's memory until the file is closed, and
reading all tensors of a block before they are fused would hold the block twice.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from paredown.core.files import TensorInfo
from paredown.errors import CheckpointError

DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8,
    "U16": torch.uint16, "U32": torch.uint32, "U64": torch.uint64, "BOOL": torch.bool, "C64": torch.complex64,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2,
}  # fmt: skip
CHUNK = 1 << 20
"""Elements that sums over weights take at once: they need a wider copy of what they add up."""


class OnFile:
    """A tensor that is read when it is indexed, in the way in which transformers' loader asks for it."""

    def __init__(self, folder: Path, name: str, info: TensorInfo) -> None:
        self.folder, self.name, self.info = folder, name, info

    def __getitem__(self, _: Any) -> Tensor:
        """Read and check the whole tensor, whatever the index; nothing asks for parts."""
        return read(self.folder, self.name, self.info)


def read(folder: Path, name: str, info: TensorInfo) -> Tensor:
    """Read one tensor into memory of its own.

    Raises
    ------
    CheckpointError
        If the file ends early, the numbers are of a kind that torch does not have, or are not finite.
    """
    dtype = DTYPES.get(info.dtype)
    if dtype is None:
        raise CheckpointError(f"{name} in {folder} holds numbers of the kind {info.dtype}, which torch cannot compute.")
    raw = torch.empty(info.nbytes, dtype=torch.uint8)
    with info.file.open("rb", buffering=0) as source:
        source.seek(info.start)
        view, done = memoryview(raw.numpy()), 0  # type: ignore[arg-type]
        while done < info.nbytes:
            count = source.readinto(view[done:])
            if not count:
                raise CheckpointError(f"{info.file} ended while {name} was read; is another program writing to it?")
            done += count
    tensor = raw.view(dtype).reshape(info.shape)
    check_finite(folder, name, tensor)
    return tensor


def check_finite(folder: Path, name: str, tensor: Tensor) -> None:
    """Refuse weights that are not numbers.

    Raises
    ------
    CheckpointError
        Naming the tensor.
    """
    if not tensor.is_floating_point():
        return
    bad = 0
    for part in torch.split(tensor.reshape(-1), CHUNK):
        # The sum is not finite as soon as one element is not; only an overflow needs the second, dearer look.
        if not torch.isfinite(part.sum(dtype=torch.float32)):
            bad += int((~torch.isfinite(part.float())).sum())
    if bad:
        raise CheckpointError(
            f"{name} in {folder} holds {bad} values that are not finite numbers; copy the checkpoint again."
        )
