"""The published training's further knobs, each against the plain way of doing the same."""

import math
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from fedstrata.client import features as features_module
from fedstrata.client import training
from fedstrata.client.dropout import Dropout
from fedstrata.client.lora import Cohort, adapted
from fedstrata.client.model import BaseModel
from fedstrata.client.optimiser import rate
from fedstrata.client.training import Job, answer_loss, batches, collate, train
from fedstrata.core.adapters import Flat, Layout, fresh
from fedstrata.core.config import LoraSection, ModelSection, TrainSection
from fedstrata.core.errors import BadInput
from fedstrata.scenarios.stream import Example, Pixels
from tests.client import cohorts

SCALING = 2.0
exact = partial(cohorts.exact, scaling=SCALING)
SETTINGS = TrainSection(lr=1e-2, batch_size=3, local_epochs=2, warmup_steps=2, max_grad_norm=0.5, weight_decay=0.1)
COSINE = replace(SETTINGS, schedule="cosine", warmup_ratio=0.3)
SYSTEM = "A chat between a curious human and an assistant."
LLAVA = (  # llava-1.5's own, in short: the system sentence stands bare
    "{% for m in messages %}{% if m['role'] != 'system' %}{{ m['role'].upper() + ': ' }}{% endif %}"
    "{% for p in m['content'] %}{{ '<image>\n' if p['type'] == 'image' else p['text'] + ' ' }}{% endfor %}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"
)


def load(llava: Path, double: bool = False, **section: Any) -> BaseModel:
    torch.set_num_threads(1)
    base = BaseModel(ModelSection(name=str(llava), **section), LoraSection())
    if double:
        base.model.double()
        for module in base.model.modules():
            if isinstance(module, LlamaRMSNorm):
                module.forward = partial(norm, module)
    return base


def norm(module: Any, x: torch.Tensor) -> torch.Tensor:
    """Llama's norm without its detour over float32; its eager softmax takes one too, so these bases attend by sdpa."""
    return module.weight * x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + module.variance_epsilon)


@pytest.fixture(scope="module")
def base(llava: Path) -> BaseModel:
    return load(llava)


@pytest.fixture
def base64(llava: Path) -> BaseModel:
    return load(llava, double=True, attention="sdpa")


def examples(count: int, seed: int = 0) -> list[Example]:
    """Some with a picture, some with further turns."""
    draw = np.random.default_rng(seed)
    pictures = [Pixels(draw.integers(0, 256, (32, 32, 3), dtype=np.uint8)) for _ in range(count)]
    words = ["red", "blue green", "the shape", "4"]
    rows = [Example(str(i), f"what colour is shape {i}?", words[i % 4], p) for i, p in enumerate(pictures)]
    return [replace(row, more=(("and now?", "green"),) * (i % 3)) for i, row in enumerate(rows)]


def filled(base: BaseModel, seed: int, rank: int = 4) -> Flat:
    flat = fresh(base.layout, rank, seed)
    return flat + np.random.default_rng(seed).normal(0, 0.05, flat.shape).astype(np.float32)


def jobs(base: BaseModel, counts: tuple[int, ...]) -> list[Job]:
    return [Job(examples(count, seed=c), filled(base, c), seed=c) for c, count in enumerate(counts)]


def apart(left: np.ndarray, right: np.ndarray, start: Flat) -> float:
    """The difference relative to the update."""
    update = np.linalg.norm(right - start)
    assert update > 1e-3
    return float(np.linalg.norm(left - right) / update)


# --- further turns ---------------------------------------------------------------------------------------------------


