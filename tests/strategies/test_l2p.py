"""L2P: who gets which prompts, what they learn, and that a batch with prompts in front is read as it should be."""

from typing import Any

import numpy as np
import pytest
import torch

from fedstrata.client.answers import answer_logits
from fedstrata.client.banks import bank_of
from fedstrata.client.batching import collate
from fedstrata.client.generation import greedy
from fedstrata.client.model import BaseModel
from fedstrata.client.prefix import Prompted, before
from fedstrata.client.training import Job, train
from fedstrata.core.adapters import Flat, Layout, fresh
from fedstrata.core.config import LoraSection, ModelSection, TrainSection
from fedstrata.core.errors import BadInput
from fedstrata.core.records import Knowledge
from fedstrata.scenarios.stream import Example, Pixels
from fedstrata.strategies.base import Inputs
from fedstrata.strategies.l2p import L2P, L2PConfig, Pulled
from fedstrata.strategies.prompting import Nearest, apart, chosen, nearest, similar

OPTIONS = L2PConfig(prompts=4, length=3, top=2)


@pytest.fixture(scope="module")
def base() -> BaseModel:
    torch.set_num_threads(1)
    model = BaseModel(ModelSection(), LoraSection())
    model.model.double()
    model.train_as(OPTIONS)
    return model


def examples(count: int, seed: int = 0) -> list[Example]:
    """Every second one has a picture."""
    draw = np.random.default_rng(seed)
    words = ["what colour is this", "how many bars are there", "which letter stands here"]
    pictures = [Pixels(draw.integers(0, 256, (32, 32, 3), dtype=np.uint8)) if i % 2 else None for i in range(count)]
    return [Example(str(i), f"{words[i % 3]} {i}?", ("four", "a red one")[i % 2], p) for i, p in enumerate(pictures)]


def test_the_prompts_with_the_nearest_keys_are_chosen_and_of_equals_the_first() -> None:
    """Keys at 0°, 90°, 180° and once more 0°."""
    keys = np.array([[1, 0], [0, 2], [-1, 0], [3, 0]], dtype=np.float32)
    queries = np.array([[1, 0.1], [-0.2, 1], [1, 0], [0, 0]], dtype=np.float32)
    router = Nearest(keys, 2)
    weights = router.weights(Inputs(queries, [0] * 4, "abcd"))
    assert weights.tolist() == [[1, 0, 0, 0.5], [0, 1, 0.5, 0], [1, 0, 0, 0.5], [1, 0.5, 0, 0]]
    cosine = similar(torch.from_numpy(queries), torch.from_numpy(keys).expand(4, -1, -1))
    assert nearest(cosine, 2).tolist() == [[0, 3], [1, 2], [0, 3], [0, 1]]
    assert [np.nonzero(row)[0].tolist() for row in weights] == nearest(cosine, 2).tolist()
    assert (Nearest(keys, 9).weights(Inputs(queries, [0] * 4, "abcd")) > 0).all()


def test_prompts_stand_in_the_order_of_the_pool() -> None:
    pool = torch.arange(2 * 3 * 2).view(2, 3, 2, 1)
    assert chosen(pool, torch.tensor([[0, 2], [1, 2]]))[:, :, 0].tolist() == [[0, 1, 4, 5], [8, 9, 10, 11]]


def test_its_layout_counts_prompts_as_ranks_and_survives_the_wire(base: BaseModel) -> None:
    layout, hidden = base.layout, base.model.config.get_text_config().hidden_size
    one = 3 * hidden + base.encoder.dim
    assert [layout.size(count) for count in (1, 4)] == [one, 4 * one]
    assert Layout.from_json(layout.to_json()) == layout
    flat = fresh(layout, 4, 0)
    assert layout.rank(flat) == 4
    assert np.abs(flat).max() <= 1
    assert len(set(flat.tolist())) > 0.9 * flat.size
    parts = apart(layout, flat)
    views = [layout.views(part) for part in parts]
    assert np.array_equal(np.concatenate([view["prompts"] for view in views]), layout.views(flat)["prompts"])
    assert np.array_equal(np.concatenate([view["keys"] for view in views]), layout.views(flat)["keys"])


def test_answers_behind_prompts_are_read_at_their_own_places(base: BaseModel) -> None:
    """Every row alone, its prompts written into the sequence by hand, against a padded batch of two clients."""
    rows = base.prepare(examples(4), 512)
    batch = collate(base, [rows[:1], rows[1:]])
    draw = torch.Generator().manual_seed(0)
    front = torch.randn(6, 5, batch.embeds.shape[2], generator=draw, dtype=torch.float64)
    together = answer_logits(base, before(batch, front))
    assert together.shape[0] == sum(sum(row.supervised) for row in rows)
    start = 0
    for row, place in zip(rows, (0, 3, 4, 5), strict=True):
        alone = base.embed([row.prompt + row.answer], [row.features], left=False)
        embeds = torch.cat([front[place : place + 1], alone.embeds], 1)
        mask = torch.ones(embeds.shape[:2], dtype=torch.int64)
        with torch.no_grad():
            hidden = base.backbone(inputs_embeds=embeds, attention_mask=mask).last_hidden_state[0]
            first = 5 + len(row.prompt) - 1
            expected = base.head(hidden[first : first + len(row.answer)])
        assert torch.allclose(together[start : start + len(row.answer)], expected, atol=1e-5)
        start += len(row.answer)


def job(base: BaseModel, client: int, count: int) -> Job:
    return Job(examples(count, client), fresh(base.layout, OPTIONS.prompts, client), client)


