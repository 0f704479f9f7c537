"""The terminal: progress on standard error, the table on standard output."""

import time
from typing import TYPE_CHECKING, Self

from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeRemainingColumn
from rich.table import Column, Table

from batchnorm.lab.record import CellConfig, Done, Evaluation, Record
from batchnorm.lab.summary import ArmSummary, summarize
from batchnorm.views.terminal import terminal
from batchnorm.views.verdict import figure, number, verdict
from batchnorm.views.words import Words

if TYPE_CHECKING:
    from collections.abc import Callable

    from IPython.display import DisplayHandle

EVERY = 10  # steps between two looks at the numbers of a bar
NOTEBOOK_SECONDS = 0.25  # between two drawings


class Console:
    """A bar a cell on a terminal and in a notebook, a line an evaluation elsewhere."""

    def __init__(self, words: Words | None = None, *, quiet: bool = False) -> None:
        self._words = words or Words()
        self._console = terminal(stderr=True, quiet=quiet)
        self._notebook: DisplayHandle | None = None
        self._drawn = 0.0
        in_notebook = self._console.is_jupyter
        self._live = not quiet and (self._console.is_terminal or in_notebook)
        self._bars = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=None, table_column=Column(min_width=3, ratio=1)),
            TextColumn("{task.fields[numbers]}"),
            TimeRemainingColumn(compact=True, table_column=Column(min_width=5, no_wrap=True)),
            expand=True,
            console=self._console,
            disable=in_notebook or not self._live,  # a notebook's cell is drawn by IPython
        )
        self._tasks: dict[CellConfig, TaskID] = {}
        self._evaluations: dict[CellConfig, Evaluation] = {}
        self._steps_per_epoch: dict[CellConfig, int] = {}
        self._latest: dict[CellConfig, tuple[float, float, float | None]] = {}

    def __enter__(self) -> Self:
        self._bars.start()
        if self._live and self._console.is_jupyter:
            from IPython.display import display  # noqa: PLC0415  # is there, in a notebook

            self._notebook = display(self._bars, display_id=True)
        return self

    def __exit__(self, *exception: object) -> None:
        self._bars.stop()
        if self._notebook is not None:
            self._notebook.update(self._bars)

    def start(self, config: CellConfig, steps: int, step: int) -> None:
        self._tasks[config] = self._bars.add_task(
            f"{config.arm}, {self._words('seed')} {config.seed}",  # short: a bar has 80 columns
            total=steps,
            completed=step,
            numbers="",
        )
        self._steps_per_epoch[config] = steps // config.epochs

    def step(
        self, config: CellConfig, step: int, loss: float, accuracy: float, speed: float | None
    ) -> None:
        self._latest[config] = (loss, accuracy, speed)
        if self._live and step % EVERY == 0:
            self._advance(config, step)

    def evaluation(self, config: CellConfig, evaluation: Evaluation) -> None:
        self._evaluations[config] = evaluation
        if self._live:
            if config in self._latest:
                self._advance(config, evaluation.step)
        else:
            line = f"{self._name(config)}: {self._whole(evaluation)}"
            self._console.print(line, soft_wrap=True)

    def _advance(self, config: CellConfig, step: int) -> None:
        epoch = f"{step / self._steps_per_epoch[config]:.1f}/{config.epochs}"
        numbers = f"{epoch} {self._moving(config, *self._latest[config])}"
        self._bars.update(self._tasks[config], completed=step, numbers=numbers)
        if self._notebook is not None and time.monotonic() - self._drawn > NOTEBOOK_SECONDS:
            self._drawn = time.monotonic()
            self._notebook.update(self._bars)

    def finish(self, config: CellConfig, done: Done) -> None:
        if done.diverged:
            self._console.print(self._words("cell diverged", cell=self._name(config)))

    def _name(self, config: CellConfig) -> str:
        return self._words("cell", arm=self._words(config.arm), seed=config.seed)

    def _moving(self, config: CellConfig, loss: float, accuracy: float, speed: float | None) -> str:
        """For a bar: the epoch so far, then the last evaluation."""
        parts = [
            f"{self._words('loss')} {_short(loss)}",
            f"{self._words('train')} {_short(accuracy)}",
        ]
        if evaluation := self._evaluations.get(config):
            tests = (evaluation.test_accuracy, evaluation.recalibrated_test_accuracy)
            parts.append(" ".join([self._words("test"), *map(_short, filter(None, tests))]))
        if speed:
            parts.append(f"{speed / 1000:.0f}k/s")
        return " ".join(parts)

    def _whole(self, evaluation: Evaluation) -> str:
        words = self._words
        parts = [
            (words("epoch"), f"{evaluation.epoch:.1f}"),
            (words("loss"), figure(evaluation.train_loss)),
            (words("train"), figure(evaluation.train_accuracy)),
            (words("test"), figure(evaluation.test_accuracy)),
            (words("recalibrated"), figure(evaluation.recalibrated_test_accuracy)),
            (words("examples_per_second"), figure(evaluation.examples_per_second, 0)),
        ]
        return "  ".join(f"{name} {value}" for name, value in parts)


def _short(value: float) -> str:
    """Three digits, without the zero before the point."""
    return f"{value:.3f}".removeprefix("0")


def table(record: Record, words: Words) -> Table:
    """A row an arm: the last evaluation, mean ± standard deviation over the seeds."""
    found = Table(title=words("at the end"))
    columns: dict[str, Callable[[ArmSummary], str]] = {
        "": lambda arm: words(arm.arm),
        "train loss short": lambda arm: number(arm.train_loss),
        "train accuracy short": lambda arm: number(arm.train_accuracy),
        "test accuracy short": lambda arm: number(arm.test_accuracy),
        "recalibrated short": lambda arm: number(arm.recalibrated_test_accuracy),
        "examples short": lambda arm: number(arm.examples_per_second, 0),
        "parameters short": lambda arm: f"{arm.parameters:,}",
    }
    summaries = summarize(record)
    if any(arm.diverged for arm in summaries):
        columns["diverged"] = lambda arm: f"{len(arm.diverged)}/{len(arm.seeds)}"
    for key in columns:
        found.add_column(
            words(key) if key else "", justify="right" if key else "left", overflow="fold"
        )
    for arm in summaries:
        found.add_row(*(cell(arm) for cell in columns.values()))
    return found


def show(record: Record, words: Words) -> None:
    """Print the verdict, the table, and where the files are."""
    console = terminal()
    console.print(table(record, words))
    for sentence in verdict(record, words):
        console.print(sentence, markup=False)
    console.print(words("files are in", folder=record.folder), soft_wrap=True, markup=False)
