"""The grids' common ground: units, contexts, errors, ids, and what a strategy sees of a grid."""

import sys
from collections.abc import Sequence
from types import ModuleType
from typing import Any, cast

import pytest
from flwr.app import ConfigRecord, Context, Message, RecordDict
from flwr.clientapp import ClientApp

from fedstrata.core import records
from fedstrata.core.errors import BadInput
from fedstrata.server.flower_private import become_server
from fedstrata.server.grids import FIRST_NODE, InProcessGrid, answer, client_context, load_app, units
from fedstrata.server.passing import ParticipantsGrid

stock = ClientApp()


@stock.train()
def train(message: Message, context: Context) -> Message:
    """Answers with its partition and how often this client was asked before; fails or refuses when told to."""
    word = message.content.config_records["say"]["word"]
    if word == "fail":
        raise RuntimeError("out of luck")
    if word == "refuse":
        raise BadInput("model.name: no such folder")
    asked = context.state.config_records.get("memory", ConfigRecord({"asked": 0}))
    count = int(asked["asked"]) + 1  # type: ignore[arg-type]
    context.state["memory"] = ConfigRecord({"asked": count})
    said = ConfigRecord({"word": word, "partition": context.node_config["partition-id"], "asked": count})
    return Message(RecordDict({"said": said}), reply_to=message)


class Cohorts:
    """A ClientApp that takes whole units and remembers their sizes."""

    def __init__(self) -> None:
        self.sizes: list[int] = []

    def serve(self, messages: Sequence[Message], contexts: Sequence[Context]) -> list[Message]:
        self.sizes.append(len(messages))
        return [train(message, context) for message, context in zip(messages, contexts, strict=True)]


