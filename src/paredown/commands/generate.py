"""``paredown generate``: text from a model, with policies attached."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from paredown.commands import options
from paredown.errors import DataError, UsageError

Prompt = Annotated[str | None, typer.Option("--prompt", metavar="TEXT", help="What to go on from.", show_default=False)]
PromptFile = Annotated[
    Path | None, typer.Option("--prompt-file", metavar="FILE", help="The same, from a file.", show_default=False)
]
Image = Annotated[
    Path | None, typer.Option("--image", metavar="FILE", help="A picture, for a vision model.", show_default=False)
]
Most = Annotated[int, typer.Option("--max-new-tokens", metavar="N", help="At most so many new tokens.", min=1)]
Temperature = Annotated[
    float, typer.Option("--temperature", metavar="T", help="0 takes the most likely token each time.", min=0.0)
]
Seed = Annotated[int, typer.Option("--seed", metavar="N", help="Fixes what is drawn, and what a policy learns.")]


def command(
    model: options.Model,
    policy: options.Policy = None,
    keep: options.Keep = None,
    settings: options.PolicySet = None,
    prompt: Prompt = None,
    prompt_file: PromptFile = None,
    image: Image = None,
    max_new_tokens: Most = 256,
    temperature: Temperature = 0.0,
    seed: Seed = 0,
    data: options.Data = None,
    as_json: options.Json = False,
) -> None:
    """Stream text, then tell times and bytes of the key-value cache.

    Text goes to standard output as it comes; prompt tokens, time to the first token, tokens a second, peak and steady
    bytes of the cache go to standard error. The policies of the model's own folder are attached too.
    """
    text = _prompt(prompt, prompt_file, image)
    names = options.policies(policy, keep, settings)
    fields = options.fields(settings)

    import sys

    from paredown.commands.output import emit, notes, say
    from paredown.report import policies as report
    from paredown.workflow.generate import generate
    from paredown.workflow.policies import make

    def tell(piece: str) -> None:
        sys.stdout.write(piece)
        sys.stdout.flush()

    made = generate(
        model,
        text,
        make(names, keep, fields) if names else (),
        image=image,
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        seed=seed,
        data=data,
        tell=None if as_json else tell,
    )
    if as_json:
        emit(made)
        return
    tell("\n")
    say(notes(), report.generated(made))


def _prompt(prompt: str | None, file: Path | None, image: Path | None) -> str:
    if prompt is not None and file is not None:
        raise UsageError("the prompt is given twice; leave out --prompt or --prompt-file.")
    if prompt is not None:
        return prompt
    if file is None:
        if image is not None:
            return ""
        raise UsageError("say what to go on from: --prompt TEXT or --prompt-file FILE.")
    try:
        return file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "it is not text"
        raise DataError(f"the prompt file {str(file)!r} cannot be read ({reason}); give a text file.") from None
