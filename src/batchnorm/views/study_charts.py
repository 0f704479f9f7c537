"""A study's charts: its curves with bands and each seed's line, and its grid as a heat map."""

import json
import statistics
import textwrap
from collections import Counter
from collections.abc import Iterator, Mapping
from typing import Any

import altair as alt

from batchnorm.lab.results import Result
from batchnorm.views.charts import Spec, data, finish, looks, rounded
from batchnorm.views.lines import STYLES, Style
from batchnorm.views.words import Words

AXES = ("epoch", "step", "depth", "batch_size")  # what curves are drawn against, if they say so
UNIT = {"low": 15, "middle": 50, "high": 85}  # percentiles of what goes into one unit
LAYER = {f"percentile {percent}": percent for percent in range(100)}  # into all units of a layer
CURVES = ("test_accuracy", "recalibrated_test_accuracy", "train_loss")  # of a training
NARROW = {"en": 10, "zh": 5}  # characters of a column's name in a line
SHADES = ["#d6e6f4", "#08306b"]  # the same on white and on black: each cell is its own paper
WHITE_FROM = 0.55  # of the way from the light shade to the dark one


def labels(result: Result, words: Words) -> dict[str, str]:
    """What the arms are called."""
    return {arm["name"]: arm["label"][words.language] for arm in result["arms"]}


def styles(result: Result) -> dict[str, tuple[str, Style]]:
    """A look for each arm: its own where it has one, else one that the others leave."""
    names = [arm["name"] for arm in result["arms"]]
    left = [name for name in STYLES if name not in names] or list(STYLES)
    others = iter(left * len(names))
    chosen = {name: name if name in STYLES else next(others) for name in names}
    return {name: (key, STYLES[key]) for name, key in chosen.items()}


def place(point: Mapping[str, Any], words: Words) -> str:
    """A place in the grid, in words."""
    return ", ".join(f"{words.quantity(name)} {value}" for name, value in point.items())


def places(result: Result, words: Words) -> list[str]:
    """The places in the grid, in its order; one empty name without a grid."""
    return list(dict.fromkeys(place(cell["point"], words) for cell in result["cells"]))


def opening(result: Result, words: Words) -> str:
    """The place that is shown first: where the questions look at most arms, the first in the grid of such."""
    looked = Counter(
        place(point, words)
        for question in result["questions"]
        for point in question["points"].values()
    )
    return max(places(result, words), key=lambda where: looked[where])


def curves(result: Result, words: Words) -> dict[str, Spec]:
    """A chart a quantity: all arms at one place in the grid."""
    drawn = {}
    for quantity in _quantities(result):
        rows = list(_rows(result, quantity, words))
        if len({row["x"] for row in rows}) > 1:  # a line has two ends
            drawn[quantity] = _curves(result, quantity, rows, words)
    return drawn


def _quantities(result: Result) -> list[str]:
    found = list(dict.fromkeys(name for cell in result["cells"] for name in cell["curves"]))
    if "epoch" in found:
        return [name for name in CURVES if name in found]
    return [name for name in found if name not in AXES and name not in UNIT | LAYER]


def _axis(curves: Mapping[str, Any]) -> str | None:
    """The curve that others are drawn against; None: they are in the order of measurement."""
    return next((name for name in AXES if name in curves), None)


def _rows(result: Result, quantity: str, words: Words) -> Iterator[dict[str, Any]]:
    """A row a point of a seed's curve, and of the mean's, which have no seed."""
    called = labels(result, words)
    by_line: dict[tuple[str, str], list[tuple[int, dict[float, float]]]] = {}
    for cell in result["cells"]:
        key = called[cell["arm"]], place(cell["point"], words)
        by_line.setdefault(key, []).append((cell["seed"], _curve(cell, quantity)))
    for (arm, where), of_seeds in by_line.items():
        line = {"arm": arm, "place": where}
        for seed, curve in of_seeds:
            yield from ({**line, "seed": seed, "x": x, "y": y} for x, y in curve.items())
        for row in _mean([curve for _, curve in of_seeds if curve]):
            yield {**line, "seed": None, **row}


def _curve(cell: dict[str, Any], quantity: str) -> dict[float, float]:
    values = cell["curves"].get(quantity, [])
    axis = cell["curves"].get(_axis(cell["curves"]), range(len(values)))
    pairs = zip(axis, values, strict=True)
    return {rounded(x): rounded(y) for x, y in pairs if y is not None}


