"""What travels between the shim and the trainer beside it: one message and its context, as Flower serialises them.

The line is a Unix socket that only its owner can reach; both ends prove that they know the token beside it.
"""

import os
from multiprocessing.connection import Connection
from pathlib import Path

from flwr.app import Context, Message
from flwr.common.serde import context_from_proto, context_to_proto, message_from_proto, message_to_proto
from flwr.proto.message_pb2 import Context as ContextProto
from flwr.proto.message_pb2 import Message as MessageProto

from fedstrata.core.errors import BadInput

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
