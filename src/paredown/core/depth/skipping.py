"""Blocks that a pass goes past without running them, and what their cache holds of its tokens instead.

- Attached, the forward of every block but the first asks whether the pass skips it. A skipped block costs nothing: not
  one of its modules runs.
- The cache of a skipped block takes the keys and values that the nearest block below it has computed in this pass.
  Nobody reads them as long as the same blocks are skipped, but all layers hold equally many tokens, so that masks,
  beams and crops stay right and a later pass may run other blocks. Where sizes differ it takes zeros.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor, nn

from paredown.core.attention import Call
from paredown.core.cache import PolicyLayer
from paredown.core.runtime import Pass, Runtime

_NEWEST = "paredown.newest"


class Skipping:
    """The blocks' forwards while runtimes that skip are attached.

    Parameters
    ----------
    runtimes : those that override ``skips``
    current : returns the pass that is under way
    """

    def __init__(self, runtimes: Sequence[Runtime], current: Callable[[], Pass | None]) -> None:
        self.runtimes, self._current = list(runtimes), current
        self.reading = False
        self._outputs: int | None = None

    def install(self, stack: contextlib.ExitStack, hf: Any, blocks: Sequence[tuple[int, nn.Module]]) -> None:
        """Put our forwards in front of the blocks' and notice when ``generate`` reads a prompt."""
        for layer, block in blocks:
            self._replace(stack, block, "forward", self._forward(layer, block, first=layer == blocks[0][0]))
        if hasattr(hf, "_prefill"):
            self._replace(stack, hf, "_prefill", self._noting(hf._prefill))

    def note(self, call: Call) -> None:
        """Keep the keys and values of the pass's own tokens."""
        if call.now is not None:
            count = call.query.shape[2]
            call.now.memo[_NEWEST] = call.key[:, :, -count:], call.value[:, :, -count:]

    def _replace(self, stack: contextlib.ExitStack, module: nn.Module, name: str, forward: Any) -> None:
        before = vars(module).get(name)
        module.__dict__[name] = forward
        if before is None:
            stack.callback(module.__dict__.pop, name, None)
        else:
            stack.callback(module.__dict__.__setitem__, name, before)

    def _noting(self, run: Any) -> Any:
        """Return ``generate``'s own prefill, under which a pass of one token is part of the prompt."""

        def prefill(*args: Any, **kwargs: Any) -> Any:
            self.reading = True
            try:
                return run(*args, **kwargs)
            finally:
                self.reading = False

        return prefill

    def _forward(self, layer: int, block: nn.Module, *, first: bool) -> Any:
        run = block.forward

        def forward(*args: Any, **kwargs: Any) -> Any:
            now = self._current()
            if now is None or first or not any(runtime.skips(layer, now) for runtime in self.runtimes):
                output = run(*args, **kwargs)
                self._outputs = len(output) if isinstance(output, tuple) else None
                return output
            hidden = args[0] if args else kwargs["hidden_states"]
            _fill(now, _slot(block, layer))
            return hidden if self._outputs is None else (hidden, *[None] * (self._outputs - 1))

        return forward


def _slot(block: nn.Module, layer: int) -> int:
    """Return which layer of the cache is the block's."""
    return next((i for m in block.modules() if isinstance(i := getattr(m, "layer_idx", None), int)), layer)


def _fill(now: Pass, index: int) -> None:
    """Let layer ``index`` of the cache hold as many tokens as if its block had run."""
    cache = now.cache
    if cache is None or index >= len(cache.layers):
        return
    held: Any = cache.layers[index]
    known = _first(held)
    newest: tuple[Tensor, Tensor] | None = now.memo.get(_NEWEST)
    if known is None:
        return
    keys, values = (
        newest[i] if newest is not None and _like(newest[i], old) else _zeros(old, now.length)
        for i, old in enumerate(known)
    )
    if not isinstance(held, PolicyLayer):
        cache.update(keys, values, index)
        return
    held.update(keys, values)
    held.stores[0].entries.append(keys, values, None, now.past)


def _zeros(old: Tensor, length: int) -> Tensor:
    return old.new_zeros((*old.shape[:2], length, old.shape[3]))


def _first(held: Any) -> tuple[Tensor, Tensor] | None:
    """Return keys and values that a layer of the cache holds, for their sizes; None where there are none."""
    if isinstance(held, PolicyLayer):
        if len(held.parts) != 1 or not held.stores[0].entries.length:
            return None
        return held.stores[0].entries.keys, held.stores[0].entries.values
    keys, values = getattr(held, "keys", None), getattr(held, "values", None)
    return (keys, values) if isinstance(keys, Tensor) and isinstance(values, Tensor) and keys.dim() == 4 else None


def _like(new: Tensor, old: Tensor) -> bool:
    return (*new.shape[:2], new.shape[3]) == (*old.shape[:2], old.shape[3])
