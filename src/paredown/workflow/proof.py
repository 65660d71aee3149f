"""The proof: a fresh process opens what was written and finds in it the model that was in memory.

A result that plain transformers can open is opened by plain transformers, in a process that never imports Paredown.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

from paredown.core import files
from paredown.core.resources import available_memory
from paredown.errors import ProofError
from paredown.workflow.record import Planned, Proof

TOLERANCE = 1e-3
"""Largest difference of logits, relative to their spread; the same arithmetic gives zero."""

SHARE_OF_MEMORY = 0.5
"""A result that is larger than this share of the memory at hand is read block by block instead of opened whole."""

_CHILD = r"""
import json, sys
folder, reference, loader, threads, rows = sys.argv[1:6]
import torch
torch.set_num_threads(int(threads))
from safetensors.torch import load_file
import transformers
transformers.utils.logging.set_verbosity_error()
transformers.utils.logging.disable_progress_bar()
known = load_file(reference)
if loader == "transformers":
    config = transformers.AutoConfig.from_pretrained(folder)
    cls = getattr(transformers, config.architectures[0])
    model, report = cls.from_pretrained(folder, dtype="auto", use_safetensors=True, output_loading_info=True)
    wrong = [str(k) for key in ("missing_keys", "unexpected_keys", "mismatched_keys") for k in report[key]]
    if "paredown" in sys.modules:
        raise SystemExit("paredown was imported")
elif loader == "policies":
    import paredown
    from paredown.core.stepwise import stepwise
    model = paredown.load(folder, device=sys.argv[6])
    wrong = [] if model.policies else ["policy.yaml names no policy"]
elif loader == "block by block":
    from paredown.core import checkpoint, sequential
    skeleton = checkpoint.skeleton(folder)
    source, model, wrong = sequential.OnDisk(skeleton, device=sys.argv[6]), None, list(skeleton.unknown)
else:
    import paredown
    model, wrong = paredown.load(folder).hf, []
found = {"wrong": sorted(wrong)[:5], "finite": True}
step = int(rows)
if model is None:
    # Values that are not finite stop the reading.
    stream = sequential.Stream("proof", known["input_ids"], batch_size=step)
    with source.open_ends(head=False):
        stream.start(source)
    for block in skeleton.model.anatomy.language.blocks:
        stream.advance(source.open(block.index), index=block.index)
        source.close(block.index)
    with source.open_ends(head=True), torch.no_grad():
        logits = torch.cat([part.float().cpu() for part in stream.logits(source, step)])
elif loader == "policies":
    found["finite"] = all(bool(torch.isfinite(p).all()) for p in model.hf.parameters())
    found["policies"] = [policy.name for policy in model.policies]
    ids, steps = known["input_ids"].to(model.hf.device), known["logits"].shape[1]
    read = ids.shape[1] - steps
    passes = stepwise(model.hf, {"input_ids": ids[:, :read]}, ids[:, read:-1])
    logits = torch.stack([part.float().cpu() for part in passes], dim=1)
else:
    model = model.to(sys.argv[6]).eval()
    found["finite"] = all(bool(torch.isfinite(p).all()) for p in model.parameters())
    with torch.no_grad():
        ids = known["input_ids"].to(model.device)
        logits = torch.cat([model(input_ids=ids[i:i + step]).logits.float().cpu() for i in range(0, len(ids), step)])
found["shape"] = list(logits.shape)
difference = torch.tensor(float("inf"))
if logits.shape == known["logits"].shape:
    difference = (logits - known["logits"].float()).abs().max()
found["difference"] = float(difference) if torch.isfinite(difference) else 1e30
found["spread"] = float(known["logits"].float().std())
found["generated"] = []
if hasattr(model, "generate"):
    try:
        out = model.generate(ids[:1, :16], max_new_tokens=16, min_new_tokens=16, do_sample=False,
                             attention_mask=torch.ones_like(ids[:1, :16]), pad_token_id=0)
        found["generated"] = out[0, 16:].tolist()
    except Exception as error:
        found["generate_error"] = f"{type(error).__name__}: {str(error)[:120]}"
