"""The terminal: progress on standard error, the table on standard output."""

from typing import Self

import rich.console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeRemainingColumn
from rich.table import Table

from batchnorm.lab.record import CellConfig, Done, Evaluation, Record
from batchnorm.lab.summary import Spread, summarize
from batchnorm.views.words import ARM_NAMES


class Console:
    """A bar a cell on a terminal, a line an evaluation elsewhere, nothing when quiet."""

    def __init__(self, *, quiet: bool = False) -> None:
        self._console = rich.console.Console(stderr=True, quiet=quiet, highlight=False)
        self._bars = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=24),
            TextColumn("{task.fields[numbers]}"),
            TimeRemainingColumn(),
            console=self._console,
            disable=not self._console.is_terminal,
        )
        self._tasks: dict[CellConfig, TaskID] = {}

    def __enter__(self) -> Self:
        self._bars.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._bars.stop()

    def start(self, config: CellConfig, steps: int, step: int) -> None:
        self._tasks[config] = self._bars.add_task(
            _name(config), total=steps, completed=step, numbers=""
        )

    def step(
        self,
        config: CellConfig,
        step: int,
        loss: float,  # noqa: ARG002  # the running mean, shown at evaluations, is steadier
        examples_per_second: float | None,  # noqa: ARG002
    ) -> None:
        self._bars.update(self._tasks[config], completed=step)

    def evaluation(self, config: CellConfig, evaluation: Evaluation) -> None:
        numbers = _numbers(evaluation)
        if config in self._tasks:
            self._bars.update(self._tasks[config], numbers=numbers)
        if not self._console.is_terminal:
            self._console.print(f"{_name(config)}: {numbers}", soft_wrap=True)

    def finish(self, config: CellConfig, done: Done) -> None:
        if done.diverged:
            self._console.print(f"{_name(config)}: diverged; training stopped there")


def _name(config: CellConfig) -> str:
    return f"{ARM_NAMES[config.arm]}, seed {config.seed}"


def _numbers(evaluation: Evaluation) -> str:
    parts = [
        ("epoch", f"{evaluation.epoch:.1f}"),
        ("loss", _number(evaluation.train_loss)),
        ("train", _number(evaluation.train_accuracy)),
        ("test", _number(evaluation.test_accuracy)),
        ("recalibrated", _number(evaluation.recalibrated_test_accuracy)),
        ("examples/s", _number(evaluation.examples_per_second, 0)),
    ]
    return "  ".join(f"{name} {value}" for name, value in parts)


def _number(value: float | None, digits: int = 3) -> str:
    return "–" if value is None else f"{value:,.{digits}f}"


def table(record: Record) -> Table:
    """A row an arm: the last evaluation, mean ± standard deviation over the seeds."""
    found = Table(title="At the last evaluation")
    for column in (
        "",
        "train loss",
        "train acc.",
        "test acc.",
        "recalibrated",
        "examples/s",
        "parameters",
        "diverged",
    ):
        found.add_column(column, justify="right" if column else "left")
    for arm in summarize(record):
        found.add_row(
            ARM_NAMES[arm.arm],
            _spread(arm.train_loss),
            _spread(arm.train_accuracy),
            _spread(arm.test_accuracy),
            _spread(arm.recalibrated_test_accuracy),
            _spread(arm.examples_per_second, 0),
            f"{arm.parameters:,}",
            str(len(arm.diverged)),
        )
    return found


def _spread(spread: Spread, digits: int = 3) -> str:
    text = _number(spread.mean, digits)
    return text if spread.sd is None else f"{text} ± {_number(spread.sd, digits)}"


def show(record: Record) -> None:
    """Print the table, and where the files are."""
    console = rich.console.Console(highlight=False)
    console.print(table(record))
    console.print(f"The record and the pictures are in {record.folder}", soft_wrap=True)
