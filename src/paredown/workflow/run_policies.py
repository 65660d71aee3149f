"""The policies that a recipe ends in: prepared on the model that the other steps left, judged and proven at work.

They act in a whole model, so that model is opened in memory, whatever its size; its weights are not changed.
"""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor

from paredown.core import checkpoint, files, policy_file
from paredown.core.calibration import Batch
from paredown.core.checkpoint import Model
from paredown.core.durable import write_tensors, write_text
from paredown.core.method import Policy, Progress
from paredown.core.resources import peak_memory
from paredown.errors import ProofError
from paredown.workflow import policies, proof
from paredown.workflow.journal import Journal
from paredown.workflow.record import Planned, Proof, StepRecord

PROOF_SEQUENCES, PROOF_PROMPT, PROOF_STEPS = 2, 32, 8
"""Of the proof: rows, tokens that are read in one pass, and tokens that come one by one behind them."""


class Acting:
    """The policy steps of one run.

    Parameters
    ----------
    wanted : the policies as the recipe names them
    before : how many steps of the recipe come before
    original, source : folders of the recipe's model and of what the steps before left

    Attributes
    ----------
    ready : the policies after preparation
    """

    def __init__(
        self,
        wanted: Sequence[Policy],
        journal: Journal,
        *,
        before: int,
        original: Path,
        source: Path,
        device: str,
        progress: Progress | None,
    ) -> None:
        self.wanted, self.journal, self.device, self.progress = list(wanted), journal, device, progress
        self.ready: tuple[Policy, ...] = ()
        self._before, self._original, self._source = before, original, source
        self._alone = before == 0

    @cached_property
    def _model(self) -> Model:
        model = checkpoint.load(self._source, device=self.device, policies=False)
        if not self._alone:
            model.original = self._original
        return model

    def prepare(self, data: Batch | None, plans: Sequence[Planned], seed: int) -> list[StepRecord]:
        """Prepare all policies and return their records; what the journal holds is not done again."""
        records = []
        for number, (policy, planned) in enumerate(zip(self.wanted, plans, strict=True), start=1):
            if self.progress is not None:
                self.progress(number - 1, len(self.wanted), f"{policy.name}: preparing")
            records.append(self._step(number, policy, planned, data if policy.needs else None, seed))
            if self.progress is not None:
                self.progress(number, len(self.wanted), f"{policy.name}: preparing")
        return records

    def _step(self, number: int, policy: Policy, planned: Planned, data: Batch | None, seed: int) -> StepRecord:
        index = self._before + number
        folder = self.journal.step(index, lambda state: state).folder
        done, final, aside = folder / "step.json", folder / "prepared", folder / "prepared.writing"
        began = time.perf_counter()
        if not final.exists():
            shutil.rmtree(aside, ignore_errors=True)
            aside.mkdir()
            (ready,) = policies.prepare([policy], self._model, data, seed=seed, folder=aside, progress=self.progress)
            policy_file.write(aside, [ready])
            aside.rename(final)
        # Read back whether it was written now or by a run that was killed: both go on with the same.
        (ready,) = policy_file.read(final)
        self.ready = (*self.ready, ready)
        if done.exists():
            return StepRecord.model_validate_json(done.read_text(encoding="utf-8"))
        record = StepRecord(
            index=index,
            kind="policy",
            method=ready.name,
            title=ready.title,
            year=ready.year,
            arxiv=ready.arxiv,
            axis=ready.axis,
            fields=policy_file.portable(ready, number)[0],
            keep=ready.keep,
            seed=seed,
            data=data.record() if data is not None else {},
            plan=planned,
            changes=[],
            touched_share=0.0,
            parameters_before=planned.parameters_before,
            parameters_after=planned.parameters_after,
            seconds=time.perf_counter() - began,
            peak_memory_bytes=peak_memory(),
            seconds_by_stage={},
            coverage={},
            warnings=list(data.notes) if data is not None else [],
        )
        write_text(done, json.dumps(record.model_dump(mode="json"), indent=1))
        return record

    @property
    def _last(self) -> Path:
        return self.journal.folder / f"step-{self._before + len(self.wanted)}"

    def judged(self, heldout: Batch) -> dict[str, Tensor]:
        """Return losses of the original and of the result under its policies, and their divergence."""
        file = self._last / "judged.safetensors"
        if not file.exists():
            original = self._model if self._alone else checkpoint.load(
                self._original, device=self.device, policies=False
            )  # fmt: skip
            found = policies.text(
                policies.Reader(original),
                policies.Reader(self._model, self.ready),
                heldout.input_ids,
                progress=self.progress,
            )
            write_tensors(file, {"before": found.before, "after": found.after, "kl": found.kl})
        judged: dict[str, Tensor] = load_file(file)
        return judged

    def copy(self) -> Path:
        """Return a copy of a checkpoint that no step changed."""
        final, aside = self._last / "checkpoint", self._last / "checkpoint.writing"
        if final.exists():
            return final
        shutil.rmtree(aside, ignore_errors=True)
        aside.mkdir(parents=True)
        names = ["config.json", "generation_config.json", *(f.name for f in files.weight_files(self._original))]
        if not (self._original / files.SINGLE).is_file():
            names.append(files.INDEX)
        for name in names:
            if (self._original / name).exists():
                shutil.copyfile(self._original / name, aside / name)
        files.copy_extras(self._original, aside)
        aside.rename(final)
        return final

    def prove(self, whole: Path, heldout: Batch, earlier: Proof | None) -> Proof:
        """Open the result in a fresh process, with its policies, and compare what it computes with what we do.

        Parameters
        ----------
        whole : the checkpoint with its ``policy.yaml``
        earlier : the proof of the weights, if some were changed

        Raises
        ------
        ProofError
            Naming what is not as it was in memory.
        """
        file = self._last / "policy-proof.safetensors"
        length = min(PROOF_PROMPT + PROOF_STEPS, heldout.input_ids.shape[1])
        ids = heldout.input_ids[:PROOF_SEQUENCES, :length].contiguous()
        # One token more than is read: a reader predicts the last one too.
        read = max(1, length - PROOF_STEPS)
        reader = policies.Reader(self._model, self.ready, through_cache=True)
        steps = [logits.float().cpu() for logits in reader.logits(ids, read, None)]
        write_tensors(file, {"input_ids": ids, "logits": torch.stack(steps, dim=1)})
        names = [policy.name for policy in self.ready]
        shown = proof.prove_policies(whole, file, names, self._model.tokenizer, self.device)
        if earlier is None:
            if files.fingerprint(whole) != files.fingerprint(self._original):
                raise ProofError("the copy of the checkpoint is not its original; it was not given its final name.")
            equal = "config and weights equal the original's, byte for byte"
            return shown.model_copy(update={"checks": [equal, *shown.checks]})
        return shown.model_copy(
            update={
                "bytes_match_plan": earlier.bytes_match_plan,
                "max_abs_logit_difference": max(earlier.max_abs_logit_difference, shown.max_abs_logit_difference),
                "checks": [*earlier.checks, *shown.checks],
            }
        )
