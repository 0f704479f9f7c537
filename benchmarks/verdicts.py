"""The verdicts of the studies, put into the annotated note: docs/note.md, docs/note.zh-CN.md.

    batchnorm study all && python benchmarks/verdicts.py runs/studies

A page has a place for each study, `<!-- verdict NAME --> … <!-- /verdict NAME -->`. Studies that
the folder's `verdicts.json` lacks keep what stands in their place.
"""

import argparse
import json
from pathlib import Path
from typing import Any

from batchnorm.errors import BatchNormError
from batchnorm.lab import studies
from batchnorm.views import grids, markdown
from batchnorm.views.words import Words

DOCS = Path(__file__).parent.parent / "docs"
PAGES = {DOCS / "note.md": "en", DOCS / "note.zh-CN.md": "zh"}
COUNTED = {
    "en": "`batchnorm study {name}{option}`, seeds: {seeds}",
    "zh": "`batchnorm study {name}{option}`，种子数：{seeds}",
}


def verdict(name: str, found: dict[str, Any], words: Words) -> str:
    """A row a question: the claim, the verdict, effect, interval and p; below it the command."""
    keys = ("question", "verdict", "effect", "interval", "p")
    rows = [
        (question["claim"][words.language].replace("|", "\\|"), *grids.numbers(question, words))
        for question in found["questions"]
    ]
    seeds = max(question["seeds"] for question in found["questions"])
    option = "" if found["size"] == "normal" else f" --{found['size']}"
    counted = COUNTED[words.language].format(name=name, option=option, seeds=seeds)
    return f"{markdown.table([words(key) for key in keys], rows, words=2)}\n\n{counted}"


def fill(page: Path, verdicts: dict[str, Any], language: str) -> list[str]:
    """Put each study's verdict into its place; return the names of those that are filled.

    Raises:
        BatchNormError: a study of the record is unknown, or the page has no place for it.
    """
    words = Words(language)
    for name, found in verdicts.items():
        studies.find(name)
        markdown.refresh(page, f"verdict {name}", verdict(name, found, words))
    return list(verdicts)


def read(folder: Path) -> dict[str, Any]:
    """The verdicts of a folder of studies."""
    path = folder / "verdicts.json"
    if not path.exists():
        raise BatchNormError(
            f"{folder} has no verdicts.json. Run the studies: batchnorm study all --out {folder}"
        )
    verdicts: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return verdicts


def main() -> None:
    """Fill both pages."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path, help="of the studies: runs/studies")
    verdicts = read(parser.parse_args().folder)
    for page, language in PAGES.items():
        print(f"{page.name}: {', '.join(fill(page, verdicts, language))}")


if __name__ == "__main__":
    main()
