"""What puts a state of knowledge on the base while it answers."""

import hashlib
from contextlib import AbstractContextManager
from typing import Protocol

import numpy as np
import torch

from fedstrata.client.alone import Switch
from fedstrata.client.mixture import Mixture
from fedstrata.client.model import BaseModel
from fedstrata.core.records import Knowledge


class Bank(Protocol):
    """Knowledge that is ready to be put on the base."""

    def on(self, base: BaseModel) -> AbstractContextManager[None]:
        """While open, the base model answers with it."""

    def activate(self, weights: torch.Tensor, tokens: int = 0) -> None:
        """Sets α [B, K] for the next forward passes.

        tokens: how many pass with the same weights in every row, all batches together; 0: weights differ.
        """


def bank_of(base: BaseModel, knowledge: Knowledge, scaling: float) -> Bank | None:
    """The knowledge on this base, None without any. The last one is kept: an evaluation has many shards of it."""
    if not knowledge.adapters:
        return None
    key = _digest(knowledge, scaling)
    if not _BANKS or _BANKS[0][0] is not base or _BANKS[0][1] != key:
        _BANKS[:] = [(base, key, _build(base, knowledge, scaling))]
    return _BANKS[0][2]


_BANKS: list[tuple[BaseModel, str, Bank]] = []  # at most one


def _build(base: BaseModel, knowledge: Knowledge, scaling: float) -> Bank:
    """The factors in the type that the base computes in, so that nothing is converted while it answers."""
    if base.layout.kind != "lora":
        return Switch(base, knowledge.adapters, scaling, knowledge.shared)
    dtype = base.model.get_input_embeddings().weight.dtype
    return Mixture.of(knowledge.adapters, base.layout, scaling, base.device, dtype, knowledge.shared)


def _digest(knowledge: Knowledge, scaling: float) -> str:
    sha = hashlib.sha256(repr((scaling, sorted(knowledge.options.items()))).encode())
    for flat in (*knowledge.adapters, knowledge.shared):
        sha.update(f"|{flat.size}|".encode())
        sha.update(np.ascontiguousarray(flat).data)
    return sha.hexdigest()
