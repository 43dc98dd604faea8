"""Every record form: what it reads, what it refuses, and that `auto` tells them apart."""

from typing import Any

import pytest

from fedstrata.core.errors import BadInput
from fedstrata.scenarios.formats import FORMATS, Parsed

CHAT = [{"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": " red "}]
FIELDS = {"question": "ask", "answer": "say", "image": "pic"}
GOOD: list[tuple[str, dict[str, Any], Parsed]] = [
    ("llava", {"id": 7, "conversations": CHAT}, Parsed((("What?", "red"),), None, 7)),
    ("llava", {"question_id": "q", "image": "1.png", "conversations": CHAT}, Parsed((("What?", "red"),), "1.png", "q")),
    ("fcit", {"question_id": 3, "image": "1.png", "text": "What?\n<image>", "answer": "red"},
     Parsed((("What?", "red"),), "1.png", 3)),
    ("fcit", {"question_id": "3", "text": "Where?", "answer_bbox": "[0.1, 0.2, 0.3, 0.4]", "size": [4, 4]},
     Parsed((("Where?", "[0.1, 0.2, 0.3, 0.4]"),), None, "3")),
    ("fcit", {"text": "Where?", "answer": "a phrase", "answer_bbox": [1, 2.5, 3, 4]},
     Parsed((("Where?", "[1, 2.5, 3, 4]"),), None, None)),
    ("fcit", {"id": 1, "conversations": CHAT}, Parsed((("What?", "red"),), None, 1)),
    ("alpaca", {"instruction": "Add.", "input": "1 2", "output": "3"}, Parsed((("Add.\n1 2", "3"),), None, None)),
    ("alpaca", {"instruction": "Say.", "input": " ", "output": "so"}, Parsed((("Say.", "so"),), None, None)),
    ("alpaca", {"instruction": "Say.", "output": "so", "id": 0}, Parsed((("Say.", "so"),), None, 0)),
    ("trace", {"prompt": "What?", "answer": 12}, Parsed((("What?", "12"),), None, None)),
    ("trace", {"prompt": "What?", "answer": 0.5}, Parsed((("What?", "0.5"),), None, None)),
    ("trace", {"prompt": "a<image>b <image>", "answer": 10**30}, Parsed((("ab", "1" + "0" * 30),), None, None)),
    ("trace", {"prompt": "What?", "answer": "red", "image": None, "id": None}, Parsed((("What?", "red"),), None, None)),
    ("fields", {"ask": "What?", "say": "red", "pic": "1.png", "id": "a"}, Parsed((("What?", "red"),), "1.png", "a")),
    ("fields", {"ask": "What?", "say": "red", "image": "not asked for"}, Parsed((("What?", "red"),), None, None)),
]  # fmt: skip


@pytest.mark.parametrize(("name", "record", "parsed"), GOOD)
def test_a_record_is_read_in_its_form_and_by_auto(name: str, record: dict[str, Any], parsed: Parsed) -> None:
    assert FORMATS[name](record, "x.json: record 1", FIELDS) == parsed
    if name != "fields":
        assert FORMATS["auto"](record, "x.json: record 1", {}) == parsed


def test_turns_without_an_answer_are_ignored_and_counted() -> None:
    said = [("system", "Be brief."), ("gpt", "Hi"), ("human", "A?"), ("gpt", "a"), ("user", "B?"), ("human", "C?")]
    said += [("assistant", "c"), ("human", "left open")]
    record = {"conversations": [{"from": who, "value": text} for who, text in said]}
    parsed = FORMATS["llava"](record, "x", {})
    assert (parsed.turns, parsed.ignored) == ((("A?", "a"), ("C?", "c")), 4)


BAD: list[tuple[str, dict[str, Any], str]] = [
    ("auto", {"question": "What?", "answer": "red"}, "must be of a known form: llava .conversations., fcit .*; got the "
     "keys 'question, answer'"),
    ("auto", {}, "must be of a known form"),
    ("auto", {"\ud800": 1}, r"got the keys '\\ud800'"),
    ("llava", {"conversations": CHAT[:1]}, "conversations must hold a human turn followed by a gpt turn, got 'human'"),
    ("fcit", {"text": "What?"}, "answer must be a text, got None"),
    ("fcit", {"text": "What?", "answer_bbox": "[1, 2, 3]"}, "answer_bbox must be four numbers, got '"),
    ("fcit", {"text": "What?", "answer_bbox": {"x": 1}}, "answer_bbox must be four numbers, got a dict of 1"),
    ("fcit", {"text": ["What?"], "answer": "red"}, "text must be a text, got a list of 1"),
    ("alpaca", {"instruction": "Add.", "input": [1], "output": "3"}, "input must be a text, got a list of 1"),
    ("alpaca", {"instruction": "Add.", "output": "  "}, "output must not be empty"),
    ("alpaca", {"instruction": "<image>", "output": "a"}, "instruction must not be empty"),
    ("trace", {"prompt": "What?", "answer": True}, "answer must be a text, got True"),
    ("trace", {"prompt": "What?", "answer": float("nan")}, "answer must be a text, got nan"),
    ("alpaca", {"instruction": "Add.", "input": float("nan"), "output": "3"}, "input must be a text, got nan"),
    ("trace", {"prompt": "What?", "answer": float("-inf")}, "answer must be a text, got -inf"),
    ("trace", {"prompt": "a\0b", "answer": "red"}, "prompt must be Unicode text without NUL"),
    ("trace", {"prompt": "What?", "answer": "\udfff"}, "answer must be Unicode text"),
    ("trace", {"prompt": "What?", "answer": "red", "image": ["1.png"]}, "image must be a path, got a list of 1"),
    ("fields", {"question": "What?", "say": "red"}, "ask must be a text, got None"),
]  # fmt: skip


@pytest.mark.parametrize(("name", "record", "message"), BAD)
def test_a_mistake_names_record_key_rule_and_what_came(name: str, record: dict[str, Any], message: str) -> None:
    with pytest.raises(BadInput, match=message) as caught:
        FORMATS[name](record, "x.json: record 9", FIELDS)
    assert str(caught.value).startswith("x.json: record 9")
