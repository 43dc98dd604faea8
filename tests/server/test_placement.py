"""How many actors a simulation gets, and what share of the GPUs each has."""

import pytest

from fedstrata.core.errors import BadInput
from fedstrata.server.placement import Wanted, place

GPU = {"CPU": 16.0, "GPU": 4.0}


@pytest.mark.parametrize(
    ("wanted", "found", "count", "cpus", "gpus"),
    [
        (Wanted(local=3), {"CPU": 3.0}, 3, 0, 0),  # a Ray of our own has no other users
        (Wanted(address="a:1"), {"CPU": 12.0}, 12, 1, 0),
        (Wanted(address="a:1", threads=4), {"CPU": 15.0}, 3, 4, 0),
        (Wanted(address="a:1", threads=4), {"CPU": 2.0}, 1, 4, 0),
        (Wanted(actors=5, address="a:1"), {"CPU": 12.0}, 5, 1, 0),
        (Wanted(address="a:1"), GPU, 16, 1, 0),  # a run on the processor leaves them alone
        (Wanted(address="a:1", device="auto"), GPU, 4, 1, 1),
        (Wanted(address="a:1", device="auto"), {"CPU": 2.0}, 2, 1, 0),
        (Wanted(actors=2, address="a:1", device="cuda"), GPU, 2, 1, 1),  # never more than one each
        (Wanted(actors=5, address="a:1", device="cuda"), GPU, 5, 1, 0.5),  # 4 / 5 would leave one without a place
        (Wanted(actors=7, address="a:1", device="cuda"), {"CPU": 8.0, "GPU": 1.0}, 7, 1, 0.1428),
        (Wanted(local=2, device="auto"), {"CPU": 2.0, "GPU": 1.0}, 2, 0, 0.5),
    ],
)
def test_place(wanted: Wanted, found: dict[str, float], count: int, cpus: int, gpus: float) -> None:
    actors, options = place(wanted, found)
    assert (actors, options["num_cpus"], options["num_gpus"]) == (count, cpus, gpus)
    if gpus:  # all of them find a place
        assert int(found["GPU"]) * int(1 / gpus + 1e-9) >= count


def test_a_run_on_a_gpu_is_refused_where_there_is_none() -> None:
    with pytest.raises(BadInput, match=r"^model.device: is cuda, but Ray finds no GPU in the cluster at a:1$"):
        place(Wanted(device="cuda", address="a:1"), {"CPU": 4.0})
