"""Read-ME: a dense model's MLPs cut into experts by domain, one small router in front of the model for all layers.

Source: "Read-ME: Refactorizing LLMs as Router-Decoupled Mixture of Experts with System Co-Design", 2024, arXiv
2410.19123; official code VITA-Group/READ-ME. Different here, on purpose:

- Exactly ``keep * d_ff`` channels an expert, ties to the lower index; the released code loses one, and more with ties.
- The router remembers its own keys and values, so reading at once, in chunks, turns or token by token gives the same
  experts; the released one decodes from uninitialised memory.
- Its target compares absolute activations, as the masks do; ``signed`` is the released form.
- A policy leaves the model as it is. The 200 backbone steps that the source alternates with 100 router steps are steps
  of a recipe, ``{method: healing, steps: 200, under: read-me}``: it prepares channels and router and trains the model
  with each token masked to its expert. Behind it the policy is prepared anew; with ``channels_of=first`` its experts
  are the same again (the source measures them once) and the router alone is new.
- (inferred) Where no domains are named, they are found: k-means over the rows' mean token embeddings.
- (inferred) The learning rate, which neither paper nor scripts tell.
"""

from __future__ import annotations

import math
from typing import Any, ClassVar, Literal

import torch
from pydantic import Field
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from paredown.core import checkpoint
from paredown.core.calibration import Batch
from paredown.core.checkpoint import Model
from paredown.core.experts import channels, domains
from paredown.core.experts.channels import ChannelExperts, Chosen
from paredown.core.experts.pregate import Imitate, Memory, Router, preferences
from paredown.core.learning import learned, training
from paredown.core.method import Place, Policy, Progress, register
from paredown.core.runtime import Pass
from paredown.errors import DataError, PolicyError

_FILE = "read-me.safetensors"
_MASKS, _ROUTER = "masks.", "router."


