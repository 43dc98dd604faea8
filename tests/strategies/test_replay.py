"""Experience replay: the reservoir's law, what is drawn from it, and that it names rows and nothing more."""

from typing import Any

import numpy as np
import pytest
from flwr.common.serde import recorddict_from_proto
from flwr.proto.recorddict_pb2 import RecordDict

from fedstrata.core.errors import BadInput
from fedstrata.server import checkpoint
from fedstrata.server.runfolder import RunFolder
from fedstrata.strategies.base import Offer, Row
from fedstrata.strategies.replay import Replay, ReplayConfig, Reservoir, reservoir

FIRST: list[Row] = [(0, row) for row in range(0, 24, 2)]
SECOND: list[Row] = [(1, row) for row in range(8)]


def test_every_row_stays_with_the_same_chance() -> None:
    """6 of 12 + 8 rows that come one share after the other, 4000 clients: 0.3 each, within four standard errors."""
    counts = dict.fromkeys(FIRST + SECOND, 0)
    for seed in range(4000):
        for row in reservoir(reservoir(FIRST, 6, seed) + SECOND, 6, seed):
            counts[row] += 1
    shares = np.array(list(counts.values())) / 4000
    assert shares.sum() == pytest.approx(6)
    assert np.abs(shares - 0.3).max() < 4 * np.sqrt(0.3 * 0.7 / 4000)


@pytest.mark.parametrize("budget", [0, 1, 6, 20, 50])
def test_it_holds_distinct_rows_up_to_its_budget_whatever_their_order_and_number_of_times(budget: int) -> None:
    whole = reservoir(FIRST + SECOND, budget, 3)
    assert len(whole) == len(set(whole)) == min(budget, 20)
    assert set(whole) <= {*FIRST, *SECOND}
    assert reservoir(SECOND[::-1] + FIRST + FIRST, budget, 3) == whole
    assert reservoir(reservoir(reservoir(SECOND, budget, 3) + FIRST, budget, 3) + SECOND, budget, 3) == whole


def offer(rows: list[Row], memory: Any = None, draw: int = 0) -> Offer:
    return Offer(rows, memory or {}, seed=7, draw=draw)


def test_a_round_trains_its_share_and_a_draw_of_earlier_rows() -> None:
    selector = Reservoir(ReplayConfig(budget=10, ratio=0.5))
    chosen, memory = selector.select(offer(FIRST))
    assert list(chosen) == FIRST  # nothing is earlier yet
    held = [tuple(row) for row in memory["reservoir"].tolist()]
    assert held == reservoir(FIRST, 10, 7)
    assert list(selector.select(offer(FIRST, memory))[0]) == FIRST  # the same share again is not earlier
    chosen, after = selector.select(offer(SECOND, memory))
    assert list(chosen[:8]) == SECOND
    replayed = list(chosen[8:])
    assert len(replayed) == len(set(replayed)) == 4
    assert set(replayed) <= set(held)
    assert [tuple(row) for row in after["reservoir"].tolist()] == reservoir(FIRST + SECOND, 10, 7)
    assert list(selector.select(offer(SECOND, memory))[0]) == list(chosen)
    assert list(selector.select(offer(SECOND, memory, draw=1))[0]) != list(chosen)


def test_no_more_is_replayed_than_there_is() -> None:
    selector = Reservoir(ReplayConfig(budget=3, ratio=5.0))
    _, memory = selector.select(offer(FIRST))
    assert len(selector.select(offer(SECOND, memory))[0]) == 8 + 3


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"budget": -1}, "strategy.budget: must be at least 0, got -1"),
        ({"ratio": float("nan")}, "strategy.ratio: must be a finite number of at least 0, got nan"),
    ],
)
def test_options_that_cannot_be_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(BadInput) as caught:
        ReplayConfig(**options)
    assert str(caught.value) == message


def test_it_moves_no_more_bytes_than_finetune_and_clients_remember_rows_alone(short: Any) -> None:
    plain, kept = short("finetune"), short("replay")
    assert (kept.summary["bytes_up"], kept.summary["bytes_down"]) == (
        plain.summary["bytes_up"],
        plain.summary["bytes_down"],
    )
    assert not Replay.uses_task_identity
    assert remembered(kept) == {"reservoir"}


def remembered(run: Any) -> set[str]:
    """The names of what clients remember; all of it must be rows, (task, row) each."""
    commit = checkpoint.require_newest(run.folder)
    held = [tensor for name, tensor in commit.memory.tensors.items() if name.startswith("client.")]
    assert held
    names: set[str] = set()
    for data in held:
        memory = recorddict_from_proto(RecordDict.FromString(data.tobytes())).array_records["memory"]
        for name, array in memory.items():
            value = array.numpy()
            assert (value.dtype, value.ndim, value.shape[1]) == (np.int64, 2, 2)
            assert len(value) <= 100
            names.add(name)
    return names


def test_the_plan_counts_what_is_rehearsed(short: Any) -> None:
    """At most: a client that sits a stage out has less to rehearse."""
    told = {name: RunFolder(short(name).folder).events() for name in ("finetune", "replay")}
    planned = {name: events[0]["plan"]["steps"] for name, events in told.items()}
    made = sum(row["steps"] for event in told["replay"] if event["event"] == "round" for row in event["participants"])
    assert planned["finetune"] < made <= planned["replay"]
