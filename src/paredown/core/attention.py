"""Attention under a policy: one function and one mask function in transformers' registries, and what scores need.

- Attached, a model's attention layers look up a name of ours; the function behind it asks the attachment. Layers that
  no policy touches go straight on to the implementation that the model had (sdpa, eager, flash).
- Masks are made by that same implementation, in *logical* coordinates: a policy layer says how many tokens it has seen,
  and :func:`visible` picks the rows and columns of the tokens that are really there.
- Attention weights are recomputed from q and k for the few rows that a score needs; no model is switched to eager.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Protocol
from weakref import WeakKeyDictionary

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from paredown.errors import PolicyError

if TYPE_CHECKING:
    from paredown.core.runtime import Pass

PREFIX = "paredown-"
PACKED_QUERIES = 64
"""Up to this many queries, the heads of a group are packed into one product instead of repeating keys and values."""
LONG = 1024
"""From so many entries on, what a batched product would copy is taken head by head."""
ROWS_AT_ONCE = 256
"""Queries whose attention rows are held at once while columns are summed."""
_UNPACKABLE = ("softcap", "s_aux", "position_bias")


@dataclass
class Call:
    """One layer's attention in one pass.

    Attributes
    ----------
    module : the attention module
    layer : index of its block
    query : ``[B, H, Q, d]``, after RoPE
    key, value : ``[B, Hkv, Q, d]``, those of the new rows alone where a policy keeps the cache, else all
    mask : the model's own mask in logical coordinates (None, ``[B, 1, T, past + T]`` or ``[B, past + T]``)
    scaling : factor of the logits
    own : the model's own attention function
    options : what else the model hands to it
    now : the pass; None in a vision tower
    rows : ``[B, Q]`` logical positions of the rows, -1 where a row is a filler; None if they are ``past .. stop - 1``
    ordered : whether ``rows`` ascend and hold no fillers
    sizes : ``[B, Q]``, how many tokens were merged into each row; None if no row is a merger
    cached : the layer's :class:`~paredown.core.cache.PolicyLayer`, or None
    """

    module: nn.Module
    layer: int
    query: Tensor
    key: Tensor
    value: Tensor
    mask: Tensor | None
    scaling: float
    own: Callable[..., Any]
    options: dict[str, Any] = field(default_factory=dict)
    now: Pass | None = None
    rows: Tensor | None = None
    ordered: bool = True
    sizes: Tensor | None = None
    cached: Any = None

    @property
    def groups(self) -> int:
        """Query heads for each KV head."""
        return self.query.shape[1] // self.key.shape[1]

    @property
    def past(self) -> int:
        """Logical length of the cache before the pass."""
        return 0 if self.now is None else self.now.past

    @property
    def causal(self) -> bool:
        """Whether a row sees no later row."""
        told = self.options.get("is_causal")
        return bool(getattr(self.module, "is_causal", True) if told is None else told)

    def heads(self, index: Tensor) -> Call:
        """Return the same call for the KV heads ``index`` ``[n]`` and their queries."""
        at = queries_of(index, self.groups)
        return replace(self, query=self.query[:, at], key=self.key[:, index], value=self.value[:, index])

    def positions(self) -> Tensor:
        """Return the logical positions of the rows, ``[B, Q]``."""
        if self.rows is not None:
            return self.rows
        new = torch.arange(self.query.shape[2], device=self.query.device)
        return (new + self.past).expand(self.query.shape[0], -1)

    def real(self) -> Tensor:
        """Return which rows are tokens and neither fillers nor padding, ``[B, Q]``."""
        at = self.positions()
        return at >= 0 if self.now is None else self.now.real(at)

    def plain(self) -> Tensor:
        """Return what the model's own function makes of the call, ``[B, Q, H, d]``."""
        out: Tensor = self.own(
            self.module, self.query, self.key, self.value, self.mask, scaling=self.scaling, **self.options
        )[0]
        return out


def queries_of(heads: Tensor, groups: int) -> Tensor:
    """Return the query heads ``[n * groups]`` of the KV heads ``[n]``."""
    return (heads[:, None] * groups + torch.arange(groups, device=heads.device)).flatten()


@dataclass(frozen=True)
class Visible:
    """Which keys each query sees: a mask, or None with ``causal`` (as many keys as queries) or without (all)."""

    mask: Tensor | None
    causal: bool = False


