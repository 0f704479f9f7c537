"""What the scripts that measure share: their options, the order of the rounds, the files."""

import argparse
import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch

from batchnorm.views import markdown


def parser(doc: str | None, table: str | None = None) -> argparse.ArgumentParser:
    """Takes --json, and --markdown where there is a table; described by the docstring's first line."""
    made = argparse.ArgumentParser(description=(doc or "").partition("\n")[0])
    made.add_argument("--json", type=Path, help="write the figures here, too")
    if table is not None:
        made.add_argument(
            "--markdown", type=Path, help=f"put the table into this page, at <!-- {table} -->"
        )
    return made


def check(options: argparse.Namespace, table: str) -> None:
    """Before anything is measured: the page has a place for the table.

    Raises:
        BatchNormError: it has none.
    """
    if options.markdown is not None:
        markdown.find(options.markdown, table)


def in_turn(names: Iterable[str], rounds: int) -> Iterator[str]:
    """All of them in every round, each round beginning with another."""
    order = list(names)
    for _ in range(rounds):
        yield from order
        order.append(order.pop(0))


def measured_on(where: dict[str, Any]) -> str:
    """The machine, threads and versions; `where` is `environment()`."""
    return (
        f"{where['processor']}, {torch.get_num_threads()} threads, torch {where['torch']}, "
        f"{where['backend']}"
    )


def save(path: Path | None, content: object) -> None:
    """As JSON, where a path was given."""
    if path is not None:
        path.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


def publish(options: argparse.Namespace, name: str, line: str, table: str) -> None:
    """The table, and above it the line that says where it was measured, into the page asked for."""
    if options.markdown is not None:
        markdown.refresh(options.markdown, name, f"{line}.\n\n{table}")
