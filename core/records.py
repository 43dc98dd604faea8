"""What travels between server and clients: typed values ↔ Flower messages. The only place where wire keys are spelled.

Every message carries `meta`: which run, stage, round and partition it belongs to, and the run's resolved config as
JSON (a client in a container has no server files). A reply repeats the binding, so that no reply can enter another
round. A train reply has exactly one ArrayRecord and one MetricRecord, so Flower's own strategies average it unchanged;
a method that declares extras gets them in a second ArrayRecord.
"""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, cast

import numpy as np
from flwr.app import Array, ArrayRecord, ConfigRecord, Error, Message, MetricRecord, RecordDict

from fedstrata.core import codec
from fedstrata.core.adapters import Flat
from fedstrata.core.identity import Token, Vector
from fedstrata.core.packing import pack, view

TRAIN, EVALUATE = "train", "evaluate"
IDENTIFY, DESCRIBE, ASK = "query.identify", "query.describe", "query.ask"
ARRAYS, ROUTER, CONFIG, META, METRICS = "arrays", "router", "config", "meta", "metrics"
SHARED = "shared"
TAILS, OWN = "tails", "own"  # an option of knowledge whose adapters have a tail each
PAYLOAD, EXTRA = "payload", "extra"  # what a method sends beside the adapter, down and up
FLAT, TOKEN, TOKENS, COUNT = "flat", "token", "tokens", "num-examples"
TOO_FEW = 100  # code of an error reply: fewer instructions than a token needs; Flower's own codes end at 8
NOTHING = ArrayRecord()
FORGED = 101  # code of an error that stands for a reply whose signature does not hold
SILENT = 102  # … for an error that nobody signed: it says nothing of the client that was asked
HELD = "tasks"  # beside a config on the wire: the names of the tasks whose data the clients hold
TRAIN_METRICS = {COUNT, "loss", "steps", "seconds"}


@dataclass(frozen=True)
class Binding:
    """What one message belongs to. Stage and round count from 1; 0: outside the rounds."""

    run: str = ""
    stage: int = 0
    round: int = 0
    partition: int = -1


@dataclass(frozen=True)
class Assignment:
    """What one participant works on: its share of `tasks`, or the part-th of `parts` equal draws from it (joint)."""

    binding: Binding
    tasks: tuple[int, ...] = ()
    part: int = 0
    parts: int = 1
    config: str = ""  # the run's resolved config, JSON
    layout: str = ""  # hash of the layout both sides must share


@dataclass(frozen=True)
class TrainTask:
    """Train this adapter on that share. `options` are the strategy's own scalars (for example the subspace)."""

    assignment: Assignment
    flat: Flat
    options: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class TrainReply:
    """The trained adapter; loss is the mean over the client's optimiser steps, seconds its training time."""

    binding: Binding
    flat: Flat
    count: int
    loss: float
    steps: int
    seconds: float
    options: Mapping[str, Any] = field(default_factory=dict)
    extra: Mapping[str, np.ndarray] = field(default_factory=dict)  # what the strategy's `extras` declare


@dataclass(frozen=True)
class Knowledge:
    """What answers at inference: K flat adapters of one rank and, for a router, their K tokens [K, D].

    shared: the layout's dense tail, which all adapters share and none of them carries; empty without one. Where every
        adapter has its own, those of all of them one after another.
    """

    adapters: tuple[Flat, ...]
    tokens: Vector = field(default_factory=lambda: np.zeros((0, 0), dtype=np.float32))
    options: Mapping[str, Any] = field(default_factory=dict)
    shared: Flat = field(default_factory=lambda: np.zeros(0, dtype=np.float32))

    def whole(self, tail: int) -> list[Flat]:
        """The adapters, each with its tail of this length behind it."""
        last = max(self.shared.size - tail, 0)
        starts = [min(index * tail, last) for index in range(len(self.adapters))]
        return [np.concatenate([a, self.shared[i : i + tail]]) for a, i in zip(self.adapters, starts, strict=True)]


@dataclass(frozen=True)
class Shard:
    """The examples start..stop of one task's split, to be scored."""

    task: int
    start: int
    stop: int
    split: str


