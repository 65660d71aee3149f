"""The plan: what a recipe will do, from meta tensors alone. No weights are read.

Shapes, bytes and parameters after each step are exact wherever the method's budget fixes them; where they depend on
what the data say (one list over unlike units), the plan gives the larger size and says between which bounds it lies.
Peak memory and time come from a rehearsal on random weights (``estimate``).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from paredown.core import checkpoint, configs, policy_file, surgery
from paredown.core.anatomy import Anatomy, Block
from paredown.core.attach import check_together
from paredown.core.checkpoint import Model, Skeleton
from paredown.core.configs import check_unshared
from paredown.core.edits import DropBlock, Edit
from paredown.core.effects import edited
from paredown.core.method import Compressor, Policy, Progress, WholeModelCompressor
from paredown.errors import ArchitectureError, NothingTouchedError, RecipeError
from paredown.workflow import estimate
from paredown.workflow.recipe import Recipe
from paredown.workflow.record import Planned

_TRIALS = 4


def plan(recipe: Recipe, *, rehearse: bool = True, progress: Progress | None = None) -> list[Planned]:
    """Foretell every step of a recipe.

    Parameters
    ----------
    recipe : what to do
    rehearse : also estimate peak memory and time, by running one block of random weights
    progress : called as ``progress(done, total, text)``

    Raises
    ------
    BudgetError, ArchitectureError, RecipeError, CheckpointError
        Whatever would stop the run later.
    """
    methods, policies = divided(recipe)
    if rehearse:
        plan(recipe, rehearse=False)  # whatever is wrong shall be told before any progress is
    skeleton = checkpoint.skeleton(recipe.model)
    planned: list[Planned] = []
    brought = policy_file.read(skeleton.folder)
    steps: list[Compressor | Policy] = [*methods, *policies]
    for method in steps:
        if progress is not None:
            progress(len(planned), len(methods) + len(policies), f"plan: {method.name}")
        if isinstance(method, Compressor):
            planned.append(plan_step(skeleton, method, recipe, rehearse=rehearse))
        else:
            planned.append(plan_policy(skeleton.model, method, copies=not methods and not planned))
        if brought and len(planned) == 1:
            names = ", ".join(policy.name for policy in brought)
            planned[0].notes.append(f"The policies that the model brings ({names}) are left out; name them as steps.")
        if progress is not None:
            progress(len(planned), len(methods) + len(policies), f"plan: {method.name}")
    return planned


def divided(recipe: Recipe) -> tuple[list[Compressor], list[Policy]]:
    """Return the recipe's compressors, and the policies that it ends in.

    Raises
    ------
    RecipeError
        If a step is neither, or acts on weights behind a policy.
    PolicyError
        If two policies act on the same place.
    """
    found: list[Compressor] = []
    policies: list[Policy] = []
    for method in recipe.methods():
        if isinstance(method, Policy):
            policies.append(method)
        elif not isinstance(method, Compressor):
            raise RecipeError(
                f"{method.name} is a {method.kind}; a run takes methods that make the weights smaller, and policies "
                "behind them."
            )
        elif policies:
            raise RecipeError(
                f"{method.name} changes weights and {policies[-1].name} acts while the model runs; put policies last."
            )
        else:
            found.append(method)
    if len({policy.name for policy in policies}) < len(policies):
        raise RecipeError("a policy stands in the recipe twice; name each once.")
    check_together(policies)
    return found, policies


def plan_policy(model: Model, policy: Policy, *, copies: bool) -> Planned:
    """Foretell a step that changes no weight."""
    if not policy.inert and not policy.needs:
        policy.runtime(model)  # says in one sentence what the model lacks
    held = tensors(model)
    notes = [
        f"{policy.name} acts on {policy.unit} while the model runs: it saves no byte on disk, policy.yaml carries it, "
        "paredown.load attaches it, and plain transformers opens the weights without it."
    ]
    if copies:
        notes.append("No step before it changes weights: the checkpoint is copied as it is.")
    if policy.needs:
        notes.append("What it learns or measures beforehand takes the whole model in memory, and time on top of this.")
    if policy.axis == "vision":
        notes.append("The gate reads text alone: what it does to images is not judged.")
    return Planned(
        method=policy.name,
        keep=policy.keep,
        parameters_before=_count(held),
        parameters_after=_count(held),
        bytes_before=_bytes(held),
        bytes_after=_bytes(held),
        exact=True,
        peak_memory_bytes=0,
        seconds=0.0,
        uniform=surgery.is_uniform(model.config),
        loads_in="paredown.load",
        notes=notes,
        shapes={},
    )


def plan_step(skeleton: Skeleton, method: Compressor, recipe: Recipe, *, rehearse: bool) -> Planned:
    """Foretell one step and carry it out on the skeleton, so that the next step can be planned behind it."""
    model = skeleton.model
    sized = _sizes(method, model)
    forecast = estimate.Forecast(0, 0.0, [])
    if rehearse and not (isinstance(method, WholeModelCompressor) and method.inert):
        forecast = estimate.rehearse(skeleton, method, recipe, sized.edits)
    before = tensors(model)
    model.anatomy = surgery.apply_model(model.hf, model.anatomy, sized.edits)
    after = tensors(model)
    notes = [*sized.notes, *forecast.notes]
    if skeleton.unknown:
        notes.append(f"{len(skeleton.unknown)} tensors are not part of the architecture and will be left out.")
    return Planned(
        method=method.name,
        keep=method.keep,
        parameters_before=_count(before),
        parameters_after=_count(after),
        bytes_before=_bytes(before),
        bytes_after=_bytes(after),
        exact=sized.exact,
        peak_memory_bytes=forecast.peak_memory_bytes,
        seconds=forecast.seconds,
        uniform=surgery.is_uniform(model.config),
        loads_in=surgery.loads_in(model.config),
        notes=notes,
        shapes={
            name: (list(t.shape), list(after[name].shape) if name in after else [])
            for name, t in before.items()
            if name not in after or after[name].shape != t.shape
        },
    )


def tensors(model: Model) -> dict[str, Tensor]:
    """Return what a checkpoint of the model holds: parameters and stored buffers, tied ones once."""
    tied = set(getattr(model.hf, "all_tied_weights_keys", None) or ())
    return {name: t for name, t in model.hf.state_dict().items() if name not in tied}


@dataclass(frozen=True)
class _Sized:
    edits: list[Edit]
    exact: bool
    notes: list[str]


def _sizes(method: Compressor, model: Model) -> _Sized:
    """Decide on placeholder scores, in several orders, and see whether the number of parameters depends on them."""
    blocks = [b for b in model.anatomy.language.blocks if method.applies(b)]
    if not blocks:
        raise ArchitectureError(
            f"{method.name} removes {method.unit}, and {model.source} has none; `paredown scan` shows what it has."
        )
    if isinstance(method, WholeModelCompressor):
        edits = [] if method.inert else method.foretell(model.anatomy.language.blocks)
        return _Sized(edits, *_certainty(edits, model, method.sizes_vary))
    check_unshared(blocks, method.name)
    sizes = _block_sizes(model)
    trials = []
    for trial in range(_TRIALS):
        scores = _placeholders(method, blocks, trial)
        if method.scope == "global":
            edits = method.decide(blocks, scores)
        else:
            edits = [e for b in blocks for e in method.decide([b], {b.index: scores[b.index]})]
        trials.append((_removed(edits, model.anatomy.language.blocks, sizes), edits))
    if not any(edits for _, edits in trials) and method.keep < 1:
        raise NothingTouchedError(
            f"{method.name} with keep {method.keep:g} removes nothing from {model.source}: its layers have too few "
            f"{method.unit} for so small a cut; choose a smaller keep."
        )
    smallest = min(trials, key=lambda t: t[0])
    largest = max(trials, key=lambda t: t[0])
    if smallest[0] == largest[0]:
        # How much goes is certain, where it goes is not: shapes are shown for one of the possible choices.
        edits = trials[0][1]
        return _Sized(edits, True, _open_choice(edits) if method.scope == "global" else [])
    return _Sized(
        smallest[1],
        False,
        [f"what goes depends on the data: at least {smallest[0]:,} parameters, {largest[0]:,} in another order."],
    )


def _open_choice(edits: Sequence[Edit]) -> list[str]:
    """Say what the data will still decide when sizes are certain."""
    if all(edit.op == "change_weights" for edit in edits):
        return []
    if all(edit.op == "keep_experts" for edit in edits):
        return ["how many experts a layer keeps depends on the data; those shown stand for others of the same sum."]
    return ["which layers go depends on the data; those shown stand for as many others."]


def _certainty(edits: Sequence[Edit], model: Model, vary: bool) -> tuple[bool, list[str]]:
    """Tell whether edits lead to the same size whichever layers they fall on."""
    alike = not vary and len({tuple(sorted(sizes.items())) for sizes in _block_sizes(model).values()}) == 1
    if all(edit.op == "change_weights" for edit in edits):
        return True, []
    if alike:
        return True, ["which layers change depends on the data; those shown stand for as many others."]
    return False, ["what changes depends on the data, and not all of it is of one size: sizes are those of one choice."]


def _placeholders(method: Compressor, blocks: Sequence[Block], trial: int) -> Mapping[int, dict[str, Tensor]]:
    found: dict[int, dict[str, Tensor]] = {}
    for block in blocks:
        generator = torch.Generator().manual_seed(trial * 10_007 + block.index)
        found[block.index] = {
            name: value + torch.rand(value.shape, generator=generator) * (trial > 0)
            for name, value in method.placeholder(block).items()
        }
    return found


def _block_sizes(model: Model) -> dict[int, dict[str, int]]:
    """Return the number of parameters of each block, whole and by sub-layer with its norms."""
    found = {}
    for block in model.anatomy.language.blocks:
        module = model.hf.get_submodule(block.path)
        parts: dict[str, int] = {"block": sum(p.numel() for p in module.parameters())}
        for name, part in (("attention", block.attention), ("mlp", block.mlp or block.experts)):
            if part is not None:
                paths = [part.path, *part.norms]
                parts[name] = sum(p.numel() for path in paths for p in module.get_submodule(path).parameters())
        found[block.index] = parts
    return found


def _removed(edits: Sequence[Edit], blocks: Sequence[Block], sizes: dict[int, dict[str, int]]) -> int:
    """Count the parameters that edits remove, by arithmetic on the anatomy; only equality between trials matters."""
    total = 0
    for edit in edits:
        if isinstance(edit, DropBlock):
            total += sizes[edit.layer]["block"]
        elif edit.op == "drop_sublayer":
            total += sizes[edit.layer][edit.part]
        elif edit.op == "share_block":
            total += sizes[edit.layer]["block"] * (edit.source != edit.layer)
        else:
            before, after = blocks[edit.layer], edited(blocks[edit.layer], [edit])
            total += _units(before) - _units(after)
    return total


def _units(block: Block) -> int:
    experts = block.experts
    if experts is None:
        return (block.mlp.width if block.mlp is not None else 0) + (block.attention.heads if block.attention else 0)
    routed = sum(experts.widths) if experts.widths is not None else experts.count * experts.width
    return routed + (experts.shared.width if experts.shared is not None else 0)


def _count(found: Mapping[str, Tensor]) -> int:
    return sum(t.numel() for t in found.values())


def _bytes(found: Mapping[str, Tensor]) -> int:
    return sum(t.numel() * t.element_size() for t in found.values())


def changes(method: Compressor, edits: Sequence[Edit], anatomy: Anatomy) -> list[dict[str, Any]]:
    """Describe what became of each layer that the method looked at, untouched ones included."""
    touched = {edit.layer for edit in edits} | configs.removed_blocks(edits)
    described = [{"layer": e.layer, **_describe(e, anatomy.language.blocks[e.layer])} for e in edits]
    for block in anatomy.language.blocks:
        if method.applies(block) and block.index not in touched:
            whole = block.experts.count if method.unit == "experts" and block.experts is not None else 1
            described.append(
                {
                    "layer": block.index,
                    "unit": _unit(method, described),
                    "before": whole,
                    "after": whole,
                    "kept": None,
                    "detail": {},
                }
            )
    return sorted(described, key=lambda c: c["layer"])


def _unit(method: Compressor, described: Sequence[Mapping[str, Any]]) -> str:
    units = {c["unit"] for c in described}
    return units.pop() if len(units) == 1 else method.unit


def _describe(edit: Edit, block: Block) -> dict[str, Any]:
    if edit.op == "keep_experts":
        assert block.experts is not None
        told: dict[str, Any] = {"top_k": edit.top_k}
        if edit.clusters is not None:
            told["clusters"] = [list(members) for members in edit.clusters if len(members) > 1]
        return {"unit": "experts", "before": block.experts.count, "after": len(edit.keep), "kept": list(edit.keep),
                "detail": told}  # fmt: skip
    if edit.op == "keep_expert_neurons":
        assert block.experts is not None
        widths = [len(k) for k in edit.keep]
        shared = block.experts.shared
        before = sum(block.experts.widths or [block.experts.width] * block.experts.count)
        detail: dict[str, Any] = {"widths": widths}
        if shared is not None:
            detail["shared"] = [shared.width, len(edit.shared) if edit.shared is not None else shared.width]
        return {"unit": "expert neurons", "before": before, "after": sum(widths), "kept": None, "detail": detail}
    if edit.op == "keep_neurons":
        assert block.mlp is not None
        return {"unit": "neurons", "before": block.mlp.width, "after": len(edit.keep), "kept": list(edit.keep),
                "detail": {}}  # fmt: skip
    if edit.op == "keep_heads":
        assert block.attention is not None
        return {"unit": "key-value heads", "before": block.attention.kv_heads, "after": len(edit.keep),
                "kept": list(edit.keep), "detail": {}}  # fmt: skip
    if edit.op == "share_block":
        own = int(edit.source == edit.layer)
        detail = {"weights of layer": edit.source, "rank": edit.rank, "norms": "own" if edit.norms else "shared"}
        return {"unit": "blocks with weights of their own", "before": 1, "after": own, "kept": None, "detail": detail}
    if edit.op == "change_weights":
        # Shapes stay: the report must not count this among what was removed.
        return {"unit": edit.unit, "before": edit.before, "after": edit.after, "kept": None,
                "detail": {**edit.detail, "in_place": True}}  # fmt: skip
    if edit.op == "fuse_blocks":
        return {"unit": "sequential blocks", "before": edit.count, "after": 1, "kept": None,
                "detail": {"layers": [edit.layer, edit.layer + edit.count - 1]}}  # fmt: skip
    unit = "blocks" if edit.op == "drop_block" else f"{edit.part} sub-layers"
    return {"unit": unit, "before": 1, "after": 0, "kept": [], "detail": {}}
