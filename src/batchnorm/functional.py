"""`batch_norm`: check the arguments, then let the operator compute."""

import math

import torch
from torch import Tensor

from batchnorm import kernels
from batchnorm.errors import BatchNormError
from batchnorm.kernels.activations import ACTIVATIONS


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
    residual: Tensor | None = None,
    activation: str | None = None,
) -> Tensor:
    """y = activation((x − mean) / √(var + eps) · weight + bias + residual), per channel.

    In training mean and var are those of the batch, var the biased one, over all axes but axis 1;
    running_mean and running_var, where given, are then updated in place,

        running ← (1 − momentum) · running + momentum · batch,

    with the unbiased variance: var · M / (M − 1) for M values per channel. In evaluation mean and
    var are the running ones. The signature, the defaults and the numbers are those of
    `torch.nn.functional.batch_norm`.

    Args:
        input: (N, C, *spatial), any rank from 2, a floating dtype.
        running_mean: (C,), or None: in training nothing is updated; evaluation needs it.
        running_var: (C,), likewise.
        weight: (C,), or None for 1.
        bias: (C,), or None for 0.
        training: normalize with the batch's statistics instead of the running ones.
        momentum: the weight of the new batch in the running statistics, as in torch.
        eps: added to the variance, inside the square root.
        residual: of the input's shape, or one that broadcasts to it; added before the activation.
        activation: relu, leaky_relu (slope 0.01), sigmoid, tanh, silu, gelu (exact) or hardswish;
            None for none.

    Returns:
        y: (N, C, *spatial), of the dtype and the memory format of the input.

    Raises:
        BatchNormError: a shape or dtype that does not fit, a single value per channel in training,
            no running statistics in evaluation, an eps that is not positive, an activation that is
            not known, a residual that does not fit.

    Source: Ioffe & Szegedy 2015, https://arxiv.org/abs/1502.03167.
    """
    channels = input.shape[1] if input.dim() > 1 else 0
    _check_input(input, training, channels)
    _check_channels(input, channels, running_mean, running_var, weight, bias)
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
    )


def _check_input(x: Tensor, training: bool, channels: int) -> None:
    if x.dim() < 2 and x.shape != (0,):  # which torch lets through
        raise BatchNormError(
            f"batch_norm got an input of shape {tuple(x.shape)} and wants (N, C, *spatial), rank 2 "
            "or more. Add the batch axis with input[None], the channel axis with input[:, None]."
        )
    if not x.is_floating_point():
        raise BatchNormError(
            f"batch_norm got an input of dtype {x.dtype} and wants a floating one. "
            "Convert it with input.float()."
        )
    # the first condition is cheap, and rarely true
    if training and x.numel() == channels and math.prod(x.shape[2:], start=x.shape[0]) == 1:
        raise BatchNormError(
            "Expected more than 1 value per channel when training, got an input of shape "
            f"{tuple(x.shape)}. One value has no variance: use a larger batch (drop_last=True if "
            "this is the last one), or normalize with the running statistics in eval()."
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


def _check_channels(
    x: Tensor,
    channels: int,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
) -> None:
    # spelled out: this runs on every call, and a loop over a dict costs a microsecond
    if running_mean is not None and running_mean.numel() != channels:
        raise _wrong_channels(x, "running_mean", running_mean)
    if running_var is not None and running_var.numel() != channels:
        raise _wrong_channels(x, "running_var", running_var)
    if weight is not None and weight.numel() != channels:
        raise _wrong_channels(x, "weight", weight)
    if bias is not None and bias.numel() != channels:
        raise _wrong_channels(x, "bias", bias)


def _wrong_channels(x: Tensor, name: str, value: Tensor) -> BatchNormError:
    return BatchNormError(
        f"batch_norm got {x.shape[1]} channels in an input of shape {tuple(x.shape)} (channels are "
        f"axis 1), but {name} has {value.numel()} values. Build the layer with "
        f"num_features={x.shape[1]}, or move the channels to axis 1."
    )
