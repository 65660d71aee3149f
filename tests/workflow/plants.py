"""Faults planted into a child of the warm process, each a function without arguments."""

from __future__ import annotations

import errno
import os
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from paredown.core import audit, effects, files, policy_file, sequential, surgery
from paredown.workflow import journal, plan, proof
from paredown.workflow import steps as steps_module
from paredown.workflow.record import Proof


def audit_off() -> None:
    """Nobody checks surgery any more."""
    audit.check = lambda *_: None


def experts_skipped() -> None:
    """Surgery believes that it cut, and cuts nothing."""
    surgery.apply = lambda module, part, edits: effects.edited(part, edits)


def experts_skipped_unaudited() -> None:
    """And nobody looks."""
    experts_skipped()
    audit_off()


def router_permuted() -> None:
    """The router's rows no longer belong to their experts."""
    honest = surgery.apply

    def apply(module: Any, part: Any, edits: Any) -> Any:
        after = honest(module, part, edits)
        if after.experts is not None:
            weight = module.get_submodule(after.experts.router).weight
            with torch.no_grad():
                weight.copy_(weight.roll(1, 0))
        return after

    surgery.apply = apply


def router_permuted_unaudited() -> None:
    """And nobody looks."""
    router_permuted()
    audit_off()


def _after_assembling(change: Any) -> None:
    honest = files.assemble

    def assemble(parts: Any, out: Path, **options: Any) -> Any:
        written = honest(parts, out, **options)
        tensors = load_file(out / files.SINGLE)
        change(tensors)
        save_file(tensors, out / files.SINGLE, metadata={"format": "pt"})
        return written

    files.assemble = assemble


NORM = "model.layers.2.post_attention_layernorm.weight"


def norm_dropped() -> None:
    """One tensor is not written."""
    _after_assembling(lambda tensors: tensors.pop(NORM))


def norm_perturbed() -> None:
    """One tensor is written with other values."""
    _after_assembling(lambda tensors: tensors.__setitem__(NORM, tensors[NORM] + 0.5))


def norm_not_finite() -> None:
    """One value is written as nan."""
    _after_assembling(lambda tensors: tensors[NORM].__setitem__(3, float("nan")))


def tensor_left_over() -> None:
    """A tensor too many is written."""
    _after_assembling(lambda tensors: tensors.__setitem__("model.layers.9.extra", torch.ones(7)))


def tensor_halved() -> None:
    """A tensor is written in half the precision: it opens, but its size is not what was planned."""
    _after_assembling(lambda tensors: tensors.__setitem__(NORM, tensors[NORM].bfloat16().float().bfloat16()))


def bytes_misplanned() -> None:
    """The plan is off by one number."""
    honest = plan.plan_step

    def plan_step(*args: Any, **options: Any) -> Any:
        planned = honest(*args, **options)
        return planned.model_copy(update={"bytes_after": planned.bytes_after + 4})

    plan.plan_step = plan_step


def config_left_behind() -> None:
    """The config does not follow the weights."""
    surgery.new_config = lambda config, *_, **__: config


def no_blocks() -> None:
    """No block may be opened: whoever resumes a finished step must not need one."""

    def opened(self: object, index: int) -> None:
        raise AssertionError("a block was opened")

    sequential.OnDisk.open = opened


def no_proof() -> None:
    """Proofs are taken for granted, to save time."""
    proof.prove = lambda *_, **__: Proof(
        passed=True, loader="transformers", max_abs_logit_difference=0.0, generated="", bytes_match_plan=True,
        weights_match_config=True, finite=True, checks=[],
    )  # fmt: skip


def unwritable() -> None:
    """The operating system says that folders cannot be written; to root it never says so."""
    honest = os.access
    os.access = lambda path, mode, **options: False if mode == os.W_OK else honest(path, mode, **options)


def disk_full() -> None:
    """The disk is full after the second block."""
    honest = journal.write_tensors

    def write_tensors(file: Path, *args: Any, **options: Any) -> None:
        if file.name == "block-00002.safetensors":
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(file))
        honest(file, *args, **options)

    journal.write_tensors = steps_module.write_tensors = write_tensors


def weights_unreadable() -> None:
    """The weight file may not be opened."""
    honest = Path.open

    def opened(self: Path, *args: Any, **options: Any) -> Any:
        if self.name == files.SINGLE:
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(self))
        return honest(self, *args, **options)

    Path.open = opened


def other_policy() -> None:
    """What is written keeps less than what was at work."""
    honest = policy_file.write

    def write(folder: Path, policies: Any) -> None:
        if folder.name == "whole":
            policies = [policy.model_copy(update={"keep": 0.2}) for policy in policies]
        honest(folder, policies)

    policy_file.write = write
