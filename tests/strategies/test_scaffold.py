"""SCAFFOLD: controls, and what they do where clients disagree."""

from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from flwr.app import ArrayRecord, ConfigRecord

from fedstrata.core.errors import BadInput
from fedstrata.strategies.base import Participant, Parts, Setup
from fedstrata.strategies.scaffold import Controlled, Scaffold, ScaffoldConfig, controlled

HESSIANS = torch.stack([torch.diag(torch.tensor([1.0, 10.0])), torch.diag(torch.tensor([10.0, 1.0]))]).double()
CENTRES = torch.tensor([[1.0, 1.0], [-1.0, 2.0]], dtype=torch.float64)
STEPS, LR = 10, 0.05


class Clients:
    """What a local half sees of clients that take STEPS steps on losses of their own."""

    def __init__(self, control: np.ndarray, memories: list[dict[str, np.ndarray]]) -> None:
        shape = (len(memories), control.size)
        self.gradient, self.steps, self.memories = torch.zeros(shape).double(), [STEPS] * len(memories), memories
        self._control = torch.from_numpy(control).double().expand(shape)

    def sent(self, name: str) -> torch.Tensor:
        return self._control

    def recall(self, name: str) -> torch.Tensor:
        nothing = np.zeros(self.gradient.shape[1])
        return torch.stack([torch.from_numpy(memory.get(name, nothing)).double() for memory in self.memories])

    def remember(self, name: str, values: torch.Tensor) -> None:
        for memory, mine in zip(self.memories, values.numpy(), strict=True):
            memory[name] = mine.copy()


def distance_to_the_optimum(strength: float, mu: float = 0.0, rounds: int = 400) -> float:
    """Two clients with the losses ½ (x − c)ᵀ H (x − c), trained by gradient descent."""
    total, control = np.zeros(2), np.zeros(2)
    memories: list[dict[str, np.ndarray]] = [{}, {}]
    for _ in range(rounds):
        ctx, half = Clients(control, memories), Controlled(ScaffoldConfig(strength=strength))
        half.begin(ctx)
        values = torch.from_numpy(total).repeat(2, 1)
        for _ in range(STEPS):
            gradient = torch.einsum("cij,cj->ci", HESSIANS, values - CENTRES) + mu * (values - torch.from_numpy(total))
            ctx.gradient.copy_(gradient)
            half.on_gradients(ctx, {})
            values = values - LR * ctx.gradient
        changes = half.end(ctx)["control"].numpy()
        control = control + changes.sum(0) / 2  # `controlled` rounds to float32
        total = values.mean(0).numpy()
    optimum = torch.linalg.solve(HESSIANS.sum(0), torch.einsum("cij,cj->i", HESSIANS, CENTRES)).numpy()
    return float(np.linalg.norm(total - optimum))


def test_it_reaches_the_optimum_where_averaging_is_biased() -> None:
    assert distance_to_the_optimum(strength=0) == pytest.approx(0.437, abs=1e-3)  # FedAvg
    assert distance_to_the_optimum(strength=0, mu=1.0) == pytest.approx(0.387, abs=1e-3)  # FedProx
    assert distance_to_the_optimum(strength=1) < 1e-12


def loss_on_all_labels(strength: float, optimiser: str, skewed: bool, rounds: int = 15) -> float:
    """Four clients learn four labels by one linear layer, each from 60 examples: of one label alone, or of all."""
    draw = torch.Generator().manual_seed(0)
    labels = torch.arange(4).repeat_interleave(60)
    centres = 1.5 * torch.randn(4, 6, generator=draw, dtype=torch.float64)
    x = centres[labels] + torch.randn(len(labels), 6, generator=draw, dtype=torch.float64)
    x = torch.cat([x, torch.ones(len(x), 1, dtype=torch.float64)], dim=1)
    deal = torch.arange(240).view(4, 60) if skewed else torch.arange(240).view(60, 4).T

    def loss(values: torch.Tensor) -> torch.Tensor:
        """[C] for values [C, 28]."""
        logits = torch.einsum("cni,coi->cno", x[deal], values.view(4, 4, 7))
        return F.cross_entropy(logits.transpose(1, 2), labels[deal], reduction="none").mean(1)

    total, control = torch.zeros(28, dtype=torch.float64), np.zeros(28)
    memories: list[dict[str, np.ndarray]] = [{} for _ in deal]
    for _ in range(rounds):
        ctx, half = Clients(control, memories), Controlled(ScaffoldConfig(strength=strength))
        half.begin(ctx)
        values = total.repeat(4, 1).requires_grad_()
        step = torch.optim.AdamW([values], lr=0.03) if optimiser == "AdamW" else torch.optim.SGD([values], lr=0.5)
        for _ in range(STEPS):
            ctx.gradient.copy_(torch.autograd.grad(loss(values).sum(), values)[0])
            half.on_gradients(ctx, {})
            values.grad = ctx.gradient
            step.step()
        control = control + half.end(ctx)["control"].numpy().mean(0)
        total = values.detach().mean(0)
    return float(loss(total.repeat(4, 1)).mean())


