"""Routers of experts: change their logits, see where they send tokens, and say how evenly and how redundantly.

- A router's forward is the family's own throughout (groups, correction bias, normalisation, scaling). Only what its one
  linear map returns is changed, on the way.
- Entropy and mutual information are in nats and come from plain counts; nothing is estimated.
"""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from paredown.core import forward
from paredown.core.anatomy import resolve
from paredown.core.checkpoint import Model
from paredown.errors import ArchitectureError

Change = Callable[[Tensor, Tensor], Tensor]
"""From what the router reads ``[n, d]`` and its logits ``[n, E]`` to other logits ``[n, E]``."""


class _Intercept(TorchFunctionMode):
    """Hands the result of the first linear map with the router's weight to ``change``."""

    def __init__(self, shape: torch.Size, change: Change) -> None:
        super().__init__()
        self.shape, self.change, self.done = shape, change, False

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        # Some families cast the weight first, so it is known by its shape.
        if self.done or func is not F.linear or len(args) < 2 or args[1].shape != self.shape:
            return out
        self.done = True
        wide: Tensor = out
        flat = wide.reshape(-1, wide.shape[-1])
        return self.change(args[0].reshape(len(flat), -1), flat).view_as(wide)


@contextlib.contextmanager
def rerouted(router: nn.Module, change: Change) -> Iterator[None]:
    """Let ``change`` have the last word on a router's logits for as long as the context is open.

    Raises
    ------
    ArchitectureError
        When it runs, if the router computes its logits by no linear map with its own weight.
    """
    own, held = router.forward, vars(router).get("forward")
    weight: Any = router.weight

    def forward(*args: Any, **kwargs: Any) -> Any:
        mode = _Intercept(weight.shape, change)
        with mode:
            out = own(*args, **kwargs)
        if not mode.done:
            raise ArchitectureError(
                f"{type(router).__name__} computes its logits in a way that is not known, so they cannot be changed; "
                "use a method that leaves routers alone."
            )
        return out

    router.forward = forward
    try:
        yield
    finally:
        if held is None:
            del router.forward
        else:
            router.forward = held


def layers(model: Model) -> list[int]:
    """Return the layers of the language model that have routed experts."""
    return [part.index for part in model.anatomy.language.blocks if part.experts is not None]


def router(model: Model, layer: int) -> nn.Module:
    """Return the router of a layer that has one."""
    part = model.anatomy.language.blocks[layer]
    assert part.experts is not None
    return resolve(model.hf, f"{part.path}.{part.experts.router}")


def balance(logits: Sequence[Tensor], top_k: int, real: Tensor | None = None) -> Tensor:
    """Return the balance loss, pooled: tokens of all layers are one list before shares and means are multiplied.

    ``E * sum_e share_e * probability_e``, where ``share_e`` counts all ``k`` choices of a token: ``k`` at perfect
    balance, not 1. Probabilities are the softmax of the logits, as published, also where the host scores by a sigmoid.
    Layers with unlike numbers of experts are pooled apart, and their losses averaged by the number of layers.

    Parameters
    ----------
    logits : ``[n, E]`` a layer
    real : ``[n]`` bool, which tokens count; None for all
    """
    total = logits[0].new_zeros((), dtype=torch.float32)
    for count in sorted({one.shape[1] for one in logits}):
        alike = [one if real is None else one[real] for one in logits if one.shape[1] == count]
        probability = torch.cat(alike).float().softmax(-1)
        chosen = probability.topk(min(top_k, count), dim=-1).indices
        share = F.one_hot(chosen, count).sum(1).float().mean(0)
        total = total + len(alike) / len(logits) * count * (share * probability.mean(0)).sum()
    return total


def entropy(load: Tensor) -> float:
    """Return the entropy of how tokens are spread over experts, ``load [E]`` in counts, as a share of its maximum.

    1 is perfect balance; 0 is one expert for all tokens (or a layer with one expert).
    """
    if len(load) < 2 or not float(load.sum()):
        return 0.0
    share = load.double() / load.sum()
    most = torch.tensor(float(len(load)), dtype=torch.float64).log()
    return float(torch.special.entr(share).sum() / most)


def mutual_information(one: Tensor, other: Tensor, counts: tuple[int, int]) -> float:
    """Return how much the expert that a token has in one layer tells of the one in another, in nats.

    Parameters
    ----------
    one, other : ``[n, k]`` indices of experts, of the same tokens; each of the ``k * k`` pairs of a token counts alike
    counts : experts of both layers
    """
    pairs = (one[:, :, None] * counts[1] + other[:, None, :]).flatten()
    joint = torch.bincount(pairs, minlength=counts[0] * counts[1]).double().view(counts)
    joint = joint / joint.sum().clamp_min(1)
    apart = joint.sum(1, keepdim=True) * joint.sum(0, keepdim=True)
    told = torch.where(joint > 0, joint * (joint / apart.clamp_min(1e-300)).log(), 0.0).sum()
    return max(0.0, float(told))


@torch.no_grad()
def traffic(model: Model, ids: Tensor, mask: Tensor | None = None, *, batch: int = 4) -> dict[int, Tensor]:
    """Return, for each layer with experts, which ones the real tokens of ``ids [N, T]`` are sent to: ``[n, k]``.

    What is attached to the model acts; layers are keyed by their index.
    """
    found: dict[int, list[Tensor]] = {layer: [] for layer in layers(model)}
    handles = []
    real: list[Tensor | None] = [None]

    def watch(layer: int) -> Any:
        def hook(_: nn.Module, __: Any, output: Any) -> None:
            index: Tensor = output[2].cpu()
            found[layer].append(index if real[0] is None else index[real[0]])

        return hook

    try:
        for layer in found:
            handles.append(router(model, layer).register_forward_hook(watch(layer)))
        for start in range(0, len(ids), batch):
            some = None if mask is None else mask[start : start + batch]
            real[0] = None if some is None else some.flatten().bool().cpu()
            forward.logits(model.hf, ids[start : start + batch], some)
    finally:
        for handle in handles:
            handle.remove()
    return {layer: torch.cat(parts) for layer, parts in found.items()}


def spread(model: Model, sent: dict[int, Tensor]) -> tuple[float, float]:
    """Return the mean entropy of the layers' loads, and the mean mutual information of adjacent layers with experts.

    The second is in nats; 0 where there is one layer.
    """
    experts = {part.index: part.experts.count for part in model.anatomy.language.blocks if part.experts is not None}
    loads = [entropy(torch.bincount(index.flatten(), minlength=experts[layer])) for layer, index in sent.items()]
    order = sorted(sent)
    told = [
        mutual_information(sent[one], sent[other], (experts[one], experts[other]))
        for one, other in itertools.pairwise(order)
    ]
    return sum(loads) / max(1, len(loads)), sum(told) / max(1, len(told))
