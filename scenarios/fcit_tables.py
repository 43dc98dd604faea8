"""FCIT's published facts (arXiv 2503.12897 and its data release): datasets, groups, files, schedules, scorers.

Two orders are written down nowhere reliably: which dataset a `Task<k>` folder holds. They are read off the data.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from fedstrata.core.errors import unknown

BOX = re.compile(r"\[\s*[\d.]+\s*,\s*[\d.]+\s*,\s*[\d.]+\s*,\s*[\d.]+\s*\]")
BETAS = (0.5, 1.0, 5.0)


@dataclass(frozen=True)
class Dataset:
    """One of the twelve: the first folder of its pictures' paths, its test file, its published metric and others."""

    prefix: str
    test: str
    metric: str = "fcit_exact"
    beside: tuple[str, ...] = ()


@dataclass(frozen=True)
class Setting:
    """One of the four: where its partition lies, how many stages, and who trains what (het: 0-based folders)."""

    folder: str
    stages: int
    het: tuple[tuple[int, ...], ...] | None = None


CAPTIONS = ("bleu4", "meteor", "rouge_l", "cider")
DATASETS: Mapping[str, Dataset] = {
    "ImageNet-R": Dataset("ImageNet-R", "ImageNet-R/test.json"),
    "ArxivQA": Dataset("ArxivQA", "ArxivQA/test_1w.json", beside=("option_letter",)),
    "IconQA": Dataset("IconQA", "IconQA/val.json"),
    "CLEVR-Math": Dataset("CLEVR", "CLEVR-Math/test_1w.json"),
    "OCRVQA": Dataset("OCR-VQA", "OCRVQA/test_1w.json"),
    "Flickr30k": Dataset("Flickr30k", "Flickr30k-cap/val_brief.json", "caption_average", CAPTIONS),
    "FigureQA": Dataset("FigureQA", "FigureQA/test.json", "fcit_substring", ("substring",)),
    "super-CLEVR": Dataset("super-CLEVR", "super-CLEVR/test.json"),
    "DVQA": Dataset("DVQA", "DVQA/test.json", "fcit_substring", ("substring",)),
    "TabMWP": Dataset("TabMWP", "TabMWP/test.json"),
    "AOKVQA": Dataset("COCO2014", "AOKVQA/val.json"),
    "Grounding": Dataset("COCO2014", "Grounding/test_6000.json", "fcit_iou", ("iou",)),
}
REFERENCES: Mapping[str, str] = {"Flickr30k": "Flickr30k-cap/val_coco_type.json"}
"""COCO files with several references a picture: its image_id i belongs to the i-th test row, counted from 1."""

GROUPS: Mapping[str, tuple[str, ...]] = {
    "General": ("AOKVQA", "IconQA", "Grounding", "ImageNet-R"),
    "Chart": ("ArxivQA", "FigureQA", "DVQA"),
    "Math": ("CLEVR-Math", "super-CLEVR", "TabMWP"),
    "Other": ("Flickr30k", "OCRVQA"),
}

_TASK_HET = (
    (1, 2, 4, 5, 6),
    (3, 4, 5, 7, 7),
    (0, 2, 3, 4, 5),
    (0, 0, 1, 3, 7),
    (1, 2, 4, 4, 5),
    (0, 3, 5, 7, 7),
    (2, 2, 5, 7, 7),
    (5, 5, 5, 6, 6),
)
_CAP_HET = ((0, 1, 1, 3, 3), (0, 2, 2, 2, 3), (1, 2, 2, 3, 3), (0, 0, 0, 1, 1))
SETTINGS: Mapping[str, Setting] = {
    "task-hom": Setting("Task-related/seq", 8),
    "task-het": Setting("Task-related/seq", 8, _TASK_HET),
    "cap-hom": Setting("Capability-related/cap", 4),
    "cap-het": Setting("Capability-related/cap", 4, _CAP_HET),
}


@dataclass(frozen=True)
class FcitRule:
    """A scenario file's `fcit` block: which of the four settings, and three roots (relative to the scenario's root)."""

    setting: str
    instructions: str = "instructions"
    partitions: str = "partitioned_data"
    images: str = "datasets"

    def __post_init__(self) -> None:
        if self.setting not in SETTINGS:
            raise unknown("setting", self.setting, SETTINGS)


def dataset_of(record: Mapping[str, Any]) -> str:
    """Which dataset a record belongs to, by the first folder of its picture's path; `?folder` where none is known.

    AOKVQA and Grounding share COCO's pictures: a record whose answer is a box belongs to Grounding.
    """
    image = record.get("image")
    prefix = str(image).replace("\\", "/").removeprefix("./").lstrip("/").split("/")[0] if image else "(no image)"
    if prefix == "COCO2014":
        return "Grounding" if _has_box(record) else "AOKVQA"
    return next((name for name, dataset in DATASETS.items() if dataset.prefix == prefix), f"?{prefix}")


def _has_box(record: Mapping[str, Any]) -> bool:
    turns = record.get("conversations")
    said: Sequence[Any] = turns if isinstance(turns, list) else ()
    answers = [turn.get("value") for turn in said if isinstance(turn, Mapping) and turn.get("from") == "gpt"]
    asked = [turn.get("value") for turn in said if isinstance(turn, Mapping) and turn.get("from") == "human"]
    boxes = any(BOX.search(str(answer)) for answer in (*answers, record.get("answer_bbox", "")))
    # the other way round: a question that shows a box and wants words is a grounding record too
    return boxes or any(BOX.search(str(question)) for question in asked)
