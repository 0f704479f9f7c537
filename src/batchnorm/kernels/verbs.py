"""The four verbs of batch normalization, one by one: what stands between them is the caller's.

    moments           count = M,  mean = Σ x / M,  squares = Σ (x − mean)²
    normalize         y = (x − mean) · invstd · weight + bias
    reduce_gradient   sum = Σ dy,  dot = Σ dy · (x − mean)
    input_gradient    dx = weight · invstd · (dy − sum / M − (x − mean) · invstd² · dot / M)

per channel; Σ runs over the M values of a channel that `keep` marks, by default all of them. What it
does not mark may be NaN, and y and dx are 0 there. A synchronised layer gathers between the first and
the second, and between the third and the fourth. The native kernels run where they can, else torch's
operators, which are differentiable.

Everywhere: x, y, dy, dx: (N, C, *spatial); keep: bool, of the rank of x, with 1 or C channels, or
None; the rest (C,), float32 at least. M may be 0.
"""

import torch
from torch import Tensor

from batchnorm.kernels import native


def moments(x: Tensor, keep: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """count, mean and squares: (C,) each, of one dtype; of no values 0."""
    if keep is None and _natively(x):
        mean, var_biased = native.moments(x)
        count = torch.full_like(mean, x.numel() // x.shape[1])
        return count, mean, var_biased * count
    axes = [axis for axis in range(x.dim()) if axis != 1]
    wide = x.to(_wide(x))
    if keep is None:
        count = wide.new_full((x.shape[1],), x.numel() // max(x.shape[1], 1))
        mean = wide.sum(axes) / count.clamp(min=1)
        return count, mean, (wide - _on(mean, x)).square().sum(axes)
    count = keep.sum(axes).to(wide.dtype).expand(x.shape[1])
    mean = torch.where(keep, wide, 0).sum(axes) / count.clamp(min=1)
    # two passes: E[x²]−E[x]² loses every digit when |mean| ≫ std
    squares = torch.where(keep, wide - _on(mean, x), 0).square().sum(axes)
    return count, mean, squares


def normalize(
    x: Tensor,
    mean: Tensor,
    invstd: Tensor,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    keep: Tensor | None = None,
) -> Tensor:
    """y, of the dtype of x."""
    if keep is None and _natively(x):
        return native.normalize(x, mean, invstd, weight, bias)
    # subtracted first and multiplied afterwards, so that a large mean costs no digits
    centred = x.to(_wide(x)) - _on(mean, x)
    scale = invstd if weight is None else invstd * weight
    y = (centred if keep is None else torch.where(keep, centred, 0)) * _on(scale, x)
    if bias is not None:
        y = y + _on(bias, x)
    return (y if keep is None else torch.where(keep, y, 0)).to(x.dtype)


def reduce_gradient(
    dy: Tensor, x: Tensor, mean: Tensor, keep: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """sum and dot: (C,)."""
    if keep is None and _natively(x) and _natively(dy):
        return native.reduce_gradient(dy, x, mean)
    axes = [axis for axis in range(x.dim()) if axis != 1]
    wide, centred = dy.to(_wide(x)), x.to(_wide(x)) - _on(mean, x)
    if keep is not None:
        wide, centred = torch.where(keep, wide, 0), torch.where(keep, centred, 0)
    return wide.sum(axes), (wide * centred).sum(axes)


def input_gradient(
    dy: Tensor,
    x: Tensor,
    mean: Tensor,
    invstd: Tensor,
    weight: Tensor | None,
    mean_sum: Tensor,
    mean_dot: Tensor,
    keep: Tensor | None = None,
) -> Tensor:
    """dx, of the dtype of x; mean_sum is sum / M, mean_dot is dot / M."""
    if keep is None and _natively(x) and _natively(dy):
        return native.input_gradient(dy, x, mean, invstd, weight, mean_sum, mean_dot)
    scale = invstd if weight is None else invstd * weight
    along = invstd.square() * mean_dot
    centred = x.to(_wide(x)) - _on(mean, x)
    dx = (dy.to(_wide(x)) - _on(mean_sum, x) - centred * _on(along, x)) * _on(scale, x)
    return (dx if keep is None else torch.where(keep, dx, 0)).to(x.dtype)


def _natively(x: Tensor) -> bool:
    return not torch.is_grad_enabled() and native.fits(x, None, None, None, None, None)


def _wide(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)


def _on(per_channel: Tensor, x: Tensor) -> Tensor:
    """(C,) -> (1, C, 1, …), in the dtype that x is computed in."""
    return per_channel.to(_wide(x)).reshape(1, -1, *[1] * (x.dim() - 2))
