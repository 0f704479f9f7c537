"""Whole training steps before and after `convert`, and the LeNet epoch: torch.nn's norms beside ours.

    python benchmarks/networks.py [--networks resnet18,lenet] [--rounds 9] [--json FILE] [--markdown FILE]

A step is forward, loss, backward and SGD. The three arms begin with the same weights and run in one
process, in turn; a number is the median of the rounds' ratios, since seconds drift on a shared
machine. The targets follow from the norms' share of a step by Amdahl's law. Memory is as the process
was started with: docs/performance.md names the settings.
"""

import copy
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass

import torch
import torchvision
from torch import Tensor, nn
from torch.nn import functional as F

import batchnorm
import figures
import lenet
from batchnorm.lab.data import fashion_mnist
from batchnorm.lab.environment import environment
from batchnorm.views import markdown

CLASSES = 1000
LAYOUTS = {"NCHW": torch.contiguous_format, "channels_last": torch.channels_last}
ARMS = ("torch.nn", "convert", "convert(fuse=True)")


@dataclass(frozen=True)
class Workload:
    """A network and a batch, and what is asked of convert(fuse=True): torch.nn ÷ ours."""

    build: Callable[[], nn.Module]
    batch: int
    size: int
    target: dict[str, float]  # by layout


WORKLOADS = {
    "resnet18": Workload(
        torchvision.models.resnet18, 16, 128, {"NCHW": 1.13, "channels_last": 1.08}
    ),
    "resnet50": Workload(
        torchvision.models.resnet50, 8, 160, {"NCHW": 1.15, "channels_last": 1.10}
    ),
    "densenet121": Workload(
        torchvision.models.densenet121, 8, 128, {"NCHW": 1.20, "channels_last": 1.15}
    ),
    "mobilenet_v3_large": Workload(
        torchvision.models.mobilenet_v3_large, 16, 160, {"NCHW": 1.23, "channels_last": 1.22}
    ),
}
LENET = "lenet"
LENET_TARGET = 1 / 0.68  # an epoch with our kernels takes 0.68 of one with torch.nn's


@dataclass(frozen=True)
class Row:
    """Seconds of the arms, a number a round."""

    network: str
    layout: str
    what: str
    target: float
    seconds: dict[str, list[float]]

    def ratios(self, arm: str) -> list[float]:
        """torch.nn ÷ the arm, round by round."""
        pairs = zip(self.seconds[ARMS[0]], self.seconds[arm], strict=True)
        return [theirs / ours for theirs, ours in pairs]

    def cells(self) -> list[str]:
        """For a table."""
        ratios = [self.ratios(arm) for arm in ARMS[1:]]
        return [
            self.network, self.what, self.layout,
            f"{statistics.median(self.seconds[ARMS[0]]) * 1e3:.0f}",
            *(f"{statistics.median(r):.2f} ({min(r):.2f} to {max(r):.2f})" for r in ratios),
            f"{self.target:.2f}",
        ]  # fmt: skip


HEADER = [
    "network",
    "",
    "layout",
    "torch.nn ms",
    *(f"torch.nn ÷ {arm}" for arm in ARMS[1:]),
    "target",
]


def arms_of(model: nn.Module) -> dict[str, nn.Module]:
    """The model, and what `convert` makes of it."""
    return {
        ARMS[0]: model,
        ARMS[1]: batchnorm.convert(copy.deepcopy(model)),
        ARMS[2]: batchnorm.convert(copy.deepcopy(model), fuse=True),
    }


def steps(workload: Workload, layout: str) -> dict[str, Callable[[], float]]:
    """For each arm a function that does a step and tells the seconds."""
    torch.manual_seed(0)
    form = LAYOUTS[layout]
    images = torch.randn(workload.batch, 3, workload.size, workload.size)
    images = images.contiguous(memory_format=form)
    labels = torch.randint(CLASSES, (workload.batch,))
    model = workload.build().to(memory_format=form)
    return {name: _step(arm.train(), images, labels) for name, arm in arms_of(model).items()}


def _step(model: nn.Module, images: Tensor, labels: Tensor) -> Callable[[], float]:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)

    def step() -> float:
        start = time.perf_counter()
        optimizer.zero_grad()
        F.cross_entropy(model(images), labels).backward()
        optimizer.step()
        return time.perf_counter() - start

    return step


def epochs(train_images: int) -> dict[str, Callable[[], float]]:
    """The LeNet epoch of benchmarks/lenet.py, images in memory, for each arm."""
    images = lenet.first(fashion_mnist(), train_images)
    model, epoch = lenet.our_way(images, "batch-torch")

    def one(arm: nn.Module) -> Callable[[], float]:
        return lambda: lenet.train(arm, epoch)

    return {name: one(arm) for name, arm in arms_of(model).items()}


def measure(
    ways: dict[str, Callable[[], float]], rounds: int, calls: int
) -> dict[str, list[float]]:
    """In turn, every round beginning with another; a number is the median of `calls`."""
    for way in ways.values():
        way()
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for name in figures.in_turn(ways, rounds):
        seconds[name].append(statistics.median(ways[name]() for _ in range(calls)))
    return seconds


def run(names: list[str], rounds: int, train_images: int) -> list[Row]:
    """Time what is named, and print a line each."""
    rows = []
    print(" | ".join(HEADER))
    for name in names:
        for layout in LAYOUTS if name != LENET else ("NCHW",):
            if name == LENET:
                what, target, ways, calls = "epoch", LENET_TARGET, epochs(train_images), 1
            else:
                workload = WORKLOADS[name]
                what = f"{workload.batch} × {workload.size}²"
                target, ways, calls = workload.target[layout], steps(workload, layout), 3
            rows.append(Row(name, layout, what, target, measure(ways, rounds, calls)))
            print(" | ".join(rows[-1].cells()), flush=True)
    return rows


def main() -> None:
    """Parse, measure, write."""
    parser = figures.parser(__doc__, "networks")
    known = [*WORKLOADS, LENET]
    parser.add_argument("--networks", default=",".join(known), help=f"of {', '.join(known)}")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--train-images", type=int, default=60_000, help="of LeNet's epoch")
    options = parser.parse_args()
    names = [name.strip() for name in options.networks.split(",")]
    if unknown := set(names) - set(known):
        parser.error(f"there is no network {min(unknown)!r}; there are {', '.join(known)}")
    if options.rounds < 1:
        parser.error(f"--rounds is {options.rounds} and should be a whole number from 1")
    figures.check(options, "networks")
    where = environment()
    line = (
        f"{figures.measured_on(where)}; medians of {options.rounds} rounds in turn, in brackets "
        "the least and the most"
    )
    print(line)
    rows = run(names, options.rounds, options.train_images)
    figures.save(options.json, {"environment": where, "rows": [asdict(row) for row in rows]})
    table = markdown.table(HEADER, [row.cells() for row in rows], words=3)
    figures.publish(options, "networks", line, table)


if __name__ == "__main__":
    main()
