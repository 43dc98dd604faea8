"""The good replies of the round that is under way: one file each, so that a resume asks only the clients it lacks, and
so that the server holds the arrays of one at a time.

`checkpoints/round-<stage>-<round>/<kind>-<client>.reply` says what the reply answers and what its hash is, and holds
the reply's content beside what the client remembers (`server/kept.py` has the form). After a restart it is believed
only if all of that fits; then it passes the gate again.
"""

import contextlib
import hashlib
import json
import shutil
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from flwr.app import ArrayRecord, Message, RecordDict

from fedstrata.core import records
from fedstrata.core.records import Binding
from fedstrata.server import kept
from fedstrata.server.flower_private import set_message_id, with_content

Load = Callable[[], Message]


class Replies:
    """Kept replies under one folder; without a folder they stay in memory."""

    def __init__(self, folder: Path | None = None) -> None:
        self.folder = folder
        self._seen: dict[int, tuple[ArrayRecord, str]] = {}  # by identity; clients share what they are sent

    def keep(self, request: Message, reply: Message, memory: RecordDict | None = None) -> Load:
        """Stores a reply that passed the gate; says how to have it back once its arrays were let go of.

        memory: what the client remembers from now on, where the grid knows it.
        """
        if self.folder is None:
            return partial(with_content, reply, RecordDict({name: reply.content[name] for name in reply.content}))
        path = self._path(request)
        path.parent.mkdir(parents=True, exist_ok=True)
        slot = kept.write(path, self._asked(request), [reply.content, memory or RecordDict()])
        return lambda: with_content(reply, slot.load()[0])

    def have(self, request: Message) -> tuple[Message, RecordDict] | None:
        """The reply that was kept for a request and its client's memory; None when there is none that fits."""
        if self.folder is None or not (path := self._path(request)).exists():
            return None
        try:
            content, memory = kept.read(path, self._asked(request))
        except (OSError, ValueError, KeyError, TypeError):
            return None
        at = records.binding(request)
        set_message_id(request.metadata, f"kept-{request.metadata.message_type}-{at.partition}")  # it is never sent
        return Message(content, reply_to=request), memory

    def again(self, request: Message, reply: Message) -> Load:
        """As `keep`, for a reply that `have` found."""
        return partial(_read, self._path(request), reply)

    def clear(self) -> None:
        """The round is committed."""
        self._seen.clear()
        for folder in self.folder.glob("round-*") if self.folder else ():
            with contextlib.suppress(OSError):  # what is left is not believed in another round
                shutil.rmtree(folder)

    def _path(self, request: Message) -> Path:
        assert self.folder is not None
        at = records.binding(request)
        name = f"{request.metadata.message_type}-{at.partition}.reply"
        return self.folder / f"round-{at.stage}-{at.round}" / name

    def _asked(self, request: Message) -> dict[str, Any]:
        """What a reply is bound to: whose it is, and everything that the client was sent."""
        at: Binding = records.binding(request)
        kind = request.metadata.message_type
        return {**vars(at), "kind": kind, "asked": self._content(request.content)}

    def _content(self, content: RecordDict) -> str:
        sha = hashlib.sha256()
        for name in sorted(content):
            record = content[name]
            if isinstance(record, ArrayRecord):
                sha.update(f"{name} {self._arrays(record)}".encode())
            else:
                fields = {key: value for key, value in record.items() if (name, key) != (records.META, "config")}
                sha.update(json.dumps([name, fields], sort_keys=True, default=repr).encode())
        return sha.hexdigest()

    def _arrays(self, record: ArrayRecord) -> str:
        if id(record) not in self._seen:
            sha = hashlib.sha256()
            for name, array in sorted(record.items()):
                sha.update(f"{name} {array.dtype} {tuple(array.shape)} ".encode() + array.data)
            self._seen[id(record)] = (record, sha.hexdigest())
        return self._seen[id(record)][1]


def whole_units(units: Sequence[Sequence[Message]], kept: set[int]) -> list[list[Message]]:
    """The units to ask: whole ones, since a cohort's bits depend on who is in it. `kept`: ids of message objects."""
    return [list(unit) for unit in units if not all(id(message) in kept for message in unit)]


def _read(path: Path, reply: Message) -> Message:
    return with_content(reply, kept.again(path)[0])


def let_go(reply: Message) -> None:
    """Takes the arrays out of a reply, which a grid may hold on to."""
    for name, held in list(reply.content.items()) if reply.has_content() else []:
        if isinstance(held, ArrayRecord):
            del reply.content[name]
