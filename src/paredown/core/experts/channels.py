"""Experts cut out of dense MLPs: which channels each has, MLPs of those channels alone, tokens grouped by expert.

- An expert is a list of hidden channels of a dense MLP. The same expert index is used in every layer, so tokens are
  sorted by expert once for a pass and not once for a layer.
- A thin MLP is a shallow copy of the model's own with fewer rows and columns: it runs the family's own forward, with
  its activation, and shares nothing that is changed.
- An MLP is a sum over channels, so *fused* experts (all channels of each) and *separate* ones (channels that all
  experts have, once; and what each has besides) give the same numbers.
"""

from __future__ import annotations

import contextlib
import copy
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn

from paredown.core import budget
from paredown.core.anatomy import Block
from paredown.core.companion import Companion
from paredown.core.runtime import Feed, Pass, Runtime
from paredown.errors import ArchitectureError, PolicyError

if TYPE_CHECKING:
    from paredown.core.checkpoint import Model
    from paredown.core.method import Policy

ROWS_AT_ONCE = 2048
"""Tokens of a pass that only looks at activations."""


def dense_blocks(model: Model) -> dict[int, Block]:
    """Return the blocks of the language model whose MLP is dense and can be cut, by index.

    Raises
    ------
    ArchitectureError
        If there is none, or an MLP does more than a sum over its channels.
    """
    found = {}
    for part in model.anatomy.language.blocks:
        if part.mlp is None or not part.mlp.path:
            continue
        _check(model, part)
        found[part.index] = part
    if not found:
        raise ArchitectureError(
            f"{type(model.hf).__name__} has no dense MLP that is a module of its own, so no channels can be chosen; "
            "take a method for experts or whole sub-layers."
        )
    return found


def _check(model: Model, part: Block) -> None:
    assert part.mlp is not None
    block = model.hf.get_submodule(part.path)
    linears = [block.get_submodule(path) for path in (part.mlp.gate, part.mlp.up, part.mlp.down) if path is not None]
    known = {id(tensor) for linear in linears for tensor in linear.parameters()}
    others = [p for p in block.get_submodule(part.mlp.path).parameters() if id(p) not in known]
    plain = all(isinstance(linear, nn.Linear) and linear.weight.is_floating_point() for linear in linears)
    if not plain or any(part.mlp.width in p.shape for p in others):
        raise ArchitectureError(
            f"the MLP of layer {part.index} of {type(model.hf).__name__} is more than three plain projections, so its "
            "channels cannot be computed alone; merge adapters and unpack quantised weights first."
        )


# Which channels.


def widths(model: Model, keep: float) -> dict[int, tuple[int, int]]:
    """Return each layer's channels and how many of them a token uses: the share ``keep`` rounded down, at least one."""
    blocks = {index: part.mlp for index, part in dense_blocks(model).items()}
    return {
        index: (mlp.width, budget.floored(mlp.width, keep, least=1)) for index, mlp in blocks.items() if mlp is not None
    }


def strongest(means: Tensor, count: int) -> Tensor:
    """Return masks ``[D, width]``, each with its ``count`` largest of ``means`` ``[D, width]``; ties: lower index."""
    masks = torch.zeros(means.shape, dtype=torch.bool)
    for mask, row in zip(masks, means, strict=True):
        mask[list(budget.top(row, count))] = True
    return masks


def divided(masks: Tensor) -> tuple[Tensor, Tensor]:
    """Return the channels ``[width]`` that all of ``masks`` ``[D, width]`` have, and the others of each ``[D, width]``.

    Each mask is the union of both, and both are disjoint.
    """
    residual = masks.all(dim=0)
    return residual, masks & ~residual


@contextlib.contextmanager
def reading(model: Model, look: Callable[[int, Tensor], None]) -> Iterator[None]:
    """While open, hand ``look`` the index of each dense block and what its down projection reads, ``[B, T, width]``."""

    def hook(layer: int) -> Any:
        return lambda _, args: look(layer, args[0])

    handles = []
    try:
        for index, part in dense_blocks(model).items():
            assert part.mlp is not None
            down = model.hf.get_submodule(f"{part.path}.{part.mlp.down}")
            handles.append(down.register_forward_pre_hook(hook(index)))
        yield
    finally:
        for handle in handles:
            handle.remove()


