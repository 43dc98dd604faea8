"""`federation.update_clip` and `federation.update_noise`: what a client's update can change, bounded and blurred.

The server, which is trusted with the updates, clips each of them to norm C and adds N(0, (z·C)²) to their sum, then
divides by their number: the Gaussian mechanism of DP-FedAvg (McMahan et al. 2018, arXiv 1710.06963) with all clients
weighing the same. Every subspace has a sum of its own, and the layout's tail one over all participants.

The noise is cut into equal shares, one per update, so that replies can still be looked at one at a time.
"""

import math
import os
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, replace

from fedstrata.core.adapters import Flat
from fedstrata.core.config import FederationSection, RunConfig, require
from fedstrata.core.errors import BadInput, FedstrataError
from fedstrata.core.privacy import gaussian
from fedstrata.core.streaming import blocks
from fedstrata.server.clipping import Updates
from fedstrata.server.progress import Progress
from fedstrata.strategies import find
from fedstrata.strategies.base import Strategy

STEP = 2**16  # numbers drawn at a time


@dataclass(frozen=True)
class Noise:
    """One round's: whose share is drawn from what, and how wide it is.

    Attributes:
        where: (stage, round); with the partition they name a share.
        own: partition → standard deviation of its share of its subspace's noise.
        tail: the last numbers of an adapter, which all subspaces share …
        shared: … and the standard deviation of everybody's share there.
    """

    key: bytes
    where: tuple[int, int]
    own: Mapping[int, float]
    tail: int
    shared: float

    def add(self, flat: Flat, partition: int) -> None:
        """Adds a client's share to its adapter, in place."""
        cut = flat.size - self.tail
        for part, begin, end, spread in (("own", 0, cut, self.own[partition]), ("tail", cut, flat.size, self.shared)):
            part_of = flat[begin:end]
            for number, block in enumerate(blocks(part_of.size, STEP)):
                names: list[str | int | float] = ["update", *self.where, partition, part, number]
                part_of[block] += spread * gaussian(self.key, names, part_of[block].size)


def check(config: RunConfig) -> None:
    """Raises `BadInput` for a method whose state is no mean of updates: how far one of them moves it is not known."""
    name, noise = config.strategy.name, config.federation.update_noise
    good = noise == 0 or (find(name).averages and config.strategy.averages)
    rule = f"0 with strategy.name={name}, which with these options does not average updates by num-examples"
    require(good, "federation.update_noise", rule, noise)


def guarded(updates: Updates, strategy: Strategy, section: FederationSection, key: bytes) -> Updates:
    """The round's updates, each clipped and with its share of the noise.

    Raises:
        BadInput: clients upload something beside the adapter, which the noise does not cover.
        FedstrataError: clients were sent nothing that an update could be measured from.
    """
    bound, norms = section.update_clip, updates.norms
    if not bound:
        return updates
    if missing := {passed.partition for passed in updates.passed} - set(norms):
        raise FedstrataError(f"federation.update_clip: clients {sorted(missing)} were sent no adapter to start from")
    clipped = replace(updates, scaled={client: bound / norm for client, norm in norms.items() if norm > bound})
    if not section.update_noise or not updates.passed:
        return clipped
    if extras := sorted(strategy.extras()):
        raise BadInput(f"federation.update_noise: does not cover what clients send beside the adapter: {extras}")
    return replace(clipped, noise=_shares(updates, strategy, section.update_noise * bound, key))


def _shares(updates: Updates, strategy: Strategy, spread: float, key: bytes) -> Noise:
    """Shares of variance spread² / m: the m of one mean add up to spread²."""
    placement, clients = strategy.placement(), [passed.partition for passed in updates.passed]
    sizes = Counter(placement.get(client, 0) for client in clients)
    own = {client: spread / math.sqrt(sizes[placement.get(client, 0)]) for client in clients}
    at = updates.passed[0].value.reply.binding
    tail = strategy.setup.layout.tail if strategy.options.projector == "shared" else 0
    return Noise(key, (at.stage, at.round), own, tail, spread / math.sqrt(len(clients)))


def keyed(config: RunConfig, progress: Progress) -> Progress:
    """With a key that no client knows, where one is needed: they are told the run's seed. Committed with the rest."""
    needed = config.federation.update_noise and config.federation.grid == "flower" and not progress.noise_key
    return replace(progress, noise_key=os.urandom(32).hex()) if needed else progress


def key_of(config: RunConfig, progress: Progress) -> bytes:
    """What the noise is drawn from; in a simulation the run's seed, so that equal runs have equal bits."""
    return bytes.fromhex(progress.noise_key) or str(config.seed).encode()
