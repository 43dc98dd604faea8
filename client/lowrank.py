"""The product that a cohort adds to a Linear, γ B_c A_c x for each client c, as one step of autograd.

Autograd's own way multiplies into matrices whose rows are only r long, for which BLAS is several times slower, and
scales and adds up in steps of their own. Here the narrow side stays outermost: A_c x is kept transposed, [r, tokens].
"""

from typing import Any

import torch
import torch.nn.functional as F


def low_rank(
    x: torch.Tensor,
    a: torch.Tensor,
    b: torch.Tensor,
    scaling: float,
    weight: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
) -> torch.Tensor:
    """γ x A_cᵀ B_cᵀ [rows, L, out], with x Wᵀ + bias under it if there is a weight [out, in].

    Args:
        x: [rows, L, in], client-major: each of the C clients owns equally many rows.
        a: [C, r, in].
        b: [C, out, r].
        scaling: γ.
        weight: frozen; where it has another type than the factors, only the narrow products are done in theirs.
        bias: frozen.
    """
    result: torch.Tensor = _LowRank.apply(x, a, b, scaling, weight, bias)  # type: ignore[no-untyped-call]
    return result


def gated(
    x: torch.Tensor, seen: torch.Tensor, a: torch.Tensor, b: torch.Tensor, gate: torch.Tensor, scaling: float
) -> torch.Tensor:
    """γ Σ_e g_e B_e A_e x [rows, L, out] for E experts of equal rank, g = softmax(G x) of every token: MoELoRA.

    Args:
        x: [rows, L, in], what the experts read; client-major as in `low_rank`.
        seen: the same without dropout, what the gate reads.
        a: [C, r, in], the experts' ranks one after another.
        b: [C, out, r].
        gate: G [C, E, in].
        scaling: γ.
    """
    read, judged = (t.reshape(len(a), -1, t.shape[-1]).to(a.dtype) for t in (x, seen))
    shares = torch.bmm(judged, gate.mT).softmax(-1)  # [C, tokens, E]
    narrow = torch.bmm(read, a.mT).view(*shares.shape, -1) * shares.unsqueeze(-1)
    return scaling * torch.bmm(narrow.flatten(2), b.mT).view(*x.shape[:-1], b.shape[1])


class _LowRank(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        a: torch.Tensor,
        b: torch.Tensor,
        scaling: float,
        weight: torch.Tensor | None,
        bias: torch.Tensor | None,
    ) -> torch.Tensor:
        rows = x.reshape(len(a), -1, x.shape[-1])
        narrow = torch.bmm(a, rows.to(a.dtype).transpose(1, 2))  # [C, r, tokens]
        ctx.save_for_backward(x, a, b, narrow, weight)
        ctx.scaling = scaling
        shape = (*x.shape[:-1], b.shape[1])
        if weight is None:
            wide = torch.bmm(narrow.transpose(1, 2), b.transpose(1, 2)).mul_(scaling)
            return wide.view(shape)
        out = F.linear(x, weight, bias)
        _add(out.view(len(a), -1, out.shape[-1]), narrow.transpose(1, 2), b.transpose(1, 2), scaling)
        return out

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        x, a, b, narrow, weight = ctx.saved_tensors
        gradient, s = gradient.contiguous(), ctx.scaling
        rows, wide = (t.reshape(len(a), -1, t.shape[-1]).to(a.dtype) for t in (x, gradient))
        back = torch.bmm(b.transpose(1, 2), wide.transpose(1, 2))  # [C, r, tokens]
        to_a = torch.baddbmm(a, back, rows, beta=0, alpha=s)
        to_b = torch.baddbmm(b.transpose(1, 2), narrow, wide, beta=0, alpha=s).transpose(1, 2)
        to_x = None
        if ctx.needs_input_grad[0] and weight is None:
            to_x = torch.bmm(back.transpose(1, 2), a).mul_(s).view(x.shape).to(x.dtype)
        elif ctx.needs_input_grad[0]:
            to_x = gradient @ weight
            _add(to_x.view(len(a), -1, x.shape[-1]), back.transpose(1, 2), a, s)
        return to_x, to_a, to_b, None, None, None


def _add(out: torch.Tensor, left: torch.Tensor, right: torch.Tensor, scaling: float) -> None:
    """out += γ · left @ right, in place."""
    if out.dtype == left.dtype:
        out.baddbmm_(left, right, alpha=scaling)
    else:
        out.add_(torch.bmm(left, right).to(out.dtype), alpha=scaling)
