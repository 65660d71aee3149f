"""Which heads copy from the context: facts planted in text, asked for at its end, and who looked at what was copied.

Source of the score: "Retrieval Head Mechanistically Explains Long-Context Factuality", 2024, arXiv 2404.15574.

- A :class:`Planter` makes texts in which statements (a marker, then a key that cannot be guessed) are planted; the end
  of the text repeats markers, and the model is to go on with the keys. It needs nothing but rows of tokens.
- :func:`copies` lets the model answer, and counts for each head how many tokens of the key it looked at most just when
  the model produced them. The model keeps its own attention; only the last query's row is computed beside it.
- :func:`ablate` switches heads off, to see whether those that copy are needed for it.
"""

from __future__ import annotations

import contextlib
import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor
from transformers import DynamicCache

from paredown.core.attach import attach_runtimes
from paredown.core.attention import Call, visible
from paredown.core.calibration import Batch
from paredown.core.checkpoint import Model
from paredown.core.runtime import Runtime
from paredown.errors import DataError

ORDINALS = ("first", "second", "third", "fourth", "fifth", "sixth", "seventh", "eighth", "ninth", "tenth")
OVERLAP = 0.9
"""Share of the key's tokens that a stretch of the prompt must hold to count as its place."""
RECALL = 0.5
"""A sample counts if more than this share of the key's tokens is in the answer."""
_MARKER = 3
_LONGEST_KEY = 32


@dataclass(frozen=True)
class Statement:
    """What is planted: the tokens that announce the key, the key, and what closes the sentence."""

    marker: tuple[int, ...]
    key: tuple[int, ...]
    close: tuple[int, ...] = ()

    @property
    def ids(self) -> tuple[int, ...]:
        """All tokens."""
        return (*self.marker, *self.key, *self.close)


@dataclass(frozen=True)
class Needle:
    """A question about a text: the prompt, the answer, and where in the prompt the answer stands (None: nowhere)."""

    prompt: tuple[int, ...]
    answer: tuple[int, ...]
    span: tuple[int, int] | None

    @classmethod
    def of(cls, prompt: Sequence[int], answer: Sequence[int]) -> Needle:
        """Make one, looking for the answer in the prompt."""
        return cls(tuple(prompt), tuple(answer), find(prompt, answer))


def find(prompt: Sequence[int], answer: Sequence[int]) -> tuple[int, int] | None:
    """Return where ``answer`` stands in ``prompt`` (start, stop): the first exact place, else the first close one.

    A tokenizer may cut the answer differently inside a text, so a window of the same length will do that holds at least
    90 % of its distinct tokens. That window may begin early; this is why exact ones are looked for first.
    """
    count, wanted = len(answer), set(answer)
    starts = range(len(prompt) - count + 1)
    if count == 0:
        return None
    told = tuple(answer)
    exact = next((s for s in starts if prompt[s] == told[0] and tuple(prompt[s : s + count]) == told), None)
    if exact is not None:
        return exact, exact + count
    near = next((s for s in starts if len(wanted & set(prompt[s : s + count])) > OVERLAP * len(wanted)), None)
    return None if near is None else (near, near + count)


