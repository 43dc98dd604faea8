"""O-LoRA: a subspace a stage, orthogonal to the frozen ones, all of them active."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from flwr.app import ArrayRecord, ConfigRecord, Message

from fedstrata.core import config as configuration
from fedstrata.core import shapes
from fedstrata.core.adapters import Layout, fresh
from fedstrata.core.errors import BadInput
from fedstrata.server import checkpoint
from fedstrata.server.runfolder import RunFolder
from fedstrata.strategies.base import Inputs, Participant, Parts, Setup
from fedstrata.strategies.olora import OLora, OLoraConfig, overlap
from fedstrata.strategies.staged import joined


def test_a_new_branch_is_silent_on_what_an_old_one_reads() -> None:
    """The penalty alone: A_new ends orthogonal to A_old and does not vanish."""
    draw = torch.Generator().manual_seed(0)
    old = torch.linalg.qr(torch.randn(16, 4, generator=draw, dtype=torch.float64))[0].T
    new = torch.randn(1, 4, 16, generator=draw, dtype=torch.float64, requires_grad=True)
    for step in range(600):
        (gradient,) = torch.autograd.grad(overlap({"q.lora_A": old}, {"q.lora_A": new}).sum(), new)
        with torch.no_grad():
            new -= 0.02 * (1 - step / 600) * gradient
    x = old.T @ torch.randn(4, 6, generator=draw, dtype=torch.float64)
    assert (new @ x).abs().max() < 0.15
    assert torch.linalg.vector_norm(new) > 1


def test_the_penalty_is_the_sum_of_absolute_products_of_each_client() -> None:
    old = {"a.lora_A": torch.tensor([[1.0, 0.0], [1.0, 1.0]]), "b.lora_A": torch.tensor([[2.0]])}
    new = {"a.lora_A": torch.tensor([[[1.0, -3.0]], [[0.0, 0.0]]]), "b.lora_A": torch.tensor([[[5.0]], [[-1.0]]])}
    assert overlap(old, new).tolist() == [1 + 2 + 10, 2]


def test_concatenated_ranks_are_the_sum_of_the_deltas() -> None:
    layout = Layout((("a", 3, 4), ("b", 2, 5)))
    draw = np.random.default_rng(0)
    flats = [draw.normal(size=layout.size(rank)).astype(np.float32) for rank in (2, 3)]
    one = joined(layout, np.zeros(0, np.float32), *flats)
    assert layout.rank(one) == 5
    for name, (a, b) in layout.split(one).items():
        parts = [layout.split(flat)[name] for flat in flats]
        assert np.allclose(b @ a, sum(mine @ yours for yours, mine in parts), atol=1e-5)


def olora(setup: Setup) -> OLora:
    return OLora(OLoraConfig(), setup)


def messages(strategy: OLora, number: int = 1) -> list[Message]:
    strategy.meet([Participant(2, 0), Participant(3, 1)])
    return list(strategy.configure_train(number, ArrayRecord(), ConfigRecord(), None))  # type: ignore[arg-type]


def test_a_stage_freezes_what_the_one_before_it_trained_and_opens_a_new_subspace(
    setup: Setup, train_reply: Any
) -> None:
    strategy = olora(setup)
    strategy.begin_stage(1)
    assert strategy.adapter_rank == 1
    assert strategy.state.adapter.tobytes() == fresh(setup.layout, 1, 0, 0).tobytes()
    assert all("payload" not in message.content for message in messages(strategy))
    strategy.aggregate_train(1, [train_reply(0, [1, 2, 3], 1), train_reply(1, [5, 2, 3], 3)])
    assert strategy.knowledge().adapters[0].tolist() == [4, 2, 3]
    strategy.begin_stage(2)
    assert strategy.state.adapter.tobytes() == fresh(setup.layout, 1, 0, 1).tobytes()
    one, other = messages(strategy)
    assert one.content["payload"] is other.content["payload"]
    assert one.content.array_records["payload"]["past"].numpy().tolist() == [4, 2, 3]
    strategy.aggregate_train(2, [train_reply(0, [7, 8, 9])])
    (known,) = strategy.knowledge().adapters
    (a, b) = setup.layout.split(known)["layer"]
    assert (a.tolist(), b.tolist()) == ([[4, 2], [7, 8]], [[3, 9]])
    assert strategy.extras() == {}
    strategy.begin_stage(3)
    assert messages(strategy)[0].content.array_records["payload"]["past"].numpy().tolist() == known.tolist()


def test_a_subspace_that_nobody_trained_is_not_kept(setup: Setup, train_reply: Any) -> None:
    strategy = olora(setup)
    strategy.begin_stage(1)
    strategy.aggregate_train(1, [])
    strategy.begin_stage(2)
    assert strategy.state.past.size == 0
    strategy.aggregate_train(2, [train_reply(0, [7, 8, 9])])
    strategy.begin_stage(3)
    assert strategy.state.past.tolist() == [7, 8, 9]


def test_a_resumed_run_announces_a_stage_again_and_nothing_happens(setup: Setup, train_reply: Any) -> None:
    strategy, again = olora(setup), olora(setup)
    strategy.begin_stage(1)
    strategy.aggregate_train(1, [train_reply(0, [1, 2, 3])])
    strategy.begin_stage(2)
    strategy.aggregate_train(2, [train_reply(0, [4, 5, 6])])
    parts = strategy.save()
    again.load(Parts(dict(parts.tensors), dict(parts.facts)))
    again.begin_stage(2)
    assert again.knowledge().adapters[0].tolist() == strategy.knowledge().adapters[0].tolist()
    assert again.save().facts == parts.facts == {"stage": 2, "trained": True}


def test_a_shared_projector_goes_on_over_stages(setup: Setup, train_reply: Any) -> None:
    layout = Layout((("layer", 1, 2),), (("projector.weight", (2,)),))
    strategy = olora(replace(setup, layout=layout))
    strategy.begin_stage(1)
    strategy.aggregate_train(1, [train_reply(0, [1, 2, 3, 10, 20])])
    strategy.begin_stage(2)
    assert strategy.state.past.tolist() == [1, 2, 3]
    assert strategy.state.adapter[-2:].tolist() == [10, 20]
    assert strategy.knowledge().shared.tolist() == [10, 20]
    strategy.aggregate_train(2, [train_reply(0, [4, 5, 6, 10, 20])])
    assert layout.rank(np.concatenate([strategy.knowledge().adapters[0], strategy.knowledge().shared])) == 2


def test_all_subspaces_answer_everything(setup: Setup) -> None:
    router = OLora.router(olora(setup).knowledge())
    assert router.weights(Inputs(None, [1, 2], ["a", "b"])).tolist() == [[1], [1]]
    assert not OLora.uses_task_identity


def test_a_strength_that_cannot_be_is_refused() -> None:
    with pytest.raises(BadInput, match=r"strategy\.strength: must be a finite number of at least 0, got -1"):
        OLoraConfig(strength=-1.0)


def test_its_first_stage_is_finetune_of_the_same_rank_bit_for_bit(federate: Any) -> None:
    one_stage = ["scenario.name=fcit-mini-short", "federation.rounds_per_stage=1"]
    plain = stage_one(federate("finetune", *one_stage, "strategy.subspaces=1"))
    assert stage_one(federate("olora", *one_stage, "strategy.strength=0")).tobytes() == plain.tobytes()


def test_the_penalty_keeps_the_second_stage_orthogonal_to_the_first(federate: Any) -> None:
    """A whole run: ranks grow, the first stage keeps its bits, the frozen subspaces are counted on the way down."""
    free, held = (federate("olora", f"strategy.strength={strength}") for strength in (0, 1))
    for run in (free, held):
        past, new = run.parts.tensors["past"], run.parts.tensors["adapter"]
        assert past.size == new.size
        assert past.tobytes() == stage_one(run).tobytes()
        assert run.summary["bytes_down"] == 2 * 2 * new.nbytes + 2 * 2 * 2 * new.nbytes
        assert run.summary["bytes_up"] == 2 * 2 * 2 * new.nbytes
        assert run.summary["routing_accuracy"] is None
    assert products(held) < 0.8 * products(free)


def stage_one(run: Any) -> np.ndarray:
    commit = checkpoint.stage_start(run.folder / "checkpoints", 2)
    assert commit is not None
    adapter: np.ndarray = commit.parts.tensors["adapter"]
    return adapter


def products(run: Any) -> float:
    """Σ |A_old A_newᵀ| of a run's last state."""
    layout = shapes.layout(configuration.from_dict(RunFolder(run.folder).config, OLoraConfig))
    old, new = (layout.split(run.parts.tensors[name]) for name in ("past", "adapter"))
    return float(sum(np.abs(old[name][0] @ new[name][0].T).sum() for name in old))