def test_a_conversation_is_one_sequence_whose_answers_alone_are_supervised(base: BaseModel) -> None:
    example = Example("a", "what colour?", "red", Pixels(np.zeros((32, 32, 3), np.uint8)), more=(("and?", "blue"),))
    row, tokenizer = base.prepare([example], 512)[0], base.tokenizer
    assert row.features is not None
    pieces = ["USER: <image>\nwhat colour? ASSISTANT:", " red", "</s>", "USER: and? ASSISTANT:", " blue", "</s>"]
    ids = [tokenizer(piece, add_special_tokens=index == 0)["input_ids"] for index, piece in enumerate(pieces)]
    at = ids[0].index(base.image_token)
    ids[0][at : at + 1] = [base.image_token] * len(row.features)
    assert list(row.prompt) == ids[0]
    assert list(row.answer) == [token for piece in ids[1:] for token in piece]
    marks = [index in (1, 2, 4, 5) for index, piece in enumerate(ids) for _ in piece][len(ids[0]) :]
    assert list(row.supervised) == marks


def test_the_loss_of_a_conversation_is_torchs_with_other_labels_at_minus_100(base64: BaseModel) -> None:
    rows = base64.prepare(examples(4), 512)
    ours = answer_loss(base64, collate(base64, [rows]), 1)
    batch = base64.embed([row.prompt + row.answer for row in rows], [row.features for row in rows], left=False)
    labels = torch.full(batch.mask.shape, -100)
    for index, row in enumerate(rows):
        for place, (token, counts) in enumerate(zip(row.answer, row.supervised, strict=True), len(row.prompt)):
            labels[index, place] = token if counts else -100
    hidden = base64.model.model.language_model(inputs_embeds=batch.embeds, attention_mask=batch.mask)
    logits = base64.model.lm_head(hidden.last_hidden_state)[:, :-1]
    plain = torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels[:, 1:].flatten(), ignore_index=-100)
    assert sum(labels.flatten() != -100) == sum(sum(row.supervised) for row in rows)
    assert ours.item() == pytest.approx(plain.item(), rel=1e-12)


def test_the_image_tag_in_a_further_turn_is_refused(base: BaseModel) -> None:
    for more in ((("an <image>?", "4"),), (("and?", "<image>"),)):
        with pytest.raises(BadInput, match="example x: no answer and no further turn may hold the image tag"):
            base.tokenise([Example("x", "what?", "4", more=more)], 512)


# --- learning rates --------------------------------------------------------------------------------------------------


def test_the_cosine_falls_from_lr_behind_a_warm_up_of_a_clients_own_steps() -> None:
    settings = TrainSection(lr=1.0, schedule="cosine", warmup_ratio=0.2)
    found = [rate(settings, number, 10) for number in range(1, 11)]  # ceil(0.2 · 10) = 2 steps of warm-up, 8 of cosine
    falling = [0.5 * (1 + math.cos(math.pi * k / 8)) for k in range(8)]
    assert found == pytest.approx([0.5, 1.0, *falling])
    assert found[2] == 1.0
    assert min(found) > 0


@pytest.mark.parametrize("schedule", ["constant", "cosine"])
def test_a_client_with_one_step_trains_at_lr(schedule: str) -> None:
    assert rate(TrainSection(lr=0.5, schedule=schedule, warmup_ratio=0.03), 1, 1) == 0.5
    assert rate(TrainSection(lr=0.5, schedule=schedule, warmup_steps=0), 1, 1) == 0.5


def test_a_ratio_replaces_the_number_of_steps() -> None:
    settings = TrainSection(lr=1.0, warmup_steps=7, warmup_ratio=0.03)
    assert [rate(settings, number, 100) for number in (1, 2, 3, 4)] == pytest.approx([1 / 3, 2 / 3, 1, 1])


