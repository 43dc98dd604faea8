"""The command above a run tells how it ended, whatever ended it."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import yaml

from fedstrata.core import config as configuration
from fedstrata.server import configure, guard, supervise

HEAD = """
import os, signal, subprocess, sys, time
from fedstrata.server import cli, guard

@cli.cli.command()
def work(folder: str) -> None:
    {body}

signal.signal(signal.SIGINT, signal.default_int_handler)
cli.end(cli.code(guarded=True))
"""
WAIT = "print(os.getpid(), flush=True); time.sleep(60)"


def command(folder: Path, *lines: str) -> "subprocess.Popen[str]":
    """A command whose run does these lines."""
    code = HEAD.format(body="\n    ".join(lines))
    pipe = subprocess.PIPE
    return subprocess.Popen([sys.executable, "-c", code, "work", str(folder)], stdout=pipe, stderr=pipe, text=True)


def ended(process: "subprocess.Popen[str]") -> tuple[int, str, str]:
    out, err = process.communicate(timeout=60)
    return process.returncode, out, err


def gone(pid: int) -> bool:
    for _ in range(100):
        if not supervise.alive(pid):
            return True
        time.sleep(0.05)
    return False


@pytest.fixture
def begun(tmp_path: Path) -> Path:
    """A run folder without a commit."""
    folder = tmp_path / "run"
    folder.mkdir()
    tree = configuration.to_dict(configure.resolve("fcit-mini-short", [f"run.dir={folder}"]))
    (folder / "config.yaml").write_text(yaml.safe_dump(tree))
    return folder


@pytest.mark.parametrize(
    ("lines", "said"),
    [
        (["os._exit(1)"], "the run's process ended without a word (exit code 1), as by Ray or for lack of memory"),
        (["guard.tell(reason='Ray is dead')", "os.kill(os.getpid(), 9)"], "Ray is dead"),
    ],
)
def test_a_run_that_ends_without_a_word_is_interrupted_and_told(begun: Path, lines: list[str], said: str) -> None:
    code, _, err = ended(command(begun, "guard.tell(folder=folder)", *lines))
    assert code == 75
    (line,) = err.splitlines()
    assert line.startswith(f"failed: {said}")
    assert line.endswith(f"; the last commit stands; to go on from it: fedstrata resume {begun}")
    summary = json.loads((begun / "summary.json").read_text())
    assert (summary["status"], summary["seed"], summary["last"]) == ("interrupted", 0, None)
    assert (begun / "report.html").exists()


def test_what_ends_before_it_has_a_folder_has_failed(tmp_path: Path) -> None:
    code, _, err = ended(command(tmp_path / "none", "os.kill(os.getpid(), 9)"))
    assert (code, "ended without a word (signal 9)" in err, "the run has not begun" in err) == (1, True, True)
    assert not (tmp_path / "none").exists()


def test_a_folder_that_cannot_be_read_is_told_beside_the_end(tmp_path: Path) -> None:
    code, _, err = ended(command(tmp_path / "none", "guard.tell(folder=folder)", "os._exit(1)"))
    assert (code, "summary.json could not be written" in err) == (75, True)
    assert not (tmp_path / "none").exists()


@pytest.mark.parametrize(("line", "code"), [("pass", 0), ("raise SystemExit(5)", 5), ("1 / 0", 1)])
def test_the_code_that_a_run_told_stands_whatever_its_process_ends_with(tmp_path: Path, line: str, code: int) -> None:
    late = "import atexit; atexit.register(os._exit, 9)"  # as a dead Ray would
    assert ended(command(tmp_path, late, line))[0] == code


def test_nothing_of_a_run_outlives_its_command(tmp_path: Path) -> None:
    sleeper = "subprocess.Popen(['sleep', '600'], start_new_session=True)"
    code, out, _ = ended(command(tmp_path, f"print({sleeper}.pid, flush=True)", "os._exit(1)"))
    assert code == 1
    assert gone(int(out))


def test_a_run_dies_with_its_command(tmp_path: Path) -> None:
    process = command(tmp_path, WAIT)
    assert process.stdout is not None
    run = int(process.stdout.readline())
    assert run != process.pid
    process.kill()
    ended(process)
    assert gone(run)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_to_the_command_alone_or_to_both_reaches_the_run_once(tmp_path: Path, number: int) -> None:
    slow = ("try:", f"    {WAIT}", "except KeyboardInterrupt:", "    time.sleep(0.3)", "    print('once')", "    raise")
    for both in (False, True):
        process = command(tmp_path, *slow)
        assert process.stdout is not None
        run = int(process.stdout.readline())
        if both:
            os.kill(run, number)
        process.send_signal(number)
        code, out, err = ended(process)
        assert (code, out) == (75, "once\n")
        assert err == "failed: interrupted before it began; the same command begins it again\n"


def test_a_process_with_other_threads_is_not_forked() -> None:
    """Who embeds the command line, as a test runner does, would lose its threads in the fork."""
    over, process = threading.Event(), os.getpid()
    waiting = threading.Thread(target=over.wait)
    waiting.start()
    try:
        guard.begin()
        assert os.getpid() == process
        assert not guard.tell(code=0)
    finally:
        over.set()
        waiting.join()
