"""Write ``card.md`` of a testbed from its config and what was measured; no number is typed by hand."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

PURPOSE = {
    "lm": "a dense decoder that predicts English prose",
    "moe": "a mixture-of-experts decoder that predicts English prose",
    "recall": "a dense decoder that repeats facts planted anywhere in real text",
    "recall-moe": "a mixture-of-experts decoder that repeats facts planted anywhere in real text",
    "vlm": "a vision-language model that says which digit lies in a named cell of a mosaic",
}
_RECALL = (
    'The text holds four facts such as "The secret number of garden is 472."; at its end stands the beginning of '
    'one of them, "The secret number of garden is", and the model must go on with all three digits. The whole '
    "prompt has the length in the table, the fact's place is uniform over the text."
)
TASK = {
    "recall": _RECALL,
    "recall-moe": _RECALL,
    "vlm": (
        "A mosaic of 3 x 3 cells holds two to nine handwritten digits; the prompt is `<|image|>`, a line break and "
        '"row 2 column 3?", the answer " 7" (" none" for an empty cell). One question to an image, always about a '
        "filled cell."
    ),
}


def _architecture(config: dict[str, Any]) -> str:
    text = config.get("text_config", config)
    parts = [
        f"{config['architectures'][0]}",
        f"{text['num_hidden_layers']} layers",
        f"width {text['hidden_size']}",
        f"{text['num_attention_heads']} query and {text['num_key_value_heads']} key-value heads of {text['head_dim']}",
    ]
    experts = text.get("num_experts", text.get("num_local_experts"))
    if experts:
        width = text.get("moe_intermediate_size", text["intermediate_size"])
        parts.append(f"{experts} experts of width {width}, {text['num_experts_per_tok']} for each token")
    else:
        parts.append(f"MLP width {text['intermediate_size']}")
    parts.append(f"vocabulary {text['vocab_size']}")
    if "vision_config" in config:
        vision = config["vision_config"]
        tokens = (vision["image_size"] // vision["patch_size"]) ** 2
        parts.append(
            f"CLIP tower of {vision['num_hidden_layers']} layers, width {vision['hidden_size']}, with CLS: "
            f"{tokens} visual tokens from {vision['image_size']} x {vision['image_size']} pixels"
        )
    return "; ".join(parts)


def _percent(share: dict[str, float]) -> str:
    return f"{100 * share['share']:.1f} % ± {100 * share['standard_error']:.1f}"


def _rows(scores: dict[str, Any]) -> list[tuple[str, str]]:
    rows = []
    if "perplexity" in scores:
        about = f"{scores['heldout_tokens']:,} held-out tokens, context {scores['context']}"
        rows.append((f"perplexity ({about})", f"{scores['perplexity']:.1f}"))
    if "bigram_perplexity" in scores:
        rows.append(
            ("the same of an interpolated bigram model of the training text", f"{scores['bigram_perplexity']:.1f}")
        )
        rows.append(("the same of a unigram model", f"{scores['unigram_perplexity']:.1f}"))
    for length, share in scores.get("recall_exact", {}).items():
        rows.append((f"exact recall in {length} tokens ({scores['recall_questions_each']} questions)", _percent(share)))
    if "mosaic_exact" in scores:
        rows.append(
            (f"exact answers ({scores['mosaic_questions']} questions, unseen digits)", _percent(scores["mosaic_exact"]))
        )
        rows.append(
            ("CLS token: is this digit in the image? right", f"{100 * scores['cls_presence_each_digit']:.1f} %")
        )
        rows.append(
            ("the same, always guessing the commoner answer", f"{100 * scores['cls_presence_constant_guess']:.1f} %")
        )
        rows.append(("CLS token: whole set of digits right", _percent(scores["cls_presence_whole_set"])))
    return rows


def write_card(name: str, folder: Path) -> None:
    """Write the card of one testbed.

    Parameters
    ----------
    name
        Which testbed it is.
    folder
        Holds ``config.json``, ``training.json`` and ``scores.json``; ``card.md`` is written next to them.
    """
    config, training, scores = (
        json.loads((folder / file).read_text(encoding="utf-8"))
        for file in ("config.json", "training.json", "scores.json")
    )
    rows = [
        ("data", training.get("data", "see PROVENANCE.md")),
        ("started from", training.get("init", "random weights")),
        ("steps", f"{training['step']:,}"),
        ("tokens", f"{training['tokens']:,}"),
        ("minutes", f"{training['seconds'] / 60:.0f}"),
        ("hardware", training.get("hardware", "not recorded")),
    ]
    if training.get("note"):
        rows.append(("note", training["note"]))
    task = f"## Task\n\n{TASK[name]}\n\n" if name in TASK else ""
    text = (
        f"# Testbed `{name}`\n\n"
        f"{scores['parameters']:,} parameters in bfloat16: {PURPOSE[name]}.\n\n"
        f"{_architecture(config)}.\n\n"
        f"{task}## Training\n\n| | |\n| --- | --- |\n{_table(rows)}\n\n"
        f"## Scores\n\nMeasured by `python -m paredown.testbeds.score {name}`; ± is one standard error.\n\n"
        f"| | |\n| --- | ---: |\n{_table(_rows(scores))}\n\n"
        "A testbed is for trying methods on. It knows nothing of use.\n"
    )
    (folder / "card.md").write_text(text, encoding="utf-8")


def _table(rows: list[tuple[str, str]]) -> str:
    return "\n".join(f"| {left} | {right} |" for left, right in rows)
