"""The recall task: facts planted in real text, asked for later; and scoring of both tasks, 0 or 1 for each question.

The mosaic task itself is in `paredown.testbeds.mosaic`.  Everything is drawn from a seed, so two models (or one model
before and after) are always asked the same questions and callers may pair the results.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import numpy.typing as npt

from paredown.testbeds import mosaic

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerFast

    from paredown.core.stepwise import Held

How = Literal["after", "within"]
"""How a question is put through the cache. ``after``: the text is read in one pass, then question and answer come token
by token, so that what was let go before the question was known is missed. ``within``: text and question are read in
one pass, then the answer comes token by token, as methods that make reading cheaper expect."""
DIGITS = 3
"""Digits of a secret number."""
Hits = npt.NDArray[np.int64]


def names_in(texts: Iterable[str], most: int = 4000) -> list[str]:
    """Return words fit to name a fact: lower-case, four to eight letters, evenly spread over the alphabet."""
    words = sorted({word for text in texts for word in re.findall(r"\b[a-z]{4,8}\b", text)})
    return words[:: max(1, len(words) // most)][:most]


@dataclass(frozen=True)
class RecallItem:
    """One question about one fact in a text full of facts.

    Attributes
    ----------
    prompt
        Token ids of text, facts and question.
    answer
        Token ids that must follow.
    text, question, reply
        The same as strings: the text with its facts, the question, the number.
    depth
        Where the fact stands: 0 at the start of the text, 1 at its end.
    """

    prompt: list[int]
    answer: list[int]
    text: str
    question: str
    reply: str
    depth: float


class FactWriter:
    """Plants facts in windows of tokens and asks for them.

    Parameters
    ----------
    tokenizer
        A tokenizer in which each digit is a token.
    names
        Words that facts are about.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerFast, names: Sequence[str]) -> None:
        self.tokenizer, self.names = tokenizer, list(names)

    def _encode(self, text: str) -> list[int]:
        return list(self.tokenizer.encode(text, add_special_tokens=False))

    def _draw(self, pairs: int, rng: np.random.Generator) -> list[tuple[list[int], list[int], str, str]]:
        """Return (statement, number, name, digits) for each of `pairs` facts with different names."""
        facts = []
        for index in rng.choice(len(self.names), size=pairs, replace=False):
            name = self.names[index]
            digits = "".join(str(digit) for digit in rng.integers(0, 10, size=DIGITS))
            statement = self._encode(f"\nThe secret number of {name} is")
            facts.append((statement, self._encode(f" {digits}.\n"), name, digits))
        return facts

    def question_length(self, item: RecallItem) -> int:
        """Return how many tokens at the end of an item's prompt are its question."""
        return len(self._encode(f"\n{item.question}"))

    @staticmethod
    def _plant(
        body: Sequence[int], facts: Sequence[tuple[list[int], list[int], str, str]], cuts: Sequence[int]
    ) -> list[int]:
        """Return the body with fact ``k`` put in before token ``cuts[k]``."""
        ids: list[int] = []
        for start, stop, fact in zip([0, *cuts[:-1]], cuts, facts, strict=True):
            ids += [*body[start:stop], *fact[0], *fact[1]]
        return ids + list(body[cuts[-1] :])

    def training_row(
        self, window: npt.NDArray[np.int64], pairs: int, rng: np.random.Generator
    ) -> tuple[list[int], list[float]]:
        """Return a sequence as long as `window`: facts in text, then a question for each; and a weight for each token.

        The numbers in the questions weigh 6, text 1, template words 0.2: only a dense signal teaches a small model to
        recall.
        """
        facts = self._draw(pairs, rng)
        while (need := 2 * sum(len(fact[0]) + len(fact[1]) for fact in facts)) > len(window) - 8:
            facts.pop()
        body = window[: len(window) - need].tolist()
        cuts = sorted(rng.integers(0, len(body) + 1, size=len(facts)).tolist())
        ids: list[int] = []
        weights: list[float] = []
        for start, stop, fact in zip([0, *cuts[:-1]], cuts, facts, strict=True):
            ids += [*body[start:stop], *fact[0], *fact[1]]
            weights += [1.0] * (stop - start) + [0.2] * (len(fact[0]) + len(fact[1]))
        ids += body[cuts[-1] :]
        weights += [1.0] * (len(body) - cuts[-1])
        for index in rng.permutation(len(facts)):
            statement, number, _, _ = facts[index]
            ids += [*statement, *number]
            weights += [0.2] * len(statement) + [6.0] * len(number)
        return ids, weights

    def item(self, window: npt.NDArray[np.integer], rng: np.random.Generator, facts: int = 4) -> RecallItem:
        """Return one question whose prompt is as long as `window`; the fact asked for stands anywhere in the text."""
        drawn = self._draw(facts, rng)
        asked = int(rng.integers(facts))
        statement, number, name, digits = drawn[asked]
        need = sum(len(fact[0]) + len(fact[1]) for fact in drawn) + len(statement)
        body = [int(token) for token in window[: len(window) - need]]
        cuts = sorted(rng.integers(0, len(body) + 1, size=facts).tolist())
        text = self._plant(body, drawn, cuts)
        return RecallItem(
            prompt=text + statement,
            answer=number[: len(number) - len(self._encode(".\n"))],
            text=self.tokenizer.decode(text),
            question=f"The secret number of {name} is",
            reply=digits,
            depth=cuts[asked] / max(1, len(body)),
        )


