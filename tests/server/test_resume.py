"""A run that was stopped goes on as if it had not been."""

import errno
import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
import yaml
from flwr.app import Message, RecordDict
from rich.console import Console
from safetensors.numpy import save

from fedstrata.core import durable, tracking
from fedstrata.core.errors import BadInput, FedstrataError, Interrupted
from fedstrata.server import checkpoint, configure, ending, launch, results
from fedstrata.server.arrivals import ArrivingRayGrid
from fedstrata.server.federation import Federation
from fedstrata.server.flower_private import become_server
from fedstrata.server.grids import InProcessGrid
from fedstrata.server.runfolder import RunFolder

QUIET = Console(quiet=True)
ADAM = "flwr.serverapp.strategy:FedAdam"
SAME = ("status", "final_state_sha256", "last", "avg", "routing_accuracy", "bytes_up", "bytes_down", "bytes_eval")
WORDS = ["federation.grid=inprocess", "train.local_epochs=1", "evaluate.split=val", "federation.rounds_per_stage=2"]


def config(folder: Path, *words: str) -> Any:
    return configure.resolve("fcit-mini-short", [*WORDS, f"run.dir={folder}", *words])


def final(folder: Path) -> dict[str, Any]:
    return dict(json.loads((folder / "summary.json").read_text()))


@pytest.mark.parametrize("strategy", ["disco", "oracle", "joint", ADAM, "flwr.serverapp.strategy:FedAvgM"])
def test_an_interrupted_run_resumes_to_the_same_bits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, strategy: str
) -> None:
    quiet = Console(quiet=True)
    momentum = ["strategy.arguments={server_momentum: 0.5}"] if strategy.endswith("FedAvgM") else []
    chosen = [f"strategy.name={strategy}", *momentum]
    whole = launch.run(config(tmp_path / "whole", *chosen), quiet)
    real = Federation._round

    def stop_in_stage_two(self: Federation, stage: int, round_: int) -> None:
        if (stage, round_) == (2, 2):
            raise KeyboardInterrupt
        real(self, stage, round_)

    with monkeypatch.context() as patch:
        patch.setattr(Federation, "_round", stop_in_stage_two)
        with pytest.raises(Interrupted, match="fedstrata resume"):
            launch.run(config(tmp_path / "cut", *chosen), quiet)
    assert final(tmp_path / "cut")["status"] == "interrupted"
    cut = launch.resume(tmp_path / "cut", quiet)
    for key in SAME:
        assert final(cut)[key] == final(whole)[key], key
    assert (cut / "matrix.json").read_text() == (whole / "matrix.json").read_text()
    with pytest.raises(BadInput, match="nothing to resume"):
        launch.resume(cut, quiet)


