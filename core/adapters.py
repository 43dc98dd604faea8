"""An adapter on the wire is one flat float32 vector; a `Layout` says which Linear layers it adapts and how to read it.

Per layer, in the order of their names: A [rank, in], then B [out, rank], both row-major. The rank is not part of the
layout: one layout serves a subspace of rank r and a concatenation of K of them. Kinds that hold more than A and B, or
other things, have `vectors` behind them: dora's magnitudes, ia3's scales, what a method trains of its own. A run that
also trains the multimodal projector appends a dense tail. Vectors and tail are differences to the base's own values,
row-major, 0 at the start: so a new adapter needs no weights, and a mean of differences is right. Prompts stand for
themselves: `prompts` [P, length, hidden], in units of the spread of the base's token embeddings, and `keys` [P, D].
"""

import hashlib
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from fedstrata.core.config import RunConfig
from fedstrata.core.seeds import generator

Flat = npt.NDArray[np.float32]
Parameters = tuple[tuple[str, tuple[int, ...]], ...]  # (name in the base model, shape), in the order of the wire

KINDS = ("lora", "dora", "ia3", "moelora", "prompts")  # of a layout
STACKED = ("lora", "moelora", "prompts")  # kinds of which a cohort's adapters lie in one buffer
FUSED = ("lora", "rslora")  # values of lora.kind whose cohorts are fused and whose adapters can be mixed
LORA_A, LORA_B, MAGNITUDE, SCALE = "lora_A", "lora_B", "lora_magnitude_vector", "ia3_l"  # as PEFT calls them
GATE = "lora_router"  # as CoIN calls it
FEEDFORWARD = ("down_proj", "w2", "wo", "fc2", "fc_out", "dense_4h_to_h", "mlp.c_proj")  # where PEFT's tables have them


def unfusable(config: RunConfig) -> str:
    """Why the run's clients are trained one at a time; empty where cohorts are fused."""
    kind = config.lora.kind
    return "" if kind in FUSED else f"lora.kind={kind} cannot be fused"


def feedforward(name: str) -> bool:
    """Whether ia3 rescales this layer's input, as at the end of a feed-forward block, and not its output."""
    return f".{name}".endswith(tuple(f".{end}" for end in FEEDFORWARD))