def recall_items(
    tokenizer: PreTrainedTokenizerFast,
    texts: Sequence[str],
    *,
    length: int = 512,
    count: int = 100,
    facts: int = 4,
    seed: int = 0,
) -> list[RecallItem]:
    """Make questions over held-out text: every prompt is `length` tokens, the depth of the fact asked for is uniform.

    Parameters
    ----------
    tokenizer
        The testbed's tokenizer.
    texts
        Filler, for instance ``testbeds.heldout_texts("recall")``.
    length, count, facts, seed
        Tokens of a prompt, questions, facts in each prompt (one of them is asked for), seed.
    """
    rng = np.random.default_rng((seed, length, facts))
    stream = np.array(tokenizer.encode("\n".join(texts), add_special_tokens=False), dtype=np.int64)
    if len(stream) <= length:
        raise ValueError(f"the filler has {len(stream)} tokens, a prompt needs {length}")
    writer = FactWriter(tokenizer, names_in(texts))
    starts = rng.integers(0, len(stream) - length, size=count)
    return [writer.item(stream[start : start + length], rng, facts) for start in starts]


def recall_rows(
    tokenizer: PreTrainedTokenizerFast, texts: Sequence[str], *, length: int = 512, count: int = 512, seed: int = 0
) -> npt.NDArray[np.int64]:
    """Make rows ``[count, length]`` to learn recall from: facts in text, then a question about each, answered.

    Parameters
    ----------
    tokenizer, texts, length, count, seed
        As in `recall_items`; take other texts than those that questions are asked about.
    """
    rng = np.random.default_rng((seed, length, count))
    stream = np.array(tokenizer.encode("\n".join(texts), add_special_tokens=False), dtype=np.int64)
    if len(stream) <= length:
        raise ValueError(f"the filler has {len(stream)} tokens, a row needs {length}")
    writer = FactWriter(tokenizer, names_in(texts))
    starts = rng.integers(0, len(stream) - length, size=count)
    rows = [writer.training_row(stream[start : start + length], 4, rng)[0] for start in starts]
    return np.array(rows, dtype=np.int64)


def recall_accuracy(
    hf_model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerFast,
    texts: Sequence[str],
    *,
    length: int = 512,
    count: int = 100,
    facts: int = 4,
    seed: int = 0,
    generate: bool = False,
    how: How | None = None,
    held: Held | None = None,
    batch_size: int = 20,
) -> Hits:
    """Ask a model for planted facts; all digits must be right.

    Parameters
    ----------
    hf_model
        A causal language model.
    tokenizer, texts, length, count, facts, seed
        As in `recall_items`.
    generate
        Whether to decode token by token through the cache; else one forward pass over prompt and answer, which counts
        exactly the answers that greedy decoding would have given.
    how
        To put the question through the cache, with the right answer's tokens fed in: an answer counts if each of them
        was the most likely one. Without a policy the hits are those of one forward pass.
    held
        Told what the cache holds; only with ``how``.
    batch_size
        Questions in a forward pass.

    Returns
    -------
    numpy.ndarray
        ``[count]`` zeros and ones.
    """
    import torch

    items = recall_items(tokenizer, texts, length=length, count=count, facts=facts, seed=seed)
    writer = FactWriter(tokenizer, ())
    # Prompts are equally long, but names and with them questions are not: batches of one split need no padding.
    reads = [length - (writer.question_length(item) if how == "after" else 0) for item in items]
    hits = np.zeros(count, dtype=np.int64)
    for read in sorted(set(reads)) if how == "after" else [length]:
        chosen = [index for index, one in enumerate(reads) if one == read]
        for start in range(0, len(chosen), batch_size):
            part = chosen[start : start + batch_size]
            prompts = torch.tensor([items[index].prompt for index in part], device=hf_model.device)
            answers = torch.tensor([items[index].answer for index in part], device=hf_model.device)
            if how is None:
                hits[part] = _greedy_hits(hf_model, {"input_ids": prompts}, answers, generate)
            else:
                hits[part] = _stepwise_hits(hf_model, {"input_ids": prompts}, read, answers, held)
    return hits


