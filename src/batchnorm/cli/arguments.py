"""The arguments that several commands take."""

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

Language = StrEnum("Language", ["en", "zh"])

Events = Annotated[
    Path | None, typer.Option(help="Write TensorBoard's event files there, a run a cell.")
]
Weights = Annotated[Path | None, typer.Option(help="Its weights: .safetensors, .pt or .pth.")]


def names(text: str | None) -> list[str] | None:
    """What stands between the commas; None where nothing was given."""
    return None if text is None else [name.strip() for name in text.split(",") if name.strip()]
