"""The curves as they grew, as GIFs."""

from collections.abc import Sequence
from io import BytesIO
from pathlib import Path

import matplotlib as mpl
from matplotlib.figure import Figure
from PIL import Image

from batchnorm.lab.record import Record
from batchnorm.views import curves, fonts
from batchnorm.views.lines import Line, accuracy_lines, training_lines
from batchnorm.views.words import Words

FRAME_MS, LAST_MS = 250, 3000
FRAMES = 60  # at most: more only make the file large
DPI = 100
TOP = 23  # a loss that grew without bound is drawn up to ten times ln 10


def write(record: Record, folder: Path, words: Words) -> None:
    """`without.gif` and `with.gif` as in the note, and `compare.gif`."""
    with_norm = next((arm for arm in record.arms if arm.startswith("batch")), None)
    pictures = {"without.gif": "none", "with.gif": with_norm}
    lines = {
        name: training_lines(record, arm, words)
        for name, arm in pictures.items()
        if arm in record.arms
    }
    top = _top([line for of_arm in lines.values() for line in of_arm])  # of both: they are compared
    for name, of_arm in lines.items():
        _write(of_arm, folder / name, words(of_arm[0].arm), words, top)
    compare(record, folder / "compare.gif", words)


def compare(record: Record, path: Path, words: Words) -> None:
    """Test accuracy: without, with running statistics, with recalibrated ones."""
    _write(accuracy_lines(record, words), path, words("test_accuracy"), words)


def _top(lines: Sequence[Line]) -> float:
    """How high the axes reach: 1 at least, and at most ten times the loss of guessing a tenth."""
    highest = max((p.value for line in lines for _, ps in line.seeds for p in ps), default=1)
    return max(1, min(highest * 1.03, TOP))


def _write(
    lines: Sequence[Line], path: Path, title: str, words: Words, top: float | None = None
) -> None:
    top = top or _top(lines)
    epochs = sorted({e.epoch for line in lines for cell in line.cells for e in cell.evaluations})
    every = -(-len(epochs) // FRAMES)
    kept = [*epochs[:-1:every], epochs[-1]]
    with mpl.rc_context({"font.family": fonts.family(words)}):
        frames = [_frame(lines, epoch, (epochs[-1], top), title, words) for epoch in kept]
    durations = [FRAME_MS] * (len(frames) - 1) + [LAST_MS]
    frames[0].save(
        path, save_all=True, append_images=frames[1:], duration=durations, loop=0, optimize=True
    )


def _frame(
    lines: Sequence[Line], until: float, ends: tuple[float, float], title: str, words: Words
) -> Image.Image:
    """The curves up to an epoch, in axes that stay; each line's latest value in the legend."""
    figure = Figure(figsize=(6.6, 4.4), dpi=DPI, layout="constrained")
    axes = figure.add_subplot()
    for line in lines:
        shown = [point for point in line.mean if point.epoch <= until]
        value = f"{shown[-1].value:.3f}" if shown else "    –"
        curves.plot(axes, line._replace(label=f"{value}  {line.label}"), until)
    last, top = ends
    axes.set(xlim=(0, max(last, 1) * 1.02), ylim=(0, top), xlabel=words("epoch"), title=title)
    curves.decorate(axes)
    # below the axes, where no curve runs
    figure.legend(loc="outside lower center", frameon=False, handlelength=3.2)
    buffer = BytesIO()
    figure.savefig(buffer, format="png")
    with Image.open(buffer) as picture:
        return picture.convert("RGB").quantize(64)
