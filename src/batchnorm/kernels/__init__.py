"""The operator: the one place that computes batch normalization, whatever computes it.

`functional` is its only caller and has checked the arguments. The operator normalizes and, in
training, updates the running statistics where it has the batch's variance in hand: handing back
`invstd` for somebody else to do so would cost the small variances, since 1 / invstd² − eps has no
digit left once var ≪ eps.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

from batchnorm.kernels import native
from batchnorm.kernels.activations import ACTIVATIONS, IN_PLACE
from batchnorm.kernels.pools import POOLS


def backend() -> str:
    """What computes batch normalization of plain CPU tensors in this process.

    `native, avx512` (or avx2, baseline): the kernels, and the instruction set they use; `torch`:
    torch's own operator, which also serves every other device and whatever traces or transforms.
    The environment chooses otherwise: BATCHNORM_BACKEND=torch, BATCHNORM_ISA=baseline.
    """
    return native.BACKEND


def batch_norm(
    x: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    training: bool,
    momentum: float,
    eps: float,
    residual: Tensor | None,
    activation: str | None,
    pool: str | None = None,
) -> Tensor:
    """Normalize x: (N, C, *spatial); see `batchnorm.batch_norm` for the equations."""
    plain = residual is None and activation is None and pool is None
    if plain and training and native.sooner_by_torch(x, running_mean, running_var, weight, bias):
        # past F.batch_norm, whose checks functional has made
        return torch.batch_norm(
            x, weight, bias, running_mean, running_var, training, momentum, eps, False
        )
    ours = native.NATIVE and native.fits(x, running_mean, running_var, weight, bias, residual)
    if pool is not None and not (ours and native.pools(x, residual)):
        y = batch_norm(
            x,
            running_mean,
            running_var,
            weight,
            bias,
            training,
            momentum,
            eps,
            residual,
            activation,
        )
        return POOLS[pool](y)
    if ours:
        return native.batch_norm(
            x,
            running_mean,
            running_var,
            weight,
            bias,
            training,
            momentum,
            eps,
            residual,
            activation,
            pool,
        )
    y = F.batch_norm(x, running_mean, running_var, weight, bias, training, momentum, eps)
    if plain:
        return y
    # nobody else holds y, and no backward pass reads it: what follows may be written over it, which
    # saves the fresh memory; a transform may have made the residual larger than y
    alone = not torch._C._are_functorch_transforms_active()  # noqa: SLF001  # torch has no public way
    if residual is not None:
        alike = residual.shape == y.shape and residual.dtype == y.dtype
        y = y.add_(residual) if alone and alike else y + residual
    if activation is None:
        return y
    in_place = IN_PLACE.get(activation) if alone else None
    return ACTIVATIONS[activation](y) if in_place is None else in_place(y)


def moments(x: Tensor) -> tuple[Tensor, Tensor]:
    """mean = Σ x / M,  var_biased = Σ (x − mean)² / M: (C,) each, float32 at least.

    x: (N, C, *spatial), M = N · prod(spatial) values per channel, 1 or more.
    """
    if native.NATIVE and native.fits(x, None, None, None, None, None):
        return native.moments(x)
    x = x if x.dtype in {torch.float32, torch.float64} else x.float()
    if x.device.type not in {"cpu", "cuda"} or native.transformed():  # which see no values
        return _moments_of_two_passes(x)
    # four times faster than torch.var_mean, but in channels_last its sums lose digits far from 0
    mean, var_biased = torch.batch_norm_update_stats(x, None, None, 0.0)
    if bool((mean.square() > FAR * FAR * var_biased).any()):
        return _moments_of_two_passes(x.double())
    return mean, var_biased


FAR = 100  # standard deviations between the mean and 0, from which float32 sums are not trusted


def _moments_of_two_passes(x: Tensor) -> tuple[Tensor, Tensor]:
    axes = [axis for axis in range(x.dim()) if axis != 1]
    var_biased, mean = torch.var_mean(x, axes, correction=0)
    return mean, var_biased
