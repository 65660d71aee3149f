"""BlockPruner: drop sub-layers one after the other, each time the one without which the text is read best.

Source: "BlockPruner: Fine-grained Pruning for Large Language Models", 2024, arXiv 2406.10594; official code
MrGGLS/BlockPruner (block_search.py). What the paper calls a block, MHA or MLP, is a sub-layer here.

In each round every sub-layer that is left is taken out alone, beside those that are gone; the perplexity of the
calibration text is measured, and the sub-layer with the lowest goes. A loss is compared here instead of its
exponential: the order is the same. Ties: attention before MLP, lower layer first, as in the code's list.

A round of ``n`` candidates costs ``n`` passes at most (the blocks before a candidate are run once for all). The code
writes down an order and leaves deleting to another script, which it does in a list that holds sets; here the best set
is what is deleted. The paper draws 256 samples of Alpaca, the code's default is 128.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any, Literal

from pydantic import Field

from paredown.core import budget, surgery
from paredown.core.anatomy import Block
from paredown.core.calibration import Batch
from paredown.core.checkpoint import Model
from paredown.core.depth import bypass
from paredown.core.depth.gates import Kind, Unit, drops, gated, units
from paredown.core.durable import write_text
from paredown.core.edits import Edit
from paredown.core.method import WholeModelCompressor, register
from paredown.core.session import Session

_ROUNDS = "rounds.json"


@register
class BlockPruner(WholeModelCompressor):
    """Drops sub-layers one by one, each time the one whose absence leaves the lowest perplexity."""

    name = "blockpruner"
    title = "BlockPruner: Fine-grained Pruning for Large Language Models"
    year = 2024
    arxiv = "2406.10594"
    axis = "depth"
    unit = "sub-layers"
    needs = ("calibration-data",)

    part: Literal["attention", "mlp", "joint"] = Field(
        "joint", description="Which sub-layers may go: attention, mlp, or both from one list (joint)."
    )

    @property
    def sizes_vary(self) -> bool:
        """Attention and MLP are of unequal size."""
        return self.part == "joint"

    def applies(self, part: Block) -> bool:
        """Whether the block has a residual sub-layer of the wanted kind."""
        return bool(self._candidates([part]))

    def foretell(self, blocks: Sequence[Block]) -> list[Edit]:
        """Return as many drops as there will be, from the first on; which they are is not known."""
        listed = self._candidates(blocks)
        return drops(listed[: budget.removed(len(listed), self.keep)])

    def passes(self, blocks: Sequence[Block]) -> float:
        """Return half a pass for each candidate of each round."""
        count = len(self._candidates(blocks))
        return sum(count - i for i in range(budget.removed(count, self.keep))) / 2

    def transform(self, model: Model, data: Batch | None, session: Session) -> list[Edit]:
        """Drop round by round, then delete what was dropped."""
        assert data is not None
        listed = self._candidates(model.anatomy.language.blocks)
        wanted = budget.removed(len(listed), self.keep)
        whose = [self.part, wanted, data.fingerprint]
        rounds = _known(session, whose)[:wanted]
        gone: list[Unit] = [(int(one["layer"]), one["part"]) for one in rounds]
        with session.timed("search"), gated(model) as gates:
            for number in range(len(rounds), wanted):
                text = f"{self.name}: {number} of {wanted} dropped"

                def tell(done: int, total: int, text: str = text) -> None:
                    session.tell(done, total, text)

                left = [unit for unit in listed if unit not in gone]
                found = bypass.scan(model, gates, data, left, gone, tell=tell)
                best = min(left, key=lambda unit: found[unit].loss)
                gone.append(best)
                rounds.append({"layer": best[0], "part": best[1], "loss": found[best].loss})
                if session.folder is not None:
                    session.folder.mkdir(parents=True, exist_ok=True)
                    write_text(session.folder / _ROUNDS, json.dumps({"whose": whose, "rounds": rounds}))
        edits = drops(gone)
        model.anatomy = surgery.apply_model(model.hf, model.anatomy, edits)
        session.coverage["rounds"] = rounds
        return edits

    def _candidates(self, blocks: Sequence[Block]) -> list[Unit]:
        kinds: dict[str, tuple[Kind, ...]] = {
            "attention": ("attention",), "mlp": ("mlp",), "joint": ("attention", "mlp")
        }  # fmt: skip
        return [unit for kind in kinds[self.part] for unit in units(blocks, [kind])]


def _known(session: Session, whose: object) -> list[dict[str, Any]]:
    """Return the rounds that were played before a kill, of the same search."""
    if session.folder is None or not (session.folder / _ROUNDS).exists():
        return []
    held = json.loads((session.folder / _ROUNDS).read_text(encoding="utf-8"))
    return list(held["rounds"]) if held["whose"] == json.loads(json.dumps(whose)) else []
