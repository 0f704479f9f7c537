"""What a study found: the record that tables and pages are made from, and nothing else is.

    results/<study>.json   format, name, claim {en, zh}, source, size, seeds, environment, grid,
                           arms: [{name, label {en, zh}, changes}],
                           cells: [{arm, point, seed, hash, values {name: number or null},
                                    curves {name: [number or null]}}], one a finished cell,
                           missing: hashes of the cells that failed or were not run,
                           questions: [{name, claim {en, zh}, rule {low, high}, verdict, effect,
                                        interval [low, high], p, p_adjusted, seeds, exploratory,
                                        per_seed {seed: effect}, points {arm: its point}}],
                           power: {smallest_p, detectable}, said before the data were seen
    verdicts.json          {study: {claim, questions: [the same without per_seed]}}, all studies
    cells.csv              a row a cell: study, arm, point, seed, hash, then every value
    verdicts.csv           a row a question

`point` is a cell's place in the grid, {field: value}; {} without a grid. A training's curves share
the axis `epoch` (`seconds` is another); a probe's have the names that its function gave them.
"""

import csv
import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from batchnorm.errors import BatchNormError
from batchnorm.lab import cells, files, statistics
from batchnorm.lab.effects import Table
from batchnorm.lab.environment import environment
from batchnorm.lab.study import Planned, Study, Text

FORMAT = 1
FOLDER = "results"

Result = dict[str, Any]


def conclude(study: Study, size: str, planned: Sequence[Planned], folder: Path) -> Result:
    """Judge a study by its finished cells."""
    found = [(each, cells.outcome(each, folder)) for each in planned]
    outcomes = [outcome for _, outcome in found if outcome is not None]
    seeds = sorted({each.seed for each in planned})
    return {
        "format": FORMAT,
        "name": study.name,
        "claim": _text(study.claim),
        "source": study.source,
        "size": size,
        "seeds": seeds,
        "environment": environment(),
        "grid": {name: list(values) for name, values in study.sizes[size].grid.items()},
        "common": dict(study.sizes[size].common),
        "arms": [
            {"name": arm.name, "label": _text(arm.label), "changes": dict(arm.changes)}
            for arm in study.arms
        ],
        "cells": [dataclasses.asdict(outcome) for outcome in outcomes],
        "missing": [each.config.hash for each, outcome in found if outcome is None],
        "questions": _answers(study, Table(outcomes)),
        "power": power(study, len(seeds)),
    }


def power(study: Study, seeds: int) -> dict[str, float | None]:
    """What so many seeds can find, known before any is run."""
    questions = max(1, len(study.questions))
    return {
        "smallest_p": min(1.0, questions * statistics.smallest_p(seeds)),
        "detectable": statistics.detectable(seeds, questions),
    }


def _answers(study: Study, table: Table) -> list[dict[str, Any]]:
    per_seed = [question.effect.per_seed(table) for question in study.questions]
    judged = statistics.judge(
        [
            (list(values.values()), question.rule)
            for values, question in zip(per_seed, study.questions, strict=True)
        ]
    )
    return [
        {
            "name": question.name,
            "claim": _text(question.claim),
            "rule": dataclasses.asdict(question.rule),
            **dataclasses.asdict(finding),
            "per_seed": {str(seed): value for seed, value in values.items()},
            "points": {arm: dict(point) for arm, point in question.effect.points(table).items()},
        }
        for question, finding, values in zip(study.questions, judged, per_seed, strict=True)
    ]


def _text(text: Text) -> dict[str, str]:
    return {"en": text.en, "zh": text.zh}


def write(results: Sequence[Result], folder: Path) -> None:
    """Write these studies' results, and the verdicts of every study in the folder."""
    for result in results:
        content = json.dumps(result, ensure_ascii=False, indent=1, allow_nan=False) + "\n"
        files.keep(content.encode(), folder / FOLDER / f"{result['name']}.json")
    every = read(folder)
    verdicts = {
        result["name"]: {
            "claim": result["claim"],
            "size": result["size"],
            "questions": [
                {name: value for name, value in question.items() if name != "per_seed"}
                for question in result["questions"]
            ],
        }
        for result in every
    }
    content = json.dumps(verdicts, ensure_ascii=False, indent=1, allow_nan=False) + "\n"
    files.keep(content.encode(), folder / "verdicts.json")
    _write_cells(every, folder / "cells.csv")
    _write_verdicts(every, folder / "verdicts.csv")


def read(folder: Path) -> list[Result]:
    """The results of a folder, by name."""
    results = []
    for path in sorted((folder / FOLDER).glob("*.json")):
        try:
            result = json.loads(path.read_text(encoding="utf-8"))
            known = result["format"] == FORMAT
        except (ValueError, KeyError, TypeError) as error:
            raise BatchNormError(
                f"{path} is not the result of a study ({error}). Move it away; the same command "
                "makes it again."
            ) from error
        if not known:
            raise BatchNormError(
                f"{path} has the format {result['format']}, and this version writes {FORMAT}. Name "
                "another folder with --out."
            )
        results.append(result)
    return results


def _write_cells(results: Sequence[Result], path: Path) -> None:
    rows = [
        {"study": result["name"]}
        | {name: cell[name] for name in ("arm", "seed", "hash")}
        | {"point": json.dumps(cell["point"])}
        | cell["values"]
        for result in results
        for cell in result["cells"]
    ]
    _write_csv(rows, path)


def _write_verdicts(results: Sequence[Result], path: Path) -> None:
    rows = []
    for result in results:
        for question in result["questions"]:
            low, high = question["interval"] or (None, None)
            names = ("verdict", "effect", "p", "p_adjusted", "seeds", "exploratory")
            rows.append(
                {"study": result["name"], "question": question["name"]}
                | {name: question[name] for name in names}
                | {"low": low, "high": high}
            )
    _write_csv(rows, path)


def _write_csv(rows: Sequence[dict[str, Any]], path: Path) -> None:
    names = list(dict.fromkeys(name for row in rows for name in row))
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, names, restval="")
        writer.writeheader()
        writer.writerows(rows)
