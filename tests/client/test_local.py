"""Methods' local halves in a fused cohort: what they see, and that every client gets what a plain loop gives it."""

import copy
from collections.abc import Callable, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from flwr.app import Context, RecordDict
from peft import LoraConfig, get_peft_model

from fedstrata.client.answers import answer_logits
from fedstrata.client.batching import batches, collate
from fedstrata.client.local import LocalContext
from fedstrata.client.lora import Cohort, adapted
from fedstrata.client.memory import remember, remembered
from fedstrata.client.model import BaseModel
from fedstrata.client.training import Job, answer_loss, train
from fedstrata.core.adapters import Flat, fresh
from fedstrata.core.config import LoraSection, ModelSection, TrainSection
from fedstrata.strategies.base import LocalHalf
from fedstrata.strategies.ewc import Anchored, EwcConfig
from fedstrata.strategies.fedprox import FedProxConfig, Proximal
from fedstrata.strategies.lwf import Distilled, LwfConfig
from fedstrata.strategies.olora import OLoraConfig, Orthogonal
from fedstrata.strategies.scaffold import Controlled, ScaffoldConfig
from tests.client.cohorts import examples

SCALING, RANK = 2.0, 4
SETTINGS = TrainSection(lr=1e-2, batch_size=3, local_epochs=2, warmup_steps=2, max_grad_norm=0.5)
HALVES: Mapping[str, Callable[[], LocalHalf]] = {
    "fedprox": lambda: Proximal(FedProxConfig(mu=0.5)),
    "scaffold": lambda: Controlled(ScaffoldConfig()),
    "ewc": lambda: Anchored(EwcConfig(strength=3.0)),
    "olora": lambda: Orthogonal(OLoraConfig(strength=0.05)),
    "lwf": lambda: Distilled(LwfConfig(strength=0.7)),
}


@pytest.fixture
def base(llava: Path) -> BaseModel:
    torch.set_num_threads(1)
    model = BaseModel(ModelSection(name=str(llava)), LoraSection())
    model.model.double()
    return model


def drawn(base: BaseModel, seed: int, spread: float = 0.05, rank: int = RANK) -> Flat:
    flat = fresh(base.layout, rank, seed)
    return flat + np.random.default_rng(seed).normal(0, spread, flat.shape).astype(np.float32)


def job(base: BaseModel, client: int, method: str) -> Job:
    """Clients differ in data, steps, start and memory; what the strategy sends is the same for all."""
    size, draw = base.layout.size(RANK), np.random.default_rng(99)
    sent = {
        "fedprox": {},
        "scaffold": {"control": draw.normal(0, 0.1, size).astype(np.float32)},
        "ewc": {
            "importance": draw.uniform(0, 1, size).astype(np.float32),
            "anchor": drawn(base, 77),
        },
        "olora": {"past": drawn(base, 55, rank=6)},
        "lwf": {"teacher": drawn(base, 55)},
    }[method]
    own = np.random.default_rng(client).normal(0, 0.1, size).astype(np.float32)
    memory = {"control": own} if method == "scaffold" and client else {}  # the first one is new
    count = (3, 11, 7, 1, 5)[client % 5]
    return Job(examples(count, seed=client), drawn(base, client), client, {}, sent, memory)


class Precise:
    """The adapters in float64 when training ends, in the cohort's order; a reply has them in float32."""

    def __init__(self, half: LocalHalf) -> None:
        self.flats: dict[int, torch.Tensor] = {}
        inner = half.end

        def end(ctx: LocalContext) -> Mapping[str, torch.Tensor]:
            self.flats = {job.seed: row.clone() for job, row in zip(ctx.jobs, ctx.cohort.flat.detach(), strict=True)}
            return inner(ctx)

        half.end = end  # type: ignore[method-assign]


def run(base: BaseModel, jobs: list[Job], half: LocalHalf, settings: TrainSection = SETTINGS) -> dict[int, Any]:
    """seed of the job → its adapter in float64."""
    precise = Precise(half)
    train(base, jobs, settings, SCALING, half, dtype=torch.float64)
    return precise.flats