def _mean(of_seeds: list[dict[float, float]]) -> Iterator[dict[str, float]]:
    """Mean ± standard deviation, where every seed has a value: those left would flatter."""
    for x in sorted(set.intersection(*map(set, of_seeds))) if of_seeds else ():
        values = [curve[x] for curve in of_seeds]
        mean = statistics.fmean(values)
        spread = statistics.stdev(values) if len(values) > 1 else 0.0
        bounds = {"low": rounded(mean - spread), "high": rounded(mean + spread)}
        yield {"x": x, "y": rounded(mean), **bounds}


def _curves(result: Result, quantity: str, rows: list[dict[str, Any]], words: Words) -> Spec:
    called = labels(result, words)
    colour, dash = looks("arm", {called[name]: look for name, look in styles(result).items()})
    scale = alt.Scale(zero=False)
    against = words.quantity(_axis(result["cells"][0]["curves"]) or "order")
    base = alt.Chart(data(rows)).encode(
        x=alt.X("x:Q", title=against),
        y=alt.Y("y:Q", title=None, scale=scale),
        color=colour,
    )
    base = base.transform_filter("datum.place === place")
    means = base.transform_filter("datum.seed === null")
    seeds = base.transform_filter("datum.seed !== null")
    band = means.mark_area(aria=False, opacity=0.16).encode(
        y=alt.Y("low:Q", title=None, scale=scale), y2="high:Q"
    )
    thin = seeds.mark_line(aria=False, strokeWidth=0.8, opacity=0.45)
    mean = means.mark_line(aria=False, strokeWidth=2.2).encode(strokeDash=dash)
    layers = [band, thin.encode(strokeDash=dash, detail="seed:N"), mean]
    chart = alt.LayerChart(layer=layers).add_params(
        alt.param(name="place", value=opening(result, words))
    )
    return finish(
        chart.properties(height=220),
        words.quantity(quantity),
        _ends(rows, opening(result, words), words),
    )


def _ends(rows: list[dict[str, Any]], where: str, words: Words) -> str:
    """Where the mean of each arm ends at the place that is shown first, in words."""
    ends = {r["arm"]: r["y"] for r in rows if r["seed"] is None and r["place"] == where}
    return words("mean line") + " " + "; ".join(f"{arm}: {y:.3g}" for arm, y in ends.items())


def heat(result: Result, words: Words) -> tuple[str, Spec] | None:
    """What is measured, and its mean over the seeds at every place in the grid; None without one."""
    if len(places(result, words)) < 2:  # one place is no grid
        return None
    quantity = next(
        name for name in ("test_accuracy", *result["cells"][0]["values"])
        if name in result["cells"][0]["values"]
    )  # fmt: skip
    rows = _means(result, quantity, words)
    if not rows:
        return None
    # a column's name takes as many lines as it needs: Vega would leave out every second one
    width = NARROW[words.language]
    lines = {name: textwrap.wrap(name, width) for name in labels(result, words).values()}
    low, high = min(r["mean"] for r in rows), max(r["mean"] for r in rows)
    base = alt.Chart(data(rows)).encode(
        x=alt.X("arm:N", title=None, sort=list(labels(result, words).values()),
                axis=alt.Axis(labelAngle=0, orient="top", labelLimit=0, labelOverlap=False,
                             labelExpr=f"{json.dumps(lines, ensure_ascii=False)}[datum.label]")),
        y=alt.Y("place:N", title=None, sort=places(result, words), axis=alt.Axis(labelLimit=150)),
    )  # fmt: skip
    shades = alt.Scale(domain=[low, max(high, low + 1e-9)], range=SHADES, interpolate="rgb")
    cells = base.mark_rect(aria=False).encode(color=alt.Color("mean:Q", scale=shades, legend=None))
    dark = alt.datum.mean > low + WHITE_FROM * (high - low)
    numbers = base.mark_text(aria=False, fontSize=13).encode(
        text=alt.Text("mean:Q", format=".3~g"),
        color=alt.condition(dark, alt.value("#fff"), alt.value("#10202f")),
    )
    chart = alt.LayerChart(layer=[cells, numbers]).properties(
        height=28 * len(places(result, words))
    )
    said = "; ".join(f"{r['arm']}, {r['place']}: {r['mean']:.3g}" for r in rows)
    return quantity, finish(chart, words.quantity(quantity), said)


def _means(result: Result, quantity: str, words: Words) -> list[dict[str, Any]]:
    called = labels(result, words)
    found: dict[tuple[str, str], list[float]] = {}
    for cell in result["cells"]:
        if (value := cell["values"].get(quantity)) is not None:
            found.setdefault((called[cell["arm"]], place(cell["point"], words)), []).append(value)
    return [
        {"arm": arm, "place": where, "mean": rounded(statistics.fmean(values))}
        for (arm, where), values in found.items()
    ]
