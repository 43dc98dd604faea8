"""Laws that every method of the catalogue obeys; what differs between methods is what each declares in its `facts`.

Server halves are driven by made-up replies in the embedded base's layout; whole runs are two stages of one round.
"""

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from flwr.app import ArrayRecord, ConfigRecord, Message
from rich.console import Console

from fedstrata.core import codec, records
from fedstrata.core.config import RunConfig
from fedstrata.core.identity import Token
from fedstrata.core.privacy import token_options
from fedstrata.core.records import Binding, Knowledge, TrainReply
from fedstrata.server import checkpoint, configure, export, launch, preparing
from fedstrata.server.methods import upload_bytes
from fedstrata.strategies import STRATEGIES
from fedstrata.strategies.base import Inputs, Participant, Parts, Strategy

SCENARIO = """
tasks:
  names: {generate: fcit-mini/names, train: 12, val: 2, test: 2}
  charts: {generate: fcit-mini/charts, train: 12, val: 2, test: 2}
stages: STAGES
partition: {kind: dirichlet, beta: 1.0, min_size: 3}
defaults:
  federation: {clients: 2, clients_per_round: 2, rounds_per_stage: 1, grid: inprocess}
  train: {lr: 1.0e-3, batch_size: 4, local_epochs: 1}
  evaluate: {split: val}
"""
STAGES = {1: "[[names]]", 2: "[[names], [charts]]"}
COUNTS = (4, 8, 6)  # of the participants in a made-up round
DIM = 8  # of a made-up token
DRAWS = 3  # replies that differ; in the split round the last participant is the third one's second half


@pytest.mark.parametrize("name", STRATEGIES)
def test_it_declares_its_own_facts(name: str) -> None:
    assert "facts" in vars(STRATEGIES[name]), f"{name}: give the class `facts` (strategies/facts.py)"


# server halves, driven by made-up replies


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Mapping[int, Path]:
    """Stages → a scenario file with so many."""
    folder = tmp_path_factory.mktemp("laws")
    paths = {number: folder / f"stages-{number}.yaml" for number in STAGES}
    for number, path in paths.items():
        path.write_text(SCENARIO.replace("STAGES", STAGES[number]), encoding="utf-8")
    return paths


def config(path: Path, name: str, options: Mapping[str, Any], *words: str) -> RunConfig:
    told = [f"strategy.{key}={json.dumps(value)}" for key, value in options.items()]
    return configure.resolve(str(path), [f"strategy.name={name}", *told, *words])


