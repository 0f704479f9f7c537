"""Put other layers in the place of a model's batch normalization."""

from collections.abc import Callable

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from batchnorm.model.discovery import batch_norms


def replace(model: nn.Module, make: Callable[[_BatchNorm], nn.Module]) -> nn.Module:
    """Put `make(layer)` where each batch-norm layer is, in place; return the model.

    `make` is called once a layer: one that is shared under several names stays shared. A model
    that is itself a batch-norm layer comes back as `make(model)`.
    """
    made = {layer: make(layer) for layer in batch_norms(model).values()}
    for parent in list(model.modules()):
        for name, child in list(parent._modules.items()):  # named_children drops duplicates  # noqa: SLF001
            if isinstance(child, _BatchNorm):
                setattr(parent, name, made[child])
    return made[model] if isinstance(model, _BatchNorm) else model
