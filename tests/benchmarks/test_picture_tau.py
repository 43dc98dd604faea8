"""strata's picture threshold is what the base's pre-training tasks say, not what a stream says."""

import pytest

from fedstrata.benchmarks.picture_tau import threshold
from fedstrata.strategies.strata import StrataConfig


def test_the_default_is_the_one_of_the_pre_training_tasks() -> None:
    least, largest, tau = threshold(60)
    assert largest < StrataConfig().picture_tau < least
    assert tau == pytest.approx(StrataConfig().picture_tau, abs=0.01)
