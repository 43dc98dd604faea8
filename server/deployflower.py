"""Flower's own command line towards one SuperLink, its answers as values; only the server host reaches it."""

import json
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from flwr.app.user_config import UserConfig

from fedstrata.core.config import require
from fedstrata.core.errors import BadInput, FedstrataError
from fedstrata.server import deploykeys
from fedstrata.server.flower_private import NodeInfo, NodeStatus, list_nodes, run_settings
from fedstrata.server.node import LOCAL

CONNECTION = "deployment"


@dataclass(frozen=True)
class Place:
    """Where a deployment's SuperLink is and what belongs to its server host.

    address: host:port; certs: the folder `server` that `fedstrata deploy keys` made, None without TLS; home: a folder
    of our own, for Flower's settings.
    """

    address: str
    certs: Path | None
    home: Path

    @property
    def authority(self) -> Path | None:
        """The certificate that the SuperLink's own is checked against."""
        return self.certs / "ca.crt" if self.certs else None


def place_of(environment: Mapping[str, str], insecure: bool) -> Place:
    """The place that FEDSTRATA_SUPERLINK, FEDSTRATA_CERTS and FEDSTRATA_HOME name.

    Raises:
        BadInput: one is missing, the folder of certificates holds no ca.crt, or it is insecure and not on this machine.
    """
    address, home = environment.get("FEDSTRATA_SUPERLINK", ""), environment.get("FEDSTRATA_HOME", "")
    host, _, port = address.rpartition(":")
    require(bool(host) and port.isdigit(), "FEDSTRATA_SUPERLINK", "host:port of the SuperLink", address)
    require(bool(home), "FEDSTRATA_HOME", "a folder of this host's own", home)
    if insecure:
        require(host in LOCAL, "--insecure", f"used with a SuperLink on this machine alone ({LOCAL[0]})", host)
        return Place(address, None, Path(home).resolve())
    certs = Path(environment.get("FEDSTRATA_CERTS", "")).resolve()
    if not (certs / "ca.crt").is_file():
        raise BadInput(
            f"FEDSTRATA_CERTS: {certs} holds no ca.crt; where the authority is kept, this puts it into every party's "
            f"folder: `{deploykeys.how()}`"
        )
    return Place(address, certs, Path(home).resolve())


class Flower:
    """`flwr …` as a child process: its Python functions are private, its JSON is not."""

    def __init__(self, place: Place) -> None:
        self.place = place
        safety = f'root-certificates = "{place.authority}"' if place.certs else "insecure = true"
        settings = f'[superlink]\ndefault = "{CONNECTION}"\n\n[superlink.{CONNECTION}]\naddress = "{place.address}"\n'
        place.home.mkdir(parents=True, exist_ok=True)
        (place.home / "config.toml").write_text(f"{settings}{safety}\n", encoding="utf-8")

    def runs(self) -> list[dict[str, Any]]:
        """All runs that the SuperLink knows, as `flwr ls` lists them."""
        return list(self._ask("ls")["runs"])

    def status(self, run: str) -> tuple[str, str]:
        """A run's status (`running`, `finished:completed`, …) and what Flower says of it."""
        told = next((each for each in self.runs() if each["run-id"] == run), None)
        if told is None:
            raise FedstrataError(
                f"run {run}: the SuperLink at {self.place.address} does not know it; was its state lost?"
            )
        return str(told["status"]), str(told["status-details"])

    def submit(self, app: Path, settings: Mapping[str, str]) -> str:
        """Starts a run of the app; returns its id. settings: run config as TOML values."""
        words = [word for key, value in settings.items() for word in ("--run-config", f"{key}={value}")]
        return str(self._ask("run", str(app), CONNECTION, *words)["run-id"])

    def stop(self, run: str) -> None:
        """Ends a run."""
        self._ask("stop", run)

    def settings(self, run: str) -> UserConfig:
        """The run config with which a run was submitted."""
        return run_settings(self.place.address, self.place.authority, int(run))

    def nodes(self) -> list[NodeInfo]:
        """The nodes that may connect, with their public keys; not those that were unregistered."""
        return [node for node in self.all_nodes() if node.status != NodeStatus.UNREGISTERED]

    def all_nodes(self) -> list[NodeInfo]:
        """Also those that were unregistered: Flower never takes their keys again."""
        return list_nodes(self.place.address, self.place.authority)

    def register(self, public: Path, name: str) -> None:
        """Lets the owner of a public key connect."""
        self._ask("supernode", "register", str(public), CONNECTION, "--name", name)

    def unregister(self, node: int) -> None:
        """Shuts a node out."""
        self._ask("supernode", "unregister", str(node), CONNECTION)

    def _ask(self, *words: str) -> dict[str, Any]:
        """Raises FedstrataError with Flower's message where Flower refuses or cannot be reached."""
        told = _flwr([*words, "--format", "json"], self.place.home)
        if not told.get("success"):
            raise FedstrataError(f"flwr {words[0]}: {told.get('error-message') or 'no answer'}")
        return told


def _flwr(words: Sequence[str], home: Path) -> dict[str, Any]:
    quiet = {"FLWR_TELEMETRY_ENABLED": "0", "FLWR_DISABLE_UPDATE_CHECK": "1", "FLWR_HOME": str(home)}
    command = [str(Path(sys.executable).with_name("flwr")), *words]
    done = subprocess.run(
        command, env={**os.environ, **quiet}, cwd=home, capture_output=True, text=True, timeout=120, check=False
    )
    try:
        told: dict[str, Any] = json.loads(done.stdout)
    except ValueError:
        said = (done.stderr or done.stdout).strip() or f"exit code {done.returncode}"
        return {"success": False, "error-message": said.splitlines()[-1]}
    return told
