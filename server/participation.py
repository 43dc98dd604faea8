"""Who takes part in a round and with which draw from its data: pure functions of (config, stage, round)."""

from collections import Counter

from fedstrata.core.config import RunConfig
from fedstrata.core.seeds import generator


def draw(config: RunConfig, clients: int, stage: int, round_: int) -> list[int]:
    """The round's participants in the order of their positions: a pure function of (seed, stage, round)."""
    size = min(config.federation.clients_per_round, clients)
    chosen = generator(config.seed, "participants", stage, round_).choice(clients, size, replace=False)
    return [int(client) for client in chosen]


def visits(config: RunConfig, clients: int, stage: int, round_: int) -> Counter[int]:
    """How often each client took part before this round."""
    rounds = config.federation.rounds_per_stage
    before = [divmod(number, rounds) for number in range((stage - 1) * rounds + round_ - 1)]
    return Counter(client for s, r in before for client in draw(config, clients, s + 1, r + 1))


def share_size(pool: int, part: int, parts: int) -> int:
    """How many examples the part-th of `parts` draws from a pool holds (see the client's `share`)."""
    if parts == 1 or pool == 0:
        return pool
    size = max(1, pool // parts)
    draws = pool // size
    return pool - (draws - 1) * size if part % draws == draws - 1 else size
