"""Parts of a frozen base as one step of autograd each, where its own chain of small ones costs more than it computes.

They are elementwise: on a CPU every step in between is a pass over the memory of all tokens, and one more backwards.
"""

import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import lru_cache
from types import ModuleType
from typing import Any

import torch
from torch import nn

EPSILONS = ("variance_epsilon", "eps")  # what transformers' norms call theirs
ROTARY = "apply_rotary_pos_emb"
NEAR = 1e-5  # largest relative difference to a norm's own answer that is rounding


@contextmanager
def quick(backbone: nn.Module) -> Iterator[None]:
    """While open, the language model's norms and rotary embeddings are one step of autograd each; to rounding."""
    with ExitStack() as stack:
        for module in backbone.modules():
            if is_rms_norm(module):
                stack.enter_context(_norm(module))
        for source in {type(module).__module__ for module in backbone.modules()}:
            if turns(source):
                stack.enter_context(_rotary(sys.modules[source]))
        yield


def is_rms_norm(module: nn.Module) -> bool:
    """Whether a module divides by the root mean square and multiplies by its frozen weight, and does nothing else.

    Tried on numbers, not read from its name: some models multiply by 1 + weight.
    """
    known = vars(module).get("_rms_norm")
    if known is None:
        known = module._rms_norm = _try(module)  # type: ignore[assignment]
    return bool(known)


@torch.no_grad()
def _try(module: nn.Module) -> bool:
    weight = getattr(module, "weight", None)
    if not type(module).__name__.endswith("RMSNorm") or not isinstance(weight, torch.Tensor):
        return False
    if weight.dtype != torch.float32 or weight.dim() != 1 or weight.requires_grad or _epsilon(module) is None:
        return False
    draw = torch.linspace(-2, 3, 2 * len(weight), device=weight.device).view(2, -1)
    theirs = module(draw)
    return bool((rms_norm(draw, weight, _epsilon(module) or 0.0) - theirs).norm() <= NEAR * theirs.norm())


def _epsilon(module: nn.Module) -> float | None:
    found = [value for name in EPSILONS if isinstance(value := getattr(module, name, None), float)]
    return found[0] if found else None


@contextmanager
def _norm(module: nn.Module) -> Iterator[None]:
    before, plain = vars(module).get("forward"), module.forward
    weight, epsilon = module.weight, _epsilon(module)

    def forward(x: torch.Tensor) -> Any:
        return rms_norm(x, weight, epsilon) if x.dtype == torch.float32 else plain(x)

    vars(module)["forward"] = forward
    try:
        yield
    finally:
        del vars(module)["forward"]
        if before is not None:
            vars(module)["forward"] = before


def rms_norm(x: torch.Tensor, weight: Any, epsilon: Any) -> torch.Tensor:
    """x / √(mean x² + ε) · weight over the last dimension; no gradient for the weight."""
    result: torch.Tensor = _RmsNorm.apply(x, weight, epsilon)  # type: ignore[no-untyped-call]
    return result


class _RmsNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor, epsilon: float) -> torch.Tensor:
        length = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
        inverse = length.square_().div_(x.shape[-1]).add_(epsilon).rsqrt_()
        ctx.save_for_backward(x, weight, inverse)
        out: torch.Tensor = (x * inverse).mul_(weight)
        return out

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        """g w / rms − x (g w · x) / (d rms³)."""
        x, weight, inverse = ctx.saved_tensors
        scaled = gradient * weight
        along = (scaled * x).sum(-1, keepdim=True).mul_(inverse.pow(3)).div_(-x.shape[-1])
        return scaled.mul_(inverse).addcmul_(x, along), None, None


@lru_cache(maxsize=64)
@torch.no_grad()
def turns(source: str) -> bool:
    """Whether a module of transformers turns queries and keys by its `apply_rotary_pos_emb` as Llama does.

    Tried on numbers: others of that name interleave the halves.
    """
    theirs = getattr(sys.modules.get(source), ROTARY, None)
    if theirs is None:
        return False
    draw = torch.linspace(-1, 2, 2 * 3 * 2 * 8).view(2, 3, 2, 8)
    angles = torch.linspace(0, 3, 2 * 2 * 8).view(2, 2, 8)
    given = (draw, draw[:, :1] + 1, angles.cos(), angles.sin())
    try:
        came = theirs(*given)
    except (TypeError, ValueError, RuntimeError):  # it wants something else
        return False
    return all(torch.allclose(mine, other, atol=1e-6) for mine, other in zip(rotary(*given), came, strict=True))


@contextmanager
def _rotary(source: ModuleType) -> Iterator[None]:
    plain = getattr(source, ROTARY)

    def turned(q: torch.Tensor, k: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, *rest: Any, **named: Any) -> Any:
        whole = cos.shape[-1] == q.shape[-1] and not rest and not named  # some turn a part of each head only
        return rotary(q, k, cos, sin) if whole else plain(q, k, cos, sin, *rest, **named)

    setattr(source, ROTARY, turned)
    try:
        yield
    finally:
        setattr(source, ROTARY, plain)


def rotary(q: torch.Tensor, k: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Queries and keys [B, heads, L, d] turned by their positions (Su et al. 2021, arXiv 2104.09864).

    Args:
        q: [B, heads, L, d].
        k: [B, fewer heads or as many, L, d].
        cos: [B or 1, L, d], of every number's angle.
        sin: the same.
    """
    cos, sin = cos.unsqueeze(1), sin.unsqueeze(1)
    turned: tuple[torch.Tensor, torch.Tensor] = (_Turn.apply(q, cos, sin), _Turn.apply(k, cos, sin))  # type: ignore[no-untyped-call]
    return turned


class _Turn(torch.autograd.Function):
    """(x₁, x₂) → (x₁ cos₁ − x₂ sin₁, x₂ cos₂ + x₁ sin₂), the halves of the last dimension."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(cos, sin)
        (first, second), (low, high) = x.chunk(2, dim=-1), sin.chunk(2, dim=-1)
        out = x.new_empty(x.shape, dtype=torch.result_type(x, cos))  # head by head, as attention multiplies
        torch.mul(x, cos, out=out)
        left, right = out.chunk(2, dim=-1)
        left.addcmul_(second, low, value=-1)
        right.addcmul_(first, high)
        return out

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        cos, sin = ctx.saved_tensors
        (first, second), (low, high) = gradient.chunk(2, dim=-1), sin.chunk(2, dim=-1)
        rows, heads, length, width = gradient.shape
        out = gradient.new_empty(rows, length, heads, width).transpose(1, 2)  # as the layers before it want it
        torch.mul(gradient, cos, out=out)
        left, right = out.chunk(2, dim=-1)
        left.addcmul_(second, high)
        right.addcmul_(first, low, value=-1)
        return out, None, None
