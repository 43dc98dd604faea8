"""The good replies of the round that is under way: one file each, so that a resume asks only the clients it lacks.

`checkpoints/round-<stage>-<round>/<kind>-<client>.reply` is one line of JSON, which says what the reply answers and
what its hash is, and the reply's content. It is believed only if all of that fits; then it passes the gate again.
"""

import contextlib
import hashlib
import json
import shutil
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from flwr.app import ArrayRecord, Message, RecordDict
from flwr.common.serde import recorddict_from_proto, recorddict_to_proto
from flwr.proto.recorddict_pb2 import RecordDict as Proto

from fedstrata.core import records
from fedstrata.core.records import Binding
from fedstrata.server import durable
from fedstrata.server.flower_private import set_message_id


class Replies:
    """Kept replies under one folder; without a folder nothing is kept."""

    def __init__(self, folder: Path | None = None) -> None:
        self.folder = folder
        self._seen: dict[int, tuple[ArrayRecord, str]] = {}  # by identity; clients share what they are sent

    def keep(self, request: Message, reply: Message) -> None:
        """Stores a reply that passed the gate."""
        if self.folder is None:
            return
        data = recorddict_to_proto(reply.content).SerializeToString()
        head = json.dumps({**self._asked(request), "sha256": hashlib.sha256(data).hexdigest()}, sort_keys=True)
        path = self._path(request)
        path.parent.mkdir(parents=True, exist_ok=True)
        durable.write_atomic(path, head.encode() + b"\n" + data, flush=False)  # a power cut may cost the round's work

    def have(self, request: Message) -> Message | None:
        """The reply that was kept for a request; None when there is none that fits."""
        if self.folder is None:
            return None
        try:
            line, _, data = self._path(request).read_bytes().partition(b"\n")
            head = json.loads(line)
            if head != {**self._asked(request), "sha256": hashlib.sha256(data).hexdigest()}:
                return None
            content = recorddict_from_proto(Proto.FromString(data))
        except (OSError, ValueError, TypeError):
            return None
        at = records.binding(request)
        set_message_id(request.metadata, f"kept-{request.metadata.message_type}-{at.partition}")  # it is never sent
        return Message(content, reply_to=request)

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
        return {**asdict(at), "kind": kind, "asked": self._content(request.content)}

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
