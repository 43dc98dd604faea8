"""A cohort's training against PEFT's own model, its own loss and torch's own AdamW, client by client."""

import math
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from fedstrata.benchmarks.bases import llama
from fedstrata.client import answers, batching
from fedstrata.client.lora import Cohort
from fedstrata.client.model import BaseModel
from fedstrata.client.prompts import Prepared
from fedstrata.client.training import Job, batches, train
from fedstrata.core.adapters import Flat, fresh
from fedstrata.core.config import LoraSection, ModelSection, TrainSection
from fedstrata.scenarios.stream import Example, Pixels
from fedstrata.strategies.base import LocalHalf
from tests.client import cohorts

SCALING, RANK = 2.0, 4
MLP = ("mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")
SETTINGS = TrainSection(
    lr=1e-2, batch_size=3, local_epochs=2, warmup_ratio=0.3, schedule="cosine", max_grad_norm=0.5, weight_decay=0.1
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.set_num_threads(1)
    return llama(tmp_path_factory.mktemp("llama"), hidden=32, layers=2, vocabulary=128)


def norm(module: Any, x: torch.Tensor) -> torch.Tensor:
    """Llama's norm without its detour over float32."""
    return module.weight * x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + module.variance_epsilon)


def doubled(model: Any) -> Any:
    for module in model.double().modules():
        if isinstance(module, LlamaRMSNorm):
            module.forward = partial(norm, module)
    return model


@pytest.fixture(scope="module")
def base(folder: Path) -> BaseModel:
    return BaseModel(ModelSection(name=str(folder), device="cpu"), LoraSection())


@pytest.fixture(scope="module")
def base64(folder: Path) -> BaseModel:
    opened = BaseModel(ModelSection(name=str(folder), device="cpu", attention="sdpa"), LoraSection())
    doubled(opened.model)
    return opened


def examples(count: int, seed: int, longest: int = 12) -> list[Example]:
    """Questions and answers of many lengths."""
    draw = np.random.default_rng(seed)
    sizes = draw.integers(1, (longest + 1, 5), size=(count, 2)).tolist()
    words = [[" ".join(f"w{w}" for w in draw.integers(4, 128, size)) for size in pair] for pair in sizes]
    return [Example(str(row), *pair) for row, pair in enumerate(words)]


def filled(base: BaseModel, seed: int) -> Flat:
    flat = fresh(base.layout, RANK, seed)
    return (flat + np.random.default_rng(seed).normal(0, 0.05, flat.shape)).astype(np.float32)


def ragged(base: BaseModel, clients: int, longest: int = 12) -> list[Job]:
    """Between 1 and 11 examples each: 2 to 8 steps, many of them with a short last batch."""
    return [Job(examples(1 + 5 * c % 11, c, longest), filled(base, c), c) for c in range(clients)]


def exact(base: BaseModel, jobs: Sequence[Job], settings: TrainSection = SETTINGS, **more: Any) -> list[np.ndarray]:
    return cohorts.exact(base, jobs, settings, SCALING, **more)


def apart(left: np.ndarray, right: np.ndarray, start: Flat) -> float:
    """The difference relative to the update."""
    update = np.linalg.norm(right - start.astype(np.float64))
    assert update > 1e-2
    return float(np.linalg.norm(left - right) / update)


