"""The reply gate: what is wrong with a reply costs that reply, by name, and nothing else."""

import io
import json
import pickle
import tracemalloc
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from flwr.app import Array, ArrayRecord, ConfigRecord, Error, Message, MetricRecord, RecordDict
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console

from fedstrata.core import codec, records
from fedstrata.core.errors import FedstrataError
from fedstrata.core.identity import Token
from fedstrata.core.metrics import AccuracyMatrix
from fedstrata.core.records import Binding, Description, ScoreReply, TrainReply
from fedstrata.core.streaming import RunningMean, distance
from fedstrata.server import checkpoint, clipping, configure, exchange, launch
from fedstrata.server.checks import Kind
from fedstrata.server.flower_private import become_server, set_message_id
from fedstrata.server.gate import Expected, Rejected, Update, pass_replies, read_token, read_train, strays
from fedstrata.server.grids import InProcessGrid
from fedstrata.server.intake import Passed
from fedstrata.server.progress import Progress
from fedstrata.server.runfolder import RunFolder
from fedstrata.server.scoregate import read_description, read_scores

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
    assert bad == [Rejected(0, f"array: must be float32 (4,), got float32 (4,) in {len(large)} bytes", Kind.SHAPE)]


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
    assert (good, bad) == ([], [Rejected(0, "the client failed: lost", Kind.FAILED)])


def test_a_reply_that_never_came_is_named() -> None:
    sent = [request(0), request(1)]
    good, bad = gate(sent, [reply(sent[1])])
    assert [value.binding.partition for _, value in good] == [1]
    assert bad == [Rejected(0, "no reply in time", Kind.LATE)]


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
    assert bad == [Rejected(1, "the client failed: node unavailable", Kind.FAILED)]


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


def test_an_encoded_token_must_travel_as_was_agreed() -> None:
    asked = request(0, records.IDENTIFY)
    value = np.array([1, -2, 3], np.float32)
    for upload, reason in (("int8", ""), ("float32", "flat.int8"), ("bfloat16", "flat.int8")):
        message = records.token_reply(Token(value, SAMPLES), binding(0), asked, upload)
        want = Expected(binding(0), 3, SAMPLES, upload="int8")
        good, bad = pass_replies([asked], [message], {2: want}, read_token)
        assert [reason in each.reason for each in bad] == [True] * bool(reason)
        assert [np.abs(token.value - value).max() <= 3 / 254 * 1.01 for _, token in good] == [True] * (not reason)
    message.content.array_records[records.ARRAYS].clear()
    scales = np.array([records.codec.INFINITE], np.uint16)
    message.content.array_records[records.ARRAYS].update(
        records.arrays(**{"flat.int8": np.ones(3, np.int8), "flat.scales": scales})
    )
    _, (bad_scale,) = pass_replies([asked], [message], {2: want}, read_token)
    assert "must be finite" in bad_scale.reason


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


@pytest.mark.parametrize(
    ("make", "kind"),
    [
        (lambda asked: Message(Error(2, "gone"), reply_to=asked), Kind.FAILED),
        (lambda asked: without_record(asked, "metrics"), Kind.SCHEMA),
        (lambda asked: with_metrics(asked, speed=3.0), Kind.SCHEMA),
        (lambda asked: reply(asked, binding=binding(9)), Kind.BINDING),
        (lambda asked: reply(asked, flat=np.zeros(SIZE + 1, np.float32)), Kind.SHAPE),
        (lambda asked: reply(asked, flat=np.array([0, np.nan, 0, 0], np.float32)), Kind.NOT_FINITE),
        (lambda asked: reply(asked, loss=float("nan")), Kind.NOT_FINITE),
        (lambda asked: reply(asked, seconds=float("inf")), Kind.NOT_FINITE),
        (lambda asked: reply(asked, seconds=-1.0), Kind.RANGE),
        (lambda asked: reply(asked, steps=-3), Kind.RANGE),
        (lambda asked: reply(asked, count=9), Kind.COUNT),
        (lambda asked: with_array(asked, Array("float32", (SIZE,), "numpy.ndarray", b"?")), Kind.UNREADABLE),
    ],
)
def test_every_reason_is_of_a_kind_from_the_closed_list(make: Callable[[Message], Message], kind: Kind) -> None:
    sent = [request(0)]
    _, bad = gate(sent, [make(sent[0])])
    assert [rejected.kind for rejected in bad] == [kind]


