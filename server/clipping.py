"""`federation.clip`: no update of a subspace moves further than the median of them."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from statistics import median
from typing import TYPE_CHECKING, cast

from flwr.app import ArrayRecord, Message, MetricRecord, RecordDict

from fedstrata.core import codec, records
from fedstrata.core.adapters import Flat
from fedstrata.core.packing import gather, vector, view
from fedstrata.core.records import TrainReply
from fedstrata.server.exchange import Seat
from fedstrata.server.flower_private import with_content
from fedstrata.server.gate import Update
from fedstrata.server.intake import Passed

if TYPE_CHECKING:
    from fedstrata.server.noise import Noise

ENOUGH = 3  # updates of a subspace in a round, for their median to be theirs
LOUD = 2.0  # times the round's median that a subspace's own may be


def starts(seats: Sequence[Seat], messages: Sequence[Message]) -> dict[int, Flat]:
    """partition → the adapter that it was sent; those of one subspace share its bytes."""
    at = {seat.node: seat.partition for seat in seats}
    sent = {
        at[m.metadata.dst_node_id]: cast(ArrayRecord, m.content.get(records.ARRAYS, records.NOTHING)) for m in messages
    }
    return {partition: view(arrays[records.FLAT]) for partition, arrays in sent.items() if records.FLAT in arrays}


def factors(
    norms: Mapping[int, float], placement: Mapping[int, int], usual: Callable[[int], float | None]
) -> dict[int, float]:
    """partition → what its update is multiplied by, for those that are longer than their subspace's limit.

    That is the median of its updates in this round; of fewer than three, where one hostile client would decide it, the
    median of its earlier ones (`usual`); and at most twice the median of the whole round, since a subspace's clients
    may be mostly hostile. Where the subspace is not known yet, it is the median of the round.
    """
    groups: dict[int, list[float]] = {}
    for partition, norm in norms.items():
        groups.setdefault(placement.get(partition, 0), []).append(norm)
    whole = median(norms.values()) if norms else 0.0
    own = {j: median(found) if len(found) >= ENOUGH else usual(j) or whole for j, found in groups.items()}
    most = {subspace: min(length, LOUD * whole) for subspace, length in own.items()}
    limits = {partition: most[placement.get(partition, 0)] for partition in norms}
    return {partition: limits[partition] / norm for partition, norm in norms.items() if norm > limits[partition]}


@dataclass(frozen=True)
class Updates:
    """The accepted updates of a round, in the order of partitions; may be gone through more than once.

    Going through them loads one at a time, as the message that a strategy averages: whole, and clipped where that was
    asked for. So a mean needs memory for itself and one adapter, however many there are.
    """

    passed: Sequence[Passed[Update]]
    sent: Mapping[int, Flat]
    scaled: Mapping[int, float] = field(default_factory=dict)  # partition → factor of its update
    noise: "Noise | None" = None  # added to every one of them; all weigh the same then

    @property
    def replies(self) -> list[TrainReply]:
        """What they say beside the arrays."""
        return [passed.value.reply for passed in self.passed]

    @property
    def norms(self) -> dict[int, float]:
        """partition → norm of its update as it came."""
        return {passed.partition: passed.value.norm for passed in self.passed if passed.value.norm is not None}

    def __len__(self) -> int:
        return len(self.passed)

    def __iter__(self) -> Iterator[Message]:
        return (self._whole(passed) for passed in self.passed)

    def _whole(self, passed: Passed[Update]) -> Message:
        message, factor = passed.load(), self.scaled.get(passed.partition, 1.0)
        record = cast(ArrayRecord, message.content[records.ARRAYS])
        if records.FLAT in record and factor == 1.0 and self.noise is None:
            return message
        start = self.sent[passed.partition]
        array, flat = vector(start.size)
        codec.restore(start, {name: view(part) for name, part in record.items()}, factor, flat)
        content = {name: message.content[name] for name in message.content}
        if self.noise is not None:
            self.noise.add(flat, passed.partition)
            content[records.METRICS] = records.weighing(cast(MetricRecord, content[records.METRICS]), 1)
        return with_content(message, RecordDict({**content, records.ARRAYS: gather([(records.FLAT, array)])}))
