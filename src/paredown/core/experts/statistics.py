"""Statistics of experts and of linear layers that only some methods need: co-activation, input norms, Hessians."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import combinations
from typing import Any

import torch
from torch import Tensor, nn

from paredown.core.anatomy import Experts, Mlp
from paredown.core.method import View
from paredown.core.statistics import ExpertTraffic, Observer


class CoActivation(Observer):
    """Which experts the router chooses together: ``together [E, E]``, ``tokens [E]``, ``total``.

    ``together`` counts, for every token and every unordered pair of its top-k experts, one on each side of a zero
    diagonal (the source code knows top-2 only; all pairs for larger k are inferred). Only the router's choice is read,
    so the cost does not depend on the number of experts.
    """

    def attach(self, view: View) -> list[Any]:
        """Hook the input of the experts."""
        part = view.part.experts
        assert part is not None
        count = part.count

        def hook(_: nn.Module, args: tuple[Any, ...]) -> None:
            chosen = self.flat(args[1])
            pairs = torch.zeros(count * count, device=chosen.device)
            for a, b in combinations(range(chosen.shape[1]), 2):
                pairs += torch.bincount(chosen[:, a] * count + chosen[:, b], minlength=count * count)
            counted = pairs.reshape(count, count)
            self.add("together", counted + counted.T)
            self.add("tokens", torch.bincount(chosen.reshape(-1), minlength=count))
            self.add("total", torch.tensor(float(chosen.shape[0])))

        return [view.child(part.experts).register_forward_pre_hook(hook)]


class ExpertInputs(ExpertTraffic):
    """What enters the projections of each expert, as sums of squares over its tokens.

    Beside what :class:`ExpertTraffic` gives: ``entering [E, H]`` (into gate and up) and ``inner [E, I]`` (into down,
    before the routing weight). Divided by ``tokens [E]`` they are mean squares; experts without tokens have zeros.
    """

    def __init__(self, *, outputs: bool = True) -> None:
        super().__init__(outputs=outputs)

    def attach(self, view: View) -> list[Any]:
        """Let the experts' forward be computed here while observed."""
        part = view.part.experts
        assert part is not None
        hidden = view.child(part.experts).down_proj.shape[1]
        self.sums["entering"] = torch.zeros(part.count, hidden)
        self.sums["inner"] = torch.zeros(part.count, part.width)
        return super().attach(view)

    def each(self, expert: int, entering: Tensor, inner: Tensor, real: Tensor | None) -> None:
        """Add up squares."""
        for name, x in (("entering", entering), ("inner", inner)):
            x = (x if real is None else x[real]).float()
            self.sums[name] = self.sums[name].to(x.device)
            self.sums[name][expert] += x.square().sum(0)


class ExpertHessians(ExpertTraffic):
    """``X^T X`` of what enters each expert's projections, and the energy of its neurons.

    Beside what :class:`ExpertTraffic` gives with ``energy=True``: ``_entering [E, H, H]``, ``_inner [E, I, I]`` and,
    where there is a shared expert, ``_shared_entering [H, H]`` and ``_shared_inner [I_s, I_s]``; fp32. That is much
    memory with many experts (4 E (H^2 + I^2) bytes a layer), and never stored.
    """

    def __init__(self, *, outputs: bool = True) -> None:
        super().__init__(energy=True, outputs=outputs)

    def attach(self, view: View) -> list[Any]:
        """Let the experts' forward be computed here while observed, and hook a shared expert."""
        part = view.part.experts
        assert part is not None
        hidden = view.child(part.experts).down_proj.shape[1]
        self.sums["_entering"] = torch.zeros(part.count, hidden, hidden)
        self.sums["_inner"] = torch.zeros(part.count, part.width, part.width)
        handles = super().attach(view)
        if part.shared is not None:
            handles += self._attach_shared_hessians(view, part, part.shared)
        return handles

    def each(self, expert: int, entering: Tensor, inner: Tensor, real: Tensor | None) -> None:
        """Add up second moments."""
        for name, x in (("_entering", entering), ("_inner", inner)):
            x = (x if real is None else x[real]).float()
            self.sums[name] = self.sums[name].to(x.device)
            self.sums[name][expert] += x.T @ x

    def _attach_shared_hessians(self, view: View, part: Experts, shared: Mlp) -> list[Any]:
        def taking(name: str) -> Any:
            def hook(_: nn.Module, args: tuple[Any, ...]) -> None:
                x = self.flat(args[0]).float()
                self.add(name, x.T @ x)

            return hook

        return [
            view.child(shared.up).register_forward_pre_hook(taking("_shared_entering")),
            view.child(shared.down).register_forward_pre_hook(taking("_shared_inner")),
        ]


class LinearInputs(Observer):
    """Sums of squares of what enters linear layers: ``input.PATH [in]`` for each path, and ``seen`` (tokens)."""

    def __init__(self, paths: Sequence[str]) -> None:
        super().__init__()
        self.paths = tuple(paths)
        self._last: tuple[Tensor, Tensor] | None = None

    def begin(self, valid: Tensor | None, past: Sequence[Tensor]) -> None:
        """Announce the next batch."""
        super().begin(valid, past)
        self._last = None

    def attach(self, view: View) -> list[Any]:
        """Hook the layers' inputs."""

        def taking(path: str, first: bool) -> Any:
            def hook(_: nn.Module, args: tuple[Any, ...]) -> None:
                # Queries, keys and values read one tensor; so do gate and up.
                if self._last is None or self._last[0] is not args[0]:
                    self._last = (args[0], self.flat(args[0]).float().square().sum(0))
                self.add(f"input.{path}", self._last[1])
                if first:
                    self.add("seen", torch.tensor(float(self.flat(args[0]).shape[0])))

            return hook

        return [view.child(path).register_forward_pre_hook(taking(path, i == 0)) for i, path in enumerate(self.paths)]

    def result(self) -> dict[str, Tensor]:
        """Return the statistics on the CPU."""
        self._last = None
        return super().result()
