"""TensorBoard's event files, made from the record as every other view is: a run a cell.

    DIR/<arm>/seed-<n>                    of a comparison
    DIR/<study>/<arm>/<place>/seed-<n>    of a study

Where a study has no grid there is no place.
"""

from collections.abc import Iterator, Sequence
from datetime import datetime
from pathlib import Path
from typing import NamedTuple

from batchnorm.errors import BatchNormError, lacking
from batchnorm.lab.record import Cell, Record
from batchnorm.lab.results import Result
from batchnorm.lab.summary import QUANTITIES
from batchnorm.views import study_charts
from batchnorm.views.words import Words

WRITTEN = "events.out.tfevents.*"


class Scalar(NamedTuple):
    name: str
    value: float
    step: int
    when: float | None  # since 1970; TensorBoard's relative axis counts from a run's first


def check() -> None:
    """Say what is missing before hours of training, not after them."""
    try:
        import tensorboard  # noqa: F401, PLC0415  # an extra
    except ModuleNotFoundError as missing:
        raise BatchNormError(lacking("an event file", missing)) from missing


def of_record(record: Record, folder: Path) -> None:
    """The curves of a comparison, over its steps; times are seconds of training."""
    for cell in record.cells:
        _write(folder / cell.config.arm / f"seed-{cell.config.seed}", _of_cell(cell))


def of_results(found: Sequence[Result], folder: Path) -> None:
    """The curves of studies: over steps where they have them, else in the order of measurement."""
    words = Words()
    for result in found:
        for cell in result["cells"]:
            place = study_charts.place(cell["point"], words).replace(" ", "-").replace("/", "-")
            run = folder / result["name"] / cell["arm"] / place / f"seed-{cell['seed']}"
            _write(run, _of_curves(cell["curves"]))


def _of_cell(cell: Cell) -> Iterator[Scalar]:
    began = datetime.fromisoformat(cell.header.environment["started"]).timestamp()
    for evaluation in cell.evaluations:
        for name in (*QUANTITIES, "held_out_accuracy"):
            if (value := getattr(evaluation, name)) is not None:
                yield Scalar(name, value, evaluation.step, began + evaluation.seconds)


def _of_curves(curves: dict[str, list[float | None]]) -> Iterator[Scalar]:
    axis = next((curves[name] for name in ("step", "batch_size", "depth") if name in curves), None)
    seconds = curves.get("seconds")
    for name in sorted(curves.keys() - {*study_charts.AXES, "seconds"}):
        for order, value in enumerate(curves[name]):
            if value is not None:
                step = order if axis is None else int(axis[order] or 0)
                when = None if seconds is None else seconds[order]
                yield Scalar(name.replace(" ", "-"), value, step, when)


def _write(run: Path, scalars: Iterator[Scalar]) -> None:
    """In the place of what an earlier call wrote there: TensorBoard would show both."""
    check()
    from torch.utils.tensorboard import SummaryWriter  # noqa: PLC0415  # an extra

    for old in run.glob(WRITTEN):
        old.unlink()
    with SummaryWriter(str(run)) as writer:
        for scalar in scalars:
            writer.add_scalar(scalar.name, scalar.value, scalar.step, scalar.when)
