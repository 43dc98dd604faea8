"""The reply gate: what is wrong with a reply costs that reply, by name, and nothing else."""

import io
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from flwr.app import Array, ArrayRecord, ConfigRecord, Error, Message, MetricRecord, RecordDict

from fedstrata.core import records
from fedstrata.core.identity import Token
from fedstrata.core.records import Binding, TrainReply
from fedstrata.server.flower_private import become_server, set_message_id
from fedstrata.server.gate import Expected, Rejected, pass_replies, read_token, read_train

SIZE, SAMPLES = 4, 10


def binding(partition: int) -> Binding:
    return Binding("run-1", 1, 2, partition)


def request(partition: int, kind: str = records.TRAIN) -> Message:
    message = Message(RecordDict(), partition + 2, kind)
    set_message_id(message.metadata, f"message-{partition}")
    return message


GOOD = TrainReply(binding(0), np.arange(SIZE, dtype=np.float32), SAMPLES, 0.5, 3, 0.1)


def reply(asked: Message, **changes: Any) -> Message:
    at = binding(asked.metadata.dst_node_id - 2)
    return records.train_reply(replace(GOOD, **{"binding": at, **changes}), asked)


def gate(sent: Sequence[Message], came: Sequence[Message]) -> tuple[list[tuple[Message, TrainReply]], list[Rejected]]:
    expected = {m.metadata.dst_node_id: Expected(binding(m.metadata.dst_node_id - 2), SIZE, SAMPLES) for m in sent}
    return pass_replies(sent, came, expected, read_train)


@pytest.fixture(autouse=True)
def _server() -> None:
    become_server()


def rejection(make: Callable[[Message], Message]) -> str:
    """Why the reply of the second of three clients is rejected; the others' must pass."""
    sent = [request(partition) for partition in range(3)]
    good, bad = gate(sent, [reply(sent[0]), make(sent[1]), reply(sent[2])])
    assert [value.binding.partition for _, value in good] == [0, 2]
    assert [rejected.partition for rejected in bad] == [1]
    return bad[0].reason


def with_array(asked: Message, array: Array) -> Message:
    message = reply(asked)
    message.content["arrays"] = ArrayRecord({"flat": array})
    return message


def with_metrics(asked: Message, **changes: Any) -> Message:
    message = reply(asked)
    message.content["metrics"] = MetricRecord({**message.content.metric_records["metrics"], **changes})
    return message


def without(asked: Message, record: str, key: str) -> Message:
    message = reply(asked)
    del message.content[record][key]
    return message


def without_record(asked: Message, record: str) -> Message:
    message = reply(asked)
    del message.content[record]
    return message


def test_good_replies_pass_in_the_order_of_their_partitions() -> None:
    sent = [request(partition) for partition in (7, 1, 4)]
    came = [reply(asked, flat=np.full(SIZE, asked.metadata.dst_node_id - 2, np.float32)) for asked in sent]
    good, bad = gate(sent, [came[2], came[0], came[1]])
    assert [int(value.flat[0]) for _, value in good] == [1, 4, 7]
    assert [message for message, _ in good] == [came[1], came[2], came[0]]
    assert bad == []


def test_an_error_reply_is_rejected_with_the_clients_reason() -> None:
    reason = rejection(lambda asked: Message(Error(2, "MemoryError: no room"), reply_to=asked))
    assert reason == "the client failed: MemoryError: no room"


@pytest.mark.parametrize("record", ["arrays", "metrics", "meta"])
def test_a_reply_without_a_record_is_rejected_by_its_name(record: str) -> None:
    assert rejection(lambda asked: without_record(asked, record)) == f"record '{record}' is missing"


@pytest.mark.parametrize(("record", "key"), [("arrays", "flat"), ("metrics", "steps"), ("meta", "round")])
def test_a_reply_without_a_key_is_rejected_by_its_name(record: str, key: str) -> None:
    assert rejection(lambda asked: without(asked, record, key)) == f"record '{key}' is missing"


