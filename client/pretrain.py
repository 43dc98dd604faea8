"""Makes the tiny base that ships in `client/tiny/`: an ordinary LLaVA folder, pre-trained on `scenarios/pretraining.py`.

    python -m fedstrata.client.pretrain --out client/tiny

takes about MINUTES minutes on one core (torch 2.13, fp32). fcit-mini's eight tasks take no part in it, nor in the choice of
the text encoder's tau and epsilon.
"""

import argparse
import math
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from torch import Tensor
from transformers import (
    CLIPVisionConfig,
    GenerationConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedTokenizerFast,
)
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from fedstrata.client.encoder import save_encoder, token_mean
from fedstrata.core.seeds import derive, generator
from fedstrata.scenarios import drawing
from fedstrata.scenarios.pretraining import pretraining_examples, pretraining_prompts
from fedstrata.scenarios.stream import Example
from fedstrata.scenarios.vocabulary import WORDS

SPECIAL = ("<pad>", "<s>", "</s>", "<image>")
PAD, BOS, EOS, IMAGE = range(4)
PATCH, VISION, LANGUAGE = 8, (128, 4, 3), (96, 4, 4)  # hidden size, heads, layers
TEMPLATE = (
    "{% for m in messages %}{% if m['role'] == 'user' %}{{ 'USER: ' }}{% if m['content'] is string %}"
    "{{ m['content'] }}{% else %}{% for p in m['content'] if p['type'] == 'image' %}{{ '<image>\\n' }}{% endfor %}"
    "{% for p in m['content'] if p['type'] == 'text' %}{{ p['text'] }}{% endfor %}{% endif %}"
    "{% else %}{{ ' ASSISTANT: ' }}{% if m['content'] is string %}{{ m['content'] }}{% else %}"
    "{% for p in m['content'] if p['type'] == 'text' %}{{ p['text'] }}{% endfor %}{% endif %}{{ '</s>' }}{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}{{ ' ASSISTANT:' }}{% endif %}"
)


