"""A client's own folder (`FEDSTRATA_DATA`) in the place of its part of the run's scenario."""

import hashlib
import hmac
import json
import os
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path

from flwr.app import Context

from fedstrata.client.release import own_key
from fedstrata.core import records
from fedstrata.core.config import RunConfig
from fedstrata.core.errors import BadInput
from fedstrata.scenarios.own import FILE, holding_of, open_own
from fedstrata.scenarios.stream import Scenario

DATA = "FEDSTRATA_DATA"
Stamp = tuple[tuple[str, int, int], ...]


def names_of(text: str) -> tuple[str, ...]:
    """The tasks whose data clients hold, from a config on the wire; () in a simulation.

    Raises:
        BadInput: this client has a folder of its own, and the server's scenario would not use it.
    """
    names = _names(text)
    if not names and os.environ.get(DATA):
        raise BadInput(f"{DATA}: is set, but the server's scenario has data of its own (no `held: clients`)")
    return names


@lru_cache(maxsize=4)
def _names(text: str) -> tuple[str, ...]:
    return tuple(json.loads(text).get(records.HELD, ()))


def scenario(config: RunConfig, names: Sequence[str], partition: int) -> Scenario:
    """The client's own scenario as the server numbers it; read again when one of its files was changed.

    Raises:
        BadInput: there is no folder, or a mistake in it.
    """
    folder = Path(os.environ.get(DATA, ""))
    if not os.environ.get(DATA) or not (folder / FILE).is_file():
        raise BadInput(f"{DATA}: must be this client's folder, with {FILE} in it, got {os.environ.get(DATA, '')!r}")
    federation = config.federation
    sizes = (federation.clients, config.seed, federation.rounds_per_stage)
    return _open(folder, tuple(names), partition, *sizes, _stamp(folder))


def holding(config: RunConfig, names: Sequence[str], context: Context) -> str:
    """What the client tells of its folder, as JSON; names of data under a key that it keeps."""
    partition = int(context.node_config.get("partition-id", -1))
    key = own_key(context)
    view = scenario(config, names, partition)
    rounds = config.federation.rounds_per_stage
    told = holding_of(view, partition, rounds, lambda word: hmac.new(key, word.encode(), hashlib.sha256).hexdigest())
    return told.to_json()


@lru_cache(maxsize=2)
def _open(
    folder: Path, names: tuple[str, ...], partition: int, clients: int, seed: int, rounds: int, stamp: Stamp
) -> Scenario:
    return open_own(folder, names, partition, clients, seed, rounds)


def _stamp(folder: Path) -> Stamp:
    """Name, size and time of the folder's text files."""
    files = [path for end in ("yaml", "json", "jsonl") for path in sorted(folder.rglob(f"*.{end}"))]
    return tuple((str(path), path.stat().st_size, path.stat().st_mtime_ns) for path in files)
