"""The lines of every picture: what each shows, what it is called, how it looks.

The colour is the arm. The dashes tell lines apart without colour: those of an arm, or, where an arm
has two lines, dashed with running statistics and solid with recalibrated ones.
"""

from collections.abc import Iterable
from typing import NamedTuple

from batchnorm.lab.record import Cell, Record
from batchnorm.lab.summary import Point, curve, mean_curve
from batchnorm.views.words import Words


class Style(NamedTuple):
    colour: str  # on white; after Okabe & Ito's palette, which colour-blind readers tell apart
    dark: str  # the same on near black
    dashes: tuple[int, ...]  # on and off, in points; () is a solid line


SOLID: tuple[int, ...] = ()
DASHED = (5, 3)

STYLES = {
    "none": Style("#000000", "#e8e8e8", (2, 2)),
    "batch": Style("#0072b2", "#56b4e9", SOLID),
    "batch-torch": Style("#a35200", "#f0a830", (8, 3)),
    "batch-note": Style("#c8432b", "#ff8a6c", (8, 3, 2, 3)),
    "group": Style("#00795a", "#2fd0a3", (4, 2)),
    "layer": Style("#a8497f", "#e79fc6", (1, 2)),
    "batch-noise": Style("#6a5acd", "#b3a9f5", (5, 2, 1, 2)),
    "batch-population": Style("#8a6d00", "#d9bd4a", (3, 3)),
    "ghost": Style("#4b5fa8", "#a9b8f5", (6, 2, 1, 2)),
    "ghost-16": Style("#a0307a", "#f39bd3", (9, 2, 2, 2)),
    "ghost-64": Style("#2f6f8f", "#8fd0ea", (1, 3)),
    "ghost-256": Style("#7a4a2a", "#dcb08c", (7, 4)),
    "renorm": Style("#6b6b00", "#d6d04a", (10, 2)),
    "estimator": Style("#00708a", "#5fd0e8", (7, 2, 2, 2)),
    "frozen": Style("#5c5c5c", "#b8b8b8", (1, 3)),
    "split": Style("#9a3f9a", "#e59ae5", (4, 2, 1, 2)),
    "sync": Style("#2f6b2f", "#8fd08f", (12, 3)),
}
QUANTITY_STYLES = {
    "train_loss": Style("#0072b2", "#56b4e9", SOLID),
    "train_accuracy": Style("#c8432b", "#ff8a6c", DASHED),
    "test_accuracy": Style("#00795a", "#2fd0a3", (8, 3, 2, 3)),
}


class Line(NamedTuple):
    """A quantity of an arm: a mean over its cells, and a thin line for each of several."""

    arm: str
    cells: list[Cell]
    quantity: str
    label: str
    style: Style

    @property
    def mean(self) -> list[Point]:
        return mean_curve(self.cells, self.quantity)

    @property
    def seeds(self) -> list[tuple[Cell, list[Point]]]:
        """Each cell's own curve."""
        return [(cell, curve(cell, self.quantity)) for cell in self.cells]


def accuracy_lines(record: Record, words: Words) -> list[Line]:
    """Test accuracy: an arm with batch norm has a line with each kind of statistics."""
    lines = []
    for arm in record.arms:
        cells, name, style = record.of(arm), arm_name(record, arm, words), STYLES[arm]
        if not recalibrated(cells):
            lines.append(Line(arm, cells, "test_accuracy", name, style))
            continue
        running, again = words("running line", arm=name), words("recalibrated line", arm=name)
        dashed, solid = style._replace(dashes=DASHED), style._replace(dashes=SOLID)
        lines.append(Line(arm, cells, "test_accuracy", running, dashed))
        lines.append(Line(arm, cells, "recalibrated_test_accuracy", again, solid))
    return lines


def quantity_lines(record: Record, quantity: str, words: Words) -> list[Line]:
    """One quantity, a line an arm that has it."""
    lines = [
        Line(arm, record.of(arm), quantity, arm_name(record, arm, words), STYLES[arm])
        for arm in record.arms
    ]
    return [line for line in lines if any(points for _, points in line.seeds)]


def training_lines(record: Record, arm: str, words: Words) -> list[Line]:
    """One arm as in the note's pictures: train loss, train accuracy, test accuracy."""
    cells = record.of(arm)
    return [
        Line(arm, cells, quantity, words(quantity), style)
        for quantity, style in QUANTITY_STYLES.items()
    ]


def arm_name(record: Record, arm: str, words: Words) -> str:
    """What an arm is called; one that diverged says so."""
    diverged = any(cell.diverged for cell in record.of(arm))
    return words("arm diverged", arm=words(arm)) if diverged else words(arm)


def recalibrated(cells: Iterable[Cell]) -> bool:
    """Whether the arm has batch statistics to recalibrate."""
    return any(curve(cell, "recalibrated_test_accuracy") for cell in cells)
