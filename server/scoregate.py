"""The gate for what clients say of the base model and of a shard's score; neither is arithmetic's business before."""

import math
from collections.abc import Sequence

from flwr.app import Message

from fedstrata.core import records
from fedstrata.core.adapters import Layout
from fedstrata.core.estimate import Shape
from fedstrata.core.machine import Footprint
from fedstrata.core.records import Description, ScoreReply
from fedstrata.core.scoring import SCORERS, percentages
from fedstrata.server import checks
from fedstrata.server.checks import Kind, Refused
from fedstrata.server.gate import Expected, failure


def read_scores(
    message: Message, want: Expected, metrics: Sequence[str], subspaces: int, shown: bool = True
) -> ScoreReply:
    """A shard's score: all metrics, every example, numbers that can be. Raises `Refused` or what decoding raises.

    shown: whether predictions come with it; of a client's own data they stay with the client.
    """
    reply, count = records.read_scores(message), want.samples
    rule = f"num-examples: must be {count}, the shard's, got {reply.count!r}"
    checks.check(_is_count(reply.count) and reply.count == count, Kind.COUNT, rule)
    came = sorted(reply.stats)
    checks.check(came == sorted(metrics), Kind.SCHEMA, f"metrics: must be {sorted(metrics)}, got {came}")
    for name, total in reply.stats.items():
        _statistics(name, total, count)
    if reply.in_vocabulary is not None:
        _whole("in-vocabulary", reply.in_vocabulary, count)
    _hits(reply.hits, count, subspaces)
    came_with, wanted = len(reply.predictions), count if shown else 0
    checks.check(came_with == wanted, Kind.COUNT, f"predictions: must be {wanted}, got {came_with}")
    return reply


def _statistics(name: str, total: Sequence[float], count: int) -> None:
    size = SCORERS[name].size
    checks.check(len(total) == size, Kind.SHAPE, f"stats.{name}: must be {size} numbers, got {len(total)}")
    for value in total:
        checks.finite(f"stats.{name}", value)
        checks.between(f"stats.{name}", value, 0, float("inf"))
    checks.between(f"score {name}", percentages({name: total}, count)[name], 0, 100)


def _hits(hits: Sequence[int], count: int, subspaces: int) -> None:
    checks.check(len(hits) == subspaces, Kind.SHAPE, f"hits: must be {subspaces} numbers, got {len(hits)}")
    for hit in hits:
        _whole("hits", hit, count)
    if hits:
        checks.check(sum(hits) == count, Kind.COUNT, f"hits: must add up to {count}, got {sum(hits)}")


def _whole(name: str, value: int, most: int) -> None:
    checks.check(_is_count(value), Kind.RANGE, f"{name}: must be a whole number, got {value!r}")
    checks.between(name, value, 0, most)


def _is_count(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def read_description(message: Message) -> Description:
    """What a client says of its base model. Raises `Refused`: an error, missing keys, numbers that cannot be."""
    if message.has_error():
        raise failure(message.error)
    try:
        says = records.read_description(message)
        Layout.from_json(says.layout)
        if says.shape or says.machine:
            Shape.from_json(says.shape)
            Footprint.from_json(says.machine)
    except Exception as error:  # a stranger's words may fail in any way
        raise Refused(Kind.SCHEMA, f"description: {error or type(error).__name__}") from error
    checks.check(_is_count(says.partition), Kind.RANGE, f"partition-id: must be a whole number, got {says.partition!r}")
    checks.check(_is_count(says.dim) and says.dim >= 0, Kind.RANGE, f"dim: must be at least 0, got {says.dim!r}")
    words = _is_count(says.words) and 0 <= says.words <= says.dim
    checks.check(words, Kind.RANGE, f"words: must be a part of dim, {says.dim!r}, got {says.words!r}")
    for name in ("tau", "epsilon", "words_tau"):
        value = getattr(says, name)
        good = isinstance(value, float | int) and math.isfinite(value)
        checks.check(good, Kind.NOT_FINITE, f"{name}: must be finite, got {value!r}")
    return says
