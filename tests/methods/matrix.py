"""The common matrix: which methods are tested with which fields on which families, and how their units are counted.

Every compressor of the registry is in it. One that is not named in `FIELDS` runs with its defaults, on all decoders
that have what it removes.
"""

from __future__ import annotations

import functools
import math
from collections import deque
from collections.abc import Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass, field
from fractions import Fraction
from typing import Any

import families
import torch
from torch import Tensor

from paredown import registry
from paredown.core import anatomy as anatomies
from paredown.core.anatomy import Anatomy, Block
from paredown.core.calibration import Batch
from paredown.core.checkpoint import Model
from paredown.core.compression import InMemory, Job, stream_for
from paredown.core.edits import Edit
from paredown.core.method import Compressor, WholeModelCompressor
from paredown.core.sequential import Resident, Stream

# Fields that make a method another one; defaults are always among them.
FIELDS: dict[str, tuple[dict[str, Any], ...]] = {
    "camera-p": ({}, {"form": "ragged"}),
    "camera-q": ({}, {"search": False}),
    "dern": ({}, {"alpha": 0.0}),
    "llm-drop": ({}, {"part": "mlp"}, {"part": "joint"}, {"part": "each"}),
    "llm-drop-blocks": ({}, {"consecutive": True}),
    "random-blocks": ({}, {"consecutive": True}),
    "random-experts": ({},),
    "random-neurons": ({}, {"form": "ragged"}),
    "random-sublayers": ({}, {"part": "mlp"}, {"part": "joint"}),
    "random-weights": ({}, {"where": "mlp"}),
    "sajjad": (
        {},
        {"strategy": "bottom"},
        {"strategy": "symmetric"},
        {"strategy": "odd-alternate"},
        {"strategy": "parameter"},
        {"strategy": "contribution"},
    ),
    "stun": ({}, {"uniform": True}, {"coactivation": 1.0, "linkage": "complete"}),
    "unified-layer-skipping": ({}, {"spread": "even"}),
    "stun-weights": ({}, {"by": "owl"}, {"by": "magnitude", "where": "mlp"}),
}
# Families in which what an axis removes differs; an axis that is not named is tried on all decoders.
FAMILIES: dict[str, tuple[str, ...]] = {
    "experts": ("mixtral", "qwen2_moe", "qwen3_moe_mixed", "deepseek_v3"),
    "depth": ("llama", "gemma3", "gpt_neox", "phi", "qwen3_moe_mixed", "deepseek_v3"),
}
# Budgets that every family can meet; 0.3 of three layers takes two, 0.75 of eight experts two.
KEEPS: dict[str, tuple[float, ...]] = {"experts": (0.5, 0.75), "depth": (0.5, 0.3)}
_SUBLAYERS = ("sub-layers", "sub-layers, searched")
# Units whose budgets mean something else than a half of them.
UNIT_KEEPS: dict[str, tuple[float, ...]] = {"expert bits": (0.2, 0.17)}
# Both ends stay, so that one of three layers is refused.
NAME_KEEPS: dict[str, tuple[float, ...]] = {"unified-layer-skipping": (0.5,)}


@dataclass(frozen=True)
class Case:
    """One method with its fields on one family."""

    name: str
    fields: Mapping[str, Any] = field(hash=False)
    family: str

    def __str__(self) -> str:
        words = [f"{k}={v}" for k, v in self.fields.items()]
        return "-".join([self.name, *words, self.family])

    @property
    def keeps(self) -> tuple[float, ...]:
        """Budgets to try."""
        entry = registry.entry(self.name)
        if self.name in NAME_KEEPS:
            return NAME_KEEPS[self.name]
        return UNIT_KEEPS.get(entry.unit) or KEEPS.get(entry.axis, (0.5,))

    def method(self, keep: float | None = None) -> Compressor:
        """Build the method, with the first of its budgets if none is given."""
        made = registry.create(self.name, keep=self.keeps[0] if keep is None else keep, **self.fields)
        assert isinstance(made, Compressor)
        return made


