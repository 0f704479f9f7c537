"""Which parameters should decay."""

from typing import Any

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.instancenorm import _InstanceNorm

from batchnorm.variants.variant import Variant

NORMS = (
    _BatchNorm,
    Variant,
    _InstanceNorm,
    nn.GroupNorm,
    nn.LayerNorm,
    nn.RMSNorm,
    nn.LocalResponseNorm,
)


def param_groups(
    model: nn.Module, weight_decay: float, *, biases: bool = False
) -> list[dict[str, Any]]:
    """Two groups for an optimizer: parameters that decay, and those of norms, which do not.

    Decay of a convolution's weight before batch norm changes no output, only the effective learning
    rate; decay of the norm's own weight and bias pulls the network's scale and thresholds to 0.

    Args:
        model: any module; norms are torch's and their subclasses, ours and others'.
        weight_decay: of the first group; the second has 0.
        biases: keep every layer's bias from decaying, too.

    Returns:
        `[{"params": […], "weight_decay": weight_decay}, {"params": […], "weight_decay": 0.0}]`.
        Every parameter that requires a gradient is in one of them once, in the model's order; an
        empty group is left out.
    """
    kept = {
        id(parameter)
        for module in model.modules()
        for name, parameter in module.named_parameters(recurse=False)
        if isinstance(module, NORMS) or (biases and name == "bias")
    }
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    groups = [
        {"params": [p for p in trained if id(p) not in kept], "weight_decay": weight_decay},
        {"params": [p for p in trained if id(p) in kept], "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]
