"""What travels between the shim and the trainer beside it: one message and its context, as Flower serialises them.

The line is a Unix socket that only its owner can reach; both ends prove that they know the token beside it. Whatever
either of them answers is signed with the node's own key, also that it failed.
"""

import os
from dataclasses import replace
from multiprocessing.connection import Connection
from pathlib import Path

from cryptography.hazmat.primitives.asymmetric.ec import EllipticCurvePrivateKey
from flwr.app import Context, Error, Message
from flwr.common.serde import context_from_proto, context_to_proto, message_from_proto, message_to_proto
from flwr.proto.message_pb2 import Context as ContextProto
from flwr.proto.message_pb2 import Message as MessageProto

from fedstrata.core import records, signing
from fedstrata.core.errors import BadInput

CERTS, KEY = "FEDSTRATA_CERTS", "node.key"  # the folder of the node's key, and its name there
FAILED = 2  # Flower's code of a ClientApp that raised
TRAINER = "FEDSTRATA_TRAINER"  # the socket's path
LIMIT = "FEDSTRATA_TRAINER_LIMIT"  # seconds that one message may take
LONGEST = 100  # characters of the path; the system takes 107


def address(home: Path) -> Path:
    """Where a node's trainer listens. Raises `BadInput` for a folder whose path is too long for a socket."""
    path = home / "trainer.sock"
    if len(str(path)) > LONGEST:
        raise BadInput(f"FEDSTRATA_HOME: must be a path of at most {LONGEST - 13} characters, got {home}")
    return path


def token_of(socket: Path) -> Path:
    """The file with the token that both ends must know."""
    return socket.with_suffix(".token")


def limit() -> float:
    """Seconds that one message may take."""
    return float(os.environ.get(LIMIT, "3600"))


def send(line: Connection, message: Message, context: Context) -> None:
    line.send_bytes(message_to_proto(message).SerializeToString())
    line.send_bytes(context_to_proto(context).SerializeToString())


def receive(line: Connection) -> tuple[Message, Context]:
    """Raises EOFError or OSError when the other end is gone."""
    message = message_from_proto(MessageProto.FromString(line.recv_bytes()))
    return message, context_from_proto(ContextProto.FromString(line.recv_bytes()))


def node_key() -> EllipticCurvePrivateKey | None:
    """The node's private key; None without one: replies are not signed. Raises `BadInput` for what is no key."""
    certs = os.environ.get(CERTS)
    return signing.private_key(Path(certs) / KEY) if certs else None


def failed(message: Message, reason: str) -> Message:
    """The reply that says so."""
    return Message(Error(FAILED, reason), reply_to=message)


def seal(reply: Message, message: Message, context: Context, key: EllipticCurvePrivateKey | None) -> Message:
    """The reply, signed as this client's to this message."""
    if key:
        own = replace(_binding(message), partition=int(context.node_config.get("partition-id", -1)))
        signing.sign(reply, own, message.metadata.message_id, key)
    return reply


def _binding(message: Message) -> records.Binding:
    """What the message belongs to; one that does not say so belongs to nothing, and is answered all the same."""
    try:
        return records.binding(message)
    except (KeyError, ValueError):
        return records.Binding()
