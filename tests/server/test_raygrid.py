"""RayGrid on a real Ray, with a trivial stock Flower ClientApp (echo_app.py) in the actors."""

import os
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from flwr.app import ArrayRecord, ConfigRecord, Message, RecordDict

from fedstrata.core import records
from fedstrata.core.errors import BadInput
from fedstrata.server import parcels, raygrid
from fedstrata.server.grids import FIRST_NODE
from fedstrata.server.placement import Wanted
from fedstrata.server.raygrid import RayGrid
from fedstrata.server.raystart import start_ray

ray = raygrid.ray  # imported behind fedstrata.server, which sets what Ray reads from the environment once
CLIENTS = 8


@pytest.fixture(scope="module")
def two() -> Iterator[RayGrid]:
    """A grid with two actors, and the Ray of this module: its workers find echo_app.py beside this file."""
    ray.shutdown()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", os.pathsep.join([str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")]))
        start_ray(2)
        grid = RayGrid(CLIENTS, 1, Wanted(local=2), client_app="echo_app:app")
        yield grid
        grid.close()
        assert not ray.is_initialized()


@pytest.fixture
def one(two: RayGrid) -> Iterator[RayGrid]:
    """The same grid, reduced to one of its actors."""
    wait_for_actors(two)
    rest = [two.crew.free.pop() for _ in two.crew.free[1:]]
    yield two
    two.crew.free += rest


def wait_for_actors(grid: RayGrid) -> None:
    """Until all actors are free."""
    while grid.crew.coming:
        grid.crew.arrive(ray.wait(list(grid.crew.coming))[0][0])


