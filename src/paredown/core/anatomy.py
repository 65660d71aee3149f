"""Where things are in a model, found by role and shape.

- All paths of parts are relative to their block, all paths of blocks are relative to the Hugging Face model, so the
  same anatomy serves a model in memory, a skeleton on the meta device and a single block loaded from disk.
- An anatomy holds no tensors and no modules. It is computed from a skeleton as well as from a loaded model.
- No class names here: the few exceptions live in ``architectures``.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from torch import nn

from paredown.core import architectures as names
from paredown.errors import ArchitectureError

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel


@dataclass(frozen=True)
class Attention:
    """Self-attention of one block.

    ``contribution`` is the module whose output is added to the residual stream: the attention itself, or the norm
    after it where a family has one (Gemma 3). ``norms`` are the norms that serve this sub-layer alone.
    ``layout`` is ``separate`` (q, k, v projections), ``fused`` (one qkv projection) or ``mla`` (latent attention).
    ``fused_order`` says how the rows of a fused projection are laid out: ``interleaved`` ``[heads, 3, head_dim]`` or
    ``stacked`` ``[3, heads, head_dim]``; None where that is not known. ``joint_norms`` is true where queries and keys
    are normalised over all heads together (OLMoE), which makes heads depend on each other.
    """

    path: str
    layout: Literal["separate", "fused", "mla"]
    heads: int
    kv_heads: int
    head_dim: int
    q: str | None
    k: str | None
    v: str | None
    qkv: str | None
    o: str
    norms: tuple[str, ...]
    contribution: str
    fused_order: Literal["interleaved", "stacked"] | None = None
    joint_norms: bool = False


@dataclass(frozen=True)
class Mlp:
    """A dense feed-forward part: ``down(act(gate(x)) * up(x))``, or ``down(act(up(x)))`` where ``gate`` is None.

    ``width_key`` is the config attribute that holds ``width``.
    """

    path: str
    gate: str | None
    up: str
    down: str
    width: int
    width_key: str
    norms: tuple[str, ...]
    contribution: str


@dataclass(frozen=True)
class Experts:
    """A mixture-of-experts part: router, fused experts, and shared experts where there are any.

    ``experts`` is the module that owns ``gate_up_proj [E, 2I, H]`` and ``down_proj [E, H, I]``; ``router`` the module
    that owns ``weight [E, H]`` and returns ``(logits, weights, indices)``. Keys name config attributes.
    ``widths`` holds each expert's width where they differ (then ``width`` is the largest), else None. ``groups`` are
    consecutive runs of experts of equal length, of which a token may use ``open_groups``.
    """

    path: str
    router: str
    experts: str
    count: int
    width: int
    top_k: int
    count_key: str
    width_key: str
    top_k_key: str
    correction_bias: str | None
    groups: int
    group_key: str | None
    shared: Mlp | None
    shared_gate: str | None
    norms: tuple[str, ...]
    contribution: str
    widths: tuple[int, ...] | None = None
    open_groups: int = 1


@dataclass(frozen=True)
class Block:
    """One transformer block. ``mlp`` and ``experts`` exclude each other; a dropped sub-layer is None.

    ``residual`` is ``pre`` (norm, sub-layer, add; one after the other), ``parallel`` (both read the same stream) or
    ``post`` (the norm comes after the addition, as in BERT).
    """

    index: int
    path: str
    residual: Literal["pre", "parallel", "post"]
    attention: Attention | None
    mlp: Mlp | None
    experts: Experts | None


@dataclass(frozen=True)
class Tower:
    """A stack of blocks with what feeds it and what follows it.

    ``config_path`` names the sub-config that describes it (``""`` for the top-level config, ``text_config``,
    ``vision_config``); ``layers`` is the path of the module list that holds the blocks; ``decoder`` the path of the
    module whose forward runs them (``""`` for the model itself).
    """

    name: Literal["language", "vision"]
    config_path: str
    decoder: str
    layers: str
    embedding: str | None
    final_norm: str | None
    head: str | None
    hidden_size: int
    blocks: tuple[Block, ...]


@dataclass(frozen=True)
class Anatomy:
    """What a model is made of.

    ``language`` is the tower that compression acts on by default; in a pure vision model it is the vision tower (its
    ``name`` says so) and ``vision`` is None.
    """

    family: str
    language: Tower
    vision: Tower | None
    projector: str | None


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
        raise _missing(model, "blocks", f"no module list whose items attend; lists seen: {', '.join(seen) or 'none'}")
    towers = [_tower(model, path, items) for path, items in found]
    vision = [tower for tower in towers if tower.name == "vision"]
    language = [tower for tower in towers if tower.name == "language"] or vision
    main = max(language, key=lambda tower: len(tower.blocks))
    beside = max((tower for tower in vision if tower is not main), key=lambda tower: len(tower.blocks), default=None)
    projector = next((path for path, _ in model.named_modules() if path.split(".")[-1] in names.PROJECTOR), None)
    return Anatomy(model.config.model_type, main, beside, projector if beside else None)


def resolve(root: nn.Module, path: str) -> nn.Module:
    """Return the module at ``path`` below ``root``; the root itself for an empty path."""
    return root.get_submodule(path)


def tower_config(config: PreTrainedConfig, tower: Tower) -> PreTrainedConfig:
    """Return the part of the top-level ``config`` that describes ``tower``."""
    return getattr(config, tower.config_path) if tower.config_path else config


def block(
    module: nn.Module, config: PreTrainedConfig, *, index: int, path: str, model: nn.Module | None = None
) -> Block:
    """Find the parts of one block; ``config`` is its tower's, ``model`` only names the class in errors.

    Raises
    ------
    ArchitectureError
        If a role is not found.
    """
    owner = model if model is not None else module
    attention = _attention(module, config, owner, path)
    mlp, experts = _feed_forward(module, config, owner, path, attention)
    residual = _residual(module, attention, mlp, config)
    before_a, after_a, before_m, after_m = _norms(module, residual, attention, mlp, experts)
    if attention is not None:
        attention = _with_norms(attention, before_a, after_a)
    if mlp is not None:
        mlp = _with_norms(mlp, before_m, after_m)
    if experts is not None:
        experts = _with_norms(experts, before_m, after_m)
    return Block(index, path, residual, attention, mlp, experts)


def _missing(model: nn.Module, role: str, seen: str) -> ArchitectureError:
    return ArchitectureError(
        f"the {role} of {type(model).__name__} could not be found ({seen}); name the layout in core/architectures.py"
        " or use a supported family"
    )


def _lists(model: nn.Module) -> list[tuple[str, nn.ModuleList]]:
    return [(path, m) for path, m in model.named_modules() if isinstance(m, nn.ModuleList) and len(m) > 0]


def stacks(model: nn.Module) -> list[tuple[str, nn.ModuleList]]:
    """Return the outermost module lists, with their paths, of which at least one item attends."""
    found: list[tuple[str, nn.ModuleList]] = []
    for path, items in _lists(model):
        if any(path.startswith(f"{outer}.") for outer, _ in found):
            continue
        if any(_attending(item) for item in items):
            found.append((path, items))
    return found


def _attending(item: nn.Module) -> bool:
    return any(_child_attends(child) for child in item.children())


def _child_attends(child: nn.Module) -> bool:
    """Whether a child of a block is attention: it projects to queries, keys and values, or it was before it was dropped."""
    if dropped(child) == "attention":
        return True
    inner = {path.split(".")[-1] for path, module in child.named_modules() if _is_linear(module)}
    separate = bool(inner & set(names.QUERY)) and bool(inner & set(names.KEY)) and bool(inner & set(names.VALUE))
    return separate or bool(inner & set(names.FUSED)) or bool(inner & set(names.LATENT))


def dropped(module: nn.Module) -> str | None:
    """Return which sub-layer (``attention`` or ``mlp``) this module stands for if surgery removed it, else None."""
    mark: str | None = getattr(module, "paredown_dropped", None)
    return mark


def _is_linear(module: nn.Module) -> bool:
    weight = getattr(module, "weight", None)
    return weight is not None and weight.dim() == 2 and not isinstance(module, nn.Embedding)


def _linears(module: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    for path, child in module.named_modules():
        if path and _is_linear(child):
            yield path, child


def _matches(path: str, wanted: Sequence[str]) -> bool:
    return any(path == name or path.endswith(f".{name}") for name in wanted)


def _pick(module: nn.Module, wanted: Sequence[str]) -> str | None:
    return next((path for path, _ in _linears(module) if _matches(path, wanted)), None)


def _join(*parts: str) -> str:
    return ".".join(part for part in parts if part)


def _weight(module: nn.Module, path: str) -> Any:
    return resolve(module, path).weight


def _attention(module: nn.Module, config: PreTrainedConfig, model: nn.Module, where: str) -> Attention | None:
    candidates = [(name, child) for name, child in module.named_children() if _child_attends(child)]
    if not candidates:
        seen = ", ".join(name for name, _ in module.named_children())
        raise _missing(model, "attention", f"{where} holds {seen}")
    name, child = candidates[0]
    if dropped(child):
        return None
    o = _pick(child, names.OUTPUT)
    if o is None:
        seen = ", ".join(path for path, _ in _linears(child))
        raise _missing(model, "attention's output projection", f"{_join(where, name)} holds {seen}")
    q, k, v = (_pick(child, wanted) for wanted in (names.QUERY, names.KEY, names.VALUE))
    qkv, latent = _pick(child, names.FUSED), _pick(child, names.LATENT)
    owner = _projection_owner(child, q or qkv or latent)
    into = _weight(child, o).shape[1]
    layout: Literal["separate", "fused", "mla"]
    order: Literal["interleaved", "stacked"] | None = None
    if latent is not None:
        layout, head_dim = "mla", int(owner.v_head_dim)  # type: ignore[arg-type]
        heads = kv_heads = into // head_dim
        q = k = v = qkv = None
    else:
        head_dim = _head_dim(owner, config, model, _join(where, name))
        heads = into // head_dim
        if qkv is not None:
            layout, order = "fused", names.FUSED_ORDER.get(config.model_type)
            kv_heads = (_weight(child, qkv).shape[0] // head_dim - heads) // 2
            q = k = v = None
        else:
            layout = "separate"
            if k is None:
                raise _missing(model, "attention's key projection", _join(where, name))
            kv_heads = _weight(child, k).shape[0] // head_dim
    joint = any(
        norm.weight.shape[0] != head_dim and layout == "separate"
        for path, norm in child.named_modules()
        if path.split(".")[-1] in ("q_norm", "k_norm", "q_layernorm", "k_layernorm")
        and getattr(norm, "weight", None) is not None
    )
    full = [None if path is None else _join(name, path) for path in (q, k, v, qkv)]
    return Attention(
        name, layout, heads, kv_heads, head_dim, *full, _join(name, o), (), name, order, joint  # type: ignore[arg-type]
    )


def _projection_owner(child: nn.Module, path: str | None) -> nn.Module:
    return child.get_submodule(path.rpartition(".")[0]) if path else child


def _head_dim(owner: nn.Module, config: PreTrainedConfig, model: nn.Module, where: str) -> int:
    for key in ("head_dim", "head_size", "attention_head_size"):
        value = getattr(owner, key, None)
        if isinstance(value, int):
            return value
    value = getattr(config, "head_dim", None)
    if isinstance(value, int):
        return value
    raise _missing(model, "size of an attention head", f"{where} has no head_dim, head_size or attention_head_size")


def _feed_forward(
    module: nn.Module, config: PreTrainedConfig, model: nn.Module, where: str, attention: Attention | None
) -> tuple[Mlp | None, Experts | None]:
    """Find the dense MLP or the experts of a block; (None, None) if surgery removed them."""
    others = [(n, c) for n, c in module.named_children() if not _child_attends(c)]
    if any(dropped(child) == "mlp" for _, child in others):
        return None, None
    for name, child in others:
        owner = _experts_owner(child)
        if owner is not None:
            return None, _experts(child, name, owner, config, model, where)
    width_key = _first_key(config, names.MLP_WIDTH_KEYS) or names.MLP_WIDTH_KEY
    for name, child in others:
        mlp = _dense(child, name, width_key)
        if mlp is not None:
            return mlp, None
    # BERT keeps the two halves of its MLP as two children of the block.
    halves = _dense_halves(module, others, width_key)
    if halves is not None:
        return halves, None
    seen = ", ".join(_join(name, path) for name, child in others for path, _ in _linears(child)) or "no projections"
    raise _missing(model, "MLP or experts", f"{where} holds {seen}")


def _dense(child: nn.Module, name: str, width_key: str) -> Mlp | None:
    up, down = _pick(child, names.MLP_UP), _pick(child, names.MLP_DOWN)
    if up is None or down is None or _weight(child, up).shape != _weight(child, down).shape[::-1]:
        return None
    gate = _pick(child, names.MLP_GATE)
    paths = (None if gate is None else _join(name, gate), _join(name, up), _join(name, down))
    return Mlp(name, *paths, _weight(child, up).shape[0], width_key, (), name)


def _dense_halves(module: nn.Module, others: list[tuple[str, nn.Module]], width_key: str) -> Mlp | None:
    linears = [_join(name, path) for name, child in others for path, _ in _linears(child)]
    up = next((path for path in linears if _matches(path, names.MLP_UP)), None)
    down = next((path for path in linears if _matches(path, names.MLP_DOWN)), None)
    if up is None or down is None or _weight(module, up).shape != _weight(module, down).shape[::-1]:
        return None
    return Mlp("", None, up, down, _weight(module, up).shape[0], width_key, (), down)


def _experts_owner(child: nn.Module) -> str | None:
    """Return the path of the module that owns the fused experts, ragged or not."""
    for path, module in child.named_modules():
        if getattr(module, "paredown_ragged", False):
            return path
        fused = module._parameters.get("gate_up_proj")
        if fused is not None and fused.dim() == 3:
            return path
    return None


def _experts(
    child: nn.Module, name: str, owner: str, config: PreTrainedConfig, model: nn.Module, where: str
) -> Experts:
    experts = resolve(child, owner)
    parent_path = owner.rpartition(".")[0]
    parent = resolve(child, parent_path)
    widths: tuple[int, ...] | None = getattr(experts, "widths", None)
    if widths is not None:
        count, width, hidden = len(widths), max(widths), int(experts.hidden_dim)  # type: ignore[arg-type]
    else:
        gate_up, down = experts.gate_up_proj, experts._parameters.get("down_proj")
        count, hidden, width = down.shape if down is not None else (0, 0, 0)
        if tuple(gate_up.shape) != (count, 2 * width, hidden):  # type: ignore[union-attr, arg-type]
            seen = {key: tuple(value.shape) for key, value in experts._parameters.items() if value is not None}
            raise _missing(model, "experts' gate_up_proj [E, 2I, H] and down_proj [E, H, I]", f"{where} has {seen}")
    siblings = [(n, c) for n, c in parent.named_children() if c is not experts]
    router = next((n for n, c in siblings if _own_shape(c) == (count, hidden)), None)
    if router is None:
        seen = ", ".join(f"{n} {_own_shape(c) or ''}".strip() for n, c in siblings) or "nothing"
        raise _missing(model, f"router with weight [{count}, {hidden}]", f"beside {_join(where, name, owner)}: {seen}")
    prefix = _join(name, parent_path)
    shared = next(
        (m for n, c in siblings if n != router and (m := _dense(c, _join(prefix, n), _shared_key(config))) is not None),
        None,
    )
    gate = next((n for n, c in siblings if n != router and _own_shape(c) == (1, hidden)), None)
    routing = resolve(parent, router)
    bias = next((key for key, value in _tensors(routing) if "bias" in key and tuple(value.shape) == (count,)), None)
    groups = getattr(routing, "num_group", None) or 1
    top_k = getattr(routing, "top_k", None)
    if not isinstance(top_k, int):
        raise _missing(model, "router's top_k", f"{_join(where, prefix, router)} has no such attribute")
    keys = [
        _required_key(config, model, role, wanted)
        for role, wanted in (
            ("experts' count in the config", names.EXPERT_COUNT_KEYS),
            ("experts' width in the config", names.EXPERT_WIDTH_KEYS),
            ("experts' top-k in the config", names.EXPERT_TOP_K_KEYS),
        )
    ]
    router_path = _join(prefix, router)
    return Experts(
        path=name,
        router=router_path,
        experts=_join(name, owner),
        count=int(count),
        width=int(width),
        top_k=top_k,
        count_key=keys[0],
        width_key=keys[1],
        top_k_key=keys[2],
        correction_bias=None if bias is None else _join(router_path, bias),
        groups=int(groups),
        group_key=_first_key(config, names.EXPERT_GROUP_KEYS) if groups > 1 else None,
        shared=shared,
        shared_gate=None if gate is None or shared is None else _join(prefix, gate),
        norms=(),
        contribution=name,
        widths=widths,
        open_groups=int(getattr(routing, "topk_group", None) or 1),
    )


def _tensors(module: nn.Module) -> list[tuple[str, Any]]:
    own = [*module._parameters.items(), *module._buffers.items()]
    return [(key, value) for key, value in own if value is not None]


def _own_shape(module: nn.Module) -> tuple[int, ...] | None:
    weight = module._parameters.get("weight")
    return None if weight is None else tuple(weight.shape)


def _first_key(config: PreTrainedConfig, wanted: Sequence[str]) -> str | None:
    """Return the first key that the config really stores; names that its ``attribute_map`` forwards do not count."""
    forwarded = getattr(config, "attribute_map", {})
    return next((key for key in wanted if key not in forwarded and key in vars(config)), None)


def _required_key(config: PreTrainedConfig, model: nn.Module, role: str, wanted: Sequence[str]) -> str:
    key = _first_key(config, wanted)
    if key is None:
        raise _missing(model, role, f"none of {', '.join(wanted)}")
    return key


def _shared_key(config: PreTrainedConfig) -> str:
    return _first_key(config, names.SHARED_WIDTH_KEYS) or "shared_expert_intermediate_size"


def _residual(
    module: nn.Module, attention: Attention | None, mlp: Mlp | None, config: PreTrainedConfig
) -> Literal["pre", "parallel", "post"]:
    """Tell how sub-layers meet the stream: by a flag of the block, by its norms, or because the norm sits after the sum."""
    flag = getattr(module, "use_parallel_residual", getattr(config, "use_parallel_residual", None))
    if flag is not None:
        return "parallel" if flag else "pre"
    inside = [path for path, child in module.named_modules() if "." in path and _is_norm(child)]
    direct = [name for name, child in module.named_children() if _is_norm_place(name, child)]
    if not direct and any(path.split(".")[-1] == "LayerNorm" for path in inside):
        return "post"
    return "parallel" if len(direct) == 1 else "pre"


def _is_norm(module: nn.Module) -> bool:
    weight = module._parameters.get("weight")
    return weight is not None and weight.dim() == 1


def _is_norm_place(name: str, module: nn.Module) -> bool:
    """Whether a child of a block is a norm, or was one until its sub-layer was dropped."""
    return _is_norm(module) or (isinstance(module, nn.Identity) and any(part in name for part in ("norm", "ln_")))


def _norms(
    module: nn.Module,
    residual: str,
    attention: Attention | None,
    mlp: Mlp | None,
    experts: Experts | None,
) -> tuple[tuple[str, ...], ...]:
    """Return the norms before and after attention and before and after the MLP, as names of the block's children."""
    present = {name for name, child in module.named_children() if _is_norm_place(name, child)}
    if residual == "post" or not present:
        return (), (), (), ()
    if residual == "parallel" and len(present) == 1:
        # One norm feeds both sub-layers; it goes only when both have gone.
        return (), (), (), ()
    for pattern in names.NORM_PATTERNS:
        if {name for part in pattern for name in part} == present:
            return pattern
    raise _missing(module, "norms of a block", f"children that look like norms: {', '.join(sorted(present))}")


