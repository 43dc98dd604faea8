"""How everything here is measured: A/B pairs interleaved in one process tree, medians of paired ratios.

Machines are noisy, so a figure is a ratio of two sides that ran next to each other. CPU seconds (this process and the
children it waited for) say what work costs; wall seconds stand beside them.
"""

import os
import platform
import resource
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from statistics import median
from typing import Any

Work = Callable[[], Any]


@dataclass(frozen=True)
class Cost:
    """Seconds of one repetition."""

    cpu: float
    wall: float


@dataclass(frozen=True)
class Result:
    """One benchmark's outcome; `Result.json` is what `fedstrata bench NAME --json FILE` writes.

    Attributes:
        name: the benchmark.
        what: one line: work, sizes, unit.
        clock: cpu | wall: what the ratios are of; or another unit ("bytes", "ops", "MB").
        ratios: baseline → median of baseline / ours; bigger is better. The first one is `ratio`.
        targets: baseline or limit → what was aimed at.
        limits: name → measured value of a ceiling (smaller is better: ≤ its target).
        pairs: every repetition: side → cost.
        equal: what was asserted to be equal in the same run, with the largest difference.
        notes: whatever else is worth knowing.
    """

    name: str
    what: str
    clock: str
    ratios: Mapping[str, float]
    targets: Mapping[str, float]
    limits: Mapping[str, float] = field(default_factory=dict)
    pairs: tuple[Mapping[str, Any], ...] = ()
    equal: Mapping[str, Any] = field(default_factory=dict)
    notes: tuple[str, ...] = ()

    def json(self) -> dict[str, Any]:
        """With `ratio` (the first baseline's) and the machine."""
        first = next(iter(self.ratios.values()), None)
        return {"version": 1, "ratio": first, **asdict(self), "machine": machine()}


def cost(work: Work) -> Cost:
    """What one call costs."""
    wall, cpu = time.perf_counter(), _cpu()
    work()
    return Cost(_cpu() - cpu, time.perf_counter() - wall)


def paired(sides: Mapping[str, Work], repeats: int = 5, warm: int = 1) -> list[dict[str, Cost]]:
    """`repeats` rounds in which every side runs once, in a turning order, after `warm` calls."""
    for work in sides.values():
        for _ in range(warm):
            work()
    names, rounds = list(sides), []
    for number in range(repeats):
        turned = names[number % len(names) :] + names[: number % len(names)]
        costs = {name: cost(sides[name]) for name in turned}
        rounds.append({name: costs[name] for name in names})
    return rounds


def ratios(rounds: list[dict[str, Cost]], ours: str, clock: str) -> dict[str, float]:
    """Side → median over the rounds of its cost / ours."""
    names = [name for name in rounds[0] if name != ours]
    return {n: median(getattr(r[n], clock) / getattr(r[ours], clock) for r in rounds) for n in names}


def raw(rounds: list[dict[str, Cost]]) -> tuple[dict[str, Any], ...]:
    """The rounds as plain dicts."""
    return tuple({name: asdict(spent) for name, spent in round_.items()} for round_ in rounds)


def machine() -> dict[str, Any]:
    """What the figures were measured on."""
    names = ("torch", "transformers", "peft", "flwr", "ray", "numpy")
    return {
        "processor": _processor(),
        "cores": os.cpu_count(),
        "python": platform.python_version(),
        "load": os.getloadavg()[0],
        "versions": {name: version(name) for name in names},
    }


def _cpu() -> float:
    own, waited = resource.getrusage(resource.RUSAGE_SELF), resource.getrusage(resource.RUSAGE_CHILDREN)
    return own.ru_utime + own.ru_stime + waited.ru_utime + waited.ru_stime


def _processor() -> str:
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:  # noqa: PTH123
            return next(line.split(":", 1)[1].strip() for line in file if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()
