"""The layers beside torch's: in a terminal, for programs, in a page, as a picture."""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, NullLocator
from rich import box
from rich.table import Table

from batchnorm.errors import BatchNormError
from batchnorm.speed.cases import FUSIONS, OVERHEAD, PASSES
from batchnorm.speed.rows import Report, Row
from batchnorm.views import markdown
from batchnorm.views.terminal import terminal

INK = "#7a7a7a"  # as readable on white as on black: the picture has no background of its own
LEAST_ROUNDS = 5  # from here on the sign test can find something
COLOURS = dict(zip(FUSIONS, ("#2f81c9", "#d9822b", "#3a9a5b", "#b0559c"), strict=True))


@dataclass(frozen=True)
class Block:
    """The rows of a setting and a count of threads, as a table."""

    title: str
    header: list[str]
    lines: list[list[str]]


def heading(report: Report) -> list[str]:
    """Where the numbers come from."""
    where, plan = report.environment, report.plan
    threads = ", ".join(map(str, plan.threads))
    return [
        f"{where['processor']}, {where['cores']} cores; {where['platform']}",
        (
            f"batchnorm {where['batchnorm']} ({where['backend']}), torch {where['torch']}, "
            f"Python {where['python']}"
        ),
        (
            f"{plan.dtype}; threads {threads}; memory {', '.join(report.settings)}; "
            f"medians of {plan.rounds} rounds in turn; {where['started']}"
        ),
    ]


def legend(report: Report) -> str:
    """What stands in a cell."""
    compiled = " · torch.compile ÷ ours" if report.plan.compiled else ""
    return f"torch eager ÷ ours · ours ÷ what memory allows (copy, sum){compiled}"


def blocks(report: Report) -> Iterator[Block]:
    """A table for each setting and count of threads; at last the overhead of a call."""
    kinds = dict.fromkeys((row.setting, row.threads) for row in report.rows)
    for setting, threads in kinds:
        of_kind = [r for r in report.rows if (r.setting, r.threads) == (setting, threads)]
        title = f"{setting} memory, {threads} thread{'s' * (threads > 1)}"
        large = [row for row in of_kind if row.family != OVERHEAD]
        tiny = [row for row in of_kind if row.family == OVERHEAD]
        if large:
            yield _by_class(title, large)
        if tiny:
            yield _overhead(f"{title}: the call itself, on tiny tensors", tiny)


def _by_class(title: str, rows: list[Row]) -> Block:
    lines = []
    for family in dict.fromkeys(row.family for row in rows):
        first = family
        for shape in dict.fromkeys(row.shape for row in rows if row.family == family):
            for fusion in FUSIONS:
                found = {
                    row.step: _cell(row)
                    for row in rows
                    if (row.family, row.shape, row.fusion) == (family, shape, fusion)
                }
                if found:
                    name = shape if fusion == FUSIONS[0] else ""
                    lines.append([first, name, fusion, *(found.get(s, "") for s in PASSES)])
                    first = ""
    return Block(title, ["class", "shape", "with", *PASSES], lines)


def _cell(row: Row) -> str:
    numbers = [row.ratio(), row.ratio("ours", "floor")]
    if "compiled" in row.times:
        numbers.append(row.ratio("compiled", "ours"))
    return "!" * row.slower + " · ".join(map(_number, numbers))


def _number(value: float) -> str:
    """Three digits or so."""
    return f"{value:.2f}" if value < 10 else f"{value:.1f}" if value < 100 else f"{value:.0f}"


def _overhead(title: str, rows: list[Row]) -> Block:
    header = ["class", "shape", "pass", "torch µs", "ours µs", "torch ÷ ours"]
    lines, before = [], ""
    for row in rows:
        shape = "" if row.shape == before else row.shape
        family = "" if before else row.family
        before = row.shape
        micros = [f"{row.seconds(name) * 1e6:.1f}" for name in ("torch", "ours")]
        lines.append([family, shape, row.step, *micros, "!" * row.slower + _number(row.ratio())])
    return Block(title, header, lines)


def show(report: Report) -> None:
    """Print where it was measured, the tables, and what is slower than torch."""
    console = terminal()
    for line in heading(report):
        console.print(line, markup=False, soft_wrap=True)
    for block in blocks(report):
        console.print(_grid(block))
    if report.rows:
        console.print(legend(report), markup=False, soft_wrap=True)
    for line in verdict(report):
        console.print(line, markup=False, soft_wrap=True)


def _grid(block: Block) -> Table:
    """Class and shape as lines of their own, so that a terminal of 80 columns holds it."""
    grid = Table(
        title=block.title, title_justify="left", box=box.SIMPLE_HEAD, show_edge=False,
        padding=(0, 1, 0, 0),
    )  # fmt: skip
    grid.add_column("class, shape, " + block.header[2], no_wrap=True)
    for name in block.header[3:]:
        grid.add_column(name, justify="right", overflow="fold")
    for family, shape, name, *cells in block.lines:
        if family:
            grid.add_row(family, style="bold")
        if shape:
            grid.add_row(f" {shape.removesuffix(', channels_last')}")  # the class says it
        slower = any(cell.startswith("!") for cell in cells)
        grid.add_row(f"  {name}", *cells, style="red" if slower else "")
    return grid


def verdict(report: Report) -> list[str]:
    """Whether anything is slower than torch, and what; why it ended early."""
    count = len(report.rows)
    sentences = []
    if report.slower:
        sentences.append(f"slower than torch eager in {len(report.slower)} of {count} (!):")
        sentences += [f"  {row}" for row in report.slower]
    elif report.plan.rounds < LEAST_ROUNDS:
        sentences.append(f"{count} measured; fewer than five rounds cannot show what is slower")
    elif count:
        sentences.append(f"nowhere slower than torch eager: {count} measured")
    if report.interrupted:
        sentences.append("interrupted: this is what had been measured")
    if report.failure:
        sentences.append(f"ended early: {report.failure}")
    return sentences


