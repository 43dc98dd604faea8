"""PEFT's own layers in the base, for adapters that are more than an added low-rank product: DoRA, (IA)³.

They stand in the base only while an `Injected` is open; afterwards the same modules stand where they stood before.
"""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import nn

from fedstrata.client.dropout import Dropout
from fedstrata.client.lora import Cohort, adapted
from fedstrata.client.model import BaseModel
from fedstrata.core.adapters import LORA_A, LORA_B, MAGNITUDE, SCALE, Flat, Layout
from fedstrata.core.peftfolder import peft_config

ADAPTER = "default"  # PEFT's name of a layer's one adapter


@dataclass(frozen=True)
class Part:
    """One parameter: its place on the wire, PEFT's tensor, and the base's own value, from which the wire counts."""

    name: str
    shape: tuple[int, ...]
    parameter: torch.Tensor
    origin: torch.Tensor


@dataclass
class Injected(Cohort):
    """A cohort of one whose parameters are PEFT's own; `flat` [1, size] shows them as the wire has them.

    The tail's parameters are differences already, and are added as every cohort adds them.
    """

    parts: tuple[Part, ...] = ()
    layers: dict[str, Any] = field(default_factory=dict)  # PEFT's, by the names of those they replace

    def named(self, which: torch.Tensor) -> dict[str, torch.Tensor]:
        """{parameter: [1, …]} of `flat` or `gradient`."""
        rows = torch.split(which, [part.parameter.numel() for part in self.parts], dim=1)
        return {part.name: row.view(1, *part.shape) for part, row in zip(self.parts, rows, strict=True)}

    @property
    def parameters(self) -> list[torch.Tensor]:
        """What an optimiser trains, in the order of the wire."""
        return [part.parameter for part in self.parts]

    @torch.no_grad()
    def load(self, flat: Flat) -> None:
        """Takes the values of one adapter."""
        self.flat[0] = torch.from_numpy(flat).to(self.flat)
        self.write()

    @torch.no_grad()
    def write(self) -> None:
        """`flat` → PEFT's parameters."""
        for part, row in zip(self.parts, self.named(self.flat).values(), strict=True):
            part.parameter.copy_(part.origin + row.view_as(part.parameter))

    @torch.no_grad()
    def read(self) -> None:
        """PEFT's parameters → `flat`."""
        for part, row in zip(self.parts, self.named(self.flat).values(), strict=True):
            row.copy_((part.parameter - part.origin).view_as(row))

    def frozen(self, flat: Flat, layout: Layout) -> "Injected":
        return replace(self, flat=torch.from_numpy(flat).to(self.flat)[None])

    @contextmanager
    def instead(self, other: Cohort) -> Iterator[None]:
        """PEFT's parameters point elsewhere meanwhile: written in place, a backward to come would not find them."""
        mine, dropout = [parameter.data for parameter in self.parameters], self.dropout
        for part, row in zip(self.parts, self.named(other.flat).values(), strict=True):
            part.parameter.data = part.origin.data + row.view_as(part.parameter)
        self.dropout = None
        try:
            yield
        finally:
            for parameter, data in zip(self.parameters, mine, strict=True):
                parameter.data = data
            self.dropout = dropout

    def enable(self, on: bool) -> None:
        """Off: the adapted layers answer as the base's."""
        for layer in self.layers.values():
            layer.enable_adapters(on)


@contextmanager
def injected(
    base: BaseModel, rank: int, scaling: float, dtype: torch.dtype, dropout: Dropout | None = None
) -> Iterator[Injected]:
    """While open, the base answers with the adapter that the cohort is made to `load`."""
    from peft import IA3Model, LoraModel

    layout, before = base.layout, {name: base.module(name) for name, _, _ in base.layout.modules}
    kind = IA3Model if layout.kind == "ia3" else LoraModel
    with ExitStack() as stack:
        stack.callback(_restore, base, before)
        kind(base.model, peft_config(layout, rank, scaling), ADAPTER)
        layers = {name: base.module(name) for name in before}
        cohort = _cohort(base, layers, layout.parameters(rank), scaling, dtype)
        cohort.dropout = dropout
        for name, layer in cohort.layers.items() if dropout else ():
            layer.lora_dropout[ADAPTER] = _Drawn(cohort, name)
        stack.enter_context(adapted(base, cohort))
        yield cohort


def _restore(base: BaseModel, before: dict[str, nn.Module]) -> None:
    for name, module in before.items():
        base.model.set_submodule(name, module)
    if hasattr(base.model, "peft_config"):  # PEFT's note that it was here
        del base.model.peft_config


def _cohort(
    base: BaseModel,
    layers: dict[str, nn.Module],
    parameters: Sequence[tuple[str, tuple[int, ...]]],
    scaling: float,
    dtype: torch.dtype,
) -> Injected:
    """PEFT's parameters in `dtype`, their gradients as views of one buffer."""
    parts = tuple(_part(name, shape, layers, base.device, dtype) for name, shape in parameters)
    sizes = [part.parameter.numel() for part in parts]
    flat = torch.zeros(1, sum(sizes), device=base.device, dtype=dtype)
    gradient = torch.zeros_like(flat)
    for part, row in zip(parts, torch.split(gradient[0], sizes), strict=True):
        part.parameter.grad = row.view_as(part.parameter)
    dense = {part.name: part.parameter for part in parts[len(parts) - len(base.layout.dense) :]}
    return Injected(flat, gradient, {}, scaling, 1, dense, parts=parts, layers=layers)


def _part(
    name: str, shape: tuple[int, ...], layers: dict[str, nn.Module], device: torch.device, dtype: torch.dtype
) -> Part:
    layer, _, kind = name.rpartition(".")
    if kind not in (LORA_A, LORA_B, MAGNITUDE, SCALE):  # of the tail
        leaf = torch.zeros(1, *shape, device=device, dtype=dtype)
        return Part(name, shape, leaf.clone().requires_grad_(), leaf)
    held: Any = getattr(layers[layer], kind)[ADAPTER]
    parameter: torch.Tensor = held if kind == SCALE else held.weight
    parameter.data = parameter.data.to(device, dtype)
    origin = torch.full_like(parameter, float(kind == SCALE), requires_grad=False)
    return Part(name, shape, parameter, _magnitude(layers[layer], dtype) if kind == MAGNITUDE else origin)


@torch.no_grad()
def _magnitude(layer: Any, dtype: torch.dtype) -> torch.Tensor:
    """The norms [out] of the rows of W, dequantised where it must be."""
    from peft.utils.integrations import dequantize_module_weight

    weight: torch.Tensor = dequantize_module_weight(layer.get_base_layer())
    return torch.linalg.vector_norm(weight.to(dtype), dim=1)  # type: ignore[no-any-return]


class _Drawn(nn.Module):
    """The cohort's dropout, where PEFT would have torch's."""

    def __init__(self, cohort: Injected, name: str) -> None:
        super().__init__()
        self._cohort, self._name = cohort, name

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x [rows, L, in]."""
        return x if self._cohort.dropout is None else self._cohort.dropout(x, self._name)
