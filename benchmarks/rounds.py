"""A real federation, round by round: what `fedstrata run` does, stepped from outside."""

import io
from collections.abc import Iterable, Iterator, Sequence
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

from flwr.app import Message
from rich.console import Console

from fedstrata.core import records
from fedstrata.server import configure, launch
from fedstrata.server.federation import Federation
from fedstrata.server.preparing import prepare


class Rounds:
    """A federation that waits for `next`; `asked` holds the train messages of the last round."""

    def __init__(self, federation: Federation) -> None:
        self.federation, self.number = federation, 0
        self.asked: list[Message] = []
        self._listen(federation.grid)

    def next(self) -> None:
        """The next round of stage 1: identify, train, gate, aggregate, commit."""
        if not self.number:
            self.federation.strategy.begin_stage(1)
            self.federation.chronicle.stage(1)
        self.number += 1
        self.asked = []
        self.federation._round(1, self.number)

    def _listen(self, grid: Any) -> None:
        send = grid.send_and_receive

        def heard(messages: Iterable[Message], *, timeout: float | None = None) -> Iterable[Message]:
            sent = list(messages)
            self.asked += [message for message in sent if message.metadata.message_type == records.TRAIN]
            return list(send(sent, timeout=timeout))

        grid.send_and_receive = heard


@contextmanager
def rounds(folder: Path, words: Sequence[str], recipe: str = "") -> Iterator[Rounds]:
    """Opens a run folder at `folder` for the config of `words`; the grid is closed at the end."""
    folder.mkdir(parents=True, exist_ok=True)
    config = configure.resolve(recipe, [*words, f"run.dir={folder}"])
    prepared = prepare(config)
    try:
        federation = launch.federation_of(prepared, folder, Console(file=io.StringIO()), None)
        with closing(federation.chronicle.tracker):
            yield Rounds(federation)
    finally:
        prepared.close()
