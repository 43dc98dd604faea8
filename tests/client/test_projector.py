"""A shared projector: trained by every client beside its adapter, as differences to the base's values."""

from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from fedstrata.client.evaluation import Answerer
from fedstrata.client.lora import Cohort, adapted
from fedstrata.client.mixture import Mixture
from fedstrata.client.model import BaseModel
from fedstrata.client.training import Job, answer_loss, batches, collate, train
from fedstrata.core import shapes
from fedstrata.core.adapters import Flat, fresh
from fedstrata.core.config import LoraSection, ModelSection, TrainSection, from_dict
from fedstrata.core.errors import BadInput
from fedstrata.core.peftfolder import save_peft
from fedstrata.core.records import Knowledge
from fedstrata.scenarios.stream import Example
from fedstrata.strategies.base import Everything
from fedstrata.strategies.disco import DiscoConfig
from tests.client import cohorts

examples = partial(cohorts.examples, bare=True)

SCALING = 2.0
SETTINGS = TrainSection(lr=1e-2, batch_size=3, local_epochs=2, warmup_steps=2, max_grad_norm=0.5, weight_decay=0.1)
SIZE = 48 * 32 + 48 + 48 * 48 + 48  # two Linears with bias, from a tower of 32 to a language model of 48


def norm(module: Any, x: torch.Tensor) -> torch.Tensor:
    """Llama's norm without its detour over float32."""
    return module.weight * x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + module.variance_epsilon)


def load(llava: Path, projector: str = "shared", double: bool = False) -> BaseModel:
    torch.set_num_threads(1)
    section = ModelSection(name=str(llava), attention="sdpa" if double else "eager", max_new_tokens=4)
    base = BaseModel(section, LoraSection(), projector)
    if double:
        base.model.double()
        for module in base.model.modules():
            if isinstance(module, LlamaRMSNorm):
                module.forward = partial(norm, module)
    return base


@pytest.fixture(scope="module")
def base(llava: Path) -> BaseModel:
    return load(llava)


@pytest.fixture
def base64(llava: Path) -> BaseModel:
    return load(llava, double=True)


def filled(base: BaseModel, seed: int, rank: int = 4, tail: float = 0.02) -> Flat:
    """An adapter whose B and tail are not zero."""
    flat, draw = fresh(base.layout, rank, seed), np.random.default_rng(seed)
    low, dense = base.layout.cut(flat + draw.normal(0, 0.05, flat.shape).astype(np.float32))
    return np.concatenate([low, dense * (tail / 0.05)]).astype(np.float32)


def jobs(base: BaseModel, counts: tuple[int, ...]) -> list[Job]:
    return [Job(examples(count, seed=c), filled(base, c), seed=c) for c, count in enumerate(counts)]


def test_the_tail_is_the_projector_in_the_layout_of_client_and_server(base: BaseModel, llava: Path) -> None:
    names = [name for name, _ in base.layout.dense]
    assert names == [f"model.multi_modal_projector.linear_{i}.{kind}" for i in (1, 2) for kind in ("weight", "bias")]
    assert base.layout.tail == SIZE
    for projector in ("shared", "frozen"):
        tree = {"model": {"name": str(llava)}, "strategy": {"name": "disco", "projector": projector}}
        known = shapes.layout(from_dict(tree, DiscoConfig))
        assert known == load(llava, projector).layout
        assert (known == base.layout) == (known.hash == base.layout.hash) == (projector == "shared")


def test_a_zero_tail_changes_nothing(base: BaseModel, llava: Path) -> None:
    plain, flat, rows = load(llava, "frozen"), filled(base, 0, tail=0), examples(3)
    losses = []
    for one, values in ((base, flat), (plain, base.layout.cut(flat)[0])):
        with adapted(one, Cohort.of([values], one.layout, SCALING, one.device, torch.float32)), torch.no_grad():
            losses.append(answer_loss(one, collate(one, [one.prepare(rows, 512)]), 1).item())
    assert losses[0] == pytest.approx(losses[1], rel=1e-6)


