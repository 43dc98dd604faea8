"""Clients with folders of their own, each behind its own trainer, in this process: a deployment without wires."""

from collections.abc import Callable, Iterable
from pathlib import Path

import pytest
from flwr.app import Context, Message, RecordDict
from flwr.common.serde import message_from_proto, message_to_proto
from flwr.proto.message_pb2 import Message as Proto
from flwr.serverapp import Grid

from fedstrata.client.trainer import Trainer
from fedstrata.core import signing
from fedstrata.server import deploykeys
from fedstrata.server.flower_private import NodeInfo, Run, become_server, key_bytes, set_message_id

FIRST = 1000  # node of partition 0


class Folders(Grid):
    """A grid over trainers; messages go through Flower's own serialisation, both ways."""

    def __init__(self, split: Path, clients: int, homes: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.split, self.monkeypatch, self._run, self._sent = split, monkeypatch, become_server(), 0
        self.there = set(range(clients))
        deploykeys.make(homes / "keys", clients)
        self.public = homes / "keys" / "server" / "nodes"
        self.trainers: dict[int, Trainer] = {}
        for client in range(clients):
            home = homes / f"home-{client}"
            home.mkdir(parents=True, exist_ok=True)
            key = signing.private_key(homes / "keys" / f"client-{client}" / "node.key")
            self.trainers[client] = Trainer(home, key)
        self.keys = {FIRST + client: key_bytes(key) for client, key in signing.public_keys(self.public).items()}
        self.uploads: list[bytes] = []
        self.asked: list[tuple[int, str]] = []
        self.before: Callable[[Message], None] = lambda message: None
        self._replies: dict[str, Message] = {}

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
        return [FIRST + client for client in sorted(self.there)]

    def get_nodes(self) -> Iterable[NodeInfo]:
        return [NodeInfo(node_id=node, public_key=self.keys[node]) for node in self.get_node_ids()]

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        names = []
        for message in messages:
            self._sent += 1
            set_message_id(message.metadata, f"message-{self._sent}")
            self.before(message)
            names.append(message.metadata.message_id)
            client = message.metadata.dst_node_id - FIRST
            if client in self.there:
                self._replies[names[-1]] = self.serve(client, message)
        return names

    def serve(self, client: int, message: Message) -> Message:
        """What the client's own trainer says."""
        self.monkeypatch.setenv("FEDSTRATA_DATA", str(self.split / f"client-{client}"))
        context = Context(1, FIRST + client, {"partition-id": client}, RecordDict(), {})
        self.asked.append((client, message.metadata.message_type))
        came = message_from_proto(Proto.FromString(message_to_proto(message).SerializeToString()))
        data = message_to_proto(self.trainers[client].answer(came, context)).SerializeToString()
        self.monkeypatch.delenv("FEDSTRATA_DATA")
        self.uploads.append(data)
        return message_from_proto(Proto.FromString(data))

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        return [self._replies.pop(name) for name in list(message_ids) if name in self._replies]

    def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None = None) -> Iterable[Message]:
        return self.pull_messages(self.push_messages(messages))