def test_an_update_far_above_the_median_is_rejected_by_its_norm() -> None:
    sent = [request(0), request(1)]
    start = np.ones(SIZE, np.float32)
    expected = {p + 2: Expected(binding(p), SIZE, SAMPLES, start, 10.0) for p in range(2)}
    far = np.array([12, 1, 1, 1], np.float32)
    good, bad = pass_replies(sent, [reply(sent[0], flat=start * 5), reply(sent[1], flat=far)], expected, read_train)
    assert [value.binding.partition for _, value in good] == [0]
    assert bad == [Rejected(1, "norm of the update: must be at most 10, 10 × the subspace's median, got 11", Kind.NORM)]


def test_second_answers_and_answers_to_nothing_are_counted() -> None:
    sent = [request(0), request(1)]
    first = reply(sent[0])
    came = [first, reply(sent[1]), first, reply(request(7)), reply(request(7))]
    assert strays(sent, came) == [Kind.DUPLICATE, Kind.LATE, Kind.DUPLICATE]


EMPTY = Progress(AccuracyMatrix((), (), ()))


def test_the_limit_of_a_norm_is_ten_medians_of_its_own_subspace_once_there_are_five() -> None:
    progress = EMPTY.count_norms([(0, 1.0), (0, 2.0), (0, 3.0), (0, 4.0), (1, 100.0)])
    assert progress.limit(0) == float("inf")
    progress = progress.count_norms([(0, 5.0)])
    assert (progress.limit(0), progress.limit(1), progress.limit(2)) == (30.0, float("inf"), float("inf"))
    assert Progress.from_json(json.loads(json.dumps(progress.to_json()))).limit(0) == 30.0
    assert len(EMPTY.count_norms((0, float(n)) for n in range(500)).norms[0]) == 50


def test_three_rejections_in_a_row_send_a_client_away_for_five_rounds() -> None:
    progress = EMPTY
    for number in (1, 2):
        progress = progress.judge(number, {1}, {0})
    assert (progress.strikes, progress.quarantine) == ({0: 2}, {})
    clean = progress.judge(3, {0}, set()).judge(4, set(), {0})
    assert (clean.strikes, clean.quarantine) == ({0: 1}, {})
    away = progress.judge(3, set(), {0})
    assert (away.strikes, away.quarantine) == ({}, {0: 8})
    assert away.judge(7, set(), set()).quarantine == {0: 8}
    assert away.judge(8, set(), set()).quarantine == {}
    again = Progress.from_json(json.loads(json.dumps(away.count_rejected([Kind.NORM, Kind.NORM]).to_json())))
    assert (again.quarantine, again.rejected) == ({0: 8}, {"norm": 2})


def test_updates_above_their_subspaces_median_are_scaled_down_to_it() -> None:
    starts = {partition: np.ones(SIZE, np.float32) for partition in range(3)}
    sent = [request(partition) for partition in range(3)]
    flats = [np.ones(SIZE, np.float32) + np.float32(step) * np.eye(SIZE, dtype=np.float32)[0] for step in (1, 2, 8)]
    good, _ = gate(sent, [reply(asked, flat=flat) for asked, flat in zip(sent, flats, strict=True)])
    came = {value.binding.partition: message for message, value in good}
    norms = {partition: distance(flat, starts[partition]) for partition, flat in enumerate(flats)}
    assert norms == {0: 1.0, 1: 2.0, 2: 8.0}
    passed = [Passed(p, Update(GOOD, norms[p]), lambda p=p: came[p]) for p in came]
    updates = clipping.Updates(passed, starts, clipping.factors(norms, {}, EMPTY.usual))
    clipped = [records.read_train_reply(message).flat.tolist() for message in updates]
    assert clipped == [[2, 1, 1, 1], [3, 1, 1, 1], [3, 1, 1, 1]]
    assert [m.metadata.reply_to_message_id for m in updates] == [m.metadata.message_id for m in sent]
    assert good[2][1].flat[0] == 9  # what came is not changed


