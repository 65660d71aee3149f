"""How good, how large, how fast a model is, alone or against another, item by item.

- Both models see the same tokens and the same questions; differences are paired, every score has an interval.
- Quality is measured in float32 on a CPU, for there a bfloat16 product may depend on the number of threads; size,
  memory and speed are those of the checkpoint's own precision.
- Logits live for one batch and are never kept.
"""

from __future__ import annotations

import contextlib
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from transformers import PreTrainedModel

from paredown.core import calibration, checkpoint, configs, files, forward
from paredown.core.attach import check_together
from paredown.core.checkpoint import Model
from paredown.core.method import Policy
from paredown.errors import CheckpointError, UsageError
from paredown.testbeds.tasks import How
from paredown.workflow import measure, tasks
from paredown.workflow import policies as under
from paredown.workflow.intervals import (
    crossed,
    interval,
    paired,
    perplexity,
    proportion,
    score_kl,
    score_perplexity,
    score_task,
    verdict,
)
from paredown.workflow.measured import EvalRecord, Side
from paredown.workflow.record import Score

__all__ = [
    "EvalRecord",
    "crossed",
    "evaluate",
    "interval",
    "kl",
    "load_any",
    "nll",
    "paired",
    "perplexity",
    "proportion",
    "score_kl",
    "score_perplexity",
    "score_task",
    "together",
    "verdict",
]

Progress = Callable[[int, int, str], None]

_LOGITS_AT_ONCE = 2**26
load_any = checkpoint.load
"""Opens plain checkpoints and those whose layers differ."""


def nll(
    hf: PreTrainedModel, input_ids: Tensor, batch_size: int | None = None, *, progress: Progress | None = None
) -> Tensor:
    """Return the negative log-likelihood of each token but the first.

    Parameters
    ----------
    hf
        A causal language model.
    input_ids
        ``[N, T]``, int64, without padding.
    batch_size
        Sequences at once; as many as keep the logits small by default.
    progress
        Told how far it is.

    Returns
    -------
    Tensor
        ``[N, T-1]`` float32 on the CPU, in nats.
    """
    return _stream(hf, None, input_ids, batch_size, progress, "perplexity")[0]


def kl(
    reference: PreTrainedModel,
    hf: PreTrainedModel,
    input_ids: Tensor,
    batch_size: int | None = None,
    *,
    progress: Progress | None = None,
) -> Tensor:
    """Return KL(reference ‖ hf) of the next token's distribution, the mean over each sequence's predictions.

    Parameters
    ----------
    reference, hf
        Causal language models with one vocabulary.
    input_ids
        ``[N, T]``, int64, without padding.
    batch_size
        Sequences at once.
    progress
        Told how far it is.

    Returns
    -------
    Tensor
        ``[N]`` float32 on the CPU, in nats a token; exactly 0 for equal logits.

    Raises
    ------
    UsageError
        If the vocabularies differ.
    """
    return together(reference, hf, input_ids, batch_size, progress=progress)[2]


