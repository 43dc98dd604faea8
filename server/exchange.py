"""One gated exchange with the participants of a round, and the bytes it cost."""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar

from flwr.app import ArrayRecord, Message, RecordDict
from flwr.serverapp import Grid

from fedstrata.core import records
from fedstrata.core.errors import FedstrataError
from fedstrata.core.records import Assignment
from fedstrata.server.arrivals import Arrived, ArrivingRayGrid
from fedstrata.server.checks import Kind, Refused
from fedstrata.server.gate import Expected, Rejected, pass_replies, strays
from fedstrata.server.grids import InProcessGrid, units
from fedstrata.server.replies import Replies, whole_units
from fedstrata.server.scoregate import read_description

T = TypeVar("T")


@dataclass(frozen=True)
class Seat:
    """One participant of a round: which node it is, what it works on and how many examples that is."""

    node: int
    assignment: Assignment
    samples: int

    @property
    def partition(self) -> int:
        return self.assignment.binding.partition


@dataclass
class Ledger:
    """Raw tensor bytes of the exchanges of one round, and what came of them."""

    up: int = 0
    down: int = 0
    rejected: list[Rejected] = field(default_factory=list)
    strays: list[Kind] = field(default_factory=list)
    accepted: set[int] = field(default_factory=set)  # partitions whose update may be used
    norms: dict[int, float] = field(default_factory=dict)  # partition → norm of its accepted update


@dataclass(frozen=True)
class Question(Generic[T]):
    """What is asked in one exchange: how a good reply is read, and how large it may be.

    Attributes:
        size: the length of the reply's array.
        limits: partition → the largest norm of an update; one that is missing has no limit.
    """

    read: Callable[[Message, Expected], T]
    size: int
    limits: Mapping[int, float] = field(default_factory=dict)

    def expected(self, seat: Seat, message: Message) -> Expected:
        """What the answer of one seat must look like."""
        at = seat.assignment.binding
        arrays = message.content.array_records.get(records.ARRAYS, ArrayRecord())
        start = arrays[records.FLAT].numpy() if records.FLAT in arrays else None
        return Expected(at, self.size, seat.samples, start, self.limits.get(at.partition, float("inf")))


class Exchange:
    """Asks and gates; good replies are kept while the round is under way, and a kept one is not asked for again."""

    def __init__(self, grid: Grid, timeout: float, kept: Replies) -> None:
        self.grid, self.timeout, self.kept = grid, timeout, kept

    def ask(
        self, question: Question[T], seats: Sequence[Seat], messages: Sequence[Message], ledger: Ledger
    ) -> list[tuple[Message, T]]:
        """Addresses the messages, sends them and gates the replies; good ones come back in the order of partitions."""
        at = {seat.node: seat for seat in seats}
        sent = [records.address(message, at[message.metadata.dst_node_id].assignment) for message in messages]
        expected = {m.metadata.dst_node_id: question.expected(at[m.metadata.dst_node_id], m) for m in sent}

        def keep(asked: Sequence[Message], came: Sequence[Message]) -> None:
            good, _ = pass_replies(asked, came, expected, question.read)
            for request, reply in _pairs(asked, [reply for reply, _ in good]):
                self.kept.keep(request, reply)

        replies = self._collect(sent, keep)
        ledger.down += records.tensor_bytes(sent)
        ledger.up += records.tensor_bytes(replies)
        good, bad = pass_replies(sent, replies, expected, question.read)
        ledger.rejected += bad
        ledger.strays += strays(sent, replies)
        return good

    def _collect(self, sent: Sequence[Message], keep: Arrived) -> list[Message]:
        """Kept replies and those that are asked for; `keep` is called for every unit that comes in."""
        cohorts = units(sent, getattr(self.grid, "cohort_size", 1))
        found = {id(request): reply for request in sent if (reply := self.kept.have(request)) is not None}
        missing = whole_units(cohorts, set(found))
        again = {id(request) for unit in missing for request in unit}
        replies = [reply for name, reply in found.items() if name not in again]
        deadline = time.monotonic() + self.timeout
        for asked in _batches(self.grid, missing):
            replies += _send(self.grid, asked, max(0.0, deadline - time.monotonic()), keep)
        return replies


def _send(grid: Grid, asked: Sequence[Message], timeout: float, keep: Arrived) -> list[Message]:
    """A grid that can tell of every unit does so; of another one's replies all are kept at the end."""
    if not isinstance(grid, ArrivingRayGrid):
        came = list(grid.send_and_receive(asked, timeout=timeout))
        keep(asked, came)
        return came
    grid.arrived = keep
    try:
        return list(grid.send_and_receive(asked, timeout=timeout))
    finally:
        grid.arrived = None


def _batches(grid: Grid, missing: Sequence[Sequence[Message]]) -> list[list[Message]]:
    """A grid that serves one unit after the other is handed them so: what is done is kept if the next one fails."""
    if isinstance(grid, InProcessGrid):
        return [list(unit) for unit in missing]
    return [[message for unit in missing for message in unit]] if missing else []


def _pairs(sent: Sequence[Message], good: Sequence[Message]) -> list[tuple[Message, Message]]:
    by_name = {request.metadata.message_id: request for request in sent}
    return [(by_name[reply.metadata.reply_to_message_id], reply) for reply in good]


def questions(seats: Sequence[Seat], kind: str) -> list[Message]:
    """Messages without payload, one per seat."""
    return [Message(RecordDict(), seat.node, kind) for seat in seats]


def find_roster(grid: Grid, config: str, run: str) -> Mapping[int, int]:
    """partition id → node id; a grid that is not ours is asked node by node.

    Raises:
        FedstrataError: a client cannot describe its base model, or the partitions are not 0 … clients - 1, one each.
    """
    if hasattr(grid, "roster"):
        return dict(grid.roster)
    replies = _describe(grid, list(grid.get_node_ids()), config, run)
    found = [(says.partition, node) for node, says in replies]
    if sorted(partition for partition, _ in found) != list(range(len(found))):
        came = sorted(partition for partition, _ in found)
        raise FedstrataError(f"partition-id: the {len(found)} clients must hold 0 … {len(found) - 1}, got {came}")
    return dict(found)


def describe(grid: Grid, node: int, config: str, run: str) -> records.Description:
    """What one client says of the base model. Raises FedstrataError with the client's reason when it cannot."""
    return _describe(grid, [node], config, run)[0][1]


def _describe(grid: Grid, nodes: Sequence[int], config: str, run: str) -> list[tuple[int, records.Description]]:
    empty = Assignment(records.Binding(run), config=config)
    sent = [records.address(Message(RecordDict(), node, records.DESCRIBE), empty) for node in nodes]
    replies: dict[str, Any] = {r.metadata.reply_to_message_id: r for r in grid.send_and_receive(sent)}
    said = []
    for request in sent:
        try:
            if request.metadata.message_id not in replies:
                raise Refused(Kind.LATE, "no reply")
            said.append((request.metadata.dst_node_id, read_description(replies[request.metadata.message_id])))
        except Refused as error:
            raise FedstrataError(f"a client cannot describe its base model: {error}") from error
    return said
