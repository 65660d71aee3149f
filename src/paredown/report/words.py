"""Numbers and names as people read them; shared by the HTML report, the model card and the terminal.

Sizes are binary (KiB, MiB, GiB), rounded to three significant digits. A measured quality never shows more digits than
its 95 % interval justifies.
"""

from __future__ import annotations

import math
import re
import unicodedata
from collections.abc import Iterable, Sequence
from pathlib import PurePosixPath
from typing import Any

from paredown.workflow.record import Interval, LayerChange, RunRecord, Score, StepRecord

NARROW = "\u202f"  # a no-break space between a number and its unit
MINUS = "\u2212"
DASH = "\u2013"  # between the ends of a range; alone: not measured
TIMES = "\u00d7"
NO_DIFFERENCE = "no difference shown"
_ARXIV = re.compile(r"(?:\d{4}\.\d{4,5}|[a-z-]+(?:\.[A-Z]{2})?/\d{7})(?:v\d+)?")
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
_SUBLAYERS = {"attention": "attention sub-layer", "mlp": "MLP sub-layer"}


# ---- numbers ---------------------------------------------------------------------------------------------------------


def number(value: float, decimals: int) -> str:
    """Fixed decimals, thousands separated by commas, a real minus sign, words for what is not finite."""
    if math.isnan(value):
        return "not a number"
    if math.isinf(value):
        return f"{MINUS}∞" if value < 0 else "∞"
    text = f"{value:,.{max(decimals, 0)}f}" if decimals >= 0 else f"{round(value, decimals):,.0f}"
    if text.startswith("-"):
        # "-0.00" says no more than "0.00".
        text = MINUS + text[1:] if any(c in "123456789" for c in text) else text[1:]
    return text


def significant(value: float, digits: int = 3) -> str:
    """``value`` rounded to ``digits`` significant digits: 12,300, 1.23, 0.00123; 4.56e-09 when very small."""
    if not math.isfinite(value) or value == 0:
        return number(value, 0)
    rounded = float(f"{value:.{digits - 1}e}")
    if abs(rounded) < 1e-4:
        mantissa, exponent = f"{value:.{digits - 1}e}".replace("-", MINUS, 1 if value < 0 else 0).split("e")
        return f"{mantissa}e{int(exponent)}"
    return number(rounded, digits - 1 - math.floor(math.log10(abs(rounded))))


def count(value: int) -> str:
    """A whole number with separated thousands."""
    return number(value, 0)


def many(value: int) -> str:
    """A large count in thousands, millions or billions: 3.41 M."""
    for step, letter in ((10**12, "T"), (10**9, "B"), (10**6, "M"), (10**4, "k")):
        if abs(value) >= (step if letter == "k" else 0.9995 * step):
            scale = 10**3 if letter == "k" else step
            return f"{significant(value / scale)}{NARROW}{letter}"
    return count(value)


def size(value: float) -> str:
    """Bytes in binary units: 3.41 MiB."""
    amount, unit = float(value), "B"
    for larger in ("KiB", "MiB", "GiB", "TiB"):
        if abs(amount) < 999.5:
            break
        amount, unit = amount / 1024, larger
    return f"{count(int(amount)) if unit == 'B' else significant(amount)}{NARROW}{unit}"


def move(before: float, after: float) -> str:
    """Bytes before and after, their unit said once where it is the same: ``10.8 → 6.29 MiB``."""
    old, new = size(before), size(after)
    if old.split(NARROW)[-1] == new.split(NARROW)[-1]:
        old = old.split(NARROW)[0]
    return f"{old} → {new}"


def duration(seconds: float) -> str:
    """Seconds as ms, s, min or h, whichever is read without counting zeros."""
    if not math.isfinite(seconds):
        return number(seconds, 0)
    if abs(seconds) < 0.9995:
        return f"{significant(seconds * 1000)}{NARROW}ms"
    if seconds < 99.95:
        return f"{significant(seconds)}{NARROW}s"
    whole = round(seconds)
    if whole < 3600:
        return f"{whole // 60}{NARROW}min {whole % 60:02d}{NARROW}s"
    return f"{whole // 3600}{NARROW}h {whole % 3600 // 60:02d}{NARROW}min"


def rate(per_second: float) -> str:
    """Tokens per second."""
    return f"{significant(per_second)} tokens/s"


