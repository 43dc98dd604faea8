"""Privacy in whole runs: who is not asked, what is listed, what the server adds, and what it has cost so far."""

import json
import math
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from flwr.app import Message, RecordDict
from rich.console import Console

from fedstrata.core import privacy as arithmetic
from fedstrata.core import records
from fedstrata.core.adapters import Flat, Layout
from fedstrata.core.config import FederationSection, RunConfig
from fedstrata.core.errors import BadInput, FedstrataError, Interrupted
from fedstrata.core.identity import Token
from fedstrata.core.metrics import AccuracyMatrix
from fedstrata.core.records import Binding, TrainReply
from fedstrata.core.streaming import distance
from fedstrata.server import checkpoint, configure, launch, noise, privacy
from fedstrata.server.clipping import Updates
from fedstrata.server.federation import Federation
from fedstrata.server.flower_private import become_server
from fedstrata.server.gate import Update
from fedstrata.server.intake import Passed
from fedstrata.server.participation import participants, visits
from fedstrata.server.progress import Progress
from fedstrata.server.runfolder import RunFolder
from fedstrata.strategies.base import Participant, Setup
from fedstrata.strategies.disco import Disco, DiscoConfig
from fedstrata.strategies.finetune import Finetune, FinetuneConfig

QUIET = Console(quiet=True)
WORDS = ["federation.grid=inprocess", "train.local_epochs=1", "evaluate.split=val", "federation.rounds_per_stage=2"]
NOISY = ["strategy.token_noise=0.3", "federation.update_clip=0.2", "federation.update_noise=0.01"]


def config(folder: Path, *words: str) -> RunConfig:
    return configure.resolve("fcit-mini-short", [*WORDS, f"run.dir={folder}", *words])


def summary(folder: Path) -> dict[str, Any]:
    return dict(json.loads((folder / "summary.json").read_text()))


def events(folder: Path, name: str) -> list[Any]:
    return [event for event in RunFolder(folder).events() if event["event"] == name]


def sent(folder: Path) -> dict[str, Counter[int]]:
    """By the events: how often each client's token was asked for with new data, and its update used."""
    rounds = events(folder, "round")
    updates = Counter(row["client"] for told in rounds for row in told["participants"])
    tokens = {(told["stage"], row["client"]) for told in rounds for row in told["participants"]}
    return {"updates": updates, "tokens": Counter(client for _, client in tokens)}


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return launch.run(config(tmp_path_factory.mktemp("plain") / "run"), QUIET)


@pytest.fixture(scope="module")
def noisy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return launch.run(config(tmp_path_factory.mktemp("noisy") / "run", *NOISY), QUIET)


def test_strength_zero_is_the_plain_run_bit_for_bit(plain: Path, tmp_path: Path) -> None:
    nothing = ["strategy.token_min_samples=1", "strategy.token_noise=0", "federation.update_noise=0"]
    for number, words in enumerate([nothing, ["federation.update_clip=1e9"]]):  # no update is that long
        run = launch.run(config(tmp_path / str(number), *words), QUIET)
        assert summary(run)["final_state_sha256"] == summary(plain)["final_state_sha256"]
    told = summary(plain)
    assert (told["epsilon_token"], told["epsilon_update"], told["too_few"]) == (None, None, [])
    assert "psilon" not in (plain / "report.html").read_text().split("<h2>Accuracy", 1)[0]


def test_noise_changes_the_state_and_equal_runs_have_equal_bits(plain: Path, noisy: Path, tmp_path: Path) -> None:
    again = launch.run(config(tmp_path / "again", *NOISY), QUIET)
    assert summary(again)["final_state_sha256"] == summary(noisy)["final_state_sha256"]
    assert summary(noisy)["final_state_sha256"] != summary(plain)["final_state_sha256"]


def test_epsilon_is_that_of_the_client_with_most_releases(noisy: Path) -> None:
    told, counts = summary(noisy), sent(noisy)
    assert told["epsilon_token"] == pytest.approx(arithmetic.epsilon(0.3, max(counts["tokens"].values()), 1e-5))
    assert told["epsilon_update"] == pytest.approx(arithmetic.epsilon(0.01, max(counts["updates"].values()), 1e-5))
    progress = checkpoint.require_newest(noisy).progress
    assert Counter({int(c): n for c, n in progress["updates_sent"].items()}) == counts["updates"]
    assert Counter({int(c): n for c, n in progress["tokens_sent"].items()}) == counts["tokens"]
    assert (
        f"epsilon of a client&#39;s tokens, at most {told['epsilon_token']:.3g}" in (noisy / "report.html").read_text()
    )


