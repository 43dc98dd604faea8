"""What an instruction is about, as a vector: by its text, its picture, or both (`strategy.token`).

A picture's feature is the mean over what the base's frozen vision tower makes of it, scaled to norm 1, with one number
more: 0 beside a picture, 1 where there is none. So instructions without a picture are like each other and unlike those
with one. Both together are the two features, each of norm 1, side by side: their cosine is the mean of the two cosines.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from fedstrata.client.encoder import ClipTextEncoder, TokenMeanEncoder
from fedstrata.client.model import BaseModel
from fedstrata.core.errors import BadInput
from fedstrata.core.identity import Token
from fedstrata.scenarios.stream import Example


class Identity(Protocol):
    """A feature with the match threshold and the softmax temperature that belong to it, and about its norm."""

    @property
    def name(self) -> str: ...
    @property
    def dim(self) -> int: ...
    @property
    def tau(self) -> float: ...
    @property
    def epsilon(self) -> float: ...
    @property
    def norm(self) -> float: ...
    @property
    def text(self) -> tuple[int, float]:
        """How many of its numbers, the first ones, are of the text, and their own match threshold."""

    def encode(self, examples: Sequence[Example]) -> Tensor:
        """[B, dim] fp32."""


class Words:
    """The text encoder's feature of the question."""

    def __init__(self, encoder: TokenMeanEncoder | ClipTextEncoder) -> None:
        self.encoder = encoder
        self.name, self.dim, self.tau, self.epsilon = encoder.name, encoder.dim, encoder.tau, encoder.epsilon

    @property
    def norm(self) -> float:
        return self.encoder.norm

    @property
    def text(self) -> tuple[int, float]:
        return self.dim, self.tau

    def encode(self, examples: Sequence[Example]) -> Tensor:
        return self.encoder.encode([example.question for example in examples])


class Sight:
    """The tower's feature of the picture, with the paper's τ and ε."""

    name, tau, epsilon, norm = "tower", 0.9, 0.05, 1.0
    text = (0, 0.0)

    def __init__(self, base: BaseModel) -> None:
        """Raises `BadInput` for a base without vision."""
        if base.processor is None:
            rule = f"needs a base that sees pictures, model.name {base.name!r} is a language model without vision"
            raise BadInput(f"strategy.token: {rule}")
        self._pictures, self.dim = base.pictures, base.sight + 1

    def encode(self, examples: Sequence[Example]) -> Tensor:
        rows = torch.zeros(len(examples), self.dim)
        for row, seen in zip(rows, self._pictures.glance(examples), strict=True):
            if seen is None:
                row[-1] = 1
            else:
                row[:-1] = F.normalize(seen, dim=0)
        return rows


@dataclass(frozen=True)
class Both:
    """Text and picture weigh the same."""

    words: Identity
    sight: Identity

    @property
    def name(self) -> str:
        return f"{self.words.name}+{self.sight.name}"

    @property
    def dim(self) -> int:
        return self.words.dim + self.sight.dim

    @property
    def tau(self) -> float:
        return (self.words.tau + self.sight.tau) / 2

    @property
    def epsilon(self) -> float:
        return (self.words.epsilon + self.sight.epsilon) / 2

    @property
    def norm(self) -> float:
        return math.sqrt(2)

    @property
    def text(self) -> tuple[int, float]:
        return self.words.text

    def encode(self, examples: Sequence[Example]) -> Tensor:
        return torch.cat([F.normalize(part.encode(examples), dim=1) for part in (self.words, self.sight)], dim=1)


def identity(base: BaseModel, kind: str = "text") -> Identity:
    """kind: text | image | both. Raises `BadInput` for pictures with a base without vision."""
    if kind == "text":
        return Words(base.encoder)
    return Sight(base) if kind == "image" else Both(Words(base.encoder), Sight(base))


def identify(base: BaseModel, examples: Sequence[Example], kind: str = "text") -> Token:
    """A client's identity token: the mean feature over all of its instructions."""
    features = identity(base, kind).encode(examples)
    return Token(features.double().mean(0).float().numpy(), len(examples))
