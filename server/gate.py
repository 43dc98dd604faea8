"""The reply gate: every reply passes it before any arithmetic. A bad reply costs that client that round and is logged
with the reason; it never costs the run.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TypeVar

import numpy as np
import numpy.typing as npt
from flwr.app import ArrayRecord, Error, Message, MetricRecord

from fedstrata.core import codec, records
from fedstrata.core.identity import Token
from fedstrata.core.packing import view
from fedstrata.core.records import Binding, TrainReply
from fedstrata.core.streaming import distance
from fedstrata.server import checks
from fedstrata.server.checks import Kind, Refused

T = TypeVar("T")
ERRORS = {records.TOO_FEW: Kind.TOO_FEW, records.FORGED: Kind.SIGNATURE, records.SILENT: Kind.SILENT}  # by code


@dataclass(frozen=True)
class Expected:
    """What a reply must look like: its binding, the adapter's length, and the client's known sample count.

    Attributes:
        start: the adapter that was sent, where there was one.
        limit: the largest norm that the difference to `start` may have.
        extras: name → shape of every array that the method declares beside the adapter.
        upload: how the array travels (`federation.upload`, `strategy.token_upload`).
    """

    binding: Binding
    size: int
    samples: int
    start: npt.NDArray[np.float32] | None = field(default=None, compare=False)
    limit: float = float("inf")
    extras: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    upload: str = "float32"


@dataclass(frozen=True)
class Update:
    """A train reply that passed, without its arrays.

    Attributes:
        norm: how far it moved the adapter that was sent; None where it was sent none of its length.
    """

    reply: TrainReply
    norm: float | None


@dataclass(frozen=True)
class Rejected:
    """A reply that may not enter, or one that never came."""

    partition: int
    reason: str
    kind: Kind


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
    by_request = first(replies)
    good, bad = [], []
    for request in sent:
        want = expected[request.metadata.dst_node_id]
        try:
            reply = by_request.get(request.metadata.message_id)
            good.append((want.binding.partition, reply, admit(reply, want, read)))
        except Refused as error:
            bad.append(Rejected(want.binding.partition, str(error), error.kind))
    good.sort(key=lambda item: item[0])
    return [(reply, value) for _, reply, value in good if reply is not None], bad


def first(replies: Sequence[Message]) -> dict[str, Message]:
    """Request id → reply; of duplicates the first one counts."""
    by_request: dict[str, Message] = {}
    for reply in replies:
        by_request.setdefault(reply.metadata.reply_to_message_id, reply)
    return by_request


def strays(sent: Sequence[Message], replies: Sequence[Message]) -> list[Kind]:
    """What came without being asked for: second answers, and answers to an exchange that is over."""
    asked, came = {request.metadata.message_id for request in sent}, set()
    found = []
    for reply in replies:
        name = reply.metadata.reply_to_message_id
        if name not in asked or name in came:
            found.append(Kind.DUPLICATE if name in came else Kind.LATE)
        came.add(name)
    return found


def admit(reply: Message | None, want: Expected, read: Callable[[Message, Expected], T]) -> T:
    """The reply's value. Raises `Refused`, whatever is wrong with it."""
    if reply is None:
        raise Refused(Kind.LATE, "no reply in time")
    if reply.has_error():
        raise failure(reply.error, "the client failed: ")
    try:
        came = records.binding(reply)
        checks.check(came == want.binding, Kind.BINDING, f"binding: expected {want.binding}, got {came}")
        return read(reply, want)
    except Refused:
        raise
    except KeyError as error:
        raise Refused(Kind.SCHEMA, f"record {error} is missing") from error
    except Exception as error:  # decoding what a stranger sent may end in any type: EOFError, BadZipFile, …
        raise Refused(Kind.UNREADABLE, str(error) or type(error).__name__) from error


def failure(error: Error, said: str = "") -> Refused:
    """What an error reply comes to. said: before the client's own words."""
    kind = ERRORS.get(error.code, Kind.FAILED)
    return Refused(kind, f"{said if kind == Kind.FAILED else ''}{error.reason}")


