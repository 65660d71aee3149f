"""Questions with answers: the testbeds' own tasks, and those of lm-eval; one number a question, in a fixed order.

The same questions are put to every model, so that scores pair.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from paredown import testbeds
from paredown.errors import DataError, UsageError

if TYPE_CHECKING:
    from paredown.core.calibration import Batch
    from paredown.core.checkpoint import Model
    from paredown.core.method import Policy
    from paredown.core.stepwise import Held
    from paredown.testbeds.tasks import How

Points = npt.NDArray[np.float64]

BUILT_IN = ("recall", "mosaic")
QUESTIONS = 200
_OF_TESTBED = {**{f"testbed:{name}": "recall" for name in testbeds.RECALLING}, "testbed:vlm": "mosaic"}


def own(*refs: str | None) -> list[str]:
    """Return the built-in tasks that belong to the testbeds among ``refs``."""
    return list(dict.fromkeys(_OF_TESTBED[ref] for ref in refs if ref in _OF_TESTBED))


def ask(
    task: str,
    model: Model,
    *,
    questions: int = QUESTIONS,
    how: How | None = None,
    policies: Sequence[Policy] = (),
    held: Held | None = None,
) -> Points:
    """Put a built-in task to a model and return 0 or 1 for each of ``questions`` questions.

    Parameters
    ----------
    task, model
        What is asked, and who.
    questions
        How many.
    how
        The question goes through the cache (see `testbeds.tasks.How`); one forward pass by default.
    policies
        Attached to the model for as long as it is asked.
    held
        Told what the cache holds.

    Raises
    ------
    UsageError
        If the model cannot be asked: no image processor, too few positions.
    """
    from paredown.core.attach import attach

    with attach(model, *policies) if policies else contextlib.nullcontext():
        return _ask(task, model, questions, how, held)


def _ask(task: str, model: Model, questions: int, how: How | None, held: Held | None) -> Points:
    from paredown.testbeds import tasks

    hf: Any = model.hf
    if task == "recall":
        if model.tokenizer is None:
            raise UsageError(f"the task recall needs a tokenizer, and {model.source} has none.")
        length = min(512, (getattr(hf.config.get_text_config(), "max_position_embeddings", None) or 512) - 8)
        texts = testbeds.heldout_texts("recall")
        try:
            hits = tasks.recall_accuracy(hf, model.tokenizer, texts, length=length, count=questions, how=how, held=held)
        except ValueError as error:
            raise UsageError(f"the task recall cannot be put to {model.source} ({error}).") from None
        return hits.astype(np.float64)
    if task == "mosaic":
        if model.processor is None:
            raise UsageError(
                f"the task mosaic needs an image processor, and {model.source} has none that can be read: "
                "pip install 'paredown[vision]'."
            )
        digits, labels = testbeds.heldout_digits()
        seen = tasks.mosaic_accuracy(hf, model.processor, digits, labels, count=questions, how=how, held=held)
        return seen.astype(np.float64)
    raise UsageError(f"there is no built-in task {task!r}; there are {' and '.join(BUILT_IN)}.")


def practice(model: Model, seed: int) -> Batch:
    """Return rows of the recall task that policies may learn from: other texts than those it is asked about.

    Raises
    ------
    UsageError
        If the model has no tokenizer.
    """
    import torch

    from paredown.core.calibration import Batch
    from paredown.testbeds import tasks

    if model.tokenizer is None:
        raise UsageError(f"the task recall needs a tokenizer, and {model.source} has none.")
    rows = tasks.recall_rows(model.tokenizer, testbeds.calibration_texts("recall"), seed=seed)
    digest = hashlib.sha256(rows.tobytes()).hexdigest()
    note = "Policies that learn were given rows with planted facts and questions about them, of other texts."
    return Batch(torch.from_numpy(rows), None, "planted facts", digest, seed, len(rows), (note,))


def harness(model: Model, names: Sequence[str], *, limit: int | None = None) -> dict[str, dict[str, float]]:
    """Put lm-eval's tasks to a model.

    Parameters
    ----------
    model
        What is asked.
    names
        Names as lm-eval knows them.
    limit
        Questions of each task; all of them by default.

    Returns
    -------
    dict
        ``{"task metric": {question: points}}`` for every metric that gives a number for each question.

    Raises
    ------
    UsageError
        If lm-eval is not installed.
    DataError
        If lm-eval does not know a task, cannot get its questions, or fails.
    """
    try:
        from lm_eval import simple_evaluate
        from lm_eval.models.huggingface import HFLM
    except ImportError:
        raise UsageError(
            f"the tasks {', '.join(names)} are lm-eval's, which is not installed: pip install 'paredown[eval]'."
        ) from None
    try:
        # Its bars and log lines are for its own command line; ours tells how far it is.
        with contextlib.redirect_stderr(io.StringIO()), contextlib.redirect_stdout(io.StringIO()):
            lm = HFLM(pretrained=model.hf, tokenizer=model.tokenizer, backend="causal", batch_size=8)
            found = simple_evaluate(model=lm, tasks=list(names), limit=limit, log_samples=True, bootstrap_iters=0)
    except Exception as error:  # it passes on whatever its tasks, files and servers raise
        lines = str(error).strip().splitlines() or [type(error).__name__]
        raise DataError(f"lm-eval could not run {', '.join(names)} ({lines[0][:200].rstrip('.')}).") from error
    return points(found["samples"])


def points(samples: Mapping[str, Sequence[Mapping[str, Any]]]) -> dict[str, dict[str, float]]:
    """Take from lm-eval's samples what each question scored, metric by metric."""
    found: dict[str, dict[str, float]] = {}
    for task in sorted(samples):
        for sample in samples[task]:
            key = f"{sample['doc_id']}/{sample.get('filter', 'none')}"
            for metric in sample.get("metrics", ("acc", "acc_norm", "exact_match")):
                value = sample.get(metric)
                if isinstance(value, bool | int | float):
                    found.setdefault(f"{task} {metric}", {})[key] = float(value)
    return found


def matched(before: Mapping[str, float], after: Mapping[str, float]) -> tuple[Points, Points]:
    """Return two models' points on the questions that both were asked, in one order."""
    keys = [key for key in before if key in after]
    return np.array([before[key] for key in keys]), np.array([after[key] for key in keys])
