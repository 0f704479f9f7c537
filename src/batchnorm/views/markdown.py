"""Tables in Markdown, and the place in a page where a command puts them."""

from collections.abc import Iterable, Sequence
from pathlib import Path

from batchnorm.errors import BatchNormError


def table(header: Sequence[str], rows: Iterable[Sequence[str]], words: int = 1) -> str:
    """The first `words` columns to the left, numbers to the right."""
    sides = ["---" if place < words else "--:" for place in range(len(header))]
    return "\n".join("| " + " | ".join(row) + " |" for row in (header, sides, *rows))


def find(path: Path, name: str) -> tuple[str, str]:
    """The page before and behind the place between `<!-- NAME -->` and `<!-- /NAME -->`.

    Raises:
        BatchNormError: the page lacks these lines.
    """
    begin, end = f"<!-- {name} -->", f"<!-- /{name} -->"
    before, found, rest = path.read_text(encoding="utf-8").partition(begin)
    _, closed, after = rest.partition(end)
    if not (found and closed):
        raise BatchNormError(
            f"{path} has no place for this table: put the lines {begin} and {end} into it."
        )
    return before + begin, end + after


def refresh(path: Path, name: str, text: str) -> None:
    """Put `text` into the place of that name, and leave the rest of the page as it is."""
    before, after = find(path, name)
    path.write_text(f"{before}\n\n{text.strip()}\n\n{after}", encoding="utf-8")
