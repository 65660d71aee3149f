"""One block at a time: token streams that pass block after block, whether the blocks are in memory or on disk.

- A :class:`Source` hands out blocks. :class:`Resident` has them in memory; :class:`OnDisk` reads each one when it is
  asked for and forgets it afterwards, so that one block is resident.
- A :class:`Stream` holds the hidden states of some sequences between two blocks, together with what the model's own
  forward hands to each block (masks, position embeddings). Those are caught once, by running the model with its
  blocks replaced by shims, so no family's forward is written here a second time.
"""

from __future__ import annotations

import contextlib
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.func import functional_call
from transformers import PreTrainedModel

from paredown.core.anatomy import Attention, Block, Tower
from paredown.core.checkpoint import Model, Skeleton, below
from paredown.core.method import View
from paredown.core.statistics import Observer, observing


class Source(Protocol):
    """Where blocks come from."""

    model: Model
    device: str

    def open(self, index: int) -> View:
        """Make block ``index`` ready to run."""

    def close(self, index: int) -> None:
        """Say that block ``index`` is not needed for now."""

    def open_ends(self, *, head: bool) -> contextlib.AbstractContextManager[None]:
        """Make what lies around the blocks ready: embedding and norms, or norms and head."""


class Resident:
    """Blocks of a model in memory."""

    def __init__(self, model: Model) -> None:
        self.model = model
        self.device = str(next(model.hf.parameters()).device)

    def open(self, index: int) -> View:
        """Return the block; it is always ready."""
        return _view(self.model, index)

    def close(self, index: int) -> None:
        """Nothing to do."""

    @contextlib.contextmanager
    def open_ends(self, *, head: bool) -> Iterator[None]:
        """Nothing to do."""
        yield


class OnDisk:
    """Blocks read from a checkpoint's files when they are needed, one resident at a time."""

    def __init__(self, skeleton: Skeleton, *, device: str = "cpu") -> None:
        self.skeleton = skeleton
        self.model = skeleton.model
        self.device = device

    def open(self, index: int) -> View:
        """Read the block's weights."""
        self.skeleton.fill((self.model.anatomy.language.blocks[index].path,), device=self.device)
        return _view(self.model, index)

    def close(self, index: int) -> None:
        """Forget the block's weights."""
        self.skeleton.empty(self.model.anatomy.language.blocks[index].path)

    @contextlib.contextmanager
    def open_ends(self, *, head: bool) -> Iterator[None]:
        """Read what lies around the blocks; the larger of embedding and head stays on disk if it is not needed."""
        tower = self.model.anatomy.language
        left_out = [block.path for block in tower.blocks]
        ends = tuple(p for p in (tower.embedding, tower.head) if p)
        ties = getattr(self.model.hf, "all_tied_weights_keys", None) or {}
        if not any(below(name, ends) for name in ties):
            left_out += [p for p in (tower.embedding if head else tower.head,) if p]
        self.skeleton.fill(("",), without=tuple(left_out), device=self.device)
        try:
            yield
        finally:
            for path in (tower.embedding, tower.head):
                if path:
                    self.skeleton.empty(path)