class Plain:
    """PEFT around the ordinary model, rows one by one through its own forward, torch's own optimiser."""

    def __init__(self, folder: Path, base: BaseModel, dtype: torch.dtype) -> None:
        self.base, self.dtype = base, dtype
        model = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="sdpa")
        targets = [name for name, _, _ in base.layout.modules]
        config = LoraConfig(r=RANK, lora_alpha=int(SCALING * RANK), target_modules=targets)
        self.model = get_peft_model(doubled(model) if dtype == torch.float64 else model, config)
        named = dict(self.model.named_parameters())
        self.trained = [
            named[f"base_model.model.{n}.{k}.default.weight"] for n in targets for k in ("lora_A", "lora_B")
        ]

    def client(self, job: Job, settings: TrainSection) -> np.ndarray:
        values = [factor for pair in self.base.layout.split(job.flat).values() for factor in pair]
        for parameter, value in zip(self.trained, values, strict=True):
            parameter.data = torch.from_numpy(value.copy()).to(self.dtype)
        optimiser = torch.optim.AdamW(self.trained, lr=settings.lr, weight_decay=settings.weight_decay)
        rows = self.base.tokenise(job.examples, settings.max_length)
        plan = batches(len(rows), settings, job.seed)
        warm = math.ceil(settings.warmup_ratio * len(plan))
        for step, mine in enumerate(plan, 1):
            falling = 0.5 * (1 + math.cos(math.pi * (step - 1 - warm) / max(1, len(plan) - warm)))
            optimiser.param_groups[0]["lr"] = settings.lr * (step / warm if step <= warm else falling)
            optimiser.zero_grad()
            self.loss([rows[row] for row in mine]).backward()
            torch.nn.utils.clip_grad_norm_(self.trained, settings.max_grad_norm)
            optimiser.step()
        return np.concatenate([parameter.detach().double().numpy().ravel() for parameter in self.trained])

    def loss(self, rows: Sequence[Prepared]) -> torch.Tensor:
        """The mean over the answer tokens of all rows; no row is padded."""
        total, count = torch.zeros((), dtype=self.dtype), 0
        for row in rows:
            logits = self.model(input_ids=torch.tensor([row.prompt + row.answer])).logits[0]
            labels = torch.tensor(row.answer)
            total = total + F.cross_entropy(logits[len(row.prompt) - 1 : -1], labels, reduction="sum")
            count += len(labels)
        return total / count


@pytest.mark.parametrize("clients", [1, 2, 5, 16])
def test_in_float64_every_client_of_a_cohort_gets_what_plain_peft_gives_it(
    base64: BaseModel, folder: Path, clients: int
) -> None:
    jobs, plain = ragged(base64, clients), Plain(folder, base64, torch.float64)
    for job, ours in zip(jobs, exact(base64, jobs), strict=True):
        assert apart(ours, plain.client(job, SETTINGS), job.flat) <= 1e-9


@pytest.mark.parametrize("clients", [1, 2, 5, 16])
def test_in_float32_every_client_of_a_cohort_gets_what_plain_peft_gives_it(
    base: BaseModel, folder: Path, clients: int
) -> None:
    jobs, plain = ragged(base, clients), Plain(folder, base, torch.float32)
    for job, ours in zip(jobs, train(base, jobs, SETTINGS, SCALING), strict=True):
        assert apart(ours.flat.astype(np.float64), plain.client(job, SETTINGS), job.flat) <= 1e-3
        assert ours.steps == 2 * math.ceil(len(job.examples) / 3)


@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_a_clients_result_does_not_depend_on_its_partners(base64: BaseModel, dropout: float) -> None:
    """Few or many of them, with more or fewer steps, with shorter or far longer rows."""
    mine, *short = ragged(base64, 4)
    long = ragged(base64, 3, longest=200)[1:]
    alone = exact(base64, [mine], dropout=dropout)[0]
    for partners in (short[:1], short, long, [*long, *short]):
        for place in (0, len(partners)):
            jobs = [*partners[:place], mine, *partners[place:]]
            assert apart(exact(base64, jobs, dropout=dropout)[place], alone, mine.flat) <= 1e-9
    other = exact(base64, [replace(mine, seed=99)], dropout=dropout)[0]
    assert (apart(other, alone, mine.flat) > 1e-3) == bool(dropout)  # one example: the seed is in the dropout alone


# --- padding ---------------------------------------------------------------------------------------------------------


def row(tokens: int) -> Prepared:
    return Prepared((7,) * (tokens - 1), (8,), (True,))


