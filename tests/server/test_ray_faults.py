"""What RayGrid does when actors hang, cannot start, or strangers knock; on a Ray of this module."""

import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from flwr.app import ConfigRecord, Message, RecordDict

from fedstrata.core import records
from fedstrata.core.errors import BadInput, FedstrataError, Interrupted
from fedstrata.server import cli, raygrid, raystart
from fedstrata.server.arrivals import ArrivingRayGrid
from fedstrata.server.grids import FIRST_NODE
from fedstrata.server.placement import Wanted

ray = raygrid.ray
JOIN = "from fedstrata.server.raystart import start_ray; start_ray(1, {!r}); print('joined')"
ANOTHER = "127.0.0.1:1"  # where no cluster is
KNOCK = "import ray; ray.init(address={!r}, log_to_driver=False); print('joined')"


@pytest.fixture(scope="module")
def started(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A Ray of our own, whose workers find echo_app.py and dying_app.py; its address."""
    ray.shutdown()
    folder = tmp_path_factory.mktemp("apps")
    (folder / "dying_app.py").write_text("import os\nos._exit(1)\n")
    with pytest.MonkeyPatch.context() as patch:
        folders = [str(Path(__file__).parent), str(folder), os.environ.get("PYTHONPATH", "")]
        patch.setenv("PYTHONPATH", os.pathsep.join(folders))
        with pytest.MonkeyPatch.context() as another:
            another.setenv("RAY_ADDRESS", ANOTHER)
            raystart.start_ray(2)
        yield ray.get_runtime_context().gcs_address
        raystart.stop_ray()


@pytest.fixture
def grid(started: str) -> Iterator[ArrivingRayGrid]:
    made = ArrivingRayGrid(4, 1, Wanted(local=2), cohort_timeout=2.0, client_app="echo_app:app")
    while made.crew.coming:
        made.crew.arrive(ray.wait(list(made.crew.coming))[0][0])
    yield made
    made.crew.close()


def message(folder: Path, partition: int, word: str, wait: float = 0.0) -> Message:
    say = ConfigRecord({"word": word, "wait": wait, "folder": str(folder)})
    return Message(RecordDict({"say": say}), partition + FIRST_NODE, records.TRAIN)


def told(grid: ArrivingRayGrid) -> list[tuple[str, bool]]:
    """(request, whether it ended in an error) of every unit, filled as they arrive."""
    seen: list[tuple[str, bool]] = []
    grid.arrived = lambda asked, came: seen.append((asked[0].metadata.message_id, came[0].has_error()))
    return seen


def test_a_cohort_that_hangs_is_served_again_by_another_actor(grid: ArrivingRayGrid, tmp_path: Path) -> None:
    seen, before = told(grid), set(grid.crew.nodes)
    sent = [message(tmp_path, 0, "hangs once"), message(tmp_path, 1, "quick")]
    replies = list(grid.send_and_receive(sent))
    assert [reply.content.config_records["said"]["word"] for reply in replies] == ["hangs once", "quick"]
    assert len(list(tmp_path.glob("hangs once-*"))) == 2
    assert [name for name, _ in seen] == [sent[1].metadata.message_id, sent[0].metadata.message_id]
    assert len(before & set(grid.crew.nodes)) == 1


def test_a_cohort_that_always_hangs_ends_as_an_error_that_names_the_setting(
    grid: ArrivingRayGrid, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(raygrid, "TRIES", 2)
    seen, grid.cohort_timeout = told(grid), 0.5
    sent = [message(tmp_path, 0, "slow", wait=600), message(tmp_path, 1, "quick")]
    slow, quick = grid.send_and_receive(sent)
    assert slow.error.reason == "it took longer than federation.cohort_timeout = 0.5 s 2 times"
    assert not quick.has_error()
    assert sorted(seen) == sorted([(sent[0].metadata.message_id, True), (sent[1].metadata.message_id, False)])


def served_by(grid: ArrivingRayGrid) -> list[int]:
    """The actors' process ids."""
    return [int(ray.get(actor.__ray_call__.remote(lambda worker: os.getpid()))) for actor in grid.crew.free]


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP])
def test_an_actor_that_was_killed_or_stopped_costs_no_reply(
    grid: ArrivingRayGrid, tmp_path: Path, number: signal.Signals
) -> None:
    pids = served_by(grid)
    assert len(set(pids)) == 2
    os.kill(pids[0], number)
    for again in range(2):
        replies = list(grid.send_and_receive([message(tmp_path, p, f"{again} {p}") for p in range(4)]))
        assert [r.content.config_records["said"]["word"] for r in replies] == [f"{again} {p}" for p in range(4)]