@dataclass
class Call:
    """What the model hands to one block besides the hidden states."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]


class Stream:
    """Sequences on their way through the blocks.

    Parameters
    ----------
    name : for journals and messages
    ids : tokens ``[N, T]``
    mask : real tokens ``[N, T]``, or None when all are real
    batch_size : sequences run together
    lookback : how many earlier block inputs to hold
    """

    def __init__(
        self, name: str, ids: Tensor, mask: Tensor | None = None, *, batch_size: int = 8, lookback: int = 0
    ) -> None:
        self.name = name
        self.ids = torch.split(ids, batch_size)
        self.masks = torch.split(mask, batch_size) if mask is not None else (None,) * len(self.ids)
        self.hidden: list[Tensor] = []
        self.calls: list[list[Call]] = []
        self.past: list[deque[Tensor]] = [deque(maxlen=lookback) for _ in self.ids]

    @property
    def tokens(self) -> int:
        """Number of tokens, padding included."""
        return sum(ids.numel() for ids in self.ids)

    @torch.no_grad()
    def start(self, source: Source, *, embeddings: Callable[[Tensor], Tensor] | None = None) -> None:
        """Embed the tokens and catch what each block is handed. Needs the source's ends (without head) open.

        ``embeddings`` takes the place of the model's own embedding: ids ``[B, T]`` to hidden states ``[B, T, H]``.
        """
        for ids, mask in zip(self.ids, self.masks, strict=True):
            hidden, calls = catch(source, ids, mask, None if embeddings is None else embeddings(ids))
            self.hidden.append(hidden)
            self.calls.append(calls)

    @torch.no_grad()
    def advance(
        self,
        view: View | None,
        observers: Sequence[Observer] = (),
        *,
        index: int,
        discard: bool = False,
        replay: AttentionMemory | None = None,
    ) -> None:
        """Run every batch through one block.

        Parameters
        ----------
        view : the block; None where it was dropped, and the stream stays as it is
        observers : attached while the batches pass
        index : the block's number in the numbering of the source
        discard : look only; the stream stays before the block
        replay : remembers attention outputs in the first pass and gives them back in the second
        """
        if view is None:
            return
        with observing(view, observers):
            for b, hidden in enumerate(self.hidden):
                if self.past[b].maxlen:
                    self.past[b].append(hidden)
                past = self.past[b] if len(self.past[b]) == (self.past[b].maxlen or -1) else ()
                mask = self.masks[b]
                for observer in observers:
                    observer.begin(mask.to(hidden.device) if mask is not None else None, tuple(past))
                call = self.calls[b][index]
                with replay.batch(b) if replay is not None else contextlib.nullcontext():
                    output = view.module(hidden, *call.args, **call.kwargs)
                if not discard:
                    self.hidden[b] = output[0] if isinstance(output, tuple) else output

    @torch.no_grad()
    def logits(self, source: Source, rows: int) -> Iterator[Tensor]:
        """Yield logits ``[rows, T, V]``, ``rows`` sequences at a time. Needs the source's ends (with head) open."""
        for start in range(0, sum(map(len, self.hidden)), rows):
            mask = _rows(self.masks, start, rows) if self.masks[0] is not None else None
            yield finish(source, _rows(self.hidden, start, rows), mask)

    def forget(self) -> None:
        """Let go of the hidden states: nobody will ask for them again."""
        self.hidden.clear()
        self.calls.clear()
        for past in self.past:
            past.clear()

    def state(self) -> dict[str, Tensor]:
        """Everything that changes from block to block, for the journal."""
        found = {f"{self.name}.{b}": h for b, h in enumerate(self.hidden)}
        for b, past in enumerate(self.past):
            found |= {f"{self.name}.{b}.past.{i}": h for i, h in enumerate(past)}
        return {k: v.detach().cpu().contiguous() for k, v in found.items()}

    def restore(self, state: dict[str, Tensor], device: str) -> None:
        """Put a journal's state back."""
        for b in range(len(self.ids)):
            self.hidden[b] = state[f"{self.name}.{b}"].to(device)
            i = 0
            self.past[b].clear()
            while (key := f"{self.name}.{b}.past.{i}") in state:
                self.past[b].append(state[key].to(device))
                i += 1


def _rows(batches: Sequence[Tensor | None], start: int, count: int) -> Tensor:
    """Return some rows of tensors that follow one another, without joining all of them."""
    found, first = [], 0
    for batch in batches:
        assert batch is not None
        found.append(batch[max(0, start - first) : max(0, start + count - first)])
        first += len(batch)
    return torch.cat(found)


class AttentionMemory:
    """Remembers what a block's attention returned for each batch, so that a second pass need not compute it again.

    Only for edits that leave the attention and what precedes it alone.
    """

    def __init__(self, view: View) -> None:
        part: Attention | None = view.part.attention
        self.module: nn.Module | None = view.child(part.path) if part is not None else None
        self.outputs: dict[int, Any] = {}

    @contextlib.contextmanager
    def batch(self, number: int) -> Iterator[None]:
        """Record the batch's attention output, or play it back if it is known."""
        if self.module is None:
            yield
            return
        if number in self.outputs:
            known = self.outputs.pop(number)
            self.module.forward = lambda *_, **__: known
            try:
                yield
            finally:
                del self.module.forward
            return

        def keep(_: nn.Module, __: Any, output: Any) -> None:
            self.outputs[number] = output

        handle = self.module.register_forward_hook(keep)
        try:
            yield
        finally:
            handle.remove()


def blocks_of(hf: PreTrainedModel, tower: Tower) -> nn.ModuleList:
    """Return the module list that holds a tower's blocks."""
    layers = hf.get_submodule(tower.layers)
    assert isinstance(layers, nn.ModuleList)
    return layers


