"""The curves as they grew, as GIFs."""

from collections.abc import Sequence
from io import BytesIO
from pathlib import Path
from typing import NamedTuple

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from PIL import Image

from batchnorm.lab.record import Cell, Record
from batchnorm.views.words import ARM_NAMES

FRAME_MS, LAST_MS = 250, 3000
DPI = 100


class Line(NamedTuple):
    cell: Cell
    quantity: str
    label: str
    colour: str
    dashes: str


def write(record: Record, folder: Path) -> None:
    """`without.gif` and `with.gif` as in the note, and `compare.gif`, of the first seed."""
    first = {arm: record.of(arm)[0] for arm in record.arms}
    with_norm = next((first[arm] for arm in first if arm.startswith("batch")), None)
    if "none" in first:
        _write(_training_lines(first["none"]), folder / "without.gif")
    if with_norm is not None:
        _write(_training_lines(with_norm), folder / "with.gif")
    compare(record, folder / "compare.gif")


def compare(record: Record, path: Path) -> None:
    """Test accuracy: without, with running statistics, with recalibrated ones."""
    first = {arm: record.of(arm)[0] for arm in record.arms}
    lines = []
    colours = ["#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9"]
    for arm, cell in first.items():
        name = ARM_NAMES[arm]
        if cell.last.recalibrated_test_accuracy is None:
            colour = "#000000" if arm == "none" else colours.pop()
            lines.append(Line(cell, "test_accuracy", name, colour, ":"))
            continue
        colour = colours.pop(0)
        running, again = f"{name}, running statistics", f"{name}, recalibrated"
        lines.append(Line(cell, "test_accuracy", running, colour, "--"))
        lines.append(Line(cell, "recalibrated_test_accuracy", again, colour, "-"))
    _write(lines, path, "test accuracy")


def _training_lines(cell: Cell) -> list[Line]:
    return [
        Line(cell, "train_loss", "train loss", "#0072B2", "-"),
        Line(cell, "train_accuracy", "train accuracy", "#D55E00", "--"),
        Line(cell, "test_accuracy", "test accuracy", "#009E73", "-."),
    ]


def _write(lines: Sequence[Line], path: Path, title: str | None = None) -> None:
    title = title or ARM_NAMES[lines[0].cell.config.arm]
    most = max(len(line.cell.evaluations) for line in lines)
    frames = [_frame(lines, count, title) for count in range(1, most + 1)]
    durations = [FRAME_MS] * (len(frames) - 1) + [LAST_MS]
    frames[0].save(
        path, save_all=True, append_images=frames[1:], duration=durations, loop=0, optimize=True
    )


def _frame(lines: Sequence[Line], count: int, title: str) -> Image.Image:
    """The curves up to the `count`-th evaluation, in axes that stay."""
    figure = Figure(figsize=(6.6, 4.2), dpi=DPI, layout="constrained")
    axes = figure.add_subplot()
    for line in lines:
        _draw(axes, line, count)
    last = max(line.cell.last.epoch for line in lines)
    losses = [e.train_loss or 0 for line in lines for e in line.cell.evaluations]
    has_loss = any(line.quantity == "train_loss" for line in lines)
    axes.set(xlim=(0, max(last, 1) * 1.02), xlabel="epoch", title=title)
    axes.set_ylim(0, max(1.0, *losses) * 1.03 if has_loss else 1.0)
    axes.grid(alpha=0.3)
    axes.legend(loc="lower right" if not has_loss else "best", frameon=False)
    buffer = BytesIO()
    figure.savefig(buffer, format="png")
    with Image.open(buffer) as picture:
        return picture.convert("RGB").quantize(64)


def _draw(axes: Axes, line: Line, count: int) -> None:
    points = [
        (evaluation.epoch, value)
        for evaluation in line.cell.evaluations[:count]
        if (value := getattr(evaluation, line.quantity)) is not None
    ]
    value = f" {points[-1][1]:.3f}" if points else ""
    xs, ys = zip(*points, strict=True) if points else ((), ())
    axes.plot(xs, ys, color=line.colour, linestyle=line.dashes, label=line.label + value)
