"""DuoAttention: heads that need the whole context keep it, the others keep its first and latest tokens.

Source: "DuoAttention: Efficient Long-Context LLM Inference with Retrieval and Streaming Heads", 2024, arXiv 2410.10819;
official code mit-han-lab/duo-attention. Different here, on purpose:

- The training mask is exact to the token; the official kernel rounds windows to blocks of 128.
- The teacher runs first and alone, without gradient, and hands its attention outputs on: the same numbers as the
  official batch of two, for less than twice the memory.
- Ties are broken by index, not by noise, and the number of heads is exact.
- Weights are not reordered: the heads of a layer are indexed once.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np
import torch
from pydantic import Field
from torch import Tensor, nn

from paredown.core import attention, retrieval
from paredown.core import heads as kv
from paredown.core.attention import Call, Seat, Visible, compute
from paredown.core.calibration import Batch
from paredown.core.checkpoint import Model
from paredown.core.learning import training
from paredown.core.method import Place, Policy, Progress, register
from paredown.core.runtime import Runtime
from paredown.errors import DataError, PolicyError


@register
class DuoAttention(Policy):
    """Heads that retrieve keep the whole cache; streaming heads keep the first few and the latest tokens.

    Which heads retrieve is learned once for a model (one gate for each KV head, everything else frozen) on texts in
    which passkeys are hidden, or told by how often each head copies from the context. The budget counts KV heads over
    all layers; layers with a sliding window are left alone. The first pass reads with full attention in all heads.
    """

    name: ClassVar[str] = "duo-attention"
    title: ClassVar[str] = "DuoAttention: Efficient Long-Context LLM Inference with Retrieval and Streaming Heads"
    year: ClassVar[int | None] = 2024
    arxiv: ClassVar[str | None] = "2410.10819"
    axis: ClassVar = "cache"
    unit: ClassVar[str] = "KV heads"
    needs: ClassVar[tuple[str, ...]] = ("calibration-data", "training")
    places: ClassVar[frozenset[Place]] = frozenset({"heads"})

    sink: int = Field(64, ge=0, description="First tokens that streaming heads keep.")
    recent: int = Field(256, ge=1, description="Latest tokens that streaming heads keep.")
    heads: kv.Table | None = Field(
        None, description="A number for each layer and KV head, high where it must keep all; made by prepare."
    )
    selector: Literal["gates", "retrieval"] = Field("gates", description="Where the numbers come from.")
    steps: int = Field(2000, ge=1, description="Training steps of the gates.")
    lr: float = Field(0.02, gt=0, description="Learning rate of the gates.")
    reg: float = Field(0.05, ge=0, description="Weight of the gates' mean size in the loss.")
    batch: int = Field(1, ge=1, description="Texts in a training step.")
    length: int = Field(0, ge=0, description="Tokens of a text; 0 takes the length of the calibration rows.")
    passkeys: int = Field(10, ge=1, description="Passkeys hidden in a training text.")
    template: str = Field("", description="A sentence to hide, with {name} and {value}; empty numbers random tokens.")
    key: int = Field(0, ge=0, description="Tokens of a passkey, or digits of {value}; 0 takes what fits.")

    def runtime(self, model: Model) -> Runtime:
        if self.heads is None:
            raise PolicyError(
                f"{self.name} does not know yet which heads of {type(model.hf).__name__} retrieve; call prepare with "
                "calibration data first, or give it heads."
            )
        chosen = kv.best(self.heads, self.keep)
        counts = kv.shape(model)
        if tuple(map(len, self.heads)) != counts:
            raise PolicyError(
                f"{self.name} was given numbers for {list(map(len, self.heads))} heads and {type(model.hf).__name__} "
                f"has {list(counts)}; prepare it with this model."
            )
        return kv.StreamingHeads(self, model, chosen, sink=self.sink, recent=self.recent)

    def prepare(
        self,
        model: Model,
        data: Batch | None,
        *,
        seed: int = 0,
        folder: str | None = None,
        progress: Progress | None = None,
    ) -> DuoAttention:
        """Return the policy with a number for each head. Heads that were given stay."""
        if self.heads is not None or self.inert:
            return self
        counts = kv.shape(model)
        planter = retrieval.Planter(data, model.tokenizer, self.template)
        assert data is not None
        length = self.length or int(data.input_ids.shape[1])
        if self.selector == "retrieval":
            scores = self._copied(model, planter, length, counts, seed)
        else:
            gates = Gates(model, counts)
            rows = Passkeys(planter, length, self.passkeys, self.key, seed, self.steps * self.batch)
            settings = training.Settings(
                steps=self.steps, lr=self.lr, batch=self.batch, seed=seed, schedule=plateau, decay=0.01
            )
            task = Distill(model, gates, self.sink, self.recent, self.reg)
            if progress is not None:
                # Where the model cannot find them, nothing that is learned from them tells heads apart.
                progress(
                    0,
                    self.steps,
                    f"gates: the model finds {task.found([rows[i] for i in range(min(2, len(rows)))]):.0%} of keys",
                )
            place = None if folder is None else Path(folder) / "gates"
            training.fit(task, rows, settings, folder=place, progress=progress, what="gates")
            scores = gates.flat()
        return self.model_copy(update={"heads": kv.table(scores, counts)})

    def _copied(
        self, model: Model, planter: retrieval.Planter, length: int, counts: Sequence[int], seed: int
    ) -> Tensor:
        lengths = sorted({max(length * part // 4, 1) for part in (2, 3, 4)})
        found = retrieval.copies(model, planter.grid(lengths, 10, self.key, seed))
        if not found.counted:
            raise DataError(
                f"{type(model.hf).__name__} found none of the {found.asked} hidden keys again, so no head can be told "
                "to retrieve; use selector='gates', or a template of a sentence that it does repeat."
            )
        return found.of_kv_heads(counts)


def plateau(progress: float) -> float:
    """Rise over the first fifth, fall over the last, never below a tenth."""
    return max(0.1, min(1.0, 5 * progress, 5 * (1 - progress)))


class Passkeys(Sequence[tuple[list[int], list[int]]]):
    """Texts with passkeys, made when they are asked for: each a function of the seed and its number alone."""

    def __init__(self, planter: retrieval.Planter, length: int, count: int, key: int, seed: int, rows: int) -> None:
        self.planter, self.length, self.key, self.seed, self.rows = planter, length, key, seed, rows
        self.passkeys = count

    def __len__(self) -> int:
        return self.rows

    def __getitem__(self, index: Any) -> Any:
        return self.planter.passkeys(
            self.length, self.passkeys, self.key, np.random.default_rng((self.seed, int(index)))
        )


class Gates(nn.Module):
    """A gate for each KV head that may be made streaming: 1 is full attention, 0 is streaming. Always fp32."""

    def __init__(self, model: Model, counts: Sequence[int]) -> None:
        super().__init__()
        ones = {str(i): nn.Parameter(torch.ones(n, device=model.hf.device)) for i, n in enumerate(counts) if n}
        self.gates = nn.ParameterDict(ones)

    def flat(self) -> Tensor:
        """All gates in the order of layers, ``[n]``."""
        return torch.cat([self.gates[name] for name in sorted(self.gates, key=int)]).detach().cpu()

    def mean_size(self) -> Tensor:
        """The mean of their absolute values."""
        return torch.cat(list(self.gates.values())).abs().mean()


class Distill(training.Task[tuple[list[int], list[int]]]):
    """Makes gates small where streaming attention leaves the last hidden state of the answers as it is."""

    def __init__(self, model: Model, gates: Gates, sink: int, recent: int, reg: float) -> None:
        super().__init__(model.hf, gates)
        self.model, self.gates, self.sink, self.recent, self.reg = model, gates, sink, recent, reg
        self.full: dict[int, Tensor] | None = None
        self.teaching = True
        self.bias: Tensor | None = None
        tower = model.anatomy.language
        self.decoder: Any = model.hf.get_submodule(tower.decoder)
        self.modules = {
            part.index: model.hf.get_submodule(f"{part.path}.{part.attention.path}")
            for part in tower.blocks
            if part.attention is not None
        }

    def loss(self, rows: list[tuple[list[int], list[int]]]) -> Tensor:
        """Return the distance of hidden states on the answers, and the gates' size."""
        return self.distance(rows) + self.reg * self.gates.mean_size()

    def distance(self, rows: list[tuple[list[int], list[int]]]) -> Tensor:
        """Return the mean squared difference that streaming makes to the final hidden states of labelled tokens."""
        ids = torch.tensor([row for row, _ in rows], device=self.model.hf.device)
        labelled = torch.zeros_like(ids, dtype=torch.bool)
        for row, (_, places) in zip(labelled, rows, strict=True):
            row[places] = True
        self.full = {}
        try:
            with attention.seated(self, "language", self.modules):
                self.teaching = True
                with torch.no_grad():
                    taught = self.decoder(input_ids=ids, use_cache=False).last_hidden_state
                self.teaching = False
                learned = self.decoder(input_ids=ids, use_cache=False).last_hidden_state
        finally:
            self.full = None
        difference: Tensor = learned[labelled].float() - taught[labelled].float()
        return difference.pow(2).mean()

    @torch.no_grad()
    def found(self, rows: list[tuple[list[int], list[int]]]) -> float:
        """Return the share of labelled tokens after which the model, as it is, says the right next one."""
        hits = []
        for row, places in rows:
            ids = torch.tensor(row, device=self.model.hf.device)
            said = self.model.hf(input_ids=ids[None]).logits[0].argmax(-1)
            hits += [int(said[place]) == row[place + 1] for place in places if place + 1 < len(row)]
        return sum(hits) / max(1, len(hits))

    def project(self) -> None:
        """Keep the gates between 0 and 1."""
        for gate in self.gates.gates.values():
            gate.clamp_(0, 1)

    def attention(self, seat: Seat, call: Call) -> Tensor:
        """Return full attention to the teacher, gate * the teacher's + (1 - gate) * streaming to the learner."""
        assert self.full is not None
        if str(seat.layer) not in self.gates.gates:
            return call.plain()
        if self.teaching:
            full = self.full[seat.layer] = call.plain()
            return full
        streaming = compute(call, call.key, call.value, Visible(self._bias(call.query)))
        gate = self.gates.gates[str(seat.layer)].repeat_interleave(call.groups)[:, None]
        mixed: Tensor = gate * self.full.pop(seat.layer).float() + (1 - gate) * streaming.float()
        return mixed.to(streaming.dtype)

    def _bias(self, query: Tensor) -> Tensor:
        """Return what streaming heads add to their logits (eager attention takes no other mask): one for all layers."""
        length = query.shape[2]
        bias = self.bias
        if bias is None or bias.shape[-1] != length or bias.dtype != query.dtype or bias.device != query.device:
            at = torch.arange(length, device=query.device)
            hidden = ~kv.streaming_mask(at, at, self.sink, self.recent)
            bias = torch.zeros(hidden.shape, dtype=query.dtype, device=query.device)
            self.bias = bias = bias.masked_fill_(hidden, torch.finfo(bias.dtype).min)[None, None]
        return bias