print("\n" + json.dumps(found))
"""


def prove(
    folder: Path, reference: Path, *, loader: str, rows: int, plan: Planned, tokenizer: Any, device: str = "cpu"
) -> Proof:
    """Open ``folder`` in a fresh process and compare.

    Parameters
    ----------
    folder : the written checkpoint
    reference : safetensors with ``input_ids [N, T]`` and the ``logits [N, T, V]`` that the model in memory gave
    loader : ``transformers`` or ``paredown.load``
    rows : sequences in one forward, as when the reference was taken
    plan : what the last step was to give
    tokenizer : turns the generated tokens into text; may be None

    Raises
    ------
    ProofError
        Naming the first thing that is not as it was in memory.
    """
    nbytes = sum(info.nbytes for info in files.headers(folder).values())
    whole = nbytes <= SHARE_OF_MEMORY * available_memory()
    found = _in_fresh_process(folder, reference, loader if whole else "block by block", rows, device)
    match = not plan.exact or nbytes == plan.bytes_after
    generated = tokenizer.decode(found["generated"]) if tokenizer is not None and found["generated"] else ""
    limit = TOLERANCE * max(1.0, found["spread"])
    failures = []
    if found["wrong"]:
        failures.append(f"weights and config do not agree ({found['wrong'][0]})")
    if not found["finite"]:
        failures.append("some weights are not finite numbers")
    if not found["difference"] <= limit:
        failures.append(f"its logits differ by up to {found['difference']:.3g} from those in memory")
    if "generate_error" in found:
        failures.append(f"it does not generate ({found['generate_error']})")
    if not match:
        failures.append(f"it holds {nbytes:,} bytes of weights where the plan said {plan.bytes_after:,}")
    if failures:
        raise ProofError(
            f"the result was written and opened again, but {' and '.join(failures)}; it was not given its final name."
        )
    checks = [
        f"opened in a fresh process with {'plain transformers' if loader == 'transformers' else 'paredown.load'}"
        if whole
        else "read block by block by Paredown in a fresh process, and not generated with: opened whole, it would take "
        f"more than {SHARE_OF_MEMORY:.0%} of the memory at hand",
        "every weight of the config is in the file and none is left over",
        "all weights are finite",
        f"logits of {found['shape'][0]} sequences of {found['shape'][1]} tokens differ by at most "
        f"{found['difference']:.2g} from those in memory",
        f"bytes of weights: {nbytes:,}" + (" as planned" if plan.exact else ""),
    ]
    if found["generated"]:
        checks.append("it generates")
    return Proof(
        passed=True,
        loader=loader,
        max_abs_logit_difference=found["difference"],
        generated=generated,
        bytes_match_plan=match,
        weights_match_config=not found["wrong"],
        finite=found["finite"],
        checks=checks,
    )


def prove_policies(folder: Path, reference: Path, names: list[str], tokenizer: Any, device: str = "cpu") -> Proof:
    """Open ``folder`` with `paredown.load` in a fresh process, and compare what it computes under its policies.

    Parameters
    ----------
    folder : the written checkpoint with its ``policy.yaml``
    reference : safetensors with ``input_ids [N, T]`` and the ``logits [N, n, V]`` for the last ``n`` of its tokens that
        the model in memory gave: after the tokens before them in one pass, and after each of them but the last
    names : the policies that must be attached
    tokenizer : turns the generated tokens into text; may be None

    Raises
    ------
    ProofError
        Naming what is not as it was in memory.
    """
    found = _in_fresh_process(folder, reference, "policies", 1, device)
    failures = []
    if found.get("policies") != names:
        failures.append(f"its policies are {found.get('policies')} and not {names}")
    if not found["finite"]:
        failures.append("some weights are not finite numbers")
    if not found["difference"] <= TOLERANCE * max(1.0, found["spread"]):
        failures.append(f"under its policies its logits differ by up to {found['difference']:.3g} from those in memory")
    if "generate_error" in found:
        failures.append(f"it does not generate ({found['generate_error']})")
    if failures:
        raise ProofError(
            f"the result was written and opened again, but {' and '.join(failures)}; it was not given its final name."
        )
    rows, steps = found["shape"][:2]
    return Proof(
        passed=True,
        loader="paredown.load",
        max_abs_logit_difference=found["difference"],
        generated=tokenizer.decode(found["generated"]) if tokenizer is not None and found["generated"] else "",
        bytes_match_plan=True,
        weights_match_config=True,
        finite=found["finite"],
        checks=[
            f"opened in a fresh process with paredown.load, which attached {' and '.join(names)}",
            f"under them, logits of {rows} sequences behind a prompt and {steps - 1} steps differ by at most "
            f"{found['difference']:.2g} from those in memory",
            *(["it generates under them"] if found["generated"] else []),
        ],
    )


def _in_fresh_process(folder: Path, reference: Path, loader: str, rows: int, device: str) -> dict[str, Any]:
    package = str(Path(__file__).parents[2])
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "PYTHONPATH": package} if loader != "transformers" else {
        **os.environ, "HF_HUB_OFFLINE": "1"
    }  # fmt: skip
    arguments = [str(folder), str(reference), loader, str(torch.get_num_threads()), str(rows), device]
    done = subprocess.run(
        [sys.executable, "-c", _CHILD, *arguments], capture_output=True, text=True, check=False, env=environment
    )
    if done.returncode:
        lines = [line for line in done.stderr.strip().splitlines() if line.strip()] or ["no message"]
        raise ProofError(
            f"the result was written but does not open in a fresh process ({lines[-1][:200].rstrip('.')}); "
            "it was not given its final name."
        )
    parsed = json.loads(done.stdout.strip().splitlines()[-1])
    assert isinstance(parsed, dict)
    return parsed
