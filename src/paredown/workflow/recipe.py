"""A recipe: what to do to which model, as a file that people write and editors can check.

    model: testbed:moe
    seed: 0
    data: {calibration: texts.jsonl, sequences: 64, length: 512}
    gate: ppl:2.0
    steps:
      - {method: dern, keep: 0.5}
      - {method: llm-drop, keep: 0.75, part: attention}

YAML is read without tags and without anchors: a recipe is data, and a small one.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from paredown import registry
from paredown.errors import RecipeError, UsageError

if TYPE_CHECKING:
    from paredown.core.method import Method

LARGEST_RECIPE = 1 << 20


class Step(BaseModel):
    """One method with its fields; fields stand next to ``method``."""

    model_config = ConfigDict(frozen=True, extra="allow")

    method: str = Field(description="Name of a method; `paredown methods` lists them.")

    @property
    def fields(self) -> dict[str, Any]:
        """The method's hyper-parameters as given."""
        return dict(self.model_extra or {})

    def build(self) -> Method:
        """Return the method, its fields checked."""
        return registry.create(self.method, **self.fields)


class Data(BaseModel):
    """What the methods look at and what the result is judged on."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    calibration: str | None = Field(None, description="File, folder or hub data set; None: the testbed's own sample.")
    heldout: str | None = Field(None, description="The same for the gate; None: documents of the calibration data "
                                                  "that no method looks at.")  # fmt: skip
    sequences: int = Field(64, ge=1, le=1_000_000, description="Calibration sequences.")
    length: int = Field(512, ge=8, le=1_000_000, description="Tokens a sequence.")
    heldout_sequences: int = Field(32, ge=2, le=1_000_000, description="Held-out sequences.")


class GateSpec(BaseModel):
    """How much quality may be lost: ``ppl:2.0`` (ratio), ``kl:0.5`` (nats a token) or ``none``."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    kind: Literal["ppl", "kl", "none"]
    limit: float | None = None

    @classmethod
    def parse(cls, text: str) -> GateSpec:
        """Read ``ppl:2.0``, ``kl:0.5`` or ``none``.

        Raises
        ------
        UsageError
            If it is none of these.
        """
        kind, _, number = text.partition(":")
        if kind == "none" and not number:
            return cls(kind="none")
        try:
            limit = float(number)
        except ValueError:
            limit = math.nan
        if kind not in ("ppl", "kl") or not math.isfinite(limit) or limit <= 0:
            raise UsageError(f"the gate {text!r} is not one of ppl:2.0 (ratio), kl:0.5 (nats a token) and none.")
        return cls(kind="ppl" if kind == "ppl" else "kl", limit=limit)

    def __str__(self) -> str:
        """Return the form that :meth:`parse` reads."""
        return "none" if self.kind == "none" else f"{self.kind}:{self.limit:g}"


class Recipe(BaseModel):
    """What to do to which model."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    model: str = Field(min_length=1, description="Hub id, local folder or testbed:NAME.")
    steps: tuple[Step, ...] = Field(min_length=1, max_length=64, description="Methods, in this order.")
    data: Data = Field(default_factory=lambda: Data(), description="Calibration and held-out data.")
    gate: str = Field("ppl:2.0", description="Largest loss: ppl:RATIO, kl:NATS or none.")
    seed: int = Field(0, ge=0, lt=2**31, description="Fixes whatever is drawn.")

    @field_validator("gate")
    @classmethod
    def _gate(cls, value: str) -> str:
        return str(GateSpec.parse(value))

    def methods(self) -> list[Method]:
        """Return the steps' methods, all fields checked."""
        return [step.build() for step in self.steps]

    def identity(self) -> dict[str, Any]:
        """Return what decides the output's bytes: everything but the gate."""
        return self.model_dump(mode="json", exclude={"gate"})


def read(path: str | Path) -> Recipe:
    """Read a recipe file.

    Raises
    ------
    RecipeError
        One sentence: which key or line, what is wrong, what is allowed.
    """
    path = Path(path)
    try:
        if path.stat().st_size > LARGEST_RECIPE:
            raise RecipeError(f"{path} is larger than a megabyte; a recipe is a small file.")
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise RecipeError(f"there is no recipe {path}; give a YAML file, or --method and --keep.") from None
    except (OSError, UnicodeDecodeError) as error:
        raise RecipeError(f"{path} cannot be read as text ({type(error).__name__}).") from None
    try:
        raw = yaml.load(text, Loader=_PlainLoader)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f" in line {mark.line + 1}" if mark is not None else ""
        problem = getattr(error, "problem", None) or "not YAML"
        raise RecipeError(f"{path} cannot be read{where}: {problem}.") from None
    except (RecursionError, ValueError) as error:
        raise RecipeError(f"{path} is nested too deeply or holds an illegal value ({type(error).__name__}).") from None
    if not isinstance(raw, dict):
        raise RecipeError(f"{path} must hold the keys model and steps, not a {type(raw).__name__}.")
    return check(raw, str(path))


def check(raw: dict[Any, Any], where: str = "the recipe") -> Recipe:
    """Turn plain data into a checked recipe, steps and their fields included."""
    try:
        recipe = Recipe.model_validate(raw)
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(str(part) for part in first["loc"]) or "top level"
        if first["type"] == "extra_forbidden":
            legal = ", ".join(Data.model_fields if key.startswith("data.") else Recipe.model_fields)
            raise RecipeError(f"{where} has an unknown key {key!r}; the keys here are {legal}.") from None
        text = first["msg"][0].lower() + first["msg"][1:]
        raise RecipeError(f"{where}: {key}={first.get('input')!r} will not do: {text}.") from None
    recipe.methods()
    return recipe


class _PlainLoader(yaml.SafeLoader):
    """Safe YAML without aliases: a few anchors can unfold into gigabytes."""

    def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
        """Refuse aliases."""
        if self.check_event(yaml.events.AliasEvent):
            event = self.peek_event()  # type: ignore[no-untyped-call]
            raise yaml.composer.ComposerError(
                None, None, "anchors and aliases are not read; write the values out", event.start_mark
            )
        return super().compose_node(parent, index)
