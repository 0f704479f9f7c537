"""Find the batch normalization in a model."""

from collections.abc import Iterable, Sequence
from fnmatch import fnmatchcase
from typing import TypeAlias

from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.instancenorm import _InstanceNorm

from batchnorm.errors import BatchNormError
from batchnorm.variants.sync import SyncBatchNorm
from batchnorm.variants.variant import Variant

Norm: TypeAlias = _BatchNorm | Variant
SYNCHRONISED = (nn.SyncBatchNorm, SyncBatchNorm)


def refuse_no_model(model: object, verb: str) -> None:
    """What is given must be a module."""
    if not isinstance(model, nn.Module):
        raise BatchNormError(f"{verb} got a {type(model).__name__} and wants a torch.nn.Module.")


def uncompiled(model: nn.Module) -> nn.Module:
    """What torch.compile holds; any other model is itself."""
    inner = getattr(model, "_orig_mod", model)
    return inner if isinstance(inner, nn.Module) else model


def batch_norms(model: nn.Module) -> dict[str, Norm]:
    """Every batch-norm layer of the model under its first name, in the order of registration.

    Found are torch.nn's layers, their subclasses (ours, timm's), SyncBatchNorm, and the family's
    members; of a split one the layers of its domains. A layer that is used under several names is
    listed once.
    """
    return {name: m for name, m in model.named_modules() if isinstance(m, Norm)}


def matching(model: nn.Module, pattern: str | Sequence[str]) -> list[tuple[str, Norm]]:
    """The batch norms whose name fits one of the patterns."""
    return [(name, norm) for name, norm in batch_norms(model).items() if fits(name, pattern)]


def fits(name: str, pattern: str | Sequence[str]) -> bool:
    """The name fits one of the patterns, with * and ?."""
    patterns = [pattern] if isinstance(pattern, str) else pattern
    if not isinstance(patterns, Iterable) or not all(isinstance(p, str) for p in patterns):
        raise BatchNormError(
            f'got the pattern {pattern!r} and wants a name with * and ?, such as "layer1.*", or '
            "several of them."
        )
    return any(fnmatchcase(name, each) for each in patterns)


def activation_of(norm: nn.Module) -> nn.Module:
    """What a norm does besides normalizing: timm's BatchNormAct2d drops and activates."""
    rest = [getattr(norm, name, None) for name in ("drop", "act")]
    kept = [m for m in rest if isinstance(m, nn.Module) and not isinstance(m, nn.Identity)]
    if not kept:
        return nn.Identity()
    return kept[0] if len(kept) == 1 else nn.Sequential(*kept)


def constant_norms(model: nn.Module) -> dict[str, nn.Module]:
    """Layers that apply batch normalization with statistics that are constants.

    torchvision's, timm's and detectron2's frozen layers are no `_BatchNorm`: they are known by what
    they hold.
    """
    return {
        name: module
        for name, module in model.named_modules()
        if not isinstance(module, _BatchNorm | _InstanceNorm)
        and isinstance(getattr(module, "running_mean", None), Tensor)
        and isinstance(getattr(module, "running_var", None), Tensor)
        and "Frozen" in type(module).__name__
    }
