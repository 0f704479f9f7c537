"""Find the batch normalization in a model."""

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm


def batch_norms(model: nn.Module) -> dict[str, _BatchNorm]:
    """Every batch-norm layer of the model under its first name, in the order of registration.

    Found are torch.nn's layers, their subclasses (ours, timm's) and SyncBatchNorm. A layer that is
    used under several names is listed once.
    """
    return {name: m for name, m in model.named_modules() if isinstance(m, _BatchNorm)}
