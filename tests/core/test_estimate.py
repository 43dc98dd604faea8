"""The estimate of a client's memory, beside what a real step takes; and what a machine says it has."""

import resource
import weakref
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import AutoConfig, AutoProcessor, LlamaConfig, LlavaForConditionalGeneration

from fedstrata.client.model import TINY, BaseModel
from fedstrata.client.training import Job, train
from fedstrata.core import estimate, machine
from fedstrata.core.adapters import Layout, fresh
from fedstrata.core.config import LoraSection, ModelSection, RunConfig, TrainSection, build, parse_words
from fedstrata.core.estimate import Shape, Work
from fedstrata.core.machine import Footprint
from fedstrata.scenarios.stream import Example

RANK, CLIENTS = 8, 2
SHAPE = Shape(hidden=256, intermediate=704, layers=4, heads=4, head=64, vocabulary=4000)
LAYOUT = Layout(tuple((f"layers.{i}.{name}", 256, 256) for i in range(4) for name in ("q_proj", "v_proj")))


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A base of random weights with hidden 256, two key heads for four query heads, and a head of its own."""
    folder = tmp_path_factory.mktemp("wide")
    config = AutoConfig.from_pretrained(TINY)
    sizes = {"hidden_size": 256, "intermediate_size": 704, "num_hidden_layers": 4, "vocab_size": 4000}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 64}
    config.text_config = LlamaConfig(**{**config.text_config.to_dict(), **sizes, **heads, "tie_word_embeddings": False})
    config.tie_word_embeddings = False
    torch.manual_seed(0)
    LlavaForConditionalGeneration(config).save_pretrained(folder)
    AutoProcessor.from_pretrained(TINY).save_pretrained(folder)
    return str(folder)


class Live(TorchDispatchMode):
    """The bytes of all tensors that come into being while it is open; `most` at one time."""

    def __init__(self) -> None:
        super().__init__()
        self.known: dict[int, Any] = {}
        self.now = self.most = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, torch.Tensor):
                self.see(tensor.untyped_storage())
        return out

    def see(self, storage: torch.UntypedStorage) -> None:
        name, size = storage._cdata, storage.nbytes()
        if name not in self.known:
            self.known[name] = weakref.finalize(storage, self.drop, name, size)
            self.now += size
            self.most = max(self.most, self.now)

    def drop(self, name: int, size: int) -> None:
        del self.known[name]
        self.now -= size


def measured(base: BaseModel, jobs: list[Job], settings: TrainSection, dropout: float) -> int:
    live = Live()
    own = (*base.model.parameters(), *base.model.buffers())
    live.known = dict.fromkeys(tensor.untyped_storage()._cdata for tensor in own)
    with live:
        train(base, jobs, settings, 2.0, dropout=dropout)
    assert live.now == 0  # all of it was seen to go
    return live.most


@pytest.mark.parametrize(
    ("name", "dtype", "attention", "rows", "words", "checkpointing", "dropout"),
    [
        ("tiny", "float32", "eager", 8, 1, False, 0.0),
        ("tiny", "float32", "eager", 2, 30, False, 0.0),
        ("tiny", "float32", "sdpa", 8, 6, False, 0.0),
        ("wide", "float32", "eager", 4, 6, False, 0.0),
        ("wide", "float32", "sdpa", 2, 30, False, 0.0),
        ("wide", "float32", "eager", 4, 6, False, 0.1),
        ("wide", "bfloat16", "eager", 4, 6, False, 0.0),
        ("wide", "bfloat16", "sdpa", 4, 6, False, 0.1),
        ("wide", "float32", "sdpa", 4, 6, True, 0.0),
        ("wide", "float32", "eager", 2, 30, True, 0.0),
    ],
)
def test_the_estimate_is_near_the_most_that_a_step_takes_and_hardly_below(
    wide: str, name: str, dtype: str, attention: str, rows: int, words: int, checkpointing: bool, dropout: float
) -> None:
    torch.set_num_threads(1)
    model = ModelSection(name=wide if name == "wide" else name, dtype=dtype, attention=attention, device="cpu")
    base = BaseModel(model, LoraSection())
    settings = TrainSection(batch_size=rows, local_epochs=1, max_length=4000, checkpointing=checkpointing)
    examples = [Example(str(row), "what colour is the shape? " * words, "red") for row in range(rows)]
    prepared = base.tokenise(examples, 4000)
    length, answer = len(prepared[0].prompt + prepared[0].answer), len(prepared[0].answer)
    jobs = [Job(examples, fresh(base.layout, RANK, 0), seed) for seed in range(CLIENTS)]
    work = Work(rows, length, answer, dtype, attention, checkpointing, dropout > 0)
    shape = estimate.shape_of(base.model.config)
    ours = CLIENTS * estimate.client_bytes(shape, base.layout, RANK, work)
    assert 0.8 <= ours / measured(base, jobs, settings, dropout) <= 1.5


def test_the_shape_of_a_base_is_read_from_its_config(wide: str) -> None:
    assert estimate.shape_of(AutoConfig.from_pretrained(wide)) == replace(SHAPE, picture=16)
    assert estimate.shape_of(AutoConfig.from_pretrained(TINY)) == Shape(96, 192, 3, 4, 24, 1569, 16)
    alone = LlamaConfig(hidden_size=64, intermediate_size=96, num_attention_heads=2)
    assert estimate.shape_of(alone).picture == 0
    assert Shape.from_json(SHAPE.to_json()) == SHAPE


@pytest.mark.parametrize(
    "text",
    ["", "[]", "{}", '{"hidden": 1}', SHAPE.to_json().replace("704", "0"), SHAPE.to_json().replace("704", '"a"')],
)
def test_words_that_are_no_shape_are_refused(text: str) -> None:
    with pytest.raises((ValueError, TypeError)):
        Shape.from_json(text)


def resolved(*words: str) -> RunConfig:
    return build([parse_words(words)])


def client(*words: str) -> int:
    return estimate.client_bytes(SHAPE, LAYOUT, 8, estimate.work_of(resolved(*words)))


@pytest.mark.parametrize(
    "words",
    [
        ["train.micro_batch=4"],
        ["train.batch_size=8"],
        ["train.max_length=256"],
        ["train.checkpointing=true"],
        ["model.attention=sdpa"],
    ],
)
def test_the_settings_that_a_refusal_names_do_lower_the_need(words: list[str]) -> None:
    assert client(*words) < client()


def test_an_adapter_costs_its_gradient_and_moments_too() -> None:
    one, work = LAYOUT.size(1), Work(1, 8, 1)
    assert estimate.client_bytes(SHAPE, LAYOUT, 3, work) - estimate.client_bytes(SHAPE, LAYOUT, 1, work) == 32 * one


MEMINFO = "MemTotal:       2000000 kB\nMemFree:         100000 kB\nMemAvailable:   1500000 kB\n"
MakeRoot = Callable[..., Path]


@pytest.fixture
def make_root(tmp_path: Path) -> MakeRoot:
    def make(**files: str) -> Path:
        for name, text in {"proc/meminfo": MEMINFO, **files}.items():
            path = tmp_path / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)
        return tmp_path

    return make


def test_free_memory_is_what_the_kernel_calls_available(make_root: MakeRoot) -> None:
    assert machine.free_and_total(make_root()) == (1_536_000_000, 2_048_000_000)


def test_a_cgroup_of_version_2_limits_it_and_its_cached_files_count_as_free(make_root: MakeRoot) -> None:
    stat = "anon 1\ninactive_file 100000000\n"
    files = {"memory.max": "1000000000\n", "memory.current": "300000000\n", "memory.stat": stat}
    root = make_root(
        **{f"sys/fs/cgroup/job/{name}": text for name, text in files.items()}, **{"proc/self/cgroup": "0::/job/inner\n"}
    )
    assert machine.free_and_total(root) == (800_000_000, 1_000_000_000)
    (root / "sys/fs/cgroup/job/memory.max").write_text("max\n")
    assert machine.free_and_total(root) == (1_536_000_000, 2_048_000_000)


def test_a_cgroup_of_version_1_limits_it(make_root: MakeRoot) -> None:
    files = {"memory.limit_in_bytes": "400000000", "memory.usage_in_bytes": "500000000", "memory.stat": "cache 5\n"}
    root = make_root(
        **{f"sys/fs/cgroup/memory/{name}": text for name, text in files.items()}, **{"proc/self/cgroup": "4:memory:/\n"}
    )
    assert machine.free_and_total(root) == (0, 400_000_000)


def test_a_system_that_does_not_say_gives_zeros(tmp_path: Path) -> None:
    assert machine.free_and_total(tmp_path) == (0, 0)


def test_only_visible_gpus_count(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for number in range(4):
        (tmp_path / f"proc/driver/nvidia/gpus/{number}").mkdir(parents=True)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert machine.gpus(tmp_path) == 4
    for visible, count in (("0,2", 2), ("", 0), ("0", 1)):
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
        assert machine.gpus(tmp_path) == count


def test_the_peak_of_this_process_is_at_least_what_it_holds() -> None:
    before = machine.peak()
    now = resource.getpagesize() * int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1])
    held = np.ones(before - now + 50_000_000, dtype=np.uint8)  # more than there ever was, beside what is there now
    assert machine.peak() > before
    assert machine.peak() > held.nbytes


def test_a_footprint_survives_the_wire_and_nonsense_does_not() -> None:
    there = Footprint("NVIDIA H200", True, 14, 14, 100, 140)
    assert Footprint.from_json(there.to_json()) == there
    for text in ("", "{", '{"base": -1}', '{"free": "much"}', '{"disk": 1}'):
        with pytest.raises((ValueError, TypeError)):
            Footprint.from_json(text)
