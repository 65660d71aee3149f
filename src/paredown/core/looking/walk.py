"""A few sequences walked through the blocks by hand: each block may be run again on other inputs, and differentiated.

- The model may be in memory or on disk, one block at a time; what is needed later travels along as hidden states.
- Blocks run in fp32, whatever the weights are kept in: what a block adds is often a hundredth of the stream, and small
  differences of it would drown in bf16. Blocks of more than `LARGEST` parameters run in their own precision.
- Attention and experts run in their eager forms, which forward-mode derivatives need. Only inside the walk: the model's
  own choice of kernels is put back at the end of each step.
"""

from __future__ import annotations

import contextlib
import copy
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
import torch.autograd.forward_ad as forward_ad
from torch import Tensor, nn
from transformers import PreTrainedModel

from paredown.core.anatomy import Block
from paredown.core.calibration import Batch
from paredown.core.method import View
from paredown.core.sequential import Call, Source, catch, finish
from paredown.errors import ArchitectureError, DataError

LARGEST = 2 * 10**9
"""Parameters of a block up to which it is copied into fp32 (8 GB)."""
_CHOICES = ("_attn_implementation_internal", "_experts_implementation_internal")


@contextlib.contextmanager
def plain(hf: PreTrainedModel) -> Iterator[None]:
    """Let attention and experts run in their eager forms inside the ``with`` block; then as the model had it."""
    configs = {id(m.config): m.config for m in hf.modules() if "config" in vars(m)}
    before = [(config, name, getattr(config, name)) for config in configs.values() for name in _CHOICES]
    try:
        for config, name, _ in before:
            setattr(config, name, "eager")
        yield
    finally:
        for config, name, value in before:
            setattr(config, name, value)


class Walk:
    """Some sequences between two blocks.

    Parameters
    ----------
    source : hands out the blocks; its ends (without head) must be open
    ids : tokens ``[B, T]``
    mask : real tokens ``[B, T]``, or None when all are

    Attributes
    ----------
    hidden : ``[B, T, H]`` before the next block
    counted : ``[B, T]``, the tokens that count in statistics: real ones, but the first of each row, which is an outlier
        in most models
    exact : whether all blocks so far ran in fp32 (or better)

    Raises
    ------
    ArchitectureError
        If the norms belong to the stream (BERT): then there is nothing that a block adds to it.
    """

    @torch.no_grad()
    def __init__(self, source: Source, ids: Tensor, mask: Tensor | None = None) -> None:
        tower = source.model.anatomy.language
        if any(block.residual == "post" for block in tower.blocks):
            raise ArchitectureError(
                f"{source.model.source} normalises the stream itself after each addition, so what its blocks add to it "
                "cannot be taken apart; choose a decoder."
            )
        self.source, self.ids = source, ids
        self.mask = mask.to(source.device) if mask is not None else None
        with plain(source.model.hf):
            hidden, calls = catch(source, ids, mask)
        self.exact = True
        self.hidden = _raise(hidden)
        self.calls = [_raised(call) for call in calls]
        real = self.mask.bool() if self.mask is not None else torch.ones_like(ids, dtype=torch.bool)
        self.counted = (real & (real.cumsum(1) > 1)).to(self.hidden.device)

    @contextlib.contextmanager
    def step(self, view: View) -> Iterator[Step]:
        """Run the next block and yield what it did; afterwards the walk stands behind it."""
        with plain(self.source.model.hf), torch.no_grad():
            module = view.module
            floats = [p for p in module.parameters() if p.is_floating_point()]
            low = any(p.dtype.itemsize < 4 for p in floats)
            dtype = floats[0].dtype if floats else self.hidden.dtype
            if low and sum(p.numel() for p in floats) <= LARGEST:
                module, dtype = copy.deepcopy(module).float(), torch.float32
            elif low:
                self.exact = False
            call = self.calls[view.part.index]
            step = Step(replace(view, module=module), self.hidden, call, dtype)
            step.look()
            yield step
            self.hidden = step.after

    @torch.no_grad()
    def logits(self, hidden: Tensor) -> Tensor:
        """Return the logits ``[B, T, V]`` that the model would give if ``hidden [B, T, H]`` left its last block.

        Needs the source's ends open, with the head.
        """
        with plain(self.source.model.hf):
            return finish(self.source, hidden, self.mask).float()


