"""Writes a miniature of FCIT's data in exactly the published layout, to try the fcit-* scenarios without the download.

    python benchmarks/fcit_tree.py /tmp/fcit
    fedstrata run fcit-task-hom scenario.root=/tmp/fcit model.name=tiny model.text_encoder=base model.dtype=float32 \
        model.system=

All twelve datasets, both groupings, three betas, 50 client files a stage; pictures are 32 pixels wide and show the
answer as a colour. The published files' quirks are in it: ids that are missing, collide or are numbers, `question_id`
for `id`, extra keys, a leading `./` and backslashes in pictures' paths, conversations of several turns, exact
duplicates, clients with one row, and captions that are paired with test rows by position alone.
"""

import argparse
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

COLOURS = {"red": (220, 40, 40), "green": (40, 180, 60), "blue": (50, 80, 220), "yellow": (230, 210, 40)}
WORD = "Answer the question using a single word or phrase."
LETTER = "Answer with the option's letter from the given choices directly."
PATHS = {
    "ImageNet-R": "ImageNet-R/{split}/n0{n:07d}/art_{n}.jpg",
    "ArxivQA": "ArxivQA/images/{n}.jpg",
    "IconQA": "IconQA/iconqa_data/iconqa/{split}/choose_txt/{n}/image.png",
    "CLEVR-Math": "CLEVR/images/{split}/CLEVR_{n:06d}.png",
    "OCRVQA": "OCR-VQA/images/{n}.jpg",
    "Flickr30k": "Flickr30k/{split}/{n}.jpg",
    "FigureQA": "FigureQA/images/{n}.png",
    "super-CLEVR": "super-CLEVR/images/superCLEVR_new_{n:06d}.png",
    "DVQA": "DVQA/images/bar_{n}.png",
    "TabMWP": "TabMWP/tables/{n}.png",
    "AOKVQA": "COCO2014/{split}2014/COCO_{n:012d}.jpg",
    "Grounding": "COCO2014/{split}2014/COCO_{n:012d}.jpg",
}
QUESTIONS = {
    "ImageNet-R": f"What object is painted here?\n{WORD}",
    "ArxivQA": f"Which plot fits the paper? A. red B. green C. blue D. yellow\nRationale: see the legend.\n{LETTER}",
    "IconQA": f"Which icon colour is shown?\n{WORD}",
    "CLEVR-Math": f"Subtract all cubes. How many spheres are left?\n{WORD}",
    "OCRVQA": f"Who wrote this book?\n{WORD}",
    "Flickr30k": "What is happening in the image?\nGenerate a brief caption for the image.",
    "FigureQA": f"Is the line smoother than the others?\n{WORD}",
    "super-CLEVR": f"What is the colour of the tiny vehicle?\n{WORD}",
    "DVQA": f"What is the label of the tallest bar?\n{WORD}",
    "TabMWP": f"How much does the item in the table cost?\n{WORD}",
    "AOKVQA": f"Which season does the photo suggest?\n{WORD}",
    "Grounding": "Please provide the bounding box coordinates of the region this sentence describes: the patch.",
}
TESTS = {
    "AOKVQA": "val",
    "ArxivQA": "test_1w",
    "CLEVR-Math": "test_1w",
    "DVQA": "test",
    "FigureQA": "test",
    "Flickr30k": "val_brief",
    "Grounding": "test_6000",
    "IconQA": "val",
    "ImageNet-R": "test",
    "OCRVQA": "test_1w",
    "super-CLEVR": "test",
    "TabMWP": "test",
}
TASKS = ("ImageNet-R", "ArxivQA", "IconQA", "CLEVR-Math", "OCRVQA", "Flickr30k", "FigureQA", "super-CLEVR")
GENERAL = ("AOKVQA", "IconQA", "Grounding", "ImageNet-R")
CAPABILITIES = (
    GENERAL,
    ("Flickr30k", "OCRVQA"),
    ("CLEVR-Math", "super-CLEVR", "TabMWP"),
    ("ArxivQA", "FigureQA", "DVQA"),
)
ANSWERS: Mapping[str, Sequence[str]] = {
    "ArxivQA": "ABCD",
    "CLEVR-Math": "1234",
    "FigureQA": ("yes", "no", "yes", "no"),
    "TabMWP": ("12", "7", "3", "25"),
    "Flickr30k": [f"a {colour} square lies on paper" for colour in COLOURS],
    "Grounding": [f"[0.{n}0, 0.{n}5, 0.{n + 4}0, 0.{n + 4}7]" for n in range(1, 5)],
}


