"""`bench aggregate`: the mean of 100 adapters of 42 MB as they stream in, against memcpy and Flower's aggregation.

Ours goes through `Finetune.aggregate_train`, one message at a time, each with one flat array; Flower's through its own
`aggregate_arrayrecords`, on a list of messages of 448 arrays each, as peers ship them. The messages of both sides
share the bytes of a few adapters, so that the bench itself stays small.
"""

import tracemalloc
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
from flwr.app import Array, ArrayRecord, Message, MetricRecord, RecordDict
from flwr.serverapp.strategy.strategy_utils import aggregate_arrayrecords

from fedstrata.benchmarks.measure import Result, cost, paired, ratios, raw
from fedstrata.core import records
from fedstrata.core.adapters import Flat, Layout
from fedstrata.core.records import Binding, TrainReply
from fedstrata.server.flower_private import become_server, with_content
from fedstrata.server.gate import Expected, read_update
from fedstrata.server.replies import Good, Replies
from fedstrata.strategies.base import Setup
from fedstrata.strategies.finetune import Finetune, FinetuneConfig

ADAPTERS, NUMBERS, ARRAYS = 100, 10_485_760, 448  # 42 MB of float32
SOURCES = 4  # distinct adapters
COUNTS = (10, 100)  # at which memory is measured


def bench(quick: bool = False) -> Result:
    """CPU seconds of one aggregation on one thread, and its extra peak memory."""
    import torch

    torch.set_num_threads(1)
    become_server()
    count, size = (6, 448 * 500) if quick else (ADAPTERS, NUMBERS)
    rng = np.random.default_rng(0)
    flats = [rng.standard_normal(size, dtype=np.float32) for _ in range(SOURCES)]
    ours, theirs = Ours(flats), [_many(flat) for flat in flats]
    buffer, payloads = np.zeros(size, dtype=np.float32), [_payload(message) for message in ours.messages]

    def memcpy() -> None:
        for number in range(count):
            np.copyto(buffer, payloads[number % SOURCES])

    def flower() -> ArrayRecord:
        return aggregate_arrayrecords([_weighted(theirs[n % SOURCES], n) for n in range(count)], records.COUNT)

    rounds = paired({"ours": lambda: ours.mean(count), "flower": flower, "memcpy": memcpy}, repeats=2 if quick else 7)
    peaks = {number: _peak(partial(ours.mean, number), 4 * size) for number in _counts(count)}
    equal = _compare(ours.mean(count), flower(), flats, count)
    return Result(
        name="aggregate",
        what=f"mean of {count} adapters of {4 * size / 1e6:.0f} MB, float32, streaming",
        clock="cpu",
        ratios=ratios(rounds, "ours", "cpu"),
        targets={"flower": 5.0, "memcpy": 0.75, **{_label(number): 1.5 for number in peaks}},
        limits={_label(number): peak for number, peak in peaks.items()},
        pairs=raw(rounds),
        equal=equal,
        notes=(
            "memcpy: speed as a part of that of copying the payloads out of the same messages, a ceiling near 1",
            "extra peak: beyond the messages themselves, in adapters; the old state is not counted",
            f"Flower's extra peak at {min(peaks)} adapters: "
            f"{_peak(lambda: _few(theirs, min(peaks)), 4 * size):.2f} adapters, beside all messages",
            *_whole(ours, 2 if quick else 10),
        ),
    )


class Ours:
    """A strategy and the replies it is given; messages share the bytes of the sources."""

    def __init__(self, flats: Sequence[Flat]) -> None:
        size = flats[0].size
        self.flats, self.size = flats, size
        layout = Layout((("layer", size - 64, 64),))
        self.setup = Setup(seed=0, layout=layout, rank=1, subspaces=1, tau=0.9, epsilon=0.05)
        self.strategy = Finetune(FinetuneConfig(subspaces=1), self.setup)
        request = Message(RecordDict(), 2, records.TRAIN)
        self.messages = [records.train_reply(_reply(n, flat), request) for n, flat in enumerate(flats)]

    def replies(self, count: int) -> Iterator[Message]:
        """One at a time, in the order of partitions; weights are 1, 2, …"""
        for number in range(count):
            message = self.messages[number % SOURCES]
            content = {name: message.content[name] for name in message.content}
            weight = MetricRecord({**message.content.metric_records[records.METRICS], records.COUNT: number + 1})
            yield with_content(message, RecordDict({**content, records.METRICS: weight}))

    def mean(self, count: int) -> Flat:
        self.strategy.aggregate_train(1, self.replies(count))
        return self.strategy.state.adapter


