"""The picture of the study of recalibration: two marks a condition, joined by a line."""

import csv
import statistics
from pathlib import Path

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from batchnorm.lab.studies.recalibration import Rescue, Study
from batchnorm.views import fonts
from batchnorm.views.words import Words

BEFORE, AFTER = "#c8432b", "#0072b2"


def draw(study: Study, words: Words) -> Figure:
    """A row a condition: each seed small, the means large and joined, with their numbers."""
    conditions = study.conditions
    with mpl.rc_context({"font.family": fonts.family(words)}):
        figure = Figure(figsize=(8.6, 1.3 + 0.42 * len(conditions)), layout="constrained")
        axes = figure.add_subplot()
        for row, condition in enumerate(conditions):
            _draw_row(axes, row, study.of(condition))
        axes.set_yticks(range(len(conditions)), [words(f"study {name}") for name in conditions])
        axes.invert_yaxis()
        axes.set_xlim(0, 1)
        axes.set_xlabel(words("test_accuracy"))
        axes.set_title(words("study title"), loc="left")
        axes.grid(axis="x", alpha=0.25)
        axes.spines[["top", "right", "left"]].set_visible(False)
        axes.tick_params(axis="y", length=0)
        figure.legend(
            *axes.get_legend_handles_labels(), loc="outside lower center", ncols=2, frameon=False
        )
        for handle, key in zip(
            figure.legends[0].get_texts(), ("study before", "study after"), strict=True
        ):
            handle.set_text(words(key))
    return figure


def _draw_row(axes: Axes, row: int, rescues: list[Rescue]) -> None:
    """The means on the row with their numbers at the outer ends, the seeds a little below."""
    before, after = [r.before for r in rescues], [r.after for r in rescues]
    means = statistics.fmean(before), statistics.fmean(after)
    axes.plot(means, [row, row], color="0.55", linewidth=2.5, zorder=1)
    for values, mean, colour, face in (
        (before, means[0], BEFORE, "white"),
        (after, means[1], AFTER, AFTER),
    ):
        below = [row + 0.27] * len(values)
        axes.scatter(values, below, s=12, color=colour, alpha=0.5, linewidths=0)
        axes.scatter(
            mean, row, s=80, edgecolors=colour, facecolors=face, linewidths=2, zorder=3,
            label=colour if row == 0 else None,
        )  # fmt: skip
    for mean, offset, side in ((min(means), -0.018, "right"), (max(means), 0.018, "left")):
        axes.text(mean + offset, row, f"{mean:.3f}", ha=side, va="center", fontsize="small")


def save(study: Study, folder: Path, words: Words) -> None:
    """`dumbbell.svg`, the same bytes for the same record, and `table.csv`."""
    with mpl.rc_context({"svg.hashsalt": "batchnorm"}):
        draw(study, words).savefig(folder / "dumbbell.svg", metadata={"Date": None})
    with (folder / "table.csv").open("w", encoding="utf-8", newline="") as file:
        rows = csv.writer(file)
        rows.writerow(["condition", "seed", "before", "after"])
        rows.writerows([r.condition, r.seed, r.before, r.after] for r in study.rescues)
