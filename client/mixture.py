"""K subspaces on one frozen base, mixed per input in one forward (DISCO's subspace selective activation).

While a mixture is open, the adapted Linear layers run its forward instead of their own; the base's weights are never
written. Rows with weights of their own cost two narrow products per layer. Where all rows share their weights and
enough tokens pass, W + ΔW is computed once and costs what the bare base costs.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import cast

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from fedstrata.client.model import BaseModel
from fedstrata.core.adapters import Flat, Layout

MERGED_BYTES = 2**30  # most memory that merged weights may take; larger bases are always mixed
WIDE = (torch.float32, torch.float64)
WORTH = 2  # measured at hidden 64 to 1024: a merge is repaid after 1 to 4 times the tokens that its operations say

Factors = dict[str, tuple[torch.Tensor, torch.Tensor]]  # layer → A [K·r, in], B [out, K·r]
Forward = Callable[[torch.Tensor], torch.Tensor]


@dataclass
class Mixture:
    """K subspaces with concatenated ranks: Σ_i α_i γ B_i A_i x in one pass (DISCO's SSA).

    What a forward computes is a function of the last `activate` alone, never of those before it.
    """

    factors: Factors
    scaling: float
    rank: int
    subspaces: int
    dense: dict[str, torch.Tensor] = field(default_factory=dict)  # parameter of the tail → its differences [1 or K, …]
    own_tails: bool = False  # K of them, each weighed with its subspace; else one at weight 1
    _alphas: torch.Tensor = field(default_factory=lambda: torch.ones(1, 1))  # α [B, K] of those
    _weights: torch.Tensor = field(default_factory=lambda: torch.zeros(1, 1, 0))  # γ α [B, 1, used ranks]
    _used: tuple[int, ...] = ()  # subspaces with a weight above 0
    _active: Factors = field(default_factory=dict)  # the factors of those
    _merging: bool = False
    _merged: dict[str, torch.Tensor] = field(default_factory=dict)  # layer → W + ΔW of the weights below
    _merged_for: tuple[BaseModel | None, torch.Tensor | None] = (None, None)  # base and α of those

    @staticmethod
    def of(
        flats: Sequence[Flat],
        layout: Layout,
        scaling: float,
        device: torch.device,
        dtype: torch.dtype,
        shared: Flat | None = None,
        own_tails: bool = False,
    ) -> "Mixture":
        """All subspaces at weight 1; `flats` without the tail. `shared`: the tail; own_tails: K of them."""
        tails = [] if shared is None or not shared.size else np.split(shared, shared.size // layout.tail)
        dense = {
            name: torch.from_numpy(np.stack([layout.dense_views(tail)[name] for tail in tails])).to(device, dtype)
            for name, _ in (layout.dense if tails else ())
        }
        layout = layout.lora
        views = [layout.split(flat) for flat in flats]
        factors = {}
        for name, _, _ in layout.modules:
            a = np.concatenate([view[name][0] for view in views], axis=0)
            b = np.concatenate([view[name][1] for view in views], axis=1)
            factors[name] = (torch.from_numpy(a).to(device, dtype), torch.from_numpy(b).to(device, dtype))
        mixture = Mixture(factors, scaling, layout.rank(flats[0]), len(flats), dense, own_tails)
        mixture.activate(torch.ones(1, len(flats)))
        return mixture

    def activate(self, weights: torch.Tensor, tokens: int = 0) -> None:
        """Sets α [B, K] for the next forward passes, of B rows each; one row stands for any number.

        Subspaces whose weight is 0 in every row take no part.

        tokens: how many will pass with these weights, in all batches; by it a merge pays. 0: never merged.
        """
        self._use(tuple(torch.nonzero((weights != 0).any(dim=0))[:, 0].tolist()))
        self._merging = bool((weights == weights[:1]).all()) and self._pays(tokens)
        if self._merging:
            weights = weights[:1]
        self._alphas = weights
        a, _ = next(iter(self.factors.values()))
        spread = weights[:, list(self._used)].to(a.device, a.dtype).repeat_interleave(self.rank, dim=1)
        self._weights = self.scaling * spread.unsqueeze(1)
        if self._merging:
            self._forget(self._merged_for[0], weights.clone())

    @contextmanager
    def on(self, base: BaseModel) -> Iterator[None]:
        """While open, the base model answers with the mixture."""
        self._forget(base, self._merged_for[1])
        layers = {name: base.module(name) for name in (*self.factors, *dict.fromkeys(map(_owner, self.dense)))}
        before = {name: vars(layer).get("forward") for name, layer in layers.items()}
        for name, layer in layers.items():
            vars(layer)["forward"] = self._forward(name, layer)
        try:
            yield
        finally:
            for name, layer in layers.items():
                del vars(layer)["forward"]
                if before[name] is not None:
                    vars(layer)["forward"] = before[name]

    def _forward(self, name: str, layer: nn.Module) -> Forward:
        """What stands in for the layer's own forward: x [B, L, in] → [B, L, out]."""
        plain: Forward = layer.forward
        if name not in self.factors:
            return lambda x: self._shifted(name, x, plain(x))
        own = type(layer) is nn.Linear and "forward" not in vars(layer)  # not quantised, no other adapter underneath

        def forward(x: torch.Tensor) -> torch.Tensor:
            if not self._used:
                return plain(x)
            if own and self._merging and (weight := self._merge(name, layer)) is not None:
                return F.linear(x, weight, cast(nn.Linear, layer).bias)
            return self._mixed(name, x, plain(x))

        return forward

    def _mixed(self, name: str, x: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
        """Adds γ Σ α_i B_i A_i x to `out`, which is nobody else's yet."""
        a, b = self._active[name]
        hidden = F.linear(x.to(a.dtype), a) * self._weights
        if out.dtype != b.dtype:
            return out + F.linear(hidden, b).to(out.dtype)
        out.view(-1, out.shape[-1]).addmm_(hidden.view(-1, hidden.shape[-1]), b.t())
        return out

    def _shifted(self, name: str, x: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
        """out + x ΔWᵀ + Δb; where every subspace has its own, out + Σ α_i (x ΔW_iᵀ + Δb_i)."""
        weights, biases = self.dense[f"{name}.weight"], self.dense.get(f"{name}.bias")
        alphas = self._alphas.to(weights.device, weights.dtype)
        for i in self._used if self.own_tails else (0,):
            moved = F.linear(x.to(weights.dtype), weights[i], None if biases is None else biases[i])
            if self.own_tails:
                moved = alphas[:, i, None, None] * moved
            out = out + moved.to(out.dtype)
        return out

    def _merge(self, name: str, layer: nn.Module) -> torch.Tensor | None:
        """W + ΔW, computed when the layer first needs it.

        None where W is narrower than float32 or than the factors: rounded to it, ΔW would lose what it says.
        """
        if name not in self._merged:
            (a, b), weight = self._active[name], cast(nn.Linear, layer).weight
            if weight.dtype != a.dtype or weight.dtype not in WIDE:
                return None
            self._merged[name] = torch.addmm(weight.detach(), b * self._weights[0], a)
        return self._merged[name]

    def _forget(self, base: BaseModel | None, weights: torch.Tensor | None) -> None:
        """Merged weights are of one base and one α."""
        old_base, old = self._merged_for
        if old_base is not base or old is None or weights is None or not torch.equal(old, weights):
            self._merged = {}
        self._merged_for = (base, weights)

    def _use(self, used: tuple[int, ...]) -> None:
        """Keeps the factors of these subspaces at hand."""
        if used == self._used:
            return
        self._used, self._active = used, self.factors
        if len(used) < self.subspaces:
            ranks = [subspace * self.rank + row for subspace in used for row in range(self.rank)]
            self._active = {n: (a[ranks], b[:, ranks].contiguous()) for n, (a, b) in self.factors.items()}

    def _pays(self, tokens: int) -> bool:
        """Per unit of rank a merge takes Σ in·out operations, a mixed token Σ (in + out)."""
        shapes = [(len(b), a.shape[1], a.element_size()) for a, b in self.factors.values()]
        fits = sum(out * inner * size for out, inner, size in shapes) <= MERGED_BYTES
        return fits and tokens * sum(o + i for o, i, _ in shapes) >= WORTH * sum(o * i for o, i, _ in shapes)


def _owner(parameter: str) -> str:
    return parameter.rpartition(".")[0]