def make_tokenizer() -> PreTrainedTokenizerFast:
    """Byte-level BPE in which every word of `WORDS` and of the pre-training prompts is one token."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    prompts = [question for questions in pretraining_prompts(0, 200).values() for question in questions]
    text = [f" {word} {word}" for word in WORDS] + prompts + [f" {prompt}" for prompt in prompts]
    text += [f" {example.answer}" for example in pretraining_examples(0, 2000)] + ["USER:  ASSISTANT:"] * 9
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=4000, min_frequency=2, special_tokens=list(SPECIAL), initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(text, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", BOS)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<s>", eos_token="</s>", padding_side="left",
        extra_special_tokens={"image_token": "<image>"}, model_max_length=256,
    )


def make_processor(tokenizer: PreTrainedTokenizerFast) -> LlavaProcessor:
    """Pictures [32, 32] to 16 image tokens, questions through the vicuna-like chat template."""
    side = {"height": drawing.SIZE, "width": drawing.SIZE}
    images = CLIPImageProcessorPil(size={"shortest_edge": drawing.SIZE}, crop_size=side)
    return LlavaProcessor(
        image_processor=images, tokenizer=tokenizer, patch_size=PATCH, vision_feature_select_strategy="default",
        num_additional_image_tokens=1, chat_template=TEMPLATE, image_token="<image>",
    )


def make_model(vocabulary: int, seed: int) -> LlavaForConditionalGeneration:
    """A random LLaVA. At the usual initializer range of 0.02 one this small does not learn, at 0.1 it does."""
    torch.manual_seed(derive(seed, "base weights"))
    hidden, heads, layers = VISION
    vision = CLIPVisionConfig(
        hidden_size=hidden, intermediate_size=2 * hidden, num_hidden_layers=layers, num_attention_heads=heads,
        image_size=drawing.SIZE, patch_size=PATCH, projection_dim=hidden, initializer_range=0.1,
    )  # fmt: skip
    hidden, heads, layers = LANGUAGE
    language = LlamaConfig(
        vocab_size=vocabulary, hidden_size=hidden, intermediate_size=2 * hidden, num_hidden_layers=layers,
        num_attention_heads=heads, max_position_embeddings=256, tie_word_embeddings=True, initializer_range=0.1,
        pad_token_id=PAD, bos_token_id=BOS, eos_token_id=EOS,
    )  # fmt: skip
    config = LlavaConfig(
        vision_config=vision, text_config=language, image_token_index=IMAGE, vision_feature_layer=-1,
        vision_feature_select_strategy="default", image_seq_length=(drawing.SIZE // PATCH) ** 2,
        tie_word_embeddings=True, attn_implementation="eager", pad_token_id=PAD,
    )  # fmt: skip
    model = LlavaForConditionalGeneration(config)
    model.generation_config = GenerationConfig(
        do_sample=False, max_new_tokens=24, pad_token_id=PAD, bos_token_id=BOS, eos_token_id=EOS
    )
    return model


def encode(tokenizer: Any, example: Example) -> tuple[list[int], int]:
    """(token ids with the image tokens, number of prompt tokens) of one example."""
    image = "<image>" * (drawing.SIZE // PATCH) ** 2 + "\n" if example.image is not None else ""
    prompt = tokenizer(f"USER: {image}{example.question} ASSISTANT:")["input_ids"]
    answer = tokenizer(f" {example.answer}", add_special_tokens=False)["input_ids"]
    return [*prompt, *answer, EOS], len(prompt)


def collate(tokenizer: Any, processor: LlavaProcessor, examples: Sequence[Example]) -> dict[str, Tensor]:
    """Right-padded ids and labels [B, T] (labels on answers only) and pixels [images, 3, 32, 32]."""
    coded = [encode(tokenizer, example) for example in examples]
    shape = len(coded), max(len(ids) for ids, _ in coded)
    ids, labels = torch.full(shape, PAD), torch.full(shape, -100)
    for row, (tokens, start) in enumerate(coded):
        ids[row, : len(tokens)] = torch.tensor(tokens)
        labels[row, start : len(tokens)] = ids[row, start : len(tokens)]
    pictures = [np.asarray(example.image.open()) for example in examples if example.image is not None]
    pixels = torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2).float() / 255
    mean, std = (torch.tensor(x)[:, None, None] for x in (processor.image_processor.image_mean, processor.image_processor.image_std))
    return {"input_ids": ids, "labels": labels, "attention_mask": (ids != PAD).long(), "pixel_values": (pixels - mean) / std}


def batches(seed: int, size: int, chunk: int = 64) -> Iterator[list[Example]]:
    """Fresh examples for ever, `size` at a time; short and long answers (over eight words) come in different batches."""
    rng, number = generator(seed, "batches"), 0
    while True:
        examples = pretraining_examples(derive(seed, "chunk", number), chunk * size)
        number += 1
        examples.sort(key=lambda example: len(example.answer.split()) > 8)
        for start in rng.permutation(chunk):
            yield examples[start * size : (start + 1) * size]


def answer_loss(model: LlavaForConditionalGeneration, batch: dict[str, Tensor]) -> Tensor:
    """Mean cross-entropy over answer tokens; logits are computed for these alone, they are a fifth of all."""
    labels = batch["labels"][:, 1:]
    inputs = {name: value for name, value in batch.items() if name != "labels"}
    hidden = model.model(**inputs).last_hidden_state[:, :-1]
    return F.cross_entropy(model.lm_head(hidden[labels >= 0]), labels[labels >= 0])


def train(model: LlavaForConditionalGeneration, processor: LlavaProcessor, steps: int, seed: int) -> None:
    """AdamW with warm-up and a cosine to a twentieth of the peak rate; prints the loss now and then."""
    decay = [p for p in model.parameters() if p.ndim > 1]
    rest = [p for p in model.parameters() if p.ndim <= 1]
    optimizer = torch.optim.AdamW([{"params": decay, "weight_decay": 0.01}, {"params": rest, "weight_decay": 0.0}], lr=2e-3, betas=(0.9, 0.98), fused=True)
    rates = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min(1.0, (step + 1) / 100) * (0.05 + 0.475 * (1 + math.cos(math.pi * step / steps)))
    )
    stream, losses, started = batches(seed, 32), list[float](), time.perf_counter()
    model.train()
    for step in range(steps):
        batch = collate(processor.tokenizer, processor, next(stream))
        loss = answer_loss(model, batch)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        rates.step()
        losses.append(loss.item())
        if (step + 1) % 200 == 0:
            print(f"step {step + 1}: loss {np.mean(losses[-200:]):.3f}, {time.perf_counter() - started:.0f} s", flush=True)
    model.eval()


def fit_encoder(model: LlavaForConditionalGeneration, tokenizer: Any, folder: Path, normalize: bool = True) -> None:
    """Chooses the text encoder's centre, tau and epsilon on pre-training prompts and writes them into `folder`.

    tau lies halfway between the cosines of 5-prompt clients of one task and of different tasks; epsilon is the warmest
    temperature that gives the right task weight 0.95 or more for 99 % of the prompts.
    """
    embedding = model.get_input_embeddings().weight.detach()
    phi = torch.stack(
        [token_mean(tokenizer, embedding, asked, normalize) for asked in pretraining_prompts(1, 200).values()]
    )
    center = phi.mean((0, 1))
    encoded = phi - center
    clients = F.normalize(encoded.unflatten(1, (-1, 5)).mean(2), dim=-1)
    cosines = torch.einsum("acd,bed->abce", clients, clients)
    own = torch.eye(len(phi), dtype=torch.bool)
    tau = (float(cosines[own].quantile(0.01)) + float(cosines[~own].quantile(0.99))) / 2
    tokens = F.normalize(encoded.mean(1), dim=-1)
    scores = F.normalize(encoded, dim=-1) @ tokens.T
    truth = torch.arange(len(phi))[:, None].expand(scores.shape[:2])
    for epsilon in (0.2, 0.15, 0.1, 0.08, 0.06, 0.05, 0.04, 0.03, 0.02):
        weight = (scores / epsilon).softmax(-1).gather(-1, truth[..., None])
        if float((weight >= 0.95).float().mean()) >= 0.99:
            break
    print(f"within {cosines[own].min():.2f}, between {cosines[~own].max():.2f}, tau {tau:.2f}, epsilon {epsilon}")
    save_encoder(folder, center, round(tau, 2), epsilon, normalize)


def main() -> None:
    """Makes the folder; see the module's first lines for the command."""
    parser = argparse.ArgumentParser(description="Pre-train the tiny base and write it as a from_pretrained folder.")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "tiny")
    parser.add_argument("--steps", type=int, default=5000)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    torch.set_num_threads(1)
    options.out.mkdir(parents=True, exist_ok=True)
    processor = make_processor(make_tokenizer())
    model = make_model(len(processor.tokenizer), options.seed)
    print(f"{model.num_parameters():,} parameters, {len(processor.tokenizer)} tokens")
    train(model, processor, options.steps, options.seed)
    model.save_pretrained(options.out)
    processor.save_pretrained(options.out)
    fit_encoder(model, processor.tokenizer, options.out)


if __name__ == "__main__":
    main()
