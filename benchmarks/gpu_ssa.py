"""Answering with 32 mixtures of 8 subspaces in one batch at LLaVA-1.5-7B's shape on one GPU."""

from dataclasses import replace
from functools import partial

import torch

from fedstrata.benchmarks.gpu_parts import FFN, LLAVA_7B, TOY, Shape, card, device_of, random_base
from fedstrata.benchmarks.measure import Result, Work, paired, ratios, raw
from fedstrata.benchmarks.ssa import BASE, OURS, PUBLISHED, Sides, Sizes

FEW = 2  # prompts of the published path, which is measured per prompt


def bench(quick: bool = False) -> Result:
    """Wall seconds over the bare base, and the published path's over ours, per prompt."""
    device = device_of("gpu-ssa", quick)
    shape = TOY if quick else LLAVA_7B
    sizes = Sizes(shape.hidden, shape.layers, shape.vocabulary, prompts=32, length=650, new=32)
    return compare(shape, replace(sizes, prompts=4, length=12, new=4) if quick else sizes, device, 2 if quick else 5)


def compare(shape: Shape, sizes: Sizes, device: torch.device, repeats: int) -> Result:
    """One batch of all prompts through an `Answerer`, as an evaluate message is answered."""
    base = random_base(shape, device, FFN, sizes.new)
    sides = Sides(base, sizes)
    theirs = partial(sides.published.answer, sides.rows[:FEW], torch.from_numpy(sides.alphas[:FEW]))
    ways: dict[str, Work] = {
        OURS: partial(sides.ours, sides.mixed),
        BASE: partial(sides.ours, sides.bare),
        PUBLISHED: theirs,
    }
    rounds = paired(ways, repeats)
    each = f"{PUBLISHED}, per prompt"
    return Result(
        name="gpu-ssa",
        what=sizes.words().replace("7 Linears", "3 Linears"),
        clock="wall",
        ratios={each: ratios(rounds, OURS, "wall")[PUBLISHED] * sizes.prompts / FEW},
        targets={f"{OURS} / {BASE}": 1.1},
        limits={f"{OURS} / {BASE}": ratios(rounds, BASE, "wall")[OURS]},
        pairs=raw(rounds),
        equal=alike(sides),
        notes=(card(device), f"the published path answered {FEW} of the prompts"),
    )


def alike(sides: Sides) -> dict[str, str]:
    """How many of the first answers' words are the published path's: rounding in bfloat16 can turn a greedy choice."""
    theirs = sides.published.answer(sides.rows[:FEW], torch.from_numpy(sides.alphas[:FEW]))
    pairs = [(a.split(), b.split()) for a, b in zip(sides.ours(sides.mixed), theirs, strict=False)]
    agreed = sum(x == y for a, b in pairs for x, y in zip(a, b, strict=False))
    if not agreed:
        raise AssertionError("gpu-ssa: ours and the published path share not one word")
    return {"tokens": f"{agreed} of {sum(len(b) for _, b in pairs)} as the published path's"}
