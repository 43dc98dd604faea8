"""Replies stream through the server: one adapter in memory at a time, the same bits in whatever order they come."""

import json
import random
import tracemalloc
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from flwr.app import Message, RecordDict
from flwr.serverapp import Grid
from rich.console import Console

from fedstrata.core import codec, records
from fedstrata.core.adapters import Flat, Layout
from fedstrata.core.errors import Interrupted
from fedstrata.core.identity import Token
from fedstrata.core.packing import gather, over, pack
from fedstrata.core.records import Assignment, Binding, TrainReply
from fedstrata.server import clipping, configure, exchange, launch
from fedstrata.server.exchange import Exchange, Ledger, Question, Seat
from fedstrata.server.flower_private import become_server, set_message_id
from fedstrata.server.gate import Update, read_update
from fedstrata.server.grids import InProcessGrid, LocalGrid
from fedstrata.server.intake import Intake
from fedstrata.server.replies import Replies
from fedstrata.server.runfolder import RunFolder
from fedstrata.strategies import find
from fedstrata.strategies.base import Participant, Setup
from fedstrata.strategies.disco import Disco, DiscoConfig
from fedstrata.strategies.finetune import Finetune, FinetuneConfig
from fedstrata.strategies.flower import StockConfig

QUIET = Console(quiet=True)
SAMPLES = 10


@pytest.fixture(autouse=True)
def _server() -> None:
    become_server()


class Serving(LocalGrid):
    """Answers every message with an adapter; a reply's bytes lie in `sources` and cost nothing."""

    def __init__(self, clients: int, sources: Sequence[Flat], kind: str = "float32") -> None:
        super().__init__(clients)
        self.sources, self.kind, self.cohort_size = [pack(flat) for flat in sources], kind, 1
        self.flats = sources

    def answer(self, message: Message) -> Message:
        at = records.binding(message)
        reply = TrainReply(at, np.empty(0, np.float32), SAMPLES + at.partition, 0.5, 1, 0.1)
        came = records.train_reply(reply, message)
        source = self.sources[at.partition % len(self.sources)]
        came.content["arrays"] = gather([("flat", over(source.dtype, source.shape, source.data))])
        if self.kind != "float32":
            flat, start = self.flats[at.partition % len(self.sources)], records.train_task(message).flat
            came = records.train_reply(reply, message, codec.encode(flat, start, None, self.kind)[0])
        return came

    def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None = None) -> list[Message]:
        return [self.answer(message) for message in self._number(messages)]

    def close(self) -> None:
        """Nothing was started."""


class OneByOne(InProcessGrid, Serving):
    """The same, unit by unit, as the in-process grid and the Ray grid tell of them."""

    def __init__(self, clients: int, sources: Sequence[Flat], kind: str = "float32") -> None:
        Serving.__init__(self, clients, sources, kind)

    def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None = None) -> list[Message]:
        return Serving.send_and_receive(self, messages, timeout=timeout)


def seat(partition: int) -> Seat:
    return Seat(partition + 2, Assignment(Binding("run", 1, 1, partition)), SAMPLES + partition)


def setup(size: int) -> Setup:
    """One layer whose rank-1 adapter has `size` numbers."""
    return Setup(seed=0, layout=Layout((("layer", size - 10, 10),)), rank=1, subspaces=1, tau=0.9, epsilon=0.05)


def finetune(size: int, clients: int) -> Finetune:
    strategy = Finetune(FinetuneConfig(subspaces=1), setup(size))
    strategy.meet([Participant(p + 2, p) for p in range(clients)])
    return strategy


def messages(strategy: Any) -> list[Message]:
    return list(strategy.configure_train(1, records.arrays(), records.to_meta(Assignment(Binding())), None))


def ask(grid: Grid, strategy: Any, folder: Path | None, upload: str = "float32", clip: bool = False) -> Ledger:
    """One exchange and its aggregation, as the federation does it."""
    ledger, sent = Ledger(), messages(strategy)
    seats = [seat(m.metadata.dst_node_id - 2) for m in sent]
    size = strategy.setup.layout.size(strategy.adapter_rank)
    question = Question(read_update, size, upload=upload)
    updates = clipping.Updates(
        Exchange(grid, 60, Replies(folder)).ask(question, seats, sent, ledger), clipping.starts(seats, sent)
    )
    scaled = clipping.factors(updates.norms, {}, lambda _: None) if clip else {}
    strategy.aggregate_train(1, clipping.Updates(updates.passed, updates.sent, scaled))
    return ledger


def drawn(count: int, size: int) -> list[Flat]:
    rng = np.random.default_rng(0)
    return [rng.standard_normal(size, dtype=np.float32) for _ in range(count)]


