"""`report.html`: one file, which asks the network for nothing."""

import dataclasses
import shlex
from collections.abc import Iterable, Iterator
from functools import cache
from itertools import groupby
from pathlib import Path
from typing import Any

import vl_convert
from jinja2 import Environment, PackageLoader, StrictUndefined

from batchnorm.lab.networks import NETWORKS
from batchnorm.lab.record import CellConfig, Record
from batchnorm.lab.summary import QUANTITIES, ArmSummary, summarize
from batchnorm.views import charts, verdict
from batchnorm.views.lines import STYLES, accuracy_lines, arm_name
from batchnorm.views.words import Words, name


def save(record: Record, path: Path, words: Words) -> None:
    """Write the page."""
    path.write_text(render(record, words), encoding="utf-8")


def render(record: Record, words: Words) -> str:
    """The page as a string; whatever a record holds is escaped."""
    header = record.cells[0].header
    network, data = name(header.config.network), name(header.config.data)
    curves, layers = charts.quantities(record, words), charts.layers(record, words)
    specs = {"accuracy": charts.accuracy(record, words)}
    specs |= {f"curve-{quantity}": spec for quantity, spec in curves.items()}
    specs |= {f"layer-{place}": spec for place, spec in layers.items()}
    return fill(
        "report.html.j2",
        words=words,
        title=words("title", network=network, data=data),
        figure=verdict.figure,
        styles=STYLES,
        record=record,
        header=header,
        sentences=verdict.verdict(record, words),
        answers=verdict.is_it(record),
        arms={arm: arm_name(record, arm, words) for arm in record.arms},
        rows=_rows(record, words),
        several=any(len(record.of(arm)) > 1 for arm in record.arms),
        last=max(cell.last.epoch for cell in record.cells),
        lines=accuracy_lines(record, words),
        curves=curves,
        layers=layers,
        quantities=QUANTITIES,
        statistics=charts.STATISTICS,
        axes=charts.AXES,
        evaluations=charts.table(record),
        environments=places(cell.header.environment for cell in record.cells),
        commands=list(commands(record)),
        as_command=is_named(header.config),
        specs=specs,
        libraries=libraries(),
    )


def html(record: Record, words: Words) -> str:
    """The verdict and the table, for a notebook's cell."""
    return fill(
        "notebook.html.j2",
        words=words,
        sentences=verdict.verdict(record, words),
        rows=_rows(record, words),
        folder=record.folder,
    )


def fill(template: str, **values: Any) -> str:
    """A template of this folder with its values, escaped."""
    return _environment().get_template(template).render(**values)


@cache
def _environment() -> Environment:
    return Environment(
        loader=PackageLoader("batchnorm.views", "."),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )


@cache
def libraries() -> str:
    """Vega, Vega-Lite and Vega-Embed as one script that sets `window.vegaEmbed`."""
    bundle: str = vl_convert.javascript_bundle("window.vegaEmbed = vegaEmbed;")
    return bundle.replace("</script", r"<\/script")  # ends no script element early


def _rows(record: Record, words: Words) -> list[dict[str, str]]:
    """The table: a row an arm, its cells by column."""
    summaries = summarize(record)
    rows = [_row(summary, words) for summary in summaries]
    if any(summary.diverged for summary in summaries):
        for row, summary in zip(rows, summaries, strict=True):
            row["diverged"] = f"{len(summary.diverged)}/{len(summary.seeds)}"
    return rows


def _row(arm: ArmSummary, words: Words) -> dict[str, str]:
    accuracies = ("train_accuracy", "test_accuracy", "recalibrated_test_accuracy")
    row = {"arm": words(arm.arm)}
    row |= {key: verdict.number(getattr(arm, key)) for key in ("train_loss", *accuracies)}
    row["examples_per_second"] = verdict.number(arm.examples_per_second, 0)
    row["parameters"] = f"{arm.parameters:,}"
    return row


def places(environments: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """Where it ran, whenever that was; usually one place."""
    found: list[dict[str, Any]] = []
    for environment in environments:
        place = {k: v for k, v in environment.items() if k != "started"}
        if place not in found:
            found.append(place)
    return found


def is_named(config: CellConfig) -> bool:
    """Whether the command line can name the network and the data."""
    network, data = config.network, config.data
    return (network in NETWORKS or ":" in network) and (data == "fashion-mnist" or ":" in data)


def commands(record: Record) -> Iterator[str]:
    """The commands that make the record again: one for each set of arms that share their seeds."""
    by_seeds: dict[tuple[int, ...], list[str]] = {}
    for arm in record.arms:
        seeds = tuple(cell.config.seed for cell in record.of(arm))
        by_seeds.setdefault(seeds, []).append(arm)
    common = record.cells[0].config.without_arm_and_seed()
    for seeds, arms in by_seeds.items():
        # neighbours keep the same distance to their place in the row
        for _, run in groupby(enumerate(seeds), lambda pair: pair[1] - pair[0]):
            first, *others = [seed for _, seed in run]
            yield _command(common, arms, first, 1 + len(others))


def _command(common: dict[str, Any], arms: list[str], seed: int, seeds: int) -> str:
    defaults = {f.name: f.default for f in dataclasses.fields(CellConfig)}
    options = {"arms": ",".join(arms), "seed": seed, "seeds": seeds}
    options |= {name: value for name, value in common.items() if value != defaults[name]}
    # not 2 everywhere: by default as many as torch uses on the machine
    options["threads"] = common["threads"]
    if common["network"] != "lenet":
        options["initialization"] = common["initialization"]
    words = [f"--{name.replace('_', '-')} {shlex.quote(str(v))}" for name, v in options.items()]
    return " ".join(["batchnorm compare", *words])
