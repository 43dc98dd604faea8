"""A trace: from which round on which client has which tasks, told by a JSON, JSONL or CSV file.

`{"client": 3, "round": 12, "tasks": ["charts"]}`: from round 12 of the run (rounds count from 1 through all stages)
client 3 trains charts; `[]` or null: it is absent. Before its first record a client is absent.
"""

import csv
import io
from bisect import bisect_right
from collections.abc import Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from fedstrata.core.errors import BadInput, unknown
from fedstrata.core.seeds import generator
from fedstrata.scenarios.dealing import Indices, Shares
from fedstrata.scenarios.formats import clean
from fedstrata.scenarios.jsonfile import brief, read_records

KEYS = ("client", "round", "tasks")
MOST_DIGITS = 18  # of a number in a CSV file


@dataclass(frozen=True)
class Trace:
    """{client: ascending [(first round, tasks)]}"""

    changes: Mapping[int, Sequence[tuple[int, tuple[int, ...]]]]

    def at(self, client: int, number: int) -> tuple[int, ...]:
        """The client's tasks in round `number` of the run; () while it is absent."""
        mine = self.changes.get(client, ())
        place = bisect_right(mine, number, key=lambda change: change[0])
        return mine[place - 1][1] if place else ()

    def spells(self, client: int, task: int) -> int:
        """How many separate times the client has the task."""
        return len(self._begins(client, task))

    def spell(self, client: int, task: int, number: int) -> int:
        """Which of them (from 0) round `number` belongs to."""
        return bisect_right(self._begins(client, task), number) - 1

    def _begins(self, client: int, task: int) -> list[int]:
        mine, found, had = self.changes.get(client, ()), [], False
        for number, tasks in mine:
            if task in tasks and not had:
                found.append(number)
            had = task in tasks
        return found


def read_trace(path: Path, clients: int, rounds: int, names: Sequence[str]) -> Trace:
    """Reads and checks a trace; `rounds`: of the whole run.

    Raises:
        BadInput: file, record, rule and what came; a round in which no client is present.
    """
    changes: dict[int, dict[int, tuple[int, ...]]] = {}
    for number, record in enumerate(_records(path), 1):
        where = f"{path}: record {number}"
        client, first, tasks = _change(record, where, clients, rounds, names)
        mine = changes.setdefault(client, {})
        if first in mine:
            raise BadInput(f"{where}: client {client} must have one record for round {first}, got a second one")
        mine[first] = tasks
    told = {client: sorted(mine.items()) for client, mine in changes.items()}
    _check_present(path, told, rounds)
    return Trace(told)


class Traced:
    """A timeline that a file tells. A task that recurs for a client brings the same rows, or fresh ones, each time."""

    def __init__(self, trace: Trace, shares: Sequence[Shares], rounds: int, fresh: bool, seed: int) -> None:
        self.trace, self.shares, self.rounds, self.fresh, self.seed = trace, shares, rounds, fresh, seed

    def tasks(self, client: int, stage: int, round_: int) -> tuple[int, ...]:
        return self.trace.at(client, (stage - 1) * self.rounds + round_)

    def rows(self, task: int, client: int, stage: int, round_: int) -> Indices:
        number, rows = (stage - 1) * self.rounds + round_, self.shares[task][client]
        if task not in self.trace.at(client, number):
            return rows[:0]
        if not self.fresh:
            return rows
        spells = self.trace.spells(client, task)
        return fresh_part(rows, spells, self.trace.spell(client, task, number), self.seed, task, client)

    def epoch(self, stage: int, round_: int) -> Hashable:
        return stage, round_  # what changes in between is not looked for


def fresh_part(rows: Indices, parts: int, place: int, seed: int, task: int, client: int) -> Indices:
    """One of `parts` seeded parts of the client's rows, ascending; together they are all of them, sizes within one."""
    if parts == 1:
        return rows
    order = generator(seed, "arrival", "fresh", task, client).permutation(len(rows))
    return np.sort(rows[np.array_split(order, parts)[place]])


def _check_present(path: Path, changes: Mapping[int, Sequence[tuple[int, tuple[int, ...]]]], rounds: int) -> None:
    absent = np.ones(rounds, dtype=np.bool_)
    for mine in changes.values():
        for (first, tasks), (end, _) in pairwise([*mine, (rounds + 1, ())]):
            if tasks:
                absent[first - 1 : end - 1] = False
    if absent.any():
        number = int(np.flatnonzero(absent)[0]) + 1
        raise BadInput(f"{path}: some client must be present in every round, none is in round {number}")


def _change(
    record: Any, where: str, clients: int, rounds: int, names: Sequence[str]
) -> tuple[int, int, tuple[int, ...]]:
    if not isinstance(record, dict) or set(record) != set(KEYS):
        raise BadInput(f"{where}: must be a mapping with client, round and tasks, got {_came(record)}")
    client = _whole(record["client"], 0, clients - 1, f"{where}: client")
    first = _whole(record["round"], 1, rounds, f"{where}: round")
    told = [] if record["tasks"] is None else record["tasks"]
    if not isinstance(told, list) or not all(isinstance(name, str) for name in told):
        raise BadInput(f"{where}: tasks must be a list of task names, got {brief(told)}")
    for name in told:
        if name not in names:
            raise unknown(f"{where}: tasks", clean(name, f"{where}: tasks"), names)
    return client, first, tuple(sorted({names.index(name) for name in told}))


def _whole(value: Any, least: int, most: int, where: str) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or not least <= value <= most:
        raise BadInput(f"{where} must be a whole number between {least} and {most}, got {brief(value)}")
    return value


def _records(path: Path) -> Iterator[Any]:
    return _csv(path) if path.suffix.lower() == ".csv" else read_records(path)


def _csv(path: Path) -> Iterator[dict[str, Any]]:
    """Columns client, round, tasks; several tasks are joined by `+`."""
    try:
        reader = csv.DictReader(io.StringIO(path.read_text(encoding="utf-8-sig"), newline=""), strict=True)
        rows, columns = list(reader), list(reader.fieldnames or ())
    except (OSError, ValueError, csv.Error) as error:
        raise BadInput(f"{path}: not a readable CSV file: {error}") from error
    if sorted(columns) != sorted(KEYS):
        raise BadInput(f"{path}: must have the columns {', '.join(KEYS)}, got {brief(','.join(columns))}")
    for number, row in enumerate(rows, 1):
        if None in row or None in row.values():
            came = "fewer" if None in row.values() else "more"
            raise BadInput(f"{path}: record {number}: must have {len(KEYS)} cells, got {came}")
        names = row["tasks"].strip()
        told = [name.strip() for name in names.split("+")] if names else []
        yield {"client": _number(row["client"]), "round": _number(row["round"]), "tasks": told}


def _number(text: Any) -> Any:
    """A whole number where the cell holds one."""
    good = isinstance(text, str) and text.strip().isdecimal() and len(text.strip()) <= MOST_DIGITS
    return int(text) if good else text


def _came(record: Any) -> str:
    return f"the keys {brief(', '.join(map(str, record)))}" if isinstance(record, dict) else brief(record)
