"""`fedstrata deploy check`: what an administrator asks before the first run, on a client's host or the server's.

Which host it is follows from the keys in FEDSTRATA_CERTS: `node.key` is a client's, `server.key` the server's.
"""

import http.client
import ssl
import stat
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from pathlib import Path

from cryptography import x509
from rich.console import Console

from fedstrata import scenarios
from fedstrata.core.errors import FedstrataError
from fedstrata.server import configure, deploykeys, deploynodes, deployrun
from fedstrata.server.deployflower import Flower, Place
from fedstrata.server.runfolder import EVENTS, read_events

CLOCK = 30.0  # seconds that two hosts may differ; Flower refuses a node at 300
SOON = 30  # days before the end of a certificate
CONTROL = "/v1/control/list-runs"


@dataclass(frozen=True)
class Finding:
    """One thing that was looked at."""

    good: bool
    what: str
    why: str


def findings(place: Place, environment: Mapping[str, str]) -> Iterator[Finding]:
    """All checks that this host allows, one after the other; none of them stops the next."""
    client = place.certs is not None and (place.certs / "node.key").exists()
    if place.certs:
        yield from _keys(place.certs)
        yield from _certificates(place.certs)
    yield _try("port", lambda: _port(place))
    yield _try("clock", lambda: _clock(place))
    if client:
        yield _try("control API", lambda: _closed(place))
    if environment.get("FEDSTRATA_DATA"):
        yield _try("data", lambda: _data(Path(environment["FEDSTRATA_DATA"])))


def _try(what: str, look: Callable[[], str]) -> Finding:
    """look: returns what is well, raises what is not."""
    try:
        return Finding(True, what, look())
    except (OSError, FedstrataError, http.client.HTTPException) as error:
        return Finding(False, what, str(error))


def _keys(certs: Path) -> Iterator[Finding]:
    """Secrets are for their owner alone."""
    for path in sorted([*certs.glob("*.key"), *certs.glob("*.secret")]):
        mode = stat.S_IMODE(path.stat().st_mode)
        yield Finding(not mode & 0o077, path.name, f"mode {mode:04o}" + (": must be 0600" if mode & 0o077 else ""))


def _certificates(certs: Path) -> Iterator[Finding]:
    """Every certificate is by our authority, has begun, and does not end soon."""
    authority = x509.load_pem_x509_certificate((certs / "ca.crt").read_bytes())
    for path in sorted(certs.glob("*.crt")):
        yield _try(path.name, lambda path=path: _certificate(path, authority))  # type: ignore[misc]


def _certificate(path: Path, authority: x509.Certificate) -> str:
    certificate = x509.load_pem_x509_certificate(path.read_bytes())
    try:
        certificate.verify_directly_issued_by(authority)
    except Exception as error:  # cryptography raises several kinds; each means the same
        raise FedstrataError(
            f"{path}: is not by the authority in ca.crt; where that is kept: `{deploykeys.how(path.stem)}`"
        ) from error
    left = (certificate.not_valid_after_utc - datetime.now(UTC)).days
    if certificate.not_valid_before_utc > datetime.now(UTC):
        raise FedstrataError(
            f"{path}: is valid from {certificate.not_valid_before_utc:%Y-%m-%d %H:%M} UTC; is the clock right?"
        )
    if left < SOON:
        raise FedstrataError(f"{path}: ends in {left} days; where the authority is kept: `{deploykeys.how(path.stem)}`")
    return f"valid for {left} days"


def _ask(place: Place, path: str, body: bytes | None = None) -> http.client.HTTPResponse:
    host, _, port = place.address.rpartition(":")
    connection: http.client.HTTPConnection = http.client.HTTPConnection(host, int(port), timeout=10)
    if place.certs:
        context = ssl.create_default_context(cafile=str(place.authority))
        connection = http.client.HTTPSConnection(host, int(port), timeout=10, context=context)
    connection.request("POST" if body is not None else "GET", path, body)
    return connection.getresponse()


def _port(place: Place) -> str:
    try:
        _ask(place, "/health")
    except ssl.SSLError as error:
        raise FedstrataError(f"{place.address}: TLS fails: {error.reason or error}") from error
    except OSError as error:
        raise FedstrataError(f"{place.address}: {error.strerror or error}") from error
    return f"{place.address} answers over {'TLS' if place.certs else 'plain HTTP'}"


def _clock(place: Place) -> str:
    told = parsedate_to_datetime(str(_ask(place, "/health").headers["Date"]))
    apart = abs(time.time() - told.timestamp())
    if apart > CLOCK:
        raise FedstrataError(
            f"{place.address}: its clock and this one are {apart:.0f} s apart; {CLOCK:.0f} s are allowed"
        )
    return f"{apart:.0f} s apart from {place.address}"


def _closed(place: Place) -> str:
    """From a client's network the control API must not be reached: it asks for no login."""
    status = _ask(place, CONTROL, b"").status
    if status != 403:
        raise FedstrataError(f"{place.address}{CONTROL}: must be refused with 403, got {status}; put the gate in front")
    return "refused from here, as it must be"


def dry_round(flower: Flower, recipe: str, words: Sequence[str], folder: Path, console: Console) -> Iterator[Finding]:
    """One round with every client; folder: a new one that server and this host see.

    Raises:
        BadInput: words that no run takes. FedstrataError: another run is going on.
    """
    clients = configure.resolve(recipe, words).federation.clients
    deployrun.reach(flower, console)
    if run := deployrun.running(flower):
        raise FedstrataError(f"Flower run {run} is going on; a dry round would wait for it")
    deploynodes.register(flower)
    all_words = [*deployrun.defaults(recipe, words), *words, f"run.dir={folder}"]
    run = deployrun.submit(flower, deployrun.settings(flower.place, recipe, all_words, "rehearse"))
    status, details = deployrun.watch(flower, run, lambda: None)
    events = read_events(folder / EVENTS)
    rows = {row["client"]: row for event in events if event["event"] == "round" for row in event["participants"]}
    refused = {event["client"]: event["reason"] for event in events if event["event"] == "rejected"}
    for client in range(clients):
        if row := rows.get(client):
            yield Finding(True, f"client-{client}", f"trained on {row['samples']} instructions, loss {row['loss']:.3f}")
        else:
            why = refused.get(client, "not connected, or without enough data for the first stage")
            yield Finding(False, f"client-{client}", why)
    if status != "finished:completed":
        yield Finding(False, "dry round", f"Flower run {run} {status} {details}".rstrip())


def _data(folder: Path) -> str:
    scenario = scenarios.of(configure.resolve(str(folder / "scenario.yaml"), []))
    return f"{folder}: {len(scenario.tasks)} tasks readable"
