"""The good replies of the round that is under way: one file for those that came together, so that a resume asks only
the clients it lacks, and so that the server holds the arrays of one at a time.

`checkpoints/round-<stage>-<round>/<kind>-<first client>.reply` says what each reply answers and what the file's hash
is, and holds each reply's content beside what its client remembers (`server/kept.py` has the form). After a restart a
reply is believed only if all of that fits; then it passes the gate again.
"""

import contextlib
import hashlib
import json
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from flwr.app import ArrayRecord, Message, RecordDict

from fedstrata.core import records
from fedstrata.core.records import Binding
from fedstrata.server import kept
from fedstrata.server.flower_private import set_message_id, with_content

Load = Callable[[], Message]


@dataclass(frozen=True)
class Good:
    """A reply that passed the gate; `memory`: what its client remembers from now on, where the grid knows it."""

    request: Message
    reply: Message
    memory: RecordDict | None = None


@dataclass(frozen=True)
class Recalled:
    """A reply that an earlier process kept, what its client remembered, and how to have the whole of it again."""

    reply: Message
    memory: RecordDict
    load: Load


class Replies:
    """Kept replies under one folder; without a folder they stay in memory."""

    def __init__(self, folder: Path | None = None) -> None:
        self.folder = folder
        self._seen: dict[int, tuple[ArrayRecord, str]] = {}  # by identity; clients share what they are sent
        self._looked: Path | None = None
        self._found: dict[str, tuple[Path, int]] = {}  # what was asked → where an earlier process kept the answer

    def keep(self, came: Sequence[Good]) -> list[Load]:
        """Stores replies that passed the gate; says how to have each back once its arrays were let go of."""
        if self.folder is None:
            contents = [RecordDict({name: good.reply.content[name] for name in good.reply.content}) for good in came]
            return [partial(with_content, good.reply, content) for good, content in zip(came, contents, strict=True)]
        if not came:
            return []
        path = self._path(came[0].request)
        path.parent.mkdir(parents=True, exist_ok=True)
        contents = [content for good in came for content in (good.reply.content, good.memory or RecordDict())]
        slot = kept.write(path, {"asked": [self._asked(good.request) for good in came]}, contents)
        return [partial(_load, good.reply, slot, 2 * number) for number, good in enumerate(came)]

    def have(self, request: Message) -> Recalled | None:
        """The reply that was kept for a request; None when there is none that fits."""
        if self.folder is None:
            return None
        path = self._path(request)
        if path.parent != self._looked:
            self._looked, self._found = path.parent, dict(_there(path.parent))
        if not self._found:
            return None
        found = self._found.get(json.dumps(self._asked(request), sort_keys=True))
        if found is None:
            return None
        content, memory = (kept.read(found[0], 2 * found[1] + part) for part in (0, 1))
        at = records.binding(request)
        set_message_id(request.metadata, f"kept-{request.metadata.message_type}-{at.partition}")  # it is never sent
        reply = Message(content, reply_to=request)
        return Recalled(reply, memory, lambda: with_content(reply, kept.read(found[0], 2 * found[1])))

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


def _there(folder: Path) -> Iterator[tuple[str, tuple[Path, int]]]:
    """(what was asked, (file, number)) of all replies in the folder's sound files."""
    for path in sorted(folder.glob("*.reply")):
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
            asked = kept.head(path)["asked"] if kept.sound(path) else []
            yield from [(json.dumps(one, sort_keys=True), (path, number)) for number, one in enumerate(asked)]


def _load(reply: Message, slot: kept.Slot, number: int) -> Message:
    return with_content(reply, slot.load(number))


def let_go(reply: Message) -> None:
    """Takes the arrays out of a reply, which a grid may hold on to."""
    for name, held in list(reply.content.items()) if reply.has_content() else []:
        if isinstance(held, ArrayRecord):
            del reply.content[name]
