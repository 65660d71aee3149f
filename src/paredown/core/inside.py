"""Seams inside blocks: what routers say, what MLPs add to the stream, and blocks that no row enters."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from paredown.core.cache import PolicyLayer
from paredown.core.experts import routing
from paredown.core.roles import Block
from paredown.core.runtime import Runtime, overrides


def install(
    stack: contextlib.ExitStack, attachment: Any, blocks: Sequence[tuple[Block, nn.Module]], runtimes: Sequence[Runtime]
) -> None:
    """Let runtimes act that override ``route`` or ``added``, or empty blocks; all is undone when ``stack`` closes.

    Parameters
    ----------
    attachment : knows the pass that is under way (``now``) and its ``stream``
    """
    route = [runtime for runtime in runtimes if overrides(runtime, "route")]
    added = [runtime for runtime in runtimes if overrides(runtime, "added")]
    if any(runtime.empties for runtime in runtimes):
        _Passing(attachment).install(stack, blocks)
    for part, block in blocks:
        dense = part.mlp or part.experts
        if route and part.experts is not None:
            module = block.get_submodule(part.experts.router)
            stack.enter_context(routing.rerouted(module, _routed(attachment, part.index, route)))
        if added and dense is not None:
            module = block.get_submodule(dense.contribution)
            stack.callback(module.register_forward_hook(_adds(attachment, part.index, added)).remove)


def _routed(attachment: Any, layer: int, runtimes: Sequence[Runtime]) -> routing.Change:
    def change(hidden: Tensor, logits: Tensor) -> Tensor:
        now, stream = attachment.now, attachment.stream
        if now is not None:
            for runtime in runtimes:
                logits = runtime.route(layer, hidden, logits, now, None if stream is None else stream.rows)
        return logits

    return change


def _adds(attachment: Any, layer: int, runtimes: Sequence[Runtime]) -> Any:
    def hook(_: nn.Module, __: Any, output: Any) -> Any:
        now = attachment.now
        if now is None:
            return None
        before = after = output[0] if isinstance(output, tuple) else output
        for runtime in runtimes:
            after = runtime.added(layer, after, now)
        if after is before:
            return None
        return (after, *output[1:]) if isinstance(output, tuple) else after

    return hook


class _Passing:
    """Goes past blocks that no row enters: none of their modules runs, and their caches count the tokens."""

    def __init__(self, attachment: Any) -> None:
        self._attachment = attachment
        self._outputs: int | None = None

    def install(self, stack: contextlib.ExitStack, blocks: Sequence[tuple[Block, nn.Module]]) -> None:
        for _, block in blocks:
            held = vars(block).get("forward")
            block.forward = self._forward(block)
            if held is None:
                stack.callback(block.__dict__.pop, "forward", None)
            else:
                stack.callback(block.__dict__.__setitem__, "forward", held)

    def _forward(self, block: nn.Module) -> Any:
        run = block.forward
        index = next((i for m in block.modules() if isinstance(i := getattr(m, "layer_idx", None), int)), None)

        def forward(*args: Any, **kwargs: Any) -> Any:
            hidden = args[0] if args else kwargs["hidden_states"]
            now = self._attachment.now
            if now is None or hidden.shape[1]:
                output = run(*args, **kwargs)
                self._outputs = len(output) if isinstance(output, tuple) else None
                return output
            layers = () if now.cache is None or index is None else now.cache.layers
            if index is not None and index < len(layers) and isinstance(layers[index], PolicyLayer):
                layers[index].seen = now.stop
            return hidden if self._outputs is None else (hidden, *[None] * (self._outputs - 1))

        return forward
