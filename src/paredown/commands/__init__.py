"""The command line: reads options, calls the workflow, prints. A file a command; no logic.

- Standard output carries results alone (with ``--json`` one JSON document), standard error everything else.
- Exit codes: 0 done, 1 user's error, 2 usage, 3 stopped by the gate, 4 proof failed, 130 interrupted.
- An error is one line that starts with ``error:``; ``--debug``, anywhere on the line, shows where it came from.
"""

from __future__ import annotations

import sys
import traceback
from collections.abc import Sequence
from typing import Annotated

import typer

from paredown.commands import compare, evaluate, generate, methods, plan, probe, quiet, run, scan, show
from paredown.errors import ParedownError

INTERRUPTED = 130

app = typer.Typer(
    name="paredown",
    add_completion=False,
    # Plain help: the same text on a terminal, in a pipe and in docs/cli.md, and no time lost in drawing boxes.
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
)

app.command("scan")(scan.command)
app.command("probe")(probe.command)
app.command("plan")(plan.command)
app.command("run")(run.command)
app.command("eval")(evaluate.command)
app.command("compare")(compare.command)
app.command("generate")(generate.command)
app.command("methods")(methods.command)
app.command("show")(show.command)


def _version(wanted: bool) -> None:
    if wanted:
        import paredown

        typer.echo(f"paredown {paredown.__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", help="Print the version.", callback=_version, is_eager=True)
    ] = False,
    debug: Annotated[
        bool, typer.Option("--debug", help="Show where an error came from; may stand anywhere on the line.")
    ] = False,
) -> None:
    """Find what a transformer does not need, take it away, prove what that cost.

    MODEL is a hub id, a local folder, or a trained model in the box: testbed:lm, testbed:moe, testbed:recall,
    testbed:recall-moe, testbed:vlm.
    """


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit code; whatever goes wrong is told in one line.

    Parameters
    ----------
    arguments
        Words after ``paredown``; those of this process by default.
    """
    words = list(sys.argv[1:] if arguments is None else arguments)
    debug = "--debug" in words
    words = [word for word in words if word != "--debug"] or ["--help"]
    quiet.hush(debug=debug)
    try:
        # Not app(): outside of a click main loop the exceptions below arrive as they were raised.
        code = typer.main.get_command(app).main(words, prog_name="paredown", standalone_mode=False)
    except ParedownError as error:
        return _fail(str(error), error.exit_code, debug)
    except (KeyboardInterrupt, typer.Abort):
        return _fail(_interrupted(words), INTERRUPTED, debug)
    except Exception as error:
        # Click's own errors are told apart by what they can do: their classes moved between releases of typer.
        if hasattr(error, "format_message"):
            return _usage(error.format_message(), getattr(error, "ctx", None), getattr(error, "exit_code", 2))
        reason = f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
        advice = "" if debug else "; run again with --debug to see where, and please report it"
        return _fail(f"internal error ({_one_line(reason)}){advice}", 1, debug)
    if code == INTERRUPTED:  # some releases of typer catch the interrupt themselves
        return _fail(_interrupted(words), INTERRUPTED, debug)
    return code if isinstance(code, int) else 0


def _fail(message: str, code: int, debug: bool) -> int:
    if debug and code != INTERRUPTED:
        traceback.print_exc()
    typer.echo(f"error: {_one_line(message)}", err=True)
    return code


def _usage(message: str, context: object, code: int) -> int:
    path = getattr(context, "command_path", "paredown")
    typer.echo(f"error: {_one_line(message).rstrip('.')} (see '{path} --help')", err=True)
    return code


def _interrupted(words: Sequence[str]) -> str:
    if words[:1] == ["run"]:
        return "interrupted; the same command with --resume goes on where it was"
    return "interrupted"


def _one_line(message: str) -> str:
    return " ".join(message.split())
