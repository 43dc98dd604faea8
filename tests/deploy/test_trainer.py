"""The resident trainer and the shim before it: restarted, tried again once, ended when it hangs, and nobody else's."""

import os
import sys
import threading
from collections.abc import Iterator
from dataclasses import replace
from multiprocessing import AuthenticationError
from pathlib import Path

import numpy as np
import pytest
from flwr.app import ConfigRecord, Context, Message, RecordDict

from fedstrata.client import keep, line, shim
from fedstrata.client.keep import Keep
from fedstrata.core import records, signing
from fedstrata.core.errors import BadInput, FedstrataError
from fedstrata.core.records import Assignment, Binding
from fedstrata.server import deploykeys
from fedstrata.server.flower_private import become_server, set_message_id
from fedstrata.server.node import write_secret
from fedstrata.server.supervise import Child, Job, alive, tend

ODD = Path(__file__).with_name("odd_trainer.py")


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A trainer that is kept running; a message may take three seconds."""
    monkeypatch.setenv(line.LIMIT, "3")
    write_secret(line.token_of(line.address(tmp_path)))
    job = Job("trainer", [sys.executable, str(ODD), str(tmp_path), "3"], dict(os.environ), tmp_path / "log")
    stop = threading.Event()
    keeper = threading.Thread(target=tend, args=([Child(job)], stop, lambda child, code: None, lambda: None))
    keeper.start()
    yield tmp_path
    stop.set()
    keeper.join()


def ask(home: Path, what: str) -> Message:
    become_server()
    message = Message(RecordDict({"do": ConfigRecord({"what": what})}), 1, records.TRAIN)
    context = Context(1, 1, {}, RecordDict({"kept": ConfigRecord({"a": 1})}), {})
    reply = shim.forward(line.address(home), message, context)
    assert context.state.config_records["kept"]["a"] == 1
    return reply


def test_a_trainer_is_started_again_and_its_message_tried_once_more_but_not_for_ever(home: Path) -> None:
    first = ask(home, "live").content.config_records["who"]["pid"]
    assert ask(home, "live").content.config_records["who"]["pid"] == first  # it stays
    token = line.token_of(line.address(home))
    right = token.read_text()
    token.write_text("another token")
    with pytest.raises(AuthenticationError):
        ask(home, "live")
    token.write_text(right)
    assert ask(home, "die once").content.config_records["who"]["pid"] != first
    with pytest.raises(FedstrataError, match="the trainer died 2 times over this message"):
        ask(home, "die")
    with pytest.raises(FedstrataError, match="the trainer took longer than 3 s and was ended"):
        ask(home, "hang")
    assert "Timeout" in (home / "log").read_text()  # where it hung


def test_the_shims_own_error_is_signed_as_the_clients(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """There is no trainer, and it is not waited for."""
    deploykeys.make(tmp_path, 2)
    monkeypatch.setenv(line.CERTS, str(tmp_path / "client-1"))
    monkeypatch.setenv(line.TRAINER, str(tmp_path / "trainer.sock"))
    monkeypatch.setattr(shim, "PATIENCE", 0.0)
    write_secret(line.token_of(tmp_path / "trainer.sock"))
    become_server()
    message = records.address(Message(RecordDict(), 7, records.TRAIN), Assignment(AT, config="{}"))
    set_message_id(message.metadata, "m1")
    reply = shim.app(message, Context(1, 7, {"partition-id": 1}, RecordDict(), {}))
    keys = signing.public_keys(tmp_path / "server" / "nodes")
    assert signing.verify(reply, replace(AT, partition=1), keys)
    assert reply.error.reason == "no trainer came within 0 s; its log says why"


def test_the_socket_and_its_token_are_the_owners_alone(tmp_path: Path) -> None:
    write_secret(tmp_path / "token")
    assert (tmp_path / "token").stat().st_mode & 0o777 == 0o600
    assert len((tmp_path / "token").read_text()) == 64
    with pytest.raises(BadInput, match="FEDSTRATA_HOME: must be a path of at most 87 characters"):
        line.address(Path("/" + "x" * 100))


def test_the_shim_loads_neither_torch_nor_a_base_model() -> None:
    import subprocess

    asked = "import sys, fedstrata.client.shim; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", asked], text=True, capture_output=True, check=True)
    assert done.stdout.strip() == "False"


def test_a_child_dies_with_the_process_that_started_it(tmp_path: Path) -> None:
    import subprocess
    import time

    script = (
        "import sys, time; from pathlib import Path; from fedstrata.server.supervise import Child, Job\n"
        f"child = Child(Job('a', ['sleep', '60'], {{'PATH': '/usr/bin:/bin'}}, Path({str(tmp_path / 'log')!r})))\n"
        "child.tend(lambda *_: None); print(child.pid, flush=True); time.sleep(60)"
    )
    with subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True) as parent:
        assert parent.stdout is not None
        pid = int(parent.stdout.readline())
        assert alive(pid)
        parent.kill()
    deadline = time.monotonic() + 10
    while _running(pid) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not _running(pid)


def _running(pid: int) -> bool:
    """A dead one that nobody waited for is not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except FileNotFoundError:
        return False


