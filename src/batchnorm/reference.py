"""The equations of batch normalization in plain torch: the oracle that every test compares with.

Nothing here is called in training. It is written to be read and to be right: two passes over the
data, no cleverness, any rank from 2, whatever floating dtype it is given (float64, for an oracle).

Everywhere below
    x, y, dy, dx: (N, C, *spatial); weight, bias, mean, var, dweight, dbias: (C,);
    M = N · prod(spatial) is the count of values per channel, and Σ runs over them.

Source: Ioffe & Szegedy, "Batch Normalization", 2015, https://arxiv.org/abs/1502.03167, algorithm 1
and the gradients after it.
"""

import torch
from torch import Tensor


def moments(x: Tensor) -> tuple[Tensor, Tensor]:
    """mean = Σ x / M,  var_biased = Σ (x − mean)² / M.

    Returns mean, var_biased: (C,).
    """
    axes = _axes(x)
    mean = x.mean(axes)
    # two passes: E[x²]−E[x]² loses every digit when |mean| ≫ std
    var_biased = (x - _broadcast(mean, x)).square().mean(axes)
    return mean, var_biased


def normalize(
    x: Tensor,
    mean: Tensor,
    var_biased: Tensor,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
) -> Tensor:
    """y = (x − mean) / √(var_biased + eps) · weight + bias.

    In evaluation mean and var are the running ones, and this is the whole forward pass.
    """
    y = (x - _broadcast(mean, x)) / _broadcast((var_biased + eps).sqrt(), x)
    if weight is not None:
        y = y * _broadcast(weight, x)
    if bias is not None:
        y = y + _broadcast(bias, x)
    return y


def forward(
    x: Tensor, weight: Tensor | None = None, bias: Tensor | None = None, eps: float = 1e-5
) -> tuple[Tensor, Tensor, Tensor]:
    """Training: normalize x with its own moments.

    Returns y: (N, C, *spatial) and the mean, var_biased: (C,) that it used.
    """
    mean, var_biased = moments(x)
    return normalize(x, mean, var_biased, weight, bias, eps), mean, var_biased


def backward(
    dy: Tensor, x: Tensor, weight: Tensor | None = None, eps: float = 1e-5
) -> tuple[Tensor, Tensor, Tensor]:
    """Training, where mean and var depend on x.

    With x̂ = (x − mean) / √(var_biased + eps):

        dbias = Σ dy,  dweight = Σ dy · x̂,
        dx = weight / √(var_biased + eps) · (dy − dbias / M − x̂ · dweight / M).

    Returns dx: (N, C, *spatial); dweight, dbias: (C,).
    """
    mean, var_biased = moments(x)
    x_hat = normalize(x, mean, var_biased, eps=eps)
    dweight, dbias = _reduce(dy, x_hat)
    count = x.numel() // x.shape[1]
    dx = dy - _broadcast(dbias / count, x) - x_hat * _broadcast(dweight / count, x)
    return dx * _scale(x, var_biased, weight, eps), dweight, dbias


def backward_evaluation(
    dy: Tensor,
    x: Tensor,
    running_mean: Tensor,
    running_var: Tensor,
    weight: Tensor | None = None,
    eps: float = 1e-5,
) -> tuple[Tensor, Tensor, Tensor]:
    """Evaluation, where mean and var are constants.

        dbias = Σ dy,  dweight = Σ dy · x̂,  dx = weight / √(running_var + eps) · dy.

    Returns dx: (N, C, *spatial); dweight, dbias: (C,).
    """
    x_hat = normalize(x, running_mean, running_var, eps=eps)
    dweight, dbias = _reduce(dy, x_hat)
    return dy * _scale(x, running_var, weight, eps), dweight, dbias


def update_running(
    running_mean: Tensor,
    running_var: Tensor,
    mean: Tensor,
    var_biased: Tensor,
    count: int,
    momentum: float,
) -> tuple[Tensor, Tensor]:
    """running ← (1 − momentum) · running + momentum · batch,  var_unbiased = var_biased · M / (M − 1).

    momentum weighs the new batch, as in torch; the running variance is the unbiased one, although
    training normalizes with the biased one. `count` is M; M = 1 has no unbiased variance.

    Returns the new running_mean, running_var: (C,).
    """
    var_unbiased = var_biased * (count / (count - 1))
    new_mean = (1 - momentum) * running_mean + momentum * mean
    new_var = (1 - momentum) * running_var + momentum * var_unbiased
    return new_mean, new_var


def _axes(x: Tensor) -> list[int]:
    """Every axis but the channels'."""
    return [axis for axis in range(x.dim()) if axis != 1]


def _broadcast(per_channel: Tensor, x: Tensor) -> Tensor:
    """(C,) -> (1, C, 1, …, 1), of the rank of x."""
    return per_channel.reshape(1, -1, *[1] * (x.dim() - 2))


def _reduce(dy: Tensor, x_hat: Tensor) -> tuple[Tensor, Tensor]:
    axes = _axes(dy)
    return (dy * x_hat).sum(axes), dy.sum(axes)


def _scale(x: Tensor, var_biased: Tensor, weight: Tensor | None, eps: float) -> Tensor:
    """weight / √(var_biased + eps), broadcast over x."""
    scale = torch.ones_like(var_biased) if weight is None else weight
    return _broadcast(scale / (var_biased + eps).sqrt(), x)
