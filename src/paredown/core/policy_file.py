"""``policy.yaml``: the policies that belong to a checkpoint folder, next to its weights.

    format: 1
    policies:
      - method: duo-attention
        fields: {keep: 0.5, gates: [[0.9, 0.1], [0.2, 0.8]]}
        files: {}
      - method: loco
        fields: {keep: 0.5}
        files: {weights: policies/2-weights.safetensors}

``fields`` are the method's hyper-parameters and what it learned, as far as that is small; ``files`` names the fields
that hold learned weights, as safetensors files below the folder. Reading builds registered methods from checked fields
and runs nothing else.
"""

from __future__ import annotations

import hashlib
import re
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from paredown import registry
from paredown.core.method import Policy
from paredown.errors import CheckpointError, ParedownError

NAME = "policy.yaml"
FOLDER = "policies"
_LARGEST = 1 << 26
_FILE = re.compile(rf"{FOLDER}/[\w-]+\.safetensors")
_HEAD = "# What acts on this model while it runs; paredown.load attaches it.\n"


def portable(policy: Policy, number: int) -> tuple[dict[str, Any], dict[str, Path]]:
    """Return a policy's fields with learned files under the names that they have in a folder, and those files.

    Parameters
    ----------
    number : position among the folder's policies, counted from 1; part of the files' names

    Returns
    -------
    fields : plain data
    files : where the file of each such field lies now
    """
    fields = policy.model_dump(mode="json")
    files = {
        name: Path(value) for name, value in fields.items() if isinstance(value, str) and value.endswith(".safetensors")
    }
    for name in files:
        fields[name] = f"{FOLDER}/{number}-{name.replace('_', '-')}.safetensors"
    return fields, files


def identity(policy: Policy) -> dict[str, Any]:
    """Return what a policy is, down to the bytes of its learned files and not where they lie."""
    fields, files = portable(policy, 1)
    found = {name: hashlib.sha256(path.read_bytes()).hexdigest() for name, path in files.items() if path.is_file()}
    return {"method": policy.name, "fields": fields | found}


def write(folder: Path, policies: Sequence[Policy]) -> None:
    """Write ``policy.yaml`` and learned files into a checkpoint folder."""
    listed = []
    for number, policy in enumerate(policies, start=1):
        fields, files = portable(policy, number)
        for name, source in files.items():
            target = folder / fields[name]
            target.parent.mkdir(exist_ok=True)
            shutil.copyfile(source, target)
        kept = {name: value for name, value in fields.items() if name not in files}
        listed.append({"method": policy.name, "fields": kept, "files": {name: fields[name] for name in files}})
    text = yaml.safe_dump({"format": 1, "policies": listed}, sort_keys=False, allow_unicode=True, width=120)
    (folder / NAME).write_text(_HEAD + text, encoding="utf-8")


def read(folder: Path) -> tuple[Policy, ...]:
    """Return the policies of a checkpoint folder, in order; none where it has no ``policy.yaml``.

    Raises
    ------
    CheckpointError
        If the file is damaged, names a method that is not there, or points outside the folder.
    """
    file = folder / NAME
    if not file.is_file():
        return ()
    mend = "mend it, delete it, or load with policies=False"
    try:
        if file.stat().st_size > _LARGEST:
            raise CheckpointError(f"{file} is larger than {_LARGEST >> 20} MiB; {mend}.")
        raw = yaml.safe_load(file.read_text(encoding="utf-8"))
        listed = [(str(one["method"]), dict(one["fields"]), dict(one.get("files") or {})) for one in raw["policies"]]
        known = raw.get("format")
    except (OSError, UnicodeDecodeError, yaml.YAMLError, KeyError, TypeError, ValueError, AttributeError) as error:
        raise CheckpointError(f"{file} cannot be read ({type(error).__name__}); {mend}.") from None
    if known != 1:
        raise CheckpointError(f"{file} is of the format {known!r}, which this version does not know; {mend}.")
    found: list[Policy] = []
    for method, fields, files in listed:
        for name, path in files.items():
            if not isinstance(path, str) or not _FILE.fullmatch(path) or not (folder / path).is_file():
                raise CheckpointError(f"{file} names the file {path!r}, which is not in the folder; {mend}.")
            fields[name] = str(folder / path)
        try:
            made = registry.create(method, **fields)
        except ParedownError as error:
            raise CheckpointError(f"{file} cannot be used ({str(error).rstrip('.')}); {mend}.") from None
        if not isinstance(made, Policy):
            raise CheckpointError(f"{file} names {method}, which is a {made.kind} and no policy; {mend}.")
        found.append(made)
    return tuple(found)
