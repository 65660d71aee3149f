"""Find the parts of one block: attention, MLP or experts, and the norms that serve them."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Literal

from torch import nn
from transformers.pytorch_utils import Conv1D

from paredown.core import architectures as names
from paredown.core.roles import Attention, Block, Experts, Mlp
from paredown.errors import ArchitectureError

if TYPE_CHECKING:
    from transformers import PreTrainedConfig


def resolve(root: nn.Module, path: str) -> nn.Module:
    """Return the module at ``path`` below ``root``; the root itself for an empty path."""
    return root.get_submodule(path)


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
    if attention is not None and mlp is not None:
        rows, columns = _weight(module, attention.o).shape[0], _weight(module, mlp.up).shape[1]
        if rows != columns:
            raise missing(owner, "MLP", f"{join(path, mlp.up)} reads {columns} channels of a stream of {rows}")
    residual = _residual(module, attention, mlp, config)
    before_a, after_a, before_m, after_m = _norms(module, residual, owner, path)
    if attention is not None:
        attention = _with_norms(attention, before_a, after_a)
    if mlp is not None:
        mlp = _with_norms(mlp, before_m, after_m)
    if experts is not None:
        experts = _with_norms(experts, before_m, after_m)
    return Block(index, path, residual, attention, mlp, experts, shared=getattr(module, "paredown_shared", None))


def missing(model: nn.Module, role: str, seen: str) -> ArchitectureError:
    """Build the error for a role that was not found."""
    return ArchitectureError(
        f"the {role} of {type(model).__name__} could not be found ({seen}); name the layout in core/architectures.py"
        " or use a supported family"
    )


def attending(item: nn.Module) -> bool:
    """Whether an item of a module list holds attention."""
    return any(_child_attends(child) for child in item.children())


def _child_attends(child: nn.Module) -> bool:
    """Whether a child of a block is attention: it projects to queries, keys and values, or did until it was dropped."""
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
    # Conv1D of GPT-2 stores its weight transposed; what is not recognised here is refused instead of cut wrongly.
    return weight is not None and weight.dim() == 2 and not isinstance(module, (nn.Embedding, Conv1D))


def _linears(module: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    for path, child in module.named_modules():
        if path and _is_linear(child):
            yield path, child


def _matches(path: str, wanted: Sequence[str]) -> bool:
    return any(path == name or path.endswith(f".{name}") for name in wanted)


def _pick(module: nn.Module, wanted: Sequence[str]) -> str | None:
    return next((path for path, _ in _linears(module) if _matches(path, wanted)), None)


def join(*parts: str) -> str:
    """Join the parts of a path that are not empty."""
    return ".".join(part for part in parts if part)


def _weight(module: nn.Module, path: str) -> Any:
    return resolve(module, path).weight


def _attention(module: nn.Module, config: PreTrainedConfig, model: nn.Module, where: str) -> Attention | None:
    candidates = [(name, child) for name, child in module.named_children() if _child_attends(child)]
    if not candidates:
        seen = ", ".join(name for name, _ in module.named_children())
        raise missing(model, "attention", f"{where} holds {seen}")
    name, child = candidates[0]
    if dropped(child):
        return None
    o = _pick(child, names.OUTPUT)
    if o is None:
        seen = ", ".join(path for path, _ in _linears(child))
        raise missing(model, "attention's output projection", f"{join(where, name)} holds {seen}")
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
        head_dim = _head_dim(owner, config, model, join(where, name))
        heads = into // head_dim
        if qkv is not None:
            layout, order = "fused", names.FUSED_ORDER.get(config.model_type)
            kv_heads = (_weight(child, qkv).shape[0] // head_dim - heads) // 2
            q = k = v = None
        else:
            layout = "separate"
            if k is None:
                raise missing(model, "attention's key projection", join(where, name))
            kv_heads = _weight(child, k).shape[0] // head_dim
    norms: list[Any] = [
        norm
        for path, norm in child.named_modules()
        if path.split(".")[-1] in ("q_norm", "k_norm", "q_layernorm", "k_layernorm")
    ]
    weights = [norm.weight for norm in norms if getattr(norm, "weight", None) is not None]
    joint = any(weight.shape[0] != head_dim and layout == "separate" for weight in weights)
    if layout != "mla":
        _check_attention(child, {"q": q, "k": k, "v": v, "qkv": qkv, "o": o}, (heads, kv_heads, head_dim), model, where)
    q, k, v, qkv = (None if path is None else join(name, path) for path in (q, k, v, qkv))
    return Attention(
        path=name,
        layout=layout,
        heads=heads,
        kv_heads=kv_heads,
        head_dim=head_dim,
        q=q,
        k=k,
        v=v,
        qkv=qkv,
        o=join(name, o),
        norms=(),
        contribution=name,
        fused_order=order,
        joint_norms=joint,
        head_norms=bool(norms),
        sees=", ".join(f"{name} {vars(owner)[name]}" for name in names.SEES if name in vars(owner)),
    )


def _check_attention(
    child: nn.Module, paths: dict[str, str | None], sizes: tuple[int, int, int], model: nn.Module, where: str
) -> None:
    """Refuse attention that only looks like what surgery knows: other projections, sizes or ways to add."""
    heads, kv_heads, head_dim = sizes
    extra = [path for path, _ in _linears(child) if path not in paths.values()]
    if extra:
        raise missing(
            model, "role of an attention's projection", f"{where} has {', '.join(extra)} beside the known ones"
        )
    wanted = {"q": heads, "k": kv_heads, "v": kv_heads, "qkv": heads + 2 * kv_heads}
    found = {role: int(_weight(child, path).shape[0]) for role, path in paths.items() if path and role in wanted}
    if kv_heads < 1 or heads % kv_heads or any(rows != wanted[role] * head_dim for role, rows in found.items()):
        raise missing(model, "attention's heads", f"{where} projects to {found} rows with heads of {head_dim}")
    if "residual" in inspect.signature(type(child).forward).parameters:
        raise missing(model, "addition to the residual stream", f"the attention of {where} adds for itself")


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
    raise missing(model, "size of an attention head", f"{where} has no head_dim, head_size or attention_head_size")


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
    seen = ", ".join(join(name, path) for name, child in others for path, _ in _linears(child)) or "no projections"
    raise missing(model, "MLP or experts", f"{where} holds {seen}")


def _dense(child: nn.Module, name: str, width_key: str) -> Mlp | None:
    up, down = _pick(child, names.MLP_UP), _pick(child, names.MLP_DOWN)
    if up is None or down is None or _weight(child, up).shape != _weight(child, down).shape[::-1]:
        return None
    gate = _pick(child, names.MLP_GATE)
    width = int(_weight(child, up).shape[0])
    return Mlp(
        name, None if gate is None else join(name, gate), join(name, up), join(name, down), width, width_key, (), name
    )


def _dense_halves(module: nn.Module, others: list[tuple[str, nn.Module]], width_key: str) -> Mlp | None:
    linears = [join(name, path) for name, child in others for path, _ in _linears(child)]
    up = next((path for path in linears if _matches(path, names.MLP_UP)), None)
    down = next((path for path in linears if _matches(path, names.MLP_DOWN)), None)
    if up is None or down is None or _weight(module, up).shape != _weight(module, down).shape[::-1]:
        return None
    return Mlp("", None, up, down, _weight(module, up).shape[0], width_key, (), down)


def _experts_owner(child: nn.Module) -> str | None:
    """Return the path of the module that owns the fused experts, ragged or not."""
    for path, module in child.named_modules():
        if getattr(module, "paredown_ragged", False):
            return str(path)
        fused = module._parameters.get("gate_up_proj")
        if fused is not None and fused.dim() == 3:
            return str(path)
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
        if tuple(gate_up.shape) != (count, 2 * width, hidden):  # type: ignore[arg-type]
            shapes = {key: tuple(value.shape) for key, value in experts._parameters.items() if value is not None}
            raise missing(model, "experts' gate_up_proj [E, 2I, H] and down_proj [E, H, I]", f"{where} has {shapes}")
    siblings = [(n, c) for n, c in parent.named_children() if c is not experts]
    router = next((n for n, c in siblings if own_shape(c) == (count, hidden)), None)
    if router is None:
        seen = ", ".join(f"{n} {own_shape(c) or ''}".strip() for n, c in siblings) or "nothing"
        raise missing(model, f"router with weight [{count}, {hidden}]", f"beside {join(where, name, owner)}: {seen}")
    prefix = join(name, parent_path)
    shared = next(
        (m for n, c in siblings if n != router and (m := _dense(c, join(prefix, n), _shared_key(config))) is not None),
        None,
    )
    gate = next((n for n, c in siblings if n != router and own_shape(c) == (1, hidden)), None)
    routing = resolve(parent, router)
    deeper = [key for key, value in routing.state_dict().items() if "." in key and count in value.shape]
    if deeper:
        raise missing(model, "role of a router's part", f"{join(where, prefix, router)} also holds {', '.join(deeper)}")
    bias = next((key for key, value in _tensors(routing) if "bias" in key and tuple(value.shape) == (count,)), None)
    groups = getattr(routing, "num_group", None) or 1
    top_k = getattr(routing, "top_k", None)
    if not isinstance(top_k, int):
        raise missing(model, "router's top_k", f"{join(where, prefix, router)} has no such attribute")
    keys = [
        _required_key(config, model, role, wanted)
        for role, wanted in (
            ("experts' count in the config", names.EXPERT_COUNT_KEYS),
            ("experts' width in the config", names.EXPERT_WIDTH_KEYS),
            ("experts' top-k in the config", names.EXPERT_TOP_K_KEYS),
        )
    ]
    router_path = join(prefix, router)
    return Experts(
        path=name,
        router=router_path,
        experts=join(name, owner),
        count=int(count),
        width=int(width),
        top_k=top_k,
        count_key=keys[0],
        width_key=keys[1],
        top_k_key=keys[2],
        correction_bias=None if bias is None else join(router_path, bias),
        groups=int(groups),
        group_key=_first_key(config, names.EXPERT_GROUP_KEYS) if groups > 1 else None,
        shared=shared,
        shared_gate=None if gate is None or shared is None else join(prefix, gate),
        norms=(),
        contribution=name,
        widths=widths,
        open_groups=int(getattr(routing, "topk_group", None) or 1),
        step=max(16 // next(experts.parameters()).element_size(), 1),
    )


def _tensors(module: nn.Module) -> list[tuple[str, Any]]:
    own = [*module._parameters.items(), *module._buffers.items()]
    return [(key, value) for key, value in own if value is not None]


def own_shape(module: nn.Module) -> tuple[int, ...] | None:
    """Return the shape of a module's own weight."""
    weight = module._parameters.get("weight")
    return None if weight is None else tuple(weight.shape)


