"""What a norm, an activation and a pooling in one pass could save at most of a step, and what is saved.

    python benchmarks/pooling.py [--rounds 9] [--json FILE] [--markdown FILE]

A pass that does all three writes no activation and reads no gradient of one: it saves the pooling's own
time, forward and backward, and what moving one tensor of the activation's size there and back takes.
That is measured at each place where a network has the three in a row, beside a whole training step of
that network with fused layers, in one process, in turn; the sum over the places ÷ the step is the most
that such a pass could save: what it would compute itself is not taken off.
"""

import statistics
from collections.abc import Callable
from dataclasses import asdict, dataclass

import torch
import torchvision
from torch import Tensor, nn
from torch.nn import functional as F

import batchnorm
import figures
from batchnorm.lab import arms, networks
from batchnorm.lab.environment import environment
from batchnorm.speed import timing
from batchnorm.views import markdown


@dataclass(frozen=True)
class Place:
    """A norm's input: (N, C, H, W), and what follows the norm."""

    sizes: tuple[int, int, int, int]
    activation: str
    pool: nn.Module


@dataclass(frozen=True)
class Workload:
    """A network, its input, and where it has norm, activation and pooling in a row."""

    build: Callable[[], nn.Module]
    sizes: tuple[int, int, int, int]
    classes: int
    places: tuple[Place, ...]


def lenet() -> nn.Module:
    """The note's, with its norms."""
    return arms.apply(networks.lenet(), "batch-torch")[0]


def two_pools(activation: str, pool: nn.Module) -> tuple[Place, ...]:
    """LeNet's, at a batch of 256."""
    return tuple(Place(sizes, activation, pool) for sizes in ((256, 6, 28, 28), (256, 16, 10, 10)))


IMAGES = (256, 1, 28, 28)
STEM_POOL = nn.MaxPool2d(3, stride=2, padding=1)
WORKLOADS = {
    "LeNet, sigmoid, average": Workload(
        lenet, IMAGES, 10, two_pools("sigmoid", nn.AvgPool2d(2, stride=2))
    ),
    "LeNet, ReLU, maximum": Workload(
        lambda: _with_maximum(lenet()), IMAGES, 10, two_pools("relu", nn.MaxPool2d(2))
    ),
    "ResNet-18, stem": Workload(
        torchvision.models.resnet18, (16, 3, 128, 128), 1000,
        (Place((16, 64, 64, 64), "relu", STEM_POOL),),
    ),
    "ResNet-50, stem": Workload(
        torchvision.models.resnet50, (8, 3, 160, 160), 1000,
        (Place((8, 64, 80, 80), "relu", STEM_POOL),),
    ),
}  # fmt: skip


def _with_maximum(model: nn.Module) -> nn.Module:
    for name, module in list(model.named_children()):
        if isinstance(module, nn.Sigmoid):
            setattr(model, name, nn.ReLU())
        elif isinstance(module, nn.AvgPool2d):
            setattr(model, name, nn.MaxPool2d(2))
    return model


@dataclass(frozen=True)
class Row:
    """Seconds, a number a round."""

    network: str
    times: dict[str, list[float]]  # step; and of each place k: all k, norm k, copy k

    def reached(self) -> list[float]:
        """What is saved ÷ the step, round by round; nothing where no pooling is taken in."""
        pairs = zip(self.times.get("pooled", []), self.times["step"], strict=False)
        return [1 - pooled / step for pooled, step in pairs]

    def shares(self) -> list[float]:
        """The most that could be saved ÷ the step, round by round."""
        places = sum(name.startswith("all") for name in self.times)
        return [
            sum(
                self.times[f"all {k}"][i] - self.times[f"norm {k}"][i] + self.times[f"copy {k}"][i]
                for k in range(places)
            )
            / step
            for i, step in enumerate(self.times["step"])
        ]

    def cells(self) -> list[str]:
        """For a table."""
        step = f"{statistics.median(self.times['step']) * 1e3:.1f}"
        return [self.network, step, *_spread(self.shares()), *_spread(self.reached())]


def _spread(shares: list[float]) -> list[str]:
    if not shares:
        return ["–", "–"]
    return [f"{statistics.median(shares):.1%}", f"{min(shares):.1%} to {max(shares):.1%}"]


HEADER = ["network", "step ms", "saved at most", "in all rounds", "is saved", "in all rounds"]


def calls_of(place: Place) -> dict[str, Callable[[], object]]:
    """Norm, activation and pooling, forward and backward; the first two alone; a copy of y."""
    x = torch.randn(place.sizes, requires_grad=True)
    norm = batchnorm.BatchNormAct2d(place.sizes[1], activation=place.activation)
    leaves = [x, *norm.parameters()]
    dy = torch.randn(place.sizes)
    pooled = torch.randn_like(place.pool(dy))
    return {
        "all": lambda: torch.autograd.grad(place.pool(norm(x)), leaves, pooled),
        "norm": lambda: torch.autograd.grad(norm(x), leaves, dy),
        "copy": dy.clone,
    }


def apart(model: nn.Module) -> nn.Module:
    """The poolings are of classes that are not fused, and do the same."""
    for module in model.modules():
        if isinstance(module, nn.AvgPool2d | nn.MaxPool2d):
            module.__class__ = type("Apart", (type(module),), {})
    return model


def step_of(model: nn.Module, workload: Workload) -> Callable[[], object]:
    """Forward, loss, backward and SGD."""
    images = torch.randn(workload.sizes)
    labels = torch.randint(workload.classes, (workload.sizes[0],))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)

    def step() -> Tensor:
        optimizer.zero_grad()
        loss = F.cross_entropy(model(images), labels)
        loss.backward()
        optimizer.step()
        return loss

    return step


def measure(name: str, rounds: int) -> Row:
    """The step and its places, in turn."""
    torch.manual_seed(0)
    workload = WORKLOADS[name]
    plain = batchnorm.convert(apart(workload.build().train()), fuse=True)
    pooled = batchnorm.convert(workload.build().train(), fuse=True)
    calls = {"step": step_of(plain, workload)}
    if "pooling" in str(batchnorm.changes(pooled)):
        calls["pooled"] = step_of(pooled, workload)
    for k, place in enumerate(workload.places):
        calls |= {f"{what} {k}": call for what, call in calls_of(place).items()}
    return Row(name, timing.measure(calls, rounds))


def main() -> None:
    """Measure every network, print the table."""
    parser = figures.parser(__doc__, "pooling")
    parser.add_argument("--rounds", type=int, default=9)
    options = parser.parse_args()
    figures.check(options, "pooling")
    where = environment()
    line = f"{figures.measured_on(where)}, {options.rounds} rounds"
    print(line)
    rows = [measure(name, options.rounds) for name in WORKLOADS]
    table = markdown.table(HEADER, [row.cells() for row in rows], words=1)
    print(table)
    figures.save(options.json, {"environment": where, "rows": [asdict(row) for row in rows]})
    figures.publish(options, "pooling", line, table)


if __name__ == "__main__":
    main()
