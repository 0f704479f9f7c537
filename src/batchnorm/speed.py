"""The layers beside torch's, on this machine: seconds side by side, and what memory allows.

Everything that is compared runs in one process, in turn, round by round; what counts is the median of
the rounds' ratios, since seconds drift and ratios of neighbours do not. An allocator's settings hold
for a process, so each setting has a process:

    reused        glibc keeps what was freed
    default       glibc gives a tensor over 32 MB back to the system at once, and asks for it again,
                  but for this library's own, which reuse memory
    huge-pages    THP_MEM_ALLOC_ENABLE=1, torch's own switch
"""

import gc
import json
import math
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from batchnorm import layers
from batchnorm.errors import BatchNormError, brief
from batchnorm.lab.environment import environment

SETTINGS: dict[str, dict[str, str]] = {
    "reused": {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": str(2**34)},
    "default": {},
    "huge-pages": {"THP_MEM_ALLOC_ENABLE": "1"},
}
DTYPES = ("float32", "bfloat16", "float16", "float64")
LEAST = 5e-3  # seconds of one measurement: short calls are repeated
MARGIN = 0.03  # a smaller difference is not seen on a machine that others use, too
CHANCE = 0.05  # how often equal speeds may look like these rounds
AGAIN = 3  # times the rounds, when what looks slower is measured again
OVERHEAD = "overhead"


@dataclass(frozen=True)
class Shape:
    """One input, and the class of inputs that it stands for."""

    family: str
    sizes: tuple[int, ...]
    channels_last: bool = False

    @property
    def name(self) -> str:
        """As people write it."""
        sizes = "×".join(map(str, self.sizes))
        return f"{sizes}{', channels_last' if self.channels_last else ''}"

    @property
    def operations(self) -> tuple["Operation", ...]:
        """What is timed on it: on tiny tensors the call itself, layer against layer."""
        if self.family != OVERHEAD:
            return OPERATIONS
        return tuple(each for each in OPERATIONS if each.fusion == "plain" and each != BACKWARD)

    def tensor(self, dtype: torch.dtype) -> Tensor:
        """Normal numbers in it."""
        x = torch.randn(self.sizes).to(dtype)
        return x.contiguous(memory_format=torch.channels_last) if self.channels_last else x


SHAPES = (
    Shape("NCHW, large", (32, 64, 112, 112)),
    Shape("NCHW, large", (32, 256, 56, 56)),
    Shape("NCHW, few samples", (2, 256, 64, 64)),
    Shape("NCHW, 7×7", (32, 2048, 7, 7)),
    Shape("channels_last beyond L3", (32, 256, 56, 56), channels_last=True),
    Shape("channels_last, 2-D, in L3", (32, 2048, 7, 7), channels_last=True),
    Shape("channels_last, 2-D, in L3", (4096, 1024)),
    Shape("channels_last, C = 6", (256, 6, 28, 28), channels_last=True),
    Shape("LeNet convolutions", (256, 6, 28, 28)),
    Shape("LeNet convolutions", (256, 16, 10, 10)),
    Shape("features", (256, 120)),
    Shape(OVERHEAD, (8, 4)),
    Shape(OVERHEAD, (4, 8, 2, 2)),
)
QUICK = tuple(shape for shape in SHAPES if math.prod(shape.sizes) <= 2_500_000)

PASSES = ("forward", "backward", "both", "evaluation")
FUSIONS = ("plain", "ReLU", "sigmoid", "residual + ReLU")


@dataclass(frozen=True)
class Operation:
    """What is timed: a pass of the layer, with what follows it."""

    step: str  # of PASSES
    fusion: str  # of FUSIONS

    @property
    def activation(self) -> str | None:
        """Its name in this library."""
        return {"plain": None, "sigmoid": "sigmoid"}.get(self.fusion, "relu")

    @property
    def residual(self) -> bool:
        """Whether a tensor of the same shape is added."""
        return self.fusion.startswith("residual")

    @property
    def differentiated(self) -> bool:
        """Whether there is a backward pass."""
        return self.step in {"backward", "both"}


BACKWARD = Operation("backward", "plain")
OPERATIONS = tuple(Operation(step, fusion) for fusion in FUSIONS for step in PASSES)


@dataclass(frozen=True)
class Plan:
    """What is measured in one process."""

    shapes: tuple[Shape, ...] = SHAPES
    dtype: str = "float32"
    threads: tuple[int, ...] = (1,)
    rounds: int = 9
    compiled: bool = False


@dataclass(frozen=True)
class Row:
    """One shape and operation: seconds of a call, a number a round, of everyone who was timed."""

    family: str
    shape: str
    step: str
    fusion: str
    dtype: str
    threads: int
    setting: str
    times: dict[str, list[float]]  # torch, ours, floor, and compiled where it was asked for

    def seconds(self, name: str) -> float:
        """The median."""
        return statistics.median(self.times[name])

    def ratios(self, above: str, below: str) -> list[float]:
        """Of the two, round by round."""
        pairs = zip(self.times[above], self.times[below], strict=True)
        return [first / second for first, second in pairs]

    def ratio(self, above: str = "torch", below: str = "ours") -> float:
        """The median of the rounds' ratios."""
        return statistics.median(self.ratios(above, below))

    @property
    def quartiles(self) -> tuple[float, float]:
        """Of torch ÷ ours: half of the rounds lie between."""
        ratios = self.ratios("torch", "ours")
        if len(ratios) == 1:
            return ratios[0], ratios[0]
        low, _, high = statistics.quantiles(ratios, n=4, method="inclusive")
        return low, high

    @property
    def slower(self) -> bool:
        """Slower than torch, by more than the margin, and not by chance."""
        ratios = self.ratios("torch", "ours")
        return self.ratio() < 1 - MARGIN and chance(ratios) < CHANCE

    def __str__(self) -> str:
        low, high = self.quartiles
        return (
            f"{self.shape}, {self.step}, {self.fusion}, {self.dtype}, {self.threads} "
            f"thread{'s' * (self.threads > 1)}, {self.setting}: torch ÷ ours {self.ratio():.2f} "
            f"({low:.2f} to {high:.2f})"
        )

    def content(self) -> dict[str, Any]:
        """For programs: the rounds, and what is computed from them."""
        low, high = self.quartiles
        return {
            **asdict(self),
            "medians": {name: self.seconds(name) for name in self.times},
            "torch_to_ours": {"median": self.ratio(), "quartiles": [low, high]},
            "ours_to_floor": self.ratio("ours", "floor"),
            "slower": self.slower,
        }


def chance(ratios: list[float]) -> float:
    """P(as many of n ratios below 1, or more | each is there with probability 1/2): the sign test.

    It knows nothing of how times are distributed, and so fewer than five rounds prove nothing.
    """
    count = len(ratios)
    below = sum(ratio < 1 for ratio in ratios)
    return sum(math.comb(count, k) for k in range(below, count + 1)) / 2.0**count


@dataclass
class Report:
    """The rows, and where they come from."""

    plan: Plan
    settings: tuple[str, ...]
    environment: dict[str, Any]
    rows: list[Row] = field(default_factory=list)
    interrupted: bool = False
    failure: str | None = None  # why it ended early

    @property
    def slower(self) -> list[Row]:
        """Where this library loses to torch."""
        return [row for row in self.rows if row.slower]

    @property
    def status(self) -> int:
        """Of the command: 130 interrupted, 2 ended early, 1 slower than torch somewhere."""
        return 130 if self.interrupted else 2 if self.failure else 1 if self.slower else 0


def bench(
    *,
    settings: tuple[str, ...] | None = None,
    threads: tuple[int, ...] | None = None,
    dtype: str = "float32",
    rounds: int | None = None,
    compiled: bool = False,
    quick: bool = False,
    told: Callable[[Row], object] = lambda _: None,
) -> Report:
    """Time every operation on every shape, in every setting.

    Args:
        settings: of SETTINGS, by default those that this system's allocator has; with `quick` the
            first.
        threads: counts of torch's threads; by default one, and all; with `quick` all.
        dtype: of the inputs: float32, bfloat16, float16, float64.
        rounds: measurements of each, in turn; 9, or 5 with `quick`.
        compiled: torch.compile, too: it compiles every shape and operation anew.
        quick: the shapes that take seconds.
        told: called with each row as soon as it is known.

    Returns:
        The report; what was measured before an interruption is in it.

    Raises:
        BatchNormError: an unknown setting or dtype, fewer than one round or thread.
    """
    settings = settings or available()[: 1 if quick else None]
    everyone = torch.get_num_threads()
    plan = Plan(
        QUICK if quick else SHAPES,
        dtype,
        threads or tuple(sorted({everyone if quick else 1, everyone})),
        (5 if quick else 9) if rounds is None else rounds,
        compiled,
    )
    _check(plan, settings)
    report = Report(plan, settings, environment())
    try:
        for setting in settings:
            for row in apart(plan, setting):
                report.rows.append(row)
                told(row)
    except KeyboardInterrupt:
        report.interrupted = True
    except BatchNormError as error:
        report.failure = str(error)
    return report


def available() -> tuple[str, ...]:
    """The settings that have an effect here: the variables are read by glibc, and by torch on Linux."""
    return tuple(SETTINGS) if platform.libc_ver()[0] == "glibc" else ("default",)


def _check(plan: Plan, settings: tuple[str, ...]) -> None:
    here = available()
    for setting in settings:
        if setting not in SETTINGS:
            known = ", ".join(SETTINGS)
            raise BatchNormError(f"there is no setting {setting!r}; there are {known}.")
        if setting not in here:
            raise BatchNormError(
                f"the setting {setting!r} needs glibc, and this system has another C library. "
                "Leave it out."
            )
    if plan.dtype not in DTYPES:
        known = ", ".join(DTYPES)
        raise BatchNormError(f"there is no timing for dtype {plan.dtype!r}; there is {known}.")
    for name, value in (("rounds", plan.rounds), ("threads", min(plan.threads))):
        if value < 1:
            raise BatchNormError(f"{name} is {value} and should be a whole number from 1.")


def apart(plan: Plan, setting: str) -> Iterator[Row]:
    """The rows, measured in a process of the setting, each as soon as it is known."""
    ours = {name for variables in SETTINGS.values() for name in variables}
    variables = {name: value for name, value in os.environ.items() if name not in ours}
    # -P: a file in the current folder named like a module would be imported in its place
    command = [sys.executable, "-P", "-m", "batchnorm.speed", setting, json.dumps(asdict(plan))]
    with subprocess.Popen(  # noqa: S603  # this module
        command,
        env=variables | SETTINGS[setting],
        stdout=subprocess.PIPE,
        text=True,
        process_group=0,  # Ctrl-C reaches this process alone, which ends the other
    ) as process:
        assert process.stdout is not None  # noqa: S101  # for the type checker
        try:
            for line in process.stdout:
                yield _read(line)
        except BaseException:  # an interruption, or nobody wants the rest
            process.terminate()
            raise
    if process.returncode:
        raise BatchNormError(
            f"the process that measures with {setting} memory ended with {process.returncode}. "
            "If this machine is short of memory, --quick needs little."
        )


def _read(line: str) -> Row:
    content = json.loads(line)
    if "error" in content:
        raise BatchNormError(content["error"])
    return Row(**content)


def here(plan: Plan, setting: str) -> Iterator[Row]:
    """The rows, measured in this process."""
    before = torch.get_num_threads()
    try:
        for count in plan.threads:
            torch.set_num_threads(count)
            for shape in plan.shapes:
                for operation in shape.operations:
                    yield _row(plan, setting, count, shape, operation)
    finally:
        torch.set_num_threads(before)


def _row(plan: Plan, setting: str, threads: int, shape: Shape, operation: Operation) -> Row:
    def timed(rounds: int) -> Row:
        calls = contenders(shape, operation, getattr(torch, plan.dtype), compiled=plan.compiled)
        return Row(
            shape.family, shape.name, operation.step, operation.fusion, plan.dtype, threads,
            setting, measure(calls, rounds),
        )  # fmt: skip

    row = timed(plan.rounds)
    # among hundreds of rows some look slower by chance; the second measurement decides
    return timed(AGAIN * plan.rounds) if row.slower else row


Call = Callable[[], object]


def measure(calls: dict[str, Call], rounds: int) -> dict[str, list[float]]:
    """Seconds of a call of each, a number a round; every round begins with another one."""
    repeats = {}
    for name, call in calls.items():
        call()  # the first one makes what later ones find made
        repeats[name] = max(1, int(LEAST / _seconds(call, 1)))
    found: dict[str, list[float]] = {name: [] for name in calls}
    order = list(calls)
    collecting = gc.isenabled()
    gc.disable()  # a collection would fall on one of them
    try:
        for _ in range(rounds):
            for name in order:
                found[name].append(_seconds(calls[name], repeats[name]))
            order.append(order.pop(0))
    finally:
        if collecting:
            gc.enable()
    return found


def _seconds(call: Call, repeats: int) -> float:
    start = time.perf_counter()
    for _ in range(repeats):
        call()
    return (time.perf_counter() - start) / repeats


THEIRS: dict[int, type[nn.Module]] = {2: nn.BatchNorm1d, 4: nn.BatchNorm2d}
OURS: dict[int, type[nn.Module]] = {2: layers.BatchNorm1d, 4: layers.BatchNorm2d}
FUSED: dict[int, type[nn.Module]] = {2: layers.BatchNormAct1d, 4: layers.BatchNormAct2d}


def contenders(
    shape: Shape, operation: Operation, dtype: torch.dtype, *, compiled: bool = False
) -> dict[str, Call]:
    """torch's layer and activation, ours, and what memory allows, on the same tensors."""
    x = shape.tensor(dtype).requires_grad_(operation.differentiated)
    dy = shape.tensor(dtype)
    behind: tuple[Tensor, ...] = ()
    if operation.residual:
        behind = (shape.tensor(dtype).requires_grad_(operation.differentiated),)
    rank, size = x.dim(), {
        "num_features": shape.sizes[1],
        # mixed precision as in training: parameters and statistics are float32 beside short inputs
        "dtype": torch.float64 if dtype is torch.float64 else torch.float32,
    }  # fmt: skip
    theirs = THEIRS[rank](**size)
    plain = operation.fusion == "plain"
    ours = OURS[rank](**size) if plain else FUSED[rank](**size, activation=operation.activation)
    way = theirs if plain else _followed(theirs, operation)
    ways: dict[str, tuple[nn.Module, Callable[..., Tensor]]] = {
        "torch": (theirs, way),
        "ours": (ours, ours),
    }
    if compiled and operation.step != "backward":  # its graph may be run backward only once
        torch.compiler.reset()  # it gives up after eight compilations of the same lines
        ways["compiled"] = theirs, torch.compile(way, dynamic=False)
    calls = {}
    for name, (module, each) in ways.items():
        module.train(operation.step != "evaluation")
        calls[name] = _call(each, (x, *behind), dy, list(module.parameters()), operation)
    if "compiled" in calls:
        _compile(calls["compiled"])
    return calls | {"floor": _floor(x.detach(), dy, operation)}


def _followed(norm: nn.Module, operation: Operation) -> Callable[..., Tensor]:
    """torch's way: the norm, then the sum, then the activation, both in place as networks do it."""
    activate = torch.sigmoid_ if operation.activation == "sigmoid" else F.relu_

    def of_torch(x: Tensor, *residual: Tensor) -> Tensor:
        y: Tensor = norm(x)
        for each in residual:
            y += each
        return activate(y)

    return of_torch


def _compile(call: Call) -> None:
    try:
        call()
    except Exception as error:
        raise BatchNormError(
            f"torch.compile does not work here: {brief(error)}. Leave out --compile."
        ) from error


def _call(
    way: Callable[..., Tensor],
    inputs: tuple[Tensor, ...],
    dy: Tensor,
    parameters: list[Tensor],
    operation: Operation,
) -> Call:
    leaves = [*inputs, *parameters]

    def forward() -> Tensor:
        with torch.no_grad():
            return way(*inputs)

    def both() -> tuple[Tensor, ...]:
        return torch.autograd.grad(way(*inputs), leaves, dy)

    if not operation.differentiated:
        return forward
    if operation.step == "both":
        return both
    y = way(*inputs)
    return lambda: torch.autograd.grad(y, leaves, dy, retain_graph=True)


def _floor(x: Tensor, other: Tensor, operation: Operation) -> Call:
    """torch's fastest operations that read and write as many bytes as the pass must.

    Forward a copy, or a sum where a residual is read, too. Backward a sum, for x and dy are read and
    dx is written; behind a residual and a ReLU the sign has to be read and the residual's gradient
    to be written: a copy more.
    """

    def forward() -> Tensor:
        return x + other if operation.residual else x.clone()

    def backward() -> tuple[Tensor, ...]:
        dx = x + other
        return (dx, other.clone()) if operation.residual else (dx,)

    def both() -> None:
        y = forward()  # which lives as long as the backward pass
        backward()
        del y

    if not operation.differentiated:
        return forward
    return both if operation.step == "both" else backward


def _main(setting: str, content: str) -> None:
    """Measure in this process, and write a line a row."""
    with os.fdopen(os.dup(1), "w", encoding="utf-8") as lines:
        os.dup2(2, 1)  # what a compiler may print is no row
        given = json.loads(content)
        shapes = tuple(
            Shape(each["family"], tuple(each["sizes"]), each["channels_last"])
            for each in given.pop("shapes")
        )
        plan = Plan(shapes=shapes, threads=tuple(given.pop("threads")), **given)
        try:
            for row in here(plan, setting):
                print(json.dumps(asdict(row)), file=lines, flush=True)
        except BatchNormError as error:
            print(json.dumps({"error": str(error)}), file=lines, flush=True)


if __name__ == "__main__":
    _main(*sys.argv[1:])
