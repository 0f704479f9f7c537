"""The poolings that are fused behind the activation, by torch's operators: 2×2 windows, stride 2."""

from collections.abc import Callable

from torch import Tensor
from torch.nn import functional as F

WINDOW = 2
POOLS: dict[str, Callable[[Tensor], Tensor]] = {
    "avg": lambda y: F.avg_pool2d(y, WINDOW),
    "max": lambda y: F.max_pool2d(y, WINDOW),
}