def test_rows_of_like_lengths_are_one_piece_in_their_order() -> None:
    rows = [[row(20), row(21), row(19)], [row(22)]]
    assert batching.pieces(rows, 0) == [([[0, 1, 2], [0]], rows)]
    equal = [[row(20)] * 3, [row(20)]]
    assert [places for places, _ in batching.pieces(equal, 2)] == [[[0, 1], [0]], [[2], []]]


def test_rows_of_very_different_lengths_are_padded_in_pieces_of_their_own() -> None:
    rows = [[row(20), row(900), row(30)], [row(25), row(15), row(800)]]
    assert [places for places, _ in batching.pieces(rows, 0)] == [[[1], [2]], [[2, 0], [0, 1]]]
    for places, mine in batching.pieces(rows, 0):
        assert [[rows[c][place] for place in own] for c, own in enumerate(places)] == mine


@pytest.mark.parametrize("most", [0, 1, 2, 3])
def test_every_row_is_in_one_piece_and_no_piece_is_larger_than_it_may_be(most: int) -> None:
    draw = np.random.default_rng(0)
    for _ in range(50):
        rows = [[row(int(n)) for n in draw.integers(2, 1500, draw.integers(1, 8))] for _ in range(4)]
        found = batching.pieces(rows, most)
        for client, mine in enumerate(rows):
            assert sorted(place for places, _ in found for place in places[client]) == list(range(len(mine)))
        assert not most or max(len(own) for places, _ in found for own in places) <= most
        assert found == batching.pieces(rows, most)


def padded(pieces: Sequence[tuple[Any, batching.Rows]]) -> int:
    """Tokens of all passes with their padding."""
    wide = [max(batching.length(row) for own in rows for row in own) for _, rows in pieces]
    return sum(w * len(rows) * max(map(len, rows)) for w, (_, rows) in zip(wide, pieces, strict=True))


def test_pieces_by_length_never_cost_more_than_one_piece() -> None:
    draw = np.random.default_rng(1)
    for _ in range(50):
        rows = [[row(int(n)) for n in draw.integers(2, 700, 6)] for _ in range(3)]
        found, whole = batching.pieces(rows, 0), [([[]], rows)]
        assert padded(found) + batching.PASS_TOKENS * (len(found) - 1) <= padded(whole)


@pytest.mark.parametrize(("micro_batch", "dropout"), [(0, 0.0), (0, 0.3), (2, 0.3)])
def test_grouping_by_length_changes_no_result(
    base64: BaseModel, monkeypatch: pytest.MonkeyPatch, micro_batch: int, dropout: float
) -> None:
    settings = replace(SETTINGS, micro_batch=micro_batch)
    jobs = ragged(base64, 3, longest=150)
    whole = exact(base64, jobs, settings, dropout=dropout)
    monkeypatch.setattr(batching, "PASS_TOKENS", 1)
    found = batching.pieces([base64.tokenise(job.examples, 512)[:3] for job in jobs], micro_batch)
    assert len(found) > (2 if micro_batch else 1)
    for job, left, right in zip(jobs, exact(base64, jobs, settings, dropout=dropout), whole, strict=True):
        assert apart(left, right, job.flat) <= 1e-9


# --- groups ----------------------------------------------------------------------------------------------------------


def test_groups_are_as_many_as_the_hidden_states_fill_caches() -> None:
    rows = [[row(64)] * 4] * 16
    assert batching.group_size(rows, 64) == 16
    assert batching.group_size(rows, 256) == 8  # 16 · 4 · 64 · 256 is twice as much
    assert batching.group_size(rows[:3], 256) == 3
    assert batching.group_size(rows[:9], 256) == 5
    assert batching.group_size(rows, 4096) == 1


@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_groups_of_clients_change_no_result(base64: BaseModel, monkeypatch: pytest.MonkeyPatch, dropout: float) -> None:
    jobs = ragged(base64, 5)
    together = exact(base64, jobs, dropout=dropout)
    for numbers in (1, 2 * 3 * 25 * 32):
        monkeypatch.setattr(batching, "CACHED", numbers)
        for job, left, right in zip(jobs, exact(base64, jobs, dropout=dropout), together, strict=True):
            assert apart(left, right, job.flat) <= 1e-9