@dataclass
class Driver:
    """One method's server half."""

    prepared: preparing.Prepared

    def new(self) -> Strategy:
        return self.prepared.strategy()

    def stage(self, strategy: Strategy, number: int, order: Sequence[int] = (), halves: bool = False) -> None:
        """One round of a new task; its replies come in `order`, or the last client's data lies on two."""
        counts = (*COUNTS[:-1], COUNTS[-1] // 2, COUNTS[-1] // 2) if halves else COUNTS
        strategy.begin_stage(number)
        messages = self.asked(strategy, number, counts)
        replies = [self.reply(strategy, message, number, counts) for message in messages]
        strategy.aggregate_train(number, [replies[place] for place in order or range(len(replies))])
        strategy.end_stage(number)

    def asked(self, strategy: Strategy, number: int, counts: Sequence[int] = COUNTS) -> list[Message]:
        strategy.meet([self.participant(strategy, number, p, count) for p, count in enumerate(counts)])
        return list(strategy.configure_train(number, ArrayRecord(), ConfigRecord(), None))  # type: ignore[arg-type]

    def participant(self, strategy: Strategy, number: int, partition: int, count: int) -> Participant:
        """Tokens of different stages are orthogonal; nobody gets what the method does not ask for."""
        value = np.eye(DIM, dtype=np.float32)[number]
        token = Token(value, count) if strategy.needs_tokens else None
        tasks = (number - 1,) if strategy.uses_task_identity else None
        return Participant(partition + 2, partition, token, tasks)

    def reply(self, strategy: Strategy, message: Message, number: int, counts: Sequence[int]) -> Message:
        partition = message.metadata.dst_node_id - 2
        draw = np.random.default_rng([number, min(partition, DRAWS - 1)])
        sent = message.content.array_records[records.ARRAYS][records.FLAT].numpy()
        flat = sent + draw.normal(size=sent.shape).astype(np.float32)
        extra = {name: draw.normal(size=shape).astype(np.float32) for name, shape in strategy.extras().items()}
        at = Binding("", number, 1, partition)
        return records.train_reply(TrainReply(at, flat, counts[partition], 1.0, 3, 0.1, extra=extra), message)


@pytest.fixture(scope="module")
def drivers(files: Mapping[int, Path]) -> Iterator[Callable[[str], Driver]]:
    """Each method is prepared once."""
    torch.set_num_threads(1)
    done: dict[str, Driver] = {}

    def of(name: str) -> Driver:
        if name not in done:
            done[name] = Driver(preparing.prepare(config(files[2], name, {})))
        return done[name]

    yield of
    for driver in done.values():
        driver.prepared.close()


@pytest.fixture
def driver(drivers: Callable[[str], Driver], name: str) -> Driver:
    return drivers(name)


def numbers(parts: Parts) -> dict[str, np.ndarray]:
    """The arrays of a state."""
    return {key: np.asarray(value) for key, value in parts.tensors.items()}


def assert_equal(one: Knowledge, other: Knowledge) -> None:
    assert [adapter.tobytes() for adapter in one.adapters] == [adapter.tobytes() for adapter in other.adapters]
    assert one.shared.tobytes() == other.shared.tobytes()


def arithmetic(parts: Parts) -> dict[str, object]:
    """The facts of a state without the names of those who are in it, which a client that is split changes."""
    return {key: value for key, value in parts.facts.items() if key != "folded"}


def assert_near(one: Parts, other: Parts) -> None:
    """Equal but for the last bits that another order of summing costs."""
    assert arithmetic(one) == arithmetic(other)
    assert one.tensors.keys() == other.tensors.keys()
    for key, value in numbers(one).items():
        assert np.allclose(value, other.tensors[key], rtol=1e-4, atol=1e-5), key


@pytest.mark.parametrize("name", STRATEGIES)
def test_the_order_of_replies_does_not_matter(driver: Driver) -> None:
    one, other = driver.new(), driver.new()
    for number in (1, 2):
        driver.stage(one, number)
        driver.stage(other, number, order=(2, 0, 1))
    assert_near(one.save(), other.save())


@pytest.mark.parametrize("name", [name for name, kind in STRATEGIES.items() if kind.facts.splits])
def test_a_client_counts_as_much_as_the_same_data_on_two(driver: Driver) -> None:
    whole, halves = driver.new(), driver.new()
    for number in (1, 2):
        driver.stage(whole, number)
        driver.stage(halves, number, halves=True)
    assert_near(whole.save(), halves.save())


@pytest.mark.parametrize("name", STRATEGIES)
def test_what_is_saved_and_loaded_answers_and_goes_on_as_before(driver: Driver) -> None:
    one, again = driver.new(), driver.new()
    for number in (1, 2):
        driver.stage(one, number)
        parts = one.save()
        again.load(Parts(dict(numbers(parts)), json.loads(json.dumps(parts.facts))))
        assert checkpoint.state_sha256(again.save()) == checkpoint.state_sha256(parts)
        known, loaded = one.knowledge(), again.knowledge()
        assert_equal(known, loaded)
        assert loaded.options == known.options
        draw = np.random.default_rng(0)
        wide = int(known.options.get("key", DIM))  # prompts' keys are as long as the text encoder's features
        asked = Inputs(draw.normal(size=(4, wide)).astype(np.float32), [0, 1, 1, 0], "abcd")
        assert type(again).router(loaded).weights(asked).tobytes() == type(one).router(known).weights(asked).tobytes()
    driver.stage(one, 3)
    driver.stage(again, 3)
    assert checkpoint.state_sha256(again.save()) == checkpoint.state_sha256(one.save())


@pytest.mark.parametrize("name", STRATEGIES)
def test_a_new_task_adds_what_the_method_says_and_no_more(driver: Driver, name: str) -> None:
    strategy, sizes = driver.new(), []
    for number in (1, 2, 3, 4):
        driver.stage(strategy, number)
        sizes.append(sum(value.size for value in numbers(strategy.save()).values()))
    one = driver.prepared.layout.lora.size(strategy.adapter_rank) + (DIM if strategy.needs_tokens else 0)
    assert [after - before for before, after in pairwise(sizes[1:])] == [strategy.facts.grows * one] * 2


@pytest.mark.parametrize("name", [name for name, kind in STRATEGIES.items() if kind.facts.grows])
def test_training_a_new_task_leaves_every_number_of_the_others_as_it_is(driver: Driver) -> None:
    strategy = driver.new()
    driver.stage(strategy, 1)
    before = every(strategy)
    for number in (2, 3):
        driver.stage(strategy, number)
        assert before <= every(strategy)


def every(strategy: Strategy) -> set[float]:
    """All numbers of a state, wherever they are kept: a method may stack its adapters."""
    return {number for value in numbers(strategy.save()).values() for number in np.unique(value).tolist()}


# whole runs


@pytest.fixture(scope="module")
def outcome(files: Mapping[int, Path], tmp_path_factory: pytest.TempPathFactory) -> Any:
    """(method, options, stages) → its run folder; each is run once, without a report."""
    done: dict[str, Path] = {}

    def run(name: str, options: Mapping[str, Any], stages: int = 2, *words: str) -> Path:
        key = repr((name, sorted(options.items()), stages, words))
        if key not in done:
            torch.set_num_threads(1)
            folder = tmp_path_factory.mktemp("runs") / "run"
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(launch, "write_report", lambda _: None)
                done[key] = launch.run(
                    config(files[stages], name, options, f"run.dir={folder}", *words), Console(quiet=True)
                )
        return done[key]

    return run


@pytest.mark.parametrize("name", [name for name, kind in STRATEGIES.items() if kind.facts.plain is not None])
def test_at_strength_zero_it_is_the_plain_run_bit_for_bit(outcome: Any, name: str) -> None:
    facts = STRATEGIES[name].facts
    stages = 1 if facts.one_stage else 2
    runs = [outcome(name, facts.neutral, stages), outcome("finetune", facts.plain, stages)]
    assert_equal(*(export.read_knowledge(folder)[1] for folder in runs))


@pytest.mark.parametrize("name", STRATEGIES)
def test_it_sends_and_gets_the_bytes_that_were_computed(outcome: Any, driver: Driver, name: str) -> None:
    """By the plan of the whole run, and by the table's figure of one client-round: two clients, two stages."""
    summary = json.loads((outcome(name, {}) / "summary.json").read_text(encoding="utf-8"))
    assert summary["status"] == "completed"
    for what in ("bytes_up", "bytes_down", "bytes_eval"):
        assert summary["plan"][what]["planned"] == summary[what] > 0, what
    token = codec.nbytes(token_options(driver.prepared.config.strategy).token_upload, driver.prepared.description.dim)
    sent = sum(2 * (upload_bytes(driver.new(), stage, 1) + token) for stage in (1, 2))
    assert summary["bytes_up"] == sent
