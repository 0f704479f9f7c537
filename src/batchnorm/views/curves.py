"""Curves against the epoch, as a figure and as `curves.svg`."""

from io import BytesIO
from pathlib import Path
from typing import Any

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from batchnorm.lab.record import Record
from batchnorm.lab.summary import Point
from batchnorm.views import fonts
from batchnorm.views.lines import Line, accuracy_lines, quantity_lines
from batchnorm.views.words import Words

QUANTITIES = ("train_loss", "train_accuracy", "test_loss")
WIDTH = 1.6


class Curves(Figure):
    """A figure that a notebook shows, whether or not pyplot was imported there."""

    def _repr_png_(self) -> bytes:
        buffer = BytesIO()
        self.savefig(buffer, format="png")
        return buffer.getvalue()


def draw(record: Record, words: Words) -> Figure:
    """Test accuracy in all its lines, and a panel for each other quantity."""
    with mpl.rc_context({"font.family": fonts.family(words)}):
        figure = Curves(figsize=(10, 7), layout="constrained")
        panels = {"test_accuracy": accuracy_lines(record, words)}
        panels |= {name: quantity_lines(record, name, words) for name in QUANTITIES}
        for axes, (name, lines) in zip(figure.subplots(2, 2).flat, panels.items(), strict=True):
            for line in lines:
                plot(axes, line)
            axes.set(title=words(name), xlabel=words("epoch"))
            decorate(axes)
            if lines:
                axes.legend(frameon=False, fontsize="small", handlelength=3.2)
    return figure


def plot(axes: Axes, line: Line, until: float = float("inf")) -> None:
    """The mean over the seeds, each seed thin behind it, a cross where one diverged."""
    dashes = (0, line.style.dashes) if line.style.dashes else "solid"
    look: dict[str, Any] = {"color": line.style.colour, "linestyle": dashes}
    if len(line.cells) > 1:
        for _, points in line.seeds:
            axes.plot(*_until(points, until), **look, alpha=0.3, linewidth=WIDTH / 2)
    axes.plot(
        *_until(line.mean, until), **look,
        linewidth=WIDTH, marker="o", markersize=4, markevery=[-1], label=line.label,
    )  # fmt: skip
    for cell, points in line.seeds:
        if cell.diverged and points and points[-1].epoch <= until:
            axes.plot(*points[-1][::2], "x", color=line.style.colour, markersize=9)


def _until(points: list[Point], until: float) -> tuple[list[float], list[float]]:
    kept = [point for point in points if point.epoch <= until]
    return [point.epoch for point in kept], [point.value for point in kept]


def decorate(axes: Axes) -> None:
    """A light grid, and no box around it."""
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)


def save(record: Record, path: Path, words: Words) -> None:
    """`curves.svg`, the same bytes for the same record."""
    with mpl.rc_context({"svg.hashsalt": "batchnorm"}):
        draw(record, words).savefig(path, metadata={"Date": None})
