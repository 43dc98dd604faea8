"""Who is there: nodes come, go, fail to describe themselves, and claim places that are not theirs."""

import re
from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path

import pytest
from flwr.app import Error, Message
from flwr.serverapp import Grid

from fedstrata.core import records
from fedstrata.core.errors import FedstrataError
from fedstrata.core.records import Description, Holding
from fedstrata.scenarios.definition import Definition, HeldTask
from fedstrata.scenarios.held import HeldScenario, plan
from fedstrata.server import roster
from fedstrata.server.flower_private import become_server, set_message_id
from fedstrata.server.passing import ParticipantsGrid
from fedstrata.server.roster import Roster

SILENCE = "nothing"
LAYOUT = '[["a", 1, 1]]'


class Nodes(ParticipantsGrid):
    """Nodes that say what they are told to."""

    def __init__(self) -> None:
        become_server()
        self.says: dict[int, Description | str] = {}
        self.asked: list[int] = []
        self.tick: Callable[[], None] = lambda: None

    def get_node_ids(self) -> Iterable[int]:
        self.tick()
        return list(self.says)

    def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None = None) -> Iterable[Message]:
        replies = []
        for message in messages:
            node = message.metadata.dst_node_id
            self.asked.append(node)
            set_message_id(message.metadata, f"m{len(self.asked)}")
            says = self.says[node]
            if says == SILENCE:
                continue
            if isinstance(says, str):
                replies.append(Message(Error(2, says), reply_to=message))
            else:
                replies.append(records.description_reply(says, message))
        return replies


@pytest.fixture
def grid(monkeypatch: pytest.MonkeyPatch) -> Nodes:
    monkeypatch.setattr(roster, "PAUSE", 0.01)
    monkeypatch.setattr("fedstrata.server.scoregate.Layout.from_json", lambda text: text)  # no real base's
    return Nodes()


def scenario() -> HeldScenario:
    tasks = {name: HeldTask("clients") for name in ("a", "b")}
    return plan("held", Definition(Path("x.yaml"), tasks, stages=((0,), (1,))), 3, 0, 1)


def holding(*rounds: list[int]) -> str:
    keys = [["k" if count else "" for count in row] for row in rounds]
    return Holding(list(rounds), keys, [5, 5], ["k", "k"], {"test": [2, 0], "val": [0, 0]}).to_json()


def client(partition: int, told: str = "") -> Description:
    return Description(partition, LAYOUT, "base", "hash", "", 0, 0.0, 0.0, holding=told or holding([4, 0], [0, 3]))


def look(grid: Grid, found: HeldScenario, timeout: float = 5.0) -> Roster:
    return Roster(grid, found, "{}", "run", timeout, 1000)


def test_nodes_that_come_and_go_are_told_of_and_only_new_ones_are_asked(grid: Nodes) -> None:
    found = scenario()
    grid.says = {7: client(0), 8: client(1)}
    there = look(grid, found)
    assert dict(there) == {0: 7, 1: 8}
    assert found.present(1, 1) == [0, 1]
    grid.says = {8: client(1), 9: client(2, holding([0, 0], [0, 3]))}
    change = there.look()
    assert (change.joined, change.left, change.refused) == ((2,), (0,), ())
    assert grid.asked == [7, 8, 9]
    assert found.present(1, 1) == [1]  # client 2 has nothing new in stage 1 …
    assert found.present(2, 1) == [1, 2]  # … but in stage 2
    assert found.scored(0, "test") == [(1, 2), (2, 2)]
    assert found.scored(1, "test") == []


def test_a_client_with_other_data_at_a_new_stage_is_asked_anew_and_one_that_fails_then_is_gone(grid: Nodes) -> None:
    found = scenario()
    grid.says = {7: client(0), 8: client(1)}
    there = look(grid, found)
    before = found.data_key([1], 0, 2, 1)
    grid.says = {7: client(0, holding([4, 0], [0, 9])), 8: "ValueError; the client's own log says more"}
    change = there.look(anew=True)
    assert found.share_size([1], 0, 2, 1) == 9
    assert before == found.data_key([1], 0, 2, 1)  # the word is the client's, and it did not change it
    assert change.left == (1,)
    assert [client for client, _ in found.scored(0, "test")] == [0]  # nobody is asked to score what is not there
    grid.says[8] = client(1)
    assert there.look().joined == (1,)


