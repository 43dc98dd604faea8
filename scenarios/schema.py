"""Strict reading of YAML blocks into dataclasses; every mistake names the file and the key, the rule and what came."""

import types
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, fields
from typing import Any, TypeVar, get_args, get_origin, get_type_hints

from fedstrata.core.errors import BadInput, unknown
from fedstrata.scenarios.jsonfile import brief

Block = TypeVar("Block")
WORDS = {int: "a whole number", float: "a number", str: "a text", bool: "true or false"}


def fill(block: type[Block], tree: object, where: str) -> Block:
    """`block(**tree)` for a dataclass of scalars whose own rules raise `BadInput("key: ...")`.

    Raises:
        BadInput: no mapping, an unknown or missing key, a wrong type, or the block's own rule; begins with `where`.
    """
    hints = get_type_hints(block)
    values = mapping(tree, where)
    for key, value in values.items():
        if key not in hints:
            raise unknown(f"{where}.{key}", key, hints)
        expect(_fits(value, hints[key]), f"{where}.{key}", _word(hints[key]), value)
    needed = [entry.name for entry in fields(block) if entry.default is MISSING and entry.default_factory is MISSING]  # type: ignore[arg-type]
    for key in needed:
        if key not in values:
            raise BadInput(f"{where}: must have the key {key}, got {', '.join(values) or 'no key'}")
    try:
        return block(**values)
    except BadInput as error:
        raise BadInput(f"{where}.{error}") from None


def mapping(tree: object, where: str) -> Mapping[str, Any]:
    """`tree` as a mapping with text keys, or `BadInput`."""
    expect(isinstance(tree, Mapping), where, "a mapping of keys to values", tree)
    assert isinstance(tree, Mapping)
    for key in tree:
        expect(_fits(key, str), where, "a mapping whose keys are texts (quote them)", key)
    return tree


def listing(tree: object, where: str, rule: str) -> Sequence[Any]:
    """`tree` as a list with at least one entry, or `BadInput`."""
    expect(isinstance(tree, list) and len(tree) > 0, where, rule, tree)
    assert isinstance(tree, list)
    return tree


def expect(holds: bool, where: str, rule: str, came: object) -> None:
    """Raises `BadInput` unless the rule `holds`; what came is cut short."""
    if not holds:
        raise BadInput(f"{where}: must be {rule}, got {brief(came)}")


def _fits(value: object, hint: Any) -> bool:
    if isinstance(hint, types.UnionType):
        return any(_fits(value, choice) for choice in get_args(hint))
    if get_origin(hint) is list:
        return isinstance(value, list) and all(_fits(entry, get_args(hint)[0]) for entry in value)
    if get_origin(hint) is dict:
        return isinstance(value, dict) and all(_fits(part, str) for pair in value.items() for part in pair)
    if isinstance(value, bool):
        return hint is bool
    if isinstance(value, str) and any("\ud800" <= mark <= "\udfff" for mark in value):
        return False  # half of a surrogate pair, which YAML can spell but no file or tokenizer can hold
    return isinstance(value, int | float if hint is float else hint)


def _word(hint: Any) -> str:
    if isinstance(hint, types.UnionType):
        return " or ".join(_word(choice) for choice in get_args(hint))
    if get_origin(hint) is list:
        return f"a list, each {_word(get_args(hint)[0])}"
    if get_origin(hint) is dict:
        return "a mapping of texts to texts"
    return "null" if hint is type(None) else WORDS[hint]
