"""An adapter on the wire is one flat float32 vector; a `Layout` says which Linear layers it adapts and how to read it.

Per layer, in the order of their names: A [rank, in], then B [out, rank], both row-major. The rank is not part of the
layout: one layout serves a subspace of rank r and a concatenation of K of them.
"""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from fedstrata.core.seeds import generator

Flat = npt.NDArray[np.float32]


@dataclass(frozen=True)
class Layout:
    """The adapted Linear layers: (name in the base model, out features, in features), sorted by name."""

    modules: tuple[tuple[str, int, int], ...]

    @property
    def width(self) -> int:
        """Parameters per unit of rank: Σ (in + out)."""
        return sum(out + inner for _, out, inner in self.modules)

    def size(self, rank: int) -> int:
        """Length of a flat adapter of this rank."""
        return self.width * rank

    def rank(self, flat: Flat) -> int:
        """The rank of a flat adapter. Raises ValueError when its length fits none."""
        rank, rest = divmod(flat.size, self.width)
        if rest or rank < 1:
            raise ValueError(f"an adapter of this layout has a multiple of {self.width} parameters, got {flat.size}")
        return rank

    def split(self, flat: Flat) -> dict[str, tuple[Flat, Flat]]:
        """Views {layer: (A [rank, in], B [out, rank])} of a flat adapter."""
        rank, start, views = self.rank(flat), 0, {}
        for name, out, inner in self.modules:
            middle, end = start + rank * inner, start + rank * (inner + out)
            views[name] = (flat[start:middle].reshape(rank, inner), flat[middle:end].reshape(out, rank))
            start = end
        return views

    def join(self, factors: Mapping[str, tuple[Flat, Flat]]) -> Flat:
        """The inverse of `split`."""
        pieces = [factor.ravel() for name, _, _ in self.modules for factor in factors[name]]
        return np.concatenate(pieces, dtype=np.float32)

    def to_json(self) -> str:
        return json.dumps(self.modules)

    @staticmethod
    def from_json(text: str) -> "Layout":
        return Layout(tuple((str(name), int(out), int(inner)) for name, out, inner in json.loads(text)))

    @property
    def hash(self) -> str:
        """Two sides that disagree about it must not exchange adapters."""
        return hashlib.sha256(self.to_json().encode()).hexdigest()[:16]


def fresh(layout: Layout, rank: int, seed: int, *names: str | int) -> Flat:
    """A new adapter that changes nothing yet: A ~ U(−1/√in, 1/√in) as PEFT draws it, B = 0.

    A pure function of (seed, names): the server draws it once, so a whole group starts from the same A.
    """
    draw = generator(seed, "adapter", *names)
    factors = {}
    for name, out, inner in layout.modules:
        bound = 1 / np.sqrt(inner)
        a = draw.uniform(-bound, bound, size=(rank, inner)).astype(np.float32)
        factors[name] = (a, np.zeros((out, rank), dtype=np.float32))
    return layout.join(factors)


def weighted_mean(flats: Sequence[Flat], weights: Sequence[float]) -> Flat:
    """Σ w_k x_k / Σ w_k, summed in float64 in the order given (callers sort by partition id) and rounded once."""
    total = float(sum(weights))
    if total <= 0 or len(flats) != len(weights):
        raise ValueError(f"expected one weight per adapter with a sum above 0, got {list(weights)}")
    mean = np.zeros(flats[0].shape, dtype=np.float64)
    for flat, weight in zip(flats, weights, strict=True):
        mean += flat.astype(np.float64) * (weight / total)
    return mean.astype(np.float32)


def save_peft(folder: Path, layout: Layout, flat: Flat, scaling: float, base: str) -> None:
    """Writes one adapter as a folder that `peft.PeftModel.from_pretrained(base_model, folder)` loads.

    scaling: γ in ΔW = γ B A; PEFT writes it as lora_alpha / r.
    """
    import torch
    from peft import LoraConfig
    from safetensors.torch import save_file

    rank = layout.rank(flat)
    targets = [name for name, _, _ in layout.modules]
    config = LoraConfig(r=rank, lora_alpha=scaling * rank, target_modules=targets, base_model_name_or_path=base)  # type: ignore[arg-type]
    config.save_pretrained(str(folder))
    tensors = {}
    for name, (a, b) in layout.split(flat).items():
        tensors[f"base_model.model.{name}.lora_A.weight"] = torch.from_numpy(a.copy())
        tensors[f"base_model.model.{name}.lora_B.weight"] = torch.from_numpy(b.copy())
    save_file(tensors, str(folder / "adapter_model.safetensors"), metadata={"format": "pt"})
