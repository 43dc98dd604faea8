"""Grids around another grid, which they pass everything on to but what they are there for."""

from collections.abc import Iterable, Sequence

from flwr.app import Message, RecordDict
from flwr.serverapp import Grid

from fedstrata.server.flower_private import Run


class PassingGrid(Grid):
    """Passes everything on."""

    def __init__(self, inner: Grid) -> None:
        self._inner = inner

    def set_run(self, run: Run) -> None:
        self._inner.set_run(run)

    @property
    def run(self) -> Run:
        return self._inner.run

    def create_message(
        self, content: RecordDict, message_type: str, dst_node_id: int, group_id: str, ttl: float | None = None
    ) -> Message:
        return self._inner.create_message(content, message_type, dst_node_id, group_id, ttl)

    def get_node_ids(self) -> Iterable[int]:
        return self._inner.get_node_ids()

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        return self._inner.push_messages(messages)

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        return self._inner.pull_messages(message_ids)

    def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None = None) -> Iterable[Message]:
        return self._inner.send_and_receive(messages, timeout=timeout)


class ParticipantsGrid(PassingGrid):
    """A grid as a Flower strategy sees it while it configures a round: only this round's participants are there."""

    def __init__(self, inner: Grid, nodes: Sequence[int]) -> None:
        super().__init__(inner)
        self._nodes = list(nodes)

    def get_node_ids(self) -> Iterable[int]:
        return self._nodes
