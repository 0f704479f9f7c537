"""The page's charts, as Vega-Lite specifications made with Altair.

Colours are CSS variables that the page defines for light and dark; what a reader can change (how
far to draw, which arms, against what, which statistic) is a signal that the page's controls set.
"""

from collections.abc import Iterable
from typing import Any

import altair as alt
import numpy as np

from batchnorm.lab.record import Evaluation, Record
from batchnorm.lab.summary import QUANTITIES, Point
from batchnorm.views.lines import STYLES, Line, Style, accuracy_lines, quantity_lines
from batchnorm.views.words import Words

Spec = dict[str, Any]

STATISTICS = ("input_mean", "input_var", "output_mean", "output_var", "weight", "bias")
AXES = ("epoch", "seconds")
LAYERS = 8  # at most: a deep network has more than a page can show
BAND = {"low": 5, "middle": 50, "high": 95}  # percentiles over the channels
SOLID = [1, 0]  # dashes, as Vega writes them
DIGITS = 5  # of a number in the page; the record has all of them


def accuracy(record: Record, words: Words) -> Spec:
    """Test accuracy in all its lines, up to an epoch."""
    lines = accuracy_lines(record, words)
    last = max(cell.last.epoch for cell in record.cells)
    x = alt.X("epoch:Q", title=words("epoch"), scale=alt.Scale(domain=[0, last]))
    y = alt.Y("value:Q", title=None, scale=alt.Scale(domain=[0, 1]))
    chart = _lines(lines, x, y).add_params(alt.param(name="until", value=last))
    chart = chart.transform_filter("datum.epoch <= until")
    return finish(chart.properties(height=340), words("test_accuracy"), _ends(lines))


def quantities(record: Record, words: Words) -> dict[str, Spec]:
    """A chart a quantity, a line an arm, against epochs or seconds."""
    charts = {}
    for quantity in QUANTITIES:
        if not (lines := quantity_lines(record, quantity, words)):
            continue
        x = alt.X("x:Q", title=None)
        y = alt.Y("value:Q", title=None, scale=alt.Scale(zero=False))
        chart = _lines(lines, x, y).add_params(
            alt.param(name="axis", value="epoch"), _shown(record)
        )
        chart = chart.transform_calculate(x="datum[axis]").transform_filter(_ARM_IS_SHOWN)
        charts[quantity] = finish(chart.properties(height=200), words(quantity), _ends(lines))
    return charts


def layers(record: Record, words: Words) -> dict[str, Spec]:
    """A chart a layer: the channels' median and band over the epochs, of the first seed."""
    return {place: _layer(record, place, words) for place in shown_layers(record)}


def shown_layers(record: Record) -> list[str]:
    """The places of normalization, evenly thinned where there are many."""
    places = record.cells[0].header.layers
    count = min(LAYERS, len(places))
    return [places[round(i)] for i in np.linspace(0, len(places) - 1, count)]


def table(record: Record) -> list[dict[str, Any]]:
    """Every number of the curves, a row an evaluation."""
    return [
        {"arm": cell.config.arm, "seed": cell.config.seed}
        | {name: getattr(evaluation, name) for name in (*AXES, *QUANTITIES)}
        for cell in record.cells
        for evaluation in cell.evaluations
    ]


def _lines(lines: list[Line], x: alt.X, y: alt.Y) -> alt.LayerChart:
    """The mean over the seeds, each seed thin behind it, a cross where one diverged."""
    colour, dash = looks("line", {line.label: (line.arm, line.style) for line in lines})
    base = alt.Chart(data(_rows(lines))).encode(x=x, y=y, color=colour)
    means = base.transform_filter("datum.seed === null")
    layers = [means.mark_line(aria=False, strokeWidth=2.2).encode(strokeDash=dash), hover(means)]
    if any(len(line.cells) > 1 for line in lines):
        seeds = base.transform_filter("datum.seed !== null")
        thin = seeds.mark_line(aria=False, strokeWidth=0.8, opacity=0.45)
        layers.insert(0, thin.encode(strokeDash=dash, detail="seed:N"))
    if any(cell.diverged for line in lines for cell in line.cells):
        ends = base.transform_filter("datum.diverged")
        layers.append(ends.mark_point(aria=False, shape="cross", angle=45, filled=True, size=90))
    return alt.LayerChart(layer=layers)


