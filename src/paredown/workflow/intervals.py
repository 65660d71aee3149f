"""Means with 95 % intervals, and what may be said from them; numbers in, numbers out.

- Over items: the bootstrap with a fixed seed. A plain percentile interval is too narrow where items are few; its levels
  are widened to those that agree with Student's t for a normal mean (Hesterberg 2014, arXiv:1411.5279). Below ten items
  there is too little to resample and Student's t itself is used.
- Over seeds and items, where each seed was measured on the same items: the two-way random-effects variance with
  Satterthwaite's degrees of freedom. Seeds and items are crossed, for an item that is hard is hard with every seed;
  resampling items anew within each seed would count it once a seed and give intervals that are too narrow.
- One item says nothing about spread: the interval is then the mean itself and ``n`` is 1.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import NormalDist
from typing import Any

import numpy as np
import numpy.typing as npt

from paredown.workflow.measured import Verdict
from paredown.workflow.record import Interval, Score

Array = npt.NDArray[np.float64]

RESAMPLES = 10_000
_FEW = 10
_NORMAL = NormalDist()
_Z = _NORMAL.inv_cdf(0.975)


def interval(values: Any, weights: Any = None, seed: int = 0) -> Interval:
    """Return the weighted mean of ``values`` with its 95 % interval over items.

    Parameters
    ----------
    values
        ``[n]`` numbers, one an item (sequence, question), n >= 1.
    weights
        ``[n]`` positive numbers, for instance tokens in each sequence; equal by default.
    seed
        Of the bootstrap.

    Raises
    ------
    ValueError
        If there are no values, or not as many weights.
    """
    x = _vector(values)
    w = np.ones_like(x) if weights is None else _vector(weights)
    if len(w) != len(x):
        raise ValueError(f"{len(x)} values but {len(w)} weights")
    mean = float((w * x).sum() / w.sum())
    if len(x) == 1 or not np.isfinite(x).all() or (x == x[0]).all():
        return Interval(mean=mean, low=mean, high=mean, n=len(x))
    if len(x) < _FEW:
        # The variance of a weighted mean, linearised; for equal weights the usual one.
        share = w / w.sum()
        error = math.sqrt(float((share**2 * (x - mean) ** 2).sum()) * len(x) / (len(x) - 1))
        reach = _student(len(x) - 1) * error
        return Interval(mean=mean, low=mean - reach, high=mean + reach, n=len(x))
    rng = np.random.default_rng(seed)
    means = np.empty(RESAMPLES)
    step = max(1, 2**22 // len(x))
    for start in range(0, RESAMPLES, step):
        chosen = rng.integers(0, len(x), size=(min(step, RESAMPLES - start), len(x)))
        means[start : start + step] = (w[chosen] * x[chosen]).sum(axis=1) / w[chosen].sum(axis=1)
    low, high = _quantiles(means, len(x) - 1)
    return Interval(mean=mean, low=min(low, mean), high=max(high, mean), n=len(x))


def paired(before: Any, after: Any, weights: Any = None, seed: int = 0) -> Interval:
    """Return the mean of ``after - before``, item by item, with its interval."""
    x, y = _vector(before), _vector(after)
    if len(x) != len(y):
        raise ValueError(f"{len(x)} items before but {len(y)} after")
    return interval(y - x, weights, seed)


def crossed(values: Any) -> Interval:
    """Return the mean over seeds and items with an interval that covers other seeds as well as other items.

    Parameters
    ----------
    values
        ``[S, n]``: item ``i`` measured with seed ``s``; the same items for each seed. One seed alone leaves an interval
        over items.
    """
    x = np.asarray(values, dtype=np.float64)
    if x.ndim != 2 or 0 in x.shape:
        raise ValueError(f"values must be [seeds, items], not {list(x.shape)}")
    seeds, items = x.shape
    if seeds == 1 or not np.isfinite(x).all():
        return interval(x.mean(axis=0))
    mean = float(x.mean())
    by_seed, by_item = x.mean(axis=1), x.mean(axis=0)
    noise = (x - by_seed[:, None] - by_item + mean).var() * seeds * items / max(1, (seeds - 1) * (items - 1))
    over_seeds = float(by_seed.var(ddof=1)) / seeds
    over_items = float(by_item.var(ddof=1)) / items if items > 1 else 0.0
    # Each of the two holds the noise once; it must count once in all.
    variance = max(over_seeds + over_items - float(noise) / (seeds * items), over_seeds, over_items)
    if variance == 0:
        return Interval(mean=mean, low=mean, high=mean, n=items)
    freedom = (over_seeds + over_items) ** 2 / (over_seeds**2 / (seeds - 1) + over_items**2 / max(1, items - 1))
    reach = _student(freedom) * math.sqrt(variance)
    return Interval(mean=mean, low=mean - reach, high=mean + reach, n=items)


def proportion(hits: Any) -> Interval:
    """Return the share of ones among zeros and ones with Wilson's interval, which is sound at 0 and 1 too."""
    x = _vector(hits)
    n, p = len(x), float(x.mean())
    middle = (p + _Z**2 / (2 * n)) / (1 + _Z**2 / n)
    reach = _Z * math.sqrt(p * (1 - p) / n + _Z**2 / (4 * n**2)) / (1 + _Z**2 / n)
    return Interval(mean=p, low=max(0.0, min(p, middle - reach)), high=min(1.0, max(p, middle + reach)), n=n)


