"""What is timed: inputs, each with the class that it stands for, and passes of the layer."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

DTYPES = ("float32", "bfloat16", "float16", "float64")
OVERHEAD = "overhead"


@dataclass(frozen=True)
class Shape:
    """One input, and the class of inputs that it stands for."""

    family: str
    sizes: tuple[int, ...]
    channels_last: bool = False

    @property
    def name(self) -> str:
        """As people write it."""
        sizes = "×".join(map(str, self.sizes))
        return f"{sizes}{', channels_last' if self.channels_last else ''}"

    @property
    def operations(self) -> tuple["Operation", ...]:
        """What is timed on it: on tiny tensors the call itself, layer against layer."""
        if self.family != OVERHEAD:
            return OPERATIONS
        return tuple(each for each in OPERATIONS if each.fusion == "plain" and each != BACKWARD)

    def tensor(self, dtype: torch.dtype) -> Tensor:
        """Normal numbers in it."""
        x = torch.randn(self.sizes).to(dtype)
        return x.contiguous(memory_format=torch.channels_last) if self.channels_last else x


SHAPES = (
    Shape("NCHW, large", (32, 64, 112, 112)),
    Shape("NCHW, large", (32, 256, 56, 56)),
    Shape("NCHW, few samples", (2, 256, 64, 64)),
    Shape("NCHW, 14×14", (32, 512, 14, 14)),
    Shape("NCHW, 7×7", (32, 2048, 7, 7)),
    Shape("channels_last beyond L3", (32, 256, 56, 56), channels_last=True),
    Shape("channels_last, 2-D, in L3", (32, 2048, 7, 7), channels_last=True),
    Shape("channels_last, 2-D, in L3", (4096, 1024)),
    Shape("channels_last, C = 6", (256, 6, 28, 28), channels_last=True),
    Shape("LeNet convolutions", (256, 6, 28, 28)),
    Shape("LeNet convolutions", (256, 16, 10, 10)),
    Shape("features", (256, 120)),
    Shape(OVERHEAD, (8, 4)),
    Shape(OVERHEAD, (4, 8, 2, 2)),
    Shape(OVERHEAD, (8, 16, 8, 8)),
)
QUICK = tuple(shape for shape in SHAPES if math.prod(shape.sizes) <= 2_500_000)

PASSES = ("forward", "backward", "both", "evaluation")
FUSIONS = ("plain", "ReLU", "sigmoid", "residual + ReLU")


@dataclass(frozen=True)
class Operation:
    """What is timed: a pass of the layer, with what follows it."""

    step: str  # of PASSES
    fusion: str  # of FUSIONS

    @property
    def activation(self) -> str | None:
        """Its name in this library."""
        return {"plain": None, "sigmoid": "sigmoid"}.get(self.fusion, "relu")

    @property
    def residual(self) -> bool:
        """Whether a tensor of the same shape is added."""
        return self.fusion.startswith("residual")

    @property
    def differentiated(self) -> bool:
        """Whether there is a backward pass."""
        return self.step in {"backward", "both"}


BACKWARD = Operation("backward", "plain")
OPERATIONS = tuple(Operation(step, fusion) for fusion in FUSIONS for step in PASSES)


@dataclass(frozen=True)
class Plan:
    """What is measured in one process."""

    shapes: tuple[Shape, ...] = SHAPES
    dtype: str = "float32"
    threads: tuple[int, ...] = (1,)
    rounds: int = 9
    compiled: bool = False
