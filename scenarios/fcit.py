"""FCIT's published files, read as they are: `instructions/`, `partitioned_data/`, and the pictures' root.

Training data are `client_<id>.json` files, one folder a stage; tests are `instructions/<dataset>/<file>`. Nothing is
rewritten, and no order of stages is assumed: what a folder holds is read off its pictures' paths and told.
"""

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from fedstrata.core.errors import BadInput
from fedstrata.scenarios.example import Example
from fedstrata.scenarios.fcit_tables import BETAS, DATASETS, GROUPS, REFERENCES, SETTINGS, FcitRule, Setting, dataset_of
from fedstrata.scenarios.files import Found, Reading, load_file, refuse_missing
from fedstrata.scenarios.images import open_images
from fedstrata.scenarios.jsonfile import is_folder
from fedstrata.scenarios.partition import Shares
from fedstrata.scenarios.rows import Joined, Marks, Rows, hash_texts
from fedstrata.scenarios.stream import Assign, Task

Parts = Mapping[str, Sequence[Rows]]


@dataclass(frozen=True)
class Published:
    """What the files hold. A dataset is a task of the accuracy matrix; a stage brings one, or a group of them."""

    tasks: tuple[Task, ...]
    stages: tuple[tuple[int, ...], ...]
    assign: Assign | None
    shares: tuple[Shares, ...]
    units: int


def load(rule: FcitRule, root: Path, beta: float, clients: int, strict: bool = True) -> Published:
    """Reads one setting at one beta.

    Raises:
        BadInput: a file or folder is missing, a record breaks a rule, a folder mixes what belongs to several stages,
            or `clients` is not the number of published client files. Begins with the file or folder.
    """
    setting = SETTINGS[rule.setting]
    if beta not in BETAS:
        raise BadInput(f"scenario.beta: FCIT's partitions exist for {', '.join(map(str, BETAS))}, got {beta}")
    folder = _folder(root / rule.partitions / setting.folder / str(float(beta)), "the published partition")
    reading = Reading(images=open_images(_folder(root / rule.images, "the pictures")), source=dataset_of)
    found: dict[str, Found] = {}
    numbers = _numbers(folder, setting)
    stages = [_stage(folder / f"Task{number}", setting, clients, reading, found) for number in numbers]
    names = [name for stage in stages for name in stage]
    _check_once(folder, names)
    scored = replace(reading, whole=False, source=None)
    tests = {name: _tests(name, root / rule.instructions, scored, found[name]) for name in names}
    parts = [(name, rows) for stage in stages for name, rows in stage.items()]
    tasks = tuple(_task(name, Joined(rows), tests[name], found[name], strict) for name, rows in parts)
    shares = tuple(_ranges([len(part) for part in rows]) for _, rows in parts)
    places = [tuple(names.index(name) for name in stage) for stage in stages]
    return Published(tasks, *_schedule(setting, places), shares, len(stages))


def _check_once(folder: Path, names: Sequence[str]) -> None:
    for name, count in Counter(names).items():
        if count > 1:
            raise BadInput(f"{folder}: {name} must lie in one Task folder, got {count}")


def _schedule(setting: Setting, places: Sequence[tuple[int, ...]]) -> tuple[tuple[tuple[int, ...], ...], Assign | None]:
    """(stages, assign); het lists name folders by position."""
    if setting.het is None:
        return tuple(places), None
    assign = tuple(tuple(places[folder] for folder in stage) for stage in setting.het)
    return tuple(tuple(sorted({task for place in stage for task in place})) for stage in assign), assign


def _numbers(folder: Path, setting: Setting) -> range:
    numbers = range(1, setting.stages + 1)
    there = sorted(path.name for path in folder.iterdir() if path.name.startswith("Task"))
    if set(there) != {f"Task{number}" for number in numbers}:
        raise BadInput(f"{folder}: must hold Task1 … Task{setting.stages}, got {', '.join(there) or 'none'}")
    return numbers


def _stage(folder: Path, setting: Setting, clients: int, reading: Reading, found: dict[str, Found]) -> Parts:
    """{dataset: its rows at each client} of one Task folder, in the order of its group."""
    _check_clients(folder, clients)
    told = Found()
    files = [load_file(folder / f"client_{client}.json", reading, told) for client in range(clients)]
    counts = _count(folder, files)
    names = _belong(folder, counts, setting)
    for name in names:
        found[name] = Found([*told.notes], [*told.missing]) if name == names[0] else Found()
        found[name].notes.append(f"{folder.name} holds {name}: {counts[name]} rows at {clients} clients")
    codes = {name: _code(name) for name in names}
    return {name: [file.take(np.flatnonzero(file.marks.source == codes[name])) for file in files] for name in names}


