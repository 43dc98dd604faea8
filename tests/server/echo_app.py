"""A stock Flower ClientApp for test_raygrid.py; Ray's workers import it by name.

The record `say` tells it what to do: a word to echo, seconds to wait, and a folder in which every call leaves a file.
"""

import os
import time
import uuid
from pathlib import Path
from typing import Any

from flwr.app import ConfigRecord, Context, Message, RecordDict
from flwr.clientapp import ClientApp

from fedstrata.core.errors import BadInput

app = ClientApp()


@app.train()
def train(message: Message, context: Context) -> Message:
    """Echoes the word, the sum of the arrays, the partition and how often this client was asked before."""
    say = message.content.config_records["say"]
    word, folder = str(say["word"]), Path(str(say["folder"]))
    (folder / f"{word}-{uuid.uuid4().hex}").touch()
    if word == "dies" or (word == "dies once" and len(list(folder.glob("dies once-*"))) == 1):
        os._exit(1)
    if word == "hangs once" and len(list(folder.glob("hangs once-*"))) == 1:
        time.sleep(600)
    time.sleep(float(say["wait"]))  # type: ignore[arg-type]
    if word == "fail":
        raise RuntimeError("out of luck")
    if word == "refuse":
        raise BadInput("model.name: no such folder")
    asked = int(context.state.config_records.get("memory", ConfigRecord({"asked": 0}))["asked"]) + 1  # type: ignore[arg-type]
    context.state["memory"] = ConfigRecord({"asked": asked})
    total = sum(
        float(array.numpy().sum()) for record in message.content.array_records.values() for array in record.values()
    )
    said: dict[str, Any] = {
        "word": word,
        "total": total,
        "partition": context.node_config["partition-id"],
        "asked": asked,
    }
    return Message(RecordDict({"said": ConfigRecord(said)}), reply_to=message)