def to_json(report: Report) -> str:
    """For programs: every round of every row."""
    content = {
        "environment": report.environment,
        "rounds": report.plan.rounds,
        "settings": report.settings,
        "interrupted": report.interrupted,
        "failure": report.failure,
        "rows": [row.content() for row in report.rows],
    }
    return json.dumps(content, indent=1, ensure_ascii=False) + "\n"


def to_markdown(report: Report) -> str:
    """For a page."""
    parts = ["\n".join(f"- {line}" for line in heading(report)), f"In a cell: {legend(report)}."]
    for block in blocks(report):
        parts += [f"**{block.title}**", markdown.table(block.header, block.lines, words=3)]
    return "\n\n".join([*parts, "\n".join(verdict(report))])


def draw(report: Report) -> Figure:
    """A panel a pass, a line a shape, a dot a fusion: the first setting, the most threads."""
    threads = max((row.threads for row in report.rows), default=1)
    rows = [r for r in report.rows if (r.setting, r.threads) == (report.settings[0], threads)]
    shapes = list(dict.fromkeys((row.family, row.shape) for row in rows))
    with mpl.rc_context(INKED):
        figure = Figure(figsize=(10.5, 1.9 + 0.42 * len(shapes)), layout="constrained")
        panels = figure.subplots(1, len(PASSES), sharey=True, sharex=True, squeeze=False)[0]
        for axes, step in zip(panels, PASSES, strict=True):
            for row in rows:
                if row.step == step:
                    _draw_row(axes, shapes.index((row.family, row.shape)), row)
            _decorate(axes, step)
        panels[0].set_yticks(range(len(shapes)), _labels(shapes), fontsize="small")
        panels[0].invert_yaxis()
        figure.suptitle(
            f"torch eager ÷ batchnorm ({rows[0].dtype}, {report.settings[0]} memory, "
            f"{threads} thread{'s' * (threads > 1)})" if rows else "nothing was measured",
            x=0.01, ha="left", color=INK,
        )  # fmt: skip
        figure.legend(
            handles=_handles(), loc="outside lower center", ncols=5, frameon=False,
            labelcolor=INK, fontsize="small",
        )  # fmt: skip
    return figure


INKED: dict[Any, Any] = dict.fromkeys(
    ("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color"), INK
)


def _labels(shapes: list[tuple[str, str]]) -> list[str]:
    """The class above the first of its shapes."""
    seen: set[str] = set()
    labels = []
    for family, shape in shapes:
        size = shape.removesuffix(", channels_last")
        labels.append(size if family in seen else f"{family}\n{size}")
        seen.add(family)
    return labels


def _draw_row(axes: Axes, place: int, row: Row) -> None:
    """The median with the quartiles; a tick where memory ends it, for the plain layer."""
    height = place + 0.15 * (FUSIONS.index(row.fusion) - (len(FUSIONS) - 1) / 2)
    colour = COLOURS[row.fusion]
    axes.plot(row.quartiles, [height, height], color=colour, linewidth=1.2, solid_capstyle="butt")
    axes.plot(row.ratio(), height, "o", color=colour, markersize=4.5)
    if row.fusion == FUSIONS[0] and row.family != OVERHEAD:
        axes.plot(row.ratio("torch", "floor"), place, "|", color=INK, markersize=14)


def _decorate(axes: Axes, step: str) -> None:
    axes.set_title(step, loc="left", fontsize="medium", color=INK)
    axes.set_facecolor("none")
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:.3g}×"))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.axvline(1, color=INK, linewidth=1)
    axes.grid(axis="x", color=INK, alpha=0.25)
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.tick_params(axis="y", length=0)


def _handles() -> list[Line2D]:
    dots = [
        Line2D([], [], color=colour, marker="o", linestyle="", label=fusion)
        for fusion, colour in COLOURS.items()
    ]
    limit = Line2D(
        [], [], color=INK, marker="|", markersize=12, linestyle="", label="limit of memory (plain)"
    )
    return [*dots, limit]


def save(report: Report, path: Path) -> None:
    """The picture, by the file's ending."""
    with mpl.rc_context({"svg.hashsalt": "batchnorm"}):
        metadata = {"Date": None} if path.suffix == ".svg" else None
        draw(report).savefig(path, transparent=True, metadata=metadata)


PICTURES = (".svg", ".png", ".pdf")


def place(dtype: str, *, compiled: bool) -> str:
    """Of the tables, in a page."""
    return f"bench {dtype} compiled" if compiled else f"bench {dtype}"


def refuse(picture: Path | None, page: Path | None, where: str) -> None:
    """Say before the measurement, which takes long, what could not be written after it.

    Raises:
        BatchNormError: a picture of another kind, a page without a place for the tables.
    """
    if picture is not None and picture.suffix not in PICTURES:
        kinds = ", ".join(PICTURES)
        raise BatchNormError(f"--picture {picture} should end in one of {kinds}.")
    if page is not None:
        markdown.find(page, where)


def write(report: Report, json_file: Path | None, picture: Path | None, page: Path | None) -> None:
    """The files that were asked for; a page's numbers stay if the new ones are not complete."""
    if json_file is not None:
        json_file.write_text(to_json(report), encoding="utf-8")
    if picture is not None:
        save(report, picture)
    if page is not None and report.status < 2:
        where = place(report.plan.dtype, compiled=report.plan.compiled)
        markdown.refresh(page, where, to_markdown(report))