@torch.no_grad()
def read(model: Model, ids: Tensor, mask: Tensor | None, look: Callable[[slice, int, Tensor], None]) -> None:
    """Read rows ``ids`` ``[N, T]`` and hand ``look`` which rows, the layer, and what its down projection reads."""
    decoder: Any = model.hf.get_submodule(model.anatomy.language.decoder)
    size = max(1, ROWS_AT_ONCE // ids.shape[1])
    for start in range(0, len(ids), size):
        rows = slice(start, min(start + size, len(ids)))
        some = None if mask is None else mask[rows].to(model.hf.device)
        with reading(model, lambda layer, inner, rows=rows: look(rows, layer, inner)):  # type: ignore[misc]
            decoder(input_ids=ids[rows].to(model.hf.device), attention_mask=some, use_cache=False)


def domain_means(model: Model, ids: Tensor, mask: Tensor | None, domains: Tensor, count: int) -> dict[int, Tensor]:
    """Return the mean absolute input of each down projection over the tokens of each domain, ``[count, width]``.

    Parameters
    ----------
    ids : ``[N, T]``
    mask : ``[N, T]``, nonzero for real tokens; None if all are
    domains : ``[N]``, the domain of each row, 0..count-1
    """
    sums: dict[int, Tensor] = {}
    real = torch.ones(ids.shape) if mask is None else mask.float().cpu()

    def look(rows: slice, layer: int, inner: Tensor) -> None:
        weights = real[rows].to(inner.device)
        told = torch.einsum("btc,bt->bc", inner.detach().abs().float(), weights).double().cpu()
        total = sums.setdefault(layer, torch.zeros(count, told.shape[1], dtype=torch.float64))
        total.index_add_(0, domains[rows], told)

    read(model, ids, mask, look)
    tokens = torch.zeros(count, dtype=torch.float64).index_add_(0, domains, real.double().sum(1))
    return {layer: total / tokens[:, None].clamp_min(1) for layer, total in sums.items()}


# Thin MLPs.


def thin(block: nn.Module, part: Block, channels: Tensor, *, bias: bool = True) -> nn.Module:
    """Return an MLP of the ``channels`` ``[n]`` alone; the model's own is not touched.

    Parameters
    ----------
    block : the module that ``part`` describes
    bias : False leaves out what the down projection adds whatever its input is
    """
    mlp = part.mlp
    assert mlp is not None
    out = _copied(block.get_submodule(mlp.path))
    for path in (mlp.gate, mlp.up, mlp.down):
        if path is None:
            continue
        *owners, name = path.removeprefix(f"{mlp.path}.").split(".")
        owner = out
        for step in owners:
            owner._modules[step] = _copied(owner.get_submodule(step))
            owner = owner.get_submodule(step)
        owner._modules[name] = _cut(owner.get_submodule(name), channels, path == mlp.down, bias)
    return out


def _copied(module: nn.Module) -> nn.Module:
    """Return a copy that shares tensors and neither children's list nor hooks."""
    out = copy.copy(module)
    out._modules, out._parameters = dict(module._modules), dict(module._parameters)
    for name in list(vars(out)):
        if name.endswith("_hooks") or "_hooks_" in name:
            vars(out)[name] = OrderedDict()
    vars(out).pop("forward", None)
    return out


def _cut(linear: nn.Module, channels: Tensor, down: bool, bias: bool) -> nn.Linear:
    weight: Any = linear.weight
    added: Any = linear.bias
    at = channels.to(weight.device)
    held = weight.detach().index_select(1 if down else 0, at).contiguous()
    if added is not None:
        added = (added.detach() if bias else None) if down else added.detach().index_select(0, at)
    out = nn.Linear(held.shape[1], held.shape[0], bias=added is not None, device="meta")
    out.weight = nn.Parameter(held, requires_grad=False)
    if added is not None:
        out.bias = nn.Parameter(added, requires_grad=False)
    return out


class Groups:
    """Tokens sorted by expert.

    Parameters
    ----------
    experts : ``[n]``, the expert of each token

    Attributes
    ----------
    parts : experts that some token has, with their numbers of tokens, in the order of ``order``
    order : ``[n]``, tokens by expert, each expert's in their own order; None if all have the same
    """

    def __init__(self, experts: Tensor, count: int) -> None:
        sizes = torch.bincount(experts, minlength=count).tolist()
        self.parts = [(expert, size) for expert, size in enumerate(sizes) if size]
        self.order: Tensor | None = None
        self._back: Tensor | None = None
        if len(self.parts) > 1:
            self.order = experts.argsort(stable=True)
            self._back = self.order.argsort()

    def run(self, hidden: Tensor, experts: list[nn.Module]) -> Tensor:
        """Return each token ``[n, D]`` behind its expert."""
        if self.order is None or self._back is None:
            alone: Tensor = experts[self.parts[0][0]](hidden)
            return alone
        pieces = torch.split(hidden.index_select(0, self.order), [size for _, size in self.parts])
        outs = [experts[expert](piece) for (expert, _), piece in zip(self.parts, pieces, strict=True)]
        return torch.cat(outs).index_select(0, self._back)


class Bank:
    """The experts of one layer.

    Parameters
    ----------
    masks : ``[D, width]``, the channels of each expert
    separate : compute channels that all experts have once for all tokens, instead of within each expert: less memory,
        more products
    """

    def __init__(self, block: nn.Module, part: Block, masks: Tensor, *, separate: bool = False) -> None:
        residual, own = divided(masks)
        self.residual: nn.Module | None = None
        if separate and bool(residual.any()):
            self.residual = thin(block, part, residual.nonzero()[:, 0])
            # Masks are of one size, so all experts have channels of their own or none has.
            own = own if bool(own.any()) else own[:0]
            self.experts = [thin(block, part, mask.nonzero()[:, 0], bias=False) for mask in own]
        else:
            self.experts = [thin(block, part, mask.nonzero()[:, 0]) for mask in masks]

    def __call__(self, hidden: Tensor, groups: Groups) -> Tensor:
        """Return the experts' outputs, ``[n, D]``, for tokens ``hidden`` ``[n, D]``."""
        shared: Tensor | None = None if self.residual is None else self.residual(hidden)
        if not self.experts:
            assert shared is not None
            return shared
        out = groups.run(hidden, self.experts)
        return out if shared is None else out + shared

    @property
    def nbytes(self) -> int:
        """Bytes of the experts' weights."""
        modules = [*self.experts, *([self.residual] if self.residual is not None else [])]
        return sum(p.numel() * p.element_size() for module in modules for p in module.parameters())


# At work.


class Chosen(Companion):
    """The expert of each token of a sequence."""

    told: ClassVar[tuple[str, ...]] = ("experts",)

    def __init__(self) -> None:
        self.experts: Tensor | None = None
        """``[B, n]``"""

    def add(self, experts: Tensor) -> None:
        """Remember the experts of new tokens, ``[B, n]``."""
        self.experts = experts if self.experts is None else torch.cat([self.experts, experts], dim=1)


class _Live:
    """A model's own MLP in which each token has the channels of its expert and zeros elsewhere."""

    def __init__(self, hf: nn.Module, part: Block, masks: Tensor) -> None:
        assert part.mlp is not None
        self.down = hf.get_submodule(f"{part.path}.{part.mlp.down}")
        self.masks = masks.to(next(self.down.parameters()).device)

    def __call__(self, call: Feed, experts: Tensor) -> Tensor:
        """Return what the MLP gives, ``[B, n, D]``, for tokens of ``experts`` ``[B, n]``."""
        mask = self.masks[experts]
        # Some families flatten rows on the way.
        hook = self.down.register_forward_pre_hook(lambda _, args: (args[0] * mask.reshape(args[0].shape),))
        try:
            out = call.own(call.hidden)
        finally:
            hook.remove()
        assert isinstance(out, Tensor)
        return out


class ChannelExperts(Runtime):
    """Runs each token through the channels of one expert, the same in every layer.

    A subclass writes :meth:`choose`. Tokens that come back in a later pass keep their expert.

    Parameters
    ----------
    masks : ``[D, width]`` for each dense layer
    separate : see `Bank`
    live : run the model's own MLPs with the other channels at zero, so that its weights can be trained; saves nothing
    """

    def __init__(
        self,
        policy: Policy,
        model: Model,
        masks: Mapping[int, Tensor],
        *,
        separate: bool = False,
        live: bool = False,
    ) -> None:
        super().__init__(policy, model)
        blocks = dense_blocks(model)
        wanted = {index: part.mlp.width for index, part in blocks.items() if part.mlp is not None}
        if {index: mask.shape[1] for index, mask in masks.items()} != wanted:
            raise PolicyError(
                f"the channels of {policy.name} were chosen for another model than this {type(model.hf).__name__}; "
                "prepare it with this one."
            )
        self.count = len(next(iter(masks.values())))
        self.banks: dict[int, Bank] = {}
        self.live: dict[int, _Live] = {}
        if live:
            self.live = {index: _Live(model.hf, part, masks[index]) for index, part in blocks.items()}
            return
        with torch.no_grad():
            self.banks = {
                index: Bank(model.hf.get_submodule(part.path), part, masks[index], separate=separate)
                for index, part in blocks.items()
            }

    def choose(self, ids: Tensor, now: Pass, held: Chosen) -> Tensor:
        """Return the expert of each new token, ``[B, n]``, from token ids alone."""
        raise NotImplementedError

    def touches(self, layer: int, window: int | None) -> bool:
        """Whether keys and values are kept otherwise: never."""
        return False

    def companion(self) -> Chosen:
        return Chosen()

    def begin(self, now: Pass) -> None:
        if now.ids is None:
            raise PolicyError(f"{self.policy.name} chooses by token ids, and the model was given embeddings; pass ids.")
        held = now.companions[self]
        assert isinstance(held, Chosen)
        with torch.no_grad():
            held.add(self.choose(now.ids, now, held))

    def feed(self, call: Feed) -> Tensor | None:
        if call.layer in self.live:
            return self.live[call.layer](call, self._experts(call))
        bank = self.banks.get(call.layer)
        if bank is None:
            return None
        out = bank(call.hidden.flatten(0, -2), self._groups(call))
        return out.view(call.hidden.shape)

    def _groups(self, call: Feed) -> Groups:
        """Return the rows by expert: once for as long as the rows are the same."""
        memo = call.now.memo
        if "channel groups" not in memo or memo["channel groups"][0] is not call.rows:
            memo["channel groups"] = call.rows, Groups(self._experts(call).flatten(), self.count)
        groups: Groups = memo["channel groups"][1]
        return groups

    def _experts(self, call: Feed) -> Tensor:
        """Return the expert of each row, ``[B, n]``."""
        held = call.now.companions[self]
        assert isinstance(held, Chosen)
        assert held.experts is not None
        if call.rows is None:
            return held.experts[:, call.now.past :]
        return held.experts.gather(1, call.rows.clamp_min(0))