SETTINGS = TrainSection(lr=1e-2, batch_size=3, local_epochs=1, warmup_steps=1)


class Watched(Pulled):
    """Keeps which prompts were chosen and what gradient each prompt and key got."""

    def __init__(self, options: L2PConfig) -> None:
        super().__init__(options)
        self.used: set[int] = set()
        self.moved: dict[str, torch.Tensor] = {}
        self.lengths: set[int] = set()

    def batch(self, ctx: Any, batch: Any) -> Any:
        longer = super().batch(ctx, batch)
        self.used = set(self.picks.unique().tolist())
        self.lengths.add(longer.mask.shape[1] - batch.mask.shape[1])
        return longer

    def on_gradients(self, ctx: Any, gradients: Any) -> None:
        self.moved = {name: g[0].flatten(1).abs().amax(1) for name, g in gradients.items()}


def test_prompts_that_nobody_chose_get_no_gradient_and_the_others_do(base: BaseModel) -> None:
    half = Watched(OPTIONS)
    train(base, [job(base, 0, 1)], SETTINGS, 1.0, half, dtype=torch.float64)
    assert half.lengths == {2 * 3}
    assert len(half.used) == 2
    for gradient in half.moved.values():
        assert {place for place, g in enumerate(gradient.tolist()) if g > 0} == half.used


def test_the_pull_draws_chosen_keys_to_their_queries(base: BaseModel) -> None:
    one = job(base, 0, 1)
    (done,) = train(base, [one], TrainSection(lr=1e-2, local_epochs=20), 1.0, Pulled(OPTIONS), dtype=torch.float64)
    query = base.encoder.encode([one.examples[0].question])
    near = [similar(query, torch.from_numpy(base.layout.views(f)["keys"])[None])[0] for f in (one.flat, done.flat)]
    picks = nearest(near[0][None], 2)[0]
    assert (near[1][picks] > near[0][picks] + 0.01).all()


def test_without_the_pull_keys_stay(base: BaseModel) -> None:
    one, still = job(base, 0, 3), Pulled(L2PConfig(prompts=4, length=3, top=2, strength=0.0))
    (done,) = train(base, [one], SETTINGS, 1.0, still)
    before_, after = (base.layout.views(flat) for flat in (one.flat, done.flat))
    assert np.array_equal(before_["keys"], after["keys"])
    assert not np.array_equal(before_["prompts"], after["prompts"])


def test_a_fused_cohort_gives_every_ragged_client_what_it_gets_alone_whatever_the_micro_batch(base: BaseModel) -> None:
    jobs = [job(base, client, 2 + 3 * client) for client in range(2)]
    together = train(base, jobs, SETTINGS, 1.0, Pulled(OPTIONS), dtype=torch.float64)
    small = TrainSection(**{**vars(SETTINGS), "micro_batch": 2})
    pieces = train(base, jobs, small, 1.0, Pulled(OPTIONS), dtype=torch.float64)
    for one, fused, cut in zip(jobs, together, pieces, strict=True):
        (alone,) = train(base, [one], SETTINGS, 1.0, Pulled(OPTIONS), dtype=torch.float64)
        update = np.linalg.norm(alone.flat - one.flat)
        assert update > 0.1
        assert np.linalg.norm(fused.flat - alone.flat) / update < 1e-3
        assert np.linalg.norm(fused.flat - cut.flat) / update < 1e-3


def test_the_bank_answers_with_each_rows_own_prompts(base: BaseModel) -> None:
    flat: Flat = fresh(base.layout, OPTIONS.prompts, 5)
    bank = bank_of(base, Knowledge(apart(base.layout, flat)), 1.0)
    assert isinstance(bank, Prompted)
    rows, embed = base.prepare(examples(3), 512), base.embed
    plain = greedy(base, rows)
    weights = torch.tensor([[1, 0.5, 0, 0], [0, 1, 0, 0.5], [1, 0, 0.5, 0]])
    with bank.on(base):
        bank.activate(weights)
        together = greedy(base, rows)
        for place, row in enumerate(rows):
            bank.activate(weights[place : place + 1])
            alone = greedy(base, [row])[0]
            assert torch.equal(together[place, : len(alone)], alone[: together.shape[1]])
        with pytest.raises(ValueError, match="equally many prompts"):
            bank.activate(torch.tensor([[1.0, 0, 0, 0], [1, 1, 0, 0]]))
    assert base.embed == embed
    assert torch.equal(greedy(base, rows), plain)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"merge": "product"},
            "strategy.merge: must be mean | median | trimmed | multikrum | geomedian, got 'product'",
        ),
        ({"prompts": 0}, "strategy.prompts: must be at least 1, got 0"),
        ({"top": 11}, "strategy.top: must be between 1 and strategy.prompts (10), got 11"),
        ({"strength": -1.0}, "strategy.strength: must be a finite number of at least 0, got -1.0"),
    ],
)
def test_options_that_cannot_be_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(BadInput) as caught:
        L2PConfig(**options)
    assert str(caught.value) == message


def test_prompts_with_another_kind_or_a_trained_projector_are_refused() -> None:
    with pytest.raises(BadInput, match=r"lora\.kind: must be lora with strategy\.name=l2p, .* got 'dora'"):
        L2PConfig().trains(Layout((("layer", 1, 2),), kind="dora"), 4, lambda: 4)
    with pytest.raises(BadInput, match=r"strategy\.projector: must be frozen with strategy\.name=l2p"):
        L2PConfig().trains(Layout((("layer", 1, 2),), (("projector.weight", (2,)),)), 4, lambda: 4)
    assert not L2P.uses_task_identity
