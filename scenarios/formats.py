"""Record forms that instruction data come in: from a record to its turns, its picture's name and its id.

llava   {"conversations": [{"from": "human", "value": ...}, {"from": "gpt", ...}], "image": ...}  (LLaVA's
        Finetune_Custom_Data.md, FCIT's training files); `<image>` may stand anywhere, a turn nobody answers is ignored
fcit    {"question_id", "image", "text", "answer"}, Grounding's with "answer_bbox" and "size"  (FCIT's tests), or llava
alpaca  {"instruction", "input", "output"}  (Stanford Alpaca)
trace   {"prompt", "answer"}  (TRACE, arXiv 2310.06762)
fields  keys named by the task's `fields`
auto    whichever of them the record's keys fit

Everywhere `id` or `question_id` is the id, `image` the picture, and other keys are ignored.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from fedstrata.core import boxes
from fedstrata.core.errors import BadInput
from fedstrata.scenarios.example import ImageSource
from fedstrata.scenarios.jsonfile import brief

IMAGE_TAG = "<image>"
ASKS, ANSWERS = ("human", "user"), ("gpt", "assistant")


@dataclass(frozen=True)
class Parsed:
    """A record's questions with their answers; `image` as the record names it; `ignored` turns had no answer."""

    turns: tuple[tuple[str, str], ...]
    image: str | ImageSource | None
    id: object
    ignored: int = 0


Fields = Mapping[str, str]
Parser = Callable[[Mapping[str, Any], str, Fields], Parsed]


def llava(record: Mapping[str, Any], where: str, fields: Fields) -> Parsed:
    turns = typed(record.get("conversations"), list, f"{where}: conversations", "a list of turns")
    said = [_turn(turn, f"{where}: turn {place}") for place, turn in enumerate(turns, 1)]
    pairs = [
        (_question(ask[1], where), _filled(reply[1], f"{where}: answer"))
        for ask, reply in pairwise(said)
        if ask[0] in ASKS and reply[0] in ANSWERS
    ]
    if not pairs:
        came = brief(", ".join(who for who, _ in said))
        raise BadInput(f"{where}: conversations must hold a human turn followed by a gpt turn, got {came}")
    return Parsed(tuple(pairs), _image(record, where), _id(record), len(said) - 2 * len(pairs))


def fcit(record: Mapping[str, Any], where: str, fields: Fields) -> Parsed:
    if "conversations" in record:
        return llava(record, where, fields)
    if "answer_bbox" in record:
        record = {**record, "answer": _box(record["answer_bbox"], where)}
    return _single(record, where, "text", "answer")


def alpaca(record: Mapping[str, Any], where: str, fields: Fields) -> Parsed:
    question = _said(record, "instruction", where)
    more = record.get("input")
    if more is not None and (not isinstance(more, str) or more.strip()):
        question = f"{question}\n{_said(record, 'input', where)}"
    return Parsed(((question, _said(record, "output", where)),), _image(record, where), _id(record))


def trace(record: Mapping[str, Any], where: str, fields: Fields) -> Parsed:
    return _single(record, where, "prompt", "answer")


def named(record: Mapping[str, Any], where: str, fields: Fields) -> Parsed:
    keys = {name: fields.get(name, name) for name in ("question", "answer", "image")}
    return _single(record, where, keys["question"], keys["answer"], keys["image"])


def auto(record: Mapping[str, Any], where: str, fields: Fields) -> Parsed:
    for name, keys in SIGNS:
        if all(key in record for key in keys):
            return FORMATS[name](record, where, fields)
    known = ", ".join(f"{name} ({' + '.join(keys)})" for name, keys in SIGNS)
    raise BadInput(f"{where}: must be of a known form: {known}; got the keys {brief(', '.join(record))}")


SIGNS = (
    ("llava", ("conversations",)),
    ("fcit", ("text", "answer")),
    ("fcit", ("text", "answer_bbox")),
    ("alpaca", ("instruction", "output")),
    ("trace", ("prompt", "answer")),
)
FORMATS: Mapping[str, Parser] = {
    "llava": llava,
    "fcit": fcit,
    "alpaca": alpaca,
    "trace": trace,
    "fields": named,
    "auto": auto,
}


def typed(value: Any, kind: type, where: str, rule: str) -> Any:
    """`value`, if it is of this kind."""
    if not isinstance(value, kind):
        raise BadInput(f"{where} must be {rule}, got {brief(value)}")
    return value


def clean(text: str, where: str) -> str:
    """Refuses what no tokenizer takes: NUL characters and halves of surrogate pairs."""
    if "\0" in text or (not text.isascii() and any("\ud800" <= mark <= "\udfff" for mark in text)):
        raise BadInput(f"{where} must be Unicode text without NUL characters, got {brief(text)}")
    return text


def _single(record: Mapping[str, Any], where: str, question: str, answer: str, image: str = "image") -> Parsed:
    turn = (_said(record, question, where), _said(record, answer, where))
    return Parsed((turn,), _image(record, where, image), _id(record))


def _said(record: Mapping[str, Any], key: str, where: str) -> str:
    value = record.get(key)
    if isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < float("inf"):
        # answers of arithmetic tasks; not NaN, which stands for missing ones
        value = str(value)
    text = clean(typed(value, str, f"{where}: {key}", "a text"), f"{where}: {key}")
    return _filled(text.replace(IMAGE_TAG, ""), f"{where}: {key}")


def _box(value: Any, where: str) -> str:
    """The box as text; four numbers, as a text or a list."""
    text = str(value) if isinstance(value, str | list) else ""
    if boxes.read(text) is None:
        raise BadInput(f"{where}: answer_bbox must be four numbers, got {brief(value)}")
    return text


def _turn(turn: Any, where: str) -> tuple[str, str]:
    """(who, what they said)."""
    fields = typed(turn, dict, where, "a mapping with from and value")
    who = typed(fields.get("from"), str, f"{where}: from", "human or gpt")
    return who, clean(typed(fields.get("value"), str, f"{where}: value", "a text"), f"{where}: value")


def _question(text: str, where: str) -> str:
    return _filled(text.replace(IMAGE_TAG, ""), f"{where}: question (without {IMAGE_TAG})")


def _filled(text: str, where: str) -> str:
    if not text.strip():
        raise BadInput(f"{where} must not be empty, got {brief(text)}")
    return text.strip()


def _image(record: Mapping[str, Any], where: str, key: str = "image") -> str | ImageSource | None:
    image = record.get(key)
    if image is None or hasattr(image, "open"):  # a dataset brings its pictures with it
        return image
    return str(typed(image, str, f"{where}: {key}", "a path"))


def _id(record: Mapping[str, Any]) -> object:
    return record["id"] if "id" in record else record.get("question_id")
