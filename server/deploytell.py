"""What `fedstrata deploy run` says of a run while it goes on."""

from pathlib import Path

from rich.console import Console

from fedstrata.core.errors import BadInput
from fedstrata.server.runfolder import RunFolder


class Teller:
    """Says each round and each row of scores once, from the run folder's events."""

    def __init__(self, folder: Path, console: Console) -> None:
        self.folder, self.console = folder, console
        self.told = len(self._lines())

    def __call__(self) -> None:
        lines = self._lines()
        for line in lines[self.told :]:
            self.console.print(line, highlight=False, markup=False, soft_wrap=True)
        self.told = len(lines)

    def _lines(self) -> list[str]:
        try:
            events = RunFolder(self.folder).events()
        except BadInput:
            return []  # not begun
        return [_line(event) for event in events if event["event"] in ("round", "stage_scored", "resumed")]


def _line(event: dict[str, object]) -> str:
    if event["event"] == "round":
        people = event["participants"]
        names = " ".join(str(row["client"]) for row in people) if isinstance(people, list) else ""
        cost = f"{event['bytes_up']} bytes up, {event['bytes_down']} down, {event['seconds']:.1f} s"
        return f"stage {event['stage']} round {event['round']}: clients {names or 'none'}, {cost}"
    if event["event"] == "resumed":
        return f"goes on from commit {event['commit']}"
    return f"stage {event['stage']} scored: {event['scores']}"
