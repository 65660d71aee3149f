"""Streaming statistics of activations: sums and maxima, taken while a block runs, never the activations themselves.

- An :class:`Observer` hooks one block, sees batch after batch, and ends as a handful of small fp32 tensors.
- All statistics are sums or maxima, so data-parallel calibration is an all-reduce (:meth:`Observer.reduce`).
- Observed experts run once: :class:`ExpertTraffic` computes the experts itself and looks at what passes by, instead
  of running them a second time.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from paredown.core.anatomy import Attention, Experts, Mlp
from paredown.core.method import View
from paredown.core.ragged import filled
from paredown.errors import ArchitectureError


class Observer:
    """Looks at one block while calibration data pass through it.

    Subclasses hook modules in :meth:`attach` and add to ``sums`` and ``maxima`` (fp32). ``valid`` is the current
    batch's mask of real tokens ``[B, T]`` (None: all are real), ``past`` the inputs of the last blocks for this batch.
    """

    def __init__(self) -> None:
        self.sums: dict[str, Tensor] = {}
        self.maxima: dict[str, Tensor] = {}
        self.valid: Tensor | None = None
        self.past: Sequence[Tensor] = ()

    def attach(self, view: View) -> list[Any]:
        """Hook the block; return handles that have ``remove()``."""
        raise NotImplementedError

    def begin(self, valid: Tensor | None, past: Sequence[Tensor]) -> None:
        """Announce the next batch."""
        self.valid, self.past = valid, past

    def result(self) -> dict[str, Tensor]:
        """Return the statistics on the CPU."""
        self.reduce()
        return {k: v.detach().cpu() for k, v in (*self.sums.items(), *self.maxima.items())}

    def reduce(self) -> None:
        """Add up over data-parallel workers, if there are any."""
        if dist.is_available() and dist.is_initialized():
            for tensor in self.sums.values():
                dist.all_reduce(tensor, op=dist.ReduceOp.SUM)
            for tensor in self.maxima.values():
                dist.all_reduce(tensor, op=dist.ReduceOp.MAX)

    def add(self, name: str, value: Tensor) -> None:
        """Add to a running sum, in fp32."""
        value = value.float()
        self.sums[name] = self.sums[name] + value if name in self.sums else value

    def raise_to(self, name: str, value: Tensor) -> None:
        """Raise a running maximum."""
        value = value.float()
        self.maxima[name] = torch.maximum(self.maxima[name], value) if name in self.maxima else value

    def flat(self, x: Tensor) -> Tensor:
        """Return the real tokens of ``x [B, T, ...]`` (or ``[B*T, ...]``) as ``[n, ...]``."""
        if self.valid is None:
            return x.flatten(0, -2) if x.ndim > 2 else x
        mask = self.valid.reshape(-1).bool()
        return x.reshape(-1, x.shape[-1])[mask]


@contextlib.contextmanager
def observing(view: View, observers: Sequence[Observer]) -> Iterator[None]:
    """Attach observers to a block and take them off again, whatever happens."""
    handles: list[Any] = []
    try:
        for observer in observers:
            handles += observer.attach(view)
        yield
    finally:
        for handle in handles:
            handle.remove()


class Similarity(Observer):
    """Mean cosine between the residual stream before and after each sub-layer, and before and after the block.

    Gives sums ``attention``, ``mlp``, ``block``, ``window`` (block input ``lookback`` blocks ago against this block's
    output) and ``tokens``. What *enters* the stream is compared with what *leaves* it; norms are not part of either.
    The stream between the two sub-layers is taken where the second one reads it, so that families that scale what
    they add (Granite) are measured as they are.
    """

    def attach(self, view: View) -> list[Any]:
        """Hook the block and what reads the stream, or adds to it, within the block."""
        part = view.part
        dense = part.mlp or part.experts
        seen: dict[str, Tensor] = {}

        def enter(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            seen["in"] = args[0] if args else kwargs["hidden_states"]

        def keep(name: str) -> Any:
            def hook(_: nn.Module, __: Any, output: Any) -> None:
                seen[name] = output[0] if isinstance(output, tuple) else output

            return hook

        def between(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            # The first to read the stream is the norm before the MLP, or the MLP itself where it has none.
            seen.setdefault("middle", args[0] if args else kwargs["hidden_states"])

        def leave(_: nn.Module, __: Any, output: Any) -> None:
            out = output[0] if isinstance(output, tuple) else output
            start, end = self.flat(seen["in"]).float(), self.flat(out).float()
            self.add("tokens", torch.tensor(float(start.shape[0])))
            if part.residual == "pre":
                middle = self.flat(seen["middle"]).float() if "middle" in seen else end
                if part.attention is not None:
                    self.add("attention", _cosines(start, middle))
                if dense is not None:
                    self.add("mlp", _cosines(middle, end))
            else:
                for name in ("attention", "mlp"):
                    if name in seen:
                        self.add(name, _cosines(start, start + self.flat(seen[name]).float()))
            self.add("block", _cosines(start, end))
            if self.past:
                self.add("window", _cosines(self.flat(self.past[0]).float(), end))
            seen.clear()

        handles = [
            view.module.register_forward_pre_hook(enter, with_kwargs=True),
            view.module.register_forward_hook(leave),
        ]
        if part.residual == "pre":
            for path in (*dense.norms, dense.path) if dense is not None else ():
                handles.append(view.child(path).register_forward_pre_hook(between, with_kwargs=True))
            return handles
        if part.attention is not None:
            handles.append(view.child(part.attention.contribution).register_forward_hook(keep("attention")))
        if dense is not None:
            handles.append(view.child(dense.contribution).register_forward_hook(keep("mlp")))
        return handles


class ExpertTraffic(Observer):
    """What passes through the experts of one block.

    Parameters
    ----------
    response : also take ``response [E, I]``, the largest ``|act(gate)|`` of each neuron over its tokens
    energy : also take ``energy [E, I]`` and ``peak [E, I]``: sum and maximum of ``(weight * inner)^2`` over tokens,
        where ``inner = act(gate) * up``; and, where there is a shared expert, ``shared_energy``, ``shared_peak [I_s]``
    outputs : False skips the down projections; only for passes whose output nobody uses

    Always gives ``tokens [E]`` (how many tokens each expert saw), ``mass [E]`` (sum of the routing weights really
    applied) and ``total`` (all tokens).
    """

    def __init__(self, *, response: bool = False, energy: bool = False, outputs: bool = True) -> None:
        super().__init__()
        self.response, self.energy, self.outputs = response, energy, outputs

    def attach(self, view: View) -> list[Any]:
        """Let the experts' forward be computed here while observed."""
        part = view.part.experts
        assert part is not None
        module = view.child(part.experts)
        for odd in ("has_bias", "is_transposed", "has_post_expert_norm", "paredown_ragged"):
            if getattr(module, odd, False):
                raise ArchitectureError(
                    f"the experts of layer {view.part.index} ({type(module).__name__}) cannot be measured neuron by "
                    f"neuron ({odd}); use a method that looks at no neurons, or drop whole sub-layers."
                )

        def forward(hidden: Tensor, index: Tensor, weights: Tensor, **_: Any) -> Tensor:
            return self._run(module, part, hidden, index, weights)

        handles: list[Any] = [_Override(module, forward)]
        if self.energy and part.shared is not None:
            handles += self._attach_shared(view, part, part.shared)
        return handles

    def _run(self, module: Any, part: Experts, hidden: Tensor, index: Tensor, weights: Tensor) -> Tensor:
        if self.valid is not None:
            real = self.valid.reshape(-1, 1).bool()
            counted = torch.where(real, weights, torch.zeros_like(weights))
            hits = real.expand_as(index).float()
        else:
            counted, hits = weights, torch.ones_like(index, dtype=torch.float32)
        flat = index.reshape(-1)
        zeros = torch.zeros(part.count, device=hidden.device)
        self.add("tokens", zeros.index_add(0, flat, hits.reshape(-1)))
        self.add("mass", zeros.index_add(0, flat, counted.float().reshape(-1)))
        self.add("total", torch.tensor(float(hits[:, 0].sum())))
        out = torch.zeros_like(hidden)
        response = torch.zeros(part.count, part.width, device=hidden.device)
        energy, peak = torch.zeros_like(response), torch.zeros_like(response)
        # Sorting once gives every expert its tokens as one slice.
        order = torch.argsort(flat, stable=True)
        ends = torch.bincount(flat, minlength=part.count).cumsum(0).tolist()
        start = 0
        for expert, end in enumerate(ends):
            chosen, start = order[start:end], end
            if not len(chosen):
                continue
            token = chosen // index.shape[1]
            gate_up = _linear(hidden[token], module.gate_up_proj[expert])
            inner = _gated(module, gate_up)
            self.each(expert, hidden[token], inner, None if self.valid is None else hits.reshape(-1)[chosen] > 0)
            weight = weights.reshape(-1)[chosen].unsqueeze(-1)
            if self.response:
                act = module.act_fn(gate_up.chunk(2, dim=-1)[0])
                real_act = act if self.valid is None else act[hits.reshape(-1)[chosen] > 0]
                if len(real_act):
                    response[expert] = real_act.abs().amax(0).float()
            if self.energy:
                squared = (inner.float() * counted.reshape(-1)[chosen].float().unsqueeze(-1)).square()
                energy[expert], peak[expert] = squared.sum(0), squared.amax(0)
            if self.outputs:
                y = _linear(inner, module.down_proj[expert]) * weight
                out.index_add_(0, token, y.to(out.dtype))
        if self.response:
            self.raise_to("response", response)
        if self.energy:
            self.add("energy", energy)
            self.raise_to("peak", peak)
        return out

    def each(self, expert: int, entering: Tensor, inner: Tensor, real: Tensor | None) -> None:
        """Look at the tokens of one expert in one batch; for subclasses that measure more.

        Parameters
        ----------
        entering : ``[n, H]``, what the expert is given
        inner : ``[n, I]``, what its down projection is given, before the routing weight
        real : ``[n]``, False for padding; None when all are real
        """

    def _attach_shared(self, view: View, part: Experts, shared: Mlp) -> list[Any]:
        pending: list[Tensor] = []

        def take(inner: Tensor, weight: Tensor | None) -> None:
            squared = inner.float() if weight is None else inner.float() * weight.float()
            squared = squared.square()
            self.add("shared_energy", squared.sum(0))
            self.raise_to("shared_peak", squared.amax(0))

        def entering_down(_: nn.Module, args: tuple[Any, ...]) -> None:
            if part.shared_gate is None:
                take(self.flat(args[0]), None)
            else:
                pending.append(self.flat(args[0]))

        def gated(_: nn.Module, __: Any, output: Tensor) -> None:
            # Families compute the gate before or after the shared expert; both have run when the block ends.
            pending.append(torch.sigmoid(self.flat(output)))
            if len(pending) == 2:
                inner, weight = sorted(pending, key=lambda t: -t.shape[-1])
                take(inner, weight)
                pending.clear()

        handles = [view.child(shared.down).register_forward_pre_hook(entering_down)]
        if part.shared_gate is not None:
            handles.append(view.child(part.shared_gate).register_forward_hook(gated))
        return handles


