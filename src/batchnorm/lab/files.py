"""Files that a kill or a power cut leaves whole."""

import os
from pathlib import Path


def append(path: Path, text: str) -> None:
    """Add to a file, and see it on the disk."""
    with path.open("a", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())


def keep(content: bytes | memoryview, path: Path) -> None:
    """Write a file in one move: a kill leaves the one before, or none, or all of it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".part")
    with partial.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())  # before the move: a power cut leaves a whole file, too
    partial.replace(path)
