"""`fedstrata ask`: one instruction, answered with a run's knowledge."""

import io
import json
from dataclasses import dataclass
from pathlib import Path

from flwr.app import Message
from PIL import Image, UnidentifiedImageError

from fedstrata.core import records
from fedstrata.core.errors import BadInput, FedstrataError
from fedstrata.core.records import Assignment, Binding
from fedstrata.server import preparing
from fedstrata.server.export import read_knowledge
from fedstrata.server.grids import InProcessGrid


@dataclass(frozen=True)
class Reply:
    """The answer, and α per subspace."""

    text: str
    weights: tuple[tuple[str, float], ...]


def ask(run_dir: Path, text: str, image: Path | None) -> Reply:
    """Answers `text` about `image` as an `evaluate` message does: only the client side holds a model.

    Raises:
        BadInput: no run folder, an image that cannot be read, or a method that routes by task identity.
    """
    config, knowledge, _ = read_knowledge(run_dir)
    if "owners" in knowledge.options:
        raise BadInput(f"{run_dir}: {config.strategy.name} routes by task identity, which a question does not carry")
    grid = InProcessGrid(1, 1)
    node = next(iter(grid.roster.values()))
    content = records.with_question(records.knowledge_content(knowledge), text, _picture(image))
    meta = Assignment(Binding(partition=0), config=json.dumps(preparing.on_the_wire(config)))
    reply = next(iter(grid.send_and_receive([records.address(Message(content, node, records.ASK), meta)])))
    if reply.has_error():
        raise FedstrataError(reply.error.reason)
    answer, weights = records.read_answer(reply)
    return Reply(answer, tuple((f"subspace {index}", weight) for index, weight in enumerate(weights)))


def _picture(path: Path | None) -> bytes:
    """The image as PNG bytes; empty without one."""
    if path is None:
        return b""
    buffer = io.BytesIO()
    try:
        with Image.open(path) as picture:
            picture.convert("RGB").save(buffer, "PNG")
    except (OSError, UnidentifiedImageError, Image.DecompressionBombError) as error:
        raise BadInput(f"--image: cannot read {path}: {error}") from error
    return buffer.getvalue()
