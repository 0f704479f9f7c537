"""`check` and `watch`: what is wrong with a model's batch normalization, or a training's."""

from pathlib import Path
from typing import Annotated

import typer

from batchnorm.cli.arguments import Json, Weights, names
from batchnorm.cli.errors import said

Least = Annotated[str, typer.Option("--level", help="The lowest reported: note, warning or error.")]
Select = Annotated[
    str | None, typer.Option(help="Rules, or beginnings of them, with commas; all by default.")
]
Ignore = Annotated[str | None, typer.Option(help="Rules not to check, with commas.")]
Page = Annotated[Path | None, typer.Option(help="Write a page (.html), too.")]
Whole = Annotated[bool, typer.Option("--whole", help="Every layer of every rule.")]


@said()
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
    page: Page = None,
    as_json: Json = False,
    whole: Whole = False,
    explain: Annotated[
        str | None, typer.Option(help="A rule's page: what goes wrong, why the threshold.")
    ] = None,
) -> None:
    """Find what is wrong with the batch normalization in a model.

    The exit status is 0 where nothing is found, 3 for notes and warnings, 4 for errors.
    """
    from batchnorm import doctor
    from batchnorm.views import findings

    if explain is not None:
        findings.explain(doctor.rule(explain))
        return
    found = doctor.check(
        model, checkpoint, data, train=train, level=level, select=names(select),
        ignore=names(ignore), samples=samples, fix=fix, to=to,
    )  # fmt: skip
    if page is not None:
        doctor.write_page(found, page)
    if as_json:
        typer.echo(found.to_json())
    else:
        findings.show(found, whole=whole)
    raise typer.Exit(doctor.status(found))


@said()
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
    page: Page = None,
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
    from batchnorm import doctor

    doctor.watch(
        script, arguments or [], module=module, level=level, select=names(select),
        ignore=names(ignore), every=every, json_file=json_file, page=page, guard=guard,
        whole=whole,
    )  # fmt: skip
