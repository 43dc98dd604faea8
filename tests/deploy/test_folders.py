"""Clients with folders of their own: equal to the simulation, bit for bit, and nothing but what is declared leaves."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import yaml
from flwr.app import ArrayRecord, Error, Message
from flwr.common.serde import message_from_proto
from flwr.proto.message_pb2 import Message as Proto
from rich.console import Console

from fedstrata.core import records, signing
from fedstrata.core.errors import BadInput, Interrupted
from fedstrata.server import configure, launch, splitting
from fedstrata.server.preparing import lineage_of
from fedstrata.server.runfolder import RunFolder
from fedstrata.server.signed import SignedGrid
from tests.deploy.folders import FIRST, Folders

SMALL = ["federation.rounds_per_stage=1", "train.local_epochs=1", "lora.targets=[q_proj, v_proj]"]
QUIET = Console(quiet=True)
ONE = "federation.cohort_size=1"
CANARY = "zyxcanary"


@pytest.fixture(scope="module")
def split(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """fcit-mini-short over three folders."""
    folder = tmp_path_factory.mktemp("split")
    splitting.split(splitting.resolve("fcit-mini-short", [], 3), folder)
    return folder


def deployed(split: Path, folder: Path, grid: Any, *words: str) -> RunFolder:
    all_words = [*SMALL, ONE, "federation.grid=flower", "evaluate.shard=100", f"run.dir={folder}", *words]
    launch.run(configure.resolve(str(split / "server" / "scenario.yaml"), all_words), QUIET, grid)
    return RunFolder(folder)


def trust(grid: Folders) -> SignedGrid:
    return SignedGrid(grid, signing.public_keys(grid.public))


def events(run: RunFolder, name: str) -> list[Mapping[str, Any]]:
    return [event for event in run.events() if event["event"] == name]


def test_own_folders_train_to_the_same_bits_as_the_simulation(
    split: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = [*SMALL, ONE, "federation.clients=3", "federation.clients_per_round=2", "federation.upload=int8"]
    there = ["federation.grid=inprocess", f"run.dir={tmp_path / 'simulated'}"]
    launch.run(configure.resolve("fcit-mini-short", [*words, *there]), QUIET)
    simulated = RunFolder(tmp_path / "simulated")
    grid = Folders(split, 3, tmp_path, monkeypatch)
    found = deployed(split, tmp_path / "run", trust(grid), "federation.upload=int8")  # int8: clients have to remember
    for key in ("final_state_sha256", "bytes_up", "bytes_down", "last", "routing_accuracy", "rejected"):
        assert found.summary[key] == simulated.summary[key], key
    assert found.matrix.scores == simulated.matrix.scores
    assert found.matrix.counts == simulated.matrix.counts
    assert all(not path.read_text() for path in (found.path / "predictions").iterdir())
    uploads(grid)


def uploads(grid: Folders) -> None:
    """Every reply that left a client: the declared records and tensors, and nothing else."""
    allowed = {records.ARRAYS, records.METRICS, records.META, signing.SIGNATURE}
    tensors = set()
    for data in grid.uploads:
        reply = message_from_proto(Proto.FromString(data))
        assert set(reply.content) <= allowed
        for record in reply.content.values():
            tensors |= set(record) if isinstance(record, ArrayRecord) else set()
    assert tensors == {"token", "flat.int8", "flat.scales"}


def test_no_word_of_a_clients_data_or_paths_leaves_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Canaries in instructions, answers, ids, picture names and the folder's own name; errors among the replies."""
    split = tmp_path / CANARY
    splitting.split(splitting.resolve("fcit-mini-short", [], 2), split)
    for path in split.glob("client-*/*/*.json"):
        rows = json.loads(path.read_text())
        for row in rows:
            image = path.parent / "images" / row["image"]
            row["image"] = f"{CANARY}-{row['image']}"
            row["id"] = f"{CANARY}{row['id']}"
            image.rename(image.with_name(row["image"]))
            row["conversations"][0]["value"] += f" {CANARY}"
            row["conversations"][1]["value"] += f" {CANARY}"
        path.write_text(json.dumps(rows))
    grid = Folders(split, 2, tmp_path / "homes", monkeypatch)

    def before(message: Message) -> None:
        """In stage 2 client 1's pictures are gone: its error would name their path."""
        if records.binding(message).stage == 2:
            for path in (split / "client-1" / "charts" / "images").glob("*train-*"):
                path.unlink()

    monkeypatch.setattr(grid, "before", before)
    run = deployed(split, tmp_path / "run", trust(grid))
    (failed,) = events(run, "rejected")
    assert failed["reason"] == "the client failed: BadInput; the client's own log says more"
    assert len(grid.uploads) > 12
    assert not [data for data in grid.uploads if CANARY.encode() in data]


