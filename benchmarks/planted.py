"""A federation whose clients' updates are planted: real messages, gate and strategies, and no model to train.

Twenty clients in one or several subspaces. An honest client of subspace j moves its adapter by the subspace's own
direction plus a deviation of its own; both are Gaussian in all factors. Round 1 is honest: it opens the subspaces and
shows the gate what norms are usual. Round 2 is attacked.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache
from typing import Any

import numpy as np
import numpy.typing as npt
from flwr.app import ArrayRecord, ConfigRecord, Message

from fedstrata.core import records
from fedstrata.core.adapters import Flat, Layout
from fedstrata.core.identity import Token
from fedstrata.core.metrics import AccuracyMatrix
from fedstrata.core.packing import view
from fedstrata.core.records import Assignment, Binding, TrainReply
from fedstrata.core.seeds import generator
from fedstrata.server import clipping
from fedstrata.server.exchange import Exchange, Ledger, Question, Seat, questions
from fedstrata.server.gate import read_token, read_update
from fedstrata.server.grids import FIRST_NODE, InProcessGrid
from fedstrata.server.progress import Progress
from fedstrata.server.replies import Replies
from fedstrata.strategies.base import Participant, Setup
from fedstrata.strategies.disco import Disco, DiscoConfig

LAYOUT, RANK = Layout(tuple((f"layer.{n}", 48, 48) for n in range(4))), 8
CLIENTS, SAMPLES, DIM = 20, 50, 8
STEP = 0.3  # norm of a subspace's direction / norm of a new adapter
Product = npt.NDArray[np.float64]
Forge = Callable[["Federation", int, Flat], Flat]  # (federation, client, adapter it was sent) → what it sends back


class Planted(InProcessGrid):
    """Every message is answered by a function."""

    def __init__(self, answer: Callable[[Message], Message]) -> None:
        super().__init__(CLIENTS, 1, "builtins:object")
        self._answer = answer

    def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None = None) -> list[Message]:
        return [self._answer(message) for message in self._number(messages)]


@dataclass
class Federation:
    """One server and its clients.

    Attributes:
        options: DISCO's.
        groups: how many subspaces there are; client k is at home in k mod groups.
        spread: norm of a client's own deviation / norm of its subspace's direction.
        clip: whether updates are clipped to their subspace's median norm.
        gated: False: replies are merged as they come, to see what the gate is good for.
        tokens: client → subspace whose token it sends; its own home where it is not named.
        away: clients that take no part.
    """

    options: Mapping[str, Any]
    groups: int
    spread: float
    seed: int
    clip: bool = False
    gated: bool = True
    tokens: Mapping[int, int] = field(default_factory=dict)
    away: frozenset[int] = frozenset()
    forge: Mapping[int, Forge] = field(default_factory=dict)
    round: int = 0

    def __post_init__(self) -> None:
        setup = Setup(self.seed, LAYOUT, RANK, self.groups, tau=0.9, epsilon=0.05)
        self.strategy = Disco(DiscoConfig(**self.options), setup)
        self.progress = Progress(AccuracyMatrix((), (), ()))
        self.exchange = Exchange(Planted(self._answer), 60.0, Replies())

    def next(self, forge: Mapping[int, Forge] | None = None) -> Ledger:
        """One round, in which the named clients send what they forge."""
        self.round, self.forge, ledger = self.round + 1, forge or {}, Ledger()
        seats = [self._seat(client) for client in range(CLIENTS) if client not in self.away]
        asked = questions(seats, records.IDENTIFY)
        tokens = {p.partition: p.value for p in self.exchange.ask(Question(read_token, DIM), seats, asked, ledger)}
        self.strategy.meet([Participant(seat.node, seat.partition, tokens[seat.partition]) for seat in seats])
        grid = self.exchange.grid
        messages = list(self.strategy.configure_train(self.round, ArrayRecord(), ConfigRecord(), grid))
        self.strategy.aggregate_train(self.round, self._merged(seats, messages, ledger))
        return ledger

    def _merged(self, seats: Sequence[Seat], messages: Sequence[Message], ledger: Ledger) -> Iterable[Message]:
        """What the strategy is given: as `server.federation` does it, or the replies as they are."""
        if not self.gated:
            at = {seat.node: seat.assignment for seat in seats}
            sent = [records.address(message, at[message.metadata.dst_node_id]) for message in messages]
            return list(self.exchange.grid.send_and_receive(sent))
        placed = self.strategy.placement()
        limits = {client: self.progress.limit(subspace) for client, subspace in placed.items()}
        question = Question(read_update, LAYOUT.size(RANK), limits)
        updates = clipping.Updates(
            self.exchange.ask(question, seats, messages, ledger), clipping.starts(seats, messages)
        )
        scaled = clipping.factors(updates.norms, placed, self.progress.usual) if self.clip else {}
        self.progress = self.progress.count_norms((placed[client], norm) for client, norm in updates.norms.items())
        return replace(updates, scaled=scaled)

    def _seat(self, client: int) -> Seat:
        assignment = Assignment(Binding("planted", 1, self.round, client), layout=LAYOUT.hash)
        return Seat(client + FIRST_NODE, assignment, SAMPLES)

    def _answer(self, asked: Message) -> Message:
        at = records.binding(asked)
        client = at.partition
        if asked.metadata.message_type == records.IDENTIFY:
            home = self.tokens.get(client, client % self.groups)
            return records.token_reply(Token(np.eye(DIM, dtype=np.float32)[home], SAMPLES), at, asked)
        start = view(asked.content.array_records[records.ARRAYS][records.FLAT])
        flat = self.forge.get(client, honest)(self, client, start)
        return records.train_reply(TrainReply(at, flat, SAMPLES, 1.0, 1, 0.1), asked)

    def update(self, client: int) -> Flat:
        """How far an honest client moves in this round; read only."""
        return _moved(self.seed, self.round, client % self.groups, client, self.spread)

    def members(self, subspace: int) -> list[int]:
        """Who is at home in a subspace."""
        return [client for client in range(CLIENTS) if client % self.groups == subspace]


@lru_cache(maxsize=10_000)
def _moved(seed: int, round_: int, home: int, client: int, spread: float) -> Flat:
    size = LAYOUT.size(RANK)
    common, own = (generator(seed, "planted", round_, *n).normal(size=size) for n in ((home,), (home, client)))
    length = STEP * np.sqrt(len(LAYOUT.modules) * RANK / 3) / np.sqrt(size)  # the norm of a new A is √(r/3) per layer
    moved = np.asarray(length * (common + spread * own), dtype=np.float32)
    moved.flags.writeable = False
    return moved


def honest(federation: Federation, client: int, start: Flat) -> Flat:
    """What a client sends that does as it should."""
    return start + federation.update(client)


def product(flat: Flat) -> Product:
    """What an adapter does: every layer's B A, in one vector."""
    return np.concatenate([(b.astype(np.float64) @ a).ravel() for a, b in LAYOUT.split(flat).values()])
