"""Where things are in a model, found by role and shape.

- All paths of parts are relative to their block, all paths of blocks are relative to the Hugging Face model, so the
  same anatomy serves a model in memory, a skeleton on the meta device and a single block loaded from disk.
- An anatomy holds no tensors and no modules. It is computed from a skeleton as well as from a loaded model.
- No class names here: the few exceptions live in ``architectures``. The words are defined in ``roles``, the parts of
  one block are found by ``blocks``.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

from torch import nn

from paredown.core import architectures as names
from paredown.core.blocks import attending, block, dropped, is_norm, join, missing, own_shape, resolve
from paredown.core.roles import Anatomy, Attention, Block, Experts, Mlp, Tower

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel

__all__ = [
    "Anatomy",
    "Attention",
    "Block",
    "Experts",
    "Mlp",
    "Tower",
    "block",
    "dropped",
    "find",
    "resolve",
    "stacks",
    "tower_config",
]


def find(model: PreTrainedModel) -> Anatomy:
    """Find the parts of ``model`` (in memory or on the meta device).

    Raises
    ------
    ArchitectureError
        If a role is not found; the message names the role and the model's class.
    """
    found = stacks(model)
    if not found:
        seen = [f"{path or 'the model'} ({len(items)})" for path, items in _lists(model)]
        raise missing(model, "blocks", f"no module list whose items attend; lists seen: {', '.join(seen) or 'none'}")
    towers = [_tower(model, path, items) for path, items in found]
    vision = [tower for tower in towers if tower.name == "vision"]
    language = [tower for tower in towers if tower.name == "language"] or vision
    main = max(language, key=lambda tower: len(tower.blocks))
    beside = max((tower for tower in vision if tower is not main), key=lambda tower: len(tower.blocks), default=None)
    projector = next((path for path, _ in model.named_modules() if path.split(".")[-1] in names.PROJECTOR), None)
    return Anatomy(model.config.model_type, main, beside, projector if beside else None)


def tower_config(config: PreTrainedConfig, tower: Tower) -> PreTrainedConfig:
    """Return the part of the top-level ``config`` that describes ``tower``."""
    return getattr(config, tower.config_path) if tower.config_path else config


def _lists(model: nn.Module) -> list[tuple[str, nn.ModuleList]]:
    return [(path, m) for path, m in model.named_modules() if isinstance(m, nn.ModuleList) and len(m) > 0]


def stacks(model: nn.Module) -> list[tuple[str, nn.ModuleList]]:
    """Return the outermost module lists, with their paths, of which at least one item attends."""
    found: list[tuple[str, nn.ModuleList]] = []
    for path, items in _lists(model):
        if any(path.startswith(f"{outer}.") for outer, _ in found):
            continue
        if any(attending(item) for item in items):
            found.append((path, items))
    return found


def _tower(model: PreTrainedModel, path: str, items: nn.ModuleList) -> Tower:
    name: Literal["language", "vision"] = "language"
    if set(path.split(".")) & set(names.VISION) or getattr(model, "main_input_name", "") == "pixel_values":
        name = "vision"
    config_path = _config_path(model, name)
    config = getattr(model.config, config_path) if config_path else model.config
    blocks = tuple(block(item, config, index=i, path=f"{path}.{i}", model=model) for i, item in enumerate(items))
    hidden = _hidden_size(items, blocks, config)
    decoder = path.rpartition(".")[0]
    is_language = name == "language"
    return Tower(
        name=name,
        config_path=config_path,
        decoder=decoder,
        layers=path,
        embedding=_path_of(model, model.get_input_embeddings()) if is_language else None,
        final_norm=_final_norm(model, decoder, hidden),
        head=_path_of(model, model.get_output_embeddings()) if is_language or not config_path else None,
        hidden_size=hidden,
        blocks=blocks,
    )


def _config_path(model: PreTrainedModel, name: str) -> str:
    wanted = ("vision_config",) if name == "vision" else ("text_config", "language_config", "llm_config")
    return next((key for key in wanted if key in vars(model.config)), "")


def _hidden_size(items: nn.ModuleList, blocks: tuple[Block, ...], config: PreTrainedConfig) -> int:
    for item, part in zip(items, blocks, strict=True):
        for dense in (part.attention.o if part.attention else None, part.mlp.down if part.mlp else None):
            if dense is not None:
                weight: Any = resolve(item, dense).weight
                return int(weight.shape[0])
    return int(getattr(config, "embed_dim", None) or config.hidden_size)


def _path_of(model: nn.Module, wanted: nn.Module | None) -> str | None:
    return next((path for path, module in model.named_modules() if module is wanted), None) if wanted else None


def _final_norm(model: nn.Module, decoder: str, hidden: int) -> str | None:
    """Find the norm after the last block: a child of the module that runs the blocks, or of the one around it."""
    for owner in (decoder, decoder.rpartition(".")[0]):
        found = [
            name
            for name, child in resolve(model, owner).named_children()
            if is_norm(child) and own_shape(child) == (hidden,) and not name.startswith("pre")
        ]
        if found:
            return join(owner, found[-1])
        if not owner:
            break
    return None