def test_a_dead_raylet_interrupts_the_run_with_the_reason(
    grid: ArrivingRayGrid, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    ended = subprocess.Popen(["false"])
    assert ended.wait() == 1
    raystart._watch(ended)
    assert capfd.readouterr().err.startswith("Ray's raylet has died; the last commit stands: ")
    with monkeypatch.context() as patch:
        patch.setattr(raystart, "_raylets", lambda: [ended])
        with pytest.raises(Interrupted, match=r"^Ray's raylet has died \(exit code 1\)$"):
            list(grid.send_and_receive([message(tmp_path, 0, "hello")]))
    assert not list(tmp_path.iterdir())
    assert raystart.death() == ""


@pytest.mark.parametrize("left", [True, False])
def test_where_a_dead_ray_was_left_behind_the_process_ends_at_once(monkeypatch: pytest.MonkeyPatch, left: bool) -> None:
    ended: list[int] = []
    monkeypatch.setattr(os, "_exit", ended.append)
    monkeypatch.setattr(raystart, "ABANDONED", threading.Event())
    if left:
        raystart.ABANDONED.set()
    with pytest.raises(SystemExit, match="^75$"):  # reached since this `_exit` comes back
        cli.end(75)
    assert ended == ([75] if left else [])


@pytest.mark.parametrize("failures", [1, 2])
def test_a_ray_that_does_not_come_up_is_started_once_more_and_then_told(
    monkeypatch: pytest.MonkeyPatch, failures: int
) -> None:
    starts: list[int] = []

    def init(num_cpus: int, **_: Any) -> None:
        starts.append(num_cpus)
        if len(starts) <= failures:
            raise Exception("The current node timed out during startup.")

    monkeypatch.setattr(raystart.ray, "init", init)
    monkeypatch.setattr(raystart.ray, "shutdown", lambda: None)
    monkeypatch.setattr(raystart.ray, "is_initialized", lambda: False)
    monkeypatch.setattr(raystart, "get_authentication_mode", lambda: raystart.AuthenticationMode.TOKEN)
    for name, value in {"_raylets": list, "_read_again": lambda: None}.items():
        monkeypatch.setattr(raystart, name, value)  # the module's own Ray goes on
    if failures == 1:
        raystart.start_ray(3)
    else:
        with pytest.raises(FedstrataError, match="^Ray does not start on this machine: The current node timed out"):
            raystart.start_ray(3)
    assert starts == [3, 3]


def test_after_bad_input_the_other_actors_work_is_not_taken_for_the_next_exchanges(
    grid: ArrivingRayGrid, tmp_path: Path
) -> None:
    with pytest.raises(BadInput):
        list(grid.send_and_receive([message(tmp_path, 0, "old", wait=0.5), message(tmp_path, 1, "refuse")]))
    replies = grid.send_and_receive([message(tmp_path, p, f"new {p}") for p in range(3)])
    assert [reply.content.config_records["said"]["word"] for reply in replies] == ["new 0", "new 1", "new 2"]


@pytest.mark.parametrize(
    ("app", "reason"),
    [
        ("no_such_package.app:app", "ModuleNotFoundError: No module named 'no_such_package'"),
        ("echo_app:nothing", "AttributeError: module 'echo_app' has no attribute 'nothing'"),
    ],
)
def test_an_actor_that_cannot_start_says_why(started: str, tmp_path: Path, app: str, reason: str) -> None:
    grid = ArrivingRayGrid(4, 1, Wanted(local=1), client_app=app)
    try:
        with pytest.raises(FedstrataError, match=rf"^an actor cannot start on \S+: {reason}$"):
            list(grid.send_and_receive([message(tmp_path, 0, "hello")]))
    finally:
        grid.crew.close()


def test_actors_that_die_while_they_start_end_the_run(started: str, tmp_path: Path) -> None:
    grid = ArrivingRayGrid(4, 1, Wanted(local=1), client_app="dying_app:app")
    try:
        with pytest.raises(FedstrataError, match="^3 actors in a row died while they started: "):
            list(grid.send_and_receive([message(tmp_path, 0, "hello")]))
    finally:
        grid.crew.close()


def outsider(code: str, **environment: str) -> "subprocess.CompletedProcess[str]":
    """Another process of this machine, with these settings of Ray's."""
    mine = {key: value for key, value in os.environ.items() if not key.startswith("RAY_AUTH")}
    mine |= {"RAY_NUM_REDIS_GET_RETRIES": "1", "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0", **environment}
    return subprocess.run([sys.executable, "-c", code], env=mine, capture_output=True, text=True, timeout=60)


def test_a_ray_of_ours_answers_nobody_without_its_token(started: str) -> None:
    for environment in ({}, {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": "f" * 64}):
        ended = outsider(KNOCK.format(started), **environment)
        assert ended.returncode == 1
        assert "joined" not in ended.stdout
        assert "Authentication token is missing or incorrect" in ended.stderr


def test_a_ray_of_ours_is_our_own_whatever_cluster_the_environment_names(started: str) -> None:
    assert started != ANOTHER
    assert len(ray.nodes()) == 1


def test_who_may_not_join_is_told_what_to_set(started: str) -> None:
    ended = outsider(JOIN.format(started))
    assert ended.returncode == 1
    (last,) = ended.stderr.strip().splitlines()[-1:]
    assert f"BadInput: federation.ray_address: {started} refused us: InvalidAuthToken" in last
    assert last.endswith("set RAY_AUTH_MODE=token and the cluster's token (RAY_AUTH_TOKEN, RAY_AUTH_TOKEN_PATH, "
                         "~/.ray/auth_token)")  # fmt: skip


def test_the_token_is_a_secret_of_rays_processes(started: str) -> None:
    token = ray.get(ray.remote(lambda: os.environ["RAY_AUTH_TOKEN"]).options(num_cpus=0).remote())
    assert len(token) == 64
    assert token not in os.environ.values()
    session = Path(ray._private.worker._global_node.get_session_dir_path())
    files: list[Path] = [path for path in session.rglob("*") if path.is_file()]
    assert files
    assert not [path for path in files if token.encode() in path.read_bytes()]
    commands: Any = [path.read_bytes() for path in Path("/proc").glob("[0-9]*/cmdline") if path.exists()]
    assert not [command for command in commands if token.encode() in command]
