"""Checkpoint folders as files: finding them, refusing broken or unsafe ones, reading headers, writing shards.

- Everything is checked from headers and sizes before a single weight is read.
- Weights are safetensors in and safetensors out; pickles are refused.
- Shards are put together by copying bytes, so that writing needs no memory.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
import shutil
import struct
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from paredown.errors import CheckpointError, ModelNotFoundError

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
MAX_SHARD_BYTES = 5 * 10**9
_MAX_HEADER_BYTES = 100 * 2**20
_HUB_FILES = ["*.safetensors", "*.json", "*.model", "*.txt", "*.jinja", "tokenizer*", "LICENSE*", "README.md",
              "policy.yaml", "policies/*.safetensors"]  # fmt: skip
_EXTRA_PREFIXES = (
    "tokenizer", "vocab", "merges", "special_tokens", "added_tokens", "chat_template", "LICENSE", "NOTICE",
)  # fmt: skip
_BITS = {
    "F64": 64, "I64": 64, "U64": 64, "F32": 32, "I32": 32, "U32": 32, "F16": 16, "BF16": 16, "I16": 16, "U16": 16,
    "F8_E4M3": 8, "F8_E5M2": 8, "F8_E8M0": 8, "I8": 8, "U8": 8, "BOOL": 8, "F4": 4, "C64": 64,
}  # fmt: skip


@dataclass(frozen=True)
class TensorInfo:
    """Where one tensor lies: its file, and its bytes ``start..end`` counted from the beginning of that file."""

    file: Path
    dtype: str
    shape: tuple[int, ...]
    start: int
    end: int

    @property
    def numel(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        """Bytes of data."""
        return self.end - self.start


def locate(ref: str | Path) -> Path:
    """Return the local folder of a checkpoint: ``testbed:NAME``, a folder, or a hub id (downloaded, never executed).

    Raises
    ------
    ModelNotFoundError
        If there is no such testbed, folder or repository.
    CheckpointError
        If the folder is there but its files are missing, broken or unsafe.
    """
    text = str(ref)
    if text.startswith("testbed:"):
        from paredown import testbeds

        folder = testbeds.path(text.removeprefix("testbed:"))
    elif _exists(text) or not re.fullmatch(r"[\w-][\w.-]*(/[\w-][\w.-]*)?", text):
        folder = Path(text)
        if _exists(text):
            folder = folder.expanduser()
        else:
            raise ModelNotFoundError(
                f"there is no folder {text!r}; give a local folder, a hub id like org/name, or testbed:moe."
            )
    else:
        folder = _download(text)
    check(folder)
    return folder


def check(folder: Path) -> None:
    """Refuse a folder that is not a whole, safe checkpoint.

    Raises
    ------
    CheckpointError
        One sentence: what, where, how to mend.
    """
    if not folder.is_dir():
        raise CheckpointError(f"{folder} is a file, not a checkpoint folder; give the folder that holds config.json.")
    read_json(folder / "config.json", "the folder is not a checkpoint, or its config was lost")
    headers(folder)


def read_json(path: Path, remedy: str) -> dict[str, Any]:
    """Read a JSON object, or say in one sentence why not."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CheckpointError(f"{path.parent} has no {path.name}: {remedy}.") from None
    except (json.JSONDecodeError, UnicodeDecodeError, RecursionError, OSError) as error:
        raise CheckpointError(f"{path} cannot be read as JSON ({_short(error)}); copy the checkpoint again.") from None
    if not isinstance(found, dict):
        raise CheckpointError(f"{path} must hold a JSON object, not a {type(found).__name__}.")
    return found


def headers(folder: Path) -> dict[str, TensorInfo]:
    """Read every tensor's place from the safetensors headers, checking each file's length against its header.

    Raises
    ------
    CheckpointError
        If there are no safetensors, only pickles, a shard is missing or cut short, or the index points elsewhere.
    """
    found: dict[str, TensorInfo] = {}
    for file in weight_files(folder):
        for name, info in _header(file).items():
            if name in found:
                raise CheckpointError(f"{folder} holds the tensor {name!r} twice; copy the checkpoint again.")
            found[name] = info
    if not (folder / SINGLE).is_file():
        promised = read_json(folder / INDEX, "its index was lost")["weight_map"]
        absent = sorted(n for n, file in promised.items() if n not in found or found[n].file.name != file)
        if absent:
            raise CheckpointError(
                f"{folder / INDEX} says that {absent[0]!r} is in {promised[absent[0]]}, where it is not; "
                "copy the checkpoint again."
            )
    if not found:
        raise CheckpointError(f"the weight files of {folder} hold no tensors; copy the checkpoint again.")
    return found