def together(
    reference: PreTrainedModel,
    hf: PreTrainedModel,
    input_ids: Tensor,
    batch_size: int | None = None,
    *,
    progress: Progress | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return `nll` of both models and `kl` from one pass: ``[N, T-1]``, ``[N, T-1]``, ``[N]``."""
    check_vocabularies(reference, hf)
    own, other, divergence = _stream(hf, reference, input_ids, batch_size, progress, "perplexity and KL")
    assert other is not None
    assert divergence is not None
    return other, own, divergence


def evaluate(
    ref: str | Path,
    against: str | Path | None = None,
    data: str | Path | None = None,
    *,
    policies: Sequence[Policy] = (),
    tasks: Sequence[str] = (),
    question: How = "after",
    seed: int = 0,
    length: int = 512,
    sequences: int = 64,
    questions: int = 200,
    cost: bool = True,
    repetitions: int = measure.REPETITIONS,
    dtype: str = "auto",
    device: str | None = None,
    progress: Progress | None = None,
) -> EvalRecord:
    """Measure a model, against another if there is one.

    Parameters
    ----------
    ref, against
        Hub ids, local folders or ``testbed:NAME``; plain checkpoints or those whose layers differ.
    data
        Held-out text: a file, a folder, a hub data set id, ``testbed:NAME``; None for the sample of whichever model is
        a testbed.
    policies
        Attached to ``ref``, on top of those that its folder brings. As soon as either side has one, text is read as a
        cache is used and the second half of each row is scored (see `policies.text`); tasks go through the cache too.
    tasks
        ``recall``, ``mosaic`` or names that lm-eval knows; the tasks of testbeds are always among them.
    question
        Whether ``recall`` asks after the text was read, or within the same pass; matters under policies alone.
    seed
        Of what policies learn and draw.
    length, sequences
        Tokens of a held-out row, rows.
    questions
        Questions of each task.
    cost
        Whether to measure memory and speed too.
    repetitions
        Of each speed measurement.
    dtype
        For quality; ``auto`` is float32 on a CPU and the checkpoint's own elsewhere.
    device
        Where to measure; a GPU where there is one, else the CPU.
    progress
        Called as ``progress(done, total, stage)``.

    Raises
    ------
    UsageError
        If the two models do not share a vocabulary and tokenizer, or a model predicts no next token.
    DataError
        If there is no text, or too little.
    """
    start = time.perf_counter()
    device = device or measure.default_device()
    dtype = quality_dtype(dtype, device)
    refs = [str(ref)] if against is None else [str(ref), str(against)]
    models = [checkpoint.load(one, dtype=dtype, device=device, policies=False) for one in refs]
    for model in models:
        check_causal(model)
    acting = [under.stored(model) for model in models]
    check_together((*acting[0], *policies))
    if against is not None:
        check_vocabularies(models[1].hf, models[0].hf)
    scores: list[Score] = []
    notes: list[str] = []
    learns = under.needs_data(policies)
    batch = _heldout(models, refs, data, length, sequences, notes, split="heldout" if learns else "all")
    with tempfile.TemporaryDirectory(prefix="paredown-") as folder:
        sample = None
        if learns:
            texts = calibration.read(data, model_ref=refs[0], split="calibration")
            sample = calibration.for_model(models[0], texts, length=length, seed=seed)
        ready = under.prepare(policies, models[0], sample, seed=seed, folder=Path(folder), progress=progress)
        acting[0] = (*acting[0], *ready)
        readers = [under.Reader(model, each) for model, each in zip(models, acting, strict=True)]
        if batch is not None:
            scores += _text_scores(readers, batch, notes, progress)
        scores += _task_scores(readers, refs, tasks, question, questions, progress)
        sides = [_side(reader) for reader in readers]
        del models, readers  # memory and speed are those of the checkpoint's precision
        ratios: list[Any] = [None, None]
        if cost:
            ids = batch.input_ids if batch is not None else torch.arange(measure.PREFILL_TOKENS)[None] % 256
            ratios = _costs(refs, sides, acting, ids, device, repetitions, progress)
    return EvalRecord(
        created=measure.now(),
        model=sides[0],
        against=sides[1] if against is not None else None,
        scores=scores,
        prefill_ratio=ratios[0],
        decode_ratio=ratios[1],
        data=batch.record() if batch is not None else {},
        dtype=dtype,
        notes=notes,
        versions=measure.versions(),
        hardware=measure.hardware(device),
        seconds=time.perf_counter() - start,
    )


def quality_dtype(dtype: str, device: str) -> str:
    """Return the precision that quality is measured in."""
    return "float32" if dtype == "auto" and device == "cpu" else dtype


def check_causal(model: Model) -> None:
    """Refuse a model that does not predict the next token.

    Raises
    ------
    UsageError
        Naming its class.
    """
    if not model.hf.can_generate():
        raise UsageError(
            f"{model.source} is a {type(model.hf).__name__}, which predicts no next token; "
            "give a causal language model."
        )


def check_vocabularies(reference: PreTrainedModel, hf: PreTrainedModel) -> None:
    """Refuse to compare distributions over different vocabularies.

    Raises
    ------
    UsageError
        Giving both sizes.
    """
    ours, theirs = (one.config.get_text_config().vocab_size for one in (hf, reference))
    if ours != theirs:
        raise UsageError(
            f"the models have vocabularies of {ours} and {theirs} tokens, so their predictions cannot be compared; "
            "give two models with one vocabulary."
        )


def _heldout(
    models: Sequence[Model],
    refs: Sequence[str],
    data: str | Path | None,
    length: int,
    sequences: int,
    notes: list[str],
    split: calibration.Split,
) -> calibration.Batch | None:
    """Return the held-out rows that all models read, or None where a testbed's data are images."""
    source = data
    if source is None:
        source = next((one for one in refs if one.startswith("testbed:")), None)
        if source == "testbed:vlm":
            notes.append("Perplexity on text alone says nothing about a vision model and was not measured.")
            return None
    texts = calibration.read(source, model_ref=refs[0], split=split)
    limit = min(measure.positions(model.hf) or length for model in models)
    if limit < length:
        notes.append(f"Rows were shortened from {length} to the {limit} positions that every model has.")
        length = limit
    batches = [
        calibration.for_model(model, texts, length=length, sequences=sequences, what="held-out")
        for model in models
        if model.tokenizer is not None or model is models[0]
    ]
    if len({batch.fingerprint for batch in batches}) > 1:
        raise UsageError(
            f"the tokenizers of {refs[0]} and {refs[1]} cut the same text into different tokens; "
            "give two models with one tokenizer."
        )
    notes += batches[0].notes
    return batches[0]


def _text_scores(
    readers: Sequence[under.Reader], batch: calibration.Batch, notes: list[str], progress: Progress | None
) -> list[Score]:
    models = [reader.model for reader in readers]
    if any(reader.policies for reader in readers):
        notes.append(under.HALVES)
        # Alone, a model under policies is read next to itself without them, and that side is not told.
        other_reader = readers[1] if len(readers) > 1 else under.Reader(models[0])
        found = under.text(other_reader, readers[0], batch.input_ids, progress=progress)
        if len(readers) == 1:
            return [score_perplexity(None, found.after)]
        return [score_perplexity(found.before, found.after), score_kl(found.kl)]
    if len(models) == 1:
        own = nll(models[0].hf, batch.input_ids, progress=progress)
        _check_numbers(models[0], own)
        return [score_perplexity(None, own)]
    other, own, divergence = together(models[1].hf, models[0].hf, batch.input_ids, progress=progress)
    for model, values in ((models[0], own), (models[1], other)):
        _check_numbers(model, values)
    return [score_perplexity(other, own), score_kl(divergence)]


def _check_numbers(model: Model, values: Tensor) -> None:
    if not torch.isfinite(values).all():
        raise CheckpointError(f"{model.source} computes logits that are not finite numbers; its weights are damaged.")


def _task_scores(
    readers: Sequence[under.Reader],
    refs: Sequence[str],
    names: Sequence[str],
    question: How,
    questions: int,
    progress: Progress | None,
) -> list[Score]:
    models = [reader.model for reader in readers]
    # Without a policy one pass gives the same answers as the way through the cache, and sooner.
    ways: list[dict[str, Any]] = [
        {"how": question, "policies": reader.policies} if reader.policies else {} for reader in readers
    ]
    own = list(dict.fromkeys([*tasks.own(*refs), *(name for name in names if name in tasks.BUILT_IN)]))
    foreign = [name for name in names if name not in tasks.BUILT_IN]
    found: list[Score] = []
    for index, name in enumerate(own):
        points = [tasks.ask(name, one, questions=questions, **way) for one, way in zip(models, ways, strict=True)]
        found.append(score_task(name, points[1] if len(points) > 1 else None, points[0]))
        if progress is not None:
            progress(index + 1, len(own), "tasks")
    if foreign:
        if any(reader.policies for reader in readers):
            raise UsageError(f"lm-eval's tasks ({foreign[0]}) read rows in one pass; leave --tasks out under a policy.")
        each: list[Mapping[str, Mapping[str, float]]] = []
        for index, model in enumerate(models):
            each.append(tasks.harness(model, foreign, limit=questions))
            if progress is not None:
                progress(index + 1, len(models), "lm-eval")
        for name, after in each[0].items():
            if len(each) == 1:
                found.append(score_task(name, None, list(after.values())))
            elif name in each[1]:
                found.append(score_task(name, *tasks.matched(each[1][name], after)))
    return found


def _side(reader: under.Reader) -> Side:
    model = reader.model
    assert model.folder is not None
    return Side(
        policies=under.described(reader.policies),
        model=model.source,
        loads_in=configs.loads_in(model.hf.config),
        size=measure.size(files.locate(model.folder)),
        memory=None,
        prefill=None,
        decode=None,
    )


def _costs(
    refs: Sequence[str],
    sides: Sequence[Side],
    acting: Sequence[tuple[Policy, ...]],
    ids: Tensor,
    device: str,
    repetitions: int,
    progress: Progress | None,
) -> list[Any]:
    """Fill in memory and speed of each side and return the ratios of prefill and decode times."""
    for index, (ref, side) in enumerate(zip(refs, sides, strict=True)):
        side.memory = measure.memory(ref, device=device)
        if progress is not None:
            progress(index + 1, len(refs), "memory")
    if any(acting):
        return under.costs(refs, sides, acting, ids, device, repetitions, progress)
    models = [checkpoint.load(ref, device=device).hf for ref in refs]
    timed = measure.speed(models, ids, repetitions=repetitions, progress=progress)
    for side, (prefill, decode) in zip(sides, timed, strict=True):
        side.prefill, side.decode = prefill, decode
    if len(sides) == 1:
        return [None, None]
    ours, theirs = timed
    return [measure.ratio(a, b) for a, b in zip(ours, theirs, strict=True)]


def _stream(
    hf: PreTrainedModel,
    reference: PreTrainedModel | None,
    input_ids: Tensor,
    batch_size: int | None,
    progress: Progress | None,
    stage: str,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Return the model's NLL and, with a reference, the reference's NLL and the KL; batch by batch."""
    rows, length = input_ids.shape
    if length < 2:
        raise ValueError("a row needs two tokens or more")
    vocabulary = hf.config.get_text_config().vocab_size
    size = batch_size or max(1, min(16, _LOGITS_AT_ONCE // (length * vocabulary)))
    starts = [*range(0, rows, size), rows]
    own, other, divergence = [], [], []
    with torch.inference_mode(), checkpoint.quiet(), _evaluating(hf, reference):
        for start, stop in pairwise(starts):
            ids = input_ids[start:stop]
            logits = forward.logits(hf, ids)
            theirs = None if reference is None else forward.logits(reference, ids)
            # One row at a time in float32: whole batches would take several times the memory of the logits.
            for index, row in enumerate(ids):
                log_q = functional.log_softmax(logits[index, :-1].float(), dim=-1)
                own.append(_picked(log_q, row))
                if theirs is not None:
                    log_p = functional.log_softmax(theirs[index, :-1].float().to(log_q.device), dim=-1)
                    other.append(_picked(log_p, row))
                    divergence.append(_divergence(log_p, log_q))
            if progress is not None:
                progress(stop, rows, stage)
    if reference is None:
        return torch.stack(own), None, None
    return torch.stack(own), torch.stack(other), torch.stack(divergence)


def _picked(log_probabilities: Tensor, row: Tensor) -> Tensor:
    index = row[1:, None].to(log_probabilities.device)
    return -log_probabilities.gather(1, index)[:, 0].float().cpu()


def _divergence(log_p: Tensor, log_q: Tensor) -> Tensor:
    """Return the mean over positions of KL(p ‖ q), ``[T, V]`` each; a token that p rules out adds nothing."""
    p = log_p.exp()
    terms = torch.where(p > 0, p * (log_p - log_q), 0.0)
    return terms.sum(-1).clamp_min(0).mean().float().cpu()


@contextlib.contextmanager
def _evaluating(*models: PreTrainedModel | None) -> Iterator[None]:
    """Switch models to evaluation and back: dropout would make two passes over the same tokens differ."""
    training = [hf for hf in models if hf is not None and hf.training]
    for hf in training:
        hf.eval()
    try:
        yield
    finally:
        for hf in training:
            hf.train()
