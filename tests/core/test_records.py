"""The wire: every message type survives the way there and back, and Flower's own strategies understand a reply."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from flwr.app import ArrayRecord, ConfigRecord, Error, Message, MetricRecord, RecordDict
from flwr.serverapp.strategy import FedAvg

from fedstrata.core import records
from fedstrata.core.identity import Token
from fedstrata.core.records import Assignment, Binding, Description, Knowledge, ScoreReply, Shard, TrainReply
from fedstrata.server.flower_private import become_server

AT = Binding("run-1", 2, 3, 5)
META = Assignment(AT, (4, 1), 1, 8, '{"seed": 0}', "abcd")


@pytest.fixture(autouse=True)
def _server() -> None:
    become_server()


def flat(*values: float) -> np.ndarray:
    return np.array(values, dtype=np.float32)


def wired(message: Message) -> Message:
    """The message as another process gets it: every record in it turned into bytes and read again."""
    message.content = _again(message.content)
    return message


def _again(record: Any) -> Any:
    children = {name: _again(child) for name, child in record.children.items()} if record.children else None
    return type(record).inflate(record.deflate(), children)


def request(content: RecordDict | None = None, kind: str = records.TRAIN) -> Message:
    return records.address(Message(content or RecordDict(), 7, kind), META)


def reply_of(partition: int, values: list[float], count: int, **changes: Any) -> Message:
    reply = TrainReply(Binding("run-1", 2, 3, partition), flat(*values), count, 0.5, 15, 1.25, changes)
    return records.train_reply(reply, request())


def test_a_train_task_survives() -> None:
    content = records.train_content(records.arrays(flat=flat(1, 2, 3)), {"subspace": 4, "name": "x"})
    task = records.train_task(wired(request(content)))
    assert task.assignment == META
    assert task.flat.tolist() == [1, 2, 3]
    assert task.flat.dtype == np.float32
    assert task.options == {"subspace": 4, "name": "x"}


def test_a_train_reply_survives() -> None:
    reply = records.read_train_reply(wired(reply_of(5, [1, -2], 17, note="kept")))
    assert reply.binding == AT
    assert reply.flat.tolist() == [1, -2]
    assert (reply.count, reply.loss, reply.steps, reply.seconds) == (17, 0.5, 15, 1.25)
    assert reply.options == {"note": "kept"}


def test_a_train_reply_names_the_request_it_answers() -> None:
    asked = request()
    answered = records.train_reply(TrainReply(AT, flat(1), 1, 0.0, 1, 0.0), asked)
    assert answered.metadata.reply_to_message_id == asked.metadata.message_id
    assert answered.metadata.src_node_id == 7


def test_a_token_reply_survives() -> None:
    message = wired(records.token_reply(Token(flat(0.5, 1), 9), AT, request(kind=records.IDENTIFY)))
    token = records.read_token(message)
    assert token.value.tolist() == [0.5, 1]
    assert token.value.dtype == np.float32
    assert token.count == 9
    assert records.binding(message) == AT


def test_a_token_travels_in_fewer_bits_within_half_a_step() -> None:
    """int8: the largest number of a group of 64 is code 127, so half a step is at most a 254th of it, and its scale is
    rounded up by at most a 128th."""
    value = np.linspace(-1, 3, 225, dtype=np.float32)
    for upload, error, nbytes in (("bfloat16", 3 / 256, 450), ("int8", 3 / 254 * (1 + 1 / 128), 225 + 2 * 4)):
        message = wired(records.token_reply(Token(value, 9), AT, request(kind=records.IDENTIFY), upload))
        token = records.read_token(message)
        assert token.value.dtype == np.float32
        assert np.abs(token.value - value).max() <= error
        assert records.tensor_bytes([message]) == nbytes


def test_knowledge_and_shard_survive_in_one_message() -> None:
    many = tuple(flat(index, -index) for index in range(11))  # eleven: as texts, flat.10 sorts before flat.2
    tokens = np.arange(22, dtype=np.float32).reshape(11, 2)
    options = {"epsilon": 0.05, "activation": "softmax", "owners": [2, 0]}
    content = records.with_shard(records.knowledge_content(Knowledge(many, tokens, options)), Shard(3, 50, 75, "test"))
    message = wired(request(content, records.EVALUATE))
    known = records.read_knowledge(message)
    assert [adapter.tolist() for adapter in known.adapters] == [adapter.tolist() for adapter in many]
    assert known.tokens.tolist() == tokens.tolist()
    assert dict(known.options) == options
    assert records.read_shard(message) == Shard(3, 50, 75, "test")


def test_knowledge_of_nothing_survives() -> None:
    known = records.read_knowledge(wired(request(records.knowledge_content(Knowledge((), options={"owners": []})))))
    assert known.adapters == ()
    assert known.tokens.shape == (0, 0)
    assert dict(known.options) == {"owners": []}


def test_a_score_reply_survives() -> None:
    rows = ({"id": "a", "answer": "blau – „ä“"}, {"id": "b", "answer": ""})
    score = ScoreReply({"rouge_l": (1 / 3,), "bleu4": (1.0, 2.0**52, 1e-300)}, 2, 1, (2, 0), rows)
    message = wired(records.score_reply(score, AT, request(kind=records.EVALUATE)))
    found = records.read_scores(message)
    assert found == score  # to the last bit
    assert list(found.stats) == ["rouge_l", "bleu4"]
    assert records.binding(message) == AT


@pytest.mark.parametrize("known", [0, None])
def test_scores_without_subspaces_or_vocabulary_survive(known: int | None) -> None:
    score = ScoreReply({"exact_match": (0.0,)}, 2, known, (), ())
    assert records.read_scores(wired(records.score_reply(score, AT, request(kind=records.EVALUATE)))) == score


def test_a_question_and_its_answer_survive() -> None:
    content = records.with_question(records.knowledge_content(Knowledge((flat(1),))), "how many?", b"\x89PNG\x00")
    asked = wired(request(content, records.ASK))
    assert records.read_question(asked) == ("how many?", b"\x89PNG\x00")
    assert records.read_answer(wired(records.answer_reply("3", [0.25, 0.75], asked))) == ("3", [0.25, 0.75])


def test_a_description_survives() -> None:
    value = Description(5, '[["q", 2, 3]]', "tiny", "ff00", "token_mean", 96, 0.5, 0.05)
    assert records.read_description(wired(records.description_reply(value, request(kind=records.DESCRIBE)))) == value


def test_addressing_keeps_destination_kind_and_the_shared_record() -> None:
    shared = records.arrays(flat=flat(1, 2))
    sent = [records.address(Message(records.train_content(shared, {}), node, records.TRAIN), META) for node in (7, 8)]
    assert [message.metadata.dst_node_id for message in sent] == [7, 8]
    assert all(message.metadata.message_type == records.TRAIN for message in sent)
    assert all(message.content.array_records[records.ARRAYS] is shared for message in sent)
    assert records.assignment(sent[0]) == META


def test_addressing_again_replaces_the_assignment() -> None:
    other = replace(META, binding=replace(META.binding, round=9))
    again = records.address(request(), other)
    assert records.assignment(again) == other
    assert other.binding == Binding("run-1", 2, 9, 5)
    assert other.tasks == META.tasks


def test_a_message_without_meta_has_no_binding() -> None:
    with pytest.raises(KeyError):
        records.binding(Message(RecordDict(), 7, records.TRAIN))


@pytest.mark.parametrize("missing", ["arrays", "metrics", "meta"])
def test_a_train_reply_without_one_of_its_records_is_refused(missing: str) -> None:
    reply = reply_of(5, [1], 1)
    reply.content = RecordDict({name: reply.content[name] for name in reply.content if name != missing})
    with pytest.raises(KeyError, match=missing):
        records.read_train_reply(reply)


def test_tensor_bytes_are_those_of_the_tensors_alone() -> None:
    task = request(records.train_content(records.arrays(flat=np.zeros(100, np.float32)), {"note": "x" * 999}))
    token = records.token_reply(Token(np.zeros(8, np.float32), 3), AT, request())
    half = Message(RecordDict({"arrays": records.arrays(flat=np.zeros((3, 5), np.float16))}), 7, records.TRAIN)
    assert records.tensor_bytes([task]) == 400
    assert records.tensor_bytes([token]) == 32
    assert records.tensor_bytes([half]) == 30
    assert records.tensor_bytes([task, task, token, half]) == 862  # what two clients get is counted twice


def test_knowledge_costs_its_adapters_and_its_tokens() -> None:
    known = Knowledge((np.zeros(10, np.float32), np.zeros(10, np.float32)), np.zeros((2, 3), np.float32))
    assert records.tensor_bytes([request(records.knowledge_content(known))]) == 4 * (10 + 10 + 6)


def test_messages_without_tensors_or_content_cost_nothing() -> None:
    failed = Message(Error(2, "no memory"), reply_to=request())
    nothing = request(records.knowledge_content(Knowledge(())))
    assert records.tensor_bytes([]) == records.tensor_bytes([failed]) == records.tensor_bytes([nothing]) == 0


def test_flowers_own_fedavg_averages_train_replies_unchanged() -> None:
    replies = [reply_of(0, [1, 2], 1), reply_of(1, [5, -2], 3)]
    arrays, metrics = FedAvg().aggregate_train(1, replies)
    assert isinstance(arrays, ArrayRecord)
    assert isinstance(metrics, MetricRecord)
    assert list(arrays) == ["flat"]
    assert arrays["flat"].numpy().tolist() == [4, -1]  # (1·1 + 3·5) / 4, (1·2 + 3·(−2)) / 4
    assert metrics["loss"] == 0.5


def test_a_train_reply_has_one_array_and_one_metric_record_with_the_known_keys() -> None:
    content = reply_of(0, [1], 1).content
    assert {name: set(record) for name, record in content.array_records.items()} == {"arrays": {"flat"}}
    assert {name: set(record) for name, record in content.metric_records.items()} == {"metrics": records.TRAIN_METRICS}
    assert isinstance(content["meta"], ConfigRecord)
