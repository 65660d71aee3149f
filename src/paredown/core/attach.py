"""Attach policies to a model and take them off again; in between, the seams call their runtimes.

- What is touched: the name of the attention implementation in the configs, hooks on modules, the forward of MLPs that
  a policy computes itself, the layers of caches that pass by. All of it is undone when the context closes, also after
  an error.
- A ``DynamicCache`` that comes along empty gets our layers; one that was filled by the model alone, and a static one,
  is refused.
- Policies that act on different places go together; the others are refused before anything runs.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Cache, DynamicCache, PreTrainedModel

from paredown.core import anatomy as anatomy_module
from paredown.core import attention, feeding, inside
from paredown.core.attention import Call, Seat, compute, visible
from paredown.core.cache import PolicyLayer, Store, nbytes
from paredown.core.checkpoint import Model
from paredown.core.companion import Companion, CompanionLayer
from paredown.core.depth.skipping import Skipping
from paredown.core.images import visual
from paredown.core.method import Place, Policy
from paredown.core.runtime import Part, Pass, Runtime, overrides
from paredown.core.stream import Stream
from paredown.errors import ArchitectureError, PolicyError

_WHOLE_CACHE: frozenset[Place] = frozenset({"slots", "reads", "token stream"})
_PARTS_OF_CACHE: frozenset[Place] = frozenset({"heads", "keys", "values"})
_ATTACHED = "_paredown_attachment"


@contextlib.contextmanager
def attach(model: Model | PreTrainedModel, *policies: Policy) -> Iterator[Attachment]:
    """Make ``model`` run under ``policies`` for as long as the context is open.

    Parameters
    ----------
    model : a `paredown.Model` or a plain Hugging Face model
    policies : one or several that act on different places; ``keep=1`` changes nothing

    Yields
    ------
    The attachment, which tells how many bytes the caches hold.

    Raises
    ------
    PolicyError
        If the policies do not go together, or the model cannot run under one.
    ArchitectureError
        If the model lacks what a policy acts on.
    """
    whole = model if isinstance(model, Model) else wrap(model)
    check_together(policies)
    with attach_runtimes(whole, [policy.runtime(whole) for policy in policies if not policy.inert], policies) as it:
        yield it


@contextlib.contextmanager
def attach_runtimes(model: Model, runtimes: Sequence[Runtime], policies: Sequence[Policy] = ()) -> Iterator[Attachment]:
    """Like :func:`attach`, for runtimes that belong to no policy, such as those that only look."""
    hf: Any = model.hf
    check_model(hf)
    attachment = Attachment(model, runtimes, policies)
    with contextlib.ExitStack() as stack:
        hf.__dict__[_ATTACHED] = attachment
        stack.callback(hf.__dict__.pop, _ATTACHED, None)
        if runtimes:
            attachment.install(stack)
        yield attachment


def wrap(hf: PreTrainedModel) -> Model:
    """Return ``hf`` with its anatomy, and touch nothing."""
    return Model(hf, None, None, anatomy_module.find(hf), type(hf).__name__)


def check_model(hf: Any) -> None:
    """Refuse a model that no policy can run in.

    Raises
    ------
    PolicyError
        In one sentence.
    """
    if _ATTACHED in hf.__dict__:
        raise PolicyError("a policy is attached to this model already; attach several at once: attach(model, a, b).")
    if hasattr(hf, "_orig_mod") or any("_compiled_call_impl" in m.__dict__ or _compiled(m) for m in hf.modules()):
        raise PolicyError("a compiled model cannot run under a policy; give the model that torch.compile was given.")
    if len(set((getattr(hf, "hf_device_map", None) or {}).values())) > 1:
        raise PolicyError("a model spread over several devices cannot run under a policy; load it on one.")
    if getattr(getattr(hf, "generation_config", None), "cache_implementation", None) not in (None, "dynamic"):
        raise PolicyError(
            f"the model's generation config asks for a {hf.generation_config.cache_implementation!r} cache, and a "
            "policy needs a dynamic one; set cache_implementation to None."
        )


def _compiled(module: nn.Module) -> bool:
    forward: Any = module.__dict__.get("forward")
    return getattr(module, "_compiled_call_impl", None) is not None or hasattr(forward, "_torchdynamo_orig_callable")


def check_together(policies: Sequence[Policy]) -> None:
    """Refuse policies that act on the same place.

    Raises
    ------
    PolicyError
        Naming both and the place.
    """
    for index, one in enumerate(policies):
        for other in policies[:index]:
            shared = one.places & other.places
            if not shared and one.places & _WHOLE_CACHE and other.places & (_WHOLE_CACHE | _PARTS_OF_CACHE):
                shared = frozenset({"slots"})
            if not shared and other.places & _WHOLE_CACHE and one.places & _PARTS_OF_CACHE:
                shared = frozenset({"slots"})
            if shared:
                what = "how the cache is kept" if shared == {"slots"} else f"the {min(shared)}"
                raise PolicyError(
                    f"{other.name} and {one.name} both decide on {what}, so they cannot run together; leave one out."
                )


class Attachment:
    """Policies at work on a model.

    Attributes
    ----------
    now : the pass that is under way, or None
    stream : its token stream, or None
    """

    def __init__(self, model: Model, runtimes: Sequence[Runtime], policies: Sequence[Policy]) -> None:
        self.model, self.runtimes, self.policies = model, list(runtimes), list(policies)
        self.now: Pass | None = None
        self.stream: Stream | None = None
        self.last: Cache | None = None
        self._tower = model.anatomy.language
        self._eye = visual.Eye(model, self._with("look"), self._with("after_vision"), self._with("features"))
        self._before, self._after = self._with("before"), self._with("after")
        self._attend, self._watch = self._with("attend"), self._with("watch")
        self._feed, self._remember = self._with("feed"), self._with("companion")
        self._skipping = Skipping(found, lambda: self.now) if (found := self._with("skips")) else None
        self._streams = bool(self._before or self._after or self._eye.chooses)
        self._keeps = bool(self._attend or self._with("store") or self._with("partition") or self._streams)
        self._attentions: dict[int, nn.Module] = {}

    def _with(self, hook: str) -> list[Runtime]:
        return [runtime for runtime in self.runtimes if overrides(runtime, hook)]

    def nbytes(self, cache: Cache | None = None) -> int:
        """Return the bytes that ``cache`` keeps allocated; the cache that was used last by default."""
        cache = self.last if cache is None else cache
        return 0 if cache is None else nbytes(cache)

    # Installing.

    def install(self, stack: contextlib.ExitStack) -> None:
        """Touch the model; everything is undone when ``stack`` closes."""
        stack.callback(self._finish)
        hf = self.model.hf
        blocks = [(part, hf.get_submodule(part.path)) for part in self._tower.blocks]
        for part, block in blocks:
            if part.attention is not None:
                self._attentions[part.index] = attention.attender(block.get_submodule(part.attention.path))
        self._check_attention()
        stack.enter_context(attention.seated(self, "language", self._attentions))
        decoder = hf.get_submodule(self._tower.decoder)
        handles = [
            decoder.register_forward_pre_hook(self._begin, with_kwargs=True),
            decoder.register_forward_hook(self._done, always_call=True),
        ]
        if self._streams:
            for name, child in decoder.named_children():
                if "rotary" in name or name == "rotary_emb":
                    handles.append(child.register_forward_hook(self._rotated, with_kwargs=True))
            last = blocks[-1][0].index
            for part, block in blocks:
                handles.append(block.register_forward_pre_hook(self._enter(part.index), with_kwargs=True))
                # Ours comes first, so that hidden states recorded by transformers are those that go on.
                handles.append(block.register_forward_hook(self._leave(part.index, part.index == last), prepend=True))
        for handle in handles:
            stack.callback(handle.remove)
        if self._feed:
            feeding.install(stack, self, blocks, self._feed)
        if self._skipping is not None:
            self._skipping.install(stack, hf, [(part.index, block) for part, block in blocks])
        inside.install(stack, self, blocks, self.runtimes)
        self._eye.install(stack, self)

    def _check_attention(self) -> None:
        for part in self._tower.blocks:
            if part.attention is not None and part.attention.layout == "mla" and self._keeps:
                raise ArchitectureError(
                    f"{type(self.model.hf).__name__} keeps latent keys and values, which no policy of the cache can "
                    "divide; use a method that makes the weights smaller."
                )
        if self.policies and self._keeps and self._tower.name == "language":
            config: Any = self.model.hf.get_submodule(self._tower.decoder).config
            if not self._touched(DynamicCache(config=config)):
                raise ArchitectureError(
                    f"every layer of {type(self.model.hf).__name__} keeps a sliding window of tokens alone, so "
                    f"{self.policies[0].name} would change nothing; run the model without it."
                )

    # The pass.

    def _begin(self, decoder: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, Any]:
        ids = kwargs.get("input_ids", args[0] if args else None)
        embeds = kwargs.get("inputs_embeds")
        first = embeds if embeds is not None else ids
        assert first is not None
        batch, length = first.shape[:2]
        kwargs = self._with_cache(decoder, kwargs)
        cache = kwargs.get("past_key_values")
        past = 0 if cache is None else int(cache.get_seq_length())
        self.now = Pass(
            batch=batch,
            length=length,
            past=past,
            padding=_padding(kwargs.get("attention_mask"), past + length),
            cache=cache,
            ids=ids,
            reading=self._skipping is not None and self._skipping.reading,
        )
        self._eye.see(self.now)
        self._accompany(self.now)
        self.last = cache if cache is not None else self.last
        self.stream = Stream(self.now) if self._streams else None
        for runtime in self.runtimes:
            runtime.begin(self.now)
        return args, kwargs

    def _done(self, *_: Any) -> None:
        self._finish()

    def _finish(self) -> None:
        now, self.now, self.stream = self.now, None, None
        if now is not None:
            for runtime in self.runtimes:
                runtime.end(now)
        self._eye.forget()

    def _accompany(self, now: Pass) -> None:
        """Hand runtimes what they remember of the pass's sequences."""
        layers = [] if now.cache is None else [one for one in now.cache.layers if isinstance(one, CompanionLayer)]
        held: dict[int, Companion] = {}
        for layer in layers:
            if layer.seen != now.past:
                raise PolicyError("this cache was changed from outside while a policy was attached; start a new one.")
            layer.seen, layer.is_initialized = now.stop, True
            held[layer.number] = layer.companion
        for number, runtime in enumerate(self.runtimes):
            if runtime in self._remember:
                now.companions[runtime] = held[number] if number in held else runtime.companion()

    def _with_cache(self, decoder: nn.Module, kwargs: dict[str, Any]) -> dict[str, Any]:
        if not (self._keeps or self._remember):
            return kwargs
        config: Any = decoder.config
        wanted = kwargs.get("use_cache")
        cache = kwargs.get("past_key_values")
        if cache is None:
            generates = getattr(config, "use_cache", False) and self._tower.name == "language"
            if not (generates if wanted is None else wanted) or decoder.training:
                return kwargs
            cache = DynamicCache(config=config)
            kwargs = {**kwargs, "past_key_values": cache}
        self.adopt(cache)
        return kwargs

    def adopt(self, cache: Any) -> None:
        """Put our layers into an empty cache; accept one that has them. A first pass does so by itself.

        Raises
        ------
        PolicyError
            If it is no dynamic cache, or holds tokens that were read without these policies.
        """
        config: Any = self.model.hf.get_submodule(self._tower.decoder).config
        if getattr(cache, "offloading", False):
            raise PolicyError("an offloaded cache does not go with a policy; drop cache_implementation='offloaded'.")
        if not isinstance(cache, DynamicCache):
            raise PolicyError(
                f"a policy cannot keep its tokens in a {type(cache).__name__}; pass a DynamicCache, or none."
            )
        filled_under: Attachment | None = getattr(cache, _ATTACHED, None)
        if filled_under is not None:
            if filled_under is not self:
                if filled_under.policies != self.policies:
                    raise PolicyError("this cache was filled under another policy; start a new one.")
                for layer in cache.layers:
                    if isinstance(layer, PolicyLayer):
                        layer.owner = self
                setattr(cache, _ATTACHED, self)
            return
        if cache.layers and cache.get_seq_length() > 0:
            raise PolicyError(
                "this cache was filled by the model without the policy; start a new one inside `with attach(...)`."
            )
        if not cache.layers:
            cache.layers = list(DynamicCache(config=config).layers)
            cache.layer_class_to_replicate = None
        setattr(cache, _ATTACHED, self)
        for index, window in self._touched(cache).items() if self._keeps else ():
            cache.layers[index] = PolicyLayer(self, self._parts(index, window), window)
        for number, runtime in enumerate(self.runtimes):
            if runtime in self._remember:
                cache.layers.append(CompanionLayer(runtime.companion(), number))

    def _touched(self, cache: Any) -> dict[int, int | None]:
        """Return the layers of a plain cache that a policy keeps, with their sliding windows."""
        found = {}
        for index, layer in enumerate(cache.layers):
            window = getattr(layer, "sliding_window", None)
            if index not in self._attentions or type(layer).__module__ != "transformers.cache_utils":
                continue
            if self._streams or any(runtime.touches(index, window) for runtime in self.runtimes):
                found[index] = window
        return found

    def _parts(self, layer: int, window: int | None) -> list[tuple[Tensor | None, Store]]:
        touching = [runtime for runtime in self.runtimes if runtime.touches(layer, window)]
        divided: Sequence[Part] | None = next((p for r in touching if (p := r.partition(layer)) is not None), None)
        if divided is None:
            divided = [Part(None, None)]
        return [(part.heads, part.make() if part.make is not None else self._grow(touching, layer)) for part in divided]

    def _grow(self, touching: Sequence[Runtime], layer: int) -> Store:
        return next((store for r in touching if (store := r.store(layer)) is not None), None) or Store()

    # Attention.

    def attention(self, seat: Seat, call: Call) -> Tensor:
        """Return attention of a call: what the registered function asks."""
        if seat.tower == "vision":
            return self._eye.attention(call)
        now = self.now
        if now is None:
            return call.plain()
        call.now = now
        if self.stream is not None:
            call.rows, call.ordered, call.sizes = self.stream.rows, self.stream.ordered, self.stream.sizes
            if call.rows is not None:
                # Flash attention would take gaps in the positions for the borders of packed sequences.
                call.options.pop("position_ids", None)
        layers = now.cache.layers if now.cache is not None else ()
        index = getattr(call.module, "layer_idx", seat.layer)
        held = layers[index] if index < len(layers) else None
        call.cached = held if isinstance(held, PolicyLayer) else None
        for runtime in self._watch:
            runtime.watch(call)
        if self._skipping is not None:
            self._skipping.note(call)
        if call.cached is not None:
            for runtime in self._attend:
                out = runtime.attend(call)
                if out is not None:
                    return out
            held_here: Tensor = call.cached.attend(call)
            return held_here
        if call.rows is None and call.sizes is None:
            return call.plain()
        seen = visible(call, call.rows, call.key.shape[2], call.sizes)
        return compute(call, call.key, call.value, seen)

    # The token stream.

    def _rotated(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        if self.stream is None:
            return
        ids = kwargs.get("position_ids", args[1] if len(args) > 1 else None)
        if not isinstance(ids, Tensor):
            return
        rest = {name: value for name, value in kwargs.items() if name not in ("x", "position_ids")}

        def rotate(hidden: Tensor, position_ids: Tensor) -> Any:
            return module.forward(hidden, position_ids, *args[2:], **rest)

        self.stream.rotations.append((output, ids, rotate))

    def _enter(self, layer: int) -> Any:
        def hook(block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, Any] | None:
            stream = self.stream
            if stream is None:
                return None
            hidden = args[0] if args else kwargs["hidden_states"]
            stream.enter(hidden)
            stream.told(kwargs)
            if layer == self._tower.blocks[0].index:
                self._eye.drop(stream)
            for runtime in self._before:
                stream.told(kwargs)
                runtime.before(layer, stream)
            if not stream.changed:
                return None
            told = stream.told(kwargs)
            if args:
                return (stream.state(), *args[1:]), told
            return args, {**told, "hidden_states": stream.state()}

        return hook

    def _leave(self, layer: int, last: bool) -> Any:
        def hook(block: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
            stream = self.stream
            if stream is None:
                return None
            hidden = output[0] if isinstance(output, tuple) else output
            stream.leave(hidden)
            for runtime in self._after:
                runtime.after(layer, stream)
            if stream.rows is None and stream.hidden is hidden:
                return None
            state = stream.restored() if last else stream.state()
            return (state, *output[1:]) if isinstance(output, tuple) else state

        return hook


def _padding(mask: Any, length: int) -> Tensor | None:
    """Return which tokens are real, ``[B, length]``, or None if all are."""
    if isinstance(mask, dict):
        mask = next((m for m in mask.values() if m is not None), None)
    if not isinstance(mask, Tensor):
        return None
    if mask.dim() == 4:
        # The last query sees all real tokens, unless a window hides some; 4-D masks come from static caches alone.
        row = mask[:, 0, -1]
        real = row if row.dtype == torch.bool else row > torch.finfo(row.dtype).min / 2
    else:
        real = mask.bool()
    real = real[:, :length]
    return None if bool(real.all()) else real
