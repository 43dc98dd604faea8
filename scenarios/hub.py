"""Hugging Face datasets as rows: by hub name, or a folder on disk. Rows and pictures stay in Arrow until asked for.

Needs the `datasets` library: `pip install fedstrata[hub]`.
"""

import importlib
import os
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from PIL import Image

from fedstrata.core.errors import BadInput
from fedstrata.scenarios.images import ImageFile, decode, refuse_large
from fedstrata.scenarios.instructions import Found, Reading, load
from fedstrata.scenarios.rows import Rows

BATCH = 256  # rows that are in memory at a time while they are checked
SAVED = ("dataset_dict.json", "state.json")  # what `save_to_disk` leaves in a folder


def load_hub(dataset: str, subset: str | None, split: str, reading: Reading, found: Found) -> Rows:
    """A split of a dataset: a folder made by `save_to_disk`, a folder of data files, or a hub name.

    Raises:
        BadInput: the library is missing, it cannot load the split, or a record breaks a rule.
    """
    return load(Split(dataset, subset, split), reading, found)


@dataclass(frozen=True)
class Split:
    """The records of a split; plain values, so that a process can open it anew."""

    dataset: str
    subset: str | None
    split: str

    @property
    def label(self) -> str:
        return f"dataset {self.dataset}{f', subset {self.subset}' if self.subset else ''}, split {self.split}"

    @property
    def short(self) -> str:
        return self.split

    @property
    def opened(self) -> "Opened":
        return _opened(self, os.getpid())

    def scan(self) -> Iterator[Any]:
        rows = len(self.opened.table)
        for first in range(0, rows, BATCH):
            yield from self._records(first, min(first + BATCH, rows))

    def fetch(self, number: int) -> Any:
        return self._records(number - 1, number)[0]

    def cells(self, first: int, end: int) -> Any:
        """These rows as an Arrow table."""
        try:
            return self.opened.table[first:end]
        except Exception as error:  # pyarrow has an error class for every way in which a file can be damaged
            raise BadInput(f"{self.label}: record {first + 1}: not readable: {_reason(error)}") from error

    def _records(self, first: int, end: int) -> list[dict[str, Any]]:
        """Pictures become `HubImage`, classes their names; a field without a value is left out."""
        cells, pictures = self.cells(first, end), self.opened.pictures
        there = {column: cells.column(column).is_valid().to_pylist() for column in pictures}
        plain = {column: cells.column(column).to_pylist() for column in cells.column_names if column not in pictures}
        records = []
        for place in range(end - first):
            values = {column: self._named(column, cell[place]) for column, cell in plain.items()}
            images = {name: HubImage(self, first + place, name) for name in pictures if there[name][place]}
            records.append({column: value for column, value in values.items() if value is not None} | images)
        return records

    def _named(self, column: str, value: Any) -> Any:
        names = self.opened.classes.get(column)
        return value if names is None or not isinstance(value, int) or value < 0 else names[value]


@dataclass(frozen=True)
class HubImage:
    """A picture in a dataset; `row` is counted from 0."""

    where: Split
    row: int
    column: str

    @property
    def name(self) -> str:
        """The same on every machine."""
        return f"{self.where.split}/{self.row}.{self.column}"

    def key(self) -> str:
        return f"{self.where.dataset}/{self.where.subset or ''}/{self.name}"

    def open(self) -> Image.Image:
        """RGB. Raises `BadInput` when it is no image, too large, or not in the dataset itself."""
        stored = self.where.cells(self.row, self.row + 1).column(self.column)[0].as_py() or {}
        data, path = stored.get("bytes"), stored.get("path")
        if data is None and path:
            return self._file(str(path)).open()
        refuse_large(self.key(), len(data or b""))
        return decode(data or b"", self.key())

    def _file(self, path: str) -> ImageFile:
        """A dataset may name files beside it; any others would let it read the whole disk."""
        for root in self.where.opened.roots:
            if os.path.realpath(path).startswith(root + "/"):
                return ImageFile(root, os.path.relpath(os.path.realpath(path), root))
        raise BadInput(f"{self.key()}: image must be stored in the dataset or lie in its folder, got {path[:100]!r}")


@dataclass(frozen=True)
class Opened:
    """A split's Arrow rows, its columns of pictures, its classes' names, and the folders it may read pictures from."""

    table: Any
    pictures: tuple[str, ...]
    classes: dict[str, list[str]]
    roots: tuple[str, ...]


@lru_cache(maxsize=64)
def _opened(split: Split, process: int) -> Opened:
    """Once per process: Arrow's threads do not survive a fork."""
    library = _library(split.label)
    try:
        table = _table(library, split)
        features = table.features or {}
        return Opened(
            table.with_format("arrow"),
            tuple(name for name, feature in features.items() if isinstance(feature, library.Image)),
            {name: feature.names for name, feature in features.items() if isinstance(feature, library.ClassLabel)},
            _roots(library, split),
        )
    except BadInput:
        raise
    except Exception as error:  # the library raises its own, pyarrow's, fsspec's and the network's errors
        raise BadInput(f"{split.label}: cannot be loaded: {_reason(error)}") from error


def _library(label: str) -> Any:
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    try:
        datasets = importlib.import_module("datasets")
    except ImportError:
        raise BadInput(f"{label}: needs the datasets library: pip install 'fedstrata[hub]'") from None
    datasets.config.HF_UPDATE_DOWNLOAD_COUNTS = False  # a request for every load, of local folders too
    datasets.disable_progress_bars()
    return datasets


def _table(library: Any, split: Split) -> Any:
    if not any(Path(split.dataset, name).is_file() for name in SAVED):
        return library.load_dataset(split.dataset, split.subset, split=split.split)
    saved = library.load_from_disk(split.dataset)
    splits = saved if isinstance(saved, dict) else {str(saved.split or split.split): saved}
    if split.split not in splits or split.subset:
        known = f"splits {', '.join(splits)} and no subsets"
        raise BadInput(f"{split.label}: must be there, got a folder with {known}")
    return splits[split.split]


def _roots(library: Any, split: Split) -> tuple[str, ...]:
    """The dataset's own folder, or for a hub name the library's caches."""
    config = library.config
    caches = [config.HF_DATASETS_CACHE, config.DOWNLOADED_DATASETS_PATH, config.HF_CACHE_HOME]
    own = [split.dataset] if Path(split.dataset).is_dir() else caches
    return tuple(os.path.realpath(str(root)) for root in own)


def _reason(error: BaseException) -> str:
    """One line: the library wraps what went wrong in errors that only say that something did."""
    while error.__cause__ is not None:
        error = error.__cause__
    return " ".join(str(error).split())[:300] or type(error).__name__
