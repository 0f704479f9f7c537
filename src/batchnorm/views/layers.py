"""The summary of a model in a terminal."""

import json
from dataclasses import asdict

from rich.table import Table

from batchnorm.model.inventory import Summary
from batchnorm.views.terminal import terminal

WORDS = {"layer", "kind", "mode", "between", "health"}  # the other columns are numbers


def show(found: Summary) -> None:
    """Print a row a layer."""
    console = terminal()
    if len(found):
        console.print(_table(found))
    for line in (found.headline, *found.notes):
        console.print(line, markup=False)


def as_json(found: Summary) -> str:
    """The same for programs."""
    content = {
        "model": found.model,
        "layers": [asdict(row) for row in found],
        "untraced": found.untraced,
    }
    return json.dumps(content, indent=2, ensure_ascii=False)


def _table(found: Summary) -> Table:
    grid = Table()
    for name in found.columns:
        grid.add_column(name, justify="left" if name in WORDS else "right", overflow="fold")
    for row in zip(*found.columns.values(), strict=True):
        grid.add_row(*row)
    return grid