def weight_files(folder: Path) -> list[Path]:
    """Return the safetensors files of a checkpoint, in order."""
    if (folder / SINGLE).is_file():  # transformers, too, looks for the single file first
        return [folder / SINGLE]
    if (folder / INDEX).exists():
        index = read_json(folder / INDEX, "")
        weight_map = index.get("weight_map")
        if not isinstance(weight_map, dict) or not all(isinstance(v, str) for v in weight_map.values()):
            raise CheckpointError(f"{folder / INDEX} has no weight_map of file names; copy the checkpoint again.")
        files = []
        for name in sorted(set(weight_map.values())):
            # An index from elsewhere must not make us read files outside the folder.
            if Path(name).name != name or not name.endswith(".safetensors"):
                raise CheckpointError(f"{folder / INDEX} points to {name!r}, outside the checkpoint; do not trust it.")
            if not (folder / name).is_file():
                raise CheckpointError(f"the shard {name} of {folder} is missing; copy or download it again.")
            files.append(folder / name)
        return files
    pickles = [p.name for pattern in ("*.bin", "*.pt", "*.pth", "*.ckpt") for p in folder.glob(pattern)]
    if pickles:
        raise CheckpointError(
            f"{folder} holds only pickled weights ({pickles[0]}), which can run code when opened; "
            "convert them to safetensors first."
        )
    raise CheckpointError(f"{folder} holds no {SINGLE}; give the folder that holds the weights.")


def equal(a: TensorInfo, b: TensorInfo) -> bool:
    """Whether two tensors hold the same bytes; both may be larger than memory."""
    if (a.dtype, a.shape, a.nbytes) != (b.dtype, b.shape, b.nbytes):
        return False
    with a.file.open("rb") as first, b.file.open("rb") as second:
        first.seek(a.start)
        second.seek(b.start)
        rest = a.nbytes
        while rest:
            count = min(rest, 1 << 22)
            if first.read(count) != second.read(count):
                return False
            rest -= count
    return True


def fingerprint(folder: Path) -> str:
    """Return a sha256 over config and weights, to know a checkpoint again."""
    digest = hashlib.sha256()
    for file in [folder / "config.json", *weight_files(folder)]:
        digest.update(file.name.encode())
        with file.open("rb") as stream:
            while chunk := stream.read(1 << 22):
                digest.update(chunk)
    return digest.hexdigest()


