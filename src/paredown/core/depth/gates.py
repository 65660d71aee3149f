"""Gates on what blocks and sub-layers add to the residual stream, for passes without a cache.

A factor of 0 takes a unit out: it is not run, and the model computes exactly what it would if the unit were deleted. 1
leaves it untouched. Anything between, or a tensor that is being learned, scales what the unit adds. Searches and scans
try hundreds of models this way without changing a weight.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Literal

from torch import Tensor, nn

from paredown.core.anatomy import Block, resolve
from paredown.core.checkpoint import Model
from paredown.core.dropped import DroppedMlp, stand_in
from paredown.core.edits import DropBlock, DropSublayer, Edit
from paredown.errors import ArchitectureError

Kind = Literal["attention", "mlp", "block"]
Unit = tuple[int, Kind]
Factor = float | Tensor


def units(blocks: Iterable[Block], kinds: Iterable[Kind] = ("attention", "mlp")) -> list[Unit]:
    """Return the units of some kinds that can be gated, by layer and then in the order of ``kinds``."""
    listed = tuple(kinds)
    return [(block.index, kind) for block in blocks for kind in listed if _has(block, kind)]


def drops(gone: Iterable[Unit]) -> list[Edit]:
    """Return the edits that take units out for good, by layer, attention before MLP."""
    return [
        DropBlock(layer=layer) if kind == "block" else DropSublayer(layer=layer, part=kind)
        for layer, kind in sorted(gone)
    ]


class Gates:
    """The factors in force; missing ones are 1."""

    def __init__(self, model: Model) -> None:
        self._hf, self._blocks = model.hf, model.anatomy.language.blocks
        self._patched: dict[Unit, list[nn.Module]] = {}
        self.factors: dict[Unit, Factor] = {}

    def set(self, factors: Mapping[Unit, Factor]) -> None:
        """Replace all factors.

        Raises
        ------
        ArchitectureError
            If the model has no such unit, or its norm belongs to the stream (BERT), so that it cannot be taken out.
        """
        wanted = {unit: factor for unit, factor in factors.items() if isinstance(factor, Tensor) or factor != 1}
        for unit in wanted:
            self._check(unit)
        for unit in [unit for unit, factor in self.factors.items() if wanted.get(unit) is not factor]:
            self._release(unit)
        for unit, factor in wanted.items():
            if unit not in self._patched:
                self._patch(unit, factor)
        self.factors = wanted

    def drop(self, gone: Iterable[Unit]) -> None:
        """Take these units out, and put all others back."""
        self.set(dict.fromkeys(gone, 0.0))

    def _check(self, unit: Unit) -> None:
        layer, kind = unit
        if not (0 <= layer < len(self._blocks) and _has(self._blocks[layer], kind)):
            raise ArchitectureError(f"layer {layer} has no {kind} that could be gated; `paredown scan` shows what is.")

    def _release(self, unit: Unit) -> None:
        for module in self._patched.pop(unit, ()):
            del module.forward

    def _patch(self, unit: Unit, factor: Factor) -> None:
        layer, kind = unit
        part = self._blocks[layer]
        block = resolve(self._hf, part.path)
        off = not isinstance(factor, Tensor) and factor == 0
        if kind == "block":
            self._put(unit, block, _around if off else _scaled_block(block, factor))
            return
        served = part.attention if kind == "attention" else part.mlp or part.experts
        assert served is not None
        contribution = resolve(block, served.contribution)
        if not off:
            self._put(unit, contribution, _scaled(contribution, factor))
            return
        owner = resolve(block, served.path)
        gone: Any = stand_in(owner) if kind == "attention" else DroppedMlp()
        gone.layer_idx = None  # there is no cache to count tokens in
        self._put(unit, owner, gone.forward)
        for norm in served.norms:
            self._put(unit, resolve(block, norm), _same)

    def _put(self, unit: Unit, module: nn.Module, forward: Callable[..., Any]) -> None:
        module.forward = forward
        self._patched.setdefault(unit, []).append(module)


@contextmanager
def gated(model: Model) -> Iterator[Gates]:
    """Let the units of ``model`` be gated inside the ``with`` block; the model is as before afterwards."""
    gates = Gates(model)
    try:
        yield gates
    finally:
        gates.set({})


def _has(block: Block, kind: Kind) -> bool:
    if kind == "block":
        return True
    if block.residual == "post":
        return False
    return (block.attention if kind == "attention" else block.mlp or block.experts) is not None


def _same(hidden: Tensor, *_: Any, **__: Any) -> Tensor:
    return hidden


def _stream(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    hidden = args[0] if args else kwargs["hidden_states"]
    assert isinstance(hidden, Tensor)
    return hidden


def _around(*args: Any, **kwargs: Any) -> Tensor:
    """Hand the stream on: what a block's forward is while the block is out."""
    return _stream(args, kwargs)


def _scaled(module: nn.Module, factor: Factor) -> Callable[..., Any]:
    run = type(module).forward

    def forward(*args: Any, **kwargs: Any) -> Any:
        output = run(module, *args, **kwargs)
        return (output[0] * factor, *output[1:]) if isinstance(output, tuple) else output * factor

    return forward


def _scaled_block(block: nn.Module, factor: Factor) -> Callable[..., Any]:
    run = type(block).forward

    def forward(*args: Any, **kwargs: Any) -> Any:
        hidden = _stream(args, kwargs)
        output = run(block, *args, **kwargs)
        after = output[0] if isinstance(output, tuple) else output
        scaled = hidden + factor * (after - hidden)
        return (scaled, *output[1:]) if isinstance(output, tuple) else scaled

    return forward
