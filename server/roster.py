"""Who is there: which node serves which partition, kept up to date where nodes come and go.

A grid of our own has all clients at all times. On Flower's, nodes are asked to describe themselves when they appear;
one that is gone has no seat until it is back.
"""

import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace

from flwr.serverapp import Grid

from fedstrata.core.errors import FedstrataError
from fedstrata.core.records import Description, Holding
from fedstrata.scenarios.held import HeldScenario, check_holding
from fedstrata.scenarios.stream import Scenario
from fedstrata.server.checks import Kind, Refused
from fedstrata.server.exchange import PAUSE, describe, describe_all

MOST = 600.0  # seconds that a node may take to describe itself: its base is loaded for the first time then
PATIENCE = 64  # looks at most between two questions to a node that does not answer
SAME = ("layout", "base_hash", "encoder", "dim", "tau", "epsilon", "words", "words_tau")  # of all clients' descriptions


@dataclass(frozen=True)
class Change:
    """Who came and who left since the last look; `refused`: node → why it may not take part."""

    joined: tuple[int, ...] = ()
    left: tuple[int, ...] = ()
    refused: tuple[tuple[int, str], ...] = ()


class Roster(Mapping[int, int]):
    """partition → node of the clients that are there."""

    def __init__(self, grid: Grid, scenario: Scenario, config: str, run: str, timeout: float, most: int) -> None:
        """config: as it travels; run: its lineage; timeout: seconds to wait for anybody; most: federation.max_samples.

        Raises:
            FedstrataError: nobody is there, or none of them can take part; says why.
        """
        self._grid, self._scenario, self._config, self._run, self._timeout = grid, scenario, config, run, timeout
        self._most = most
        self._nodes: dict[int, int] = dict(getattr(grid, "roster", {}))
        self._fixed = bool(self._nodes)
        self._wrong: dict[int, str] = {}  # nodes that may not take part and are still there
        self._late: dict[int, tuple[int, int]] = {}  # node that did not answer → looks to leave it alone: left, in all
        self._first: Description | None = None
        if self._fixed:
            self._first = describe(grid, next(iter(self._nodes.values())), config, run)
            return
        refused = self._update().refused
        if self._first is None:
            why = "; ".join(reason for _, reason in refused) or "none is connected"
            raise FedstrataError(f"no client can take part: {why}")

    @property
    def description(self) -> Description:
        """What the first client said; all others have the same base."""
        assert self._first is not None
        return self._first

    def look(self, anew: bool = False) -> Change:
        """Brings the roster up to date; with nobody there it waits for somebody, since rounds would be for nothing.

        anew: asks those that are known, too, since their data may have changed.

        Raises:
            FedstrataError: nobody came within the timeout.
        """
        before, change = set(self._nodes), self._update(anew)
        deadline = time.monotonic() + self._timeout
        while not self._nodes:
            if time.monotonic() > deadline:
                raise FedstrataError(f"federation.timeout: no client was there for {self._timeout:g} s")
            time.sleep(PAUSE)
            change = self._update()
        now = set(self._nodes)
        return replace(change, joined=tuple(sorted(now - before)), left=tuple(sorted(before - now)))

    def _update(self, anew: bool = False) -> Change:
        """One look; of the change, who was refused."""
        if self._fixed:
            return Change()
        anew = anew and isinstance(self._scenario, HeldScenario)
        there, before = set(self._grid.get_node_ids()), self._nodes
        self._nodes = {client: node for client, node in before.items() if node in there and not anew}
        self._wrong = {node: why for node, why in self._wrong.items() if node in there}
        self._late = {node: (left - 1, looks) for node, (left, looks) in self._late.items() if node in there}
        resting = {node for node, (left, _) in self._late.items() if left >= 0}
        refused = self._ask(sorted(there - {*self._nodes.values(), *self._wrong, *resting}))
        for client in before.keys() - self._nodes.keys():
            if isinstance(self._scenario, HeldScenario):
                self._scenario.told.tell(client, None)
        return Change(refused=refused)

    def _ask(self, nodes: list[int]) -> tuple[tuple[int, str], ...]:
        """Takes in those that describe themselves well; of the others, why not.

        Who failed is asked again next time; who did not answer in time, after 1, 2, 4, … looks without a question:
        everybody waits for it each time.
        """
        refused = []
        for node, said in describe_all(self._grid, nodes, self._config, self._run, min(self._timeout, MOST)):
            _, looks = self._late.pop(node, (0, 0))
            if isinstance(said, Refused) and said.kind == Kind.LATE:
                looks = min(2 * looks or 1, PATIENCE)
                self._late[node] = (looks, looks)
            try:
                self._take(node, said)
            except (ValueError, TypeError, KeyError) as error:
                refused.append((node, str(error)))
                if not isinstance(error, Refused):
                    self._wrong[node] = str(error)
        return tuple(refused)

    def _take(self, node: int, said: Description | Refused) -> None:
        """Raises ValueError (`Refused` is one), TypeError or KeyError for a client that may not take part."""
        if isinstance(said, Refused):
            raise said
        clients, first = self._scenario.client_count, self._first or said
        if not 0 <= said.partition < clients or said.partition in self._nodes:
            free = sorted(set(range(clients)) - self._nodes.keys())
            raise ValueError(f"partition-id: must be one of {free}, got {said.partition}")
        for name in SAME:
            ours, its = getattr(first, name), getattr(said, name)
            if its != ours:
                raise ValueError(f"client {said.partition}: {name} must be {ours}, as the first client's, got {its}")
        if isinstance(self._scenario, HeldScenario):
            holding = Holding.from_json(said.holding)
            try:
                check_holding(holding, len(self._scenario.tasks), self._most)
            except ValueError as error:
                raise ValueError(f"client {said.partition}: {error}") from error
            self._scenario.told.tell(said.partition, holding)
        self._first, self._nodes[said.partition] = first, node

    def __getitem__(self, partition: int) -> int:
        return self._nodes[partition]

    def __iter__(self) -> Iterator[int]:
        return iter(sorted(self._nodes))

    def __len__(self) -> int:
        return len(self._nodes)