def plain_peft(base: BaseModel, job: Job, settings: TrainSection) -> np.ndarray:
    """One client the ordinary way: PEFT, torch's AdamW and transformers' schedule of the same shape."""
    targets = [name for name, _, _ in base.layout.modules]
    rank = base.layout.rank(job.flat)
    peft = get_peft_model(base.model, LoraConfig(r=rank, lora_alpha=SCALING * rank, target_modules=targets))
    parameters, trained = dict(peft.named_parameters()), []
    for name, factors in base.layout.split(job.flat).items():
        for label, value in zip(("lora_A", "lora_B"), factors, strict=True):
            parameter = parameters[f"base_model.model.{name}.{label}.default.weight"]
            parameter.data = torch.from_numpy(value.copy()).double()
            trained.append(parameter)
    optimiser = torch.optim.AdamW(trained, lr=settings.lr, weight_decay=settings.weight_decay)
    prepared, plan = base.prepare(job.examples, 512), batches(len(job.examples), settings, job.seed)
    warm = math.ceil(settings.warmup_ratio * len(plan))
    for step, rows in enumerate(plan, 1):
        falling = 0.5 * (1 + math.cos(math.pi * (step - 1 - warm) / max(1, len(plan) - warm)))
        optimiser.param_groups[0]["lr"] = settings.lr * (step / warm if step <= warm else falling)
        optimiser.zero_grad()
        answer_loss(base, collate(base, [[prepared[row] for row in rows]]), 1).sum().backward()
        torch.nn.utils.clip_grad_norm_(trained, settings.max_grad_norm)
        optimiser.step()
    base.model = peft.unload()
    return np.concatenate([parameter.detach().numpy().ravel() for parameter in trained])


def test_a_cohort_on_cosines_of_their_own_equals_plain_peft_client_by_client(base64: BaseModel) -> None:
    cohort = jobs(base64, (9, 2, 5))
    for job, trained in zip(cohort, exact(base64, cohort, COSINE), strict=True):
        assert apart(trained, plain_peft(base64, job, COSINE), job.flat) < 1e-9


