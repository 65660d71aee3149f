"""Decisions about units, as data: what a method decided, unit by unit, ready for JSON, for plans and for surgery.

An edit names *kept* units, so that the same list serves weights, config and report. ``layer`` always counts in the
numbering of the model that the step was given.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter


class _Edit(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")

    layer: int


class KeepExperts(_Edit):
    """Keep these experts of a layer, in this order; router rows and correction bias follow; ``top_k`` may fall."""

    op: Literal["keep_experts"] = "keep_experts"
    keep: tuple[int, ...]
    top_k: int


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


Edit = Annotated[
    KeepExperts | KeepExpertNeurons | KeepNeurons | KeepHeads | DropSublayer | DropBlock, Field(discriminator="op")
]

_ADAPTER: TypeAdapter[list[Edit]] = TypeAdapter(list[Edit])


def to_json(edits: list[Edit]) -> str:
    """Serialise decisions; the same decisions give the same bytes."""
    return _ADAPTER.dump_json(edits).decode()


def from_json(text: str | bytes) -> list[Edit]:
    """Read decisions back, checked field by field."""
    return _ADAPTER.validate_json(text)
