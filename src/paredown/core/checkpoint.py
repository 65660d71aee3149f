"""Load and save: a model in memory, a skeleton without weights, and single blocks from disk.

- A **skeleton** is the whole model on the meta device, with real rotary tables; blocks are filled from disk one at a
  time and emptied again. Renaming and fusing of weights on load is done by transformers' own conversion mapping, and
  undone by it on save, so what we write has the names of the original checkpoint.
- Results whose layers differ open here too: :func:`load` hands each block its own ``per_layer_config``.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
import transformers
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers import AutoConfig, AutoTokenizer, GenerationConfig, PreTrainedConfig, PreTrainedModel
from transformers import initialization as init
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    WeightConverter,
    WeightRenaming,
    convert_and_load_state_dict_in_model,
    rename_source_key,
    revert_weight_conversion,
)
from transformers.modeling_utils import LoadStateDictConfig
from transformers.utils import logging as transformers_logging

from paredown.core import anatomy as anatomy_module
from paredown.core import files, layered
from paredown.core.anatomy import Anatomy
from paredown.core.buffers import real_buffers
from paredown.core.resources import release_memory
from paredown.core.tensors import DTYPES, OnFile, check_finite
from paredown.errors import ArchitectureError, CheckpointError

if TYPE_CHECKING:
    from paredown.core.method import Policy

_GENERATION = "generation_config.json"


@dataclass
class Model:
    """A Hugging Face model, its tokenizer or processor and its anatomy, together.

    ``source`` is what the user gave; ``folder`` the local folder it was read from (None for a model from memory);
    ``policies`` act on it since it was loaded, until :meth:`detach`. ``original`` is the folder of the model that a
    recipe began with, where earlier steps made this one of it: a teacher for what is learned.
    """

    hf: PreTrainedModel
    tokenizer: Any
    processor: Any
    anatomy: Anatomy
    source: str
    folder: Path | None = None
    policies: tuple[Policy, ...] = ()
    original: Path | None = None
    _held: contextlib.ExitStack = field(default_factory=contextlib.ExitStack, repr=False, compare=False)

    @classmethod
    def of(cls, hf: PreTrainedModel, tokenizer: Any = None, processor: Any = None) -> Model:
        """Wrap a model that is already in memory."""
        return cls(hf.eval(), tokenizer, processor, anatomy_module.find(hf), type(hf).__name__)

    @property
    def config(self) -> PreTrainedConfig:
        """The top-level config."""
        return self.hf.config

    def parameters(self) -> int:
        """Count parameters, tied ones once (on the meta device they are two tensors)."""
        tied = set(getattr(self.hf, "all_tied_weights_keys", None) or ())
        return sum(p.numel() for name, p in self.hf.named_parameters(remove_duplicate=False) if name not in tied)

    def generate(self, *args: Any, **options: Any) -> Any:
        """Generate, as the Hugging Face model does."""
        generates: Any = self.hf
        return generates.generate(*args, **options)

    def hold(self, policies: tuple[Policy, ...]) -> None:
        """Attach policies until :meth:`detach`, instead of for one context."""
        from paredown.core.attach import attach

        self._held.enter_context(attach(self, *policies))
        self.policies = policies

    def detach(self) -> None:
        """Take off the policies that the model was loaded with."""
        self._held.close()
        self.policies = ()

    def save(self, out: str | Path) -> None:
        """Write a standard checkpoint folder (weights, config, generation config, tokenizer, policies)."""
        out = Path(out)
        self.hf.save_pretrained(out)
        if self.policies:
            from paredown.core import policy_file

            policy_file.write(out, self.policies)
        if self.folder is not None:
            files.copy_extras(self.folder, out)
        elif self.tokenizer is not None:
            self.tokenizer.save_pretrained(out)


def load(ref: str | Path, *, dtype: str | torch.dtype = "auto", device: str = "cpu", policies: bool = True) -> Model:
    """Load a checkpoint into memory: plain ones, those whose layers differ, and those that bring policies.

    Parameters
    ----------
    ref : hub id, local folder or ``testbed:NAME``
    dtype : ``auto`` keeps the checkpoint's
    device : ``cpu``, ``cuda``, ...
    policies : attach what the folder's ``policy.yaml`` names; ``Model.detach`` takes it off

    Raises
    ------
    ModelNotFoundError, CheckpointError, ArchitectureError
        In one sentence.
    """
    folder = files.locate(ref)
    config = read_config(folder)
    cls = model_class(config, folder)
    stored = _policies(folder) if policies else ()
    with quiet(), layered.layered(config):
        try:
            hf, report = cls.from_pretrained(
                folder, config=config, dtype=dtype, output_loading_info=True, use_safetensors=True
            )
        except (RuntimeError, ValueError, TypeError, LookupError, ArithmeticError, OSError, SafetensorError) as error:
            raise CheckpointError(
                f"the weights of {folder} do not fit its config ({_first_line(error)}); copy the checkpoint again or "
                "mend config.json."
            ) from None
    _check_loading(folder, report["missing_keys"], report.get("mismatched_keys", ()))
    for name, tensor in hf.state_dict().items():
        check_finite(folder, name, tensor)
    hf = cast(PreTrainedModel, hf.to(device).eval())
    model = Model(hf, read_tokenizer(folder), read_processor(folder), anatomy_module.find(hf), str(ref), folder)
    if stored:
        model.hold(stored)
    return model


def _policies(folder: Path) -> tuple[Policy, ...]:
    """Read ``policy.yaml`` where there is one; methods are imported for nobody else."""
    if not (folder / "policy.yaml").is_file():
        return ()
    from paredown.core import policy_file

    return policy_file.read(folder)


@dataclass
class Skeleton:
    """A model on the meta device that can fetch parts of its weights from disk."""

    model: Model
    tensors: dict[str, files.TensorInfo]
    places: dict[str, str]
    mapping: list[Any]
    dtype: torch.dtype
    unknown: tuple[str, ...]

    @property
    def hf(self) -> PreTrainedModel:
        """The model on the meta device."""
        return self.model.hf

    @property
    def folder(self) -> Path:
        """The checkpoint's folder."""
        assert self.model.folder is not None
        return self.model.folder

    def fill(self, prefixes: tuple[str, ...], *, without: tuple[str, ...] = (), device: str = "cpu") -> None:
        """Read from disk the weights below ``prefixes`` but not below ``without``, checking that they are numbers."""
        ties = {
            target: source
            for target, source in (getattr(self.hf, "all_tied_weights_keys", None) or {}).items()
            if below(target, prefixes) and not below(target, without)
        }
        # What is tied to a weight elsewhere needs that weight, which is not to stay where it is not asked for.
        lent = {s for s in ties.values() if not below(s, prefixes) or below(s, without)}
        held = {source: self.hf.get_parameter(source) for source in lent}
        lent = {source for source, parameter in held.items() if parameter.is_meta}
        wanted = [
            name
            for name, place in self.places.items()
            if place in lent or (below(place, prefixes) and not below(place, without))
        ]
        # Read tensor by tensor while they are renamed and fused, so that no block is held twice.
        state = {name: OnFile(self.folder, name, self.tensors[name]) for name in wanted}
        report = self._convert(state, device)
        absent = {k for k in report.missing_keys if below(k, prefixes) and not below(k, without)}
        _check_loading(self.folder, absent - self._tied(), report.mismatched_keys)
        for target, source in ties.items():
            self._put(target, self.hf.get_parameter(source))
        for source in lent:
            self._put(source, held[source])

    def empty(self, prefix: str) -> None:
        """Forget the weights below ``prefix``."""
        module = self.hf.get_submodule(prefix)
        for child in module.modules():
            for name, parameter in list(child._parameters.items()):
                if parameter is not None:
                    child._parameters[name] = nn.Parameter(
                        torch.empty_like(parameter, device="meta"), requires_grad=False
                    )
        release_memory()

    def disk_names(self, state: dict[str, Tensor]) -> dict[str, Tensor]:
        """Turn names and layouts in memory into those of the original checkpoint."""
        self.hf._weight_conversions = [c for c in self.mapping if c.was_used()]
        with quiet():
            return {k: v.contiguous() for k, v in revert_weight_conversion(self.hf, state).items()}

    def _put(self, name: str, parameter: nn.Parameter) -> None:
        owner, _, leaf = name.rpartition(".")
        self.hf.get_submodule(owner)._parameters[leaf] = parameter

    def _tied(self) -> set[str]:
        return set(getattr(self.hf, "all_tied_weights_keys", {}) or {})

    def _convert(self, state: Mapping[str, Any], device: str) -> Any:
        config = LoadStateDictConfig(
            weight_mapping=self.mapping, device_map={"": device}, dtype=self.dtype, dtype_plan={}
        )
        with quiet(), _one_by_one():
            report, _ = convert_and_load_state_dict_in_model(self.hf, dict(state), config)
        if report.conversion_errors or report.error_msgs:
            first = next(iter(report.conversion_errors or report.error_msgs))
            raise CheckpointError(f"the weights of {self.folder} cannot be fused as its config asks ({first}).")
        return report


