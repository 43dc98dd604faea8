"""A deployment as plain processes: SuperLink with TLS, node keys and a database, and three `fedstrata deploy node`."""

import json
import os
import signal
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from fedstrata.core import flowerapp
from fedstrata.core.errors import BadInput
from fedstrata.server import configure, deploykeys, deploynodes, deployrun, launch, splitting
from fedstrata.server.deployflower import Flower, Place
from fedstrata.server.node import Node, free_port
from fedstrata.server.runfolder import RunFolder
from tests.deploy.processes import Deployment

SMALL = ["train.local_epochs=1", "lora.targets=[q_proj, v_proj]", "strategy.name=finetune"]
SMALL += ["evaluate.shard=200", "federation.cohort_size=1"]
SCENARIO = """
tasks:
  names: {generate: fcit-mini/names, train: 60, val: 0, test: 15}
stages: [[names]]
defaults:
  federation: {clients: 3, clients_per_round: 2, rounds_per_stage: 2}
"""


@pytest.fixture(scope="module")
def deployment(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Deployment]:
    """The server's two processes, and data for three clients."""
    root = tmp_path_factory.mktemp("d")
    (root / "small.yaml").write_text(SCENARIO, encoding="utf-8")
    splitting.split(splitting.resolve(str(root / "small.yaml"), [], 3), root / "split")
    made = Deployment(root, root / "split", 3)
    made.serve()
    yield made
    made.close()


def told(folder: Path) -> list[Mapping[str, Any]]:
    path = folder / "events.jsonl"
    return [json.loads(text) for text in path.read_text().splitlines()] if path.exists() else []


def test_real_clients_come_to_the_simulations_bits_although_a_trainer_is_killed_over_its_message(
    deployment: Deployment, tmp_path: Path
) -> None:
    for client in range(3):
        deployment.node(client)
    deployment.until(lambda: all(all([*deployment.pids(c).values(), deployment.pids(c)]) for c in range(3)))
    folder = deployment.root / "run"
    deployment.submit(folder, SMALL)

    words = [*SMALL, "federation.grid=inprocess", f"run.dir={tmp_path / 'sim'}"]
    launch.run(configure.resolve(str(deployment.root / "small.yaml"), words), Console(quiet=True))
    simulated = RunFolder(tmp_path / "sim").summary

    deployment.until(lambda: [event for event in told(folder) if event["event"] == "stage_scored"], 240)
    trainers = {client: deployment.pids(client)["trainer"] for client in range(3)}
    for pid in trainers.values():
        os.kill(pid or 0, signal.SIGSTOP)  # whoever is asked to train now has its message in hand and waits
    asked = deployment.until(lambda: [c for c in range(3) if "Receiving: train message" in heard(deployment, c)])
    os.kill(trainers[asked[0]] or 0, signal.SIGKILL)
    for client in set(trainers) - {asked[0]}:
        os.kill(trainers[client] or 0, signal.SIGCONT)
    deployment.until(lambda: (folder / "summary.json").exists(), 300)

    found = RunFolder(folder).summary
    assert found["status"] == "completed", deployment.logs()
    for key in ("final_state_sha256", "last", "bytes_up", "bytes_down"):
        assert found[key] == simulated[key], key
    assert found["rejected"] == {}
    assert found["skipped_rounds"] == 0
    assert deployment.pids(asked[0])["trainer"] != trainers[asked[0]]
    assert "trainer ended (signal 9); it is started again" in (deployment.root / f"node{asked[0]}.log").read_text()


def heard(deployment: Deployment, client: int) -> str:
    return (deployment.root / f"n{client}" / "logs" / "flower-supernode.log").read_text()


FOREIGN = {
    "foreign_server.py": """
import json, pathlib
from flwr.app import Message, RecordDict
from flwr.serverapp import ServerApp
app = ServerApp()
@app.main()
def main(grid, context):
    sent = [Message(RecordDict(), node, "query") for node in grid.get_node_ids()]
    told = [reply.error.reason if reply.has_error() else "served" for reply in grid.send_and_receive(sent, timeout=90)]
    pathlib.Path({told!r}).write_text(json.dumps(told))
""",
    "foreign_client.py": """
import pathlib
pathlib.Path({loaded!r}).touch()
from flwr.clientapp import ClientApp
app = ClientApp()
@app.query()
def query(message, context):
    return Message(RecordDict(), reply_to=message)
""",
}


def test_a_foreign_app_is_refused_and_none_of_its_code_is_loaded(deployment: Deployment) -> None:
    """Submitted by the server's own host, under our name and version: nodes serve what is installed, or nothing."""
    if "node0" not in deployment.started:
        deployment.node(0)
    deployment.until(lambda: all([*deployment.pids(0).values(), deployment.pids(0)]))
    app, told, loaded = flowerapp.write(deployment.root / "evil"), deployment.root / "told", deployment.root / "loaded"
    own = (app / "pyproject.toml").read_text()
    foreign = own.replace(flowerapp.SERVER_APP, "foreign_server:app").replace(
        flowerapp.CLIENT_APP, "foreign_client:app"
    )
    (app / "pyproject.toml").write_text(foreign)
    for name, text in FOREIGN.items():
        (app / name).write_text(text.format(told=str(told), loaded=str(loaded)))
    deployment.until(lambda: online(deployment))
    done = deployment.flwr("run", str(app), "tls")
    assert done.returncode == 0, done.stdout + done.stderr
    replies = json.loads(deployment.until(lambda: told.exists() and told.read_text(), 150))
    assert replies
    for reply in replies:
        assert "app: must be the bundle of fedstrata" in reply
    assert not loaded.exists()
    assert not list(deployment.root.glob("n0/flwr/apps/*"))  # nothing was unpacked either, not even our own
    log = (deployment.root / "n0" / "logs" / "flower-superexec.log").read_text()
    assert log.count("BadInput: app: must be the bundle of fedstrata") == 1


