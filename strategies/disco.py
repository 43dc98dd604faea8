"""DISCO: dynamic knowledge organization and subspace selective activation.

Guo et al., "Federated Continual Instruction Tuning", ICCV 2025, arXiv 2503.12897. Uses task identity: no.

The server keeps a growing cache of subspaces, each a LoRA adapter with an identity token. A participant first sends
its token; the server matches it against the cache (cosine ≥ τ) or opens a subspace; the participant trains that
subspace alone and uploads only it. At inference every input activates the subspaces by a softmax over cosines / ε. The
arithmetic is in `organisation` and `activation`.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt
from flwr.app import ArrayRecord, ConfigRecord, Message, MetricRecord
from flwr.serverapp import Grid

from fedstrata.core import records
from fedstrata.core.adapters import Flat, fresh
from fedstrata.core.config import PROJECTORS, StrategyConfig, require
from fedstrata.core.identity import Token
from fedstrata.core.privacy import TokenConfig
from fedstrata.core.records import Knowledge
from fedstrata.strategies.activation import ACTIVATIONS, SelectiveActivation
from fedstrata.strategies.base import Participant, Parts, Router, Setup, Strategy, train_messages
from fedstrata.strategies.facts import Facts
from fedstrata.strategies.merging import MergeConfig, merge_options
from fedstrata.strategies.optimizers import packed, unpacked
from fedstrata.strategies.organisation import DiscoState, Subspace, Update, organise, place


@dataclass(frozen=True)
class DiscoConfig(MergeConfig, TokenConfig):
    """Options of DISCO. τ, ε and the text encoder are one unit: null takes the encoder's own."""

    tau: float | None = None  # cosine from which a token joins a subspace; higher opens more subspaces
    epsilon: float | None = None  # softmax temperature; lower routes harder
    activation: str = "softmax"  # softmax | argmax | cosine | concat (the paper's ablation)
    compat: str = "none"  # none | official: with the published code's defects, for comparison only
    min_open: int = 3  # instructions a group must hold to open a subspace; a smaller group sits the round out

    projectors: ClassVar[tuple[str, ...]] = (*PROJECTORS, "per-subspace")  # trained, averaged, activated with its own

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.tau is None or -1 <= self.tau <= 1, "strategy.tau", "a cosine between -1 and 1", self.tau)
        require(self.epsilon is None or self.epsilon > 0, "strategy.epsilon", "above 0", self.epsilon)
        require(self.activation in ACTIVATIONS, "strategy.activation", " | ".join(ACTIVATIONS), self.activation)
        require(self.min_open >= 1, "strategy.min_open", "at least 1", self.min_open)
        require(self.compat in ("none", "official"), "strategy.compat", "none | official", self.compat)
        good = self.compat == "none" or self.name == "disco"
        require(good, "strategy.compat", f"none with strategy.name={self.name}", self.compat)

    @property
    def averages(self) -> bool:
        """As published, a subspace that nobody owns is overwritten by one client's."""
        return super().averages and self.compat == "none"


