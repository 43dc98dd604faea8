"""Tracking: what `events.jsonl` holds, and what the real wandb wrote in offline mode."""

import contextlib
import json
import struct
import time
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fedstrata.core.config import TrackSection
from fedstrata.core.tracking import JsonLines, Trackers, open_tracker


class Recorder:
    """Remembers what it was told."""

    def __init__(self) -> None:
        self.told: list[tuple[str, dict[str, Any]]] = []
        self.closed = False

    def event(self, name: str, /, **fields: Any) -> None:
        self.told.append((name, fields))

    def close(self) -> None:
        self.closed = True


class Broken(Recorder):
    def close(self) -> None:
        raise OSError("disk full")


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def test_each_event_is_one_flushed_line_with_a_utc_time(tmp_path: Path) -> None:
    tracker = JsonLines(tmp_path / "events.jsonl")
    tracker.event("round", stage=1, loss=0.5)
    (line,) = lines(tmp_path / "events.jsonl")  # read before close: nothing waits in a buffer
    time = datetime.fromisoformat(line.pop("time"))
    assert time.tzinfo == UTC
    assert list(line.items()) == [("event", "round"), ("stage", 1), ("loss", 0.5)]
    tracker.close()


def test_what_json_cannot_hold_is_made_plain(tmp_path: Path) -> None:
    tracker = JsonLines(tmp_path / "events.jsonl")
    tracker.event("x", nan=float("nan"), inf=[float("-inf")], small=np.float32(0.5), keys={3: (1, 2)}, names={"b", "a"})
    tracker.close()
    (line,) = lines(tmp_path / "events.jsonl")
    del line["time"]
    assert line == {"event": "x", "nan": None, "inf": [None], "small": 0.5, "keys": {"3": [1, 2]}, "names": ["a", "b"]}


def test_a_field_may_be_called_name(tmp_path: Path) -> None:
    tracker = JsonLines(tmp_path / "events.jsonl")
    tracker.event("x", name="y")
    tracker.close()
    assert lines(tmp_path / "events.jsonl")[0]["name"] == "y"


def test_appending_cuts_off_the_line_a_killed_process_left(tmp_path: Path) -> None:
    path = tmp_path / "events.jsonl"
    path.write_text('{"event": "one"}\n{"event": "tw', encoding="utf-8")
    tracker = JsonLines(path)
    tracker.event("three")
    tracker.close()
    assert [line["event"] for line in lines(path)] == ["one", "three"]


def test_all_trackers_are_told_and_all_are_closed_even_when_one_fails() -> None:
    first, second = Broken(), Recorder()
    trackers = Trackers([first, second])
    trackers.event("round", stage=1)
    assert first.told == second.told == [("round", {"stage": 1})]
    with pytest.raises(OSError, match="disk full"):
        trackers.close()
    assert second.closed


def test_wandb_is_off_by_default(tmp_path: Path) -> None:
    tracker = open_tracker(TrackSection(), tmp_path, {}, "run")
    tracker.event("run_started")
    tracker.close()
    assert [path.name for path in tmp_path.iterdir()] == ["events.jsonl"]


def test_offline_wandb_holds_the_rounds_the_scores_and_the_summary(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WANDB_DIR", str(tmp_path))
    tracker = open_tracker(TrackSection(wandb="offline", project="p"), tmp_path, {"lora": {"rank": 8}}, "run-name")
    tracker.event("round", stage=1, round=1, loss=1.25, skipped=False, participants=[{"client": 3}], note="text")
    tracker.event("round", stage=1, round=2, loss=float("nan"))
    tracker.event("rejected", client=3, reason="late")
    tracker.event("stage_scored", stage=1, scores={"names": 80.0})
    tracker.event("run_finished", status="completed", last=80.0, fwt=None)
    tracker.close()

    (file,) = tmp_path.rglob("*.wandb")
    told = whole(file)
    (started,) = [record.run for record in told if record.HasField("run")]
    assert (started.project, started.display_name) == ("p", "run-name")
    assert {item.key: json.loads(item.value_json) for item in started.config.update}["lora"] == {"rank": 8}
    history = [unpack(record.history.item) for record in told if record.HasField("history")]
    assert history == [
        {"round/stage": 1, "round/round": 1, "round/loss": 1.25, "round/skipped": 0},
        {"round/stage": 1, "round/round": 2},
        {"stage_scored/stage": 1, "stage_scored/scores/names": 80.0},
    ]
    summary: dict[str, Any] = {}
    for record in told:
        summary |= unpack(record.summary.update)
    assert {key: summary[key] for key in ("status", "last", "fwt")} == {
        "status": "completed",
        "last": 80.0,
        "fwt": None,
    }
    assert [record.exit.exit_code for record in told if record.HasField("exit")] == [0]
    assert [line["event"] for line in lines(tmp_path / "events.jsonl")][-1] == "run_finished"


def unpack(items: Any) -> dict[str, Any]:
    """A record's key/value items without wandb's own (`_step`, `_runtime`, …)."""
    named = {item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in items}
    return {key: value for key, value in named.items() if not key.startswith("_")}


def whole(file: Path) -> list[Any]:
    """The records up to the exit: wandb's own process may still be writing when `finish` returns."""
    from google.protobuf.message import DecodeError

    for _ in range(100):
        with contextlib.suppress(DecodeError):
            told = list(wandb_records(file))
            if any(record.HasField("exit") for record in told):
                return told
        time.sleep(0.1)
    raise AssertionError(f"{file} has no exit record")


def wandb_records(file: Path) -> Iterator[Any]:
    """The records of a `.wandb` file: LevelDB's log format (32 KiB blocks; crc, length, type) after a 7-byte header."""
    from wandb.proto import wandb_internal_pb2

    data, at, parts = file.read_bytes(), 7, b""
    while at + 7 <= len(data):
        room = -at % 32768 or 32768
        if room < 7:  # a block's last bytes are padding when no header fits
            at += room
            continue
        _, length, kind = struct.unpack_from("<IHB", data, at)
        parts += data[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):  # whole, or the last fragment
            yield wandb_internal_pb2.Record.FromString(parts)
            parts = b""