def layer_config(config: Any, tower: Tower, index: int) -> Any:
    """Return the config of one block of a tower."""
    for name in filter(None, tower.config_path.split(".")):
        config = getattr(config, name)
    return config.per_layer_config[index] if getattr(config, "is_heterogeneous", False) else config


def _view(model: Model, index: int) -> View:
    tower = model.anatomy.language
    part: Block = tower.blocks[index]
    return View(model.hf.get_submodule(part.path), part, layer_config(model.config, tower, index))


class _Shim(nn.Module):
    """Stands in for a block: notes what it is handed and passes the hidden states on (or puts others in)."""

    def __init__(self, block: nn.Module, put: Tensor | None = None) -> None:
        super().__init__()
        # Not a registered child: the block's own weights may lie on the meta device.
        object.__setattr__(self, "_block", block)
        self.put = put
        self.seen: tuple[Tensor, Call] | None = None

    def __getattr__(self, name: str) -> Any:
        # Model forwards ask blocks for attributes such as attention_type.
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(object.__getattribute__(self, "_block"), name)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        if args:
            hidden, rest = args[0], args[1:]
        else:
            hidden, rest = kwargs.pop("hidden_states"), ()
        for cache in ("past_key_values", "layer_past"):
            kwargs.pop(cache, None)
        kwargs["use_cache"] = False
        self.seen = (hidden, Call(rest, kwargs))
        return hidden if self.put is None else self.put


@contextlib.contextmanager
def _shimmed(hf: PreTrainedModel, tower: Tower, put: Tensor | None = None) -> Iterator[list[_Shim]]:
    layers = blocks_of(hf, tower)
    blocks = list(layers)
    shims = [_Shim(block, put) for block in blocks]
    try:
        for i, shim in enumerate(shims):
            layers[i] = shim
        yield shims
    finally:
        for i, block in enumerate(blocks):
            layers[i] = block


def catch(
    source: Source, ids: Tensor, mask: Tensor | None, embedded: Tensor | None = None
) -> tuple[Tensor, list[Call]]:
    """Return what enters the first block, and what each block is handed beside it. Needs the source's ends open."""
    tower = source.model.anatomy.language
    decoder = source.model.hf.get_submodule(tower.decoder)
    with _shimmed(source.model.hf, tower) as shims:
        arguments = {"input_ids": ids.to(source.device)} if embedded is None else {"inputs_embeds": embedded}
        if mask is not None:
            arguments["attention_mask"] = mask.to(source.device)
        decoder(**arguments, **_no_cache(decoder))
        first = shims[0].seen
        assert first is not None
        return first[0], [shim.seen[1] for shim in shims if shim.seen is not None]


def finish(source: Source, hidden: Tensor, mask: Tensor | None) -> Tensor:
    """Run what follows the blocks, by letting the model run with every block giving back ``hidden``.

    Hidden states of a higher precision than the weights are computed with in theirs. Needs the source's ends open,
    with the head.
    """
    hf, tower = source.model.hf, source.model.anatomy.language
    with _shimmed(hf, tower, put=hidden):
        arguments: dict[str, Any] = {"inputs_embeds": hidden}
        if mask is not None:
            arguments["attention_mask"] = mask.to(source.device)
        arguments |= _no_cache(hf)
        raised = {} if hidden.dtype == hf.dtype else _raised(hf, tower, hidden.dtype)
        output: Any = functional_call(hf, raised, (), arguments) if raised else hf(**arguments)
    assert isinstance(output.logits, Tensor)
    return output.logits


def _raised(hf: PreTrainedModel, tower: Tower, dtype: torch.dtype) -> dict[str, Tensor]:
    """Return the weights that follow the blocks in another precision: final norm, head, and what stands by them."""
    heads = tuple(path for path in (tower.head, tower.final_norm) if path)
    beside = f"{tower.decoder}." if tower.decoder else ""
    found = {}
    for name, parameter in hf.named_parameters():
        owner = name.rpartition(".")[0]
        after = owner in heads or (name.startswith(beside) and owner != tower.embedding)
        if after and parameter.is_floating_point() and not parameter.is_meta:
            found[name] = parameter.to(dtype)
    tied = getattr(hf, "all_tied_weights_keys", None) or {}
    for target, origin in tied.items():
        if target.rpartition(".")[0] in heads and not hf.get_parameter(origin).is_meta:
            found[origin] = hf.get_parameter(origin).to(dtype)
    return found


def _no_cache(module: nn.Module) -> dict[str, bool]:
    return {"use_cache": False} if hasattr(getattr(module, "config", None), "use_cache") else {}
