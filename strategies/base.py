"""What a strategy is: the server half (a Flower `Strategy`), the local half, and the router that answers at inference.

A strategy owns one immutable `state`; every method that changes it replaces it. It learns that a stage began, not
which task; only a method with `uses_task_identity = True` is told the tasks of a participant, and the report says so.
"""

from abc import abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar, Protocol

import numpy as np
import numpy.typing as npt
from flwr.app import ArrayRecord, ConfigRecord, Message, MetricRecord
from flwr.serverapp import Grid
from flwr.serverapp.strategy import Strategy as FlowerStrategy

from fedstrata.core import records
from fedstrata.core.adapters import Flat, Layout
from fedstrata.core.config import StrategyConfig
from fedstrata.core.identity import Token
from fedstrata.core.records import Knowledge, TrainReply
from fedstrata.strategies.facts import Facts

if TYPE_CHECKING:  # the server half needs no torch, and its import takes seconds
    from torch import Tensor

Weights = npt.NDArray[np.float32]
Row = tuple[int, int]


@dataclass(frozen=True)
class Setup:
    """What every method is told before the first stage."""

    seed: int
    layout: Layout
    rank: int  # r of one subspace
    subspaces: int  # K, the number of tasks: single-adapter methods get rank K·r, as FCIT's 64 = 8 × 8
    tau: float  # the text encoder's match threshold (a cosine)
    epsilon: float  # the text encoder's softmax temperature
    init: str = "uniform"  # how a new adapter's A is drawn (`core.adapters.fresh`)
    clients: int = 1  # N, all clients of the federation
    rounds: int = 1  # rounds of one stage
    words: int = 0  # of a token's numbers the first ones, which are of the text (`strategy.token`)
    words_tau: float = 0.0  # their match threshold


@dataclass(frozen=True)
class Participant:
    """One client of this round. `token` and `tasks` are None for methods that do not ask for them."""

    node: int
    partition: int
    token: Token | None = None
    tasks: tuple[int, ...] | None = None


@dataclass(frozen=True)
class Parts:
    """A state taken apart for the commit: tensors go to safetensors, facts to JSON."""

    tensors: Mapping[str, npt.NDArray[Any]]
    facts: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Inputs:
    """B inputs to be answered: identity features [B, D] (None unless asked for), task indices and example ids."""

    features: npt.NDArray[np.float32] | None
    tasks: Sequence[int]
    ids: Sequence[str]


class Router(Protocol):
    """Which subspaces answer which input."""

    @property
    def needs_features(self) -> bool:
        """Whether `weights` reads the inputs' identity features."""

    def weights(self, inputs: Inputs) -> Weights:
        """float32 [B, K], K the number of adapters in the knowledge."""


@dataclass(frozen=True)
class Everything:
    """The router of a method with one adapter: it answers everything at weight 1."""

    adapters: int
    needs_features: bool = False

    def weights(self, inputs: Inputs) -> Weights:
        return np.ones((len(inputs.ids), self.adapters), dtype=np.float32)


class LocalHalf:
    """The client's part of a method, for a cohort of C clients at once; every hook is optional.

    Tensors carry a leading client dimension. Hooks run in this order: features, begin, then per step batch → loss →
    on_gradients (after backward, before clipping) → on_step (after the optimiser), then end. One object serves one
    cohort for one round, so it may keep tensors between its hooks. `ctx` is a `client.local.LocalContext`: start
    values, what the strategy sent, what the clients remember, frozen adapters underneath, statistics.
    """

    def __init__(self, options: Any = None) -> None:
        """options: the strategy's own, `strategy.<option>`."""
        self.options = options

    def features(self, base: Any, examples: Sequence[Any]) -> "Tensor | None":
        """What it wants to know of a client's examples before they are trained, [n, D]: `batch.queries` shows it.

        base: a `client.model.BaseModel`; examples: `scenarios.stream.Example`s.
        """
        return None

    def begin(self, ctx: Any) -> None:
        """Before the first step."""

    def batch(self, ctx: Any, batch: Any) -> Any:
        """The `client.batching.Batch` that is passed through the base in the place of this one."""
        return batch

    def loss(self, ctx: Any, batch: Any, out: Any, base_loss: "Tensor") -> "Tensor":
        """The loss [C] to be minimised; the base loss is each client's mean answer-token cross-entropy.

        `out`: the logits [N, vocabulary] before the batch's N answer tokens, whose client is `batch.owner` [N].

        With `train.micro_batch` it is asked once per part of a step, and the parts add up: a penalty is added times
        `batch.part`.
        """
        return base_loss

    def on_gradients(self, ctx: Any, gradients: Mapping[str, "Tensor"]) -> None:
        """May change the gradients {name: [C, …]} in place."""

    def on_step(self, ctx: Any, parameters: Mapping[str, "Tensor"]) -> None:
        """May change the parameters {name: [C, …]} in place."""

    def end(self, ctx: Any) -> Mapping[str, "Tensor"]:
        """What the clients upload beside their adapters, {name: [C, …]}."""
        return {}


@dataclass(frozen=True)
class Offer:
    """What a client could train in a round: rows name its examples as (task, row of the task's training data).

    Attributes:
        rows: its present share.
        memory: what it remembers, {name: array}.
        seed: the client's own, the same in every round.
        draw: the client's in this round.
    """

    rows: Sequence[Row]
    memory: Mapping[str, npt.NDArray[Any]]
    seed: int
    draw: int


