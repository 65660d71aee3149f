"""Building models whose layers differ: what plain transformers lacks to load a config with ``per_layer_config``.

transformers has the config side only. While `layered` is active, every model with such a config is built from its
global values, which are the largest of all layers, and each block is then cut to its layer's own numbers before weights
are loaded into it. On the meta device, where ``from_pretrained`` builds, that costs no memory.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from transformers import PreTrainedModel
from transformers.integrations.heterogeneity import HeterogeneousConfigMixin

from paredown.core import anatomy
from paredown.core.anatomy import Block
from paredown.core.configs import (
    DROPOUT_KEYS,
    HEADS_KEY,
    NORMS_KEY,
    RANK_KEY,
    SHARED_KEY,
    SHARING,
    WIDTHS_KEY,
    WITH_KEY,
    is_uniform,
    overrides_of,
)
from paredown.core.edits import DropSublayer, Edit, KeepExpertNeurons, KeepExperts, KeepHeads, KeepNeurons
from paredown.core.roles import Shared
from paredown.errors import CheckpointError

if TYPE_CHECKING:
    from torch import nn
    from transformers import PreTrainedConfig


@contextmanager
def layered(config: PreTrainedConfig | None = None) -> Iterator[None]:
    """Let transformers build models with unequal layers inside the ``with`` block.

    Parameters
    ----------
    config
        The config about to be loaded; nothing is patched if its layers are alike. None: be ready for any.

    Raises
    ------
    CheckpointError
        While a model is built, if a layer's override is unknown or larger than the global value.
    """
    if config is not None and is_uniform(config):
        yield
        return
    post_init: Callable[..., Any] = PreTrainedModel.post_init
    access = HeterogeneousConfigMixin.allow_global_per_layer_attribute_access
    logger = logging.getLogger("transformers.integrations.heterogeneity.configuration_utils")
    level = logger.level

    def conforming_post_init(self: PreTrainedModel) -> None:
        post_init(self)
        overrides = overrides_of(self.config)
        if overrides:
            conform(self, overrides)

    # Blocks read the global values while they are built; outside this context such a read stays an error.
    PreTrainedModel.post_init = conforming_post_init
    HeterogeneousConfigMixin.allow_global_per_layer_attribute_access = property(lambda self: True)
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        PreTrainedModel.post_init = post_init
        HeterogeneousConfigMixin.allow_global_per_layer_attribute_access = access
        logger.setLevel(level)


def conform(model: PreTrainedModel, overrides: dict[int, dict[str, Any]]) -> None:
    """Cut the blocks of a freshly built model (its own, not those of towers within it) to their layers' overrides."""
    from paredown.core.depth import sharing
    from paredown.core.surgery import apply

    for path, blocks in anatomy.stacks(model):
        if _owner_config(model, path) is not model.config:
            continue
        for i, module in enumerate(blocks):
            if i in overrides:
                part = anatomy.block(module, model.config, index=i, path=f"{path}.{i}", model=model)
                own = _own(overrides, i, len(blocks))
                edits = _edits(part, own, i)
                part = apply(module, part, edits)
                widths = own.get(WIDTHS_KEY)
                if widths is not None and part.experts is not None and part.experts.widths is None:
                    _make_ragged(module, part, widths)
        shared = {i: _shared(found, i) for i, found in overrides.items() if found.get(WITH_KEY) is not None}
        if shared:
            sharing.tie(model, path, shared)


def _own(overrides: dict[int, dict[str, Any]], layer: int, count: int) -> dict[str, Any]:
    """Return a layer's overrides without what they say of sharing; a width of 0 is that of the block it shares with."""
    mine = {key: value for key, value in overrides[layer].items() if key not in SHARING}
    source = overrides[layer].get(WITH_KEY)
    if source is None or source == layer:
        return mine
    theirs = overrides.get(source, {}) if isinstance(source, int) else {}
    if not isinstance(source, int) or not 0 <= source < min(layer, count) or theirs.get(WITH_KEY, source) != source:
        raise CheckpointError(
            f"per_layer_config of layer {layer} shares the weights of layer {source}, which must be an earlier one that"
            " holds its own; mend config.json"
        )
    dead = {key for key, value in mine.items() if value == 0}
    living = {key: value for key, value in mine.items() if key not in dead}
    return living | {key: value for key, value in theirs.items() if key in dead}