@register
class ReadMe(Policy):
    """Run each token through the MLP channels of one domain; a router that reads token ids alone names the domain.

    For each domain the channels that fire strongest on its texts form an expert, the same size in every layer. The
    router is a tiny causal transformer in front of the model: one decision a token, for all layers, known before the
    first of them runs. ``prepare`` measures the domains, learns the router from what the dense model does, and writes
    both to a file. Attention stays whole, and so does the model: weights of experts are copies.
    """

    name: ClassVar[str] = "read-me"
    title: ClassVar[str] = "Read-ME: Refactorizing LLMs as Router-Decoupled Mixture of Experts with System Co-Design"
    year: ClassVar[int | None] = 2024
    arxiv: ClassVar[str | None] = "2410.19123"
    axis: ClassVar = "experts"
    unit: ClassVar[str] = "channels a token"
    needs: ClassVar[tuple[str, ...]] = ("calibration-data", "training")
    places: ClassVar[frozenset[Place]] = frozenset({"channels"})

    experts: int = Field(7, ge=1, description="Domains to look for, where none are named; 1 routes nothing.")
    domains: tuple[str, ...] = Field((), description="A file, folder or data set for each domain; empty finds some.")
    rows: int = Field(64, ge=1, description="Rows of each named domain.")
    layers: int = Field(2, ge=1, description="Layers of the router.")
    width: int = Field(64, ge=4, description="Width of the router, at most the model's.")
    heads: int = Field(2, ge=1, description="Attention heads of the router.")
    channels_of: Literal["model", "first"] = Field(
        "model", description="Where channels are measured: this model, or the one that the recipe began with."
    )
    signed: bool = Field(False, description="Let the router's target compare signed activations, as released.")
    steps: int = Field(100, ge=0, description="Training steps of the router.")
    batch: int = Field(16, ge=1, description="Rows in a training step.")
    lr: float = Field(2e-3, gt=0, description="Learning rate of the router at the start; a cosine brings it to zero.")
    form: Literal["fused", "separate"] = Field(
        "fused",
        description="How experts are kept: each whole, or what all share once, which takes less memory and more time.",
    )
    weights: str | None = Field(None, description="File of channels and router; made by prepare.")

    def runtime(self, model: Model) -> ReadMeExperts:
        """Choose channels in all layers with a dense MLP."""
        masks, router = self.load(model)
        return ReadMeExperts(self, model, masks, router)

    def learning(self, model: Model) -> ReadMeExperts:
        """Mask the model's own MLPs, router frozen: the source's backbone steps."""
        masks, router = self.load(model)
        return ReadMeExperts(self, model, masks, router, live=True)

    def prepare(
        self,
        model: Model,
        data: Batch | None,
        *,
        seed: int = 0,
        folder: str | None = None,
        progress: Progress | None = None,
    ) -> ReadMe:
        """Return the policy with experts and a learned router. Weights that were given stay."""
        if self.inert or self.weights is not None:
            return self
        folder = learned.place(self.name, folder, what="channels and its router")
        measured, sizes = self._measured(model), channels.widths(model, self.keep)
        ids, mask, belongs = self._rows(measured, data, seed)
        count = int(belongs.max()) + 1
        if progress is not None:
            progress(0, self.steps, f"{self.name}: channels of {count} domains")
        means = channels.domain_means(measured, ids, mask, belongs, count)
        masks = {layer: channels.strongest(mean, sizes[layer][1]) for layer, mean in means.items()}
        router = self._router(model, count, seed)
        targets = self._targets(model, ids, mask, masks)
        if targets is not None:
            task = Imitate(router, ids, mask, targets)
            settings = training.Settings(steps=self.steps, lr=self.lr, batch=self.batch, schedule=cosine, seed=seed)
            rows, what = range(len(ids)), f"{self.name}'s router"
            learned.fit(task, rows, settings, folder=folder, progress=progress, what=what)
        held = {f"{_MASKS}{layer}": one.to(torch.uint8) for layer, one in masks.items()}
        held |= {f"{_ROUTER}{name}": tensor for name, tensor in router.state_dict().items()}
        return self.model_copy(update={"weights": learned.keep(held, folder, _FILE)})

    def _measured(self, model: Model) -> Model:
        """Return the model that says which channels belong to which domain."""
        if self.channels_of == "model" or model.original is None:
            return model
        like: dict[str, Any] = {"dtype": model.hf.dtype, "device": str(model.hf.device)}
        first = checkpoint.load(model.original, policies=False, **like)
        if channels.widths(first, self.keep) != channels.widths(model, self.keep):
            raise PolicyError(
                f"the MLPs of {first.source} are not those of this model any more, so its channels cannot be used; set "
                "channels_of=model."
            )
        return first

    def _rows(self, model: Model, data: Batch | None, seed: int) -> tuple[Tensor, Tensor | None, Tensor]:
        """Return rows of tokens, their mask, and the domain of each."""
        if self.domains:
            length = 512 if data is None else int(data.input_ids.shape[1])
            ids, belongs = domains.named(model, self.domains, length=length, rows=self.rows, seed=seed)
            return ids, None, belongs
        if data is None:
            raise DataError(f"{self.name} finds its domains in text; give it calibration data, or name domains.")
        return data.input_ids, data.attention_mask, domains.found(model, data, self.experts)

    def _router(self, model: Model, count: int, seed: int) -> Router:
        embedding: Any = model.hf.get_input_embeddings()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            made = Router(embedding.weight.detach(), count, width=self.width, layers=self.layers, heads=self.heads)
        return made.to(model.hf.device)

    def _targets(self, model: Model, ids: Tensor, mask: Tensor | None, masks: dict[int, Tensor]) -> Tensor | None:
        """Return what the layers would have the router say, ``[N, T, D]``; None if their experts are all the same."""
        own = {layer: channels.divided(one)[1].to(model.hf.device) for layer, one in masks.items()}
        told = [layer for layer, one in own.items() if bool(one.any())]
        if not told:
            return None
        targets = torch.zeros(*ids.shape, len(next(iter(masks.values()))))

        def look(rows: slice, layer: int, inner: Tensor) -> None:
            said = preferences(inner, own[layer], signed=self.signed)
            if said is not None:
                targets[rows] += said.cpu() / len(told)

        channels.read(model, ids, mask, look)
        return targets

    def load(self, model: Model) -> tuple[dict[int, Tensor], Router]:
        """Return the channels of each expert by layer, ``[D, d_ff]`` bool, and the router.

        Raises
        ------
        PolicyError
            If there are none yet, or they cannot be read, or belong to another model.
        """
        if self.weights is None:
            raise PolicyError(
                f"{self.name} has no experts for {type(model.hf).__name__} yet; call prepare with calibration data "
                "first."
            )
        try:
            held = load_file(self.weights)
            masks = {int(k.removeprefix(_MASKS)): v.bool() for k, v in held.items() if k.startswith(_MASKS)}
            count = len(next(iter(masks.values())))
        except (OSError, SafetensorError, ValueError, StopIteration) as error:
            raise PolicyError(
                f"{self.weights} holds no experts that can be read ({error}); prepare them again."
            ) from None
        router = self._router(model, count, 0)
        try:
            router.load_state_dict({k.removeprefix(_ROUTER): v for k, v in held.items() if k.startswith(_ROUTER)})
        except RuntimeError:
            raise PolicyError(
                f"the router in {self.weights} was learned for another model or with other fields; prepare it again."
            ) from None
        return masks, router.requires_grad_(False).eval()


def cosine(progress: float) -> float:
    """Fall from 1 to 0 along half a wave."""
    return 0.5 * (1 + math.cos(math.pi * progress))


class ReadMeExperts(ChannelExperts):
    """The channels of the domain that the router names."""

    policy: ReadMe

    def __init__(
        self, policy: ReadMe, model: Model, masks: dict[int, Tensor], router: Router, *, live: bool = False
    ) -> None:
        super().__init__(policy, model, masks, separate=policy.form == "separate", live=live)
        self.router = router

    def companion(self) -> Memory:
        return Memory(len(self.router.layers))

    def choose(self, ids: Tensor, now: Pass, held: Chosen) -> Tensor:
        """Ask the router; ties go to the lower index."""
        assert isinstance(held, Memory)
        real = None if now.padding is None else now.padding[:, now.past :]
        return self.decide(ids, real, held)

    @torch.no_grad()
    def decide(self, ids: Tensor, real: Tensor | None = None, held: Memory | None = None) -> Tensor:
        """Return the experts of tokens ``[B, n]``, which are the same before, between and after all passes."""
        logits: Tensor = self.router(ids, real, held)
        return logits.argmax(-1)