@pytest.mark.parametrize("clip", [False, True])
@pytest.mark.parametrize("clients", [4, 40])
def test_the_servers_peak_is_two_adapters_at_most_however_many_clients(
    tmp_path: Path, clients: int, clip: bool
) -> None:
    size = 1_000_000
    sources = drawn(3, size)
    ask(OneByOne(2, drawn(1, 30)), finetune(30, 2), tmp_path / "warm")
    strategy, grid = finetune(size, clients), OneByOne(clients, sources)
    old = strategy.state.adapter
    tracemalloc.start()
    try:
        before, _ = tracemalloc.get_traced_memory()
        ask(grid, strategy, tmp_path / "run", clip=clip)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    sent = old.nbytes  # the message that all clients share
    assert len(list(tmp_path.glob("run/round-1-1/*.reply"))) == clients
    assert peak - before - sent <= 2 * old.nbytes + 2**20  # and some blocks


def test_the_result_is_the_mean_to_a_millionth(tmp_path: Path) -> None:
    sources, strategy = drawn(7, 5000), finetune(5000, 7)
    ask(OneByOne(7, sources), strategy, tmp_path)
    exact = np.average(np.stack(sources).astype(np.float64), axis=0, weights=[SAMPLES + p for p in range(7)])
    assert np.linalg.norm(strategy.state.adapter - exact) <= 1e-6 * np.linalg.norm(exact)


def disco(size: int, clients: int) -> Disco:
    """Two subspaces: even and odd partitions."""
    strategy = Disco(DiscoConfig(), setup(size))
    axes = np.eye(2, dtype=np.float32)
    strategy.meet([Participant(p + 2, p, Token(axes[p % 2], SAMPLES + p)) for p in range(clients)])
    return strategy


@pytest.mark.parametrize("upload", ["float32", "bfloat16", "int8"])
@pytest.mark.parametrize("kept", [True, False])
def test_the_order_in_which_replies_come_does_not_show_in_a_bit(tmp_path: Path, upload: str, kept: bool) -> None:
    states = set()
    for number in range(4):
        strategy, grid = disco(2000, 9), Serving(9, drawn(9, 2000), upload)
        sent = [records.address(m, seat(m.metadata.dst_node_id - 2).assignment) for m in messages(strategy)]
        pairs = list(zip(sent, grid.send_and_receive(sent), strict=True))
        random.Random(number).shuffle(pairs)
        question = Question(read_update, 2000, upload=upload)
        expected = {m.metadata.dst_node_id: question.expected(seat(m.metadata.dst_node_id - 2), m) for m in sent}
        intake: Intake[Update] = Intake(expected, read_update, Replies(tmp_path / str(number) if kept else None), grid)
        for request, came in pairs:
            intake.take([request], [came])
        starts = clipping.starts([seat(p) for p in range(9)], sent)
        strategy.aggregate_train(1, clipping.Updates(intake.passed(), starts))
        assert len(strategy.state.subspaces) == 2
        states.add(b"".join(subspace.adapter.tobytes() for subspace in strategy.state.subspaces))
    assert len(states) == 1


def test_what_the_grid_still_holds_of_a_reply_that_was_taken_in_has_no_arrays(tmp_path: Path) -> None:
    strategy, grid = finetune(50, 3), Serving(3, drawn(3, 50))
    held: list[Message] = []
    real = grid.answer
    grid.answer = lambda message: held.append(real(message)) or held[-1]  # type: ignore[func-returns-value,method-assign]
    ledger = ask(grid, strategy, tmp_path)
    assert ledger.up == 3 * 50 * 4
    assert [list(message.content.array_records) for message in held] == [[], [], []]


@pytest.mark.parametrize("folder", [True, False])
def test_a_stock_strategy_gets_ordinary_messages_of_encoded_and_clipped_replies(tmp_path: Path, folder: bool) -> None:
    kind: Any = find("flwr.serverapp.strategy:FedMedian")
    strategy = kind(StockConfig(name="stock", subspaces=1), setup(500))
    strategy.meet([Participant(p + 2, p) for p in range(3)])
    start = strategy.state.adapter
    flats = [start + np.float32(step) for step in (0.01, 0.02, 0.5)]
    grid = Serving(3, flats, "int8")
    strategy.configure_train = lambda *_: [
        Message(records.train_content(records.arrays(flat=start), {}), p + 2, records.TRAIN) for p in range(3)
    ]
    ask(grid, strategy, tmp_path if folder else None, "int8", clip=True)
    assert strategy.state.adapter - start == pytest.approx(0.02, rel=0.01)


