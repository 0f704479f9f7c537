"""The layers beside torch's, on this machine: seconds side by side, and what memory allows.

Everything that is compared runs in one process, in turn, round by round; what counts is the median of
the rounds' ratios. An allocator's settings hold for a process, so each setting has a process.

    default       as the process was started: glibc returns a tensor over 32 MB to the system at once
    huge pages    THP_MEM_ALLOC_ENABLE=1, torch's own switch
    reused        glibc keeps what was freed
"""

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from batchnorm import layers
from batchnorm.errors import BatchNormError

SETTINGS: dict[str, dict[str, str]] = {
    "reused": {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": str(2**34)},
    "default": {},
    "huge pages": {"THP_MEM_ALLOC_ENABLE": "1"},
}
HERE = "here"  # whatever this process has
LEAST = 2e-3  # seconds of one measurement: short calls are repeated
NOISE = 0.97  # a median ratio from here on is not slower
EQUAL = 1.03


@dataclass(frozen=True)
class Shape:
    """One input."""

    family: str
    sizes: tuple[int, ...]
    channels_last: bool = False

    @property
    def name(self) -> str:
        sizes = " × ".join(map(str, self.sizes))
        return f"{sizes}{', channels_last' if self.channels_last else ''}"

    def tensor(self) -> Tensor:
        x = torch.randn(self.sizes)
        return x.contiguous(memory_format=torch.channels_last) if self.channels_last else x


SHAPES = (
    Shape("LeNet", (256, 6, 28, 28)),
    Shape("few channels", (256, 6, 28, 28), channels_last=True),
    Shape("LeNet", (256, 16, 10, 10)),
    Shape("features", (256, 120)),
    Shape("large", (32, 64, 112, 112)),
    Shape("large", (32, 256, 56, 56)),
    Shape("large", (32, 256, 56, 56), channels_last=True),
    Shape("7 × 7", (32, 2048, 7, 7)),
    Shape("7 × 7", (32, 2048, 7, 7), channels_last=True),
    Shape("features", (4096, 1024)),
    Shape("few samples", (2, 256, 64, 64)),
)


@dataclass(frozen=True)
class Operation:
    """What is timed: a pass of the layer, with what follows it."""

    name: str
    training: bool = True
    forward: bool = True
    backward: bool = False
    activation: str | None = None
    residual: bool = False


OPERATIONS = (
    Operation("forward"),
    Operation("forward, ReLU", activation="relu"),
    Operation("forward, sigmoid", activation="sigmoid"),
    Operation("forward, residual, ReLU", activation="relu", residual=True),
    Operation("backward", forward=False, backward=True),
    Operation("both", backward=True),
    Operation("both, ReLU", backward=True, activation="relu"),
    Operation("both, residual, ReLU", backward=True, activation="relu", residual=True),
    Operation("evaluation", training=False),
    Operation("evaluation, ReLU", training=False, activation="relu"),
)


@dataclass(frozen=True)
class Row:
    """One shape and operation: median seconds, and how much longer the others take."""

    family: str
    shape: str
    operation: str
    dtype: str
    threads: int
    setting: str
    seconds: dict[str, float]  # torch, ours, floor, and compiled where it was asked for
    ratio: tuple[float, float, float]  # torch ÷ ours: median, and the quartiles

    @property
    def slower(self) -> bool:
        """Slower than torch, and not by chance."""
        return self.ratio[0] < NOISE and self.ratio[2] < EQUAL

    @property
    def of_floor(self) -> float:
        """Ours ÷ a copy (forward) or a sum (backward) of such tensors."""
        return self.seconds["ours"] / self.seconds["floor"]


Call = Callable[[], object]


def compare(
    *,
    settings: tuple[str, ...] = tuple(SETTINGS),
    threads: tuple[int, ...] = (),
    shapes: tuple[Shape, ...] = SHAPES,
    dtype: torch.dtype = torch.float32,
    rounds: int = 9,
    compiled: bool = False,
    told: Callable[[Row], object] = lambda _: None,
) -> list[Row]:
    """Time every operation on every shape, in every setting.

    Args:
        settings: of SETTINGS, or "here" for this process as it is.
        threads: counts of torch's threads; by default one, and all.
        shapes: the inputs.
        dtype: of the inputs.
        rounds: measurements of each, in turn.
        compiled: torch.compile, too: it compiles every shape and operation for itself.
        told: called with each row as soon as it is known.

    Returns:
        The rows.
    """
    threads = threads or tuple(sorted({1, torch.get_num_threads()}))
    if unknown := set(settings) - {*SETTINGS, HERE}:
        known = ", ".join([*SETTINGS, HERE])
        raise BatchNormError(f"there is no setting {min(unknown)!r}; there are {known}.")
    rows = []
    for setting in settings:
        found = (
            _here(threads, shapes, dtype, rounds, compiled)
            if setting == HERE
            else _elsewhere(setting, threads, shapes, dtype, rounds, compiled)
        )
        for row in found:
            told(row)
            rows.append(row)
    return rows


def _elsewhere(
    setting: str,
    threads: tuple[int, ...],
    shapes: tuple[Shape, ...],
    dtype: torch.dtype,
    rounds: int,
    compiled: bool,
) -> Iterator[Row]:
    """In a process of its own, which writes a line a row."""
    places = ",".join(str(SHAPES.index(shape)) for shape in shapes)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "rows.jsonl"
        command = [
            sys.executable, "-m", "batchnorm.speed", str(path), setting, places,
            ",".join(map(str, threads)), str(dtype).removeprefix("torch."), str(rounds),
            str(int(compiled)),
        ]  # fmt: skip
        path.touch()
        environment = {**os.environ, **SETTINGS[setting]}
        with (
            subprocess.Popen(command, env=environment) as process,  # noqa: S603  # this Python, this module
            path.open() as lines,
        ):
            while True:
                ended = process.poll() is not None
                while line := lines.readline():
                    yield Row(**json.loads(line))
                if ended:
                    break
                time.sleep(0.2)
        if process.returncode:
            raise BatchNormError(
                f"the process that measures with {setting} memory ended with {process.returncode}."
            )


def _here(
    threads: tuple[int, ...],
    shapes: tuple[Shape, ...],
    dtype: torch.dtype,
    rounds: int,
    compiled: bool,
    setting: str = HERE,
) -> Iterator[Row]:
    before = torch.get_num_threads()
    try:
        for count in threads:
            torch.set_num_threads(count)
            for shape in shapes:
                for operation in OPERATIONS:
                    calls = contenders(shape, operation, dtype, compiled=compiled)
                    times = measure(calls, rounds)
                    yield _row(shape, operation, dtype, count, setting, times)
    finally:
        torch.set_num_threads(before)


def _row(
    shape: Shape,
    operation: Operation,
    dtype: torch.dtype,
    threads: int,
    setting: str,
    times: dict[str, list[float]],
) -> Row:
    ratios = [theirs / mine for theirs, mine in zip(times["torch"], times["ours"], strict=True)]
    low, middle, high = statistics.quantiles(ratios, n=4, method="inclusive")
    return Row(
        shape.family, shape.name, operation.name, str(dtype).removeprefix("torch."), threads,
        setting, {name: statistics.median(each) for name, each in times.items()},
        (middle, low, high),
    )  # fmt: skip


def measure(calls: dict[str, Call], rounds: int) -> dict[str, list[float]]:
    """Seconds of a call of each, a number a round; every round begins with another one."""
    repeats = max(1, int(LEAST / min(_seconds(call, 1) for call in _warm(calls).values())))
    found: dict[str, list[float]] = {name: [] for name in calls}
    order = list(calls)
    for _ in range(rounds):
        for name in order:
            found[name].append(_seconds(calls[name], repeats))
        order.append(order.pop(0))
    return found


def _warm(calls: dict[str, Call]) -> dict[str, Call]:
    for call in calls.values():
        call()
    return calls


def _seconds(call: Call, repeats: int) -> float:
    start = time.perf_counter()
    for _ in range(repeats):
        call()
    return (time.perf_counter() - start) / repeats


def contenders(
    shape: Shape, operation: Operation, dtype: torch.dtype, *, compiled: bool = False
) -> dict[str, Call]:
    """torch's layer and activation, ours, and what memory allows, on the same tensors."""
    x = shape.tensor().to(dtype).requires_grad_(operation.backward)
    other = torch.randn_like(x)
    residual = other if operation.residual else None
    channels = shape.sizes[1]
    theirs: nn.Module = {2: nn.BatchNorm1d, 4: nn.BatchNorm2d}[x.dim()](channels)
    ours: nn.Module = {2: layers.BatchNormAct1d, 4: layers.BatchNormAct2d}[x.dim()](
        channels, activation=operation.activation
    )
    activate = {None: None, "relu": F.relu_, "sigmoid": torch.sigmoid_}[operation.activation]

    def of_torch(x: Tensor) -> Tensor:
        y: Tensor = theirs(x)
        if residual is not None:
            y += residual
        return y if activate is None else activate(y)

    def of_ours(x: Tensor) -> Tensor:
        y: Tensor = ours(x) if residual is None else ours(x, residual)
        return y

    ways = {"torch": (theirs, of_torch), "ours": (ours, of_ours)}
    if compiled and operation.forward:
        ways["compiled"] = theirs, torch.compile(of_torch, dynamic=False)
    calls = {
        name: _call(way, x, other, list(module.train(operation.training).parameters()), operation)
        for name, (module, way) in ways.items()
    }
    calls["floor"] = _floor(x.detach(), other, operation)
    return calls


def _call(
    way: Callable[[Tensor], Tensor],
    x: Tensor,
    dy: Tensor,
    parameters: list[Tensor],
    operation: Operation,
) -> Call:
    leaves = [x, *parameters]

    def forward() -> None:
        with torch.no_grad():
            way(x)

    def both() -> None:
        torch.autograd.grad(way(x), leaves, dy)

    if not operation.backward:
        return forward
    if operation.forward:
        return both
    y = way(x)
    return lambda: torch.autograd.grad(y, leaves, dy, retain_graph=True)


def _floor(x: Tensor, other: Tensor, operation: Operation) -> Call:
    """As few bytes as such a pass must move: a copy forward, a sum where two tensors are read."""

    def forward() -> Tensor:
        return x + other if operation.residual else x.clone()

    def both() -> None:
        y = forward()
        del y
        x + other

    if not operation.backward:
        return forward
    return both if operation.forward else lambda: x + other


def _main(
    path: str, setting: str, places: str, threads: str, dtype: str, rounds: str, compiled: str
) -> None:
    rows = _here(
        tuple(int(count) for count in threads.split(",")),
        tuple(SHAPES[int(place)] for place in places.split(",")),
        getattr(torch, dtype),
        int(rounds),
        bool(int(compiled)),
        setting,
    )
    with Path(path).open("a", encoding="utf-8") as lines:
        for row in rows:
            lines.write(json.dumps(asdict(row)) + "\n")
            lines.flush()


def to_json(rows: list[Row], environment: dict[str, Any]) -> str:
    """For programs."""
    content = {
        "environment": environment,
        "rows": [{**asdict(row), "slower": row.slower, "of_floor": row.of_floor} for row in rows],
    }
    return json.dumps(content, indent=1)


if __name__ == "__main__":
    _main(*sys.argv[1:])
