"""FedProx: the squared distance to the adapter that the round began with."""

from typing import Any

import pytest
import torch

from fedstrata.core.errors import BadInput
from fedstrata.strategies import find
from fedstrata.strategies.base import Participant, Setup
from fedstrata.strategies.fedprox import FedProx, FedProxConfig, proximal
from fedstrata.strategies.finetune import Finetune, FinetuneConfig


def test_the_gradient_of_the_term_is_mu_times_the_distance() -> None:
    """Flower's docstring omits the square: its gradient would be (0.03, 0.04), whatever the distance."""
    values = torch.tensor([[3.0, 4.0], [0.0, 0.0]], dtype=torch.float64, requires_grad=True)
    penalty = proximal(values, torch.zeros(2, dtype=torch.float64), 0.1)
    assert penalty.tolist() == pytest.approx([1.25, 0.0])  # 0.05 · 25
    penalty.sum().backward()
    assert values.grad is not None
    assert torch.allclose(values.grad, torch.tensor([[0.3, 0.4], [0.0, 0.0]], dtype=torch.float64), atol=1e-15)


def test_the_server_averages_as_finetune_does(setup: Setup, train_reply: Any, sent: Any) -> None:
    one, other = FedProx(FedProxConfig(subspaces=1), setup), Finetune(FinetuneConfig(subspaces=1), setup)
    for strategy in (one, other):
        strategy.meet([Participant(2, 0), Participant(3, 1)])
        strategy.aggregate_train(1, [train_reply(0, [1, 2, 0], 1), train_reply(1, [5, -2, 0], 3)])
    assert sent(one, 2) == sent(other, 2)
    assert one.extras() == {}
    assert not one.uses_task_identity


@pytest.mark.parametrize("mu", [-0.1, float("inf"), float("nan")])
def test_a_strength_that_cannot_be_is_refused(mu: float) -> None:
    with pytest.raises(BadInput, match=r"strategy\.mu: must be a finite number of at least 0"):
        FedProxConfig(mu=mu)


def test_strength_zero_is_finetune_bit_for_bit_and_another_is_not(federate: Any) -> None:
    assert find("fedprox") is FedProx
    plain = federate("finetune").parts.tensors["adapter"]
    assert federate("fedprox", "strategy.mu=0").parts.tensors["adapter"].tobytes() == plain.tobytes()
    held = federate("fedprox", "strategy.mu=10")
    assert held.parts.tensors["adapter"].tobytes() != plain.tobytes()
    assert held.summary["status"] == "completed"
