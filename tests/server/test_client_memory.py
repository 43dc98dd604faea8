"""What simulated clients remember is part of every commit, and a resumed run goes on with it."""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from flwr.app import Array, ArrayRecord, Message, RecordDict
from rich.console import Console

from fedstrata.core import records
from fedstrata.core.errors import Interrupted
from fedstrata.core.records import Binding, TrainReply
from fedstrata.server import configure, launch, manifest
from fedstrata.server.checks import Kind, Refused
from fedstrata.server.flower_private import become_server
from fedstrata.server.gate import Expected, admit, read_train
from fedstrata.server.grids import InProcessGrid
from fedstrata.server.memory import CLIENT, Clients
from fedstrata.strategies.base import Parts

QUIET = Console(quiet=True)
SMALL = ["train.local_epochs=1", "evaluate.split=val", "federation.clients_per_round=3", "federation.cohort_size=2"]


def config(folder: Path, *words: str, grid: str = "inprocess", strategy: str = "scaffold") -> Any:
    chosen = [f"federation.grid={grid}", f"strategy.name={strategy}", f"run.dir={folder}"]
    return configure.resolve("fcit-mini-short", [*SMALL, *chosen, *words])


def final(folder: Path) -> str:
    return str(json.loads((folder / "summary.json").read_text())["final_state_sha256"])


class Stopping(InProcessGrid):
    """Stops with Ctrl-C instead of serving the `stop`-th unit of train messages; lists which clients it trained."""

    def __init__(self, stop: int = 0) -> None:
        super().__init__(4, 2)
        self.stop, self.units, self.trained = stop, 0, list[int]()

    def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None = None) -> Iterable[Message]:
        asked = list(messages)
        if asked and asked[0].metadata.message_type == records.TRAIN:
            self.units += 1
            if self.units == self.stop:
                raise KeyboardInterrupt
            self.trained += [message.metadata.dst_node_id - 2 for message in asked]
        return super().send_and_receive(asked, timeout=timeout)


def memories(grid: InProcessGrid) -> dict[int, bytes]:
    """What every client of a grid remembers."""
    states = {node: grid.state(node) for node in grid.get_node_ids()}
    return {node: state["memory"]["control"].numpy().tobytes() for node, state in states.items() if state}


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Stopping]:
    """A run that nobody disturbed, and its grid."""
    grid = Stopping()
    return launch.run(config(tmp_path_factory.mktemp("whole") / "run"), QUIET, grid), grid


@pytest.mark.parametrize("unit", [2, 3, 6])
def test_wherever_it_is_cut_a_resumed_run_ends_the_same(
    tmp_path: Path, whole: tuple[Path, Stopping], unit: int
) -> None:
    """Four rounds of two cohorts each: cut between rounds, or within one whose first cohort's replies are kept."""
    undisturbed, calm = whole
    with pytest.raises(Interrupted):
        launch.run(config(tmp_path / "run"), QUIET, Stopping(unit))
    grid = Stopping()
    launch.resume(tmp_path / "run", QUIET, grid)
    assert final(tmp_path / "run") == final(undisturbed)
    assert memories(grid) == memories(calm)
    assert len(memories(grid)) == 4
    done = sum(len(trained) for trained in split(calm.trained)[: unit - 1])
    assert grid.trained == calm.trained[done:]  # what was kept was not asked again


def split(trained: list[int]) -> list[list[int]]:
    """Cohorts of two and one, in turn."""
    cohorts, left = [], list(trained)
    while left:
        size = 1 if len(cohorts) % 2 else 2
        cohorts.append(left[:size])
        left = left[size:]
    return cohorts


def test_a_whole_cohort_that_is_asked_again_starts_from_what_it_remembered_before(
    tmp_path: Path, whole: tuple[Path, Stopping]
) -> None:
    with pytest.raises(Interrupted):
        launch.run(config(tmp_path / "run"), QUIET, Stopping(4))  # within round 2
    (kept,) = (tmp_path / "run" / "checkpoints").glob("round-1-2/train-*.reply")
    kept.write_bytes(kept.read_bytes()[:-1])  # a file that is not whole is not believed
    grid = Stopping()
    launch.resume(tmp_path / "run", QUIET, grid)
    assert final(tmp_path / "run") == final(whole[0])
    assert memories(grid) == memories(whole[1])


def test_back_at_an_earlier_stage_clients_remember_what_they_did_then(
    tmp_path: Path, whole: tuple[Path, Stopping]
) -> None:
    folder = launch.run(config(tmp_path / "run"), QUIET, grid := Stopping())
    launch.resume(folder, QUIET, grid, from_stage=2)  # a grid that remembers the whole run
    assert final(folder) == final(whole[0])
    assert memories(grid) == memories(whole[1])
    launch.resume(folder, QUIET, grid, from_stage=1)
    assert final(folder) == final(whole[0])


def test_a_new_run_begins_with_clients_that_remember_nothing(tmp_path: Path, whole: tuple[Path, Stopping]) -> None:
    grid = Stopping()
    for name in ("one", "two"):
        assert final(launch.run(config(tmp_path / name), QUIET, grid)) == final(whole[0])


