"""The supervisor of a deployment's runs, against a Flower command line that answers from a script."""

import json
import re
import shlex
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives.serialization import load_ssh_public_key
from flwr.app import Message
from rich.console import Console
from typer.testing import CliRunner

from fedstrata.core import flowerapp, records
from fedstrata.core.errors import BadInput, FedstrataError
from fedstrata.server import (
    configure,
    deployflower,
    deploying,
    deploykeys,
    deploynodes,
    deployrun,
    preparing,
)
from fedstrata.server.deploycheck import dry_round
from fedstrata.server.deployflower import Flower, Place
from fedstrata.server.flower_private import NodeInfo, key_bytes
from fedstrata.server.rehearsal import rehearse

WORDS = ["strategy.name=finetune"]


class Script:
    """Answers `flwr …`: `ends` are the statuses with which the runs end, one after the other."""

    def __init__(self, ends: list[str], folder: Path) -> None:
        self.ends, self.folder = ends, folder
        self.asked: list[list[str]] = []
        self.runs: list[dict[str, Any]] = []
        self.nodes: list[NodeInfo] = []
        self.away = 0  # answers that fail from here on

    def __call__(self, words: list[str], home: Path) -> dict[str, Any]:
        self.asked.append(list(words))
        if self.away:
            self.away -= 1
            return {"success": False, "error-message": "Connection to the SuperLink is unavailable."}
        return {"success": True, **getattr(self, "_" + "_".join(word for word in words[:2] if word.isalpha()))(words)}

    def _ls(self, words: list[str]) -> dict[str, Any]:
        told = json.loads(json.dumps(self.runs))
        for run in self.runs:  # looked at once while it goes on, then it has ended
            run["status"] = run["end"]
            if run["end"] == "finished:completed":
                (self.folder / "summary.json").write_text('{"version": 1, "status": "completed"}')
        return {"runs": told}

    def _run(self, words: list[str]) -> dict[str, Any]:
        self.folder.mkdir(exist_ok=True)
        (self.folder / "config.yaml").write_text("seed: 0\n")
        run = {"run-id": str(len(self.runs)), "status": "running", "status-details": "", "end": self.ends.pop(0)}
        self.runs.append(run)
        return {"run-id": run["run-id"]}

    def _supernode_register(self, words: list[str]) -> dict[str, Any]:
        key = key_bytes(load_ssh_public_key(Path(words[2]).read_bytes()))  # type: ignore[arg-type]
        assert key not in [node.public_key for node in self.nodes]  # Flower's own rule, unregistered or not
        self.nodes.append(NodeInfo(node_id=100 + len(self.nodes), public_key=key, name=words[5], status="registered"))
        return {"node-id": str(self.nodes[-1].node_id)}

    def _supernode_unregister(self, words: list[str]) -> dict[str, Any]:
        (node,) = [node for node in self.nodes if str(node.node_id) == words[2] and node.status != "unregistered"]
        node.status = "unregistered"
        return {}

    def settings(self, address: str, authority: Path | None, run: int) -> dict[str, Any]:
        """With which run config a run was submitted."""
        words = self.submitted()[run]
        config = [words[at + 1].split("=", 1) for at, word in enumerate(words) if word == "--run-config"]
        return {key: json.loads(value) for key, value in config}

    def submitted(self) -> list[list[str]]:
        return [words for words in self.asked if words[0] == "run"]


@pytest.fixture
def place(tmp_path: Path) -> Place:
    return Place("127.0.0.1:1", None, tmp_path / "home")