def skeleton(ref: str | Path) -> Skeleton:
    """Build a model on the meta device and check, from headers alone, that the checkpoint fits it.

    Raises
    ------
    CheckpointError
        If a weight is missing or has another shape than the config says.
    """
    folder = files.locate(ref)
    config = read_config(folder)
    cls = model_class(config, folder)
    _check_generation(folder)
    dtype = config.dtype if isinstance(config.dtype, torch.dtype) else torch.float32
    with quiet(), layered.layered(config):
        try:
            with init.no_tie_weights(), torch.device("meta"), init.meta_device_safe_creation_ops():
                previous = torch.get_default_dtype()
                torch.set_default_dtype(dtype)
                try:
                    hf = cls(config)
                finally:
                    torch.set_default_dtype(previous)
        except (RuntimeError, ValueError, LookupError, ArithmeticError, TypeError, AttributeError) as error:
            raise CheckpointError(
                f"{folder / 'config.json'} does not describe a model that can be built ({_first_line(error)}); "
                "mend it or copy it again."
            ) from None
    hf = hf.eval().requires_grad_(False)
    real_buffers(hf)
    hf.tie_weights(recompute_mapping=True)
    tensors = files.headers(folder)
    model = Model(hf, read_tokenizer(folder), read_processor(folder), anatomy_module.find(hf), str(ref), folder)
    found = Skeleton(model, tensors, {}, get_model_conversion_mapping(hf), dtype, ())
    _place(found)
    _check_layout(found)
    _check_ties(found)
    return found


