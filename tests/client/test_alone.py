"""Kinds that cannot be fused, through PEFT one client at a time, against a loop over PEFT written out here."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import IA3Config, LoraConfig, PeftModel, get_peft_model
from peft.utils.constants import TRANSFORMERS_MODELS_TO_IA3_FEEDFORWARD_MODULES_MAPPING as FEEDFORWARD

from fedstrata.client import alone, training
from fedstrata.client.alone import Switch, batches_of
from fedstrata.client.banks import bank_of
from fedstrata.client.batching import batches, collate
from fedstrata.client.model import BaseModel
from fedstrata.client.training import Job, answer_loss
from fedstrata.core.adapters import MAGNITUDE, Flat, feedforward, fresh
from fedstrata.core.config import LoraSection, ModelSection, TrainSection
from fedstrata.core.errors import BadInput
from fedstrata.core.peftfolder import own_values, save_peft
from fedstrata.core.records import Knowledge
from fedstrata.scenarios.stream import Example
from fedstrata.strategies.base import LocalHalf
from tests.client.cohorts import examples

SCALING, RANK = 2.0, 4
SETTINGS = TrainSection(lr=1e-2, batch_size=3, local_epochs=2, warmup_steps=2, max_grad_norm=0.5, weight_decay=0.05)
ALONE = ("dora", "ia3")


def load(llava: Path, kind: str, double: bool = False, projector: str = "frozen") -> BaseModel:
    torch.set_num_threads(1)
    model = BaseModel(ModelSection(name=str(llava)), LoraSection(kind=kind), projector)
    if double:
        model.model.double()
    return model


def filled(base: BaseModel, seed: int) -> Flat:
    """An adapter of which no part is 0."""
    flat = fresh(base.layout, RANK, seed)
    return flat + np.random.default_rng(seed).normal(0, 0.05, flat.shape).astype(np.float32)


def hidden(base: BaseModel, rows: list[Example]) -> torch.Tensor:
    """Hidden states at the prompts' tokens."""
    prepared = base.prepare(rows, 512)
    with torch.no_grad():
        batch = base.embed([p.prompt for p in prepared], [p.features for p in prepared], left=True)
        out = base.backbone(inputs_embeds=batch.embeds, attention_mask=batch.mask)
    found: torch.Tensor = out.last_hidden_state[batch.mask == 1]
    return found


class Witness(LocalHalf):
    """Keeps the trained adapter before it is rounded to float32."""

    def __init__(self, seen: list[torch.Tensor]) -> None:
        super().__init__()
        self.seen = seen

    def end(self, ctx: Any) -> Mapping[str, torch.Tensor]:
        self.seen.append(ctx.cohort.flat[0].detach().clone())
        return {}


def plain_peft(base: BaseModel, job: Job) -> np.ndarray[Any, Any]:
    """One client the ordinary way; what was trained less the base's own values, in the order of the wire."""
    names = [name for name, _, _ in base.layout.modules]
    config: Any = LoraConfig(
        r=RANK, lora_alpha=SCALING * RANK, target_modules=names, use_dora=base.layout.kind == "dora"
    )
    if base.layout.kind == "ia3":
        down = [name for name in names if name.endswith("down_proj")]
        config = IA3Config(target_modules=names, feedforward_modules=down)
    peft = get_peft_model(base.model, config)
    everything, trained, origins = dict(peft.named_parameters()), [], []
    for name, value in base.layout.views(job.flat).items():
        key = f"base_model.model.{name}.default" + ("" if name.endswith("ia3_l") else ".weight")
        layer = f"base_model.model.{name.rpartition('.')[0]}.base_layer.weight"
        origin = torch.zeros(value.shape, dtype=torch.float64)
        if name.endswith("ia3_l"):
            origin += 1
        elif name.endswith(MAGNITUDE):
            origin = (everything[layer] ** 2).sum(dim=1).sqrt()
        parameter = everything[key]
        parameter.data = origin + torch.from_numpy(value.copy()).double()
        trained.append(parameter)
        origins.append(origin)
    optimiser = torch.optim.AdamW(trained, lr=SETTINGS.lr, weight_decay=SETTINGS.weight_decay)
    prepared = base.prepare(job.examples, 512)
    for step, rows in enumerate(batches(len(job.examples), SETTINGS, job.seed), 1):
        optimiser.param_groups[0]["lr"] = SETTINGS.lr * min(1, step / SETTINGS.warmup_steps)
        optimiser.zero_grad()
        answer_loss(base, collate(base, [[prepared[row] for row in rows]]), 1).sum().backward()
        torch.nn.utils.clip_grad_norm_(trained, SETTINGS.max_grad_norm)
        optimiser.step()
    moved = [(p.detach() - origin).numpy().ravel() for p, origin in zip(trained, origins, strict=True)]
    base.model = peft.unload()
    return np.concatenate(moved)


