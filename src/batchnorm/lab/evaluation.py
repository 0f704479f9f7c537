"""What is measured of a network at one moment; everything that it changes for that comes back."""

import math
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules.instancenorm import _InstanceNorm

from batchnorm import kernels
from batchnorm.lab.batches import EVALUATION_BATCH, Batch
from batchnorm.lab.record import LayerStatistics
from batchnorm.model.discovery import constant_norms
from batchnorm.model.recalibration import Collector


def evaluate(model: nn.Module, batches: Iterable[Batch], device: str) -> tuple[float, float]:
    """Mean cross-entropy and accuracy over the batches, in evaluation mode; NaN of none."""
    loss, correct, count = 0.0, 0, 0
    with evaluating(model):
        for inputs, labels in batches:
            logits = model(inputs.to(device))
            target = labels.to(device)
            loss += F.cross_entropy(logits, target, reduction="sum").item()
            correct += int((logits.argmax(1) == target).sum())
            count += len(labels)
    return (loss / count, correct / count) if count else (math.nan, math.nan)


def accuracy_of(model: nn.Module, inputs: Tensor, labels: Tensor) -> float:
    """On the CPU, in evaluation mode."""
    batches = zip(inputs.split(EVALUATION_BATCH), labels.split(EVALUATION_BATCH), strict=True)
    return evaluate(model, batches, "cpu")[1]


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode without gradients; each module's own mode comes back."""
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for module, mode in modes.items():
            module.training = mode


@contextmanager
def population_statistics(
    model: nn.Module, batches: Iterable[Batch], device: str
) -> Iterator[bool]:
    """Inside, the running statistics are those of the batches taken together; then they come back.

    Yields whether the model has running statistics at all. The note's layer, which is no
    `_BatchNorm` of torch's, counts as well.
    """
    constants = set(constant_norms(model).values())
    layers = [
        module
        for module in model.modules()
        if getattr(module, "running_mean", None) is not None
        and module not in constants
        and not isinstance(module, _InstanceNorm)  # its statistics are those of single images
    ]
    if not layers:
        yield False
        return

    def forward(model: nn.Module, inputs: Tensor) -> None:
        model(inputs.to(device))

    with Collector(model, layers) as collector:
        found = collector.read(((inputs, len(inputs)) for inputs, _ in batches), forward)
        for layer, moments in found.moments.items():
            collector.use(layer, moments)
        yield True


def layer_statistics(
    model: nn.Module, places: list[str], inputs: Tensor
) -> dict[str, LayerStatistics]:
    """What goes into and comes out of each place in evaluation mode.

    A place that the network does not call with such inputs is left out.
    """
    seen: dict[str, tuple[Tensor, Tensor]] = {}

    def watch(name: str, stack: ExitStack) -> None:
        def keep(
            _module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor
        ) -> None:
            seen[name] = (args[0] if args else next(iter(kwargs.values())), output)

        layer = model.get_submodule(name)
        stack.enter_context(layer.register_forward_hook(keep, with_kwargs=True))

    with ExitStack() as hooks, evaluating(model):
        for place in places:
            watch(place, hooks)
        model(inputs)
    return {
        place: _describe(model.get_submodule(place), *seen[place])
        for place in places
        if place in seen
    }


def _describe(layer: nn.Module, x: Tensor, y: Tensor) -> LayerStatistics:
    (input_mean, input_var), (output_mean, output_var) = kernels.moments(x), kernels.moments(y)
    return LayerStatistics(
        input_mean=_numbers(input_mean),
        input_var=_numbers(input_var),
        output_mean=_numbers(output_mean),
        output_var=_numbers(output_var),
        weight=_parameter(layer, "weight"),
        bias=_parameter(layer, "bias"),
        running_mean=_parameter(layer, "running_mean"),
        running_var=_parameter(layer, "running_var"),
    )


def _parameter(layer: nn.Module, name: str) -> list[float | None] | None:
    value = getattr(layer, name, None)
    return None if value is None else _numbers(value.detach())


def _numbers(values: Tensor) -> list[float | None]:
    """As many digits as float32 has; None for what JSON cannot say."""
    return [float(f"{v:.7g}") if math.isfinite(v) else None for v in values.tolist()]