def below(name: str, prefixes: tuple[str, ...]) -> bool:
    """Whether a parameter name lies below one of the module paths."""
    return any(p == "" or name == p or name.startswith(p + ".") for p in prefixes)


def read_config(folder: Path) -> PreTrainedConfig:
    """Read the config; remote code is never run."""
    raw = files.read_json(folder / "config.json", "give the folder that holds it")
    _check_layers(raw, folder)
    with quiet():
        try:
            config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
        except (ValueError, KeyError, TypeError, AttributeError, OSError) as error:
            kind = raw.get("model_type")
            if kind is None:
                raise CheckpointError(f"{folder / 'config.json'} names no model_type; copy it again.") from None
            raise ArchitectureError(
                f"transformers {transformers.__version__} cannot read the config of {folder} (model_type {kind!r}: "
                f"{_first_line(error)}); remote code is not run, so the architecture must be part of transformers."
            ) from None
        except Exception as error:  # strict config validation raises classes of huggingface_hub
            raise CheckpointError(f"{folder / 'config.json'} holds an illegal value ({_first_line(error)}).") from None
    if getattr(config, "quantization_config", None) is not None:
        raise ArchitectureError(f"{folder} is quantised already; give the checkpoint it was made from.")
    return cast(PreTrainedConfig, config)


def _check_layers(raw: Any, folder: Path) -> None:
    """Refuse a number of layers that the files cannot fill, before lists and modules of that length are made."""
    held = len(files.headers(folder))
    for part in [raw, *(value for value in raw.values() if isinstance(value, dict))]:
        # A layer that shares the weights of another may hold nothing of its own.
        layers = part.get("per_layer_config")
        listed = layers.values() if isinstance(layers, dict) else ()
        limit = held + sum(isinstance(one, dict) and one.get("shared_with") is not None for one in listed)
        for key in ("num_hidden_layers", "num_layers", "n_layer", "n_layers", "depth"):
            if isinstance(part.get(key), int) and part[key] > limit:
                raise CheckpointError(
                    f"{folder / 'config.json'} asks for {part[key]} layers ({key}), but the checkpoint holds {held} "
                    "tensors; mend the config or copy the checkpoint again."
                )


def model_class(config: PreTrainedConfig, folder: Path) -> type[PreTrainedModel]:
    """Return the transformers class that the config names."""
    named = config.architectures if isinstance(config.architectures, list) else []
    for name in named:
        cls = getattr(transformers, str(name), None)
        if isinstance(cls, type) and issubclass(cls, PreTrainedModel):
            return cls
    with contextlib.suppress(KeyError):
        return cast(type[PreTrainedModel], transformers.MODEL_FOR_CAUSAL_LM_MAPPING[type(config)])
    raise ArchitectureError(
        f"{folder / 'config.json'} names no architecture that transformers {transformers.__version__} has "
        f"({config.architectures}); remote code is not run."
    )


