"""``paredown scan``: where a model is redundant."""

from __future__ import annotations

from paredown.commands import options


def command(model: options.Model, data: options.Data = None, as_json: options.Json = False) -> None:
    """Measure redundancy per axis and layer.

    Expert use and similarity, what sub-layers and blocks change in the residual stream, energy of neurons,
    importance of heads, spectra of weights.
    """
    from paredown.commands.output import console, emit
    from paredown.commands.progress import progress
    from paredown.report import text
    from paredown.workflow.scan import scan

    with progress() as report:
        record = scan(model, data=data, progress=report)
    if as_json:
        emit(record)
    else:
        text.scan(record, console())
