"""Text encoders: the one that ships with the base, and a CLIP text tower."""

import json
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import (
    AutoTokenizer,
    CLIPTextConfig,
    CLIPTextModel,
    LlavaForConditionalGeneration,
    PreTrainedTokenizerFast,
)

import fedstrata.client
from fedstrata.client.encoder import ClipTextEncoder, TokenMeanEncoder, load_encoder, save_encoder, token_mean
from fedstrata.core.errors import BadInput
from fedstrata.scenarios.mini import MINI_TASKS, mini_task
from fedstrata.scenarios.pretraining import pretraining_prompts

TINY = Path(fedstrata.client.__file__).parent / "tiny"
CLIENT = 5
"""Fewest samples of a client whose token must be recognised."""


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(scope="module")
def encoder() -> TokenMeanEncoder:
    tokenizer = AutoTokenizer.from_pretrained(TINY)
    embedding = LlavaForConditionalGeneration.from_pretrained(TINY).get_input_embeddings().weight
    loaded = load_encoder("base", TINY, tokenizer, embedding)
    assert isinstance(loaded, TokenMeanEncoder)
    return loaded


@pytest.fixture(scope="module")
def encoded(encoder: TokenMeanEncoder) -> torch.Tensor:
    """E of 400 prompts of each task: [8, 400, D]."""
    asked = ([example.question for example in mini_task(name, 5, 400, 0, 0).train] for name in MINI_TASKS)
    return torch.stack([encoder.encode(questions) for questions in asked])


@pytest.fixture(scope="module")
def clip_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random CLIP text tower of 16 dimensions with a word tokenizer."""
    folder = tmp_path_factory.mktemp("clip")
    words = ("<pad>", "<s>", "</s>", "<unk>", "how", "many", "dots")
    core = Tokenizer(models.WordLevel({word: index for index, word in enumerate(words)}, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.Whitespace()
    core.post_processor = processors.TemplateProcessing(single="<s> $A </s>", special_tokens=[("<s>", 1), ("</s>", 2)])
    PreTrainedTokenizerFast(
        tokenizer_object=core, pad_token="<pad>", bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    ).save_pretrained(folder)
    config = CLIPTextConfig(
        vocab_size=7, hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
        max_position_embeddings=77, pad_token_id=0, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    torch.manual_seed(0)
    CLIPTextModel(config).save_pretrained(folder)
    return folder


def test_a_question_is_the_mean_of_its_words_less_the_centre(encoder: TokenMeanEncoder) -> None:
    one, other, both = encoder.encode(["bars", " bars", " bars bars"])
    assert torch.allclose(other, both, atol=1e-6)
    assert not torch.allclose(one, other)


def test_marks_do_not_count(encoder: TokenMeanEncoder) -> None:
    plain, marked = encoder.encode(["How many dots", "How many dots ?!"])
    assert torch.equal(plain, marked)


def test_shapes(encoder: TokenMeanEncoder) -> None:
    features = encoder.encode(["How many dots?", ""])
    assert features.shape == (2, encoder.dim)
    assert features.dtype == torch.float32
    assert encoder.encode([]).shape == (0, encoder.dim)
    assert torch.isfinite(features).all()


def test_the_centre_is_the_mean_over_the_pretraining_prompts(encoder: TokenMeanEncoder) -> None:
    phi = torch.cat([encoder.encode(asked) for asked in pretraining_prompts(1, 200).values()])
    assert torch.allclose(phi.mean(0), torch.zeros(encoder.dim), atol=2e-3)


def test_clients_of_one_task_match_and_of_two_do_not(encoder: TokenMeanEncoder, encoded: torch.Tensor) -> None:
    clients = F.normalize(encoded.reshape(len(MINI_TASKS), -1, CLIENT, encoder.dim).mean(2), dim=-1)
    cosines = torch.einsum("acd,bed->abce", clients, clients)
    own = torch.eye(len(MINI_TASKS), dtype=torch.bool)
    assert float(cosines[own].min()) >= encoder.tau
    assert float(cosines[~own].max()) < encoder.tau


def test_activation_finds_the_right_task(encoder: TokenMeanEncoder, encoded: torch.Tensor) -> None:
    tokens = F.normalize(encoded.mean(1), dim=-1)
    weights = (F.normalize(encoded, dim=-1) @ tokens.T / encoder.epsilon).softmax(-1)
    right = weights.argmax(-1) == torch.arange(len(MINI_TASKS))[:, None]
    assert float(right.float().mean()) >= 0.99
    assert float(weights.diagonal(dim1=0, dim2=2).mean()) >= 0.95


def test_a_base_without_encoder_is_bad_input(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match=r"text_encoder\.json"):
        load_encoder("base", tmp_path, None, torch.zeros(3, 4))


def test_an_unknown_kind_and_a_wrong_width_are_bad_input(tmp_path: Path) -> None:
    save_encoder(tmp_path, torch.zeros(4), 0.5, 0.1, True)
    with pytest.raises(BadInput, match="dim is 4"):
        TokenMeanEncoder(None, torch.zeros(3, 5), tmp_path)
    settings = tmp_path / "text_encoder.json"
    settings.write_text(json.dumps({**json.loads(settings.read_text()), "kind": "other"}))
    with pytest.raises(BadInput, match="kind must be"):
        TokenMeanEncoder(None, torch.zeros(3, 4), tmp_path)


def test_token_mean_without_normalisation_is_the_plain_mean(encoder: TokenMeanEncoder) -> None:
    tokenizer = AutoTokenizer.from_pretrained(TINY)
    embedding = torch.randn(len(tokenizer), 4)
    ids = tokenizer(" red blue", add_special_tokens=False)["input_ids"]
    assert torch.allclose(token_mean(tokenizer, embedding, [" red blue"], False)[0], embedding[ids].mean(0))


def test_clip_gives_its_pooled_feature(clip_folder: Path, tmp_path: Path) -> None:
    encoder = load_encoder(str(clip_folder), tmp_path, None, torch.zeros(1, 1))
    assert isinstance(encoder, ClipTextEncoder)
    assert (encoder.tau, encoder.epsilon, encoder.dim) == (0.9, 0.05, 16)
    model = CLIPTextModel.from_pretrained(clip_folder).eval()
    with torch.no_grad():
        wanted = model(input_ids=torch.tensor([[1, 4, 5, 6, 2]])).pooler_output
    assert torch.allclose(encoder.encode(["how many dots", "how"])[:1], wanted, atol=1e-6)
    assert encoder.encode([]).shape == (0, 16)


def test_clip_cuts_long_questions(clip_folder: Path) -> None:
    encoder = ClipTextEncoder(str(clip_folder))
    long, longer = encoder.encode(["how " * 100, "how " * 200])
    assert torch.allclose(long, longer, atol=1e-6)


def test_a_missing_clip_is_bad_input(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match=r"model\.text_encoder"):
        ClipTextEncoder(str(tmp_path / "nowhere"))