def _check_clients(folder: Path, clients: int) -> None:
    there = len(list(folder.glob("client_*.json")))
    if there != clients:
        raise BadInput(f"{folder}: holds {there} client files, federation.clients must be that, got {clients}")
    for client in range(clients):
        if not (folder / f"client_{client}.json").is_file():
            raise BadInput(
                f"{folder}: must hold client_0.json … client_{clients - 1}.json, got no client_{client}.json"
            )


def _count(folder: Path, files: Sequence[Rows]) -> Counter[str]:
    """{dataset: rows}. Raises BadInput for a picture's path of no known dataset."""
    names, counts = {int(_code(name)): name for name in DATASETS}, Counter[str]()
    for client, file in enumerate(files):
        assert file.marks.source is not None
        for row, code in enumerate(file.marks.source.tolist()):
            if code not in names:
                prefixes = ", ".join(sorted({dataset.prefix for dataset in DATASETS.values()}))
                image = getattr(file[row].image, "name", None)
                rule = f"image must begin with one of FCIT's folders ({prefixes})"
                raise BadInput(f"{folder / f'client_{client}.json'}: record {row + 1}: {rule}, got {image!r}")
            counts[names[code]] += 1
    return counts


def _belong(folder: Path, counts: Counter[str], setting: Setting) -> list[str]:
    """The datasets of this folder: one, or those of one group. Raises BadInput for a mixture."""
    groups = [(name,) for name in DATASETS] if setting.stages == 8 else list(GROUPS.values())
    for group in groups:
        if set(counts) <= set(group):
            return [name for name in group if name in counts]
    rule = "one dataset" if setting.stages == 8 else "the datasets of one capability group"
    came = ", ".join(f"{name} ({count})" for name, count in counts.most_common())
    raise BadInput(f"{folder}: must hold {rule}, got {came}")


def _tests(name: str, root: Path, reading: Reading, found: Found) -> Rows:
    rows = load_file(root / DATASETS[name].test, reading, found)
    return Referenced(rows, _references(root / REFERENCES[name], len(rows))) if name in REFERENCES else rows


def _references(path: Path, rows: int) -> list[tuple[str, ...]]:
    """Captions of a COCO file by position: the i-th row's are those of image_id i, counted from 1."""
    if not path.is_file():
        raise BadInput(f"{path}: no such file")
    try:
        tree: Any = json.loads(path.read_text(encoding="utf-8-sig"))
        captions: list[list[str]] = [[] for _ in range(rows)]
        for number, entry in enumerate(tree["annotations"], 1):
            place, caption = entry["image_id"], entry["caption"]
            if not isinstance(place, int) or not 1 <= place <= rows or not isinstance(caption, str):
                rule = f"image_id must be 1 … {rows}, the number of test rows, and caption a text"
                raise BadInput(f"{path}: annotation {number}: {rule}, got {place!r}")
            captions[place - 1].append(caption)
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise BadInput(f"{path}: not a COCO caption file: {error.__class__.__name__}: {error}") from error
    if [] in captions:
        raise BadInput(f"{path}: every test row must have a caption, image_id {captions.index([]) + 1} has none")
    return [tuple(texts) for texts in captions]


class Referenced(Rows):
    """Rows with several references each."""

    def __init__(self, rows: Rows, references: Sequence[tuple[str, ...]]) -> None:
        self._rows, self._references = rows, references

    def __len__(self) -> int:
        return len(self._rows)

    def read(self, row: int) -> Example:
        return replace(self._rows[row], references=self._references[row])

    @cached_property
    def marks(self) -> Marks:  # type: ignore[override]
        plain = self._rows.marks
        hashed = b"".join(hash_texts(*texts, size=16) for texts in self._references)
        return replace(plain, content=plain.content ^ np.frombuffer(hashed, dtype="<u8").reshape(-1, 2))


def _task(name: str, train: Rows, test: Rows, found: Found, strict: bool) -> Task:
    if strict:
        refuse_missing(found, name)
    dataset = DATASETS[name]
    notes, missing = tuple(found.notes), tuple(found.missing)
    return Task(name, train, test, metric=dataset.metric, beside=dataset.beside, found=notes, missing=missing)


def _ranges(sizes: Sequence[int]) -> Shares:
    return tuple(np.arange(start, end, dtype=np.int64) for start, end in pairwise(np.cumsum([0, *sizes])))


def _code(name: str) -> np.uint64:
    return np.uint64(int.from_bytes(hash_texts(name), "little"))


def _folder(path: Path, what: str) -> Path:
    if not is_folder(path):
        raise BadInput(f"{path}: no such folder ({what}); scenario.root must be the folder that holds FCIT's data")
    return path
