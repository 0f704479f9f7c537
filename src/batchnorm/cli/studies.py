"""`study NAME`: one claim tested, or all."""

from pathlib import Path
from typing import Annotated

import typer

from batchnorm.cli.arguments import DataDir, Events, Language, Threads, TrainImages
from batchnorm.cli.errors import said
from batchnorm.errors import BatchNormError
from batchnorm.lab import studies as library

study = typer.Typer(no_args_is_help=True)


@study.callback(invoke_without_command=True)
def studies(
    listed: Annotated[bool, typer.Option("--list", help="The studies and what they ask.")] = False,
) -> None:
    """Test one claim, with error bars; `all` tests the lot."""
    if listed:
        for name, asks in library.NAMES.items():
            typer.echo(f"{name:16}  {asks}")


def _add_study(command: str, names: list[str], asks: str) -> None:
    """`batchnorm study NAME`: the same options for each."""

    @study.command(name=command, help=asks)
    @said()
    def run(
        quick: Annotated[
            bool, typer.Option("--quick", help="A tenth of it: `all` in ten minutes.")
        ] = False,
        full: Annotated[bool, typer.Option("--full", help="All images: overnight.")] = False,
        out: Annotated[
            Path | None,
            typer.Option(help="Folder of the record; runs/studies by default, shared by all."),
        ] = None,
        seeds: Annotated[
            int | None, typer.Option(help="How many; 10 by default, below 6 only exploratory.")
        ] = None,
        dry_run: Annotated[
            bool, typer.Option("--dry-run", help="Say what would be run, and how long.")
        ] = False,
        processes: Annotated[
            int | None, typer.Option(help="At once, a thread each; one a core by default.")
        ] = None,
        cluster: Annotated[
            str | None, typer.Option(help="Address of a Dask scheduler, such as tcp://host:8786.")
        ] = None,
        budget: Annotated[
            float | None,
            typer.Option(help="Minutes; a longer plan is refused. 10, 60, full 720."),
        ] = None,
        data: Annotated[
            str | None, typer.Option(help="In place of fashion-mnist: package.module:function.")
        ] = None,
        data_dir: DataDir = None,
        lang: Annotated[Language, typer.Option(help="Of what is printed.")] = Language.en,
        tensorboard: Events = None,
    ) -> None:
        from batchnorm import studies as runner

        if quick and full:
            raise BatchNormError("the study got --quick and --full. Choose one.")
        size = "quick" if quick else "full" if full else "normal"
        runner.run(
            runner.Request(
                names, size, out, seeds, dry_run, processes, cluster, budget, data, data_dir,
                lang.value, tensorboard,
            )
        )  # fmt: skip


for _name, _asks in library.NAMES.items():
    _add_study(_name, [_name], _asks)
_add_study("all", list(library.NAMES), "All of them; cells that several ask for are run once.")


@study.command()
@said()
def recalibration(
    seeds: Annotated[int, typer.Option(help="How many seeds.")] = 10,
    epochs: Annotated[int, typer.Option(help="Passes over the training images.")] = 10,
    train_images: TrainImages = None,
    threads: Threads = None,
    data_dir: DataDir = None,
    data: Annotated[
        str, typer.Option(help="fashion-mnist, or package.module:function (tensors).")
    ] = "fashion-mnist",
    out: Annotated[Path, typer.Option(help="Folder of the record.")] = Path(
        "runs/study-recalibration"
    ),
    lang: Annotated[Language, typer.Option(help="Of the picture and the table.")] = Language.en,
) -> None:
    """Same weights, same images, only the BN statistics differ: what recalibration mends.

    The same command goes on with the seeds that are missing.
    """
    from batchnorm import studies as runner

    runner.recalibration(
        seeds=seeds,
        epochs=epochs,
        train_images=train_images,
        threads=threads,
        data=data,
        data_dir=data_dir,
        out=out,
        language=lang.value,
    )