class Step:
    """One block, with the sequences before and after it.

    Attributes
    ----------
    part : the block's anatomy
    before, after : the stream ``[B, T, H]``
    attention, mlp : what each sub-layer added to the stream ``[B, T, H]``; None where it was dropped
    """

    before: Tensor
    after: Tensor
    attention: Tensor | None
    mlp: Tensor | None

    def __init__(self, view: View, before: Tensor, call: Call, dtype: torch.dtype) -> None:
        self.view, self.part, self.before, self._call, self._dtype = view, view.part, before, call, dtype

    @property
    def index(self) -> int:
        """Number of the block."""
        return self.part.index

    @property
    def update(self) -> Tensor:
        """What the block added to the stream, ``[B, T, H]``."""
        return self.after - self.before

    def run(self, hidden: Tensor) -> Tensor:
        """Return what leaves the block if ``hidden [B, T, H]`` enters it."""
        call, dtype = self._call, self._dtype
        if dtype != hidden.dtype:
            call = _raised(call, dtype)
        output = self.view.module(hidden.to(dtype), *call.args, **call.kwargs)
        out: Tensor = output[0] if isinstance(output, tuple) else output
        return out.to(hidden.dtype)

    def push(self, hidden: Tensor, tangent: Tensor) -> tuple[Tensor, Tensor]:
        """Return what leaves the block at ``hidden``, and the derivative of it along ``tangent``; both ``[B, T, H]``.

        Forward-mode; where an operation has no rule for it, the derivative is taken by differentiating backwards twice.
        Routers choose by rank, which has no derivative: their choices count as fixed.
        """
        try:
            with warnings.catch_warnings(), forward_ad.dual_level():
                # torch compiles its own rules by a function that it calls deprecated.
                warnings.filterwarnings("ignore", "`torch.jit.script", DeprecationWarning)
                dual: Any = forward_ad.make_dual(hidden, tangent)  # type: ignore[no-untyped-call]
                out, found = forward_ad.unpack_dual(self.run(dual))  # type: ignore[no-untyped-call]
        except (NotImplementedError, RuntimeError) as error:
            if "forward AD" not in str(error) and "forward-mode" not in str(error) and "jvp" not in str(error):
                raise
            twice: Any = torch.autograd.functional.jvp
            out, found = twice(self.run, hidden, tangent)
            return out.detach(), found.detach()
        return out, found if found is not None else torch.zeros_like(out)

    def look(self) -> None:
        """Run the block on its own input and note what its sub-layers add."""
        part, module = self.part, self.view.module
        dense = part.mlp or part.experts
        paths = {"attention": part.attention and part.attention.contribution, "mlp": dense and dense.contribution}
        seen: dict[str, Tensor] = {}

        def keep(name: str) -> Any:
            def hook(_: nn.Module, __: Any, output: Any) -> None:
                seen[name] = output[0] if isinstance(output, tuple) else output

            return hook

        handles = [module.get_submodule(path).register_forward_hook(keep(k)) for k, path in paths.items() if path]
        try:
            self.after = self.run(self.before)
        finally:
            for handle in handles:
                handle.remove()
        # Granite and its kin scale what they add.
        scale = float(getattr(module, "residual_multiplier", 1.0))
        added = {name: value.reshape(self.before.shape).to(self.before.dtype) * scale for name, value in seen.items()}
        self.attention, self.mlp = added.get("attention"), added.get("mlp")
        self._check()

    def _check(self) -> None:
        """Refuse to report numbers about tensors that are not what is added to the stream."""
        total = self.before
        for one in (self.attention, self.mlp):
            total = total if one is None else total + one
        off = float((total - self.after).norm() / self.after.norm().clamp(min=1e-30))
        if not off < (1e-3 if self._dtype.itemsize >= 4 else 0.05):
            raise ArchitectureError(
                f"what attention and MLP of layer {self.index} return is not what the block adds to the stream (off by "
                f"{off:.1e}), so this family cannot be taken apart; please report it."
            )


