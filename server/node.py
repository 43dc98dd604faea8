"""`fedstrata deploy node`: what belongs to one client's host, kept running.

The trainer with the base model, Flower's SuperNode, which alone speaks with the server, and the SuperExec that starts
a ClientApp for every message, one at a time and of our own app alone. TLS and the node's key are demanded before
anything is started.
"""

import json
import os
import secrets
import signal
import socket
import ssl
import sys
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console

from fedstrata.core import durable, signing
from fedstrata.core.config import require
from fedstrata.core.errors import BadInput
from fedstrata.server.supervise import Child, Job, alive, tend

NAMES = ("trainer", "flower-supernode", "flower-superexec")
LOCAL = ("127.0.0.1", "localhost", "[::1]")
REFUSED = "Failed to activate SuperNode"  # Flower's words for an unknown key, and for one that is still in use
FLOWER = {
    "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",
    "FLWR_DISABLE_UPDATE_CHECK": "1",
    "FLWR_TELEMETRY_ENABLED": "0",
    "FLWR_SUPEREXEC_TASK_POLL_INTERVAL": "0.2",
}


@dataclass(frozen=True)
class Node:
    """One client's host.

    Attributes:
        data: the client's folder, with scenario.yaml.
        home: its own disk: memory, sockets, logs.
        superlink: host:port of the server, or of the gate before it.
        certs: ca.crt, node.key; None: plain HTTP, on this machine alone.
        partition: which client of the federation this is, counted from 0.
    """

    data: Path
    home: Path
    superlink: str
    certs: Path | None
    partition: int

    def check(self) -> None:
        """Raises `BadInput` for whatever would only fail later, and worse."""
        require(self.partition >= 0, "FEDSTRATA_PARTITION", "at least 0", self.partition)
        require(
            (self.data / "scenario.yaml").is_file(), "FEDSTRATA_DATA", "a folder with scenario.yaml", str(self.data)
        )
        host, _, port = self.superlink.rpartition(":")
        require(bool(host) and port.isdecimal(), "FEDSTRATA_SUPERLINK", "host:port", self.superlink)
        if self.certs is None:
            require(host in LOCAL, "--insecure", f"used with a SuperLink on this machine alone ({LOCAL[0]})", host)
            return
        for name in ("ca.crt", "node.key"):
            path = self.certs / name
            require(path.is_file(), "FEDSTRATA_CERTS", "a folder with ca.crt and node.key", f"no {path}")
        key = self.certs / "node.key"
        require(key.stat().st_mode & 0o077 == 0, f"{key}", "readable by its owner alone (chmod 600)", "other modes")
        signing.private_key(key)

    def reach(self) -> bool:
        """Whether the server is there; False while nothing answers. Raises `BadInput` if it is not to be trusted."""
        host, _, port = self.superlink.rpartition(":")
        try:
            with socket.create_connection((host.strip("[]"), int(port)), timeout=10) as plain:
                if self.certs is not None:
                    context = ssl.create_default_context(cafile=str(self.certs / "ca.crt"))
                    context.wrap_socket(plain, server_hostname=host.strip("[]")).close()
        except ssl.SSLCertVerificationError as error:
            rule = f"the certificate of {self.superlink} is not one that it vouches for: {error.verify_message}"
            raise BadInput(f"FEDSTRATA_CERTS: {self.certs}/ca.crt: {rule}") from error
        except ssl.SSLError as error:
            raise BadInput(f"FEDSTRATA_SUPERLINK: {self.superlink} does not speak TLS ({error.reason})") from error
        except OSError:
            return False
        return True

    def jobs(self) -> list[Job]:
        """The three processes, with a secret and a port that are drawn anew."""
        home, secret, port = self.home, self.home / "superexec.secret", free_port()
        trainer = home / "trainer.sock"
        for path in (secret, trainer.with_suffix(".token")):
            write_secret(path)
        own = {"FEDSTRATA_HOME": str(home), "FEDSTRATA_DATA": str(self.data)}
        signer = {"FEDSTRATA_CERTS": str(self.certs)} if self.certs else {}
        flower = {"FLWR_HOME": str(home / "flwr"), "FEDSTRATA_TRAINER": str(trainer)}
        shared = {**os.environ, **FLOWER, "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}
        bare = {key: value for key, value in shared.items() if key not in ("FEDSTRATA_DATA", "FEDSTRATA_CERTS")}
        api, known = f"127.0.0.1:{port}", ["--superexec-auth-secret-file", str(secret)]
        executor = [sys.executable, "-m", "fedstrata.server.superexec", "--runtime-api-address", api]
        commands: Mapping[str, tuple[list[str], dict[str, str]]] = {
            "trainer": ([sys.executable, "-m", "fedstrata.client.trainer"], {**bare, **own, **signer}),
            "flower-supernode": (["flower-supernode", *self._supernode(port), *known], {**bare, **flower}),
            "flower-superexec": ([*executor, "--insecure", *known], {**bare, **flower, **signer}),
        }
        return [Job(name, *commands[name], home / "logs" / f"{name}.log") for name in NAMES]

    def _supernode(self, port: int) -> list[str]:
        """Its runtime API stays on this host's loopback, behind the secret."""
        trust = ["--insecure"]
        if self.certs:
            key = str(self.certs / "node.key")
            trust = ["--root-certificates", str(self.certs / "ca.crt"), "--auth-supernode-private-key", key]
        who = f"partition-id={self.partition}"
        place = ["--host", "127.0.0.1", "--port", str(port)]
        return ["--superlink", self.superlink, *trust, "--isolation", "process", *place, "--node-config", who]


def run(node: Node, console: Console) -> None:
    """Keeps a client's processes running until SIGTERM or Ctrl-C.

    Raises:
        BadInput: a setting that cannot work, or a server that is not to be trusted.
    """
    node.check()
    durable.make_folder(node.home)
    node.home.chmod(0o700)
    stop = threading.Event()
    for name in (signal.SIGTERM, signal.SIGINT):
        signal.signal(name, lambda *_: stop.set())
    say(console, f"client {node.partition}: waiting for {node.superlink} …")
    while not node.reach() and not stop.wait(1.0):
        pass
    children = [Child(job) for job in node.jobs()]
    told: list[dict[str, int | None]] = []

    def note() -> None:
        """Who is running, for `--health`."""
        now = {child.job.name: child.pid for child in children}
        if told[-1:] != [now]:
            told[:] = [now]
            durable.write_atomic(node.home / "node.json", json.dumps(now).encode(), flush=False)

    tend(children, stop, lambda child, code: say(console, _ended(child, code)), note)
    (node.home / "node.json").unlink(missing_ok=True)
    say(console, f"client {node.partition}: ended")


def _ended(child: Child, code: int) -> str:
    """What a user should know of a process that ended."""
    if REFUSED in child.said():
        return (
            "the server refuses this node: it does not know its key (`fedstrata deploy run` registers those in the "
            "server's nodes/), or a SuperNode with this key was alive less than a minute ago; trying again"
        )
    how = f"signal {-code}" if code < 0 else f"code {code}"
    return f"{child.job.name} ended ({how}); it is started again; {child.job.log} says more"


def healthy(home: Path) -> bool:
    """Whether all of a node's processes are running."""
    try:
        told = json.loads((home / "node.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return set(told) == set(NAMES) and all(pid is not None and alive(pid) for pid in told.values())


def say(console: Console, line: str) -> None:
    console.print(f"{time.strftime('%H:%M:%S')} {line}", highlight=False, markup=False, soft_wrap=True)


def write_secret(path: Path) -> None:
    """32 random bytes as text, for the owner alone."""
    path.unlink(missing_ok=True)
    path.touch(mode=0o600)
    path.write_text(secrets.token_hex(32), encoding="ascii")


def free_port() -> int:
    """A loopback port that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
