"""What a method's local half sees of the cohort that it trains.

A cohort's adapters lie in one buffer [C, size], a client per row. Elementwise methods work on whole rows (`values`,
`start`, `gradient`), which is one operation for all layers; `named` shows the same numbers layer by layer.
"""

import math
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from fedstrata.client.answers import answer_logits
from fedstrata.client.batching import Batch, embedded_rows
from fedstrata.client.lora import KINDS, Cohort, adapted
from fedstrata.client.mixture import Mixture
from fedstrata.client.model import BaseModel
from fedstrata.client.prefix import before
from fedstrata.core.adapters import Flat
from fedstrata.core.config import TrainSection, require

if TYPE_CHECKING:
    from fedstrata.client.training import Job


@dataclass
class LocalContext:
    """One cohort of C clients while it trains; every list is in the cohort's order: most steps first.

    Only the first `cohort.active` clients take part in a step. Tensors below that say [active, …] have as many rows;
    in `begin` and `end` all C clients are active.

    Attributes:
        steps: each client's number of steps.
        plans: each client's batches, step by step: the places of its examples.
        step: the current one, from 0.
        memories: what each client will remember; starts as what it remembered.
        open: context managers that stay open while the cohort trains, e.g. frozen adapters underneath.
    """

    base: BaseModel
    cohort: Cohort
    jobs: "Sequence[Job]"
    settings: TrainSection
    steps: Sequence[int] = ()
    plans: Sequence[Sequence[Sequence[int]]] = ()
    step: int = 0
    memories: list[dict[str, Any]] = field(init=False)
    open: ExitStack = field(default_factory=ExitStack)
    _sent: dict[str, torch.Tensor] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.memories = [dict(job.memory) for job in self.jobs]

    def __enter__(self) -> "LocalContext":
        return self

    def __exit__(self, *_: object) -> None:
        self.open.close()

    def values(self) -> torch.Tensor:
        """The adapters [active, size] as autograd sees them: the gradient of what is made of them reaches them."""
        return _Values.apply(self._anchor, self.cohort)  # type: ignore[no-any-return, no-untyped-call]

    @property
    def start(self) -> torch.Tensor:
        """The adapters [active, size] that the clients were sent."""
        return self._start[: self.cohort.active]

    @property
    def gradient(self) -> torch.Tensor:
        """The gradients [active, size] that `on_gradients` sees; may be changed in place."""
        return self.cohort.gradient[: self.cohort.active]

    def named(self, whole: torch.Tensor) -> dict[str, torch.Tensor]:
        """Rows [n, size] in the adapter's layout as {layer.lora_A, layer.lora_B or parameter of the tail: [n, …]}."""
        shapes = {name: view.shape[1:] for name, view in self.cohort.named(self.cohort.flat).items()}
        parts = torch.split(whole, [math.prod(shape) for shape in shapes.values()], dim=1)
        views = zip(shapes.items(), parts, strict=True)
        return {name: part.view(len(whole), *shape) for (name, shape), part in views}

    def sent(self, name: str) -> torch.Tensor | None:
        """[active, …] of what the strategy sent beside the adapters; None if it sent nothing under this name.

        Clients that were sent the same share one copy.
        """
        if name not in self.jobs[0].payload:
            return None
        if name not in self._sent:
            distinct = list({id(job.payload): job.payload[name] for job in self.jobs}.values())
            several = distinct if len(distinct) == 1 else [job.payload[name] for job in self.jobs]
            stacked = self.tensor(np.stack(several))
            self._sent[name] = stacked.expand(len(self.jobs), *stacked.shape[1:])
        return self._sent[name][: self.cohort.active]

    def recall(self, name: str) -> torch.Tensor:
        """[C, size]: what the clients remember in the adapter's layout; 0 for one that remembers nothing."""
        empty = np.zeros(self.cohort.flat.shape[1], dtype=np.float32)
        return self.tensor(np.stack([memory.get(name, empty) for memory in self.memories]))

    def remember(self, name: str, values: torch.Tensor) -> None:
        """What each client keeps until it is drawn again, [C, …]."""
        for memory, mine in zip(self.memories, self.apart({name: values}), strict=True):
            memory |= mine

    def underneath(self, flat: Flat) -> dict[str, torch.Tensor]:
        """Adds a frozen adapter (without the layout's tail) at weight 1 to every client, until training ends.

        Returns its factors {layer.lora_A: [r, in], layer.lora_B: [out, r]}.
        """
        cohort, whole = self.cohort, self.cohort.flat
        bank = Mixture.of([flat], self.base.layout, cohort.scaling, whole.device, whole.dtype)
        self.open.enter_context(adapted(self.base, bank))
        pairs = [
            (f"{name}.{kind}", f) for name, both in bank.factors.items() for kind, f in zip(KINDS, both, strict=True)
        ]
        return dict(pairs)

    def frozen(self, name: str) -> Cohort | None:
        """An adapter that the strategy sent to all clients alike, for `answers`; None if it sent none of this name."""
        flat = self.jobs[0].payload.get(name)
        return None if flat is None else self.cohort.frozen(flat, self.base.layout)

    @torch.no_grad()
    def answers(self, batch: Batch, adapter: Cohort) -> torch.Tensor:
        """The logits [N, vocabulary] of a batch where another adapter answers: what `out` is for the clients' own."""
        with self.cohort.instead(adapter):
            if batch.embeds.requires_grad:  # the clients' own vision sides are in them
                batch = replace(batch, embeds=embedded_rows(self.base, batch.rows).embeds)
            return answer_logits(self.base, batch)

    def per_row(self, name: str, batch: Batch) -> torch.Tensor:
        """[rows, …]: for each row of a batch its client's `prompts` or `keys`, as autograd sees them."""
        return self.cohort.own[name][: self.cohort.active].repeat_interleave(batch.size, dim=0)

    def before(self, batch: Batch, front: torch.Tensor) -> Batch:
        """The batch with prompts [rows, n, hidden] in front of its rows."""
        return before(batch, self.base.spread * front)

    def tensor(self, array: Flat) -> torch.Tensor:
        """An array that was sent, where and as the cohort computes."""
        return torch.from_numpy(array).to(self.cohort.flat.device, self.cohort.flat.dtype)

    def squares(self, most: int = 0) -> torch.Tensor:
        """E[g²] [C, size] over each client's examples at the present values; see `client.statistics`."""
        from fedstrata.client.statistics import squares  # it needs the training loop, which needs this module

        return squares(self, most)

    def apart(self, named: Mapping[str, torch.Tensor]) -> list[dict[str, Any]]:
        """{name: [C, …]} as one mapping of arrays per client.

        Raises:
            BadInput: something other than real numbers per client, such as text, or a picture's bytes.
        """
        for name, value in named.items():
            came = f"{value.dtype} {list(value.shape)}" if isinstance(value, torch.Tensor) else type(value).__name__
            good = isinstance(value, torch.Tensor) and value.is_floating_point() and len(value) == len(self.jobs)
            require(good, f"LocalHalf.end: {name}", f"real numbers of each of the {len(self.jobs)} clients", came)
        arrays = {name: value.detach().float().cpu().numpy() for name, value in named.items()}
        return [{name: value[row] for name, value in arrays.items()} for row in range(len(self.jobs))]

    @cached_property
    def _start(self) -> torch.Tensor:
        return self.tensor(np.stack([job.flat for job in self.jobs]))

    @cached_property
    def _anchor(self) -> torch.Tensor:
        return torch.zeros((), device=self.cohort.flat.device, requires_grad=True)


class _Values(torch.autograd.Function):
    """A cohort's buffer as one leaf: what backward brings is added to the cohort's gradient in one operation."""

    @staticmethod
    def forward(ctx: Any, anchor: torch.Tensor, cohort: Cohort) -> torch.Tensor:
        """anchor: any scalar that wants a gradient, so that backward is called."""
        ctx.cohort = cohort
        return cohort.flat[: cohort.active].detach()

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[None, None]:
        ctx.cohort.gradient[: len(gradient)].add_(gradient)
        return None, None
