"""The studies: plan, run, judge, show."""

import contextlib
import dataclasses
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from rich.table import Table

from batchnorm.errors import BatchNormError
from batchnorm.lab import engine, grid, results
from batchnorm.lab import studies as library
from batchnorm.lab.data import Images, load
from batchnorm.lab.engine import Plan, Workers
from batchnorm.lab.results import Result
from batchnorm.lab.studies import recalibration as rescue
from batchnorm.lab.studies.recalibration import Rescue, Study, StudyConfig
from batchnorm.lab.summary import Spread
from batchnorm.views import dumbbell, events, fonts, grids, studies_page
from batchnorm.views.terminal import terminal
from batchnorm.views.verdict import number
from batchnorm.views.words import Words

BUDGETS = {"quick": 10.0, "normal": 60.0, "full": 12 * 60.0}  # minutes


@dataclasses.dataclass(frozen=True)
class Request:
    """What the command was asked for."""

    names: Sequence[str]
    size: str = "normal"
    out: Path | None = None
    seeds: int | None = None
    dry_run: bool = False
    processes: int | None = None
    cluster: str | None = None
    budget: float | None = None  # minutes
    data: str | None = None
    data_dir: Path | None = None
    language: str = "en"
    tensorboard: Path | None = None  # where event files are wanted

    @property
    def folder(self) -> Path:
        """One for all studies of a size: they share cells."""
        suffix = "" if self.size == "normal" else f"-{self.size}"
        return self.out if self.out is not None else Path("runs") / f"studies{suffix}"

    @property
    def minutes(self) -> float:
        return BUDGETS[self.size] if self.budget is None else self.budget


class Judged(list[Result]):
    """The results of studies; in a notebook, their verdicts as a table."""

    def __init__(self, found: Sequence[Result], folder: Path, words: Words) -> None:
        super().__init__(found)
        self.folder, self.words = folder, words

    def _repr_html_(self) -> str:
        return studies_page.inline(self, self.folder, self.words)


def run(request: Request) -> Judged:
    """Plan the studies, run what is not done, judge them, write and print what was found.

    Raises:
        BatchNormError: an unknown study, a number out of range, a plan over its budget, cells that
            failed each time.
    """
    if request.tensorboard is not None:
        events.check()
    words, errors = Words(request.language), terminal(stderr=True)
    found = [library.find(name) for name in request.names]
    planned = {s.name: s.cells(request.size, seeds=request.seeds, data=request.data) for s in found}
    processes = engine.default_processes() if request.processes is None else request.processes
    if processes < 1:
        raise BatchNormError(f"processes is {processes} and should be a whole number from 1.")
    workers = Workers(processes, request.cluster)
    with _alone(request):
        configs = [each.config for cells in planned.values() for each in cells]
        if not errors.is_terminal:  # where no status is drawn
            errors.print(words("timing"))
        with errors.status(words("timing")):
            plan = engine.plan(configs, request.folder, request.data_dir, workers)
        for study in found:
            power = results.power(study, len({each.seed for each in planned[study.name]}))
            errors.print(grids.power(study.name, power, words), soft_wrap=True)
        errors.print(grids.plan(plan, words), soft_wrap=True)
        if request.dry_run:
            return Judged([], request.folder, words)
        _refuse_over_budget(plan, request)
        with grids.Board(words) as board:
            lost = engine.run(plan, request.folder, request.data_dir, workers, board)
        judged = [results.conclude(s, request.size, planned[s.name], request.folder) for s in found]
        results.write(judged, request.folder)
        studies_page.report(request.folder, words)
        if request.tensorboard is not None:
            events.of_results(judged, request.tensorboard)
    console = terminal()
    for result in judged:
        console.print(grids.verdicts(result, words))
    console.print(words("results are in", folder=request.folder), soft_wrap=True, markup=False)
    if lost:
        raise BatchNormError(
            f"{len(lost)} cells failed {engine.ATTEMPTS} times; the verdicts are without them. "
            f"{request.folder / engine.FAILURES} says why; the same command tries them again."
        )
    return Judged(judged, request.folder, words)


@contextlib.contextmanager
def _alone(request: Request) -> Iterator[None]:
    """A dry run makes no folder."""
    if request.dry_run:
        yield
        return
    with grid.alone_in(request.folder):
        yield


def _refuse_over_budget(plan: Plan, request: Request) -> None:
    if plan.seconds > 60 * request.minutes:
        raise BatchNormError(
            f"the plan takes about {plan.seconds / 60:.0f} minutes, and the budget of a "
            f"{request.size} run is {request.minutes:g}. Ask for less with --quick or --seeds, for "
            "more processes, or for a larger --budget."
        )


def recalibration(
    *,
    seeds: int,
    epochs: int,
    train_images: int | None,
    threads: int | None,
    data: str,
    data_dir: Path | None,
    out: Path,
    language: str,
) -> Study:
    """Measure the seeds that the folder lacks, draw `dumbbell.svg`, print the table."""
    words, console = Words(language), terminal()
    fonts.family(words)  # said before the training, not after it
    for name, value in (("seeds", seeds), ("epochs", epochs)):
        if value < 1:
            raise BatchNormError(f"{name} is {value} and should be a whole number from 1.")
    images = load(data, data_dir)
    if not isinstance(images, Images):
        raise BatchNormError(
            f"the study wants images as tensors, and {data} gives loaders. Return four tensors."
        )
    config = StudyConfig(
        epochs=epochs,
        train_images=train_images,
        threads=threads if threads is not None else torch.get_num_threads(),
    )
    errors = terminal(stderr=True)

    def told(seed: int, rescues: Sequence[Rescue]) -> None:
        numbers = ", ".join(f"{r.condition} {r.before:.3f} → {r.after:.3f}" for r in rescues)
        errors.print(words("study seed", seed=seed, numbers=numbers), soft_wrap=True)

    with grid.alone_in(out):
        rescue.run(config, range(seeds), images, out, told)
        found = rescue.read(out)
        dumbbell.save(found, out, words)
    console.print(table(found, words))
    console.print(words("study files are in", folder=out), soft_wrap=True, markup=False)
    return found


def table(found: Study, words: Words) -> Table:
    """A row a condition: mean ± standard deviation over the seeds."""
    shown = Table(title=words("study title"))
    shown.add_column(words("study condition"))
    for key in ("study before", "study after"):
        shown.add_column(words(key), justify="right")
    for condition in found.conditions:
        rescues = found.of(condition)
        before, after = Spread([r.before for r in rescues]), Spread([r.after for r in rescues])
        shown.add_row(words(f"study {condition}"), number(before), number(after))
    return shown