def test_what_was_released_survives_a_crash(noisy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = Federation._train

    def stop_with_tokens_told(self: Federation, seats: Any, messages: Any, ledger: Any) -> Any:
        if (self.progress.stage, self.progress.round) == (2, 1):
            raise KeyboardInterrupt
        return real(self, seats, messages, ledger)

    with monkeypatch.context() as patch:
        patch.setattr(Federation, "_train", stop_with_tokens_told)
        with pytest.raises(Interrupted):
            launch.run(config(tmp_path / "cut", *NOISY), QUIET)
    halfway = summary(tmp_path / "cut")
    cut = launch.resume(tmp_path / "cut", QUIET)
    assert halfway["epsilon_update"] <= summary(cut)["epsilon_update"]
    for key in ("final_state_sha256", "epsilon_token", "epsilon_update", "last"):
        assert summary(cut)[key] == summary(noisy)[key]
    ledgers = [checkpoint.require_newest(run).progress for run in (cut, noisy)]
    for name in ("tokens_sent", "updates_sent"):
        assert ledgers[0][name] == ledgers[1][name]


@pytest.fixture(scope="module")
def sizes(plain: Path) -> dict[int, dict[int, int]]:
    """stage → client → instructions."""
    found: dict[int, dict[int, int]] = {1: {}, 2: {}}
    scenario = launch.prepare(config(Path("unused"))).scenario
    for stage in found:
        found[stage] = {c: scenario.share_size([stage - 1], c) for c in range(4)}
    return found


def test_clients_with_too_few_instructions_are_not_asked_and_are_listed(
    sizes: dict[int, dict[int, int]], tmp_path: Path
) -> None:
    least = sorted(sizes[1].values())[1] + 1  # two of four are too small in stage 1
    small = {stage: {c for c, n in held.items() if n < least} for stage, held in sizes.items()}
    run = launch.run(config(tmp_path / "run", f"strategy.token_min_samples={least}"), QUIET)
    for told in events(run, "round"):
        assert not {row["client"] for row in told["participants"]} & small[told["stage"]]
        there = 4 - len(small[told["stage"]])
        assert len(told["participants"]) == min(2, there)  # nobody's place stays empty while others could take it
    listed = {(told["stage"], told["round"]): set(told["clients"]) for told in events(run, "too_few_instructions")}
    assert listed == {(stage, round_): small[stage] for stage in (1, 2) for round_ in (1, 2) if small[stage]}
    everybody = sorted(small[1] | small[2])
    assert summary(run)["too_few"] == everybody
    line = f"too few instructions for a token: clients {', '.join(map(str, everybody))}"
    assert line in (run / "report.html").read_text()
    assert line in privacy.lines(summary(run))
    assert events(run, "rejected") == events(run, "quarantined") == []


def test_a_client_that_wants_more_refuses_and_is_listed_not_punished(
    sizes: dict[int, dict[int, int]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    least = sorted(sizes[1].values())[1] + 1
    small = {stage: {c for c, n in held.items() if n < least} for stage, held in sizes.items()}
    monkeypatch.setenv(arithmetic.LEAST, str(least))
    words = ["federation.clients_per_round=4", "federation.rounds_per_stage=4", "federation.max_failures=0"]
    run = launch.run(config(tmp_path / "run", *words), QUIET)
    for told in events(run, "round"):
        assert {row["client"] for row in told["participants"]} == set(range(4)) - small[told["stage"]]
    assert summary(run)["too_few"] == sorted(small[1] | small[2])
    assert events(run, "rejected") == events(run, "quarantined") == []
    progress = checkpoint.require_newest(run).progress
    told = {int(client): count for client, count in progress["tokens_sent"].items()}
    assert told == {c: n for c in range(4) if (n := sum(c not in small[stage] for stage in (1, 2)))}


def test_the_plan_counts_nobody_who_will_not_be_asked() -> None:
    run = config(Path("unused"), "strategy.token_min_samples=40", "federation.clients_per_round=4")
    scenario = launch.prepare(run).scenario
    for stage in (1, 2):
        there = {visit.client for visit in visits(run, scenario, stage)}
        assert there == {c for c in range(4) if scenario.share_size([stage - 1], c) >= 40}
        assert not there & set(privacy.too_few(run, scenario, stage, 1))
        assert there == set(participants(run, scenario, stage, 1))


def test_a_method_without_tokens_has_no_limit() -> None:
    run = config(Path("unused"), "strategy.name=oracle", "strategy.token_min_samples=1000")
    assert privacy.least(run) == 1
    assert privacy.epsilons(replace(run, strategy=DiscoConfig(name="oracle", token_noise=1.0)), empty()) == {
        "epsilon_token": None,
        "epsilon_update": None,
    }


def empty() -> Progress:
    return Progress(AccuracyMatrix((), (), ()))


# the server's noise, by hand


LAYOUT = Layout((("layer", 1, 2),))


def reply(partition: int, values: Flat, count: int, round_: int = 1) -> Passed[Update]:
    request = Message(RecordDict(), partition + 2, records.TRAIN)
    told = TrainReply(Binding("", 1, round_, partition), values, count, 0.5, 1, 0.1)
    message = records.train_reply(told, request)
    return Passed(
        partition, Update(replace(told, flat=np.empty(0, np.float32)), distance(values, START)), lambda: message
    )


SETUP = Setup(seed=0, layout=LAYOUT, rank=1, subspaces=1, tau=0.9, epsilon=0.05)
START = np.array([1, 2, 3], dtype=np.float32)
MOVES = {0: [3, 0, 0], 1: [0, 0.1, 0], 2: [0, 0, -5], 3: [0, 4, 3]}


def updates(moves: dict[int, list[float]], round_: int = 1) -> Updates:
    passed = [reply(c, START + np.array(m, dtype=np.float32), 10 + 90 * c, round_) for c, m in moves.items()]
    return Updates(passed, dict.fromkeys(moves, START))


def finetune(clients: int) -> Finetune:
    strategy = Finetune(FinetuneConfig(subspaces=1), SETUP)
    strategy.meet([Participant(c + 2, c) for c in range(clients)])
    return strategy


def disco(groups: dict[int, list[float]]) -> Disco:
    """A subspace per direction; the clients hold 10 + 90·c instructions."""
    strategy = Disco(DiscoConfig(), SETUP)
    tokens = {c: Token(np.array(value, dtype=np.float32), 10 + 90 * c) for c, value in groups.items()}
    strategy.meet([Participant(c + 2, c, token) for c, token in tokens.items()])
    return strategy


@pytest.fixture(autouse=True)
def _server() -> None:
    become_server()


def section(clip: float, z: float = 0.0) -> FederationSection:
    return FederationSection(update_clip=clip, update_noise=z)


def test_every_update_is_clipped_to_the_bound_and_short_ones_stay() -> None:
    given = updates(MOVES)
    moved = [records.read_train_reply(m).flat - START for m in noise.guarded(given, finetune(4), section(1.0), b"")]
    expected = [[1, 0, 0], [0, 0.1, 0], [0, 0, -1], [0, 0.8, 0.6]]
    assert np.array(moved) == pytest.approx(np.array(expected), abs=1e-6)
    counts = [records.read_train_reply(m).count for m in noise.guarded(given, finetune(4), section(1.0), b"")]
    assert counts == [10, 100, 190, 280]  # without noise all keep their weights


def test_with_noise_all_weigh_the_same_and_the_mean_has_the_promised_spread() -> None:
    drawn, clip, z = [], 1.0, 0.5
    for number in range(400):
        strategy = finetune(4)
        strategy.aggregate_train(1, noise.guarded(updates(MOVES), strategy, section(clip, z), str(number).encode()))
        drawn.append(strategy.state.adapter - START)
    middle = np.array([1, 0.9, -0.4]) / 4  # by hand: the mean of the clipped moves, nobody's count in it
    wanted = z * clip / 4
    error = 5 * wanted / math.sqrt(len(drawn))
    assert np.mean(drawn, axis=0) == pytest.approx(middle, abs=error)
    assert np.std(drawn, axis=0) == pytest.approx(wanted, rel=5 / math.sqrt(2 * len(drawn)))


def test_every_subspace_has_its_own_noise_by_its_own_number_of_clients() -> None:
    groups = {0: [1.0, 0.0], 1: [0.0, 1.0], 2: [0.0, 1.0], 3: [0.0, 1.0]}
    found: dict[int, list[Flat]] = {0: [], 1: []}
    for number in range(300):
        strategy = disco(groups)
        strategy.aggregate_train(1, noise.guarded(updates(MOVES), strategy, section(1.0, 1.0), str(number).encode()))
        assert len(strategy.state.subspaces) == 2
        for subspace in found:
            found[subspace].append(strategy.state.subspaces[subspace].adapter - START)
    tolerance = 5 / math.sqrt(2 * 300 * 3)
    assert np.std(np.array(found[0]) - [1, 0, 0]) == pytest.approx(1.0, rel=tolerance)
    assert np.std(np.array(found[1]) - np.array([0, 0.9, -0.4]) / 3) == pytest.approx(1 / 3, rel=tolerance)
    strategy = disco(groups)
    strategy.aggregate_train(1, noise.guarded(updates(MOVES), strategy, section(1.0, 1.0), b"x"))
    assert [s.token.count for s in strategy.state.subspaces] == [10, 570]  # tokens keep their counts


def test_the_tails_noise_is_that_of_one_mean_over_everybody() -> None:
    made = noise.Noise(b"k", (1, 1), {0: 2.0}, tail=50_000, shared=0.5)
    flat = np.zeros(200_000, dtype=np.float32)
    made.add(flat, 0)
    assert flat[:150_000].std() == pytest.approx(2.0, rel=0.02)
    assert flat[150_000:].std() == pytest.approx(0.5, rel=0.02)
    for lag in (1, noise.STEP):  # blocks are drawn one after the other, none twice
        assert abs(np.corrcoef(flat[: 150_000 - lag], flat[lag:150_000])[0, 1]) < 0.02


def test_noise_is_a_function_of_key_stage_round_and_client() -> None:
    def one(key: bytes, round_: int = 1, client: int = 0) -> bytes:
        given = updates({client: [0.1, 0, 0]}, round_)
        (message,) = noise.guarded(given, finetune(1), section(1.0, 1.0), key)
        return records.read_train_reply(message).flat.tobytes()

    assert one(b"a") == one(b"a")
    assert len({one(b"a"), one(b"b"), one(b"a", round_=2), one(b"a", client=1)}) == 4


def test_a_deployed_server_draws_from_a_secret_that_is_committed() -> None:
    told = RunConfig(seed=3, federation=section(1.0, 1.0))
    assert noise.keyed(told, empty()).noise_key == ""
    assert noise.key_of(told, empty()) == b"3"
    deployed = replace(told, federation=replace(told.federation, grid="flower"))
    progress = noise.keyed(deployed, empty())
    assert len(noise.key_of(deployed, progress)) == 32
    assert noise.key_of(deployed, progress) != noise.key_of(deployed, noise.keyed(deployed, empty()))
    back = Progress.from_json(json.loads(json.dumps(progress.to_json())))
    assert noise.key_of(deployed, noise.keyed(deployed, back)) == noise.key_of(deployed, progress)


@pytest.mark.parametrize(
    ("name", "more"),
    [
        ("flwr.serverapp.strategy:FedMedian", []),
        ("flwr.serverapp.strategy:MultiKrum", []),
        ("flwr.serverapp.strategy:FedAvg", ["strategy.arguments={weighted_by_key: loss}"]),
        ("finetune", ["strategy.merge=median"]),
        ("disco", ["strategy.server_optimizer=fedadam"]),
    ],
)
def test_noise_is_refused_where_it_would_not_be_a_means(name: str, more: list[str]) -> None:
    words = [f"strategy.name={name}", "federation.update_clip=1", "federation.update_noise=1", *more]
    with pytest.raises(BadInput, match=r"federation.update_noise: must be 0 with strategy.name=.*does not average"):
        noise.check(config(Path("unused"), *words))
    noise.check(config(Path("unused"), words[0], words[1], *more))  # a bound alone goes with everything


@pytest.mark.parametrize("name", ["finetune", "disco", "fedprox", "olora", "flwr.serverapp.strategy:FedAdam"])
def test_noise_goes_with_every_method_that_averages(name: str) -> None:
    words = [f"strategy.name={name}", "federation.update_clip=1", "federation.update_noise=1"]
    noise.check(config(Path("unused"), *words))


def test_what_travels_beside_the_adapter_is_not_covered_and_is_refused(tmp_path: Path) -> None:
    words = ["strategy.name=scaffold", "federation.update_clip=1", "federation.update_noise=1"]
    with pytest.raises(BadInput, match=r"federation.update_noise: does not cover what clients send beside"):
        launch.run(config(tmp_path / "run", *words), QUIET)


def test_updates_that_cannot_be_measured_are_not_let_through() -> None:
    given = updates(MOVES)
    lost = replace(given.passed[2], value=replace(given.passed[2].value, norm=None))
    with pytest.raises(FedstrataError, match=r"clients \[2\] were sent no adapter"):
        noise.guarded(replace(given, passed=[*given.passed[:2], lost]), finetune(4), section(1.0), b"")


def test_a_bound_from_others_updates_does_not_reject_beside_noise(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The gate's limit is a median of earlier norms: with noise, no client's update may decide on another's."""
    monkeypatch.setattr(Progress, "limit", lambda self, subspace: 1e-9)
    words = ["federation.update_clip=0.2", "federation.update_noise=0.01"]
    run = launch.run(config(tmp_path / "run", *words), QUIET)
    assert events(run, "rejected") == []