def percent(share: float) -> str:
    """A share of one as a percentage: 50 %, 12.5 %, 0.04 %."""
    points = share * 100
    if not math.isfinite(points) or points == round(points):
        return f"{number(points, 0)}{NARROW}%"
    return f"{significant(points)}{NARROW}%"


def change(before: float, after: float) -> str:
    """Relative change with its sign: ``−42 %``; ``unchanged`` when equal, a dash where a ratio means nothing."""
    if before == after:
        return "unchanged"
    if not (math.isfinite(before) and math.isfinite(after)) or before == 0:
        return DASH
    points = (after / before - 1) * 100
    text = number(abs(points), 0 if abs(points) >= 10 else 1 if abs(points) >= 0.05 else 3)
    return f"{'+' if points > 0 else MINUS}{text}{NARROW}%"


def deviation(planned: float, measured: float) -> str:
    """How far a measurement lies from its plan: ``exact`` or a signed percentage."""
    return "exact" if planned == measured else change(planned, measured)


def factor(before: float, after: float) -> str:
    """``after / before``, as 0.58×."""
    if before == 0 or not (math.isfinite(before) and math.isfinite(after)):
        return DASH
    ratio = after / before
    return f"{significant(ratio, 3 if ratio >= 1 else 2)}{TIMES}"


def _decimals(interval: Interval) -> int:
    """Decimals that the half width justifies: two digits of it up to 35, one above (the particle physicists' rule)."""
    half = (interval.high - interval.low) / 2
    if not math.isfinite(half) or half <= 0:
        mean = abs(interval.mean)
        return 2 if not math.isfinite(mean) or mean == 0 else max(0, 3 - math.floor(math.log10(mean)))
    exponent = math.floor(math.log10(half))
    leading = half / 10**exponent
    if leading >= 9.5:
        return -exponent
    return 1 - exponent if leading < 3.55 else -exponent


def mean(interval: Interval, *, signed: bool = False) -> str:
    """The mean, to the digits that its interval justifies."""
    text = number(interval.mean, min(_decimals(interval), 8))
    return f"+{text}" if signed and interval.mean > 0 else text


def bounds(interval: Interval, *, signed: bool = False) -> str:
    """The interval itself: ``[22.9, 23.9]``; with ``signed``, ``[+0.05, +0.09]``."""
    decimals = min(_decimals(interval), 8)
    low, high = (
        f"+{number(end, decimals)}" if signed and end > 0 else number(end, decimals)
        for end in (interval.low, interval.high)
    )
    return f"[{low}, {high}]"


def ranges(indices: Iterable[int]) -> str:
    """Sorted indices in short: ``0–3, 7, 9–10``."""
    runs: list[list[int]] = []
    for index in sorted(set(indices)):
        if runs and index == runs[-1][1] + 1:
            runs[-1][1] = index
        else:
            runs.append([index, index])
    parts = []
    for first, last in runs:
        parts.append(
            str(first) if first == last else f"{first}, {last}" if last == first + 1 else f"{first}{DASH}{last}"
        )
    return ", ".join(parts)


# ---- text ------------------------------------------------------------------------------------------------------------


def visible(text: str) -> str:
    """``text`` with control, bidirectional and unpaired surrogate characters shown as escapes, so none can act."""
    return "".join(
        character
        if character in "\n\t" or unicodedata.category(character) not in ("Cc", "Cf", "Cs", "Co", "Zl", "Zp")
        else f"\\u{ord(character):04x}"
        for character in text
    )


def line(text: str) -> str:
    """``visible`` text on a single line."""
    return " ".join(visible(text).split())


def plain(value: Any) -> str:
    """Any JSON value of a record in one line: numbers humane, lists of indices in short, long lists cut."""
    if value is None:
        return "none"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return count(value) if abs(value) >= 10_000 else str(value).replace("-", MINUS)
    if isinstance(value, float):
        if not math.isfinite(value):
            return number(value, 0)
        return f"{value:.6g}".replace("-", MINUS, 1 if value < 0 else 0)
    if isinstance(value, str):
        return line(value)
    if isinstance(value, dict):
        return "; ".join(f"{label(key)}: {plain(inner)}" for key, inner in value.items()) or "none"
    if isinstance(value, Sequence):
        items = list(value)
        if not items:
            return "none"
        if all(isinstance(i, int) and not isinstance(i, bool) for i in items) and items == sorted(set(items)):
            return shortened(items)
        text = ", ".join(plain(item) for item in items[:32])
        return f"{text} and {count(len(items) - 32)} more" if len(items) > 32 else text
    return line(str(value))