@pytest.mark.parametrize("method", HALVES)
def test_a_fused_cohort_gives_every_ragged_client_what_it_gets_alone(base: BaseModel, method: str) -> None:
    jobs = [job(base, client, method) for client in range(5)]
    together = run(base, jobs, HALVES[method]())
    for one in jobs:
        alone = run(base, [one], HALVES[method]())[one.seed]
        update = torch.linalg.vector_norm(alone - torch.from_numpy(one.flat))
        assert update > 0.01
        assert torch.linalg.vector_norm(together[one.seed] - alone) / update < 1e-9


@pytest.mark.parametrize("method", HALVES)
def test_the_order_of_the_clients_does_not_matter(base: BaseModel, method: str) -> None:
    jobs = [job(base, client, method) for client in range(3)]
    one, other = (train(base, order, SETTINGS, SCALING, HALVES[method]()) for order in (jobs, jobs[::-1]))
    for a, b in zip(one, other[::-1], strict=True):
        assert np.linalg.norm(a.flat - b.flat) <= 1e-3 * np.linalg.norm(a.flat)
        assert set(a.extra) == set(b.extra)
        assert all(np.allclose(a.extra[name], b.extra[name], atol=1e-5) for name in a.extra)


@pytest.mark.parametrize("method", ["fedprox", "ewc", "olora", "lwf"])
def test_a_penalty_counts_once_whatever_the_micro_batch(base: BaseModel, method: str) -> None:
    jobs = [job(base, client, method) for client in range(3)]
    whole = run(base, jobs, HALVES[method]())
    pieces = run(base, jobs, HALVES[method](), TrainSection(**{**vars(SETTINGS), "micro_batch": 2}))
    for one in jobs:
        update = torch.linalg.vector_norm(whole[one.seed] - torch.from_numpy(one.flat))
        assert torch.linalg.vector_norm(whole[one.seed] - pieces[one.seed]) / update < 1e-9


def merge(base: BaseModel, flat: Flat) -> None:
    for name, (a, b) in base.layout.split(flat).items():
        base.module(name).weight.data += SCALING * (torch.from_numpy(b).double() @ torch.from_numpy(a).double())


def plain(base: BaseModel, one: Job, method: str) -> Flat:
    """One client the ordinary way: PEFT, torch's AdamW, and the method's formula on single tensors."""
    if method == "olora":  # the frozen subspaces are in the weights
        merge(base, one.payload["past"])
    teacher = copy.copy(base)
    if method == "lwf":
        teacher.model = copy.deepcopy(base.model)
        merge(teacher, one.payload["teacher"])
    targets = [name for name, _, _ in base.layout.modules]
    peft = get_peft_model(base.model, LoraConfig(r=RANK, lora_alpha=SCALING * RANK, target_modules=targets))
    parameters, trained, layers = dict(peft.named_parameters()), [], []
    for name, factors in base.layout.split(one.flat).items():
        for label, value in zip(("lora_A", "lora_B"), factors, strict=True):
            parameter = parameters[f"base_model.model.{name}.{label}.default.weight"]
            parameter.data = torch.from_numpy(value.copy()).double()
            trained.append(parameter)
            layers.append((name, label))
    optimiser = torch.optim.AdamW(trained, lr=SETTINGS.lr, weight_decay=SETTINGS.weight_decay)
    prepared = base.prepare(one.examples, 512)
    sent = {name: torch.from_numpy(value).double() for name, value in one.payload.items()}
    start = torch.from_numpy(one.flat).double()
    for step, rows in enumerate(batches(len(one.examples), SETTINGS, one.seed), 1):
        optimiser.param_groups[0]["lr"] = SETTINGS.lr * min(1, step / SETTINGS.warmup_steps)
        optimiser.zero_grad()
        batch = collate(base, [[prepared[row] for row in rows]])
        loss = answer_loss(base, batch, 1).sum()
        whole = torch.cat([parameter.reshape(-1) for parameter in trained])
        if method == "fedprox":
            loss = loss + 0.5 / 2 * ((whole - start) ** 2).sum()
        elif method == "ewc":
            loss = loss + 3.0 / 2 * (sent["importance"] * (whole - sent["anchor"]) ** 2).sum()
        elif method == "lwf":
            with torch.no_grad():
                old = (answer_logits(teacher, batch) / 2).softmax(-1)
            new = (answer_logits(base, batch) / 2).log_softmax(-1)
            loss = loss + 0.7 * 4 * F.kl_div(new, old, reduction="batchmean")
        elif method == "olora":
            past = base.layout.split(one.payload["past"])
            for (name, label), parameter in zip(layers, trained, strict=True):
                if label == "lora_A":
                    loss = loss + 0.05 * (torch.from_numpy(past[name][0]).double() @ parameter.T).abs().sum()
        loss.backward()
        if method == "scaffold":
            mine = torch.from_numpy(one.memory.get("control", np.zeros_like(one.flat))).double()
            correction = torch.split(sent["control"] - mine, [parameter.numel() for parameter in trained])
            for parameter, value in zip(trained, correction, strict=True):
                assert parameter.grad is not None
                parameter.grad += value.view_as(parameter)
        torch.nn.utils.clip_grad_norm_(trained, SETTINGS.max_grad_norm)
        optimiser.step()
    return np.concatenate([parameter.detach().numpy().ravel() for parameter in trained])