@dataclass(frozen=True)
class ScoreReply:
    """What `count` examples of one task add up to.

    Attributes:
        stats: metric → its summed statistics (`core.scoring.Scorer`); the task's own metric first.
        in_vocabulary: how many answers are from the task's vocabulary; None where it is open-ended.
        hits: `hits[i]` counts the examples whose heaviest subspace was i.
    """

    stats: Mapping[str, tuple[float, ...]]
    count: int
    in_vocabulary: int | None
    hits: tuple[int, ...]
    predictions: tuple[dict[str, Any], ...]


@dataclass(frozen=True)
class Description:
    """What the server must know of the base model, which only clients hold.

    Attributes:
        shape: `core.estimate.Shape` as JSON; empty: unknown.
        machine: `core.machine.Footprint` as JSON; empty: unknown.
        holding: `Holding` as JSON, of a client with a folder of its own; empty: it has none.
        words: how many of a token's `dim` numbers are of the text, the first ones; 0: none, or a base without tokens.
        words_tau: the match threshold of these alone.
    """

    partition: int
    layout: str
    base: str
    base_hash: str
    encoder: str
    dim: int
    tau: float
    epsilon: float
    shape: str = ""
    machine: str = ""
    holding: str = ""
    words: int = 0
    words_tau: float = 0.0


@dataclass(frozen=True)
class Holding:
    """What a client with a folder of its own says of its data: how much of which task is there when. No data.

    Attributes:
        rounds: [round of the run][task] → instructions to train then; 0 for a task that it does not train then.
        keys: equally shaped; a word that changes when these instructions do, under a key that the client keeps.
        whole: [task] → all instructions that it ever holds, and `whole_keys` their words.
        splits: split → [task] → examples to score.
    """

    rounds: list[list[int]]
    keys: list[list[str]]
    whole: list[int]
    whole_keys: list[str]
    splits: dict[str, list[int]]

    def to_json(self) -> str:
        return json.dumps(asdict(self))

    @staticmethod
    def from_json(text: str) -> "Holding":
        """Raises ValueError, TypeError or KeyError for what is none."""
        return Holding(**json.loads(text))


def arrays(**named: np.ndarray) -> ArrayRecord:
    return ArrayRecord({name: pack(value) for name, value in named.items()})


def arrays_in(message: Message, name: str) -> ArrayRecord:
    """Raises KeyError when the message has no array record of that name."""
    record = message.content[name]  # Flower's view of one type of records is made anew each time
    if not isinstance(record, ArrayRecord):
        raise KeyError(name)
    return record


def to_meta(value: Assignment) -> ConfigRecord:
    fields = {**vars(value.binding), **{key: item for key, item in vars(value).items() if key != "binding"}}
    return ConfigRecord({key: list(item) if isinstance(item, tuple) else item for key, item in fields.items()})


def assignment(message: Message) -> Assignment:
    """The assignment in a message's meta. Raises KeyError when it carries none."""
    meta = cast(ConfigRecord, message.content[META])
    return Assignment(
        binding(message),
        tuple(cast(list[int], meta["tasks"])),
        cast(int, meta["part"]),
        cast(int, meta["parts"]),
        cast(str, meta["config"]),
        cast(str, meta["layout"]),
    )


def binding(message: Message) -> Binding:
    """The binding in a message's meta. Raises KeyError when it carries none."""
    meta = cast(ConfigRecord, message.content[META])
    run, stage, round_, partition = (meta[key] for key in ("run", "stage", "round", "partition"))
    return Binding(str(run), cast(int, stage), cast(int, round_), cast(int, partition))


def address(message: Message, meta: Assignment) -> Message:
    """The same message with `meta` added; records that clients share are not copied."""
    records = {key: message.content[key] for key in message.content if key != META}
    content = RecordDict({**records, META: to_meta(meta)})
    return Message(content, message.metadata.dst_node_id, message.metadata.message_type)


def train_content(flat: ArrayRecord, options: Mapping[str, Any], payload: ArrayRecord | None = None) -> RecordDict:
    """A strategy's train message; clients that get the same adapter, or the same payload, share one ArrayRecord."""
    beside = {} if payload is None else {PAYLOAD: payload}
    return RecordDict({ARRAYS: flat, **beside, CONFIG: ConfigRecord(dict(options))})


