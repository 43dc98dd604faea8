"""Inspired by ModalPrompt: prompts and a prototype per task, and each input is answered behind those nearest to it.

Zeng et al., "ModalPrompt: Towards Efficient Multimodal Continual Instruction Tuning with Dual-Modality Guided Prompt",
EMNLP 2025, arXiv 2410.05849. Uses task identity: in training, where it says which task's prompts a participant trains;
not at inference.

There is no LoRA. A task has one group of `length` trained tokens and a prototype. In training an input is preceded by
the `past` groups of earlier tasks whose prototypes are nearest to it, frozen, and by its task's own; the client
minimises its loss + λ (1 − cos(input, prototype)), in a mean over its answers. In use it gets the `top` nearest groups
of all tasks. So what is put before an input does not grow with the tasks. Updates of one task are averaged, and the
others' keep their bits.

What is reconstructed: the published prototype is the mean of the prompts as an MLP maps them into CLIP's space; here it
is a trained vector beside them, in the space of the identity feature (`strategy.token`). With `both` that is text and
picture side by side, each of norm 1: the cosine to a prototype whose halves have one norm is the paper's guide,
½ cos(picture) + ½ cos(text).
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
from flwr.app import ArrayRecord, ConfigRecord, Message
from flwr.serverapp import Grid

from fedstrata.core.adapters import Flat, fresh
from fedstrata.core.config import StrategyConfig, require
from fedstrata.core.records import Knowledge
from fedstrata.strategies.base import LocalHalf, train_messages
from fedstrata.strategies.controls import Oracle
from fedstrata.strategies.disco import DiscoConfig
from fedstrata.strategies.facts import Facts
from fedstrata.strategies.prompting import (
    KEYS,
    PROMPTS,
    PromptConfig,
    Prompted,
    chosen,
    nearest,
    prompts_known,
    similar,
)

if TYPE_CHECKING:
    from torch import Tensor

PAST = "past"


@dataclass(frozen=True)
class ModalPromptConfig(PromptConfig, DiscoConfig):
    """Options of ModalPrompt. Tasks are told, so `tau`, `epsilon`, `activation` and `min_open` decide nothing."""

    name: str = "modalprompt"
    token: str = "both"  # text | image | both: what of an input its prompts are chosen by
    length: int = 10  # tokens of a task's group
    past: int = 2  # groups of earlier tasks that precede an input in training
    top: int = 3  # groups that precede it in use
    strength: float = 1.0  # λ, how firmly prototypes are drawn to their inputs

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.past >= 0, "strategy.past", "at least 0", self.past)


class Guided(LocalHalf):
    """Trains the task's own group behind the nearest earlier ones."""

    def features(self, base: Any, examples: Sequence[Any]) -> "Tensor":
        found: Tensor = base.encode(examples, self.options.token)
        return found

    def batch(self, ctx: Any, batch: Any) -> Any:
        own, queries = ctx.per_row(PROMPTS, batch), batch.queries
        self.near = similar(queries, ctx.per_row(KEYS, batch))[:, 0]
        batch = ctx.before(batch, own[:, 0])
        if PAST not in ctx.jobs[0].payload:
            return batch
        past = ctx.tensor(ctx.jobs[0].payload[PAST]).expand(len(own), -1, -1)  # [rows, T, a group and its prototype]
        size = own[0].numel()
        picks = nearest(similar(queries, past[:, :, size:]), self.options.past)
        return ctx.before(batch, chosen(past[:, :, :size].view(len(own), -1, *own.shape[2:]), picks))

    def loss(self, ctx: Any, batch: Any, out: Any, base_loss: "Tensor") -> "Tensor":
        total: Tensor = batch.added(base_loss, self.options.strength * (1 - self.near)[batch.line])
        return total


class ModalPrompt(Prompted, Oracle):
    """Prompts and a prototype per task; inputs are answered behind those of the nearest (inspired by ModalPrompt)."""

    facts: ClassVar[Facts] = Facts("2410.05849", "EMNLP 2025", encoder=True, grows=1)
    config_type: ClassVar[type[StrategyConfig]] = ModalPromptConfig
    local_half: ClassVar[type[LocalHalf]] = Guided

    @property
    def adapter_rank(self) -> int:
        return 1

    def _start(self, subspace: int) -> Flat:
        known, setup = self.state.subspaces, self.setup
        return known[subspace].adapter if subspace < len(known) else fresh(setup.layout, 1, setup.seed, subspace)

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        present = sorted(set(self._placement.values()))
        flats = {subspace: self._start(subspace) for subspace in present}
        past = [known.adapter for j, known in enumerate(self.state.subspaces) if j not in present]
        payload = {PAST: np.stack(past)} if past and self.options.past else {}
        return train_messages(self.participants, flats, self._placement, config, payload)

    def beside(self, stage: int, round_: int) -> tuple[int, int]:
        """Where each stage brings one task that has not been before."""
        return 0, (stage - 1) * self.setup.layout.size(1) if self.options.past else 0

    def knowledge(self) -> Knowledge:
        adapters = tuple(subspace.adapter for subspace in self.state.subspaces)
        return prompts_known(self.setup.layout, adapters, self.options.top)