def _with_norms(part: Any, before: tuple[str, ...], after: tuple[str, ...]) -> Any:
    from dataclasses import replace

    return replace(part, norms=(*before, *after), contribution=after[0] if after else part.contribution)


def _tower(model: PreTrainedModel, path: str, items: nn.ModuleList) -> Tower:
    name: Literal["language", "vision"] = "language"
    if set(path.split(".")) & set(names.VISION) or getattr(model, "main_input_name", "") == "pixel_values":
        name = "vision"
    config_path = _config_path(model, name)
    config = getattr(model.config, config_path) if config_path else model.config
    blocks = tuple(
        block(item, config, index=i, path=f"{path}.{i}", model=model) for i, item in enumerate(items)
    )
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
                return int(_weight(item, dense).shape[0])
    return int(getattr(config, "embed_dim", None) or config.hidden_size)


def _path_of(model: nn.Module, wanted: nn.Module | None) -> str | None:
    return next((path for path, module in model.named_modules() if module is wanted), None) if wanted else None


def _final_norm(model: nn.Module, decoder: str, hidden: int) -> str | None:
    """Find the norm after the last block: a child of the module that runs the blocks, or of the one around it."""
    for owner in (decoder, decoder.rpartition(".")[0]):
        found = [
            name
            for name, child in resolve(model, owner).named_children()
            if _is_norm(child) and _own_shape(child) == (hidden,) and not name.startswith("pre")
        ]
        if found:
            return _join(owner, found[-1])
        if not owner:
            break
    return None
