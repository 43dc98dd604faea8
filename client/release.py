"""What a client tells of its instructions: its identity token, clipped and noised before it leaves, or nothing."""

import os
from collections.abc import Sequence

import numpy as np
from flwr.app import ConfigRecord, Context

from fedstrata.client.identity import identify, identity
from fedstrata.client.model import BaseModel
from fedstrata.core.config import RunConfig
from fedstrata.core.identity import Token
from fedstrata.core.privacy import clipped, gaussian, mean_sensitivity, token_options
from fedstrata.core.records import Assignment
from fedstrata.scenarios.stream import Example, Scenario

NOISE, KEY = "noise", "key"  # where a client keeps its secret; it never travels


def release(base: BaseModel, examples: Sequence[Example], config: RunConfig, key: bytes, what: str) -> Token:
    """The identity token as it leaves the client.

    With `strategy.token_noise` = z: the mean of the n features, each clipped to `strategy.token_clip`, plus
    N(0, (z · 2 · clip / n)²) on every number: (ε, δ)-private for replacing one instruction, n being public.

    what: names the data; equal keys and equal names draw equal noise, so asking again releases nothing further.
    """
    options = token_options(config.strategy)
    if not options.token_noise and options.token_clip is None:
        return identify(base, examples, options.token)
    encoder = identity(base, options.token)
    bound, count = options.token_clip or encoder.norm, len(examples)
    mean = clipped(encoder.encode(examples).numpy(), bound).mean(axis=0)
    if options.token_noise:
        spread = options.token_noise * mean_sensitivity(bound, count)
        mean += spread * gaussian(key, ["token", what, options.token_noise, bound, count], mean.size)
    return Token(mean.astype(np.float32), count)


def data_name(scenario: Scenario, at: Assignment) -> str:
    """The client and the data that one assignment is about."""
    when = (at.binding.stage, at.binding.round) if at.parts == 1 else ()
    data = scenario.data_key(at.tasks, at.binding.partition, *when)
    return f"{at.binding.partition}:{data}:{at.part}/{at.parts}"


def noise_key(config: RunConfig, context: Context) -> bytes:
    """In a simulation the run's seed, so that equal runs have equal bits; that protects nobody who is told the seed.

    Under Flower itself 32 bytes from the system's generator, drawn once and kept in the client's own context.
    """
    return own_key(context) if config.federation.grid == "flower" else str(config.seed).encode()


def own_key(context: Context) -> bytes:
    """32 bytes that only this client knows, drawn when they are first needed and kept in its context."""
    held = context.state.config_records.get(NOISE)
    if held is None:
        held = context.state[NOISE] = ConfigRecord({KEY: os.urandom(32)})
    return bytes(held[KEY])  # type: ignore[arg-type]
