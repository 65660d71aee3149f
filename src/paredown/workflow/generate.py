"""Generate text, with policies attached or without, and tell what it took: times, and bytes of the cache."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from pydantic import BaseModel, ConfigDict
from transformers import TextStreamer

from paredown.core import calibration, checkpoint
from paredown.core.attach import attach, check_together
from paredown.core.cache import nbytes
from paredown.core.checkpoint import Model
from paredown.core.method import Policy
from paredown.core.stepwise import new_cache
from paredown.errors import DataError, UsageError
from paredown.workflow import evaluate, measure, policies

Tell = Callable[[str], None]


class Generated(BaseModel):
    """What was generated and what it took.

    Bytes are those of the cache: ``peak`` the most after any pass, ``steady`` those after the last. The rate counts the
    tokens after the first.
    """

    model_config = ConfigDict(extra="forbid")

    model: str
    policies: list[dict[str, Any]]
    text: str
    prompt_tokens: int
    new_tokens: int
    seconds_to_first_token: float
    tokens_per_second: float | None
    cache_peak_bytes: int
    cache_steady_bytes: int
    seed: int
    temperature: float
    versions: dict[str, str]
    hardware: dict[str, Any]


def generate(
    ref: str | Path,
    prompt: str,
    acting: Sequence[Policy] = (),
    *,
    image: str | Path | None = None,
    max_new_tokens: int = 256,
    temperature: float = 0.0,
    seed: int = 0,
    data: str | Path | None = None,
    device: str | None = None,
    tell: Tell | None = None,
) -> Generated:
    """Generate behind a prompt.

    Parameters
    ----------
    ref
        A hub id, a local folder (whose own policies are attached too) or ``testbed:NAME``.
    prompt
        Text; for a vision model it may hold the image's placeholder, which is put in front of it otherwise.
    acting
        Policies to attach; what they must learn beforehand is learned first.
    image
        A picture, for models that see.
    max_new_tokens
        At most so many; the model's end-of-text token ends it before.
    temperature
        0 takes the most likely token each time.
    seed
        Fixes what is drawn.
    data
        What policies look at that learn; a testbed brings its own.
    device
        A GPU where there is one, else the CPU.
    tell
        Called with each piece of text as it comes.

    Raises
    ------
    UsageError
        If the model has no tokenizer or cannot see, or the prompt is empty or too long.
    PolicyError
        If the policies cannot act on this model.
    """
    if max_new_tokens < 1 or not 0 <= temperature < 100:
        raise UsageError("take --max-new-tokens of 1 or more and a --temperature of 0 or more.")
    model = checkpoint.load(ref, device=device or measure.default_device(), policies=False)
    evaluate.check_causal(model)
    together = (*policies.stored(model), *acting)
    check_together(together)
    inputs, count = _inputs(model, prompt, image)
    _check_room(model, count, max_new_tokens)
    with tempfile.TemporaryDirectory(prefix="paredown-") as folder:
        sample = None
        if policies.needs_data(acting):
            texts = calibration.read(data, model_ref=str(ref), split="calibration")
            sample = calibration.for_model(model, texts, seed=seed)
        ready = (*policies.stored(model), *policies.prepare(acting, model, sample, seed=seed, folder=Path(folder)))
        return _generate(model, inputs, count, ready, max_new_tokens, temperature, seed, tell)


def _generate(
    model: Model,
    inputs: dict[str, Any],
    count: int,
    acting: tuple[Policy, ...],
    most: int,
    temperature: float,
    seed: int,
    tell: Tell | None,
) -> Generated:
    hf: Any = model.hf
    drawn = {"do_sample": True, "temperature": temperature, "top_k": 0, "top_p": 1.0} if temperature else {
        "do_sample": False
    }  # fmt: skip
    with checkpoint.quiet(), attach(model, *acting) if acting else nullcontext(), torch.random.fork_rng():
        torch.manual_seed(seed)
        cache = new_cache(hf)
        clock = _Clock(model.tokenizer, cache, tell)
        kept = {} if cache is None else {"past_key_values": cache}
        hf.generate(**inputs, **kept, **drawn, max_new_tokens=most, streamer=clock)
    return Generated(
        model=model.source,
        policies=policies.described(acting),
        text=clock.text,
        prompt_tokens=count,
        new_tokens=clock.tokens,
        seconds_to_first_token=clock.first - clock.start,
        tokens_per_second=(clock.tokens - 1) / max(clock.last - clock.first, 1e-9) if clock.tokens > 1 else None,
        cache_peak_bytes=max(clock.held, default=0),
        cache_steady_bytes=clock.held[-1] if clock.held else 0,
        seed=seed,
        temperature=temperature,
        versions=measure.versions(),
        hardware=measure.hardware(str(hf.device)),
    )


class _Clock(TextStreamer):  # type: ignore[misc]  # transformers is not typed
    """Hands text on word by word and notes, with each token, the time and what the cache holds."""

    def __init__(self, tokenizer: Any, cache: Any, tell: Tell | None) -> None:
        super().__init__(tokenizer, skip_prompt=True, skip_special_tokens=True)
        self.text, self.tokens, self.held = "", 0, list[int]()
        self.start = self.first = self.last = time.perf_counter()
        self._cache, self._tell = cache, tell

    def put(self, value: Any) -> None:
        """Take the prompt, and then each token."""
        if not self.next_tokens_are_prompt:
            self.tokens += 1
            self.last = time.perf_counter()
            if self.tokens == 1:
                self.first = self.last
            if self._cache is not None:
                self.held.append(nbytes(self._cache))
        else:
            self.start = time.perf_counter()
        super().put(value)

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        """Hand a piece of text on."""
        self.text += text
        if self._tell is not None:
            self._tell(text)


def _inputs(model: Model, prompt: str, image: str | Path | None) -> tuple[dict[str, Any], int]:
    """Return what the model reads, and how many tokens that is."""
    if model.tokenizer is None:
        raise UsageError(f"{model.source} has no tokenizer, so it cannot write text; put its files into the folder.")
    if not prompt and image is None:
        raise UsageError("the prompt is empty; give --prompt or --prompt-file some text.")
    made = model.tokenizer(prompt, return_tensors="pt") if image is None else _seen(model, prompt, image)
    ids = made["input_ids"]
    if ids.shape[1] == 0:
        raise UsageError("the prompt gives no token; give --prompt or --prompt-file some text.")
    inputs = {name: value.to(model.hf.device) for name, value in made.items() if isinstance(value, torch.Tensor)}
    inputs = {name: value.to(model.hf.dtype) if value.is_floating_point() else value for name, value in inputs.items()}
    inputs.pop("token_type_ids", None)
    return inputs, int(ids.shape[1])


def _seen(model: Model, prompt: str, image: str | Path) -> Any:
    from PIL import Image

    processor = model.processor
    if model.anatomy.vision is None or processor is None or not hasattr(processor, "image_processor"):
        raise UsageError(f"{model.source} cannot see, or has no processor that can be read; leave out --image.")
    try:
        with Image.open(image) as opened:
            picture = opened.convert("RGB")
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or "it is no picture"
        raise DataError(f"the image {str(image)!r} cannot be read ({reason}); give a PNG or JPEG file.") from None
    token = getattr(processor, "image_token", None)
    if token and token not in prompt:
        prompt = f"{token}\n{prompt}"
    return processor(images=[picture], text=[prompt], return_tensors="pt")


def _check_room(model: Model, count: int, most: int) -> None:
    limit = measure.positions(model.hf)
    if limit is not None and count + most > limit:
        raise UsageError(
            f"{count} prompt tokens and {most} new ones are more than the {limit} positions of {model.source}; "
            "shorten the prompt or lower --max-new-tokens."
        )
