"""Images on their way into a language model: what policies see of them, and what they let go.

- The vision tower has its own module, `tower`; which feature comes from which patches is told by `features`.
- Tokens of images leave before the first block of the language model. Ids, masks, labels and position ids keep their
  length: only the stream is shorter.
- ``generate`` encodes images before the prompt is read and repeats them for beams. So runtimes choose when the prompt
  is there, from what was kept of the call.
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from paredown.core.attention import Call
from paredown.core.cache import PolicyLayer, packed
from paredown.core.images.features import Features, Picture
from paredown.core.images.tower import (
    Sight,
    VisionTower,
    class_tokens,
    feature_block,
    image_token,
    inner_of,
    moves_up,
    require,
    rotates_in_planes,
)
from paredown.core.stream import Stream
from paredown.errors import ArchitectureError, PolicyError

if TYPE_CHECKING:
    from paredown.core.checkpoint import Model
    from paredown.core.runtime import Pass, Runtime

__all__ = [
    "Eye",
    "Features",
    "Picture",
    "class_tokens",
    "feature_block",
    "image_token",
    "moves_up",
    "require",
    "rotates_in_planes",
]


class Eye:
    """What policies see and decide of images.

    Attributes
    ----------
    ids : the prompt of the pass that is under way, with image tokens; None if it came as embeddings
    """

    def __init__(
        self, model: Model, look: Sequence[Runtime], after: Sequence[Runtime], features: Sequence[Runtime]
    ) -> None:
        self.model, self._features = model, list(features)
        self.chooses = bool(after or features)
        self.ids: Tensor | None = None
        self._needed = bool(look or after or features)
        self._token = image_token(model)
        self._inner = inner_of(model) if model.anatomy.vision is not None and self._token is not None else None
        self._vision = None if self._inner is None else VisionTower(model, self._inner, look, after)
        self._keep: Tensor | None = None
        self._contiguous = False
        self._encoded_before = False

    @property
    def _sight(self) -> Sight | None:
        return None if self._vision is None else self._vision.sight

    def install(self, stack: contextlib.ExitStack, attachment: Any) -> None:
        """Touch the tower and the module around it; everything is undone when ``stack`` closes."""
        if self._inner is None or self._vision is None:
            if self._needed:
                raise ArchitectureError(
                    f"{type(self.model.hf).__name__} reads no images; take a model with a vision tower."
                )
            return
        stack.callback(self._drop_sight)
        stack.callback(self._inner.register_forward_pre_hook(self._read, with_kwargs=True).remove)
        self._vision.install(stack, attachment)

    def attention(self, call: Call) -> Tensor:
        """Return attention of a call of the vision tower, ``[B, Q, H, d]``."""
        return call.plain() if self._vision is None else self._vision.attention(call)

    # Reading the prompt.

    def _read(self, inner: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self.ids = kwargs.get("input_ids", args[0] if args else None)
        encoded = (kwargs.get("mm_encoder_outputs") or {}).get("image")
        self._encoded_before = encoded is not None
        if encoded is None or self._sight is None or encoded is not self._sight.result:
            self._drop_sight()

    def see(self, now: Pass) -> None:
        """Tell the pass which tokens stand for images, and let runtimes choose among them."""
        self._keep, self._contiguous = None, False
        ids = self.ids
        if ids is None or self._token is None or ids.shape != (now.batch, now.length):
            self._refuse_blind(now)
            return
        now.ids = ids
        seen = ids == self._token
        sight = self._sight
        # Without images in the pass, an image token is one that the model wrote itself.
        if not (self._encoded_before or sight is not None) or not bool(seen.any()):
            return
        now.visual = seen
        count = int(seen.sum())
        total = sum(len(piece) for piece in sight.pieces) if sight is not None else 0
        if self._vision is None or sight is None or total == 0 or count % total or now.batch % (count // total):
            now.images = _runs(seen)
            return
        # Beams repeat each row of the prompt, with its images.
        beams = count // total
        single = seen[::beams]
        if not self.chooses:
            now.images = self._by_length(sight, single).repeat_interleave(beams, dim=0)
            return
        features = sight.chosen
        if features is None:
            features = sight.chosen = self._vision.features(sight, lambda: _lengths(single))
            for runtime in self._features:
                runtime.features(features)
        images = torch.full(single.shape, -1, device=ids.device)
        images[single] = features.image.to(ids.device)
        now.images = images.repeat_interleave(beams, dim=0)
        if bool(features.kept.all()):
            return
        keep = torch.ones_like(single)
        keep[single] = features.kept.to(ids.device)
        self._keep, self._contiguous = keep.repeat_interleave(beams, dim=0), features.contiguous

    def _by_length(self, sight: Sight, seen: Tensor) -> Tensor:
        """Tell images apart by the lengths of what was encoded; what comes by tiles, by gaps in the prompt."""
        if hasattr(self._inner, "pixel_shuffle"):
            return _runs(seen)
        lengths = torch.tensor([len(piece) for piece in sight.pieces], device=seen.device)
        images = torch.full(seen.shape, -1, device=seen.device)
        images[seen] = torch.arange(len(lengths), device=seen.device).repeat_interleave(lengths)
        return images

    def _refuse_blind(self, now: Pass) -> None:
        sight = self._sight
        if now.length > 1 and sight is not None and any(rows is not None for rows in sight.rows.values()):
            raise PolicyError(
                "patches left in the vision tower, and the prompt came as embeddings, so their tokens cannot be found; "
                "pass input_ids."
            )

    # The language model.

    def drop(self, stream: Stream) -> None:
        """Let the tokens go that were not chosen, before the first block."""
        now = stream.now
        if now is None:
            return
        first = next((layer for layer in _layers(now.cache) if isinstance(layer, PolicyLayer)), None)
        before = None if first is None else first.gone
        if self._keep is None:
            if before is not None:
                stream.renumber(_moved_up(stream.position_ids(), (before >= 0).sum(1, keepdim=True)))
            return
        if self._contiguous:
            leaving = ~self._keep
            shift = leaving.cumsum(1)
            if before is not None:
                shift = shift + (before >= 0).sum(1, keepdim=True)
            stream.renumber(_moved_up(stream.position_ids(), shift))
            if first is not None:
                at = packed(leaving)
                at = torch.where(at >= 0, at + now.past, -1)
                first.gone = at if before is None else torch.cat([before, at], dim=1)
        stream.keep(self._keep)

    def forget(self) -> None:
        """Forget the pass; what was encoded for ``generate`` stays until a pass comes without it."""
        self.ids = self._keep = None
        if not self._encoded_before:
            self._drop_sight()

    def _drop_sight(self) -> None:
        if self._vision is not None:
            self._vision.sight = None


def _layers(cache: Any) -> Sequence[Any]:
    return () if cache is None else cache.layers


def _moved_up(ids: Tensor, shift: Tensor) -> Tensor:
    if ids.dim() != 2:
        raise PolicyError("positions on three axes cannot be made contiguous; set positions='original'.")
    return ids - shift


def _runs(seen: Tensor) -> Tensor:
    """Return the number of the run of true entries that each entry belongs to, ``[B, T]``; -1 elsewhere."""
    before = torch.zeros_like(seen)
    before[:, 1:] = seen[:, :-1]
    number = (seen & ~before).flatten().cumsum(0).view(seen.shape) - 1
    return number.masked_fill(~seen, -1)


def _lengths(seen: Tensor) -> list[int]:
    number = _runs(seen)
    return torch.bincount(number[seen]).tolist()
