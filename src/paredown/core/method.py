"""What a method is: a frozen pydantic model whose fields are its hyper-parameters.

- Five kinds, by when they act; :class:`Compressor`, :class:`Policy`, :class:`TrainingMethod` and :class:`Probe` are
  written so far.
- Registering is one decorator, :func:`register`; README table, docs, command line and test matrix follow from it.
- Class attributes say what the catalogue needs to know; the first paragraph of the docstring is its summary.
- Importing this module imports no torch, so that methods can be listed in an instant.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field

from paredown.core.edits import Edit
from paredown.errors import PolicyError

if TYPE_CHECKING:
    import torch
    from torch import nn
    from transformers import PreTrainedConfig, PreTrainedModel, TrainerCallback

    from paredown.core.anatomy import Block
    from paredown.core.attach import Attachment
    from paredown.core.calibration import Batch
    from paredown.core.checkpoint import Model
    from paredown.core.runtime import Runtime
    from paredown.core.session import Session
    from paredown.core.statistics import Observer

Scores = Mapping[str, "torch.Tensor"]
AGAIN = "again."
"""Prefix of scores of a second look, behind compressed layers."""
Axis = Literal[
    "experts", "depth", "width", "weights", "bits", "cache", "vision", "context", "training", "architecture", "analysis"
]
Kind = Literal["compressor", "policy", "training", "selector", "probe"]
Progress = Callable[[int, int, str], None]
Place = Literal[
    "vision tower",
    "visual prompt",
    "visual stream",
    "token stream",
    "heads",
    "keys",
    "values",
    "slots",
    "reads",
    "channels",
    "routers",
]
P = TypeVar("P", bound="Policy")


class Method(BaseModel):
    """Base of all methods. Subclasses set the class attributes and declare their hyper-parameters as fields.

    Attributes
    ----------
    name : name on the command line, in recipes and in tables
    title, year, arxiv : the source; ``arxiv`` is None for what has no paper (controls)
    axis : what is made smaller
    kind : when the method acts
    unit : what is removed, in the plural ("experts", "attention sub-layers")
    needs : what must be given: "calibration-data", "training"
    control : True for a baseline that others are compared with
    """

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    name: ClassVar[str]
    title: ClassVar[str]
    year: ClassVar[int | None] = None
    arxiv: ClassVar[str | None] = None
    axis: ClassVar[Axis]
    kind: ClassVar[Kind]
    unit: ClassVar[str]
    needs: ClassVar[tuple[str, ...]] = ()
    control: ClassVar[bool] = False


@dataclass(frozen=True)
class View:
    """One block as methods see it: the module in memory, its anatomy, and the config that it was built from."""

    module: nn.Module
    part: Block
    config: PreTrainedConfig

    def child(self, path: str) -> Any:
        """Return the submodule at ``path``, relative to the block."""
        return self.module.get_submodule(path)


@dataclass
class Outcome:
    """What a compressor did: decisions unit by unit, and what it cost to reach them.

    ``coverage`` tells what the calibration data reached (for experts: tokens seen, layer by layer);
    ``touched_share`` is the share of all parameters that were removed or changed.
    """

    edits: list[Edit]
    touched_share: float
    coverage: dict[str, Any] = field(default_factory=dict)
    warnings: list[str] = field(default_factory=list)
    seconds_by_stage: dict[str, float] = field(default_factory=dict)
    peak_memory_bytes: int = 0


class Compressor(Method):
    """A method that acts on weights: observe -> score -> decide -> rewrite -> surgery, one block at a time.

    A subclass writes ``score`` and ``decide``; the engine in ``core.compression`` does the rest, in memory or from
    disk. ``scope`` says whether a layer's decision needs that layer's scores alone; ``propagate`` says whether later
    layers are observed behind the dense or behind the already compressed earlier ones. Where all layers are decided
    together and later ones shall be observed behind compressed ones, each is looked at twice: densely for
    :meth:`decide`, and again before it is cut; what is scored then has the prefix `AGAIN`. ``ranked`` names the score,
    one number a unit, of which :meth:`decide` keeps the largest; None where it is not as simple as that.
    """

    kind: ClassVar[Kind] = "compressor"
    scope: ClassVar[Literal["layer", "global", "model"]] = "layer"
    propagate: ClassVar[Literal["dense", "edited"]] = "dense"
    ranked: ClassVar[str | None] = None

    keep: float = Field(0.5, gt=0, le=1, description="Share of the units that stay; 1 changes nothing.")

    @property
    def replays(self) -> bool:
        """Whether a block's attention stays as it is, so that what it puts out need not be computed a second time."""
        return True

    def applies(self, part: Block) -> bool:
        """Whether the block has what this method removes."""
        raise NotImplementedError

    def observe(self, view: View) -> list[Observer]:
        """Return what to measure while calibration data pass the block; nothing for data-free methods."""
        return []

    def score(self, view: View, seen: Scores, seed: int) -> dict[str, torch.Tensor]:
        """Turn measurements and weights into scores: small CPU tensors that the journal keeps.

        A score must be a function of its arguments alone, so that an interrupted run goes on with the same numbers.
        What is too large to be kept has a name that begins with an underscore: it lives until the layer is cut.
        """
        raise NotImplementedError

    def decide(self, blocks: Sequence[Block], scores: Mapping[int, Scores]) -> list[Edit]:
        """Turn scores into edits, within the budget, exactly. ``scores`` is keyed by layer."""
        raise NotImplementedError

    def refine(self, view: View, edits: Sequence[Edit], scores: Scores) -> list[Edit]:
        """Settle what only a layer's weights can tell, once its budget stands: which unit of a group is kept, say.

        How many units stay must not change.
        """
        return list(edits)

    def rewrite(self, view: View, edits: Sequence[Edit], scores: Scores) -> str | None:
        """Change weights that stay, before surgery removes the others. Most methods have nothing to do here.

        Returns
        -------
        What the user should be warned of in this layer, without naming the layer; None if there is nothing.
        """
        return None

    def placeholder(self, part: Block) -> dict[str, torch.Tensor]:
        """Scores of the right shapes for a plan: which units go does not matter then, only how many."""
        raise NotImplementedError

    def compress(self, model: Model, data: Batch | None, *, seed: int = 0, progress: Progress | None = None) -> Outcome:
        """Compress ``model`` in place, in memory.

        Parameters
        ----------
        model : changed in place: weights, config and anatomy
        data : calibration tokens ``[N, T]``; None for methods that look at weights only
        seed : fixes whatever the method draws
        progress : called as ``progress(done, total, text)``

        Raises
        ------
        ArchitectureError
            If no block has what the method removes.
        BudgetError
            If ``keep`` cannot be met.
        """
        from paredown.core import compression

        return compression.compress_in_memory(self, model, data, seed=seed, progress=progress)