@dataclass
class Tokens:
    """One number a token, over several walks, and what people want to know of such numbers."""

    rows: list[float] = field(default_factory=list)
    values: list[Tensor] = field(default_factory=list)

    def add(self, values: Tensor, counted: Tensor) -> None:
        """Add numbers ``[B, T]`` of the tokens that are ``counted [B, T]``."""
        for row, chosen in zip(values.detach().float().cpu(), counted.cpu(), strict=True):
            if bool(chosen.any()):
                found = row[chosen]
                self.rows.append(float(found.mean()))
                self.values.append(found)

    def __bool__(self) -> bool:
        return bool(self.rows)

    @property
    def mean(self) -> float:
        """Mean over rows of the means over their tokens."""
        return sum(self.rows) / len(self.rows)

    def quantile(self, share: float) -> float:
        """Return the number below which this share of all tokens lies."""
        return float(torch.cat(self.values).double().quantile(share))

    @property
    def largest(self) -> float:
        """The largest number of all tokens."""
        return float(torch.cat(self.values).max())


def sample(data: Batch, sequences: int, length: int) -> list[tuple[Tensor, Tensor | None]]:
    """Return the first rows of calibration data, cut to a length, a few at a time: ids and mask ``[B, T]``.

    Raises
    ------
    DataError
        If a row has fewer than eight real tokens: what is measured before and after a cut needs some.
    """
    ids = data.input_ids[:sequences, :length]
    mask = data.attention_mask[:sequences, :length] if data.attention_mask is not None else None
    least = ids.shape[1] if mask is None else int(mask.sum(1).min())
    if least < 8:
        raise DataError(f"rows of {least} tokens are too short to look at; give rows of 8 tokens or more.")
    size = max(1, 512 // max(1, ids.shape[1]))
    return [(ids[i : i + size], mask[i : i + size] if mask is not None else None) for i in range(0, len(ids), size)]


def walk(source: Source, ids: Tensor, mask: Tensor | None, blocks: Sequence[Block]) -> Iterator[tuple[Walk, Step]]:
    """Walk some sequences through all of a model's blocks, and yield every step."""
    with source.open_ends(head=False):
        found = Walk(source, ids, mask)
    for part in blocks:
        view = source.open(part.index)
        with found.step(view) as step:
            yield found, step
        source.close(part.index)


def relative(difference: Tensor, reference: Tensor, counted: Tensor) -> Tensor:
    """Return ``|difference| / |reference|`` for each token, ``[B, T]``, from ``[B, T, H]``.

    Norms below a hundredth of the mean norm (over tokens that count) are taken as that: a token to which a block adds
    nothing would otherwise outweigh all others.
    """
    norms = reference.float().norm(dim=-1)
    floor = 0.01 * norms[counted].mean() if bool(counted.any()) else norms.new_tensor(0.0)
    found: Tensor = difference.float().norm(dim=-1) / norms.clamp(min=max(1e-12, float(floor)))
    return found


def _raise(value: Any, dtype: torch.dtype | None = None) -> Any:
    """Bring tensors, also inside tuples, to fp32 (or ``dtype``); fp64 and whole numbers stay."""
    if isinstance(value, Tensor):
        if not value.is_floating_point():
            return value
        wanted = dtype or (torch.float32 if value.dtype.itemsize < 4 else value.dtype)
        return value.to(wanted)
    if isinstance(value, tuple):
        return tuple(_raise(one, dtype) for one in value)
    return value


def _raised(call: Call, dtype: torch.dtype | None = None) -> Call:
    return Call(_raise(call.args, dtype), {key: _raise(value, dtype) for key, value in call.kwargs.items()})
