"""The networks that are trained: the note's LeNet and its variants, others, or a user's own."""

from collections import OrderedDict
from collections.abc import Callable
from functools import partial
from typing import Any

from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules.batchnorm import _BatchNorm

from batchnorm.errors import BatchNormError, brief
from batchnorm.lab import plugins

Network = Callable[[], nn.Module]

INITIALIZATIONS: dict[str, Callable[[Tensor], Any] | None] = {
    "xavier-uniform": nn.init.xavier_uniform_,
    "kaiming-normal": nn.init.kaiming_normal_,
    "as-built": None,
}


def lenet(
    position: str = "before", dropout: float = 0.0, dropout_at: str = "before"
) -> nn.Sequential:
    """The note's LeNet: (N, 1, 28, 28) -> (N, 10), 61,706 parameters besides those of the norms.

    Batch normalization stands after each convolution and each hidden linear layer, before the
    activation; the arms of a comparison take its place.

    Args:
        position: of the norms, "before" or "after" the activation, or "input": a single one, before
            the first convolution.
        dropout: the share that is dropped, in training.
        dropout_at: "before" drops what goes into each layer that a norm follows, so that the norms
            meet it; "after" drops behind the last norm, before the last layer.
    """
    inside = dropout if dropout_at == "before" else 0.0
    layers: dict[str, nn.Module] = {}
    if position == "input":
        layers["norm0"] = nn.BatchNorm2d(1)

    def hidden(place: int, name: str, layer: nn.Module, norm: nn.Module) -> None:
        layers[name] = layer
        pair = {f"norm{place}": norm, f"activation{place}": nn.Sigmoid()}
        if position == "input":
            del pair[f"norm{place}"]
        layers.update(reversed(pair.items()) if position == "after" else pair.items())

    def drop(place: int, share: float) -> None:
        if share:
            layers[f"dropout{place}"] = nn.Dropout(share)

    hidden(1, "conv1", nn.Conv2d(1, 6, kernel_size=5, padding=2), nn.BatchNorm2d(6))
    layers["pool1"] = nn.AvgPool2d(2, stride=2)
    drop(1, inside)
    hidden(2, "conv2", nn.Conv2d(6, 16, kernel_size=5), nn.BatchNorm2d(16))
    layers["pool2"] = nn.AvgPool2d(2, stride=2)
    layers["flatten"] = nn.Flatten()
    drop(2, inside)
    hidden(3, "linear1", nn.Linear(16 * 5 * 5, 120), nn.BatchNorm1d(120))
    drop(3, inside)
    hidden(4, "linear2", nn.Linear(120, 84), nn.BatchNorm1d(84))
    drop(4, dropout if dropout_at == "after" else 0.0)
    layers["linear3"] = nn.Linear(84, 10)
    return nn.Sequential(OrderedDict(layers))


def mlp() -> nn.Sequential:
    """Ioffe & Szegedy's first experiment (2015, §4.1): three hidden layers of 100 sigmoid units."""
    layers: dict[str, nn.Module] = {"flatten": nn.Flatten()}
    for place, width in enumerate((28 * 28, 100, 100), start=1):
        layers[f"linear{place}"] = nn.Linear(width, 100)
        layers[f"norm{place}"] = nn.BatchNorm1d(100)
        layers[f"activation{place}"] = nn.Sigmoid()
    layers["linear4"] = nn.Linear(100, 10)
    return nn.Sequential(OrderedDict(layers))


def fast() -> nn.Sequential:
    """LeNet's size and a third of its work: (N, 1, 28, 28) -> (N, 10), 60,842 parameters.

    Strides in place of padding and pooling, 16 and 32 channels, one hidden linear layer, ReLU.
    """
    layers: dict[str, nn.Module] = {
        "conv1": nn.Conv2d(1, 16, 4, stride=2, bias=False),
        "norm1": nn.BatchNorm2d(16),
        "activation1": nn.ReLU(),
        "conv2": nn.Conv2d(16, 32, 3, stride=2, bias=False),
        "norm2": nn.BatchNorm2d(32),
        "activation2": nn.ReLU(),
        "flatten": nn.Flatten(),
        "linear1": nn.Linear(32 * 6 * 6, 48, bias=False),
        "norm3": nn.BatchNorm1d(48),
        "activation3": nn.ReLU(),
        "linear2": nn.Linear(48, 10),
    }
    return nn.Sequential(OrderedDict(layers))


class Block(nn.Module):
    """y = relu(x' + norm(conv(relu(norm(conv(x)))))), x' = x, or its 1×1 convolution."""

    def __init__(self, channels_in: int, channels: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels_in, channels, 3, stride, padding=1, bias=False)
        self.norm1 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.norm2 = nn.BatchNorm2d(channels)
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or channels_in != channels:
            self.shortcut = nn.Conv2d(channels_in, channels, 1, stride, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """x: (N, channels_in, H, W) -> (N, channels, H / stride, W / stride)."""
        y = F.relu(self.norm1(self.conv1(x)))
        return F.relu(self.norm2(self.conv2(y)) + self.shortcut(x))


def resnet() -> nn.Sequential:
    """A small ResNet for 28×28 images: (N, 1, 28, 28) -> (N, 10), seven convolutions deep."""
    layers: list[tuple[str, nn.Module]] = [
        ("conv", nn.Conv2d(1, 16, 3, stride=2, padding=1, bias=False)),
        ("norm", nn.BatchNorm2d(16)),
        ("activation", nn.ReLU()),
        ("block1", Block(16, 16, 1)),
        ("block2", Block(16, 32, 2)),
        ("block3", Block(32, 64, 2)),
        ("pool", nn.AdaptiveAvgPool2d(1)),
        ("flatten", nn.Flatten()),
        ("linear", nn.Linear(64, 10)),
    ]
    return nn.Sequential(OrderedDict(layers))


def only_norms(network: Network) -> nn.Module:
    """The network with every parameter frozen but those of its norms."""
    model = network().requires_grad_(requires_grad=False)
    for module in model.modules():
        if isinstance(module, _BatchNorm):
            module.requires_grad_()
    return model


DROPOUT_RATES = (0.2, 0.5)

NETWORKS: dict[str, Network] = {
    "fast": fast,
    "lenet": lenet,
    "lenet-norm-after": partial(lenet, "after"),
    "lenet-norm-input": partial(lenet, "input"),
    "lenet-only-norms": partial(only_norms, lenet),
    "mlp": mlp,
    "resnet": resnet,
    "resnet-only-norms": partial(only_norms, resnet),
    **{
        f"lenet-dropout-{at}-{rate}": partial(lenet, "before", rate, at)
        for at in ("before", "after")
        for rate in DROPOUT_RATES
    },
}


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