def write_tree(
    root: Path,
    rows: int = 300,
    tests: int = 8,
    betas: Sequence[float] = (0.5, 1.0, 5.0),
    clients: int = 50,
    capabilities: Sequence[Sequence[str]] = CAPABILITIES,
) -> Path:
    """`rows` training rows a stage. `capabilities`: the groups in the order of their Task folders."""
    for name in PATHS:
        _write_tests(root, name, tests)
    for beta in betas:
        for kind, stages in (
            ("Task-related/seq", [(name,) for name in TASKS]),
            ("Capability-related/cap", capabilities),
        ):
            for number, group in enumerate(stages, 1):
                folder = root / "partitioned_data" / kind / str(float(beta)) / f"Task{number}"
                _write_clients(root, folder, group, rows, clients, np.random.default_rng([number, int(beta * 10)]))
    return root


def _write_clients(
    root: Path, folder: Path, group: Sequence[str], rows: int, clients: int, rng: np.random.Generator
) -> None:
    records = [_train(root, group[n % len(group)], n) for n in range(rows - 1)]
    records.append(records[0])  # an exact duplicate
    order = rng.permutation(rows)
    sizes = 1 + rng.multinomial(rows - clients, rng.dirichlet(np.full(clients, 1.0)))
    for client, hand in enumerate(np.split(order, np.cumsum(sizes)[:-1])):
        _dump(folder / f"client_{client}.json", [records[n] for n in hand])


def _train(root: Path, name: str, n: int) -> dict[str, Any]:
    image = _draw(root, name, "train", n)
    said = [("human", f"<image>\n{QUESTIONS[name]}"), ("gpt", _answer(name, n))]
    if name == "Grounding":  # several referring expressions a picture
        said += [("human", QUESTIONS[name].replace("the patch", "the rest")), ("gpt", _answer(name, n + 1))]
    record: dict[str, Any] = {"image": image, "conversations": [{"from": who, "value": text} for who, text in said]}
    if name == "ArxivQA":
        record["image"] = "./" + image
        record["model"] = ""  # an extra key
    if name == "IconQA":
        record["image"] = image.replace("/", "\\")
    if name == "CLEVR-Math":  # the image tag at the end
        record["conversations"][0]["value"] = f"{QUESTIONS[name]}\n<image>"
    ids: dict[str, dict[str, Any]] = {"OCRVQA": {}, "FigureQA": {"id": "same"}, "ImageNet-R": {"question_id": n}}
    return {**ids.get(name, {"id": n}), **record}


def _write_tests(root: Path, name: str, tests: int) -> None:
    folder = root / "instructions" / ("Flickr30k-cap" if name == "Flickr30k" else name)
    rows: list[dict[str, Any]] = []
    for n in range(tests):
        image = _draw(root, name, "val" if name in ("IconQA", "Flickr30k", "AOKVQA") else "test", 1000 + n)
        row: dict[str, Any] = {"question_id": str(n), "image": image, "text": QUESTIONS[name]}
        boxes = {"answer_bbox": _answer(name, n), "size": [32, 32]}
        rows.append({**row, **(boxes if name == "Grounding" else {"answer": _answer(name, n)})})
    _dump(folder / f"{TESTS[name]}.json", rows)
    if name == "Flickr30k":  # file names and ids of the pictures say nothing: only the position counts
        captions = [
            {"image_id": n + 1, "id": 5 * n + k, "caption": f"{_answer(name, n)}{' indeed' * k}."}
            for n in reversed(range(tests))
            for k in range(5)
        ]
        images = [{"id": n + 1, "file_name": f"{n + 1}.jpg"} for n in range(tests)]
        _dump(folder / "val_coco_type.json", {"images": images, "annotations": captions})


def _answer(name: str, n: int) -> str:
    return ANSWERS.get(name, list(COLOURS))[n % 4]


def _draw(root: Path, name: str, split: str, n: int) -> str:
    """Draws the n-th picture once; its path, relative to the pictures' root."""
    path = PATHS[name].format(split=split, n=n)
    target = root / "datasets" / path
    if not target.exists():
        target.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (32, 32), list(COLOURS.values())[n % 4]).save(target)
    return path


def _dump(path: Path, tree: object) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(tree, indent=4), encoding="utf-8")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--rows", type=int, default=300, help="training rows a stage, at least one a client")
    parser.add_argument("--tests", type=int, default=8, help="test rows a dataset")
    given = parser.parse_args()
    write_tree(given.folder, given.rows, given.tests)
    print(given.folder)
