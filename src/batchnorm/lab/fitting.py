"""Train a network for a study that looks inside it: no record, no checkpoint, only the network."""

from collections.abc import Callable, Sequence

import torch
from torch import nn
from torch.nn import functional as F

from batchnorm.lab import arms, networks
from batchnorm.lab.batches import TensorBatches


def start(network: str, arm: str, seed: int) -> nn.Module:
    """The network at step 0, the same weights for every arm of a seed."""
    torch.manual_seed(seed)
    _, build = networks.find(network)
    model = build()
    networks.initialize(model, "xavier-uniform")
    model, _ = arms.apply(model, arm)
    return model


def fit(
    model: nn.Module,
    batches: TensorBatches,
    learning_rate: float,
    orders: Sequence[int],
    *,
    decays: bool = True,
    steps: int | None = None,
    after_step: Callable[[int], None] | None = None,
) -> nn.Module:
    """SGD for as many epochs as there are seeds of the data's order, or fewer steps than that.

    The rate decays to 0, or not.
    """
    optimizer = torch.optim.SGD(model.parameters(), lr=learning_rate)
    steps = len(orders) * batches.steps_per_epoch if steps is None else steps
    schedulers = torch.optim.lr_scheduler
    scheduler: torch.optim.lr_scheduler.LRScheduler = (
        schedulers.CosineAnnealingLR(optimizer, steps)
        if decays
        else schedulers.ConstantLR(optimizer, factor=1.0)
    )
    model.train()
    step = 0
    for epoch, order in enumerate(orders):
        for inputs, labels in batches.train(order, epoch):
            optimizer.zero_grad()
            F.cross_entropy(model(inputs), labels).backward()
            optimizer.step()
            scheduler.step()
            step += 1
            if after_step is not None:
                after_step(step)
            if step == steps:
                return model
    return model
