"""Flat adapters: every expected vector is written out by hand."""

import numpy as np
import pytest

from fedstrata.core.adapters import Flat, Layout, feedforward, fresh, unfusable
from fedstrata.core.config import LoraSection, RunConfig
from fedstrata.core.errors import BadInput

TWO = Layout((("first", 2, 3), ("second", 1, 2)))  # (name, out, in): 5 + 3 = 8 parameters per unit of rank


def flat(*values: float) -> Flat:
    return np.array(values, dtype=np.float32)


def test_a_flat_adapter_is_a_then_b_row_major_layer_after_layer() -> None:
    whole = np.arange(16, dtype=np.float32)
    views = TWO.split(whole)
    a, b = views["first"]
    assert a.tolist() == [[0, 1, 2], [3, 4, 5]]
    assert b.tolist() == [[6, 7], [8, 9]]
    a, b = views["second"]
    assert a.tolist() == [[10, 11], [12, 13]]
    assert b.tolist() == [[14, 15]]


def test_join_undoes_split_whatever_the_order_of_the_names() -> None:
    whole = np.arange(24, dtype=np.float32)
    views = TWO.split(whole)
    joined = TWO.join(dict(reversed(views.items())))
    assert joined.dtype == np.float32
    assert joined.tolist() == whole.tolist()


def test_split_gives_views_and_no_copies() -> None:
    whole = np.zeros(8, dtype=np.float32)
    TWO.split(whole)["second"][1][0, 0] = 5
    assert whole.tolist() == [0, 0, 0, 0, 0, 0, 0, 5]


def test_width_size_and_rank_by_hand() -> None:
    assert TWO.width == 8
    assert TWO.size(3) == 24
    assert TWO.rank(np.zeros(24, dtype=np.float32)) == 3


@pytest.mark.parametrize("length", [0, 7, 9, 23])
def test_a_length_that_fits_no_rank_is_refused(length: int) -> None:
    with pytest.raises(ValueError, match=f"a multiple of 8 parameters, got {length}"):
        TWO.split(np.zeros(length, dtype=np.float32))


def test_a_fresh_adapter_changes_nothing_yet() -> None:
    views = TWO.split(fresh(TWO, 4, 0, 0))
    for name, _, inner in TWO.modules:
        a, b = views[name]
        assert not b.any()
        assert a.any()
        assert np.abs(a).max() <= 1 / np.sqrt(inner)
        assert np.abs(a).max() > 0.5 / np.sqrt(inner)  # 8 or more uniform draws, the largest in the upper half


def test_a_fresh_adapter_is_a_pure_function_of_seed_and_names() -> None:
    first = fresh(TWO, 2, 3, "x", 1)
    assert first.tobytes() == fresh(TWO, 2, 3, "x", 1).tobytes()
    assert first.dtype == np.float32
    for other in (fresh(TWO, 2, 4, "x", 1), fresh(TWO, 2, 3, "x", 2), fresh(TWO, 2, 3, "y", 1)):
        assert not np.array_equal(first, other)


def test_a_layout_survives_the_way_through_json() -> None:
    again = Layout.from_json(TWO.to_json())
    assert again == TWO
    assert again.hash == TWO.hash


@pytest.mark.parametrize(
    "other",
    [
        Layout((("first", 2, 3),)),
        Layout((("first", 3, 2), ("second", 1, 2))),  # as many parameters, other shapes
        Layout((("first", 2, 3), ("third", 1, 2))),
        Layout((("second", 1, 2), ("first", 2, 3))),
    ],
)
def test_any_difference_between_layouts_shows_in_the_hash(other: Layout) -> None:
    assert other.hash != TWO.hash


TAILED = Layout(TWO.modules, (("p.weight", (2, 3)), ("p.bias", (2,))))


def test_a_tail_stands_behind_the_low_rank_part() -> None:
    whole = np.arange(16 + 8, dtype=np.float32)
    assert (TAILED.tail, TAILED.size(2), TAILED.rank(whole)) == (8, 24, 2)
    low, tail = TAILED.cut(whole)
    assert (low.tolist(), tail.tolist()) == (list(range(16)), list(range(16, 24)))
    assert (
        TAILED.join(TAILED.split(whole)).tolist() == TAILED.lora.join(TAILED.lora.split(low)).tolist() == low.tolist()
    )
    views = TAILED.dense_views(tail)
    assert views["p.weight"].tolist() == [[16, 17, 18], [19, 20, 21]]
    assert views["p.bias"].tolist() == [22, 23]
    with pytest.raises(ValueError, match="a multiple of 8 parameters and 8 more, got 25"):
        TAILED.rank(np.zeros(25, dtype=np.float32))


