"""The process beside a SuperNode that keeps the base model loaded and serves one message after the other.

`python -m fedstrata.client.trainer`, started and restarted by `fedstrata deploy node`. What the client remembers is
kept on its own disk, replies and errors are signed with the node's own key, and errors leave without what they say: it
may be a path, a name or a piece of the data.
"""

import faulthandler
import importlib
import logging
import os
import signal
import sys
import time
from multiprocessing import AuthenticationError
from multiprocessing.connection import Connection, Listener
from pathlib import Path

from cryptography.hazmat.primitives.asymmetric.ec import EllipticCurvePrivateKey
from flwr.app import Context, Message, RecordDict

from fedstrata.client import line
from fedstrata.client.keep import Keep
from fedstrata.core import records
from fedstrata.core.errors import BadInput

HOME = "FEDSTRATA_HOME"
SILENT = 60.0  # seconds until whoever connected must have said what it wants
log = logging.getLogger("fedstrata.trainer")


class Trainer:
    """One client: its memory, its key, and the ClientApp."""

    def __init__(self, home: Path, key: EllipticCurvePrivateKey | None) -> None:
        """key: the node's own; None: replies are not signed."""
        self._keep, self._key = Keep(home), key

    def answer(self, message: Message, context: Context) -> Message:
        """The signed reply; an error of whatever kind becomes an error reply that names the kind alone."""
        return line.seal(self._answer(message, context), message, context, self._key)

    def _answer(self, message: Message, context: Context) -> Message:
        try:
            at = records.binding(message)
            partition = int(context.node_config.get("partition-id", -1))
            if at.partition not in (-1, partition):
                raise BadInput(f"partition-id: this client is {partition}, the message is for {at.partition}")
            return self._serve(message, context, at)
        except Exception as error:
            log.error("%s failed", message.metadata.message_type, exc_info=not isinstance(error, BadInput) or error)
            return line.failed(message, f"{type(error).__name__}; the client's own log says more")

    def _serve(self, message: Message, context: Context, at: records.Binding) -> Message:
        """The ClientApp's reply, with the client's memory in its context and put away again afterwards."""
        from fedstrata.client import app
        from fedstrata.client.release import NOISE

        trains = message.metadata.message_type == records.TRAIN
        secret = self._keep.secret()
        state = RecordDict({**secret, **(self._keep.load(at) if trains else {})})
        inside = Context(context.run_id, context.node_id, context.node_config, state, context.run_config)
        (reply,) = app.serve([message], [inside])
        if NOISE in inside.state and NOISE not in secret:
            self._keep.secret(RecordDict({NOISE: inside.state[NOISE]}))
        if trains:
            self._keep.store(at, RecordDict({name: inside.state[name] for name in inside.state if name != NOISE}))
        return reply


def listen(trainer: Trainer, door: Listener, limit: float) -> None:
    """Serves one message after the other. One that takes longer than `limit` seconds ends the process."""
    while True:
        try:
            with door.accept() as talk:
                _talk(trainer, talk, limit)
        except (AuthenticationError, EOFError, OSError) as error:  # whoever came is gone, or was nobody of ours
            log.warning("a caller was turned away: %s", error or type(error).__name__)


def _talk(trainer: Trainer, talk: Connection, limit: float) -> None:
    if not talk.poll(SILENT):
        return
    message, context = line.receive(talk)
    faulthandler.dump_traceback_later(limit, exit=True)
    began = time.monotonic()
    try:
        reply = trainer.answer(message, context)
    finally:
        faulthandler.cancel_dump_traceback_later()
    log.info("%s in %.1f s", message.metadata.message_type, time.monotonic() - began)
    line.send(talk, reply, context)


def main() -> None:
    """Listens until it is told to end."""
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(message)s", stream=sys.stderr)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    home = Path(os.environ[HOME])
    socket = line.address(home)
    socket.unlink(missing_ok=True)
    trainer = Trainer(home, line.node_key())
    importlib.import_module("fedstrata.client.app")  # torch and its like, before the first message comes
    with Listener(str(socket), "AF_UNIX", authkey=line.token_of(socket).read_bytes()) as door:
        log.info("listening")
        listen(trainer, door, line.limit())


if __name__ == "__main__":
    main()