def train_tasks(messages: Sequence[Message]) -> list[TrainTask]:
    """Messages that share a record share one decoded adapter."""
    decoded: dict[int, Flat] = {}
    tasks = []
    for message in messages:
        record = cast(ArrayRecord, message.content[ARRAYS])
        if id(record) not in decoded:
            decoded[id(record)] = record[FLAT].numpy()
        options = dict(cast(ConfigRecord, message.content[CONFIG])) if CONFIG in message.content else {}
        tasks.append(TrainTask(assignment(message), decoded[id(record)], options))
    return tasks


def train_task(message: Message) -> TrainTask:
    """One message's."""
    return train_tasks([message])[0]


def payloads(messages: Sequence[Message]) -> list[Mapping[str, np.ndarray]]:
    """What came beside each message's adapter, {name: array}; messages that share a record share one decoded copy."""
    decoded: dict[int, Mapping[str, np.ndarray]] = {}
    sent = [cast(ArrayRecord, message.content.get(PAYLOAD, NOTHING)) for message in messages]
    for record in sent:
        if id(record) not in decoded:
            decoded[id(record)] = {name: array.numpy() for name, array in record.items()}
    return [decoded[id(record)] for record in sent]


def train_reply(reply: TrainReply, request: Message, parts: codec.Parts | None = None) -> Message:
    """parts: the adapter as `codec.encode` gives it, in the place of the whole one."""
    meta = ConfigRecord({**asdict(reply.binding), **{f"option.{k}": v for k, v in reply.options.items()}})
    metrics: dict[str, Any] = {COUNT: reply.count, "loss": reply.loss, "steps": reply.steps, "seconds": reply.seconds}
    beside = {EXTRA: arrays(**reply.extra)} if reply.extra else {}
    adapter = arrays(**(parts or {FLAT: reply.flat}))
    content = RecordDict({ARRAYS: adapter, **beside, METRICS: MetricRecord(metrics), META: meta})
    return Message(content, reply_to=request)


def read_train_reply(message: Message, start: Flat | None = None) -> TrainReply:
    """The arrays are the message's own bytes, not copies; an encoded adapter is decoded with the `start` it had.

    Raises KeyError or ValueError when a record or key is missing; values are checked by the server's gate.
    """
    content = message.content  # indexed, since Flower's views by type would keep it alive until the next collection
    metrics, meta = cast(MetricRecord, content[METRICS]), cast(ConfigRecord, content[META])
    options = {key.removeprefix("option."): value for key, value in meta.items() if key.startswith("option.")}
    flat = _adapter(cast(ArrayRecord, content[ARRAYS]), start)
    count, steps = (int(cast(int, metrics[key])) for key in (COUNT, "steps"))
    loss, seconds = (float(cast(float, metrics[key])) for key in ("loss", "seconds"))
    beside = cast(ArrayRecord, content[EXTRA]) if EXTRA in content else {}
    extra = {name: view(array) for name, array in beside.items()}
    return TrainReply(binding(message), flat, count, loss, steps, seconds, options, extra)


def weighing(metrics: MetricRecord, count: int) -> MetricRecord:
    """A train reply's metrics with another weight in the mean."""
    return MetricRecord({**metrics, COUNT: count})


def _adapter(record: ArrayRecord, start: Flat | None) -> Flat:
    if FLAT in record or start is None:
        return view(record[FLAT])
    return codec.restore(start, {name: view(array) for name, array in record.items()})


def token_reply(token: Token, at: Binding, request: Message, upload: str = "float32") -> Message:
    """upload: `strategy.token_upload`, whose rounding is not made up for: a token is sent once."""
    zeros, parts = np.zeros_like(token.value), {TOKEN: token.value}
    if upload != "float32":
        parts, _ = codec.encode(token.value, zeros, None, upload)
    metrics = MetricRecord({COUNT: token.count})
    content = RecordDict({ARRAYS: arrays(**parts), METRICS: metrics, META: ConfigRecord(asdict(at))})
    return Message(content, reply_to=request)


def too_few_reply(reason: str, request: Message) -> Message:
    """A client's word that it holds too few instructions for a token."""
    return Message(Error(TOO_FEW, reason), reply_to=request)


def read_token(message: Message) -> Token:
    parts = {name: array.numpy() for name, array in message.content.array_records[ARRAYS].items()}
    if TOKEN in parts:
        value = parts[TOKEN]
    else:
        size = max(part.size for part in parts.values())  # of the codes, not of their scales
        value = codec.restore(np.zeros(size, np.float32), parts)
    return Token(value, int(cast(int, message.content.metric_records[METRICS][COUNT])))


