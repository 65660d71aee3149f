"""Policies at work: made from a command line, prepared, and scored on text as a cache is used.

The first half of each row is read in one pass, the second half token by token (the right tokens are fed in); losses and
divergence are those of the second half's tokens. A model without policies gets one forward pass, which is the same
arithmetic, and the same tokens count.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from paredown import registry
from paredown.core import checkpoint, forward, policy_file
from paredown.core.attach import attach, check_together
from paredown.core.calibration import Batch
from paredown.core.checkpoint import Model
from paredown.core.method import Policy
from paredown.core.stepwise import Held, stepwise
from paredown.errors import CheckpointError, UsageError
from paredown.workflow import measure
from paredown.workflow.measured import Alone, KeyValues, Ratio, Side, Timing

Progress = Callable[[int, int, str], None]

HALVES = (
    "Text is read as a cache is used: the first half of each row in one pass, the second token by token; "
    "the second half alone is scored."
)
_LOGITS_AT_ONCE = 2**26
_MOST_ROWS = 64


def make(
    names: Sequence[str], keep: float | None = None, fields: Mapping[str, Any] | None = None
) -> tuple[Policy, ...]:
    """Build policies from the words of a command line.

    Parameters
    ----------
    names
        Methods, each a policy.
    keep
        Of all that get none of their own.
    fields
        ``field`` where there is one policy, ``policy.field`` where there are several.

    Raises
    ------
    UsageError, RecipeError, PolicyError
        If a name is no policy, a field belongs to none of them, or they do not go together.
    """
    given: dict[str, dict[str, Any]] = {name: {} if keep is None else {"keep": keep} for name in names}
    if len(given) < len(names):
        raise UsageError("a policy is named twice; name each once.")
    for key, value in (fields or {}).items():
        owner, dot, name = key.partition(".")
        if not dot and len(names) == 1:
            owner, name = names[0], key
        if owner not in given or not name:
            raise UsageError(f"--set {key} belongs to no policy; write --set {names[0]}.{name or key}=value.")
        given[owner][name] = value
    found = []
    for name, chosen in given.items():
        entry = registry.entry(name)
        if entry.kind != "policy":
            raise UsageError(f"{name} is a {entry.kind}, not a policy; `paredown methods` lists what acts when.")
        made = registry.create(name, **chosen)
        assert isinstance(made, Policy)
        found.append(made)
    check_together(found)
    return tuple(found)


def stored(model: Model) -> tuple[Policy, ...]:
    """Return the policies that a model's folder brings; they were prepared when it was written."""
    return policy_file.read(model.folder) if model.folder is not None else ()


def needs_data(policies: Sequence[Policy]) -> bool:
    """Whether some policy learns or measures beforehand."""
    return any(policy.needs and not policy.inert for policy in policies)


def prepare(
    policies: Sequence[Policy],
    model: Model,
    data: Batch | None,
    *,
    seed: int,
    folder: Path,
    progress: Progress | None = None,
) -> tuple[Policy, ...]:
    """Let policies learn or measure what they need; each on the model without the others.

    Parameters
    ----------
    folder
        Where learned weights go, each policy's into a folder of its own.
    """
    found = []
    for number, policy in enumerate(policies, start=1):
        if policy.inert:
            found.append(policy)
            continue
        own = folder / f"{number}-{policy.name}"
        own.mkdir(parents=True, exist_ok=True)
        wanted = data if policy.needs else None
        with checkpoint.quiet():
            found.append(policy.prepare(model, wanted, seed=seed, folder=str(own), progress=progress))
    return tuple(found)


@dataclass(frozen=True)
class Reader:
    """A model and what is attached to it while it reads."""

    model: Model
    policies: tuple[Policy, ...] = ()
    through_cache: bool = False

    @property
    def stepwise(self) -> bool:
        """Whether it must be read through the cache, token by token."""
        return self.through_cache or any(not policy.inert for policy in self.policies)

    def logits(self, ids: Tensor, half: int, held: Held | None) -> Iterator[Tensor]:
        """Yield logits ``[B, V]`` for the tokens at ``half``, ``half + 1``, ... of ``ids`` ``[B, T]``, in turn."""
        hf: Any = self.model.hf
        ids = ids.to(hf.device)
        if self.stepwise:
            with attach(self.model, *self.policies) if self.policies else nullcontext():
                yield from stepwise(hf, {"input_ids": ids[:, :half]}, ids[:, half:-1], watch=held)
            if held is not None:
                held.close(len(ids))
            return
        with torch.inference_mode():
            whole = forward.logits(hf, ids[:, :-1])[:, half - 1 :]
        for step in range(whole.shape[1]):
            yield whole[:, step]


@dataclass(frozen=True)
class TextScores:
    """What two readers made of the second halves of the same rows.

    Attributes
    ----------
    before, after
        ``[N, T - T // 2]`` negative log-likelihoods of the reference and of the model, in nats.
    kl
        ``[N]``, KL(reference ‖ model), the mean over the row's second half.
    """

    before: Tensor
    after: Tensor
    kl: Tensor