def _shared(override: dict[str, Any], layer: int) -> Shared:
    rank, norms = override.get(RANK_KEY, 0), override.get(NORMS_KEY, True)
    if not isinstance(rank, int) or rank < 0:
        raise CheckpointError(f"per_layer_config of layer {layer} sets {RANK_KEY} to {rank}; mend config.json")
    return Shared(override[WITH_KEY], rank, bool(norms))


def _owner_config(model: nn.Module, path: str) -> Any:
    """Return the config of the innermost model around the module list at ``path``."""
    found = getattr(model, "config", None)
    steps = path.split(".")
    for n in range(1, len(steps)):
        module = model.get_submodule(".".join(steps[:n]))
        if isinstance(module, PreTrainedModel):
            found = module.config
    return found


def _make_ragged(module: nn.Module, part: Block, widths: Sequence[int]) -> None:
    from paredown.core.ragged import RaggedExperts

    assert part.experts is not None
    parent, _, name = part.experts.experts.rpartition(".")
    built = module.get_submodule(part.experts.experts)
    setattr(module.get_submodule(parent), name, RaggedExperts.cut(built, [range(width) for width in widths]))


def _edits(part: Block, overrides: dict[str, Any], layer: int) -> list[Edit]:
    """Translate a layer's overrides into the edits that lead from the block as built to the block as saved."""
    skip = set(overrides.get("skip", ()))
    edits: list[Edit] = []
    for name in ("attention", "mlp"):
        present = part.attention if name == "attention" else part.mlp or part.experts
        if name in skip and present is not None:
            edits.append(DropSublayer(layer=layer, part=name))
    rest = {key: value for key, value in overrides.items() if key not in ("skip", WIDTHS_KEY)}
    attention, mlp, experts = part.attention, part.mlp, part.experts
    if "attention" in skip:
        for key in (HEADS_KEY, *DROPOUT_KEYS):
            rest.pop(key, None)
        attention = None
    if "mlp" in skip:
        for key in [key for key, value in rest.items() if value == 0]:
            del rest[key]
        mlp = experts = None
    if attention is not None and (heads := rest.pop(HEADS_KEY, None)) is not None:
        full = attention.kv_heads
        _add(edits, KeepHeads(layer=layer, keep=_first(heads, full, HEADS_KEY, layer)), full)
    if mlp is not None and (width := rest.pop(mlp.width_key, None)) is not None:
        _add(edits, KeepNeurons(layer=layer, keep=_first(width, mlp.width, mlp.width_key, layer)), mlp.width)
    if experts is not None:
        count = rest.pop(experts.count_key, experts.count)
        top_k = rest.pop(experts.top_k_key, experts.top_k)
        if (count, top_k) != (experts.count, experts.top_k):
            size, stay = experts.count // experts.groups, count // experts.groups
            _first(count, experts.count, experts.count_key, layer)
            keep = tuple(group * size + i for group in range(experts.groups) for i in range(stay))
            edits.append(KeepExperts(layer=layer, keep=keep, top_k=top_k))
        width = rest.pop(experts.width_key, experts.width)
        width = experts.width if WIDTHS_KEY in overrides else width
        shared = rest.pop(SHARED_KEY, None)
        neurons = _first(width, experts.width, experts.width_key, layer)
        beside = None
        if shared is not None and experts.shared is not None:
            beside = _first(shared, experts.shared.width, SHARED_KEY, layer)
        if experts.widths is None and (width != experts.width or beside is not None):
            edits.append(KeepExpertNeurons(layer=layer, keep=(neurons,) * count, shared=beside))
    if rest:
        raise CheckpointError(
            f"per_layer_config of layer {layer} has {', '.join(sorted(rest))}, which Paredown cannot build; load this"
            " model with the tool that wrote it"
        )
    return edits


def _add(edits: list[Edit], edit: KeepHeads | KeepNeurons, full: int) -> None:
    if len(edit.keep) != full:
        edits.append(edit)


def _first(count: Any, built: int, key: str, layer: int) -> tuple[int, ...]:
    if not isinstance(count, int) or not 0 < count <= built:
        raise CheckpointError(
            f"per_layer_config of layer {layer} sets {key} to {count}, which must be from 1 to the global {built}; mend"
            " config.json"
        )
    return tuple(range(count))