def test_a_subspace_is_clipped_to_what_is_usual_in_it() -> None:
    placement = {1: 0, 2: 0, 3: 0, 4: 0, 5: 1, 6: 1, 7: 2}
    norms = {1: 1.0, 2: 2.0, 3: 3.0, 4: 50.0, 5: 32.0, 6: 80.0, 7: 20.0}
    # subspace 0: the median of its own four, 2.5; 1 and 2 have fewer than three: that of the round, 20
    assert clipping.factors(norms, placement, EMPTY.usual) == {3: 2.5 / 3, 4: 0.05, 5: 0.625, 6: 0.25}
    # subspace 1 is known by five earlier updates whose median is 32; one fewer is not enough to know 2 by
    known = EMPTY.count_norms([*((1, n) for n in (10.0, 20.0, 32.0, 50.0, 9e9)), *((2, 1.0) for _ in range(4))])
    assert clipping.factors(norms, placement, known.usual) == {3: 2.5 / 3, 4: 0.05, 6: 0.4}
    assert clipping.factors({}, {}, EMPTY.usual) == {}
    assert clipping.factors({1: 4.0}, {}, EMPTY.usual) == {}


def test_a_loud_subspace_neither_loosens_the_clip_of_a_quiet_one_nor_gets_out_of_hand_itself() -> None:
    placement = {p: p // 5 for p in range(15)}
    quiet = dict.fromkeys(range(4), 1.0) | {4: 9.0}  # 4 is hostile; the round's median is 4
    loud = {p: 4.0 if p < 10 else 6.0 for p in range(5, 15)}
    assert clipping.factors(quiet | loud, placement, EMPTY.usual) == {4: 1 / 9}
    taken = dict.fromkeys(range(10, 13), 1e6) | {13: 4.0, 14: 4.0}  # most of subspace 2 is hostile: twice the median, 8
    assert clipping.factors(quiet | loud | taken, placement, EMPTY.usual) == {4: 1 / 9, 10: 8e-6, 11: 8e-6, 12: 8e-6}


PREDICTION = {"id": "a", "prediction": "x", "answer": "x", "score": 1.0, "weights": [1.0]}
SCORE = ScoreReply({"exact_match": (7.0,)}, 10, 9, (6, 4), (PREDICTION,) * 10)


def scored(**changes: Any) -> ScoreReply:
    asked = request(0, records.EVALUATE)
    message = records.score_reply(replace(SCORE, **changes), binding(0), asked)
    ((_, value),), _ = pass_replies(
        [asked],
        [message],
        {2: Expected(binding(0), 0, 10)},
        lambda message, want: read_scores(message, want, metrics=("exact_match",), subspaces=2),
    )
    return value


def refusal(**changes: Any) -> tuple[str, Kind]:
    asked = request(0, records.EVALUATE)
    message = records.score_reply(replace(SCORE, **changes), binding(0), asked)
    _, (bad,) = pass_replies(
        [asked],
        [message],
        {2: Expected(binding(0), 0, 10)},
        lambda message, want: read_scores(message, want, metrics=("exact_match",), subspaces=2),
    )
    return bad.reason.split(":")[0], bad.kind


def test_a_good_score_passes() -> None:
    assert scored() == SCORE
    assert scored(in_vocabulary=None).in_vocabulary is None


@pytest.mark.parametrize(
    ("changes", "name", "kind"),
    [
        ({"count": 11}, "num-examples", Kind.COUNT),
        ({"count": 10.0}, "num-examples", Kind.COUNT),
        ({"stats": {"iou": (1.0,)}}, "metrics", Kind.SCHEMA),
        ({"stats": {"exact_match": (1.0, 2.0)}}, "stats.exact_match", Kind.SHAPE),
        ({"stats": {"exact_match": (float("nan"),)}}, "stats.exact_match", Kind.NOT_FINITE),
        ({"stats": {"exact_match": (-1.0,)}}, "stats.exact_match", Kind.RANGE),
        ({"stats": {"exact_match": (11.0,)}}, "score exact_match", Kind.RANGE),
        ({"in_vocabulary": 11}, "in-vocabulary", Kind.RANGE),
        ({"in_vocabulary": -1}, "in-vocabulary", Kind.RANGE),
        ({"hits": (10,)}, "hits", Kind.SHAPE),
        ({"hits": (11, -1)}, "hits", Kind.RANGE),
        ({"hits": (5, 4)}, "hits", Kind.COUNT),
        ({"predictions": (PREDICTION,) * 9}, "predictions", Kind.COUNT),
    ],
)
def test_a_score_that_cannot_be_is_refused(changes: dict[str, Any], name: str, kind: Kind) -> None:
    assert refusal(**changes) == (name, kind)


LAYOUT = json.dumps({})
SAYS = Description(0, LAYOUT, "tiny", "ab", "base", 4, 0.5, 0.1)


@pytest.mark.parametrize("changes", [{"layout": "?"}, {"tau": float("nan")}, {"partition": "0"}, {"dim": -1}])
def test_a_description_that_cannot_be_is_refused(monkeypatch: pytest.MonkeyPatch, changes: dict[str, Any]) -> None:
    monkeypatch.setattr("fedstrata.server.scoregate.Layout.from_json", lambda text: json.loads(text))
    asked = request(0, records.DESCRIBE)
    assert read_description(records.description_reply(SAYS, asked)) == SAYS
    with pytest.raises(ValueError, match="must be|description"):
        read_description(records.description_reply(replace(SAYS, **changes), asked))


def test_a_client_that_does_not_answer_cannot_describe_its_base() -> None:
    class Silent(InProcessGrid):
        def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None = None) -> list[Message]:
            return []

    with pytest.raises(FedstrataError, match="a client cannot describe its base model: no reply"):
        exchange.describe(Silent(1, 1, "builtins:object"), 2, "{}", "")


