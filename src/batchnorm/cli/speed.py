"""`bench`: the layers beside torch's, timed."""

from pathlib import Path
from typing import Annotated

import typer

from batchnorm.cli.arguments import names
from batchnorm.cli.errors import said
from batchnorm.errors import BatchNormError
from batchnorm.views.terminal import terminal


@said()
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
        typer.Option(
            "--markdown",
            help="Put the tables into this page, at <!-- bench DTYPE -->, "
            "or <!-- bench DTYPE compiled -->.",
        ),
    ] = None,
) -> None:
    """Our kernels beside torch's on this machine, and beside what memory allows.

    The exit status is 1 where anything is slower than torch eager beyond noise.
    """
    from batchnorm.speed import benching
    from batchnorm.views import speeds

    counts = None if threads is None else tuple(_counts(threads))
    asked = None if settings is None else tuple(names(settings) or ())
    speeds.refuse(picture, page, speeds.place(dtype, compiled=compiled))
    with terminal(stderr=True).status("measuring") as status:
        report = benching.bench(
            settings=asked, threads=counts, dtype=dtype, rounds=rounds, compiled=compiled,
            quick=quick, told=lambda row: status.update(str(row)),
        )  # fmt: skip
    speeds.show(report)
    speeds.write(report, json_file, picture, page)
    raise typer.Exit(report.status)


def _counts(text: str) -> list[int]:
    try:
        return [int(name) for name in names(text) or []]
    except ValueError:
        raise BatchNormError(
            f"--threads is {text!r} and should be whole numbers with commas, such as 1,8."
        ) from None
