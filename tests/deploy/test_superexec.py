"""Flower's SuperExec on a client's host: one ClientApp at a time, and no app but our own."""

import http.server
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from flwr.proto.runtime_pb2 import AcquireTaskRequest, AcquireTaskResponse
from flwr.proto.task_pb2 import Task

from fedstrata.core import flowerapp
from fedstrata.core.errors import BadInput
from fedstrata.server import clientapp, flower_private
from fedstrata.server.flower_private import ExecutionSpec, TaskType
from fedstrata.server.superexec import OneAtATime

LAUNCH = """
from fedstrata.server.flower_private import serve_superexec
from fedstrata.server.superexec import OneAtATime
serve_superexec(OneAtATime(["sh", "-c", 'echo $$ >> started; sleep 60']))
"""


class SuperNode(http.server.BaseHTTPRequestHandler):
    """Flower's Runtime API with a queue that is never empty: whoever asks for a ClientApp gets one to start."""

    asked: list[list[str]]

    def do_POST(self) -> None:
        request = AcquireTaskRequest.FromString(self.rfile.read(int(self.headers["Content-Length"])))
        self.asked.append(list(request.supported_task_types))
        answer = AcquireTaskResponse()
        if request.supported_task_types:
            task = Task(task_id=len(self.asked), run_id=1, type=str(TaskType.CLIENT_APP))
            answer = AcquireTaskResponse(task=task, token="0" * 16)
        body = answer.SerializeToString()
        self.send_response(200)
        self.send_header("Content-Type", "application/x-protobuf")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: object) -> None:
        """Says nothing."""


@pytest.fixture
def node() -> Iterator[http.server.ThreadingHTTPServer]:
    SuperNode.asked = []
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), SuperNode) as made:
        threading.Thread(target=made.serve_forever, daemon=True).start()
        yield made
        made.shutdown()


def until(there: "object", seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while not there():  # type: ignore[operator]
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_flowers_own_loop_starts_the_next_clientapp_when_the_last_one_has_ended(
    node: http.server.ThreadingHTTPServer, tmp_path: Path
) -> None:
    words = ["--runtime-api-address", f"127.0.0.1:{node.server_port}", "--insecure"]
    quick = {**os.environ, "FLWR_SUPEREXEC_TASK_POLL_INTERVAL": "0.05"}
    with subprocess.Popen([sys.executable, "-c", LAUNCH, *words], cwd=tmp_path, env=quick) as process:
        try:
            until(lambda: len(SuperNode.asked) >= 10)
            started = [int(pid) for pid in (tmp_path / "started").read_text().split()]
            assert len(started) == 1
            assert SuperNode.asked[:10] == [["flwr-clientapp"]] + 9 * [[]]  # nothing else is ever asked for
            os.kill(started[0], signal.SIGKILL)
            until(lambda: len((tmp_path / "started").read_text().split()) == 2)
        finally:
            process.terminate()
    for pid in (tmp_path / "started").read_text().split()[1:]:
        os.kill(int(pid), signal.SIGKILL)


def test_a_task_of_another_kind_is_not_started(tmp_path: Path) -> None:
    executor = OneAtATime(["touch", str(tmp_path / "started")])
    spec = ExecutionSpec(TaskType.AGENT_APP, "127.0.0.1:1", "token", True, None, False, None, True, 1)
    told = executor.launch(spec)
    assert (told.status, told.message) == ("failed", "this node serves ClientApps alone, not flwr-agentapp")
    assert executor.get_eligible_capacity(set(TaskType)) == ({TaskType.CLIENT_APP}, set())
    assert not (tmp_path / "started").exists()


@pytest.mark.filterwarnings("ignore:GitWildMatchPattern:DeprecationWarning")  # Flower's own
def test_one_bundle_is_let_in(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from flwr.cli.build import build_fab_from_disk

    own = build_fab_from_disk(flowerapp.write(tmp_path))
    monkeypatch.setenv(clientapp.OWN, flowerapp.own_hash())
    clientapp.check(own)
    (tmp_path / "evil.py").write_text("print(1)\n")
    rule = r"app: must be the bundle of fedstrata \S+ \(SHA-256 [0-9a-f]{16}…\), got '[0-9a-f]{16}…'"
    for foreign in (build_fab_from_disk(tmp_path), own + b"\0", b""):
        with pytest.raises(BadInput, match=rule):
            clientapp.check(foreign)


def test_a_bound_that_flower_would_no_longer_call_is_an_error() -> None:
    with pytest.raises(AttributeError, match="gone"):
        flower_private._replace("flwr.supernode.runtime.run_clientapp", "gone", None)
