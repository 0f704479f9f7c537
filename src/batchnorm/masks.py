"""Batch normalization of the values that count: padding stays out of statistics and gradients."""

from typing import Any

import torch
from torch import Tensor

from batchnorm import kernels
from batchnorm.errors import BatchNormError
from batchnorm.kernels import verbs
from batchnorm.kernels.activations import ACTIVATIONS


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
    keep: Tensor,
) -> Tensor:
    """y = keep · activation((x − mean) / √(var + eps) · weight + bias + residual).

    In training mean and var are those of the values kept, M of them in a channel, and the running
    statistics of a channel move where M > 1. No step waits for the device or depends on how many
    values are kept: the graph is one and the same for every mask.

    x: (N, C, *spatial); keep: bool, of the rank of x, with 1 or C channels.
    """
    if training:
        count, mean, squares = verbs.moments(x, keep)
        invstd = (squares / count.clamp(min=1) + eps).rsqrt()
        y = verbs.normalize(x, mean, invstd, weight, bias, keep)
        update_running(running_mean, running_var, count, mean, squares, momentum)
    else:
        filled = torch.where(keep, x, 0)
        y = kernels.batch_norm(
            filled, running_mean, running_var, weight, bias, False, momentum, eps, None, None
        )
    if residual is not None:
        y = y + torch.where(keep, residual, 0)  # a NaN would reach its gradient
    if activation is not None:
        y = ACTIVATIONS[activation](y)
    return torch.where(keep, y, 0)  # the bias, the residual and sigmoid(0) are not 0


@torch.no_grad()
def update_running(
    running_mean: Tensor | None,
    running_var: Tensor | None,
    count: Tensor,
    mean: Tensor,
    squares: Tensor,
    momentum: float | Tensor,
) -> None:
    """running ← (1 − momentum) · running + momentum · batch, in channels with two values or more.

    count, mean, squares: (C,); squares is Σ (x − mean)², and the running variance the unbiased one.
    """
    known = count > 1  # one value has no variance
    var_unbiased = squares / (count - 1).clamp(min=1)
    for running, batch in ((running_mean, mean), (running_var, var_unbiased)):
        if running is not None:
            # in the wider dtype: the step of a half-precision average may be less than its digit;
            # not by a difference, which would cost the digits of a batch that is small beside it
            old = running.to(torch.promote_types(running.dtype, batch.dtype))
            moved = (1 - momentum) * old + momentum * batch
            running.copy_(torch.where(known, moved, running))


def moves(x: Tensor, keep: Tensor | None = None) -> Tensor | bool:
    """Whether a batch of (N, C, *spatial) moves statistics: some channel is left two values or more.

    What is said of a mask stays a tensor: reading it would wait for the device.
    """
    if keep is None:
        return bool(x.shape[1] > 0 and x.numel() >= 2 * x.shape[1])
    return (count(keep) > 1).any()


def leaves_two(mask: Tensor, x: Tensor, axis: int) -> Tensor:
    """`moves`, of a mask that is known to fit: as it stands, without the views that `fit` makes."""
    if mask.dim() < x.dim():
        return mask.sum() > 1
    places = [place for place in range(x.dim()) if place != axis % x.dim()]
    return (mask.sum(places) > 1).any()


def count(keep: Tensor) -> Tensor:
    """(N, 1 or C, *spatial) -> (1 or C,): the values that are left to each channel."""
    return keep.movedim(1, 0).flatten(1).sum(1)


def counted(x: Tensor, mask: Tensor | None = None, axis: int = 1) -> tuple[Tensor, Tensor | None]:
    """x with its channels on axis 1 and the mask in its rank: what a layer's call is about."""
    if mask is None and axis == 1:
        return x, None
    check_axis("batch_norm", x, axis)
    keep = None if mask is None else fit(mask, x, axis % x.dim()).movedim(axis, 1)
    return x.movedim(axis, 1), keep


def called(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Tensor, Tensor | None]:
    """`counted` of what a layer is called with, whatever its first argument is named."""
    given = dict(zip(("mask", "axis"), args[1:], strict=False)) | kwargs
    # by keyword the input may stand anywhere, and others' layers name it otherwise
    x = args[0] if args else next(v for k, v in kwargs.items() if k not in {"mask", "axis"})
    x, keep = counted(x, given.get("mask"), given.get("axis", 1))
    if keep is not None and keep.shape[1] != 1:
        raise BatchNormError(
            "got a mask with a place for every channel, and only one for all channels leaves them "
            "the same count of values, of which batches are merged. Pass a mask without channels."
        )
    return x, keep


def values(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    """What a layer that is called so takes the moments of, with the channels on axis 1.

    Raises:
        BatchNormError: a mask with a place for every channel, which leaves them different counts.
    """
    x, keep = called(args, kwargs)
    return x if keep is None else x.movedim(1, -1)[keep[:, 0]]


def fit(mask: Tensor, x: Tensor, axis: int = 1) -> Tensor:
    """The mask in the rank of x: with 1 channel or C.

    mask: x's shape without the channel axis, or x's rank with 1 or C channels. It is never
    right-aligned: which samples a shorter mask means would be a guess.
    """
    if not isinstance(mask, Tensor):
        raise BatchNormError(
            f"batch_norm got a {type(mask).__name__} as mask and wants a torch.Tensor of dtype "
            "torch.bool, True where a value counts. Convert it with torch.as_tensor."
        )
    shape = list(x.shape)
    places = shape[:axis] + shape[axis + 1 :]
    per_channel = mask.dim() == x.dim() and mask.shape[axis] in {1, shape[axis]}
    rest = list(mask.shape)
    if per_channel:
        del rest[axis]
    if mask.dtype != torch.bool or rest != places:
        one = [*shape[:axis], 1, *shape[axis + 1 :]]
        raise BatchNormError(
            f"batch_norm got a mask of dtype {mask.dtype} and shape {tuple(mask.shape)} for an input "
            f"of shape {tuple(shape)} with the channels on axis {axis}, and wants torch.bool, "
            f"{tuple(places)}, {tuple(one)} or {tuple(shape)}, True where a value counts. From "
            "lengths: torch.arange(T) < lengths[:, None]."
        )
    return mask if per_channel else mask.unsqueeze(axis)


def check_axis(who: str, x: Tensor, axis: int) -> None:
    """The input has such an axis."""
    if x.dim() < 2 or not hasattr(axis, "__index__") or not -x.dim() <= axis < x.dim():
        raise BatchNormError(
            f"{who} got axis={axis!r} for an input of shape {tuple(x.shape)} and wants an axis of "
            "an input of rank 2 or more, a whole number such as -1 for (N, L, C)."
        )
