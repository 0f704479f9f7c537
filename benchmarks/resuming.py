"""A look at many models, one after another: a line each in a record, so that a run that stops goes on."""

import argparse
import gc
import json
import sys
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

Line = dict[str, Any]


def part_of(doc: str | None) -> str | None:
    """The part of the names that the command line gives; None: all of them, recorded."""
    parser = argparse.ArgumentParser(description=(doc or "").partition("\n")[0])
    parser.add_argument("part", nargs="?", help="of the names")
    part: str | None = parser.parse_args().part
    return part


def read(record: Path) -> list[Line]:
    """What was found before."""
    if not record.exists():
        return []
    return [json.loads(line) for line in record.read_text(encoding="utf-8").splitlines()]


def look(
    looks: Mapping[str, Callable[[], Line | None]], record: Path, key: str, part: str | None
) -> None:
    """At those with `part` in their names, or at all that the record's `key` does not name yet.

    A look that finds nothing to look at gives None; one that raises is told, and the others go on.
    """
    warnings.simplefilter("ignore")
    record.parent.mkdir(exist_ok=True)
    known = {line[key] for line in read(record)} if part is None else set()
    for name, find in looks.items():
        if name in known or (part or "") not in name:
            continue
        try:
            line = find()
        except Exception as error:  # noqa: BLE001  # told, and the others go on
            said = f"{name}: {type(error).__name__}: {str(error)[:300]}"
            print(said, file=sys.stderr, flush=True)
            continue
        if line is not None:
            print(*line.values(), sep=" | ", flush=True)
            if part is None:
                with record.open("a", encoding="utf-8") as file:
                    file.write(json.dumps(line, ensure_ascii=False) + "\n")
        gc.collect()
