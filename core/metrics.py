"""The accuracy matrix and what is read off it; `docs/metrics.md` has the same formulas under the same names.

A[t, i] is the score of task i, 0–100, after stage t; t = 0 is before any training; T is the last stage *that was
scored*, so a run that was interrupted gives values over the rows it has. S_t holds the tasks trained in the first t
stages and t_i is the stage in which task i was first trained. All means are unweighted means over tasks.
"""

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any, TypeVar

from fedstrata.core.errors import BadInput

VERSION = 1
KEYS = ("version", "tasks", "stages", "scores", "seen", "counts", "metrics", "vocabulary")
Cell = TypeVar("Cell")
Rows = tuple[tuple[Cell, ...], ...]


@dataclass(frozen=True)
class AccuracyMatrix:
    """Scores of all N tasks before training and after each of T stages; rows exist for what has been scored so far.

    Attributes:
        tasks: N names, the columns.
        stages: T names, one per stage of the scenario (row t > 0 belongs to `stages[t - 1]`).
        metrics: N names of scorers, what a task's score measures.
        scores: up to T+1 rows of N scores in 0–100; row 0 is before training.
        seen: same shape; whether the task was trained in the first t stages.
        counts: same shape; test examples behind the score.
        vocabulary: same shape; percentage of answers from the task's own vocabulary, None where it has none.

    Raises:
        ValueError: shapes disagree, a score leaves 0–100, row 0 has a seen task, or a seen task becomes unseen.
    """

    tasks: tuple[str, ...]
    stages: tuple[str, ...]
    metrics: tuple[str, ...]
    scores: Rows[float] = ()
    seen: Rows[bool] = ()
    counts: Rows[int] = ()
    vocabulary: Rows[float | None] = ()

    def __post_init__(self) -> None:
        _check_names(self)
        for name in ("scores", "seen", "counts", "vocabulary"):
            _check_shape(self, name)
        _check_values(self)
        _check_seen(self.seen)

    def add_row(
        self,
        scores: Mapping[str, float],
        trained: Collection[str],
        counts: Mapping[str, int],
        vocabulary: Mapping[str, float | None] | None = None,
    ) -> "AccuracyMatrix":
        """The matrix with one more row.

        Args:
            scores: 0–100 for each of the N tasks.
            trained: tasks trained in the stage that just ended (empty for row 0); earlier ones stay seen.
            counts: test examples for each of the N tasks.
            vocabulary: 0–100 or None per task; a missing task counts as None.

        Raises:
            ValueError: the matrix is full, or the names are not exactly the tasks.
        """
        for name, given in (("scores", scores), ("counts", counts)):
            if set(given) != set(self.tasks):
                raise ValueError(f"{name}: must name exactly the tasks {list(self.tasks)}, got {sorted(given)}")
        if unknown := set(trained) - set(self.tasks):
            raise ValueError(f"trained: not tasks of this matrix: {sorted(unknown)}")
        before = self.seen[-1] if self.seen else (False,) * len(self.tasks)
        rates = vocabulary or {}
        return replace(
            self,
            scores=(*self.scores, tuple(float(scores[task]) for task in self.tasks)),
            seen=(*self.seen, tuple(old or task in trained for old, task in zip(before, self.tasks, strict=True))),
            counts=(*self.counts, tuple(int(counts[task]) for task in self.tasks)),
            vocabulary=(*self.vocabulary, tuple(rates.get(task) for task in self.tasks)),
        )

    @property
    def done(self) -> int:
        """T: how many stages have been scored."""
        return max(0, len(self.scores) - 1)

    @property
    def final(self) -> dict[str, float]:
        """Task → score in the last row, unseen tasks too; empty without rows."""
        return dict(zip(self.tasks, self.scores[-1], strict=True)) if self.scores else {}

    @property
    def last(self) -> float | None:
        """mean_{i ∈ S_T} A[T, i]: FCIT's Last (arXiv 2503.12897), MCITlib's MFN (mean final accuracy)."""
        return self._mean_seen(self.done)

    @property
    def avg(self) -> float | None:
        """(1/T) Σ_{t=1..T} mean_{i ∈ S_t} A[t, i]: FCIT's Avg, MCITlib's MAA (mean average accuracy)."""
        return _mean([mean for mean in self.by_stage if mean is not None])

    @property
    def by_stage(self) -> tuple[float | None, ...]:
        """mean_{i ∈ S_t} A[t, i] for t = 1..T: the curve whose mean is `avg` and whose end is `last`."""
        return tuple(self._mean_seen(t) for t in range(1, self.done + 1))

    @property
    def forgetting(self) -> float | None:
        """mean_{i ∈ S_{T-1}} (max_{t<T, i ∈ S_t} A[t, i] − A[T, i]): the *maximum* variant; lower is better.

        Chaudhry et al., "Riemannian Walk for Incremental Learning", ECCV 2018 (arXiv 1801.10112): the fall from the
        best earlier score, not from the first. Not clipped: negative when tasks improved. None before stage 2.
        """
        return _mean([self._best(i) - self.scores[-1][i] for i in self._seen_before_last()])

    @property
    def bwt(self) -> float | None:
        """mean_{i ∈ S_{T-1}} (A[T, i] − A[t_i, i]): backward transfer; higher is better.

        Lopez-Paz and Ranzato, "Gradient Episodic Memory", NeurIPS 2017 (arXiv 1706.08840). None before stage 2.
        """
        return _mean([self.scores[-1][i] - self.scores[self._first(i)][i] for i in self._seen_before_last()])

    @property
    def fwt(self) -> float | None:
        """mean_{i: t_i ≥ 2} (A[t_i − 1, i] − A[0, i]): what earlier stages gave to a new task.

        Forward transfer of Lopez-Paz and Ranzato 2017, with the base model's own score (row 0) as their b_i.
        """
        late = [i for i in range(len(self.tasks)) if self.done and self.seen[-1][i] and self._first(i) >= 2]
        return _mean([self.scores[self._first(i) - 1][i] - self.scores[0][i] for i in late])

    @property
    def vocabulary_rate(self) -> float | None:
        """mean_{i ∈ S_T} of the last row's vocabulary percentages, over the tasks that have a vocabulary."""
        if not self.scores:
            return None
        rates = zip(self.vocabulary[-1], self.seen[-1], strict=True)
        return _mean([rate for rate, seen in rates if seen and rate is not None])

    def to_json(self) -> dict[str, Any]:
        """What `matrix.json` holds: plain lists under exactly the names in `KEYS`."""
        rows = {name: [list(row) for row in getattr(self, name)] for name in ("scores", "seen", "counts", "vocabulary")}
        names = {name: list(getattr(self, name)) for name in ("tasks", "stages", "metrics")}
        tree = {"version": VERSION, **names, **rows}
        return {key: tree[key] for key in KEYS}

    @classmethod
    def from_json(cls, tree: object, source: str = "matrix.json") -> "AccuracyMatrix":
        """The inverse of `to_json`. Raises `BadInput`, beginning with `source`, for anything else."""
        if not isinstance(tree, Mapping) or set(tree) != set(KEYS):
            raise BadInput(f"{source}: must hold exactly the keys {', '.join(KEYS)}")
        if tree["version"] != VERSION:
            raise BadInput(f"{source}: version must be {VERSION}, got {tree['version']!r}")
        try:
            rows = {key: tuple(map(tuple, tree[key])) for key in ("scores", "seen", "counts", "vocabulary")}
            return cls(tuple(tree["tasks"]), tuple(tree["stages"]), tuple(tree["metrics"]), **rows)
        except (TypeError, ValueError) as error:
            raise BadInput(f"{source}: not an accuracy matrix: {error}") from error

    def _mean_seen(self, t: int) -> float | None:
        if not self.scores:
            return None
        return _mean([score for score, seen in zip(self.scores[t], self.seen[t], strict=True) if seen])

    def _seen_before_last(self) -> list[int]:
        return [i for i in range(len(self.tasks)) if self.done >= 2 and self.seen[-2][i]]

    def _first(self, i: int) -> int:
        """t_i of a seen task."""
        return next(t for t, row in enumerate(self.seen) if row[i])

    def _best(self, i: int) -> float:
        """max_{t<T, i ∈ S_t} A[t, i] of a task seen before the last stage."""
        return max(row[i] for row, seen in zip(self.scores[:-1], self.seen[:-1], strict=True) if seen[i])