def visible(call: Call, held: Tensor | None, count: int, sizes: Tensor | None = None) -> Visible:
    """Return which of ``count`` held entries the rows of ``call`` see.

    Parameters
    ----------
    call : the rows and the model's own mask
    held : logical positions of the entries, ``[B, K]`` or ``[B, Hkv, K]``, -1 where a slot is empty; None if entry
        ``k`` is token ``k``
    count : K
    sizes : ``[B, K]``, how many tokens were merged into each entry: it counts that often; None for once

    Returns
    -------
    The mask is ``[B, 1 or Hkv, Q, K]``: true where a key is seen, or what is added to the logits.
    """
    seen = _seen(call, held, count)
    if sizes is None:
        return seen
    bias = sizes.to(call.query.dtype).log()[:, None, None, :]
    mask = seen.mask
    if seen.causal:
        mask = torch.ones(count, count, dtype=torch.bool, device=bias.device).tril()[None, None]
    if mask is None:
        return Visible(bias)
    return Visible(torch.where(mask, bias, -torch.inf) if mask.dtype == torch.bool else mask + bias)


def _seen(call: Call, held: Tensor | None, count: int) -> Visible:
    mask, length = call.mask, call.query.shape[2]
    if held is None and call.rows is None and (mask is None or mask.dim() == 4):
        if mask is not None:
            return Visible(mask)
        if length == count or (length == 1 and not _narrow(call)):
            return Visible(None, causal=length > 1 and call.causal)
    in_order = call.ordered and (held is call.rows or not call.causal) and not _narrow(call)
    if mask is None and in_order and length == count:
        return Visible(None, causal=length > 1 and call.causal)
    if held is None:
        held = torch.arange(count, device=call.query.device)[None]
    rows = call.positions()
    columns = held if held.dim() == 3 else held[:, None]
    there = (columns >= 0)[:, :, None]
    if mask is None or mask.dim() == 2:
        seen = there & _before(call, columns, rows) if call.causal else there
        if mask is not None:
            seen = seen & _at(mask.bool(), columns)
        return Visible(seen)
    batch, heads = call.query.shape[0], columns.shape[1]
    own = (rows - call.past).clamp_min(0)[:, None, :, None]
    picked = mask.expand(batch, mask.shape[1], -1, -1)
    if picked.shape[2] > 1:  # some models make one row for all queries
        picked = picked.gather(2, own.expand(batch, mask.shape[1], -1, mask.shape[3]))
    wanted = columns.clamp_min(0).expand(batch, heads, -1)[:, :, None].expand(-1, -1, picked.shape[2], -1)
    picked = picked.expand(batch, heads, -1, -1).gather(3, wanted)
    if call.causal and call.rows is not None and not call.ordered:
        # Rows that came back stand before this pass, where the model made no row of its mask for them: a plain one.
        own_row = there & _before(call, columns, rows)
        if call.now is not None and call.now.padding is not None:
            own_row = own_row & _at(call.now.padding, columns)
        back = (rows < call.past)[:, None, :, None]
        picked = _hide(picked.masked_fill(back, picked.dtype == torch.bool), back & ~own_row)
    return Visible(_hide(picked, ~there))


def _window(call: Call) -> int | None:
    width = call.options.get("sliding_window")
    return width if isinstance(width, int) else None


def _narrow(call: Call) -> bool:
    """Whether a sliding window hides something although there is no mask: the flash functions make it themselves."""
    width = _window(call)
    return width is not None and call.now is not None and call.now.stop > width


def _before(call: Call, columns: Tensor, rows: Tensor) -> Tensor:
    """Return which columns ``[B, 1 or Hkv, K]`` rows ``[B, Q]`` may see: none behind them, none before their window."""
    seen = columns[:, :, None] <= rows[:, None, :, None]
    width = _window(call)
    return seen if width is None else seen & (columns[:, :, None] > rows[:, None, :, None] - width)


def _at(real: Tensor, columns: Tensor) -> Tensor:
    real = real[:, None].expand(-1, columns.shape[1], -1)
    return real.gather(2, columns.clamp_min(0).expand(real.shape[0], -1, -1))[:, :, None]


def _hide(mask: Tensor, hidden: Tensor) -> Tensor:
    if mask.dtype == torch.bool:
        return mask & ~hidden
    return mask.masked_fill(hidden, torch.finfo(mask.dtype).min)


def compute(call: Call, keys: Tensor, values: Tensor, seen: Visible) -> Tensor:
    """Return attention of the call's queries over ``keys`` and ``values`` (``[B, Hkv, K, d]``): ``[B, Q, H, d]``.

    A query that sees nothing (a filler row) gets zeros or garbage, never NaN.
    """
    batch, heads, length, _ = call.query.shape
    if special(call) or seen.causal or (length > PACKED_QUERIES and call.groups > 1):
        return _own(call, keys, values, seen)
    mask, group = seen.mask, call.groups
    query = call.query
    if group > 1:
        query = query.reshape(batch, keys.shape[1], group * length, -1)
        if mask is not None:
            if mask.shape[1] == heads and heads != keys.shape[1]:
                mask = mask.reshape(mask.shape[0], keys.shape[1], group * length, -1)
            elif length > 1:
                mask = mask.repeat(1, 1, group, 1)
    if mask is not None and mask.dtype != torch.bool:
        mask = mask.to(query.dtype)
    out = F.scaled_dot_product_attention(query, keys, values, attn_mask=mask, scale=call.scaling)
    return out.reshape(batch, heads, length, -1).transpose(1, 2)


