"""Gradient checkpointing: a layer keeps its input alone and runs once more when its gradient is wanted."""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

from torch import nn
from torch.utils.checkpoint import checkpoint

from fedstrata.core.errors import BadInput


@contextmanager
def checkpointed(backbone: nn.Module) -> Iterator[None]:
    """While open, the language model's layers keep no activations; adapters on them run again too.

    The switch of transformers would put the layers into training mode, with the dropout of the base.

    Raises:
        BadInput: a model whose layers transformers does not mark as fit for it.
    """
    from transformers.modeling_layers import GradientCheckpointingLayer

    layers = [module for module in backbone.modules() if isinstance(module, GradientCheckpointingLayer)]
    if not layers:
        raise BadInput(f"train.checkpointing: the layers of a {type(backbone).__name__} cannot be checkpointed")
    with ExitStack() as stack:
        for layer in layers:
            stack.enter_context(_again(layer))
        yield


@contextmanager
def _again(layer: nn.Module) -> Iterator[None]:
    plain: Callable[..., Any] = layer.forward

    def forward(*args: Any, **kwargs: Any) -> Any:
        return checkpoint(plain, *args, use_reentrant=False, preserve_rng_state=False, **kwargs)

    vars(layer)["forward"] = forward
    try:
        yield
    finally:
        del vars(layer)["forward"]
