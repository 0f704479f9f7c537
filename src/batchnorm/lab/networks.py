"""The networks that are trained: the note's LeNet, or a user's own."""

from collections import OrderedDict
from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from batchnorm.errors import BatchNormError, brief
from batchnorm.lab import plugins

Network = Callable[[], nn.Module]

INITIALIZATIONS: dict[str, Callable[[Tensor], Any] | None] = {
    "xavier-uniform": nn.init.xavier_uniform_,
    "kaiming-normal": nn.init.kaiming_normal_,
    "as-built": None,
}


def lenet() -> nn.Sequential:
    """The note's LeNet: (N, 1, 28, 28) -> (N, 10), 61,706 parameters besides those of the norms.

    Batch normalization stands after each convolution and each hidden linear layer, before the
    activation; the arms of a comparison take its place.
    """
    layers: list[tuple[str, nn.Module]] = [
        ("conv1", nn.Conv2d(1, 6, kernel_size=5, padding=2)),
        ("norm1", nn.BatchNorm2d(6)),
        ("activation1", nn.Sigmoid()),
        ("pool1", nn.AvgPool2d(2, stride=2)),
        ("conv2", nn.Conv2d(6, 16, kernel_size=5)),
        ("norm2", nn.BatchNorm2d(16)),
        ("activation2", nn.Sigmoid()),
        ("pool2", nn.AvgPool2d(2, stride=2)),
        ("flatten", nn.Flatten()),
        ("linear1", nn.Linear(16 * 5 * 5, 120)),
        ("norm3", nn.BatchNorm1d(120)),
        ("activation3", nn.Sigmoid()),
        ("linear2", nn.Linear(120, 84)),
        ("norm4", nn.BatchNorm1d(84)),
        ("activation4", nn.Sigmoid()),
        ("linear3", nn.Linear(84, 10)),
    ]
    return nn.Sequential(OrderedDict(layers))


NETWORKS: dict[str, Network] = {"lenet": lenet}


def find(network: str | Network) -> tuple[str, Network]:
    """A network's name in records, and the function that builds it.

    `network` is a name in `NETWORKS`, `package.module:function`, or the function itself.
    """
    if callable(network):
        return f"{network.__module__}:{getattr(network, '__qualname__', repr(network))}", network
    if ":" in network:
        return network, plugins.resolve(network, "network")
    if network not in NETWORKS:
        raise BatchNormError(
            f"there is no network called {network!r}. Known are {', '.join(NETWORKS)}; your own is "
            "named as package.module:function, a function without arguments that returns it."
        )
    return network, NETWORKS[network]


def build(name: str, network: Network) -> nn.Module:
    """Call the user's function, and say whose fault it is when it fails."""
    try:
        model = network()
    except Exception as error:
        raise BatchNormError(
            f"the network function {name} raised {brief(error)}. Call it by itself to see where."
        ) from error
    if not isinstance(model, nn.Module):
        raise BatchNormError(
            f"the network function {name} returned a {type(model).__name__} and should return a "
            "torch.nn.Module."
        )
    return model


def initialize(model: nn.Module, initialization: str) -> None:
    """Fill the weights of convolutions and linear layers; biases stay as torch makes them."""
    fill = INITIALIZATIONS[initialization]
    if fill is None:
        return
    for module in model.modules():
        if isinstance(module, nn.Linear | nn.modules.conv._ConvNd):  # noqa: SLF001  # all ranks
            fill(module.weight)