@pytest.mark.parametrize(
    ("said", "why"),
    [
        (client(0), r"partition-id: must be one of \[1, 2\], got 0"),
        (client(5), r"partition-id: must be one of \[1, 2\], got 5"),
        (replace(client(1), base_hash="other"), "client 1: base_hash must be hash, as the first client's, got other"),
        (replace(client(1), encoder="clip"), "client 1: encoder must be , as the first client's, got clip"),
        (replace(client(1), dim=3), "client 1: dim must be 0, as the first client's, got 3"),
        (replace(client(1), tau=0.5), r"client 1: tau must be 0\.0, as the first client's, got 0\.5"),
        (replace(client(1), epsilon=0.5), r"client 1: epsilon must be 0\.0, as the first client's, got 0\.5"),
        (
            client(1, holding([10**12, 0], [0, 3])),
            r"client 1: holding: counts must be at most federation.max_samples \(1000\), got 1000000000000",
        ),
        (client(1, '{"rounds": 1}'), "missing 4 required"),
        (client(1, holding([4], [3])), "rounds must have one int for each of 2 tasks"),
        (client(1, holding([-4, 0], [0, 3])), "counts must not be negative"),
    ],
)
def test_a_node_that_may_not_take_part_is_refused_once_and_costs_nobody_else(
    grid: Nodes, said: Description, why: str
) -> None:
    grid.says = {7: client(0)}
    there = look(grid, scenario())
    grid.says[8] = said
    ((node, reason),) = there.look().refused
    assert node == 8
    assert re.search(why, reason)
    assert there.look().refused == ()
    assert dict(there) == {0: 7}


def test_a_node_that_does_not_answer_is_left_alone_for_twice_as_many_looks_each_time(grid: Nodes) -> None:
    grid.says = {7: client(0)}
    there = look(grid, scenario())
    grid.says[8] = SILENCE
    asked = []
    for number in range(200):
        before = len(grid.asked)
        there.look()
        asked += [number] * (len(grid.asked) - before)
    assert asked == [0, 2, 5, 10, 19, 36, 69, 134, 199]  # 1, 2, 4, … 64, 64 looks between two questions
    grid.says[8] = "ImportError"
    for _ in range(65):
        there.look()
    before = len(grid.asked)
    there.look()
    assert len(grid.asked) == before + 1  # one that answers with an error is asked at every look, as ever
    grid.says = {7: client(0), 9: SILENCE}
    there.look()
    grid.says[9] = client(1)
    assert [there.look().joined for _ in range(2)] == [(), (1,)]


def test_with_nobody_there_a_run_waits_and_rounds_are_not_spent(grid: Nodes) -> None:
    grid.says = {7: client(0)}
    there = look(grid, scenario())
    grid.says = {}
    looks = []

    def tick() -> None:
        looks.append(1)
        if len(looks) == 5:
            grid.says = {11: client(0)}

    grid.tick = tick
    assert there.look().left == ()  # the same client is back, on another node
    assert dict(there) == {0: 11}
    assert len(looks) == 5


def test_a_federation_without_clients_ends_with_the_reason(grid: Nodes) -> None:
    with pytest.raises(FedstrataError, match="no client can take part: none is connected"):
        look(grid, scenario())
    grid.says = {7: "ImportError; the client's own log says more"}
    with pytest.raises(FedstrataError, match="no client can take part: ImportError"):
        look(grid, scenario())
    grid.says = {7: client(0)}
    there = look(grid, scenario(), timeout=0.05)
    grid.says = {}
    with pytest.raises(FedstrataError, match=r"federation.timeout: no client was there for 0.05 s"):
        there.look()