@pytest.mark.parametrize("kind", ["lora", *ALONE])
def test_each_client_gets_what_a_plain_peft_loop_gives_it(llava: Path, kind: str) -> None:
    base = load(llava, kind, double=True)
    jobs = [Job(examples(3 + 4 * c, seed=c), filled(base, c), seed=c) for c in range(2)]  # ragged data
    seen: list[torch.Tensor] = []
    done = alone.train(base, jobs, SETTINGS, SCALING, Witness(seen), torch.float64)
    for job, trained, exact in zip(jobs, done, seen, strict=True):
        expected = plain_peft(base, job)
        update = np.linalg.norm(expected - job.flat)
        assert update > 0.05
        assert np.linalg.norm(exact.numpy() - expected) / update < 1e-9
        assert np.array_equal(trained.flat, exact.float().numpy())
        assert trained.steps == len(batches(len(job.examples), SETTINGS, job.seed))


@pytest.mark.parametrize("kind", ALONE)
def test_a_client_alone_gets_the_bits_that_it_gets_in_company(llava: Path, kind: str) -> None:
    base, dropout = load(llava, kind), 0.3 if kind == "dora" else 0.0
    jobs = [Job(examples(3 + 2 * c, seed=c), filled(base, c), seed=c) for c in range(3)]
    together = training.train(base, jobs, SETTINGS, SCALING, dropout=dropout)
    for job, trained in zip(jobs, together, strict=True):
        (single,) = training.train(base, [job], SETTINGS, SCALING, dropout=dropout)
        assert single.flat.tobytes() == trained.flat.tobytes()
        assert (single.loss, single.steps) == (trained.loss, trained.steps)


def test_the_way_through_peft_and_the_fused_way_draw_the_same_dropout(llava: Path) -> None:
    base = load(llava, "lora", double=True)
    job = Job(examples(5), filled(base, 0), seed=3)
    plain, fused, peft = (
        way(base, [job], TrainSection(lr=1e-2), SCALING, dtype=torch.float64, dropout=p)[0].flat
        for way, p in ((training.train, 0.0), (training.train, 0.5), (alone.train, 0.5))
    )
    update = np.linalg.norm(fused - job.flat)
    assert np.linalg.norm(fused - peft) / update < 1e-6
    assert np.linalg.norm(fused - plain) / update > 0.1


def test_dropout_is_drawn_for_dora_and_micro_batches_add_up_to_the_batch(llava: Path) -> None:
    base = load(llava, "dora", double=True)
    job = Job(examples(5), filled(base, 0), seed=3)
    flats = [
        training.train(base, [job], TrainSection(micro_batch=most), SCALING, dtype=torch.float64, dropout=p)[0].flat
        for most, p in ((0, 0.0), (0, 0.4), (2, 0.4))
    ]
    update = np.linalg.norm(flats[1] - job.flat)
    assert np.linalg.norm(flats[1] - flats[2]) / update < 1e-6
    assert np.linalg.norm(flats[1] - flats[0]) / update > 0.1


