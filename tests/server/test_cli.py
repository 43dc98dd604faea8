"""The command line as its users meet it: every command on a real small run, and every mistake told in one message."""

import contextlib
import hashlib
import io
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from safetensors.numpy import load_file, save_file

from fedstrata.client.lora import adapted
from fedstrata.client.mixture import Mixture
from fedstrata.client.model import TINY, BaseModel
from fedstrata.core.config import LoraSection, ModelSection
from fedstrata.scenarios.stream import Example, Pixels
from fedstrata.server import cli

SMALL = ("fcit-mini-short", "federation.grid=inprocess", "train.local_epochs=1", "evaluate.shard=20")
PAGE = Path(__file__).resolve().parents[2] / "docs" / "export.md"


@dataclass(frozen=True)
class Said:
    """What a command ended with and printed."""

    code: int
    out: str
    err: str


def fedstrata(*words: str | Path) -> Said:
    """The console script, without the seconds that a new process takes to import everything."""
    out, err = io.StringIO(), io.StringIO()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["fedstrata", *map(str, words)])
        patch.setenv("COLUMNS", "200")
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            code = cli.code()
    return Said(code, out.getvalue(), err.getvalue())


def read(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A real DISCO run: two tasks, two stages of two rounds, four clients; into a folder that is there and empty."""
    folder = tmp_path_factory.mktemp("runs") / "disco"
    folder.mkdir()
    said = fedstrata("run", *SMALL, f"run.dir={folder}")
    assert said.code == 0, said.err
    return folder


@pytest.fixture(scope="module")
def exported(finished: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("exports") / "disco"
    said = fedstrata("export", finished, "--to", folder)
    assert said.code == 0, said.err
    return folder


@pytest.fixture(scope="module")
def picture(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("pictures") / "noise.png"
    pixels = np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path)
    return path


# what a run leaves behind


def state_of(run: Path) -> dict[str, Any]:
    """The tensors of a run's newest commit: its manifest names the blob of each."""
    folder = run / "checkpoints"
    named = read(max(folder.glob("*.json")))["tensors"]
    return {name: load_file(folder / f"{blob}.safetensors")["tensor"] for name, blob in named.items()}


def test_a_run_leaves_the_documented_files(finished: Path) -> None:
    files = {path.name for path in finished.iterdir()}
    assert files == {
        "config.yaml",
        "events.jsonl",
        "predictions",
        "matrix.json",
        "summary.json",
        "checkpoints",
        "report.html",
    }


def test_the_matrix_has_a_row_before_training_and_one_per_stage(finished: Path) -> None:
    matrix = read(finished / "matrix.json")
    assert matrix["tasks"] == ["names", "charts"]
    assert len(matrix["stages"]) == 2
    assert np.shape(matrix["scores"]) == (3, 2)
    assert all(0 <= score <= 100 for row in matrix["scores"] for score in row)
    assert matrix["seen"] == [[False, False], [True, False], [True, True]]
    assert matrix["counts"] == [[50, 50]] * 3
    assert matrix["metrics"] == ["exact_match", "exact_match"]


def test_the_summary_has_the_documented_keys(finished: Path) -> None:
    documented = """version status seed strategy scenario_hash last avg forgetting bwt fwt routing_accuracy bytes_up
    bytes_down bytes_eval skipped_rounds train_seconds wall_seconds final_state_sha256"""
    summary = read(finished / "summary.json")
    assert set(documented.split()) <= set(summary)
    assert (summary["version"], summary["status"], summary["skipped_rounds"]) == (1, "completed", 0)


def test_every_prediction_is_kept_and_adds_up_to_the_matrix(finished: Path) -> None:
    matrix = read(finished / "matrix.json")
    assert {path.name for path in (finished / "predictions").iterdir()} == {f"stage-{t}.jsonl" for t in range(3)}
    for stage, row in enumerate(matrix["scores"]):
        kept = lines(finished / "predictions" / f"stage-{stage}.jsonl")
        assert {frozenset(line) for line in kept} == {
            frozenset(("task", "id", "prediction", "answer", "score", "weights"))
        }
        assert {len(line["weights"]) for line in kept} == {stage}  # one subspace a stage here
        for task, score in zip(matrix["tasks"], row, strict=True):
            points = [line["score"] for line in kept if line["task"] == task]
            assert len(points) == 50
            assert 100 * sum(points) / 50 == pytest.approx(score)


def test_the_state_hash_is_of_sorted_tensors_and_canonical_facts(finished: Path) -> None:
    newest = max((finished / "checkpoints").glob("*.json"))
    sha = hashlib.sha256()
    for name, tensor in sorted(state_of(finished).items()):
        sha.update(json.dumps([name, str(tensor.dtype), list(tensor.shape)]).encode())
        sha.update(tensor.astype("<f4").tobytes())
    sha.update(json.dumps(read(newest)["facts"], sort_keys=True, separators=(",", ":")).encode())
    assert read(finished / "summary.json")["final_state_sha256"] == sha.hexdigest()


def test_disco_uploads_one_subspace_per_client_round_and_each_token_once(finished: Path) -> None:
    state = state_of(finished)
    adapter, token = state["subspace.0.adapter"].size, state["subspace.0.token"].size
    rounds = [event for event in lines(finished / "events.jsonl") if event["event"] == "round"]
    trained = [(event["stage"], row["client"]) for event in rounds for row in event["participants"]]
    assert len(rounds) == 4
    assert len(set(trained)) < len(trained)  # somebody came twice with the same data
    summary = read(finished / "summary.json")
    assert summary["bytes_up"] == 4 * (len(trained) * adapter + len(set(trained)) * token)
    assert summary["bytes_down"] == 4 * len(trained) * adapter
    shards = 2 * 3  # two tasks of 50 examples in shards of 20
    assert summary["bytes_eval"] == 4 * shards * (0 + 1 + 2) * (adapter + token)


def test_the_same_command_twice_gives_the_same_bits(finished: Path, tmp_path: Path) -> None:
    assert fedstrata("run", *SMALL, f"run.dir={tmp_path / 'again'}").code == 0
    first, again = read(finished / "summary.json"), read(tmp_path / "again" / "summary.json")
    timed = {"train_seconds", "wall_seconds", "plan"}
    assert {k: v for k, v in again.items() if k not in timed} == {k: v for k, v in first.items() if k not in timed}
    for name in ("matrix.json", "predictions/stage-2.jsonl"):
        assert (tmp_path / "again" / name).read_bytes() == (finished / name).read_bytes()


# before a run


def test_a_dry_run_prints_config_schedule_and_bytes_and_creates_nothing(
    finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    said = fedstrata("run", *SMALL, f"run.dir={finished}", "--dry-run")  # the folder of the run it predicts
    assert said.code == 0, said.err
    assert list(tmp_path.iterdir()) == []
    config = said.out[: said.out.index("schedule: task")].rpartition("\n")[0]
    assert yaml.safe_load(config) == yaml.safe_load((finished / "config.yaml").read_text(encoding="utf-8"))
    for row in trained(finished):
        assert re.search(rf"│ {row['client']} .*{row['tasks'][0]} {row['samples']}\b", said.out)
    assert predicted(said) == moved(finished)


@pytest.mark.parametrize("strategy", ["finetune", "joint", "oracle"])
def test_the_predicted_bytes_are_the_ones_that_a_run_moves(strategy: str, tmp_path: Path) -> None:
    words = (*SMALL, f"strategy.name={strategy}", "federation.rounds_per_stage=1", into(tmp_path))
    plan = fedstrata("run", *words, "--dry-run")
    assert fedstrata("run", *words).code == 0
    assert predicted(plan) == moved(tmp_path / "run")


def predicted(said: Said) -> dict[str, int]:
    return {name: int(count.replace(",", "")) for name, count in re.findall(r"bytes (\w+): ([\d,]+)", said.out)}


def moved(folder: Path) -> dict[str, int]:
    summary = read(folder / "summary.json")
    return {"up": summary["bytes_up"], "down": summary["bytes_down"], "evaluation": summary["bytes_eval"]}


def trained(folder: Path) -> list[dict[str, Any]]:
    events = lines(folder / "events.jsonl")
    return [row for event in events if event["event"] == "round" for row in event["participants"]]


def test_list_names_everything_there_is_to_choose() -> None:
    said = fedstrata("list")
    assert said.code == 0
    for name in ("disco", "finetune", "joint", "fcit-mini", "real-images", "tiny"):
        assert name in said.out
    assert "fcit-mini" not in fedstrata("list", "strategies").out
    wrong = fedstrata("list", "strategy")
    assert (wrong.code, "did you mean 'strategies'?" in wrong.err) == (2, True)


def test_list_needs_neither_torch_nor_ray() -> None:
    code = "import sys; from fedstrata.server import catalogue; print('torch' in sys.modules, 'ray' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], text=True, capture_output=True, check=True)
    assert done.stdout.split() == ["False", "False"]  # it should answer in a blink


# after a run


def test_compare_prints_and_writes_the_table(finished: Path, tmp_path: Path) -> None:
    names = [tmp_path / name for name in ("table.md", "table.csv", "table.json")]
    said = fedstrata("compare", finished, "--markdown", names[0], "--csv", names[1], "--json", names[2])
    assert said.code == 0, said.err
    assert "disco" in said.out
    assert "disco" in names[0].read_text(encoding="utf-8")
    assert "disco" in names[1].read_text(encoding="utf-8")
    assert read(names[2])


def test_report_is_rebuilt_from_the_folder_alone(finished: Path, tmp_path: Path) -> None:
    moved = tmp_path / "moved"
    shutil.copytree(finished, moved)
    (moved / "report.html").unlink()
    said = fedstrata("report", moved)
    assert (said.code, said.out.strip()) == (0, str(moved / "report.html"))
    page = (moved / "report.html").read_text(encoding="utf-8")
    assert "names" in page
    assert not re.search(r"(src|href)=[\"']https?://", page)  # self-contained


def test_ask_answers_with_the_weights_of_the_subspaces(finished: Path, picture: Path, tmp_path: Path) -> None:
    said = fedstrata("ask", finished, "--image", picture, "--json", tmp_path / "a.json", "Which digit is drawn here?")
    assert said.code == 0, said.err
    weights = [float(weight) for weight in re.findall(r"α (\d\.\d+)  subspace \d", said.out)]
    assert len(weights) == 2
    assert sum(weights) == pytest.approx(1, abs=0.002)
    told = read(tmp_path / "a.json")
    assert said.out.startswith(told["answer"])
    assert list(told["weights"].values()) == pytest.approx(weights, abs=0.001)
    assert fedstrata("ask", finished, "Only text?").code == 0


@pytest.mark.parametrize("content", [None, b"", b"no picture"])
def test_ask_refuses_what_is_no_picture(finished: Path, tmp_path: Path, content: bytes | None) -> None:
    path = tmp_path / "picture.png"
    if content is not None:
        path.write_bytes(content)
    refused(fedstrata("ask", finished, "--image", path, "What is it?"), "--image: cannot read", str(path))


@pytest.mark.parametrize("command", ["report", "export", "ask", "resume"])
def test_a_folder_that_is_no_run_is_refused(command: str, tmp_path: Path) -> None:
    rest = {"export": ["--to", str(tmp_path / "out")], "ask": ["What?"]}.get(command, [])
    refused(fedstrata(command, tmp_path, *rest), "not a run folder")
    assert list(tmp_path.iterdir()) == []


# the export


def test_an_export_never_replaces_a_folder(finished: Path, exported: Path) -> None:
    refused(fedstrata("export", finished, "--to", exported), "exists already")


def test_the_router_names_tokens_thresholds_encoder_and_base(finished: Path, exported: Path) -> None:
    router, summary = read(exported / "router.json"), read(finished / "summary.json")
    assert router["subspaces"] == ["subspace-0", "subspace-1"]
    assert {path.name for path in exported.iterdir()} == {"subspace-0", "subspace-1", "router.json"}
    assert len({len(token) for token in router["tokens"]}) == 1
    assert (router["base"], router["base_hash"]) == ("tiny", summary["base_hash"])
    assert router["text_encoder"] == "base"
    encoder = read(TINY / "text_encoder.json")
    assert (router["tau"], router["epsilon"]) == (encoder["tau"], encoder["epsilon"])


@torch.no_grad()
def test_an_exported_subspace_gives_the_same_logits_in_peft(finished: Path, exported: Path, picture: Path) -> None:
    from peft import PeftModel

    base = BaseModel(ModelSection(), LoraSection())
    question = Example("q", "Which digit is drawn here?", "", Pixels(np.asarray(Image.open(picture))))
    prepared = base.prepare([question], 512)
    batch = base.embed([p.prompt for p in prepared], [p.features for p in prepared], left=True)
    inputs = {"inputs_embeds": batch.embeds, "attention_mask": batch.mask}
    plain = base.model(**inputs).logits
    state = state_of(finished)
    scaling = read(exported / "router.json")["scaling"]
    ours = []
    for index in range(2):
        bank = Mixture.of([state[f"subspace.{index}.adapter"]], base.layout, scaling, base.device, torch.float32)
        bank.activate(torch.ones(1, 1))
        with adapted(base, bank):
            ours.append(base.model(**inputs).logits)
    for index in range(2):
        fresh = BaseModel(ModelSection(), LoraSection())
        loaded = PeftModel.from_pretrained(fresh.model, str(exported / f"subspace-{index}"))
        theirs = loaded(**inputs).logits
        assert torch.allclose(theirs, ours[index], atol=1e-4)
        assert not torch.allclose(theirs, plain, atol=1e-2)


@pytest.mark.parametrize("block", [0, 1])
def test_the_scripts_of_the_export_page_run_as_they_stand(
    finished: Path, exported: Path, picture: Path, tmp_path: Path, block: int
) -> None:
    script = re.findall(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)[block]
    assert "fedstrata" not in script
    if block == 0:
        own = [line for line in script.splitlines() if line and not line.startswith(("import", "from"))]
        assert len(own) <= 10
    question = "Which digit is drawn here?"
    source = exported / "subspace-0" if block == 0 else exported
    command = [sys.executable, "-c", script, str(TINY), str(source), str(picture), question]
    done = subprocess.run(command, cwd=tmp_path, text=True, capture_output=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    answer = fedstrata("ask", finished, "--image", picture, question).out.splitlines()
    if block == 1:
        weights = re.findall(r"α (\d\.\d+)", "".join(answer[1:]))
        assert done.stdout.splitlines() == [answer[0], *(f"{w} subspace-{i}" for i, w in enumerate(weights))]


# mistakes: one clear message, exit code 2, no traceback, no half-made folder


def refused(said: Said, *parts: str) -> None:
    assert (said.code, "Traceback" in said.err + said.out) == (2, False), said.err
    assert len(said.err.strip().splitlines()) == 1, said.err
    assert said.err.startswith("bad input: ")
    for part in parts:
        assert part in said.err


@pytest.mark.parametrize(
    ("words", "parts"),
    [
        ("fcit-mini-shrt", ["recipe: unknown 'fcit-mini-shrt'", "did you mean 'fcit-mini-short'?"]),
        ("scenario.name=fcit-mni", ["scenario.name: unknown 'fcit-mni'", "did you mean 'fcit-mini'?"]),
        ("scenario.name=gone.yaml", ["gone.yaml: no such file"]),
        ("strategy.name=dsico", ["strategy.name: unknown 'dsico'", "did you mean 'disco'?"]),
        ("strategy.tua=0.5", ["strategy.tua: unknown 'tua'", "did you mean 'tau'?"]),
        ("fcit-mini-short lora.rnak=4", ["lora.rnak: unknown 'rnak'", "did you mean 'rank'?"]),
        ("fcit-mini-short lora.rank=0", ["lora.rank: must be at least 1, got 0"]),
        ("fcit-mini-short lora.rank=eight", ["lora.rank", "eight"]),
        ("fcit-mini-short lora.rank", ["'lora.rank': expected key=value"]),
        ("fcit-mini-short lora.targets=[no_such_layer]", ["lora.targets: no_such_layer"]),
        ("fcit-mini-short scenario.beta=0", ["scenario.beta: must be a finite number above 0, got 0"]),
        ("fcit-mini-short federation.clients_per_round=5", ["must be between 1 and federation.clients (4), got 5"]),
        ("fcit-mini-short federation.grid=flower", ["federation.grid: 'flower' runs under Flower itself"]),
        ("fcit-mini-short model.name=tinny", ["must be 'tiny', a folder or a hub name (owner/name), got 'tinny'"]),
    ],
)
def test_a_wrong_word_is_told_in_one_message(words: str, parts: Sequence[str], tmp_path: Path) -> None:
    first, *rest = words.split()
    refused(fedstrata("run", first, "federation.grid=inprocess", *rest, into(tmp_path)), *parts)
    assert list(tmp_path.iterdir()) == []


def into(folder: Path) -> str:
    return f"run.dir={folder / 'run'}"


@pytest.mark.parametrize("words", [["--drry-run"], ["--seed", "3"]])
def test_an_unknown_option_is_bad_input_too(words: Sequence[str]) -> None:
    said = fedstrata("run", *words)
    assert said.code == 2
    assert "No such option" in said.err
    assert words[0] in said.err
    assert "Traceback" not in said.err


def test_an_unknown_command_is_bad_input_too() -> None:
    said = fedstrata("rnu")
    assert (said.code, "No such command 'rnu'" in said.err) == (2, True)


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("lora: {rnak: 4}", ["lora.rnak: unknown 'rnak'", "did you mean 'rank'?"]),
        ("lora: {rank: 4", ["recipe.yaml: not a readable YAML file"]),
        ("- lora", ["recipe.yaml: must hold a mapping"]),
    ],
)
def test_a_mistake_in_a_recipe_file_is_told(text: str, parts: Sequence[str], tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(text, encoding="utf-8")
    refused(fedstrata("run", recipe, into(tmp_path)), *parts)
    assert not (tmp_path / "run").exists()


def test_a_folder_that_holds_a_run_names_resume(finished: Path) -> None:
    before = (finished / "summary.json").read_bytes()
    refused(fedstrata("run", *SMALL, f"run.dir={finished}"), "already holds a run", f"fedstrata resume {finished}")
    assert (finished / "summary.json").read_bytes() == before


def test_a_folder_with_other_files_is_refused(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("", encoding="utf-8")
    refused(fedstrata("run", *SMALL, f"run.dir={tmp_path}"), "must be a new or an empty folder")
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]


def scenario(folder: Path, image: str = "a.png", train: str | None = None) -> Path:
    """A scenario of files: one task, eight rows, one picture. `train`: the text of train.json, if not these rows."""
    turns = [{"from": "human", "value": "<image>\nWhat is it?"}, {"from": "gpt", "value": "noise"}]
    rows = [{"id": str(n), "image": image, "conversations": turns} for n in range(8)]
    (folder / "images").mkdir()
    Image.new("RGB", (8, 8), "red").save(folder / "images" / "a.png")
    Image.new("RGB", (8, 8), "red").save(folder / "secret.png")
    (folder / "train.json").write_text(json.dumps(rows) if train is None else train, encoding="utf-8")
    (folder / "test.json").write_text(json.dumps(rows[:2]), encoding="utf-8")
    tree = {
        "tasks": {"only": {"train": "train.json", "test": "test.json", "images": "images"}},
        "stages": [["only"]],
        "defaults": {"federation": {"clients": 1, "clients_per_round": 1, "rounds_per_stage": 1}},
    }
    (folder / "own.yaml").write_text(yaml.safe_dump(tree), encoding="utf-8")
    return folder / "own.yaml"


@pytest.mark.parametrize(
    ("change", "parts"),
    [
        ({"image": "../secret.png"}, ["train.json: record 1", "image", "../secret.png"]),
        ({"image": "/etc/hostname"}, ["train.json: record 1", "image", "/etc/hostname"]),
        ({"image": "b.png"}, ["10 images are missing", "'b.png' (train.json: record 1)"]),
        ({"train": '[{"id": "0", "image": "a.png", "conversa'}, ["train.json: record 1", "truncated"]),
        ({"train": ""}, ["train.json", "empty file"]),
    ],
)
def test_a_mistake_in_the_data_is_told_before_anything_is_written(
    change: dict[str, str], parts: Sequence[str], tmp_path: Path
) -> None:
    file = scenario(tmp_path, **change)
    refused(fedstrata("run", file, "federation.grid=inprocess", into(tmp_path)), *parts)
    assert not (tmp_path / "run").exists()


def cut_weights(folder: Path) -> None:
    data = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(data[: len(data) // 2])


def garble_weights(folder: Path) -> None:
    (folder / "model.safetensors").write_bytes(b"these are not weights" * 1000)


def drop_a_weight(folder: Path) -> None:
    change_weights(folder, lambda tensors, name: tensors.pop(name))


def reshape_a_weight(folder: Path) -> None:
    change_weights(folder, lambda tensors, name: tensors.update({name: np.zeros((3, 5), dtype=np.float32)}))


def change_weights(folder: Path, change: Callable[[dict[str, Any], str], Any]) -> None:
    tensors = load_file(folder / "model.safetensors")
    change(tensors, next(name for name in sorted(tensors) if "q_proj" in name))
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def name_another_model(folder: Path) -> None:
    (folder / "config.json").write_text('{"model_type": "bert"}', encoding="utf-8")


def cut_encoder(folder: Path) -> None:
    (folder / "text_encoder.json").write_text('{"kind": "token_', encoding="utf-8")


@pytest.mark.parametrize(
    ("damage", "part"),
    [
        (cut_weights, "model.name: cannot load"),
        (garble_weights, "model.name: cannot load"),
        (drop_a_weight, "weights are missing or of another shape"),
        (reshape_a_weight, "weights are missing or of another shape"),
        (name_another_model, "or of model type 'llava', got 'bert'"),
        (cut_encoder, "not a readable text encoder"),
    ],
)
def test_a_corrupt_base_is_told_before_anything_is_written(
    damage: Callable[[Path], None], part: str, tmp_path: Path
) -> None:
    base = tmp_path / "base"
    shutil.copytree(TINY, base)
    damage(base)
    refused(fedstrata("run", *SMALL, f"model.name={base}", into(tmp_path)), part, str(base))
    assert not (tmp_path / "run").exists()


def test_the_console_script_itself_refuses_in_one_line(tmp_path: Path) -> None:
    script = Path(sys.executable).with_name("fedstrata")
    done = subprocess.run(
        [str(script), "run", "lora.rank=0"],
        cwd=tmp_path,
        env=dict(os.environ),
        text=True,
        capture_output=True,
        check=False,
    )
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "bad input: lora.rank: must be at least 1, got 0\n"
    assert list(tmp_path.iterdir()) == []