def _mean(values: Sequence[float]) -> float | None:
    return math.fsum(values) / len(values) if values else None


def _check_names(matrix: AccuracyMatrix) -> None:
    for name in ("tasks", "stages", "metrics"):
        if not all(isinstance(value, str) for value in getattr(matrix, name)):
            raise ValueError(f"{name}: must be names")
    if len(set(matrix.tasks)) != len(matrix.tasks) or len(matrix.metrics) != len(matrix.tasks):
        raise ValueError("tasks: must be different names with one metric each")


def _check_shape(matrix: AccuracyMatrix, name: str) -> None:
    rows, most = getattr(matrix, name), len(matrix.stages) + 1
    if len(rows) != len(matrix.scores) or len(rows) > most:
        raise ValueError(f"{name}: must have as many rows as scores and at most {most}, got {len(rows)}")
    if any(len(row) != len(matrix.tasks) for row in rows):
        raise ValueError(f"{name}: every row must have {len(matrix.tasks)} entries")


def _check_values(matrix: AccuracyMatrix) -> None:
    percentages = [value for row in (*matrix.scores, *matrix.vocabulary) for value in row if value is not None]
    if any(value is None for row in matrix.scores for value in row) or not all(0 <= v <= 100 for v in percentages):
        raise ValueError("scores and vocabulary: must be between 0 and 100")
    if not all(type(value) is int and value >= 0 for row in matrix.counts for value in row):
        raise ValueError("counts: must be whole numbers of at least 0")


def _check_seen(seen: Rows[bool]) -> None:
    if not all(isinstance(value, bool) for row in seen for value in row) or (seen and any(seen[0])):
        raise ValueError("seen: must be true or false, and false in row 0")
    pairs = (pair for old, new in pairwise(seen) for pair in zip(old, new, strict=True))
    if any(old and not new for old, new in pairs):
        raise ValueError("seen: a task that was trained stays seen")
