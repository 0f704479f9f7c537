"""The studies: run one, show it."""

from collections.abc import Sequence
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

from batchnorm.errors import BatchNormError
from batchnorm.lab import grid
from batchnorm.lab.data import Images, load
from batchnorm.lab.studies import recalibration as rescue
from batchnorm.lab.studies.recalibration import Rescue, Study, StudyConfig
from batchnorm.lab.summary import Spread
from batchnorm.views import dumbbell, fonts
from batchnorm.views.verdict import number
from batchnorm.views.words import Words


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
    words, console = Words(language), Console(highlight=False)
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
    errors = Console(stderr=True, highlight=False)

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