def plain_peft(base: BaseModel, job: Job) -> np.ndarray:
    """One client the ordinary way: PEFT with modules_to_save, torch's AdamW; the tail as differences."""
    rank, targets = base.layout.rank(job.flat), [name for name, _, _ in base.layout.modules]
    config = LoraConfig(
        r=rank, lora_alpha=SCALING * rank, target_modules=targets, modules_to_save=["multi_modal_projector"]
    )
    peft = get_peft_model(base.model, config)
    parameters, learned = dict(peft.named_parameters()), []
    for name, factors in base.layout.split(job.flat).items():
        for label, value in zip(("lora_A", "lora_B"), factors, strict=True):
            parameter = parameters[f"base_model.model.{name}.{label}.default.weight"]
            parameter.data = torch.from_numpy(value.copy()).double()
            learned.append(parameter)
    module, starts = "base_model.model.model.multi_modal_projector.", []
    for name, delta in base.layout.dense_views(base.layout.cut(job.flat)[1]).items():
        parameter = parameters[f"{module}modules_to_save.default.{name.split('projector.')[1]}"]
        starts.append(parameter.data.clone())
        parameter.data = parameter.data + torch.from_numpy(delta.copy())
        learned.append(parameter)
    optimiser = torch.optim.AdamW(learned, lr=SETTINGS.lr)
    prepared = base.prepare(job.examples, 512)
    for step, rows in enumerate(batches(len(job.examples), SETTINGS, job.seed), 1):
        optimiser.param_groups[0]["lr"] = SETTINGS.lr * min(1, step / SETTINGS.warmup_steps)
        optimiser.param_groups[0]["weight_decay"] = 0.0
        optimiser.zero_grad(set_to_none=False)
        answer_loss(base, collate(base, [[prepared[row] for row in rows]]), 1).sum().backward()
        torch.nn.utils.clip_grad_norm_(learned, SETTINGS.max_grad_norm)
        optimiser.step()
    low, tail = learned[: -len(starts)], learned[-len(starts) :]
    values = [*low, *(parameter - start for parameter, start in zip(tail, starts, strict=True))]
    result = np.concatenate([value.detach().numpy().ravel() for value in values])
    base.model = peft.unload()
    return result