class Selector:
    """Which examples a client trains in a round. The plain one takes its present share.

    It runs on the client. What it wants to know again it remembers by rows, so that no example is kept anywhere else.
    A client's weight in a mean is the size of its present share, whatever is selected.
    """

    def __init__(self, options: Any = None) -> None:
        """options: the strategy's own, `strategy.<option>`."""
        self.options = options

    def select(self, offer: Offer) -> tuple[Sequence[Row], Mapping[str, npt.NDArray[Any]]]:
        """The rows to be trained, and what the client remembers beside what it remembered before."""
        return offer.rows, {}


class Strategy(FlowerStrategy):
    """One method. Subclasses give `configure_train`, `aggregate_train`, `knowledge`, `save`, `load`, perhaps `meet`."""

    facts: ClassVar[Facts] = Facts()  # for tables and laws; a method of the catalogue declares its own
    config_type: ClassVar[type[StrategyConfig]] = StrategyConfig
    uses_task_identity: ClassVar[bool] = False
    needs_tokens: ClassVar[bool] = False  # ask participants for identity tokens before training
    pooled: ClassVar[bool] = False  # participants draw from all tasks at once (the upper bound)
    routes: ClassVar[bool] = True  # an input's heaviest adapter should be the one that its task trained
    averages: ClassVar[bool] = False  # of the updates, only means weighted by num-examples enter the state
    local_half: ClassVar[type[LocalHalf]] = LocalHalf
    selector: ClassVar[type[Selector]] = Selector

    def __init__(self, options: Any, setup: Setup) -> None:
        self.options = options
        self.setup = setup
        self.participants: tuple[Participant, ...] = ()

    def begin_stage(self, stage: int) -> None:
        """A stage (counted from 1) begins; which task it brings is not told."""

    def end_stage(self, stage: int) -> None:
        """A stage ends, before it is scored."""

    def meet(self, participants: Sequence[Participant]) -> None:
        """This round's participants, with their tokens if the method needs them."""
        self.participants = tuple(participants)

    def extras(self) -> Mapping[str, tuple[int, ...]]:
        """{name: shape} of the float32 arrays that this round's replies hold beside the adapter.

        They are what `LocalHalf.end` returns, without the client dimension. A reply with any other array is refused,
        so nothing else can leave a client. Asked for after `configure_train`.
        """
        return {}

    def beside(self, stage: int, round_: int) -> tuple[int, int]:
        """How many float32 numbers a client sends, and gets, beside the adapter in this round: the plan asks."""
        return 0, 0

    def rehearsed(self, stage: int, samples: int) -> int:
        """How many earlier examples a client trains beside so many of this stage, at most: the plan asks."""
        return 0

    def rank_after(self, stage: int) -> int:
        """Rank of an adapter of `knowledge` once this stage has ended (0: before the first one): the plan asks."""
        return self.adapter_rank

    def placement(self) -> Mapping[int, int]:
        """partition → subspace that it trains this round; a participant that is missing sits this round out."""
        return {participant.partition: 0 for participant in self.participants}

    @abstractmethod
    def knowledge(self) -> Knowledge:
        """What answers at inference."""

    @abstractmethod
    def save(self) -> Parts:
        """The state taken apart."""

    @abstractmethod
    def load(self, parts: Parts) -> None:
        """The inverse of `save`."""

    @property
    @abstractmethod
    def adapter_rank(self) -> int:
        """Rank of one trained adapter."""

    @classmethod
    def variant(cls, options: Any) -> "type[Strategy]":
        """The class that these options ask for: this one, or one that inherits it."""
        return cls

    @classmethod
    def mixes(cls, options: Any) -> bool:
        """Whether an input may be answered by several adapters at once; only lora and rslora can be added up."""
        return False

    @classmethod
    def router(cls, knowledge: Knowledge) -> Router:
        """The client's half of inference."""
        return Everything(len(knowledge.adapters))

    # What Flower's interface asks for and the federation loop does itself.

    def configure_evaluate(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """Scoring is the federation loop's: it cuts the test sets into shards and sends `knowledge`."""
        return []

    def aggregate_evaluate(self, server_round: int, replies: Iterable[Message]) -> MetricRecord | None:
        return None

    def summary(self) -> None:
        return None


def passing(replies: Iterable[Message], hear: Callable[[TrainReply], None]) -> Iterator[Message]:
    """The same replies, one at a time, each shown to `hear` as it passes by: for what a method adds to an average."""
    for message in replies:
        hear(records.read_train_reply(message))
        yield message


def train_messages(
    participants: Sequence[Participant],
    flats: Mapping[int, Flat],
    placement: Mapping[int, int],
    config: ConfigRecord,
    payload: Mapping[str, npt.NDArray[Any]] | None = None,
) -> list[Message]:
    """One train message per placed participant; those of one subspace share one ArrayRecord.

    payload: arrays that all of them get beside the adapter; `LocalContext.sent` shows them to the local half.
    """
    shared = {subspace: records.arrays(flat=flat) for subspace, flat in flats.items()}
    beside = records.arrays(**payload) if payload else None
    messages = []
    for participant in participants:
        if participant.partition in placement:
            subspace = placement[participant.partition]
            content = records.train_content(shared[subspace], {**config, "subspace": subspace}, beside)
            messages.append(Message(content, participant.node, records.TRAIN))
    return messages
