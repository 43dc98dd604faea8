"""Makes the tiny base that ships in `client/tiny/`, an ordinary LLaVA folder, by pre-training on other tasks.

    python -m fedstrata.client.pretrain --out client/tiny

takes about 80 ms per step (2,500 of the tower, 5,000 of the language model; torch 2.13, fp32, one core), so ten minutes
on an idle machine; 13 and 17 were measured beside other work. fcit-mini's eight tasks take no part in it, nor in the
choice of the text encoder's tau and epsilon.
"""

import argparse
import math
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fedstrata.client.architecture import EOS, PAD, PATCH, make_model, make_processor, make_tokenizer
from fedstrata.client.encoder import save_encoder, token_mean
from fedstrata.client.tower import pixels, report, train_tower
from fedstrata.core.seeds import derive, generator
from fedstrata.scenarios import drawing
from fedstrata.scenarios.pretraining import pretraining_examples, pretraining_prompts
from fedstrata.scenarios.stream import Example


def encode(tokenizer: Any, example: Example) -> tuple[list[int], int]:
    """(token ids with the image tokens, number of prompt tokens) of one example."""
    image = "<image>" * (drawing.SIZE // PATCH) ** 2 + "\n" if example.image is not None else ""
    prompt = tokenizer(f"USER: {image}{example.question} ASSISTANT:")["input_ids"]
    answer = tokenizer(f" {example.answer}", add_special_tokens=False)["input_ids"]
    return [*prompt, *answer, EOS], len(prompt)


def collate(tokenizer: Any, processor: Any, examples: Sequence[Example]) -> dict[str, Tensor]:
    """Right-padded ids and labels [B, T] (labels on answers only) and pixels [images, 3, 32, 32]."""
    coded = [encode(tokenizer, example) for example in examples]
    shape = len(coded), max(len(ids) for ids, _ in coded)
    ids, labels = torch.full(shape, PAD), torch.full(shape, -100)
    for row, (tokens, start) in enumerate(coded):
        ids[row, : len(tokens)] = torch.tensor(tokens)
        labels[row, start : len(tokens)] = ids[row, start : len(tokens)]
    attend = (ids != PAD).long()
    return {"input_ids": ids, "labels": labels, "attention_mask": attend, "pixel_values": pixels(processor, examples)}


def batches(seed: int, size: int, chunk: int = 64) -> Iterator[list[Example]]:
    """Fresh examples for ever, `size` at a time; answers of over eight words come in batches of their own."""
    rng, number = generator(seed, "batches"), 0
    while True:
        examples = pretraining_examples(derive(seed, "chunk", number), chunk * size)
        number += 1
        examples.sort(key=lambda example: len(example.answer.split()) > 8)
        for start in rng.permutation(chunk):
            yield examples[start * size : (start + 1) * size]


def answer_loss(model: Any, batch: dict[str, Tensor]) -> Tensor:
    """Mean cross-entropy over answer tokens; logits are computed for these alone, they are a fifth of all."""
    labels = batch["labels"][:, 1:]
    inputs = {name: value for name, value in batch.items() if name != "labels"}
    hidden = model.model(**inputs).last_hidden_state[:, :-1]
    return F.cross_entropy(model.lm_head(hidden[labels >= 0]), labels[labels >= 0])


def train(model: Any, processor: Any, steps: int, seed: int) -> None:
    """AdamW with warm-up and a cosine to a twentieth of the peak rate; prints the loss now and then.

    Words that the pre-training never uses keep their random embeddings: pushed down as wrong answers, all of them would
    drift the same way, and the text encoder could no longer tell the stream's prompts apart.
    """
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, betas=(0.9, 0.98), weight_decay=0.0, fused=True)
    rates = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min(1.0, (step + 1) / 100) * (0.05 + 0.475 * (1 + math.cos(math.pi * step / steps)))
    )
    used = torch.zeros(len(processor.tokenizer), 1)
    for example in pretraining_examples(derive(seed, "used words"), 4000):
        used[encode(processor.tokenizer, example)[0]] = 1
    model.get_input_embeddings().weight.register_hook(lambda gradient: gradient * used)
    stream, losses, started = batches(seed, 16), list[float](), time.perf_counter()
    model.train()
    for step in range(steps):
        batch = collate(processor.tokenizer, processor, next(stream))
        loss = answer_loss(model, batch)
        loss.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        rates.step()
        losses.append(loss.item())
        if (step + 1) % 200 == 0:
            report("language", step + 1, losses, started)
    model.eval()


def fit_encoder(model: Any, tokenizer: Any, folder: Path, normalize: bool = True) -> None:
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
    clients = F.normalize(encoded.reshape(len(phi), -1, 5, phi.shape[-1]).mean(2), dim=-1)
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
    train_tower(model, processor, options.steps // 2, options.seed)
    train(model, processor, options.steps, options.seed)
    model.save_pretrained(options.out)
    processor.save_pretrained(options.out)
    fit_encoder(model, processor.tokenizer, options.out)


if __name__ == "__main__":
    main()
