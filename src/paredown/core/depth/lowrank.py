"""Linear layers with a low-rank delta beside their weight, and the best delta of a rank.

``y = W x + b + B (A x)``: W may belong to several layers at once, A ``[r, in]`` and B ``[out, r]`` to this one alone.
They stay a side branch: what is added to a weight that others use, too, cannot be merged into it.
"""

from __future__ import annotations

import math
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional

from paredown.errors import ArchitectureError

Start = Literal["svd", "zero"]
EXACT = 1024
"""Matrices with more rows and columns than this, of which few singular vectors are wanted, get them by iteration."""
_OVERSAMPLING, _ITERATIONS = 16, 4


class DeltaLinear(nn.Linear):
    """A linear layer with a delta of low rank beside its weight.

    Parameters
    ----------
    linear : whose parameters are used, as they are
    rank : of the delta, which begins as zero; it is never more than the smaller side of the weight
    """

    def __init__(self, linear: nn.Linear, rank: int) -> None:
        out_features, in_features = linear.weight.shape
        super().__init__(in_features, out_features, bias=False, device="meta")
        self.weight, self.bias = linear.weight, linear.bias
        rank = min(rank, in_features, out_features)
        like: dict[str, Any] = {"dtype": linear.weight.dtype, "device": linear.weight.device}
        wanted = linear.weight.requires_grad
        self.delta_a = nn.Parameter(torch.zeros(rank, in_features, **like), requires_grad=wanted)
        self.delta_b = nn.Parameter(torch.zeros(out_features, rank, **like), requires_grad=wanted)
        self.train(linear.training)

    def forward(self, input: Tensor) -> Tensor:
        """Return ``[..., out]`` for ``[..., in]``."""
        delta = functional.linear(functional.linear(input, self.delta_a), self.delta_b)
        return functional.linear(input, self.weight, self.bias) + delta

    def dense(self) -> Tensor:
        """Return the weight with its delta, ``[out, in]`` in fp32."""
        return self.weight.detach().float() + self.delta_b.detach().float() @ self.delta_a.detach().float()

    def extra_repr(self) -> str:
        """Show the rank as well."""
        return f"{super().extra_repr()}, rank={len(self.delta_a)}"


def is_delta(name: str) -> bool:
    """Whether a parameter's name is that of one half of a delta."""
    return name.rpartition(".")[2] in ("delta_a", "delta_b")


def linears(block: nn.Module) -> dict[str, nn.Linear]:
    """Return the linear layers of a block, by path; all its matrices must be theirs.

    Raises
    ------
    ArchitectureError
        If a matrix belongs to something else (experts, routers): it could have no delta.
    """
    found = {path: m for path, m in block.named_modules() if isinstance(m, nn.Linear)}
    plain = {path for path, m in found.items() if type(m).forward in (nn.Linear.forward, DeltaLinear.forward)}
    for name, parameter in block.named_parameters(remove_duplicate=False):
        if parameter.dim() > 1 and name.rpartition(".")[0] not in plain:
            raise ArchitectureError(
                f"{name} of a block of this model is no plain linear layer and can have no low-rank delta; set rank=0."
            )
    return found


def add_deltas(block: nn.Module, rank: int) -> None:
    """Let every linear layer of a block be a `DeltaLinear`; those that are one already stay.

    Raises
    ------
    ArchitectureError
        See `linears`.
    """
    for path, linear in linears(block).items():
        if not isinstance(linear, DeltaLinear):
            parent, _, name = path.rpartition(".")
            setattr(block.get_submodule(parent), name, DeltaLinear(linear, rank))


def factors(matrix: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """Return A ``[r, in]`` and B ``[out, r]`` in fp32, of which ``B A`` is the closest to ``matrix`` ``[out, in]``.

    The truncated singular value decomposition, with ``B = U S`` and ``A = V^T`` (Relaxed Recursive Transformers). It is
    exact, but of large matrices and small ranks, for which a randomised iteration of fixed seed finds nearly the same.
    """
    matrix = matrix.float()
    rank = min(rank, *matrix.shape)
    if min(matrix.shape) > EXACT and 4 * rank < min(matrix.shape):
        with torch.random.fork_rng():
            torch.manual_seed(0)
            u, s, v = torch.svd_lowrank(matrix, q=rank + _OVERSAMPLING, niter=_ITERATIONS)
        return v[:, :rank].T.contiguous(), u[:, :rank] * s[:rank]
    u, s, vh = torch.linalg.svd(matrix, full_matrices=False)
    return vh[:rank].contiguous(), u[:, :rank] * s[:rank]


def started(residual: Tensor, rank: int, start: Start, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Return the halves of a delta to begin with: `factors` of what is missing, or LoRA's usual start.

    The latter has A uniform in ``+- 1 / sqrt(in)`` and B zero: it adds nothing, and its gradient is not zero.
    """
    if start == "svd":
        return factors(residual, rank)
    rank = min(rank, *residual.shape)
    bound = 1 / math.sqrt(residual.shape[1])
    a = (torch.rand(rank, residual.shape[1], generator=generator) * 2 - 1) * bound
    return a.to(residual.device), residual.new_zeros(residual.shape[0], rank, dtype=torch.float32)