def shortened(indices: Sequence[int], limit: int = 512) -> str:
    """Indices in short, the first ``limit`` of them where there are more."""
    if len(indices) <= limit:
        return ranges(indices) or "none"
    return f"{ranges(sorted(indices)[:limit])} and {count(len(indices) - limit)} more (all stand in the run's record)"


def moment(stamp: str) -> str:
    """An ISO time in UTC without its seconds; any other text as it is."""
    found = re.fullmatch(r"(\d{4}-\d\d-\d\d)[T ](\d\d:\d\d)(:\d\d(\.\d+)?)?(Z|\+00:00)", stamp)
    return f"{found[1]} {found[2]} UTC" if found else line(stamp)


def label(key: object) -> str:
    """A key of a record as words: ``seconds_by_stage`` becomes ``seconds by stage``, and ``3`` is a layer."""
    text = line(str(key)).replace("_", " ")
    return f"layer {text}" if text.isdecimal() else text


def unit(name: str, amount: int = 1) -> str:
    """A unit's name in number, whichever way a record spells it: ``8 experts``, ``1 attention sub-layer``."""
    word = line(name)
    word = _SUBLAYERS.get(word.lower(), word)
    word = f"MLP{word[3:]}" if word.startswith("mlp ") else word
    single = word[:-1] if word.endswith("s") else word
    return single if amount == 1 else f"{single}s"


def joined(parts: Sequence[str]) -> str:
    """Parts as a sentence lists them: a, b and c."""
    return parts[0] if len(parts) == 1 else f"{', '.join(parts[:-1])} and {parts[-1]}" if parts else ""


# ---- records ---------------------------------------------------------------------------------------------------------


def hub_id(source: str) -> str | None:
    """``source`` if it reads as ``organisation/name``, else None (a folder, a testbed)."""
    return source if _HUB_ID.fullmatch(source) else None


def short_name(source: str) -> str:
    """What to call a model or a data set: its hub id, its testbed name, or the last part of its folder."""
    if hub_id(source) or ("/" not in source and "\\" not in source):
        return line(source)
    return line(PurePosixPath(source.replace("\\", "/")).name or source)


def arxiv(step: StepRecord) -> str | None:
    """The arXiv id of a step's paper; None when there is none or when it does not look like one."""
    value = getattr(step, "arxiv", None)
    return value if isinstance(value, str) and _ARXIV.fullmatch(value) else None


def year(step: StepRecord) -> int | None:
    """The year of a step's paper, where the record has it."""
    value = getattr(step, "year", None)
    return value if isinstance(value, int) else None


def is_perplexity(score: Score) -> bool:
    """Whether ``difference`` of ``score`` is in nats a token while its means are perplexities."""
    return any(word in f"{score.name} {score.unit}".lower() for word in ("perplexity", "ppl"))


def difference_unit(score: Score) -> str:
    """The unit of a score's paired difference."""
    if is_perplexity(score):
        return "nats a token"
    return "points" if score.unit == "% correct" else line(score.unit)


def in_percent(score: Score) -> Score:
    """A share of correct answers in per cent; any other score as it is."""
    if score.unit != "share correct":
        return score

    def scaled(one: Interval | None) -> Interval | None:
        if one is None:
            return None
        low, middle, high = (round(end * 100, 10) for end in (one.low, one.mean, one.high))
        return Interval(mean=middle, low=low, high=high, n=one.n)

    update = {"unit": "% correct", "before": scaled(score.before), "after": scaled(score.after)}
    return score.model_copy(update=update | {"difference": scaled(score.difference)})


def score_unit(score: Score) -> str:
    """The unit of a score's means; empty where the score's name says it already."""
    unit_ = line(score.unit)
    return "" if unit_.lower() in score.name.lower() or is_perplexity(score) else unit_