def test_a_fresh_tail_is_zero_behind_the_same_draw() -> None:
    assert fresh(TAILED, 2, 0, 0).tolist() == [*fresh(TWO, 2, 0, 0).tolist(), *[0.0] * 8]


def test_a_tail_shows_in_json_and_hash_and_its_absence_does_not() -> None:
    assert Layout.from_json(TAILED.to_json()) == TAILED
    assert TAILED.hash != TWO.hash
    assert TAILED.lora == TWO
    assert TWO.to_json() == '[["first", 2, 3], ["second", 1, 2]]'
    assert TWO.cut(whole := np.zeros(8, dtype=np.float32))[0] is whole


DORA = Layout(TWO.modules, kind="dora")  # magnitudes: 2 + 1
IA3 = Layout((("first", 2, 3), ("mlp.down_proj", 1, 4)), (("p.bias", (2,)),), "ia3")  # scales: 2 outputs, 4 inputs


def test_dora_has_its_magnitudes_behind_the_low_rank_part() -> None:
    whole = np.arange(16 + 3, dtype=np.float32)
    assert (DORA.width, DORA.size(2), DORA.rank(whole)) == (8, 19, 2)
    views = DORA.views(whole)
    assert list(views) == [
        *("first.lora_A", "first.lora_B", "second.lora_A", "second.lora_B"),
        *("first.lora_magnitude_vector", "second.lora_magnitude_vector"),
    ]
    assert views["second.lora_B"].tolist() == [[14, 15]]
    assert views["first.lora_magnitude_vector"].tolist() == [16, 17]
    assert views["second.lora_magnitude_vector"].tolist() == [18]
    assert DORA.cut(whole)[0] is whole


def test_ia3_has_no_rank_and_scales_inputs_where_a_feed_forward_block_ends() -> None:
    whole = np.arange(2 + 4 + 2, dtype=np.float32)
    assert (IA3.width, IA3.size(1), IA3.size(64), IA3.rank(whole)) == (0, 8, 8, 0)
    assert IA3.parameters(0) == (("first.ia3_l", (2, 1)), ("mlp.down_proj.ia3_l", (1, 4)), ("p.bias", (2,)))
    assert IA3.views(whole)["mlp.down_proj.ia3_l"].tolist() == [[2, 3, 4, 5]]
    low, tail = IA3.cut(whole)
    assert (low.tolist(), tail.tolist()) == ([0, 1, 2, 3, 4, 5], [6, 7])
    assert IA3.lora.size(0) == 6
    assert feedforward("layers.0.mlp.down_proj")
    assert not feedforward("layers.0.mlp.updown_proj")


@pytest.mark.parametrize(("layout", "length"), [(DORA, 3), (DORA, 16), (DORA, 20), (IA3, 7), (IA3, 16)])
def test_another_kinds_wrong_length_is_refused(layout: Layout, length: int) -> None:
    rule = "a multiple of 8 parameters and 3 more" if layout is DORA else "8"
    with pytest.raises(ValueError, match=f"has {rule}, got {length}"):
        layout.cut(np.zeros(length, dtype=np.float32))


def test_a_fresh_adapter_of_another_kind_is_zero_but_for_a() -> None:
    assert fresh(DORA, 2, 0, 0).tolist() == [*fresh(TWO, 2, 0, 0).tolist(), 0, 0, 0]
    assert fresh(IA3, 2, 0, 0).tolist() == [0] * 8


def test_a_kind_shows_in_json_and_hash() -> None:
    for layout in (DORA, IA3):
        assert Layout.from_json(layout.to_json()) == layout
    assert len({TWO.hash, DORA.hash, Layout(TWO.modules, kind="ia3").hash}) == 3
    with pytest.raises(ValueError, match="kind is one of lora, dora, ia3, .*got 'vera'"):
        Layout.from_json(DORA.to_json().replace("dora", "vera"))


def test_the_scaling_of_each_kind_by_hand() -> None:
    found = {kind: LoraSection(kind=kind, rank=4, alpha=8.0).scaling for kind in ("lora", "rslora", "dora")}
    assert found == {"lora": 2.0, "rslora": 4.0, "dora": 2.0}


def test_what_cannot_be_fused_has_a_reason_and_ia3_no_dropout() -> None:
    reasons = {kind: unfusable(RunConfig(lora=LoraSection(kind=kind))) for kind in ("lora", "rslora", "dora", "ia3")}
    assert (reasons["lora"], reasons["rslora"]) == ("", "")
    assert reasons["dora"] == "lora.kind=dora cannot be fused"
    assert reasons["ia3"] == "lora.kind=ia3 cannot be fused"
    with pytest.raises(BadInput, match=r"lora\.dropout: must be 0 with lora\.kind=ia3"):
        LoraSection(kind="ia3", dropout=0.1)
