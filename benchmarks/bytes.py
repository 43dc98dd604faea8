"""`bench bytes`: what one client uploads in one round at LLaVA-1.5-7B's shapes, against FCIT's published code.

The published code sends all eight subspaces, the mixing matrices and the projector, in the 16-bit numbers that it
trains (228 MB in the task setting). Ours sends the one subspace that was trained and the projector. The bytes are those
in a real train reply, which passes the server's gate; the layout is that of the real model, built without weights.
"""

from functools import partial
from statistics import median
from typing import Any

import numpy as np
from flwr.app import Message, RecordDict

from fedstrata.benchmarks.measure import Result, cost
from fedstrata.core import codec, records
from fedstrata.core.adapters import Flat, Layout
from fedstrata.core.identity import Token
from fedstrata.core.records import Binding, TrainReply
from fedstrata.core.shapes import find_layout
from fedstrata.server.flower_private import become_server, set_message_id
from fedstrata.server.gate import Expected, pass_replies, read_train

RANK, SUBSPACES, FEATURE = 8, 8, 768
TARGETS = ("gate_proj", "up_proj", "down_proj")
UPDATE = 1e-4  # size of one number's change: a round of Adam at the published rates
KINDS = ("bfloat16", "int8", "float32")


def bench(quick: bool = False) -> Result:
    """Bytes per client-round of every `federation.upload`, and what each loses of the update."""
    become_server()
    layout = seven_billion(layers=1, hidden=64, inner=172) if quick else seven_billion()
    start, flat = adapters(layout)
    theirs = published(layout)
    found = {kind: upload(kind, start, flat, repeats=1 if quick else 5) for kind in KINDS}
    sizes = {kind: one["bytes"] for kind, one in found.items()}
    return Result(
        name="bytes",
        what=f"upload per client-round, {len(layout.modules)} layers at rank {RANK} and projector, "
        f"{flat.size / 1e6:.2f} M numbers; published code: {theirs / 1e6:.1f} MB",
        clock="bytes",
        ratios={f"published code ({kind})": theirs / size for kind, size in sizes.items()},
        targets={
            "published code (bfloat16)": 3.4,
            "published code (int8)": 6.5,
            "error of int8 / update": 0.01,
        },
        limits={f"error of {kind} / update": one["error"] for kind, one in found.items()},
        pairs=tuple({"upload": kind, **one} for kind, one in found.items()),
        equal={"what the gate decodes is what the client thinks it sent": "bit for bit"},
        notes=(
            "bfloat16: the published code's own width, of differences; float32: every bit of what was trained",
            f"16 bits of the adapter itself, as published, would lose {blunt(start, flat):.1%} of the update",
            "what rounding loses in a round is remembered by the client and added to its next update",
            *(f"{kind}: {one['bytes'] / 1e6:.2f} MB; {_speed(one)}" for kind, one in found.items()),
        ),
    )


def seven_billion(layers: int = 32, hidden: int = 4096, inner: int = 11008) -> Layout:
    """The layout of LLaVA-1.5-7B with FCIT's targets and a trained projector; other sizes for a quick look."""
    import torch
    from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

    text: dict[str, Any] = {"hidden_size": hidden, "intermediate_size": inner, "num_hidden_layers": layers}
    seen: dict[str, Any] = {"hidden_size": hidden // 4, "intermediate_size": hidden, "image_size": 336}
    vision = CLIPVisionConfig(**seen, patch_size=14, num_hidden_layers=1, num_attention_heads=16)
    heads = max(1, hidden // 128)
    language = LlamaConfig(**text, num_attention_heads=heads, num_key_value_heads=heads, vocab_size=32064)
    with torch.device("meta"):
        model: Any = LlavaForConditionalGeneration(LlavaConfig(vision_config=vision, text_config=language))
    return find_layout(model, TARGETS, "shared")


def published(layout: Layout) -> int:
    """Bytes of the published upload: every subspace, an r·K square per layer, the projector; 2 bytes a number."""
    mixing = len(layout.modules) * (RANK * SUBSPACES) ** 2
    return 2 * (layout.width * RANK * SUBSPACES + mixing + layout.tail)


def adapters(layout: Layout) -> tuple[Flat, Flat]:
    """What was sent and what came of it: A as it is drawn, B and projector small; changes with heavy tails (t, 5)."""
    rng, size = np.random.default_rng(0), layout.size(RANK)
    start = rng.standard_normal(size, dtype=np.float32) * np.float32(0.01)
    return start, start + rng.standard_t(5, size).astype(np.float32) * np.float32(UPDATE)


def upload(kind: str, start: Flat, flat: Flat, repeats: int) -> dict[str, Any]:
    """One client's two replies of a round, token and adapter, through the gate: bytes, error, CPU seconds of coding."""
    at = Binding("bench", 1, 1, 0)
    request = Message(RecordDict(), 2, records.TRAIN)
    set_message_id(request.metadata, "bench")
    if kind == "float32":
        parts, encoded, decoded = None, 0.0, 0.0
    else:
        parts, _ = codec.encode(flat, start, None, kind)
        encoded = median(cost(partial(codec.encode, flat, start, None, kind)).cpu for _ in range(repeats))
        decoded = median(cost(partial(codec.restore, start, parts)).cpu for _ in range(repeats))
    message = records.train_reply(TrainReply(at, flat, 10, 0.5, 1, 0.1), request, parts)
    token = records.token_reply(Token(np.ones(FEATURE, dtype=np.float32), 10), at, request)
    wanted = Expected(at, flat.size, 10, start, upload=kind)
    good, bad = pass_replies([request], [message], {2: wanted}, read_train)
    if bad:
        raise AssertionError(f"the gate refuses the reply: {bad}")
    seen = good[0][1].flat
    if seen.tobytes() != (flat if parts is None else codec.restore(start, parts)).tobytes():
        raise AssertionError(f"{kind}: the gate decodes another adapter than the client sent")
    size = records.tensor_bytes([message, token])
    spent = {"encode_cpu": encoded, "decode_cpu": decoded, "numbers": flat.size}
    return {"bytes": size, "error": relative(seen, flat, start), **spent}


def relative(seen: Flat, flat: Flat, start: Flat) -> float:
    """‖what the server sees − what was trained‖ / ‖update‖."""
    wrong = np.linalg.norm((seen - flat).astype(np.float64))
    return float(wrong / np.linalg.norm((flat - start).astype(np.float64)))


def blunt(start: Flat, flat: Flat) -> float:
    """The error of rounding the adapter itself, and not its difference, to bfloat16."""
    parts, _ = codec.encode(flat, np.zeros_like(flat), None, "bfloat16")
    return relative(codec.restore(np.zeros_like(flat), parts), flat, start)


def _speed(one: dict[str, Any]) -> str:
    if not one["encode_cpu"]:
        return "sent as it is"
    gigabytes = 4 * one["numbers"] / 1e9
    encode, decode = (gigabytes / max(one[f"{name}_cpu"], 1e-9) for name in ("encode", "decode"))
    return f"{encode:.2f} GB encoded and {decode:.2f} GB decoded per CPU second"
