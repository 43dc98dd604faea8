"""The running mean: exact where it can be, close where it cannot, and small."""

import tracemalloc

import numpy as np
import pytest
import torch
from flwr.app import Array
from hypothesis import given, settings
from hypothesis import strategies as st

from fedstrata.core.adapters import Flat
from fedstrata.core.packing import gather, owned, pack, vector, view
from fedstrata.core.streaming import RunningMean, distance


def mean(flats: list[Flat], weights: list[float]) -> Flat:
    running = RunningMean()
    for flat, weight in zip(flats, weights, strict=True):
        running.add(flat, weight)
    return running.value()


def drawn(count: int, size: int, seed: int = 0) -> list[Flat]:
    rng = np.random.default_rng(seed)
    return [rng.standard_normal(size, dtype=np.float32) for _ in range(count)]


def test_by_hand() -> None:
    flats = [np.array(values, np.float32) for values in ([1, 2], [5, -2])]
    assert mean(flats, [1, 3]).tolist() == [4, -1]  # (1·1 + 3·5) / 4, (1·2 + 3·(−2)) / 4
    assert mean(flats, [10, 30]).tolist() == [4, -1]


def test_one_adapter_or_equal_ones_come_out_bit_for_bit() -> None:
    (flat,) = drawn(1, 1001)
    assert mean([flat], [7]).tobytes() == flat.tobytes()
    assert mean([flat, flat, flat], [7, 1, 30]).tobytes() == flat.tobytes()


@settings(max_examples=20, deadline=None)
@given(st.lists(st.integers(1, 10_000), min_size=1, max_size=60), st.integers(0, 99))
def test_it_is_the_mean_in_float64_to_a_millionth(weights: list[int], seed: int) -> None:
    flats = drawn(len(weights), 777, seed)
    exact = sum(w * f.astype(np.float64) for w, f in zip(weights, flats, strict=True)) / sum(weights)
    came = mean(flats, list(map(float, weights)))
    assert np.linalg.norm(came - exact) <= 1e-6 * np.linalg.norm(exact)


def test_hundreds_of_adapters_stay_within_a_millionth() -> None:
    flats = drawn(300, 2000)
    exact = np.mean([flat.astype(np.float64) for flat in flats], axis=0)
    assert np.linalg.norm(mean(flats, [1.0] * 300) - exact) <= 1e-6 * np.linalg.norm(exact)


def test_neither_threads_nor_the_place_of_a_number_show_in_the_bits() -> None:
    flats, before = drawn(3, 100_003), torch.get_num_threads()
    whole = mean(flats, [1, 2, 3])
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            assert mean(flats, [1, 2, 3]).tobytes() == whole.tobytes()
    finally:
        torch.set_num_threads(before)
    for begin, end in ((0, 7), (5, 1000), (99_990, 100_003)):
        assert mean([flat[begin:end] for flat in flats], [1, 2, 3]).tobytes() == whole[begin:end].tobytes()


def test_what_is_added_is_not_changed_and_may_be_read_only() -> None:
    first, second = drawn(2, 50)
    second.flags.writeable = False
    copies = first.copy(), second.copy()
    mean([first, second], [1, 1])
    assert (first == copies[0]).all()
    assert (second == copies[1]).all()


def test_bad_input_is_refused() -> None:
    running = RunningMean()
    with pytest.raises(ValueError, match="a mean of no adapters"):
        running.value()
    with pytest.raises(ValueError, match="weight must be above 0, got 0"):
        running.add(np.zeros(3, np.float32), 0)
    running.add(np.zeros(3, np.float32), 1)
    with pytest.raises(ValueError, match="one length, got 3 and 4"):
        running.add(np.zeros(4, np.float32), 1)


@pytest.mark.parametrize("count", [4, 40])
def test_its_memory_is_one_adapter_however_many_there_are(count: int) -> None:
    sources = drawn(2, 1_000_000)
    mean(sources, [1, 1])  # what torch needs to start
    tracemalloc.start()
    try:
        running = RunningMean()
        for number in range(count):
            running.add(sources[number % 2], 1 + number)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak <= 1.1 * sources[0].nbytes


def test_the_distance_is_the_norm_of_the_difference() -> None:
    one, two = drawn(2, 20_001)
    assert distance(one, two) == pytest.approx(float(np.linalg.norm(one.astype(np.float64) - two)), rel=1e-12)
    assert distance(one, one) == 0


@pytest.mark.parametrize(
    "value",
    [
        np.arange(5, dtype=np.float32),
        np.zeros((0, 0), np.float32),
        np.array(2.5),
        np.arange(6, dtype=np.int8).reshape(2, 3),
        np.arange(6, dtype=np.uint16).reshape(2, 3).T,
    ],
)
def test_packed_arrays_are_flowers_and_views_are_what_flower_decodes(value: np.ndarray) -> None:
    packed = pack(value)
    assert (packed.dtype, packed.shape, packed.stype) == (str(value.dtype), value.shape, Array(value).stype)
    if value.flags.c_contiguous:
        assert packed.data == Array(value).data
    for array in (packed, Array(value)):
        assert (array.numpy() == value).all()
        assert (view(array) == value).all()
        assert view(array).dtype == value.dtype
        assert view(array).shape == value.shape


def test_a_vector_is_filled_in_place() -> None:
    array, flat = vector(5)
    flat[:] = np.arange(5)
    assert array.numpy().tolist() == [0, 1, 2, 3, 4]
    assert owned(gather([("flat", array)]))["flat"].numpy().tolist() == [0, 1, 2, 3, 4]


@pytest.mark.parametrize(
    ("array", "reason"),
    [
        (Array("float32", (4,), "numpy.ndarray", b"?"), "magic"),
        (Array("float32", (4,), "other", b"?"), "serialised as numpy.ndarray, got 'other'"),
        (Array("float32", (4,), "numpy.ndarray", pack(np.zeros(4, np.float32)).data[:-4]), "buffer is smaller"),
    ],
)
def test_bytes_that_are_no_array_are_refused(array: Array, reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        view(array)
