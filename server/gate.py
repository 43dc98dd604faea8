"""The reply gate: every reply of both exchanges passes it before any arithmetic. A bad reply costs that client that
round and is logged with the reason; it never costs the run.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
from flwr.app import Array, Message

from fedstrata.core import records
from fedstrata.core.identity import Token
from fedstrata.core.records import Binding, TrainReply

T = TypeVar("T")


@dataclass(frozen=True)
class Expected:
    """What a reply must look like: its binding, the adapter's length, and the client's known sample count."""

    binding: Binding
    size: int
    samples: int


@dataclass(frozen=True)
class Rejected:
    """A reply that may not enter, or one that never came."""

    partition: int
    reason: str


def pass_replies(
    sent: Sequence[Message],
    replies: Sequence[Message],
    expected: Mapping[int, Expected],
    read: Callable[[Message, Expected], T],
) -> tuple[list[tuple[Message, T]], list[Rejected]]:
    """Good replies in the order of their partitions, and why the others were rejected.

    Replies are matched to what was sent by `reply_to_message_id` (a dead node's error comes from the SuperLink, so
    its source says nothing); `expected` is keyed by destination node.
    """
    by_request: dict[str, Message] = {}
    for reply in replies:
        by_request.setdefault(reply.metadata.reply_to_message_id, reply)  # of duplicates the first one counts
    good, bad = [], []
    for request in sent:
        want = expected[request.metadata.dst_node_id]
        try:
            reply = by_request[request.metadata.message_id]
            good.append((want.binding.partition, reply, _read(reply, want, read)))
        except KeyError as error:
            missing = request.metadata.message_id not in by_request
            bad.append(
                Rejected(want.binding.partition, "no reply in time" if missing else f"record {error} is missing")
            )
        except Exception as error:  # decoding what a stranger sent may end in any type: EOFError, BadZipFile, …
            bad.append(Rejected(want.binding.partition, str(error) or type(error).__name__))
    good.sort(key=lambda item: item[0])
    return [(reply, value) for _, reply, value in good], bad


def _read(reply: Message, want: Expected, read: Callable[[Message, Expected], T]) -> T:
    if reply.has_error():
        raise ValueError(f"the client failed: {reply.error.reason}")
    came = records.binding(reply)
    if came != want.binding:
        raise ValueError(f"binding: expected {want.binding}, got {came}")
    return read(reply, want)


def read_train(message: Message, want: Expected) -> TrainReply:
    """A train reply whose adapter is float32, of the expected length and finite, and whose count is the known one."""
    _declared(message.content.array_records[records.ARRAYS][records.FLAT], want.size)
    reply = records.read_train_reply(message)
    _alone(message)
    _decoded(reply.flat, want.size)
    _counted(reply.count, want.samples)
    if not np.isfinite(reply.loss):
        raise ValueError(f"loss: must be finite, got {reply.loss}")
    return reply


def read_token(message: Message, want: Expected) -> Token:
    """A token reply: float32, of the encoder's length, finite, from the known number of instructions."""
    _declared(message.content.array_records[records.ARRAYS][records.TOKEN], want.size)
    token = records.read_token(message)
    _decoded(token.value, want.size)
    _counted(token.count, want.samples)
    return token


def _declared(array: Array, size: int) -> None:
    """Checked on the declaration, before anything is decoded: a header may claim gigabytes."""
    if array.dtype != "float32" or tuple(array.shape) != (size,) or len(array.data) > 4 * size + 1024:
        came = f"{array.dtype} {tuple(array.shape)} in {len(array.data)} bytes"
        raise ValueError(f"array: must be float32 ({size},), got {came}")


def _alone(message: Message) -> None:
    """Flower's own strategies average all that they find and end the run where replies differ in their keys."""
    content = message.content
    came = {name: sorted(content[name]) for name in (*content.array_records, *content.metric_records)}
    want = {records.ARRAYS: [records.FLAT], records.METRICS: sorted(records.TRAIN_METRICS)}
    if came != want:
        raise ValueError(f"records: must be {want}, got {came}")


def _decoded(values: np.ndarray, size: int) -> None:
    """The bytes carry a header of their own, which need not be what was declared."""
    if values.dtype != np.float32 or values.shape != (size,):
        raise ValueError(f"array: must be float32 ({size},), got {values.dtype} {values.shape}")
    if not np.isfinite(values).all():
        raise ValueError("array: must be finite, got NaN or infinity")


def _counted(count: int, samples: int) -> None:
    if count != samples:
        raise ValueError(f"num-examples: must be {samples}, the client's known share, got {count}")
