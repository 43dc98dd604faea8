"""The benchmarks on a GPU: they say so where there is none, and their code runs at toy sizes on the CPU."""

import importlib
from types import ModuleType

import pytest
import torch

from fedstrata.benchmarks import NAMES, gpu_sides
from fedstrata.benchmarks.gpu_cases import Case
from fedstrata.benchmarks.gpu_parts import FFN, TOY, Load, jobs_of, random_base
from fedstrata.benchmarks.gpu_sides import Ours, activation_bytes, fitting
from fedstrata.core.errors import BadInput

GPU = [name for name in NAMES if name.startswith("gpu")]
TRAINING = ["gpu-train", "gpu-round", "gpu-small"]
CPU = torch.device("cpu")


def module(name: str) -> ModuleType:
    return importlib.import_module(f"fedstrata.benchmarks.{name.replace('-', '_')}")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
@pytest.mark.parametrize("name", GPU)
def test_without_a_gpu_nothing_is_measured(name: str) -> None:
    with pytest.raises(BadInput, match=f"bench {name}: no GPU found: nothing measured"):
        module(name).bench()


@pytest.mark.parametrize("name", TRAINING)
def test_both_ways_to_train_end_in_the_same_adapters(name: str) -> None:
    result = module(name).bench(quick=True)
    assert result.equal["losses, relative difference"] < 1e-5
    assert result.equal["updates, relative difference"] < 1e-3
    assert len(result.ratios) == len(result.limits) == 1
    assert set(result.limits) <= set(result.targets)
    assert set(result.targets) <= {*result.limits, *result.ratios}
    assert "figures say nothing" in result.notes[0]
    assert result.name == name


def test_the_targets_are_those_of_the_shapes() -> None:
    cases: dict[str, Case] = {name: module(name).CASE for name in TRAINING}
    assert cases["gpu-train"].load.tokens == 2 * 7 * 4 * 650
    assert 1e6 / cases["gpu-train"].most == pytest.approx(14_000)
    assert cases["gpu-train"].checkpointing
    assert cases["gpu-round"].load.clients == 100
    assert cases["gpu-round"].units() == 1
    assert cases["gpu-round"].most == 8e6
    assert cases["gpu-small"].units() == 64 * 8
    assert 1e6 / cases["gpu-small"].most == pytest.approx(3_000)


def test_answering_at_a_toy_size_is_the_published_paths() -> None:
    result = module("gpu-ssa").bench(quick=True)
    assert result.targets == {"mixed / bare base": 1.1}
    assert set(result.limits) == set(result.targets)
    agreed, _, words, *_ = result.equal["tokens"].split()
    assert agreed == words


def test_memory_is_told_for_each_number_of_clients() -> None:
    result = module("gpu-memory").bench(quick=True)
    assert [round(value, 6) for value in result.limits.values()] == [
        round(size / count, 6) for count, size in zip((1, 4, 16), result.pairs[0].values(), strict=True)
    ]


def test_the_facts_are_measured() -> None:
    result = module("gpu").bench(quick=True)
    assert all(value > 0 for value in result.limits.values())
    assert result.ratios == result.targets == {}


def test_what_autograd_keeps_is_counted_per_token() -> None:
    base = random_base(TOY, CPU, FFN)
    short, long = (Load(1, 2, 2, length, 4) for length in (12, 24))
    each = [activation_bytes(base, jobs_of(base, load, TOY.vocabulary)[0], load.settings) for load in (short, long)]
    assert each[0] > 4 * TOY.layers * (2 * TOY.hidden + 2 * TOY.intermediate)  # at least inputs and gates of each layer
    assert each[1] == pytest.approx(each[0], rel=0.3)


def test_a_cohort_is_as_large_as_the_memory_lets_it(monkeypatch: pytest.MonkeyPatch) -> None:
    base, load = random_base(TOY, CPU, FFN), Load(7, 4, 2, 100)
    assert fitting(base, load, 1e12) == 7  # a quick run takes all at once
    base.device = torch.device("cuda")
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _: (10_000_000, 20_000_000))
    room = gpu_sides.ROOM * 10_000_000 / (2 * 100)
    assert fitting(base, load, room / 3.5) == 3
    assert fitting(base, load, room * 2) == 1
    assert fitting(base, load, room / 100) == 7


def test_cohorts_cover_every_client_in_order() -> None:
    base, load = random_base(TOY, CPU, FFN), Load(3, 2, 2, 12, 4)
    jobs = jobs_of(base, load, TOY.vocabulary)
    whole, apart = Ours(base, jobs, load, 3).round(), Ours(base, jobs, load, 2).round()
    assert apart[1] == pytest.approx(whole[1], rel=1e-5)
    assert len(set(whole[1])) == 3
