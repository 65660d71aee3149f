"""A run: plan -> journal -> steps -> gate -> proof -> report, and the result under its final name only when whole.

Blocks are read from disk one at a time and written as they are done, whatever the model's size. Held-out sequences
pass the blocks before and after, so that the gate's numbers cost two more passes and no second model in memory.
"""

from __future__ import annotations

import json
import shutil
import sys
import time
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from safetensors.torch import load_file

import paredown
from paredown.core import calibration, checkpoint, files, policy_file, surgery
from paredown.core.calibration import Batch
from paredown.core.checkpoint import Skeleton
from paredown.core.durable import write_json, write_text
from paredown.core.method import Compressor, Policy, Progress
from paredown.core.resources import available_memory
from paredown.errors import DataError, GateError, OutputError, ParedownError, ProofError
from paredown.report import card, html
from paredown.workflow import intervals, journal, measure, plan, proof
from paredown.workflow.journal import Journal
from paredown.workflow.recipe import GateSpec, Recipe
from paredown.workflow.record import Gate, Planned, RunRecord, Score, read_record
from paredown.workflow.run_policies import Acting
from paredown.workflow.steps import Result, Step, from_end_to_end, reopened, rows_at_once

_SPEED_SHARE_OF_MEMORY = 0.4


def run(
    recipe: Recipe,
    out: str | Path,
    *,
    resume: bool = False,
    force: bool = False,
    device: str = "cpu",
    speed: bool = True,
    progress: Progress | None = None,
    tell: Callable[[list[Planned]], None] | None = None,
) -> RunRecord:
    """Carry out a recipe and write a checkpoint folder with its report.

    Parameters
    ----------
    recipe : what to do to which model
    out : the folder to write; it must not exist unless ``force``
    resume : go on with an interrupted run of the same recipe
    force : replace an output folder
    device : where blocks run
    speed : also measure speed and memory before and after
    progress : called as ``progress(done, total, text)``
    tell : called with the plan before the work begins

    Returns
    -------
    The record of the run, as it stands in ``out/paredown/run.json``.

    Raises
    ------
    GateError
        If quality fell beyond the gate; the journal stays, so that ``resume`` with another gate costs nothing.
    ProofError
        If the written result is not the model that was in memory; nothing is left behind.
    ParedownError
        For whatever the user can mend; nothing is left behind.
    """
    methods, policies = plan.divided(recipe)
    folder = files.locate(recipe.model)
    # First of all: hours of hashing a model in vain would be no kindness.
    journal.check_out(Path(out), force=force or resume)
    whole = _Run(recipe, methods, policies, folder, Path(out), resume, force, device, speed, progress)
    try:
        return whole.carry_out(tell)
    except GateError:
        raise
    except ParedownError as error:
        # A journal that was there before stays as good as it was, unless what it led to is wrong.
        if isinstance(error, ProofError) or not whole.journal.resumed:
            whole.journal.discard()
        raise
    except OSError as error:
        raise OutputError(
            f"{error.filename or whole.journal.folder} cannot be used ({error.strerror or error}); what is done so far "
            "is kept, so mend that and go on with --resume."
        ) from error
    finally:
        whole.journal.release()