def reading(score: Score) -> str:
    """What a paired difference says: worse, better, or that no difference is shown."""
    if score.difference is None:
        return "measured after only" if score.before is None else "not compared"
    low, high = score.difference.low, score.difference.high
    if math.isnan(low) or math.isnan(high):
        return "not a number"
    if low <= 0 <= high:
        return NO_DIFFERENCE
    return "better" if (low > 0) == score.higher_is_better else "worse"


def by_unit(changes: Sequence[LayerChange]) -> dict[str, list[LayerChange]]:
    """Changes of one step, grouped by unit in order of appearance, each group by layer."""
    groups: dict[str, list[LayerChange]] = {}
    for one in sorted(changes, key=lambda change_: change_.layer):
        groups.setdefault(one.unit, []).append(one)
    return groups


def removed(record: RunRecord) -> list[str]:
    """What the whole run removed, unit by unit: ``48 of 96 experts``.

    Where a record lists only layers that lost their only unit (a dropped sub-layer), how many there were is unknown
    and is not claimed. Zeros and narrower numbers in tensors of the old shape are not removed from anywhere.
    """
    totals: dict[tuple[int, str], list[int]] = {}
    for position, step in enumerate(record.steps):
        for one in step.changes:
            if one.detail.get("in_place"):
                continue
            entry = totals.setdefault((position, one.unit), [0, 0, 1])
            entry[0] += one.before
            entry[1] += one.after
            entry[2] &= int(one.before == 1 and one.after == 0)
    parts = []
    for (_, name), (before, after, only_lost) in totals.items():
        if after < before:
            of = "" if only_lost else f"of {count(before)} "
            parts.append(f"{count(before - after)} {of}{unit(name, before - after if only_lost else before)}")
    return parts


def policies(record: RunRecord) -> list[str]:
    """The policies that belong to the result: they act while it runs and change no weight."""
    return list(dict.fromkeys(line(step.method) for step in record.steps if step.kind == "policy"))


def opens(loader: str) -> str:
    """What opens a result: ``plain transformers``, or whatever else the record names."""
    return "plain transformers" if loader == "transformers" else line(loader)


def gate_sentence(record: RunRecord) -> str:
    """The gate's decision in one sentence."""
    gate = record.gate
    if gate.kind == "none":
        return "No gate was asked for."
    what = "perplexity after / before" if gate.kind == "ppl" else "divergence from the original in nats a token"
    value = "not measured" if gate.value is None else significant(gate.value)
    limit = "" if gate.limit is None else f", limit {significant(gate.limit)}"
    return f"The gate {'passed' if gate.passed else 'failed'}: {what} {value}{limit}."


def written(record: RunRecord) -> bool:
    """Whether the run left a checkpoint: a failed gate without a proof means that nothing was written."""
    return record.gate.passed or record.proof is not None


def layer_pattern(name: str) -> tuple[str, int | None]:
    """A tensor's name with its first number replaced by ``*``, and that number."""
    match = re.search(r"(?<=\.)\d+(?=\.)", name)
    return (name, None) if match is None else (f"{name[: match.start()]}*{name[match.end() :]}", int(match.group()))


def shape_groups(shapes: dict[str, tuple[list[int], list[int]]]) -> list[tuple[str, str, str, str]]:
    """Planned shapes, equal layers together: ``(name, layers, before, after)``."""
    groups: dict[tuple[str, tuple[int, ...], tuple[int, ...]], list[int]] = {}
    for name, (before, after) in shapes.items():
        pattern, layer = layer_pattern(name)
        found = groups.setdefault((pattern, tuple(before), tuple(after)), [])
        if layer is not None:
            found.append(layer)
    return [(line(p), ranges(layers), _shape(b), _shape(a)) for (p, b, a), layers in groups.items()]


def _shape(shape: tuple[int, ...]) -> str:
    return f" {TIMES} ".join(map(str, shape)) if shape else "gone"


def rows(values: dict[str, Any]) -> list[tuple[str, str]]:
    """A free-form dictionary as rows for a table: nested dictionaries become rows of their own, empty values none."""
    found: list[tuple[str, str]] = []
    for key, value in values.items():
        if value in ([], {}, ""):
            continue
        if isinstance(value, dict):
            found += [(f"{label(key)}, {name}", text) for name, text in rows(value)]
        else:
            found.append((label(key), plain(value)))
    return found