AT = Binding("a1", 1, 1, 0)


def state(value: float) -> RecordDict:
    return RecordDict({"memory": records.arrays(a=np.array([value], dtype=np.float32))})


def value(found: RecordDict) -> float | None:
    return float(found.array_records["memory"]["a"].numpy()[0]) if found else None


def test_a_round_that_is_asked_for_again_finds_what_it_found_the_first_time(tmp_path: Path) -> None:
    keep = Keep(tmp_path)
    assert value(keep.load(AT)) is None
    for round_ in (1, 2, 3):
        keep.store(replace(AT, round=round_), state(round_))
    assert value(Keep(tmp_path).load(replace(AT, round=4))) == 3  # another process
    assert value(keep.load(replace(AT, round=3))) == 2  # the server resumed before round 3 …
    assert value(keep.load(replace(AT, round=4))) == 2  # … whose memory is gone until it is trained again
    assert value(keep.load(AT)) is None  # a new run of the same config
    assert value(keep.load(replace(AT, round=9))) is None


def test_memories_of_the_last_runs_stay_and_older_ones_go(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(keep, "RUNS", 3)
    kept, runs = Keep(tmp_path), ["a1", "b2", "c3", "d4"]
    kept.secret(RecordDict({"noise": ConfigRecord({"key": b"k"})}))
    for number, run in enumerate(runs):
        kept.store(Binding(run, 1, 1, 0), state(number))
        os.utime(tmp_path / "memory" / f"{run}-0", ns=(number, number))
    assert [value(kept.load(Binding(run, 1, 2, 0))) for run in runs] == [None, 1, 2, 3]
    kept.store(Binding("b2", 1, 2, 0), state(9))  # an earlier run goes on: it is now the latest
    (tmp_path / "memory" / ".f6-0").mkdir()  # what was left when the process was killed over it
    kept.store(Binding("e5", 1, 1, 0), state(4))
    assert [value(kept.load(Binding(run, 1, 3, 0))) for run in [*runs, "e5"]] == [None, 9, None, 3, 4]
    assert sorted(path.name for path in (tmp_path / "memory").iterdir()) == ["b2-0", "d4-0", "e5-0", "own"]


def test_memories_of_clients_and_runs_are_apart_and_old_ones_go(tmp_path: Path) -> None:
    keep = Keep(tmp_path)
    for stage in (1, 2):
        for round_ in (1, 2, 3, 4):
            keep.store(Binding("a1", stage, round_, 0), state(10 * stage + round_))
    assert value(keep.load(Binding("a1", 2, 5, 1))) is None
    assert value(keep.load(Binding("b2", 2, 5, 0))) is None
    assert sorted(path.name for path in (tmp_path / "memory" / "a1-0").iterdir()) == ["1-4", "2-3", "2-4"]
    assert value(keep.load(Binding("a1", 2, 1, 0))) == 14  # `resume --from-stage 2`


@pytest.mark.parametrize(
    "at",
    [
        *[Binding(run, 1, 1, 0) for run in ("../../victim", "", "a/b", "A1", "run", "a1\n", "a" * 65)],
        Binding("a1", "../../../victim", 1, 0),  # type: ignore[arg-type]
        Binding("a1", 1, "1/../../victim", 0),  # type: ignore[arg-type]
    ],
)
def test_a_message_cannot_name_a_place_outside_the_memory(tmp_path: Path, at: Binding) -> None:
    for use in (lambda keep: keep.store(at, state(1)), lambda keep: keep.load(at)):
        with pytest.raises(BadInput, match="message: must be of a run named by 1 to 64 hex digits"):
            use(Keep(tmp_path / "home" / "inner"))
    assert not any(tmp_path.iterdir())


def test_what_is_the_clients_own_stays_whatever_the_run(tmp_path: Path) -> None:
    assert not Keep(tmp_path).secret()
    Keep(tmp_path).secret(RecordDict({"noise": ConfigRecord({"key": b"k" * 32})}))
    assert Keep(tmp_path).secret().config_records["noise"]["key"] == b"k" * 32
    assert (tmp_path / "memory" / "own").stat().st_mode & 0o777 == 0o600
