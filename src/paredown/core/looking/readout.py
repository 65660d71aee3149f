"""Linear readouts: what can be read off hidden states by logistic regression, and from which layer on.

- Regression, search for the penalty and standardising see the training part alone.
- All in fp64 by L-BFGS, without randomness: the same vectors give the same numbers.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from paredown.core.method import View
from paredown.core.statistics import Observer
from paredown.errors import DataError

Where = Literal["stream", "norm"]
"""``stream`` leaves the block; ``norm`` enters its MLP: the stream between attention and MLP, normalised."""


class Vectors(Observer):
    """Takes the hidden states at some positions of each row: ``vectors [N * P, H]`` in fp32.

    Parameters
    ----------
    positions : ``[N, P]``, in the order in which rows pass
    where : what is taken
    """

    def __init__(self, positions: Tensor, where: Where = "stream") -> None:
        super().__init__()
        self.positions, self.where = positions, where
        self._rows: list[Tensor] = []

    def attach(self, view: View) -> list[Any]:
        """Hook the block, or what its MLP reads; a block without one is read where it ends."""
        dense = view.part.mlp or view.part.experts
        if self.where == "norm" and dense is not None:

            def enter(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
                self._take(args[0] if args else kwargs["hidden_states"])

            return [view.child(dense.path).register_forward_pre_hook(enter, with_kwargs=True)]

        def leave(_: nn.Module, __: Any, output: Any) -> None:
            self._take(output[0] if isinstance(output, tuple) else output)

        return [view.module.register_forward_hook(leave)]

    def result(self) -> dict[str, Tensor]:
        """Return the vectors on the CPU."""
        return {"vectors": torch.cat(self._rows)}

    def _take(self, hidden: Tensor) -> None:
        done = sum(map(len, self._rows)) // max(1, self.positions.shape[1])
        at = self.positions[done : done + len(hidden)].to(hidden.device)
        found = hidden.gather(1, at[..., None].expand(-1, -1, hidden.shape[-1]))
        self._rows.append(found.flatten(0, 1).float().cpu())


@dataclass(frozen=True)
class Readout:
    """A fitted classifier: ``sigmoid(((z - mean) / scale) . weight + bias)`` is the probability of label 1."""

    weight: Tensor
    bias: float
    mean: Tensor
    scale: Tensor
    penalty: float

    def scores(self, vectors: Tensor) -> Tensor:
        """Return log-odds of label 1, ``[n]``, of vectors ``[n, H]``."""
        found: Tensor = ((vectors.double() - self.mean) / self.scale) @ self.weight + self.bias
        return found


def fit(vectors: Tensor, labels: Tensor, penalty: float, *, standardise: bool = True) -> Readout:
    """Fit logistic regression: the sum of the losses plus ``penalty / 2 * |w|^2``; the bias is free.

    Parameters
    ----------
    vectors, labels : ``[n, H]``, and ``[n]`` of 0 and 1
    penalty : 1 is the usual default (C = 1)
    standardise : give each feature mean 0 and variance 1 first
    """
    z, y = vectors.double(), labels.double()
    mean, scale = torch.zeros(z.shape[1], dtype=torch.float64), torch.ones(z.shape[1], dtype=torch.float64)
    if standardise:
        mean, scale = z.mean(0), z.std(0, correction=0)
        scale = torch.where(scale > 1e-12, scale, torch.ones_like(scale))
        z = (z - mean) / scale
    weight = torch.zeros(z.shape[1], dtype=torch.float64, requires_grad=True)
    bias = torch.zeros((), dtype=torch.float64, requires_grad=True)
    optimiser = torch.optim.LBFGS(
        [weight, bias], max_iter=500, tolerance_grad=1e-9, tolerance_change=1e-12, line_search_fn="strong_wolfe"
    )

    def loss() -> Tensor:
        optimiser.zero_grad()
        total = (
            F.binary_cross_entropy_with_logits(z @ weight + bias, y) + penalty / (2 * len(y)) * weight.square().sum()
        )
        total.backward()  # type: ignore[no-untyped-call]
        return total

    with torch.enable_grad():
        optimiser.step(loss)  # type: ignore[no-untyped-call]
    return Readout(weight.detach(), float(bias.detach()), mean, scale, penalty)


def search(
    vectors: Tensor, labels: Tensor, groups: Tensor, penalties: Sequence[float], *, standardise: bool = True
) -> Readout:
    """Fit with the penalty that has the lowest loss on a quarter of the groups, left out for it; ties take the larger.

    Parameters
    ----------
    groups : ``[n]``, which examples must stay on one side (those of one row)
    """
    chosen = max(penalties)
    if len(penalties) > 1:
        names = torch.unique(groups)
        inner = torch.isin(groups, names[3::4])
        if inner.any() and _both(labels[~inner]):
            losses = {}
            for penalty in penalties:
                probe = fit(vectors[~inner], labels[~inner], penalty, standardise=standardise)
                said = probe.scores(vectors[inner])
                losses[penalty] = float(F.binary_cross_entropy_with_logits(said, labels[inner].double()))
            chosen = min(penalties, key=lambda p: (losses[p], -p))
    return fit(vectors, labels, chosen, standardise=standardise)


def divide(labels: Tensor, groups: Tensor, share: float, generator: torch.Generator) -> Tensor:
    """Return which examples train, ``[n]``: a share of the groups; of each label's own where groups are single.

    Raises
    ------
    DataError
        If one part would have one label only.
    """
    names, sizes = torch.unique(groups, return_counts=True)
    train = torch.zeros(len(labels), dtype=torch.bool)
    if bool((sizes == 1).all()):
        for label in (0, 1):
            found = (labels == label).nonzero().flatten()
            order = found[torch.randperm(len(found), generator=generator)]
            train[order[: round(share * len(found))]] = True
    else:
        order = names[torch.randperm(len(names), generator=generator)]
        train = torch.isin(groups, order[: round(share * len(names))])
    if not (_both(labels[train]) and _both(labels[~train])):
        raise DataError("both labels must occur in what is trained on and in what is held out; give more examples.")
    return train


def _both(labels: Tensor) -> bool:
    return bool((labels == 0).any() and (labels == 1).any())


def accuracy(scores: Tensor, labels: Tensor) -> float:
    """Return the share of examples whose score ``[n]`` is on the side of their label ``[n]``."""
    return float(((scores > 0) == (labels == 1)).double().mean())


def f1(scores: Tensor, labels: Tensor) -> float:
    """Return the harmonic mean of precision and recall for label 1; 0 where nothing of it was found."""
    said, true = scores > 0, labels == 1
    both = int((said & true).sum())
    return 2 * both / (int(said.sum()) + int(true.sum())) if both else 0.0


def auc(scores: Tensor, labels: Tensor) -> float:
    """Return how often an example of label 1 scores above one of label 0; ties count half."""
    ones, zeros = scores[labels == 1].double(), scores[labels == 0].double()
    zeros = zeros.sort().values
    below = torch.searchsorted(zeros, ones).double() + torch.searchsorted(zeros, ones, right=True).double()
    return float(below.mean() / (2 * len(zeros)))


def jumping(curve: Sequence[float], ratio: float = 1.1) -> float | None:
    """Return the relative depth of the first abrupt gain of ``a_1 .. a_L``; None if there is none."""
    for layer in range(1, len(curve)):
        if curve[layer] >= ratio * curve[layer - 1] * (1 - 1e-12):
            return (layer + 1) / len(curve)
    return None


def converging(curve: Sequence[float], flat: float = 0.03) -> float:
    """Return the relative depth behind the last change of ``flat`` or more: from there on the curve is flat."""
    changes = [i for i in range(1, len(curve)) if abs(curve[i] / max(curve[i - 1], 1e-12) - 1) >= flat * (1 - 1e-12)]
    return min((changes[-1] + 2) if changes else 1, len(curve)) / len(curve)


def depth(curve: Sequence[float], delta: float) -> int:
    """Return the smallest number of blocks whose accuracy is within ``delta`` of the best."""
    best = max(curve)
    return next(i for i, value in enumerate(curve, 1) if value >= best - delta - 1e-12)


def depth_interval(correct: Tensor, groups: Tensor, delta: float, draws: int, generator: torch.Generator) -> list[int]:
    """Return the 95 % interval of :func:`depth` over draws of the held-out groups with replacement.

    Parameters
    ----------
    correct : ``[L, n]``, which held-out examples each layer reads right
    groups : ``[n]``
    """
    names, owner = torch.unique(groups, return_inverse=True)
    found = []
    for _ in range(draws):
        drawn = torch.randint(len(names), (len(names),), generator=generator)
        weights = torch.bincount(drawn, minlength=len(names))[owner].double()
        curve = (correct.double() @ weights) / weights.sum().clamp(min=1)
        found.append(depth(curve.tolist(), delta))
    found.sort()
    return [found[int(0.025 * (draws - 1))], found[-1 - int(0.025 * (draws - 1))]]