def test_a_node_that_answers_for_another_is_refused_and_costs_nobody_else_anything(
    split: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    grid = Folders(split, 3, tmp_path, monkeypatch)
    honest, replayed, key = grid.serve, list[Message](), grid.trainers[1]._key
    assert key is not None

    def serve(client: int, message: Message) -> Message:
        """Client 2's training is answered by client 1, signed with its own key; later client 2 replays an answer.

        Then an error comes in the place of client 1's answer, and nobody signed it.
        """
        if message.metadata.message_type != records.TRAIN or client == 0:
            return honest(client, message)
        if client == 1:
            wrong = Message(Error(2, "client 1 is at fault"), reply_to=message)
            return wrong if records.binding(message).stage == 2 else honest(client, message)
        if not replayed:
            replayed.append(honest(client, message))
            forged = honest(client, message)
            signing.sign(forged, records.binding(message), message.metadata.message_id, key)
            return forged
        old = replayed[0]
        old.metadata.__dict__["_reply_to_message_id"] = message.metadata.message_id
        return old

    monkeypatch.setattr(grid, "serve", serve)
    run = deployed(split, tmp_path / "run", trust(grid), "federation.clients_per_round=3", "strategy.name=finetune")
    forged, silent, replay = events(run, "rejected")
    assert [(event["client"], event["kind"]) for event in (forged, replay)] == [(2, "signature")] * 2
    assert forged["reason"] == "signature: client 2 did not sign this answer to this message"
    assert (silent["client"], silent["kind"]) == (1, "silent")
    flowers = "no answer; an error that nobody signed, as Flower makes them for nodes that are gone, says"
    assert silent["reason"] == f"{flowers} 'client 1 is at fault' (code 2)"
    trained = [[row["client"] for row in event["participants"]] for event in events(run, "round")]
    assert trained == [[0, 1], [0]]


def test_a_node_without_a_known_key_does_not_get_in(
    split: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    grid = Folders(split, 2, tmp_path, monkeypatch)
    keys = {0: signing.public_keys(grid.public)[0]}
    run = deployed(split, tmp_path / "run", SignedGrid(grid, keys), "strategy.name=finetune")
    assert {client for client, kind in grid.asked if kind == records.TRAIN} == {0}
    (first, *_) = events(run, "node_refused")
    assert first["reason"] == "signature: the node that was asked has no key that the server knows"


def test_clients_come_and_go_and_a_latecomer_gets_the_nearest_subspace(
    split: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    grid = Folders(split, 3, tmp_path, monkeypatch)
    grid.there = {0, 1}

    def before(message: Message) -> None:
        """Client 2 joins before the second round of a stage, client 0 leaves over a message of the same round."""
        at = records.binding(message)
        if message.metadata.message_type == records.TRAIN and (at.stage, at.round) == (1, 1):
            grid.there.add(2)
        if message.metadata.message_type == records.TRAIN and (at.stage, at.round) == (1, 2):
            grid.there.discard(0)

    monkeypatch.setattr(grid, "before", before)
    words = ("federation.clients_per_round=3", "federation.rounds_per_stage=2", "federation.timeout=0.5")
    run = deployed(split, tmp_path / "run", trust(grid), *words)
    assert [event["client"] for event in events(run, "joined")][:1] == [2]
    assert [event["client"] for event in events(run, "left")] == [0]
    rounds = events(run, "round")
    who = [{row["client"]: row["subspace"] for row in event["participants"]} for event in rounds]
    assert who[0] == {0: 0, 1: 0}
    assert who[1] == {1: 0, 2: 0}  # client 0 was gone; the latecomer trains the subspace that was there
    assert rounds[1]["opened"] == []
    assert all(set(found) == {1, 2} for found in who[2:])
    assert run.summary["status"] == "completed"


def test_a_client_without_data_of_a_stage_is_not_asked_to_train_it(
    split: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    copied = tmp_path / "split"
    for client in range(2):
        folder = copied / f"client-{client}"
        folder.parent.mkdir(exist_ok=True)
        folder.symlink_to(split / f"client-{client}")
    (copied / "server").symlink_to(split / "server")
    (copied / "client-1").unlink()
    (copied / "client-1").mkdir()
    (copied / "client-1" / "names").symlink_to(split / "client-1" / "names")
    tree = yaml.safe_load((split / "client-1" / "scenario.yaml").read_text())
    del tree["tasks"]["charts"]
    (copied / "client-1" / "scenario.yaml").write_text(yaml.safe_dump({**tree, "stages": [["names"], []]}))
    grid = Folders(copied, 2, tmp_path, monkeypatch)
    run = deployed(copied, tmp_path / "run", trust(grid), "strategy.name=finetune")
    trained = [[row["client"] for row in event["participants"]] for event in events(run, "round")]
    assert trained == [[0, 1], [0]]
    assert run.matrix.counts[-1]["charts"] if isinstance(run.matrix.counts[-1], dict) else run.matrix.counts[-1][1] > 0


def test_a_deployed_run_keeps_its_name_when_it_is_resumed_and_another_of_its_config_has_another(
    split: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Clients keep what they remember by this name: a second run must not find what the first one left."""
    grid, trained = Folders(split, 2, tmp_path / "homes", monkeypatch), list[records.Binding]()
    last = 2

    def before(message: Message) -> None:
        """Ctrl-C over the first message to train that is not of the first `last` ones."""
        if message.metadata.message_type == records.TRAIN:
            trained.append(records.binding(message))
            if len(trained) > last:
                raise KeyboardInterrupt

    monkeypatch.setattr(grid, "before", before)
    words = ("strategy.name=finetune", "federation.clients_per_round=2", "evaluate.split=val")
    with pytest.raises(Interrupted):
        deployed(split, tmp_path / "run", grid, *words)
    with pytest.raises(Interrupted):
        launch.resume(tmp_path / "run", QUIET, grid)
    with pytest.raises(Interrupted):
        deployed(split, tmp_path / "again", grid, *words)
    assert [at.stage for at in trained] == [1, 1, 2, 2, 1]
    assert len({at.run for at in trained[:4]}) == 1
    assert trained[4].run != trained[0].run


def test_the_name_of_a_simulation_follows_from_its_config() -> None:
    config = configure.resolve("fcit-mini-short", [])
    assert lineage_of(config) == lineage_of(config)
    there = configure.resolve("fcit-mini-short", ["federation.grid=flower"])
    assert lineage_of(there) != lineage_of(there)


def test_a_scenario_of_the_clients_data_runs_in_a_deployment_only(split: Path, tmp_path: Path) -> None:
    words = ["federation.grid=inprocess", f"run.dir={tmp_path / 'run'}"]
    with pytest.raises(BadInput, match="clients hold its data; it runs in a deployment only"):
        launch.run(configure.resolve(str(split / "server" / "scenario.yaml"), words), QUIET)
    assert not (tmp_path / "run").exists()


def test_what_folders_cannot_say_is_not_split(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match="scenario.name: must be homogeneous, with arrival kind stages"):
        splitting.split(splitting.resolve("fcit-mini-het", [], 5), tmp_path)
    task = "{generate: fcit-mini/names, train: 8, val: 2, test: 2, metric: cider}"
    (tmp_path / "captions.yaml").write_text(f"tasks: {{a: {task}}}\nstages: [[a]]\n")
    with pytest.raises(BadInput, match="tasks.a.metric: must be one that adds up over clients"):
        splitting.split(splitting.resolve(str(tmp_path / "captions.yaml"), [], 2), tmp_path)
    (tmp_path / "client-0").mkdir()
    (tmp_path / "client-0" / "something").touch()
    with pytest.raises(BadInput, match="--to: .*client-0 must be new or empty"):
        splitting.split(splitting.resolve("fcit-mini-short", [], 2), tmp_path)


def test_a_client_is_told_which_tasks_are_asked_for_only_by_name(
    split: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its own file lists them in another order; FIRST is the node of partition 0."""
    copied = tmp_path / "client-0"
    copied.mkdir()
    tree = yaml.safe_load((split / "client-0" / "scenario.yaml").read_text())
    for name in tree["tasks"]:
        (copied / name).symlink_to(split / "client-0" / name)
    tree["tasks"] = dict(reversed(tree["tasks"].items()))
    (copied / "scenario.yaml").write_text(yaml.safe_dump(tree, sort_keys=False))
    (tmp_path / "server").symlink_to(split / "server")
    hashes = []
    for number, folders in enumerate((split, tmp_path)):
        grid = Folders(folders, 1, tmp_path / f"homes{number}", monkeypatch)
        assert list(grid.get_node_ids()) == [FIRST]
        run = deployed(folders, tmp_path / f"run{number}", trust(grid), "strategy.name=finetune")
        hashes.append(run.summary["final_state_sha256"])
    assert hashes[0] == hashes[1]