@pytest.mark.parametrize("method", HALVES)
def test_a_method_in_a_cohort_equals_its_formula_in_a_plain_peft_loop(llava: Path, method: str) -> None:
    torch.set_num_threads(1)
    base = BaseModel(ModelSection(name=str(llava)), LoraSection())
    base.model.double()
    jobs = [job(base, client, method) for client in range(2)]
    fused = run(base, jobs, HALVES[method]())
    for one in jobs:
        fresh_base = BaseModel(ModelSection(name=str(llava)), LoraSection())
        fresh_base.model.double()
        expected = torch.from_numpy(plain(fresh_base, one, method))
        update = torch.linalg.vector_norm(expected - torch.from_numpy(one.flat))
        close = 1e-5 if method == "lwf" else 1e-9  # a merged teacher's hidden states round apart in float32 norms
        assert torch.linalg.vector_norm(fused[one.seed] - expected) / update < close


def test_squares_are_the_mean_of_every_examples_own_squared_gradient(base: BaseModel) -> None:
    counts = (2, 3, 1)
    jobs = [Job(examples(count, seed=c), drawn(base, c), c) for c, count in enumerate(counts)]
    found: dict[int, Any] = {}

    class Measure(LocalHalf):
        def end(self, ctx: Any) -> dict[str, torch.Tensor]:
            squares = ctx.squares()
            for at, mine in enumerate(ctx.jobs):
                found[mine.seed] = (squares[at].clone(), ctx.cohort.flat[at].detach().clone())
            return {}

    train(base, jobs, SETTINGS, SCALING, Measure(), dtype=torch.float64)
    for one in jobs:
        squares, flat = found[one.seed]
        cohort = Cohort.of([one.flat], base.layout, SCALING, base.device, torch.float64)
        with torch.no_grad():
            cohort.flat.copy_(flat)
        expected = torch.zeros_like(squares)
        with adapted(base, cohort):
            for row in base.prepare(one.examples, 512):
                cohort.gradient.zero_()
                torch.autograd.backward(answer_loss(base, collate(base, [[row]]), 1).sum())
                expected += cohort.gradient[0] ** 2 / len(one.examples)
        assert torch.allclose(squares, expected, rtol=1e-9, atol=1e-15)
        assert squares.max() > 0


def test_squares_of_some_examples_are_those_of_a_draw(base: BaseModel) -> None:
    seen = []

    class Measure(LocalHalf):
        def end(self, ctx: Any) -> dict[str, torch.Tensor]:
            seen.append([ctx.squares(most).clone() for most in (2, 2, 9, 0)])
            return {}

    train(base, [Job(examples(5), drawn(base, 0), 0)], SETTINGS, SCALING, Measure(), dtype=torch.float64)
    two, again, nine, every = seen[0]
    assert torch.equal(two, again)
    assert torch.equal(nine, every)
    assert not torch.allclose(two, every)


