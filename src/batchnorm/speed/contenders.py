"""Who is timed: torch's layer and activation, this library's, and what memory allows."""

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from batchnorm import layers
from batchnorm.errors import BatchNormError, brief
from batchnorm.speed.cases import Operation, Shape

Call = Callable[[], object]

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
