"""Where a run is: what the federation loop itself must remember between rounds."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from fedstrata.core.metrics import AccuracyMatrix


@dataclass(frozen=True)
class Progress:
    """Stage and round count from 1 and name the next ones to run; bytes are raw tensor bytes.

    trained[task][subspace] counts the instructions that the task sent into the subspace over all rounds.
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

    def to_json(self) -> dict[str, Any]:
        return {**asdict(replace(self, matrix=None)), "matrix": self.matrix.to_json()}  # type: ignore[arg-type]

    @staticmethod
    def from_json(tree: dict[str, Any]) -> "Progress":
        """JSON keys are strings; tasks and subspaces are numbers."""
        trained = {int(t): {int(s): n for s, n in row.items()} for t, row in tree["trained"].items()}
        routing = {int(task): share for task, share in tree["routing"].items()}
        matrix = AccuracyMatrix.from_json(tree["matrix"])
        return Progress(**{**tree, "matrix": matrix, "trained": trained, "routing": routing})

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
