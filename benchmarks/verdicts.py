"""The verdicts of the studies, put into the annotated note and README, each in both languages.

    batchnorm study all && python benchmarks/verdicts.py runs/studies

The note has a place for each study, `<!-- verdict NAME --> … <!-- /verdict NAME -->`; what the
folder's `verdicts.json` lacks keeps what stands in its place. README has one for all of the note's
claims, `<!-- verdicts -->`, which is filled where none of them is lacking.
"""

import argparse
import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from batchnorm.errors import BatchNormError
from batchnorm.lab import studies
from batchnorm.views import grids, markdown
from batchnorm.views.words import Words

ROOT = Path(__file__).parent.parent
NOTES = {ROOT / "docs" / "note.md": "en", ROOT / "docs" / "note.zh-CN.md": "zh"}
READMES = {ROOT / "README.md": "en", ROOT / "README.zh-CN.md": "zh"}
COUNTED = {
    "en": "`batchnorm study {name}{option}`, seeds: {seeds}",
    "zh": "`batchnorm study {name}{option}`，种子数：{seeds}",
}
RATE = "learning_rate"
RATES = {"en": "learning rates", "zh": "学习率"}
OUTCOMES = ("supported", "contradicted", "inconclusive")
HEADER = {
    "en": ("the note's claim", *OUTCOMES, "`batchnorm study`"),
    "zh": ("笔记的论断", "成立", "不成立", "无定论", "`batchnorm study`"),
}


def verdict(name: str, found: dict[str, Any], words: Words) -> str:
    """A row a question: the claim, the verdict, effect, interval, p, the arms' rates; then the command."""
    header = [words(key) for key in ("question", "verdict", "effect", "interval", "p")]
    tried = studies.find(name).sizes[found["size"]].grid.get(RATE, ())
    seeds = max(question["seeds"] for question in found["questions"])
    rows = [
        [
            question["claim"][words.language].replace("|", "\\|") + fewer(question, seeds, words),
            *grids.numbers(question, words),
            *([rates(question["points"], tried)] if tried else []),
        ]
        for question in found["questions"]
    ]
    if tried:
        header.append(RATES[words.language])
    option = "" if found["size"] == "normal" else f" --{found['size']}"
    counted = COUNTED[words.language].format(name=name, option=option, seeds=seeds)
    return f"{markdown.table(header, rows, words=2)}\n\n{counted}"


def fewer(question: dict[str, Any], seeds: int, words: Words) -> str:
    """How many seeds have an answer, where that is not all of them."""
    answered = question["seeds"]
    return f" ({words('so many seeds', count=answered)})" if answered < seeds else ""


def rates(points: dict[str, dict[str, float]], tried: Sequence[float]) -> str:
    """Each arm's, with a ° where it is the first or last that was tried: a better one may lie beyond."""
    ends = (min(tried), max(tried))
    chosen = {arm: point[RATE] for arm, point in points.items()}
    return ", ".join(f"`{arm}` {rate:g}{'°' * (rate in ends)}" for arm, rate in chosen.items())


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


def table(verdicts: dict[str, Any], language: str) -> str:
    """A row a claim of the note: how many of its questions ended how, and the study."""
    rows = []
    for name in of_the_note():
        found = verdicts[name]
        ends = Counter(question["verdict"] for question in found["questions"])
        counts = (str(ends[outcome] or "–") for outcome in OUTCOMES)
        rows.append((found["claim"][language], *counts, f"`{name}`"))
    return markdown.table(HEADER[language], rows)


def of_the_note() -> list[str]:
    """The studies of the note's own claims."""
    return [name for name in studies.NAMES if studies.find(name).source.startswith("the note")]


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
    """Fill the pages."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path, help="of the studies: runs/studies")
    verdicts = read(parser.parse_args().folder)
    for page, language in NOTES.items():
        print(f"{page.name}: {', '.join(fill(page, verdicts, language))}")
    if missing := [name for name in of_the_note() if name not in verdicts]:
        print(f"README stays as it is: it wants all of the note's, and lacks {', '.join(missing)}")
        return
    for page, language in READMES.items():
        markdown.refresh(page, "verdicts", table(verdicts, language))


if __name__ == "__main__":
    main()