@pytest.mark.parametrize(
    "wrong",
    [
        Binding("run-1", 1, 1, 1),  # another round
        Binding("run-1", 2, 2, 1),  # another stage
        Binding("run-0", 1, 2, 1),  # another run
        Binding("run-1", 1, 2, 0),  # another client
    ],
)
def test_a_reply_that_belongs_elsewhere_is_rejected(wrong: Binding) -> None:
    reason = rejection(lambda asked: reply(asked, binding=wrong))
    assert reason == f"binding: expected {binding(1)}, got {wrong}"


@pytest.mark.parametrize(
    ("values", "came"),
    [
        (np.zeros(SIZE, np.float64), "float64 (4,)"),
        (np.zeros(SIZE, np.float16), "float16 (4,)"),
        (np.zeros(SIZE, np.int32), "int32 (4,)"),
        (np.zeros(SIZE + 1, np.float32), "float32 (5,)"),
        (np.zeros(0, np.float32), "float32 (0,)"),
        (np.zeros((2, 2), np.float32), "float32 (2, 2)"),
        (np.float32(1), "float32 ()"),
    ],
)
def test_an_array_of_another_type_or_shape_is_rejected(values: Any, came: str) -> None:
    reason = rejection(lambda asked: with_array(asked, Array(np.asarray(values))))
    assert reason.startswith(f"array: must be float32 (4,), got {came}")


def saved(values: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, values)
    return buffer.getvalue()


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"not an array",
        b"PK\x03\x04 not a zip",
        b"\x93NUMPY",
        saved(np.zeros(SIZE, np.float32))[:-1],
        saved(np.zeros((2, 2), np.float32)),
        saved(np.zeros(SIZE, np.float64)),
        saved(np.zeros(SIZE + 1, np.float32)),
    ],
)
def test_bytes_that_are_not_what_was_declared_are_rejected(data: bytes) -> None:
    lying = Array("float32", (SIZE,), "numpy.ndarray", data)
    assert rejection(lambda asked: with_array(asked, lying))


def test_a_declared_size_that_hides_more_bytes_is_rejected_before_decoding(monkeypatch: pytest.MonkeyPatch) -> None:
    large = saved(np.zeros(1000, np.float32))
    sent = [request(0)]
    message = with_array(sent[0], Array("float32", (SIZE,), "numpy.ndarray", large))
    monkeypatch.setattr(Array, "numpy", lambda self: pytest.fail("decoded before it was checked"))
    _, bad = gate(sent, [message])
    assert bad == [Rejected(0, f"array: must be float32 (4,), got float32 (4,) in {len(large)} bytes")]


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_an_array_that_is_not_finite_is_rejected(value: float) -> None:
    flat = np.array([0, value, 0, 0], dtype=np.float32)
    assert rejection(lambda asked: reply(asked, flat=flat)) == "array: must be finite, got NaN or infinity"


@pytest.mark.parametrize("count", [0, -10, 9, 11, 10**9])
def test_a_count_that_is_not_the_known_share_is_rejected(count: int) -> None:
    reason = rejection(lambda asked: reply(asked, count=count))
    assert reason == f"num-examples: must be 10, the client's known share, got {count}"


@pytest.mark.parametrize("count", [[10], float("nan"), float("inf")])
def test_a_count_that_is_no_number_is_rejected(count: Any) -> None:
    assert rejection(lambda asked: with_metrics(asked, **{"num-examples": count}))


@pytest.mark.parametrize("loss", [float("nan"), float("inf")])
def test_a_loss_that_is_not_finite_is_rejected(loss: float) -> None:
    assert rejection(lambda asked: reply(asked, loss=loss)) == f"loss: must be finite, got {loss}"


def test_what_rides_along_is_rejected_since_flowers_strategies_would_average_it() -> None:
    def second_array(asked: Message) -> Message:
        message = reply(asked)
        message.content.array_records["arrays"]["more"] = Array(np.zeros(2, np.float32))
        return message

    def second_record(asked: Message) -> Message:
        message = reply(asked)
        message.content["more"] = ArrayRecord({"flat": Array(np.zeros(2, np.float32))})
        return message

    for make in (second_array, second_record, lambda asked: with_metrics(asked, speed=3.0)):
        assert rejection(make).startswith("records: must be")


