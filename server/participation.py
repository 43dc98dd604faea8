"""Who takes part in a round and with which draw from its data: pure functions of (config, scenario, stage, round)."""

from collections import Counter
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from fedstrata.core.config import RunConfig
from fedstrata.core.seeds import generator
from fedstrata.scenarios.stream import Scenario
from fedstrata.server import privacy


@dataclass(frozen=True)
class Visit:
    """One client's part in one round: what it trains when it is the participant at this position."""

    stage: int
    round: int
    position: int
    client: int
    tasks: tuple[int, ...]


def draw(config: RunConfig, present: Sequence[int], stage: int, round_: int) -> list[int]:
    """The round's participants in the order of their positions, among the clients that are present."""
    size = min(config.federation.clients_per_round, len(present))
    if config.federation.sampling == "fcit":
        return _published(present, size, (stage - 1) * 10 + round_ - 1)
    chosen = generator(config.seed, "participants", stage, round_).choice(len(present), size, replace=False)
    return [present[int(index)] for index in chosen]


def _published(present: Sequence[int], size: int, seed: int) -> list[int]:
    """FCIT's sampling (arXiv 2503.12897, published code): numpy's legacy generator, then the order of a Python set.

    It depends on stage and round alone, not on the run's seed; CPython orders a set of small numbers by hash and size.
    """
    chosen = np.random.RandomState(seed).choice(len(present), size, replace=False)
    return [present[index] for index in set(chosen.tolist())]


def participants(
    config: RunConfig,
    scenario: Scenario,
    stage: int,
    round_: int,
    pooled: bool = False,
    away: Collection[int] = (),
) -> list[int]:
    """The round's participants, without those that are `away` (in quarantine) or hold too few instructions for a token.

    A method that pools all tasks draws from all clients at all times.
    """
    there = range(scenario.client_count) if pooled else scenario.present(stage, round_)
    away = {*away, *privacy.too_few(config, scenario, stage, round_)}
    return draw(config, [client for client in there if client not in away] if away else there, stage, round_)


def visits(config: RunConfig, scenario: Scenario, stage: int, pooled: bool = False) -> Iterator[Visit]:
    """Every client-round of a stage in which the client has data; `pooled`: of all tasks at all times."""
    everything, least = tuple(range(len(scenario.tasks))), privacy.least(config)
    for round_ in range(1, config.federation.rounds_per_stage + 1):
        for position, client in enumerate(participants(config, scenario, stage, round_, pooled)):
            tasks = everything if pooled else scenario.tasks_of(stage, round_, position, client)
            if scenario.share_size(tasks, client, *((0, 0) if pooled else (stage, round_))) >= least:
                yield Visit(stage, round_, position, client, tasks)


def earlier(config: RunConfig, scenario: Scenario, stage: int, round_: int) -> Counter[int]:
    """How often each client took part in a method that pools all tasks, before this round."""
    rounds = config.federation.rounds_per_stage
    before = [divmod(number, rounds) for number in range((stage - 1) * rounds + round_ - 1)]
    drawn = (participants(config, scenario, s + 1, r + 1, pooled=True) for s, r in before)
    return Counter(client for clients in drawn for client in clients)


def share_size(pool: int, part: int, parts: int) -> int:
    """How many examples the part-th of `parts` draws from a pool holds (see the client's `share`)."""
    if parts == 1 or pool == 0:
        return pool
    size = max(1, pool // parts)
    draws = pool // size
    return pool - (draws - 1) * size if part % draws == draws - 1 else size
