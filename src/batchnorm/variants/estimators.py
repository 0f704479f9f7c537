"""Batch normalization whose running statistics are estimated in another way than torch's."""

import math

import torch
from torch import Tensor

from batchnorm import masks
from batchnorm.errors import BatchNormError
from batchnorm.variants.variant import Variant

AVERAGES = ("exponential", "debiased", "cumulative")


class EstimatorBatchNorm(Variant):
    """y = (x − mean) / √(var + eps) · weight + bias, and a choice of what evaluation will use.

    Training and evaluation are batch normalization. The running statistics move by

        running ← running + share_t · (batch − running),

    for the t-th batch and its mean and variance, var (biased) or var · M / (M − 1) (unbiased), with

        exponential    share_t = momentum; the start, 0 and 1, fades as (1 − momentum)^t
        debiased       share_t = momentum / (1 − (1 − momentum)^t): the exponential average divided by
                       1 − (1 − momentum)^t, so that the start has no weight from the first batch on
        cumulative     share_t = 1 / t: the plain average of all batches

    torch's layers are exponential and unbiased, with momentum=None cumulative; Keras, Flax and ONNX
    are exponential and biased, Equinox debiased and biased. Use it to go on with a training that was
    begun there, or where a training is too short for the start to fade (debiased); for anything else
    the plain layer, and `recalibrate` after it.

    Args:
        num_features: C.
        eps: added to the variance, inside the square root.
        momentum: the weight of the new batch, as in torch; without a part in a cumulative average.
        affine: learn weight and bias.
        device: where the parameters and buffers are made.
        dtype: of the parameters and buffers.
        bias: with affine: learn the bias.
        unbiased: the running variance has Bessel's factor, as in torch.
        average: exponential, debiased or cumulative.

    Shapes: (N, C, *spatial), any rank from 2.

    Raises:
        BatchNormError: an average that is not known; momentum=None with one that needs it.

    Source: Ioffe & Szegedy 2015, https://arxiv.org/abs/1502.03167, algorithm 2 (unbiased); Kingma &
    Ba 2015, https://arxiv.org/abs/1412.6980, section 3 (the debiased average).
    """

    options = ("unbiased", "average")

    def __init__(
        self,
        num_features: int,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        affine: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        bias: bool = True,
        unbiased: bool = True,
        average: str = "exponential",
    ) -> None:
        super().__init__(num_features, eps, momentum, affine, True, device, dtype, bias=bias)
        if average not in AVERAGES:
            raise BatchNormError(
                f"EstimatorBatchNorm got average={average!r} and wants one of {', '.join(AVERAGES)}."
            )
        if momentum is None and average != "cumulative":
            raise BatchNormError(
                f"EstimatorBatchNorm got momentum=None with average={average!r}, which is an average "
                'by momentum. Pass momentum=0.1, or average="cumulative".'
            )
        if average == "debiased" and momentum is not None and not 0 < momentum <= 1:
            raise BatchNormError(
                f'EstimatorBatchNorm got momentum={momentum} with average="debiased" and wants more than '
                "0 and at most 1: the start is taken out by dividing by 1 − (1 − momentum)^t."
            )
        self.unbiased, self.average = unbiased, average

    def train_on(self, x: Tensor, keep: Tensor | None) -> Tensor:
        """Batch normalization; then the statistics."""
        if not (self.updates and x.numel()):
            return self.normalize(x, None, None, by_batch=True, keep=keep)
        mean, var_unbiased = (torch.zeros_like(running) for running in self.running())
        # momentum 1: what comes back in the buffers is the batch's statistics alone
        y = self.normalize(x, mean, var_unbiased, by_batch=True, momentum=1.0, keep=keep)
        if keep is None:
            values = x[:, :1].numel()
            self.move(mean, var_unbiased * (1 if self.unbiased else (values - 1) / values))
            return y
        count = masks.count(keep).to(mean)  # integers would be divided in float32
        bessel = 1 if self.unbiased else (count - 1).clamp(min=1) / count.clamp(min=1)
        with self.moving_where(count > 1):
            self.move(mean, var_unbiased * bessel)
        return y

    def share(self) -> Tensor | float:
        """share_t of the docstring's table."""
        by_momentum = super().share()
        if self.average == "cumulative":
            return self.seen().reciprocal()
        if self.average == "debiased" and by_momentum != 1:
            # 1 − (1 − momentum)^t, which loses the digits of a small momentum, by expm1 and log1p
            return by_momentum / -(self.seen() * math.log1p(-by_momentum)).expm1()
        return by_momentum