def read_tokenizer(folder: Path) -> Any:
    """Read the tokenizer, or None where there is none; whoever needs one says so."""
    if not any((folder / n).exists() for n in ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt")):
        return None
    with quiet():
        try:
            return AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
        except Exception as error:
            raise CheckpointError(
                f"the tokenizer of {folder} cannot be read ({_first_line(error)}); copy its files again."
            ) from None


def read_processor(folder: Path) -> Any:
    """Read the image processor of a vision model, or None where there is none or its extras are not installed."""
    if not ((folder / "preprocessor_config.json").exists() or (folder / "processor_config.json").exists()):
        return None
    with quiet(), contextlib.suppress(Exception):
        return transformers.AutoProcessor.from_pretrained(folder, trust_remote_code=False)
    with quiet(), contextlib.suppress(Exception):
        return transformers.AutoImageProcessor.from_pretrained(folder, trust_remote_code=False)
    return None


def save_config(model: Model, config: PreTrainedConfig, out: Path) -> None:
    """Write the config as ``save_pretrained`` would, and the generation config that the model came with."""
    config = type(config).from_dict(json.loads(config.to_json_string(use_diff=False)))
    config.architectures = [type(model.hf).__name__]
    config.save_pretrained(out)
    generation = getattr(model.hf, "generation_config", None)
    if model.folder is not None and (model.folder / _GENERATION).exists():
        # As it is: many that are in use would be refused by save_pretrained, which is stricter than loading.
        shutil.copyfile(model.folder / _GENERATION, out / _GENERATION)
    elif generation is not None:
        generation.save_pretrained(out)


@contextlib.contextmanager
def _one_by_one() -> Iterator[None]:
    """Keep transformers' loader from reading ahead in threads: what waits to be fused would fill the memory."""
    name = "HF_DEACTIVATE_ASYNC_LOAD"
    before = os.environ.get(name)
    os.environ[name] = "1"
    try:
        yield
    finally:
        if before is None:
            del os.environ[name]
        else:
            os.environ[name] = before


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Keep transformers' progress bars and warnings away from the user; ours say what matters."""
    level = transformers_logging.get_verbosity()
    bars = transformers_logging.is_progress_bar_enabled()
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        transformers_logging.set_verbosity(level)
        if bars:
            transformers_logging.enable_progress_bar()


def _place(skeleton: Skeleton) -> None:
    """Find out below which module each tensor on disk ends up."""
    renamings = [c for c in skeleton.mapping if isinstance(c, WeightRenaming)]
    converters = [c for c in skeleton.mapping if isinstance(c, WeightConverter)]
    known = skeleton.hf.state_dict()
    prefix = skeleton.hf.base_model_prefix
    unknown = []
    for name in skeleton.tensors:
        place, _ = rename_source_key(name, renamings, converters, prefix, known)
        if place not in known and name in known:
            place = name
        if place in known:
            skeleton.places[name] = place
        else:
            unknown.append(name)
    skeleton.unknown = tuple(sorted(unknown))


def _check_layout(skeleton: Skeleton) -> None:
    """Run the whole conversion on tensors without data: shapes and names must fit, before hours are spent."""
    state = {
        name: torch.empty(info.shape, dtype=DTYPES.get(info.dtype, skeleton.dtype), device="meta")
        for name, info in skeleton.tensors.items()
        if name in skeleton.places
    }
    mapping = skeleton.mapping
    trial = replace(skeleton, mapping=get_model_conversion_mapping(skeleton.hf))
    report = trial._convert(state, "meta")
    skeleton.mapping = mapping
    ignored = skeleton.hf._keys_to_ignore_on_load_missing or ()
    import re

    absent = {k for k in report.missing_keys if not any(re.search(p, k) for p in ignored)}
    _check_loading(skeleton.folder, absent - skeleton._tied(), report.mismatched_keys)


def _check_generation(folder: Path) -> None:
    """Read the generation config now: a broken one must not come to light when the work is done."""
    if not (folder / _GENERATION).exists():
        return
    files.read_json(folder / _GENERATION, "it was lost while it was read")
    with quiet():
        try:
            GenerationConfig.from_pretrained(folder)
        except Exception as error:
            raise CheckpointError(
                f"{folder / _GENERATION} cannot be used ({_first_line(error)}); mend it or delete it."
            ) from None


def _check_ties(skeleton: Skeleton) -> None:
    """Refuse a config that ties two tensors which differ on disk: transformers would not tie them, and we must not."""
    on_disk = {place: name for name, place in skeleton.places.items()}
    for target, source in (getattr(skeleton.hf, "all_tied_weights_keys", None) or {}).items():
        both = [skeleton.tensors[on_disk[name]] for name in (target, source) if name in on_disk]
        if len(both) == 2 and not files.equal(*both):
            raise CheckpointError(
                f"config.json of {skeleton.folder} ties {target} to {source}, but the checkpoint holds two different "
                "tensors; set tie_word_embeddings to false in it."
            )


def _check_loading(folder: Path, missing: Any, mismatched: Any) -> None:
    if mismatched:
        name, on_disk, expected = min(mismatched, key=lambda m: str(m[0]))
        raise CheckpointError(
            f"{name} in {folder} has the shape {list(on_disk)}, but config.json asks for {list(expected)}; "
            "mend the config or copy the checkpoint again."
        )
    if missing:
        first = sorted(missing)[0]
        raise CheckpointError(
            f"{len(missing)} weights that config.json of {folder} asks for are not in the checkpoint, "
            f"{first} for one; mend the config or copy the checkpoint again."
        )


def _first_line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return (lines[0] if lines else type(error).__name__)[:160].rstrip(".")
