"""HiDe-LLaVA: the top layer is expanded, one slot per task, and routed by anchors; in all other layers slots are fused.

Guo et al., "HiDe-LLaVA: Hierarchical Decoupling for Continual Instruction Tuning of Multimodal Large Language Model",
ACL 2025, arXiv 2503.12941. Uses task identity: in training, where it says which slot a participant trains; not at
inference.

In the paper, linear CKA between tasks is near 1 in all layers but the last: only there does a task need a room of its
own. A participant trains its task's slot alone, at weight 1, and updates of one slot are averaged. A task's anchor is
the mean identity feature of its clients' instructions (`strategy.token`: text, image or both), a sum and a count, so
exact over clients. At inference the top layers take Σ_c d_c B_c A_c with d = softmax(cos(x, anchor_c) / 0.1), the
others one adapter out of all slots: `fuse=factor` is the published code's (Σ B_c)(Σ A_c), cross products and all;
`fuse=delta` is the paper's Σ B_c A_c. With `token=both` the cosine is that of the two features side by side; the paper
takes the mean of two cosines, which is the same for anchors whose halves have one norm.

The engine mixes whole adapters, so slot c answers as an adapter that has B_c A_c in the top layers and the fused one
everywhere else: the weights d add up to 1. That is exact but for rounding, and costs what DISCO costs; `fuse=delta`
needs K times the rank.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import numpy as np

from fedstrata.core.adapters import Flat, Layout
from fedstrata.core.config import PROJECTORS, StrategyConfig, require
from fedstrata.core.errors import BadInput
from fedstrata.core.records import Knowledge
from fedstrata.core.shapes import TOWER
from fedstrata.strategies.activation import SelectiveActivation
from fedstrata.strategies.base import Router, Setup
from fedstrata.strategies.controls import Oracle
from fedstrata.strategies.disco import DiscoConfig
from fedstrata.strategies.facts import Facts
from fedstrata.strategies.organisation import DiscoState
from fedstrata.strategies.staged import joined

FUSIONS = ("factor", "delta")


@dataclass(frozen=True)
class HideConfig(DiscoConfig):
    """Options of HiDe-LLaVA. Tasks are told, so `tau` and `min_open` decide nothing."""

    name: str = "hide"
    token: str = "both"  # text | image | both: what anchors are made of; a base without vision has text alone
    epsilon: float | None = 0.1  # softmax temperature of the anchors
    fuse: str = "factor"  # factor: (Σ B)(Σ A), as published; delta: Σ B A, as written
    expand: int = 1  # how many of the last decoder layers keep one slot per task

    projectors: ClassVar[tuple[str, ...]] = PROJECTORS  # a slot has none of its own

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.fuse in FUSIONS, "strategy.fuse", " | ".join(FUSIONS), self.fuse)
        require(self.expand >= 1, "strategy.expand", "at least 1", self.expand)
        good = self.activation in ("softmax", "argmax")
        require(good, "strategy.activation", "softmax or argmax, whose weights add up to 1", self.activation)


class Hide(Oracle):
    """One slot per task, kept apart in the top layer and routed there by anchors, fused in all other layers."""

    facts: ClassVar[Facts] = Facts("2503.12941", "ACL 2025", grows=1, plain={"subspaces": 1}, one_stage=True)
    config_type: ClassVar[type[StrategyConfig]] = HideConfig
    needs_tokens: ClassVar[bool] = True

    def __init__(self, options: HideConfig, setup: Setup) -> None:
        super().__init__(options, setup)
        self.top = top_layers(setup.layout, options.expand)
        self._answer: tuple[DiscoState, tuple[Flat, ...]] | None = None  # what the present state comes to

    def knowledge(self) -> Knowledge:
        known = super().knowledge()
        if self._answer is None or self._answer[0] is not self.state:
            self._answer = self.state, decoupled(known.adapters, self.setup.layout, self.top, self.options.fuse)
        return replace(known, adapters=self._answer[1])

    def rank_after(self, stage: int) -> int:
        return self.setup.rank * (max(1, stage) if self.options.fuse == "delta" else 1)

    @classmethod
    def mixes(cls, options: Any) -> bool:
        return True

    @classmethod
    def router(cls, knowledge: Knowledge) -> Router:
        options = knowledge.options
        return SelectiveActivation(knowledge.tokens, options["epsilon"], options["activation"])


def top_layers(layout: Layout, expand: int) -> frozenset[str]:
    """The adapted layers inside the last `expand` decoder layers that are adapted.

    Raises:
        BadInput: none of the adapted layers belongs to the language model's numbered layers.
    """
    found = {name: re.search(r"\.(\d+)\.", name) for name, _, _ in layout.modules if TOWER not in name}
    depth = {name: int(match[1]) for name, match in found.items() if match}
    if not depth:
        rule = "must name some in the language model's decoder layers, the last of which strategy.name=hide expands"
        raise BadInput(f"lora.targets: {rule}, got {', '.join(name for name, _, _ in layout.modules)}")
    last = sorted(set(depth.values()))[-expand:]
    return frozenset(name for name, number in depth.items() if number in last)


def decoupled(slots: Sequence[Flat], layout: Layout, top: frozenset[str], fuse: str) -> tuple[Flat, ...]:
    """K adapters that share everything outside `top`; mixed with weights of sum 1, that part is answered once.

    Of the slots' rank r with `fuse` factor, of rank K·r with delta: a slot's top layers are filled up with zeros.
    """
    views = [layout.lora.split(slot) for slot in slots]
    rest = [name for name, _, _ in layout.modules if name not in top and slots]
    if fuse == "factor":
        fused = {name: (_sum([v[name][0] for v in views]), _sum([v[name][1] for v in views])) for name in rest}
        return tuple(layout.join({**view, **fused}) for view in views)
    whole = layout.lora.split(joined(layout, *slots)) if slots else {}
    alone = [joined(layout, *[slot if slot is own else np.zeros_like(slot) for slot in slots]) for own in slots]
    fused = {name: whole[name] for name in rest}
    return tuple(layout.join({**layout.lora.split(flat), **fused}) for flat in alone)


def _sum(factors: Sequence[Flat]) -> Flat:
    """In float64, rounded once; one factor alone comes out bit for bit."""
    return np.asarray(np.sum(np.stack(factors), axis=0, dtype=np.float64), dtype=np.float32)
