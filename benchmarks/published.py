"""The published evaluation path of subspace selective activation, re-implemented from its description, as a baseline.

One prompt at a time, since the mixture is one state of the whole model; every call of an adapted layer builds two
Linear layers (without drawing their weights), concatenates all subspaces' factors into them and puts the mixing matrix
between the two. Same mathematics as `client/mixture.py`.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import nn

from fedstrata.client.generation import decode, greedy
from fedstrata.client.model import BaseModel
from fedstrata.client.prompts import Prepared
from fedstrata.core.adapters import Flat

Pair = tuple[torch.Tensor, torch.Tensor]  # A [r, in], B [out, r]


class Published:
    """K subspaces on a base; `mixing` [K·r, K·r] is set before every prompt."""

    def __init__(self, base: BaseModel, flats: Sequence[Flat], scaling: float) -> None:
        self.base, self.scaling = base, scaling
        dtype = base.model.get_input_embeddings().weight.dtype
        views = [base.layout.lora.split(flat) for flat in flats]
        self.slots: dict[str, list[Pair]] = {}
        for name, _, _ in base.layout.modules:
            pairs = [[torch.from_numpy(factor).to(base.device, dtype) for factor in view[name]] for view in views]
            self.slots[name] = [(a, b) for a, b in pairs]
        self.rank = base.layout.lora.rank(flats[0])
        self.mixing = torch.zeros(0, 0)

    def answer(self, rows: Sequence[Prepared], weights: torch.Tensor) -> list[str]:
        """Greedy answers with α [B, K], one after another."""
        texts = []
        with self.on():
            for row, alpha in zip(rows, weights, strict=True):
                self.activate(alpha)
                texts += decode(self.base, greedy(self.base, [row]))
        return texts

    def activate(self, alpha: torch.Tensor) -> None:
        """Sets α [K] for the whole model."""
        like = next(iter(self.slots.values()))[0][0]
        self.mixing = torch.diag(alpha.repeat_interleave(self.rank)).to(like.device, like.dtype)

    @contextmanager
    def on(self) -> Iterator[None]:
        """While open, every adapted layer adds the mixture."""
        handles = [self.base.module(name).register_forward_hook(self._hook(name)) for name in self.slots]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _hook(self, name: str) -> Callable[[nn.Module, tuple[torch.Tensor, ...], torch.Tensor], torch.Tensor]:
        def add(_: nn.Module, args: tuple[torch.Tensor, ...], out: torch.Tensor) -> torch.Tensor:
            slots, x = self.slots[name], args[0]
            a = _built([slot[0] for slot in slots], 0)
            b = _built([slot[1] for slot in slots], 1)
            added: torch.Tensor = b(torch.matmul(a(x), self.mixing))
            return out + self.scaling * added

        return add


class _Undrawn(nn.Linear):
    def reset_parameters(self) -> None:
        """The published code turns torch's initialisation off."""


@torch.no_grad()
def _built(factors: Sequence[torch.Tensor], dim: int) -> nn.Linear:
    whole = torch.cat(list(factors), dim=dim)
    layer = _Undrawn(whole.shape[1], whole.shape[0], bias=False, device=whole.device, dtype=whole.dtype)
    layer.weight.copy_(whole)
    return layer