class WholeModelCompressor(Compressor):
    """A compressor that needs the whole model in memory, running: because it searches, trains, or ties layers.

    A subclass writes ``transform`` and ``foretell``; none of the hooks of the block-wise engine are asked.
    """

    scope: ClassVar[Literal["layer", "global", "model"]] = "model"
    trains_always: ClassVar[bool] = False
    """Whether ``keep=1`` still changes weights (a step that only trains); else it leaves everything as it is."""

    @property
    def inert(self) -> bool:
        """Whether the method would change nothing."""
        return self.keep == 1 and not self.trains_always

    @property
    def sizes_vary(self) -> bool:
        """Whether equal budgets may lead to unequal sizes: what goes depends on the data, and units differ in size."""
        return False

    def applies(self, part: Block) -> bool:
        """Whether the block has what this method acts on; by default every block has."""
        return True

    def transform(self, model: Model, data: Batch | None, session: Session) -> list[Edit]:
        """Change ``model`` in place (through `core.surgery` and training) and return what was done, layer by layer.

        ``layer`` in the edits counts in the numbering before this step; ``model.anatomy`` and the config must be those
        of the changed model on return. With ``keep=1`` and nothing to train, nothing may be touched.

        Parameters
        ----------
        data : calibration tokens ``[N, T]``; None only if ``needs`` does not name them
        session : seed, place for checkpoints, progress, the model that the recipe began with
        """
        raise NotImplementedError

    def foretell(self, blocks: Sequence[Block]) -> list[Edit]:
        """Return edits of the sizes that :meth:`transform` will lead to; which layers they name does not matter."""
        raise NotImplementedError

    def passes(self, blocks: Sequence[Block]) -> float:
        """Return about how many passes over 64 calibration rows it takes; a row that is trained on counts thrice."""
        return 1.0

    def compress(
        self,
        model: Model,
        data: Batch | None,
        *,
        seed: int = 0,
        progress: Progress | None = None,
        folder: str | Path | None = None,
        original: Callable[[], Model] | None = None,
    ) -> Outcome:
        """Compress ``model`` in place, as :meth:`Compressor.compress` does.

        Parameters
        ----------
        folder : where a search or a training keeps what it needs to go on after a kill; None keeps nothing
        original : opens the model that serves as a teacher; None: ``model`` as it is handed over
        """
        from paredown.core import whole
        from paredown.core.session import Session

        place = None if folder is None else Path(folder)
        return whole.transform(self, model, data, Session(seed, place, progress, original))


