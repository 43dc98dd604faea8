"""`fedstrata deploy keys`: the authority, the certificates and the node keys of a deployment, one folder per party.

    ca/        ca.key ca.crt                               kept off every host of the deployment
    server/    server.key server.crt ca.crt superexec.secret nodes/client-K.pub
    gate/      gate.key gate.crt ca.crt
    client-K/  node.key node.pub ca.crt                    client K alone

Secrets have mode 0600. What is there is kept; only `rotate` replaces it. A client of which server/nodes has the public
half has its key, wherever its folder was carried.
"""

import ipaddress
import os
import secrets
from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.ec import EllipticCurvePrivateKey
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from fedstrata.core import durable
from fedstrata.core.config import require
from fedstrata.core.errors import BadInput

LOCAL = ("localhost", "127.0.0.1")
AUTHORITY = "ca"
AUTHORITY_DAYS, CERTIFICATE_DAYS = 3650, 365
PARTIES = ("server", "gate")


def make(to: Path, clients: int, hosts: Sequence[str] = (), rotate: str = "") -> list[str]:
    """Makes what is missing, and what `rotate` names anew; returns the names of what was made.

    hosts: further names and addresses by which server and gate are reached (none: a certificate made anew keeps the
    old one's); rotate: ca, server, gate or client-K. A new authority brings new certificates and no new node keys.

    Raises:
        BadInput: no clients, an unknown name to rotate, an authority of which a half is missing, or a certificate that
            stands and does not name one of the hosts.
    """
    names = [f"client-{number}" for number in range(clients)]
    every = (AUTHORITY, *PARTIES, *names)
    require(clients > 0, "--clients", "at least 1", clients)
    require(rotate in ("", *every), "--rotate", f"one of {', '.join(every)}", rotate)
    there = _authority(to)
    if not rotate:
        _certified(to, clients, hosts)
    anew = rotate == AUTHORITY or not there
    made = [_new_authority(to)] if anew else []
    for party in PARTIES:
        if anew or party == rotate or not (to / party / f"{party}.crt").exists():
            names_of = [party, *(("superlink",) if party == "server" else ()), *LOCAL, *(hosts or _hosts(to, party))]
            made.append(_certify(to, party, list(dict.fromkeys(names_of))))
    if not (to / "server" / "superexec.secret").exists():
        _write(to / "server" / "superexec.secret", secrets.token_bytes(32), secret=True)
    for name in names:
        places = (to / name / "node.key", to / "server" / "nodes" / f"{name}.pub")
        if name == rotate or not any(path.exists() for path in places):
            made.append(_node(to, name))
    for name in (*PARTIES, *names):
        if (to / name).is_dir():
            _write(to / name / "ca.crt", (to / "ca" / "ca.crt").read_bytes())
    return made


def how(rotate: str = "", clients: int = 0, hosts: Sequence[str] = (), to: object = "KEYS") -> str:
    """The command that makes a key anew, or without `rotate` what is missing. KEYS: the folder of all keys."""
    words = ["fedstrata deploy keys", f"--to {to}", *([f"--clients {clients}"] if clients else [])]
    words += [f"--rotate {rotate}"] if rotate else []
    return " ".join([*words, *(f"--host {host}" for host in hosts)])


def _certified(to: Path, clients: int, hosts: Sequence[str]) -> None:
    """Raises `BadInput` for a certificate that stands and does not name all hosts: nothing replaces it by itself."""
    for party in PARTIES:
        named = _hosts(to, party)
        if named and (missing := [host for host in hosts if host not in named]):
            path, own = to / party / f"{party}.crt", {party, "superlink", *LOCAL}
            every = [*(name for name in named if name not in own), *missing]
            way = how(party, clients, every, to)
            raise BadInput(f"--host: {path} stands and does not name {', '.join(missing)}; to make it anew: {way}")


def _authority(to: Path) -> bool:
    """Whether there is one. Raises `BadInput` for half of one: a new one would make all certificates worthless."""
    there = {name: (to / "ca" / name).exists() for name in ("ca.key", "ca.crt")}
    if all(there.values()):
        return True
    orphans = [party for party in PARTIES if (to / party / f"{party}.crt").exists()]
    lost = [name for name, exists in there.items() if not exists]
    if any(there.values()) or orphans:
        raise BadInput(
            f"{to / 'ca'}: {' and '.join(lost)} missing, but certificates stand; bring it back or empty {to}"
        )
    return False


