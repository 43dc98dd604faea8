"""What a person sees while a run is going on: live bars in a terminal, plain lines elsewhere."""

from collections.abc import Sequence

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from fedstrata.core.metrics import AccuracyMatrix


class Display:
    """Stage, round, clients, loss and ETA; after each stage one line of scores."""

    def __init__(self, console: Console, stages: int, rounds: int, done: int = 0) -> None:
        self.console, self.stages, self.rounds = console, stages, rounds
        self.live: Progress | None = None
        if console.is_terminal:
            text = TextColumn("[bold]{task.description}")
            bars = (
                text,
                BarColumn(),
                MofNCompleteColumn(),
                TimeElapsedColumn(),
                TextColumn("eta"),
                TimeRemainingColumn(),
            )
            self.live = Progress(*bars, console=console, transient=True)
            self.bar = self.live.add_task("starting", total=stages * rounds, completed=done)
            self.live.start()

    def stage(self, stage: int, tasks: Sequence[str]) -> None:
        """A stage begins."""
        self.tasks = ", ".join(tasks)

    def round(
        self, stage: int, round_: int, clients: Sequence[int], loss: float | None, rejected: int, skipped: bool
    ) -> None:
        """A round has been committed."""
        shown = "skipped" if skipped else f"loss {loss:.3f}"
        people = " ".join(str(client) for client in clients)
        line = f"stage {stage}/{self.stages} {self.tasks} · round {round_}/{self.rounds} · clients {people} · {shown}"
        line += f" · {rejected} rejected" if rejected else ""
        if self.live:
            self.live.update(self.bar, advance=1, description=line)
        else:
            self.console.print(line, highlight=False, soft_wrap=True)

    def scored(self, stage: int, matrix: AccuracyMatrix) -> None:
        """One line of scores; tasks not yet trained in brackets."""
        cells = zip(matrix.tasks, matrix.scores[-1], matrix.seen[-1], strict=True)
        words = [f"{name} {score:.0f}" if seen else f"[dim]({name} {score:.0f})[/dim]" for name, score, seen in cells]
        label = f"stage {stage}" if stage else "before training"
        self.console.print(f"[bold]scores[/bold] {label}: " + " · ".join(words), highlight=False, soft_wrap=True)

    def close(self) -> None:
        """Ends the live display."""
        if self.live:
            self.live.stop()