@pytest.mark.parametrize("optimiser", ["SGD", "AdamW"])
def test_it_beats_averaging_where_every_client_has_one_label(optimiser: str) -> None:
    """Loss 0.265 averaged and 0.230 controlled by SGD, 0.381 and 0.225 by AdamW; with even labels 0.227 and 0.234."""
    averaged, controlled = (loss_on_all_labels(strength, optimiser, skewed=True) for strength in (0.0, 1.0))
    even, same = (loss_on_all_labels(strength, optimiser, skewed=False) for strength in (0.0, 1.0))
    assert controlled < averaged
    assert controlled - same < (averaged - even) / 2  # at least half of what the skew costs is gone
    assert abs(same - even) < 0.02


def test_the_mean_of_the_gradients_is_the_papers_rule_where_steps_are_plain() -> None:
    """c_k⁺ = c_k − c + (x − y)/(Kη)."""
    memories = [{"control": np.array([0.5, -1.0])}, {"control": np.array([2.0, 0.25])}]
    own, control = np.stack([memory["control"] for memory in memories]), np.array([0.3, 0.7])
    ctx, half = Clients(control, memories), Controlled(ScaffoldConfig())
    half.begin(ctx)
    values = start = torch.tensor([[0.2, -0.4], [0.2, -0.4]], dtype=torch.float64)
    for _ in range(STEPS):
        ctx.gradient.copy_(torch.einsum("cij,cj->ci", HESSIANS, values - CENTRES))
        half.on_gradients(ctx, {})
        values = values - LR * ctx.gradient
    change = half.end(ctx)["control"].numpy()
    paper = own - control + (start - values).numpy() / (STEPS * LR)
    assert np.allclose(np.stack([memory["control"] for memory in memories]), paper, atol=1e-12)
    assert np.allclose(change, paper - own, atol=1e-12)


def test_the_control_moves_by_the_share_of_clients_that_took_part() -> None:
    moved = controlled(np.ones(2, np.float32), np.array([3, 4], np.float32), 2 / 8)
    assert moved.tolist() == [1.75, 2.0]


def test_the_control_travels_both_ways_and_is_declared(setup: Setup, train_reply: Any) -> None:
    strategy = Scaffold(ScaffoldConfig(subspaces=1), setup)
    strategy.meet([Participant(2, 0), Participant(3, 1)])
    one, other = strategy.configure_train(1, ArrayRecord(), ConfigRecord(), None)  # type: ignore[arg-type]
    assert one.content["payload"] is other.content["payload"]  # one copy for all
    assert one.content.array_records["payload"]["control"].numpy().tolist() == [0, 0, 0]
    assert strategy.extras() == {"control": (3,)}
    strategy.aggregate_train(
        1, [train_reply(0, [1, 2, 0], 1, control=[1, 2, 3]), train_reply(1, [5, -2, 0], 3, control=[1, 0, 1])]
    )
    assert strategy.state.adapter.tolist() == [4, -1, 0]  # by sample counts
    assert strategy.state.control.tolist() == [2, 2, 4]  # Σ Δc / N; the setup has N = 1


def test_neither_the_order_of_replies_nor_save_and_load_change_it(setup: Setup, train_reply: Any) -> None:
    replies = [train_reply(k, [k, 2, 0], k + 1, control=[k, 0.1, -k]) for k in range(3)]
    strategies = [Scaffold(ScaffoldConfig(subspaces=1), setup) for _ in range(2)]
    for strategy, order in zip(strategies, (replies, replies[::-1]), strict=True):
        strategy.meet([Participant(2, 0)])
        strategy.aggregate_train(1, order)
    assert np.allclose(strategies[0].state.control, strategies[1].state.control, atol=1e-6)
    parts = strategies[0].save()
    again = Scaffold(ScaffoldConfig(subspaces=1), setup)
    again.load(Parts(dict(parts.tensors), dict(parts.facts)))
    assert again.state.adapter.tobytes() == strategies[0].state.adapter.tobytes()
    assert again.state.control.tobytes() == strategies[0].state.control.tobytes()


def test_a_round_without_replies_keeps_the_state(setup: Setup) -> None:
    strategy = Scaffold(ScaffoldConfig(), setup)
    before = strategy.state
    assert strategy.aggregate_train(1, []) == (None, None)
    assert strategy.state.control.tobytes() == before.control.tobytes()
    assert strategy.state.adapter is before.adapter


def test_a_strength_that_cannot_be_is_refused() -> None:
    with pytest.raises(BadInput, match=r"strategy\.strength: must be between 0 and 1, got 1.5"):
        ScaffoldConfig(strength=1.5)


def test_strength_zero_is_finetune_bit_for_bit_and_one_is_not(federate: Any) -> None:
    plain, off, on = federate("finetune"), federate("scaffold", "strategy.strength=0"), federate("scaffold")
    assert off.parts.tensors["adapter"].tobytes() == plain.parts.tensors["adapter"].tobytes()
    assert on.parts.tensors["adapter"].tobytes() != plain.parts.tensors["adapter"].tobytes()
    assert on.parts.tensors["control"].any()
    assert on.summary["bytes_up"] == 2 * plain.summary["bytes_up"]  # the adapter and Δc
    assert on.summary["bytes_down"] == 2 * plain.summary["bytes_down"]
