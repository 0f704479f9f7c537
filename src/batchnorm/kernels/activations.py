"""The activations that are fused behind the normalization, by torch's operators."""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

LEAKY_SLOPE = 0.01

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": F.relu,
    "leaky_relu": F.leaky_relu,
    "sigmoid": torch.sigmoid,
    "tanh": torch.tanh,
    "silu": F.silu,
    "gelu": F.gelu,
    "hardswish": F.hardswish,
}
# those whose gradient is a function of what they give
IN_PLACE: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": torch.relu_,
    "sigmoid": torch.sigmoid_,
    "tanh": torch.tanh_,
}
# dy, y -> dy · activation'
DERIVATIVES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "relu": lambda dy, y: dy * (y > 0),
    "leaky_relu": lambda dy, y: torch.where(y > 0, dy, LEAKY_SLOPE * dy),
    "sigmoid": lambda dy, y: dy * y * (1 - y),
    "tanh": lambda dy, y: dy * (1 - y.square()),
}