def context(base: BaseModel, *jobs: Job) -> LocalContext:
    cohort = Cohort.of([job.flat for job in jobs], base.layout, SCALING, base.device, torch.float64)
    return LocalContext(base, cohort, jobs, SETTINGS)


def test_rows_by_name_are_the_adapters_factors_and_carry_gradients(base: BaseModel) -> None:
    jobs = [Job(examples(1), drawn(base, c), c) for c in range(3)]
    ctx = context(base, *jobs)
    named = ctx.named(ctx.values())
    for client, one in enumerate(jobs):
        for name, (a, b) in base.layout.split(one.flat).items():
            assert np.array_equal(named[f"{name}.lora_A"][client].detach().float().numpy(), a)
            assert np.array_equal(named[f"{name}.lora_B"][client].detach().float().numpy(), b)
    first = f"{base.layout.modules[0][0]}.lora_A"
    ctx.cohort.gradient.fill_(1.0)  # what other losses brought before
    torch.autograd.backward((3 * named[first]).sum())
    brought = ctx.named(ctx.gradient)
    assert torch.equal(brought[first], torch.full_like(brought[first], 4.0))
    assert torch.equal(brought[f"{base.layout.modules[1][0]}.lora_B"].unique(), torch.ones(1, dtype=torch.float64))


def test_only_active_clients_are_seen_within_a_step(base: BaseModel) -> None:
    control = np.arange(base.layout.size(RANK), dtype=np.float32)
    ctx = context(base, *[Job(examples(1), drawn(base, c), c, {}, {"control": control}) for c in range(3)])
    ctx.cohort.active = 2
    rows = (ctx.values(), ctx.start, ctx.gradient, ctx.sent("control"))
    assert [len(row) for row in rows if row is not None] == [2, 2, 2, 2]
    assert ctx.recall("control").shape == ctx.cohort.flat.shape
    assert ctx.sent("nothing") is None


def test_what_all_clients_were_sent_is_one_copy_and_what_differs_is_their_own(base: BaseModel) -> None:
    same = {"x": np.arange(4, dtype=np.float32)}
    shared = context(base, *[Job(examples(1), drawn(base, c), c, {}, same) for c in range(3)]).sent("x")
    assert shared is not None
    assert shared.stride(0) == 0
    assert shared.tolist() == [[0, 1, 2, 3]] * 3
    own = [{"x": np.full(4, c, dtype=np.float32)} for c in range(3)]
    apart = context(base, *[Job(examples(1), drawn(base, c), c, {}, own[c]) for c in range(3)]).sent("x")
    assert apart is not None
    assert apart[:, 0].tolist() == [0, 1, 2]


def test_the_frozen_adapter_underneath_is_gone_when_training_ends(base: BaseModel) -> None:
    layer, past = base.layout.modules[0][0], drawn(base, 5)
    x = torch.randn(1, 2, base.layout.modules[0][2], dtype=torch.float64)
    before = base.module(layer)(x)
    ctx = context(base, Job(examples(1), drawn(base, 0), 0))
    with ctx, torch.no_grad():
        factors = ctx.underneath(past)
        a, b = (torch.from_numpy(factor).double() for factor in base.layout.split(past)[layer])
        assert torch.allclose(base.module(layer)(x), before + SCALING * x @ a.T @ b.T)
        assert torch.equal(factors[f"{layer}.lora_A"], a)
    assert torch.equal(base.module(layer)(x), before)


def test_a_client_keeps_what_it_remembers_and_not_a_round_that_went_astray() -> None:
    client = Context(1, 2, {}, RecordDict(), {})
    assert remembered(client) == {}
    remember(client, {})
    assert not client.state
    remember(client, {"control": np.array([1, 2], dtype=np.float32)})
    remember(client, {"control": np.array([np.nan, 2], dtype=np.float32)})
    assert remembered(client)["control"].tolist() == [1, 2]


def test_a_method_without_a_local_half_remembers_and_sends_nothing(base: BaseModel) -> None:
    trained = train(base, [Job(examples(2), drawn(base, 0), 0)], SETTINGS, SCALING, LocalHalf(SimpleNamespace()))[0]
    assert (dict(trained.extra), dict(trained.memory)) == ({}, {})