def test_further_config_records_do_no_harm() -> None:
    sent = [request(0)]
    message = reply(sent[0])
    message.content["note"] = ConfigRecord({"text": "hello"})
    good, bad = gate(sent, [message])
    assert (len(good), bad) == (1, [])


def test_of_duplicate_replies_the_first_counts_once() -> None:
    sent = [request(0), request(1)]
    first = reply(sent[0], flat=np.full(SIZE, 1, np.float32))
    second = reply(sent[0], flat=np.full(SIZE, 2, np.float32))
    good, bad = gate(sent, [first, second, reply(sent[1]), second])
    assert [message is first for message, _ in good] == [True, False]
    assert [value.binding.partition for _, value in good] == [0, 1]
    assert bad == []


def test_a_duplicate_of_a_bad_reply_does_not_redeem_it() -> None:
    sent = [request(0)]
    good, bad = gate(sent, [Message(Error(2, "lost"), reply_to=sent[0]), reply(sent[0])])
    assert (good, bad) == ([], [Rejected(0, "the client failed: lost")])


def test_a_reply_that_never_came_is_named() -> None:
    sent = [request(0), request(1)]
    good, bad = gate(sent, [reply(sent[1])])
    assert [value.binding.partition for _, value in good] == [1]
    assert bad == [Rejected(0, "no reply in time")]


def test_a_reply_to_what_was_never_sent_is_passed_over() -> None:
    sent = [request(0)]
    good, bad = gate(sent, [reply(request(5)), reply(sent[0])])
    assert [value.binding.partition for _, value in good] == [0]
    assert bad == []


def test_an_error_from_another_source_is_matched_by_the_request_it_answers() -> None:
    sent = [request(0), request(1)]
    error = Message(Error(3, "node unavailable"), reply_to=sent[1])
    error.metadata.__dict__["_src_node_id"] = 1  # a dead node's error comes from the SuperLink
    _, bad = gate(sent, [reply(sent[0]), error])
    assert bad == [Rejected(1, "the client failed: node unavailable")]


def test_when_all_fail_every_client_is_named_with_its_own_reason() -> None:
    sent = [request(partition) for partition in range(3)]
    came = [reply(sent[0], count=1), Message(Error(2, "gone"), reply_to=sent[1])]
    good, bad = gate(sent, came)
    assert good == []
    assert [rejected.partition for rejected in bad] == [0, 1, 2]
    assert [rejected.reason.split(":")[0] for rejected in bad] == [
        "num-examples",
        "the client failed",
        "no reply in time",
    ]


def test_nothing_sent_nothing_gated() -> None:
    assert gate([], []) == ([], [])


def token_gate(value: np.ndarray, count: int) -> tuple[list[tuple[Message, Token]], list[Rejected]]:
    asked = request(0, records.IDENTIFY)
    message = records.token_reply(Token(value, count), binding(0), asked)
    return pass_replies([asked], [message], {2: Expected(binding(0), 3, SAMPLES)}, read_token)


def test_a_good_token_passes() -> None:
    ((_, token),), bad = token_gate(np.array([1, 2, 3], np.float32), SAMPLES)
    assert token.value.tolist() == [1, 2, 3]
    assert token.count == SAMPLES
    assert bad == []


@pytest.mark.parametrize(
    ("value", "count", "reason"),
    [
        (np.zeros(4, np.float32), SAMPLES, "array: must be float32 (3,)"),
        (np.zeros(3, np.float64), SAMPLES, "array: must be float32 (3,)"),
        (np.array([0, np.nan, 0], np.float32), SAMPLES, "array: must be finite"),
        (np.zeros(3, np.float32), SAMPLES + 1, "num-examples: must be 10"),
    ],
)
def test_a_bad_token_is_rejected_with_its_reason(value: np.ndarray, count: int, reason: str) -> None:
    good, bad = token_gate(value, count)
    assert good == []
    assert bad[0].reason.startswith(reason)