@dataclass(frozen=True)
class Layout:
    """The adapted Linear layers: (name in the base model, out features, in features), sorted by name.

    dense: the parameters of the tail: (name in the base model, shape), in the model's order; () without a tail.
    kind: lora, dora or ia3; rslora is a lora whose scaling differs, and the scaling is no part of the layout. Other
        kinds are a method's own: `core.config.StrategyConfig.trains`.
    own: what such a kind has: moelora its gates, whatever the rank; prompts what one prompt is made of, and the rank is
        the number of prompts.
    """

    modules: tuple[tuple[str, int, int], ...]
    dense: Parameters = ()
    kind: str = "lora"
    own: Parameters = ()

    @property
    def width(self) -> int:
        """Parameters per unit of rank: Σ (in + out), or one prompt's; 0 for ia3, which has no rank."""
        if self.kind == "prompts":
            return sum(math.prod(shape) for _, shape in self.own)
        return 0 if self.kind == "ia3" else sum(out + inner for _, out, inner in self.modules)

    @property
    def vectors(self) -> Parameters:
        """What each layer has whatever the rank: dora its magnitude [out], ia3 its scale [1, in] or [out, 1]."""
        if self.kind == "dora":
            return tuple((f"{name}.{MAGNITUDE}", (out,)) for name, out, _ in self.modules)
        if self.kind == "ia3":
            shapes = [(name, (1, inner) if feedforward(name) else (out, 1)) for name, out, inner in self.modules]
            return tuple((f"{name}.{SCALE}", shape) for name, shape in shapes)
        return () if self.kind == "prompts" else self.own

    @property
    def fixed(self) -> int:
        """Parameters of `vectors`."""
        return sum(math.prod(shape) for _, shape in self.vectors)

    @property
    def tail(self) -> int:
        """Length of the dense tail."""
        return sum(math.prod(shape) for _, shape in self.dense)

    @property
    def lora(self) -> "Layout":
        """The same layers without the tail: how a subspace is read that keeps none."""
        return replace(self, dense=())

    def size(self, rank: int) -> int:
        """Length of a flat adapter of this rank, its tail included."""
        return self.width * rank + self.fixed + self.tail

    def rank(self, flat: Flat) -> int:
        """The rank of a flat adapter, 0 for ia3. Raises ValueError when its length fits none."""
        more = self.fixed + self.tail
        rank, rest = divmod(flat.size - more, self.width) if self.width else (0, flat.size - more)
        if rest or (self.width and rank < 1):
            low = f"a multiple of {self.width} parameters" + (f" and {more} more" if more else "")
            raise ValueError(f"an adapter of this layout has {low if self.width else more}, got {flat.size}")
        return rank

    def parameters(self, rank: int) -> Parameters:
        """Everything that a flat adapter of this rank holds, in its order."""
        low = [
            pair
            for name, out, inner in self.modules
            for pair in ((f"{name}.{LORA_A}", (rank, inner)), (f"{name}.{LORA_B}", (out, rank)))
        ]
        prompts = [(name, (rank, *shape)) for name, shape in self.own] if self.kind == "prompts" else []
        return (*(low if self.width else ()), *prompts, *self.vectors, *self.dense)

    def views(self, flat: Flat) -> dict[str, Flat]:
        """Views {parameter: its part, in its shape} of a flat adapter with its tail."""
        return _views(flat, self.parameters(self.rank(flat)))

    def cut(self, flat: Flat) -> tuple[Flat, Flat]:
        """Views (the adapter without its tail, the tail) of a flat adapter; without a tail the adapter itself."""
        middle = self.size(self.rank(flat)) - self.tail
        return flat[:middle] if self.tail else flat, flat[middle:]

    def dense_views(self, tail: Flat) -> dict[str, Flat]:
        """Views {parameter: difference to the base's value, in its shape} of a tail [`tail`]."""
        return _views(tail, self.dense)

    def split(self, flat: Flat) -> dict[str, tuple[Flat, Flat]]:
        """Views {layer: (A [rank, in], B [out, rank])} of a flat adapter; of rank 0 where the kind has none."""
        rank, start, views = self.rank(flat), 0, {}
        for name, out, inner in self.modules:
            middle, end = start + rank * inner, start + rank * (inner + out)
            views[name] = (flat[start:middle].reshape(rank, inner), flat[middle:end].reshape(out, rank))
            start = end
        return views

    def join(self, factors: Mapping[str, tuple[Flat, Flat]]) -> Flat:
        """The inverse of `split`: the low-rank part."""
        pieces = [factor.ravel() for name, _, _ in self.modules for factor in factors[name]]
        return np.concatenate(pieces, dtype=np.float32)

    def to_json(self) -> str:
        """The modules alone where there is nothing else to say, so that such a layout keeps its hash."""
        plain = self.kind == "lora" and not self.dense
        kind = {} if self.kind == "lora" else {"kind": self.kind}
        own = {"own": self.own} if self.own else {}
        return json.dumps(self.modules if plain else {"modules": self.modules, "dense": self.dense, **kind, **own})

    @staticmethod
    def from_json(text: str) -> "Layout":
        """Raises ValueError, KeyError or TypeError for any other text."""
        tree = json.loads(text)
        tree = tree if isinstance(tree, dict) else {"modules": tree, "dense": []}
        modules = tuple((str(name), int(out), int(inner)) for name, out, inner in tree["modules"])
        kind = tree.get("kind", "lora")
        if kind not in KINDS:
            raise ValueError(f"a layout's kind is one of {', '.join(KINDS)}, got {kind!r}")
        dense, own = (_parameters(tree.get(key, [])) for key in ("dense", "own"))
        return Layout(modules, dense, kind, own)

    @property
    def hash(self) -> str:
        """Two sides that disagree about it must not exchange adapters."""
        return hashlib.sha256(self.to_json().encode()).hexdigest()[:16]


def fresh(layout: Layout, rank: int, seed: int, *names: str | int, init: str = "uniform") -> Flat:
    """A new adapter that changes nothing yet: A is drawn, everything else is 0.

    A pure function of (seed, names): the server draws it once, so a whole group starts from the same A.

    Prompts have no such start: they are drawn whole, from U(−1, 1) as L2P's are.

    init: uniform: A ~ U(−1/√in, 1/√in) as PEFT draws it; normal: A ~ N(0, 0.01²) as FCIT's published code does.
    """
    draw = generator(seed, "adapter", *names)
    if layout.kind == "prompts":
        drawn = draw.uniform(-1, 1, size=layout.width * rank)
        return np.concatenate([drawn, np.zeros(layout.tail)], dtype=np.float32)
    rank, factors = rank if layout.width else 0, {}
    for name, out, inner in layout.modules:
        bound, shape = 1 / np.sqrt(inner), (rank, inner)
        a = draw.uniform(-bound, bound, size=shape) if init == "uniform" else draw.normal(0, 0.01, size=shape)
        factors[name] = (a.astype(np.float32), np.zeros((out, rank), dtype=np.float32))
    return np.concatenate([layout.join(factors), np.zeros(layout.fixed + layout.tail, dtype=np.float32)])


def _parameters(tree: Any) -> Parameters:
    return tuple((str(name), tuple(map(int, shape))) for name, shape in tree)


def _views(flat: Flat, parameters: Parameters) -> dict[str, Flat]:
    start, views = 0, {}
    for name, shape in parameters:
        end = start + math.prod(shape)
        views[name] = flat[start:end].reshape(shape)
        start = end
    return views