@pytest.fixture(autouse=True)
def _no_waiting(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(deployrun.time, "sleep", lambda seconds: None)
    return


def script(monkeypatch: pytest.MonkeyPatch, folder: Path, *ends: str) -> Script:
    answers = Script(list(ends), folder)
    monkeypatch.setattr(deployflower, "_flwr", answers)
    monkeypatch.setattr(deployflower, "list_nodes", lambda *_: answers.nodes)
    monkeypatch.setattr(deployflower, "run_settings", answers.settings)
    return answers


def supervise(place: Place, folder: Path, attempts: int = 3) -> Path:
    words = [*WORDS, f"run.dir={folder}"]
    return deployrun.supervise(place, "fcit-mini-short", words, attempts, Console(quiet=True))


def test_a_run_that_flower_lost_is_submitted_again_on_the_same_run_folder(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, place: Place
) -> None:
    answers = script(monkeypatch, tmp_path / "run", "finished:failed", "finished:stopped", "finished:completed")
    assert supervise(place, tmp_path / "run") == tmp_path / "run"
    first, *others = answers.submitted()
    assert len(others) == 2
    assert all(other == first for other in others)  # the same words, folder and all; resume decides on the server
    assert "resume=true" in first


def test_it_gives_up_after_its_attempts_and_says_that_commits_stand(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, place: Place
) -> None:
    answers = script(monkeypatch, tmp_path / "run", "finished:failed", "finished:failed", "finished:completed")
    with pytest.raises(FedstrataError, match="not completed after 2 attempts; its commits stand"):
        supervise(place, tmp_path / "run", attempts=2)
    assert len(answers.submitted()) == 2


def test_a_finished_run_is_not_run_again(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, place: Place) -> None:
    answers = script(monkeypatch, tmp_path / "run", "finished:completed")
    supervise(place, tmp_path / "run")
    answers.asked.clear()
    supervise(place, tmp_path / "run")
    assert answers.asked == []


def test_a_run_that_is_going_on_is_watched_and_not_started_twice(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, place: Place
) -> None:
    answers = going_on(monkeypatch, place, tmp_path / "run", f"run.dir={tmp_path / 'run'}")
    supervise(place, tmp_path / "run")
    assert len(answers.submitted()) == 1


@pytest.mark.parametrize(
    ("words", "where"),
    [
        ("run.dir=/runs/other", "in /runs/other;"),
        ("seed=7 run.dir={}", "in {} with other words;"),
        ("run.dir=/runs/it's", "and names no run folder;"),  # words that are not ours
    ],
)
def test_another_run_that_is_going_on_is_named_and_not_watched_in_its_place(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, place: Place, words: str, where: str
) -> None:
    folder = tmp_path / "run"
    answers = going_on(monkeypatch, place, folder, f"run.dir={folder}")
    monkeypatch.setattr(deployflower, "run_settings", lambda *_: {"overrides": words.format(folder)})
    way = f"a deployment runs one at a time: wait for it, or end it with FLWR_HOME={place.home} flwr stop 0"
    with pytest.raises(FedstrataError, match=re.escape(f"Flower run 0 is going on {where.format(folder)} {way}")):
        supervise(place, folder)
    assert len(answers.submitted()) == 1


def going_on(monkeypatch: pytest.MonkeyPatch, place: Place, folder: Path, *words: str) -> Script:
    """A deployment in which a run with these words was submitted before; it is looked at three times, then it ends."""
    answers = script(monkeypatch, folder, "finished:completed")
    every = [*deployrun.defaults("fcit-mini-short", WORDS), *WORDS, *words]
    deployrun.submit(Flower(place), deployrun.settings(place, "fcit-mini-short", every, "resume"))
    looks, ls = iter(["running", "running", "running", "finished:completed", ""]), answers._ls
    monkeypatch.setattr(answers, "_ls", lambda words: (answers.runs[0].update(end=next(looks)), ls(words))[1])
    return answers


def test_what_the_server_calls_bad_input_is_not_tried_again(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, place: Place
) -> None:
    answers = script(monkeypatch, tmp_path / "run", "finished:failed", "finished:completed")
    submit = answers._run

    def refused(words: list[str]) -> dict[str, Any]:
        told = submit(words)
        answers.runs[-1]["status-details"] = "ServerApp failed with exception: bad input: FEDSTRATA_NODES: must name"
        return told

    monkeypatch.setattr(answers, "_run", refused)
    with pytest.raises(BadInput, match="^FEDSTRATA_NODES: must name"):
        supervise(place, tmp_path / "run")
    assert len(answers.submitted()) == 1


def test_a_superlink_that_is_away_for_a_while_is_waited_for(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, place: Place
) -> None:
    answers = script(monkeypatch, tmp_path / "run", "finished:completed")
    answers.away = 5
    supervise(place, tmp_path / "run")
    assert len(answers.submitted()) == 1


def test_a_superlink_that_never_answers_is_told_with_the_reason(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, place: Place
) -> None:
    answers = script(monkeypatch, tmp_path / "run")
    answers.away = 10**9
    with pytest.raises(FedstrataError, match=r"127.0.0.1:1: no SuperLink answers in 0 s: .*is unavailable"):
        deployrun.reach(Flower(place), Console(quiet=True), wait=0)


@pytest.mark.parametrize("folder", ["", "here", "/"])
def test_a_run_folder_that_later_attempts_could_not_find_is_bad_input(place: Place, folder: str) -> None:
    with pytest.raises(BadInput, match="run.dir: must be an absolute path"):
        deployrun.supervise(place, "fcit-mini-short", [f"run.dir={folder}"], 3, Console(quiet=True))


def test_a_deployment_clips_asks_for_fifty_instructions_and_waits_a_quarter_hour_unless_told_otherwise() -> None:
    loud, late = "federation.clip=median", "federation.timeout=900"
    assert deployrun.defaults("", []) == ["strategy.token_min_samples=50", loud, late]
    assert deployrun.defaults("", ["strategy.name=finetune"]) == [loud, late]
    assert deployrun.defaults("", ["strategy.token_min_samples=1", "federation.clip=off"]) == [late]
    assert deployrun.defaults("", ["strategy.name=finetune", "federation.timeout=3600"]) == [loud]
    assert deployrun.defaults("", ["strategy.name=finetune", "federation.timeout=60"]) == [loud]


def test_what_a_file_says_is_not_overridden_by_what_a_deployment_does_otherwise(tmp_path: Path) -> None:
    file = tmp_path / "scenario.yaml"
    tasks = "tasks: {a: {held: clients}}\nstages: [[a]]\n"
    said = "{strategy: {token_min_samples: 1}, federation: {clip: off, timeout: 3600}}"
    file.write_text(f"{tasks}defaults: {said}\n")
    assert deployrun.defaults(str(file), []) == []
    file.write_text(f"{tasks}defaults: {{federation: {{clients: 8}}}}\n")
    assert len(deployrun.defaults(str(file), [])) == 3


def test_words_survive_the_way_through_two_quotings(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, place: Place
) -> None:
    answers = script(monkeypatch, tmp_path / "a 'run'", "finished:completed")
    supervise(place, tmp_path / "a 'run'")
    (sent,) = [word for word in answers.submitted()[0] if word.startswith("overrides=")]
    assert shlex.split(json.loads(sent.removeprefix("overrides=")))[-1] == f"run.dir={tmp_path / 'a '}'run'"


def test_every_key_but_the_present_ones_is_shut_out_whoever_registered_it(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    deploykeys.make(tmp_path / "keys", 2)
    deploykeys.make(tmp_path / "strangers", 1)
    flower = Flower(Place("127.0.0.1:1", tmp_path / "keys" / "server", tmp_path / "home"))
    answers = script(monkeypatch, tmp_path / "run")
    flower.register(tmp_path / "strangers" / "client-0" / "node.pub", "by hand")
    flower.register(tmp_path / "keys" / "client-0" / "node.pub", "by hand, too")
    rule = "shut out, its key is not in nodes/"
    assert deploynodes.register(flower) == [f"by hand: {rule}", "client-1: registered"]
    assert deploynodes.register(flower) == []
    deploykeys.make(tmp_path / "keys", 2, rotate="client-1")
    assert deploynodes.register(flower) == [f"client-1: {rule}", "client-1: registered"]
    assert [node.status for node in answers.nodes] == ["unregistered", "registered", "unregistered", "registered"]
    assert [name for name, _ in deploynodes.named(flower.nodes(), flower.place)] == ["client-0", "client-1"]


def test_a_key_that_was_shut_out_before_is_told_with_the_way_out(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Flower takes no key twice, and would let a deployment wait for a client that it refuses."""
    deploykeys.make(tmp_path / "keys", 4)
    flower = Flower(Place("127.0.0.1:1", tmp_path / "keys" / "server", tmp_path / "home"))
    answers = script(monkeypatch, tmp_path / "run")
    deploynodes.register(flower)
    flower.unregister(103)
    with pytest.raises(BadInput, match=r"takes no key again that was unregistered, client-3: `(.*)`") as told:
        deploynodes.register(flower)
    hinted = str(told.value).split("`")[1].replace("KEYS", str(tmp_path / "keys"))
    assert CliRunner().invoke(deploying.deploy, shlex.split(hinted)[2:]).exit_code == 0
    assert deploynodes.register(flower) == ["client-3: registered"]
    assert len(answers.nodes) == 5


def test_what_flower_answers_is_json_or_one_clear_line(tmp_path: Path) -> None:
    (tmp_path / "home").mkdir()
    flower = Flower(Place("127.0.0.1:9", None, tmp_path / "home"))
    with pytest.raises(FedstrataError, match=r"flwr ls: \S+"):
        flower.runs()


@pytest.mark.filterwarnings("ignore:GitWildMatchPattern:DeprecationWarning")  # Flower's own
def test_the_submitted_app_has_no_code_and_always_the_same_bytes(tmp_path: Path) -> None:
    one, other = (flowerapp.write(tmp_path / name) for name in ("one", "other"))
    assert [path.name for path in one.iterdir()] == ["pyproject.toml"]
    assert flowerapp.bundle_hash(one) == flowerapp.bundle_hash(other)
    (other / "evil.py").write_text("print(1)\n")
    assert flowerapp.bundle_hash(one) != flowerapp.bundle_hash(other)


def test_the_submitted_app_names_the_repositorys_own_components() -> None:
    import tomllib

    ours = tomllib.loads((Path(__file__).resolve().parents[2] / "pyproject.toml").read_text())["tool"]["flwr"]["app"]
    theirs = tomllib.loads(flowerapp.text())["tool"]["flwr"]["app"]
    assert (theirs["components"], theirs["config"]) == (ours["components"], ours["config"])


def test_a_dry_round_trains_with_every_client_and_says_who_did_not(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, place: Place
) -> None:
    words = ["federation.grid=inprocess", "train.local_epochs=1", "strategy.name=finetune", "evaluate.shard=50"]
    answers = script(monkeypatch, tmp_path / "unused", "finished:completed")
    dry = tmp_path / "dry"

    def start(asked: list[str]) -> dict[str, Any]:
        """What the ServerApp does with rehearse=true; client 2 is silent."""
        assert "rehearse=true" in asked
        config = configure.resolve("fcit-mini-short", [*words, f"run.dir={dry}"])
        grid = preparing.open_grid(config)
        send = grid.send_and_receive

        def lossy(messages: Iterable[Message], *, timeout: float | None = None) -> list[Message]:
            sent = [message for message in messages if message.metadata.message_type != "train" or lost(message)]
            return list(send(sent, timeout=timeout))

        def lost(message: Message) -> bool:
            return records.binding(message).partition != 2

        monkeypatch.setattr(grid, "send_and_receive", lossy)
        try:
            rehearse(config, grid, Console(quiet=True))
        finally:
            grid.close()
        return Script._run(answers, asked)

    monkeypatch.setattr(answers, "_run", start)
    flower = Flower(place)
    found = {each.what: each for each in dry_round(flower, "fcit-mini-short", words, dry, Console(quiet=True))}
    assert {name: each.good for name, each in found.items()} == {
        "client-0": True,
        "client-1": True,
        "client-2": False,
        "client-3": True,
    }
    assert "instructions, loss" in found["client-0"].why
    assert not (dry / "config.yaml").exists()  # no run's folder: nothing that could be resumed
