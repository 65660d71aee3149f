"""A router in front of a model: a small causal transformer that reads token ids and names an expert for each token.

It sees nothing of the model's hidden states, so all decisions about a prompt are known before the first layer runs.
What it must remember of a sequence (keys, values, which tokens are real) lives in the sequence's cache, and its
positions count real tokens alone: whatever the padding, the chunks or the turns, a token gets the expert that it gets
when its whole sequence is read at once.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from paredown.core.cache import Entries
from paredown.core.experts.channels import Chosen
from paredown.core.learning import training

_BASE = 10_000.0
_EPS = 1e-6


class Memory(Chosen):
    """What a router remembers of its sequences: experts, which tokens are real, its own keys and values."""

    told: ClassVar[tuple[str, ...]] = ("experts", "real")

    def __init__(self, layers: int) -> None:
        super().__init__()
        self.real: Tensor | None = None
        """``[B, n]``, false for padding; None while there was none."""
        self.layers = [Entries() for _ in range(layers)]

    @property
    def length(self) -> int:
        """Tokens seen."""
        return self.layers[0].length

    def tensors(self) -> Iterator[Tensor]:
        """Yield every tensor that is kept alive."""
        yield from super().tensors()
        yield from (tensor for layer in self.layers for tensor in layer.tensors())

    def batch(self, index: Tensor) -> None:
        """Take the rows ``index`` ``[B']`` of the batch."""
        super().batch(index)
        for layer in self.layers:
            layer.batch(index)

    def crop(self, stop: int) -> None:
        """Forget the tokens at logical positions ``stop`` and later."""
        super().crop(stop)
        for layer in self.layers:
            layer.narrow(0, stop)

    def reset(self) -> None:
        """Forget everything."""
        super().reset()
        self.layers = [Entries() for _ in self.layers]


class Router(nn.Module):
    """Token ids in, logits over experts out; always fp32.

    As released: attention with biases, RoPE and no scaling of the products, an MLP of two layers with SiLU between, a
    norm before each and before the head, everything of one width. (The base of RoPE is fixed here; theirs is the
    model's.)

    Parameters
    ----------
    embedding : ``[V, E]``, the model's token embeddings, whose first columns are the start of the router's
    experts : how many there are to choose from
    width : of everything; at most ``E``, rounded down to what the heads can share
    """

    def __init__(self, embedding: Tensor, experts: int, *, width: int, layers: int, heads: int) -> None:
        super().__init__()
        width = max(2 * heads, min(width, embedding.shape[1]) // (2 * heads) * 2 * heads)
        self.heads = heads
        self.embedding = nn.Embedding(len(embedding), width)
        with torch.no_grad():
            shared = min(width, embedding.shape[1])
            self.embedding.weight[:, :shared] = embedding[:, :shared].float().cpu()
        self.layers = nn.ModuleList([_Layer(width) for _ in range(layers)])
        self.norm = nn.RMSNorm(width, eps=_EPS)
        self.head = _linear(width, experts)

    def forward(self, ids: Tensor, real: Tensor | None = None, memory: Memory | None = None) -> Tensor:
        """Return logits ``[B, n, D]``.

        Parameters
        ----------
        ids : ``[B, n]``, new tokens
        real : ``[B, n]``, false for padding; None if all count
        memory : of what came before; the new tokens are added to it
        """
        past = 0 if memory is None else memory.length
        before = None if memory is None else memory.real
        seen = _joined(before, real, past, ids)
        if memory is not None:
            memory.real = seen
        positions = _positions(seen, past, ids)
        mask = _visible(seen, past, ids.shape[1])
        causal = mask is None and ids.shape[1] > 1
        hidden = self.embedding(ids)
        turn = _turn(positions, hidden.shape[-1] // self.heads)
        for number, layer in enumerate(self.layers):
            assert isinstance(layer, _Layer)
            held = None if memory is None else memory.layers[number]
            hidden = layer(hidden, turn, mask, causal, held, self.heads)
        logits: Tensor = self.head(self.norm(hidden))
        return logits


class _Layer(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm, self.second = nn.RMSNorm(width, eps=_EPS), nn.RMSNorm(width, eps=_EPS)
        self.q, self.k, self.v, self.o = (_linear(width, width) for _ in range(4))
        self.up, self.down = _linear(width, width), _linear(width, width)

    def forward(
        self,
        hidden: Tensor,
        turn: tuple[Tensor, Tensor],
        mask: Tensor | None,
        causal: bool,
        held: Entries | None,
        heads: int,
    ) -> Tensor:
        batch, length, width = hidden.shape
        read = self.norm(hidden)
        query, key, value = (
            part(read).view(batch, length, heads, -1).transpose(1, 2) for part in (self.q, self.k, self.v)
        )
        query, key = _turned(query, turn), _turned(key, turn)
        if held is not None:
            held.append(key, value, None, held.length)
            key, value = held.keys, held.values
        out = F.scaled_dot_product_attention(query, key, value, attn_mask=mask, is_causal=causal, scale=1.0)
        hidden = hidden + self.o(out.transpose(1, 2).reshape(batch, length, width))
        added: Tensor = self.down(F.silu(self.up(self.second(hidden))))
        return hidden + added


def _linear(width: int, to: int) -> nn.Linear:
    made = nn.Linear(width, to)
    nn.init.kaiming_uniform_(made.weight)
    return made


def _joined(before: Tensor | None, real: Tensor | None, past: int, ids: Tensor) -> Tensor | None:
    """Return which tokens so far are real, ``[B, past + n]``; None if all are."""
    if before is None and (real is None or bool(real.all())):
        return None
    batch, length = ids.shape
    if before is None:
        before = torch.ones((batch, past), dtype=torch.bool, device=ids.device)
    if real is None:
        real = torch.ones((batch, length), dtype=torch.bool, device=ids.device)
    return torch.cat([before, real.bool()], dim=1)


def _positions(seen: Tensor | None, past: int, ids: Tensor) -> Tensor:
    """Return how many real tokens came before each new one, ``[B, n]``."""
    if seen is None:
        return torch.arange(past, past + ids.shape[1], device=ids.device).expand(ids.shape)
    return (seen.cumsum(1) - 1).clamp_min(0)[:, past:]


def _visible(seen: Tensor | None, past: int, length: int) -> Tensor | None:
    """Return what each new token sees; None for all that came before it."""
    if seen is None and (length == 1 or past == 0):
        return None
    device = None if seen is None else seen.device
    columns, rows = torch.arange(past + length, device=device), torch.arange(past, past + length, device=device)
    before = columns <= rows[:, None]
    if seen is None:
        return before
    # Padding sees itself, so that no row is empty; nobody sees it.
    return (before & seen[:, None, None, :]) | (columns == rows[:, None])


def _turn(positions: Tensor, width: int) -> tuple[Tensor, Tensor]:
    rates = _BASE ** (-torch.arange(0, width, 2, device=positions.device).float() / width)
    angles = positions[:, None, :, None].float() * rates
    angles = torch.cat([angles, angles], dim=-1)
    return angles.cos(), angles.sin()


def _turned(states: Tensor, turn: tuple[Tensor, Tensor]) -> Tensor:
    one, other = states.chunk(2, dim=-1)
    return states * turn[0] + torch.cat([-other, one], dim=-1) * turn[1]


# What the router learns.


def preferences(inner: Tensor, own: Tensor, *, signed: bool = False) -> Tensor | None:
    """Return what one layer would have the router say, ``[..., D]``; each token's numbers sum to 1.

    A channel counts up to five times, once for each of five ranks (N/5, 2N/5, 3N/5, 4N/5 and N - 1, where N channels
    are an expert's own) that its activation exceeds; an expert's affinity is ten thirds of the mean over its own
    channels. Three quarters of the answer are the best expert, smoothed by half; one quarter is a softmax of the
    affinities. Cross-entropy is linear in its target, so that is the published sum of two losses.

    Parameters
    ----------
    inner : ``[..., width]``, what the down projection reads
    own : ``[D, width]``, channels of each expert that not all have
    signed : compare activations as they are (as released) and not their absolute values

    Returns
    -------
    None if the experts of this layer are all the same.
    """
    count = int(own[0].sum())
    if count == 0:
        return None
    told = inner.float() if signed else inner.float().abs()
    highest = told.topk(count, dim=-1).values
    activity = torch.zeros_like(told)
    for rank in (*(count * part // 5 for part in (1, 2, 3, 4)), count - 1):
        activity += told > highest[..., rank, None]
    affinity = 10 * (activity @ own.to(told).T) / (3 * count)
    experts = len(own)
    best = F.one_hot(affinity.argmax(-1), experts).float()
    return 0.75 * (0.5 * best + 0.5 / experts) + 0.25 * affinity.softmax(-1)


class Imitate(training.Task[int]):
    """Makes a router say what the layers of the dense model would: rows are numbers of rows of ``ids``.

    Parameters
    ----------
    ids : ``[N, T]``
    mask : ``[N, T]``, nonzero for real tokens; None if all are
    targets : ``[N, T, D]``, the mean of the layers' preferences
    """

    def __init__(self, router: Router, ids: Tensor, mask: Tensor | None, targets: Tensor) -> None:
        super().__init__(nn.Identity(), router)
        self.router, self.ids, self.targets = router, ids, targets
        self.real = torch.ones(ids.shape, dtype=torch.bool) if mask is None else mask.bool()

    def loss(self, rows: Sequence[int]) -> Tensor:
        """Return the mean cross-entropy of real tokens."""
        index, device = torch.tensor(list(rows)), self.router.head.weight.device
        real = self.real[index].to(device)
        told = self.router(self.ids[index].to(device), real).log_softmax(-1)
        each = -(self.targets[index].to(device) * told).sum(-1)
        mean: Tensor = (each * real).sum() / real.sum().clamp_min(1)
        return mean