def test_in_groups_too_every_client_trains_its_own_projector(llava: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    vision = BaseModel(ModelSection(name=str(llava), device="cpu"), LoraSection(), "shared")
    pictures = [Pixels(np.full((32, 32, 3), 40 * number, np.uint8)) for number in range(4)]
    share = [Example(str(number), "what?", "red blue", picture) for number, picture in enumerate(pictures)]
    jobs = [Job(share[: 1 + client], fresh(vision.layout, RANK, client), client) for client in range(3)]
    together = train(vision, jobs, SETTINGS, SCALING)
    monkeypatch.setattr(batching, "CACHED", 1)
    for job, left, right in zip(jobs, train(vision, jobs, SETTINGS, SCALING), together, strict=True):
        (_, start), (_, mine), (_, theirs) = (vision.layout.cut(flat) for flat in (job.flat, left.flat, right.flat))
        assert apart(mine, theirs, start) <= 1e-3
        assert left.loss == pytest.approx(right.loss, rel=1e-5)


class Penalty(LocalHalf):
    """Notes how many clients its loss is asked for."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[int] = []

    def loss(self, ctx: Any, batch: Any, out: Any, base_loss: torch.Tensor) -> torch.Tensor:
        self.seen.append(len(base_loss))
        return base_loss


def test_a_method_with_a_loss_of_its_own_sees_all_clients_at_once(
    base: BaseModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(batching, "CACHED", 1)
    half = Penalty()
    train(base, ragged(base, 3), SETTINGS, SCALING, half)
    assert half.seen[0] == 3


# --- the last layer ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("checkpointing", [False, True])
def test_the_last_layer_at_answers_alone_changes_no_result(
    base64: BaseModel, monkeypatch: pytest.MonkeyPatch, checkpointing: bool
) -> None:
    settings, jobs = replace(SETTINGS, checkpointing=checkpointing), ragged(base64, 3)
    positions: dict[str, int] = {}
    plain = Cohort.linear

    def counted(cohort: Cohort, name: str, layer: torch.nn.Linear, x: torch.Tensor) -> torch.Tensor:
        positions[name] = positions.get(name, 0) + x.shape[:-1].numel()
        return plain(cohort, name, layer, x)

    monkeypatch.setattr(Cohort, "linear", counted)
    trimmed, fewer = exact(base64, jobs, settings), dict(positions)
    positions.clear()
    monkeypatch.setattr(answers, "WORTH", 0.0)
    for job, left, right in zip(jobs, trimmed, exact(base64, jobs, settings), strict=True):
        assert apart(left, right, job.flat) <= 1e-9
    less = {name for name, count in fewer.items() if count < 0.7 * positions[name]}
    assert less == {f"model.layers.1.{part}" for part in ("self_attn.q_proj", "self_attn.o_proj", *MLP)}
    assert all(fewer[name] == count for name, count in positions.items() if name not in less)
    assert not any("forward" in vars(module) for module in base64.backbone.layers[-1].modules() if has_no_norm(module))


def has_no_norm(module: torch.nn.Module) -> bool:
    return not isinstance(module, LlamaRMSNorm)  # whose forward this file replaces


def test_an_mlp_of_another_kind_is_left_alone(base: BaseModel, monkeypatch: pytest.MonkeyPatch) -> None:
    batch = batching.collate(base, [base.tokenise(examples(2, 0), 512)])
    monkeypatch.setattr(answers, "WORTH", 1.0)
    with answers.answers_only(base, batch):
        assert "forward" in vars(base.backbone.layers[-1].mlp)
    monkeypatch.setattr(answers, "GATED", {"c_fc", "c_proj"})
    with answers.answers_only(base, batch):
        assert "forward" not in vars(base.backbone.layers[-1].mlp)
