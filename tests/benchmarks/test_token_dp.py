"""`bench token-dp`, quick: real instructions and the real encoder, two seeds."""

import numpy as np
import torch

from fedstrata.benchmarks import token_dp
from fedstrata.core.identity import Token


def test_the_quick_bench_keeps_all_tasks_at_200_and_loses_some_at_10() -> None:
    torch.set_num_threads(1)
    result = token_dp.bench(quick=True)
    assert result.targets == {"tasks lost, n = 200, z = 1": 0}
    assert result.limits["tasks lost, n = 200, z = 1"] == 0
    assert result.limits["tasks lost, n = 10, z = 1"] > 0  # the measurement can fail
    many, few = result.pairs
    assert (many["n"], few["n"], many["z"], few["z"]) == (200, 10, 1.0, 1.0)
    assert 4.3 < many["epsilon"] < 4.45
    assert many["matched"] == [8, 8]
    assert min(many["near"]) > 0.98 > 0.6 > max(few["near"])
    assert len(result.json()["pairs"]) == 2


def tokens(*values: list[float]) -> list[Token]:
    return [Token(np.array(value, dtype=np.float32), 10) for value in values]


def test_a_task_is_kept_when_its_two_clients_share_a_subspace_that_is_theirs_alone() -> None:
    a, b, c = [1.0, 0.0, 0.0], [0.0, 1.0, 0.0], [0.0, 0.0, 1.0]
    assert token_dp.kept([tokens(a, a), tokens(b, b), tokens(c, c)], 0.9) == 3
    assert token_dp.kept([tokens(a, a), tokens(b, c)], 0.9) == 1  # its second client opened another one
    assert token_dp.kept([tokens(a, a), tokens(a, a), tokens(c, c)], 0.9) == 1  # two tasks in one are none
    assert token_dp.kept([tokens(a, b), tokens(b, b)], 0.9) == 0
