"""What is measured of a network at one moment; everything that it changes for that comes back."""

import math
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from batchnorm.lab.batches import Batch
from batchnorm.lab.record import LayerStatistics


def evaluate(model: nn.Module, batches: Iterable[Batch], device: str) -> tuple[float, float]:
    """Mean cross-entropy and accuracy over the batches, in evaluation mode."""
    loss, correct, count = 0.0, 0, 0
    with evaluating(model):
        for inputs, labels in batches:
            logits = model(inputs.to(device))
            target = labels.to(device)
            loss += F.cross_entropy(logits, target, reduction="sum").item()
            correct += int((logits.argmax(1) == target).sum())
            count += len(labels)
    return loss / count, correct / count


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

    The pass runs in evaluation mode: before a layer normalizes a batch, it is given that batch's
    mean and variance as if they were the running ones, so that the layers behind it see what they
    see in training, and nothing else (dropout, counters, momentum) takes notice. Yields whether
    the model has running statistics at all.
    """
    # Any: torch types no attribute of a module
    layers: list[Any] = [m for m in model.modules() if getattr(m, "running_mean", None) is not None]
    borrowed = [(layer, layer.running_mean, layer.running_var) for layer in layers]
    merged = {layer: Moments() for layer in layers}

    def use_batch(layer: Any, args: tuple[Tensor, ...]) -> None:
        mean, var_biased, count = channel_moments(args[0])
        merged[layer].merge(mean, var_biased, count)
        layer.running_mean, layer.running_var = mean, var_biased

    try:
        if layers:
            with ExitStack() as hooks, evaluating(model):
                for layer in layers:
                    hooks.enter_context(layer.register_forward_pre_hook(use_batch))
                for inputs, _ in batches:
                    model(inputs.to(device))
            for layer, mean, var in borrowed:
                if merged[layer].count:
                    layer.running_mean = merged[layer].mean.to(mean)
                    layer.running_var = merged[layer].var_unbiased.to(var)
        yield bool(layers)
    finally:
        for layer, mean, var in borrowed:
            layer.running_mean, layer.running_var = mean, var


class Moments:
    """Mean and variance per channel of batches taken together.

    Merged pairwise (Chan, Golub & LeVeque 1979) in float64: sums of squares would lose the digits
    of a variance that is small beside the mean.
    """

    def __init__(self) -> None:
        self.count = 0
        self.mean = torch.zeros(())
        self.squares = torch.zeros(())  # Σ (x − mean)²

    def merge(self, mean: Tensor, var_biased: Tensor, count: int) -> None:
        mean, squares = mean.double(), var_biased.double() * count
        total = self.count + count
        if not self.count:
            self.count, self.mean, self.squares = total, mean, squares
            return
        gap = mean - self.mean
        self.squares = self.squares + squares + gap.square() * (self.count * count / total)
        self.mean = self.mean + gap * (count / total)
        self.count = total

    @property
    def var_unbiased(self) -> Tensor:
        return self.squares / max(self.count - 1, 1)


def channel_moments(x: Tensor) -> tuple[Tensor, Tensor, int]:
    """mean, var_biased: (C,) of x: (N, C, *spatial), and the count of values per channel."""
    axes = [axis for axis in range(x.dim()) if axis != 1]
    var_biased, mean = torch.var_mean(x, axes, correction=0)
    return mean, var_biased, x.numel() // x.shape[1]


def layer_statistics(
    model: nn.Module, places: list[str], inputs: Tensor
) -> dict[str, LayerStatistics]:
    """What goes into and comes out of each place in evaluation mode.

    A place that the network does not call with such inputs is left out.
    """
    seen: dict[str, tuple[Tensor, Tensor]] = {}

    def watch(name: str, stack: ExitStack) -> None:
        def keep(_module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
            seen[name] = (args[0], output)

        stack.enter_context(model.get_submodule(name).register_forward_hook(keep))

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
    input_mean, input_var, _ = channel_moments(x)
    output_mean, output_var, _ = channel_moments(y)
    return LayerStatistics(
        input_mean=_numbers(input_mean),
        input_var=_numbers(input_var),
        output_mean=_numbers(output_mean),
        output_var=_numbers(output_var),
        weight=_parameter(layer, "weight"),
        bias=_parameter(layer, "bias"),
    )


def _parameter(layer: nn.Module, name: str) -> list[float | None] | None:
    value = getattr(layer, name, None)
    return None if value is None else _numbers(value.detach())


def _numbers(values: Tensor) -> list[float | None]:
    """As many digits as float32 has; None for what JSON cannot say."""
    return [float(f"{v:.7g}") if math.isfinite(v) else None for v in values.tolist()]