@pytest.fixture
def app(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """A module of ClientApps that can be named by reference: `grid_test_apps:stock` and `grid_test_apps:cohorts`."""
    become_server()
    module: Any = ModuleType("grid_test_apps")
    module.stock, module.cohorts = stock, Cohorts()
    monkeypatch.setitem(sys.modules, "grid_test_apps", module)
    return cast(ModuleType, module)


def message(partition: int, word: str = "hello", kind: str = records.TRAIN) -> Message:
    return Message(RecordDict({"say": ConfigRecord({"word": word})}), partition + FIRST_NODE, kind)


def said(reply: Message) -> tuple[Any, ...]:
    record = reply.content.config_records["said"]
    return record["partition"], record["word"], record["asked"]


def sizes(kinds: str, cohort_size: int) -> list[int]:
    """`t` for a train message, `e` for an evaluate message."""
    become_server()
    sent = [message(0, kind={"t": records.TRAIN, "e": records.EVALUATE}[kind]) for kind in kinds]
    found = units(sent, cohort_size)
    assert [one for unit in found for one in unit] == sent  # all of them, in order
    return [len(unit) for unit in found]


@pytest.mark.parametrize(
    ("kinds", "cohort_size", "expected"),
    [
        ("", 3, []),
        ("t", 3, [1]),
        ("ttt", 3, [3]),
        ("ttttttt", 3, [3, 3, 1]),
        ("tttt", 1, [1, 1, 1, 1]),
        ("eee", 3, [1, 1, 1]),
        ("ttett", 3, [2, 1, 2]),
    ],
)
def test_train_messages_are_cut_into_cohorts_and_others_stand_alone(
    kinds: str, cohort_size: int, expected: list[int]
) -> None:
    assert sizes(kinds, cohort_size) == expected


@pytest.mark.usefixtures("app")
def test_replies_come_in_the_order_of_the_messages_and_name_them() -> None:
    grid = InProcessGrid(4, 2, "grid_test_apps:stock")
    sent = [message(partition, str(partition)) for partition in (3, 0, 2)]
    replies = list(grid.send_and_receive(sent))
    assert [said(reply) for reply in replies] == [(3, "3", 1), (0, "0", 1), (2, "2", 1)]
    ids = [one.metadata.message_id for one in sent]
    assert len(set(ids)) == 3
    assert [reply.metadata.reply_to_message_id for reply in replies] == ids


@pytest.mark.usefixtures("app")
def test_message_ids_are_never_given_twice() -> None:
    grid = InProcessGrid(2, 1, "grid_test_apps:stock")
    first, second = [message(0), message(1)], [message(0), message(1)]
    list(grid.send_and_receive(first))
    list(grid.send_and_receive(second))
    assert len({one.metadata.message_id for one in first + second}) == 4


@pytest.mark.usefixtures("app")
def test_every_client_keeps_a_memory_of_its_own() -> None:
    grid = InProcessGrid(3, 2, "grid_test_apps:stock")
    for _ in range(2):
        list(grid.send_and_receive([message(0), message(1)]))
    replies = list(grid.send_and_receive([message(1), message(2)]))
    assert [said(reply)[2] for reply in replies] == [3, 1]


def test_an_app_that_serves_cohorts_gets_whole_units(app: ModuleType) -> None:
    grid = InProcessGrid(5, 2, "grid_test_apps:cohorts")
    replies = list(grid.send_and_receive([message(partition) for partition in range(5)]))
    assert app.cohorts.sizes == [2, 2, 1]
    assert [said(reply)[0] for reply in replies] == [0, 1, 2, 3, 4]


@pytest.mark.usefixtures("app")
def test_an_exception_becomes_an_error_reply_for_each_message_of_its_unit_only() -> None:
    grid = InProcessGrid(5, 2, "grid_test_apps:cohorts")
    words = ["a", "b", "c", "fail", "e"]  # units: ab, c+fail, e
    sent = [message(partition, word) for partition, word in enumerate(words)]
    replies = list(grid.send_and_receive(sent))
    assert [reply.has_error() for reply in replies] == [False, False, True, True, False]
    assert [reply.error.reason for reply in replies[2:4]] == ["RuntimeError: out of luck"] * 2
    assert [reply.metadata.reply_to_message_id for reply in replies] == [one.metadata.message_id for one in sent]
    assert [reply.metadata.src_node_id for reply in replies] == [one.metadata.dst_node_id for one in sent]


@pytest.mark.usefixtures("app")
def test_bad_input_ends_the_exchange_with_its_own_message() -> None:
    grid = InProcessGrid(2, 1, "grid_test_apps:stock")
    with pytest.raises(BadInput, match=r"^model\.name: no such folder$"):
        list(grid.send_and_receive([message(0), message(1, "refuse")]))


def test_answer_turns_a_wrong_number_of_contexts_into_errors_rather_than_fewer_replies(app: ModuleType) -> None:
    sent = [message(0), message(1)]
    assert [reply.has_error() for reply in answer(app.stock, sent, [])] == [True, True]


@pytest.mark.usefixtures("app")
def test_pushed_messages_are_pulled_once() -> None:
    grid = InProcessGrid(3, 1, "grid_test_apps:stock")
    ids = list(grid.push_messages([message(2, "x"), message(0, "y")]))
    assert len(ids) == 2
    (second,) = grid.pull_messages(ids[1:])
    assert said(second) == (0, "y", 1)
    (first,) = grid.pull_messages(ids)
    assert said(first) == (2, "x", 1)
    assert list(grid.pull_messages(ids)) == []
    assert list(grid.pull_messages(["unknown"])) == []


@pytest.mark.usefixtures("app")
def test_the_roster_names_the_node_of_every_partition() -> None:
    grid = InProcessGrid(3, 1, "grid_test_apps:stock")
    assert grid.roster == {0: FIRST_NODE, 1: FIRST_NODE + 1, 2: FIRST_NODE + 2}
    assert list(grid.get_node_ids()) == list(grid.roster.values())
    context = client_context(FIRST_NODE + 2, 3, None)
    assert context.node_config == {"partition-id": 2, "num-partitions": 3}


@pytest.mark.usefixtures("app")
def test_a_grid_makes_messages_that_it_can_send() -> None:
    grid = InProcessGrid(2, 1, "grid_test_apps:stock")
    made = grid.create_message(message(1, "made").content, records.TRAIN, FIRST_NODE + 1, "7")
    assert made.metadata.group_id == "7"
    assert [said(reply) for reply in grid.send_and_receive([made])] == [(1, "made", 1)]


@pytest.mark.usefixtures("app")
def test_a_strategy_sees_the_participants_only_and_reaches_the_same_clients() -> None:
    grid = InProcessGrid(5, 1, "grid_test_apps:stock")
    view = ParticipantsGrid(grid, [FIRST_NODE + 4, FIRST_NODE + 1])
    assert list(view.get_node_ids()) == [FIRST_NODE + 4, FIRST_NODE + 1]
    assert view.run is grid.run
    assert [said(reply)[0] for reply in view.send_and_receive([message(4)])] == [4]
    assert [said(reply)[0] for reply in view.pull_messages(view.push_messages([message(1)]))] == [1]
    assert [said(reply)[2] for reply in grid.send_and_receive([message(4)])] == [2]  # one memory, not two
    made = view.create_message(RecordDict(), records.TRAIN, FIRST_NODE + 1, "9")
    assert (made.metadata.dst_node_id, made.metadata.group_id) == (FIRST_NODE + 1, "9")


@pytest.mark.usefixtures("app")
def test_an_app_is_loaded_by_reference() -> None:
    assert load_app("grid_test_apps:stock") is stock
    with pytest.raises(AttributeError):
        load_app("grid_test_apps:nothing")
