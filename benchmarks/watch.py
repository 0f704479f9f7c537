"""What `watch` costs: training steps with it beside the same steps without, in one process.

Blocks of steps alternate; the median and the quartiles of the ratios of the pairs. The losses are compared, too: they
are the same bits.

    python benchmarks/watch.py [--rounds 9] [--json FILE]
"""

import copy
import statistics
import time
from collections.abc import Callable
from contextlib import nullcontext

import torch
import torchvision
from torch import Tensor, nn

import batchnorm
import figures
from batchnorm.lab import networks
from batchnorm.lab.environment import environment

STEPS = 50  # in a block: one of them is looked at


def workloads() -> dict[str, tuple[Callable[[], nn.Module], Tensor, int]]:
    """The note's LeNet, a ResNet-18, and an MLP whose every step is short."""
    return {
        "LeNet, batch 256": (networks.lenet, torch.randn(256, 1, 28, 28), 1),
        "ResNet-18, batch 8 × 64²": (torchvision.models.resnet18, torch.randn(8, 3, 64, 64), 1),
        "MLP, batch 256 × 64": (mlp, torch.randn(256, 64), 4),
    }


def mlp() -> nn.Module:
    """Three layers with norms."""
    return nn.Sequential(
        *(nn.Sequential(nn.Linear(64, 64), nn.BatchNorm1d(64), nn.ReLU()) for _ in range(3)),
        nn.Linear(64, 10),
    )


def block(model: nn.Module, x: Tensor, steps: int, *, watched: bool) -> tuple[float, list[float]]:
    """Seconds, and the losses."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    losses = []
    with batchnorm.watch(model) if watched else nullcontext():
        start = time.perf_counter()
        for _ in range(steps):
            loss = model(x).square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        return time.perf_counter() - start, losses


def main() -> None:
    """Time both in turn, print medians and ratios."""
    parser = figures.parser(__doc__)
    parser.add_argument("--rounds", type=int, default=9, help="2 or more")
    options = parser.parse_args()
    where = environment()
    print(f"{where['processor']}, {torch.get_num_threads()} threads, torch {where['torch']}")
    rows = {}
    for name, (build, x, blocks) in workloads().items():
        torch.manual_seed(0)
        model = build()
        ratios = []
        for place in range(options.rounds + 1):
            seconds, losses = {}, {}
            for watched in ((False, True), (True, False))[place % 2]:
                twin = copy.deepcopy(model)
                seconds[watched], losses[watched] = block(twin, x, STEPS * blocks, watched=watched)
            assert losses[True] == losses[False]
            if place:  # the first one warms up
                ratios.append(seconds[True] / seconds[False])
        low, middle, high = statistics.quantiles(ratios, n=4)
        print(f"{name:28} {middle - 1:+7.1%}   ({low - 1:+.1%} to {high - 1:+.1%})", flush=True)
        rows[name] = {"median": middle, "quartiles": [low, high]}
    figures.save(options.json, {"environment": where, "ratios": rows})


if __name__ == "__main__":
    main()
