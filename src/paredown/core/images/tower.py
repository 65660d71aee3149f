"""The vision tower under a policy: who looks there, which patches are left, and the map of what came out.

- The tower's attention modules are seated like those of the language model, so that a policy can look at queries and
  keys; its blocks get a token stream, whose rows need not come back.
- Where rows left, what follows the tower gets the full grid again, with zeros in the gaps: the family's own packing
  runs unchanged. Features without a patch are then dropped like those that a policy chose.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn

from paredown.core import architectures as names
from paredown.core import attention
from paredown.core.attention import Call, compute, visible
from paredown.core.images import features as imagemap
from paredown.core.images.features import Features, Packing
from paredown.core.stream import Stream, scattered
from paredown.errors import ArchitectureError, PolicyError

if TYPE_CHECKING:
    from paredown.core.checkpoint import Model
    from paredown.core.runtime import Runtime


def image_token(model: Model) -> int | None:
    """Return the id that stands for pieces of images in prompts, or None if the model reads none."""
    config: Any = model.hf.config
    found = getattr(config, "image_token_id", None)
    return getattr(config, "image_token_index", None) if found is None else found


def require(model: Model, name: str) -> None:
    """Refuse a model that reads no images.

    Raises
    ------
    ArchitectureError
        Naming the method.
    """
    if model.anatomy.vision is None or image_token(model) is None or inner_of(model) is None:
        raise ArchitectureError(
            f"{name} acts on images, and {type(model.hf).__name__} reads none; take a model with a vision tower."
        )


def class_tokens(model: Model) -> int:
    """Return how many rows stand in front of the patches in the vision tower: 1 with a class token, else 0."""
    assert model.anatomy.vision is not None
    around = model.hf.get_submodule(model.anatomy.vision.decoder.rpartition(".")[0])
    return int(any(name.rpartition(".")[2] in names.CLASS_TOKEN for name, _ in around.named_parameters()))


def feature_block(model: Model, chosen: Any = None) -> int:
    """Return the index of the vision block whose output the language model reads (the last of several).

    ``chosen`` is a ``vision_feature_layer`` that was passed; by default the config's. -1 means the tower's input.
    """
    assert model.anatomy.vision is not None
    depth = len(model.anatomy.vision.blocks)
    if chosen is None:
        chosen = getattr(model.hf.config, "vision_feature_layer", None)
    if chosen is None:
        return depth - 1
    # Hidden states begin with the tower's input.
    return max((at - 1 if at >= 0 else depth + at) for at in ([chosen] if isinstance(chosen, int) else chosen))


def rotates_in_planes(model: Model) -> bool:
    """Whether positions of the language model have three axes (M-RoPE)."""
    config: Any = model.hf.config.get_text_config()
    return "mrope_section" in (getattr(config, "rope_parameters", None) or {})


def moves_up(model: Model, wanted: Literal["contiguous", "original"], name: str) -> bool:
    """Whether tokens behind those that leave close the gap.

    Raises
    ------
    PolicyError
        If it is asked for where positions have three axes.
    """
    if wanted == "contiguous" and rotates_in_planes(model):
        raise PolicyError(f"{name} cannot make positions on three axes contiguous; set positions to 'original'.")
    return wanted == "contiguous"


def inner_of(model: Model) -> nn.Module | None:
    """Return the module that joins tower, projector and language model."""
    found = model.hf.get_submodule(model.anatomy.language.decoder.rpartition(".")[0])
    return found if hasattr(found, "get_image_features") else None


@dataclass
class Sight:
    """One call of ``get_image_features``, as the seams saw it."""

    arguments: dict[str, Any]
    flat: bool = False
    full: int = 0
    rows: dict[int, Tensor | None] = field(default_factory=dict)
    shapes: list[tuple[int, int]] | None = None
    more: tuple[tuple[Any, ...], dict[str, Any]] = ((), {})
    result: Any = None
    chosen: Features | None = None
    pieces: Sequence[Tensor] = ()


class VisionTower:
    """What happens while images are encoded.

    Attributes
    ----------
    sight : the last call of ``get_image_features``; None if there was none, or it is over
    """

    def __init__(self, model: Model, inner: nn.Module, look: Sequence[Runtime], after: Sequence[Runtime]) -> None:
        assert model.anatomy.vision is not None
        self.model, self._inner, self._look, self._after = model, inner, list(look), list(after)
        self._tower = model.anatomy.vision
        self._leading = class_tokens(model)
        self.sight: Sight | None = None
        self._stream: Stream | None = None
        self._start = 0
        self._inside = False

    def install(self, stack: contextlib.ExitStack, attachment: Any) -> None:
        """Touch the tower and the module around it; everything is undone when ``stack`` closes."""
        hf, inner, tower, handles = self.model.hf, self._inner, self._tower, []
        _replace(stack, inner, "get_image_features", self._encoding)
        if hasattr(inner, "pack_image_features"):
            _replace(stack, inner, "pack_image_features", self._packing)
        if self._look or self._after:
            seats: dict[int, nn.Module] = {}
            for part in tower.blocks:
                block = hf.get_submodule(part.path)
                if part.attention is not None:
                    seats[part.index] = attention.attender(block.get_submodule(part.attention.path))
                handles.append(block.register_forward_pre_hook(self._enter(part.index), with_kwargs=True))
                handles.append(block.register_forward_hook(self._leave(part.index), prepend=True))
            decoder: Any = hf.get_submodule(tower.decoder)
            if hasattr(decoder, "window_size"):
                raise ArchitectureError(
                    f"{type(hf).__name__} sorts patches into windows, which policies in its vision tower cannot "
                    "follow; take one that chooses behind the tower."
                )
            stack.enter_context(attention.seated(attachment, "vision", seats))
        if self._after:
            if hf.config.model_type not in names.THINNABLE:
                raise ArchitectureError(
                    f"patches cannot leave in the vision tower of {type(hf).__name__}, as what follows is not known; "
                    f"families for which it is: {', '.join(sorted(names.THINNABLE))}."
                )
            if hasattr(inner, "pixel_shuffle"):
                outer = hf.get_submodule(tower.decoder.rpartition(".")[0])
                handles.append(outer.register_forward_hook(self._regrid))
            elif self.model.anatomy.projector is not None:
                projector = hf.get_submodule(self.model.anatomy.projector)
                handles.append(projector.register_forward_pre_hook(self._check_cells))
                handles.append(projector.register_forward_hook(self._projected))
        for handle in handles:
            stack.callback(handle.remove)

    def _encoding(self, original: Callable[..., Any]) -> Callable[..., Any]:
        signature = inspect.signature(original)

        @functools.wraps(original)
        def encode(*args: Any, **kwargs: Any) -> Any:
            bound = signature.bind(*args, **kwargs).arguments
            self.sight = sight = Sight({**bound, **bound.get("kwargs", {})})
            self._inside = True
            try:
                result = original(*args, **kwargs)
            finally:
                self._inside, self._stream = False, None
            pieces = getattr(result, "pooler_output", None)
            pieces = [] if pieces is None else list(pieces)
            sight.result, sight.pieces = result, pieces if all(piece.dim() == 2 for piece in pieces) else []
            return result

        return encode

    def _packing(self, original: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(original)
        def pack(image_features: Any, *args: Any, **kwargs: Any) -> Any:
            if self._inside and self.sight is not None:
                self.sight.shapes = [(part.shape[0], part.shape[1]) for part in image_features]
                self.sight.more = args, kwargs
            return original(image_features, *args, **kwargs)

        return pack

    def _enter(self, layer: int) -> Any:
        first = layer == self._tower.blocks[0].index

        def hook(block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, Any] | None:
            if not self._inside or self.sight is None:
                return None
            hidden = args[0] if args else kwargs["hidden_states"]
            if first:
                flat = hidden.dim() == 2
                self._stream = Stream(None, flat=flat)
                self.sight.flat, self.sight.full = flat, hidden.shape[-2]
            if self._stream is None:
                return None
            self._stream.enter(hidden)
            told = self._stream.told(kwargs)
            self._start = 0
            return None if self._stream.rows is None else (args, told)

        return hook

    def _leave(self, layer: int) -> Any:
        def hook(block: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
            stream = self._stream
            if stream is None or self.sight is None:
                return None
            hidden = output[0] if isinstance(output, tuple) else output
            stream.leave(hidden)
            before = stream.hidden
            for runtime in self._after:
                runtime.after_vision(layer, stream)
            self.sight.rows[layer] = stream.rows
            if stream.hidden is before:
                return None
            state = stream.state()
            return (state, *output[1:]) if isinstance(output, tuple) else state

        return hook

    def attention(self, call: Call) -> Tensor:
        """Return attention of a call of the vision tower, ``[B, Q, H, d]``."""
        stream = self._stream
        if not self._inside or stream is None:
            return call.plain()
        call.ordered = stream.ordered
        if stream.flat:
            # One call for each segment; rows are numbered through all of them.
            part = slice(self._start, self._start + call.query.shape[2])
            self._start = part.stop
            call.rows = stream.positions()[:, part]
            call.sizes = None if stream.sizes is None else stream.sizes[:, part]
        else:
            call.rows, call.sizes = stream.rows, stream.sizes
        for runtime in self._look:
            runtime.look(call)
        if call.sizes is None and call.ordered:
            return call.plain()
        return compute(call, call.key, call.value, visible(call, call.rows, call.key.shape[2], call.sizes))

    def _thinned(self) -> tuple[Sight, Tensor] | None:
        """Return the call and the rows that are left where features are taken; None if all are."""
        sight = self.sight
        if not self._inside or sight is None:
            return None
        chosen = sight.arguments.get("vision_feature_layer")
        if chosen is None:
            chosen = getattr(self.model.hf.config, "vision_feature_layer", None)
        if isinstance(chosen, list | tuple):
            each = [sight.rows.get(feature_block(self.model, at)) for at in chosen]
            if any(rows is not each[0] for rows in each):
                raise PolicyError(
                    "features are taken from several layers of the vision tower, between which a policy lets patches "
                    "go; take them from one layer."
                )
        rows = sight.rows.get(feature_block(self.model, chosen))
        return None if rows is None else (sight, rows)

    def _strategy(self, sight: Sight) -> str:
        told = sight.arguments.get("vision_feature_select_strategy")
        return told or getattr(self.model.hf.config, "vision_feature_select_strategy", None) or "full"

    def _projected(self, module: nn.Module, args: Any, output: Tensor) -> Tensor | None:
        """Write projected features back to their places in the full grid."""
        found = self._thinned()
        if found is None:
            return None
        sight, rows = found
        if sight.flat:
            size = self._cell()
            grid = output.new_zeros((sight.full // size, output.shape[-1]))
            grid[rows[0, ::size] // size] = output
            return grid
        cut = self._leading if self._strategy(sight) == "default" else 0
        self._check_class(rows)
        return scattered(
            output.new_zeros((len(output), sight.full - cut, output.shape[-1])), rows[:, cut:] - cut, output
        )

    def _check_cells(self, module: nn.Module, args: Any) -> None:
        """Refuse to project cells of which only a part is left: patches of different cells would be mixed."""
        found = self._thinned()
        if found is None or not found[0].flat:
            return
        rows, size = found[1][0], self._cell()
        whole = len(rows) % size == 0
        if whole:
            cells = rows.view(-1, size)
            first = cells[:, :1]
            whole = bool((first % size == 0).all()) and bool(
                (cells == first + torch.arange(size, device=rows.device)).all()
            )
        if not whole:
            raise PolicyError(
                f"a policy let parts of a cell go; in this model's vision tower the {size} patches of one go together."
            )

    def _cell(self) -> int:
        side: int = self.model.hf.config.vision_config.spatial_merge_size
        return side * side

    def _regrid(self, module: nn.Module, args: Any, output: Any) -> Any:
        """Write the tower's rows back to their places, where what follows needs the whole square."""
        sight = self.sight
        if not self._inside or sight is None:
            return None

        def spread(hidden: Tensor | None, layer: int) -> Tensor | None:
            rows = sight.rows.get(layer)
            if rows is None or hidden is None:
                return hidden
            self._check_class(rows)
            return scattered(hidden.new_zeros((len(hidden), sight.full, hidden.shape[-1])), rows, hidden)

        depth = len(sight.rows)
        output.last_hidden_state = spread(output.last_hidden_state, depth - 1)
        if output.hidden_states is not None:
            output.hidden_states = tuple(spread(part, at - 1) for at, part in enumerate(output.hidden_states))
        return output

    def _check_class(self, rows: Tensor) -> None:
        if self._leading and bool((rows[:, 0] != 0).any()):
            raise PolicyError("a policy let the class token of the vision tower go, which must stay in front.")

    def features(self, sight: Sight, runs: Callable[[], list[int]]) -> Features:
        """Return the map of a call; ``runs`` returns the lengths of the runs of image tokens in the prompt."""
        arguments = sight.arguments
        flat = arguments.get("image_grid_thw") is not None
        if not flat and arguments.get("image_sizes") is not None and sight.shapes is None:
            raise ArchitectureError(
                f"{type(self.model.hf).__name__} cuts images in a way that policies of images cannot follow."
            )
        total, extra = self._patches(sight, flat)
        if sight.full and sight.full != total + (0 if flat else self._leading):
            raise ArchitectureError(
                f"{type(self.model.hf).__name__} makes {len(sight.pieces[0])} features of {sight.full} rows of its "
                "vision tower in a way that policies cannot follow; take one that does not look into the tower."
            )
        packing = Packing(arguments, sight.pieces, total, extra, flat, sight.shapes, sight.more)
        return imagemap.features(self._inner, packing, runs, self._alive(sight, total))

    def _patches(self, sight: Sight, flat: bool) -> tuple[int, int]:
        """Return the patches of a tile (of the call, in a flat tower), and the rows before them that are features."""
        if flat:
            return int(sight.arguments["image_grid_thw"].prod(-1).sum()), 0
        extra = self._leading if self._strategy(sight) == "full" else 0
        if sight.shapes is not None:
            return sight.shapes[0][1] - extra, extra
        if hasattr(self._inner, "pixel_shuffle"):
            ratio: float = self.model.hf.config.downsample_ratio
            return round(len(sight.pieces[0]) / ratio**2), 0
        return len(sight.pieces[0]) - extra, extra

    def _alive(self, sight: Sight, total: int) -> Tensor | None:
        rows = sight.rows.get(feature_block(self.model, sight.arguments.get("vision_feature_layer")))
        if rows is None:
            return None
        lead = 0 if sight.flat else self._leading
        alive = torch.zeros((len(rows), total + 1), dtype=torch.bool, device=rows.device)
        # The spare column takes fillers and the class token.
        alive.scatter_(1, torch.where(rows >= lead, rows - lead, total), True)
        return alive[:, :total].flatten()


def _replace(stack: contextlib.ExitStack, owner: nn.Module, name: str, wrapper: Callable[..., Any]) -> None:
    """Put a wrapped method in front of the class's own for as long as ``stack`` is open."""
    own = owner.__dict__.get(name)
    owner.__dict__[name] = wrapper(getattr(owner, name))
    if own is None:
        stack.callback(owner.__dict__.pop, name, None)
    else:
        stack.callback(owner.__dict__.__setitem__, name, own)