def special(call: Call) -> bool:
    """Whether the model's attention does more than a softmax over scaled products (soft caps, sinks, biases)."""
    return any(call.options.get(name) is not None for name in _UNPACKABLE)


def _own(call: Call, keys: Tensor, values: Tensor, seen: Visible) -> Tensor:
    mask = seen.mask
    if mask is not None and mask.shape[1] not in (1, call.query.shape[1]):
        mask = mask.repeat_interleave(call.groups, dim=1)
    # The flash functions read no mask of ours; sdpa gives the same numbers.
    own = call.own if mask is None or mask is call.mask else _with_mask(call.own)
    out: Tensor = own(call.module, call.query, keys, values, mask, scaling=call.scaling, **call.options)[0]
    return out


def _with_mask(own: Callable[..., Any]) -> Callable[..., Any]:
    name = getattr(own, "__name__", "")
    sdpa: Callable[..., Any] = ALL_ATTENTION_FUNCTIONS["sdpa"]
    return sdpa if "flash" in name or "flex" in name else own


def probabilities(query: Tensor, keys: Tensor, scaling: float, mask: Tensor | None = None) -> Tensor:
    """Return attention probabilities for a few queries: products in the model's precision, softmax in fp32.

    Parameters
    ----------
    query : ``[B, H, r, d]``
    keys : ``[B, Hkv, K, d]``
    scaling : factor of the logits
    mask : ``[B, 1, Hkv or H, r, K]``-like: true (or 0) where a key is seen; None if all are

    Returns
    -------
    ``[B, H, r, K]``; a query that sees nothing has zeros.
    """
    batch, heads, length, width = query.shape
    kv = keys.shape[1]
    grouped = query.reshape(batch, kv, heads // kv * length, width)
    logits = (over_heads(grouped, keys.transpose(-1, -2)).float() * scaling).view(batch, heads, length, -1)
    if mask is None:
        return logits.softmax(-1)
    if mask.shape[1] not in (1, heads):
        mask = mask.repeat_interleave(heads // mask.shape[1], dim=1)
    hidden = ~mask if mask.dtype == torch.bool else mask <= torch.finfo(mask.dtype).min / 2
    logits = logits.masked_fill(hidden, -torch.inf) if mask.dtype == torch.bool else logits + mask.float()
    return logits.softmax(-1).masked_fill(hidden, 0.0)


def over_heads(left: Tensor, right: Tensor) -> Tensor:
    """Return ``left @ right`` for ``[B, H, n, k]`` and ``[B, H, k, m]``, without copying a cache that has spare room.

    Between the heads of a growing cache lies what is not filled yet; a batched product on a CPU copies all of it.
    """
    rows, columns = right.shape[2:]
    dense = right.stride(1) == rows * columns and right.stride(0) == right.shape[1] * rows * columns
    if dense or right.is_cuda or max(rows, columns) < LONG or right.requires_grad or left.requires_grad:
        return left @ right
    out = left.new_empty((*left.shape[:3], columns))
    for b in range(left.shape[0]):
        for h in range(left.shape[1]):
            torch.mm(left[b, h], right[b, h], out=out[b, h])
    return out


def column_sums(call: Call, keys: Tensor, held: Tensor | None) -> Tensor:
    """Return, for each query head, how much attention each key got from all rows together: ``[B, H, K]``, fp32.

    Rows that are padding or fillers count nothing. Rows are taken ``ROWS_AT_ONCE`` at a time.
    """
    batch, heads, length, _ = call.query.shape
    sums = call.query.new_zeros((batch, heads, keys.shape[2]), dtype=torch.float32)
    positions = call.positions()
    real = call.real()
    for start in range(0, length, ROWS_AT_ONCE):
        part = slice(start, min(length, start + ROWS_AT_ONCE))
        few = replace(call, query=call.query[:, :, part], rows=positions[:, part], ordered=False)
        seen = visible(few, held, keys.shape[2]).mask
        weights = probabilities(few.query, keys, call.scaling, seen)
        sums += (weights * real[:, None, part, None]).sum(2)
    return sums


class Attending(Protocol):
    """What the registered function asks."""

    def attention(self, seat: Seat, call: Call) -> Tensor:
        """Return attention of the call, ``[B, Q, H, d]``."""
        ...


@dataclass(frozen=True)
class Seat:
    """An attention module under a policy: who attends there, and what it did before."""

    owner: Attending
    tower: str
    layer: int
    own: Callable[..., Any]


_SEATS: WeakKeyDictionary[nn.Module, Seat] = WeakKeyDictionary()


def _function(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **options: Any
) -> tuple[Tensor, None]:
    """The function in transformers' attention registry; tensors are ``[B, H, T, d]``, the output ``[B, T, H, d]``."""
    seat = _SEATS[module]
    scaling = options.pop("scaling", None)
    call = Call(
        module=module,
        layer=seat.layer,
        query=query,
        key=key,
        value=value,
        mask=attention_mask,
        scaling=query.shape[-1] ** -0.5 if scaling is None else scaling,
        own=seat.own,
        options=options,
    )
    return seat.owner.attention(seat, call), None


def implementation(own: str) -> str:
    """Register our function and mask function next to the implementation ``own``; return their common name."""
    name = PREFIX + own
    if name not in ALL_ATTENTION_FUNCTIONS:
        if own not in ALL_MASK_ATTENTION_FUNCTIONS:
            raise PolicyError(
                f"the model attends by {own!r}, which has no mask function to go with; load it with "
                "attn_implementation='sdpa'."
            )
        AttentionInterface.register(name, _function)
        AttentionMaskInterface.register(name, ALL_MASK_ATTENTION_FUNCTIONS[own])
    return name


def attender(module: nn.Module) -> nn.Module:
    """Return the module inside an attention part that looks up the attention function: the one that holds a config."""
    return next((m for m in module.modules() if "config" in vars(m)), module)


@contextmanager
def seated(owner: Attending, tower: str, modules: dict[int, nn.Module]) -> Iterator[None]:
    """Let ``owner`` attend in ``modules`` (layer -> attention module) for as long as the context is open."""
    configs: dict[int, tuple[Any, str]] = {}
    try:
        for layer, module in modules.items():
            config: Any = module.config
            if id(config) not in configs:
                before = config._attn_implementation_internal or "eager"
                name = implementation(before)
                configs[id(config)] = (config, config._attn_implementation_internal)
                config._attn_implementation_internal = name
            own = (configs[id(config)][1]) or "eager"
            _SEATS[module] = Seat(owner, tower, layer, _function_of(module, own))
        yield
    finally:
        for config, before in configs.values():
            config._attn_implementation_internal = before
        for module in modules.values():
            _SEATS.pop(module, None)


def _function_of(module: nn.Module, own: str) -> Callable[..., Any]:
    """Return what ``module`` attends by; eager attention is a function in the file of each family."""
    home = sys.modules[type(module).__module__]
    default = getattr(home, "eager_attention_forward", None)
    found: Callable[..., Any] = ALL_ATTENTION_FUNCTIONS.get_interface(own, default)
    return found


class _Captured(Exception):  # noqa: N818 (it is no error)
    """Carries queries and keys out of an attention module, so that nothing after them is computed."""


class _Capture:
    def attention(self, seat: Seat, call: Call) -> Tensor:
        raise _Captured(call)


def captured(attention: nn.Module, run: Callable[[], Any]) -> Call:
    """Return the call that ``attention`` (see :func:`attender`) would make while ``run`` runs, which ends there.

    Raises
    ------
    PolicyError
        If no policy is attached, or the module does not attend by transformers' registry.
    """
    before = _SEATS.get(attention)
    if before is None:
        raise PolicyError("queries and keys can be captured only while a policy is attached.")
    _SEATS[attention] = Seat(_Capture(), before.tower, before.layer, before.own)
    try:
        run()
    except _Captured as found:
        call: Call = found.args[0]
        return call
    finally:
        _SEATS[attention] = before
    raise PolicyError("the model's attention does not go through transformers' attention registry.")


def capture(attention: nn.Module, hidden: Tensor, options: dict[str, Any]) -> tuple[Tensor, Tensor, Tensor, float]:
    """Return queries ``[B, H, T, d]``, keys, values ``[B, Hkv, T, d]`` (after norms and RoPE) and the logits' factor.

    Parameters
    ----------
    attention : the attention module
    hidden : ``[B, T, D]``, what its projections read (after the block's first norm)
    options : the keyword arguments its block was called with, for these rows
    """
    told = {**options, "past_key_values": None, "use_cache": False}
    call = captured(attention, lambda: attention(hidden, **told))
    return call.query, call.key, call.value, call.scaling
