"""The record of a comparison: a folder that training appends to and that pictures are made from.

    cells/<hash>.jsonl   first line: the header (configuration, seed, versions, processor, threads);
                         then a line per evaluation; a last line `done`
    cells/<hash>.pt      the checkpoint of a cell that is not done yet

Nothing here trains and nothing here draws.
"""

import dataclasses
import hashlib
import json
import math
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from batchnorm.errors import BatchNormError

FORMAT = 1
CELLS = "cells"
# fields of a configuration that were added to FORMAT 1, and the value that changes nothing
ADDED = {"held_out_images": 0, "test_images": None, "ghost_size": 32}


@dataclass(frozen=True)
class CellConfig:
    """Everything that decides a cell's numbers; two cells with equal configurations are one cell.

    The thread count is part of it: with another count of threads sums are taken in another order,
    and losses differ from the fourth step on.
    """

    arm: str
    seed: int = 0
    network: str = "lenet"
    data: str = "fashion-mnist"
    epochs: int = 10
    batch_size: int = 256
    learning_rate: float = 1.0
    optimizer: str = "sgd"
    schedule: str = "constant"
    momentum: float = 0.0
    weight_decay: float = 0.0
    initialization: str = "xavier-uniform"
    evaluations_per_epoch: int = 2
    recalibration_images: int = 10_000
    train_images: int | None = None  # None: all of them
    device: str = "cpu"
    threads: int = 2
    held_out_images: int = 0  # the last N training images: not trained on, for choices
    test_images: int | None = None  # the first N; None: all of them
    ghost_size: int = 32  # samples in a ghost batch of the arm ghost

    @property
    def hash(self) -> str:
        """A name for the configuration's content, 16 hexadecimal digits."""
        fields = dataclasses.asdict(self)
        for name, default in ADDED.items():  # the records made before keep their names
            if fields[name] == default:
                del fields[name]
        content = json.dumps({"format": FORMAT, **fields}, sort_keys=True)
        return hashlib.sha256(content.encode()).hexdigest()[:16]

    def without_arm_and_seed(self) -> dict[str, Any]:
        """What the cells of one comparison have in common."""
        common = dataclasses.asdict(self)
        del common["arm"], common["seed"]
        return common


@dataclass(frozen=True)
class Header:
    """The first line of a cell: what runs, on what, and what it started from."""

    config: CellConfig
    environment: dict[str, Any]  # versions, processor, cores, platform, started (ISO 8601, UTC)
    parameters: int  # trainable scalars
    initial_weights: str  # SHA-256 of the weights that every arm shares
    data_digest: str  # SHA-256 of the data; of the first test batch where they come from loaders
    train_images: int
    test_images: int
    statistics_images: int  # of the first test batch: for the statistics inside the layers
    steps_per_epoch: int
    layers: list[str]  # the places where the network has batch normalization, in order of the pass


@dataclass(frozen=True)
class LayerStatistics:
    """Per channel, over the first test batch in evaluation mode; lists of length C.

    A number that is not finite (the cell diverged) is None.
    """

    input_mean: list[float | None]
    input_var: list[float | None]  # biased
    output_mean: list[float | None]
    output_var: list[float | None]  # biased
    # None where the arm has no such parameter; length 1 in `batch-note`
    weight: list[float | None] | None
    bias: list[float | None] | None
    running_mean: list[float | None] | None = None  # None where the arm keeps no such statistics
    running_var: list[float | None] | None = None


@dataclass(frozen=True)
class Evaluation:
    """One line of a cell. A number that is not finite is stored as None, since JSON has none."""

    step: int
    epoch: float
    seconds: float  # of training alone, since the start of the cell
    examples_per_second: float | None  # of training alone, since the evaluation before
    train_loss: float | None  # mean over the images of this epoch so far, as the book does
    train_accuracy: float | None
    test_loss: float | None  # with the running statistics
    test_accuracy: float | None
    recalibrated_test_loss: float | None  # with population statistics; None without batch norm
    recalibrated_test_accuracy: float | None
    layers: dict[str, LayerStatistics] = field(default_factory=dict)
    held_out_accuracy: float | None = None  # with the running statistics; None without such images
    recalibrated_held_out_accuracy: float | None = None


@dataclass(frozen=True)
class Done:
    """The last line of a cell."""

    diverged: bool  # a loss was not finite; training stopped there
    seconds: float  # of training alone
    wall_seconds: float  # with evaluations, over all sessions of an interrupted cell