def _new_authority(to: Path) -> str:
    key = ec.generate_private_key(ec.SECP384R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "fedstrata deployment authority")])
    draft = _draft(name, name, key, AUTHORITY_DAYS).add_extension(x509.BasicConstraints(ca=True, path_length=0), True)
    draft = draft.add_extension(_usage(signs=True), critical=True)
    _write(to / "ca" / "ca.key", _private(key), secret=True)
    _write(to / "ca" / "ca.crt", draft.sign(key, hashes.SHA384()).public_bytes(serialization.Encoding.PEM))
    return AUTHORITY


def _certify(to: Path, party: str, hosts: Sequence[str]) -> str:
    """A key and a certificate by the authority for all of `hosts`."""
    authority = x509.load_pem_x509_certificate((to / "ca" / "ca.crt").read_bytes())
    signer = _signer(to / "ca" / "ca.key")
    key = ec.generate_private_key(ec.SECP384R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, party)])
    draft = _draft(name, authority.subject, key, CERTIFICATE_DAYS)
    draft = draft.add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
    draft = draft.add_extension(_usage(signs=False), critical=True)
    draft = draft.add_extension(x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH]), critical=False)
    draft = draft.add_extension(x509.SubjectAlternativeName([_host(host) for host in hosts]), critical=False)
    issuer = x509.AuthorityKeyIdentifier.from_issuer_public_key(signer.public_key())
    signed = draft.add_extension(issuer, critical=False).sign(signer, hashes.SHA384())
    _write(to / party / f"{party}.key", _private(key), secret=True)
    _write(to / party / f"{party}.crt", signed.public_bytes(serialization.Encoding.PEM))
    return party


def _draft(name: x509.Name, issuer: x509.Name, key: EllipticCurvePrivateKey, days: int) -> x509.CertificateBuilder:
    """Valid from five minutes ago: clocks differ."""
    now = datetime.now(UTC)
    draft = x509.CertificateBuilder().subject_name(name).issuer_name(issuer).public_key(key.public_key())
    draft = draft.serial_number(x509.random_serial_number()).not_valid_before(now - timedelta(minutes=5))
    draft = draft.not_valid_after(now + timedelta(days=days))
    return draft.add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)


def _usage(signs: bool) -> x509.KeyUsage:
    """signs: for an authority; else for a server."""
    off = dict.fromkeys(("content_commitment", "data_encipherment", "encipher_only", "decipher_only"), False)
    use = {"digital_signature": not signs, "key_encipherment": False, "key_agreement": False}
    return x509.KeyUsage(**off, **use, key_cert_sign=signs, crl_sign=signs)


def _host(host: str) -> x509.GeneralName:
    try:
        return x509.IPAddress(ipaddress.ip_address(host))
    except ValueError:
        return x509.DNSName(host)


def _hosts(to: Path, party: str) -> list[str]:
    """The names and addresses of a party's certificate; [] where there is none."""
    path = to / party / f"{party}.crt"
    if not path.exists():
        return []
    certificate = x509.load_pem_x509_certificate(path.read_bytes())
    names = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    return [str(name.value) for name in names]


def _node(to: Path, name: str) -> str:
    """A node's key pair in OpenSSH's formats, on a curve that Flower takes; the server gets the public half."""
    key, formats = ec.generate_private_key(ec.SECP384R1()), serialization.PublicFormat
    public = key.public_key().public_bytes(serialization.Encoding.OpenSSH, formats.OpenSSH) + b"\n"
    _write(to / name / "node.key", _private(key, serialization.PrivateFormat.OpenSSH), secret=True)
    _write(to / name / "node.pub", public)
    _write(to / "server" / "nodes" / f"{name}.pub", public)
    return name


def _private(
    key: EllipticCurvePrivateKey, form: serialization.PrivateFormat = serialization.PrivateFormat.PKCS8
) -> bytes:
    return key.private_bytes(serialization.Encoding.PEM, form, serialization.NoEncryption())


def _signer(path: Path) -> EllipticCurvePrivateKey:
    key = serialization.load_pem_private_key(path.read_bytes(), password=None)
    if not isinstance(key, EllipticCurvePrivateKey):
        raise BadInput(f"{path}: must be a key on an elliptic curve, got {type(key).__name__}")
    return key


def _write(path: Path, data: bytes, secret: bool = False) -> None:
    """Whole or not at all; a secret is never readable by others, not even while it is written."""
    durable.make_folder(path.parent)
    before = os.umask(0o077 if secret else 0o022)
    try:
        durable.write_atomic(path, data)
    finally:
        os.umask(before)
