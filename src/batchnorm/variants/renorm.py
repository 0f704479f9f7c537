"""Batch renormalization: training that normalizes almost as evaluation does."""

from contextlib import nullcontext
from typing import Any, Self

import torch
from torch import Tensor
from torch.nn.modules.batchnorm import _NormBase

from batchnorm import kernels, masks
from batchnorm.errors import BatchNormError
from batchnorm.functional import batch_norm
from batchnorm.kernels import verbs
from batchnorm.variants.variant import Variant, refuse_recomputation


class RenormBatchNorm(Variant):
    """y = ((x − mean) / σ_B · r + d) · weight + bias, with r and d held constant in the gradient.

        σ_B = √(var + eps),             r = clip(σ_B / σ, 1 / r_limit, r_limit),
        σ = √(running var + eps),       d = clip((mean − running mean) / σ, −d_limit, d_limit)

    for the batch's mean and biased variance var. Where nothing is clipped, y = (x − running mean) / σ
    · weight + bias, as in evaluation, so that small or dependent batches do not part training from
    evaluation. Then, with momentum as the weight of the new batch,

        running mean ← running mean + momentum · (mean − running mean),    σ ← σ + momentum · (σ_B − σ).

    It is the deviation σ that is averaged, eps within, and without Bessel's factor, as in the paper
    and in Keras; `running_var` holds σ² − eps, so that evaluation is batch normalization with it.

    The limits widen with the number t of batches seen before: until `warmup` r_limit = 1 and
    d_limit = 0, which is batch normalization; from there they grow linearly, r_limit to r_max at
    `r_steps` and d_limit to d_max at `d_steps`, and stay. With all three at 0 they are r_max and d_max
    from the start.

    Use it where batches are small or their samples depend on each other. Not with a running average
    that lags: a momentum far below 0.01, or a large learning rate at the start without warm-up.

    Args:
        num_features: C.
        eps: added to the variance, inside the square root.
        momentum: the weight of the new batch; the paper has 0.01. None: the average over all batches.
        affine: learn weight and bias.
        device: where the parameters and buffers are made.
        dtype: of the parameters and buffers.
        bias: with affine: learn the bias.
        r_max: the largest r, 1 or more, finite; the smallest is 1 / r_max.
        d_max: the largest |d|, 0 or more, finite.
        warmup: batches of plain batch normalization.
        r_steps: the batch at which r_limit is r_max.
        d_steps: the batch at which d_limit is d_max.

    Shapes: (N, C, *spatial), any rank from 2; statistics over all axes but the channels'.

    Raises:
        BatchNormError: limits or steps that make no sense; one value per channel in training.

    Source: Ioffe 2017, https://arxiv.org/abs/1702.03275, algorithm 1 and section 4 (the steps).
    """

    options = ("r_max", "d_max", "warmup", "r_steps", "d_steps")

    def __init__(
        self,
        num_features: int,
        eps: float = 1e-5,
        momentum: float | None = 0.01,
        affine: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        bias: bool = True,
        r_max: float = 3.0,
        d_max: float = 5.0,
        warmup: int = 5_000,
        r_steps: int = 40_000,
        d_steps: int = 25_000,
    ) -> None:
        super().__init__(num_features, eps, momentum, affine, True, device, dtype, bias=bias)
        if not (1 <= r_max < float("inf") and 0 <= d_max < float("inf")):
            raise BatchNormError(
                f"RenormBatchNorm got r_max={r_max} and d_max={d_max} and wants r_max from 1 and "
                "d_max from 0, both finite. For no limit pass a large number, 1e6."
            )
        if not 0 <= warmup <= min(r_steps, d_steps):
            raise BatchNormError(
                f"RenormBatchNorm got warmup={warmup}, r_steps={r_steps}, d_steps={d_steps} and "
                "wants 0 <= warmup <= r_steps and d_steps: the limits widen after the warm-up."
            )
        self.r_max, self.d_max = r_max, d_max
        self.warmup, self.r_steps, self.d_steps = warmup, r_steps, d_steps

    @classmethod
    def of(cls, norm: _NormBase, **options: Any) -> Self:
        """In the place of a norm, whose momentum and count of batches it keeps unless told otherwise."""
        momentum = options.pop("momentum", norm.momentum)
        made = super().of(norm, **options)
        made.momentum = momentum
        return made

    def limits(self) -> tuple[Tensor, Tensor]:
        """r_limit and d_limit for the next batch: scalars on the layer's device."""
        seen = self.seen()
        r_limit = 1 + (self.r_max - 1) * _progress(seen, self.warmup, self.r_steps)
        return r_limit, self.d_max * _progress(seen, self.warmup, self.d_steps)

    def train_on(self, x: Tensor, keep: Tensor | None) -> Tensor:
        """One sweep for the moments, one for the rest, with r and d in weight and bias."""
        if x[:, :1].numel() < 2:  # batch_norm says what one value, or none, makes of it
            return self.normalize(x, None, None, by_batch=True, keep=keep)
        if self.updates:
            refuse_recomputation(self)
        with torch.no_grad():
            mean, var_biased = kernels.moments(x) if keep is None else _masked_moments(x, keep)
            r, d = self._correction(mean, var_biased)
        weight = r if self.weight is None else r * self.weight
        bias = d if self.weight is None else d * self.weight
        bias = bias if self.bias is None else bias + self.bias
        wide = torch.float64 if x.dtype == torch.float64 else torch.float32
        affine = weight.to(wide), bias.to(wide)
        y = batch_norm(x, None, None, *affine, training=True, eps=self.eps, mask=keep)
        if self.updates:
            known = None if keep is None else masks.count(keep) > 1
            with nullcontext() if known is None else self.moving_where(known):
                self._move(mean, var_biased)
        return y

    def _correction(self, mean: Tensor, var_biased: Tensor) -> tuple[Tensor, Tensor]:
        """r and d: (C,), of the dtype of the running statistics, float32 at least."""
        running_mean, running_var = (running.to(mean) for running in self.running())
        sigma = (running_var + self.eps).sqrt()
        r_limit, d_limit = (limit.to(mean) for limit in self.limits())
        r = ((var_biased + self.eps).sqrt() / sigma).clamp(1 / r_limit, r_limit)
        d = ((mean - running_mean) / sigma).clamp(-d_limit, d_limit)
        return r, d

    @torch.no_grad()
    def _move(self, mean: Tensor, var_biased: Tensor) -> None:
        running_mean, running_var = self.running()
        old_var = running_var.to(var_biased)
        sigma = (old_var + self.eps).sqrt()
        share = self.share()
        share = share.to(mean) if isinstance(share, Tensor) else share
        # step = share · (σ_B − σ), and σ² − eps = running var + step · (2 σ + step), both without
        # the difference of two near numbers
        step = share * (var_biased - old_var) / ((var_biased + self.eps).sqrt() + sigma)
        running_mean.copy_(running_mean.to(mean).lerp(mean, share))
        running_var.copy_(old_var + step * (2 * sigma + step))


def _masked_moments(x: Tensor, keep: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and biased variance of the values that count."""
    count, mean, squares = verbs.moments(x, keep)
    return mean, squares / count.clamp(min=1)


def _progress(seen: Tensor, start: int, end: int) -> Tensor:
    """0 until start, 1 from end, and never more."""
    if start == end:
        return (seen >= end).to(seen.dtype)
    return ((seen - start) / (end - start)).clamp(0, 1)