@dataclass(frozen=True)
class Cell:
    """A cell as it was read: its header, its evaluations so far, and its end, if it has one."""

    header: Header
    evaluations: list[Evaluation]
    done: Done | None

    @property
    def config(self) -> CellConfig:
        return self.header.config

    @property
    def last(self) -> Evaluation:
        """The evaluation that counts as the cell's result."""
        return self.evaluations[-1]

    @property
    def diverged(self) -> bool:
        return self.done is not None and self.done.diverged


@dataclass(frozen=True)
class Record:
    """All cells of a folder, in the order of their arms and seeds as they were asked for."""

    folder: Path
    cells: list[Cell]

    @property
    def arms(self) -> list[str]:
        return list(dict.fromkeys(cell.config.arm for cell in self.cells))

    @property
    def seeds(self) -> list[int]:
        return sorted({cell.config.seed for cell in self.cells})

    def of(self, arm: str) -> list[Cell]:
        """The cells of one arm, by seed."""
        return sorted(
            (cell for cell in self.cells if cell.config.arm == arm), key=lambda c: c.config.seed
        )


def json_line(kind: str, content: Header | Evaluation | Done) -> str:
    """One line of a cell's file, newline included; never NaN or Infinity, which JSON lacks."""
    return json.dumps({"kind": kind, **dataclasses.asdict(content)}, allow_nan=False) + "\n"


def finite(value: float | None) -> float | None:
    """The number, or None in place of those that JSON lacks."""
    return float(value) if value is not None and math.isfinite(value) else None


def cell_path(folder: Path, config: CellConfig) -> Path:
    return folder / CELLS / f"{config.hash}.jsonl"


def read_cell(path: Path) -> Cell | None:
    """Read one cell; None where there is no file, or it was killed before its header was whole."""
    if not path.exists():
        return None
    header: Header | None = None
    evaluations: list[Evaluation] = []
    done: Done | None = None
    try:
        for line in _whole_lines(path):
            match line.pop("kind", None):
                case "header":
                    config = CellConfig(**line.pop("config"))
                    header = Header(config=config, **line)
                case "evaluation":
                    layers = {n: LayerStatistics(**v) for n, v in line.pop("layers").items()}
                    evaluations.append(Evaluation(layers=layers, **line))
                case "done":
                    done = Done(**line)
    except (TypeError, KeyError, AttributeError, UnicodeDecodeError) as error:
        # other fields, or no object at all
        raise _not_ours(path, str(error)) from error
    return None if header is None else Cell(header, evaluations, done)


def is_finished(path: Path) -> bool:
    """Whether a cell has its last line."""
    cell = read_cell(path)
    return cell is not None and cell.done is not None


def _not_ours(path: Path, reason: str) -> BatchNormError:
    return BatchNormError(
        f"{path} is not a record of this version of batchnorm ({reason}). Move the file away, and "
        "the checkpoint beside it; its cell is then trained again."
    )


def _whole_lines(path: Path) -> Iterator[dict[str, Any]]:
    with path.open(encoding="utf-8") as lines:
        for number, line in enumerate(lines, start=1):
            if not line.endswith("\n"):
                return  # killed in the middle of a write; training cuts it off and goes on
            try:
                content = json.loads(line)
            except json.JSONDecodeError as error:
                raise _not_ours(path, f"line {number} is not JSON: {error}") from error
            yield content


def read(folder: str | os.PathLike[str]) -> Record:
    """Read every cell of a folder; an error where there is none to read."""
    folder = Path(folder)
    cells = [cell for cell in map(read_cell, sorted((folder / CELLS).glob("*.jsonl"))) if cell]
    if not any(cell.evaluations for cell in cells):
        raise BatchNormError(
            f"{folder} holds no record of a comparison (no evaluation in {folder / CELLS}/*.jsonl). "
            "Make one with `batchnorm compare --out DIR`, or name its folder."
        )
    return Record(folder, in_order([cell for cell in cells if cell.evaluations]))


def in_order(cells: Iterable[Cell]) -> list[Cell]:
    """Cells by arm, in the order in which the arms are listed everywhere, then by seed."""
    from batchnorm.lab.arms import ARMS  # noqa: PLC0415  # arms build layers; reading need not

    rank = {arm: place for place, arm in enumerate(ARMS)}
    return sorted(cells, key=lambda c: (rank.get(c.config.arm, len(rank)), c.config.seed))
