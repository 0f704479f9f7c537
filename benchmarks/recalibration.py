"""Recalibration beside torch's `update_bn` and fvcore's `update_bn_stats`: seconds and error.

Each tool passes the same batches through the same network, in one process, in turn; medians, and
the ratio of each pair. The error is the largest one of a first-layer mean and variance, in standard
deviations and relative, against float64 over all images at once.

    [THP_MEM_ALLOC_ENABLE=1] python benchmarks/recalibration.py [--rounds 7] [--json FILE]
"""

import copy
import statistics
import time
from collections.abc import Callable

import torch
import torchvision
from fvcore.nn.precise_bn import update_bn_stats
from torch import Tensor, nn
from torch.optim.swa_utils import update_bn

import batchnorm
import figures
from batchnorm.lab import networks
from batchnorm.lab.data import fashion_mnist
from batchnorm.lab.environment import environment

Tool = Callable[[nn.Module, list[Tensor]], object]

TOOLS: dict[str, Tool] = {
    "torch, update_bn": lambda model, batches: update_bn(batches, model),
    "fvcore, update_bn_stats": lambda model, batches: update_bn_stats(model, batches, len(batches)),
    "batchnorm, recalibrate": batchnorm.recalibrate,
}


def workloads() -> dict[str, tuple[nn.Module, list[Tensor]]]:
    """LeNet on 10,000 images, ResNet-18 on 64 random ones, each with a last batch that is smaller."""
    torch.manual_seed(0)
    images = fashion_mnist().train_images[:10_000]
    return {
        "LeNet, 10,000 × 28²": (networks.lenet(), list(images.split(256))),
        "ResNet-18, 72 × 160²": (
            torchvision.models.resnet18(),
            list(torch.randn(72, 3, 160, 160).split(32)),
        ),
    }


def first_error(model: nn.Module, batches: list[Tensor]) -> float:
    """The first norm's statistics against float64 over all images at once."""
    layer = next(m for m in model.modules() if isinstance(m, nn.BatchNorm2d))
    convolution = copy.deepcopy(next(m for m in model.modules() if isinstance(m, nn.Conv2d)))
    with torch.no_grad():
        x = torch.cat([convolution.double()(batch.double()) for batch in batches])
    var, mean = torch.var_mean(x, (0, 2, 3))
    assert layer.running_mean is not None
    assert layer.running_var is not None
    of_mean = ((layer.running_mean - mean) / var.sqrt()).abs().max().item()
    return max(of_mean, ((layer.running_var - var) / var).abs().max().item())


def main() -> None:
    """Time every tool in turn, print medians, ratios and errors."""
    parser = figures.parser(__doc__)
    parser.add_argument("--rounds", type=int, default=7)
    options = parser.parse_args()
    where = environment()
    print(f"{where['processor']}, {torch.get_num_threads()} threads, torch {where['torch']}")
    content = {"environment": where, "threads": torch.get_num_threads()}
    for name, (model, batches) in workloads().items():
        content[name] = compare(name, model, batches, options.rounds)
    figures.save(options.json, content)


def compare(
    name: str, model: nn.Module, batches: list[Tensor], rounds: int
) -> dict[str, dict[str, float]]:
    model.train()  # fvcore wants it
    seconds: dict[str, list[float]] = {tool: [] for tool in TOOLS}
    errors = {}
    for _ in range(rounds + 1):
        for tool, update in TOOLS.items():
            start = time.perf_counter()
            update(model, batches)
            seconds[tool].append(time.perf_counter() - start)
            errors[tool] = first_error(model, batches)
    print(f"\n{name:30}{'median s':>10}{'÷ ours':>10}{'error':>12}")
    ours = seconds["batchnorm, recalibrate"][1:]  # the first round warms up
    rows = {}
    for tool, (_, *values) in seconds.items():
        ratio = statistics.median(v / o for v, o in zip(values, ours, strict=True))
        median = statistics.median(values)
        print(f"{tool:30}{median:10.3f}{ratio:10.2f}{errors[tool]:12.1e}")
        rows[tool] = {"median": median, "ratio_to_ours": ratio, "error": errors[tool]}
    return rows


if __name__ == "__main__":
    main()
