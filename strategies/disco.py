"""DISCO: dynamic knowledge organization and subspace selective activation.

Guo et al., "Federated Continual Instruction Tuning", ICCV 2025, arXiv 2503.12897. Uses task identity: no.

The server keeps a growing cache of subspaces, each a LoRA adapter with an identity token. A participant first sends
its token; the server matches it against the cache (cosine ≥ τ) or opens a subspace; the participant trains that
subspace alone and uploads only it. At inference every input activates the subspaces by a softmax over cosines / ε.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt
from flwr.app import ArrayRecord, ConfigRecord, Message, MetricRecord
from flwr.serverapp import Grid

from fedstrata.core import records
from fedstrata.core.adapters import Flat, Layout, fresh
from fedstrata.core.config import PROJECTORS, StrategyConfig, require
from fedstrata.core.identity import Token, cosines, pooled
from fedstrata.core.privacy import TokenConfig
from fedstrata.core.records import Knowledge
from fedstrata.strategies.base import Inputs, Participant, Parts, Router, Setup, Strategy, Weights, train_messages
from fedstrata.strategies.facts import Facts
from fedstrata.strategies.merging import MergeConfig, Merging, merge_options
from fedstrata.strategies.optimizers import Moments, packed, unpacked

Likeness = Callable[[npt.ArrayLike, npt.ArrayLike], npt.NDArray[np.float64]]  # of rows with rows
ACTIVATIONS = ("softmax", "argmax", "cosine", "concat")
FEDAVG = MergeConfig()


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


@dataclass(frozen=True)
class Subspace:
    """One piece of the server's knowledge; `count` is N_j, the instructions folded into the token so far."""

    adapter: Flat
    token: Token
    moments: Moments | None = None  # the server optimiser's of this subspace, if there is one


@dataclass(frozen=True)
class DiscoState:
    """The cache. It grows without limit; only filled subspaces are in it, with the layout's tail where it is theirs."""

    subspaces: tuple[Subspace, ...] = ()
    shared: Flat = field(default_factory=lambda: np.zeros(0, np.float32), compare=False)  # the layout's tail, for all
    shared_moments: Moments | None = None

    def tokens(self) -> npt.NDArray[np.float32]:
        """[K, D]; [0, 0] while the cache is empty."""
        rows = [subspace.token.value for subspace in self.subspaces]
        return np.stack(rows) if rows else np.zeros((0, 0), dtype=np.float32)


@dataclass(frozen=True)
class Update:
    """What one participant sent back for its subspace."""

    subspace: int
    adapter: Flat
    token: Token
    shared: Flat = field(default_factory=lambda: np.zeros(0, dtype=np.float32))
    weight: float | None = None  # of the adapter in its mean; None: the token's count


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
        return train_messages(self.participants, flats, self._placement, config)

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


@dataclass(frozen=True)
class SelectiveActivation:
    """SSA: the router over the subspaces' tokens [K, D]."""

    tokens: npt.NDArray[np.float32]
    epsilon: float
    activation: str
    needs_features: bool = True

    def weights(self, inputs: Inputs) -> Weights:
        if not len(self.tokens):
            return np.zeros((len(inputs.ids), 0), dtype=np.float32)
        assert inputs.features is not None, "a router that needs features was given none"
        return activate(inputs.features, self.tokens, self.epsilon, self.activation)


def match(
    token: npt.ArrayLike, tokens: npt.NDArray[np.float32], tau: float, likeness: Likeness = cosines
) -> int | None:
    """j* = argmax_j cos(μ, μ_j) if that cosine is at least τ, else None: the token is new."""
    if not len(tokens):
        return None
    similar = likeness(np.atleast_2d(np.asarray(token)), tokens)[0]
    best = int(similar.argmax())
    return best if similar[best] >= tau else None


