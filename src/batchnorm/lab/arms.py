"""The arms of a comparison: what stands where a network has batch normalization.

An arm is a function from a batch-norm layer to the layer that takes its place. Weight and bias
start from the layer's own, so that a network that initializes them (to 0 at the end of a residual
branch, say) is compared as it is meant.
"""

from collections import OrderedDict
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules.batchnorm import _BatchNorm

import batchnorm
from batchnorm.errors import BatchNormError
from batchnorm.lab.note import NoteBatchNorm
from batchnorm.model import conversion
from batchnorm.model.conversion import replace
from batchnorm.model.discovery import activation_of, batch_norms
from batchnorm.variants.estimators import EstimatorBatchNorm
from batchnorm.variants.frozen import FrozenBatchNorm
from batchnorm.variants.ghost import GhostBatchNorm
from batchnorm.variants.renorm import RenormBatchNorm
from batchnorm.variants.split import SplitBatchNorm

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


class Noise(nn.Module):
    """y = x + ε in training, ε ~ N(μ, σ²), where μ and σ are drawn anew for each channel and step.

    μ ~ U(−0.5, 0.5), σ ~ U(0, 1.25): the shift that normalization is said to remove, put back
    behind it (Santurkar et al. 2018, §2.1, https://arxiv.org/abs/1805.11604).
    """

    def forward(self, x: Tensor) -> Tensor:
        """x: (N, C, *spatial)."""
        if not self.training:
            return x
        shape = [1, x.shape[1], *[1] * (x.dim() - 2)]
        mean, std = x.new_empty(shape).uniform_(-0.5, 0.5), x.new_empty(shape).uniform_(0, 1.25)
        return x + mean + std * torch.randn_like(x)


def batch_noise(layer: _BatchNorm) -> nn.Module:
    """This library's layer, and noise of a changing mean and variance behind it in training."""
    return nn.Sequential(OrderedDict(norm=batch(layer), noise=Noise()))


class PopulationNorm(nn.Module):
    """y = (x − running mean) / √(running var + eps) · weight + bias, in training as in evaluation.

    The running statistics take the batch in before they are used; no gradient passes through them.
    What is left out of batch normalization are the noise of a batch's own statistics and the
    gradient through them (Luo et al. 2019, §2, https://arxiv.org/abs/1809.00846).
    """

    def __init__(self, norm: _BatchNorm) -> None:
        super().__init__()
        self.norm = norm

    def forward(self, x: Tensor) -> Tensor:
        """x: (N, C, *spatial)."""
        norm = self.norm
        if not self.training:
            y: Tensor = norm(x)
            return y
        with torch.no_grad():
            norm(x)
        return F.batch_norm(
            x, norm.running_mean, norm.running_var, norm.weight, norm.bias, eps=norm.eps
        )


def batch_population(layer: _BatchNorm) -> nn.Module:
    """This library's layer, normalizing with the running statistics in training, too."""
    return PopulationNorm(batch(layer))  # type: ignore[arg-type]  # of this library's classes


GHOST_SIZE = 32
GHOST_SIZES = (16, 64, 256)  # with an arm of their own


def ghost(layer: _BatchNorm, ghost_size: int = GHOST_SIZE) -> nn.Module:
    """Ghost batch normalization: the statistics of so many samples each."""
    return GhostBatchNorm.of(layer, ghost_size=ghost_size)


def renorm(layer: _BatchNorm) -> nn.Module:
    """Batch renormalization, its schedule a 25th of the paper's: comparisons have fewer steps."""
    return RenormBatchNorm.of(layer, warmup=200, r_steps=1_600, d_steps=1_000)


def estimator(layer: _BatchNorm) -> nn.Module:
    """Batch normalization with debiased running averages: comparisons are short."""
    return EstimatorBatchNorm.of(layer, average="debiased")


def frozen(layer: _BatchNorm) -> nn.Module:
    """The affine map of the network's own statistics, all of it constant."""
    made = FrozenBatchNorm(layer.num_features, layer.eps, dtype=_dtype(layer))
    known = {name: value for name, value in layer.state_dict().items() if name in made._buffers}  # noqa: SLF001  # torch's
    made.load_state_dict(made.state_dict() | known)
    return made


def split(layer: _BatchNorm) -> nn.Module:
    """Split batch normalization; a comparison trains its first domain, which then is `batch`."""
    return SplitBatchNorm.of(layer, shared=True)


def sync(layer: _BatchNorm) -> nn.Module:
    """Synchronised batch normalization; in the one process of a comparison it is `batch`."""
    return _twin(layer, batchnorm.SyncBatchNorm)


ARMS: dict[str, Arm] = {
    "none": none,
    "batch": batch,
    "batch-torch": batch_torch,
    "batch-note": batch_note,
    "group": group,
    "layer": layer,
    "batch-noise": batch_noise,
    "batch-population": batch_population,
    "ghost": ghost,
    **{f"ghost-{size}": partial(ghost, ghost_size=size) for size in GHOST_SIZES},
    "renorm": renorm,
    "estimator": estimator,
    "frozen": frozen,
    "split": split,
    "sync": sync,
}


def apply(model: nn.Module, arm: str, ghost_size: int = GHOST_SIZE) -> tuple[nn.Module, list[str]]:
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
    make = partial(ghost, ghost_size=ghost_size) if arm == "ghost" else ARMS[arm]
    return replace(model, partial(_in_the_place_of, make)), places


def _in_the_place_of(make: Arm, layer: _BatchNorm) -> nn.Module:
    """The arm's layer; an activation that belonged to the old one stays behind it."""
    made, activation = make(layer), activation_of(layer)
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