def blobs_of(folder: Path) -> list[dict[str, str]]:
    """{client's tensor: blob} of every commit."""
    trees = [manifest.read(path).tree["memory_tensors"] for path in sorted((folder / "checkpoints").glob("0*.json"))]
    return [{name: blob for name, blob in tree.items() if name.startswith(CLIENT)} for tree in trees]


def test_commits_share_what_did_not_change(tmp_path: Path) -> None:
    folder = launch.run(config(tmp_path / "run", "federation.rounds_per_stage=1"), QUIET, grid := Stopping())
    start, first, trained, last = blobs_of(folder)  # before training, stage 1, the round of stage 2, stage 2
    drawn = [{f"{CLIENT}{partition}" for partition in round_} for round_ in (grid.trained[:3], grid.trained[3:])]
    assert start == {}
    assert set(first) == drawn[0]
    assert trained == last
    assert set(last) == drawn[0] | drawn[1]
    assert {name for name in last if first.get(name) != last[name]} == drawn[1]
    assert len(drawn[0] & drawn[1]) < 3  # somebody was not asked again


def test_a_method_without_memory_commits_none(tmp_path: Path) -> None:
    folder = launch.run(config(tmp_path / "run", strategy="fedprox"), QUIET)
    assert all(commit == {} for commit in blobs_of(folder))


def test_only_clients_that_were_trained_are_looked_at(tmp_path: Path) -> None:
    grid = InProcessGrid(3, 1)
    clients = Clients(grid, grid.roster)
    for node in grid.get_node_ids():
        grid.remember(node, RecordDict({"memory": records.arrays(control=np.ones(2, np.float32))}))
    clients.asked([1])
    assert set(clients.store(tmp_path)) == {"client.1"}
    assert set(clients.store(tmp_path)) == {"client.1"}  # still part of the next commit
    clients.asked([0, 2])
    stored = clients.store(tmp_path)
    assert set(stored) == {"client.0", "client.1", "client.2"}
    assert len(set(stored.values())) == 1  # equal memories are one blob


def test_of_a_grid_that_is_not_ours_nothing_is_remembered(tmp_path: Path) -> None:
    clients = Clients(object(), {0: 2})  # type: ignore[arg-type]
    clients.restore(Parts({"client.0": np.zeros(3, np.uint8)}))
    clients.asked([0])
    assert clients.store(tmp_path) == {}


def test_two_actors_end_as_one_process_does(tmp_path: Path, whole: tuple[Path, Stopping]) -> None:
    """Memory goes to whichever actor trains the client, and comes back."""
    folder = launch.run(config(tmp_path / "run", "federation.actors=2", grid="ray"), QUIET)
    assert final(folder) == final(whole[0])


def reply(**extra: np.ndarray) -> Message:
    become_server()
    request = Message(RecordDict(), 2, records.TRAIN)
    value = TrainReply(Binding("r", 1, 1, 0), np.zeros(3, np.float32), 5, 1.0, 2, 0.1, extra=extra)
    return records.train_reply(value, request)


WANT = Expected(Binding("r", 1, 1, 0), 3, 5, extras={"control": (3,)})


def test_declared_extras_come_through() -> None:
    control = np.array([1, 2, 3], dtype=np.float32)
    assert admit(reply(control=control), WANT, read_train).extra["control"].tolist() == [1, 2, 3]
    assert records.tensor_bytes([reply(control=control)]) == 24


@pytest.mark.parametrize(
    ("extra", "kind"),
    [
        ({}, Kind.SCHEMA),
        ({"control": np.zeros(3, np.float32), "text": np.zeros(3, np.float32)}, Kind.SCHEMA),
        ({"text": np.zeros(3, np.float32)}, Kind.SCHEMA),
        ({"control": np.zeros(4, np.float32)}, Kind.SHAPE),
        ({"control": np.zeros((3, 1), np.float32)}, Kind.SHAPE),
        ({"control": np.zeros(3, np.float64)}, Kind.SHAPE),
        ({"control": np.full(3, np.nan, np.float32)}, Kind.NOT_FINITE),
    ],
)
def test_anything_else_is_refused(extra: dict[str, np.ndarray], kind: Kind) -> None:
    with pytest.raises(Refused) as caught:
        admit(reply(**extra), WANT, read_train)
    assert caught.value.kind is kind


def test_what_a_method_does_not_declare_cannot_leave_a_client() -> None:
    want = Expected(WANT.binding, 3, 5)
    with pytest.raises(Refused, match=r"records: must be .*, got .*'control'"):
        admit(reply(control=np.zeros(3, np.float32)), want, read_train)
    empty = reply()
    empty.content["extra"] = ArrayRecord()
    with pytest.raises(Refused, match="records: must be"):
        admit(empty, want, read_train)


def test_an_extra_is_refused_before_it_is_decoded() -> None:
    huge = reply(control=np.zeros(3, np.float32))
    huge.content["extra"] = ArrayRecord({"control": Array("float32", (3,), "numpy.ndarray", b"x" * 5000)})
    with pytest.raises(Refused, match="in 5000 bytes"):
        admit(huge, WANT, read_train)
