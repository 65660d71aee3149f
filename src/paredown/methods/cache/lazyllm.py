"""LazyLLM: a token is read by a layer only when the next token wants it.

Source: "LazyLLM: Dynamic Token Pruning for Efficient Long Context LLM Inference", 2024, arXiv 2407.14057. No official
code; checked by its properties.

- Every pass starts with all tokens *selected*: the new ones are rows of the stream, earlier ones have keys and values
  in some layers. Behind layer ``l`` the ``floor(rate_l * n)`` least important of ``n`` selected tokens go.
- importance of a token = attention from the newest row(s) in that layer, mean over query heads; one ``q K^T``.
- A token that goes before the next layer has read it leaves its hidden state there. When a later pass still has it
  selected at that point, it joins the stream again, with its own position. So no layer reads a token twice, and a layer
  holds keys and values of those tokens alone that it has read.

Readings of ours: the newest token never goes, so at most ``n - 1`` do; of equals the oldest goes; a layer with a
sliding window sees too little to judge, so a cut there uses the last layer before it that sees everything; padding goes
first.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from pydantic import Field
from torch import Tensor

from paredown.core.attention import Call, compute, probabilities, visible
from paredown.core.cache import PolicyLayer, Store, gathered, packed
from paredown.core.checkpoint import Model
from paredown.core.method import Place, Policy, register
from paredown.core.runtime import Pass, Runtime
from paredown.core.stores.gapped import GappedStore, skippable
from paredown.core.stream import Stream
from paredown.errors import PolicyError

_MEMO = "lazyllm"
_LEAST_SHARE = 0.1
"""A stage keeps at least this share of the stage before it, else the first cut moves forward."""


@register
class LazyLLM(Policy):
    """Reads fewer prompt tokens the deeper the layer, chosen by what the newest token attends to; they may come back.

    ``keep`` is the share of the prompt's layer-token evaluations that is done before the first answer token. The first
    third of the layers reads all tokens, the second a share ``x`` of them, the last ``x * x``; where ``keep`` leaves
    too little for that, the first cut comes earlier. What goes before the layer that looks facts up is lost for this
    step, so a shallow model bears little. Later steps choose among all tokens again and read what was
    put off, so the state of put-off tokens is kept. What the model says about earlier tokens of the prompt (its
    perplexity there) means nothing under this policy: only the last position counts.
    """

    name: ClassVar[str] = "lazyllm"
    title: ClassVar[str] = "LazyLLM: Dynamic Token Pruning for Efficient Long Context LLM Inference"
    year: ClassVar[int | None] = 2024
    arxiv: ClassVar[str | None] = "2407.14057"
    axis: ClassVar = "cache"
    unit: ClassVar[str] = "cached tokens"
    places: ClassVar[frozenset[Place]] = frozenset({"token stream"})

    rates: tuple[float, ...] | None = Field(
        None,
        description="Share of the selected tokens that goes behind each layer, a number a layer; instead of keep.",
    )
    rows: int = Field(1, ge=1, description="Newest rows whose attention is averaged into the importance.")
    revive: bool = Field(True, description="Keep the state of tokens that go, so that later steps can read them.")

    @property
    def inert(self) -> bool:
        """Whether nothing would ever go."""
        return self.keep == 1 if self.rates is None else not any(self.rates)

    def runtime(self, model: Model) -> Runtime:
        """Return what cuts the stream.

        Raises
        ------
        ArchitectureError
            If the model has layers that cannot skip tokens.
        PolicyError
            If ``keep`` asks for less than the first layer alone, or ``rates`` do not fit.
        """
        return _Lazy(self, model)


def schedule(keep: float, layers: int) -> list[float]:
    """Return the share of the selected tokens that goes behind each of ``layers`` layers.

    Raises
    ------
    PolicyError
        If ``keep`` is not more than one layer's part.
    """
    rates = [0.0] * layers
    for first in range(-(-layers // 3), 0, -1):
        second = first + (layers - first + 1) // 2
        sizes = (first, second - first, layers - second)
        if keep * layers <= sum(n * _LEAST_SHARE**i for i, n in enumerate(sizes)) and first > 1:
            continue
        if keep * layers > first:
            low, high = 0.0, 1.0
            for _ in range(60):
                middle = (low + high) / 2
                below = sum(n * middle**i for i, n in enumerate(sizes)) < keep * layers
                low, high = (middle, high) if below else (low, middle)
            rates[first - 1] = 1 - high
            if second < layers:
                rates[second - 1] = 1 - high
            return rates
    raise PolicyError(
        f"LazyLLM reads the whole prompt in the first of {layers} layers, so keep must be above {1 / layers:.3f}; "
        f"{keep} was asked for."
    )


@dataclass
class _Chosen:
    """A pass: ``selected [B, stop]``; ``scores [B, stop]``, -1 for tokens that the layer does not hold."""

    selected: Tensor
    newest: Tensor
    cut: bool = False
    scores: Tensor | None = None


class LazyStore(GappedStore):
    """Keys and values of the tokens that a layer has read, and its output for those that went behind it.

    Attributes
    ----------
    waiting : ``[B, a, D]`` hidden states, or None
    waiting_rows : ``[B, a]`` their logical positions, -1 for empty slots
    waiting_ids : ``[B, a]`` or ``[B, 3, a]``, their position ids
    """

    batched: ClassVar[tuple[str, ...]] = ("waiting", "waiting_rows", "waiting_ids")

    def __init__(self) -> None:
        super().__init__()
        self.waiting: Tensor | None = None
        self.waiting_rows: Tensor | None = None
        self.waiting_ids: Tensor | None = None

    def put(self, stream: Stream, gone: Tensor) -> None:
        """Take over the rows ``gone`` ``[B, n]`` of the stream."""
        if not bool(gone.any()):
            return
        at = packed(gone)
        hidden, rows, ids = _taken(stream.hidden, stream.positions(), stream.position_ids().movedim(-2, 0), at)
        if self.waiting is not None and self.waiting_rows is not None and self.waiting_ids is not None:
            hidden = torch.cat([self.waiting, hidden], dim=1)
            rows = torch.cat([self.waiting_rows, rows], dim=1)
            ids = torch.cat([self.waiting_ids, ids], dim=-1)
        self.waiting, self.waiting_rows, self.waiting_ids = hidden, rows, ids

    def bring(self, stream: Stream, selected: Tensor) -> None:
        """Hand the waiting tokens among ``selected`` ``[B, stop]`` back to the stream."""
        if self.waiting is None or self.waiting_rows is None or self.waiting_ids is None:
            return
        there = self.waiting_rows >= 0
        wanted = there & selected.gather(1, self.waiting_rows.clamp_min(0))
        if not bool(wanted.any()):
            return
        hidden, rows, ids = _taken(self.waiting, self.waiting_rows, self.waiting_ids, packed(wanted))
        stream.add(hidden, rows, ids.movedim(0, -2))
        self._stay(there & ~wanted)

    def _stay(self, mask: Tensor) -> None:
        assert self.waiting is not None
        assert self.waiting_rows is not None
        assert self.waiting_ids is not None
        if bool(mask.any()):
            left = _taken(self.waiting, self.waiting_rows, self.waiting_ids, packed(mask))
            self.waiting, self.waiting_rows, self.waiting_ids = left
        else:
            self.waiting = self.waiting_rows = self.waiting_ids = None

    def crop(self, stop: int) -> None:
        """Forget the tokens at logical positions ``stop`` and later."""
        super().crop(stop)
        if self.waiting_rows is not None:
            self._stay((self.waiting_rows >= 0) & (self.waiting_rows < stop))


class _Lazy(Runtime):
    """``evaluated[l]`` counts the tokens that layer ``l`` has read since the policy was attached."""

    policy: LazyLLM

    def __init__(self, policy: LazyLLM, model: Model) -> None:
        super().__init__(policy, model)
        tower = model.anatomy.language
        self.layers = [part.index for part in tower.blocks]
        attends = [part.attention is not None for part in tower.blocks]
        windows = skippable(model, "LazyLLM")
        self.rates = policy.rates if policy.rates is not None else _moved(schedule(policy.keep, len(attends)), attends)
        _check(self.rates, attends)
        self.judges: set[int] = set()
        for layer in (layer for layer, rate in enumerate(self.rates[:-1]) if rate):
            wide = [i for i in range(layer + 1) if attends[i] and windows[i] is None]
            self.judges.add(max(wide, default=layer))
        self.evaluated = [0] * len(attends)

    def touches(self, layer: int, window: int | None) -> bool:
        """Tokens go from every layer; a window is left to the masks."""
        return True

    def store(self, layer: int) -> Store:
        """Return a store with room for what waits."""
        return LazyStore()

    def before(self, layer: int, stream: Stream) -> None:
        """Select all tokens, or let those come back that are still selected."""
        now = stream.now
        assert now is not None
        if layer == self.layers[0]:
            real = now.padding
            if real is None:
                real = torch.ones((now.batch, now.stop), dtype=torch.bool, device=stream.hidden.device)
            order = torch.arange(1, now.stop + 1, device=real.device)
            now.memo[_MEMO] = _Chosen(real, (real * order).argmax(1))
        elif (store := _store_of(now, layer - 1)) is not None:
            store.bring(stream, now.memo[_MEMO].selected)
        plain = stream.rows is None and now.padding is None
        self.evaluated[layer] += now.batch * now.length if plain else int(stream.real().sum())

    def attend(self, call: Call) -> Tensor | None:
        """Attend to the selected tokens that the layer holds, and to the rows of the stream."""
        store = call.cached.parts[0][1]
        assert call.now is not None
        store.extend(call)
        held, chosen = store.entries, call.now.memo[_MEMO]
        keys, values, at = held.keys, held.values, held.positions
        if chosen.cut and call.past:
            # Before the first cut all are selected; in a first pass the rows of the stream are all that is held.
            at = at if at is not None else torch.arange(held.length, device=keys.device).expand(keys.shape[0], -1)
            index = packed((at >= 0) & chosen.selected.gather(1, at.clamp_min(0)))
            if index.shape[1] < held.length:
                keys, values = gathered(keys, index), gathered(values, index)
                at = at.gather(1, index.clamp_min(0)).masked_fill(index < 0, -1)
        self._judge(call, keys, at)
        out = compute(call, keys, values, visible(call, at, keys.shape[2]))
        store.settle(call)
        return out

    def watch(self, call: Call) -> None:
        """Judge where there is no cache; with one, the keys are known only in :meth:`attend`."""
        if call.cached is None:
            self._judge(call, call.key, call.rows)

    def _judge(self, call: Call, keys: Tensor, positions: Tensor | None) -> None:
        if call.layer in self.judges and call.now is not None:
            call.now.memo[_MEMO].scores = importance(call, keys, positions, self.policy.rows)

    def after(self, layer: int, stream: Stream) -> None:
        """Let the least important tokens go."""
        now, rate = stream.now, self.rates[layer]
        if not rate or layer == self.layers[-1] or now is None:
            return
        chosen: _Chosen = now.memo[_MEMO]
        assert chosen.scores is not None
        chosen.selected = chosen.selected & ~least(chosen.scores, chosen.selected, chosen.newest, rate)
        chosen.cut = True
        rows = stream.positions()
        stay = (rows >= 0) & chosen.selected.gather(1, rows.clamp_min(0))
        if self.policy.revive and (store := _store_of(now, layer)) is not None:
            store.put(stream, stream.real() & ~stay)
        stream.keep(stay)


def importance(call: Call, keys: Tensor, positions: Tensor | None, rows: int) -> Tensor:
    """Return how much the newest rows attend to each token, mean over query heads.

    Parameters
    ----------
    keys : ``[B, Hkv, K, d]``
    positions : ``[B, K]`` their logical positions, -1 for empty slots; None if entry ``k`` is token ``k``
    rows : newest new tokens of each row of the batch that are averaged

    Returns
    -------
    ``[B, stop]`` fp32, -1 for tokens that are not among the keys.
    """
    now = call.now
    assert now is not None
    at = call.positions()
    real = now.real(at) & (at >= now.past)
    newest, where = at.masked_fill(~real, -1).topk(min(rows, at.shape[1]), dim=1)
    query = call.query.gather(2, where[:, None, :, None].expand(-1, call.query.shape[1], -1, call.query.shape[3]))
    few = replace(call, query=query, rows=newest, ordered=False)
    count = keys.shape[2]
    weights = probabilities(query, keys, call.scaling, visible(few, positions, count).mask).mean(1)
    there = (newest >= 0).float()
    score = (weights * there[..., None]).sum(1) / there.sum(1, keepdim=True).clamp_min(1)
    if positions is None:
        positions = torch.arange(count, device=keys.device).expand(len(score), -1)
    # One column more takes what empty slots say.
    out = score.new_full((len(score), now.stop + 1), -1.0)
    return out.scatter(1, positions.masked_fill(positions < 0, now.stop), score)[:, :-1]


def least(scores: Tensor, selected: Tensor, newest: Tensor, rate: float) -> Tensor:
    """Return the ``min(floor(rate * n), n - 1)`` least important of each row's ``n`` selected tokens, ``[B, stop]``.

    Parameters
    ----------
    scores : ``[B, stop]``, below 0 for tokens that are not there
    selected : ``[B, stop]`` bool
    newest : ``[B]``, the token that never goes
    """
    there = selected & (scores >= 0)
    number = there.sum(1)
    # 0.29 * 100 is a hair below 29.
    count = torch.minimum((rate * number.double() + 1e-6).floor().long(), number - 1)
    ranked = scores.masked_fill(~there, torch.inf).scatter(1, newest[:, None], torch.inf)
    order = ranked.argsort(dim=1, stable=True)
    first = torch.arange(order.shape[1], device=order.device) < count[:, None]
    return torch.zeros_like(selected).scatter(1, order, first)


def _taken(hidden: Tensor, rows: Tensor, ids: Tensor, at: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    inside = at.clamp_min(0)
    picked = hidden.gather(1, inside[..., None].expand(-1, -1, hidden.shape[2]))
    wide = inside if ids.dim() == 2 else inside[:, None].expand(-1, ids.shape[1], -1)
    return picked, rows.gather(1, inside).masked_fill(at < 0, -1), ids.gather(-1, wide)


def _store_of(now: Pass, layer: int) -> LazyStore | None:
    held = now.cache.layers[layer] if now.cache is not None and layer < len(now.cache.layers) else None
    store = held.parts[0][1] if isinstance(held, PolicyLayer) else None
    return store if isinstance(store, LazyStore) else None


def _moved(rates: Sequence[float], attends: Sequence[bool]) -> tuple[float, ...]:
    """Move cuts behind layers without attention to the layer before, where tokens can be judged and can wait."""
    moved = [0.0] * len(rates)
    for layer, rate in enumerate(rates):
        at = max((i for i in range(layer + 1) if attends[i]), default=layer)
        moved[at] = 1 - (1 - moved[at]) * (1 - rate)
    return tuple(moved)


def _check(rates: Sequence[float], attends: Sequence[bool]) -> None:
    if len(rates) != len(attends):
        raise PolicyError(f"LazyLLM was given {len(rates)} rates for {len(attends)} layers; give one each.")
    _refuse(rates, lambda rate: not 0 <= rate <= 1, "is not between 0 and 1; mend it")
    blind = [rate if not there else 0.0 for rate, there in zip(rates[:-1], attends[:-1], strict=True)]
    _refuse(blind, bool, "belongs to a layer without attention; set it to 0")


def _refuse(rates: Sequence[float], wrong: Callable[[float], bool], why: str) -> None:
    for layer, rate in enumerate(rates):
        if wrong(rate):
            raise PolicyError(f"LazyLLM's rate {rate} for layer {layer} {why}.")
