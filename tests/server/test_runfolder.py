"""Reading a run folder, whole and broken."""

from collections.abc import Callable
from pathlib import Path

import pytest

from fedstrata.core.errors import BadInput
from fedstrata.server.runfolder import RunFolder

WriteRun = Callable[..., Path]


def test_a_run_folder_comes_back_as_values(write_run: WriteRun) -> None:
    folder = RunFolder(write_run(seed=3))
    assert folder.config["seed"] == 3
    assert folder.summary["status"] == "completed"
    assert folder.matrix.last == 75.0
    assert [event["event"] for event in folder.events()][:3] == ["run_started", "stage_scored", "round"]


@pytest.mark.parametrize("torn", [b'{"event": "rou', b"{", '{"event": "ü'.encode()[:-1]])
def test_a_half_written_last_line_is_left_out(write_run: WriteRun, torn: bytes) -> None:
    path = write_run()
    whole = RunFolder(path).events()
    with (path / "events.jsonl").open("ab") as file:
        file.write(torn)
    assert RunFolder(path).events() == whole


@pytest.mark.parametrize("line", ["{", "[]", '{"stage": 1}'])
def test_a_broken_line_in_the_middle_is_named(write_run: WriteRun, line: str) -> None:
    path = write_run()
    events = path / "events.jsonl"
    events.write_text(line + "\n" + events.read_text(encoding="utf-8"), encoding="utf-8")
    with pytest.raises(BadInput, match=r"events\.jsonl: line 1 is not an event"):
        RunFolder(path).events()


def test_no_events_yet_is_no_error(write_run: WriteRun) -> None:
    path = write_run()
    (path / "events.jsonl").unlink()
    assert RunFolder(path).events() == []


def test_an_event_may_hold_a_unicode_line_separator(write_run: WriteRun) -> None:
    path = write_run()
    (path / "events.jsonl").write_text('{"event": "x", "text": "a\u2028b"}\n', encoding="utf-8")
    assert RunFolder(path).events() == [{"event": "x", "text": "a\u2028b"}]


def test_what_is_not_a_run_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match="no such run folder"):
        RunFolder(tmp_path / "nowhere")
    with pytest.raises(BadInput, match=r"not a run folder: config\.yaml is missing"):
        RunFolder(tmp_path)


@pytest.mark.parametrize(
    ("file", "text", "message"),
    [
        ("config.yaml", "a: [", "not a readable YAML file"),
        ("summary.json", None, "no such file"),
        ("summary.json", '{"version": 1', "not a readable JSON file"),
        ("summary.json", "[]", "must hold an object"),
        ("summary.json", '{"version": 9}', "version must be 1, got 9"),
        ("matrix.json", None, "no such file"),
        ("matrix.json", "\xff", "not a readable JSON file"),
        ("matrix.json", "{}", "exactly the keys"),
    ],
)
def test_the_missing_or_broken_file_is_named(write_run: WriteRun, file: str, text: str | None, message: str) -> None:
    path = write_run()
    if text is None:
        (path / file).unlink()
    else:
        (path / file).write_bytes(text.encode("latin-1"))
    with pytest.raises(BadInput, match=rf"{file}: .*{message}"):
        getattr(RunFolder(path), file.split(".")[0])
