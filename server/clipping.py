"""How far the accepted updates of a round moved, and `federation.clip`: none moves further than their median."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from statistics import median

import numpy as np
from flwr.app import ArrayRecord, Message, RecordDict

from fedstrata.core import records
from fedstrata.core.adapters import Flat
from fedstrata.core.records import TrainReply
from fedstrata.server.checks import distance
from fedstrata.server.exchange import Seat
from fedstrata.server.flower_private import with_content

Good = list[tuple[Message, TrainReply]]


def starts(seats: Sequence[Seat], messages: Sequence[Message]) -> dict[int, Flat]:
    """partition → the adapter that it was sent."""
    at = {seat.node: seat.partition for seat in seats}
    sent = {at[m.metadata.dst_node_id]: m.content.array_records.get(records.ARRAYS, ArrayRecord()) for m in messages}
    return {partition: arrays[records.FLAT].numpy() for partition, arrays in sent.items() if records.FLAT in arrays}


def norms(good: Good, sent: Mapping[int, Flat]) -> dict[int, float]:
    """partition → norm of its update; one that was sent no adapter of the same length has none."""
    found = {reply.binding.partition: reply.flat for _, reply in good}
    same = {p: flat for p, flat in found.items() if p in sent and sent[p].shape == flat.shape}
    return {partition: distance(flat, sent[partition]) for partition, flat in same.items()}


def clip(good: Good, sent: Mapping[int, Flat], lengths: Mapping[int, float]) -> Good:
    """The same replies; updates that are longer than the round's median are scaled down to it."""
    if not lengths:
        return good
    most, clipped = median(lengths.values()), []
    for message, reply in good:
        partition = reply.binding.partition
        if lengths.get(partition, 0.0) > most:
            start = sent[partition].astype(np.float64)
            flat = (start + (reply.flat - start) * (most / lengths[partition])).astype(np.float32)
            message, reply = _with_flat(message, flat), replace(reply, flat=flat)
        clipped.append((message, reply))
    return clipped


def _with_flat(message: Message, flat: Flat) -> Message:
    content = {key: message.content[key] for key in message.content}
    return with_content(message, RecordDict({**content, records.ARRAYS: records.arrays(flat=flat)}))
