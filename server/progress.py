"""Where a run is: what the federation loop itself must remember between rounds."""

from collections import Counter
from collections.abc import Collection, Iterable, Mapping
from dataclasses import asdict, dataclass, field, replace
from statistics import median
from typing import Any

from fedstrata.core.metrics import AccuracyMatrix

WARM = 5  # norms of a subspace before its median limits the next ones
LIMIT = 10.0  # times the median
RECENT = 50  # norms that are remembered of each subspace
STRIKES = 3  # rejections in a row that put a client in quarantine
COUNTS = ("strikes", "quarantine", "tokens_sent", "updates_sent", "too_few")  # of type {client: number}
QUARANTINE = 5  # rounds that it is not drawn for then


@dataclass(frozen=True)
class Progress:
    """Stage and round count from 1 and name the next ones to run; bytes are raw tensor bytes.

    Attributes:
        trained: trained[task][subspace] counts the instructions that the task sent into the subspace over all rounds.
        norms: subspace → the norms of its latest updates.
        strikes: client → its rejections in a row.
        quarantine: client → the last round (counted through the run) that it is not drawn for.
        rejected: kind of reason → how many replies were not used for it.
        cohort: the largest cohort that fits into memory, as clients reported; 0: none was too large.
        shrunk: how often that was lowered.
        peak: the most bytes of memory that a client's process reported.
        tokens_sent: client → how many tokens it has sent at most, each of other data than those before.
        updates_sent: client → how many of its updates went into the state.
        too_few: client → rounds in which it held too few instructions for a token.
        noise_key: what the server's noise is drawn from, where that is not the run's seed; hex digits.
        lineage: what a deployed run is called to its clients; empty in a simulation, whose config says it.
    """

    matrix: AccuracyMatrix
    stage: int = 1
    round: int = 1
    commits: int = 0
    bytes_up: int = 0
    bytes_down: int = 0
    bytes_eval: int = 0
    skipped_rounds: int = 0
    train_seconds: float = 0.0
    wall_seconds: float = 0.0
    trained: Mapping[int, Mapping[int, int]] = field(default_factory=dict)
    routing: Mapping[int, float] = field(default_factory=dict)  # task → percentage routed to its own subspace
    beside: Mapping[str, Mapping[str, float]] = field(default_factory=dict)  # task → further metrics of the last row
    norms: Mapping[int, tuple[float, ...]] = field(default_factory=dict)
    strikes: Mapping[int, int] = field(default_factory=dict)
    quarantine: Mapping[int, int] = field(default_factory=dict)
    rejected: Mapping[str, int] = field(default_factory=dict)
    cohort: int = 0
    shrunk: int = 0
    peak: int = 0
    tokens_sent: Mapping[int, int] = field(default_factory=dict)
    updates_sent: Mapping[int, int] = field(default_factory=dict)
    too_few: Mapping[int, int] = field(default_factory=dict)
    noise_key: str = ""
    lineage: str = ""

    def to_json(self) -> dict[str, Any]:
        return {**asdict(replace(self, matrix=None)), "matrix": self.matrix.to_json()}  # type: ignore[arg-type]

    @staticmethod
    def from_json(tree: dict[str, Any]) -> "Progress":
        """JSON keys are strings; tasks and subspaces are numbers."""
        trained = {int(t): {int(s): n for s, n in row.items()} for t, row in tree["trained"].items()}
        routing = {int(task): share for task, share in tree["routing"].items()}
        matrix = AccuracyMatrix.from_json(tree["matrix"])
        norms = {int(subspace): tuple(found) for subspace, found in tree.get("norms", {}).items()}
        counts = {name: {int(k): n for k, n in tree.get(name, {}).items()} for name in COUNTS}
        known = {**tree, "matrix": matrix, "trained": trained, "routing": routing, "norms": norms, **counts}
        return Progress(**known)

    def count_trained(self, tasks: Mapping[int, int], subspace: int) -> "Progress":
        """Adds {task: instructions} to a subspace."""
        trained = {task: dict(row) for task, row in self.trained.items()}
        for task, count in tasks.items():
            row = trained.setdefault(task, {})
            row[subspace] = row.get(subspace, 0) + count
        return replace(self, trained=trained)

    def owner(self, task: int) -> int | None:
        """The subspace that most of the task's instructions went into; None before it was trained."""
        row = self.trained.get(task, {})
        return max(sorted(row), key=lambda subspace: row[subspace]) if row else None

    def limit(self, subspace: int) -> float:
        """The largest norm that an update of the subspace may have; infinite until enough of them were seen."""
        return LIMIT * (self.usual(subspace) or float("inf"))

    def usual(self, subspace: int) -> float | None:
        """The median norm of the subspace's latest updates; None until enough of them were seen."""
        seen = self.norms.get(subspace, ())
        return median(seen) if len(seen) >= WARM else None

    def count_norms(self, found: Iterable[tuple[int, float]]) -> "Progress":
        """Adds (subspace, norm) of accepted updates."""
        norms = dict(self.norms)
        for subspace, norm in found:
            norms[subspace] = (*norms.get(subspace, ()), norm)[-RECENT:]
        return replace(self, norms=norms)

    def count_rejected(self, kinds: Iterable[str]) -> "Progress":
        """Adds one per kind of reason."""
        return replace(self, rejected=dict(Counter(self.rejected) + Counter(str(kind) for kind in kinds)))

    def count_sent(self, tokens: Iterable[int], updates: Iterable[int], too_few: Iterable[int]) -> "Progress":
        """Adds one for each of these clients: what they sent in a round, or why they sent nothing."""
        old = (self.tokens_sent, self.updates_sent, self.too_few)
        now = (tokens, updates, too_few)
        told, sent, few = (dict(Counter(before) + Counter(new)) for before, new in zip(old, now, strict=True))
        return replace(self, tokens_sent=told, updates_sent=sent, too_few=few)

    def fit(self, options: Iterable[Mapping[str, Any]], size: int) -> "Progress":
        """Takes in what replies say of memory; `size`: the cohort size until now. Words that make no sense count not.

        It depends on what was said, not on the order in which it came.
        """
        told = list(options)
        fits = [o["cohort"] for o in told if type(o.get("cohort")) is int and 1 <= o["cohort"] < size]
        peaks = [o["peak"] for o in told if type(o.get("peak")) is int]
        cohort = min([*fits, self.cohort or size]) if fits else self.cohort
        return replace(self, cohort=cohort, shrunk=self.shrunk + bool(fits), peak=max([self.peak, *peaks]))

    def judge(self, number: int, good: Collection[int], bad: Collection[int]) -> "Progress":
        """After round `number`: who answered well is clean; who was rejected too often in a row is sent away."""
        strikes = {client: count for client, count in self.strikes.items() if client not in good}
        strikes |= {client: strikes.get(client, 0) + 1 for client in sorted(bad)}
        away = {client: last for client, last in self.quarantine.items() if last > number}
        away |= {client: number + QUARANTINE for client, count in strikes.items() if count >= STRIKES}
        return replace(self, strikes={c: n for c, n in strikes.items() if n < STRIKES}, quarantine=away)
