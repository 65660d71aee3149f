"""Experts of unequal width: stored flat, computed one by one or as micro-experts of one common width."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from torch.nn import functional
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS, _default_apply_gate

from paredown.errors import ArchitectureError, BudgetError

ALIGNMENT = 64
"""Bytes: products of operands that start elsewhere round differently on the CPU."""
ROWS = 32


class RaggedExperts(nn.Module):
    """Fused experts whose hidden widths ``w_0 .. w_{E-1}`` differ; same call as transformers' experts modules.

    The parameters are called ``gate_up_flat [2 * sum(w), H]`` (expert e: its gate rows, then its up rows) and
    ``down_flat [sum(w), H]`` (row = a column of the expert's down projection). They must not be called
    ``gate_up_proj`` and ``down_proj``, as transformers renames those on saving and loading; under these names they
    are properties. An expert of width 0 returns zeros.

    Parameters
    ----------
    widths
        Width of each expert.
    hidden_dim
        Width of the residual stream H.
    act_fn
        Activation of the gate.
    """

    paredown_ragged = True

    def __init__(
        self,
        widths: Sequence[int],
        hidden_dim: int,
        act_fn: nn.Module,
        *,
        dtype: torch.dtype | None = None,
        device: torch.device | None = None,
    ) -> None:
        super().__init__()
        self.widths = tuple(int(width) for width in widths)
        self.num_experts = len(self.widths)
        self.hidden_dim = hidden_dim
        self.intermediate_dim = max(self.widths)
        self.act_fn = act_fn
        total = sum(self.widths)
        self.gate_up_flat = nn.Parameter(torch.empty(2 * total, hidden_dim, dtype=dtype, device=device))
        self.down_flat = nn.Parameter(torch.empty(total, hidden_dim, dtype=dtype, device=device))
        self._starts = [sum(self.widths[:e]) for e in range(self.num_experts)]

    @classmethod
    def cut(cls, experts: Any, keep: Sequence[Sequence[int]]) -> RaggedExperts:
        """Build from fused or ragged ``experts`` the experts that keep these neurons, one list an expert."""
        if getattr(experts, "has_bias", False) or getattr(experts, "is_transposed", False):
            raise ArchitectureError(
                f"{type(experts).__name__} has biases or transposed weights, which ragged experts do not hold; "
                "keep the same number of neurons in each expert"
            )
        gating = getattr(type(experts), "_apply_gate", _default_apply_gate)
        if gating is not _default_apply_gate:
            raise ArchitectureError(
                f"{type(experts).__name__} gates its experts in its own way, which ragged experts do not know; "
                "keep the same number of neurons in each expert"
            )
        sources = [expert_weights(experts, e) for e in range(len(keep))]
        like = sources[0][0]
        ragged = cls(
            [len(kept) for kept in keep], int(experts.hidden_dim), experts.act_fn, dtype=like.dtype, device=like.device
        )
        with torch.no_grad():
            for e, kept in enumerate(keep):
                index = torch.tensor(list(kept), dtype=torch.long, device=like.device)
                for own, source in zip(ragged.expert(e), sources[e], strict=True):
                    own.copy_(source.index_select(0, index))
        return ragged

    @classmethod
    def select(cls, experts: RaggedExperts, keep: Sequence[int]) -> RaggedExperts:
        """Build the experts that stay when only these, in this order, do."""
        like = experts.gate_up_flat
        widths = [experts.widths[e] for e in keep]
        chosen = cls(widths, experts.hidden_dim, experts.act_fn, dtype=like.dtype, device=like.device)
        with torch.no_grad():
            for new, old in enumerate(keep):
                for own, source in zip(chosen.expert(new), experts.expert(old), strict=True):
                    own.copy_(source)
        return chosen

    @property
    def gate_up_proj(self) -> torch.Tensor:
        """The flat gate and up rows ``[2 * sum(w), H]``."""
        return self.gate_up_flat

    @property
    def down_proj(self) -> torch.Tensor:
        """The flat, transposed down projections ``[sum(w), H]``."""
        return self.down_flat

    def expert(self, e: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Return views of one expert: gate ``[w, H]``, up ``[w, H]`` and transposed down ``[w, H]``."""
        start, width = self._starts[e], self.widths[e]
        gate = self.gate_up_flat[2 * start : 2 * start + width]
        up = self.gate_up_flat[2 * start + width : 2 * (start + width)]
        return gate, up, self.down_flat[start : start + width]

    def forward(
        self, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
    ) -> torch.Tensor:
        """Mix the chosen experts.

        Parameters
        ----------
        hidden_states
            ``[N, H]``.
        top_k_index, top_k_weights
            ``[N, k]``: the chosen experts of each token and their weights.
        """
        self._align()
        mixed = torch.zeros_like(hidden_states)
        chosen = top_k_index.reshape(-1)
        # Sorting once gives every expert its tokens as one slice.
        order = torch.argsort(chosen, stable=True)
        counts = torch.bincount(chosen, minlength=self.num_experts).tolist()
        start = 0
        for e, count in enumerate(counts):
            places, start = order[start : start + count], start + count
            if not count or e >= self.num_experts or self.widths[e] == 0:
                continue
            token = torch.div(places, top_k_index.shape[1], rounding_mode="floor")
            gate_up, down = self._pair(e)
            inputs = filled(hidden_states[token])
            gate, up = functional.linear(inputs, gate_up).chunk(2, dim=-1)
            part = ((self.act_fn(gate) * up) @ down)[:count] * top_k_weights.reshape(-1)[places, None]
            mixed.index_add_(0, token, part.to(mixed.dtype))
        return mixed

    def _pair(self, e: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Return one expert's gate and up rows ``[2w, H]`` and transposed down ``[w, H]``."""
        start, width = self._starts[e], self.widths[e]
        gate_up = self.gate_up_flat[2 * start : 2 * (start + width)]
        return _aligned(gate_up), _aligned(self.down_flat[start : start + width])

    def _align(self) -> None:
        """Move weights that do not start on a boundary, once, so that no expert has to be copied in each pass."""
        for parameter in (self.gate_up_flat, self.down_flat):
            if parameter.device.type == "cpu" and parameter.data_ptr() % ALIGNMENT:
                parameter.data = parameter.data.clone()

    def micro(self, chunk: int) -> MicroExperts:
        """Split every expert into micro-experts of ``chunk`` channels (the last one filled up with zeros).

        Exact up to the order of summation, since a gated expert is a sum over its channels.

        Raises
        ------
        BudgetError
            If a row of ``chunk`` channels is not a whole number of 16 bytes, which grouped products need.
        """
        step = max(16 // self.down_flat.element_size(), 1)
        if chunk < 1 or chunk % step:
            raise BudgetError(
                f"micro-experts of {chunk} channels cannot be multiplied in groups; use a multiple of {step}"
            )
        return MicroExperts(self, chunk)

    def extra_repr(self) -> str:
        """Show what distinguishes this module."""
        return f"widths={self.widths}, hidden_dim={self.hidden_dim}"


def _aligned(view: torch.Tensor) -> torch.Tensor:
    """Copy what does not start on a 64-byte boundary of the CPU's memory.

    Weights read from a file start anywhere, and small matrix products round differently there; with aligned operands
    the reloaded model gives the same bits as the one in memory.
    """
    return view if view.device.type != "cpu" or view.data_ptr() % ALIGNMENT == 0 else view.clone()


def filled(x: torch.Tensor) -> torch.Tensor:
    """Fill many rows up to a round number with zeros, where each new number of rows would cost a kernel.

    In half precision the CPU prepares a kernel for every shape that it has not just seen, which takes longer than to
    multiply the few rows of one expert.
    """
    missing = -len(x) % ROWS if len(x) > 1 and x.device.type == "cpu" and x.element_size() == 2 else 0
    return functional.pad(x, (0, 0, 0, missing)) if missing else x


class MicroExperts(nn.Module):
    """Ragged experts as M stock experts of one width: ``gate_up_proj [M, 2c, H]``, ``down_proj [M, H, c]``.

    Has the attributes that transformers' grouped matrix products read.
    """

    def __init__(self, ragged: RaggedExperts, chunk: int) -> None:
        super().__init__()
        counts = [-(-width // chunk) for width in ragged.widths]
        total = max(sum(counts), 1)
        like = ragged.gate_up_flat
        self.num_experts = total
        self.hidden_dim = ragged.hidden_dim
        self.intermediate_dim = chunk
        self.act_fn = ragged.act_fn
        self.has_gate, self.has_bias, self.has_post_expert_norm = True, False, False
        self.is_transposed, self.is_concatenated, self._is_expert_parallel = False, True, False
        gate_up, down = like.new_zeros(total, 2 * chunk, self.hidden_dim), like.new_zeros(total, self.hidden_dim, chunk)
        # members[e] lists the micro-experts of expert e, filled up with a valid one that is then given no weight.
        members = torch.zeros(ragged.num_experts, max(max(counts), 1), dtype=torch.long, device=like.device)
        present = torch.zeros_like(members, dtype=like.dtype)
        slot = 0
        with torch.no_grad():
            for e, count in enumerate(counts):
                gate, up, back = ragged.expert(e)
                for part in range(count):
                    rows = slice(part * chunk, min((part + 1) * chunk, ragged.widths[e]))
                    width = rows.stop - rows.start
                    gate_up[slot, :width], gate_up[slot, chunk : chunk + width] = gate[rows], up[rows]
                    down[slot, :, :width] = back[rows].T
                    members[e, part], present[e, part] = slot, 1
                    slot += 1
        self.gate_up_proj, self.down_proj = nn.Parameter(gate_up), nn.Parameter(down)
        self.members, self.present = nn.Buffer(members, persistent=False), nn.Buffer(present, persistent=False)

    _apply_gate = _default_apply_gate

    def forward(
        self, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
    ) -> torch.Tensor:
        """Mix the chosen experts; shapes as in `RaggedExperts.forward`."""
        index = self.members[top_k_index].flatten(1)
        weights = (top_k_weights[..., None] * self.present[top_k_index]).flatten(1)
        mixed: torch.Tensor = ALL_EXPERTS_FUNCTIONS["grouped_mm"](self, hidden_states, index, weights)
        return mixed


def expert_weights(experts: Any, e: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return views of gate, up and transposed down of expert ``e``, each ``[w, H]``, of fused or ragged experts."""
    if isinstance(experts, RaggedExperts):
        return experts.expert(e)
    gate, up = experts.gate_up_proj[e].chunk(2, dim=0)
    return gate, up, experts.down_proj[e].T