@pytest.mark.parametrize("kind", ALONE)
def test_a_local_half_sees_a_cohort_of_one_and_may_change_what_it_sees(llava: Path, kind: str) -> None:
    base = load(llava, kind)
    sizes = dict(base.layout.parameters(RANK))

    class Half(LocalHalf):
        def on_gradients(self, ctx: Any, gradients: Mapping[str, torch.Tensor]) -> None:
            assert {name: tuple(g.shape) for name, g in gradients.items()} == {n: (1, *s) for n, s in sizes.items()}
            assert all(bool(g.any()) for g in gradients.values())
            for gradient in gradients.values():
                gradient.zero_()

        def on_step(self, ctx: Any, parameters: Mapping[str, torch.Tensor]) -> None:
            assert torch.allclose(ctx.cohort.flat, ctx.start + self.options * ctx.step, atol=1e-6)
            for parameter in parameters.values():
                parameter += self.options

        def end(self, ctx: Any) -> Mapping[str, torch.Tensor]:
            return {"steps": torch.tensor([[float(ctx.step + 1)]])}

    settings = TrainSection(local_epochs=1, batch_size=2)
    job = Job(examples(3), np.full(base.layout.size(RANK), 0.5, np.float32), seed=0)
    (done,) = training.train(base, [job], settings, SCALING, Half(0.25))
    assert done.steps == 2
    assert done.extra["steps"].tolist() == [2.0]
    assert np.allclose(done.flat, 0.5 + 2 * 0.25, atol=1e-6)


def test_a_penalty_of_a_local_half_reaches_pefts_parameters(llava: Path) -> None:
    base = load(llava, "dora", double=True)

    class Pull(LocalHalf):
        def loss(self, ctx: Any, batch: Any, out: Any, base_loss: torch.Tensor) -> torch.Tensor:
            return base_loss * 0 + batch.part * ctx.values().sum(dim=1)

        def on_gradients(self, ctx: Any, gradients: Mapping[str, torch.Tensor]) -> None:
            assert torch.allclose(ctx.gradient, torch.ones_like(ctx.gradient))

    job = Job(examples(2), filled(base, 0), seed=0)
    (done,) = training.train(base, [job], TrainSection(local_epochs=1, micro_batch=1), SCALING, Pull(), torch.float64)
    assert (done.flat < job.flat).all()


@pytest.mark.parametrize("kind", ALONE)
def test_the_base_is_as_before_when_training_and_answering_are_over(llava: Path, kind: str) -> None:
    base = load(llava, kind)
    before, rows, modules = base.hash, examples(2), dict(base.model.named_modules())
    plain = hidden(base, rows)
    training.train(base, [Job(rows, filled(base, 0), 0)], SETTINGS, SCALING)
    bank = Switch(base, [filled(base, 0)], SCALING)
    with bank.on(base):
        bank.activate(torch.ones(2, 1))
        assert not torch.equal(hidden(base, rows), plain)
    with pytest.raises(BadInput), bank.on(base):
        bank.activate(torch.full((2, 1), 0.5))
    assert torch.equal(hidden(base, rows), plain)
    assert {name: id(module) for name, module in base.model.named_modules()} == {n: id(m) for n, m in modules.items()}
    assert not hasattr(base.model, "peft_config")
    assert not any(parameter.requires_grad for parameter in base.model.parameters())
    del base.hash  # a cached property
    assert base.hash == before


@pytest.mark.parametrize("kind", ALONE)
def test_a_fresh_adapter_answers_as_the_base_and_none_exactly_so(llava: Path, kind: str) -> None:
    base, rows = load(llava, kind), examples(3)
    plain = hidden(base, rows)
    bank = Switch(base, [fresh(base.layout, RANK, 0), filled(base, 1)], SCALING)
    with bank.on(base):
        bank.activate(torch.tensor([[1.0, 0.0]] * 3))
        assert torch.allclose(hidden(base, rows), plain, atol=1e-5)
        bank.activate(torch.zeros(3, 2))
        assert torch.equal(hidden(base, rows), plain)
        bank.activate(torch.tensor([[0.0, 1.0]] * 3))
        assert not torch.allclose(hidden(base, rows), plain, atol=1e-2)


