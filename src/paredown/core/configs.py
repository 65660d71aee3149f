"""The configuration that belongs to edited weights.

A value on which all layers that have it agree stands in the global attribute, so that plain transformers can load the
result. What differs from layer to layer stands in transformers' ``per_layer_config``. Keys there:

- the family's own: MLP width, experts' count, width and top-k, ``shared_expert_intermediate_size``,
  ``num_key_value_heads`` (the query heads follow: each key-value head keeps the query heads that read it);
- ``expert_widths``: a list, where the experts of one layer differ in width;
- ``skip``: ``["attention"]``, ``["mlp"]`` or both;
- ``shared_with``: the block whose weights this one uses, ``shared_rank`` and ``shared_norms`` (see `roles.Shared`).

Next to the last three the size that no longer means anything is written as 0: code that knows none of these keys then
fails on reading a per-layer value, where it would otherwise fill the weights that it misses with random numbers. (The
width of a block that shares is that of the block it shares with.)
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal

from paredown.core import architectures as names
from paredown.core.anatomy import Anatomy, Attention, Block, Tower, tower_config
from paredown.core.edits import ChangeWeights, DropBlock, Edit, FuseBlocks
from paredown.core.effects import edited, fused, runs
from paredown.errors import ArchitectureError, BudgetError

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

TowerName = Literal["language", "vision"]

# Lists in a config that have one entry a layer, and lists that hold numbers of layers.
_PER_LAYER_LISTS = ("layer_types", "mlp_layer_types", "no_rope_layers", "attention_layers", "moe_layers_enum")
HEADS_KEY = "num_key_value_heads"
SHARED_KEY = "shared_expert_intermediate_size"
WIDTHS_KEY = "expert_widths"
# Which block's weights a block uses, the rank of its deltas, whether its norms are its own; and what else means.
WITH_KEY, RANK_KEY, NORMS_KEY = "shared_with", "shared_rank", "shared_norms"
SHARING: dict[str, Any] = {WITH_KEY: None, RANK_KEY: 0, NORMS_KEY: True}
# Read by every attention on building, unlike the count of key-value heads.
DROPOUT_KEYS = ("attention_dropout", "attention_probs_dropout_prob", "attn_pdrop")


def new_config(
    config: PreTrainedConfig, anatomy: Anatomy, edits: Sequence[Edit], *, tower: TowerName = "language"
) -> PreTrainedConfig:
    """Return a deep copy of the top-level ``config`` that describes the model after ``edits``.

    Raises
    ------
    BudgetError
        If an edit breaks a rule (see `effects.edited`) or leaves no block.
    ArchitectureError
        If the family does not allow an edit.
    """
    which = tower_of(anatomy, tower)
    after = blocks_after(which, edits)
    new = copy.deepcopy(config)
    part = tower_config(new, which)
    part.per_layer_config = None
    kept = [block.index for block in after]
    if len(kept) < len(which.blocks):
        _remap(new, part, kept, len(which.blocks), which)
    overrides: list[dict[str, Any]] = [{} for _ in after]
    _write_heads(part, which, after, overrides)
    _write_widths(part, after, overrides)
    _write_experts(part, after, overrides)
    _write_skips(part, which, after, overrides)
    _write_sharing(part, after, overrides)
    written = {i: override for i, override in enumerate(overrides) if override}
    if written:
        if not hasattr(part, "num_hidden_layers"):
            # Vision configs of older transformers call it depth; `per_layer_config` counts layers by this name.
            part.num_hidden_layers = len(after)
        part.per_layer_config = written
    return new


def tower_of(anatomy: Anatomy, name: TowerName) -> Tower:
    """Return the tower that edits are meant for.

    Raises
    ------
    ArchitectureError
        If the model has no such tower.
    """
    found = anatomy.language if name == "language" or anatomy.language.name == name else anatomy.vision
    if found is None:
        raise ArchitectureError(f"this {anatomy.family} model has no {name} tower; leave the tower out of the step")
    return found


def blocks_after(tower: Tower, edits: Sequence[Edit]) -> list[Block]:
    """Return the anatomy of each block that stays; ``index`` still counts in the model before the edits."""
    per_layer = by_layer(tower, edits)
    joined, gone = runs(edits, len(tower.blocks)), removed_blocks(edits)
    after = [
        fused([tower.blocks[i] for i in joined[block.index]])
        if block.index in joined
        else edited(block, [edit for edit in per_layer.get(block.index, ()) if not isinstance(edit, DropBlock)])
        for block in tower.blocks
        if block.index not in gone
    ]
    if not after:
        raise BudgetError(f"all {len(tower.blocks)} blocks would go; keep at least one")
    _check_sharing(after)
    return after


def removed_blocks(edits: Sequence[Edit]) -> set[int]:
    """Return the blocks that are no more: dropped ones, and those that became part of the first of their run."""
    gone = {edit.layer for edit in edits if isinstance(edit, DropBlock)}
    for edit in edits:
        if isinstance(edit, FuseBlocks):
            gone |= set(range(edit.layer + 1, edit.layer + edit.count))
    return gone


def by_layer(tower: Tower, edits: Sequence[Edit]) -> dict[int, list[Edit]]:
    """Sort edits by layer, keeping their order within a layer.

    Raises
    ------
    BudgetError
        If an edit is meant for a layer that is not there.
    ArchitectureError
        If blocks share weights and an edit would do more than change these.
    """
    if any(not isinstance(edit, ChangeWeights) for edit in edits):
        check_unshared(tower.blocks, "the step")
    sorted_edits: dict[int, list[Edit]] = {}
    for edit in edits:
        if not 0 <= edit.layer < len(tower.blocks):
            raise BudgetError(
                f"an edit is meant for layer {edit.layer}, but the {tower.name} tower has layers 0 to"
                f" {len(tower.blocks) - 1}; renumber it"
            )
        sorted_edits.setdefault(edit.layer, []).append(edit)
    return sorted_edits


def check_unshared(blocks: Sequence[Block], who: str) -> None:
    """Refuse blocks that share weights: what is cut in one would be cut, or missing, in all that use it.

    Raises
    ------
    ArchitectureError
        Naming the first such block; ``who`` is what refuses.
    """
    shared = next((block for block in blocks if block.shared is not None), None)
    if shared is not None:
        raise ArchitectureError(
            f"layer {shared.index} of this model shares weights with other layers, and cutting one would cut them all;"
            f" put {who} before the step that shares them, or heal behind it."
        )


def overrides_of(config: PreTrainedConfig) -> dict[int, dict[str, Any]]:
    """Return the per-layer overrides of one (sub-)config; empty when its layers are alike."""
    spec = vars(config).get("_heterogeneity_spec")
    return {} if spec is None else dict(spec.per_layer_overrides)


def is_uniform(config: PreTrainedConfig) -> bool:
    """Whether plain transformers can build every layer, of all towers, from the global attributes."""
    parts = [config, *(getattr(config, key, None) for key in getattr(config, "sub_configs", {}))]
    return not any(overrides_of(part) for part in parts if part is not None)


def loads_in(config: PreTrainedConfig) -> str:
    """Return what loads a checkpoint with this config: ``transformers`` or ``paredown.load``."""
    return "transformers" if is_uniform(config) else "paredown.load"


def _has(config: PreTrainedConfig, key: str) -> bool:
    return key in vars(config)


def _write(config: PreTrainedConfig, key: str, values: dict[int, int], overrides: list[dict[str, Any]]) -> None:
    """Write a number a layer: globally where all agree, else the largest globally and each other one in its layer.

    Plain code builds from the global value; `layered` cuts each layer down from it, so it must be the largest.
    """
    largest = max(values.values())
    setattr(config, key, largest)
    for i, value in values.items():
        if value != largest:
            overrides[i][key] = value


def _write_heads(config: PreTrainedConfig, tower: Tower, after: list[Block], overrides: list[dict[str, Any]]) -> None:
    counts = {i: block.attention.kv_heads for i, block in enumerate(after) if block.attention is not None}
    sample = next((block.attention for block in after if block.attention is not None), None)
    if sample is None or sample.layout == "mla":
        return
    before = getattr(config, HEADS_KEY, None) or config.num_attention_heads
    if set(counts.values()) == {before}:
        return
    if len(set(counts.values())) == 1 and _global_heads(config, sample.heads, sample.kv_heads, sample.head_dim):
        return
    if max(counts.values()) > before:
        before = _widened(config, sample, max(counts.values()))
    # Otherwise the global count stays: head size, rotary embedding and query heads are derived from it.
    if not _has(config, HEADS_KEY):
        setattr(config, HEADS_KEY, before)
    for i, count in counts.items():
        if count != before:
            overrides[i][HEADS_KEY] = count


def _widened(config: PreTrainedConfig, sample: Attention, least: int) -> int:
    """Write a global count of heads from which the widest layer can be cut, and return the key-value heads of it."""
    ratio = sample.heads // sample.kv_heads
    # Some families want the hidden size to be a multiple of the number of heads; a few heads more are cut on loading.
    for count in range(least, max(least, config.hidden_size // ratio) + 1):
        if _global_heads(config, count * ratio, count, sample.head_dim):
            return count
    raise ArchitectureError(
        f"the configuration of {config.model_type} cannot express {least * ratio} heads of size {sample.head_dim}, so"
        " its blocks cannot be fused; use another depth method"
    )


def _global_heads(config: PreTrainedConfig, heads: int, kv_heads: int, head_dim: int) -> bool:
    """Write head counts globally if the family's own code then builds the same attention; return whether it does."""
    family = config.model_type
    if family in names.IGNORES_HEAD_DIM or not (hasattr(config, "head_dim") or family in names.READS_HEAD_DIM):
        return False
    trial = copy.deepcopy(config)
    for one in (trial, config):
        one.num_attention_heads, one.head_dim = heads, head_dim
        if _has(one, HEADS_KEY):
            one.num_key_value_heads = kv_heads
        try:
            one.validate_architecture()
        except ValueError:  # most often: hidden_size must be a multiple of the number of heads
            return False
    return True


