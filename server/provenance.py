"""What a run's events tell: where each subspace came from, who routed where, what each stage cost.

Pure functions from a list of events (`RunFolder.events`). A resumed run repeats the rounds after its last commit; only
the last telling of a (stage, round) happened to the state that was kept, so only that one counts.
"""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

Event = Mapping[str, Any]


@dataclass
class Origin:
    """One subspace's story. `samples` maps a task ("a + b" where one share mixes several) to samples trained."""

    subspace: int
    stage: int | None = None  # where it was opened; None: it was there from the start
    round: int | None = None
    samples: Counter[str] = field(default_factory=Counter)  # summed over client-rounds
    clients: set[int] = field(default_factory=set)
    client_rounds: int = 0


@dataclass
class Cost:
    """What one stage took: raw tensor bytes and seconds; `scoring` is the evaluation after the stage."""

    stage: int
    bytes_up: int = 0
    bytes_down: int = 0
    bytes_eval: int = 0
    seconds: float = 0.0
    train_seconds: float = 0.0
    scoring: float = 0.0


def first(events: Iterable[Event], name: str) -> Event:
    """The first event of that name; empty without one."""
    return next((event for event in events if event["event"] == name), {})


def last(events: Sequence[Event], name: str) -> Event:
    """The last event of that name; empty without one."""
    return first(reversed(events), name)


def rounds(events: Iterable[Event]) -> list[Event]:
    """The rounds that happened, in order, each once."""
    told = {(e["stage"], e["round"]): e for e in events if e["event"] == "round"}
    return [told[key] for key in sorted(told)]


def scorings(events: Iterable[Event]) -> list[Event]:
    """The "stage_scored" events in order of stage (0: before training), each stage once."""
    told = {e["stage"]: e for e in events if e["event"] == "stage_scored"}
    return [told[stage] for stage in sorted(told)]


def rejections(events: Iterable[Event]) -> list[Event]:
    """The replies that were refused, in order, each once."""
    told = {(e["stage"], e["round"], e["client"]): e for e in events if e["event"] == "rejected"}
    return [told[key] for key in sorted(told)]


def origins(events: Iterable[Event]) -> list[Origin]:
    """Where each subspace came from, by subspace; empty for a method whose participants name no subspace."""
    found: dict[int, Origin] = {}
    for told in rounds(events):
        if told.get("skipped"):
            continue
        for subspace in told.get("opened") or ():
            found.setdefault(subspace, Origin(subspace, told["stage"], told["round"]))
        for participant in told.get("participants") or ():
            if participant.get("subspace") is not None:
                _count(found.setdefault(participant["subspace"], Origin(participant["subspace"])), participant)
    return [found[subspace] for subspace in sorted(found)]


def _count(origin: Origin, participant: Event) -> None:
    origin.samples[" + ".join(participant["tasks"])] += participant["samples"]
    origin.clients.add(participant["client"])
    origin.client_rounds += 1


def homes(subspaces: Iterable[Origin]) -> dict[str, int]:
    """Task → its home: the subspace that trained on most of the task's samples (ties: the older one)."""
    best: dict[str, tuple[int, int]] = {}
    for origin in subspaces:
        for task, samples in origin.samples.items():
            best[task] = max(best.get(task, (0, 1)), (samples, -origin.subspace))
    return {task: -subspace for task, (_, subspace) in best.items()}


def routed_home(hits: Sequence[int], home: int | None) -> float | None:
    """Percentage of a task's test inputs whose highest weight fell on `home`; None without a home or an input."""
    total = sum(hits)
    if home is None or not total:
        return None
    return 100 * hits[home] / total if home < len(hits) else 0.0


def costs(events: Sequence[Event]) -> list[Cost]:
    """Bytes and seconds of each stage, in order; stage 0 is the scoring before training."""
    found: dict[int, Cost] = {}
    for told in rounds(events):
        cost = found.setdefault(told["stage"], Cost(told["stage"]))
        for name in ("bytes_up", "bytes_down", "seconds", "train_seconds"):
            setattr(cost, name, getattr(cost, name) + (told.get(name) or 0))
    for told in scorings(events):
        cost = found.setdefault(told["stage"], Cost(told["stage"]))
        cost.bytes_eval, cost.scoring = told.get("bytes_eval") or 0, told.get("seconds") or 0.0
    return [found[stage] for stage in sorted(found)]