class Policy(Method):
    """A method that acts while the model runs: attached, it makes passes cheaper; detached, the model is as it was.

    A subclass writes ``runtime``: what it does at the seams that the core offers (see ``core.runtime``). ``places``
    names what it acts on; two policies that share a place are refused together.
    """

    kind: ClassVar[Kind] = "policy"
    places: ClassVar[frozenset[Place]] = frozenset()

    keep: float = Field(0.5, gt=0, le=1, description="Share of the units that stay; 1 changes nothing.")

    @property
    def inert(self) -> bool:
        """Whether the policy would change nothing: then no seam is touched."""
        return self.keep == 1

    def runtime(self, model: Model) -> Runtime:
        """Return what the policy does while it is attached to ``model``.

        Raises
        ------
        ArchitectureError
            If the model lacks what the policy acts on.
        PolicyError
            If the policy lacks something that :meth:`prepare` makes.
        """
        raise NotImplementedError

    def learning(self, model: Model) -> Runtime:
        """Return a runtime that does the same and lets gradients reach the weights of ``model``, to train it under.

        Raises
        ------
        PolicyError
            If there is no such form.
        """
        raise PolicyError(
            f"no model can be trained under {self.name}: it has no form that gradients pass; heal without it."
        )

    def prepare(
        self: P,
        model: Model,
        data: Batch | None,
        *,
        seed: int = 0,
        folder: str | None = None,
        progress: Progress | None = None,
    ) -> P:
        """Return this policy with all that it must learn or measure beforehand; most need nothing and return self.

        Parameters
        ----------
        model : is left exactly as it was; ``model.original`` is the folder of the model that a recipe began with
        data : calibration tokens ``[N, T]``; None for policies that make their own
        seed : fixes whatever is drawn
        folder : where learned weights are written; small numbers become fields and need no file
        progress : called as ``progress(done, total, text)``
        """
        return self

    @contextmanager
    def attach(self, model: Model | PreTrainedModel) -> Iterator[Attachment]:
        """Make ``model`` run under this policy for as long as the context is open.

        Raises
        ------
        ArchitectureError, PolicyError
            If the model cannot run under it; then nothing was touched.
        """
        from paredown.core.attach import attach

        with attach(model, self) as attachment:
            yield attachment


class TrainingMethod(Method):
    """A method that acts while a model is trained by ``transformers.Trainer``: callbacks, loss, a wrapped model."""

    kind: ClassVar[Kind] = "training"

    def callbacks(self, model: Model) -> list[TrainerCallback]:
        """Return the callbacks that the Trainer is to be given."""
        return []

    @contextmanager
    def wrap(self, model: Model) -> Iterator[None]:
        """Change how ``model`` runs for as long as it is trained; it runs as before afterwards."""
        yield


class Probe(Method):
    """A method that looks and changes nothing: it ends in a table, not in a smaller model."""

    kind: ClassVar[Kind] = "probe"

    @property
    def reads_data(self) -> bool:
        """Whether :meth:`measure` needs calibration data, with these fields."""
        return "calibration-data" in self.needs

    def measure(self, model: Model, data: Batch | None, *, seed: int = 0) -> list[dict[str, Any]]:
        """Look at ``model`` and return a table: one dictionary a row, the same keys in each, ready for JSON.

        Parameters
        ----------
        model : is left exactly as it was
        data : calibration tokens ``[N, T]``; None for probes that look at weights only
        seed : fixes whatever the probe draws

        Raises
        ------
        ArchitectureError
            If the model has nothing to look at.
        DataError
            If the probe needs data and none were given.
        """
        raise NotImplementedError


_REGISTERED: dict[str, type[Method]] = {}
M = TypeVar("M", bound=type[Method])


def register(cls: M) -> M:
    """Class decorator: make a method known under its ``name``."""
    for attribute in ("name", "title", "axis", "kind", "unit"):
        if not isinstance(getattr(cls, attribute, None), str):
            raise TypeError(f"{cls.__name__} must set the class attribute {attribute!r}")
    other = _REGISTERED.get(cls.name)
    if other is not None and other.__qualname__ != cls.__qualname__:
        raise TypeError(f"two methods are called {cls.name!r}: {other.__qualname__} and {cls.__qualname__}")
    _REGISTERED[cls.name] = cls
    return cls


def registered() -> Iterator[type[Method]]:
    """Yield the methods whose modules have been imported so far."""
    yield from _REGISTERED.values()
