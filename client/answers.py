"""Where answers are read: the logits there, and the last layer at their positions and nowhere else.

Behind the last layer only the head follows, which runs at answer positions alone. So what works position by position
in the last layer need not run at the others: the MLP, the queries and the projection of what attention found. Keys and
values are read from every position. Only for layers that name these parts as Llama's kin do.
"""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import nn

from fedstrata.client.batching import Batch
from fedstrata.client.model import BaseModel

GATED = {"gate_proj", "up_proj", "down_proj"}  # an MLP that is known to look at one position at a time
WORTH = 0.75  # of all positions; with more of them gathering and putting back costs what it saves


def answer_logits(base: BaseModel, batch: Batch) -> torch.Tensor:
    """[N, vocabulary] before each answer token; the head runs there alone."""
    out = base.backbone(inputs_embeds=batch.embeds, attention_mask=batch.mask, use_cache=False)
    logits: torch.Tensor = base.head(out.last_hidden_state.flatten(0, 1).index_select(0, batch.places))
    return logits


@contextmanager
def answers_only(base: BaseModel, batch: Batch) -> Iterator[None]:
    """While open, these parts of the last layer answer 0 at positions without an answer token behind them.

    It stays open for the backward too, where checkpointing runs the layer once more.
    """
    clients, most = batch.spots.shape
    with ExitStack() as stack:
        for part in _parts(base) if clients * most <= WORTH * batch.mask.numel() else ():
            stack.enter_context(_there(part, batch.spots))
        yield


def _parts(base: BaseModel) -> list[nn.Module]:
    layers = getattr(base.backbone, "layers", None)
    layer: Any = layers[-1] if isinstance(layers, nn.ModuleList) else None
    mlp, attention = getattr(layer, "mlp", None), dict(getattr(layer, "self_attn", nn.Module()).named_children())
    if not isinstance(mlp, nn.Module) or not {name for name, _ in mlp.named_children()} >= GATED:
        return []
    return [mlp, *(attention[name] for name in ("q_proj", "o_proj") if name in attention)]


@contextmanager
def _there(part: nn.Module, spots: torch.Tensor) -> Iterator[None]:
    """spots: [C, most] of the positions [rows · L]: client-major, as adapters need it."""
    before, plain, chosen = vars(part).get("forward"), part.forward, spots.flatten()

    def forward(x: torch.Tensor) -> torch.Tensor:
        rows = x.flatten(0, 1)
        some: torch.Tensor = plain(rows.index_select(0, chosen).view(*spots.shape, -1)).flatten(0, 1)
        out = some.new_zeros(len(rows), some.shape[1]).index_copy(0, chosen, some)
        return out.view(*x.shape[:-1], -1)

    vars(part)["forward"] = forward
    try:
        yield
    finally:
        del vars(part)["forward"]
        if before is not None:
            vars(part)["forward"] = before
