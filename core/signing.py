"""A reply signed with its node's own key: an authenticated node cannot answer for another one, nor answer twice.

Flower binds a key to a connection, not to what is sent over it. The signature is over the run, stage, round and
partition that a reply belongs to, the message that it answers, and everything in it. It travels in a record of its own;
an error reply, which has no records, has it behind its reason.
"""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path

from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.serialization import load_ssh_private_key, load_ssh_public_key
from flwr.app import ArrayRecord, ConfigRecord, Error, Message, RecordDict

from fedstrata.core.errors import BadInput
from fedstrata.core.records import Binding

SIGNATURE, VALUE = "signature", "value"
MARK = "\nsignature: "  # between an error's reason and its signature, which is written in hex


def private_key(path: Path) -> ec.EllipticCurvePrivateKey:
    """A node's key, in OpenSSH's format as Flower wants it. Raises `BadInput` for what is none."""
    try:
        key = load_ssh_private_key(path.read_bytes(), None)
    except (OSError, ValueError, UnsupportedAlgorithm) as error:
        raise BadInput(f"{path}: must be a node's private key (EC, OpenSSH format): {error}") from error
    if not isinstance(key, ec.EllipticCurvePrivateKey):
        raise BadInput(f"{path}: must be an EC key, got {type(key).__name__}")
    return key


def public_keys(folder: Path) -> dict[int, ec.EllipticCurvePublicKey]:
    """partition → key, of a folder's `client-<partition>.pub`. Raises `BadInput` for a file that is no such key."""
    found = {}
    for path in sorted(folder.glob("client-*.pub")):
        number = path.stem.removeprefix("client-")
        try:
            key = load_ssh_public_key(path.read_bytes())
        except (OSError, ValueError, UnsupportedAlgorithm) as error:
            raise BadInput(f"{path}: must be a node's public key (EC, OpenSSH format): {error}") from error
        if not isinstance(key, ec.EllipticCurvePublicKey) or not number.isdecimal():
            raise BadInput(f"{path}: must be an EC key named client-<partition>.pub, got {type(key).__name__}")
        found[int(number)] = key
    if not found:
        raise BadInput(f"{folder}: must hold the clients' public keys, client-<partition>.pub; there is none")
    return found


def sign(reply: Message, at: Binding, request: str, key: ec.EllipticCurvePrivateKey) -> None:
    """Adds the signature to a reply. at: what it belongs to and whose it is; request: the id of what it answers."""
    value = key.sign(_claim(reply, at, request), ec.ECDSA(SHA256()))
    if reply.has_error():
        reply.error = Error(reply.error.code, f"{reply.error.reason or ''}{MARK}{value.hex()}")
    else:
        reply.content[SIGNATURE] = ConfigRecord({VALUE: value})


def unsigned(reply: Message) -> bool:
    """Whether a reply carries no signature at all, not even a false one."""
    if reply.has_error():
        return MARK not in (reply.error.reason or "")
    return SIGNATURE not in reply.content


def verify(reply: Message, at: Binding, keys: Mapping[int, ec.EllipticCurvePublicKey]) -> bool:
    """Whether the node of `at.partition` signed exactly this answer to exactly this message.

    The signature is taken off. Raises whatever decoding a stranger's answer may raise.
    """
    key, value = keys.get(at.partition), _taken_off(reply)
    if key is None or not isinstance(value, bytes):
        return False
    try:
        key.verify(value, _claim(reply, at, reply.metadata.reply_to_message_id), ec.ECDSA(SHA256()))
    except InvalidSignature:
        return False
    return True


def _taken_off(reply: Message) -> object:
    """The signature, or what stands in its place."""
    if not reply.has_error():
        record = reply.content.pop(SIGNATURE, None)
        return record.get(VALUE) if isinstance(record, ConfigRecord) else None
    said, _, value = (reply.error.reason or "").rpartition(MARK)
    reply.error = Error(reply.error.code, said)
    return bytes.fromhex(value)


def _claim(reply: Message, at: Binding, request: str) -> bytes:
    """What is signed."""
    said = ["error", reply.error.code, reply.error.reason or ""] if reply.has_error() else content_hash(reply.content)
    return json.dumps(["fedstrata reply", at.run, at.stage, at.round, at.partition, request, said]).encode()


def content_hash(content: RecordDict) -> str:
    """SHA-256 over all records, in the order of their names."""
    sha = hashlib.sha256()
    for name in sorted(content):
        record = content[name]
        if isinstance(record, ArrayRecord):
            for key, array in sorted(record.items()):
                head = [name, key, array.dtype, list(array.shape), array.stype, len(array.data)]
                sha.update(json.dumps(head).encode() + array.data)
        else:
            fields = [[key, type(value).__name__, value] for key, value in sorted(record.items())]
            sha.update(json.dumps([name, type(record).__name__, fields], default=_hex).encode())
    return sha.hexdigest()


def _hex(value: object) -> str:
    assert isinstance(value, bytes)
    return value.hex()
