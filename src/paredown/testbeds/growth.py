"""Start a larger model where a smaller one stands.

- `grow`: more blocks and wider MLPs, the same function at first. After LLaMA-Pro (Wu et al. 2024, arXiv:2401.02415): an
  added block is a copy whose output projections are zero, an added neuron has a zero column in the down projection.
  Both change nothing until they are trained.
- `split`: experts instead of an MLP, each with channels of it. After LLaMA-MoE (Zhu et al. 2024, arXiv:2406.16554). The
  function changes; it is right on average over the draws.
"""

from __future__ import annotations

import re
from typing import Any

import torch
from torch import Tensor

LAYER = re.compile(r"\.layers\.(\d+)\.")
OUTPUTS = ("o_proj.weight", "down_proj.weight")


def grow(model: Any, earlier: Any) -> None:
    """Give `model` the function of `earlier`.

    Parameters
    ----------
    model
        A Llama with fresh weights, a whole multiple of the blocks of `earlier`, and MLPs at least as wide.
    earlier
        The smaller Llama; equal in everything else.
    """
    before, after = (config.get_text_config().num_hidden_layers for config in (earlier.config, model.config))
    times, rest = divmod(after, before)
    if rest or times < 1:
        raise ValueError(f"cannot grow from {before} to {after} blocks: only to a whole multiple")
    source, target = earlier.state_dict(), model.state_dict()
    with torch.no_grad():
        for key, tensor in target.items():
            found = LAYER.search(key)
            layer = int(found[1]) if found else 0
            old = source[LAYER.sub(f".layers.{layer // times}.", key)]
            tensor.copy_(_widened(key, old, tensor))
            if layer % times and key.endswith(OUTPUTS):
                tensor.zero_()


def split(model: Any, earlier: Any, seed: int = 0) -> None:
    """Make experts of the MLPs of `earlier`; everything else is taken over.

    Parameters
    ----------
    model
        A Mixtral with fresh weights: its routers stay fresh. Its experts are at most as wide as the MLPs.
    earlier
        A Llama, equal in everything but the experts.
    seed
        Which channels each expert gets; no expert gets a channel twice, several may share one.
    """
    source, target = earlier.state_dict(), model.state_dict()
    wide, narrow = earlier.config.intermediate_size, model.config.intermediate_size
    if narrow > wide:
        raise ValueError(f"experts of width {narrow} cannot be made of MLPs of width {wide}: only narrower ones")
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for key, tensor in target.items():
            if ".mlp." not in key:
                tensor.copy_(source[key])
        for layer in range(model.config.num_hidden_layers):
            gate, up, down = (source[f"model.layers.{layer}.mlp.{part}_proj.weight"] for part in ("gate", "up", "down"))
            experts = model.model.layers[layer].mlp.experts
            for expert in range(len(experts.down_proj)):
                chosen = torch.randperm(wide, generator=generator)[:narrow]
                experts.gate_up_proj[expert] = torch.cat([gate[chosen], up[chosen]])
                experts.down_proj[expert] = down[:, chosen] * (wide / narrow)


def _widened(key: str, old: Tensor, fresh: Tensor) -> Tensor:
    """Return `old` in the shape of `fresh`: new rows (neurons) keep their fresh weights, new columns become zero."""
    if old.shape == fresh.shape:
        return old
    if ".mlp." not in key or any(small > large for small, large in zip(old.shape, fresh.shape, strict=True)):
        raise ValueError(
            f"cannot grow {key} from {tuple(old.shape)} to {tuple(fresh.shape)}: only MLPs may become wider"
        )
    rows, columns = old.shape
    wide = fresh.clone()
    wide[:, columns:] = 0
    wide[:rows, :columns] = old
    return wide
