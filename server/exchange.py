"""One gated exchange with the participants of a round, and the bytes it cost."""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Generic, TypeVar

from flwr.app import ArrayRecord, Message, RecordDict
from flwr.serverapp import Grid

from fedstrata.core import records
from fedstrata.core.errors import FedstrataError
from fedstrata.core.packing import view
from fedstrata.core.records import Assignment
from fedstrata.server.arrivals import Arrived, ArrivingRayGrid
from fedstrata.server.checks import Kind, Refused
from fedstrata.server.gate import Expected, Rejected
from fedstrata.server.grids import InProcessGrid, LocalGrid, units
from fedstrata.server.intake import Intake, Passed
from fedstrata.server.replies import Replies, whole_units
from fedstrata.server.scoregate import read_description

T = TypeVar("T")
AT_ONCE = 4  # replies fetched from Flower's own grid in one call, and so the most that are held
PAUSE = 1.0  # seconds between two rounds of asking it


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
    told: set[int] = field(default_factory=set)  # partitions that were asked for a token and may have sent one
    few: set[int] = field(default_factory=set)  # partitions with too few instructions for a token


@dataclass(frozen=True)
class Question(Generic[T]):
    """What is asked in one exchange: how a good reply is read, and how large it may be.

    Attributes:
        size: the length of the reply's array.
        limits: partition → the largest norm of an update; one that is missing has no limit.
        extras: name → shape of what a reply holds beside the array.
        upload: how the array travels (`federation.upload`, `strategy.token_upload`).
    """

    read: Callable[[Message, Expected], T]
    size: int
    limits: Mapping[int, float] = field(default_factory=dict)
    extras: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    upload: str = "float32"

    def expected(self, seat: Seat, message: Message) -> Expected:
        """What the answer of one seat must look like."""
        at = seat.assignment.binding
        arrays = message.content.get(records.ARRAYS)
        start = view(arrays[records.FLAT]) if isinstance(arrays, ArrayRecord) and records.FLAT in arrays else None
        limit = self.limits.get(at.partition, float("inf"))
        return Expected(at, self.size, seat.samples, start, limit, self.extras, self.upload)


class Exchange:
    """Asks and gates; good replies are kept while the round is under way, and a kept one is not asked for again."""

    def __init__(self, grid: Grid, timeout: float, kept: Replies) -> None:
        self.grid, self.timeout, self.kept = grid, timeout, kept

    def ask(
        self, question: Question[T], seats: Sequence[Seat], messages: Sequence[Message], ledger: Ledger
    ) -> list[Passed[T]]:
        """Addresses the messages, sends them and gates the replies; good ones come back in the order of partitions."""
        at = {seat.node: seat for seat in seats}
        sent = [records.address(message, at[message.metadata.dst_node_id].assignment) for message in messages]
        expected = {m.metadata.dst_node_id: question.expected(at[m.metadata.dst_node_id], m) for m in sent}
        intake = Intake(expected, question.read, self.kept, self.grid)
        deadline = time.monotonic() + self.timeout
        for asked in _batches(self.grid, self._missing(sent, intake)):
            _send(self.grid, asked, max(0.0, deadline - time.monotonic()), intake.take)
        ledger.down += records.tensor_bytes(sent)
        ledger.up += intake.bytes
        ledger.rejected += intake.rejected(sent)
        ledger.strays += intake.strays(sent)
        return intake.passed()

    def _missing(self, sent: Sequence[Message], intake: Intake[T]) -> list[list[Message]]:
        """The units that are to be asked; of the others the kept replies are taken in."""
        found = {id(request) for request in sent if self.kept.have(request) is not None}
        missing = whole_units(units(sent, getattr(self.grid, "cohort_size", 1)), found)
        again = {id(request) for unit in missing for request in unit}
        for request in sent:
            kept = None if id(request) in again else self.kept.have(request)
            if kept is not None:
                intake.recall(request, kept)
        return missing


def _send(grid: Grid, asked: Sequence[Message], timeout: float, take: Arrived) -> None:
    """Ours tell of every unit when it comes in; of Flower's own, replies are fetched a few at a time."""
    if not isinstance(grid, LocalGrid):
        _fetch(grid, asked, timeout, take)
        return
    if isinstance(grid, ArrivingRayGrid):
        grid.arrived = take
    try:
        take(asked, list(grid.send_and_receive(asked, timeout=timeout)))
    finally:
        if isinstance(grid, ArrivingRayGrid):
            grid.arrived = None


def _fetch(grid: Grid, asked: Sequence[Message], timeout: float, take: Arrived) -> None:
    """What Flower's `send_and_receive` does, without holding all replies at once."""
    waiting = [name for name in grid.push_messages(asked) if name]
    deadline = time.monotonic() + timeout
    while waiting and time.monotonic() < deadline:
        answered: set[str] = set()
        for begin in range(0, len(waiting), AT_ONCE):
            came = list(grid.pull_messages(waiting[begin : begin + AT_ONCE]))
            answered |= {reply.metadata.reply_to_message_id for reply in came}
            take(asked, came)
        waiting = [name for name in waiting if name not in answered]
        if waiting:
            time.sleep(PAUSE)


def _batches(grid: Grid, missing: Sequence[Sequence[Message]]) -> list[list[Message]]:
    """A grid that serves one unit after the other is handed them so: what is done is kept if the next one fails."""
    if isinstance(grid, InProcessGrid):
        return [list(unit) for unit in missing]
    return [[message for unit in missing for message in unit]] if missing else []


def questions(seats: Sequence[Seat], kind: str) -> list[Message]:
    """Messages without payload, one per seat."""
    return [Message(RecordDict(), seat.node, kind) for seat in seats]


def describe(grid: Grid, node: int, config: str, run: str) -> records.Description:
    """What one client says of the base model. Raises FedstrataError with the client's reason when it cannot."""
    ((_, said),) = describe_all(grid, [node], config, run)
    if isinstance(said, Refused):
        raise FedstrataError(f"a client cannot describe its base model: {said}") from said
    return said


def describe_all(
    grid: Grid, nodes: Sequence[int], config: str, run: str, timeout: float | None = None
) -> list[tuple[int, records.Description | Refused]]:
    """Node by node what it says of itself, or why there is nothing."""
    empty = Assignment(records.Binding(run), config=config)
    sent = [records.address(Message(RecordDict(), node, records.DESCRIBE), empty) for node in nodes]
    answers = list(grid.send_and_receive(sent, timeout=timeout)) if sent else []
    replies = {reply.metadata.reply_to_message_id: reply for reply in answers}
    return [(request.metadata.dst_node_id, _said(replies.get(request.metadata.message_id))) for request in sent]


def _said(reply: Message | None) -> records.Description | Refused:
    try:
        if reply is None:
            raise Refused(Kind.LATE, "no reply")
        return read_description(reply)
    except Refused as error:
        return error