class Bad(InProcessGrid):
    """A grid one of whose replies is changed: `spoil` is called with every reply and gives the one that comes."""

    def __init__(self, clients: int, spoil: Callable[[Message], Message]) -> None:
        super().__init__(clients, 1)
        self.spoil = spoil

    def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None = None) -> list[Message]:
        return [self.spoil(reply) for reply in super().send_and_receive(messages, timeout=timeout)]


WORDS = ["federation.grid=inprocess", "train.local_epochs=1", "evaluate.split=val", "strategy.name=finetune"]


def run(folder: Path, grid: InProcessGrid, *words: str) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    config = configure.resolve("fcit-mini-short", [*WORDS, *words, f"run.dir={folder}"])
    found = RunFolder(launch.run(config, Console(quiet=True), grid))
    return found.summary, found.events()


def test_a_client_that_is_rejected_round_after_round_sits_five_out_and_the_run_completes(tmp_path: Path) -> None:
    def spoil(came: Message) -> Message:
        if came.metadata.message_type == records.TRAIN and came.metadata.src_node_id == 3:
            came.content.array_records["arrays"]["flat"] = Array(np.full(3, np.nan, np.float32))
        return came

    words = ["federation.clients=3", "federation.clients_per_round=3", "federation.rounds_per_stage=5"]
    summary, events = run(tmp_path / "run", Bad(3, spoil), *words)
    rejected = [(e["stage"], e["round"], e["client"], e["kind"]) for e in events if e["event"] == "rejected"]
    assert rejected == [*((1, n, 1, "shape") for n in (1, 2, 3)), *((2, n, 1, "shape") for n in (4, 5))]
    (away,) = [event for event in events if event["event"] == "quarantined"]
    assert (away["stage"], away["round"], away["client"], away["until"]) == (1, 3, 1, 8)
    assert summary["status"] == "completed"
    assert summary["rejected"] == {"shape": 5}
    trained = {row["client"] for e in events if e["event"] == "round" for row in e["participants"]}
    assert trained == {0, 2}


THREE = ["federation.clients=3", "federation.clients_per_round=3", "federation.rounds_per_stage=1"]


def shorten(came: Message) -> Message:
    """In stage 1, client 1 sends what has another shape."""
    if came.metadata.message_type != records.TRAIN:
        return came
    at = records.binding(came)
    if (at.stage, at.partition) == (1, 1):
        came.content.array_records["arrays"]["flat"] = Array(np.zeros(3, np.float32))
    return came