def test_a_run_that_skips_most_of_its_rounds_has_not_completed(tmp_path: Path) -> None:
    with pytest.raises(launch.FedstrataError, match="4 of 4 rounds were skipped"):
        launch.run(config(tmp_path / "run", "strategy.min_open=100000"), Console(quiet=True))
    assert final(tmp_path / "run")["status"] == "failed"
    assert final(tmp_path / "run")["skipped_rounds"] == 4


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that nobody disturbed; read only."""
    return launch.run(config(tmp_path_factory.mktemp("whole") / "run"), QUIET)


@pytest.fixture
def copy(whole: Path, tmp_path: Path) -> Path:
    """The same run, whose last commit is that of stage 2, round 1, as if it had been killed then."""
    folder = tmp_path / "copy"
    shutil.copytree(whole, folder)
    (folder / "summary.json").unlink()
    return folder


def same(folder: Path, whole: Path) -> None:
    for key in SAME:
        assert final(folder)[key] == final(whole)[key], key
    assert (folder / "matrix.json").read_text() == (whole / "matrix.json").read_text()
    for stage in range(3):
        name = f"predictions/stage-{stage}.jsonl"
        assert (folder / name).read_text() == (whole / name).read_text()
    told = [(e["event"], e.get("stage"), e.get("round")) for e in RunFolder(folder).events()]
    rounds = [at for at in told if at[0] in ("round", "stage_scored")]
    assert rounds == [at for at in told_of(whole) if at[0] in ("round", "stage_scored")]


def told_of(folder: Path) -> list[tuple[str, Any, Any]]:
    return [(e["event"], e.get("stage"), e.get("round")) for e in RunFolder(folder).events()]


class Counting(InProcessGrid):
    """Counts the messages it serves, by kind; stops with Ctrl-C instead of serving the `stop`-th train unit."""

    def __init__(self, stop: int = 0) -> None:
        super().__init__(4, 1)
        self.stop, self.units = stop, 0
        self.served: list[tuple[str, int]] = []

    def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None = None) -> Iterable[Message]:
        asked = list(messages)
        if asked and asked[0].metadata.message_type == "train":
            self.units += 1
            if self.units == self.stop:
                raise KeyboardInterrupt
        self.served += [(m.metadata.message_type, m.metadata.dst_node_id - 2) for m in asked]
        return super().send_and_receive(asked, timeout=timeout)


def kept(folder: Path) -> list[Path]:
    return sorted(folder.rglob("*.reply"))


def answered(files: Iterable[Path]) -> list[int]:
    """Whose replies the files hold."""
    heads = [json.loads(path.read_bytes().partition(b"\n")[0]) for path in files]
    return [asked["partition"] for head in heads for asked in head["asked"]]


@pytest.mark.parametrize("size", [1, 2])
def test_within_a_round_only_missing_cohorts_are_asked_again(tmp_path: Path, size: int) -> None:
    words = [f"federation.cohort_size={size}", "federation.clients_per_round=4", "federation.rounds_per_stage=1"]
    whole = launch.run(config(tmp_path / "whole", *words), QUIET, undisturbed := Counting())
    first = [client for kind, client in undisturbed.served if kind == "train"][:4]
    with pytest.raises(Interrupted):
        launch.run(config(tmp_path / "run", *words), QUIET, Counting(stop=2))
    trained = first[:size]
    folder = tmp_path / "run" / "checkpoints" / "round-1-1"
    assert answered(folder.glob("train-*.reply")) == trained
    assert len(answered(folder.glob("query.identify-*.reply"))) == 4
    if size == 2:  # what is there of it is not what was written
        (folder / f"train-{trained[0]}.reply").write_bytes(b"half a cohort")
    grid = Counting()
    launch.resume(tmp_path / "run", QUIET, grid)
    asked = [client for kind, client in grid.served if kind == "train"][: 4 if size == 2 else 3]
    assert asked == first[0 if size == 2 else 1 :]
    assert ("query.identify", first[0]) not in grid.served[: len(asked)]
    same(tmp_path / "run", whole)
    assert kept(tmp_path / "run") == []


@pytest.mark.parametrize("spoil", ["flip", "other", "cut"])
def test_a_kept_reply_that_does_not_fit_is_not_believed(tmp_path: Path, spoil: str) -> None:
    words = ["federation.cohort_size=1", "federation.rounds_per_stage=1"]
    whole = launch.run(config(tmp_path / "whole", *words), QUIET)
    with pytest.raises(Interrupted):
        launch.run(config(tmp_path / "run", *words), QUIET, Counting(stop=2))
    (path,) = (tmp_path / "run" / "checkpoints").glob("round-*/train-*.reply")
    line, _, data = path.read_bytes().partition(b"\n")
    if spoil == "flip":
        data = data[:-9] + bytes([data[-9] ^ 1]) + data[-8:]
    elif spoil == "cut":
        data = data[:-9]
    else:  # whole, but of another adapter
        head = json.loads(line)
        line = json.dumps({**head, "asked": [{**head["asked"][0], "asked": "0" * 64}]}, sort_keys=True).encode()
    path.write_bytes(line + b"\n" + data)
    grid = Counting()
    launch.resume(tmp_path / "run", QUIET, grid)
    same(tmp_path / "run", whole)
    assert [kind for kind, _ in grid.served].count("train") == 4  # two rounds of two clients: all were asked


def test_it_goes_on_with_other_actors_and_batches(copy: Path, whole: Path) -> None:
    checkpoint.drop_after(copy / "checkpoints", 4)
    launch.resume(copy, QUIET, words=["federation.actors=3", "evaluate.batch_size=7", "seed=0"])
    same(copy, whole)


@pytest.mark.parametrize(
    ("words", "named"),
    [
        (["seed=1"], "seed"),
        (["train.lr=0.5", "federation.actors=2", "lora.rank=2"], "lora.rank, train.lr"),
        (["federation.cohort_size=1"], "federation.cohort_size"),
        (["run.dir=elsewhere"], "run.dir"),
        (["strategy.tau=0.1"], "strategy.tau"),
    ],
)
def test_what_would_change_the_result_is_refused_by_its_keys(copy: Path, words: list[str], named: str) -> None:
    with pytest.raises(BadInput, match=f"^{named}: a resumed run may change only federation.actors, "):
        launch.resume(copy, QUIET, words=words)


def test_a_config_that_was_changed_since_is_refused_by_its_keys(copy: Path) -> None:
    tree = yaml.safe_load((copy / "config.yaml").read_text())
    tree["train"]["lr"], tree["federation"]["actors"] = 0.25, 7
    (copy / "config.yaml").write_text(yaml.safe_dump(tree))
    with pytest.raises(BadInput, match=r"config.yaml was changed since the run began: train.lr$"):
        launch.resume(copy, QUIET)


@pytest.mark.parametrize("stage", [1, 2])
def test_from_an_earlier_stage_on_it_ends_the_same(copy: Path, whole: Path, stage: int) -> None:
    shutil.copy(whole / "summary.json", copy)  # completed
    launch.resume(copy, QUIET, from_stage=stage)
    same(copy, whole)
    assert [e["stage"] for e in RunFolder(copy).events() if e["event"] == "resumed"] == [stage]


def test_going_back_drops_what_came_later_at_once(copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def stops(self: Federation, stage: int, round_: int) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(Federation, "_round", stops)
    with pytest.raises(Interrupted):
        launch.resume(copy, QUIET, from_stage=2)
    assert final(copy)["status"] == "interrupted"
    assert len(json.loads((copy / "matrix.json").read_text())["scores"]) == 2
    assert [path.name for path in sorted((copy / "predictions").iterdir())] == ["stage-0.jsonl", "stage-1.jsonl"]
    assert [e["stage"] for e in RunFolder(copy).events() if e["event"] == "stage_scored"] == [0, 1]
    assert max(path.stem for path in (copy / "checkpoints").glob("0*.json")) == "000004"


@pytest.mark.parametrize("stage", [4, 9])
def test_a_stage_that_has_not_begun_cannot_be_gone_back_to(copy: Path, stage: int) -> None:
    with pytest.raises(BadInput, match=f"--from-stage {stage}: .* holds no whole commit from which stage {stage}"):
        launch.resume(copy, QUIET, from_stage=stage)


def test_a_run_of_an_earlier_release_goes_on(copy: Path, whole: Path) -> None:
    folder = copy / "checkpoints"
    checkpoint.drop_after(folder, 4)
    at = checkpoint.newest(folder)
    assert at is not None
    data = save(dict(at.parts.tensors))
    old = {"norms", "strikes", "quarantine", "rejected"}
    progress = {key: value for key, value in at.progress.items() if key not in old}
    manifest = {"version": 1, "number": 4, "facts": at.parts.facts, "progress": progress, "keep": True}
    for path in folder.iterdir():
        path.unlink()
    (folder / "000004.safetensors").write_bytes(data)
    text = json.dumps({**manifest, "blob": hashlib.sha256(data).hexdigest()})
    (folder / "000004.json").write_text(text)
    launch.resume(copy, QUIET)
    assert final(copy)["final_state_sha256"] == final(whole)["final_state_sha256"]
    assert (copy / "matrix.json").read_text() == (whole / "matrix.json").read_text()


@pytest.mark.parametrize("what", ["base", "scenario"])
def test_another_base_or_scenario_than_the_commits_is_refused(
    copy: Path, monkeypatch: pytest.MonkeyPatch, what: str
) -> None:
    real = launch.Prepared.bound
    monkeypatch.setattr(launch.Prepared, "bound", lambda self: {**real(self), what: "other"})
    with pytest.raises(BadInput, match=f"the {what} is another than at the last commit: .* then, other now"):
        launch.resume(copy, QUIET)


def test_other_package_versions_than_the_commits_are_warned_of_by_name(
    copy: Path, whole: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoint.drop_after(copy / "checkpoints", 6)
    at, real = checkpoint.newest(copy / "checkpoints"), launch.Prepared.bound
    assert at is not None
    assert at.bound["versions"] == results.versions()
    assert {"flwr", "torch", "transformers", "peft", "ray", "numpy", "fedstrata", "python"} == set(at.bound["versions"])
    other = {**at.bound["versions"], "torch": "0.1"}
    monkeypatch.setattr(launch.Prepared, "bound", lambda self: {**real(self), "versions": other})
    console = Console(record=True, width=300)
    launch.resume(copy, console)
    same(copy, whole)
    then = f"torch {at.bound['versions']['torch']} then, 0.1 now"
    (told,) = [event for event in RunFolder(copy).events() if event["event"] == "other_versions"]
    assert told["packages"] == [then]
    assert f"warning: other versions than at the last commit, so bits may differ: {then}" in console.export_text()


def test_the_ray_grid_tells_its_listener_of_every_unit_that_is_finished() -> None:
    become_server()
    grid = ArrivingRayGrid.__new__(ArrivingRayGrid)  # without a Ray
    asked, came = Message(RecordDict(), 2, "train"), Message(RecordDict(), 3, "train")
    told: list[Any] = []
    grid.tell([asked], [came])  # nobody listens
    grid.arrived = lambda unit, replies: told.append((unit, replies))
    grid.tell([asked], [came])
    assert told == [([asked], [came])]


def damage(folder: Path, number: int) -> None:
    path = folder / "checkpoints" / f"{number:06d}.json"
    path.write_bytes(path.read_bytes().replace(b'"stage"', b'"stagf"'))


def test_a_damaged_newest_commit_costs_one_round_and_is_told(copy: Path, whole: Path) -> None:
    damage(copy, 7)
    console = Console(record=True, width=200)
    launch.resume(copy, console)
    same(copy, whole)
    (told,) = [event for event in RunFolder(copy).events() if event["event"] == "commit_damaged"]
    assert told["reason"].startswith("000007.json: ")
    assert told["used"] == 6
    assert "warning: a damaged commit was passed over: 000007.json" in console.export_text()


def test_more_than_one_damaged_commit_is_not_passed_over_in_silence(copy: Path, whole: Path) -> None:
    damage(copy, 7)
    damage(copy, 6)
    with pytest.raises(BadInput, match=r"more than the newest commit is damaged \(000007.*000006.*--from-stage K"):
        launch.resume(copy, QUIET)
    launch.resume(copy, QUIET, from_stage=2)
    same(copy, whole)


def test_a_run_stopped_between_its_last_commit_and_its_summary_ends_the_same(copy: Path, whole: Path) -> None:
    launch.resume(copy, QUIET)
    same(copy, whole)


def test_the_end_of_a_run_that_could_not_write_it_is_told_by_its_last_commit(copy: Path, whole: Path) -> None:
    ending.interrupted(copy)
    told, known = final(copy), final(whole)
    assert told.keys() == known.keys()
    commit = checkpoint.require_newest(copy)
    assert told["status"] == "interrupted"
    assert told["final_state_sha256"] == checkpoint.state_sha256(commit.parts) == known["final_state_sha256"]
    unknown = {"cohort_size", "subspaces", "adapter_rank", "cosine_between", "base", "text_encoder"}
    assert {key for key in told if told[key] != known[key]} - {"plan", "wall_seconds"} == {"status", *unknown}
    assert all(told[key] is None for key in unknown)
    assert RunFolder(copy).events()[-1]["event"] == "run_finished"
    same(launch.resume(copy, QUIET), whole)


def test_what_was_told_of_a_round_that_was_not_committed_is_told_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, whole: Path
) -> None:
    def stops(self: Federation, keep: bool = False) -> None:
        if self.progress.commits == 2:
            raise KeyboardInterrupt
        real(self, keep)

    real = Federation._commit
    with monkeypatch.context() as patch:
        patch.setattr(Federation, "_commit", stops)
        with pytest.raises(Interrupted):
            launch.run(config(tmp_path / "run"), QUIET)
    assert ("round", 1, 2) in told_of(tmp_path / "run")
    launch.resume(tmp_path / "run", QUIET)
    same(tmp_path / "run", whole)


SMALL = ["federation.rounds_per_stage=1", "federation.clients_per_round=1"]


def test_a_full_disk_at_any_file_is_one_clear_line_and_loses_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every file that a run writes does not fit when it is first written; there is room when it is resumed."""
    whole, folder = launch.run(config(tmp_path / "whole", *SMALL), QUIET), tmp_path / "run"
    real, refused = durable.put, list[str]()

    def full(file: Any, data: bytes) -> None:
        name = Path(file.name).name
        if name not in refused:
            refused.append(name)
            file.write(data[: len(data) // 2])
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), file.name)
        real(file, data)

    monkeypatch.setattr(durable, "put", full)
    before, told = 0, list[tuple[str, int, int]]()
    for _ in range(60):
        begun = (folder / "config.yaml").exists()
        try:
            launch.resume(folder, QUIET) if begun else launch.run(config(folder, *SMALL), QUIET)
        except FedstrataError as error:
            told.append((str(error), error.exit_code, 75 if (folder / "config.yaml").exists() else 1))
            commit = checkpoint.newest(folder / "checkpoints")
            assert (commit.number if commit else 0) >= before
            before = commit.number if commit else 0
            assert not list(folder.rglob(".*.tmp"))
        else:
            break
    assert len(refused) >= 20
    assert all("cannot be written: No space left on device" in text and code == want for text, code, want in told)
    same(folder, whole)