@pytest.mark.parametrize("kind", ["lora", "rslora", *ALONE])
@pytest.mark.parametrize("projector", ["frozen", "shared"])
def test_a_saved_folder_answers_in_peft_as_the_bank_does(
    llava: Path, tmp_path: Path, kind: str, projector: str
) -> None:
    base, rows = load(llava, kind, projector=projector), examples(2)
    lora = LoraSection(kind=kind, rank=RANK, alpha=6.0)
    scaling = lora.scaling
    assert scaling == {"rslora": 3.0}.get(kind, 1.5)
    low, tail = base.layout.cut(filled(base, 1))
    bank = bank_of(base, Knowledge((fresh(base.layout.lora, RANK, 0), low), shared=tail), scaling)
    assert bank is not None
    with bank.on(base):
        bank.activate(torch.tensor([[0.0, 1.0]]).expand(2, 2))
        ours = hidden(base, rows)
    own = own_values(str(llava), "float32", base.layout)
    folder, flat = tmp_path / "one", np.concatenate([low, tail])
    save_peft(folder, base.layout, flat, scaling, str(llava), own, kind == "rslora")
    other = load(llava, kind, projector=projector)
    plain = hidden(other, rows)
    peft = PeftModel.from_pretrained(other.model, str(folder))
    config = peft.peft_config["default"]
    assert getattr(config, "use_rslora", False) == (kind == "rslora")
    if kind != "ia3":
        assert config.lora_alpha == pytest.approx(6.0)  # as the run's config has it
    other.model = peft.base_model.model
    assert torch.allclose(ours, hidden(other, rows), atol=1e-5)
    assert not torch.allclose(ours, plain, atol=1e-2)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_weight_files_have_the_magnitudes_that_training_starts_from(llava: Path, dtype: str) -> None:
    base = BaseModel(ModelSection(name=str(llava), dtype=dtype), LoraSection(kind="dora"))
    found = own_values(str(llava), dtype, base.layout)
    assert sorted(found) == sorted(name for name, _ in base.layout.vectors)
    for name, _, _ in base.layout.modules:
        expected = base.module(name).weight.float().norm(dim=1)
        assert torch.allclose(torch.from_numpy(found[f"{name}.{MAGNITUDE}"]), expected, rtol=1e-6)
    with pytest.raises(BadInput, match="has no safetensors files"):
        own_values(str(llava.parent / "nowhere"), dtype, base.layout)


@pytest.mark.parametrize("weights", [[[0.5, 0.5]], [[1.0, 1.0]], [[0.0, 0.7]], [[1.0, 0.0], [0.999, 0.001]]], ids=str)
def test_a_mixture_of_such_adapters_is_refused(llava: Path, weights: list[list[float]]) -> None:
    base = load(llava, "ia3")
    bank = Switch(base, [filled(base, 0), filled(base, 1)], SCALING)
    with pytest.raises(BadInput, match=r"lora\.kind: .* kind ia3 .*strategy\.activation=argmax"), bank.on(base):
        bank.activate(torch.tensor(weights))


def test_rows_are_batched_by_their_adapter(llava: Path) -> None:
    base = load(llava, "ia3")
    bank = Switch(base, [filled(base, 0), filled(base, 1)], SCALING)
    weights = torch.tensor([[0.0, 1.0], [1.0, 0.0], [0.0, 1.0], [0.0, 0.0], [0.0, 1.0]])
    assert batches_of(bank, weights, [1] * 5, 2) == [[3], [1], [0, 2], [4]]
    assert batches_of(None, weights, [1] * 5, 2) == [[0, 1], [2, 3], [4]]


def test_scales_stand_where_pefts_table_has_them() -> None:
    names = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    found = [name for name in names if feedforward(f"model.language_model.layers.0.mlp.{name}")]
    assert found == FEEDFORWARD["llama"]


@pytest.mark.parametrize("kind", ALONE)
def test_a_base_in_bfloat16_trains_and_answers_near_one_in_float32(llava: Path, kind: str) -> None:
    jobs, updates = [Job(examples(4), fresh(load(llava, kind).layout, RANK, 0), 0)], []
    for dtype in ("float32", "bfloat16"):
        base = BaseModel(ModelSection(name=str(llava), dtype=dtype), LoraSection(kind=kind))
        (done,) = training.train(base, jobs, TrainSection(lr=1e-2, schedule="cosine"), SCALING)
        assert done.flat.dtype == np.float32
        updates.append(done.flat - jobs[0].flat)
        bank = bank_of(base, Knowledge((done.flat,)), SCALING)
        assert bank is not None
        with bank.on(base):
            bank.activate(torch.ones(1, 1))
            assert torch.isfinite(hidden(base, examples(1)).float()).all()
    cosine = updates[0] @ updates[1] / np.linalg.norm(updates[0]) / np.linalg.norm(updates[1])
    assert cosine > 0.9
