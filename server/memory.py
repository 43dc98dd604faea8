"""What a resumed run must know beside the strategy's state: known tokens, the inner state of a stock strategy, and what
every simulated client remembers.

It is part of the commit and no part of `final_state_sha256`.
"""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Protocol, runtime_checkable

import numpy as np
from flwr.common.serde import recorddict_from_proto, recorddict_to_proto
from flwr.proto.recorddict_pb2 import RecordDict as Proto
from flwr.serverapp import Grid

from fedstrata.core.identity import Token
from fedstrata.server import blobs
from fedstrata.server.grids import LocalGrid
from fedstrata.strategies.base import Parts, Strategy

Tokens = dict[tuple[int, str], Token]  # (client, hash of its data) → token
TOKENS, INNER, CLIENT = "tokens", "inner.", "client."


@runtime_checkable
class Remembers(Protocol):
    """A strategy that has more to remember than its state."""

    def save_inner(self) -> Parts:
        """What there is, taken apart."""

    def load_inner(self, parts: Parts) -> None:
        """The inverse of `save_inner`."""


def pack(tokens: Mapping[tuple[int, str], Token], strategy: Strategy) -> Parts:
    """Everything as one `Parts`; tokens are one matrix, in the order of clients."""
    known = sorted(tokens.items(), key=lambda item: item[0])
    inner = strategy.save_inner() if isinstance(strategy, Remembers) else Parts({})
    tensors = {f"{INNER}{name}": tensor for name, tensor in inner.tensors.items()}
    if known:
        tensors[TOKENS] = np.stack([token.value for _, token in known])
    told = [[client, data, token.count] for (client, data), token in known]
    return Parts(tensors, {"tokens": told, "inner": dict(inner.facts)})


def unpack(memory: Parts, strategy: Strategy) -> Tokens:
    """Gives the strategy its inner state back and returns the tokens; older commits hold neither."""
    inner = {name.removeprefix(INNER): t for name, t in memory.tensors.items() if name.startswith(INNER)}
    facts = memory.facts.get("inner", {})
    if isinstance(strategy, Remembers) and (inner or facts):
        strategy.load_inner(Parts(inner, facts))
    rows = zip(memory.facts.get("tokens", []), memory.tensors.get(TOKENS, ()), strict=True)
    return {(int(client), str(data)): Token(value, int(count)) for (client, data, count), value in rows}


class Clients:
    """What simulated clients remember, which their grid keeps. A deployed client keeps its own."""

    def __init__(self, grid: Grid, roster: Mapping[int, int]) -> None:
        """roster: partition → node. Of a grid that is not ours nothing is known."""
        self._grid = grid if isinstance(grid, LocalGrid) else None
        self._roster = roster
        self._moved: set[int] = set()  # partitions that may remember something else than at the last commit
        self._stored: dict[str, str] = {}  # name of a client's tensor → its blob

    def asked(self, partitions: Iterable[int]) -> None:
        """These clients are trained before the next commit."""
        self._moved.update(partitions)

    def store(self, folder: Path) -> Mapping[str, str]:
        """{name: blob} of all that clients remember; only those that were trained since are looked at."""
        for partition in sorted(self._moved if self._grid else ()):
            if state := self._grid and self._grid.state(self._roster[partition]):
                data = recorddict_to_proto(state).SerializeToString()
                self._stored[f"{CLIENT}{partition}"] = blobs.put(folder, np.frombuffer(data, dtype=np.uint8))
        self._moved.clear()
        return dict(self._stored)

    def restore(self, memory: Parts) -> None:
        """All clients remember what a commit's `memory` says, and nothing else."""
        if self._grid is None:
            return
        held = {n.removeprefix(CLIENT): t for n, t in memory.tensors.items() if n.startswith(CLIENT)}
        for partition, node in self._roster.items():
            data = held.get(str(partition))
            state = None if data is None else recorddict_from_proto(Proto.FromString(data.tobytes()))
            self._grid.remember(node, state)
        self._moved.update(map(int, held))
