"""The private corners of Flower that we use: pinned to one version, and each behaves as our grids need it.

When Flower is upgraded, the first test says so; then read `flower_private.py` again beside Flower's new source.
"""

from importlib.metadata import version

import flwr
import numpy as np
import pytest
from flwr.app import Array, ArrayRecord, Message, RecordDict
from flwr.supercore.task_identity import TaskIdentity

from fedstrata.server.flower_private import (
    FLOWER_VERSION,
    SUPERLINK_NODE_ID,
    Run,
    become_server,
    set_message_id,
    with_content,
)
from fedstrata.server.grids import FIRST_NODE


@pytest.fixture
def _stranger(monkeypatch: pytest.MonkeyPatch) -> None:
    """A process that is no Flower task yet."""
    for name in ("_task_id", "_run_id", "_node_id"):
        monkeypatch.setattr(TaskIdentity, name, None)


def test_flower_is_the_version_whose_private_names_were_read() -> None:
    assert FLOWER_VERSION == version("flwr") == flwr.__version__


@pytest.mark.usefixtures("_stranger")
def test_a_process_that_is_no_flower_task_cannot_make_instructions() -> None:
    with pytest.raises(RuntimeError, match="not set"):
        Message(RecordDict(), 5, "train")


@pytest.mark.usefixtures("_stranger")
def test_become_server_lets_this_process_make_instructions() -> None:
    run = become_server()
    assert isinstance(run, Run)
    message = Message(RecordDict(), 5, "train")
    assert (message.metadata.run_id, message.metadata.dst_node_id) == (1, 5)
    assert message.metadata.src_node_id == SUPERLINK_NODE_ID
    assert run.run_id == message.metadata.run_id


def test_our_nodes_do_not_collide_with_the_superlink() -> None:
    assert FIRST_NODE > SUPERLINK_NODE_ID


def test_a_message_gets_the_id_it_is_given_and_its_reply_names_it() -> None:
    become_server()
    message = Message(RecordDict(), 5, "train")
    assert message.metadata.message_id == ""
    set_message_id(message.metadata, "17")
    assert message.metadata.message_id == "17"
    answered = Message(RecordDict(), reply_to=message)
    assert answered.metadata.reply_to_message_id == "17"
    assert (answered.metadata.src_node_id, answered.metadata.dst_node_id) == (5, SUPERLINK_NODE_ID)


def test_with_content_keeps_every_id_and_leaves_the_original_alone() -> None:
    become_server()
    heavy = RecordDict({"arrays": ArrayRecord({"flat": Array(np.zeros(3, np.float32))})})
    message = Message(heavy, 5, "query.identify", ttl=12.0, group_id="3")
    set_message_id(message.metadata, "18")
    light = with_content(message, RecordDict())
    assert light.metadata == message.metadata
    assert (light.metadata.message_id, light.metadata.message_type) == ("18", "query.identify")
    assert len(light.content) == 0
    assert message.content is heavy