class Slow(Grid):
    """Flower's own kind of grid: messages are pushed, and replies pulled by the ids of what they answer."""

    def __init__(self, serving: Serving, silent: int = -1) -> None:
        self.serving, self.silent, self.most = serving, silent, 0
        self.waiting: dict[str, Message] = {}
        self.polls = 0

    def push_messages(self, messages: Iterable[Message]) -> list[str]:
        for number, message in enumerate(messages):
            set_message_id(message.metadata, f"id-{number}")
            self.waiting[f"id-{number}"] = message
        return list(self.waiting)

    def pull_messages(self, message_ids: Iterable[str]) -> list[Message]:
        self.polls += 1
        ready = [n for n in message_ids if n in self.waiting and int(n[3:]) != self.silent and self.polls % 2]
        self.most = max(self.most, len(ready))
        return [self.serving.answer(self.waiting.pop(name)) for name in ready]

    run = property(lambda self: None)
    set_run = create_message = get_node_ids = send_and_receive = lambda *_: None  # type: ignore[assignment]


def test_of_flowers_own_grid_replies_are_fetched_a_few_at_a_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(exchange, "PAUSE", 0.0)
    sources, ours, theirs = drawn(10, 60), finetune(60, 10), finetune(60, 10)
    grid = Slow(Serving(10, sources))
    ask(grid, theirs, tmp_path / "a")
    ask(OneByOne(10, sources), ours, tmp_path / "b")
    assert theirs.state.adapter.tobytes() == ours.state.adapter.tobytes()
    assert grid.most == exchange.AT_ONCE < 10


def test_who_does_not_answer_flowers_own_grid_in_time_is_late(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(exchange, "PAUSE", 0.0)
    strategy, ledger = finetune(60, 3), Ledger()
    sent = messages(strategy)
    asking = Exchange(Slow(Serving(3, drawn(3, 60)), silent=1), 0.2, Replies(tmp_path))
    passed = asking.ask(Question(read_update, 60), [seat(p) for p in range(3)], sent, ledger)
    assert [one.partition for one in passed] == [0, 2]
    assert [(bad.partition, bad.reason) for bad in ledger.rejected] == [(1, "no reply in time")]


class Stopping(InProcessGrid):
    """Stops with Ctrl-C instead of serving the `stop`-th train unit."""

    def __init__(self, stop: int = 0) -> None:
        super().__init__(4, 1)
        self.stop, self.units = stop, 0

    def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None = None) -> Iterable[Message]:
        asked = list(messages)
        if asked and asked[0].metadata.message_type == records.TRAIN:
            self.units += 1
            if self.units == self.stop:
                raise KeyboardInterrupt
        return super().send_and_receive(asked, timeout=timeout)


WORDS = ["federation.grid=inprocess", "train.local_epochs=1", "evaluate.split=val", "federation.cohort_size=1"]


def run(folder: Path, grid: InProcessGrid, *words: str) -> dict[str, Any]:
    config = configure.resolve("fcit-mini-short", [*WORDS, f"run.dir={folder}", *words])
    return RunFolder(launch.run(config, QUIET, grid)).summary


def test_int8_uploads_cost_a_quarter_and_a_run_resumes_to_the_same_bits(tmp_path: Path) -> None:
    """Stopped within a round: what the clients of kept replies remember is kept with these."""
    plain = run(tmp_path / "plain", Stopping())
    whole = run(tmp_path / "whole", Stopping(), "federation.upload=int8")
    assert plain["bytes_up"] >= 3.5 * whole["bytes_up"]
    assert whole["final_state_sha256"] != plain["final_state_sha256"]
    assert whole["rejected"] == {}
    with pytest.raises(Interrupted):
        run(tmp_path / "cut", Stopping(6), "federation.upload=int8")
    assert list((tmp_path / "cut").rglob("train-*.reply"))
    again = RunFolder(launch.resume(tmp_path / "cut", QUIET, Stopping())).summary
    for key in ("final_state_sha256", "bytes_up", "last", "avg"):
        assert again[key] == whole[key], key
    assert not list((tmp_path / "cut").rglob("*.reply"))


def test_what_rounding_left_behind_is_remembered_by_its_client_and_nobody_else(tmp_path: Path) -> None:
    grid = Stopping()
    run(tmp_path / "run", grid, "federation.upload=int8", "federation.rounds_per_stage=1")
    trained = {
        row["client"]
        for event in RunFolder(tmp_path / "run").events()
        if event["event"] == "round"
        for row in event["participants"]
    }
    kept = {p for p, node in grid.roster.items() if grid.state(node) is not None}
    assert kept == trained
    for partition in kept:
        state = grid.state(grid.roster[partition])
        assert isinstance(state, RecordDict)
        left = {n: a.numpy() for r in state.array_records.values() for n, a in r.items() if n.startswith("upload.")}
        assert left
        assert all(np.abs(values).max() > 0 for values in left.values())
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["status"] == "completed"
