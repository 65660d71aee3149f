"""Measure: ``python -m benchmarks.run overhead|memory|speed|plan|quality|all``, or one method's name.

After a testbed was trained anew, ``python -m benchmarks.run METHOD --on testbed:lm`` measures a policy on it again and
leaves its other runs as they are.
"""

from __future__ import annotations

import argparse
import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks import (
    axes,
    caches,
    checkfree,
    evopress,
    memory,
    overhead,
    plan,
    policies,
    prompts,
    quality,
    readme_serving,
    rmoe,
    rounds,
    speed,
    stun,
    tables,
)
from benchmarks.common import RESULTS, one_thread, say, write

BENCHMARKS: dict[str, Callable[[], Any]] = {
    "overhead": overhead.measure,
    "memory": memory.measure,
    "speed": speed.measure,
    "plan": plan.measure,
    "caches": caches.measure,
    "prompts": prompts.measure,
    "stun-forwards": stun.measure,
    "readme-serving": readme_serving.measure,
    "readme-speed": readme_serving.speed,
    **{name: functools.partial(rounds.measure, name) for name in rounds.SUBJECTS},
    "repair": rmoe.measure,
    "evopress-search": evopress.measure,
    "checkfree-recovery": checkfree.measure,
    "axis-experts": functools.partial(axes.measure, "experts"),
    "axis-depth": functools.partial(axes.measure, "depth"),
}


def main() -> None:
    """Measure what was asked for and write the page."""
    methods = {file.stem: file for file in quality.experiments()}
    parser = argparse.ArgumentParser(prog="python -m benchmarks.run", description="Measure.")
    parser.add_argument("name", choices=[*BENCHMARKS, "quality", "all", *methods])
    parser.add_argument("--on", metavar="MODEL", help="of a policy's runs, only those on MODEL; the others stay")
    options = parser.parse_args()
    asked = options.name
    one_thread()
    for name, measure in BENCHMARKS.items():
        if asked in (name, "all"):
            write(measure(), RESULTS / f"{name}.json")
    for name, file in methods.items():
        if asked in (name, "quality", "all"):
            place = RESULTS / file.parent.name / f"{name}.json"
            found: Any = _policy(file, place, options.on) if policies.is_policy(name) else quality.measure(file)
            write(found, place)
            say(f"{name}: {found.summary}")
    tables.PAGE.write_text(tables.page(), encoding="utf-8")


def _policy(file: Path, place: Path, on: str | None) -> policies.PolicyResult:
    if on is None:
        return policies.measure(file)
    earlier = policies.PolicyResult.model_validate_json(place.read_text(encoding="utf-8")) if place.exists() else None
    return policies.measure(file, earlier=earlier, on=on)


if __name__ == "__main__":
    main()
