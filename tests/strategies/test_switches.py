"""DISCO's switches end to end: whole runs of fcit-mini-short, one epoch a round."""

from typing import Any

import numpy as np
import pytest


def test_a_server_optimizer_runs_under_disco_on_subspaces_that_come_later(federate: Any) -> None:
    """The paper's compatibility study: each stage's subspace is moved by FedAdam with moments of its own."""
    plain, adam = federate("disco"), federate("disco", "strategy.server_optimizer=fedadam")
    assert adam.summary["subspaces"] == plain.summary["subspaces"] == 2
    assert adam.summary["bytes_up"] == plain.summary["bytes_up"]
    assert adam.summary["bytes_down"] == plain.summary["bytes_down"]
    for index in range(2):
        name = f"subspace.{index}."
        assert adam.parts.tensors[f"{name}steps"].tolist() == [2]  # rounds of its own stage
        assert adam.parts.tensors[f"{name}second"].any()
        moved = adam.parts.tensors[f"{name}adapter"]
        assert moved.dtype == np.float32
        assert not np.array_equal(moved, plain.parts.tensors[f"{name}adapter"])


@pytest.mark.parametrize(("token", "encoder", "dim"), [("image", "tower", 129), ("both", "base+tower", 225)])
def test_pictures_find_the_subspaces_too(federate: Any, token: str, encoder: str, dim: int) -> None:
    ran = federate("disco", f"strategy.token={token}")
    assert ran.summary["subspaces"] == 2
    assert ran.summary["text_encoder"] == encoder
    assert ran.parts.tensors["subspace.0.token"].shape == (dim,)
    assert ran.summary["routing_accuracy"] == 100


def test_subspaces_keep_projectors_of_their_own_at_the_bytes_that_were_computed(federate: Any) -> None:
    ran = federate("disco", "strategy.projector=per-subspace")
    assert "shared" not in ran.parts.tensors
    one, other = (ran.parts.tensors[f"subspace.{index}.adapter"][-64:] for index in range(2))  # the last bias
    assert one.any()
    assert other.any()
    assert not np.array_equal(one, other)
    for what in ("bytes_up", "bytes_down", "bytes_eval"):
        assert ran.summary["plan"][what]["planned"] == ran.summary[what] > 0, what
