"""The ClientApp that Flower loads anew for every message: it hands the message to the trainer that stays beside it.

The trainer keeps the base model loaded; nothing heavy is imported here. Where there is no reply of the trainer's, the
shim says so, signed with the node's key as the trainer's replies are. Where the environment names no trainer, as in
`flwr run`'s simulation, the message is served in this process.
"""

import logging
import os
import time
from multiprocessing.connection import Client, Connection
from pathlib import Path

from flwr.app import Context, Message
from flwr.clientapp import ClientApp

from fedstrata.client import line
from fedstrata.core.errors import FedstrataError

PATIENCE = 120.0  # seconds that a trainer may take to start
TRIES = 2  # of a message over which the trainer dies
log = logging.getLogger("fedstrata.shim")


class Shim(ClientApp):
    """Forwards everything."""

    def __call__(self, message: Message, context: Context) -> Message:
        socket = os.environ.get(line.TRAINER)
        if socket:
            return served(Path(socket), message, context)
        from fedstrata.client.app import app as here

        return here(message, context)


app = Shim()


def served(socket: Path, message: Message, context: Context) -> Message:
    """The trainer's reply, or this client's word that there is none and why."""
    try:
        return forward(socket, message, context)
    except Exception as error:  # one that left this process would go back unsigned, as Flower's word
        log.error("%s failed: %s", message.metadata.message_type, error or type(error).__name__)
        reason = str(error) if isinstance(error, FedstrataError) else type(error).__name__
        return line.seal(line.failed(message, reason), message, context, line.node_key())


def forward(socket: Path, message: Message, context: Context) -> Message:
    """The trainer's reply; a message that it dies over is tried again once, one that it hangs over is not.

    Raises:
        FedstrataError: there is no reply.
    """
    for _ in range(TRIES):
        talk = connect(socket)
        began = time.monotonic()
        try:
            with talk:
                line.send(talk, message, context)
                reply, after = line.receive(talk)
        except (EOFError, OSError):
            if time.monotonic() - began >= line.limit():
                raise FedstrataError(f"the trainer took longer than {line.limit():g} s and was ended") from None
            continue
        context.state = after.state
        return reply
    raise FedstrataError(f"the trainer died {TRIES} times over this message; its log says why")


def connect(socket: Path) -> Connection:
    """A line to the trainer, which may just be starting. Raises FedstrataError when it does not come."""
    deadline = time.monotonic() + PATIENCE
    while True:
        try:
            return Client(str(socket), "AF_UNIX", line.token_of(socket).read_bytes())
        except (FileNotFoundError, ConnectionError, EOFError):
            if time.monotonic() > deadline:
                raise FedstrataError(f"no trainer came within {PATIENCE:g} s; its log says why") from None
            time.sleep(0.1)
