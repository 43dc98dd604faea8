"""What an administrator is told before the first run and while one goes on."""

import http.server
import io
import json
import re
import ssl
import threading
from collections.abc import Callable, Iterator
from email.utils import formatdate
from pathlib import Path

import pytest
from rich.console import Console

from fedstrata.core.errors import BadInput
from fedstrata.server import deploycheck, deploykeys, deploystatus
from fedstrata.server.deploycheck import Finding
from fedstrata.server.deployflower import Place, place_of

Serve = Callable[..., str]


@pytest.fixture(scope="module")
def keys(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("keys")
    deploykeys.make(folder, 1)
    return folder


@pytest.fixture
def serve(keys: Path) -> Iterator[Serve]:
    """An HTTPS server with the gate's certificate; `control` is its answer to POST, `late` how wrong its clock is."""
    started: list[http.server.HTTPServer] = []

    def start(control: int = 403, late: float = 0.0) -> str:
        class Handler(http.server.BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                self._say(200)

            def do_POST(self) -> None:
                self._say(control)

            def _say(self, status: int) -> None:
                self.send_response(status)
                self.send_header("Content-Length", "0")
                self.end_headers()

            def date_time_string(self, timestamp: float | None = None) -> str:
                import time

                return formatdate(time.time() - late, usegmt=True)

            def log_message(self, format: str, *args: object) -> None:
                """Tests are quiet."""

        server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(keys / "gate" / "gate.crt", keys / "gate" / "gate.key")
        server.socket = context.wrap_socket(server.socket, server_side=True)
        threading.Thread(target=server.serve_forever, daemon=True).start()
        started.append(server)
        return f"127.0.0.1:{server.server_address[1]}"

    yield start
    for server in started:
        server.shutdown()
        server.server_close()


def check(address: str, certs: Path) -> dict[str, Finding]:
    return {found.what: found for found in deploycheck.findings(Place(address, certs, certs), {})}


def test_a_client_host_in_order_has_nothing_bad(keys: Path, serve: Serve) -> None:
    found = check(serve(), keys / "client-0")
    assert [each.what for each in found.values() if not each.good] == []
    assert {"node.key", "ca.crt", "port", "clock", "control API"} <= set(found)


def test_a_control_api_that_a_client_can_reach_is_bad(keys: Path, serve: Serve) -> None:
    found = check(serve(control=200), keys / "client-0")["control API"]
    assert not found.good
    assert "must be refused with 403, got 200; put the gate in front" in found.why


def test_a_clock_a_minute_late_is_bad(keys: Path, serve: Serve) -> None:
    found = check(serve(late=60), keys / "client-0")["clock"]
    assert not found.good
    assert re.search("6[0-9] s apart; 30 s are allowed", found.why)


def test_another_authority_is_bad_and_says_so(keys: Path, serve: Serve, tmp_path: Path) -> None:
    deploykeys.make(tmp_path, 1)
    found = check(serve(), tmp_path / "client-0")["port"]
    assert not found.good
    assert "TLS fails: CERTIFICATE_VERIFY_FAILED" in found.why


def test_a_port_where_nobody_listens_is_bad(keys: Path) -> None:
    found = check("127.0.0.1:9", keys / "server")["port"]
    assert (found.good, found.why) == (False, "127.0.0.1:9: Connection refused")


def test_a_key_that_others_can_read_is_bad(tmp_path: Path) -> None:
    deploykeys.make(tmp_path, 1)
    (tmp_path / "client-0" / "node.key").chmod(0o640)
    found = check("127.0.0.1:9", tmp_path / "client-0")["node.key"]
    assert (found.good, found.why) == (False, "mode 0640: must be 0600")


def test_a_certificate_near_its_end_names_the_way_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(deploykeys, "CERTIFICATE_DAYS", 3)
    deploykeys.make(tmp_path, 1)
    found = check("127.0.0.1:9", tmp_path / "server")
    assert found["ca.crt"].good
    hint = "ends in 2 days; where the authority is kept: `fedstrata deploy keys --to KEYS --rotate server`"
    assert hint in found["server.crt"].why


@pytest.mark.parametrize(
    ("environment", "rule"),
    [
        ({}, "FEDSTRATA_SUPERLINK: must be host:port"),
        ({"FEDSTRATA_SUPERLINK": "gate", "FEDSTRATA_HOME": "/x"}, "FEDSTRATA_SUPERLINK: must be host:port"),
        ({"FEDSTRATA_SUPERLINK": "gate:1"}, "FEDSTRATA_HOME: must be a folder"),
        (
            {"FEDSTRATA_SUPERLINK": "gate:1", "FEDSTRATA_HOME": "/x", "FEDSTRATA_CERTS": "/x"},
            "FEDSTRATA_CERTS: /x holds no ca.crt",
        ),
    ],
)
def test_an_environment_that_is_not_whole_is_bad_input(environment: dict[str, str], rule: str) -> None:
    with pytest.raises(BadInput, match=rule):
        place_of(environment, insecure=False)


def test_only_this_machine_is_spoken_to_without_tls() -> None:
    told = {"FEDSTRATA_SUPERLINK": "fed.example.org:8000", "FEDSTRATA_HOME": "/x"}
    with pytest.raises(BadInput, match="--insecure: must be used with a SuperLink on this machine alone"):
        place_of(told, insecure=True)
    assert place_of({**told, "FEDSTRATA_SUPERLINK": "127.0.0.1:8000"}, insecure=True).certs is None


def test_status_says_where_the_run_stands_and_when_each_client_took_part(write_run: Callable[..., Path]) -> None:
    told = deploystatus.standing(write_run())
    assert (told["stage"], told["round"], told["bytes_up"], told["bytes_down"]) == (2, 1, 3000, 6000)
    assert {name: (seen["stage"], seen["round"]) for name, seen in told["seen"].items()} == {
        "client-3": (2, 1),
        "client-5": (1, 1),
    }


def test_status_knows_which_node_was_refused_last_and_why(write_run: Callable[..., Path]) -> None:
    run = write_run()
    with (run / "events.jsonl").open("a") as file:
        for when, why in (("noon", "silent"), ("one", "app: must be the bundle of fedstrata 0.1.0")):
            file.write(json.dumps({"event": "node_refused", "time": when, "node": "7", "reason": why}) + "\n")
    refused = {"7": {"time": "one", "reason": "app: must be the bundle of fedstrata 0.1.0"}}
    assert deploystatus.standing(run)["refused"] == refused


def test_status_names_connected_clients_and_their_last_round() -> None:
    seen = {"client-0": {"time": "noon", "stage": 1, "round": 2}}
    run = {
        "folder": "/runs/a",
        "stage": 1,
        "round": 2,
        "bytes_up": 2_000_000,
        "bytes_down": 1,
        "seen": seen,
        "refused": {"78": {"time": "noon", "reason": "signature: not its own"}},
    }
    node = {"client": "client-0", "node": "77", "status": "online", "online": "10:00", "offline": ""}
    out = io.StringIO()
    runs = [{"run-id": "5", "status": "running", "status-details": "", "elapsed": 1}]
    deploystatus.show({"nodes": [node], "runs": runs, "run": run}, Console(file=out, width=200))
    assert "stage 1 round 2, noon" in out.getvalue()
    assert "Flower run 5: running" in out.getvalue()
    assert "stage 1 round 2 committed, 2 MB up" in out.getvalue()
    assert "node 78 was refused, last noon: signature: not its own" in out.getvalue()
