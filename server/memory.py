"""What a resumed run must know beside the strategy's state: known tokens, the inner state of a stock strategy.

It is part of the commit and no part of `final_state_sha256`.
"""

from collections.abc import Mapping
from typing import Protocol, runtime_checkable

import numpy as np

from fedstrata.core.identity import Token
from fedstrata.strategies.base import Parts, Strategy

Tokens = dict[tuple[int, str], Token]  # (client, hash of its data) → token
TOKENS, INNER = "tokens", "inner."


@runtime_checkable
class Remembers(Protocol):
    """A strategy that has more to remember than its state."""

    def save_inner(self) -> Parts:
        """What there is, taken apart."""

    def load_inner(self, parts: Parts) -> None:
        """The inverse of `save_inner`."""


def pack(tokens: Mapping[tuple[int, str], Token], strategy: Strategy) -> Parts:
    """Everything as one `Parts`; tokens are one matrix, in the order of clients."""
    known = sorted(tokens.items(), key=lambda item: item[0])
    inner = strategy.save_inner() if isinstance(strategy, Remembers) else Parts({})
    tensors = {f"{INNER}{name}": tensor for name, tensor in inner.tensors.items()}
    if known:
        tensors[TOKENS] = np.stack([token.value for _, token in known])
    told = [[client, data, token.count] for (client, data), token in known]
    return Parts(tensors, {"tokens": told, "inner": dict(inner.facts)})


def unpack(memory: Parts, strategy: Strategy) -> Tokens:
    """Gives the strategy its inner state back and returns the tokens; older commits hold neither."""
    inner = {name.removeprefix(INNER): t for name, t in memory.tensors.items() if name.startswith(INNER)}
    facts = memory.facts.get("inner", {})
    if isinstance(strategy, Remembers) and (inner or facts):
        strategy.load_inner(Parts(inner, facts))
    rows = zip(memory.facts.get("tokens", []), memory.tensors.get(TOKENS, ()), strict=True)
    return {(int(client), str(data)): Token(value, int(count)) for (client, data, count), value in rows}
