"""The terminal of a study: what is planned, how far it is, what was found."""

import time
from typing import Any, Self

from rich.progress import (
    BarColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Table

from batchnorm.lab.engine import Plan
from batchnorm.lab.results import Result
from batchnorm.lab.study import Config
from batchnorm.views.terminal import terminal
from batchnorm.views.words import Words

LINES = 10  # of progress, where there is no terminal to draw a bar on


class Board:
    """One bar for the whole grid, by expected seconds; a few lines where there is no terminal."""

    def __init__(self, words: Words) -> None:
        self._words = words
        self._console = terminal(stderr=True)
        self._bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            TextColumn("{task.fields[done]}/{task.fields[cells]}"),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            console=self._console,
            disable=not self._console.is_terminal,
        )
        self._task = self._bar.add_task(words("cells"), total=None, done=0, cells=0)
        self._cells, self._done, self._expected, self._spent = 0, 0, 0.0, 0.0
        self._started = time.monotonic()

    def __enter__(self) -> Self:
        self._bar.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._bar.stop()

    def start(self, cells: int, seconds: float) -> None:
        self._cells, self._expected, self._started = cells, seconds, time.monotonic()
        self._bar.update(self._task, total=seconds, cells=cells)

    def finish(self, config: Config, seconds: float) -> None:  # noqa: ARG002  # not by its name
        self._done += 1
        self._spent += seconds
        self._bar.update(self._task, advance=seconds, done=self._done)
        every = max(1, self._cells // LINES)
        if not self._console.is_terminal and (self._done % every == 0 or self._done == self._cells):
            self._console.print(self._line(), soft_wrap=True)

    def failed(self, config: Config, error: str, attempt: int) -> None:
        said = self._words("cell failed", hash=config.hash, attempt=attempt, error=error)
        self._console.print(said, soft_wrap=True, markup=False)

    def _line(self) -> str:
        """How far, and how long it should still take: as long as what is done took, in proportion."""
        elapsed = time.monotonic() - self._started
        left = elapsed * max(self._expected - self._spent, 0) / self._spent if self._spent else 0
        return self._words(
            "progress", done=self._done, cells=self._cells, elapsed=elapsed / 60, left=left / 60
        )


def power(name: str, found: dict[str, float | None], words: Words) -> str:
    """What so many seeds can find, said beforehand."""
    key = "finds nothing" if found["detectable"] is None else "finds"
    return words(key, name=name, **found)


def plan(planned: Plan, words: Words) -> str:
    """How many cells, and how long they should take."""
    return words(
        "plan",
        waiting=len(planned.waiting),
        done=planned.done,
        minutes=planned.seconds / 60,
        workers=planned.workers,
    )


def verdicts(result: Result, words: Words) -> Table:
    """A row a question: the claim, the verdict, and the numbers it rests on."""
    shown = Table(title=result["claim"][words.language], title_justify="left")
    shown.add_column(words("question"), ratio=1)
    for key in ("verdict", "effect", "interval", "p"):
        shown.add_column(words(key), justify="left" if key == "verdict" else "right")
    for question in result["questions"]:
        shown.add_row(question["claim"][words.language], *numbers(question, words))
    return shown


def numbers(question: dict[str, Any], words: Words) -> tuple[str, str, str, str]:
    verdict = words(question["verdict"])
    if question["exploratory"]:
        verdict = words("few seeds", verdict=verdict)
    interval = question["interval"]
    return (
        verdict,
        short(question["effect"]),
        "–" if interval is None else f"{short(interval[0])} … {short(interval[1])}",
        short(question["p_adjusted"]),
    )


def short(value: float | None) -> str:
    return "–" if value is None else f"{value:.3g}"