# --- micro-batches ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("most", "dropout"), [(1, 0.0), (2, 0.0), (3, 0.0), (1, 0.2)])
def test_micro_batches_add_up_to_the_whole_batch(base64: BaseModel, most: int, dropout: float) -> None:
    cohort = jobs(base64, (7, 2, 4))
    whole = exact(base64, cohort, SETTINGS, dropout=dropout)
    pieces = exact(base64, cohort, replace(SETTINGS, micro_batch=most), dropout=dropout)
    for job, left, right in zip(cohort, pieces, whole, strict=True):
        assert apart(left, right, job.flat) < 1e-9
    losses = [train(base64, cohort, replace(SETTINGS, micro_batch=m), SCALING)[0].loss for m in (0, most)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


# --- long texts ------------------------------------------------------------------------------------------------------


def test_a_long_question_loses_its_end_and_nothing_else(base: BaseModel) -> None:
    long = Example("long", "what colour is it? " * 9, "red", Pixels(np.zeros((32, 32, 3), np.uint8)))
    whole = base.tokenise([long], 512)[0]
    cut = base.tokenise([long], 40, "cut")[0]
    assert len(cut.prompt) + len(cut.answer) <= 40 < len(whole.prompt) + len(whole.answer)
    assert len(cut.prompt) + len(cut.answer) >= 38  # merges where it now ends may take a token or two more
    assert cut.answer == whole.answer
    text, full = (base.tokenizer.decode(row.prompt) for row in (cut, whole))
    ending = " ASSISTANT:"
    assert text.endswith(ending)
    assert full.startswith(text.removesuffix(ending))
    assert cut.prompt.count(base.image_token) == whole.prompt.count(base.image_token) == 4
    assert base.tokenise([long], 512, "cut")[0] == whole


def test_an_answer_that_is_too_long_alone_is_refused_all_the_same(base: BaseModel) -> None:
    with pytest.raises(BadInput, match=r"example x: must have at most train.max_length = 20 tokens, got \d+"):
        base.tokenise([Example("x", "what?", "red blue " * 20)], 20, "cut")


def test_a_long_conversation_first_loses_its_last_turns_whole(base: BaseModel) -> None:
    example = Example("x", "what colour is it?", "red", more=(("and now?", "green"), ("and then? " * 9, "blue")))
    fits = base.tokenise([replace(example, more=example.more[:1])], 512)[0]
    assert base.tokenise([example], len(fits.prompt) + len(fits.answer), "cut")[0] == fits


def test_what_is_asked_does_not_depend_on_the_answer_where_questions_are_cut(base: BaseModel) -> None:
    from fedstrata.client.evaluation import generate

    rows = [Example("x", "what colour is it? " * 9, answer) for answer in ("red", "red blue green " * 3)]
    assert len({generate(base, [row], 40, "cut")[0] for row in rows}) == 1
    with pytest.raises(BadInput, match="train.max_length = 40"):
        generate(base, rows[:1], 40)


# --- the system sentence and the pictures' frame ---------------------------------------------------------------------


def with_template(llava: Path, folder: Path, template: str) -> Path:
    """The same base with another chat template."""
    folder.mkdir()
    for file in llava.iterdir():
        if file.suffix != ".jinja":
            (folder / file.name).symlink_to(file)
    (folder / "chat_template.jinja").write_text(template, encoding="utf-8")
    return folder


def test_a_system_sentence_stands_before_the_first_turn_alone(llava: Path, tmp_path: Path) -> None:
    base = load(with_template(llava, tmp_path / "base", LLAVA), system=SYSTEM)
    example = Example("a", "what?", "red", Pixels(np.zeros((32, 32, 3), np.uint8)), more=(("and?", "blue"),))
    assert base.prompt(example) == f"{SYSTEM} USER: <image>\nwhat? ASSISTANT:"
    row = base.tokenise([example], 512)[0]
    assert base.tokenizer.decode(row.answer) == " red</s>USER: and? ASSISTANT: blue</s>"


@pytest.mark.parametrize(
    "template",
    [
        "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no such role') }}{% endif %}USER: ",
        "{% for m in messages if m['role'] == 'user' %}USER: {{ m['content'][-1]['text'] }}{% endfor %}",
        "{% for m in messages %}{{ 'U' if m['role'] == 'user' else 'A' }}: {{ m['content'][-1]['text'] }}{% endfor %}",
    ],
)
def test_a_template_without_a_system_role_is_refused(llava: Path, tmp_path: Path, template: str) -> None:
    folder = with_template(llava, tmp_path / "base", template)
    with pytest.raises(BadInput, match="model.system: the base's chat template"):
        load(folder, system=SYSTEM)


def test_the_tiny_base_has_no_place_for_a_system_sentence() -> None:
    with pytest.raises(BadInput, match="model.system: the base's chat template has no place"):
        BaseModel(ModelSection(system=SYSTEM), LoraSection())


def test_a_wide_picture_is_padded_to_a_square_in_the_mean_colour(llava: Path) -> None:
    base = load(llava, image_fit="pad")
    wide, tall = (Pixels(np.full(shape, 200, np.uint8)) for shape in ((20, 40, 3), (40, 20, 3)))
    mean = [int(value * 255) for value in base.processor.image_processor.image_mean]
    square = np.full((40, 40, 3), mean, np.uint8)
    square[10:30] = 200
    assert np.array_equal(np.asarray(base.pictures.vision.fitted(wide.open())), square)
    assert np.array_equal(np.asarray(base.pictures.vision.fitted(tall.open())), square.transpose(1, 0, 2))
    rows = [Example("a", "what?", "red", picture) for picture in (wide, Pixels(square))]
    plain = load(llava)
    padded, expected = base.image_features(rows[:1])[0], plain.image_features(rows[1:])[0]
    assert padded is not None
    assert expected is not None
    assert torch.equal(padded, expected)
    assert not torch.equal(padded, plain.image_features(rows[:1])[0])  # the processor alone cuts the sides off


# --- dropout and init ------------------------------------------------------------------------------------------------


def test_with_dropout_too_a_clients_result_does_not_depend_on_its_cohort(base64: BaseModel) -> None:
    cohort = jobs(base64, (7, 2, 5))
    together = exact(base64, cohort, SETTINGS, dropout=0.3)
    for job, trained in zip(cohort, together, strict=True):
        assert apart(exact(base64, [job], SETTINGS, dropout=0.3)[0], trained, job.flat) < 1e-9
        assert apart(exact(base64, [job], SETTINGS)[0], trained, job.flat) > 1e-2


def test_dropout_stands_where_peft_has_it(base64: BaseModel) -> None:
    rows, flat = base64.prepare(examples(1), 512), filled(base64, 0)
    batch = collate(base64, [rows])

    def begun() -> Dropout:
        dropout = Dropout(0.3, base64.device)
        dropout.begin([[len(rows[0].prompt) + len(rows[0].answer)]], [7], step=1)
        return dropout

    cohort = Cohort.of([flat], base64.layout, SCALING, base64.device, torch.float64)
    cohort.dropout = begun()
    with adapted(base64, cohort):
        ours = answer_loss(base64, batch, 1).item()
    rank, shared = base64.layout.rank(flat), begun()
    targets = [name for name, _, _ in base64.layout.modules]
    config = LoraConfig(r=rank, lora_alpha=SCALING * rank, lora_dropout=0.3, target_modules=targets)
    peft = get_peft_model(base64.model, config)
    for name, (a, b) in base64.layout.split(flat).items():
        layer = peft.base_model.model.get_submodule(name)
        layer.lora_A["default"].weight.data = torch.from_numpy(a.copy()).double()
        layer.lora_B["default"].weight.data = torch.from_numpy(b.copy()).double()
        assert isinstance(layer.lora_dropout["default"], torch.nn.Dropout)
        layer.lora_dropout["default"] = Drawn(shared)
    theirs = answer_loss(base64, batch, 1).item()
    base64.model = peft.unload()
    assert ours == pytest.approx(theirs, rel=1e-12)


class Drawn(torch.nn.Module):
    """A Dropout in the place of PEFT's."""

    def __init__(self, dropout: Dropout) -> None:
        super().__init__()
        self.dropout = dropout

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.dropout(x)


def test_dropout_keeps_the_share_it_says_and_the_mean() -> None:
    dropout = Dropout(0.25, torch.device("cpu"))
    dropout.begin([[50], [40]], [1, 2], step=3)
    out = dropout(torch.ones(2, 60, 400))
    assert out[0, :50].unique().tolist() == pytest.approx([0, 1 / 0.75])
    assert out[0, :50].mean().item() == pytest.approx(1, abs=0.02)
    assert out[1, 40:].abs().max() == 0
    assert not torch.equal(out[0, :40], out[1, :40])


def test_the_normal_init_is_the_published_one() -> None:
    layout = Layout((("first", 40, 300),))
    a, b = layout.split(fresh(layout, 8, 0, 0, init="normal"))["first"]
    assert a.std() == pytest.approx(0.01, rel=0.05)
    assert abs(a.mean()) < 1e-3
    assert np.abs(a).max() > 0.025  # a uniform draw of this spread would end at 0.0174
    assert not b.any()


# --- memory ----------------------------------------------------------------------------------------------------------


def test_features_per_step_give_the_bits_of_features_made_up_front(
    llava: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cohort = jobs(load(llava), (6, 5))
    per_step = train(load(llava), cohort, SETTINGS, SCALING)
    monkeypatch.setattr(features_module.Pictures, "warm", lambda *_: None)
    monkeypatch.setattr(training, "tokens", up_front)
    before = train(load(llava), cohort, SETTINGS, SCALING)
    assert all(np.array_equal(left.flat, right.flat) for left, right in zip(per_step, before, strict=True))


def up_front(base: BaseModel, share: list[Example], settings: TrainSection) -> list[Any]:
    return base.prepare(share, settings.max_length, settings.overlong)


def test_a_share_that_the_cache_cannot_hold_is_trained_all_the_same(
    llava: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = Job(examples(6), filled(load(llava), 0), seed=0)
    roomy = train(load(llava), [job], SETTINGS, SCALING)[0]
    monkeypatch.setattr(features_module, "CACHE_BYTES", 2 * 4 * 48 * 4)  # two pictures: 4 tokens of 48 floats each
    base = load(llava)
    tight = train(base, [job], SETTINGS, SCALING)[0]
    assert len(base.pictures._cache) == 2
    assert np.allclose(roomy.flat, tight.flat, atol=1e-6)


def test_a_prepared_share_holds_no_features(base: BaseModel) -> None:
    share = examples(3)
    rows = base.tokenise(share, 512)
    assert all(row.features is None and row.image is not None for row in rows)
    assert [replace(row, features=None) for row in base.prepare(share, 512)] == rows
