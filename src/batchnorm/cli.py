"""The command: parse, call, print."""

import contextlib
import errno
import signal
import sys
from collections.abc import Iterator
from enum import StrEnum
from pathlib import Path
from typing import Annotated

from batchnorm.errors import BatchNormError, lacking

try:
    import typer
    from rich.console import Console
except ModuleNotFoundError as missing:
    raise SystemExit(f"batchnorm: {lacking('the command', missing)}") from missing

from batchnorm.lab import studies as library

app = typer.Typer(
    name="batchnorm",
    help="Batch normalization in PyTorch: train with and without, and see the difference.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

Language = StrEnum("Language", ["en", "zh"])
Schedule = StrEnum(
    "Schedule", [("CONSTANT", "constant"), ("COSINE", "cosine"), ("ONE", "one-cycle")]
)
Optimizer = StrEnum("Optimizer", ["sgd", "adamw"])
Initialization = StrEnum(
    "Initialization",
    [("XAVIER", "xavier-uniform"), ("KAIMING", "kaiming-normal"), ("BUILT", "as-built")],
)

Events = Annotated[
    Path | None, typer.Option(help="Write TensorBoard's event files there, a run a cell.")
]


def _version(asked: bool) -> None:
    if not asked:
        return
    from batchnorm.lab.environment import environment  # noqa: PLC0415  # not for --help

    for name, value in environment().items():
        if name != "started":
            typer.echo(f"{name}: {value}")
    raise typer.Exit


@app.callback()
def batchnorm(
    version: Annotated[
        bool,
        typer.Option(
            "--version",
            callback=_version,
            is_eager=True,
            help="This package's, and what it runs on.",
        ),
    ] = False,
) -> None:
    """Batch normalization in PyTorch: train with and without, and see the difference."""


@app.command()
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
    train_images: Annotated[int | None, typer.Option(help="The first N; all by default.")] = None,
    held_out_images: Annotated[
        int, typer.Option(help="Of the training images, the last N: measured, not trained on.")
    ] = 0,
    test_images: Annotated[int | None, typer.Option(help="The first N; all by default.")] = None,
    ghost_size: Annotated[
        int, typer.Option(help="Samples in a ghost batch of the arm ghost.")
    ] = 32,
    device: Annotated[str, typer.Option(help="cpu, cuda, cuda:1, mps.")] = "cpu",
    threads: Annotated[
        int | None, typer.Option(help="Of torch; part of the configuration.")
    ] = None,
    data_dir: Annotated[
        Path | None, typer.Option(help="Where Fashion-MNIST is looked for first.")
    ] = None,
    out: Annotated[
        Path | None, typer.Option(help="Folder of the record; runs/compare-… by default.")
    ] = None,
    lang: Annotated[
        Language, typer.Option(help="Of the pictures, the page and the table.")
    ] = Language.en,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="No progress.")] = False,
    tensorboard: Events = None,
) -> None:
    """Train with and without batch normalization, record it, show it.

    The same command goes on where it was interrupted, and trains nothing that is finished.
    """
    with said():
        from batchnorm import comparison  # noqa: PLC0415  # loads torch: not for --help
        from batchnorm.views import console, events  # noqa: PLC0415
        from batchnorm.views.words import Words  # noqa: PLC0415

        if tensorboard is not None:
            events.check()
        result = comparison.compare(
            network,
            [arm.strip() for arm in arms.split(",") if arm.strip()],
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


@app.command()
def report(
    folder: Annotated[Path, typer.Argument(help="The folder of a comparison, or of studies.")],
    lang: Annotated[
        Language, typer.Option(help="Of the pictures, the page and the table.")
    ] = Language.en,
    tensorboard: Events = None,
) -> None:
    """Make the pictures, the tables and the page of a record again."""
    with said():
        from batchnorm import comparison  # noqa: PLC0415
        from batchnorm.lab import results  # noqa: PLC0415
        from batchnorm.views import console, events, studies_page  # noqa: PLC0415
        from batchnorm.views.words import Words  # noqa: PLC0415

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


Model = Annotated[
    str,
    typer.Argument(
        help="package.module:function that builds it, such as torchvision.models:resnet18."
    ),
]
Weights = Annotated[Path | None, typer.Option(help="Its weights: .safetensors, .pt or .pth.")]
Shapes = Annotated[
    list[str] | None,
    typer.Option(help="Shape of a random input, such as 2,3,224,224; once for each input."),
]
Inputs = Annotated[
    str | None,
    typer.Option(help="package.module:function that gives the inputs, in place of --input."),
]


@app.command()
def fold(
    model: Model,
    checkpoint: Weights = None,
    to: Annotated[
        Path | None,
        typer.Option(help=".onnx, .pt2, .safetensors, .pt or .pth; by default nothing is written."),
    ] = None,
    input: Shapes = None,
    inputs: Inputs = None,
) -> None:
    """Fold batch norm into its neighbours, and compare what was written with the model.

    The exit status is 1 where the exported outputs differ by more than rounding.
    """
    with said():
        from batchnorm import deployment  # noqa: PLC0415  # loads torch: not for --help

        sample = deployment.sample_inputs(input or [], inputs)
        folded = deployment.fold(model, checkpoint, sample, to)
        typer.echo(str(folded.changes))
        if to is not None:
            typer.echo(f"written: {to}")
        if folded.agreement is not None:
            typer.echo(f"{to.suffix if to else ''} beside the model: {folded.agreement}")
            raise typer.Exit(not folded.agreement.holds)


@app.command()
def recalibrate(
    model: Model,
    checkpoint: Annotated[Path, typer.Option(help="Its weights: .safetensors, .pt or .pth.")],
    data: Annotated[
        str,
        typer.Option(
            help="package.module:function that gives a loader, or a tensor of inputs; no labels."
        ),
    ],
    to: Annotated[Path, typer.Option(help="The checkpoint with the new statistics.")],
    samples: Annotated[
        int | None, typer.Option(help="Read at most so many; all by default.")
    ] = None,
    exact: Annotated[
        bool, typer.Option("--exact", help="A pass a layer: how the data is split does not matter.")
    ] = False,
    prior: Annotated[
        float, typer.Option(help="The share of the old statistics that is kept.")
    ] = 0.0,
) -> None:
    """Give a checkpoint's batch norm the statistics of the data."""
    with said():
        from batchnorm import deployment  # noqa: PLC0415

        with Console(stderr=True).status("reading") as status:
            account = deployment.recalibrate(
                model, checkpoint, data, to,
                samples=samples, exact=exact, prior=prior,
                progress=lambda seen: status.update(f"{seen:,} samples"),
            )  # fmt: skip
        typer.echo(str(account))
        typer.echo(f"written: {to}")


@app.command()
def summary(
    model: Model,
    checkpoint: Weights = None,
    input: Shapes = None,
    inputs: Inputs = None,
    train: Annotated[bool, typer.Option(help="The mode in which it is looked at.")] = True,
    as_json: Annotated[bool, typer.Option("--json", help="For programs.")] = False,
) -> None:
    """Each batch-norm layer: neighbours, calls, values per channel, health, cost."""
    with said():
        from batchnorm import deployment  # noqa: PLC0415
        from batchnorm.views import layers  # noqa: PLC0415

        sample = deployment.sample_inputs(input or [], inputs)
        found = deployment.summary(model, checkpoint, sample, train=train)
        if as_json:
            typer.echo(layers.as_json(found))
        else:
            layers.show(found)


Least = Annotated[str, typer.Option("--level", help="The lowest reported: note, warning or error.")]
Select = Annotated[
    str | None, typer.Option(help="Rules, or beginnings of them, with commas; all by default.")
]
Ignore = Annotated[str | None, typer.Option(help="Rules not to check, with commas.")]
Json = Annotated[bool, typer.Option("--json", help="For programs.")]
Whole = Annotated[bool, typer.Option("--whole", help="Every layer of every rule.")]


@app.command()
def check(
    model: Annotated[
        str | None,
        typer.Argument(
            help="package.module:function that gives a model, or (model, loader) or (model, loader, optimizer)."
        ),
    ] = None,
    checkpoint: Weights = None,
    data: Annotated[
        str | None, typer.Option(help="package.module:function that gives a loader.")
    ] = None,
    train: Annotated[
        bool | None, typer.Option(help="The mode in which it is checked; as it comes by default.")
    ] = None,
    level: Least = "warning",
    select: Select = None,
    ignore: Ignore = None,
    samples: Annotated[
        int | None,
        typer.Option(help="Of the loader; by default 256 to check, 10,000 to recalibrate."),
    ] = None,
    fix: Annotated[
        bool, typer.Option("--fix", help="Mend what is safe and a checkpoint holds; wants --to.")
    ] = False,
    to: Annotated[Path | None, typer.Option(help="The mended checkpoint.")] = None,
    page: Annotated[Path | None, typer.Option(help="Write a page (.html), too.")] = None,
    as_json: Json = False,
    whole: Whole = False,
    explain: Annotated[
        str | None, typer.Option(help="A rule's page: what goes wrong, why the threshold.")
    ] = None,
) -> None:
    """Find what is wrong with the batch normalization in a model.

    The exit status is 0 where nothing is found, 3 for notes and warnings, 4 for errors.
    """
    with said():
        from batchnorm import doctor  # noqa: PLC0415  # loads torch: not for --help
        from batchnorm.views import findings  # noqa: PLC0415

        if explain is not None:
            findings.explain(doctor.rule(explain))
            return
        found = doctor.check(
            model, checkpoint, data, train=train, level=level, select=_names(select),
            ignore=_names(ignore), samples=samples, fix=fix, to=to,
        )  # fmt: skip
        if page is not None:
            doctor.write_page(found, page)
        if as_json:
            typer.echo(found.to_json())
        else:
            findings.show(found, whole=whole)
        raise typer.Exit(doctor.status(found))


@app.command(context_settings={"allow_interspersed_args": False, "ignore_unknown_options": True})
def watch(
    script: Annotated[str, typer.Argument(help="As behind python: train.py.")],
    arguments: Annotated[list[str] | None, typer.Argument(help="The script's own.")] = None,
    module: Annotated[
        bool, typer.Option("-m", help="SCRIPT is a module, as behind python -m.")
    ] = False,
    level: Least = "warning",
    select: Select = None,
    ignore: Ignore = None,
    every: Annotated[int, typer.Option(help="Steps between two looks at the layers' inputs.")] = 50,
    json_file: Annotated[
        Path | None, typer.Option("--json", help="Write what was found here, too.")
    ] = None,
    page: Annotated[Path | None, typer.Option(help="Write a page (.html), too.")] = None,
    guard: Annotated[
        bool,
        typer.Option(
            "--guard", help="Exit with 3 for warnings, 4 for errors, if the script ended well."
        ),
    ] = False,
    whole: Whole = False,
) -> None:
    """Run a training script as it is, and say what is wrong with its batch normalization.

    The script's output and exit status are its own; the report goes to standard error.
    """
    with said():
        from batchnorm import doctor  # noqa: PLC0415

        doctor.watch(
            script, arguments or [], module=module, level=level, select=_names(select),
            ignore=_names(ignore), every=every, json_file=json_file, page=page, guard=guard,
            whole=whole,
        )  # fmt: skip


def _names(text: str | None) -> list[str] | None:
    return None if text is None else [name.strip() for name in text.split(",") if name.strip()]


@app.command()
def bench(
    quick: Annotated[
        bool, typer.Option("--quick", help="Small inputs, one setting, all threads: a minute.")
    ] = False,
    dtype: Annotated[
        str, typer.Option(help="Of the inputs: float32, bfloat16, float16 or float64.")
    ] = "float32",
    threads: Annotated[
        str | None, typer.Option(help="Counts, with commas; one and all by default.")
    ] = None,
    settings: Annotated[
        str | None,
        typer.Option(help="Of memory, with commas: reused, default, huge-pages; all by default."),
    ] = None,
    rounds: Annotated[
        int | None, typer.Option(help="Measurements of each, in turn; 9, or 5 with --quick.")
    ] = None,
    compiled: Annotated[
        bool, typer.Option("--compile", help="torch.compile, too, which takes much longer.")
    ] = False,
    json_file: Annotated[
        Path | None, typer.Option("--json", help="Write every round of every row here.")
    ] = None,
    picture: Annotated[Path | None, typer.Option(help="Draw it: .svg, .png or .pdf.")] = None,
    page: Annotated[
        Path | None,
        typer.Option("--markdown", help="Put the tables into this page, at <!-- bench DTYPE -->."),
    ] = None,
) -> None:
    """Our kernels beside torch's on this machine, and beside what memory allows.

    The exit status is 1 where anything is slower than torch eager beyond noise.
    """
    with said():
        from batchnorm import speed  # noqa: PLC0415  # loads torch: not for --help
        from batchnorm.views import speeds  # noqa: PLC0415

        counts = None if threads is None else tuple(_counts(threads))
        asked = None if settings is None else tuple(_names(settings) or ())
        speeds.refuse(picture, page, dtype)
        with Console(stderr=True).status("measuring") as status:
            report = speed.bench(
                settings=asked, threads=counts, dtype=dtype, rounds=rounds, compiled=compiled,
                quick=quick, told=lambda row: status.update(str(row)),
            )  # fmt: skip
        speeds.show(report)
        speeds.write(report, json_file, picture, page)
        raise typer.Exit(report.status)


def _counts(text: str) -> list[int]:
    try:
        return [int(name) for name in _names(text) or []]
    except ValueError:
        raise BatchNormError(
            f"--threads is {text!r} and should be whole numbers with commas, such as 1,8."
        ) from None


study = typer.Typer(
    help="Test one claim, with error bars; `all` tests the lot.", no_args_is_help=True
)
app.add_typer(study, name="study")


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
        data_dir: Annotated[
            Path | None, typer.Option(help="Where Fashion-MNIST is looked for first.")
        ] = None,
        lang: Annotated[Language, typer.Option(help="Of what is printed.")] = Language.en,
        tensorboard: Events = None,
    ) -> None:
        with said():
            from batchnorm import studies as runner  # noqa: PLC0415  # loads torch: not for --help

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
def recalibration(
    seeds: Annotated[int, typer.Option(help="How many seeds.")] = 10,
    epochs: Annotated[int, typer.Option(help="Passes over the training images.")] = 10,
    train_images: Annotated[int | None, typer.Option(help="The first N; all by default.")] = None,
    threads: Annotated[
        int | None, typer.Option(help="Of torch; part of the configuration.")
    ] = None,
    data_dir: Annotated[
        Path | None, typer.Option(help="Where Fashion-MNIST is looked for first.")
    ] = None,
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
    with said():
        from batchnorm import studies as runner  # noqa: PLC0415  # loads torch: not for --help

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


@contextlib.contextmanager
def said() -> Iterator[None]:
    """What a user can mend is said in a line, with exit status 2; an interruption has its own."""
    errors = Console(stderr=True, soft_wrap=True, highlight=False)
    try:
        yield
    except BatchNormError as error:
        errors.print(f"batchnorm: {error}", markup=False)
        raise typer.Exit(2) from error
    except ModuleNotFoundError as error:
        errors.print(f"batchnorm: {lacking('the command', error)}", markup=False)
        raise typer.Exit(2) from error
    except OSError as error:
        where = f" ({error.filename})" if error.filename else ""
        errors.print(
            f"batchnorm: {error.strerror or error}{where}. What is recorded stays; the same "
            f"command goes on {REMEDIES.get(error.errno or 0, 'once that is mended')}.",
            markup=False,
        )
        raise typer.Exit(2) from error
    except KeyboardInterrupt as error:
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # a second one has nothing left to stop
        errors.print("batchnorm: interrupted. The same command goes on from the last checkpoint.")
        raise typer.Exit(130) from error


REMEDIES = {
    errno.ENOSPC: "once there is room",
    errno.EDQUOT: "once there is room",
    errno.EFBIG: "once larger files are allowed",
    errno.EACCES: "once it may write there",
    errno.EPERM: "once it may write there",
    errno.EROFS: "once it may write there",
    errno.EEXIST: "with another folder",
    errno.ENOTDIR: "with another folder",
    errno.EISDIR: "once the folder of that name is moved away",
}


def main() -> None:
    """Run the command."""
    # package.module:function may stand in the current folder, and not in the command's own
    sys.path[: 0 if sys.flags.safe_path else 1] = [""]
    try:
        app()
    except KeyboardInterrupt:  # before or behind a command's own handling: torch takes a second
        raise SystemExit(130) from None
