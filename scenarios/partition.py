"""Who holds which training row: pure functions of (labels, clients, seed).

Every row lands at exactly one client. A new kind is one function of (deck, rule) in `PARTITIONS`.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fedstrata.core.config import require
from fedstrata.core.errors import BadInput, unknown
from fedstrata.core.seeds import generator
from fedstrata.scenarios.dealing import (
    Indices,
    Shares,
    by_source,
    check_sizes,
    dirichlet_label,
    dirichlet_quantity,
    iid,
)
from fedstrata.scenarios.saved import load_saved, sha256_of

__all__ = ["PARTITIONS", "Deck", "Indices", "PartitionRule", "Shares", "describe"]

LABELS = ("answer", "source", "task")
MAY_BE_EMPTY = ("by-task", "by-source", "file")  # kinds in which a client may hold nothing of a task


@dataclass(frozen=True)
class PartitionRule:
    """A scenario file's `partition` block.

    Attributes:
        beta: concentrates a Dirichlet draw: smaller means more skew.
        min_size: rows of every task that each client (by-task: each of the task's clients) has at least.
        label: what `dirichlet-label` skews: answers, values of the record's `field`, or the task as a whole.
        field: the record's field that names a row's source, for `by-source` and `label: source`.
        file: a saved partition, for `kind: file`; relative to the scenario file.
    """

    kind: str = "dirichlet"
    beta: float = 1.0
    min_size: int = 1
    label: str = "answer"
    field: str = ""
    file: str = ""

    def __post_init__(self) -> None:
        if self.kind not in PARTITIONS:
            raise unknown("kind", self.kind, PARTITIONS)
        if self.label not in LABELS:
            raise unknown("label", self.label, LABELS)
        require(0 < self.beta < float("inf"), "beta", "a finite number above 0", self.beta)
        least = 0 if self.kind in MAY_BE_EMPTY else 1
        require(self.min_size >= least, "min_size", f"at least {least} with kind {self.kind}", self.min_size)
        wanted = self.kind == "by-source" or self.label == "source"
        skews = self.kind == "dirichlet-label" or self.label == "answer"
        require(skews, "label", "left out unless kind is dirichlet-label", self.label)
        require(wanted == bool(self.field), "field", "there with by-source or label: source, and only then", self.field)
        require((self.kind == "file") == bool(self.file), "file", "there with kind: file, and only then", self.file)

    @property
    def source(self) -> str | None:
        """The record's field that loading must keep."""
        return self.field or None


@dataclass(frozen=True)
class Deck:
    """One task's rows, to be dealt.

    Attributes:
        labels: uint64 per row; equal means the same label.
        seed: derived from the run's seed and the task.
        task, tasks: the task's index, and how many tasks there are.
        digest: SHA-256 of the rows, which a saved partition must match.
        folder: the scenario file's.
    """

    labels: NDArray[np.uint64]
    clients: int
    seed: int
    task: int = 0
    tasks: int = 1
    name: str = ""
    digest: str = ""
    folder: Path = Path()


def describe(rule: PartitionRule, folder: Path = Path()) -> dict[str, Any]:
    """What the scenario's hash says of the rule: keys added later count only when they differ from their default."""
    told: dict[str, Any] = {"kind": rule.kind, "beta": rule.beta, "min_size": rule.min_size}
    told |= {key: value for key in ("label", "field") if (value := getattr(rule, key)) != getattr(PartitionRule, key)}
    return told | ({"file": sha256_of(folder / rule.file)} if rule.file else {})


def _dirichlet(deck: Deck, rule: PartitionRule) -> Shares:
    return dirichlet_quantity(len(deck.labels), deck.clients, rule.beta, deck.seed, rule.min_size)


def _iid(deck: Deck, rule: PartitionRule) -> Shares:
    return iid(len(deck.labels), deck.clients, deck.seed, rule.min_size)


def _dirichlet_label(deck: Deck, rule: PartitionRule) -> Shares:
    labels = np.zeros_like(deck.labels) if rule.label == "task" else deck.labels
    return dirichlet_label(labels, deck.clients, rule.beta, deck.seed, rule.min_size)


def _by_task(deck: Deck, rule: PartitionRule) -> Shares:
    """Client k belongs to task k mod tasks, and holds nothing of the others."""
    if deck.tasks > deck.clients:
        raise BadInput(f"partition: by-task needs a client for each of {deck.tasks} tasks, got {deck.clients} clients")
    own = list(range(deck.task, deck.clients, deck.tasks))
    hands = iter(iid(len(deck.labels), len(own), deck.seed, rule.min_size))
    return tuple(next(hands) if client in own else np.zeros(0, np.int64) for client in range(deck.clients))


def _by_source(deck: Deck, rule: PartitionRule) -> Shares:
    order = generator(deck.seed, "by-source", deck.clients).permutation(deck.clients)
    return check_sizes(by_source(deck.labels, order), rule.min_size)


def _file(deck: Deck, rule: PartitionRule) -> Shares:
    shares = load_saved(deck.folder / rule.file, deck.name, deck.digest, len(deck.labels), deck.clients)
    return check_sizes(shares, rule.min_size)


PARTITIONS: Mapping[str, Callable[[Deck, PartitionRule], Shares]] = {
    "dirichlet": _dirichlet,
    "dirichlet-label": _dirichlet_label,
    "iid": _iid,
    "by-task": _by_task,
    "by-source": _by_source,
    "file": _file,
}
