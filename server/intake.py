"""The replies of one exchange as they come in: each is gated, kept and let go of before the next one is looked at."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

from flwr.app import Message, RecordDict
from flwr.serverapp import Grid

from fedstrata.core import records
from fedstrata.core.packing import owned
from fedstrata.server.checks import Kind
from fedstrata.server.gate import Expected, Rejected, first, pass_replies, strays
from fedstrata.server.grids import LocalGrid
from fedstrata.server.replies import Good, Load, Recalled, Replies, let_go

T = TypeVar("T")


@dataclass(frozen=True)
class Passed(Generic[T]):
    """A good reply: what was read of it, and how to have the whole of it back."""

    partition: int
    value: T
    load: Load


class Intake(Generic[T]):
    """What came of one exchange so far. It holds no arrays, unless there is no folder to keep replies in."""

    def __init__(
        self,
        expected: Mapping[int, Expected],
        read: Callable[[Message, Expected], T],
        kept: Replies,
        grid: Grid,
    ) -> None:
        """expected: node → what its answer must look like; grid: the one that was asked, which may know memories."""
        self._expected, self._read, self._kept = expected, read, kept
        self._grid = grid if isinstance(grid, LocalGrid) else None
        self._passed: list[Passed[T]] = []
        self._rejected: dict[int, Rejected] = {}  # by the request's identity
        self._came: list[Message] = []
        self.bytes = 0

    def take(self, asked: Sequence[Message], came: Sequence[Message]) -> None:
        """One unit, or all that an exchange brought; what was taken before is passed over."""
        known = {id(reply) for reply in self._came}
        new = [reply for reply in came if id(reply) not in known]
        done = {reply.metadata.reply_to_message_id for reply in self._came}
        answers = set(first(new)) - done
        waiting = [request for request in asked if request.metadata.message_id in answers]
        judged = self._judge(waiting, new)
        good = [Good(request, reply, self._memory(request)) for request, reply, _ in judged]
        for (request, _, value), load in zip(judged, self._kept.keep(good), strict=True):
            self._passed.append(Passed(self._partition(request), value, load))
        for reply in new:
            let_go(reply)

    def recall(self, request: Message, kept: Recalled) -> None:
        """A reply that an earlier process kept; its client remembers what it did then."""
        for _, _, value in self._judge([request], [kept.reply]):
            self._passed.append(Passed(self._partition(request), value, kept.load))
            if self._grid:
                self._grid.remember(request.metadata.dst_node_id, _own(kept.memory) if len(kept.memory) else None)
        let_go(kept.reply)

    def passed(self) -> list[Passed[T]]:
        """Good replies in the order of their partitions, whatever order they came in."""
        return sorted(self._passed, key=lambda passed: passed.partition)

    def rejected(self, sent: Sequence[Message]) -> list[Rejected]:
        """Why the others may not enter; who was sent something and did not answer is late."""
        good = {passed.partition for passed in self._passed}
        silent = [m for m in sent if id(m) not in self._rejected and self._partition(m) not in good]
        late = dict(zip(map(id, silent), pass_replies(silent, [], self._expected, self._read)[1], strict=True))
        found = {**self._rejected, **late}
        return [found[id(request)] for request in sent if id(request) in found]

    def strays(self, sent: Sequence[Message]) -> list[Kind]:
        """What came without being asked for."""
        return strays(sent, self._came)

    def _judge(self, waiting: Sequence[Message], new: Sequence[Message]) -> list[tuple[Message, Message, T]]:
        """The good ones of what came, with what they answer; the others are written down."""
        self._came += new
        self.bytes += records.tensor_bytes(new)
        answers, judged = first(new), []
        for request in waiting:
            good, bad = pass_replies([request], [answers[request.metadata.message_id]], self._expected, self._read)
            judged += [(request, reply, value) for reply, value in good]
            self._rejected |= {id(request): rejected for rejected in bad}
        return judged

    def _memory(self, request: Message) -> RecordDict | None:
        return self._grid.state(request.metadata.dst_node_id) if self._grid else None

    def _partition(self, request: Message) -> int:
        return self._expected[request.metadata.dst_node_id].binding.partition


def _own(memory: RecordDict) -> RecordDict:
    """A client's memory outlives the file that it was kept in."""
    arrays = {name: owned(record) for name, record in memory.array_records.items()}
    return RecordDict({**{name: memory[name] for name in memory}, **arrays})