def _first_key(config: PreTrainedConfig, wanted: Sequence[str]) -> str | None:
    """Return the first key that the config really stores; names that its ``attribute_map`` forwards do not count."""
    forwarded = getattr(config, "attribute_map", {})
    return next((key for key in wanted if key not in forwarded and key in vars(config)), None)


def _required_key(config: PreTrainedConfig, model: nn.Module, role: str, wanted: Sequence[str]) -> str:
    key = _first_key(config, wanted)
    if key is None:
        raise missing(model, role, f"none of {', '.join(wanted)}")
    return key


def _shared_key(config: PreTrainedConfig) -> str:
    return _first_key(config, names.SHARED_WIDTH_KEYS) or "shared_expert_intermediate_size"


def _residual(
    module: nn.Module, attention: Attention | None, mlp: Mlp | None, config: PreTrainedConfig
) -> Literal["pre", "parallel", "post"]:
    """Tell how sub-layers meet the stream: by a flag of the block, or by how many norms there are and where."""
    flag = getattr(module, "use_parallel_residual", getattr(config, "use_parallel_residual", None))
    if flag is not None:
        return "parallel" if flag else "pre"
    inside = [path for path, child in module.named_modules() if "." in path and is_norm(child)]
    direct = [name for name, child in module.named_children() if _is_norm_place(name, child)]
    if not direct and any(path.split(".")[-1] == "LayerNorm" for path in inside):
        return "post"
    return "parallel" if len(direct) == 1 else "pre"


def is_norm(module: nn.Module) -> bool:
    """Whether a module has a one-dimensional weight."""
    weight = module._parameters.get("weight")
    return weight is not None and weight.dim() == 1


def _is_norm_place(name: str, module: nn.Module) -> bool:
    """Whether a child of a block is a norm, or was one until its sub-layer was dropped."""
    return is_norm(module) or (isinstance(module, nn.Identity) and any(part in name for part in ("norm", "ln_")))


def _norms(module: nn.Module, residual: str, model: nn.Module, where: str) -> tuple[tuple[str, ...], ...]:
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
    raise missing(model, "norms of a block", f"{where} holds {', '.join(sorted(present))}")


def _with_norms(part: Any, before: tuple[str, ...], after: tuple[str, ...]) -> Any:
    """Return an attention, MLP or experts part with its norms; the last norm after it is what enters the stream."""
    return replace(part, norms=(*before, *after), contribution=after[0] if after else part.contribution)