def test_a_round_without_quorum_is_skipped_and_said_so_and_the_model_is_as_it_was(tmp_path: Path) -> None:
    summary, events = run(tmp_path / "run", Bad(3, shorten), *THREE, "federation.min_replies=3")
    assert [event["skipped"] for event in events if event["event"] == "round"] == [True, False]
    assert (summary["status"], summary["skipped_rounds"]) == ("completed", 1)
    before, after = (checkpoint.stage_start(tmp_path / "run" / "checkpoints", stage) for stage in (1, 2))
    assert before is not None
    assert after is not None
    assert checkpoint.state_sha256(before.parts) == checkpoint.state_sha256(after.parts)
    assert summary["final_state_sha256"] != checkpoint.state_sha256(after.parts)


def test_more_failures_than_are_tolerated_end_the_run_with_the_reasons(tmp_path: Path) -> None:
    with pytest.raises(FedstrataError, match="max_failures = 0, but this round had 1: client 1: array: must be "):
        run(tmp_path / "run", Bad(3, shorten), *THREE, "federation.max_failures=0")
    assert RunFolder(tmp_path / "run").summary["status"] == "failed"


def test_a_bad_score_is_asked_for_once_more_of_another_client(tmp_path: Path) -> None:
    spoilt: list[int] = []

    def once(came: Message) -> Message:
        if came.metadata.message_type == records.EVALUATE and not spoilt:
            spoilt.append(came.metadata.src_node_id)
            return Message(Error(2, "no memory"), reply_to=_asked(came))
        return came

    words = ["federation.rounds_per_stage=1", "federation.clients_per_round=1", "evaluate.shard=25"]
    whole, _ = run(tmp_path / "whole", InProcessGrid(4, 1), *words)
    summary, events = run(tmp_path / "run", Bad(4, once), *words)
    assert [summary[key] for key in ("last", "avg", "final_state_sha256")] == [
        whole[key] for key in ("last", "avg", "final_state_sha256")
    ]
    (told,) = [event for event in events if event["event"] == "score_refused"]
    assert (told["stage"], told["shard"], told["kind"]) == (0, 0, "failed")
    assert summary["rejected"] == {"failed": 1}


def test_a_score_that_is_bad_twice_ends_the_run_with_the_reason(tmp_path: Path) -> None:
    def spoil(came: Message) -> Message:
        if came.metadata.message_type == records.EVALUATE:
            metrics = came.content.metric_records["metrics"]
            came.content["metrics"] = MetricRecord({**metrics, "stats.exact_match": [1e9]})
        return came

    with pytest.raises(FedstrataError, match="scoring examples 0-50 of task 0 failed: score exact_match: must be betw"):
        run(tmp_path / "run", Bad(4, spoil))


def _asked(came: Message) -> Message:
    """A message that an error can be the answer to."""
    asked = Message(RecordDict(), came.metadata.src_node_id, came.metadata.message_type)
    set_message_id(asked.metadata, came.metadata.reply_to_message_id)
    return asked


def test_an_attackers_update_is_scaled_down_where_clipping_is_on(tmp_path: Path) -> None:
    def spoil(came: Message) -> Message:
        if came.metadata.message_type == records.TRAIN and came.metadata.src_node_id == 3:
            flat = came.content.array_records["arrays"]["flat"].numpy()
            came.content.array_records["arrays"]["flat"] = Array(flat + np.float32(1e4))
        return came

    words = ["federation.clients=3", "federation.clients_per_round=3", "federation.rounds_per_stage=1"]
    norms = {}
    for clip in ("off", "median"):
        folder = tmp_path / clip
        run(folder, Bad(3, spoil), *words, f"federation.clip={clip}")
        commit = checkpoint.newest(folder / "checkpoints")
        assert commit is not None
        norms[clip] = float(np.linalg.norm(commit.parts.tensors["adapter"]))
    assert norms["median"] < 100 < norms["off"]


START = np.linspace(-1, 1, 100, dtype=np.float32)


def coded(asked: Message, kind: str = "int8", size: int = 100, **changes: np.ndarray) -> Message:
    """A reply whose adapter travels as `kind`; `changes`: arrays that are put in the place of its own."""
    start = np.resize(START, size)
    parts, _ = codec.encode(start + np.float32(0.01), start, None, kind)
    at = binding(asked.metadata.dst_node_id - 2)
    return records.train_reply(replace(GOOD, binding=at), asked, {**parts, **changes})


