"""A trainer that dies over a message, hangs over it, or answers with its process id: `python … HOME LIMIT`."""

import os
import signal
import sys
import time
from multiprocessing.connection import Listener
from pathlib import Path

from flwr.app import ConfigRecord, Context, Message, RecordDict

from fedstrata.client import line, trainer


class Odd(trainer.Trainer):
    """Does what the message says; `once`: only the first time."""

    def answer(self, message: Message, context: Context) -> Message:
        does = str(message.content.config_records["do"]["what"])
        mark = Path(sys.argv[1]) / "done"
        if does == "die" or (does == "die once" and not mark.exists()):
            mark.touch()
            os.kill(os.getpid(), signal.SIGKILL)
        if does == "hang":
            time.sleep(600)
        return Message(RecordDict({"who": ConfigRecord({"pid": os.getpid()})}), reply_to=message)


def main() -> None:
    home = Path(sys.argv[1])
    socket = line.address(home)
    socket.unlink(missing_ok=True)
    with Listener(str(socket), "AF_UNIX", authkey=line.token_of(socket).read_bytes()) as door:
        trainer.listen(Odd(home, None), door, float(sys.argv[2]))


if __name__ == "__main__":
    main()
