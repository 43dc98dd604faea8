"""Which node is whose: the public keys that `fedstrata deploy keys` made, registered with the SuperLink."""

import hashlib
import json
from pathlib import Path

from fedstrata.core import durable
from fedstrata.core.errors import BadInput, FedstrataError
from fedstrata.server.deployflower import Flower
from fedstrata.server.runfolder import read_json

NODES = "nodes.json"  # {client: {node: the SuperLink's id for it, key: SHA-256 of its public key}}


def register(flower: Flower) -> list[str]:
    """Registers every client's present key and shuts out keys that were rotated away; returns what was done.

    Raises:
        BadInput: there is no folder of public keys, or none in it.
    """
    if flower.place.certs is None:
        return []  # without node authentication whoever connects is a node
    keys = {path.stem: path for path in sorted((flower.place.certs / "nodes").glob("*.pub"))}
    if not keys:
        raise BadInput(f"{flower.place.certs / 'nodes'}: holds no public key; `fedstrata deploy keys` writes them")
    known, there = registered(flower.place.home), {node["node-id"] for node in flower.nodes()}
    done = []
    for name, path in keys.items():
        key, before = hashlib.sha256(path.read_bytes()).hexdigest(), known.get(name)
        if before and before["key"] == key and (before["node"] in there or not before["node"]):
            continue
        if before and before["node"] in there:
            flower.unregister(before["node"])
        known[name] = {"node": _enter(flower, path, name), "key": key}
        done.append(name)
        durable.write_atomic(flower.place.home / NODES, json.dumps(known, indent=1).encode())
    return done


def registered(home: Path) -> dict[str, dict[str, str]]:
    """{client: {node, key}} as registered from this host."""
    path = home / NODES
    return dict(read_json(path)) if path.is_file() else {}


def _enter(flower: Flower, path: Path, name: str) -> str:
    """The node's id; empty where the SuperLink knew the key already and does not say under which id."""
    try:
        return flower.register(path, name)
    except FedstrataError as error:
        if "already" not in str(error):
            raise
        return ""
