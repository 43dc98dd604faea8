"""A whole deployment as plain processes on loopback: TLS, node keys, a database, process isolation."""

import contextlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from fedstrata.core import flowerapp
from fedstrata.server import deploykeys
from fedstrata.server.node import FLOWER, free_port
from fedstrata.server.supervise import bound

BIN = Path(sys.executable).parent


class Deployment:
    """Keys, a SuperLink with its SuperExec, and as many nodes as are started."""

    def __init__(self, root: Path, split: Path, clients: int) -> None:
        self.root, self.split, self.keys, self.port = root, split, root / "keys", free_port()
        self.started: dict[str, subprocess.Popen[bytes]] = {}
        deploykeys.make(self.keys, clients)
        flowerapp.write(root / "app")
        home = root / "flwr"
        home.mkdir()
        where = f'address = "127.0.0.1:{self.port}"\nroot-certificates = "{self.keys}/server/ca.crt"\n'
        (home / "config.toml").write_text(f'[superlink]\ndefault = "tls"\n[superlink.tls]\n{where}', encoding="utf-8")
        path = f"{BIN}{os.pathsep}{os.environ['PATH']}"
        self.environment = {**os.environ, **FLOWER, "PATH": path, "FLWR_HOME": str(home), "PYTHONWARNINGS": "ignore"}

    def serve(self) -> None:
        """The server's two processes; every client's key is registered."""
        own, secret = self.keys / "server", ["--superexec-auth-secret-file", f"{self.keys}/server/superexec.secret"]
        tls = ["--ssl-ca-certfile", f"{own}/ca.crt", "--ssl-certfile", f"{own}/server.crt"]
        tls += ["--ssl-keyfile", f"{own}/server.key", "--enable-supernode-auth", "--isolation", "process"]
        place = ["--host", "127.0.0.1", "--port", str(self.port), "--database", str(self.root / "state.db")]
        self.start("superlink", ["flower-superlink", *place, *tls, *secret], {})
        api = ["--runtime-api-address", f"127.0.0.1:{self.port}", "--root-certificates", f"{own}/ca.crt"]
        self.start("superexec", ["flower-superexec", *api, *secret], {"FEDSTRATA_NODES": str(own / "nodes")})
        for path in sorted((own / "nodes").glob("*.pub")):
            self.until(partial(self.register, path))

    def register(self, key: Path) -> bool:
        return self.flwr("supernode", "register", str(key), "tls").returncode == 0

    def node(self, client: int, **changes: str) -> subprocess.Popen[bytes]:
        """`fedstrata deploy node` of one client. changes: of its environment."""
        told = {
            "FEDSTRATA_DATA": str(self.split / f"client-{client}"),
            "FEDSTRATA_HOME": str(self.root / f"n{client}"),
            "FEDSTRATA_SUPERLINK": f"127.0.0.1:{self.port}",
            "FEDSTRATA_CERTS": str(self.keys / f"client-{client}"),
            "FEDSTRATA_PARTITION": str(client),
        }
        return self.start(f"node{client}", ["fedstrata", "deploy", "node"], {**told, **changes})

    def start(self, name: str, command: Sequence[str], more: dict[str, str]) -> subprocess.Popen[bytes]:
        with (self.root / f"{name}.log").open("ab") as log:
            process = subprocess.Popen(
                command, env={**self.environment, **more}, cwd=self.root, stdout=log, stderr=log, preexec_fn=bound
            )
        self.started[name] = process
        return process

    def flwr(self, *words: str) -> "subprocess.CompletedProcess[str]":
        command = [str(BIN / "flwr"), *words]
        told = {"env": self.environment, "cwd": self.root, "text": True, "capture_output": True}
        return subprocess.run(command, timeout=120, check=False, **told)  # type: ignore[call-overload, no-any-return]

    def submit(self, folder: Path, words: Sequence[str]) -> None:
        """A Flower run of the scenario."""
        overrides = " ".join(f"'{word}'" for word in (f"run.dir={folder}", *words))
        config = f'recipe="{self.split}/server/scenario.yaml" overrides="{overrides}"'
        done = self.flwr("run", str(self.root / "app"), "tls", "--run-config", config)
        assert done.returncode == 0, done.stdout + done.stderr

    def pids(self, client: int) -> dict[str, int | None]:
        """The processes of a node."""
        try:
            found: dict[str, int | None] = json.loads((self.root / f"n{client}" / "node.json").read_text())
        except (OSError, ValueError):
            return {}
        return found

    def until(self, there: Callable[[], Any], seconds: float = 120) -> Any:
        """Waits for something; fails with what the processes said."""
        deadline = time.monotonic() + seconds
        while not (found := there()):
            assert time.monotonic() < deadline, self.logs()
            time.sleep(0.3)
        return found

    def logs(self) -> str:
        paths = [*self.root.glob("*.log"), *self.root.glob("n*/logs/*.log")]
        return "\n".join(f"--- {path}\n{path.read_text(errors='replace')[-3000:]}" for path in paths)

    def close(self) -> None:
        for process in reversed(self.started.values()):
            with contextlib.suppress(ProcessLookupError):
                process.terminate()
        for process in self.started.values():
            try:
                process.wait(20)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
