"""The arms of a comparison: what stands where a network has batch normalization.

An arm is a function from a batch-norm layer to the layer that takes its place. Weight and bias
start from the layer's own, so that a network that initializes them (to 0 at the end of a residual
branch, say) is compared as it is meant.
"""

from collections import OrderedDict
from collections.abc import Callable
from functools import partial

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

import batchnorm
from batchnorm.errors import BatchNormError
from batchnorm.lab.note import NoteBatchNorm
from batchnorm.model import conversion
from batchnorm.model.conversion import replace
from batchnorm.model.discovery import activation_of, batch_norms
from batchnorm.variants.ghost import GhostBatchNorm
from batchnorm.variants.renorm import RenormBatchNorm

Arm = Callable[[_BatchNorm], nn.Module]


def none(_layer: _BatchNorm) -> nn.Module:
    """Nothing: the network without batch normalization."""
    return nn.Identity()


def batch(layer: _BatchNorm) -> nn.Module:
    """This library's layer, of the same rank."""
    for theirs, ours in (
        (nn.BatchNorm1d, batchnorm.BatchNorm1d),
        (nn.BatchNorm2d, batchnorm.BatchNorm2d),
        (nn.BatchNorm3d, batchnorm.BatchNorm3d),
    ):
        if isinstance(layer, theirs):
            return _twin(layer, ours)
    return _twin(layer, batchnorm.BatchNorm)


def batch_torch(layer: _BatchNorm) -> nn.Module:
    """torch.nn's layer, of the same rank."""
    for theirs in (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d):
        if isinstance(layer, theirs):
            return _twin(layer, theirs)
    raise BatchNormError(
        f"the arm batch-torch got a {type(layer).__name__}, which has no rank, and torch.nn has a "
        "layer for each. Build the network with BatchNorm1d, BatchNorm2d or BatchNorm3d."
    )


def batch_note(_layer: _BatchNorm) -> nn.Module:
    """The note's own layer, defects and all."""
    return NoteBatchNorm()


def group(layer: _BatchNorm) -> nn.Module:
    """Group normalization: statistics per sample over at most 32 groups of 4 channels or more."""
    return conversion.KINDS["group"](layer)


def layer(layer: _BatchNorm) -> nn.Module:
    """Layer normalization as in convolutional networks: per sample, over channels and space."""
    return conversion.KINDS["layer"](layer)


def ghost(layer: _BatchNorm) -> nn.Module:
    """Ghost batch normalization: the statistics of 32 samples each."""
    return GhostBatchNorm.of(layer, ghost_size=32)


def renorm(layer: _BatchNorm) -> nn.Module:
    """Batch renormalization, its schedule a 25th of the paper's: comparisons have fewer steps."""
    return RenormBatchNorm.of(layer, warmup=200, r_steps=1_600, d_steps=1_000)


ARMS: dict[str, Arm] = {
    "none": none,
    "batch": batch,
    "batch-torch": batch_torch,
    "batch-note": batch_note,
    "group": group,
    "layer": layer,
    "ghost": ghost,
    "renorm": renorm,
}


def apply(model: nn.Module, arm: str) -> tuple[nn.Module, list[str]]:
    """Put an arm into a model, in place; return the model and the names of the places."""
    places = [
        name if isinstance(activation_of(layer), nn.Identity) else f"{name}.norm"
        for name, layer in batch_norms(model).items()
    ]
    if not places:
        raise BatchNormError(
            f"the network ({type(model).__name__}) has no batch-norm layer, so there is nothing to "
            "compare. Put torch.nn.BatchNorm1d/2d/3d where the arms should go."
        )
    return replace(model, partial(_in_the_place_of, arm)), places


def _in_the_place_of(arm: str, layer: _BatchNorm) -> nn.Module:
    """The arm's layer; an activation that belonged to the old one stays behind it."""
    made, activation = ARMS[arm](layer), activation_of(layer)
    made.train(layer.training)
    if isinstance(activation, nn.Identity):
        return made
    return nn.Sequential(OrderedDict(norm=made, act=activation))


def _twin(layer: _BatchNorm, cls: type[_BatchNorm]) -> nn.Module:
    """The same layer in another class: options, parameters, running statistics."""
    twin = cls(
        layer.num_features,
        layer.eps,
        layer.momentum,
        layer.affine,
        layer.track_running_stats,
        bias=layer.bias is not None,
        dtype=_dtype(layer),
    )
    twin.load_state_dict(layer.state_dict(), strict=False)  # an activation may have parameters
    for ours, theirs in ((twin.weight, layer.weight), (twin.bias, layer.bias)):
        if ours is not None and theirs is not None:
            ours.requires_grad_(theirs.requires_grad)
    return twin


def _dtype(layer: _BatchNorm) -> torch.dtype | None:
    like = layer.weight if layer.weight is not None else layer.running_mean
    return None if like is None else like.dtype
