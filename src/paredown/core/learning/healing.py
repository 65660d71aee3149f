"""Heal a model after surgery: train all or part of its weights, or adapters that are merged, for a few steps.

- The loss is any weighted sum of the next-token loss, the divergence from a teacher and the distance of the last
  hidden states to a teacher's. Padding never counts.
- What is trained are fp32 **master weights**: a model in bf16 or fp16 is widened as a whole while it trains and rounded
  back once at the end, for steps of 1e-4 vanish when they are added to bf16. With adapters the model stays in its
  dtype and the adapters alone are fp32.
- Weights that several places share are one tensor, trained once and saved once.
- The base stays in evaluation mode: there is no dropout in healing, and no auxiliary loss of a router.
- Same model, rows and seed give the same weights bit for bit, also when the run was killed and resumed from its folder.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.util
import json
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from paredown.core import audit, forward
from paredown.core.blocks import is_norm, resolve
from paredown.core.calibration import Batch
from paredown.core.checkpoint import Model, below
from paredown.core.learning import training
from paredown.core.learning.objective import text_loss
from paredown.core.learning.teacher import Teacher
from paredown.core.learning.training import Fitted, Settings
from paredown.core.method import Progress
from paredown.errors import ArchitectureError, UsageError

Trainable = Literal["all", "blocks", "norms"] | Sequence[int] | Callable[[str], bool]
"""Which weights: all of the language tower with its ends, its blocks, its norms, blocks by number, or names chosen."""
_ADAPTER = "healing"
_PRUNED = 0.01
"""Share of exact zeros from which a matrix counts as pruned; trained weights are hardly ever exactly zero."""


def heal(
    model: Model,
    data: Batch,
    *,
    steps: int,
    lr: float = 1e-4,
    lm: float = 1.0,
    teacher: Teacher | None = None,
    distil: float = 0.0,
    states: Tensor | None = None,
    hidden: float = 0.0,
    trainable: Trainable = "all",
    adapter_rank: int = 0,
    keep_zeros: bool = False,
    batch: int = 4,
    accumulate: int = 1,
    schedule: Callable[[float], float] = training.linear,
    decay: float = 0.0,
    clip: float = 1.0,
    seed: int = 0,
    folder: Path | None = None,
    save_every: int = 100,
    progress: Progress | None = None,
    what: str = "healing",
) -> Fitted:
    """Train ``model`` in place and leave it in evaluation mode, in its own dtypes, with ``requires_grad`` as it was.

    Parameters
    ----------
    data : rows ``[N, T]``; each comes once before any comes twice
    steps, lr, batch, accumulate, schedule, decay, clip, seed, save_every : see `training.Settings`; 0 steps do nothing
    lm : weight of the next-token loss, the mean over real predictions of a batch
    teacher : knows the rows of ``data``, in their order
    distil : weight of KL(teacher || model), likewise a mean
    states : the teacher's `last_hidden` for the rows, ``[N, T, H]``
    hidden : weight of the mean squared distance to them, over real tokens
    trainable : what is trained, see `parameters`
    adapter_rank : train LoRA adapters of this rank (scale 1) on the linear layers of the blocks instead, and add them
        to the weights at the end; 0 trains the weights themselves
    keep_zeros : entries of matrices that are exactly zero stay so, where an earlier step pruned at least 1 %
    folder : where checkpoints go and a killed run goes on; None writes nothing
    what : what ``progress`` texts begin with

    Raises
    ------
    UsageError
        If the losses lack their teacher, nothing is to be trained, peft is missing, or a loss is not a number.
    ArchitectureError
        If the model predicts no next token.
    OutputError
        If the folder belongs to another run.
    """
    _check(model, data, lm, teacher, distil, states, hidden)
    if steps <= 0:
        return Fitted(())
    settings = Settings(
        steps=steps, lr=lr, batch=batch, accumulate=accumulate, schedule=schedule, decay=decay, clip=clip, seed=seed,
        save_every=save_every,
    )  # fmt: skip
    hf = model.hf
    kept = [(parameter, parameter.requires_grad) for parameter in hf.parameters()]
    start = digest(hf) if folder is not None else ""
    wide = contextlib.nullcontext() if adapter_rank else widened(model)
    try:
        with wide, _chosen(model, trainable, adapter_rank, keep_zeros, seed) as learned:
            task = _Healing(model, learned, data, lm, teacher, distil, states, hidden, start)
            if keep_zeros and not adapter_rank:
                task.remember_zeros()
            return training.fit(task, range(len(data)), settings, folder=folder, progress=progress, what=what)
    finally:
        for parameter, wanted in kept:
            parameter.requires_grad_(wanted)
            parameter.grad = None
        hf.eval()


def parameters(model: Model, trainable: Trainable) -> dict[str, nn.Parameter]:
    """Return what would be trained, by name; each shared tensor once, under its first name.

    ``all`` are the weights of the language tower, its embedding, final norm and head; a vision tower and a projector
    stay as they are. A tensor that one chosen and one other place share is trained.

    Raises
    ------
    UsageError
        If there is no such block, or nothing is left.
    """
    wanted = _wanted(model, trainable)
    found: dict[int, tuple[str, nn.Parameter]] = {}
    for name, parameter in model.hf.named_parameters(remove_duplicate=False):
        if wanted(name) and parameter.is_floating_point():
            found.setdefault(id(parameter), (name, parameter))
    if not found:
        raise UsageError(f"{model.source} has no weights of the kind that is to be trained; choose other ones.")
    return dict(found.values())


def held(chosen: dict[str, nn.Parameter]) -> nn.ParameterDict:
    """Return a module that holds parameters under their names, for `training.Task`."""
    # Names of parameters must hold no dot.
    return nn.ParameterDict({name.replace(".", "/"): parameter for name, parameter in chosen.items()})


@torch.no_grad()
def last_hidden(model: Model, data: Batch, *, batch: int = 4) -> Tensor:
    """Return what the head reads, ``[N, T, H]`` on the CPU in the model's dtype: a teacher's last hidden states."""
    found = []
    for ids, mask in forward.batches(data, batch):
        with _listening(model) as seen:
            forward.logits(model.hf, ids, mask)
        found.append(seen[-1].cpu())
    return torch.cat(found)


class _Healing(training.Task[int]):
    """Rows are numbers of rows; losses are means over what is real in a batch."""

    def __init__(
        self,
        model: Model,
        learned: nn.Module,
        data: Batch,
        lm: float,
        teacher: Teacher | None,
        distil: float,
        states: Tensor | None,
        hidden: float,
        start: str,
    ) -> None:
        super().__init__(model.hf, learned)
        self.model, self.data, self.start = model, data, start
        self.lm, self.teacher, self.distil, self.states, self.hidden = lm, teacher, distil, states, hidden
        self.zeros: list[tuple[nn.Parameter, Tensor]] = []

    def about(self) -> dict[str, Any]:
        """Return what the losses and the model at the start were."""
        mask = self.data.attention_mask
        real = "" if mask is None else hashlib.sha256(mask.numpy().tobytes()).hexdigest()
        losses = [self.lm, self.distil, self.hidden, getattr(self.teacher, "top", None)]
        return {"start": self.start, "data": self.data.fingerprint, "mask": real, "losses": losses}

    def loss(self, rows: list[int]) -> Tensor:
        """Return the weighted sum of the losses that have a weight."""
        some = self.data.take(rows)
        mask = some.attention_mask
        with _listening(self.model, wanted=bool(self.hidden)) as seen:
            logits = forward.logits(self.model.hf, some.input_ids, mask)
        total = text_loss(logits, some, rows, lm=self.lm, teacher=self.teacher, distil=self.distil)
        if self.hidden and self.states is not None:
            taught = self.states[rows].to(logits.device).float()
            apart = (seen[-1].float() - taught).pow(2).mean(-1)
            counted = torch.ones_like(apart) if mask is None else mask.to(apart)
            total = total + self.hidden * (apart * counted).sum() / counted.sum().clamp_min(1)
        return total

    def remember_zeros(self) -> None:
        """Note which entries were pruned."""
        self.zeros = [(p, p == 0) for p in self.learned.parameters() if _is_pruned(p)]

    def project(self) -> None:
        """Keep what was pruned at zero."""
        for parameter, gone in self.zeros:
            parameter.masked_fill_(gone, 0)


def _is_pruned(parameter: Tensor) -> bool:
    return parameter.dim() > 1 and int((parameter == 0).sum()) >= _PRUNED * parameter.numel()


def _check(
    model: Model, data: Batch, lm: float, teacher: Teacher | None, distil: float, states: Tensor | None, hidden: float
) -> None:
    if model.anatomy.language.head is None or not model.hf.can_generate():
        raise ArchitectureError(
            f"healing trains the prediction of the next token, which {type(model.hf).__name__} does not make; give a "
            "causal language model."
        )
    if not (lm or distil or hidden):
        raise UsageError("healing needs a loss: give lm, distil or hidden a weight above 0.")
    if data.input_ids.shape[1] < 2:
        raise UsageError("healing needs rows of two tokens or more; give longer ones.")
    for weight, known, word in ((distil, teacher, "distil"), (hidden, states, "hidden")):
        if weight and known is None:
            raise UsageError(f"{word} needs what a teacher says about the rows; collect it, or set {word}=0.")
        if known is not None and len(known) != len(data):
            raise UsageError(f"the teacher knows {len(known)} rows and there are {len(data)}; collect it on these.")


def _wanted(model: Model, trainable: Trainable) -> Callable[[str], bool]:
    anatomy, tower = model.anatomy, model.anatomy.language
    if callable(trainable):
        return trainable
    if trainable == "all":
        beside = tuple(p for p in (anatomy.projector, anatomy.vision.decoder if anatomy.vision else None) if p)
        inside = (tower.decoder, *(p for p in (tower.embedding, tower.head) if p))
        return lambda name: below(name, inside) and not below(name, beside)
    if trainable == "blocks":
        paths = tuple(block.path for block in tower.blocks)
    elif trainable == "norms":
        inside = tuple(p for p in (tower.layers, tower.final_norm) if p)
        paths = tuple(n for n, m in model.hf.named_modules() if is_norm(m) and below(n, inside))
    else:
        assert not isinstance(trainable, str)
        numbers = {block.index: block.path for block in tower.blocks}
        if missing := [str(i) for i in trainable if i not in numbers]:
            listed = ", ".join(missing)
            raise UsageError(f"{model.source} has {len(numbers)} blocks and no block {listed}; name others to train.")
        paths = tuple(numbers[i] for i in trainable)
    return lambda name: below(name, paths)


@contextmanager
def widened(model: Model) -> Iterator[None]:
    """Hold all weights and buffers of 16 bits in fp32; round them back at the end, the untouched ones exactly."""
    narrow = (torch.bfloat16, torch.float16)
    tensors = [*model.hf.parameters(), *model.hf.buffers()]
    before = [(tensor, tensor.dtype) for tensor in tensors if tensor.dtype in narrow]
    try:
        for tensor, _ in before:
            tensor.data = tensor.data.float()
        yield
    finally:
        for tensor, dtype in before:
            tensor.data = tensor.data.to(dtype)


@contextmanager
def _chosen(model: Model, trainable: Trainable, rank: int, keep_zeros: bool, seed: int) -> Iterator[nn.ParameterDict]:
    """Give what is trained: the weights that were chosen, or adapters beside them."""
    if not rank:
        yield held(parameters(model, trainable))
        return
    with _adapted(model, trainable, rank, keep_zeros, seed) as learned:
        yield learned


@contextmanager
def _adapted(model: Model, trainable: Trainable, rank: int, keep_zeros: bool, seed: int) -> Iterator[nn.ParameterDict]:
    """Put adapters on the linear layers whose weights are chosen; on leaving without a fault they are merged."""
    if importlib.util.find_spec("peft") is None:
        raise UsageError("healing with adapters needs peft; pip install 'paredown[heal]', or set adapter_rank=0.")
    from peft import LoraConfig, inject_adapter_in_model

    blocks = tuple(block.path for block in model.anatomy.language.blocks)
    chosen = {id(parameter) for parameter in parameters(model, trainable).values()}
    linears = {
        name: module
        for name, module in model.hf.named_modules()
        if isinstance(module, nn.Linear) and below(name, blocks) and id(module.weight) in chosen
    }
    if not linears:
        raise UsageError(f"{model.source} has no linear layers there for adapters to sit on; set adapter_rank=0.")
    if keep_zeros and (pruned := next((name for name, linear in linears.items() if _is_pruned(linear.weight)), None)):
        raise UsageError(f"adapters would fill the zeros of {pruned}; set adapter_rank=0, or keep_zeros=false.")
    # One expression and not a list, which would also match longer paths that end alike.
    targets = "|".join(map(re.escape, linears))
    config = LoraConfig(r=rank, lora_alpha=rank, target_modules=targets, lora_dropout=0.0, bias="none")
    places = [
        (owner, name, child)
        for owner in list(model.hf.modules())
        for name, child in owner.named_children()
        if any(child is linear for linear in linears.values())
    ]
    try:
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            inject_adapter_in_model(config, model.hf, adapter_name=_ADAPTER)
        adapters = {name: resolve(model.hf, name) for name in linears}
        _share(places, adapters, linears)
        learned: dict[int, tuple[str, nn.Parameter]] = {}
        for name, adapter in adapters.items():
            for part in ("lora_A", "lora_B"):
                weight: Any = getattr(adapter, part)[_ADAPTER].weight
                weight.data = weight.data.float()
                learned.setdefault(id(weight), (f"{name}.{part}", weight))
        yield held(dict(learned.values()))
        _merge(adapters, linears)
    finally:
        for owner, name, child in places:
            setattr(owner, name, child)
        # What peft notes down on a model that it was let into.
        vars(model.hf).pop("peft_config", None)


def _share(
    places: Sequence[tuple[nn.Module, str, nn.Module]], adapters: dict[str, nn.Module], linears: dict[str, nn.Linear]
) -> None:
    """Where one weight serves several places, let one adapter serve them too."""
    first: dict[int, Any] = {}
    for name, linear in linears.items():
        adapter: Any = adapters[name]
        known = first.setdefault(id(linear.weight), adapter)
        adapter.lora_A, adapter.lora_B = known.lora_A, known.lora_B
    by_linear = {id(linear): adapters[name] for name, linear in linears.items()}
    for owner, name, child in places:
        setattr(owner, name, by_linear[id(child)])


@torch.no_grad()
def _merge(adapters: dict[str, nn.Module], linears: dict[str, nn.Linear]) -> None:
    done: set[int] = set()
    for name, adapter in adapters.items():
        weight = linears[name].weight
        if id(weight) not in done:
            done.add(id(weight))
            added: Any = adapter.get_delta_weight(_ADAPTER)  # type: ignore[operator]
            weight.copy_((weight.float() + added.float()).to(weight.dtype))


@contextmanager
def _listening(model: Model, *, wanted: bool = True) -> Iterator[list[Tensor]]:
    """Note what the head reads."""
    seen: list[Tensor] = []
    if not wanted:
        yield seen
        return
    assert model.anatomy.language.head is not None
    head = resolve(model.hf, model.anatomy.language.head)
    handle = head.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    try:
        yield seen
    finally:
        handle.remove()


def digest(hf: nn.Module) -> str:
    """Return a checksum of all weights, to tell one model from another."""
    return hashlib.sha256(json.dumps(audit.digests(hf), sort_keys=True).encode()).hexdigest()