def read_train(message: Message, want: Expected) -> TrainReply:
    """A train reply whose adapter is of the expected form, length and finite, and whose count is the known one.

    `flat` is the adapter whatever it travelled as; its numbers may be the message's own bytes.
    """
    return _train(message, want)[0]


def read_update(message: Message, want: Expected) -> Update:
    """The same without the arrays, so that the message can be let go of."""
    reply, norm = _train(message, want)
    return Update(replace(reply, flat=np.empty(0, dtype=np.float32), extra={}), norm)


def _train(message: Message, want: Expected) -> tuple[TrainReply, float | None]:
    """A good reply and the norm of its update."""
    _declared(message, want)
    _extras(message, want)
    reply = records.read_train_reply(message, want.start)
    _alone(message, want)
    checks.decoded(reply.flat, want.size)
    for name, shape in want.extras.items():
        checks.decoded(reply.extra[name], *shape)
    checks.counted(_count(message), want.samples)
    for name in ("loss", "seconds"):
        checks.finite(name, getattr(reply, name))
    checks.between("steps", reply.steps, 0, float("inf"))
    checks.between("seconds", reply.seconds, 0, float("inf"))
    return reply, _near(reply, want)


def read_token(message: Message, want: Expected) -> Token:
    """A token reply: typed as agreed, of the encoder's length, finite, from the known number of instructions."""
    if want.upload == "float32":
        checks.declared(message.content.array_records[records.ARRAYS][records.TOKEN], want.size)
    else:
        _declared(message, want)
    token = records.read_token(message)
    checks.decoded(token.value, want.size)
    checks.counted(_count(message), want.samples)
    return token


def _count(message: Message) -> object:
    return message.content.metric_records[records.METRICS][records.COUNT]


def _declared(message: Message, want: Expected) -> None:
    """The adapter's arrays: types, sizes and number of scales, before anything is decoded with them."""
    arrays = records.arrays_in(message, records.ARRAYS)
    wanted = codec.declared(want.upload, want.size)
    for name, (dtype, size) in wanted.items():
        checks.declared(arrays[name], size, dtype=dtype)
    if want.upload != "float32":
        for name, (dtype, size) in wanted.items():
            checks.decoded(view(arrays[name]), size, dtype=dtype)
    if codec.SCALES in wanted:
        good = codec.finite(view(arrays[codec.SCALES]))
        checks.check(good, Kind.NOT_FINITE, f"{codec.SCALES}: must be finite and not negative")


def _extras(message: Message, want: Expected) -> None:
    """Exactly what the method declares, checked before anything is decoded: nothing else can leave a client."""
    came = records.arrays_in(message, records.EXTRA) if records.EXTRA in message.content else records.NOTHING
    checks.keys({records.EXTRA: sorted(came)}, {records.EXTRA: sorted(want.extras)})
    for name, shape in want.extras.items():
        checks.declared(came[name], *shape)


def _alone(message: Message, want: Expected) -> None:
    """Flower's own strategies average all that they find and end the run where replies differ in their keys."""
    content = message.content
    came = {name: sorted(held) for name, held in content.items() if isinstance(held, ArrayRecord | MetricRecord)}
    extra = {records.EXTRA: sorted(want.extras)} if want.extras else {}
    arrays = sorted(codec.declared(want.upload, want.size))
    checks.keys(came, {records.ARRAYS: arrays, **extra, records.METRICS: sorted(records.TRAIN_METRICS)})


def _near(reply: TrainReply, want: Expected) -> float | None:
    """The norm of the update; one far larger than those that the subspace has seen would be the aggregate."""
    if want.start is None or want.start.shape != reply.flat.shape:
        return None
    norm = distance(reply.flat, want.start)
    rule = f"at most {want.limit:.4g}, 10 × the subspace's median"
    checks.check(norm <= want.limit, Kind.NORM, f"norm of the update: must be {rule}, got {norm:.4g}")
    return norm