def looks(field: str, of: dict[str, tuple[str, Style]]) -> tuple[alt.Color, alt.StrokeDash]:
    """Colour and dashes by the values of a field; the page has its own legend."""
    colours = alt.Scale(domain=list(of), range=[f"var(--{arm})" for arm, _ in of.values()])
    dashes = [list(style.dashes) or SOLID for _, style in of.values()]
    return (
        alt.Color(f"{field}:N", scale=colours, legend=None),
        alt.StrokeDash(f"{field}:N", scale=alt.Scale(domain=list(of), range=dashes), legend=None),
    )


def hover(means: alt.Chart) -> Any:
    """The point nearest to the pointer, and its numbers."""
    near = alt.selection_point(
        name="near", nearest=True, on="pointerover", fields=["line", "epoch"], empty=False
    )
    numbers = [
        alt.Tooltip("line:N"),
        alt.Tooltip("epoch:Q"),
        alt.Tooltip("seconds:Q", format=".1f"),
        alt.Tooltip("value:Q", format=".4f"),
    ]
    points = means.mark_point(aria=False, filled=True, size=55)
    opacity = alt.condition(near, alt.value(1), alt.value(0))
    return points.encode(opacity=opacity, tooltip=numbers).add_params(near)


def data(rows: list[dict[str, Any]]) -> alt.InlineData:
    return alt.InlineData(values=rows)


def _rows(lines: Iterable[Line]) -> list[dict[str, Any]]:
    """A row a point; the mean's have no seed."""
    rows = []
    for line in lines:
        rows += [_row(line, None, point) for point in line.mean]
        for cell, points in line.seeds:
            if len(line.cells) > 1 or cell.diverged:
                rows += [_row(line, cell.config.seed, point) for point in points]
            if cell.diverged and points:
                rows[-1]["diverged"] = True
    return rows


def _row(line: Line, seed: int | None, point: Point) -> dict[str, Any]:
    numbers = {name: rounded(value) for name, value in point._asdict().items()}
    return {"line": line.label, "arm": line.arm, "seed": seed, **numbers}


_ARM_IS_SHOWN = "indexof(shown, datum.arm) >= 0"


def _shown(record: Record) -> alt.Parameter:
    return alt.param(name="shown", value=record.arms)


def _layer(record: Record, place: str, words: Words) -> Spec:
    colour, dash = looks("arm", {arm: (arm, STYLES[arm]) for arm in record.arms})
    base = alt.Chart(data(_layer_rows(record, place))).encode(
        x=alt.X("epoch:Q", title=None), color=colour
    )
    base = base.transform_filter("datum.statistic === statistic").transform_filter(_ARM_IS_SHOWN)
    scale = alt.Scale(zero=False)
    band = base.mark_area(aria=False, opacity=0.18).encode(
        y=alt.Y("low:Q", title=None, scale=scale), y2="high:Q"
    )
    median = base.mark_line(aria=False, strokeWidth=1.8).encode(
        y=alt.Y("middle:Q", title=None, scale=scale), strokeDash=dash
    )
    chart = alt.LayerChart(layer=[band, median]).add_params(
        alt.param(name="statistic", value=STATISTICS[0]), _shown(record)
    )
    return finish(chart.properties(height=170), place, words("layers heading"))


def _layer_rows(record: Record, place: str) -> list[dict[str, Any]]:
    return [
        {"arm": arm, "epoch": rounded(evaluation.epoch), "statistic": statistic, **band}
        for arm in record.arms
        for evaluation in record.of(arm)[0].evaluations
        for statistic in STATISTICS
        if (band := _band(evaluation, place, statistic))
    ]


def _band(evaluation: Evaluation, place: str, statistic: str) -> dict[str, float]:
    """Percentiles over the channels that are finite; none where the layer has no such number."""
    layer = evaluation.layers.get(place)
    values = [v for v in (getattr(layer, statistic, None) or []) if v is not None]
    if not values:
        return {}
    found = map(float, np.percentile(values, list(BAND.values())))
    return dict(zip(BAND, map(rounded, found), strict=True))


def finish(chart: alt.LayerChart, name: str, description: str) -> Spec:
    """As a dictionary that fills its figure's width; the description is what is read aloud."""
    chart = chart.properties(width="container", description=f"{name}. {description}")
    spec: Spec = chart.to_dict(validate=True)
    spec.pop("$schema", None)  # an address, and the page names none
    return spec


def _ends(lines: Iterable[Line]) -> str:
    """Each line's last value, in words."""
    ends = (f"{line.label}: {line.mean[-1].value:.3f}" for line in lines if line.mean)
    return "; ".join(ends)


def rounded(value: float) -> float:
    return float(f"{value:.{DIGITS}g}")
