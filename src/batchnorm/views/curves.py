"""Curves against the epoch, as a figure and as `curves.svg`."""

from pathlib import Path

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from batchnorm.lab.record import Cell, Record
from batchnorm.views.words import ARM_NAMES

# Okabe & Ito's palette, told apart by dashes as well
COLOURS = {
    "none": "#000000",
    "batch": "#0072B2",
    "batch-torch": "#56B4E9",
    "batch-note": "#D55E00",
    "group": "#009E73",
    "layer": "#CC79A7",
}
PANELS = {
    "test_accuracy": ("test accuracy, running statistics", "-"),
    "recalibrated_test_accuracy": ("test accuracy, recalibrated", "--"),
    "train_accuracy": ("train accuracy", "-"),
    "train_loss": ("train loss", "-"),
}


def draw(record: Record) -> Figure:
    """A panel a quantity, a line a cell: colour is the arm."""
    figure = Figure(figsize=(10, 7), layout="constrained")
    for axes, (quantity, (title, dashes)) in zip(
        figure.subplots(2, 2).flat, PANELS.items(), strict=True
    ):
        for cell in record.cells:
            _draw_cell(axes, cell, quantity, dashes)
        axes.set_title(title)
        axes.set_xlabel("epoch")
        axes.grid(alpha=0.3)
        if axes.lines:
            axes.legend(frameon=False)
    return figure


def _draw_cell(axes: Axes, cell: Cell, quantity: str, dashes: str) -> None:
    points = [
        (evaluation.epoch, value)
        for evaluation in cell.evaluations
        if (value := getattr(evaluation, quantity)) is not None
    ]
    if not points:
        return
    arm = cell.config.arm
    name = ARM_NAMES[arm] + (" (diverged)" if cell.diverged else "")
    labelled = name not in axes.get_legend_handles_labels()[1]
    axes.plot(
        *zip(*points, strict=True),
        color=COLOURS[arm],
        linestyle=dashes,
        marker=".",
        label=name if labelled else None,
    )


def save(record: Record, path: Path) -> None:
    """`curves.svg`, the same bytes for the same record."""
    with mpl.rc_context({"svg.hashsalt": "batchnorm"}):
        draw(record).savefig(path, metadata={"Date": None})