def test_a_cohort_equals_plain_peft_with_modules_to_save(
    base64: BaseModel, llava: Path, trained: list[Cohort], monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = TrainSection(**{**vars(SETTINGS), "weight_decay": 0.0})
    cohort = jobs(base64, (7, 4))
    train(base64, cohort, settings, SCALING, dtype=torch.float64)
    for row, job in enumerate(cohort):
        expected = plain_peft(load(llava, double=True), job)
        for ours, theirs, start in zip(
            base64.layout.cut(trained[0].flat[row].detach().numpy()),
            base64.layout.cut(expected),
            base64.layout.cut(job.flat),
            strict=True,
        ):
            update = np.linalg.norm(theirs - start)
            assert update > 0.05
            assert np.linalg.norm(ours - theirs) / update < 1e-9


@pytest.mark.parametrize("micro_batch", [0, 1])
def test_a_client_alone_gets_what_it_gets_in_a_cohort(
    base64: BaseModel, trained: list[Cohort], micro_batch: int
) -> None:
    cohort, settings = jobs(base64, (7, 2, 5)), TrainSection(**{**vars(SETTINGS), "micro_batch": micro_batch})
    train(base64, cohort, settings, SCALING, dtype=torch.float64)
    for row, index in enumerate((0, 2, 1)):  # who has more steps comes first
        train(base64, [cohort[index]], SETTINGS, SCALING, dtype=torch.float64)
        alone, together = trained[-1].flat[0].detach().numpy(), trained[0].flat[row].detach().numpy()
        update = np.linalg.norm(alone - cohort[index].flat)
        assert np.linalg.norm(alone - together) / update < 1e-9


def test_a_client_without_pictures_leaves_its_tail(base: BaseModel) -> None:
    rows = [Example(str(i), "two and two?", "4") for i in range(3)]
    jobs = [Job(rows, fresh(base.layout, 4, 0), 0), Job(examples(3), fresh(base.layout, 4, 0), 1)]
    text, pictured = (base.layout.cut(done.flat)[1] for done in train(base, jobs, TrainSection(), SCALING))
    assert not text.any()
    assert pictured.any()


def test_the_local_halves_see_the_projector_by_name(base: BaseModel) -> None:
    flats = [filled(base, seed) for seed in range(2)]
    cohort = Cohort.of(flats, base.layout, SCALING, base.device, torch.float32)
    named = cohort.named(cohort.flat)
    views = base.layout.dense_views(base.layout.cut(flats[1])[1])
    assert list(named)[-4:] == list(views)
    for name, value in views.items():
        assert np.array_equal(named[name][1].detach().numpy(), value)


def logits(base: BaseModel, rows: list[Example]) -> torch.Tensor:
    prepared = base.prepare(rows, 512)
    with torch.no_grad():
        batch = base.embed([p.prompt for p in prepared], [p.features for p in prepared], left=True)
        hidden = base.model.model.language_model(inputs_embeds=batch.embeds, attention_mask=batch.mask)
        return base.model.lm_head(hidden.last_hidden_state[batch.mask == 1])


def test_an_exported_projector_gives_plain_peft_the_same_logits(base: BaseModel, llava: Path, tmp_path: Path) -> None:
    flat, rows = filled(base, 3), examples(3)
    low, tail = base.layout.cut(flat)
    bank = Mixture.of([low], base.layout, SCALING, base.device, torch.float32, tail)
    bank.activate(torch.ones(3, 1))
    with adapted(base, bank):
        ours = logits(base, rows)
    dense = shapes.dense_weights(str(llava), base.layout)
    save_peft(tmp_path / "one", base.layout, flat, SCALING, str(llava), dense)
    other = load(llava, "frozen")
    before = logits(other, rows)
    peft = PeftModel.from_pretrained(other.model, str(tmp_path / "one"))
    other.model = peft.base_model.model
    other.pictures._cache.clear()
    theirs = logits(other, rows)
    assert torch.allclose(ours, theirs, atol=1e-5)
    assert not torch.allclose(ours, before, atol=1e-2)


def test_the_bases_projector_is_read_from_its_files_alone(base: BaseModel, llava: Path, tmp_path: Path) -> None:
    found = shapes.dense_weights(str(llava), base.layout)
    for name, _ in base.layout.dense:
        assert np.array_equal(found[name], base.model.get_parameter(name).detach().numpy())
    with pytest.raises(BadInput, match="has no safetensors files"):
        shapes.dense_weights(str(tmp_path), base.layout)


def test_answers_use_the_shared_tail_under_every_weight(base: BaseModel) -> None:
    low, tail = base.layout.cut(filled(base, 1, tail=0.3))
    rows, nothing = examples(3), np.zeros_like(low)
    answers = [
        Answerer(base, Knowledge((adapter,), shared=shared), Everything(1), SCALING).answer(rows, 0, 3, 512).texts
        for adapter, shared in ((nothing, tail), (nothing, np.zeros(0, np.float32)), (nothing, 0 * tail))
    ]
    assert answers[1] == answers[2]
    assert answers[0][0] != answers[1][0]
    assert answers[0][1] == answers[1][1]  # text alone


def test_projectors_per_subspace_are_weighed_row_by_row(base: BaseModel) -> None:
    """Each of its layers is W + Σ α_i ΔW_i with the row's own α."""
    lows, tails = zip(*(base.layout.cut(filled(base, seed, tail=0.3)) for seed in range(2)), strict=True)
    bank = Mixture.of(lows, base.layout, SCALING, base.device, torch.float32, np.concatenate(tails), own_tails=True)
    alphas = torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.25, 0.5]])
    features = [row for row in base.image_features(examples(6)) if row is not None][:3]
    bank.activate(alphas)
    with adapted(base, bank), torch.no_grad():
        found = base.pictures.finish(features)
    for alpha, feature, row in zip(alphas, features, found, strict=True):
        tail = sum(float(a) * tail for a, tail in zip(alpha, tails, strict=True))
        assert row is not None
        assert torch.allclose(row, by_hand(base, feature, np.asarray(tail, np.float32)), atol=1e-5)
    assert not torch.allclose(found[0], base.pictures.finish(features)[0], atol=1e-2)  # type: ignore[arg-type]


@pytest.mark.parametrize("own", [True, False])
def test_a_lone_projector_is_weighed_if_it_is_its_subspaces_own(base: BaseModel, own: bool) -> None:
    low, tail = base.layout.cut(filled(base, 0, tail=0.3))
    bank = Mixture.of([low], base.layout, SCALING, base.device, torch.float32, tail, own)
    (feature,) = [row for row in base.image_features(examples(6)) if row is not None][:1]
    bank.activate(torch.zeros(1, 1))
    with adapted(base, bank), torch.no_grad():
        (found,) = base.pictures.finish([feature])
    (plain,) = base.pictures.finish([feature])
    assert found is not None
    assert plain is not None
    assert torch.equal(found, plain) == own


def by_hand(base: BaseModel, feature: torch.Tensor, tail: np.ndarray) -> torch.Tensor:
    """The projector with `tail` added to its weights."""
    moved = {name: torch.from_numpy(value.copy()) for name, value in base.layout.dense_views(tail).items()}
    projector = base.model.model.multi_modal_projector
    own = {name: value + moved[f"model.multi_modal_projector.{name}"] for name, value in projector.named_parameters()}
    with torch.no_grad():
        return torch.func.functional_call(projector, own, (feature[None],))[0]
