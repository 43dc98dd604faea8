"""Flower's grid with every reply's signature checked before anything else looks at it.

A reply that its client's own key did not sign for this very question becomes an error reply, and so costs that client
the round like any other bad one.
"""

import time
from collections.abc import Iterable, Mapping

from cryptography.hazmat.primitives.asymmetric.ec import EllipticCurvePublicKey
from flwr.app import Error, Message
from flwr.serverapp import Grid

from fedstrata.core import records, signing
from fedstrata.server.exchange import PAUSE
from fedstrata.server.flower_private import as_error
from fedstrata.server.passing import PassingGrid


class SignedGrid(PassingGrid):
    """The grid of a deployment whose clients' keys are known."""

    def __init__(self, inner: Grid, keys: Mapping[int, EllipticCurvePublicKey]) -> None:
        """keys: partition → public key."""
        super().__init__(inner)
        self._keys = keys
        self._asked: dict[str, int] = {}  # id of a message → the partition that it went to; -1: its answer says it

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        sent = list(messages)
        names = list(self._inner.push_messages(sent))
        for message, name in zip(sent, names, strict=True):
            if name:
                self._asked[name] = records.binding(message).partition
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
        """The reply, or an error in its place. Errors come unsigned: the SuperLink makes them for nodes that died."""
        request = reply.metadata.reply_to_message_id
        if reply.has_error():
            return reply
        partition = self._asked.get(request, -2)
        if partition == -1:  # a node that is not known yet says which client it is, and its key proves it
            partition = _claimed(reply)
        if partition >= 0 and self._signed(reply, partition):
            del reply.content[signing.SIGNATURE]
            return reply
        who = f"client {partition}" if partition in self._keys else f"client {partition}, of whom no key is known,"
        return as_error(reply, Error(records.FORGED, f"signature: {who} did not sign this answer to this message"))

    def _signed(self, reply: Message, partition: int) -> bool:
        try:
            return signing.holds(reply, partition, self._keys)
        except Exception:  # a stranger's content may fail in any way: whatever cannot be checked is forged
            return False


def _claimed(reply: Message) -> int:
    """The partition that a description names; -2, which is no client's, where it names none."""
    try:
        partition = records.read_description(reply).partition
    except Exception:  # a stranger's words may fail in any way
        return -2
    return partition if type(partition) is int else -2
