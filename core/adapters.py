"""An adapter on the wire is one flat float32 vector; a `Layout` says which Linear layers it adapts and how to read it.

Per layer, in the order of their names: A [rank, in], then B [out, rank], both row-major. The rank is not part of the
layout: one layout serves a subspace of rank r and a concatenation of K of them. A run that also trains the multimodal
projector appends a dense tail: per projector parameter the difference to the base's value, row-major, 0 at the start.
"""

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from fedstrata.core.seeds import generator

Flat = npt.NDArray[np.float32]


@dataclass(frozen=True)
class Layout:
    """The adapted Linear layers: (name in the base model, out features, in features), sorted by name.

    dense: the parameters of the tail: (name in the base model, shape), in the model's order; () without a tail.
    """

    modules: tuple[tuple[str, int, int], ...]
    dense: tuple[tuple[str, tuple[int, ...]], ...] = ()

    @property
    def width(self) -> int:
        """Parameters per unit of rank: Σ (in + out)."""
        return sum(out + inner for _, out, inner in self.modules)

    @property
    def tail(self) -> int:
        """Length of the dense tail."""
        return sum(math.prod(shape) for _, shape in self.dense)

    @property
    def lora(self) -> "Layout":
        """The same layers without the tail: how a subspace is read that keeps none."""
        return Layout(self.modules)

    def size(self, rank: int) -> int:
        """Length of a flat adapter of this rank, its tail included."""
        return self.width * rank + self.tail

    def rank(self, flat: Flat) -> int:
        """The rank of a flat adapter. Raises ValueError when its length fits none."""
        rank, rest = divmod(flat.size - self.tail, self.width)
        if rest or rank < 1:
            tail = f" and {self.tail} more" if self.tail else ""
            rule = f"a multiple of {self.width} parameters{tail}"
            raise ValueError(f"an adapter of this layout has {rule}, got {flat.size}")
        return rank

    def cut(self, flat: Flat) -> tuple[Flat, Flat]:
        """Views (the low-rank part, the tail) of a flat adapter; without a tail the adapter itself."""
        middle = self.size(self.rank(flat)) - self.tail
        return flat[:middle] if self.tail else flat, flat[middle:]

    def dense_views(self, tail: Flat) -> dict[str, Flat]:
        """Views {parameter: difference to the base's value, in its shape} of a tail [`tail`]."""
        start, views = 0, {}
        for name, shape in self.dense:
            end = start + math.prod(shape)
            views[name] = tail[start:end].reshape(shape)
            start = end
        return views

    def split(self, flat: Flat) -> dict[str, tuple[Flat, Flat]]:
        """Views {layer: (A [rank, in], B [out, rank])} of a flat adapter."""
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
        """The modules alone where there is no tail, so that such a layout keeps its hash."""
        return json.dumps({"modules": self.modules, "dense": self.dense} if self.dense else self.modules)

    @staticmethod
    def from_json(text: str) -> "Layout":
        tree = json.loads(text)
        tree = tree if isinstance(tree, dict) else {"modules": tree, "dense": []}
        modules = tuple((str(name), int(out), int(inner)) for name, out, inner in tree["modules"])
        return Layout(modules, tuple((str(name), tuple(map(int, shape))) for name, shape in tree["dense"]))

    @property
    def hash(self) -> str:
        """Two sides that disagree about it must not exchange adapters."""
        return hashlib.sha256(self.to_json().encode()).hexdigest()[:16]


def fresh(layout: Layout, rank: int, seed: int, *names: str | int, init: str = "uniform") -> Flat:
    """A new adapter that changes nothing yet: A is drawn, B and the tail are 0.

    A pure function of (seed, names): the server draws it once, so a whole group starts from the same A.

    init: uniform: A ~ U(−1/√in, 1/√in) as PEFT draws it; normal: A ~ N(0, 0.01²) as FCIT's published code does.
    """
    draw = generator(seed, "adapter", *names)
    factors = {}
    for name, out, inner in layout.modules:
        bound, shape = 1 / np.sqrt(inner), (rank, inner)
        a = draw.uniform(-bound, bound, size=shape) if init == "uniform" else draw.normal(0, 0.01, size=shape)
        factors[name] = (a.astype(np.float32), np.zeros((out, rank), dtype=np.float32))
    return np.concatenate([layout.join(factors), np.zeros(layout.tail, dtype=np.float32)])


def weighted_mean(flats: Sequence[Flat], weights: Sequence[float]) -> Flat:
    """Σ w_k x_k / Σ w_k, summed in float64 in the order given (callers sort by partition id) and rounded once."""
    total = float(sum(weights))
    if total <= 0 or len(flats) != len(weights):
        raise ValueError(f"expected one weight per adapter with a sum above 0, got {list(weights)}")
    mean = np.zeros(flats[0].shape, dtype=np.float64)
    for flat, weight in zip(flats, weights, strict=True):
        mean += flat.astype(np.float64) * (weight / total)
    return mean.astype(np.float32)


def save_peft(
    folder: Path, layout: Layout, flat: Flat, scaling: float, base: str, dense: Mapping[str, Flat] | None = None
) -> None:
    """Writes one adapter as a folder that `peft.PeftModel.from_pretrained(base_model, folder)` loads.

    scaling: γ in ΔW = γ B A; PEFT writes it as lora_alpha / r.
    dense: the base's own values of the tail's parameters, for a layout that has one; PEFT keeps whole modules.
    """
    import torch
    from peft import LoraConfig
    from safetensors.torch import save_file

    rank, (_, tail) = layout.rank(flat), layout.cut(flat)
    config = LoraConfig(
        r=rank,
        lora_alpha=scaling * rank,  # type: ignore[arg-type]
        target_modules=[name for name, _, _ in layout.modules],
        modules_to_save=sorted({name.rsplit(".", 2)[0] for name, _ in layout.dense}) or None,
        base_model_name_or_path=base,
    )
    config.save_pretrained(str(folder))
    tensors = {}
    for name, (a, b) in layout.split(flat).items():
        tensors[f"base_model.model.{name}.lora_A.weight"] = torch.from_numpy(a.copy())
        tensors[f"base_model.model.{name}.lora_B.weight"] = torch.from_numpy(b.copy())
    for name, delta in layout.dense_views(tail).items():
        tensors[f"base_model.model.{name}"] = torch.from_numpy((dense or {})[name] + delta)
    save_file(tensors, str(folder / "adapter_model.safetensors"), metadata={"format": "pt"})
