"""`fold`, `recalibrate` and `summary`: a model and a checkpoint."""

from pathlib import Path
from typing import Annotated

import typer

from batchnorm.cli.arguments import WEIGHTS, Json, Weights
from batchnorm.cli.errors import said
from batchnorm.views.terminal import terminal

Model = Annotated[
    str,
    typer.Argument(
        help="package.module:function that builds it, such as torchvision.models:resnet18."
    ),
]
Shapes = Annotated[
    list[str] | None,
    typer.Option(help="Shape of a random input, such as 2,3,224,224; once for each input."),
]
Inputs = Annotated[
    str | None,
    typer.Option(help="package.module:function that gives the inputs, in place of --input."),
]


@said()
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
    from batchnorm import deployment

    sample = deployment.sample_inputs(input or [], inputs)
    folded = deployment.fold(model, checkpoint, sample, to)
    typer.echo(str(folded.changes))
    if to is not None:
        typer.echo(f"written: {to}")
    if folded.agreement is not None:
        typer.echo(f"{to.suffix if to else ''} beside the model: {folded.agreement}")
        raise typer.Exit(not folded.agreement.holds)


@said()
def recalibrate(
    model: Model,
    checkpoint: Annotated[Path, WEIGHTS],
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
    from batchnorm import deployment

    with terminal(stderr=True).status("reading") as status:
        account = deployment.recalibrate(
            model, checkpoint, data, to,
            samples=samples, exact=exact, prior=prior,
            progress=lambda seen: status.update(f"{seen:,} samples"),
        )  # fmt: skip
    typer.echo(str(account))
    typer.echo(f"written: {to}")


@said()
def summary(
    model: Model,
    checkpoint: Weights = None,
    input: Shapes = None,
    inputs: Inputs = None,
    train: Annotated[bool, typer.Option(help="The mode in which it is looked at.")] = True,
    as_json: Json = False,
) -> None:
    """Each batch-norm layer: neighbours, calls, values per channel, health, cost."""
    from batchnorm import deployment
    from batchnorm.views import layers

    sample = deployment.sample_inputs(input or [], inputs)
    found = deployment.summary(model, checkpoint, sample, train=train)
    if as_json:
        typer.echo(layers.as_json(found))
    else:
        layers.show(found)
