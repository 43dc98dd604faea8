"""`flwr run` on this repository: stock Flower simulation serves the same ServerApp and ClientApp."""

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from fedstrata.core.errors import BadInput
from fedstrata.server import app, configure, launch

ROOT = Path(__file__).resolve().parents[2]
BIN = Path(sys.executable).parent
SMALL = ["federation.rounds_per_stage=1", "train.local_epochs=1", "lora.targets=[q_proj, v_proj]"]


@pytest.fixture
def flower(tmp_path: Path) -> Iterator[dict[str, str]]:
    """The environment of a Flower installation of the test's own; what it started is ended afterwards."""
    home = tmp_path / "flwr-home"
    home.mkdir()
    http, control = free_ports(2)
    yield {
        **os.environ,
        "PATH": f"{BIN}{os.pathsep}{os.environ['PATH']}",
        "FLWR_HOME": str(home),
        "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",
        "FLWR_DISABLE_UPDATE_CHECK": "1",
        "FLWR_TELEMETRY_ENABLED": "0",
        "RAY_USAGE_STATS_ENABLED": "0",
        "FLWR_LOCAL_SUPERLINK_HTTP_API_PORT": str(http),
        "FLWR_LOCAL_CONTROL_API_PORT": str(control),
    }
    end(home)


def free_ports(count: int) -> list[int]:
    sockets = [socket.socket() for _ in range(count)]
    try:
        for each in sockets:
            each.bind(("127.0.0.1", 0))
        return [int(each.getsockname()[1]) for each in sockets]
    finally:
        for each in sockets:
            each.close()


def end(home: Path) -> None:
    """Ends the SuperLink, which `flwr run` leaves running, and its children: they alone have this FLWR_HOME."""
    for which in (signal.SIGTERM, signal.SIGKILL):
        deadline = time.monotonic() + 15
        for pid in started(home):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, which)
        while started(home) and time.monotonic() < deadline:
            time.sleep(0.2)


def started(home: Path) -> list[int]:
    """Processes whose environment names this FLWR_HOME."""
    found = []
    for path in Path("/proc").glob("[0-9]*/environ"):
        try:
            if f"FLWR_HOME={home}".encode() in path.read_bytes().split(b"\0"):
                found.append(int(path.parent.name))
        except OSError:  # ended meanwhile, or not ours to read
            continue
    return found


def flwr(environment: dict[str, str], folder: Path, *words: str) -> str:
    done = subprocess.run(
        [str(BIN / "flwr"), *words],
        cwd=folder,
        env=environment,
        text=True,
        capture_output=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def summary(folder: Path) -> dict[str, Any]:
    tree: dict[str, Any] = json.loads((folder / "summary.json").read_text(encoding="utf-8"))
    return tree


@pytest.mark.skipif(not Path("/proc/self/environ").exists(), reason="the SuperLink is found through /proc")
def test_flwr_run_gives_the_same_bits_as_fedstrata_run(flower: dict[str, str], tmp_path: Path) -> None:
    folder = tmp_path / "a run"
    words = " ".join(f"'{word}'" for word in (f"run.dir={folder}", *SMALL))
    said = flwr(
        flower,
        tmp_path,
        *("run", str(ROOT), "--stream"),
        *("--run-config", f'recipe="fcit-mini-short" overrides="{words}"'),
        *("--federation-config", "num-supernodes=4 client-resources-num-cpus=1"),
    )
    listed = json.loads(flwr(flower, tmp_path, "ls", "--format", "json"))
    assert [run["status"] for run in listed["runs"]] == ["finished:completed"], said  # flwr run exits with 0 anyway

    ours = ["federation.grid=inprocess", "federation.cohort_size=1", f"run.dir={tmp_path / 'ours'}"]
    launch.run(configure.resolve("fcit-mini-short", [*SMALL, *ours]), Console(quiet=True))
    theirs, alone = summary(folder), summary(tmp_path / "ours")
    assert theirs["status"] == "completed"
    for key in ("final_state_sha256", "scenario_hash", "last", "bytes_up", "bytes_down", "bytes_eval"):
        assert theirs[key] == alone[key], key
    (bundle,) = (Path(flower["FLWR_HOME"]) / "apps").iterdir()
    bundled = {path.relative_to(bundle).as_posix(): path for path in bundle.rglob("*") if path.is_file()}
    assert {"pyproject.toml", "client/app.py", "server/app.py", "scenarios/library/fcit-mini.yaml"} <= set(bundled)
    assert not [name for name in bundled if name.startswith(("tests/", "client/tiny/", "."))]
    assert sum(path.stat().st_size for path in bundled.values()) < 2_000_000  # Flower refuses 10 MB, zipped


def test_quoted_overrides_are_read_as_a_shell_reads_them() -> None:
    words = "lora.targets='[q_proj, v_proj]' run.dir=\"/tmp/my runs\" federation.cohort_size=9"
    config = app._config("fcit-mini-short", words)
    assert config.lora.targets == ["q_proj", "v_proj"]
    assert config.run.dir == "/tmp/my runs"
    assert (config.federation.grid, config.federation.cohort_size) == ("flower", "1")  # what Flower will do


def test_an_open_quote_in_the_overrides_is_bad_input() -> None:
    with pytest.raises(BadInput, match="overrides: not words as a shell reads them"):
        app._config("", "run.dir='/tmp")