def perplexity(nll: Any) -> Interval:
    """Return ``exp`` of the mean negative log-likelihood, with its interval over sequences.

    Parameters
    ----------
    nll
        ``[N, T-1]`` in nats, one a predicted token.
    """
    return exponential(interval(_rows(nll).mean(axis=1)))


def exponential(of: Interval) -> Interval:
    """Return ``exp`` of an interval, infinite where it overflows."""
    with np.errstate(over="ignore"):
        mean, low, high = (float(np.exp(value)) for value in (of.mean, of.low, of.high))
    return Interval(mean=mean, low=low, high=high, n=of.n)


def not_negative(of: Interval) -> Interval:
    """Return the interval of what cannot lie below zero."""
    return Interval(mean=of.mean, low=max(0.0, of.low), high=of.high, n=of.n)


def score_perplexity(nll_before: Any | None, nll_after: Any) -> Score:
    """Return perplexity before and after on the same tokens.

    Parameters
    ----------
    nll_before, nll_after
        ``[N, T-1]`` in nats, one a predicted token, as `evaluate.nll` returns them.
    """
    after = _rows(nll_after)
    before = None if nll_before is None else _rows(nll_before)
    if before is not None and before.shape != after.shape:
        raise ValueError(f"tokens before {list(before.shape)} and after {list(after.shape)} are not the same")
    return Score(
        name="perplexity",
        unit="",
        higher_is_better=False,
        before=None if before is None else perplexity(before),
        after=perplexity(after),
        difference=None if before is None else paired(before.mean(axis=1), after.mean(axis=1)),
    )


def score_kl(per_sequence: Any) -> Score:
    """Return the KL divergence from the original model's predictions, in nats a token, from ``[N]`` sequence means."""
    return Score(
        name="KL to the original",
        unit="nats/token",
        higher_is_better=False,
        before=None,
        after=not_negative(interval(per_sequence)),
        difference=None,
    )


def score_task(name: str, before: Any | None, after: Any) -> Score:
    """Return accuracy before and after on the same questions in the same order: 0, 1 or a share for each."""
    seen = _vector(after) if before is None else np.concatenate([_vector(before), _vector(after)])
    count = proportion if set(np.unique(seen)) <= {0.0, 1.0} else interval
    return Score(
        name=name,
        unit="share correct",
        higher_is_better=True,
        before=None if before is None else count(before),
        after=count(after),
        difference=None if before is None else paired(before, after),
    )


def verdict(difference: Interval, *, higher_is_better: bool) -> Verdict:
    """Say what a paired difference to the random control shows: something only where its interval excludes zero."""
    if difference.n < 2 or not math.isfinite(difference.low + difference.high):
        return "no difference shown"
    low, high = (difference.low, difference.high) if higher_is_better else (-difference.high, -difference.low)
    if low > 0:
        return "beats random"
    return "worse than random" if high < 0 else "no difference shown"


def _vector(values: Any) -> Array:
    x = np.asarray(_plain(values), dtype=np.float64).reshape(-1)
    if not len(x):
        raise ValueError("no items to average")
    return x


def _rows(values: Any) -> Array:
    x = np.asarray(_plain(values), dtype=np.float64)
    if x.ndim != 2 or 0 in x.shape:
        raise ValueError(f"values must be [sequences, tokens], not {list(x.shape)}")
    return x


def _plain(values: Any) -> Any:
    """Bring tensors to the host; this module works without torch."""
    return values.detach().double().cpu().numpy() if hasattr(values, "detach") else values


def _quantiles(means: Array, freedom: float) -> tuple[float, float]:
    tail = _NORMAL.cdf(-_student(freedom) * math.sqrt((freedom + 1) / freedom))
    low, high = np.quantile(means, [tail, 1 - tail])
    return float(low), float(high)


def _student(freedom: float) -> float:
    """Return the 97.5 % quantile of Student's t; Cornish and Fisher's series from 3 degrees of freedom on."""
    if freedom < 3:
        points: Sequence[float] = (1.0, 2.0, 3.0)
        return float(math.exp(np.interp(max(1.0, freedom), points, np.log([12.7062, 4.3027, 3.1824]))))
    z, v = _Z, freedom
    return (
        z
        + (z**3 + z) / (4 * v)
        + (5 * z**5 + 16 * z**3 + 3 * z) / (96 * v**2)
        + (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / (384 * v**3)
        + (79 * z**9 + 776 * z**7 + 1482 * z**5 - 1920 * z**3 - 945 * z) / (92160 * v**4)
    )