def _reply(partition: int, flat: Flat) -> TrainReply:
    return TrainReply(Binding("bench", 1, 1, partition), flat, 1, 0.5, 1, 0.1)


def _payload(message: Message) -> Flat:
    """The numbers where they lie in a message."""
    return records.read_train_reply(message).flat


def _many(flat: Flat) -> ArrayRecord:
    pieces = np.array_split(flat, ARRAYS)
    return ArrayRecord({f"layer.{number}": Array(piece) for number, piece in enumerate(pieces)})


def _weighted(arrays: ArrayRecord, number: int) -> RecordDict:
    return RecordDict({"arrays": arrays, "metrics": MetricRecord({records.COUNT: number + 1})})


def _few(theirs: Sequence[ArrayRecord], count: int) -> ArrayRecord:
    return aggregate_arrayrecords([_weighted(theirs[n % SOURCES], n) for n in range(count)], records.COUNT)


def _peak(work: Callable[[], Any], adapter: int) -> float:
    """Memory that was allocated on the way, in adapters."""
    tracemalloc.start()
    try:
        work()
        return tracemalloc.get_traced_memory()[1] / adapter
    finally:
        tracemalloc.stop()


def _counts(count: int) -> tuple[int, ...]:
    return tuple(number for number in COUNTS if number <= count) or (count,)


def _label(number: int) -> str:
    return f"extra peak at {number} adapters"


def _compare(ours: Flat, flower: ArrayRecord, flats: Sequence[Flat], count: int) -> dict[str, float]:
    """Relative distances of both means to the one in float64; ours must be within a millionth."""
    weights = np.arange(1, count + 1, dtype=np.float64)
    shares = [float(weights[source::SOURCES].sum() / weights.sum()) for source in range(SOURCES)]
    exact = sum(share * flat.astype(np.float64) for share, flat in zip(shares, flats, strict=True))
    theirs = np.concatenate([array.numpy() for array in flower.values()])
    norm = np.linalg.norm(exact)
    found = {
        "ours to the mean in float64": float(np.linalg.norm(ours - exact) / norm),
        "Flower's to the mean in float64": float(np.linalg.norm(theirs - exact) / norm),
    }
    if max(found.values()) > 1e-6:
        raise AssertionError(f"the two sides computed different means: {found}")
    return found


def _whole(ours: Ours, count: int) -> list[str]:
    """What a reply costs beside the sum: the gate's checks, and keeping it so that a killed run loses no reply."""
    lines, gigabytes = [], 4 * ours.size * count / 1e9
    with TemporaryDirectory() as folder:
        kept, loads = Replies(Path(folder)), []
        start = ours.flats[0]
        wanted = [Expected(records.binding(m), ours.size, 1, start) for m in ours.messages]
        jobs: dict[str, Callable[[int], Any]] = {
            "gate (finite, norm of the update)": lambda n: read_update(ours.messages[n % SOURCES], wanted[n % SOURCES]),
            "keep (SHA-256, file)": lambda n: loads.extend(kept.keep([Good(_asked(n), ours.messages[n % SOURCES])])),
            "load": lambda n: records.read_train_reply(loads[n]()),
        }
        for name, job in jobs.items():
            spent = cost(partial(_each, job, count))
            lines.append(f"{name}: {gigabytes / max(spent.cpu, 1e-9):.2f} GB per CPU second")
    return lines


def _each(job: Callable[[int], Any], count: int) -> None:
    for number in range(count):
        job(number)


def _asked(number: int) -> Message:
    assignment = records.Assignment(Binding("bench", 1, 1, number))
    return records.address(Message(RecordDict(), 2, records.TRAIN), assignment)
