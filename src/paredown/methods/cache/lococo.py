"""LoCoCo: a small convolution blends old keys and values into a fixed number of slots.

Source: "LoCoCo: Dropping In Convolutions for Long Context Compression", 2024, arXiv 2406.05317; official code
VITA-Group/LoCoCo. Different here, on purpose:

- Queries of a group share keys, so their attention sums are added up; the official code runs without groups only.
- Padding is no material, and each row of a batch is compressed when it would be alone.
- A long pass attends exactly to all of itself and is compressed when it ends: the numbers are those of compressing
  before the next tokens come, and the memory is free at once.
- A policy leaves the model as it is, so token embeddings and norms, which the official code trains too, stay.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from paredown.core import heads
from paredown.core.attach import attach_runtimes
from paredown.core.attention import Call, column_sums
from paredown.core.cache import Entries, Store, packed
from paredown.core.calibration import Batch
from paredown.core.checkpoint import Model
from paredown.core.learning import learned, training
from paredown.core.method import Place, Policy, Progress, register
from paredown.core.runtime import Runtime
from paredown.errors import DataError, PolicyError

_FILE = "lococo.safetensors"


@register
class LoCoCo(Policy):
    """Keep a fixed number of slots: the cached pairs that got most attention, and blends of all others.

    Half of the slots hold the pairs with the highest attention from the last pass as they are. Each of the others
    starts from one of the next best, mixed with all pairs that must go by the weights of a convolution along the
    sequence. ``prepare`` learns the convolutions and how much they count, from the next-token loss behind one
    compression, and writes them to a file. With ``blend=0`` nothing is mixed and nothing needs learning: plain
    eviction by attention.

    ``slots`` is how many there are: given, or ``keep`` of ``length`` tokens; with ``blend=0``, ``keep`` of the first
    pass where neither is given. A pass that ends with more than ``slots + slack`` pairs is compressed to ``slots``.
    """

    name: ClassVar[str] = "lococo"
    title: ClassVar[str] = "LoCoCo: Dropping In Convolutions for Long Context Compression"
    year: ClassVar[int | None] = 2024
    arxiv: ClassVar[str | None] = "2406.05317"
    axis: ClassVar = "cache"
    unit: ClassVar[str] = "cached tokens"
    needs: ClassVar[tuple[str, ...]] = ("calibration-data", "training")
    places: ClassVar[frozenset[Place]] = frozenset({"slots"})

    slots: int | None = Field(None, ge=2, description="Cached pairs that stay; keep * length where not given.")
    length: int | None = Field(None, ge=2, description="Tokens that keep is a share of.")
    fused: float = Field(0.5, gt=0, le=1, description="Share of the slots that hold blends.")
    local: int = Field(0, ge=0, description="Latest pairs that are never blended.")
    slack: int = Field(16, ge=0, description="Pairs beyond the slots that do not yet cause a compression.")
    kernel: int = Field(21, ge=1, description="Tokens that the convolution reads at once.")
    blend: Literal[0] | None = Field(None, description="0 for plain eviction; else as learned.")
    weights: str | None = Field(None, description="File of the learned convolutions; made by prepare.")
    chunk: int = Field(512, ge=2, description="Tokens of a pass in training.")
    steps: int = Field(1000, ge=0, description="Training steps.")
    lr: float = Field(0.05, gt=0, description="Learning rate of the convolutions and of how much they count.")
    batch: int = Field(1, ge=1, description="Rows that are read together in training.")
    accumulate: int = Field(16, ge=1, description="Such batches in a training step.")
    start: Literal["normal", "fan-in"] = Field(
        "normal",
        description="How convolutions begin: N(0, 1) as published, which saturates the softmax; or scaled down by the "
        "square root of what they sum over.",
    )

    @property
    def room(self) -> int | None:
        """How many slots there are; None where the first pass decides."""
        if self.slots is not None:
            return self.slots
        return None if self.length is None else max(2, round(self.keep * self.length))

    def runtime(self, model: Model) -> Runtime:
        """Keep slots in all layers without a sliding window."""
        if self.blend == 0:
            return _Slots(self, model, None)
        if self.weights is None:
            raise PolicyError(
                f"{self.name} has learned no convolutions for {type(model.hf).__name__} yet; call prepare with "
                "calibration data first, or set blend=0 for plain eviction."
            )
        return _Slots(self, model, self._load(model, Path(self.weights)))

    def prepare(
        self,
        model: Model,
        data: Batch | None,
        *,
        seed: int = 0,
        folder: str | None = None,
        progress: Progress | None = None,
    ) -> LoCoCo:
        """Return the policy with learned convolutions. Weights that were given stay."""
        if self.inert or self.blend == 0 or self.weights is not None:
            return self
        rows = learned.text(self.name, data).input_ids
        folder = learned.place(self.name, folder, what="convolutions")
        told = self if self.room is not None else self.model_copy(update={"length": int(rows.shape[1])})
        told = told.model_copy(update={"slots": told.room})
        assert told.slots is not None
        if rows.shape[1] <= told.chunk * (1 + (told.slots + told.slack) // told.chunk):
            raise DataError(
                f"rows of {rows.shape[1]} tokens end before {told.slots} slots are full and read again; give longer "
                f"rows, or a chunk below {told.chunk}."
            )
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            mixers = told._mixers(model)
        settings = training.Settings(
            steps=told.steps,
            lr=told.lr,
            batch=told.batch,
            accumulate=told.accumulate,
            schedule=training.linear,
            seed=seed,
        )
        task = _NextToken(told, model, mixers)
        learned.fit(task, list(rows), settings, folder=folder, progress=progress, what=self.name)
        return told.model_copy(update={"weights": learned.keep(mixers.state_dict(), folder, _FILE)})

    def _mixers(self, model: Model) -> Mixers:
        assert self.slots is not None
        fused = fused_slots(self.slots, self.fused)
        widths = {
            block.index: block.attention.head_dim
            for block, count in zip(model.anatomy.language.blocks, heads.shape(model), strict=True)
            if count and block.attention is not None
        }
        return Mixers(widths, fused, self.kernel, self.start).to(model.hf.device)

    def _load(self, model: Model, place: Path) -> Mixers:
        if self.room is None:
            raise PolicyError(f"{self.name} has convolutions but no number of slots; set slots.")
        with torch.random.fork_rng():
            mixers = self.model_copy(update={"slots": self.room})._mixers(model)
        learned.restore(
            mixers,
            place,
            device=str(model.hf.device),
            unreadable=f"{place} holds no convolutions that can be read ({{}}); prepare them again.",
            foreign=(
                f"the convolutions in {place} were learned for another model or another number of slots than "
                f"{self.room}; prepare them again."
            ),
        )
        return mixers


def fused_slots(slots: int, share: float) -> int:
    """Return how many of the slots hold blends, at least one."""
    return max(1, int(slots * share + 1e-9))


class Mixer(nn.Module):
    """The weights that blend material into slots, for one layer; all heads share them.

    Parameters
    ----------
    width : head dimension of keys and of values
    fused : slots that hold blends
    """

    def __init__(self, width: int, fused: int, kernel: int, start: str) -> None:
        super().__init__()
        self.convolution = nn.Conv1d(2 * width, fused, kernel, padding=kernel // 2)
        nn.init.normal_(self.convolution.weight, std=1.0 if start == "normal" else (2 * width * kernel) ** -0.5)
        self.share = nn.Parameter(torch.tensor(0.5))

    def forward(self, material: Tensor, real: Tensor) -> Tensor:
        """Return ``[B, H, fused, S]``, rows that sum to 1, from ``[B, H, S, 2d]`` and ``[B, H, S]``."""
        batch, count, length, width = material.shape
        read = material.float() * real[..., None]
        told = F.relu(self.convolution(read.view(-1, length, width).transpose(1, 2)))[..., :length]
        told = told.reshape(batch, count, -1, length)
        weights: Tensor = told.masked_fill(~real[:, :, None], torch.finfo(told.dtype).min).softmax(-1)
        return weights


class Mixers(nn.Module):
    """One :class:`Mixer` for each layer that keeps slots."""

    def __init__(self, widths: dict[int, int], fused: int, kernel: int, start: str) -> None:
        super().__init__()
        self.layers = nn.ModuleDict({str(i): Mixer(width, fused, kernel, start) for i, width in widths.items()})

    def of(self, layer: int) -> Mixer:
        """Return the mixer of a layer."""
        found = self.layers[str(layer)]
        assert isinstance(found, Mixer)
        return found


class _Slots(Runtime):
    policy: LoCoCo

    def __init__(self, policy: LoCoCo, model: Model, mixers: Mixers | None, *, learning: bool = False) -> None:
        super().__init__(policy, model)
        self.mixers, self.learning = mixers, learning

    def store(self, layer: int) -> Store:
        return SlotStore(self.policy, None if self.mixers is None else self.mixers.of(layer), learning=self.learning)


class SlotStore(Store):
    """Compresses what it holds to a number of slots when a pass ends with more than that and the slack.

    While learning, it compresses when the next pass begins, so that the gradient of that pass reaches the mixer.
    """

    batched: ClassVar[tuple[str, ...]] = ("_room", "_mass")

    def __init__(self, policy: LoCoCo, mixer: Mixer | None, *, learning: bool = False) -> None:
        super().__init__()
        self.policy, self.mixer, self.learning = policy, mixer, learning
        self._room: Tensor | None = None
        """``[B]``, slots of each row."""
        self._least = 0
        self._mass: Tensor | None = None
        """``[B, Hkv, K]``, the attention that each entry got from the last pass; only while a compression is due."""
        self._blended = 0
        """Logical length when blends were last made: what they came from cannot be told apart any more."""

    def attend(self, call: Call) -> Tensor:
        if self.learning and self.entries.length:
            self._forget_graph()
            if self._mass is not None:
                self._compress(call)
        return super().attend(call)

    def settle(self, call: Call) -> None:
        held = self.entries
        if self._room is None:
            self._room = self._slots(call)
            self._least = int(self._room.min())
        if held.length <= self._least + self.policy.slack or not bool(self._due(call).any()):
            return
        if held.sizes is not None:
            raise PolicyError("lococo cannot blend tokens that were merged; leave one of the two policies out.")
        with torch.no_grad():
            sums = column_sums(call, held.keys, held.positions)
        self._mass = sums.view(len(sums), held.keys.shape[1], -1, held.length).sum(2)
        if not self.learning:
            self._compress(call)

    def _slots(self, call: Call) -> Tensor:
        real = self._real(call)
        if self.policy.room is not None:
            return torch.full((len(call.key),), self.policy.room, device=call.key.device)
        return (self.policy.keep * real[:, 0].sum(-1)).round().long().clamp_min(1)

    def _real(self, call: Call) -> Tensor:
        """Return which entries are tokens, ``[B, 1 or Hkv, K]``."""
        held = self.entries
        positions = held.positions
        if positions is None:
            positions = torch.arange(held.length, device=call.key.device).expand(len(call.key), -1)
        if positions.dim() == 2:
            positions = positions[:, None]
        return positions >= 0 if call.now is None else call.now.real(positions)

    def _due(self, call: Call) -> Tensor:
        assert self._room is not None
        return self._real(call)[:, 0].sum(-1) > self._room + self.policy.slack

    def _compress(self, call: Call) -> None:
        held, mass, room = self.entries, self._mass, self._room
        assert mass is not None
        assert room is not None
        real, due = self._real(call).expand_as(mass), self._due(call)[:, None, None]
        score = mass.masked_fill(~real, -1)
        if self.policy.local:
            latest = real & (real.flip(-1).cumsum(-1).flip(-1) <= self.policy.local)
            score = score.masked_fill(latest, torch.inf)
        # Rank 0 is the highest; ties go to the lower index.
        rank = score.argsort(dim=-1, descending=True, stable=True).argsort(-1)
        if self.mixer is None:
            held.select(packed(real & (~due | (rank < room[:, None, None]))))
        else:
            self._blend(self.mixer, real, due, rank, int(room[0]))
            assert call.now is not None
            self._blended = call.now.past if self.learning else call.now.stop
        self._mass = None

    def _blend(self, mixer: Mixer, real: Tensor, due: Tensor, rank: Tensor, room: int) -> None:
        held = self.entries
        untouched = room - fused_slots(room, self.policy.fused)
        material = packed(real & (rank >= untouched))
        there, at = material >= 0, material.clamp_min(0)
        keys, values = _gathered(held.keys, at), _gathered(held.values, at)
        weights = mixer(torch.cat([keys, values], -1), there)
        base = packed(there & (rank.gather(2, at) < room))
        share = mixer.share

        def blended(part: Tensor) -> Tensor:
            mixed = share * (weights @ part.float()) + (1 - share) * _gathered(part, base.clamp_min(0)).float()
            kept: Tensor = mixed.to(part.dtype)
            return kept

        positions = held.positions
        if positions is None:
            positions = torch.arange(held.length, device=rank.device).expand(len(rank), -1)
        positions = (positions if positions.dim() == 3 else positions[:, None]).expand_as(rank)
        # A blend stands where its base stood.
        every = torch.cat([positions, positions.gather(2, at.gather(2, base.clamp_min(0)))], 2)
        index = torch.arange(held.length, every.shape[2], device=rank.device).expand_as(base)
        index = torch.cat([packed(real & (rank < untouched)), index], 2)
        if not bool(due.all()):  # some rows have room left and stay as they are
            others = packed(real & ~due)
            width = max(index.shape[2], others.shape[2])
            index = torch.where(due, _widened(index, width), _widened(others, width))
        fresh, chosen = Entries(), index.clamp_min(0)
        fresh.append(
            _gathered(torch.cat([held.keys, blended(keys)], 2), chosen),
            _gathered(torch.cat([held.values, blended(values)], 2), chosen),
            every.gather(2, chosen).masked_fill(index < 0, -1),
            0,
        )
        self.entries = fresh

    def _forget_graph(self) -> None:
        held, fresh = self.entries, Entries()
        fresh.append(held.keys.detach(), held.values.detach(), held.positions, 0)
        self.entries = fresh

    def crop(self, stop: int) -> None:
        """Forget the tokens at logical positions ``stop`` and later; what was blended cannot be undone."""
        held = self.entries
        positions = held.positions
        if stop < self._blended:
            raise PolicyError(
                f"this cache cannot be cropped to {stop} tokens: {self._blended} were blended; start a new one."
            )
        if positions is None or positions.dim() == 2:
            super().crop(stop)
            return
        keep = positions < stop
        if (keep != keep[:1, :1]).any():
            raise PolicyError("this cache cannot be cropped: its rows hold different tokens; start a new one.")
        held.select(keep[0, 0].nonzero()[:, 0].expand(*positions.shape[:2], -1))

    def reset(self) -> None:
        """Forget everything."""
        super().reset()
        self._blended = 0


def _gathered(part: Tensor, at: Tensor) -> Tensor:
    """Take entries ``at`` ``[B, H, n]`` of ``[B, H, K, d]``."""
    return part.gather(2, at[..., None].expand(-1, -1, -1, part.shape[3]))


def _widened(index: Tensor, width: int) -> Tensor:
    return F.pad(index, (width - index.shape[2], 0), value=-1)


class _NextToken(training.Task[Tensor]):
    """The next-token loss, chunk by chunk, each behind at most one compression that carries a gradient."""

    def __init__(self, policy: LoCoCo, model: Model, mixers: Mixers) -> None:
        super().__init__(model.hf, mixers)
        self.policy, self.model, self.mixers = policy, model, mixers

    def loss(self, rows: Sequence[Tensor]) -> Iterator[Tensor]:
        """Yield the mean loss of each chunk that reads compressed pairs."""
        hf: Any = self.model.hf
        ids = torch.stack(list(rows)).to(hf.device)
        runtime = _Slots(self.policy, self.model, self.mixers, learning=True)
        cache = None
        with attach_runtimes(self.model, [runtime]):
            for start in range(0, ids.shape[1] - 1, self.policy.chunk):
                part = slice(start, start + self.policy.chunk)
                out = hf(input_ids=ids[:, part], past_key_values=cache, use_cache=True)
                cache, answers = out.past_key_values, ids[:, start + 1 : part.stop + 1]
                told = out.logits[:, : answers.shape[1]]
                loss = F.cross_entropy(told.flatten(0, 1).float(), answers.flatten())
                if loss.requires_grad:
                    yield loss

    def project(self) -> None:
        """Keep blends among what they are made of: unbounded, the share wanders above 1 and weights turn negative."""
        for mixer in self.mixers.layers.values():
            assert isinstance(mixer, Mixer)
            mixer.share.clamp_(0, 1)
