"""Several seeds of one arm trained at once, beside one after the other: does it pay on a CPU?

Three ways through the same steps of LeNet with batch norm, each seed with its own weights and its
own order of images:

    plain     one seed after the other, as the studies do
    grouped   the seeds side by side as channels: grouped convolutions, one norm over all channels
              (a norm knows only channels), batched matrix products
    vmapped   torch.func: stack_module_state, and vmap over the gradient

    python benchmarks/stacked.py --seeds 5 --steps 40 --rounds 7

Prints cells per minute (a cell is the 1,564 steps of a study's LeNet) and the ratio to plain,
medians over rounds that take the three in turn; and how far the losses are apart, which are equal
up to rounding.
"""

import argparse
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call, grad_and_value, stack_module_state, vmap
from torch.nn import functional as F

import batchnorm
from batchnorm.lab import fitting

BATCH = 64
RATE = 1.0
CELL_STEPS = 1_564

Batches = Sequence[tuple[Tensor, Tensor]]  # a step each: (seeds, N, 1, 28, 28), (seeds, N)


def batches(seeds: int, steps: int) -> Batches:
    generator = torch.Generator().manual_seed(0)
    return [
        (
            torch.rand(seeds, BATCH, 1, 28, 28, generator=generator),
            torch.randint(10, (seeds, BATCH), generator=generator),
        )
        for _ in range(steps)
    ]


def plain(models: Sequence[nn.Module], steps: Batches) -> Tensor:
    """The losses, (seeds, steps), of one seed after the other."""
    losses = []
    for index, model in enumerate(models):
        optimizer = torch.optim.SGD(model.parameters(), lr=RATE)
        for inputs, labels in steps:
            optimizer.zero_grad()
            loss = F.cross_entropy(model(inputs[index]), labels[index])
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
    return torch.tensor(losses).view(len(models), -1)


class Grouped(nn.Module):
    """The LeNets side by side: (N, seeds, 28, 28) -> (seeds, N, 10)."""

    def __init__(self, models: Sequence[nn.Module]) -> None:
        super().__init__()
        self.seeds = len(models)
        self.convs = nn.ModuleList(self._conv(models, f"conv{i}") for i in (1, 2))
        self.norms = nn.ModuleList(self._norm(models, f"norm{i}") for i in (1, 2, 3, 4))
        linears: list[list[Any]] = [
            [m.get_submodule(f"linear{i}") for m in models] for i in (1, 2, 3)
        ]
        self.weights = nn.ParameterList(
            torch.stack([layer.weight.detach().T for layer in layers]) for layers in linears
        )
        self.biases = nn.ParameterList(
            torch.stack([layer.bias.detach()[None] for layer in layers]) for layers in linears
        )

    def _conv(self, models: Sequence[nn.Module], name: str) -> nn.Conv2d:
        layers: list[Any] = [m.get_submodule(name) for m in models]
        first = layers[0]
        conv: Any = nn.Conv2d(
            first.in_channels * self.seeds, first.out_channels * self.seeds, first.kernel_size,
            padding=first.padding, groups=self.seeds,
        )  # fmt: skip
        with torch.no_grad():
            conv.weight.copy_(torch.cat([layer.weight for layer in layers]))
            conv.bias.copy_(torch.cat([layer.bias for layer in layers]))
        made: nn.Conv2d = conv
        return made

    def _norm(self, models: Sequence[nn.Module], name: str) -> nn.Module:
        first: Any = models[0].get_submodule(name)
        made: nn.Module = type(first)(first.num_features * self.seeds)
        return made  # all norms start from 1 and 0

    def forward(self, x: Tensor) -> Tensor:
        for conv, norm in zip(self.convs, self.norms[:2], strict=True):
            x = F.avg_pool2d(torch.sigmoid(norm(conv(x))), 2)
        x = x.unflatten(1, (self.seeds, -1)).flatten(2).transpose(0, 1)  # (seeds, N, features)
        for index, norm in enumerate(self.norms[2:]):
            x = torch.baddbmm(self.biases[index], x, self.weights[index])
            rows = norm(x.transpose(0, 1).flatten(1))  # (N, seeds · features)
            x = torch.sigmoid(rows).unflatten(1, (self.seeds, -1)).transpose(0, 1)
        return torch.baddbmm(self.biases[2], x, self.weights[2])


def grouped(models: Sequence[nn.Module], steps: Batches) -> Tensor:
    stacked = Grouped(models).to(next(models[0].parameters()).dtype)
    optimizer = torch.optim.SGD(stacked.parameters(), lr=RATE)
    losses = []
    for inputs, labels in steps:
        optimizer.zero_grad()
        logits = stacked(inputs[:, :, 0].transpose(0, 1))
        each = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="none")
        of_seeds = each.view(len(models), -1).mean(1)
        of_seeds.sum().backward()  # the seeds share no parameter: each has its own gradient
        optimizer.step()
        losses.append(of_seeds.detach())
    return torch.stack(losses, 1)


def vmapped(models: Sequence[nn.Module], steps: Batches) -> Tensor:
    base = models[0]
    # running statistics are not what is timed, and vmap refuses to write them
    for model in models:
        for module in model.modules():
            if isinstance(module, nn.modules.batchnorm._BatchNorm):  # noqa: SLF001
                module.track_running_stats = False
                module.running_mean = module.running_var = module.num_batches_tracked = None
    parameters, buffers = stack_module_state(list(models))

    def loss(own: dict[str, Tensor], other: dict[str, Tensor], x: Tensor, y: Tensor) -> Tensor:
        return F.cross_entropy(functional_call(base, (own, other), (x,)), y)

    step = vmap(grad_and_value(loss))
    losses = []
    for inputs, labels in steps:
        gradients, found = step(parameters, buffers, inputs, labels)
        with torch.no_grad():
            for name, gradient in gradients.items():
                parameters[name].sub_(RATE * gradient)
        losses.append(found.detach())
    return torch.stack(losses, 1)


WAYS: dict[str, Callable[[Sequence[nn.Module], Batches], Tensor]] = {
    "plain": plain,
    "grouped": grouped,
    "vmapped": vmapped,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--rounds", type=int, default=7)
    arguments = parser.parse_args()
    torch.set_num_threads(1)  # as in the studies, whose processes have a thread each
    steps = batches(arguments.seeds, arguments.steps)
    seconds: dict[str, list[float]] = {name: [] for name in WAYS}
    losses: dict[str, Tensor] = {}
    for _ in range(1 + arguments.rounds):  # the first one warms up
        for name, way in WAYS.items():
            models = [fitting.start("lenet", "batch", s).train() for s in range(arguments.seeds)]
            start = time.process_time()  # of one thread: others on the machine do not count
            losses[name] = way(models, steps)
            seconds[name].append(time.process_time() - start)
    print(f"{batchnorm.backend()}, 1 thread, {arguments.seeds} seeds, {arguments.steps} steps")
    for name, found in seconds.items():
        warm = found[1:]
        ratios = [one / other for one, other in zip(seconds["plain"][1:], warm, strict=True)]
        cells = 60 * arguments.seeds * arguments.steps / CELL_STEPS / statistics.median(warm)
        apart = (losses[name] - losses["plain"]).abs().amax(0)
        print(
            f"{name:8} {cells:6.1f} cells/min, {statistics.median(ratios):.2f} times plain "
            f"({min(ratios):.2f} to {max(ratios):.2f}); losses apart by {apart[0]:.1e} at the first "
            f"step, {apart.max():.1e} at most"
        )


if __name__ == "__main__":
    main()
