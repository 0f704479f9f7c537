"""Run one cell, wherever: in this process, in another one, on another machine.

    cells/<hash>.jsonl   a training, as `record` has it
    cells/<hash>.json    a probe: its configuration, where it ran, its values and curves

A cell that has its result is not run again.
"""

import dataclasses
import json
import math
import tempfile
import time
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch

from batchnorm.errors import BatchNormError
from batchnorm.lab import files, grid, networks, plugins
from batchnorm.lab.arms import ARMS
from batchnorm.lab.data import Images, Loaders, load
from batchnorm.lab.effects import Outcome
from batchnorm.lab.environment import environment
from batchnorm.lab.progress import Silent
from batchnorm.lab.record import CELLS, Cell, CellConfig, cell_path, finite, is_finished, read_cell
from batchnorm.lab.study import Config, Planned, Probe
from batchnorm.lab.training import threads, train_cell

LAST = (
    "train_loss", "train_accuracy", "test_loss", "test_accuracy", "recalibrated_test_loss",
    "recalibrated_test_accuracy", "held_out_accuracy", "recalibrated_held_out_accuracy", "seconds",
    "examples_per_second",
)  # fmt: skip


def check(config: Config) -> None:
    """What can be known to be wrong before a cell is run."""
    if isinstance(config, CellConfig):
        grid.check(config)
        networks.find(config.network)
        if config.arm not in ARMS:
            raise BatchNormError(
                f"there is no arm called {config.arm!r}. Known are {', '.join(ARMS)}."
            )
    else:
        plugins.resolve(config.function, "probe")


def perform(config: Config, folder: Path, data_dir: Path | None) -> None:
    """Bring a cell to its end, in its file; from where its record stands, if it was killed."""
    if is_done(config, folder):
        return
    if isinstance(config, CellConfig):
        _, build = networks.find(config.network)
        batches = grid.batches_of(_data(config.data, data_dir), None, config)
        train_cell(config, build, batches, folder, Silent())
    else:
        _probe(config, folder, data_dir)


def perform_elsewhere(config: Config, data_dir: Path | None) -> bytes:
    """The same where the folder is out of reach: the file's content is handed back."""
    with tempfile.TemporaryDirectory(prefix="batchnorm-") as temporary:
        folder = Path(temporary)
        perform(config, folder, data_dir)
        return path_of(config, folder).read_bytes()


def path_of(config: Config, folder: Path) -> Path:
    """A cell's file."""
    if isinstance(config, CellConfig):
        return cell_path(folder, config)
    return folder / CELLS / f"{config.hash}.json"


def is_done(config: Config, folder: Path) -> bool:
    """Whether the cell has its result."""
    path = path_of(config, folder)
    if isinstance(config, Probe):
        return path.exists()  # it is written in one move
    return is_finished(path)


@lru_cache(maxsize=1)  # a process has one data set, read once
def _data(spec: str, data_dir: Path | None) -> Images | Loaders:
    return load(spec, data_dir)


def _probe(config: Probe, folder: Path, data_dir: Path | None) -> None:
    images = _data(config.data, data_dir) if config.data else None
    function = plugins.resolve(config.function, "probe")
    start = time.perf_counter()
    with threads(config.threads), torch.random.fork_rng([]):
        torch.manual_seed(config.seed)
        found: dict[str, Any] = function(config.seed, images, **dict(config.options))
    content = {
        "config": dataclasses.asdict(config),
        "environment": environment(),
        "wall_seconds": time.perf_counter() - start,
        "values": {k: finite(v) for k, v in found.items() if not isinstance(v, list)},
        "curves": {k: [finite(x) for x in v] for k, v in found.items() if isinstance(v, list)},
    }
    files.keep(json.dumps(content, allow_nan=False).encode() + b"\n", path_of(config, folder))


def outcome(planned: Planned, folder: Path) -> Outcome | None:
    """What a finished cell gave; None for one that is not finished."""
    config = planned.config
    if not is_done(config, folder):
        return None
    path = path_of(config, folder)
    if isinstance(config, Probe):
        content = json.loads(path.read_text(encoding="utf-8"))
        values, curves = content["values"], content["curves"]
    else:
        cell = read_cell(path)
        assert cell is not None  # noqa: S101  # for the type checker: it is done
        values, curves = _values(cell), _curves(cell)
    return Outcome(planned.arm, planned.point, planned.seed, config.hash, values, curves)


def _values(cell: Cell) -> dict[str, float | None]:
    """The last evaluation; a cell that diverged stands there with what was left of it."""
    values = {name: getattr(cell.last, name) for name in LAST}
    return values | {
        "diverged": float(cell.diverged),
        "parameters": float(cell.header.parameters),
        "variance_ratio": _variance_ratio(cell),
        "recalibration_gain": _difference(
            cell.last.recalibrated_test_accuracy, cell.last.test_accuracy
        ),
    }


def _difference(one: float | None, other: float | None) -> float | None:
    return None if one is None or other is None else one - other


def _variance_ratio(cell: Cell) -> float | None:
    """var in evaluation / running var, the geometric mean over channels and layers.

    What evaluation divides by is not the variance that it meets: 1 where the two agree
    (Li et al. 2018, https://arxiv.org/abs/1801.05134).
    """
    logs = [
        math.log(seen / kept)
        for layer in cell.last.layers.values()
        for seen, kept in zip(layer.input_var, layer.running_var or [], strict=False)
        if seen and kept
    ]
    return math.exp(math.fsum(logs) / len(logs)) if logs else None


def _curves(cell: Cell) -> dict[str, list[float | None]]:
    names = ("epoch", *LAST)
    return {name: [getattr(evaluation, name) for evaluation in cell.evaluations] for name in names}
