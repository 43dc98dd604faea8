"""Flower's grid with every reply's signature checked before anything else looks at it.

A reply that its client's own key did not sign for this very question becomes an error reply, and so costs that client
the round like any other bad one. What nobody signed says nothing of the client: Flower makes such errors for nodes that
died or could not start an app, and anybody may make them; the client that was asked did not answer.
"""

import time
from collections.abc import Iterable, Mapping
from dataclasses import replace

from cryptography.hazmat.primitives.asymmetric.ec import EllipticCurvePublicKey
from flwr.app import Error, Message
from flwr.serverapp import Grid

from fedstrata.core import records, signing
from fedstrata.core.records import Binding
from fedstrata.server.exchange import PAUSE
from fedstrata.server.flower_private import NodeInfo, as_error, key_bytes
from fedstrata.server.passing import PassingGrid

LONGEST = 200  # characters of a stranger's words in a log
OURS = (records.FORGED, records.SILENT)  # codes that this grid gives and no client


class SignedGrid(PassingGrid):
    """The grid of a deployment whose clients' keys are known: a node is the client with whose key it connected."""

    def __init__(self, inner: Grid, keys: Mapping[int, EllipticCurvePublicKey]) -> None:
        """keys: partition → public key. inner: says of each node with which key it connected."""
        super().__init__(inner)
        self._keys = keys
        self._clients = {key_bytes(key): partition for partition, key in keys.items()}
        self._whose: dict[int, int] = {}  # node → partition; -1: its key is no client's
        self._asked: dict[str, tuple[Binding, Binding]] = {}  # id of a message → what it says, and what its reply must

    def get_node_ids(self) -> Iterable[int]:
        return [node.node_id for node in self.get_nodes()]

    def get_nodes(self) -> Iterable[NodeInfo]:
        nodes = list(self._inner.get_nodes())
        self._whose |= {node.node_id: self._clients.get(node.public_key, -1) for node in nodes}
        return nodes

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        sent = list(messages)
        if any(message.metadata.dst_node_id not in self._whose for message in sent):
            self.get_nodes()
        names = list(self._inner.push_messages(sent))
        for message, name in zip(sent, names, strict=True):
            if name:
                at = records.binding(message)
                whose = self._whose.get(message.metadata.dst_node_id, -1)
                self._asked[name] = (at, replace(at, partition=whose))
        return names

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        return [self._checked(reply) for reply in self._inner.pull_messages(message_ids)]

    def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None = None) -> Iterable[Message]:
        waiting = {name for name in self.push_messages(messages) if name}
        deadline = time.monotonic() + (float("inf") if timeout is None else timeout)
        replies: list[Message] = []
        while waiting and time.monotonic() < deadline:
            came = list(self.pull_messages(waiting))
            replies += came
            waiting -= {reply.metadata.reply_to_message_id for reply in came}
            if waiting:
                time.sleep(PAUSE)
        return replies

    def _checked(self, reply: Message) -> Message:
        """The reply without its signature, or an error in its place."""
        if reply.has_error() and signing.unsigned(reply):
            return as_error(reply, Error(records.SILENT, f"no answer; {_words(reply.error)}"))
        asked, wanted = self._asked.get(reply.metadata.reply_to_message_id, (Binding(), Binding()))
        if wanted.partition == -1:
            return _forged(reply, "the node that was asked has no key that the server knows")
        if not self._signed(reply, wanted):
            return _forged(reply, f"client {wanted.partition} did not sign this answer to this message")
        if asked.partition == -1 and reply.has_content() and _named(reply) != wanted.partition:
            return _forged(reply, f"the node with client {wanted.partition}'s key names another partition-id")
        if reply.has_error() and reply.error.code in OURS:
            return _forged(reply, f"client {wanted.partition} gives an error code that is the server's own")
        return reply

    def _signed(self, reply: Message, at: Binding) -> bool:
        try:
            return signing.verify(reply, at, self._keys)
        except Exception:  # a stranger's content may fail in any way: whatever cannot be checked is forged
            return False


def _forged(reply: Message, why: str) -> Message:
    return as_error(reply, Error(records.FORGED, f"signature: {why}"))


def _words(error: Error) -> str:
    """What an unsigned error says, in quotes: it may be anybody's."""
    said = repr((error.reason or "").strip())
    short = said if len(said) <= LONGEST else f"{said[:LONGEST]}…"
    return (
        f"an error that nobody signed, as Flower makes them for nodes that are gone, says {short} (code {error.code})"
    )


def _named(reply: Message) -> int:
    """The partition that a description names; -2, which is no client's, where it names none."""
    try:
        partition = records.read_description(reply).partition
    except Exception:  # a stranger's words may fail in any way
        return -2
    return partition if type(partition) is int else -2
