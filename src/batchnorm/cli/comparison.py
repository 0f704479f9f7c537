"""`compare` and `report`: a comparison made, and shown again."""

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from batchnorm.cli.arguments import DataDir, Events, Language, Threads, TrainImages, names
from batchnorm.cli.errors import said

Schedule = StrEnum(
    "Schedule", [("CONSTANT", "constant"), ("COSINE", "cosine"), ("ONE", "one-cycle")]
)
Optimizer = StrEnum("Optimizer", ["sgd", "adamw"])
Initialization = StrEnum(
    "Initialization",
    [("XAVIER", "xavier-uniform"), ("KAIMING", "kaiming-normal"), ("BUILT", "as-built")],
)
Shown = Annotated[Language, typer.Option(help="Of the pictures, the page and the table.")]


@said()
def compare(
    network: Annotated[
        str, typer.Option(help="lenet, mlp, resnet, or package.module:function.")
    ] = "lenet",
    data: Annotated[
        str, typer.Option(help="fashion-mnist, or package.module:function (loaders or tensors).")
    ] = "fashion-mnist",
    arms: Annotated[
        str,
        typer.Option(
            help="Of none, batch, batch-torch, batch-note, group, layer, batch-noise, "
            "batch-population, ghost, renorm, estimator, frozen, split, sync."
        ),
    ] = "none,batch",
    seeds: Annotated[int, typer.Option(help="How many seeds.")] = 1,
    seed: Annotated[int, typer.Option(help="The first seed.")] = 0,
    epochs: Annotated[int, typer.Option(help="Passes over the training images.")] = 10,
    batch_size: Annotated[int, typer.Option(help="Images a step.")] = 256,
    learning_rate: Annotated[float, typer.Option(help="The same for every arm.")] = 1.0,
    optimizer: Annotated[Optimizer, typer.Option()] = Optimizer.sgd,
    schedule: Annotated[Schedule, typer.Option(help="Of the learning rate.")] = Schedule.CONSTANT,
    momentum: Annotated[float, typer.Option(help="Of the optimizer sgd.")] = 0.0,
    weight_decay: Annotated[float, typer.Option()] = 0.0,
    initialization: Annotated[
        Initialization | None,
        typer.Option(help="xavier-uniform for lenet, as-built for others, unless said here."),
    ] = None,
    evaluations_per_epoch: Annotated[int, typer.Option(help="Points on the curves.")] = 2,
    recalibration_images: Annotated[
        int, typer.Option(help="Training images for the population statistics.")
    ] = 10_000,
    train_images: TrainImages = None,
    held_out_images: Annotated[
        int, typer.Option(help="Of the training images, the last N: measured, not trained on.")
    ] = 0,
    test_images: Annotated[int | None, typer.Option(help="The first N; all by default.")] = None,
    ghost_size: Annotated[
        int, typer.Option(help="Samples in a ghost batch of the arm ghost.")
    ] = 32,
    device: Annotated[str, typer.Option(help="cpu, cuda, cuda:1, mps.")] = "cpu",
    threads: Threads = None,
    data_dir: DataDir = None,
    out: Annotated[
        Path | None, typer.Option(help="Folder of the record; runs/compare-… by default.")
    ] = None,
    lang: Shown = Language.en,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="No progress.")] = False,
    tensorboard: Events = None,
) -> None:
    """Train with and without batch normalization, record it, show it.

    The same command goes on where it was interrupted, and trains nothing that is finished.
    """
    from batchnorm import comparison
    from batchnorm.views import console, events
    from batchnorm.views.words import Words

    if tensorboard is not None:
        events.check()
    result = comparison.compare(
        network,
        names(arms) or [],
        seeds=seeds,
        seed=seed,
        epochs=epochs,
        out=out,
        data=data,
        data_dir=data_dir,
        threads=threads,
        initialization=None if initialization is None else initialization.value,
        language=lang.value,
        progress=console.Console(Words(lang.value), quiet=quiet),
        batch_size=batch_size,
        learning_rate=learning_rate,
        optimizer=optimizer.value,
        schedule=schedule.value,
        momentum=momentum,
        weight_decay=weight_decay,
        evaluations_per_epoch=evaluations_per_epoch,
        recalibration_images=recalibration_images,
        train_images=train_images,
        held_out_images=held_out_images,
        test_images=test_images,
        ghost_size=ghost_size,
        device=device,
    )
    if tensorboard is not None:
        events.of_record(result.record, tensorboard)
    console.show(result.record, result.words)


@said()
def report(
    folder: Annotated[Path, typer.Argument(help="The folder of a comparison, or of studies.")],
    lang: Shown = Language.en,
    tensorboard: Events = None,
) -> None:
    """Make the pictures, the tables and the page of a record again."""
    from batchnorm import comparison
    from batchnorm.lab import results
    from batchnorm.views import console, events, studies_page
    from batchnorm.views.words import Words

    if (folder / results.FOLDER).is_dir():
        found = studies_page.report(folder, Words(lang.value))
        if tensorboard is not None:
            events.of_results(found, tensorboard)
        typer.echo(folder / studies_page.PAGE)
        return
    result = comparison.report(folder, language=lang.value)
    if tensorboard is not None:
        events.of_record(result.record, tensorboard)
    console.show(result.record, result.words)
