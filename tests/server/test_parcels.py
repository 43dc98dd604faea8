"""Parcels: what is packed comes out equal, arrays travel beside the pickle, shared records once."""

import pickle

import numpy as np
import pytest
from flwr.app import Array, ArrayRecord, ConfigRecord, Message, RecordDict

from fedstrata.server.flower_private import become_server
from fedstrata.server.parcels import APART, Parcel, pack, unpack

SIZES = (0, 1, 3, APART // 4 - 33, APART // 4 - 32, APART // 4, 3 * APART)


def record(sizes: tuple[int, ...] = SIZES) -> ArrayRecord:
    arrays = [np.arange(size, dtype=np.float32) for size in sizes]
    return ArrayRecord({f"a{index}": Array(array) for index, array in enumerate(arrays)})


def message(content: ArrayRecord) -> Message:
    become_server()
    return Message(RecordDict({"arrays": content, "say": ConfigRecord({"word": "x"})}), 2, "train")


@pytest.mark.parametrize("lend", [False, True])
def test_what_is_packed_comes_out_equal(lend: bool) -> None:
    sent = message(record())
    (came,) = unpack(pack([sent]), lend=lend)
    assert came.metadata == sent.metadata
    assert came.content["say"] == sent.content["say"]
    for name, array in sent.content["arrays"].items():
        other = came.content["arrays"][name]
        assert (other.dtype, other.shape, other.stype, bytes(other.data)) == (
            array.dtype, array.shape, array.stype, array.data)  # fmt: skip
        assert np.array_equal(other.numpy(), array.numpy())
        assert lend or type(other.data) is bytes


def test_large_arrays_are_not_in_the_pickle_and_need_no_copy() -> None:
    content = record((8 * APART,))
    parcel = pack(content)
    assert len(parcel.head) < 1000
    memory = bytearray(parcel.buffers[0])
    lent = unpack(Parcel(parcel.head, [memory]), lend=True)["a0"]
    memory[-4:] = np.float32(7).tobytes()
    assert lent.numpy()[-1] == 7
    assert content["a0"].numpy()[-1] != 7


def test_numbered_records_stay_behind_and_are_shared_within_a_parcel_only() -> None:
    one, two = record((4,)), record((5,))
    numbers = {id(one): 0, id(two): 1}
    parcel = pack([message(one), message(one), message(two)], lambda found: numbers[id(found)])
    assert not parcel.buffers
    known = [one, two]
    first, second = unpack(parcel, known.__getitem__), unpack(parcel, known.__getitem__)
    assert first[0].content["arrays"] is first[1].content["arrays"]
    assert first[2].content["arrays"] == two
    del first[0].content["arrays"]["a0"]  # what one cohort does to its messages is nothing to the next one
    assert second[0].content["arrays"] == one == record((4,))
    with pytest.raises(pickle.UnpicklingError, match="array record 0 is not in the parcel"):
        unpack(parcel)
