"""docs/benchmarks.md, written from the result files and from nothing else.

python -m benchmarks.tables            write
python -m benchmarks.tables --check    change nothing; exit 1 if the page is stale
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from benchmarks import policies
from benchmarks.axes import AxisRow
from benchmarks.caches import CacheRow
from benchmarks.checkfree import RecoveryRow
from benchmarks.common import RESULTS, ROOT, Result, Spread
from benchmarks.evopress import SearchRow
from benchmarks.memory import MemoryRow
from benchmarks.overhead import OverheadRow
from benchmarks.plan import PlanRow
from benchmarks.policies import Outcome, PolicyResult
from benchmarks.prompts import PromptRow
from benchmarks.quality import Published
from benchmarks.readme_serving import CAPACITIES, ChannelRow, ServingRow
from benchmarks.rmoe import RepairRow
from benchmarks.rounds import RoundsRow
from benchmarks.speed import SpeedRow
from benchmarks.stun import StunRow
from paredown.workflow.measured import PolicyRow

PAGE = ROOT / "docs" / "benchmarks.md"
NOTE = "<!-- Written by `python -m benchmarks.tables` from benchmarks/results; measure again with `make bench`. -->"
TYPES: dict[str, Any] = {
    "overhead": Result[OverheadRow],
    "memory": Result[MemoryRow],
    "speed": Result[SpeedRow],
    "plan": Result[PlanRow],
    "caches": Result[CacheRow],
    "prompts": Result[PromptRow],
    "stun-forwards": Result[StunRow],
    "readme-serving": Result[ServingRow],
    "readme-speed": Result[ChannelRow],
    "readme-rounds": Result[RoundsRow],
    "gammamod-rounds": Result[RoundsRow],
    "repair": Result[RepairRow],
    "evopress-search": Result[SearchRow],
    "checkfree-recovery": Result[RecoveryRow],
    "axis-experts": Result[AxisRow],
    "axis-depth": Result[AxisRow],
}
TITLES = {
    "overhead": "What a method costs",
    "memory": "Memory of a run",
    "speed": "Speed of the result",
    "plan": "Plan against run",
    "caches": "Writing with a long cache",
    "prompts": "Reading a prompt",
    "stun-forwards": "Clustering more and more experts",
    "readme-serving": "Serving experts that are known beforehand",
    "readme-speed": "Half the channels a token",
    "readme-rounds": "Training under Read-ME",
    "gammamod-rounds": "Training under gamma-MoD",
    "repair": "Routers after experts were dropped",
    "evopress-search": "Searching for what to drop",
    "checkfree-recovery": "A lost pipeline stage",
    "axis-experts": "Experts: all methods",
    "axis-depth": "Depth: all methods",
}


_TASKS: dict[tuple[str, str | None], str] = {
    ("recall", "after"): "Policies: planted facts, asked for after the text was read",
    ("recall", "within"): "Policies: planted facts, asked for within the prompt",
    ("vqa", None): "Policies: questions about images",
    ("ppl", None): "Policies: perplexity of text read through the cache",
}


def page(results: Path = RESULTS) -> str:
    """Return the page."""
    lines = [NOTE, "", "# Benchmarks", ""]
    lines += [
        "Every number here was measured by the command that stands with it. A range in brackets is from the smallest "
        "to the largest of the repetitions. The machine is small and shared, so what counts are ratios within one run.",
    ]
    for name in TYPES:
        file = results / f"{name}.json"
        if file.is_file():
            lines += _section(name, TYPES[name].model_validate_json(file.read_text(encoding="utf-8")))
    lines += _policies(results)
    lines += _quality(results)
    return "\n".join(lines) + "\n"


def _section(name: str, found: Any) -> list[str]:
    head, cells = _TABLES[name]
    lines = ["", f"## {TITLES[name]}", "", f"{found.question} Goal: {found.goal}.", ""]
    lines += _table(head, [cells(row) for row in found.rows])
    lines += ["", *(f"- {note}" for note in found.notes)]
    lines += [f"- `{found.command}`, commit {found.commit}, seed {found.seed}, {found.created}, {found.seconds:.0f} s."]
    versions = ", ".join(f"{name} {version}" for name, version in sorted(found.versions.items()))
    return [*lines, f"- {found.hardware}; {versions}."]


def _quality(results: Path) -> list[str]:
    files = _of_methods(results)
    if not files:
        return []
    found = {file.stem: Published.model_validate_json(file.read_text(encoding="utf-8")) for file in files}
    lines = [
        "",
        "## Quality of the result",
        "",
        "Each method against its random control, on the same held-out text.",
        "",
    ]
    rows = [
        (f"[{method}](methods/{method}.md)", one.summary, str(one.seeds), one.commit, f"`{one.command}`")
        for method, one in found.items()
    ]
    return lines + _table(("method", "measured", "seeds", "commit", "command"), rows)


def _of_methods(results: Path) -> list[Path]:
    return sorted(file for axis in results.iterdir() if axis.is_dir() for file in axis.glob("*.json"))


def _policies(results: Path) -> list[str]:
    """Return a table for each task: every policy that was measured in it, and the controls it was held against."""
    files = [file for file in _of_methods(results) if policies.is_policy(file.stem)]
    found = [PolicyResult.model_validate_json(file.read_text(encoding="utf-8")) for file in files]
    lines: list[str] = []
    for (task, question), title in _TASKS.items():
        runs = [
            (one, outcome)
            for one in found
            for outcome in one.outcomes
            if outcome.run.task == task and (question is None or outcome.run.question == question)
        ]
        if not runs:
            continue
        lines += ["", f"## {title}", ""]
        rows = [cells for one, outcome in runs for cells in _of_run(one.method, outcome)]
        head = ("policy", "keep", "score", "cache bytes", "against random", "", "against streaming", "")
        first = runs[0][1].original
        lines += _table(head, [("no policy", "1", _score(first, task), "100 %", "", "", "", ""), *rows])
        lines += ["", *(f"- {note}" for note in dict.fromkeys(note for _, one in runs for note in one.notes))]
        commands = dict.fromkeys(f"`{one.command}`, commit {run.commit or one.commit}" for one, run in runs)
        lines += [f"- {'; '.join(commands)}. In brackets: what a policy was held against."]
    return lines


def _of_run(method: str, outcome: Outcome) -> list[tuple[str, ...]]:
    fields = "".join(f" {key}={_short(value)}" for key, value in outcome.run.fields.items())
    listed = []
    shown = {method, "streaming"} | {row.control for row in outcome.rows if row.method == method}
    for row in outcome.rows:
        own = row.method == method
        if row.method in shown:
            listed.append(_policy_row(row, f"{row.method}{fields}" if own else f"({row.method})", outcome.run.task))
    return listed


def _policy_row(row: PolicyRow, name: str, task: str) -> tuple[str, ...]:
    text = task == "ppl"
    return (
        name, f"{row.keep:g}", _score(row.score, task), f"{row.steady_share:.0%}",
        policies.difference(row.difference, text), row.verdict or "",
        policies.difference(row.streaming_difference, text), row.streaming_verdict or "",
    )  # fmt: skip


def _score(of: Any, task: str) -> str:
    if task == "ppl":
        return f"{of.mean:.2f} [{of.low:.2f}, {of.high:.2f}]"
    return f"{of.mean:.1%} [{of.low:.0%}, {of.high:.0%}]"


def _short(value: Any) -> str:
    text = str(value).strip()
    return text if len(text) <= 24 else text[:21] + "..."


def _cache(row: CacheRow) -> tuple[str, ...]:
    fields = "".join(f" {key}={value}" for key, value in row.fields.items())
    return (
        f"{row.tokens:,}", row.method + fields, _mb(row.kv_bytes), f"{row.share_of_dense:.0%}",
        f"{row.tokens_per_second:.2f}", _spread(row.speedup), f"{row.bound:.2f}", f"{row.share_of_bound:.0%}",
    )  # fmt: skip


def _prompt(row: PromptRow) -> tuple[str, ...]:
    fields = "".join(f" {key}={_short(value)}" for key, value in row.fields.items())
    return (
        row.model, f"{row.tokens:,}", row.method + fields, f"{row.seconds:.2f} s", _spread(row.speedup),
        f"{row.bound:.2f}", f"{row.share_of_bound:.0%}", _mb(row.kv_peak_bytes), _mb(row.kv_steady_bytes),
    )  # fmt: skip


def _stun(row: StunRow) -> tuple[str, ...]:
    return (
        f"{row.experts}", f"{row.parameters / 1e6:.1f} M", f"{row.active / 1e6:.1f} M", f"{row.tokens:,}",
        f"{row.forwards:g}", f"{row.forward_seconds:.2f} s", _spread(row.looking), _yes(row.within_goal),
        _spread(row.whole),
    )  # fmt: skip


def _recovery(row: RecoveryRow) -> tuple[str, ...]:
    wins = "" if row.below_random is None else f"{row.below_random[0]}, {row.below_random[1]}"
    return (
        row.trained, f"{row.stage}", row.recovery, _spread(row.before), _spread(row.at_once), _spread(row.later),
        f"{wins} of {row.before.n}" if wins else "",
    )  # fmt: skip


def _overhead(row: OverheadRow) -> tuple[str, ...]:
    fields = "".join(f" {key}={value}" for key, value in row.fields.items())
    return (row.model, row.method + fields, f"{row.tokens:,}", f"{row.forward_seconds:.2f} s", _spread(row.ratio),
            _yes(row.within_goal))  # fmt: skip


def _memory(row: MemoryRow) -> tuple[str, ...]:
    return (
        row.model, row.method, _mb(row.checkpoint), _mb(row.block), _mb(row.largest_end), _mb(row.streams),
        _mb(row.imported), _mb(row.peak), f"{_mb(row.above_imported)} of {_mb(row.goal)}", _yes(row.within_goal),
        _yes(row.within_limit), _mb(row.proof_peak) if row.proof_peak else "",
    )  # fmt: skip


def _speed(row: SpeedRow) -> tuple[str, ...]:
    return (
        row.model, row.change, row.phase, f"{row.tokens_per_second_before:.1f}", f"{row.tokens_per_second_after:.1f}",
        _spread(row.speedup), f"{row.bound:.2f}", f"{row.share_of_bound:.0%}",
        _spread(row.against_uniform) if row.against_uniform else "",
    )  # fmt: skip


def _plan(row: PlanRow) -> tuple[str, ...]:
    return (
        row.model, row.method, _yes(row.exact), f"{row.shapes_planned}", _mb(row.peak_planned), _mb(row.peak_measured),
        f"{row.peak_error:+.0%}", f"{row.seconds_planned:.1f} s", f"{row.seconds_measured:.1f} s",
        f"{row.seconds_error:+.0%}",
    )  # fmt: skip


def _serving(row: ServingRow) -> tuple[str, ...]:
    hits = [", ".join(f"{row.hits[rule][size]:.0%}" for rule in row.hits) for size in CAPACITIES]
    return (
        row.router, row.order, f"{row.share_of_largest:.0%}", f"{row.experts_a_batch:.2f}", f"{row.mean_wait:.0f}",
        *hits,
    )  # fmt: skip


def _channels(row: ChannelRow) -> tuple[str, ...]:
    return (
        f"{row.phase} ({row.prompt} read)", row.form, f"{row.tokens_per_second:.1f}", _spread(row.speedup),
        f"{row.bound:.2f}", f"{row.share_of_bound:.0%}", _mb(row.expert_bytes), _mb(row.mlp_bytes),
    )  # fmt: skip


def _search(row: SearchRow) -> tuple[str, ...]:
    rule = "".join(f" {key}={row.fields[key]}" for key in ("part", "allocation") if key in row.fields)
    apart = row.difference
    return (
        row.model, f"{row.method}{rule}", f"{row.kl.median:.4f} ({row.kl.low:.4f} to {row.kl.high:.4f})",
        "the same choice" if apart is None else f"{apart.mean:+.4f} [{apart.low:+.4f}, {apart.high:+.4f}]",
        f"{row.better} of {row.seeds}", f"{row.same} of {row.seeds}", f"{row.parameters.median / 1e6:.2f} M",
        f"{row.passes.median:,.0f}" if row.passes else "", f"{row.seconds.median:.0f} s",
        "" if row.resumed is None else _yes(row.resumed),
    )  # fmt: skip


def _repair(row: RepairRow) -> tuple[str, ...]:
    return (
        row.dropped_by, row.routers, _score(row.perplexity, "ppl"), _score(row.kl, "ppl"),
        policies.difference(row.against_none, True),
        policies.difference(row.against_linear, True),
        f"{row.load_entropy:.0%}", f"{row.mutual_information:.3f}",
        f"{row.seconds_training:.0f} s",
    )  # fmt: skip


def _rounds(row: RoundsRow) -> tuple[str, ...]:
    return (
        row.way, str(row.steps), _score(row.perplexity, "ppl"), policies.difference(row.against_rounds, True),
        _score(row.dense, "ppl"), f"{row.seconds:.0f} s",
    )  # fmt: skip


def _axis(row: AxisRow) -> tuple[str, ...]:
    fields = "".join(f" {key}={_short(value)}" for key, value in row.fields.items())
    kind = f" ({row.kind})" if row.kind not in ("", "compressor") else ""
    return (
        row.model, f"{row.method}{fields}{kind}", f"{row.keep:g}", _mb(row.bytes), f"{row.share_of_bytes:.0%}",
        _spread(row.prefill), _spread(row.decode), _score(row.perplexity, "ppl"),
        "" if row.recall is None else f"{row.recall:.1%}", f"{row.seconds:.0f} s",
    )  # fmt: skip


_ROUNDS_HEAD = ("way", "steps", "perplexity", "less rounds (nats)", "without the policy", "time to make")
_AXIS_HEAD = (
    "model", "method", "keep", "weights", "of whole", "prefill", "decode", "perplexity", "recall", "time to make",
)  # fmt: skip
_TABLES: dict[str, tuple[Sequence[str], Callable[[Any], tuple[str, ...]]]] = {
    "overhead": (("model", "method", "tokens", "bare forward", "method / forward", "goal met"), _overhead),
    "memory": (
        ("model", "method", "checkpoint", "block", "embedding", "streams", "libraries", "peak", "above libraries",
         "goal met", "under 1.2 GB", "proof"),
        _memory,
    ),
    "speed": (
        ("model", "change", "phase", "tokens/s before", "after", "speed-up", "bound", "share of bound",
         "against equal widths"),
        _speed,
    ),
    "plan": (
        ("model", "method", "shapes and bytes exact", "shapes changed", "peak planned", "measured", "error",
         "time planned", "measured", "error"),
        _plan,
    ),
    "caches": (
        ("tokens", "method", "cache", "of dense", "tokens/s", "against dense", "bound", "share of bound"),
        _cache,
    ),
    "stun-forwards": (
        ("experts", "parameters", "used by a token", "tokens", "forwards", "bare forward", "looking / forward",
         "goal met", "whole step / forward"),
        _stun,
    ),
    "prompts": (
        ("model", "tokens", "method", "time", "against the library", "bound", "share of bound", "cache at most",
         "cache afterwards"),
        _prompt,
    ),
    "readme-serving": (
        ("router", "order", "largest expert", "experts a batch", "mean wait",
         *(f"hits with room for {size}: Belady, LRU, FIFO" for size in CAPACITIES)),
        _serving,
    ),
    "readme-speed": (
        ("phase", "experts", "tokens/s", "against dense", "bound", "share of bound", "weights of experts",
         "of the model's MLPs"),
        _channels,
    ),
    "evopress-search": (
        ("model", "method", "KL to the dense model", "against the first", "better", "same choice", "parameters",
         "forward passes", "time", "killed and resumed the same"),
        _search,
    ),
    "checkfree-recovery": (
        ("trained", "stage lost", "recovery", "loss before", "at once", "later", "seeds below random: at once, later"),
        _recovery,
    ),
    "readme-rounds": (_ROUNDS_HEAD, _rounds),
    "gammamod-rounds": (_ROUNDS_HEAD, _rounds),
    "repair": (
        ("experts dropped by", "routers trained", "perplexity", "KL to the original", "loss against none",
         "against linear", "load entropy", "mutual information", "training"),
        _repair,
    ),
    "axis-experts": (_AXIS_HEAD, _axis),
    "axis-depth": (_AXIS_HEAD, _axis),
}  # fmt: skip


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    lines = ["| " + " | ".join(head) + " |", "| " + " | ".join("---" for _ in head) + " |"]
    return lines + ["| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in rows]


def _spread(of: Spread) -> str:
    return f"{of.median:.2f} ({of.low:.2f} to {of.high:.2f})"


def _mb(nbytes: int) -> str:
    return f"{nbytes / 1e6:,.0f} MB"


def _yes(what: bool) -> str:
    return "yes" if what else "no"


def main() -> int:
    """Write the page, or with ``--check`` say whether it is stale."""
    text = page()
    if "--check" in sys.argv[1:]:
        if not PAGE.is_file() or PAGE.read_text(encoding="utf-8") != text:
            print("stale: docs/benchmarks.md (run `python -m benchmarks.tables`)", file=sys.stderr)
            return 1
        return 0
    PAGE.write_text(text, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