class Sender:
    """Makes messages to the clients and counts what the ClientApp served."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __call__(self, partition: int, word: str = "hello", wait: float = 0.0, arrays: Any = None) -> Message:
        say = ConfigRecord({"word": word, "wait": wait, "folder": str(self.folder)})
        content = RecordDict({"say": say, **({"arrays": arrays} if arrays is not None else {})})
        return Message(content, partition + FIRST_NODE, records.TRAIN)

    @property
    def served(self) -> Counter[str]:
        """How often each word was served."""
        return Counter(path.name.rpartition("-")[0] for path in self.folder.iterdir())


@pytest.fixture
def message(two: RayGrid, tmp_path: Path) -> Sender:
    return Sender(tmp_path)


def said(reply: Message) -> tuple[Any, ...]:
    record = reply.content.config_records["said"]
    return record["partition"], record["word"], record["total"]


def answers_each_once(sent: Sequence[Message], replies: Sequence[Message]) -> bool:
    """One reply per message, in the order of the messages."""
    asked = [message.metadata.message_id for message in sent]
    return len(set(asked)) == len(asked) and [r.metadata.reply_to_message_id for r in replies] == asked


def arrays(value: float) -> ArrayRecord:
    return records.arrays(flat=np.full(2, value, np.float32))


@pytest.mark.parametrize("actors", ["one", "two"])
def test_replies_come_in_message_order_from_one_actor_and_from_two(
    actors: str, request: pytest.FixtureRequest, message: Sender
) -> None:
    grid: RayGrid = request.getfixturevalue(actors)
    wait_for_actors(grid)
    assert len(grid.crew.free) == {"one": 1, "two": 2}[actors]
    # the first is slow: with two actors all others are done before it
    sent = [message(p, f"word {p}", 0.3 if p == 7 else 0.0, arrays(p)) for p in (7, 2, 5, 0, 1)]
    replies = list(grid.send_and_receive(sent))
    assert answers_each_once(sent, replies)
    assert [said(reply) for reply in replies] == [(p, f"word {p}", 2.0 * p) for p in (7, 2, 5, 0, 1)]


def test_the_messages_that_were_sent_keep_their_arrays(two: RayGrid, message: Sender) -> None:
    sent = [message(0, arrays=arrays(3))]
    list(two.send_and_receive(sent))
    assert sent[0].content.array_records["arrays"]["flat"].numpy().tolist() == [3, 3]


def test_no_messages_no_replies(two: RayGrid) -> None:
    assert list(two.send_and_receive([])) == []


def test_a_clients_memory_follows_it_to_whichever_actor_serves_it(two: RayGrid, message: Sender) -> None:
    def asked(partitions: Sequence[int]) -> list[int]:
        replies = two.send_and_receive([message(partition) for partition in partitions])
        return [int(reply.content.config_records["said"]["asked"]) for reply in replies]  # type: ignore[arg-type]

    before = asked([3, 4])
    assert asked([4, 3]) == [before[1] + 1, before[0] + 1]
    assert asked([6, 3]) == [1, before[0] + 2]


def test_an_exception_becomes_an_error_reply_for_its_unit_alone(two: RayGrid, message: Sender) -> None:
    two.cohort_size = 2
    try:
        sent = [message(p, word) for p, word in enumerate(["a", "b", "c", "fail", "e"])]  # units: ab, c+fail, e
        replies = list(two.send_and_receive(sent))
    finally:
        two.cohort_size = 1
    assert answers_each_once(sent, replies)
    assert [reply.has_error() for reply in replies] == [False, False, True, True, False]
    assert {reply.error.reason for reply in replies[2:4]} == {"RuntimeError: out of luck"}
    assert message.served["fail"] == 1  # an error is an answer, and no reason to try again


def test_bad_input_comes_out_as_itself(two: RayGrid, message: Sender) -> None:
    with pytest.raises(BadInput, match=r"^model\.name: no such folder$"):
        list(two.send_and_receive([message(0, "refuse")]))


def test_an_actor_that_dies_is_replaced_and_its_unit_served_again(two: RayGrid, message: Sender) -> None:
    wait_for_actors(two)
    actors = set(two.crew.free)
    sent = [message(p, "dies once" if p == 1 else f"word {p}", arrays=arrays(p)) for p in range(6)]
    replies = list(two.send_and_receive(sent))
    assert answers_each_once(sent, replies)
    assert [said(reply)[2] for reply in replies] == [2.0 * p for p in range(6)]
    assert message.served == {"dies once": 2, **{f"word {p}": 1 for p in range(6) if p != 1}}
    wait_for_actors(two)
    assert len(two.crew.free) == 2
    assert len(set(two.crew.free) - actors) == 1


def test_a_unit_that_kills_every_actor_ends_as_an_error_reply_and_spares_the_others(
    one: RayGrid, message: Sender, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(raygrid, "TRIES", 2)  # each costs the start of an actor
    sent = [message(0, "before"), message(1, "dies"), message(2, "behind")]
    replies = list(one.send_and_receive(sent))
    assert answers_each_once(sent, replies)
    assert [reply.has_error() for reply in replies] == [False, True, False]
    assert replies[1].error.reason == "the actor died 2 times"
    assert message.served == {"before": 1, "dies": 2, "behind": 1}


def test_behind_the_deadline_replies_are_missing_and_the_grid_goes_on(two: RayGrid, message: Sender) -> None:
    list(two.send_and_receive([message(0), message(1)]))  # both actors are up
    sent = [message(0, "slow", wait=600.0), message(1, "quick")]
    replies = list(two.send_and_receive(sent, timeout=2.0))
    assert [said(reply)[1] for reply in replies] == ["quick"]
    assert replies[0].metadata.reply_to_message_id == sent[1].metadata.message_id
    again = [message(p, f"again {p}") for p in range(3)]
    replies = list(two.send_and_receive(again))
    assert answers_each_once(again, replies)
    assert [said(reply)[1] for reply in replies] == ["again 0", "again 1", "again 2"]


def test_each_distinct_payload_is_put_into_the_object_store_once(
    two: RayGrid, message: Sender, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, put = ray.put, []

    def counting(value: Any, **options: Any) -> Any:
        put.append(value)
        return real(value, **options)

    monkeypatch.setattr(ray, "put", counting)
    first, second = arrays(1), arrays(5)
    sent = [message(p, arrays=second if p == 3 else first) for p in range(6)]
    replies = list(two.send_and_receive(sent))
    assert [said(reply)[2] for reply in replies] == [2, 2, 2, 10, 2, 2]
    assert [parcels.unpack(parcel) == record for parcel, record in zip(put, (first, second), strict=True)] == [True] * 2
