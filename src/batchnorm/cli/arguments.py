"""The arguments that several commands take."""

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

Language = StrEnum("Language", ["en", "zh"])

Events = Annotated[
    Path | None, typer.Option(help="Write TensorBoard's event files there, a run a cell.")
]
DataDir = Annotated[Path | None, typer.Option(help="Where Fashion-MNIST is looked for first.")]
TrainImages = Annotated[int | None, typer.Option(help="The first N; all by default.")]
Threads = Annotated[int | None, typer.Option(help="Of torch; part of the configuration.")]
Json = Annotated[bool, typer.Option("--json", help="For programs.")]
WEIGHTS = typer.Option(help="Its weights: .safetensors, .pt or .pth.")
Weights = Annotated[Path | None, WEIGHTS]


def names(text: str | None) -> list[str] | None:
    """What stands between the commas; None where nothing was given."""
    return None if text is None else [name.strip() for name in text.split(",") if name.strip()]