def text(
    reference: Reader,
    reader: Reader,
    input_ids: Tensor,
    *,
    held: tuple[Held, Held] | None = None,
    progress: Progress | None = None,
) -> TextScores:
    """Score the second half of each row under both readers.

    Parameters
    ----------
    input_ids
        ``[N, T]`` without padding.
    held
        Told what the caches of reference and model hold.
    """
    rows, length = input_ids.shape
    if length < 4:
        raise UsageError(f"rows of {length} tokens are too short to be read by halves; take 4 or more.")
    half = length // 2
    vocabulary = reader.model.hf.config.get_text_config().vocab_size
    size = max(1, min(_MOST_ROWS, _LOGITS_AT_ONCE // (length * vocabulary)))
    one, other = held if held is not None else (None, None)
    parts: list[list[Tensor]] = [[], [], []]
    with checkpoint.quiet():
        for start, stop in pairwise([*range(0, rows, size), rows]):
            ids = input_ids[start:stop]
            # The reference goes first: it may be the very same model, and reads whole rows before anything is attached.
            pairs = zip(reference.logits(ids, half, one), reader.logits(ids, half, other), strict=True)
            columns = [_judged(p, q, ids[:, half + at]) for at, (p, q) in enumerate(pairs)]
            for kept, column in zip(parts, zip(*columns, strict=True), strict=True):
                kept.append(torch.stack(column, dim=1))
            if progress is not None:
                progress(stop, rows, "text, token by token")
    before, after, divergence = (torch.cat(part) for part in parts)
    for who, values in ((reference, before), (reader, after)):
        if not torch.isfinite(values).all():
            name = " and ".join(policy.name for policy in who.policies)
            under = f" under {name}" if name else ""
            raise CheckpointError(f"{who.model.source} computes logits{under} that are not finite numbers.")
    return TextScores(before, after, divergence.mean(dim=1))


def _judged(p: Tensor, q: Tensor, target: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return both losses and KL(p ‖ q), ``[B]`` each, of logits ``[B, V]``."""
    log_p, log_q = p.float().log_softmax(-1), q.float().to(p.device).log_softmax(-1)
    at = target[:, None].to(p.device)
    share = log_p.exp()
    divergence = torch.where(share > 0, share * (log_p - log_q), 0.0).sum(-1).clamp_min(0)
    return -log_p.gather(1, at)[:, 0].cpu(), -log_q.gather(1, at)[:, 0].cpu(), divergence.cpu()


def described(policies: Sequence[Policy]) -> list[dict[str, Any]]:
    """Return what a record says about policies: names and fields, learned files left out."""
    return [
        {"method": policy.name, "fields": policy_file.portable(policy, number)[0]}
        for number, policy in enumerate(policies, start=1)
    ]


def costs(
    refs: Sequence[str],
    sides: Sequence[Side],
    acting: Sequence[tuple[Policy, ...]],
    ids: Tensor,
    device: str,
    repetitions: int,
    progress: Progress | None,
) -> list[Ratio | None]:
    """Measure speed and caches of sides under policies, in turns with the same weights without; fill them in.

    Returns
    -------
    Ratios of the first side's prefill and decode times to the second's; None where there is one side.
    """
    opened = {ref: checkpoint.load(ref, device=device, policies=False) for ref in refs}
    runners: dict[str, tuple[Model, tuple[Policy, ...]]] = {}
    for number, (ref, policies) in enumerate(zip(refs, acting, strict=True)):
        runners[f"side {number}"] = (opened[ref], policies)
        runners[f"{ref} alone"] = (opened[ref], ())
    helds = {name: Held() for name in runners}

    @contextmanager
    def during(name: str) -> Iterator[Held]:
        model, policies = runners[name]
        with attach(model, *policies) if policies else nullcontext():
            yield helds[name]

    timed = measure.speed(
        [model.hf for model, _ in runners.values()],
        ids,
        repetitions=repetitions,
        progress=progress,
        during=[partial(during, name) for name in runners],
    )
    by_name = dict(zip(runners, timed, strict=True))
    for number, (ref, side) in enumerate(zip(refs, sides, strict=True)):
        own, alone = f"side {number}", f"{ref} alone"
        side.prefill, side.decode = by_name[own]
        side.cache = _held(helds[own], *by_name[own])
        if acting[number]:
            side.alone = Alone(
                prefill=measure.ratio(by_name[own][0], by_name[alone][0]),
                decode=measure.ratio(by_name[own][1], by_name[alone][1]),
                cache=_held(helds[alone], *by_name[alone]),
            )
    if len(sides) == 1:
        return [None, None]
    return [measure.ratio(a, b) for a, b in zip(by_name["side 0"], by_name["side 1"], strict=True)]


def _held(held: Held, prefill: Timing, decode: Timing) -> KeyValues:
    return KeyValues(
        prompt=prefill.tokens,
        decoded=decode.tokens,
        first_bytes=held.first,
        peak_bytes=held.peak,
        steady_bytes=held.steady,
    )
