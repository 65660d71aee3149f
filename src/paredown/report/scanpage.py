"""The page of a scan: one HTML file that holds everything it shows and loads nothing."""

from __future__ import annotations

import shlex
from collections.abc import Callable
from typing import Any

from markupsafe import Markup

from paredown.report import figures, scandepth, scandraw, scanned, words
from paredown.report.html import datum, environment
from paredown.workflow.scanned import LayerRow, ScanRecord, ScanView

_FACTS = 4


def render(record: ScanRecord) -> str:
    """Draw a scan.

    Parameters
    ----------
    record
        What was found; nothing else is read.

    Returns
    -------
    str
        A whole HTML document. The same record gives the same text; every text of the record is escaped, and a content
        security policy forbids the page to load or run anything.
    """
    context: dict[str, Any] = {
        "record": record,
        "name": words.short_name(record.model),
        "lead": _lead(record),
        "facts": [
            {"name": words.line(s.unit), "big": f"keep {s.keep:g}", "small": words.line(s.because)}
            for view in record.views
            for s in view.suggests
        ][:_FACTS],
        "views": [_view(record, view) for view in record.views],
        "data": words.rows(record.data),
        "versions": words.rows(record.versions),
        "hardware": words.rows(record.hardware),
        "stages": [(words.label(k), words.duration(v)) for k, v in record.seconds_by_stage.items()],
        "scanned": scanned,
    }
    return environment().get_template("scan.html.j2").render(context)


def _lead(record: ScanRecord) -> list[str]:
    kind = "weights and use" if record.data else "weights"
    sentences = [
        f"Paredown looked at the {kind} of {words.many(record.parameters)} parameters in {record.layers} layers"
        + (f", while {scanned.data(record)} passed through them." if record.data else "; no data passed through them.")
    ]
    if any(view.suggests for view in record.views):
        sentences.append("Budgets to start comparing at:")
    else:
        sentences.append("No curve points at a budget of its own accord.")
    return sentences


def _view(record: ScanRecord, view: ScanView) -> dict[str, Any]:
    figure = _FIGURES.get(view.name, _plain)(view)
    columns = [c for c in scanned.values(view) if any(row.values.get(c.key) is not None for row in view.rows)]
    several = len(scanned.kinds(view)) > 1
    commands = []
    for one in view.suggests:
        names = [method.name for method in view.methods if method.unit == one.unit]
        if names:
            listed = shlex.quote(",".join([*names, "random"]))
            commands.append(f"paredown compare {shlex.quote(record.model)} --methods {listed} --keep {one.keep:g}")
    return {
        "view": view,
        "figure": figure,
        "columns": columns,
        "several": several,
        "rows": [
            {
                "layer": row.layer,
                "part": scanned.part(row),
                "cells": [datum(row.values.get(c.key), scanned.cell(c, row.values.get(c.key))) for c in columns],
            }
            for row in view.rows
        ],
        "explained": [(c.title, f"{c.meaning} ({c.unit})") for c in view.columns],
        "commands": commands,
    }


def _plain(view: ScanView) -> None:
    """A view that this page has no drawing for is shown by its numbers."""


def _use(view: ScanView) -> dict[str, Any]:
    top = max((max(row.series["mass"]) for row in view.rows), default=1.0)
    widest = max(row.count for row in view.rows)
    return _figure(
        "Share of the routing mass of each expert. The fuller, the more; hollow: never chosen. "
        f"A full cell is {words.percent(top)}.",
        view.rows,
        lambda row: scandraw.heat(_seen(row), top, f"layer {row.layer}: {_told_use(row)}"),
        _told_use,
        axis="expert",
        count=widest,
    )


def _seen(row: LayerRow) -> list[float]:
    """Shares of mass, with 0 for experts never chosen and a trace for those that were."""
    pairs = zip(row.series["mass"], row.series["tokens"], strict=True)
    return [max(mass, 1e-9) if load > 0 else 0.0 for mass, load in pairs]


def _told_use(row: LayerRow) -> str:
    never = row.units.get("never", [])
    told = f"90 % in {int(row.values['for_90'] or 0)} of {row.count}"
    return f"{told}; never: {words.ranges(never)}" if never else told


def _alike(view: ScanView) -> dict[str, Any]:
    by_output = all("by_output" in row.series for row in view.rows)
    key = "by_output" if by_output else "by_weights"

    def told(row: LayerRow) -> str:
        weights = f"weights {words.number(row.values['highest'] or 0, 2)}"
        if row.values["output_highest"] is None:
            return f"closest: {weights}"
        return f"closest: {weights}, output {words.number(row.values['output_highest'], 2)}"

    return _figure(
        f"Each expert's nearest twin {'by output' if by_output else 'by weights'}. The fuller, the more alike; a full "
        "cell is an exact copy.",
        view.rows,
        lambda row: scandraw.heat(
            [max(v, 0.0) for v in row.series[key]], 1.0, f"layer {row.layer}: {_listed(row.series[key])}"
        ),
        told,
        axis="expert",
        count=max(row.count for row in view.rows),
    )


def _listed(values: list[float]) -> str:
    return ", ".join(words.number(v, 2) for v in values[:64]) + ("" if len(values) <= 64 else ", ...")


