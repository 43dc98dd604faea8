"""LoRA with a client dimension: C clients' adapters on one frozen base, or K subspaces mixed per input, in one forward.

The base model's weights are never changed: while the bank is open, its forward stands in for each adapted Linear's. The
layout's dense tail works alike: a Linear of the projector gets x ΔWᵀ + Δb added, which is what W + ΔW, b + Δb give.
Two things differ from training W itself: weight decay pulls towards the base's projector, not towards 0; and a step
without a picture has the gradient 0, so that the tail moves by its moments alone.
"""

import math
import warnings
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import cast

import numpy as np
import torch
from torch import nn

from fedstrata.client.dropout import Dropout
from fedstrata.client.lowrank import gated, low_rank
from fedstrata.client.mixture import Mixture
from fedstrata.client.model import BaseModel
from fedstrata.core.adapters import GATE, LORA_A, LORA_B, Flat, Layout

KINDS = (LORA_A, LORA_B)

# A client's factors lie side by side in its row of the flat buffer, so a factor's [C, …] view has gaps; autograd adds
# into such a gradient as it is and only remarks on it.
warnings.filterwarnings("ignore", message="grad and param do not obey the gradient layout contract")


@dataclass
class Cohort:
    """C clients' adapters as leaves of autograd: views into `flat` [C, size], gradients into `gradient` [C, size].

    Rows of the forward pass are client-major: client c owns rows c·b … (c+1)·b. Only the first `active` clients take
    part, so that clients with fewer steps drop out by being sorted last.
    """

    flat: torch.Tensor
    gradient: torch.Tensor
    factors: dict[str, tuple[torch.Tensor, torch.Tensor]]  # layer → A [C, r, in], B [C, out, r]
    scaling: float
    active: int
    dense: dict[str, torch.Tensor] = field(default_factory=dict)  # parameter of the tail → its difference [C, …]
    dropout: Dropout | None = None
    own: dict[str, torch.Tensor] = field(default_factory=dict)  # what the kind has beside factors [C, …]
    window: tuple[int, int] | None = None  # the clients whose rows the next forward passes hold; None: all active ones

    @staticmethod
    def of(flats: Sequence[Flat], layout: Layout, scaling: float, device: torch.device, dtype: torch.dtype) -> "Cohort":
        flat = torch.from_numpy(np.stack(flats)).to(device, dtype)
        gradient = torch.zeros_like(flat)
        start, leaves = 0, {}
        for name, shape in layout.parameters(layout.rank(flats[0])):
            end = start + math.prod(shape)
            leaves[name] = _leaf(flat, gradient, slice(start, end), shape)
            start = end
        layers = [name for name, _, _ in layout.modules]
        factors = {name: (leaves[f"{name}.{LORA_A}"], leaves[f"{name}.{LORA_B}"]) for name in layers}
        dense = {name: leaves[name] for name, _ in layout.dense}
        low = {f"{name}.{kind}" for name in layers for kind in KINDS}
        own = {name: leaf for name, leaf in leaves.items() if name not in low and name not in dense}
        return Cohort(flat, gradient, factors, scaling, len(flats), dense, own=own)

    def named(self, which: torch.Tensor) -> dict[str, torch.Tensor]:
        """{layer.lora_A or layer.lora_B, …: [active, …]} of `flat` or `gradient`, for the hooks of a local half.

        The tail's parameters come last, under their names in the base model.
        """
        leaves = {
            f"{n}.{kind}": leaf for n, pair in self.factors.items() for kind, leaf in zip(KINDS, pair, strict=True)
        }
        views, start = {}, 0
        for label, leaf in (leaves | self.own | self.dense).items():
            end = start + leaf[0].numel()
            views[label] = which[: self.active, start:end].view(self.active, *leaf.shape[1:])
            start = end
        return views

    def delta(self, name: str, x: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
        """out + γ B_c A_c x for the rows of each client c; x [C·b, L, in] passes the dropout first, if there is one."""
        if name not in self.factors:
            return self._dense_delta(name, x, out)
        read = x if self.dropout is None else self.dropout(x, name)
        gate = self.own.get(f"{name}.{GATE}")
        if gate is not None:
            return out + gated(read, x, *self._active(name), gate[slice(*self._there)], self.scaling).to(out.dtype)
        return out + low_rank(read, *self._active(name), self.scaling).to(out.dtype)

    def linear(self, name: str, layer: nn.Linear, x: torch.Tensor) -> torch.Tensor:
        """The layer and what is added to it, in one: x Wᵀ + b + γ x A_cᵀ B_cᵀ."""
        return low_rank(x, *self._active(name), self.scaling, layer.weight, layer.bias)

    def _active(self, name: str) -> tuple[torch.Tensor, torch.Tensor]:
        a, b = self.factors[name]
        return (a, b) if self._there == (0, len(a)) else (a[slice(*self._there)], b[slice(*self._there)])

    @property
    def _there(self) -> tuple[int, int]:
        return self.window or (0, self.active)

    def frozen(self, flat: Flat, layout: Layout) -> "Cohort":
        """One adapter with its tail, for `instead`."""
        return Cohort.of([flat], layout, self.scaling, self.flat.device, self.flat.dtype)

    @contextmanager
    def instead(self, other: "Cohort") -> Iterator[None]:
        """While open, every client answers with what `frozen` gave, without dropout; not for a backward."""
        mine = (self.factors, self.own, self.dense, self.dropout)
        self.factors, self.own, self.dense, self.dropout = other.factors, other.own, other.dense, None
        try:
            yield
        finally:
            self.factors, self.own, self.dense, self.dropout = mine

    @contextmanager
    def only(self, first: int, last: int) -> Iterator[None]:
        """While open, forward passes hold the rows of clients first … last − 1 alone."""
        self.window = (first, last)
        try:
            yield
        finally:
            self.window = None

    def _dense_delta(self, name: str, x: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
        """out + ΔW_c x + Δb_c."""
        here = slice(*self._there)
        weight, bias = self.dense[f"{name}.weight"][here], self.dense.get(f"{name}.bias")
        base = out.reshape(len(weight), -1, out.shape[-1]).to(weight.dtype)
        base = base if bias is None else base + bias[here].unsqueeze(1)
        rows = x.reshape(len(weight), -1, x.shape[-1]).to(weight.dtype)
        return torch.baddbmm(base, rows, weight.transpose(1, 2)).view(out.shape).to(out.dtype)


@contextmanager
def adapted(base: BaseModel, bank: Cohort | Mixture | None) -> Iterator[None]:
    """While open, the base model answers with the bank's deltas; None leaves it as it is."""
    with ExitStack() as stack:
        if isinstance(bank, Mixture):
            stack.enter_context(bank.on(base))
        elif bank is not None:
            for name in (*bank.factors, *dict.fromkeys(name.rpartition(".")[0] for name in bank.dense)):
                stack.enter_context(_changed(base.module(name), name, bank))
        yield


@contextmanager
def _changed(layer: nn.Module, name: str, bank: Cohort) -> Iterator[None]:
    """Puts the bank's forward into the place of the layer's own."""
    before, plain = vars(layer).get("forward"), layer.forward
    plain_product = name in bank.factors and f"{name}.{GATE}" not in bank.own
    whole = type(layer) is nn.Linear and before is None and plain_product

    def forward(x: torch.Tensor) -> torch.Tensor:
        if whole and bank.dropout is None:
            return bank.linear(name, cast(nn.Linear, layer), x)
        return bank.delta(name, x, plain(x))

    vars(layer)["forward"] = forward
    try:
        yield
    finally:
        del vars(layer)["forward"]
        if before is not None:
            vars(layer)["forward"] = before


def _leaf(flat: torch.Tensor, gradient: torch.Tensor, where: slice, shape: tuple[int, ...]) -> torch.Tensor:
    leaf = flat[:, where].view(-1, *shape).requires_grad_()
    leaf.grad = gradient[:, where].view(-1, *shape)
    return leaf