def names(kind: str = "compressor") -> list[str]:
    """Return the methods of a kind that ship with Paredown; of compressors those that work block by block."""
    found = [entry.name for entry in registry.entries() if entry.kind == kind and entry.module.startswith("paredown.")]
    return [name for name in found if not issubclass(registry.get(name), WholeModelCompressor)]


def whole_names() -> list[str]:
    """Return the compressors that work on a whole model in memory."""
    found = [entry.name for entry in registry.entries() if entry.module.startswith("paredown.")]
    return [name for name in found if issubclass(registry.get(name), WholeModelCompressor)]


@functools.cache
def cases() -> tuple[Case, ...]:
    """Return every method with each of its fields on each family."""
    found = []
    for name in names():
        for fields in FIELDS.get(name, ({},)):
            for family in FAMILIES.get(registry.entry(name).axis, families.DECODERS):
                case = Case(name, fields, family)
                if any(case.method().applies(block) for block in anatomy(family).language.blocks):
                    found.append(case)
    return tuple(found)


def one_family_each() -> tuple[Case, ...]:
    """Return one case for each method and fields, on the family that asks most of it."""
    chosen: dict[tuple[str, str], Case] = {}
    for case in cases():
        chosen[case.name, str(dict(case.fields))] = case
    return tuple(chosen.values())


@functools.cache
def _built(family: str) -> Any:
    return families.FAMILIES[family]()


@functools.cache
def anatomy(family: str) -> Anatomy:
    """Return the anatomy of a family's untouched model."""
    return anatomies.find(_built(family))


def model(family: str) -> Model:
    """Return a fresh copy of a family's model."""
    return Model.of(deepcopy(_built(family)))


def batch(rows: int = 6, length: int = 12, seed: int = 1) -> Batch:
    """Return calibration tokens."""
    ids = torch.randint(3, 90, (rows, length), generator=torch.Generator().manual_seed(seed))
    return Batch(ids, None, "random", "", seed, rows)


def of(ids: Tensor, mask: Tensor | None) -> Batch:
    """Return a batch of these tokens."""
    return Batch(ids, mask, "given", "", 0, len(ids))


def scores(
    method: Compressor, found: Model, data: Batch | None, *, seed: int = 0, stream: Stream | None = None
) -> tuple[dict[int, dict[str, Tensor]], list[Edit]]:
    """Compress in memory and return every layer's scores and the edits."""
    keeper = InMemory()
    flow = stream if stream is not None else stream_for(method, found, data)
    outcome = Job(method, Resident(found), flow, None, keeper, seed).run()
    return keeper.known_scores, outcome.edits


def rows_apart(rows: Sequence[Tensor], *, lookback: int) -> Stream:
    """Return a stream in which each row runs alone, with its own length and no padding."""
    stream = Stream("calibration", rows[0][None], batch_size=1, lookback=lookback)
    stream.ids = tuple(row[None] for row in rows)
    stream.masks = (None,) * len(rows)
    stream.past = [deque(maxlen=lookback) for _ in rows]
    return stream


# Units are counted three times: what the budget allows, what the edits say, what the weights show.


def removed(n: int, keep: float) -> int:
    """Return how many of ``n`` go, by the rule in the documentation: floor(n * (1 - keep)), the decimal as typed."""
    return math.floor(n * (1 - Fraction(str(keep))))


def expected(method: Compressor, blocks: Sequence[Block]) -> dict[str, int]:
    """Return how many units stay, by pool: a layer, or all."""
    keep = method.keep
    if method.unit == "experts" and method.scope == "global" and not method.uniform:
        return {"all": sum(b.experts.count - removed(b.experts.count, keep) for b in blocks if b.experts)}
    if method.unit == "weights":
        shapes = _weights(method, blocks, _state(blocks)).values()
        return {"all": sum(math.prod(s[:-1]) * (s[-1] - removed(s[-1], keep)) for s in shapes)}
    if method.unit == "expert bits":
        return {str(b.index): sum(w * n for w, n in _widths(method, b)) for b in blocks if b.experts}
    if method.unit == "experts":
        return {str(b.index): b.experts.count - removed(b.experts.count, keep) for b in blocks if b.experts}
    if method.unit == "expert neurons":
        return {str(b.index): _neurons_that_stay(method, b) for b in blocks if b.experts}
    if method.unit == "blocks":
        return {"all": len(blocks) - removed(len(blocks), keep)}
    if method.unit in _SUBLAYERS:
        kinds = [kind for found in _sublayers(method, blocks).values() for kind in found]
        pools = [[kind for kind in kinds if kind == one] for one in ("attention", "mlp")]
        pools = pools if method.part == "each" else [kinds]
        return {"all": sum(len(pool) - removed(len(pool), keep) for pool in pools)}
    if method.unit == "levels":
        # What every layer loses alike is the total.
        return {"all": sum(expected(method.inner(), blocks).values())}
    raise AssertionError(f"teach matrix.py how a budget of {method.unit} is met, and how to count them")


