"""Which node is whose: the SuperLink lets in the keys that `fedstrata deploy keys` made, and no others."""

from collections.abc import Iterable
from pathlib import Path

from fedstrata.core import signing
from fedstrata.core.errors import BadInput
from fedstrata.server import deploykeys
from fedstrata.server.deployflower import Flower, Place
from fedstrata.server.flower_private import NodeInfo, NodeStatus, key_bytes

NODES = "nodes"  # the folder of public keys, client-<partition>.pub, beside the server's own


def register(flower: Flower) -> list[str]:
    """Registers every client's present key and shuts out every other one, whoever registered it; says what was done.

    Raises:
        BadInput: there is no folder of public keys, none in it, or one that was shut out before.
    """
    names = names_of(flower.place)
    if not names:
        return []  # without node authentication whoever connects is a node
    nodes = flower.all_nodes()
    gone = {node.public_key for node in nodes if node.status == NodeStatus.UNREGISTERED}
    there = [node for node in nodes if node.public_key not in gone]
    if spent := sorted(names[key] for key in gone & names.keys()):
        most = max(int(name.removeprefix("client-")) for name in names.values()) + 1
        ways = "; ".join(f"`{deploykeys.how(name, most)}`" for name in spent)
        raise BadInput(f"{NODES}: the SuperLink takes no key again that was unregistered, {', '.join(spent)}: {ways}")
    done = []
    for node in there:
        if node.public_key not in names:
            flower.unregister(node.node_id)
            done.append(f"{node.name or node.node_id}: shut out, its key is not in {NODES}/")
    for key, name in names.items():
        if key not in {node.public_key for node in there}:
            flower.register(_folder(flower.place) / f"{name}.pub", name)
            done.append(f"{name}: registered")
    return done


def names_of(place: Place) -> dict[bytes, str]:
    """public key as Flower has it → client-<partition>; {} for a place without TLS and keys.

    Raises:
        BadInput: there is no folder of public keys, or none in it.
    """
    if place.certs is None:
        return {}
    return {key_bytes(key): f"client-{number}" for number, key in signing.public_keys(_folder(place)).items()}


def named(nodes: Iterable[NodeInfo], place: Place) -> list[tuple[str, NodeInfo]]:
    """(client-<partition>, node); "" for a node whose key is no client's."""
    names = names_of(place)
    return [(names.get(node.public_key, ""), node) for node in nodes]


def _folder(place: Place) -> Path:
    assert place.certs is not None
    return place.certs / NODES