def group(tokens: npt.ArrayLike, tau: float, likeness: Likeness = cosines) -> list[list[int]]:
    """Groups new tokens [N, D] by single linkage at τ, in the order of their first members.

    The rule for chains: a ~ b and b ~ c put a, b and c into one group even where a ≁ c.
    """
    near = likeness(tokens, tokens) >= tau
    label = list(range(len(near)))
    for i in range(len(near)):
        for j in range(i):
            if near[i, j] and label[i] != label[j]:
                old, new = max(label[i], label[j]), min(label[i], label[j])
                label = [new if value == old else value for value in label]
    return [[i for i, value in enumerate(label) if value == first] for first in sorted(set(label))]


def place(
    tokens: Sequence[Token],
    cache: npt.NDArray[np.float32],
    tau: float,
    min_open: int,
    likeness: Likeness = cosines,
) -> list[int | None]:
    """For every participant the subspace it trains: an old one, a new one (index ≥ K), or None: it sits out.

    A mean over one or two instructions can fall below τ of its own task, so a group of fewer than `min_open`
    instructions opens nothing.
    """
    found = [match(token.value, cache, tau, likeness) for token in tokens]
    unmatched = [index for index, subspace in enumerate(found) if subspace is None]
    opened = len(cache)
    for members in group(np.stack([tokens[i].value for i in unmatched]), tau, likeness) if unmatched else []:
        if sum(tokens[unmatched[m]].count for m in members) >= min_open:
            for member in members:
                found[unmatched[member]] = opened
            opened += 1
    return found


def organise(
    state: DiscoState,
    updates: Iterable[Update],
    options: MergeConfig = FEDAVG,
    start: Callable[[int], Flat] | None = None,
    layout: Layout | None = None,
) -> DiscoState:
    """Per subspace the merge of its updates, n_k their weights; μ_j ← (N_j μ_j + Σ n_k μ_k) / (N_j + Σ n_k).

    One pass over the updates; a mean holds none of them. The tail is merged from all of them, whatever their subspace:
    FCIT's published projector is FedAvg's alone. Subspaces without an update keep their bits; new ones are appended in
    the order of their indices, and one that nobody filled leaves no gap.

    start: the adapter that a subspace's clients were sent; needed for new ones, unless the mean is their adapter.
    layout: how a subspace's adapter is read; needed for a merge of products.
    """
    known = state.subspaces
    start = start or (lambda index: known[index].adapter)
    merges: dict[int, Merging] = {}
    tokens: dict[int, list[Token]] = {}
    shared = Merging(options, lambda: state.shared, state.shared_moments)
    for update in updates:
        weight, index = update.token.count if update.weight is None else update.weight, update.subspace
        if index not in merges:
            moments = known[index].moments if index < len(known) else None
            merges[index] = Merging(options, partial(start, index), moments, layout)
        merges[index].add(update.adapter, weight)
        tokens.setdefault(index, []).append(update.token)
        if state.shared.size:
            shared.add(update.shared, weight)
        del update  # before the next one is loaded
    subspaces = list(known)
    for index in sorted(merges):
        adapter, moments = merges[index].result()
        before = [known[index].token] if index < len(known) else []
        subspaces[index : index + 1] = [Subspace(adapter, pooled([*before, *tokens[index]]), moments)]
    tail = shared.result() if shared.weight else (state.shared, state.shared_moments)
    return DiscoState(tuple(subspaces), *tail)


def activate(
    features: npt.NDArray[np.float32], tokens: npt.NDArray[np.float32], epsilon: float, kind: str = "softmax"
) -> Weights:
    """α [B, K] for features [B, D] over the filled subspaces' tokens [K, D].

    softmax: α_i = exp(cos_i/ε) / Σ_j exp(cos_j/ε) (the paper); argmax: the best alone; cosine: cos_i itself;
    concat: every subspace at weight 1.
    """
    similar = cosines(features, tokens)
    if kind == "softmax":
        raised = np.exp((similar - similar.max(axis=1, keepdims=True)) / epsilon)
        weights = raised / raised.sum(axis=1, keepdims=True)
    elif kind == "argmax":
        weights = np.eye(len(tokens))[similar.argmax(axis=1)]
    else:
        weights = similar if kind == "cosine" else np.ones_like(similar)
    return np.asarray(weights, dtype=np.float32)
