"""Put other layers in the place of a model's batch normalization."""

from collections import OrderedDict
from collections.abc import Callable, Sequence
from typing import Any

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from batchnorm import layers
from batchnorm.errors import BatchNormError
from batchnorm.model import account
from batchnorm.model.account import Change
from batchnorm.model.discovery import activation_of, batch_norms, matching
from batchnorm.model.freezing import Frozen

OURS = {
    nn.BatchNorm1d: layers.BatchNorm1d,
    nn.BatchNorm2d: layers.BatchNorm2d,
    nn.BatchNorm3d: layers.BatchNorm3d,
    nn.SyncBatchNorm: layers.BatchNorm,  # of any rank, as it is
}
TORCHS = {ours: torchs for torchs, ours in OURS.items() if torchs is not nn.SyncBatchNorm}
HOOKS = (
    "_forward_hooks",
    "_forward_hooks_with_kwargs",
    "_forward_hooks_always_called",
    "_forward_pre_hooks",
    "_forward_pre_hooks_with_kwargs",
    "_backward_hooks",
    "_backward_pre_hooks",
)


class _Left(Exception):  # noqa: N818  # a reason, told in the account
    """Why a layer stays."""


def convert(model: nn.Module, to: str = "ours", pattern: str | Sequence[str] = "*") -> nn.Module:
    """Put another kind of layer in the place of each batch norm, in place; return the model.

    The new layers hold the same Parameter and buffer objects, so that an optimizer made before
    still trains them, and the old one's mode and hooks. A layer shared under several names stays
    shared.

    Args:
        model: any model with batch norm in it.
        to: "ours" (this library's layers; the same outputs), "torch" (torch.nn's; the same
            outputs), "sync" (torch's SyncBatchNorm; the same outputs in evaluation), "group",
            "layer" or "instance" norm (statistics of each sample; weight and bias are kept), or
            "none".
        pattern: which layers, by name, with * and ?; or several patterns.

    Returns:
        The model; where it is a batch norm itself, the new layer. `changes` of it names what was
        converted, and what was left and why.

    Raises:
        BatchNormError: a kind that is not known.
    """
    if to not in KINDS:
        raise BatchNormError(f"convert got to={to!r} and wants one of {', '.join(KINDS)}.")
    entries, made = [], {}
    for name, layer in matching(model, pattern):
        try:
            made[layer] = _converted(layer, to)
        except _Left as reason:
            entries.append(Change(name, done=False, what=str(reason)))
        else:
            entries.append(Change(name, done=True, what=f"is now a {type(made[layer]).__name__}"))
    model = replace(model, lambda layer: made.get(layer, layer))
    return account.record(model, "convert", entries, to=to)


def replace(model: nn.Module, make: Callable[[_BatchNorm], nn.Module]) -> nn.Module:
    """Put `make(layer)` where each batch-norm layer is, in place; return the model.

    `make` is called once a layer: one that is shared under several names stays shared. A model
    that is itself a batch-norm layer comes back as `make(model)`.
    """
    made = {layer: make(layer) for layer in batch_norms(model).values()}
    for parent in list(model.modules()):
        for name, child in list(parent._modules.items()):  # named_children drops duplicates  # noqa: SLF001
            if isinstance(child, _BatchNorm) and made.get(child, child) is not child:
                setattr(parent, name, made[child])
    return made[model] if isinstance(model, _BatchNorm) else model


def _converted(layer: _BatchNorm, to: str) -> nn.Module:
    if isinstance(layer, Frozen):
        raise _Left("frozen: unfreeze it first")
    activation = activation_of(layer)
    if to in {"ours", "torch", "sync"}:
        if not isinstance(activation, nn.Identity):
            raise _Left(f"a {type(layer).__name__} with an activation of its own")
        return KINDS[to](layer)
    norm = KINDS[to](layer)
    norm.train(layer.training)
    for hooks in HOOKS:
        setattr(norm, hooks, getattr(layer, hooks))
    if isinstance(activation, nn.Identity):
        return norm
    return nn.Sequential(OrderedDict(norm=norm, act=activation)).train(layer.training)


def _to_ours(layer: _BatchNorm) -> nn.Module:
    return _recast(layer, OURS)


def _to_torch(layer: _BatchNorm) -> nn.Module:
    if type(layer) is layers.BatchNorm:
        raise _Left("of any rank, and torch.nn has a layer for each")
    return _recast(layer, TORCHS)


def _recast(layer: _BatchNorm, classes: dict[Any, Any]) -> nn.Module:
    """The same object in another class: whoever holds it, or what it holds, notices nothing."""
    if type(layer) in classes:
        layer.__class__ = classes[type(layer)]
    elif type(layer) not in {*OURS, *OURS.values()}:
        raise _Left(f"a {type(layer).__name__}, which may do more than batch norm")
    return layer


def _to_sync(layer: _BatchNorm) -> nn.Module:
    synced: nn.Module = nn.SyncBatchNorm.convert_sync_batchnorm(layer)
    return synced


def _to_groups(layer: _BatchNorm) -> nn.Module:
    """At most 32 groups of 4 channels or more."""
    channels = layer.num_features
    most = max(1, min(32, channels // 4))
    return _per_sample(layer, next(g for g in range(most, 0, -1) if channels % g == 0))


def _to_layer(layer: _BatchNorm) -> nn.Module:
    """Per sample, over channels and space, as in convolutional networks."""
    return _per_sample(layer, 1)


def _to_instances(layer: _BatchNorm) -> nn.Module:
    """Per sample and channel."""
    return _per_sample(layer, layer.num_features)


def _per_sample(layer: _BatchNorm, groups: int) -> nn.Module:
    norm = nn.GroupNorm(groups, layer.num_features, layer.eps, affine=layer.affine)
    norm.weight, norm.bias = layer.weight, layer.bias
    return norm


KINDS: dict[str, Callable[[_BatchNorm], nn.Module]] = {
    "ours": _to_ours,
    "torch": _to_torch,
    "sync": _to_sync,
    "group": _to_groups,
    "layer": _to_layer,
    "instance": _to_instances,
    "none": lambda _layer: nn.Identity(),
}