def _neurons_that_stay(method: Any, block: Block) -> int:
    part = block.experts
    assert part is not None
    shared = part.shared.width if part.shared is not None else 0
    if method.form == "ragged":
        n = part.count * part.width + shared
        return n - removed(n, method.keep)
    # Transformers' grouped matrix products need rows of whole 16 bytes: four numbers of fp32.
    stay = part.width - removed(part.width, method.keep)
    gone = part.width - min(part.width, math.ceil(stay / 4) * 4)
    # DeepSeek's config knows the shared width as a multiple of the experts' only.
    tied = block.experts is not None and part.shared is not None and part.shared.width_key == "n_shared_experts"
    gone_shared = gone * (shared // part.width) if tied else removed(shared, method.keep)
    return part.count * (part.width - gone) + shared - gone_shared


def _sublayers(method: Any, blocks: Sequence[Block]) -> dict[int, dict[str, str]]:
    """Return the path of each sub-layer that may go, by layer and kind."""
    found: dict[int, dict[str, str]] = {}
    for block in blocks:
        dense = block.mlp or block.experts
        parts = {"attention": block.attention.path if block.attention else None, "mlp": dense.path if dense else None}
        found[block.index] = {
            kind: f"{block.path}.{path}."
            for kind, path in parts.items()
            if path and method.part in (kind, "joint", "each")
        }
    return found


def _state(blocks: Sequence[Block]) -> Mapping[str, Tensor]:
    """Return the weights of the untouched model that these blocks are the anatomy of."""
    family = next(f for f in (*FAMILIES["experts"], *families.DECODERS) if anatomy(f).language.blocks is blocks)
    state: Mapping[str, Tensor] = _built(family).state_dict()
    return state


def _weights(method: Any, blocks: Sequence[Block], state: Mapping[str, Tensor]) -> dict[str, tuple[int, ...]]:
    """Return the shape of every matrix whose weights may be zeroed: all of two or more dimensions but gates."""
    found = {}
    for block in blocks:
        dense = block.mlp or block.experts
        assert dense is not None
        inside = f"{block.path}." if method.where == "all" else f"{block.path}.{dense.path}."
        gates = {block.experts.router, block.experts.shared_gate} if block.experts is not None else set()
        for name, tensor in state.items():
            owner = name.removeprefix(f"{block.path}.").rpartition(".")[0]
            if name.startswith(inside) and tensor.dim() > 1 and owner not in gates:
                found[name] = tuple(tensor.shape)
    return found


def _widths(method: Any, block: Block) -> list[tuple[int, int]]:
    """Return widths and how many neurons get each: a tenth the widest, then as many of the middle one as fit."""
    part = block.experts
    assert part is not None
    n = part.count * part.width + (part.shared.width if part.shared is not None else 0)
    total = math.floor(n * 16 * Fraction(str(method.keep)))
    if method.name == "uniform-bits":
        return [(total // n + 1, total % n), (total // n, n - total % n)]
    wide, middle, narrow = method.bits
    first = math.floor(n * Fraction(str(method.top)))
    second = (total - first * wide - (n - first) * narrow) // (middle - narrow)
    return [(wide, first), (middle, second), (narrow, n - first - second)]


def _levels(blocks: Sequence[Block], state: Mapping[str, Tensor]) -> dict[str, list[int]]:
    """Return how many different numbers stand in each neuron's row of up, by layer."""
    found = {}
    for block in blocks:
        if block.experts is not None:
            part = block.experts
            up = state[f"{block.path}.{part.experts}.gate_up_proj"][:, part.width :].flatten(0, 1)
            if part.shared is not None:
                up = torch.cat([state[f"{block.path}.{part.shared.up}.weight"], up])
            found[str(block.index)] = [len(row.unique()) for row in up]
    return found


def in_edits(method: Compressor, blocks: Sequence[Block], edits: Sequence[Any]) -> dict[str, int]:
    """Count the units that stay, by what the edits say."""
    if method.unit == "levels":
        return {"all": sum(in_edits(method.inner(), blocks, edits).values())}
    if method.unit == "experts":
        counts = {str(b.index): b.experts.count for b in blocks if b.experts}
        counts |= {str(e.layer): len(set(e.keep)) for e in edits}
        return {"all": sum(counts.values())} if "all" in expected(method, blocks) else counts
    if method.unit == "weights":
        return {"all": sum(e.after for e in edits)}
    if method.unit == "expert bits":
        return {str(e.layer): e.after for e in edits}
    if method.unit == "expert neurons":
        counts = {}
        for block in blocks:
            if block.experts is not None:
                shared = block.experts.shared.width if block.experts.shared is not None else 0
                counts[str(block.index)] = block.experts.count * block.experts.width + shared
                for e in edits:
                    if e.layer == block.index:
                        beside = shared if e.shared is None else len(set(e.shared))
                        counts[str(block.index)] = sum(len(set(kept)) for kept in e.keep) + beside
        return counts
    before = len(blocks) if method.unit == "blocks" else sum(map(len, _sublayers(method, blocks).values()))
    return {"all": before - len({(e.layer, getattr(e, "part", "")) for e in edits})}


def in_weights(method: Compressor, blocks: Sequence[Block], state: Mapping[str, Tensor]) -> dict[str, int]:
    """Count the units that stay, by the weights' names and shapes; ``blocks`` are those before."""
    stack = blocks[0].path.rpartition(".")[0]
    if method.unit == "blocks":
        return {"all": len({name.removeprefix(f"{stack}.").split(".")[0] for name in state if name.startswith(stack)})}
    if method.unit == "levels":
        return {"all": sum(in_weights(method.inner(), blocks, state).values())}
    if method.unit in _SUBLAYERS:
        paths = [path for kinds in _sublayers(method, blocks).values() for path in kinds.values()]
        return {"all": sum(any(name.startswith(path) for name in state) for path in paths)}
    if method.unit == "weights":
        return {"all": sum(int((state[name] != 0).sum()) for name in _weights(method, blocks, state))}
    if method.unit == "expert bits":
        # Numbers of so few columns do not tell eight bits from more; narrower ones show.
        for block, levels in zip([b for b in blocks if b.experts], _levels(blocks, state).values(), strict=True):
            for width, _ in _widths(method, block):
                wanted = sum(many for other, many in _widths(method, block) if other <= width)
                assert sum(level <= 2**width for level in levels) >= wanted
        return expected(method, blocks)
    counts = {}
    for block in blocks:
        part = block.experts
        if part is None:
            continue
        experts = f"{block.path}.{part.experts}."
        router = state[f"{block.path}.{part.router}.weight"]
        if method.unit == "experts":
            count = len(router)
            assert state[experts + "gate_up_proj"].shape[0] == count
            assert state[experts + "down_proj"].shape[0] == count
            counts[str(block.index)] = count
            continue
        if experts + "down_flat" in state:
            counts[str(block.index)] = len(state[experts + "down_flat"])
            assert len(state[experts + "gate_up_flat"]) == 2 * counts[str(block.index)]
        else:
            gate_up, down = state[experts + "gate_up_proj"], state[experts + "down_proj"]
            assert gate_up.shape[:2] == (down.shape[0], 2 * down.shape[2])
            counts[str(block.index)] = down.shape[0] * down.shape[2]
        if part.shared is not None:
            counts[str(block.index)] += state[f"{block.path}.{part.shared.down}.weight"].shape[1]
    if "all" in expected(method, blocks):
        return {"all": sum(counts.values())}
    return counts
