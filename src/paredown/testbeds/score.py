"""Measure a testbed and write its card: ``python -m paredown.testbeds.score NAME [--train TOKENS]``.

Every number in ``card.md`` comes from ``scores.json`` (measured here) or ``training.json`` (counted while training).
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from paredown.testbeds import NAMES, RECALLING, mosaic, tasks
from paredown.testbeds.corpus import Tokens, encode

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerFast

CONTEXT = 256
"""Tokens that a model sees at most when its perplexity is measured."""
RECALL_LENGTHS = (128, 256, 512)
PRIORS = (1.0, 4.0, 16.0, 64.0, 256.0, 1024.0)


class NGrams:
    """A unigram and a bigram model, the bar that a testbed must clear.

    The bigram is interpolated with the unigram by a Dirichlet prior, ``(count(a, b) + m p(b)) / (count(a) + m)``.

    Parameters
    ----------
    stream
        ``[N]`` training tokens.
    vocabulary
        Tokens in the vocabulary.
    """

    def __init__(self, stream: Tokens, vocabulary: int) -> None:
        tokens = np.asarray(stream, dtype=np.int64)
        self.vocabulary = vocabulary
        # Add one, so that a token never seen in training has a probability.
        self.unigram = (np.bincount(tokens, minlength=vocabulary) + 1.0) / (len(tokens) + vocabulary)
        pairs = np.bincount(tokens[:-1] * vocabulary + tokens[1:], minlength=vocabulary**2)
        self.pairs = pairs.reshape(vocabulary, vocabulary)
        self.firsts = self.pairs.sum(axis=1)

    def unigram_perplexity(self, tokens: npt.NDArray[np.int64]) -> float:
        """Return the perplexity of all tokens but the first."""
        return float(np.exp(-np.log(self.unigram[tokens[1:]]).mean()))

    def bigram_perplexity(self, tokens: npt.NDArray[np.int64]) -> float:
        """Return the perplexity of all tokens but the first.

        The prior is the one that suits the bigram best on these very tokens, which favours it a little: the comparison
        is meant to be hard on the testbed.
        """
        before, after = tokens[:-1], tokens[1:]
        seen, total, prior = self.pairs[before, after], self.firsts[before], self.unigram[after]
        return float(min(np.exp(-np.log((seen + m * prior) / (total + m)).mean()) for m in PRIORS))


def perplexity(
    hf_model: PreTrainedModel, tokens: npt.NDArray[np.int64], *, context: int = CONTEXT, batch_size: int = 16
) -> float:
    """Return a model's perplexity on all tokens of a stream but the first.

    The stream is cut into windows that share one token, so that each token is predicted once.

    Parameters
    ----------
    hf_model
        A causal language model.
    tokens
        ``[N]`` token ids.
    context
        Tokens that the model sees at most before the one it predicts.
    batch_size
        Windows in a forward pass.
    """
    import torch

    nll, count = 0.0, 0
    windows = [tokens[start : start + context + 1] for start in range(0, len(tokens) - 1, context)]
    last = [windows.pop()[None]]  # may be shorter than the others
    batches = [np.stack(windows[start : start + batch_size]) for start in range(0, len(windows), batch_size)] + last
    with torch.inference_mode():
        for batch in batches:
            ids = torch.from_numpy(batch).to(hf_model.device)
            logits = hf_model(ids[:, :-1]).logits.float().flatten(0, 1)
            nll += float(torch.nn.functional.cross_entropy(logits, ids[:, 1:].flatten(), reduction="sum"))
            count += ids[:, 1:].numel()
    return math.exp(nll / count)


def text_scores(
    folder: Path, hf_model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, train: Path | None
) -> dict[str, Any]:
    """Measure perplexity on ``heldout.jsonl``, and that of n-gram models of the training tokens on the same tokens."""
    heldout = encode(_texts(folder), tokenizer).astype(np.int64)
    scores: dict[str, Any] = {
        "heldout_tokens": len(heldout),
        "perplexity": perplexity(hf_model, heldout),
        "context": CONTEXT,
    }
    if train is not None:
        grams = NGrams(np.fromfile(train, dtype=np.uint16), len(tokenizer))
        scores["unigram_perplexity"] = grams.unigram_perplexity(heldout)
        scores["bigram_perplexity"] = grams.bigram_perplexity(heldout)
    return scores


def recall_scores(
    folder: Path, hf_model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, count: int
) -> dict[str, Any]:
    """Measure exact recall at each length, with the standard error of the share."""
    shares = {}
    for length in RECALL_LENGTHS:
        hits = tasks.recall_accuracy(hf_model, tokenizer, _texts(folder), length=length, count=count)
        shares[str(length)] = _share(hits)
    return {"recall_exact": shares, "recall_questions_each": count}


def vlm_scores(folder: Path, hf_model: PreTrainedModel, count: int) -> dict[str, Any]:
    """Measure exact answers about single cells, and what the CLS token knows of the digits in an image."""
    import torch
    from safetensors.torch import load_file
    from transformers import AutoProcessor

    processor = AutoProcessor.from_pretrained(folder)
    with np.load(folder / "heldout_digits.npz", allow_pickle=False) as arrays:
        digits, labels = arrays["digits"], arrays["labels"]
    hits = tasks.mosaic_accuracy(hf_model, processor, digits, labels, count=count)
    made = mosaic.make(digits, labels, count, np.random.default_rng(1))
    head = load_file(folder / "presence_head.safetensors")
    with torch.inference_mode():
        images = processor.image_processor([made.image(i) for i in range(count)], return_tensors="pt")["pixel_values"]
        pooled = hf_model.model.vision_tower(images.to(hf_model.dtype)).pooler_output
        there = (
            pooled @ head["presence.weight"].to(pooled.dtype).T + head["presence.bias"].to(pooled.dtype) > 0
        ).numpy()
    truth = made.presence().astype(bool)
    return {
        "mosaic_exact": _share(hits),
        "mosaic_questions": count,
        "cls_presence_each_digit": float((there == truth).mean()),
        "cls_presence_constant_guess": float(max(truth.mean(), 1 - truth.mean())),
        "cls_presence_whole_set": _share((there == truth).all(axis=1).astype(np.int64)),
    }


def _share(hits: npt.NDArray[np.int64]) -> dict[str, float]:
    mean = float(hits.mean())
    return {"share": mean, "standard_error": math.sqrt(mean * (1 - mean) / len(hits))}


def _texts(folder: Path) -> list[str]:
    lines = (folder / "heldout.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line)["text"] for line in lines]


def measure(name: str, folder: Path, *, train: Path | None = None, count: int = 600) -> dict[str, Any]:
    """Measure a testbed's folder.

    Parameters
    ----------
    name
        Which testbed it is.
    folder
        Its folder, as `paredown.testbeds.publish` made it.
    train
        The training tokens (``train.bin``) for the n-gram figures; without them, former figures are kept.
    count
        Questions of each kind.
    """
    import torch
    from transformers import AutoModelForCausalLM, AutoModelForImageTextToText, AutoTokenizer

    torch.manual_seed(0)
    auto = AutoModelForImageTextToText if name == "vlm" else AutoModelForCausalLM
    # float32: a bfloat16 product on a CPU may depend on the number of threads, the published figures must not.
    hf_model: Any = auto.from_pretrained(folder, dtype=torch.float32).eval()
    scores: dict[str, Any] = {"parameters": sum(parameter.numel() for parameter in hf_model.parameters())}
    if name == "vlm":
        return {**scores, **vlm_scores(folder, hf_model, count)}
    tokenizer = AutoTokenizer.from_pretrained(folder)
    former = folder / "scores.json"
    if train is None and former.exists():
        old = json.loads(former.read_text(encoding="utf-8"))
        scores |= {key: old[key] for key in ("unigram_perplexity", "bigram_perplexity") if key in old}
    scores |= text_scores(folder, hf_model, tokenizer, train)
    if name in RECALLING:
        scores |= recall_scores(folder, hf_model, tokenizer, count)
    return scores


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure one testbed and write ``scores.json`` and ``card.md`` into its folder."""
    from paredown.testbeds.card import write_card

    parser = argparse.ArgumentParser(prog="python -m paredown.testbeds.score", description=__doc__)
    parser.add_argument("name", choices=NAMES)
    parser.add_argument("--folder", type=Path, help="the testbed's folder (default: the one in this package)")
    parser.add_argument("--train", type=Path, help="train.bin of the training run, for the unigram and bigram figures")
    parser.add_argument("--count", type=int, default=600, help="questions of each kind (default: 600)")
    options = parser.parse_args(arguments)
    folder = options.folder or Path(__file__).parent / options.name
    scores = measure(options.name, folder, train=options.train, count=options.count)
    (folder / "scores.json").write_text(json.dumps(scores, indent=2) + "\n", encoding="utf-8")
    write_card(options.name, folder)
    print(json.dumps(scores, indent=2))


if __name__ == "__main__":
    main()