def _stream(view: ScanView) -> dict[str, Any]:
    keys = ("attention", "mlp", "block")
    turns = {
        (row.layer, key): scanned.turn(v) for row in view.rows for key in keys if (v := row.values[key]) is not None
    }
    high = 90.0 if max(turns.values(), default=0.0) <= 90 else 180.0

    def told(row: LayerRow) -> str:
        shown = [words.DASH if row.values[k] is None else f"{turns[row.layer, k]:.1f}°" for k in keys]
        return " / ".join(shown)

    return _figure(
        "How far each turns the stream, in degrees (the angle of the mean cosine): disc attention, ring MLP, bar the "
        "whole block. The further left, the less it does.",
        view.rows,
        lambda row: scandraw.dots(
            [turns.get((row.layer, k)) for k in keys],
            high,
            f"layer {row.layer}: attention, MLP and block turn the stream by {told(row)}",
        ),
        told,
        axis="",
        count=24,
        ticks=scandraw.scale(high, high / 6, "°"),
    )


def _drawn(view: ScanView, draw: Callable[[ScanView], scandepth.Drawn]) -> dict[str, Any]:
    found = draw(view)
    return _figure(
        found.caption, view.rows, found.draw, found.told, axis=found.axis, count=found.count, ticks=found.ticks
    )


def _neurons(view: ScanView) -> dict[str, Any]:
    keys = ("half", "most", "nearly_all")
    several = len(scanned.kinds(view)) > 1

    def told(row: LayerRow) -> str:
        return " / ".join(f"{100 * (row.values[k] or 0):.3g}" for k in keys) + f"{words.NARROW}%"

    figure = _figure(
        "Share of the neurons, the strongest first, that carry 50, 90 and 99 % of the energy, dark to light.",
        view.rows,
        lambda row: scandraw.nested(
            [row.values[k] or 0.0 for k in keys], f"layer {row.layer}, {scanned.part(row)}: {told(row)}"
        ),
        told,
        axis="",
        count=24,
        ticks=scandraw.scale(100, 25, " %", margin=0),
        heads=(lambda row: f"{row.layer} {scanned.part(row)}") if several else None,
    )
    figure["curves"] = [
        {
            "caption": f"{kind[:1].upper()}{kind[1:]}: energy (up) carried by a share of neurons (across), a "
            "curve a layer, later layers darker.",
            "drawing": scandraw.curves([row.series["curve"] for row in rows], f"energy over {kind} neurons"),
        }
        for kind, rows in scanned.kinds(view).items()
    ]
    return figure


def _heads(view: ScanView) -> dict[str, Any]:
    top = max((max(row.series["heads"]) for row in view.rows), default=1.0)

    def told(row: LayerRow) -> str:
        groups, needed = int(row.values["groups"] or 0), int(row.values["groups_99"] or 0)
        return f"99 % in {needed} of {groups} groups"

    def breaks(row: LayerRow) -> int:
        size = row.count // max(1, int(row.values["groups"] or 1))
        return size if size > 1 else 0

    return _figure(
        "Share of the layer's energy of each query head; heads that share keys and values stand together. A full cell "
        f"is {words.percent(top)}.",
        view.rows,
        lambda row: scandraw.heat(
            row.series["heads"],
            top,
            f"layer {row.layer}: " + ", ".join(words.percent(round(v, 3)) for v in row.series["heads"][:64]),
            breaks=breaks(row),
        ),
        told,
        axis="",
        count=max(int(scandraw.width(row.count, breaks(row))) for row in view.rows),
    )


def _spectrum(view: ScanView) -> dict[str, Any]:
    rows = []
    deepest = 1
    for kind, found in scanned.kinds(view).items():
        layers = {row.layer: row for row in found}
        deepest = max(deepest, max(layers) + 1)
        span = range(max(layers) + 1)
        dark = [(layers[i].values["rank_90"] or 0.0) if i in layers else 0.0 for i in span]
        light = [(layers[i].values["rank_99"] or 0.0) if i in layers else 0.0 for i in span]
        mean = [sum(one) / len(layers) for one in (dark, light)]
        told = f"{100 * mean[0]:.0f} / {100 * mean[1]:.0f}{words.NARROW}%"
        label = f"{kind}: rank for 90 and 99 % of the energy, {told} of full rank on average"
        rows.append({"head": kind, "drawing": scandraw.columns(dark, light, label), "text": told})
    return {
        "caption": "Rank that holds 90 % (dark) and 99 % (light) of a matrix's energy, of its full rank (hollow); a "
        "column a layer, first layer left. Right: the means.",
        "corner": "Matrix",
        "rows": rows,
        "width": figures.cells_width(max(deepest, 8)),
        "ticks": None,
        "axis": "",
        "curves": [],
    }


def _figure(
    caption: str,
    rows: list[LayerRow],
    draw: Callable[[LayerRow], Markup],
    told: Callable[[LayerRow], str],
    *,
    axis: str,
    count: int,
    ticks: Markup | None = None,
    heads: Callable[[LayerRow], str] | None = None,
) -> dict[str, Any]:
    """A drawing a layer; ``count`` cells wide, numbered where ``axis`` names them."""
    return {
        "caption": caption,
        "corner": "Layer",
        "rows": [
            {"head": heads(row) if heads else str(row.layer), "drawing": draw(row), "text": told(row)} for row in rows
        ],
        "width": figures.cells_width(max(count, 4)),
        "ticks": ticks if ticks is not None else figures.ticks(count) if axis else None,
        "axis": axis,
        "curves": [],
    }


_FIGURES: dict[str, Callable[[ScanView], dict[str, Any] | None]] = {
    "expert-use": _use,
    "expert-similarity": _alike,
    "stream-similarity": _stream,
    "contribution": lambda view: _drawn(view, scandepth.contribution),
    "skip-effect": lambda view: _drawn(view, scandepth.skip_effect),
    "linear-term": lambda view: _drawn(view, scandepth.linear_term),
    "lens": lambda view: _drawn(view, scandepth.lens),
    "neuron-energy": _neurons,
    "head-importance": _heads,
    "spectrum": _spectrum,
}
