"""What was planned beside what came of it: a run's summary and report show it."""

from collections.abc import Mapping, Sequence
from typing import Any

from fedstrata.core import machine
from fedstrata.server import provenance
from fedstrata.server.progress import Progress

FIGURES = ("bytes_up", "bytes_down", "bytes_eval", "actor_memory", "server_memory", "seconds")
SIZES = ("actors", "device", "cohort_size", "cohorts")


def compare(events: Sequence[provenance.Event], actual: Mapping[str, float | None]) -> dict[str, Any]:
    """The plan in a run's events; per figure what was planned and what is: None where nobody knows.

    Empty for a run that wrote no plan down. actual: figure → value.
    """
    plan = provenance.last(events, "run_started").get("plan")
    if not isinstance(plan, Mapping):
        return {}
    moved = plan.get("bytes") or {}
    planned = {
        "bytes_up": moved.get("up"),
        "bytes_down": moved.get("down"),
        "bytes_eval": moved.get("evaluation"),
        "actor_memory": plan.get("actor_memory"),
        "seconds": provenance.last(events, "time_predicted").get("seconds"),
    }
    figures = {name: {"planned": planned.get(name), "actual": actual.get(name)} for name in FIGURES}
    return {**{name: plan.get(name) for name in SIZES}, **figures}


def actual_of(progress: Progress) -> dict[str, float | None]:
    """What a run has taken so far; of memory the peak of a whole process, on a GPU of its tensors."""
    moved = {name: getattr(progress, name) for name in ("bytes_up", "bytes_down", "bytes_eval")}
    peaks = {"actor_memory": progress.peak or None, "server_memory": machine.peak()}
    return {**moved, **peaks, "seconds": progress.wall_seconds}