def coded_gate(message: Message, kind: str = "int8", limit: float = float("inf")) -> TrainReply | Rejected:
    want = Expected(binding(0), 100, SAMPLES, START, limit, upload=kind)
    good, bad = pass_replies([request(0)], [message], {2: want}, read_train)
    return good[0][1] if good else bad[0]


@pytest.mark.parametrize("kind", ["bfloat16", "int8"])
def test_an_encoded_reply_is_decoded_to_the_adapter_it_stands_for(kind: str) -> None:
    passed = coded_gate(coded(request(0), kind), kind)
    assert isinstance(passed, TrainReply)
    assert passed.flat.dtype == np.float32
    assert passed.flat - START == pytest.approx(0.01, rel=0.01)


@pytest.mark.parametrize(
    ("spoil", "kind", "reason"),
    [
        (lambda m: coded(m, "bfloat16"), Kind.SCHEMA, "record 'flat.int8' is missing"),
        (lambda m: reply(m, flat=START), Kind.SCHEMA, "record 'flat.int8' is missing"),
        (lambda m: coded(m, size=99), Kind.SHAPE, "array: must be int8 (100,), got int8 (99,)"),
        (
            lambda m: coded(m, **{"flat.int8": np.zeros(100, np.uint8)}),
            Kind.SHAPE,
            "array: must be int8 (100,), got uint8",
        ),
        (
            lambda m: coded(m, **{"flat.scales": np.zeros(3, np.uint16)}),
            Kind.SHAPE,
            "array: must be uint16 (2,), got uint16 (3,)",
        ),
        (
            lambda m: coded(m, **{"flat.scales": np.array([1, 0x7F80], np.uint16)}),
            Kind.NOT_FINITE,
            "flat.scales: must be finite",
        ),
        (
            lambda m: coded(m, **{"flat.scales": np.array([1, 0x8001], np.uint16)}),
            Kind.NOT_FINITE,
            "flat.scales: must be finite and not negative",
        ),
        (
            lambda m: coded(m, **{"flat.scales": np.array([1, 0x7F7F], np.uint16)}),
            Kind.NOT_FINITE,
            "array: must be finite",
        ),
        (lambda m: coded(m, **{"more": np.zeros(1, np.float32)}), Kind.SCHEMA, "records: must be"),
    ],
)
def test_a_corrupted_encoding_is_rejected_with_its_reason(
    spoil: Callable[[Message], Message], kind: Kind, reason: str
) -> None:
    rejected = coded_gate(spoil(request(0)))
    assert isinstance(rejected, Rejected)
    assert rejected.kind == kind
    assert rejected.reason.startswith(reason)


def test_bytes_of_an_encoding_that_are_not_what_was_declared_are_rejected() -> None:
    message = coded(request(0))
    longer = Array(np.zeros(101, np.int8)).data
    message.content.array_records["arrays"]["flat.int8"] = Array("int8", (100,), "numpy.ndarray", longer)
    rejected = coded_gate(message)
    assert isinstance(rejected, Rejected)
    assert rejected.reason.startswith("array: must be int8 (100,), got int8 (101,)")


def test_an_encoding_of_another_round_is_rejected_since_its_start_was_another() -> None:
    message = coded(request(0))
    message.content.config_records["meta"]["round"] = 1
    rejected = coded_gate(message)
    assert isinstance(rejected, Rejected)
    assert rejected.kind == Kind.BINDING


def test_an_encoded_update_far_above_the_median_is_rejected_by_its_norm() -> None:
    rejected = coded_gate(coded(request(0)), limit=0.05)  # it moved by 0.01 · √100
    assert isinstance(rejected, Rejected)
    assert rejected.kind == Kind.NORM


@pytest.mark.parametrize("place", [0, SIZE - 1])
@pytest.mark.parametrize("value", [1e16, -1e16, 3e38, -3e38])
def test_a_number_that_no_adapter_holds_is_rejected_since_two_of_them_make_the_mean_infinite(
    value: float, place: int
) -> None:
    flat = np.zeros(SIZE, np.float32)
    flat[place] = value
    reason = rejection(lambda asked: reply(asked, flat=flat))
    assert reason.startswith("array: must be at most 1e+15 in size, got ")


