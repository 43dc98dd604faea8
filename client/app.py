"""The Flower ClientApp: train, evaluate and query handlers, each unpack → one call → pack.

`serve` takes a whole cohort of messages at once, which is what the simulation's grids call; a handler that Flower
calls with one message serves a cohort of one.
"""

import io
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from flwr.app import Context, Message
from flwr.clientapp import ClientApp
from PIL import Image

from fedstrata.client import own
from fedstrata.client.evaluation import Answerer, score
from fedstrata.client.footprint import footprint, peak
from fedstrata.client.identity import identity
from fedstrata.client.memory import encoded, remember, remembered
from fedstrata.client.release import data_name, noise_key, release
from fedstrata.client.training import Job
from fedstrata.client.within import train_within
from fedstrata.client.world import base_of, read_config, share, share_rows, world
from fedstrata.core import records
from fedstrata.core.config import RunConfig
from fedstrata.core.estimate import shape_of
from fedstrata.core.privacy import own_least, token_options
from fedstrata.core.records import Assignment, Description, TrainReply
from fedstrata.core.seeds import derive
from fedstrata.scenarios.stream import Example, Pixels
from fedstrata.strategies import find
from fedstrata.strategies.base import Offer, Row


class CohortApp(ClientApp):
    """A ClientApp that can also serve several train messages in one fused pass."""

    def serve(self, messages: Sequence[Message], contexts: Sequence[Context]) -> list[Message]:
        """Replies in the order of the messages."""
        return serve(messages, contexts)


app = CohortApp()


def serve(messages: Sequence[Message], contexts: Sequence[Context]) -> list[Message]:
    """Train messages of one run together as one cohort, everything else one by one."""
    if len(messages) > 1 and all(message.metadata.message_type == records.TRAIN for message in messages):
        return train_cohort(messages, contexts)
    handlers = {
        records.TRAIN: train_one,
        records.EVALUATE: evaluate,
        records.IDENTIFY: answer_identify,
        records.DESCRIBE: answer_describe,
        records.ASK: answer_question,
    }
    pairs = zip(messages, contexts, strict=True)
    return [handlers[message.metadata.message_type](message, context) for message, context in pairs]


@app.train()
def train_one(message: Message, context: Context) -> Message:
    """Flower's door to `train_cohort`."""
    return train_cohort([message], [context])[0]


def train_cohort(messages: Sequence[Message], contexts: Sequence[Context]) -> list[Message]:
    """Trains every message's adapter on its client's share; what a client remembers lies in its context."""
    tasks = records.train_tasks(messages)
    config, base, scenario = world(tasks[0].assignment)
    method = find(config.strategy.name).variant(config.strategy)
    shares, jobs = list[list[Row]](), list[Job]()
    for task, payload, context in zip(tasks, records.payloads(messages), contexts, strict=True):
        at, before = task.assignment, remembered(context)
        shares.append(rows := share_rows(scenario, config, at))
        steady = derive(config.seed, "select", at.binding.partition)
        offer = Offer(rows, before, steady, _seed(config, at, "select"))
        chosen, more = method.selector(config.strategy).select(offer)
        seed = _seed(config, at, "batches")
        jobs.append(Job(scenario.read(chosen), task.flat, seed, task.options, payload, {**before, **more}))
    half = method.local_half(config.strategy)
    scaling = config.lora.scaling
    done, size = train_within(base, jobs, config.train, scaling, half, dropout=config.lora.dropout)
    told = {"peak": peak(base.device)} | ({"cohort": size} if size < len(jobs) else {})
    replies = []
    for message, context, task, rows, job, trained in zip(messages, contexts, tasks, shares, jobs, done, strict=True):
        cost = (len(rows), trained.loss, trained.steps, trained.seconds)
        reply = TrainReply(task.assignment.binding, trained.flat, *cost, told, trained.extra)
        parts, memory = encoded(config.federation.upload, task, trained.flat, {**job.memory, **trained.memory})
        replies.append(records.train_reply(reply, message, parts))
        remember(context, memory)
    return replies


@app.evaluate()
def evaluate(message: Message, context: Context) -> Message:
    """Scores one shard of one task's split with the knowledge in the message."""
    at = records.assignment(message)
    config, base, scenario = world(at)
    shard, knowledge = records.read_shard(message), records.read_knowledge(message)
    task = scenario.tasks[shard.task]
    examples = list(getattr(task, shard.split)[shard.start : shard.stop])
    router = find(config.strategy.name).router(knowledge)
    answerer = Answerer(base, knowledge, router, config.lora.scaling, token_options(config.strategy).token)
    limits = (config.evaluate.batch_size, config.train.max_length, config.train.overlong)
    answers = answerer.answer(examples, shard.task, *limits)
    scores = score(task, examples, answers, scenario.vocabulary(shard.task), shard.split)
    if own.names_of(at.config):
        scores = replace(scores, predictions=())  # they would be a client's own texts
    return records.score_reply(scores, at.binding, message)


@app.query("identify")
def answer_identify(message: Message, context: Context) -> Message:
    """The client's identity token over all instructions of its share, or that these are too few for one."""
    at = records.assignment(message)
    config, base, scenario = world(at)
    examples, least = share(scenario, config, at), own_least(config.strategy)
    if len(examples) < least:
        reason = f"strategy.token_min_samples: at least {least} instructions send a token, there are {len(examples)}"
        return records.too_few_reply(reason, message)
    token = release(base, examples, config, noise_key(config, context), data_name(scenario, at))
    return records.token_reply(token, at.binding, message, token_options(config.strategy).token_upload)


@app.query("describe")
def answer_describe(message: Message, context: Context) -> Message:
    """What the server must know of the base model, and which partition this node holds."""
    at = records.assignment(message)
    config = read_config(at.config)
    base = base_of(config)
    partition = int(context.node_config.get("partition-id", -1))
    facts: dict[str, Any] = {"encoder": "", "dim": 0, "tau": 0.0, "epsilon": 0.0}
    if find(config.strategy.name).needs_tokens:
        encoder = identity(base, token_options(config.strategy).token)
        facts = {"encoder": encoder.name, "dim": encoder.dim, "tau": encoder.tau, "epsilon": encoder.epsilon}
        facts |= dict(zip(("words", "words_tau"), encoder.text, strict=True))
    facts |= {"shape": shape_of(base.model.config).to_json(), "machine": footprint(base.model, base.device).to_json()}
    if names := own.names_of(at.config):
        facts["holding"] = own.holding(config, names, context)
    description = Description(partition, base.layout.to_json(), base.name, base.hash, **facts)
    return records.description_reply(description, message)


@app.query("ask")
def answer_question(message: Message, context: Context) -> Message:
    """Answers one instruction with the knowledge in the message."""
    config = read_config(records.assignment(message).config)
    base, knowledge = base_of(config), records.read_knowledge(message)
    text, picture = records.read_question(message)
    image = Pixels(np.asarray(Image.open(io.BytesIO(picture)).convert("RGB"))) if picture else None
    router = find(config.strategy.name).router(knowledge)
    answerer = Answerer(base, knowledge, router, config.lora.scaling, token_options(config.strategy).token)
    limits = (1, config.train.max_length, config.train.overlong)
    answers = answerer.answer([Example("question", text, "", image)], 0, *limits)
    return records.answer_reply(answers.texts[0], answers.weights[0].tolist(), message)


def _seed(config: RunConfig, at: Assignment, name: str) -> int:
    return derive(config.seed, name, at.binding.stage, at.binding.round, at.binding.partition)