def online(deployment: Deployment) -> bool:
    return '"online"' in deployment.flwr("supernode", "ls", "tls", "--format", "json").stdout


def test_a_real_superlink_shuts_out_a_key_that_was_registered_by_hand(deployment: Deployment, tmp_path: Path) -> None:
    deploykeys.make(tmp_path / "strangers", 1)
    assert deployment.register(tmp_path / "strangers" / "client-0" / "node.pub")
    flower = Flower(Place(f"127.0.0.1:{deployment.port}", deployment.keys / "server", tmp_path / "home"))
    (stranger,) = [node for name, node in deploynodes.named(flower.nodes(), flower.place) if not name]
    told = f"{stranger.node_id}: shut out, its key is not in nodes/"
    assert deploynodes.register(flower) == [told]  # the clients' own were registered by hand, too, and stay
    clients = ["client-0", "client-1", "client-2"]
    assert sorted(name for name, _ in deploynodes.named(flower.nodes(), flower.place)) == clients
    assert not deployment.register(tmp_path / "strangers" / "client-0" / "node.pub")  # Flower takes no key twice


def test_what_a_real_superlink_says_of_a_run_is_what_was_asked_and_why_the_server_refused_it(
    deployment: Deployment, tmp_path: Path
) -> None:
    place = Place(f"127.0.0.1:{deployment.port}", deployment.keys / "server", tmp_path / "home")
    flower, asked = Flower(place), deployrun.settings(place, "no-such-scenario", ["run.dir=/runs/a b"], "resume")
    run = deployrun.submit(flower, asked)
    assert flower.settings(run) == asked
    assert deployrun.folder_of(flower.settings(run)) == "/runs/a b"
    status, details = deployrun.watch(flower, run, lambda: None)
    assert status == "finished:failed"
    assert f"{flowerapp.REFUSED}recipe: unknown 'no-such-scenario'" in details


def test_a_node_whose_key_the_server_does_not_know_is_told_so(deployment: Deployment) -> None:
    deploykeys.make(deployment.root / "foreign", 1)
    stranger = deployment.root / "foreign" / "client-0"
    (stranger / "ca.crt").write_bytes((deployment.keys / "client-0" / "ca.crt").read_bytes())
    home = {"FEDSTRATA_HOME": str(deployment.root / "n9"), "FEDSTRATA_PARTITION": "2"}
    deployment.node(9, FEDSTRATA_DATA=str(deployment.split / "client-2"), FEDSTRATA_CERTS=str(stranger), **home)
    log = deployment.root / "node9.log"
    deployment.until(lambda: "the server refuses this node: it does not know its key" in log.read_text(), 90)
    deployment.started["node9"].terminate()


def node(deployment: Deployment, tmp_path: Path, certs: Path | None, superlink: str = "") -> Node:
    there = superlink or f"127.0.0.1:{deployment.port}"
    return Node(deployment.split / "client-0", tmp_path / "home", there, certs, 0)


def test_what_is_not_to_be_trusted_is_refused_before_anything_starts(deployment: Deployment, tmp_path: Path) -> None:
    own = deployment.keys / "client-0"
    assert node(deployment, tmp_path, own).reach()
    assert not node(deployment, tmp_path, own, f"127.0.0.1:{free_port()}").reach()  # not there yet: it waits
    deploykeys.make(tmp_path / "other", 1)
    other = tmp_path / "other" / "client-0"
    with pytest.raises(BadInput, match=r"ca.crt: the certificate of 127.0.0.1:\d+ is not one that it vouches for"):
        node(deployment, tmp_path, other).reach()
    (other / "node.key").chmod(0o644)
    with pytest.raises(BadInput, match=r"node.key: must be readable by its owner alone \(chmod 600\)"):
        node(deployment, tmp_path, other).check()
    (other / "node.key").unlink()
    with pytest.raises(BadInput, match="must be a folder with ca.crt and node.key, got 'no .*node.key'"):
        node(deployment, tmp_path, other).check()
    with pytest.raises(BadInput, match="--insecure: must be used with a SuperLink on this machine alone"):
        node(deployment, tmp_path, None, "192.0.2.1:8000").check()
    assert not (tmp_path / "home").exists()


def test_a_server_without_tls_is_refused(deployment: Deployment, tmp_path: Path) -> None:
    import http.server
    import threading

    with http.server.HTTPServer(("127.0.0.1", 0), http.server.BaseHTTPRequestHandler) as plain:
        threading.Thread(target=plain.serve_forever, daemon=True).start()
        where = f"127.0.0.1:{plain.server_port}"
        with pytest.raises(BadInput, match=f"FEDSTRATA_SUPERLINK: {where} does not speak TLS"):
            node(deployment, tmp_path, deployment.keys / "client-0", where).reach()
        plain.shutdown()