def _write_widths(config: PreTrainedConfig, after: list[Block], overrides: list[dict[str, Any]]) -> None:
    dense = {i: block.mlp.width for i, block in enumerate(after) if block.mlp is not None}
    key = next((block.mlp.width_key for block in after if block.mlp is not None), None)
    if key is None:
        return
    factors = names.COMPUTED_WIDTH.get(config.model_type)
    if factors is None:
        _write(config, key, dense, overrides)
        return
    built = int(getattr(config, factors[0]) * getattr(config, factors[1]))
    changed = {i: width for i, width in dense.items() if width != built}
    if changed:
        setattr(config, key, built)
        for i, width in changed.items():
            overrides[i][key] = width


def _write_experts(config: PreTrainedConfig, after: list[Block], overrides: list[dict[str, Any]]) -> None:
    parts = {i: block.experts for i, block in enumerate(after) if block.experts is not None}
    if not parts:
        return
    sample = next(iter(parts.values()))
    _write(config, sample.count_key, {i: part.count for i, part in parts.items()}, overrides)
    _write(config, sample.width_key, {i: part.width for i, part in parts.items()}, overrides)
    _write(config, sample.top_k_key, {i: part.top_k for i, part in parts.items()}, overrides)
    ragged = {i: list(part.widths) for i, part in parts.items() if part.widths is not None}
    if ragged:
        setattr(config, WIDTHS_KEY, None)
        for i, widths in ragged.items():
            overrides[i][WIDTHS_KEY] = widths
            overrides[i][sample.width_key] = 0
    shared = {i: part.shared.width for i, part in parts.items() if part.shared is not None}
    if not shared:
        return
    if sample.shared is not None and sample.shared.width_key == "n_shared_experts":
        # DeepSeek: the shared width is a multiple of the routed experts' width.
        width = getattr(config, sample.width_key)
        if len(set(shared.values())) == 1 and next(iter(shared.values())) % width == 0:
            config.n_shared_experts = next(iter(shared.values())) // width
            return
        config.n_shared_experts = -(-max(shared.values()) // width)
        setattr(config, SHARED_KEY, width * config.n_shared_experts)
        for i, value in shared.items():
            if value != width * config.n_shared_experts:
                overrides[i][SHARED_KEY] = value
        return
    _write(config, SHARED_KEY, shared, overrides)


def _write_skips(config: PreTrainedConfig, tower: Tower, after: list[Block], overrides: list[dict[str, Any]]) -> None:
    widths = {part.width_key for block in tower.blocks if (part := block.mlp or block.experts) is not None}
    for i, block in enumerate(after):
        skip = ["attention"] if block.attention is None else []
        skip += ["mlp"] if block.mlp is None and block.experts is None else []
        if not skip:
            continue
        overrides[i]["skip"] = skip
        guards = {"attention": {HEADS_KEY}, "mlp": widths or set(names.MLP_WIDTH_KEYS)}
        overrides[i] |= {key: 0 for one in skip for key in guards[one] if _has(config, key)}
        if "attention" in skip and HEADS_KEY not in overrides[i]:
            overrides[i] |= {key: 1.0 for key in DROPOUT_KEYS if _has(config, key)}


def _check_sharing(after: Sequence[Block]) -> None:
    parts = {block.index: block for block in after}
    used = {block.shared.source for block in after if block.shared is not None and block.shared.source != block.index}
    for block in after:
        if block.shared is None:
            continue
        source, where = parts.get(block.shared.source), f"layer {block.index}"
        if source is None or source.index > block.index:
            raise BudgetError(
                f"{where} cannot share the weights of layer {block.shared.source}; name an earlier layer that stays"
            )
        if source is not block and source.shared is not None and source.shared.source != source.index:
            raise BudgetError(
                f"{where} cannot share the weights of layer {source.index}, which uses those of layer"
                f" {source.shared.source}; name that one"
            )
        if source is block and (not block.shared.rank or block.index not in used):
            raise BudgetError(f"{where} would share its weights with no other layer; leave it out of the step")


def _write_sharing(config: PreTrainedConfig, after: list[Block], overrides: list[dict[str, Any]]) -> None:
    numbers = {block.index: i for i, block in enumerate(after)}
    shared = {i: block.shared for i, block in enumerate(after) if block.shared is not None}
    for key, usual in SHARING.items():
        if shared:
            # What some layers have, transformers wants to find globally, too.
            setattr(config, key, usual)
        else:
            vars(config).pop(key, None)
    for i, found in shared.items():
        overrides[i] |= {WITH_KEY: numbers[found.source], RANK_KEY: found.rank, NORMS_KEY: found.norms}
        part = after[i].mlp or after[i].experts
        if numbers[found.source] != i and part is not None:
            overrides[i][part.width_key] = 0


def _remap(top: PreTrainedConfig, config: PreTrainedConfig, kept: list[int], count: int, tower: Tower) -> None:
    """Renumber everything that speaks of single layers when blocks go."""
    if getattr(config, "num_kv_shared_layers", 0):
        raise ArchitectureError(
            f"the last layers of this {config.model_type} model read the keys of earlier ones, so blocks cannot be"
            " removed; drop MLPs instead"
        )
    for key in ("num_hidden_layers", "depth"):
        if hasattr(config, key):
            setattr(config, key, len(kept))
    for key in _PER_LAYER_LISTS:
        values = vars(config).get(key)
        if isinstance(values, (list, tuple)) and len(values) == count:
            setattr(config, key, [values[i] for i in kept])
    if getattr(config, "mlp_only_layers", None) is not None:
        step = getattr(config, "decoder_sparse_step", 1)
        dense = {i for i in range(count) if i in config.mlp_only_layers or (i + 1) % step != 0}
        config.mlp_only_layers = [new for new, old in enumerate(kept) if old in dense]
        config.decoder_sparse_step = 1
    if getattr(config, "first_k_dense_replace", None):
        config.first_k_dense_replace = sum(i < config.first_k_dense_replace for i in kept)
    chosen = getattr(top, "vision_feature_layer", None)
    if tower.name == "vision" and chosen is not None:
        top.vision_feature_layer = (
            [_hidden_state(one, kept, count) for one in chosen]
            if isinstance(chosen, list)
            else _hidden_state(chosen, kept, count)
        )


def _hidden_state(chosen: int, kept: list[int], count: int) -> int:
    """Renumber an entry of ``hidden_states``: 0 the embedding, i the output of block i - 1, negative from the end."""
    if chosen >= 0:
        return sum(i < chosen for i in kept)
    return -sum(i >= count + 1 + chosen for i in kept) - 1
