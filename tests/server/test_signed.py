"""What a stranger's answer can do to the server that checks its signature: be refused."""

from collections.abc import Iterable
from dataclasses import asdict
from typing import Any

import pytest
from cryptography.hazmat.primitives.asymmetric import ec
from flwr.app import ConfigRecord, Message, RecordDict

from fedstrata.core import records, signing
from fedstrata.core.records import Assignment, Binding, Description
from fedstrata.server.flower_private import become_server, set_message_id
from fedstrata.server.passing import ParticipantsGrid
from fedstrata.server.signed import SignedGrid

KEY = ec.generate_private_key(ec.SECP384R1())
SAID = Description(1, "[]", "base", "hash", "", 0, 0.0, 0.0)


class Says(ParticipantsGrid):
    """One node, whose answer to every message is of this content, signed as client 1."""

    def __init__(self, content: RecordDict) -> None:
        become_server()
        self.content, self.sent = content, list[Message]()

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        self.sent = list(messages)
        for message in self.sent:
            set_message_id(message.metadata, "m1")
        return ["m1"]

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        reply = Message(self.content, reply_to=self.sent[0])
        signing.sign(reply, 1, "m1", KEY)
        return [reply]


def answer(partition: Any, keys: Any = None) -> Message:
    """What the server sees of a description that names this partition."""
    inner = Says(RecordDict({records.META: ConfigRecord({**asdict(SAID), "partition": partition})}))
    grid = SignedGrid(inner, keys or {1: KEY.public_key()})
    question = Message(RecordDict(), 7, records.DESCRIBE)
    (reply,) = grid.send_and_receive([records.address(question, Assignment(Binding("a1"), config="{}"))])
    return reply


def test_a_description_that_its_clients_key_signed_is_let_through() -> None:
    assert records.read_description(answer(1)) == SAID


@pytest.mark.parametrize("partition", ["1", [1], 1.0, True, b"1", -1, -2, 2])
def test_a_description_of_no_client_is_forged_whatever_it_names(partition: Any) -> None:
    assert answer(partition).error.code == records.FORGED


def test_what_cannot_be_checked_is_forged(monkeypatch: pytest.MonkeyPatch) -> None:
    class Odd:
        def verify(self, *_: object) -> None:
            raise ValueError("not a signature")

    assert answer(1, {1: Odd()}).error.code == records.FORGED