class Planter:
    """Plants statements in text.

    Parameters
    ----------
    data : rows of tokens: the haystack, and the tokens that keys are made of
    tokenizer : puts the statements into words; without one they are all random tokens
    template : a statement in which ``{name}`` stands for a random word and ``{value}`` for random digits; empty for
        markers that number the statements and keys of random tokens

    Raises
    ------
    DataError
        If there are no data, or the template lacks ``{value}`` or a tokenizer.
    """

    def __init__(self, data: Batch | None, tokenizer: Any = None, template: str = "") -> None:
        if data is None or not data.input_ids.numel():
            raise DataError("texts to plant facts in are missing; give it calibration data.")
        if template and ("{value}" not in template or tokenizer is None):
            raise DataError("a template needs {value} where the digits go, and a model with a tokenizer.")
        rows = data.input_ids
        first = rows[:, 0]
        # What begins every row is the tokenizer's mark of a beginning.
        self.start = [int(first[0])] if len(rows) > 1 and bool((first == first[0]).all()) else []
        body = rows[:, len(self.start) :]
        self.stream = body.reshape(-1).tolist()
        self.tokenizer, self.template = tokenizer, template
        special = set(getattr(tokenizer, "all_special_ids", None) or ())
        self.words = sorted(set(self.stream) - special)
        self.names = self._names() if template else []

    def _encode(self, text: str) -> tuple[int, ...]:
        return tuple(self.tokenizer.encode(text, add_special_tokens=False)) if text else ()

    def _names(self) -> list[str]:
        found = [self.tokenizer.decode([word]) for word in self.words]
        return [word.strip() for word in found if word.strip().isalpha() and word.strip().islower() and len(word) > 4]

    def statements(self, count: int, key: int, rng: np.random.Generator) -> list[Statement]:
        """Return ``count`` different statements with keys of ``key`` tokens (digits, where there is a template)."""
        if self.template:
            before, _, after = self.template.partition("{value}")
            space = " " if before.endswith(" ") else ""
            names = rng.choice(self.names, size=count, replace=count > len(self.names))
            digits = ["".join(str(digit) for digit in rng.integers(0, 10, size=key)) for _ in names]
            return [
                Statement(
                    self._encode(before.rstrip(" ").replace("{name}", str(name))),
                    self._encode(space + value),
                    self._encode(after),
                )
                for name, value in zip(names, digits, strict=True)
            ]
        keys = [tuple(int(i) for i in rng.choice(self.words, size=key)) for _ in range(count)]
        if self.tokenizer is None:
            marks = [tuple(int(i) for i in rng.choice(self.words, size=_MARKER)) for _ in keys]
            return [Statement(mark, told) for mark, told in zip(marks, keys, strict=True)]
        end = self._encode("\n")
        numbers = [ORDINALS[i] if i < len(ORDINALS) else f"number {i + 1}" for i in range(count)]
        return [
            Statement(self._encode(f"\nThe {number} pass key is:"), told, end)
            for number, told in zip(numbers, keys, strict=True)
        ]

    def hay(self, count: int, rng: np.random.Generator) -> list[int]:
        """Return ``count`` tokens of text, from anywhere."""
        start = int(rng.integers(max(1, len(self.stream) - count + 1)))
        found = self.stream[start : start + count]
        while len(found) < count:
            found += self.stream[: count - len(found)]
        return found

    def passkeys(self, length: int, count: int, key: int, rng: np.random.Generator) -> tuple[list[int], list[int]]:
        """Return a row of ``length`` tokens whose end asks for the keys and gives them, in order; and where.

        What is told are the positions at which a token of a key stands or comes next. The statements are planted at
        random depths between 5 and 95 %. Statements that do not fit into half of the row are left out; ``key`` 0 takes
        as long ones as fit, at most 32 tokens.
        """
        key = key or (5 if self.template else max(2, min(_LONGEST_KEY, length // (4 * count))))
        told = self.statements(count, key, rng)
        while len(told) > 1 and 2 * sum(len(s.ids) for s in told) > length // 2:
            told.pop()
        tail = sum(len(s.ids) for s in told)
        text = self.hay(length - len(self.start) - 2 * tail, rng)
        cuts = sorted(int(cut) for cut in rng.uniform(0.05, 0.95, size=len(told)) * len(text))
        row = list(self.start)
        places: list[int] = []
        for begin, end, statement in zip([0, *cuts[:-1]], cuts, told, strict=True):
            row += [*text[begin:end], *statement.ids]
        row += text[cuts[-1] :]
        for statement in told:
            first = len(row) + len(statement.marker)
            places += range(first - 1, first + len(statement.key))
            row += statement.ids
        return row, places

    def needle(self, length: int, depth: float, key: int, rng: np.random.Generator) -> Needle:
        """Return a question whose prompt has ``length`` tokens; the statement stands at ``depth`` (0 start, 1 end)."""
        key = key or (5 if self.template else 8)
        told = self.statements(int(rng.integers(1, len(ORDINALS) + 1)), key, rng)[-1]
        room = length - len(self.start) - len(told.ids) - len(told.marker)
        if room < 1:
            raise DataError(f"a prompt of {length} tokens has no room for a fact and a question; make it longer.")
        text = self.hay(room, rng)
        cut = round(depth * room)
        prompt = [*self.start, *text[:cut], *told.ids, *text[cut:], *told.marker]
        return Needle.of(prompt, told.key)

    def grid(self, lengths: Sequence[int], depths: int, key: int, seed: int) -> list[Needle]:
        """Return a question for each length and each of ``depths`` depths from 0 to 1."""
        rng = np.random.default_rng(seed)
        places = [i / max(1, depths - 1) for i in range(depths)]
        return [self.needle(length, depth, key, rng) for length in lengths for depth in places]


@dataclass(frozen=True)
class Copies:
    """What heads copied.

    Attributes
    ----------
    scores : ``[H]`` for each layer: the share of the key that the head copied, mean over the samples that count
    frequency : ``[H]`` for each layer: the share of samples in which it copied anything
    counted, asked : samples that count (the answer was found), and all
    """

    scores: tuple[Tensor, ...]
    frequency: tuple[Tensor, ...]
    counted: int
    asked: int

    def of_kv_heads(self, counts: Sequence[int]) -> Tensor:
        """Return the highest score of each KV head's queries, ``[sum of counts]``; layers with 0 are left out."""
        return torch.cat([s.view(n, -1).amax(1) for s, n in zip(self.scores, counts, strict=True) if n])


@torch.no_grad()
def copies(
    model: Model, needles: Sequence[Needle], *, longest: int = 50, repeats: bool = False, batch: int = 8
) -> Copies:
    """Let the model answer and see which heads copied.

    Parameters
    ----------
    needles : questions; those with prompts of one length are asked together
    longest : tokens of an answer at most; it also ends at a line's end and at the end of text
    repeats : count a position as often as it is copied (as the official code does, without bound) instead of once
    batch : questions in a pass
    """
    sizes = [0 if block.attention is None else block.attention.heads for block in model.anatomy.language.blocks]
    sums = [torch.zeros(size, dtype=torch.float64) for size in sizes]
    often = [torch.zeros(size, dtype=torch.float64) for size in sizes]
    counted = 0
    watch = Looks(model)
    by_length: dict[int, list[Needle]] = {}
    for needle in needles:
        by_length.setdefault(len(needle.prompt), []).append(needle)
    with attach_runtimes(model, [watch]):
        for same in by_length.values():
            for start in range(0, len(same), batch):
                asked = same[start : start + batch]
                steps, answers = _answered(model, watch, asked, longest)
                for row, needle in enumerate(asked):
                    if recall(answers[row], needle.answer) <= RECALL:
                        continue
                    counted += 1
                    for layer, found in _shares(steps, row, needle, repeats).items():
                        sums[layer] += found
                        often[layer] += found > 0
    share = 1 / max(1, counted)
    return Copies(tuple(s * share for s in sums), tuple(o * share for o in often), counted, len(needles))


def recall(produced: Sequence[int], answer: Sequence[int]) -> float:
    """Return which share of the answer's tokens was produced (ROUGE-1 recall over tokens)."""
    there = Counter(produced)
    return sum(min(n, there[token]) for token, n in Counter(answer).items()) / max(1, len(answer))


_Step = tuple[dict[int, Tensor], list[int]]
"""Where each head of each layer looked ``[B, H]``, and the tokens that came; -1 in rows that had ended."""


def _answered(model: Model, watch: Looks, asked: Sequence[Needle], longest: int) -> tuple[list[_Step], list[list[int]]]:
    """Return what happened, step by step, and the answers."""
    hf: Any = model.hf
    ids = torch.tensor([needle.prompt for needle in asked], device=hf.device)
    cache = DynamicCache(config=hf.get_submodule(model.anatomy.language.decoder).config)
    watch.looked = None
    hf(input_ids=ids[:, :-1], past_key_values=cache, use_cache=True)
    ends = _ends(model)
    token, open_rows = ids[:, -1:], [True] * len(asked)
    steps: list[_Step] = []
    answers: list[list[int]] = [[] for _ in asked]
    while len(steps) < longest and any(open_rows):
        watch.looked = {}
        logits = hf(input_ids=token, past_key_values=cache, use_cache=True).logits
        token = logits[:, -1].argmax(-1, keepdim=True)
        produced = token[:, 0].tolist()
        steps.append((watch.looked, [t if alive else -1 for t, alive in zip(produced, open_rows, strict=True)]))
        for row, one in enumerate(produced):
            if open_rows[row]:
                answers[row].append(one)
                open_rows[row] = one not in ends
    watch.looked = None
    return steps, answers


def _ends(model: Model) -> set[int]:
    told = getattr(model.hf.generation_config, "eos_token_id", None)
    ends = set(told if isinstance(told, list) else [told]) - {None}
    if model.tokenizer is not None:
        ends |= set(model.tokenizer.encode("\n", add_special_tokens=False)[-1:])
    return ends


def _shares(steps: Sequence[_Step], row: int, needle: Needle, repeats: bool) -> dict[int, Tensor]:
    """Return for each layer, ``[H]``, which share of the answer each head copied in one sample."""
    if needle.span is None:
        return {layer: torch.zeros(looked.shape[1], dtype=torch.float64) for layer, looked in steps[0][0].items()}
    start, stop = needle.span
    prompt = torch.tensor(needle.prompt)
    found: dict[int, Tensor] = {}
    for looked, produced in steps:
        for layer, at in looked.items():
            place = at[row]
            inside = (place >= start) & (place < stop)
            hit = inside & (prompt[place.clamp(0, len(prompt) - 1)] == produced[row])
            counts = found.setdefault(layer, torch.zeros(len(place), stop - start, dtype=torch.float64))
            counts[hit.nonzero()[:, 0], place[hit] - start] += 1
    return {
        layer: (counts if repeats else counts.clamp(max=1)).sum(1) / len(needle.answer)
        for layer, counts in found.items()
    }


class Looks(Runtime):
    """Notes which position the last query of each head looks at most; ``looked`` None switches it off."""

    def __init__(self, model: Model) -> None:
        self.model = model
        self.looked: dict[int, Tensor] | None = None

    def watch(self, call: Call) -> None:
        if self.looked is not None:
            self.looked[call.layer] = looked_at_most(call).cpu()


def looked_at_most(call: Call) -> Tensor:
    """Return the position that the last query of each head gives most attention to, ``[B, H]``."""
    batch, heads, _, width = call.query.shape
    count = call.key.shape[2]
    query = call.query[:, :, -1].reshape(batch, call.key.shape[1], -1, width).float()
    logits = (query @ call.key.float().transpose(-1, -2) * math.copysign(1, call.scaling)).view(batch, heads, count)
    if isinstance(call.mask, Tensor):
        last = replace(call, query=call.query[:, :, -1:], rows=call.positions()[:, -1:])
        seen = call.mask[:, :, -1:] if call.mask.dim() == 4 else visible(last, None, count).mask
        if seen is not None:
            hidden = ~seen if seen.dtype == torch.bool else seen < torch.finfo(seen.dtype).min / 2
            logits = logits.masked_fill(hidden[:, :, 0, -count:], -torch.inf)
    # A layer with a sliding window holds the latest keys only.
    stop = count if call.now is None else call.now.stop
    return logits.argmax(-1) + (stop - count)


# The causal check.


@contextlib.contextmanager
def ablate(
    model: Model, heads: Mapping[int, Sequence[int]], how: Literal["zero", "uniform"] = "zero"
) -> Iterator[None]:
    """Switch query heads off for as long as the context is open.

    Parameters
    ----------
    heads : layer -> query heads
    how : ``zero`` takes the head's output away; ``uniform`` lets it look at all tokens alike, as the official code does
        (which keeps the mean of all values)
    """
    if how == "uniform":
        with attach_runtimes(model, [_Even(model, heads)]):
            yield
        return
    handles = []
    try:
        for block in model.anatomy.language.blocks:
            if block.attention is None or not heads.get(block.index):
                continue
            out = model.hf.get_submodule(f"{block.path}.{block.attention.o}")
            handles.append(out.register_forward_pre_hook(_without(heads[block.index], block.attention.heads)))
        yield
    finally:
        for handle in handles:
            handle.remove()


def _without(heads: Sequence[int], count: int) -> Any:
    def hook(module: Any, args: tuple[Tensor, ...]) -> tuple[Any, ...]:
        joined = args[0]
        apart = joined.reshape(*joined.shape[:-1], count, -1).clone()
        apart[..., list(heads), :] = 0
        return (apart.reshape(joined.shape), *args[1:])

    return hook


class _Even(Runtime):
    """Makes the queries of some heads zero, so that they see all tokens alike."""

    def __init__(self, model: Model, heads: Mapping[int, Sequence[int]]) -> None:
        self.model, self.heads = model, heads

    def watch(self, call: Call) -> None:
        chosen = self.heads.get(call.layer)
        if chosen:
            call.query = call.query.clone()
            call.query[:, list(chosen)] = 0
