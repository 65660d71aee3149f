"""The words for a model's parts: data only, no tensors and no modules."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Attention:
    """Self-attention of one block.

    ``contribution`` is the module whose output is added to the residual stream: the attention itself, or the norm
    after it where a family has one (Gemma 3). ``norms`` are the norms that serve this sub-layer alone.
    ``layout`` is ``separate`` (q, k, v projections), ``fused`` (one qkv projection) or ``mla`` (latent attention).
    ``fused_order`` says how the rows of a fused projection are laid out: ``interleaved`` ``[heads, 3, head_dim]`` or
    ``stacked`` ``[3, heads, head_dim]``; None where that is not known. ``joint_norms`` is true where queries and keys
    are normalised over all heads together (OLMoE), which makes heads depend on each other; ``head_norms`` where they
    are normalised at all. ``sees`` tells what a layer sees other than layers of its family need to: its window, whether
    it knows positions.
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
    head_norms: bool = False
    sees: str = ""


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
    consecutive runs of experts of equal length, of which a token may use ``open_groups``. A common width must be a
    multiple of ``step``: the grouped matrix products that transformers runs by default need rows of whole 16 bytes.
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
    step: int = 1


@dataclass(frozen=True)
class Shared:
    """Weights that several blocks use. ``source`` is the block that holds them; that may be the block itself.

    ``rank`` is that of the low-rank delta which each linear layer of the block adds to them (0: none); ``norms`` says
    whether norms and biases are the block's own.
    """

    source: int
    rank: int = 0
    norms: bool = True


@dataclass(frozen=True)
class Block:
    """One transformer block. ``mlp`` and ``experts`` exclude each other; a dropped sub-layer is None.

    ``residual`` is ``pre`` (norm, sub-layer, add; one after the other), ``parallel`` (both read the same stream) or
    ``post`` (the norm comes after the addition, as in BERT). ``shared`` is None where the block has all its weights for
    itself, or only lends them.
    """

    index: int
    path: str
    residual: Literal["pre", "parallel", "post"]
    attention: Attention | None
    mlp: Mlp | None
    experts: Experts | None
    shared: Shared | None = None


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