@pytest.mark.parametrize("values", [[1e15, -1e15, 0, 0], [1e-45, -0.0, 1e-38, -1e-45]])
def test_large_and_denormal_numbers_that_can_be_averaged_pass(values: list[float]) -> None:
    sent = [request(0)]
    flat = np.array(values, np.float32)
    ((_, value),), bad = gate(sent, [reply(sent[0], flat=flat)])
    assert (value.flat.tobytes(), bad) == (flat.tobytes(), [])


@pytest.mark.parametrize(
    "values",
    [
        np.zeros(SIZE, np.complex64),
        np.zeros(SIZE, np.bool_),
        np.zeros(SIZE, ">f4"),
        np.zeros(SIZE, "S4"),
        np.zeros(SIZE, "datetime64[s]"),
        np.zeros((1, SIZE), np.float32),
        np.zeros((SIZE, 1), np.float32),
        np.zeros(SIZE - 1, np.float32),
    ],
)
def test_what_could_be_broadcast_or_cast_is_not(values: np.ndarray) -> None:
    assert rejection(lambda asked: with_array(asked, Array(values)))
    lying = Array("float32", (SIZE,), "numpy.ndarray", saved(values))
    assert rejection(lambda asked: with_array(asked, lying))


@pytest.mark.parametrize("name", ["flаt", "../flat", "flat\0", "", "x" * 100_000, "flat "])
def test_a_name_that_only_looks_right_is_another_name(name: str) -> None:
    def renamed(asked: Message) -> Message:
        message = reply(asked)
        arrays = message.content.array_records["arrays"]
        arrays[name] = arrays.pop("flat")
        return message

    assert rejection(renamed) == "record 'flat' is missing"


def test_twenty_thousand_metrics_are_refused_by_their_names() -> None:
    def many(asked: Message) -> Message:
        return with_metrics(asked, **{f"m{n}": 0.0 for n in range(20_000)})

    assert rejection(many).startswith("records: must be")


@pytest.mark.parametrize("count", [10.0, 10.5, -0.0])
def test_a_count_that_is_no_whole_number_is_rejected_since_flowers_strategies_would_weigh_by_it(count: float) -> None:
    assert rejection(lambda asked: with_metrics(asked, **{"num-examples": count})).startswith(
        "num-examples: must be 10"
    )


