"""The seam at the MLPs: while attached, a block's MLP asks the policies, which may compute it themselves.

The module's forward is replaced and not hooked, because a hook cannot keep the module from running.
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from paredown.core.roles import Block
from paredown.core.runtime import Feed, Runtime
from paredown.errors import PolicyError


def install(
    stack: contextlib.ExitStack,
    attachment: Any,
    blocks: Sequence[tuple[Block, nn.Module]],
    runtimes: Sequence[Runtime],
) -> None:
    """Let the MLPs of ``blocks`` ask ``runtimes``; undone when ``stack`` closes.

    Raises
    ------
    PolicyError
        If one MLP serves several blocks: who asks could not be told.
    """
    found = []
    for part, block in blocks:
        dense = part.mlp or part.experts
        # BERT has no module that is its MLP; a policy that needs one says so.
        if dense is not None and dense.path:
            found.append((part.index, block.get_submodule(dense.path)))
    if len({id(module) for _, module in found}) < len(found):
        raise PolicyError(
            "several blocks of this model are one and the same module, so no policy can compute the MLP of each; leave "
            "the policy out."
        )
    for layer, module in found:
        _replace(stack, attachment, layer, module, runtimes)


def _replace(
    stack: contextlib.ExitStack, attachment: Any, layer: int, module: nn.Module, runtimes: Sequence[Runtime]
) -> None:
    # What some libraries put in place of the class's own forward is called, and put back.
    own, held = module.forward, vars(module).get("forward")

    def forward(hidden: Tensor, *args: Any, **kwargs: Any) -> Any:
        now, stream = attachment.now, attachment.stream
        if now is not None:
            call = Feed(layer, module, own, hidden, now, None if stream is None else stream.rows)
            for runtime in runtimes:
                out = runtime.feed(call)
                if out is not None:
                    return out
        return own(hidden, *args, **kwargs)

    def undo() -> None:
        if held is None:
            del module.forward
        else:
            module.forward = held

    module.forward = forward
    stack.callback(undo)
