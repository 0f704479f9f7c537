"""`studies.html`: each claim, its verdict and what it rests on; one file, made from the record."""

import shlex
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from batchnorm.errors import BatchNormError
from batchnorm.lab import results
from batchnorm.lab.results import Result
from batchnorm.lab.summary import Spread
from batchnorm.views import activations, grids, study_charts, verdict
from batchnorm.views.charts import Spec
from batchnorm.views.lines import STYLES
from batchnorm.views.page import fill, libraries, places
from batchnorm.views.words import Words

PAGE = "studies.html"
WIDTH = 200  # of an effect's picture, in its own units
MARGIN = 0.06  # of its range, at either side
VERDICTS = ("supported", "contradicted", "inconclusive")


def report(folder: Path, words: Words) -> list[Result]:
    """Write the page of a folder from its record alone; return what it shows."""
    found = results.read(folder)
    if not found:
        raise BatchNormError(
            f"{folder} holds no result of a study. Run `batchnorm study NAME --out {folder}`."
        )
    (folder / PAGE).write_text(render(found, words), encoding="utf-8")
    return found


def render(found: Sequence[Result], words: Words) -> str:
    """The page as a string; whatever a record holds is escaped."""
    specs: dict[str, Spec] = {}
    shown = [_study(index, result, specs, words) for index, result in enumerate(found)]
    counts = Counter(q["verdict"] for result in found for q in result["questions"])
    questions = [question for result in found for question in result["questions"]]
    return fill(
        "studies.html.j2",
        words=words,
        styles=STYLES,
        studies=shown,
        counts=counts,
        verdicts=VERDICTS,
        total=counts.total(),
        exploratory=sum(question["exploratory"] for question in questions),
        environments=places(result["environment"] for result in found),
        specs=specs,
        libraries=libraries(),
    )


def inline(found: Sequence[Result], folder: Path, words: Words) -> str:
    """The verdicts, for a notebook's cell."""
    called = [study_charts.labels(result, words) for result in found]
    studies = [
        (
            result["claim"][words.language],
            [_question(q, labels, words) for q in result["questions"]],
        )
        for result, labels in zip(found, called, strict=True)
    ]
    return fill("notebook_studies.html.j2", words=words, studies=studies, folder=folder)


@dataclass(frozen=True)
class Strip:
    """An effect as a picture: the interval, the effect, each seed, and where the claim holds."""

    dots: list[float]
    effect: float | None
    interval: tuple[float, float] | None
    claimed: tuple[float, float]
    bounds: list[float]


def strip(question: dict[str, Any]) -> Strip:
    """Every number as a place from 0 to `WIDTH`."""
    seeds: list[float] = list(question["per_seed"].values())
    low, high = question["rule"]["low"], question["rule"]["high"]
    bounds = [bound for bound in (low, high) if bound is not None]
    every = [*seeds, *(question["interval"] or ()), *bounds]
    least: float = min(every)
    most: float = max(every)
    margin = MARGIN * (most - least) or 1.0

    def at(value: float) -> float:
        return round(WIDTH * (value - least + margin) / (most - least + 2 * margin), 1)

    left, right = 0.0 if low is None else at(low), float(WIDTH) if high is None else at(high)
    interval, effect = question["interval"], question["effect"]
    return Strip(
        [at(seed) for seed in seeds],
        None if effect is None else at(effect),
        None if interval is None else (at(interval[0]), at(interval[1])),
        (left, right),
        [at(bound) for bound in bounds],
    )


def _study(index: int, result: Result, specs: dict[str, Spec], words: Words) -> dict[str, Any]:
    """What the template shows of a study; its charts go into `specs`."""
    curves = study_charts.curves(result, words)
    heat = study_charts.heat(result, words) if result["cells"] else None
    charts = {f"curve-{index}-{i}": name for i, name in enumerate(curves)}
    specs |= dict(zip(charts, curves.values(), strict=True))
    if heat is not None:
        specs[f"heat-{index}"] = heat[1]
    steps = activations.steps(result)
    fans = activations.fans(result, words) if steps else {}
    flows = {f"curve-{index}-flow-{i}": key for i, key in enumerate(fans)}
    specs |= dict(zip(flows, fans.values(), strict=True))
    if steps:
        specs[f"curve-{index}-flow"] = activations.moving(result, words)
    called = study_charts.labels(result, words)
    looks = study_charts.styles(result)
    return {
        "result": result,
        "claim": result["claim"][words.language],
        "arms": [(looks[name], label) for name, label in called.items()],
        "questions": [_question(question, called, words) for question in result["questions"]],
        "charts": charts,
        "steps": steps,
        "flows": [(name, words(units), called[arm]) for name, (units, arm) in flows.items()],
        "heat": None if heat is None else (f"heat-{index}", heat[0]),
        "places": study_charts.places(result, words),
        "opening": study_charts.opening(result, words) if result["cells"] else "",
        "summary": _summary(result, called, words),
        "values": _values(result),
        "called": called,
        "place": partial(study_charts.place, words=words),
        "command": _command(result),
    }


def _question(question: dict[str, Any], called: dict[str, str], words: Words) -> dict[str, Any]:
    said, effect, interval, p = grids.numbers(question, words)
    low, high = question["rule"]["low"], question["rule"]["high"]
    rule = (
        "rule between"
        if None not in (low, high)
        else "rule above"
        if high is None
        else "rule below"
    )
    return {
        "claim": question["claim"][words.language],
        "kind": question["verdict"],
        "verdict": said,
        "effect": effect,
        "interval": interval,
        "p": p,
        "seeds": question["seeds"],
        "strip": strip(question),
        "rule": words(rule, low=low, high=high),
        "points": [
            f"{called.get(arm, arm)}: {study_charts.place(point, words)}"
            for arm, point in question["points"].items()
            if point
        ],
    }


def _values(result: Result) -> list[str]:
    """What the cells measured."""
    return list(dict.fromkeys(name for cell in result["cells"] for name in cell["values"]))


def _summary(result: Result, called: dict[str, str], words: Words) -> list[dict[str, Any]]:
    """Mean ± standard deviation over the seeds: a row an arm at a place."""
    groups: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for cell in result["cells"]:
        groups.setdefault((cell["arm"], study_charts.place(cell["point"], words)), []).append(cell)
    rows = []
    for (arm, where), cells in groups.items():
        numbers = {
            name: [v for cell in cells if (v := cell["values"].get(name)) is not None]
            for name in _values(result)
        }
        spreads = {name: verdict.number(Spread(v)) if v else "–" for name, v in numbers.items()}
        rows.append({"arm": called[arm], "place": where, "values": spreads})
    return rows


def _command(result: Result) -> str:
    size = "" if result["size"] == "normal" else f" --{result['size']}"
    return f"batchnorm study {shlex.quote(result['name'])}{size} --seeds {len(result['seeds'])}"