class _Run:
    def __init__(
        self,
        recipe: Recipe,
        methods: Sequence[Compressor],
        policies: Sequence[Policy],
        folder: Path,
        out: Path,
        resume: bool,
        force: bool,
        device: str,
        speed: bool,
        progress: Progress | None,
    ) -> None:
        self.started = time.perf_counter()
        self.recipe, self.methods, self.folder, self.device = recipe, methods, folder, device
        self.policies = policies
        self.speed, self.progress = speed, progress
        self.gate = GateSpec.parse(recipe.gate)
        self.foretold: list[Planned] | None = None
        skeleton = checkpoint.skeleton(folder)
        self.heldout = self._heldout(skeleton)
        self.calibration = self._calibration(skeleton)
        identity = {
            "recipe": recipe.identity(),
            "model": files.fingerprint(folder),
            "calibration data": self.calibration.fingerprint if self.calibration is not None else None,
            "held-out data": self.heldout.fingerprint if self.heldout is not None else None,
            "versions": {k: v for k, v in measure.versions().items() if k in ("torch", "transformers", "paredown")},
            "device": device,
        }
        reads = [folder, *(Path(d) for d in (recipe.data.calibration, recipe.data.heldout) if d is not None)]
        self.journal = Journal(out, identity, resume=resume, force=force, reads=reads)

    def carry_out(self, tell: Callable[[list[Planned]], None] | None) -> RunRecord:
        if self.journal.finished:
            return self._tidy_up()
        if tell is not None:
            self.foretold = plan.plan(self.recipe, progress=self.progress)
            tell(self.foretold)
        heldout, source = self.heldout, self.folder
        results: list[Result] = []
        for number, method in enumerate(self.methods, start=1):
            result = self._step(number, method, source, heldout)
            results.append(result)
            source = result.folder
        acting = self._act(source, results)
        scores, gate = self._judge(len(self.methods), heldout, acting)
        if not gate.passed:
            raise GateError(_gate_sentence(gate))
        last = reopened(results[-1].folder)
        loader, shown = surgery.loads_in(last.model.config), None
        if heldout is not None and self.methods:
            shown = proof.prove(
                source,
                self.journal.folder / f"step-{len(self.methods)}" / "proof.safetensors",
                loader=loader,
                rows=rows_at_once(last, heldout),
                plan=results[len(self.methods) - 1].record.plan,
                tokenizer=last.model.tokenizer,
                device=self.device,
            )
        result_folder = results[-1].folder
        if acting is not None:
            result_folder = self._assemble(results[-1].folder, acting)
            if heldout is not None:
                shown = acting.prove(result_folder, heldout, shown)
        record = self._record(results, scores, gate, shown, last, heldout, result_folder)
        self._publish(record, results, acting)
        return record

    def _act(self, source: Path, results: list[Result]) -> Acting | None:
        """Prepare the policies that the recipe ends in; their results are the weights as they are."""
        if not self.policies:
            return None
        first = len(self.methods)
        acting = Acting(
            self.policies,
            self.journal,
            before=first,
            original=self.folder,
            source=source,
            device=self.device,
            progress=self.progress,
        )
        model = checkpoint.skeleton(source).model
        plans = [plan.plan_policy(model, policy, copies=not first and not n) for n, policy in enumerate(self.policies)]
        records = acting.prepare(self.calibration, plans, self.recipe.seed)
        folder = source if first else acting.copy()
        results += [Result(record, folder) for record in records]
        return acting

    def _tidy_up(self) -> RunRecord:
        """Return the record of a run that was killed when its result had its final name already."""
        record = read_record(self.journal.out)
        if str(GateSpec(kind=record.gate.kind, limit=record.gate.limit)) != str(self.gate):
            raise OutputError(
                f"{self.journal.out} holds the finished result of this run, judged by another gate; "
                "run again with --force and without --resume."
            )
        self.journal.discard()
        return record

    def _step(self, number: int, method: Compressor, source: Path, heldout: Batch | None) -> Result:
        skeleton = checkpoint.skeleton(source)
        step = Step(
            number,
            method,
            source,
            self.folder,
            skeleton,
            self.journal.step(number, skeleton.disk_names),
            self.calibration,
            heldout,
            self.recipe.seed,
            self.device,
            self.progress,
        )
        return step.known() or step.carry_out(self._plan(number, method, source))

    def _judge(self, steps: int, heldout: Batch | None, acting: Acting | None) -> tuple[list[Score], Gate]:
        """Compare the last step's result with the original model on the same held-out tokens."""
        kind, limit = self.gate.kind, self.gate.limit
        if heldout is None:
            return [], Gate(kind="none", limit=None, value=None, passed=True)
        file = self.journal.folder / f"step-{steps}" / "judged.safetensors"
        if acting is not None:
            judged = acting.judged(heldout)
        else:
            # Each step has compared its result with its own start; several steps are compared from end to end.
            alone = steps == 1
            judged = (
                load_file(file)
                if alone
                else from_end_to_end(self.folder, file.parent / "checkpoint", heldout, self.device)
            )
        scores = [intervals.score_perplexity(judged["before"], judged["after"]), intervals.score_kl(judged["kl"])]
        value: float | None = None
        if kind == "ppl":
            value = float((judged["after"].mean() - judged["before"].mean()).exp())
        elif kind == "kl":
            value = float(judged["kl"].mean())
        passed = value is None or limit is None or value <= limit
        return scores, Gate(kind=kind, limit=limit, value=value, passed=passed)

    def _calibration(self, skeleton: Skeleton) -> Batch | None:
        learns = any("calibration-data" in method.needs for method in self.methods)
        if not learns and not any(policy.needs and not policy.inert for policy in self.policies):
            return None
        spec = self.recipe.data
        texts = calibration.read(spec.calibration, model_ref=self.recipe.model, split="calibration")
        return calibration.for_model(
            skeleton.model, texts, length=spec.length, sequences=spec.sequences, seed=self.recipe.seed
        )

    def _heldout(self, skeleton: Skeleton) -> Batch | None:
        """Return the held-out sequences; without data there can be no gate and no proof of logits."""
        spec = self.recipe.data
        try:
            texts = calibration.read(
                spec.heldout or spec.calibration,
                model_ref=self.recipe.model,
                split="all" if spec.heldout else "heldout",
            )
        except DataError:
            if self.gate.kind == "none" and spec.heldout is None and spec.calibration is None:
                return None
            raise
        return calibration.for_model(
            skeleton.model, texts, length=spec.length, sequences=spec.heldout_sequences, seed=0, what="held-out"
        )

    def _plan(self, number: int, method: Compressor, source: Path) -> Planned:
        """Plan a step behind the real result of the one before; what was rehearsed already is not rehearsed again."""
        known = self.foretold[number - 1] if self.foretold is not None else None
        if known is not None and number == 1:
            return known
        planned = plan.plan_step(checkpoint.skeleton(source), method, self.recipe, rehearse=known is None)
        if known is None:
            return planned
        return planned.model_copy(update={"peak_memory_bytes": known.peak_memory_bytes, "seconds": known.seconds})

    def _record(
        self,
        results: Sequence[Result],
        scores: list[Score],
        gate: Gate,
        shown: Any,
        last: Skeleton,
        heldout: Batch | None,
        result: Path,
    ) -> RunRecord:
        before, after = self._speeds(result, heldout)
        loader = surgery.loads_in(last.model.config)
        return RunRecord(
            paredown=paredown.__version__,
            command=" ".join(["paredown", *sys.argv[1:]]) if sys.argv[0].endswith("paredown") else "paredown.run(...)",
            created=datetime.now(UTC).isoformat(timespec="seconds"),
            model=_shown(self.recipe.model),
            family=last.model.anatomy.family,
            recipe=self.recipe.model_dump(mode="json"),
            steps=[r.record for r in results],
            scores=scores,
            size_before=measure.size(self.folder),
            size_after=measure.size(results[-1].folder),
            speed_before=before,
            speed_after=after,
            gate=gate,
            proof=shown,
            uniform=loader == "transformers",
            how_to_load=_how_to_load(loader, type(last.hf).__name__, self.journal.out.name, bool(self.policies)),
            versions=measure.versions(),
            hardware=measure.hardware(self.device),
            seconds=time.perf_counter() - self.started,
            resumed=self.journal.resumed,
        )

    def _speeds(self, result: Path, heldout: Batch | None) -> tuple[Any, Any]:
        """Measure speed and memory of both models, unless they do not fit into memory side by side."""
        if not self.speed or heldout is None:
            return None, None
        wanted = measure.size(self.folder).bytes_weights + measure.size(result).bytes_weights
        if wanted > _SPEED_SHARE_OF_MEMORY * available_memory():
            return None, None
        if self.progress is not None:
            self.progress(0, 1, "measuring speed and memory")
        before, after = measure.speeds([self.folder, result], heldout.input_ids, device=self.device)
        return before, after

    def _assemble(self, result: Path, acting: Acting | None) -> Path:
        """Put the last checkpoint and the policies together in the folder that will take the final name."""
        whole = self.journal.folder / "whole"
        shutil.rmtree(whole, ignore_errors=True)
        shutil.copytree(result, whole, copy_function=_link_or_copy)
        if acting is not None:
            policy_file.write(whole, acting.ready)
        return whole

    def _publish(self, record: RunRecord, results: Sequence[Result], acting: Acting | None) -> None:
        """Add record, report and card to the last checkpoint and give it its final name."""
        whole = self._assemble(results[-1].folder, acting)
        notes = whole / "paredown"
        notes.mkdir()
        write_json(notes / "recipe.json", self.recipe.model_dump(mode="json"))
        write_json(notes / "run.json", record.model_dump(mode="json"))
        for result in results:
            step = self.journal.folder / f"step-{result.record.index}"
            edits = [json.loads(f.read_text(encoding="utf-8")) for f in sorted(step.glob("edits-*.json"))]
            write_json(notes / f"{step.name}.json", {"method": result.record.method, "edits": edits})
        write_text(whole / "README.md", card.render(record))
        write_text(notes / "report.html", html.render(record))
        self.journal.publish(whole)


def _gate_sentence(gate: Gate) -> str:
    what = "perplexity rose by a factor of" if gate.kind == "ppl" else "the divergence from the original is"
    unit = "" if gate.kind == "ppl" else " nats a token"
    return (
        f"stopped by the gate: {what} {gate.value:.3g}{unit}, more than the {gate.limit:g} allowed, and nothing was "
        "written; keep more, or accept the loss with --resume and a wider --gate."
    )


def _shown(ref: str) -> str:
    """Return a model's name such that a local folder cannot be taken for a hub id."""
    return str(Path(ref).expanduser().absolute()) if Path(ref).expanduser().is_dir() else ref


def _how_to_load(loader: str, cls: str, name: str, policies: bool) -> str:
    if policies:
        return f'import paredown\nmodel = paredown.load("{name}").hf  # its policies are attached'
    if loader == "transformers":
        return f'from transformers import {cls}\nmodel = {cls}.from_pretrained("{name}")'
    return f'import paredown\nmodel = paredown.load("{name}").hf'


def _link_or_copy(source: str, target: str) -> None:
    try:
        Path(target).hardlink_to(source)
    except OSError:
        shutil.copyfile(source, target)
