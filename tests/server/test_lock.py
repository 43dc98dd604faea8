"""One process at a time writes a run folder."""

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from rich.console import Console

from fedstrata.core.errors import BadInput, FedstrataError
from fedstrata.server import configure, launch
from fedstrata.server.runfolder import locked, unused

HOLD = """
import sys
from pathlib import Path
from fedstrata.server.runfolder import locked
with locked(Path(sys.argv[1])):
    print("held", flush=True)
    sys.stdin.read()
"""


@contextmanager
def held(folder: Path) -> Iterator[subprocess.Popen[str]]:
    """Another process that holds the folder's lock."""
    words = [sys.executable, "-c", HOLD, str(folder)]
    with subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "held\n"
        try:
            yield process
        finally:
            process.kill()


def test_a_second_process_is_refused_and_told_who_writes(tmp_path: Path) -> None:
    with (
        held(tmp_path) as process,
        pytest.raises(BadInput, match=f"{tmp_path}: is being written by process {process.pid}$"),
        locked(tmp_path),
    ):
        pytest.fail("got the lock")


def test_the_lock_ends_with_its_process_however_it_ends(tmp_path: Path) -> None:
    with held(tmp_path) as process:
        process.kill()
        process.wait()
    with locked(tmp_path):
        assert (tmp_path / "checkpoints" / "lock").read_text() == str(os.getpid())


def test_the_lock_can_be_taken_again(tmp_path: Path) -> None:
    for _ in range(2):
        with locked(tmp_path):
            pass


def test_a_run_that_is_being_written_is_not_resumed_and_not_touched(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    folder.mkdir()
    config = configure.resolve("fcit-mini-short", ["federation.grid=inprocess", f"run.dir={folder}"])
    (folder / "config.yaml").write_text(f"seed: {config.seed}\nstrategy: {{name: disco}}\n")
    with held(folder), pytest.raises(BadInput, match="is being written by process"):
        launch.resume(folder, Console(quiet=True))
    assert sorted(path.name for path in folder.iterdir()) == ["checkpoints", "config.yaml"]


def test_a_new_run_does_not_start_in_a_folder_that_another_is_about_to_use(tmp_path: Path) -> None:
    config = configure.resolve("fcit-mini-short", ["federation.grid=inprocess", f"run.dir={tmp_path}"])
    with held(tmp_path), pytest.raises(BadInput, match="is being written by process"):
        launch.run(config, Console(quiet=True))
    assert not (tmp_path / "config.yaml").exists()


def test_what_a_run_leaves_that_never_began_does_not_hold_the_folder(tmp_path: Path) -> None:
    assert unused(tmp_path)
    with locked(tmp_path):
        (tmp_path / ".config.yaml.tmp").write_text("seed")
    assert unused(tmp_path)
    (tmp_path / "checkpoints" / "other").touch()
    assert not unused(tmp_path)


def test_a_folder_that_cannot_be_written_is_one_clear_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(*arguments: object) -> int:
        raise PermissionError(13, "Permission denied", str(tmp_path))

    monkeypatch.setattr("fedstrata.server.runfolder.os.open", refused)
    refusal = pytest.raises(FedstrataError, match="cannot be written: Permission denied")
    with refusal, launch.storage(tmp_path), locked(tmp_path):
        pytest.fail("got the lock")
