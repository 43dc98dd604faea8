"""Who trains which subspace, training aside: two kinds of pictures behind one question."""

from fedstrata.benchmarks.organisation import Organised, organised

METHODS = ("strata", "oracle", "disco")


def test_strata_keeps_apart_what_disco_joins() -> None:
    found = {name: organised("fcit-mini-small-domain", [f"strategy.name={name}", "seed=100"]) for name in METHODS}
    assert found["strata"] == found["oracle"] == Organised(subspaces=2, tasks=2, visits=16, astray=0, out=0)
    assert found["disco"] == Organised(subspaces=1, tasks=2, visits=16, astray=8, out=0)
