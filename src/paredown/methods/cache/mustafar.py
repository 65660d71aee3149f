"""Mustafar: old keys and values lose their smallest elements, token by token, and are packed under bitmaps."""

from __future__ import annotations

from typing import ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from paredown.core import budget
from paredown.core.checkpoint import Model
from paredown.core.method import Place, Policy, register
from paredown.core.runtime import Runtime
from paredown.core.stores import elements
from paredown.core.stores.bitmap import Kind

Rule = Literal["exact", "official"]


@register
class Mustafar(Policy):
    """Remove the elements of smallest magnitude from each cached key and each cached value.

    Every token of every KV head loses the same number of elements, once it has left the window of latest tokens; what
    stays is never rescaled. A prompt's own attention is exact. Tokens outside the window are packed 256 at a time: the
    bitmap format takes about two thirds of the dense bytes at half of the elements, and 45 % at 0.3.
    """

    name: ClassVar[str] = "mustafar"
    title: ClassVar[str] = "Mustafar: Promoting Unstructured Sparsity for KV Cache Pruning in LLM Inference"
    year: ClassVar[int | None] = 2025
    arxiv: ClassVar[str | None] = "2505.22913"
    axis: ClassVar = "cache"
    unit: ClassVar[str] = "key and value elements"
    places: ClassVar[frozenset[Place]] = frozenset({"keys", "values"})

    window: int = Field(32, ge=0, description="Latest tokens that keep all elements.")
    rule: Rule = Field(
        "exact",
        description="How many go: exactly the share, ties keeping the lower channel; or as the official code counts, "
        "one fewer, and none that ties with the smallest that stays.",
    )
    by_group: bool = Field(
        False, description="Prune tokens when 256 of them are packed, as the official kernel does, not one by one."
    )

    def runtime(self, model: Model) -> Runtime:
        """Keep keys and values sparse in all layers without a sliding window."""
        elements.check(self.keep)
        return _Mustafar(self, model)


class _Mustafar(Runtime):
    policy: Mustafar

    def __init__(self, policy: Mustafar, model: Model) -> None:
        super().__init__(policy, model)

    def store(self, layer: int) -> _Magnitudes:
        return _Magnitudes(self.policy)


class _Magnitudes(elements.SparseElements):
    def __init__(self, policy: Mustafar) -> None:
        super().__init__(policy.window, by_group=policy.by_group)
        self._keep, self._rule = policy.keep, policy.rule

    def stays(self, elements: Tensor, kind: Kind, at: Tensor) -> Tensor:
        return largest(elements, self._keep, self._rule)


def largest(elements: Tensor, keep: float, rule: Rule = "exact") -> Tensor:
    """Return which elements of each vector (last axis) stay."""
    width = elements.shape[-1]
    gone = budget.removed(width, keep)
    size = elements.abs()
    if rule == "official":
        # The threshold itself stays, so one element fewer goes than was asked for.
        return size >= size.kthvalue(max(1, gone), dim=-1, keepdim=True).values
    order = size.sort(dim=-1, descending=True, stable=True).indices[..., : width - gone]
    return torch.zeros_like(elements, dtype=torch.bool).scatter_(-1, order, True)
