"""What a policy does while it is attached: the hooks that the seams call, each doing nothing unless overridden.

- ``Runtime`` holds what belongs to the attachment (hyper-parameters turned into numbers a layer, trained gates).
- What belongs to one sequence lives in its cache, in the stores that ``store`` and ``partition`` return: there it is
  reordered, repeated and cropped together with keys and values.
- What belongs to one sequence and to no layer lives in the companion that ``companion`` returns, in the same cache.
- What belongs to one forward pass lives in ``Pass.memo``.
- A seam is installed only if some runtime overrides its hook.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar

from torch import Tensor, nn

if TYPE_CHECKING:
    from transformers import Cache

    from paredown.core.attention import Call
    from paredown.core.cache import Store
    from paredown.core.checkpoint import Model
    from paredown.core.companion import Companion
    from paredown.core.images.visual import Features
    from paredown.core.method import Policy
    from paredown.core.stream import Stream


@dataclass
class Pass:
    """One forward pass of the language model.

    ``length`` counts the new tokens of each row, ``past`` those the cache had before: both logical, whatever the cache
    stores. ``padding`` is ``[B, past + length]``, true for real tokens; None if there is no padding. ``visual`` is
    ``[B, length]``, true where a token stands for a piece of an image; None where there are none. ``images`` tells of
    which image, counted over the batch (beams share theirs), -1 elsewhere. ``memo`` is scratch for runtimes, forgotten
    when the pass ends. ``companions`` holds what runtimes remember of the sequences, by runtime. ``reading`` is
    true while ``generate`` reads a prompt, under policies that skip blocks.
    """

    batch: int
    length: int
    past: int
    padding: Tensor | None
    cache: Cache | None
    visual: Tensor | None = None
    images: Tensor | None = None
    ids: Tensor | None = None
    memo: dict[str, Any] = field(default_factory=dict)
    reading: bool = False
    companions: dict[Runtime, Companion] = field(default_factory=dict)

    @property
    def stop(self) -> int:
        """Logical length after the pass."""
        return self.past + self.length

    @property
    def prefill(self) -> bool:
        """Whether more than one new token is read."""
        return self.length > 1

    @property
    def decodes(self) -> bool:
        """Whether the pass reads one token that the model has just said.

        The last piece of a prompt read in chunks, and a turn of one token, may be one token as well; ``generate`` tells
        them apart, and a bare call of the model cannot.
        """
        return self.length == 1 and self.past > 0 and not self.reading

    def real(self, positions: Tensor) -> Tensor:
        """Return which logical positions, ``[B, n]`` or ``[B, Hkv, n]``, are tokens: no empty slots, no padding."""
        there = positions >= 0
        if self.padding is None:
            return there
        padding = self.padding
        if positions.dim() == 3:
            padding = padding[:, None].expand(-1, positions.shape[1], -1)
        return there & padding.gather(-1, positions.clamp_min(0))


@dataclass(frozen=True)
class Feed:
    """One block's MLP (dense, or router and experts) in one pass.

    Attributes
    ----------
    layer : index of the block
    module, own : the MLP, and its own forward
    hidden : ``[B, n, D]``, what it reads
    now : the pass
    rows : ``[B, n]`` logical positions of the rows, -1 for fillers; None if they are the pass's new tokens
    """

    layer: int
    module: nn.Module
    own: Callable[..., Any]
    hidden: Tensor
    now: Pass
    rows: Tensor | None


@dataclass(frozen=True)
class Part:
    """Some KV heads of a layer and how they are stored; ``heads`` None means all, ``make`` None the growing store."""

    heads: Tensor | None
    make: Callable[[], Store] | None


class Runtime:
    """Base of what policies do. ``layers`` are the indices of the blocks it acts on.

    Attributes
    ----------
    policy : the method, with its fields
    model : the model it is attached to
    empties : whether it may lead all rows around a block, which is then not run
    """

    empties: ClassVar[bool] = False

    def __init__(self, policy: Policy, model: Model) -> None:
        self.policy, self.model = policy, model

    def touches(self, layer: int, window: int | None) -> bool:
        """Whether the policy changes how this layer's cache is stored or read.

        ``window`` is the sliding window of layers that have one: their caches are bounded already.
        """
        return window is None

    # The cache seam.

    def partition(self, layer: int) -> Sequence[Part] | None:
        """Divide the layer's KV heads into parts that are stored differently; None leaves them together."""
        return None

    def store(self, layer: int) -> Store | None:
        """Return how keys and values that may grow are stored; None leaves that to the core."""
        return None

    # The attention seam.

    def attend(self, call: Call) -> Tensor | None:
        """Compute attention over what the cache holds, ``[B, Q, H, d]``; None leaves it to the core."""
        return None

    def watch(self, call: Call) -> None:
        """Look at queries, keys and values of a layer of the language model before attention is computed."""

    # The MLPs of the language model.

    def feed(self, call: Feed) -> Any:
        """Compute a block's MLP otherwise: what the module would return; None leaves it to the model."""
        return None

    def route(self, layer: int, hidden: Tensor, logits: Tensor, now: Pass, rows: Tensor | None) -> Tensor:
        """Return the logits that the router of a layer goes on with.

        Parameters
        ----------
        hidden : ``[B * n, d]``, what the router reads
        logits : ``[B * n, E]``, its own
        rows : ``[B, n]`` logical positions, -1 for fillers; None while every new token of the pass is a row
        """
        return logits

    def added(self, layer: int, output: Tensor, now: Pass) -> Tensor:
        """Return what the MLP of a layer adds to the stream, ``[B, n, D]``, instead of ``output``."""
        return output

    # What is remembered of a sequence.

    def companion(self) -> Companion:
        """Return what is remembered of the sequences of one cache, empty; ``Pass.companions`` has it afterwards."""
        raise NotImplementedError

    # The blocks of the language model.

    def skips(self, layer: int, now: Pass) -> bool:
        """Whether the pass goes past the block ``layer`` without running it; the first block is never asked."""
        return False

    # The token stream of the language model.

    def before(self, layer: int, stream: Stream) -> None:
        """Change the stream before the block ``layer`` runs."""

    def after(self, layer: int, stream: Stream) -> None:
        """Change the stream after the block ``layer`` ran; ``stream.hidden`` is its output."""

    # The vision tower.

    def look(self, call: Call) -> None:
        """Look at queries, keys and values of a layer of the vision tower."""

    def after_vision(self, layer: int, stream: Stream) -> None:
        """Change the vision tower's stream after its block ``layer`` ran."""

    def features(self, features: Features) -> None:
        """Choose among the features of images, once they are known and before the language model sees them."""

    # The pass.

    def begin(self, now: Pass) -> None:
        """Announce a forward pass of the language model."""

    def end(self, now: Pass) -> None:
        """Announce that the pass is over (also after an error)."""


def overrides(runtime: Runtime, hook: str) -> bool:
    """Whether ``runtime`` does something at the hook."""
    return getattr(type(runtime), hook) is not getattr(Runtime, hook)
