"""What puts a state of knowledge on the base while it answers."""

import hashlib
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch

from fedstrata.client.alone import Switch
from fedstrata.client.lora import Cohort, adapted
from fedstrata.client.mixture import Mixture
from fedstrata.client.model import BaseModel
from fedstrata.client.prefix import Prompted
from fedstrata.core.adapters import STACKED
from fedstrata.core.records import OWN, TAILS, Knowledge


class Bank(Protocol):
    """Knowledge that is ready to be put on the base."""

    def on(self, base: BaseModel) -> AbstractContextManager[None]:
        """While open, the base model answers with it."""

    def activate(self, weights: torch.Tensor, tokens: int = 0) -> None:
        """Sets α [B, K] for the next forward passes.

        tokens: how many pass with the same weights in every row, all batches together; 0: weights differ.
        """


@dataclass(frozen=True)
class Sole:
    """The one adapter of a method that has no other, as a cohort of one."""

    cohort: Cohort

    @staticmethod
    def of(base: BaseModel, knowledge: Knowledge, scaling: float, dtype: torch.dtype) -> "Sole":
        (adapter,) = knowledge.adapters
        flat = np.concatenate([adapter, knowledge.shared])
        return Sole(Cohort.of([flat], base.layout, scaling, base.device, dtype))

    def on(self, base: BaseModel) -> AbstractContextManager[None]:
        return adapted(base, self.cohort)

    def activate(self, weights: torch.Tensor, tokens: int = 0) -> None:
        """Raises ValueError for weights other than 1."""
        if not bool((weights == 1).all()):
            raise ValueError("an adapter with gates answers at weight 1")


def bank_of(base: BaseModel, knowledge: Knowledge, scaling: float) -> Bank | None:
    """The knowledge on this base, None without any. The last one is kept: an evaluation has many shards of it."""
    if not knowledge.adapters:
        return None
    key = base.layout.hash + _digest(knowledge, scaling)
    if not _BANKS or _BANKS[0][0] is not base or _BANKS[0][1] != key:
        _BANKS[:] = [(base, key, _build(base, knowledge, scaling))]
    return _BANKS[0][2]


_BANKS: list[tuple[BaseModel, str, Bank]] = []  # at most one


def _build(base: BaseModel, knowledge: Knowledge, scaling: float) -> Bank:
    """The factors in the type that the base computes in, so that nothing is converted while it answers."""
    if base.layout.kind not in STACKED:
        return Switch(base, knowledge.whole(base.layout.tail), scaling)
    dtype = base.model.get_input_embeddings().weight.dtype
    if base.layout.kind == "prompts":
        return Prompted.of(base, knowledge.adapters)
    if base.layout.kind != "lora":
        return Sole.of(base, knowledge, scaling, dtype)
    own = knowledge.options.get(TAILS) == OWN
    return Mixture.of(knowledge.adapters, base.layout, scaling, base.device, dtype, knowledge.shared, own)


def _digest(knowledge: Knowledge, scaling: float) -> str:
    sha = hashlib.sha256(repr((scaling, sorted(knowledge.options.items()))).encode())
    for flat in (*knowledge.adapters, knowledge.shared):
        sha.update(f"|{flat.size}|".encode())
        sha.update(np.ascontiguousarray(flat).data)
    return sha.hexdigest()
