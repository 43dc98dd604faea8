"""What a stranger's answer can do to the server that checks its signature: be refused."""

from collections.abc import Callable, Iterable
from dataclasses import asdict, replace
from types import SimpleNamespace
from typing import Any

import pytest
from cryptography.hazmat.primitives.asymmetric import ec
from flwr.app import ConfigRecord, Error, Message, RecordDict

from fedstrata.core import records, signing
from fedstrata.core.errors import BadInput
from fedstrata.core.records import Assignment, Binding, Description
from fedstrata.server import app
from fedstrata.server.flower_private import NodeInfo, TaskType, become_server, key_bytes, set_message_id
from fedstrata.server.passing import ParticipantsGrid
from fedstrata.server.signed import SignedGrid

KEY, STRANGERS = (ec.generate_private_key(ec.SECP384R1()) for _ in range(2))
SAID = Description(1, "[]", "base", "hash", "", 0, 0.0, 0.0)
AT = Binding("a1")


class Says(ParticipantsGrid):
    """One node, connected with client 1's key, whose answer to every message is `reply` to it."""

    def __init__(self, reply: Callable[[Message], Message]) -> None:
        become_server()
        self.reply, self.sent = reply, list[Message]()

    def get_nodes(self) -> Iterable[NodeInfo]:
        return [NodeInfo(node_id=7, public_key=key_bytes(KEY.public_key()))]

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        self.sent = list(messages)
        for message in self.sent:
            set_message_id(message.metadata, "m1")
        return ["m1"]

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        return [self.reply(self.sent[0])]


def asked(reply: Callable[[Message], Message], keys: Any = None) -> Message:
    """What the server sees of the reply."""
    grid = SignedGrid(Says(reply), keys or {1: KEY.public_key()})
    question = Message(RecordDict(), 7, records.DESCRIBE)
    (seen,) = grid.send_and_receive([records.address(question, Assignment(AT, config="{}"))])
    return seen


def answer(partition: Any, keys: Any = None) -> Message:
    """… of a description that names this partition, signed as client 1."""

    def reply(message: Message) -> Message:
        content = RecordDict({records.META: ConfigRecord({**asdict(SAID), "partition": partition})})
        return signed(Message(content, reply_to=message))

    return asked(reply, keys)


def signed(reply: Message, key: ec.EllipticCurvePrivateKey = KEY, request: str = "m1", **changes: Any) -> Message:
    signing.sign(reply, replace(AT, **{"partition": 1, **changes}), request, key)
    return reply


def error(message: Message, code: int = 2, said: str = "BadInput") -> Message:
    return Message(Error(code, said), reply_to=message)


def test_a_description_that_its_clients_key_signed_is_let_through() -> None:
    assert records.read_description(answer(1)) == SAID


@pytest.mark.parametrize("partition", ["1", [1], 1.0, True, b"1", -1, -2, 2])
def test_a_description_of_no_client_is_forged_whatever_it_names(partition: Any) -> None:
    assert answer(partition).error.code == records.FORGED


def test_what_cannot_be_checked_is_forged(monkeypatch: pytest.MonkeyPatch) -> None:
    class Odd:
        public_bytes = KEY.public_key().public_bytes

        def verify(self, *_: object) -> None:
            raise ValueError("not a signature")

    assert answer(1, {1: Odd()}).error.code == records.FORGED


def test_a_clients_own_error_is_let_through_as_it_said_it() -> None:
    seen = asked(lambda message: signed(error(message, records.TOO_FEW, "3 of 50")))
    assert (seen.error.code, seen.error.reason) == (records.TOO_FEW, "3 of 50")


@pytest.mark.parametrize(
    "changes",
    [
        {"key": STRANGERS},
        {"request": "m0"},
        {"run": "a2"},
        {"stage": 1},
        {"round": 1},
        {"partition": 0},
    ],
)
def test_an_error_of_another_client_message_run_stage_or_round_is_forged(changes: dict[str, Any]) -> None:
    assert asked(lambda message: signed(error(message), **changes)).error.code == records.FORGED


def test_a_signed_error_whose_words_code_or_signature_were_changed_is_forged() -> None:
    def changed(code: int, old: str, new: str) -> Message:
        def reply(message: Message) -> Message:
            own = signed(error(message)).error
            return error(message, code, str(own.reason).replace(old, new, 1))

        return asked(reply)

    assert changed(2, "", "").error.code == 2
    for seen in (
        changed(2, "Bad", "Good"),
        changed(1, "", ""),
        changed(2, "3", "g"),
        changed(2, "\nsig", "\nsignature: "),
    ):
        assert seen.error.code == records.FORGED


def test_a_client_cannot_say_that_it_was_silent_or_forged() -> None:
    for code in (records.SILENT, records.FORGED):
        seen = asked(lambda message, code=code: signed(error(message, code, "client 0 did it")))  # type: ignore[misc]
        assert "an error code that is the server's own" in str(seen.error.reason)


def test_an_unsigned_error_is_no_answer_and_is_told_in_short_and_in_quotes() -> None:
    seen = asked(lambda message: error(message, 5, "gone\n2026 ERROR client 0 cheats " + 900 * "x")).error
    assert seen.code == records.SILENT
    assert str(seen.reason).startswith("no answer; an error that nobody signed")
    assert "'gone\\n2026" in str(seen.reason)
    assert len(str(seen.reason)) < 350


def test_an_unsigned_answer_is_forged() -> None:
    assert asked(lambda message: records.description_reply(SAID, message)).error.code == records.FORGED


def test_a_node_whose_key_is_no_clients_is_nobody_whatever_it_signs() -> None:
    seen = answer(1, {0: STRANGERS.public_key()})
    assert seen.error.reason == "signature: the node that was asked has no key that the server knows"


def test_a_deployment_without_keys_does_not_start_unless_it_is_told_to(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(app.NODES, raising=False)
    deployed: Any = SimpleNamespace(run=become_server())
    assert app.trusted(deployed, insecure=True) is deployed
    with pytest.raises(BadInput, match=f"{app.NODES}: must name the folder of the clients' public keys.*--insecure"):
        app.trusted(deployed, insecure=False)
    simulated: Any = SimpleNamespace(run=replace(become_server(), primary_task_type=TaskType.SIMULATION))
    assert app.trusted(simulated, insecure=False) is simulated
