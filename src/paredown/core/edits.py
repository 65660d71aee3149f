"""Decisions about units, as data: what a method decided, unit by unit, ready for JSON, for plans and for surgery.

An edit names *kept* units, so that the same list serves weights, config and report. ``layer`` always counts in the
numbering of the model that the step was given.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter


class _Edit(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")

    layer: int


class KeepExperts(_Edit):
    """Keep these experts of a layer, in this order; router rows and correction bias follow; ``top_k`` may fall.

    ``clusters`` tells, for methods that group experts, which ones each kept expert stands for, itself among them.
    """

    op: Literal["keep_experts"] = "keep_experts"
    keep: tuple[int, ...]
    top_k: int
    clusters: tuple[tuple[int, ...], ...] | None = None


class KeepExpertNeurons(_Edit):
    """Keep these hidden neurons of each expert: one list an expert, equal lengths unless the step is ragged.

    ``shared`` lists the kept neurons of the shared expert; None leaves it whole.
    """

    op: Literal["keep_expert_neurons"] = "keep_expert_neurons"
    keep: tuple[tuple[int, ...], ...]
    shared: tuple[int, ...] | None = None


class KeepNeurons(_Edit):
    """Keep these hidden neurons of a dense MLP."""

    op: Literal["keep_neurons"] = "keep_neurons"
    keep: tuple[int, ...]


class KeepHeads(_Edit):
    """Keep these key-value groups: a KV head together with all the query heads that read it."""

    op: Literal["keep_heads"] = "keep_heads"
    keep: tuple[int, ...]


class DropSublayer(_Edit):
    """Turn the attention or the MLP (dense or experts) of a block into the identity on the residual stream."""

    op: Literal["drop_sublayer"] = "drop_sublayer"
    part: Literal["attention", "mlp"]


class DropBlock(_Edit):
    """Remove a whole block."""

    op: Literal["drop_block"] = "drop_block"


class ChangeWeights(_Edit):
    """Weights were changed in place, shapes stay: zeros, fewer levels, training.

    ``before`` and ``after`` count the method's units of this layer (weights that are not zero, bits); ``detail`` says
    what each tensor got.
    """

    op: Literal["change_weights"] = "change_weights"
    unit: str
    before: int
    after: int
    detail: dict[str, Any] = Field(default_factory=dict)


class ShareBlock(_Edit):
    """Let a block use the weights of block ``source``, beside low-rank deltas of ``rank`` (0: none).

    ``norms`` says whether the block keeps its norms and biases. ``source`` is an earlier block that stays and shares
    with nobody before it, or the block itself: then it keeps its weights and only gets deltas beside them.
    """

    op: Literal["share_block"] = "share_block"
    source: int
    rank: int = Field(0, ge=0)
    norms: bool = True


class FuseBlocks(_Edit):
    """Run ``count`` blocks from this one on side by side on one input, fused into one wide block that stands here."""

    op: Literal["fuse_blocks"] = "fuse_blocks"
    count: int = Field(ge=2)


Edit = Annotated[
    KeepExperts
    | KeepExpertNeurons
    | KeepNeurons
    | KeepHeads
    | DropSublayer
    | DropBlock
    | ChangeWeights
    | ShareBlock
    | FuseBlocks,
    Field(discriminator="op"),
]

_ADAPTER: TypeAdapter[list[Edit]] = TypeAdapter(list[Edit])


def to_json(edits: list[Edit]) -> str:
    """Serialise decisions; the same decisions give the same bytes."""
    return _ADAPTER.dump_json(edits).decode()


def from_json(text: str | bytes) -> list[Edit]:
    """Read decisions back, checked field by field."""
    return _ADAPTER.validate_json(text)
