"""What methods that train prompts share: their options and layout, and which prompts an input gets."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import numpy.typing as npt

from fedstrata.core.adapters import Flat, Layout
from fedstrata.core.config import require
from fedstrata.core.identity import cosines
from fedstrata.core.records import Knowledge
from fedstrata.strategies.base import Inputs, Router, Strategy, Weights
from fedstrata.strategies.merging import MergeConfig

if TYPE_CHECKING:
    from torch import Tensor

PROMPTS, KEYS = "prompts", "keys"


@dataclass(frozen=True)
class PromptConfig(MergeConfig):
    """Options of every method that trains prompts; `lora.rank` and `lora.targets` say nothing here."""

    in_factors: ClassVar[bool] = True  # there are none, whose product could be merged

    length: int = 5  # tokens of a prompt
    top: int = 5  # prompts that an input gets
    strength: float = 0.1  # λ, how firmly keys are drawn to their inputs

    def __post_init__(self) -> None:
        super().__post_init__()
        for key in ("length", "top"):
            require(getattr(self, key) >= 1, f"strategy.{key}", "at least 1", getattr(self, key))
        good = 0 <= self.strength < float("inf")
        require(good, "strategy.strength", "a finite number of at least 0", self.strength)

    def trains(self, lora: Layout, hidden: int, features: Callable[[], int]) -> Layout:
        """Prompts of `length` tokens with a key each, in the place of the LoRA.

        Raises:
            BadInput: another kind than lora, or a projector that is trained too.
        """
        with_name = f"with strategy.name={self.name}, which trains prompts"
        require(lora.kind == "lora", "lora.kind", f"lora {with_name}", lora.kind)
        require(not lora.dense, "strategy.projector", f"frozen {with_name}", "shared")
        return Layout((), kind="prompts", own=((PROMPTS, (self.length, hidden)), (KEYS, (features(),))))


class Prompted(Strategy):
    """Every input is answered behind the prompts whose keys are nearest to it."""

    @classmethod
    def mixes(cls, options: Any) -> bool:
        return True

    @classmethod
    def router(cls, knowledge: Knowledge) -> Router:
        return Nearest.of(knowledge)


def prompts_known(layout: Layout, adapters: tuple[Flat, ...], top: int) -> Knowledge:
    """Adapters of one prompt each, as `Nearest.of` reads them."""
    (size,) = dict(layout.own)[KEYS]
    return Knowledge(adapters, options={"key": size, "top": top})


def apart(layout: Layout, flat: Flat) -> tuple[Flat, ...]:
    """An adapter of P prompts as P adapters of one."""
    views = layout.views(flat)
    return tuple(np.concatenate([prompt.ravel(), key]) for prompt, key in zip(views[PROMPTS], views[KEYS], strict=True))


@dataclass(frozen=True)
class Nearest:
    """Every input gets the `top` prompts whose keys [K, D] are nearest to its feature by cosine, of equals the first.

    The nearest weighs 1, the next 1/2, …; what weighs 0 is not there. With fewer prompts than `top` it gets all.
    """

    keys: npt.NDArray[np.float32]
    top: int
    needs_features: bool = True

    @staticmethod
    def of(knowledge: Knowledge) -> "Nearest":
        """Of adapters of one prompt each, at whose end the keys lie."""
        size = int(knowledge.options["key"])
        keys = [adapter[adapter.size - size :] for adapter in knowledge.adapters]
        return Nearest(np.stack(keys) if keys else np.zeros((0, size), np.float32), int(knowledge.options["top"]))

    def weights(self, inputs: Inputs) -> Weights:
        weights = np.zeros((len(inputs.ids), len(self.keys)), dtype=np.float32)
        if len(self.keys):
            assert inputs.features is not None, "a router that needs features was given none"
            order = np.argsort(-cosines(inputs.features, self.keys), axis=1, kind="stable")[:, : self.top]
            np.put_along_axis(weights, order, 1 / np.arange(1, order.shape[1] + 1, dtype=np.float32), axis=1)
        return weights


def similar(queries: "Tensor", keys: "Tensor") -> "Tensor":
    """cos of each row's query [B, D] with each of its keys [B, P, D] → [B, P]; 0 where one of them is 0."""
    asked, known = (rows / rows.norm(dim=-1, keepdim=True).clamp_min(1e-12) for rows in (queries.unsqueeze(1), keys))
    cosine: Tensor = (asked * known).sum(-1)
    return cosine


def nearest(cosine: "Tensor", top: int) -> "Tensor":
    """[B, P] → the places [B, top] of the largest in ascending order, of equals the first."""
    order = cosine.detach().argsort(dim=1, descending=True, stable=True)
    return order[:, :top].sort(dim=1).values


def chosen(pool: "Tensor", picks: "Tensor") -> "Tensor":
    """[B, P, length, hidden] and places [B, top] → [B, top · length, hidden]."""
    where = picks[:, :, None, None].expand(-1, -1, *pool.shape[2:])
    return pool.gather(1, where).flatten(1, 2)
