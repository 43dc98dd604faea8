"""What leaves a client of its instructions: the plain token, or one that is clipped and noised."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from flwr.app import Context, RecordDict
from transformers import CLIPTextConfig, CLIPTextModel

from fedstrata.client.encoder import ClipTextEncoder
from fedstrata.client.identity import identify
from fedstrata.client.model import BaseModel
from fedstrata.client.release import NOISE, noise_key, release
from fedstrata.client.world import base_of
from fedstrata.core.config import FederationSection, RunConfig
from fedstrata.core.identity import cosine
from fedstrata.core.privacy import mean_sensitivity
from fedstrata.scenarios.stream import Example
from fedstrata.strategies.disco import DiscoConfig

TEXTS = [f"What is written in box {number} of the red {thing}?" for number in range(10) for thing in ("chart", "sign")]
EXAMPLES = [Example(str(number), text, "") for number, text in enumerate(TEXTS)]


@pytest.fixture(scope="module")
def base() -> BaseModel:
    torch.set_num_threads(1)
    return base_of(RunConfig(strategy=DiscoConfig()))


def config(**options: float) -> RunConfig:
    return RunConfig(strategy=DiscoConfig(**options))  # type: ignore[arg-type]


def test_without_noise_and_bound_the_token_is_the_plain_one_bit_for_bit(base: BaseModel) -> None:
    plain, told = identify(base, EXAMPLES), release(base, EXAMPLES, config(), b"0", "data")
    assert told.count == plain.count == 20
    assert told.value.tobytes() == plain.value.tobytes()


def test_the_encoders_own_bound_hardly_clips(base: BaseModel) -> None:
    norms = base.encoder.encode(TEXTS).norm(dim=1)
    assert norms.median() < base.encoder.norm * 1.05
    bound = release(base, EXAMPLES, config(token_clip=base.encoder.norm), b"0", "data")
    assert cosine(bound.value, identify(base, EXAMPLES).value) > 0.999


def test_a_bound_alone_adds_no_noise(base: BaseModel) -> None:
    features = base.encoder.encode(TEXTS).double()
    expected = (features * (0.5 / features.norm(dim=1, keepdim=True)).clamp(max=1)).mean(0)
    told = release(base, EXAMPLES, config(token_clip=0.5), b"0", "data")
    assert told.value == pytest.approx(expected.numpy(), abs=1e-7)


def test_the_noise_is_as_wide_as_was_asked_for(base: BaseModel) -> None:
    options = config(token_clip=0.5, token_noise=2.0)
    middle = release(base, EXAMPLES, config(token_clip=0.5), b"0", "data").value
    drawn = np.stack([release(base, EXAMPLES, options, str(k).encode(), "data").value - middle for k in range(200)])
    wanted = 2.0 * mean_sensitivity(0.5, len(EXAMPLES))
    assert drawn.std() == pytest.approx(wanted, rel=5 / np.sqrt(2 * drawn.size))
    assert abs(drawn.mean()) < 5 * wanted / np.sqrt(drawn.size)


def test_asking_again_tells_the_same_and_other_data_draw_other_noise(base: BaseModel) -> None:
    options = config(token_noise=1.0)
    first = release(base, EXAMPLES, options, b"0", "3:abc")
    assert release(base, EXAMPLES, options, b"0", "3:abc").value.tobytes() == first.value.tobytes()
    middle = release(base, EXAMPLES, config(token_clip=base.encoder.norm), b"0", "3:abc").value
    others = [
        release(base, EXAMPLES, options, b"1", "3:abc").value - middle,
        release(base, EXAMPLES, options, b"0", "3:abd").value - middle,
        # noise of another strength may not be the same numbers made longer: two tokens would give the mean away
        (release(base, EXAMPLES, config(token_noise=2.0), b"0", "3:abc").value - middle) / 2,
    ]
    for other in others:
        assert abs(cosine(first.value - middle, other)) < 0.5


def test_a_simulated_client_draws_from_the_seed_and_a_deployed_one_from_a_secret_that_it_keeps() -> None:
    def context() -> Context:
        return Context(1, 2, {}, RecordDict(), {})

    here, there = context(), context()
    simulated = RunConfig(seed=7, federation=FederationSection(grid="inprocess"))
    assert noise_key(simulated, here) == noise_key(simulated, there) == b"7"
    assert NOISE not in here.state
    deployed = replace(simulated, federation=replace(simulated.federation, grid="flower"))
    first = noise_key(deployed, here)
    assert len(first) == 32
    assert noise_key(deployed, here) == first  # asked again it tells the same token, which releases nothing
    assert noise_key(deployed, there) != first


def test_a_clip_towers_bound_is_about_the_norm_of_its_features(tmp_path: Path) -> None:
    torch.manual_seed(0)
    small = CLIPTextConfig(
        vocab_size=99, hidden_size=64, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2,
        bos_token_id=0, eos_token_id=1, pad_token_id=1,
    )  # fmt: skip
    model = CLIPTextModel(small)
    tower = getattr(model, "text_model", model)
    torch.nn.init.uniform_(tower.final_layer_norm.weight, 0.5, 2.0)
    torch.nn.init.uniform_(tower.final_layer_norm.bias, -0.2, 0.2)
    model.save_pretrained(tmp_path)
    encoder = ClipTextEncoder.__new__(ClipTextEncoder)  # without a tokenizer, which a bound has no use for
    encoder._model = CLIPTextModel.from_pretrained(tmp_path)
    with torch.no_grad():
        features = encoder._model(input_ids=torch.randint(2, 99, (50, 12))).pooler_output
    assert float(features.norm(dim=1).mean()) == pytest.approx(encoder.norm, rel=0.1)