def assemble(parts: Iterable[Path], out: Path, *, max_shard_bytes: int = MAX_SHARD_BYTES) -> list[Path]:
    """Copy the tensors of many safetensors files into as few standard shards as possible, with an index if needed.

    Parameters
    ----------
    parts : safetensors files, in the order in which their tensors shall be written
    out : an existing folder
    max_shard_bytes : data bytes of one shard; a larger tensor has a shard of its own

    Returns
    -------
    The files written. The same parts give the same bytes.
    """
    shards: list[dict[str, TensorInfo]] = [{}]
    size = 0
    for part in parts:
        for name, info in _header(part).items():
            if shards[-1] and size + info.nbytes > max_shard_bytes:
                shards.append({})
                size = 0
            shards[-1][name] = info
            size += info.nbytes
    if len(shards) == 1:
        names = [SINGLE]
    else:
        names = [f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors" for i in range(len(shards))]
    for name, shard in zip(names, shards, strict=True):
        _write_shard(out / name, shard)
    if len(shards) > 1:
        total = sum(info.nbytes for shard in shards for info in shard.values())
        weight_map = {tensor: name for name, shard in zip(names, shards, strict=True) for tensor in shard}
        index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
        (out / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
    return [out / name for name in names]


def _write_shard(path: Path, tensors: dict[str, TensorInfo]) -> None:
    entries: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for name, info in tensors.items():
        entries[name] = {
            "dtype": info.dtype,
            "shape": list(info.shape),
            "data_offsets": [offset, offset + info.nbytes],
        }
        offset += info.nbytes
    head = json.dumps(entries, separators=(",", ":")).encode()
    head += b" " * (-len(head) % 8)
    with path.open("wb") as target:
        target.write(struct.pack("<Q", len(head)) + head)
        for info in tensors.values():
            with info.file.open("rb") as source:
                source.seek(info.start)
                _copy(source, target, info.nbytes)
        target.flush()
        os.fsync(target.fileno())


def _copy(source: Any, target: Any, count: int) -> None:
    while count:
        chunk = source.read(min(count, 1 << 22))
        if not chunk:
            raise CheckpointError(f"{source.name} ended while it was being copied; is another program writing to it?")
        target.write(chunk)
        count -= len(chunk)


def _header(file: Path) -> dict[str, TensorInfo]:
    try:
        size = file.stat().st_size
        with file.open("rb") as stream:
            prefix = stream.read(8)
            length = struct.unpack("<Q", prefix)[0] if len(prefix) == 8 else -1
            if not 0 <= length <= min(size - 8, _MAX_HEADER_BYTES):
                raise CheckpointError(f"{file} is cut short or not a safetensors file; copy or download it again.")
            raw = stream.read(length)
    except OSError as error:
        raise CheckpointError(f"{file} cannot be read ({error.strerror}); see to its permissions.") from None
    try:
        entries = json.loads(raw, object_pairs_hook=_without_doubles)
        if not all(isinstance(v, str) for v in entries.pop("__metadata__", {}).values()):
            raise TypeError
        found = {
            name: TensorInfo(
                file,
                str(e["dtype"]),
                tuple(map(_whole, e["shape"])),
                *(8 + length + _whole(o) for o in e["data_offsets"]),
            )
            for name, e in entries.items()
        }
    except (ValueError, KeyError, TypeError, AttributeError, IndexError, RecursionError):
        raise CheckpointError(f"the header of {file} is damaged; copy or download it again.") from None
    found = dict(sorted(found.items(), key=lambda item: (item[1].start, item[1].end)))
    end = 8 + length
    for name, info in found.items():
        bits = _BITS.get(info.dtype)
        if bits is None or info.numel * bits != 8 * info.nbytes:
            raise CheckpointError(f"the header of {file} gives {name!r} a shape at odds with its size; copy it again.")
        if info.start != end:
            raise CheckpointError(
                f"the header of {file} lays {name!r} over other tensors or behind a gap; copy it again."
            )
        end = info.end
    if end != size:
        raise CheckpointError(f"{file} is cut short or has bytes left over; copy or download it again.")
    return found


def _without_doubles(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("a name is given twice")
    return found


def _whole(value: Any) -> int:
    if type(value) is not int or value < 0:
        raise ValueError(f"{value!r} is no size")
    return value


def _exists(text: str) -> bool:
    """Whether there is such a path; what can be no path is not there."""
    try:
        return Path(text).expanduser().exists()
    except (OSError, ValueError, RuntimeError):
        return False


def copy_extras(source: Path, out: Path) -> list[str]:
    """Copy what belongs to a model but is neither weights nor config: tokenizer, templates, licence."""
    copied = []
    for path in sorted(source.iterdir()):
        name = path.name
        wanted = (
            name.startswith(_EXTRA_PREFIXES)
            or name in {"preprocessor_config.json", "processor_config.json", "video_preprocessor_config.json"}
            or name.endswith((".model", ".jinja"))
        )
        if path.is_file() and wanted:
            shutil.copyfile(path, out / name)
            copied.append(name)
    return copied


def _download(repo: str) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(repo, allow_patterns=_HUB_FILES))
    except HFValidationError:
        raise ModelNotFoundError(
            f"{repo!r} is neither a folder nor a hub id; write org/name or a local path."
        ) from None
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        raise ModelNotFoundError(
            f"there is no folder {repo!r} here, and the hub did not give a model of that name ({_short(error)}); "
            "check the name, your connection and your token."
        ) from None


def _short(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return (lines[0] if lines else type(error).__name__)[:120].rstrip(".")
