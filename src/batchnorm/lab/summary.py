"""From a record to the numbers that tables, verdicts and `summary.json` are made of."""

import csv
import dataclasses
import json
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

from batchnorm.lab.record import FORMAT, Cell, Evaluation, Record


@dataclass(frozen=True)
class Spread:
    """One quantity over the seeds of an arm; cells without it (diverged) are left out."""

    values: list[float]

    @property
    def mean(self) -> float | None:
        return statistics.fmean(self.values) if self.values else None

    @property
    def sd(self) -> float | None:
        """Sample standard deviation; None below two values."""
        return statistics.stdev(self.values) if len(self.values) > 1 else None

    def as_dict(self) -> dict[str, Any]:
        return {"mean": self.mean, "sd": self.sd, "values": self.values}


@dataclass(frozen=True)
class ArmSummary:
    """The last evaluation of every seed of an arm."""

    arm: str
    seeds: list[int]
    diverged: list[int]  # the seeds whose training diverged
    unfinished: list[int]  # the seeds whose cell has no last line
    parameters: int
    train_loss: Spread
    train_accuracy: Spread
    test_loss: Spread
    test_accuracy: Spread
    recalibrated_test_loss: Spread
    recalibrated_test_accuracy: Spread
    seconds: Spread
    examples_per_second: Spread


QUANTITIES = (
    "train_loss",
    "train_accuracy",
    "test_loss",
    "test_accuracy",
    "recalibrated_test_loss",
    "recalibrated_test_accuracy",
)


def summarize(record: Record) -> list[ArmSummary]:
    """An account of each arm, in the record's order."""
    return [_summarize_arm(arm, record.of(arm)) for arm in record.arms]


def _summarize_arm(arm: str, cells: list[Cell]) -> ArmSummary:
    def spread(value: Callable[[Cell], float | None]) -> Spread:
        return Spread([v for v in map(value, cells) if v is not None])

    def last(name: str) -> Spread:
        return spread(lambda cell: getattr(cell.last, name))

    return ArmSummary(
        arm=arm,
        seeds=[cell.config.seed for cell in cells],
        diverged=[cell.config.seed for cell in cells if cell.diverged],
        unfinished=[cell.config.seed for cell in cells if cell.done is None],
        parameters=cells[0].header.parameters,
        examples_per_second=spread(_speed),
        **{name: last(name) for name in (*QUANTITIES, "seconds")},
    )


def _speed(cell: Cell) -> float | None:
    """Examples per second over the whole cell, of training alone."""
    examples = sum(
        after.examples_per_second * (after.seconds - before.seconds)
        for before, after in pairwise(cell.evaluations)
        if after.examples_per_second is not None
    )
    return examples / cell.last.seconds if cell.last.seconds > 0 else None


class Point(NamedTuple):
    """A value at an evaluation, on both axes against which curves are drawn."""

    epoch: float
    seconds: float
    value: float


def curve(cell: Cell, quantity: str) -> list[Point]:
    """One cell's values of a quantity, without the evaluations that lack it."""
    return [
        Point(evaluation.epoch, evaluation.seconds, value)
        for evaluation in cell.evaluations
        if (value := getattr(evaluation, quantity)) is not None
    ]


def mean_curve(cells: Sequence[Cell], quantity: str) -> list[Point]:
    """The mean over cells, at the evaluations that every one of them has.

    It ends where the first of them diverged: a mean over the others would flatter the arm.
    """
    by_epoch: dict[float, list[Point]] = {}
    for cell in cells:
        for point in curve(cell, quantity):
            by_epoch.setdefault(point.epoch, []).append(point)
    return [
        Point(*map(statistics.fmean, zip(*points, strict=True)))
        for _, points in sorted(by_epoch.items())
        if len(points) == len(cells)
    ]


def write_summary(record: Record, path: Path) -> None:
    """`summary.json`: the configuration that the cells share, where they ran, each arm's numbers."""
    first = record.cells[0].header
    arms = {}
    for summary in summarize(record):
        content = {f.name: getattr(summary, f.name) for f in dataclasses.fields(summary)}
        arms[content.pop("arm")] = {
            k: v.as_dict() if isinstance(v, Spread) else v for k, v in content.items()
        }
    content = {
        "format": FORMAT,
        "config": first.config.without_arm_and_seed(),
        "environment": first.environment,
        "arms": arms,
    }
    path.write_text(json.dumps(content, indent=2, allow_nan=False) + "\n", encoding="utf-8")


def write_table(record: Record, path: Path) -> None:
    """`table.csv`: a row per evaluation, without the statistics inside the layers."""
    names = [f.name for f in dataclasses.fields(Evaluation) if f.name != "layers"]
    with path.open("w", encoding="utf-8", newline="") as file:
        rows = csv.writer(file)
        rows.writerow(["arm", "seed", *names])
        for cell in record.cells:
            for evaluation in cell.evaluations:
                numbers = [getattr(evaluation, name) for name in names]
                rows.writerow([cell.config.arm, cell.config.seed, *numbers])