class Canary:
    """Leaves a file where somebody unpickles it."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.path,)


def test_pickled_bytes_are_not_unpickled(tmp_path: Path) -> None:
    canary, control = tmp_path / "canary", tmp_path / "control"
    pickle.loads(pickle.dumps(Canary(control)))
    assert control.exists()  # it would sing
    rows = np.array([Canary(canary)] * SIZE, dtype=object)
    buffer = io.BytesIO()
    np.save(buffer, rows, allow_pickle=True)
    zipped = io.BytesIO()
    np.savez(zipped, rows, allow_pickle=True)
    for data in (buffer.getvalue(), pickle.dumps(Canary(canary)), zipped.getvalue()):
        lying = Array("float32", (SIZE,), "numpy.ndarray", data)
        assert rejection(lambda asked, lying=lying: with_array(asked, lying))
    assert not canary.exists()


def test_a_header_that_claims_gigabytes_takes_no_memory() -> None:
    header = io.BytesIO()
    fields = {"descr": "<f4", "fortran_order": False, "shape": (200_000_000_000,)}
    np.lib.format.write_array_header_1_0(header, fields)
    lying = Array("float32", (SIZE,), "numpy.ndarray", header.getvalue() + b"\0" * 16)
    tracemalloc.start()
    try:
        assert rejection(lambda asked: with_array(asked, lying))
        assert tracemalloc.get_traced_memory()[1] < 16e6
    finally:
        tracemalloc.stop()


def sane(flat: np.ndarray) -> bool:
    return flat.dtype == np.float32 and flat.shape == (SIZE,) and bool(np.abs(flat).max() <= 1e15)


def test_every_flipped_bit_of_an_arrays_header_is_refused_or_leaves_a_sane_array() -> None:
    good = GOOD.flat.astype(np.float32)
    data = saved(good)
    for bit in range(8 * (len(data) - good.nbytes)):
        flipped = bytearray(data)
        flipped[bit // 8] ^= 1 << bit % 8
        sent = [request(0)]
        message = with_array(sent[0], Array("float32", (SIZE,), "numpy.ndarray", bytes(flipped)))
        passed, bad = gate(sent, [message])
        assert len(passed) + len(bad) == 1
        assert all(sane(value.flat) for _, value in passed)  # a shorter header moves the bytes that are read


MUTANTS = st.lists(st.tuples(st.integers(0, 143), st.integers(0, 255)), min_size=1, max_size=20)


@settings(max_examples=300, deadline=None)
@given(changes=MUTANTS, cut=st.integers(0, 144), more=st.binary(max_size=40))
def test_whatever_is_done_to_the_bytes_costs_at_most_that_reply(
    changes: list[tuple[int, int]], cut: int, more: bytes
) -> None:
    data = bytearray(saved(GOOD.flat)[:144])
    for place, value in changes:
        data[place] = value
    mutant = Array("float32", (SIZE,), "numpy.ndarray", bytes(data[:cut]) + more)
    sent = [request(partition) for partition in range(3)]
    passed, bad = gate(sent, [reply(sent[0]), with_array(sent[1], mutant), reply(sent[2])])
    values = {value.binding.partition: value.flat for _, value in passed}
    assert {0, 2} <= set(values)
    assert len(passed) + len(bad) == 3
    assert all(sane(flat) for flat in values.values())


FIELDS = st.one_of(
    st.integers(-(2**63), 2**63 - 1), st.floats(), st.lists(st.floats(), max_size=3), st.lists(st.integers(0, 9))
)


@settings(max_examples=200, deadline=None)
@given(name=st.sampled_from(["num-examples", "loss", "steps", "seconds"]), value=FIELDS)
def test_whatever_a_metric_is_nothing_but_a_sane_one_passes(name: str, value: Any) -> None:
    sent = [request(0)]
    try:
        message = with_metrics(sent[0], **{name: value})
    except (TypeError, ValueError):  # what Flower's own record refuses
        return
    passed, bad = gate(sent, [message])
    assert len(passed) + len(bad) == 1
    for _, one in passed:
        assert one.count == SAMPLES
        assert np.isfinite([one.loss, one.seconds]).all()
        assert min(one.steps, one.seconds) >= 0


@settings(max_examples=100, deadline=None)
@given(run=st.text(max_size=8), stage=st.integers(-9, 9), number=st.integers(-9, 9), partition=st.integers(-9, 9))
def test_only_the_binding_that_was_asked_for_passes(run: str, stage: int, number: int, partition: int) -> None:
    at = Binding(run, stage, number, partition)
    sent = [request(1)]
    passed, _ = gate(sent, [reply(sent[0], binding=at)])
    assert bool(passed) == (at == binding(1))


def test_the_merge_of_a_round_with_one_bad_reply_is_that_of_the_good_ones_bit_for_bit() -> None:
    """For one reply of every kind; `server.federation` gives the strategy what the gate lets through."""
    bad: list[Callable[[Message], Message]] = [
        lambda asked: Message(Error(2, "gone"), reply_to=asked),
        lambda asked: without_record(asked, "metrics"),
        lambda asked: reply(asked, binding=binding(9)),
        lambda asked: reply(asked, flat=np.zeros(SIZE + 1, np.float32)),
        lambda asked: reply(asked, flat=np.array([0, np.nan, 0, 0], np.float32)),
        lambda asked: reply(asked, flat=np.full(SIZE, 3e38, np.float32)),
        lambda asked: reply(asked, count=10**15),
        lambda asked: with_array(asked, Array("float32", (SIZE,), "numpy.ndarray", b"?")),
    ]
    flats = np.random.default_rng(0).normal(size=(3, SIZE)).astype(np.float32)

    def merged(make: Callable[[Message], Message] | None) -> bytes:
        sent = [request(partition) for partition in range(4)]
        came = [reply(asked, flat=flat) for asked, flat in zip(sent, flats, strict=False)]
        good, _ = gate(sent, [*came, *([make(sent[3])] if make else [])])
        mean = RunningMean()
        for _, value in good:
            mean.add(value.flat, value.count)
        return mean.value().tobytes()

    plain = merged(None)
    assert all(merged(make) == plain for make in bad)
