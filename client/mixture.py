"""K subspaces on one frozen base, mixed per input in one forward (DISCO's subspace selective activation)."""

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
import torch.nn.functional as F

from fedstrata.core.adapters import Flat, Layout


@dataclass
class Mixture:
    """K subspaces with concatenated ranks, mixed per input: Σ_i α_i γ B_i A_i x in one pass (DISCO's SSA)."""

    factors: dict[str, tuple[torch.Tensor, torch.Tensor]]  # layer → A [K·r, in], B [out, K·r]
    scaling: float
    rank: int
    weights: torch.Tensor  # [B, 1, K·r], set for every batch
    dense: dict[str, torch.Tensor] = field(default_factory=dict)  # parameter of the tail → its difference

    @staticmethod
    def of(
        flats: Sequence[Flat],
        layout: Layout,
        scaling: float,
        device: torch.device,
        dtype: torch.dtype,
        shared: Flat | None = None,
    ) -> "Mixture":
        """`flats` without the tail, which all of them share: `shared`, or none."""
        tail = {} if shared is None or not shared.size else layout.dense_views(shared)
        layout = layout.lora
        views = [layout.split(flat) for flat in flats]
        factors = {}
        for name, _, _ in layout.modules:
            a = np.concatenate([view[name][0] for view in views], axis=0)
            b = np.concatenate([view[name][1] for view in views], axis=1)
            factors[name] = (torch.from_numpy(a).to(device, dtype), torch.from_numpy(b).to(device, dtype))
        rank = layout.rank(flats[0])
        dense = {name: torch.from_numpy(value.copy()).to(device, dtype) for name, value in tail.items()}
        return Mixture(factors, scaling, rank, torch.ones(1, 1, rank * len(flats), device=device, dtype=dtype), dense)

    def activate(self, weights: torch.Tensor) -> None:
        """Sets α [B, K] for the next forward passes."""
        spread = weights.to(self.weights.device, self.weights.dtype).repeat_interleave(self.rank, dim=1)
        self.weights = self.scaling * spread.unsqueeze(1)

    def delta(self, name: str, x: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
        """out and what the bank adds to it for x [B, L, in]."""
        if name not in self.factors:
            weight = self.dense[f"{name}.weight"]
            return out + F.linear(x.to(weight.dtype), weight, self.dense.get(f"{name}.bias")).to(out.dtype)
        a, b = self.factors[name]
        return out + F.linear(F.linear(x.to(a.dtype), a) * self.weights, b).to(out.dtype)
