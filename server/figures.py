"""The report's figures: inline SVG, equal for equal numbers, in the page's own text colour (light or dark)."""

import io
import re
from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib.style
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from fedstrata.core.metrics import AccuracyMatrix

INK = "#010203"  # stands for the page's text colour until the SVG is written
FADED = "#8a8f98"
COLOURED = ("text.color", "axes.edgecolor", "axes.labelcolor", "xtick.color", "ytick.color")
MARKERS = "osD^vP*X<>"
STYLE: dict[str, Any] = {
    "svg.fonttype": "none",  # text stays text: smaller, selectable, in the page's font
    "text.parse_math": False,  # a task may have a $ in its name
    "font.size": 9.0,
    "axes.spines.top": False,
    "axes.spines.right": False,
    **dict.fromkeys(COLOURED, INK),
}


def heat_map(matrix: AccuracyMatrix) -> str:
    """Rows: before training, then stages; columns: tasks. Cells of tasks not yet trained are hatched, not coloured."""
    rows, columns = len(matrix.scores), len(matrix.tasks)
    with matplotlib.style.context(["default", STYLE | {"svg.hashsalt": "heat map", "hatch.linewidth": 0.6}]):
        figure = Figure(figsize=(1.6 + 0.75 * columns, 1.2 + 0.36 * rows))
        axes = figure.add_subplot()
        for t in range(rows):
            for i in range(columns):
                _cell(axes, i, t, matrix.scores[t][i], matrix.seen[t][i])
        axes.set(xlim=(0, columns), ylim=(rows, 0))
        axes.set_xticks([i + 0.5 for i in range(columns)], matrix.tasks, rotation=30, ha="left", rotation_mode="anchor")
        axes.set_yticks([t + 0.5 for t in range(rows)], stage_labels(matrix))
        axes.tick_params(length=0, labeltop=True, labelbottom=False)
        axes.spines[:].set_visible(False)
        return svg(figure)


def _cell(axes: Any, column: int, row: int, score: float, seen: bool) -> None:
    colours = matplotlib.colormaps["viridis"]
    face = colours(Normalize(0, 100)(score)) if seen else "none"
    hatch: dict[str, Any] = {} if seen else {"hatch": "////", "edgecolor": FADED + "66"}
    axes.add_patch(Rectangle((column + 0.02, row + 0.03), 0.96, 0.94, facecolor=face, linewidth=0, **hatch))
    ink = ("white" if score < 60 else "black") if seen else INK
    axes.text(column + 0.5, row + 0.5, f"{score:.1f}", ha="center", va="center", color=ink, alpha=1 if seen else 0.65)


def curves(matrix: AccuracyMatrix) -> str:
    """Score of each task over the stages: dotted before the task was trained, a line from then on."""
    with matplotlib.style.context(["default", STYLE | {"svg.hashsalt": "curves"}]):
        figure = Figure(figsize=(7.2, 3.4))
        axes = figure.add_subplot()
        lines = [_curve(axes, matrix, i) for i in range(len(matrix.tasks))]
        axes.set(xlabel="stage (0: before training)", ylabel="score", ylim=(-3, 103))
        axes.set_xticks(range(len(matrix.scores)))
        axes.grid(axis="y", color=FADED, alpha=0.3, linewidth=0.6)
        axes.legend(lines, matrix.tasks, loc="center left", bbox_to_anchor=(1.0, 0.5), frameon=False)
        return svg(figure)


def _curve(axes: Any, matrix: AccuracyMatrix, i: int) -> Any:
    colour = matplotlib.colormaps["tab10" if len(matrix.tasks) <= 10 else "tab20"](i % 20)
    column = [row[i] for row in matrix.scores]
    start = next((t for t, row in enumerate(matrix.seen) if row[i]), len(column))
    axes.plot(range(min(start + 1, len(column))), column[: start + 1], color=colour, linestyle=":", linewidth=1)
    marker = MARKERS[i % len(MARKERS)]
    return axes.plot(range(start, len(column)), column[start:], color=colour, marker=marker, markersize=4)[0]


def averages(lines: Mapping[str, Sequence[tuple[float, float]]]) -> str:
    """Per method the mean score of the tasks trained so far, after each stage: (mean over seeds, deviation)."""
    with matplotlib.style.context(["default", STYLE | {"svg.hashsalt": "averages"}]):
        figure = Figure(figsize=(7.2, 3.6))
        axes = figure.add_subplot()
        for i, (name, points) in enumerate(lines.items()):
            colour = matplotlib.colormaps["tab20"](i % 20)
            stages, means = range(1, len(points) + 1), [mean for mean, _ in points]
            axes.plot(stages, means, color=colour, marker=MARKERS[i % len(MARKERS)], markersize=4, label=name)
            low, high = ([mean + sign * wide for mean, wide in points] for sign in (-1, 1))
            axes.fill_between(stages, low, high, color=colour, alpha=0.15, linewidth=0)
        axes.set(xlabel="stage", ylabel="score of the tasks so far", ylim=(-3, 103))
        axes.set_xticks(range(1, 1 + max((len(points) for points in lines.values()), default=1)))
        axes.grid(axis="y", color=FADED, alpha=0.3, linewidth=0.6)
        axes.legend(loc="center left", bbox_to_anchor=(1.0, 0.5), frameon=False)
        return svg(figure)


def cosines(stages: Sequence[int], within: Sequence[Sequence[float]], between: Sequence[Sequence[float]]) -> str:
    """Dots per stage: cosines of identity tokens inside a subspace, and between subspaces."""
    with matplotlib.style.context(["default", STYLE | {"svg.hashsalt": "cosines"}]):
        figure = Figure(figsize=(7.2, 2.6))
        axes = figure.add_subplot()
        for name, series, colour, shift in (("within", within, "#2a9d8f", -0.1), ("between", between, "#e76f51", 0.1)):
            dots = [(stage + shift, value) for stage, row in zip(stages, series, strict=True) for value in row]
            axes.scatter([x for x, _ in dots], [y for _, y in dots], s=14, alpha=0.8, color=colour, label=name)
        axes.set(xlabel="stage", ylabel="cosine")
        axes.set_xticks(list(stages))
        axes.grid(axis="y", color=FADED, alpha=0.3, linewidth=0.6)
        axes.legend(loc="center left", bbox_to_anchor=(1.0, 0.5), frameon=False)
        return svg(figure)


def stage_labels(matrix: AccuracyMatrix) -> list[str]:
    """One label per row: "before", then number and name of the stage, shortened."""
    names = [n if n.split(" ")[0] == str(t) else f"{t} {n}" for t, n in enumerate(matrix.stages, start=1)]
    short = [name if len(name) <= 24 else name[:23] + "…" for name in names]
    return ["before", *short][: len(matrix.scores)]


def svg(figure: Figure) -> str:
    """The figure as one <svg> element without date, addresses or ids that could clash with another figure's."""
    out = io.StringIO()
    none = dict.fromkeys(("Date", "Creator", "Format", "Type"))
    figure.savefig(out, format="svg", bbox_inches="tight", transparent=True, metadata=none)
    text = out.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    text = re.sub(r' xmlns(:\w+)?="[^"]*"', "", text, count=2)  # HTML knows what <svg> is; these look like addresses
    text = re.sub(r'<g id="[^"]*">', "<g>", text)  # nothing refers to them, and every figure counts from 1
    return text.replace("xlink:href=", "href=").replace(INK, "currentColor")
