"""LwF: on the new data, the answers stay close to what the model of the last stage would have said.

Li and Hoiem, "Learning without Forgetting", ECCV 2016, arXiv 1606.09282. Uses task identity: no.

The client minimises its loss + λ T² KL(p_old ‖ p_new), both softened by the temperature T, as a mean over the answer
tokens of its own new examples; nothing of the past is stored. The teacher is the same base with the adapter that the
last stage ended with: it travels to the participants beside the present one, and no second model is loaded. In the
first stage there is none, and the method is `finetune`. The server averages as `finetune` does.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

from fedstrata.core.adapters import Flat
from fedstrata.core.config import StrategyConfig, require
from fedstrata.strategies.base import LocalHalf, Parts, Setup
from fedstrata.strategies.facts import Facts
from fedstrata.strategies.finetune import Finetune, FinetuneConfig, FinetuneState
from fedstrata.strategies.optimizers import unpacked

if TYPE_CHECKING:
    from torch import Tensor

TEACHER = "teacher"


@dataclass(frozen=True)
class LwfConfig(FinetuneConfig):
    """Options of LwF."""

    name: str = "lwf"
    strength: float = 1.0  # λ; 0 is finetune
    temperature: float = 2.0  # T of both distributions

    def __post_init__(self) -> None:
        super().__post_init__()
        good = 0 <= self.strength < float("inf")
        require(good, "strategy.strength", "a finite number of at least 0", self.strength)
        good = 0 < self.temperature < float("inf")
        require(good, "strategy.temperature", "a finite number above 0", self.temperature)


@dataclass(frozen=True)
class LwfState(FinetuneState):
    """The global adapter, and the one that the last stage ended with: empty before a stage has ended."""

    teacher: Flat = field(default_factory=lambda: np.zeros(0, dtype=np.float32))


class Distilled(LocalHalf):
    """Adds the distance to the teacher's answers."""

    def begin(self, ctx: Any) -> None:
        self.teacher = ctx.frozen(TEACHER)

    def loss(self, ctx: Any, batch: Any, out: Any, base_loss: "Tensor") -> "Tensor":
        if self.teacher is None:
            return base_loss
        old, new = (logits.to(base_loss.dtype) for logits in (ctx.answers(batch, self.teacher), out))
        each = self.options.strength * distance(old, new, self.options.temperature)
        total: Tensor = batch.added(base_loss, each)
        return total


class Lwf(Finetune):
    """FedAvg on one LoRA that is taught by the one of the last stage (learning without forgetting)."""

    facts: ClassVar[Facts] = Facts("1606.09282", "ECCV 2016", plain={}, neutral={"strength": 0})
    config_type: ClassVar[type[StrategyConfig]] = LwfConfig
    local_half: ClassVar[type[LocalHalf]] = Distilled
    state: LwfState

    def __init__(self, options: LwfConfig, setup: Setup) -> None:
        super().__init__(options, setup)
        self.state = LwfState(self.state.adapter)

    def end_stage(self, stage: int) -> None:
        self.state = replace(self.state, teacher=self.state.adapter)

    def payload(self) -> Mapping[str, Flat]:
        return {TEACHER: self.state.teacher} if self.state.teacher.size and self.options.strength else {}

    def beside(self, stage: int, round_: int) -> tuple[int, int]:
        return 0, self.state.adapter.size if stage > 1 and self.options.strength else 0

    def save(self) -> Parts:
        return Parts({**super().save().tensors, TEACHER: self.state.teacher})

    def load(self, parts: Parts) -> None:
        adapter, teacher = parts.tensors["adapter"], parts.tensors[TEACHER]
        self.state = LwfState(adapter, teacher, moments=unpacked(parts.tensors))


def distance(old: "Tensor", new: "Tensor", temperature: float) -> "Tensor":
    """T² KL(p_old ‖ p_new) of each row of logits [N, V] → [N], both divided by T before the softmax.

    The factor T² keeps the gradient's size: it is T (p_new − p_old).
    """
    log_old, log_new = ((logits / temperature).log_softmax(-1) for logits in (old, new))
    return temperature**2 * (log_old.exp() * (log_old - log_new)).sum(-1)