def knowledge_content(knowledge: Knowledge) -> RecordDict:
    """The part of an evaluate message that all shards share."""
    flats = ArrayRecord({f"{FLAT}.{index}": Array(flat) for index, flat in enumerate(knowledge.adapters)})
    options = ConfigRecord(dict(knowledge.options))
    content = RecordDict({ARRAYS: flats, ROUTER: arrays(tokens=knowledge.tokens), CONFIG: options})
    if knowledge.shared.size:
        content[SHARED] = arrays(flat=knowledge.shared)
    return content


def read_knowledge(message: Message) -> Knowledge:
    flats = message.content.array_records[ARRAYS]
    adapters = tuple(flats[f"{FLAT}.{index}"].numpy() for index in range(len(flats)))
    tokens = message.content.array_records[ROUTER][TOKENS].numpy()
    options = dict(message.content.config_records[CONFIG])
    if SHARED not in message.content:
        return Knowledge(adapters, tokens, options)
    return Knowledge(adapters, tokens, options, message.content.array_records[SHARED][FLAT].numpy())


def with_shard(content: RecordDict, shard: Shard) -> RecordDict:
    return RecordDict({**{key: content[key] for key in content}, "shard": ConfigRecord(asdict(shard))})


def read_shard(message: Message) -> Shard:
    record = message.content.config_records["shard"]
    task, start, stop = (cast(int, record[key]) for key in ("task", "start", "stop"))
    return Shard(task, start, stop, str(record["split"]))


def score_reply(reply: ScoreReply, at: Binding, request: Message) -> Message:
    metrics: dict[str, Any] = {COUNT: reply.count, "hits": list(reply.hits)}
    metrics |= {f"stats.{name}": list(total) for name, total in reply.stats.items()}
    if reply.in_vocabulary is not None:
        metrics["in-vocabulary"] = reply.in_vocabulary
    meta = ConfigRecord({**asdict(at), "metrics": list(reply.stats), "predictions": json.dumps(reply.predictions)})
    return Message(RecordDict({METRICS: MetricRecord(metrics), META: meta}), reply_to=request)


def read_scores(message: Message) -> ScoreReply:
    metrics, meta = message.content.metric_records[METRICS], message.content.config_records[META]
    stats = {name: tuple(cast(list[float], metrics[f"stats.{name}"])) for name in cast(list[str], meta["metrics"])}
    count, known, hits = metrics[COUNT], metrics.get("in-vocabulary"), cast(list[int], metrics["hits"])
    predictions = tuple(json.loads(str(meta["predictions"])))
    return ScoreReply(stats, cast(int, count), cast("int | None", known), tuple(hits), predictions)


def with_question(content: RecordDict, text: str, image: bytes) -> RecordDict:
    """One instruction with its picture (PNG bytes, empty for none) beside the knowledge that answers it."""
    question = ConfigRecord({"text": text, "image": image})
    return RecordDict({**{key: content[key] for key in content}, "question": question})


def read_question(message: Message) -> tuple[str, bytes]:
    record = message.content.config_records["question"]
    return str(record["text"]), cast(bytes, record["image"])


def answer_reply(text: str, weights: Sequence[float], request: Message) -> Message:
    return Message(RecordDict({META: ConfigRecord({"text": text, "weights": list(weights)})}), reply_to=request)


def read_answer(message: Message) -> tuple[str, list[float]]:
    record = message.content.config_records[META]
    return str(record["text"]), cast(list[float], record["weights"])


def description_reply(value: Description, request: Message) -> Message:
    return Message(RecordDict({META: ConfigRecord(asdict(value))}), reply_to=request)


def read_description(message: Message) -> Description:
    return Description(**cast(dict[str, Any], dict(message.content.config_records[META])))


def tensor_bytes(messages: Sequence[Message]) -> int:
    """Raw tensor bytes in these messages: the figure reported as bytes_up, bytes_down and bytes_eval."""
    records = [record for message in messages if message.has_content() for record in message.content.values()]
    return sum(_size(array) for record in records if isinstance(record, ArrayRecord) for array in record.values())


def _size(array: Array) -> int:
    return np.dtype(array.dtype).itemsize * math.prod(array.shape)