class NeuronEnergy(Observer):
    """Energy of the hidden neurons of a dense MLP: sums ``energy [I]`` of squares, ``peak [I]``, and ``total``."""

    def attach(self, view: View) -> list[Any]:
        """Hook the input of the down projection."""
        part = view.part.mlp
        assert part is not None

        def hook(_: nn.Module, args: tuple[Any, ...]) -> None:
            squared = self.flat(args[0]).float().square()
            self.add("energy", squared.sum(0))
            self.raise_to("peak", squared.amax(0))
            self.add("total", torch.tensor(float(squared.shape[0])))

        return [view.child(part.down).register_forward_pre_hook(hook)]


class HeadMoments(Observer):
    """Second moments of each query head's output: sum ``moments [heads, d, d]`` and ``total``.

    With the output projection's slice ``W_h [H, d]``, ``trace(W_h M_h W_h^T)`` is the energy that head ``h`` adds.
    """

    def attach(self, view: View) -> list[Any]:
        """Hook the input of the output projection."""
        part = view.part.attention
        assert part is not None
        return [view.child(part.o).register_forward_pre_hook(self._hook(part))]

    def _hook(self, part: Attention) -> Any:
        def hook(_: nn.Module, args: tuple[Any, ...]) -> None:
            x = self.flat(args[0]).float()
            heads = x.reshape(x.shape[0], part.heads, -1).transpose(0, 1)
            self.add("moments", heads.transpose(1, 2) @ heads)
            self.add("total", torch.tensor(float(x.shape[0])))

        return hook


class _Override:
    """Replaces one module's forward until removed."""

    def __init__(self, module: nn.Module, forward: Any) -> None:
        self.module = module
        module.forward = forward

    def remove(self) -> None:
        """Give the class's own forward back."""
        del self.module.forward


def _linear(x: Tensor, weight: Tensor) -> Tensor:
    """Return ``x @ weight.T``."""
    return F.linear(filled(x), weight)[: len(x)]


def _gated(module: Any, gate_up: Tensor) -> Tensor:
    """Return the hidden activations ``[n, I]``, gated as the family does it (some clamp before they multiply)."""
    own = getattr(module, "_apply_gate", None)
    if own is not None:
        inner: Tensor = own(gate_up)
        return inner
    gate, up = gate_up.chunk(2, dim=-1)
    activated: Tensor = module.act_fn(gate) * up
    return activated


def _cosines(x: Tensor, y: Tensor) -> Tensor:
    return F.cosine_similarity(x, y, dim=-1, eps=1e-12).sum()
