"""`batch_norm`: check the arguments, then let the operator compute."""

import math

import torch
from torch import Tensor

from batchnorm import kernels, masks
from batchnorm.errors import BatchNormError, no_tensor
from batchnorm.kernels.activations import ACTIVATIONS
from batchnorm.kernels.pools import POOLS, WINDOW


def batch_norm(
    input: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
    *,
    mask: Tensor | None = None,
    residual: Tensor | None = None,
    activation: str | None = None,
    pool: str | None = None,
    axis: int = 1,
) -> Tensor:
    """y = pool(activation((x − mean) / √(var + eps) · weight + bias + residual)), per channel.

    In training mean and var are those of the batch, var the biased one, over all axes but `axis`;
    running_mean and running_var, where given, are then updated in place,

        running ← (1 − momentum) · running + momentum · batch,

    with the unbiased variance: var · M / (M − 1) for M values per channel. In evaluation mean and
    var are the running ones. The signature, the defaults and the numbers are those of
    `torch.nn.functional.batch_norm`.

    With a mask, mean, var and M are those of the values that count, as if they stood packed side by
    side; y and the input's gradient are 0 elsewhere, whatever stands there, NaN too. The mask is
    data, and so nothing is raised for what it leaves over: a channel's running statistics move when
    two values or more are left; where one is, it is its own mean, and y the bias.

    Args:
        input: (N, C, *spatial), any rank from 2, a floating dtype.
        running_mean: (C,), or None: in training nothing is updated; evaluation needs it.
        running_var: (C,), likewise.
        weight: (C,), or None for 1.
        bias: (C,), or None for 0.
        training: normalize with the batch's statistics instead of the running ones.
        momentum: the weight of the new batch in the running statistics, as in torch.
        eps: added to the variance, inside the square root.
        mask: bool, True where a value counts: (N, *spatial), the input's shape without channels, or
            in its rank, (N, 1, *spatial) or (N, C, *spatial); never right-aligned.
        residual: of the input's shape, or one that broadcasts to it; added before the activation.
        activation: relu, leaky_relu (slope 0.01), sigmoid, tanh, silu, gelu (exact) or hardswish;
            None for none.
        pool: avg or max over windows of 2×2 with stride 2, as `F.avg_pool2d(y, 2)`, behind the
            activation; None for none. With a mask it pools y as above, 0 where nothing counts.
        axis: where the channels stand: 1, or -1 for (N, L, C). Nothing is copied for it where the
            input is contiguous; a mask stands as the input does.

    Returns:
        y: of the shape and the memory format of the input, and of its dtype, or of the residual's where that
            is wider; with a pooling (N, C, H // 2, W // 2).

    Raises:
        BatchNormError: a shape or dtype that does not fit, a single value per channel in training,
            no running statistics in evaluation, an eps that is not positive, an activation that is
            not known, a residual that does not fit, a pooling that is not known or of an input that
            is not (N, C, H, W) with H and W of 2 or more.

    Source: Ioffe & Szegedy 2015, https://arxiv.org/abs/1502.03167.
    """
    if pool is not None:
        check_pool(pool, input, axis)
    if axis != 1:
        return _along(
            axis, input, running_mean, running_var, weight, bias, training, momentum, eps, mask,
            residual, activation,
        )  # fmt: skip
    _check_input(input, training)
    check_channels(input, running_mean, running_var, weight, bias)
    if not training and (running_mean is None or running_var is None):
        raise BatchNormError(
            "batch_norm got training=False without running_mean and running_var, and wants both. "
            "Pass them, or pass training=True to normalize with the batch's own statistics."
        )
    if eps < 0 or (training and eps == 0):
        raise BatchNormError(
            f"batch_norm: eps must be positive in training and not negative in evaluation, "
            f"but got eps={eps}. The default is 1e-5."
        )
    if activation is not None and activation not in ACTIVATIONS:
        known = ", ".join(ACTIVATIONS)
        raise BatchNormError(
            f"batch_norm got activation={activation!r} and wants one of {known}, or None."
        )
    if residual is not None and residual.shape != input.shape:
        _check_residual(input, residual)
    if mask is not None:
        masks.check_axis("batch_norm", input, axis)  # 1.0 == 1
        y = masks.batch_norm(
            input, running_mean, running_var, weight, bias, training, momentum, eps, residual,
            activation, masks.fit(mask, input),
        )  # fmt: skip
        return y if pool is None else POOLS[pool](y)
    return kernels.batch_norm(
        input,
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


def _along(
    axis: int,
    x: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    training: bool,
    momentum: float,
    eps: float,
    mask: Tensor | None,
    residual: Tensor | None,
    activation: str | None,
) -> Tensor:
    """The channels on axis 1 of a view, and the outputs back in the input's shape."""
    if not isinstance(x, Tensor):
        raise no_tensor("batch_norm", x)
    masks.check_axis("batch_norm", x, axis)
    axis %= x.dim()
    check_channels(x, running_mean, running_var, weight, bias, axis)
    if residual is not None:
        _check_residual(x, residual)
        residual = residual.expand(x.shape)
    keep = None if mask is None else masks.fit(mask, x, axis)
    moved, keep, residual = (
        None if t is None else channels_on_axis_1(t, axis, flat=x.is_contiguous())
        for t in (x, keep, residual)
    )
    assert moved is not None  # noqa: S101  # for the type checker
    y = batch_norm(
        moved, running_mean, running_var, weight, bias, training, momentum, eps,
        mask=keep, residual=residual, activation=activation,
    )  # fmt: skip
    return y.reshape(x.shape) if x.is_contiguous() else y.movedim(1, axis)


def channels_on_axis_1(x: Tensor, axis: int, *, flat: bool) -> Tensor:
    """(before, C, after) or, with no axis behind them, (before, C): no copy of what is contiguous.

    Not flat: the same rank, a view; memory that is permuted may lie well for axis 1 already.
    """
    if not flat:
        return x.movedim(axis, 1)
    before, after = math.prod(x.shape[:axis]), x.shape[axis + 1 :]
    return x.reshape(before, x.shape[axis], *([math.prod(after)] if after else []))


def _check_input(x: Tensor, training: bool) -> None:
    try:  # costs nothing: this runs on every call
        rank = x.dim()
    except AttributeError:
        raise no_tensor("batch_norm", x) from None
    if rank < 2 and x.shape != (0,):  # which torch lets through
        raise BatchNormError(
            f"batch_norm got an input of shape {tuple(x.shape)} and wants (N, C, *spatial), rank 2 "
            "or more. Add the batch axis with input[None], the channel axis with input[:, None]."
        )
    if not x.is_floating_point():
        raise BatchNormError(
            f"batch_norm got an input of dtype {x.dtype} and wants a floating one. "
            "Convert it with input.float()."
        )
    channels = x.shape[1] if rank > 1 else 0
    # the first condition is cheap, and rarely true
    if training and x.numel() == channels and math.prod(x.shape[2:], start=x.shape[0]) == 1:
        raise BatchNormError(
            "Expected more than 1 value per channel when training, got an input of shape "
            f"{tuple(x.shape)}. One value has no variance: use a larger batch (drop_last=True if "
            "this is the last one), or normalize with the running statistics in eval()."
        )


def check_pool(pool: str, x: Tensor, axis: int) -> None:
    """The pooling must be known, and x have the two axes that it is over."""
    if pool not in POOLS:
        raise BatchNormError(
            f"batch_norm got pool={pool!r} and wants one of {', '.join(POOLS)}, or None."
        )
    if axis != 1 or x.dim() != 4 or min(x.shape[2:]) < WINDOW:
        raise BatchNormError(
            f"batch_norm got pool={pool!r} for an input of shape {tuple(x.shape)} with axis={axis} and "
            f"wants (N, C, H, W), H and W {WINDOW} or more, with axis=1. Leave pool out, and pool what "
            "comes back."
        )


def _check_residual(x: Tensor, residual: Tensor) -> None:
    try:
        fits = torch.broadcast_shapes(residual.shape, x.shape) == x.shape
    except RuntimeError:
        fits = False
    if not fits:
        raise BatchNormError(
            f"batch_norm got a residual of shape {tuple(residual.shape)} for an input of shape "
            f"{tuple(x.shape)} and wants the same, or one that broadcasts to it."
        )


def check_channels(
    x: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    axis: int = 1,
) -> None:
    """What is given for each channel must be for as many as x has on the axis."""
    channels = x.shape[axis] if x.dim() > 1 else 0
    # spelled out: this runs on every call, and a loop over a dict costs a microsecond
    if running_mean is not None and running_mean.numel() != channels:
        raise _wrong_channels(x, axis, "running_mean", running_mean)
    if running_var is not None and running_var.numel() != channels:
        raise _wrong_channels(x, axis, "running_var", running_var)
    if weight is not None and weight.numel() != channels:
        raise _wrong_channels(x, axis, "weight", weight)
    if bias is not None and bias.numel() != channels:
        raise _wrong_channels(x, axis, "bias", bias)


def _wrong_channels(x: Tensor, axis: int, name: str, value: Tensor) -> BatchNormError:
    channels, elsewhere = x.shape[axis], [a for a, n in enumerate(x.shape) if n == value.numel()]
    say = f"pass axis={elsewhere[-1]}" if elsewhere else f"move the channels to axis {axis}"
    return BatchNormError(
        f"batch_norm got {channels} channels in an input of shape {tuple(x.shape)} (channels are "
        f"axis {axis}), but {name} has {value.numel()} values. Build the layer with "
        f"num_features={channels}, or {say}."
    )
