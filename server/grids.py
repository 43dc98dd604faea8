"""Grids of our own: Flower's `Grid` is the only door between server and clients.

`InProcessGrid` serves every message in this process (tests, debuggers); `RayGrid` in `raygrid.py` is the simulation's
default. Both call the same ClientApp, named by reference, and both keep what a simulated client keeps in its Context.
"""

import importlib
from abc import abstractmethod
from collections.abc import Iterable, Sequence
from typing import Any

from flwr.app import Context, Error, Message, RecordDict
from flwr.app.user_config import UserConfig
from flwr.serverapp import Grid

from fedstrata.core import records
from fedstrata.core.errors import BadInput
from fedstrata.server.flower_private import Run, become_server, set_message_id

CLIENT_APP = "fedstrata.client.app:app"
FIRST_NODE = 2  # 1 is the SuperLink's own id


class LocalGrid(Grid):
    """What our grids share: nodes and contexts of the simulated clients, message ids, push and pull."""

    def __init__(self, clients: int) -> None:
        self._run = become_server()
        self._sent = 0
        self._replies: dict[str, Message] = {}
        self._nodes = range(FIRST_NODE, FIRST_NODE + clients)
        self._states: dict[int, RecordDict] = {}  # of the clients that keep something

    @property
    def roster(self) -> dict[int, int]:
        """partition id → node id."""
        return dict(enumerate(self._nodes))

    def state(self, node: int) -> RecordDict | None:
        """What a client keeps; None when it is nothing. Raises KeyError for a node that is not there."""
        if node not in self._nodes:
            raise KeyError(node)
        return self._states.get(node)

    def remember(self, node: int, state: RecordDict | None) -> None:
        """What a client keeps from now on."""
        if state is None:
            self._states.pop(node, None)
        else:
            self._states[node] = state

    def set_run(self, run: Run) -> None:
        self._run = run

    @property
    def run(self) -> Run:
        return self._run

    def create_message(
        self, content: RecordDict, message_type: str, dst_node_id: int, group_id: str, ttl: float | None = None
    ) -> Message:
        return Message(content, dst_node_id, message_type, ttl=ttl, group_id=group_id)

    def get_node_ids(self) -> Iterable[int]:
        return list(self._nodes)

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        """Serves the messages at once; `pull_messages` hands out the replies."""
        replies = list(self.send_and_receive(messages))
        self._replies.update({reply.metadata.reply_to_message_id: reply for reply in replies})
        return [reply.metadata.reply_to_message_id for reply in replies]

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        return [self._replies.pop(name) for name in message_ids if name in self._replies]

    def _number(self, messages: Iterable[Message]) -> list[Message]:
        """Gives every message an id of its own."""
        numbered = list(messages)
        for message in numbered:
            self._sent += 1
            set_message_id(message.metadata, str(self._sent))
        return numbered

    @abstractmethod
    def close(self) -> None:
        """Ends what the grid started."""


class InProcessGrid(LocalGrid):
    """Serves every message in this process, in order, cohort by cohort."""

    def __init__(self, clients: int, cohort_size: int, client_app: str = CLIENT_APP) -> None:
        super().__init__(clients)
        self.cohort_size = cohort_size
        self._app = load_app(client_app)

    def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None = None) -> Iterable[Message]:
        replies: list[Message] = []
        for unit in units(self._number(messages), self.cohort_size):
            contexts = [self._context(message.metadata.dst_node_id) for message in unit]
            replies += answer(self._app, unit, contexts)
            for context in contexts:
                self.remember(context.node_id, context.state if len(context.state) else None)
        return replies

    def _context(self, node: int) -> Context:
        return client_context(node, len(self._nodes), self.state(node))

    def close(self) -> None:
        """Nothing was started."""


def units(messages: Sequence[Message], cohort_size: int) -> list[list[Message]]:
    """Cuts messages into what one call serves: train messages in cohorts, in the order given; others alone.

    Who shares a cohort depends on the order of the messages and the cohort size, never on the number of actors.
    """
    found: list[list[Message]] = []
    for message in messages:
        train = message.metadata.message_type == records.TRAIN
        last = found[-1] if found else []
        if train and last and len(last) < cohort_size and last[0].metadata.message_type == records.TRAIN:
            last.append(message)
        else:
            found.append([message])
    return found


def client_context(node: int, clients: int, state: RecordDict | None) -> Context:
    """What a simulated client has of its own, as Flower hands it to a ClientApp."""
    told: UserConfig = {"partition-id": node - FIRST_NODE, "num-partitions": clients}
    return Context(1, node, told, RecordDict() if state is None else state, {})


def load_app(reference: str) -> Any:
    """The ClientApp behind `package.module:attribute`."""
    module, _, attribute = reference.partition(":")
    return getattr(importlib.import_module(module), attribute)


def answer(app: Any, messages: Sequence[Message], contexts: Sequence[Context]) -> list[Message]:
    """Serves one unit; an exception becomes an error reply for each of its messages, as in Flower.

    Bad input is the user's to mend and would fail every client alike, so it ends the run instead.
    """
    try:
        if hasattr(app, "serve"):
            return list(app.serve(messages, contexts))
        return [app(message, context) for message, context in zip(messages, contexts, strict=True)]
    except BadInput:
        raise
    except Exception as error:
        reason = f"{type(error).__name__}: {error}"
        return [Message(Error(2, reason), reply_to=message) for message in messages]
