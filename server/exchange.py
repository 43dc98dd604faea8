"""One gated exchange with the participants of a round, and the bytes it cost."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

from flwr.app import Message, RecordDict
from flwr.serverapp import Grid

from fedstrata.core import records
from fedstrata.core.errors import FedstrataError
from fedstrata.core.records import Assignment
from fedstrata.server.gate import Expected, Rejected, pass_replies

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
    """Raw tensor bytes of the exchanges of one round."""

    up: int = 0
    down: int = 0
    rejected: list[Rejected] = field(default_factory=list)


def exchange(
    grid: Grid,
    seats: Sequence[Seat],
    messages: Sequence[Message],
    size: int,
    read: Callable[[Message, Expected], T],
    ledger: Ledger,
    timeout: float,
) -> list[tuple[Message, T]]:
    """Addresses the messages, sends them and gates the replies; good ones come back in the order of partitions."""
    at = {seat.node: seat for seat in seats}
    sent = [records.address(message, at[message.metadata.dst_node_id].assignment) for message in messages]
    expected = {node: Expected(seat.assignment.binding, size, seat.samples) for node, seat in at.items()}
    replies = list(grid.send_and_receive(sent, timeout=timeout))
    ledger.down += records.tensor_bytes(sent)
    ledger.up += records.tensor_bytes(replies)
    good, bad = pass_replies(sent, replies, expected, read)
    ledger.rejected += bad
    return good


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
    found = [(records.read_description(reply).partition, reply.metadata.src_node_id) for reply in replies]
    if sorted(partition for partition, _ in found) != list(range(len(found))):
        came = sorted(partition for partition, _ in found)
        raise FedstrataError(f"partition-id: the {len(found)} clients must hold 0 … {len(found) - 1}, got {came}")
    return dict(found)


def describe(grid: Grid, node: int, config: str, run: str) -> records.Description:
    """What one client says of the base model. Raises FedstrataError with the client's reason when it cannot."""
    replies = _describe(grid, [node], config, run)
    return records.read_description(replies[0])


def _describe(grid: Grid, nodes: Sequence[int], config: str, run: str) -> list[Message]:
    empty = Assignment(records.Binding(run), config=config)
    sent = [records.address(Message(RecordDict(), node, records.DESCRIBE), empty) for node in nodes]
    replies: list[Any] = list(grid.send_and_receive(sent))
    for reply in replies:
        if reply.has_error():
            raise FedstrataError(f"a client cannot describe its base model: {reply.error.reason}")
    return replies
