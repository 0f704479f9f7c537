"""What goes into a layer while it is trained: a fan an arm over the steps, and a moving histogram.

A study's cells keep percentiles of it as curves over `step`. The fans are whole as they stand; the
histogram shows one step of theirs, which a slider moves.
"""

import math
import statistics
from collections.abc import Mapping
from itertools import combinations, pairwise
from typing import Any, NamedTuple

import altair as alt

from batchnorm.lab.results import Result
from batchnorm.views import study_charts
from batchnorm.views.charts import Spec, data, finish, looks, rounded
from batchnorm.views.study_charts import LAYER, UNIT
from batchnorm.views.words import Words


class Moment(NamedTuple):
    """The percentiles of an arm at a place and a step, each the mean over the seeds."""

    arm: str
    place: str
    step: float
    values: dict[int, float]  # by percent, in their order


def steps(result: Result) -> list[float]:
    """When the cells looked; empty where none kept percentiles."""
    curves = [cell["curves"] for cell in result["cells"] if LAYER.keys() & cell["curves"].keys()]
    return list(curves[0]["step"]) if curves else []


def fans(result: Result, words: Words) -> dict[tuple[str, str], Spec]:
    """A chart an arm, of all units and of one: the median and the bands around it over the steps."""
    drawn = {}
    for heading, names in (("all units", LAYER), ("one unit", UNIT)):
        moments = _moments(result, names, words)
        ends = _extents(moments)
        for arm in dict.fromkeys(moment.arm for moment in moments):
            mine = [moment for moment in moments if moment.arm == arm]
            drawn[heading, arm] = _fan(result, mine, ends, words)
    return drawn


def _fan(result: Result, moments: list[Moment], ends: dict[str, list[float]], words: Words) -> Spec:
    arm, scale = moments[0].arm, alt.Scale(domain=_domain("ends"), nice=True)
    colour = alt.value(f"var(--{study_charts.styles(result)[arm][0]})")
    base = alt.Chart(data([_row(moment) for moment in moments]))
    base = base.transform_filter("datum.place === place").encode(
        x=alt.X("step:Q", title=words("step"))
    )

    def at(percent: int) -> alt.Y:
        return alt.Y(f"p{percent}:Q", title=None, scale=scale)

    percents = list(moments[0].values)
    bands = [
        base.mark_area(aria=False, opacity=0.16).encode(y=at(low), y2=f"p{high}:Q", color=colour)
        for low, high in combinations(percents, 2)
        if low + high == 100
    ]
    median = base.mark_line(aria=False, strokeWidth=2.2).encode(y=at(50), color=colour)
    now = base.transform_filter("datum.step === moment")
    rule = now.mark_rule(aria=False, strokeDash=[3, 3], color="var(--ink)")
    chart = alt.LayerChart(layer=[*bands, median, rule]).add_params(
        alt.param(name="ends", value=ends), *_parameters(result, words)
    )
    last = [each for each in moments if each.place == study_charts.opening(result, words)][
        -1
    ].values
    said = words("fan label", low=last[percents[0]], middle=last[50], high=last[percents[-1]])
    return finish(chart.properties(height=220), study_charts.labels(result, words)[arm], said)


def moving(result: Result, words: Words) -> Spec:
    """All arms' histograms at one step: between two percentiles lies a known share of the values."""
    called = study_charts.labels(result, words)
    moments = _moments(result, LAYER, words)
    bars: list[dict[str, Any]] = [
        {"arm": called[moment.arm], "place": moment.place, "step": moment.step, **bar}
        for moment in moments
        for bar in _bars(moment.values)
    ]
    colour, _ = looks("arm", {called[a]: look for a, look in study_charts.styles(result).items()})
    tallest: dict[str, list[float]] = {}
    for bar in bars:
        most = tallest.setdefault(bar["place"], [0.0, 0.0])
        most[1] = max(most[1], bar["density"])
    base = alt.Chart(data(bars)).transform_filter("datum.place === place")
    base = base.transform_filter("datum.step === moment").encode(
        x=alt.X("from:Q", title=words("into a unit"), scale=alt.Scale(domain=_domain("ends"))),
        x2="to:Q",
        y=alt.Y("density:Q", title=words("density"), scale=alt.Scale(domain=_domain("tallest"))),
        color=colour,
    )
    filled = base.mark_rect(aria=False, opacity=0.3).encode(y2=alt.datum(0))
    tops = base.mark_rule(aria=False, strokeWidth=2.2)
    chart = alt.LayerChart(layer=[filled, tops]).add_params(
        alt.param(name="ends", value=_extents(moments)),
        alt.param(name="tallest", value=tallest),
        *_parameters(result, words),
    )
    return finish(chart.properties(height=240), words("moving heading"), words("moving text"))


def _parameters(result: Result, words: Words) -> list[alt.Parameter]:
    """The place in the grid, and the step: at first the last one, where training ends."""
    return [
        alt.param(name="place", value=study_charts.opening(result, words)),
        alt.param(name="moment", value=steps(result)[-1]),
    ]


def _extents(moments: list[Moment]) -> dict[str, list[float]]:
    """The least and the largest value at each place: one that diverged would dwarf the others."""
    found: dict[str, list[float]] = {}
    for moment in moments:
        ends = found.setdefault(moment.place, [math.inf, -math.inf])
        ends[:] = min(ends[0], *moment.values.values()), max(ends[1], *moment.values.values())
    return found


def _domain(parameter: str) -> list[Any]:
    """A scale's two ends at the place that is shown."""
    return [alt.ExprRef(expr=f"{parameter}[place][{end}]") for end in (0, 1)]


def _moments(result: Result, names: Mapping[str, int], words: Words) -> list[Moment]:
    """By arm, place and step, where every seed has its percentiles."""
    groups: dict[tuple[str, str], list[dict[str, list[float | None]]]] = {}
    for cell in result["cells"]:
        if names.keys() & cell["curves"].keys():
            key = cell["arm"], study_charts.place(cell["point"], words)
            groups.setdefault(key, []).append(cell["curves"])
    return [
        Moment(arm, where, step, values)
        for (arm, where), of_seeds in groups.items()
        for index, step in enumerate(steps(result))
        if (values := _values(of_seeds, names, index))
    ]


def _values(
    of_seeds: list[dict[str, list[float | None]]], names: Mapping[str, int], index: int
) -> dict[int, float]:
    found = {}
    for name in names.keys() & of_seeds[0].keys():
        values = [value for curves in of_seeds if (value := curves[name][index]) is not None]
        if len(values) < len(of_seeds):  # one diverged: the others' mean would flatter
            return {}
        found[names[name]] = rounded(statistics.fmean(values))
    return dict(sorted(found.items()))


def _row(moment: Moment) -> dict[str, Any]:
    percentiles = {f"p{percent}": value for percent, value in moment.values.items()}
    return {"place": moment.place, "step": moment.step, **percentiles}


def _bars(values: Mapping[int, float]) -> list[dict[str, float]]:
    """Between neighbouring percentiles: how densely the values lie there, an integral of 1 in all."""
    return [
        {"from": low, "to": high, "density": rounded((two - one) / 100 / (high - low))}
        for (one, low), (two, high) in pairwise(values.items())
        if high > low
    ]