def test_events_that_do_not_fit_interrupt_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = tracking.JsonLines.event

    def full(self: tracking.JsonLines, name: str, /, **fields: Any) -> None:
        if name == "round":
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        real(self, name, **fields)

    with monkeypatch.context() as patch:
        patch.setattr(tracking.JsonLines, "event", full)
        with pytest.raises(Interrupted, match="No space left on device; the last commit stands; .*fedstrata resume"):
            launch.run(config(tmp_path / "run", *SMALL), QUIET)
    assert final(tmp_path / "run")["status"] == "interrupted"
    launch.resume(tmp_path / "run", QUIET)
    assert final(tmp_path / "run")["status"] == "completed"


def test_another_error_of_the_system_is_not_taken_for_a_full_disk(tmp_path: Path) -> None:
    with pytest.raises(ConnectionResetError), launch.storage(tmp_path):
        raise ConnectionResetError(errno.ECONNRESET, "reset")
    with pytest.raises(PermissionError), launch.storage(tmp_path / "run"):
        raise PermissionError(errno.EACCES, "Permission denied", str(tmp_path / "data" / "train.json"))
    with pytest.raises(FedstrataError, match="the run has not begun"), launch.storage(tmp_path / "run" / "here"):
        raise PermissionError(errno.EACCES, "Permission denied", str(tmp_path / "run"))


@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM"])
def test_a_signal_ends_a_run_that_can_go_on(tmp_path: Path, name: str) -> None:
    # a process started in the background of a shell ignores Ctrl-C, and its children inherit that
    heed = "import signal; signal.signal(signal.SIGINT, signal.default_int_handler)"
    code = f"{heed}; from fedstrata.server.cli import main; main()"
    words = ["run", "fcit-mini-short", *WORDS, f"run.dir={tmp_path / 'run'}"]
    with subprocess.Popen([sys.executable, "-c", code, *words], stdout=subprocess.PIPE, stderr=subprocess.PIPE) as run:
        while not list((tmp_path / "run" / "checkpoints").glob("*.json")):
            assert run.poll() is None, run.communicate()
            time.sleep(0.05)
        run.send_signal(getattr(signal, name))
        _, said = run.communicate(timeout=120)
    assert (run.returncode, final(tmp_path / "run")["status"]) == (75, "interrupted")
    assert b"fedstrata resume" in b"".join(said.split(b"\n"))
    assert final(launch.resume(tmp_path / "run", Console(quiet=True)))["status"] == "completed"