class Disco(Strategy):
    """DISCO: subspaces found by identity tokens, trained one at a time, activated per input."""

    facts: ClassVar[Facts] = Facts("2503.12897", "ICCV 2025", grows=1, plain={"subspaces": 1}, neutral={"tau": -1})
    config_type: ClassVar[type[StrategyConfig]] = DiscoConfig
    needs_tokens: ClassVar[bool] = True
    averages: ClassVar[bool] = True

    def __init__(self, options: Any, setup: Setup) -> None:
        super().__init__(options, setup)
        self.layout = setup.layout if options.projector == "per-subspace" else setup.layout.lora  # of one subspace
        self.state = DiscoState(shared=np.zeros(setup.layout.tail - self.layout.tail, dtype=np.float32))
        self.tau = setup.tau if options.tau is None else options.tau
        self.epsilon = setup.epsilon if options.epsilon is None else options.epsilon
        self._placement: Mapping[int, int] = {}

    @property
    def adapter_rank(self) -> int:
        return self.setup.rank

    def meet(self, participants: Sequence[Participant]) -> None:
        super().meet(participants)
        found = self._places([p.token for p in participants if p.token is not None])
        self._placement = {p.partition: j for p, j in zip(participants, found, strict=True) if j is not None}

    def _places(self, tokens: Sequence[Token]) -> list[int | None]:
        """The subspace of each participant."""
        return place(tokens, self.state.tokens(), self.tau, self.options.min_open)

    def placement(self) -> Mapping[int, int]:
        return self._placement

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        flats = {j: np.concatenate([self._start(j), self.state.shared]) for j in sorted(set(self._placement.values()))}
        return train_messages(self.participants, flats, self._placement, config, self.payload())

    def payload(self) -> Mapping[str, Flat]:
        """What the clients get beside the adapter."""
        return {}

    def _start(self, subspace: int) -> Flat:
        """A new subspace's A is drawn once, from (seed, subspace), so that its whole group shares it."""
        if subspace < len(self.state.subspaces):
            return self.state.subspaces[subspace].adapter
        setup = self.setup
        return fresh(self.layout, setup.rank, setup.seed, subspace, init=setup.init)

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        trained: set[int] = set()
        known = len(self.state.subspaces)
        options = merge_options(self.options)
        self.state = organise(self.state, self._updates(replies, trained), options, self._start, self.layout)
        filled = sorted(j for j in trained if j >= known)
        number = {**{j: j for j in range(known)}, **{j: known + i for i, j in enumerate(filled)}}
        self._placement = {p: number[j] for p, j in self._placement.items() if j in number}
        return None, None

    def _updates(self, replies: Iterable[Message], trained: set[int]) -> Iterator["Update"]:
        """The replies as updates, one at a time; the subspaces that they trained are noted in `trained`."""
        tokens = {p.partition: p.token for p in self.participants if p.token is not None}
        for message in replies:
            reply = records.read_train_reply(message)
            partition = reply.binding.partition
            token = tokens.get(partition) or Token(np.zeros(0, dtype=np.float32), reply.count)
            middle = reply.flat.size - self.state.shared.size
            adapter, shared = reply.flat[:middle], reply.flat[middle:]
            trained.add(self._placement[partition])
            yield Update(self._placement[partition], adapter, token, shared, reply.count)
            del message, reply, adapter, shared  # before the next one is loaded

    def knowledge(self) -> Knowledge:
        parts = [self.layout.cut(subspace.adapter) for subspace in self.state.subspaces]
        options = {"epsilon": self.epsilon, "activation": self.options.activation, "tau": self.tau}
        shared = np.concatenate([tail for _, tail in parts]) if self.layout.tail and parts else self.state.shared
        options |= {records.TAILS: records.OWN} if self.layout.tail else {}
        return Knowledge(tuple(adapter for adapter, _ in parts), self.state.tokens(), options, shared)

    @classmethod
    def variant(cls, options: Any) -> type[Strategy]:
        if options.compat == "none":
            return cls
        from fedstrata.strategies.official import Official  # here: it inherits this class

        return Official

    @classmethod
    def mixes(cls, options: Any) -> bool:
        return bool(options.activation != "argmax")

    @classmethod
    def router(cls, knowledge: Knowledge) -> Router:
        options = knowledge.options
        return SelectiveActivation(knowledge.tokens, options["epsilon"], options["activation"])

    def save(self) -> Parts:
        tensors: dict[str, npt.NDArray[Any]] = {}
        for index, subspace in enumerate(self.state.subspaces):
            tensors[f"subspace.{index}.adapter"] = subspace.adapter
            tensors[f"subspace.{index}.token"] = subspace.token.value
            tensors |= packed(subspace.moments, f"subspace.{index}.")
        if self.state.shared.size:
            tensors |= {"shared": self.state.shared, **packed(self.state.shared_moments, "shared.")}
        counts = [subspace.token.count for subspace in self.state.subspaces]
        return Parts(tensors, {"counts": counts, "tau": self.tau, "epsilon": self.epsilon})

    def load(self, parts: Parts) -> None:
        self.tau, self.epsilon = parts.facts["tau"], parts.facts["epsilon"]
        subspaces = []
        for index, count in enumerate(parts.facts["counts"]):
            adapter, token = (parts.tensors[f"subspace.{index}.{kind}"] for kind in ("adapter", "token"))
            moments = unpacked(parts.tensors, f"subspace.{index}.")
            subspaces.append(Subspace(adapter, Token(token, count), moments))
        shared = parts.tensors.get("shared", self.state.shared)
        self.state = DiscoState(tuple(subspaces), shared, unpacked(parts.tensors, "shared."))