def mosaic_accuracy(
    hf_model: PreTrainedModel,
    processor: Any,
    digits: npt.NDArray[np.uint8],
    labels: npt.NDArray[np.integer],
    *,
    count: int = 200,
    seed: int = 0,
    generate: bool = False,
    how: How | None = None,
    held: Held | None = None,
    batch_size: int = 20,
) -> Hits:
    """Ask one question about one filled cell of each of `count` mosaics.

    Parameters
    ----------
    hf_model
        A LLaVA-like model.
    processor
        Its processor: text and images in, ``input_ids`` and ``pixel_values`` out.
    digits, labels
        ``[N, 28, 28]`` and ``[N]``: held-out digits, see ``testbeds.heldout_digits``.
    count, seed
        Questions, one to a mosaic, and the seed that they are drawn from.
    generate, how, held, batch_size
        As in `recall_accuracy`; image and question are always read together.

    Returns
    -------
    numpy.ndarray
        ``[count]`` zeros and ones.
    """
    import torch

    rng = np.random.default_rng(seed)
    made = mosaic.make(digits, labels, count, rng)
    cells = [int(rng.choice(np.flatnonzero(row != mosaic.EMPTY))) for row in made.labels]
    hits: list[int] = []
    for start in range(0, count, batch_size):
        part = range(start, min(count, start + batch_size))
        inputs = processor(
            images=[made.image(index) for index in part],
            text=[mosaic.prompt(cells[index]) for index in part],
            return_tensors="pt",
        ).to(hf_model.device, dtype=hf_model.dtype)
        answers = torch.tensor(
            [
                processor.tokenizer.encode(mosaic.answer(made.labels[i, cells[i]]), add_special_tokens=False)
                for i in part
            ],
            device=hf_model.device,
        )
        inputs.pop("attention_mask", None)  # all prompts are equally long: nothing is padded
        if how is None:
            hits += _greedy_hits(hf_model, dict(inputs), answers, generate)
        else:
            hits += _stepwise_hits(hf_model, dict(inputs), inputs["input_ids"].shape[1], answers, held)
    return np.array(hits, dtype=np.int64)


def _greedy_hits(hf_model: PreTrainedModel, inputs: dict[str, Any], answers: Any, generate: bool) -> list[int]:
    """Return 1 for each row in which greedy decoding from ``inputs["input_ids"]`` gives ``answers`` (``[B, A]``)."""
    import torch

    prompts, length = inputs["input_ids"], answers.shape[1]
    with torch.inference_mode():
        if generate:
            told = hf_model.generate(
                **inputs,
                attention_mask=torch.ones_like(prompts),
                max_new_tokens=length,
                min_new_tokens=length,
                do_sample=False,
            )[:, prompts.shape[1] :]
        else:
            whole = torch.cat([prompts, answers[:, :-1]], dim=1)
            told = hf_model(**{**inputs, "input_ids": whole}, logits_to_keep=length).logits.argmax(dim=-1)
    return (told == answers).all(dim=1).long().tolist()  # type: ignore[no-any-return]


def _stepwise_hits(
    hf_model: PreTrainedModel, inputs: dict[str, Any], read: int, answers: Any, held: Held | None
) -> list[int]:
    """Return 1 for each row whose ``answers`` (``[B, A]``) are the most likely tokens, read through the cache.

    The first ``read`` tokens of ``inputs["input_ids"]`` are read in one pass, all that follows token by token.
    """
    import torch

    from paredown.core.stepwise import stepwise

    prompts, length = inputs["input_ids"], answers.shape[1]
    follow = torch.cat([prompts[:, read:], answers[:, :-1]], dim=1)
    passes = stepwise(hf_model, {**inputs, "input_ids": prompts[:, :read]}, follow, watch=held)
    told = torch.stack([logits.argmax(dim=-1) for logits in passes][-length:], dim=1)
    if held is not None:
        held.close(len(prompts))
    return (told == answers).all(dim=1).long().tolist()  # type: ignore[no-any-return]
