"""Compressed uploads: sizes, errors, and that nothing is lost over rounds."""

import numpy as np
import pytest
from flwr.app import Message, RecordDict
from hypothesis import given, settings
from hypothesis import strategies as st

from fedstrata.core import codec, records
from fedstrata.core.adapters import Flat
from fedstrata.core.codec import CODES, HALF, SCALES, declared, encode, restore
from fedstrata.core.records import Binding, TrainReply
from fedstrata.server.flower_private import become_server

KINDS = ["bfloat16", "int8"]


def pair(size: int, seed: int = 0, tails: float = 5.0) -> tuple[Flat, Flat]:
    """An adapter that was sent and one that was trained from it; updates have heavy tails."""
    rng = np.random.default_rng(seed)
    start = (0.02 * rng.standard_normal(size)).astype(np.float32)
    return start, start + (1e-4 * rng.standard_t(tails, size)).astype(np.float32)


def error(start: Flat, flat: Flat, seen: Flat) -> float:
    return float(np.linalg.norm((seen - flat).astype(np.float64)) / np.linalg.norm((flat - start).astype(np.float64)))


@pytest.mark.parametrize(("kind", "most"), [("bfloat16", 0.003), ("int8", 0.01)])
def test_an_update_survives_to_a_hundredth_of_its_norm(kind: str, most: float) -> None:
    start, flat = pair(200_000)
    parts, _ = encode(flat, start, None, kind)
    assert 0 < error(start, flat, restore(start, parts)) <= most


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("size", [1, 63, 64, 65, 16 * 1024, 40_001])
def test_the_parts_are_as_declared_whatever_the_size(kind: str, size: int) -> None:
    start, flat = pair(size)
    parts, left = encode(flat, start, None, kind)
    assert {name: (str(part.dtype), len(part)) for name, part in parts.items()} == declared(kind, size)
    assert left.shape == flat.shape
    assert left == pytest.approx(flat - restore(start, parts), abs=1e-12)


def test_int8_costs_a_byte_and_a_thirtysecond_per_number() -> None:
    start, flat = pair(6400)
    parts, _ = encode(flat, start, None, "int8")
    assert sum(part.nbytes for part in parts.values()) == 6400 + 2 * 100 == codec.nbytes("int8", 6400)
    assert [codec.nbytes(kind, 65) for kind in ("float32", "bfloat16", "int8")] == [260, 130, 69]


def test_int8_by_hand() -> None:
    start = np.zeros(3, np.float32)
    parts, left = encode(np.array([127, -64, 0.4], np.float32), start, None, "int8")
    assert parts[CODES].tolist() == [127, -64, 0]
    assert parts[SCALES].tolist() == [0x3F80]  # bfloat16's 1
    assert restore(start, parts).tolist() == [127, -64, 0]
    assert left.tolist() == [0, 0, pytest.approx(0.4)]


def test_bfloat16_rounds_to_nearest_and_ties_to_even() -> None:
    start = np.zeros(4, np.float32)
    flat = np.array([1 + 2**-9, 1 + 3 * 2**-8, 1 + 2**-8, -3.0], np.float32)
    parts, _ = encode(flat, start, None, "bfloat16")
    assert restore(start, parts).tolist() == [1, 1 + 2**-6, 1, -3]
    assert parts[HALF].dtype == np.uint16


@settings(max_examples=40, deadline=None)
@given(st.lists(st.floats(-(2.0**100), 2.0**100, width=32), min_size=1, max_size=200))
def test_no_int8_is_further_off_than_half_a_step_of_its_group(values: list[float]) -> None:
    flat, start = np.array(values, np.float32), np.zeros(len(values), np.float32)
    parts, left = encode(flat, start, None, "int8")
    assert np.abs(parts[CODES].astype(int)).max() <= 127
    for first in range(0, len(flat), 64):
        step = np.abs(flat[first : first + 64]).max() / 127
        assert np.abs(left[first : first + 64]).max() <= 0.51 * step + 1e-37


def test_an_unchanged_adapter_comes_back_bit_for_bit() -> None:
    start, _ = pair(1000)
    for kind in KINDS:
        parts, left = encode(start, start, None, kind)
        assert restore(start, parts).tobytes() == start.tobytes()
        assert not left.any()


@pytest.mark.parametrize("kind", KINDS)
def test_error_feedback_loses_nothing_over_rounds(kind: str) -> None:
    """The sum of what the server saw is the sum of all updates, but for the last residual; without it, it drifts."""
    update = pair(2000)[1] - pair(2000)[0]
    seen, blind, residual = np.zeros(2000), np.zeros(2000), None
    start = np.zeros(2000, np.float32)
    for _ in range(200):
        parts, residual = encode(update, start, residual, kind)
        seen += restore(start, parts)
        blind += restore(start, encode(update, start, None, kind)[0])
    exact = 200 * update.astype(np.float64)
    assert residual is not None
    assert seen + residual == pytest.approx(exact, abs=1e-9)
    assert np.linalg.norm(seen - exact) < np.linalg.norm(blind - exact) / 50
    assert np.linalg.norm(seen / 200 - update) < 1e-4 * np.linalg.norm(update)


def test_an_adapter_that_is_not_finite_leaves_no_residual_and_cannot_be_taken_for_a_good_one() -> None:
    start, flat = pair(200)
    for wrong in (np.nan, np.inf):
        flat[70] = wrong
        for kind in KINDS:
            parts, left = encode(flat, start, None, kind)
            assert not left.any()
            bad = not codec.finite(parts[SCALES]) if SCALES in parts else not np.isfinite(restore(start, parts)).all()
            assert bad


def test_a_factor_scales_the_update_of_any_kind() -> None:
    start, flat = pair(300)
    for parts in ({codec.FLAT: flat}, *(encode(flat, start, None, kind)[0] for kind in KINDS)):
        half = restore(start, parts, 0.5)
        assert half - start == pytest.approx((restore(start, parts) - start) / 2, abs=2e-9)


def test_another_kind_is_refused() -> None:
    start, flat = pair(3)
    with pytest.raises(ValueError, match="must be bfloat16 or int8, got 'int4'"):
        encode(flat, start, None, "int4")


def test_a_message_carries_the_parts_and_is_read_back_with_the_start() -> None:
    become_server()
    start, flat = pair(640)
    parts, _ = encode(flat, start, None, "int8")
    reply = TrainReply(Binding("r", 1, 1, 0), flat, 3, 0.5, 1, 0.1)
    message = records.train_reply(reply, Message(RecordDict(), 2, records.TRAIN), parts)
    assert records.tensor_bytes([message]) == 640 + 20
    assert records.read_train_reply(message, start).flat.tobytes() == restore(start, parts).tobytes()
    with pytest.raises(KeyError, match="flat"):
        records.read_train_reply(message)
