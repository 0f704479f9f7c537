"""Ghost batch normalization: the statistics of small groups of samples within a large batch."""

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from batchnorm.errors import BatchNormError
from batchnorm.functional import batch_norm
from batchnorm.variants.variant import Variant


class GhostBatchNorm(Variant):
    """y[g] = (x[g] − mean[g]) / √(var[g] + eps) · weight + bias, for each ghost batch g.

    In training a batch of N samples is cut into G = max(1, ⌊N / ghost_size⌋) ghost batches of
    consecutive samples, each normalized with its own mean and (biased) variance. Where ghost_size does not divide N, the rest is spread over the groups, whose sizes then differ by one
    at most: no sample is dropped, and none is normalized with fewer than ghost_size samples, unless
    the batch itself has fewer (a group of one sample has no variance, and a small last group would
    be noisier than all others). With G = 1 this is batch normalization.

    The running statistics move once a batch, by momentum, as in torch, towards

        mean = Σ_g n_g · mean[g] / Σ_g n_g,    var = Σ_g (n_g − 1) · var_unbiased[g] / Σ_g (n_g − 1)

    for n_g values per channel of group g: the batch's mean, and the pooled variance within the
    groups, both unbiased for samples drawn alike. (Hoffer et al. move them once a group, which lets
    the memory of the average depend on the count of groups.) Evaluation is batch normalization with
    them.

    Use it where a large batch generalizes worse than a small one, or to see on one device the
    statistics that each of several would have. Samples should be shuffled: groups are consecutive.

    Args:
        num_features: C.
        eps: added to the variance, inside the square root.
        momentum: the weight of the new batch, as in torch; None: the average over all batches.
        affine: learn weight and bias.
        track_running_stats: keep running statistics; without, evaluation uses the batch's, whole.
        device: where the parameters and buffers are made.
        dtype: of the parameters and buffers.
        bias: with affine: learn the bias.
        ghost_size: samples in a ghost batch, 1 or more.

    Shapes: (N, C, *spatial), any rank from 2.

    Raises:
        BatchNormError: a ghost_size below 1; a group with one value per channel in training.

    Source: Hoffer, Hubara & Soudry 2017, https://arxiv.org/abs/1705.08741.
    """

    options = ("ghost_size",)

    def __init__(
        self,
        num_features: int,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        affine: bool = True,
        track_running_stats: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        bias: bool = True,
        ghost_size: int = 32,
    ) -> None:
        super().__init__(
            num_features, eps, momentum, affine, track_running_stats, device, dtype, bias=bias
        )
        if ghost_size < 1:
            raise BatchNormError(
                f"GhostBatchNorm got ghost_size={ghost_size} and wants 1 or more samples."
            )
        self.ghost_size = ghost_size

    def train_on(self, x: Tensor, keep: Tensor | None) -> Tensor:
        """Each group by itself; the statistics of all towards the running ones."""
        if keep is not None:
            raise BatchNormError(
                "GhostBatchNorm got a mask in training and takes one in evaluation alone: its groups "
                "would have different counts of values, and some none. Pass no mask, or convert the "
                'layer: batchnorm.convert(model, "ours").'
            )
        groups = max(1, len(x) // self.ghost_size)
        if groups > 1 and math.prod(x.shape[2:], start=len(x) // groups) == 1:
            raise BatchNormError(
                f"GhostBatchNorm got an input of shape {tuple(x.shape)} with ghost_size="
                f"{self.ghost_size}: one value per channel in a ghost batch, which has no variance. "
                "Pass ghost_size=2 or more."
            )
        found = [self._each(part, many) for part, many in _parts(x, groups)]
        if self.updates and x.numel():
            self.move(*_pooled([statistics for _, statistics in found]))
        return found[0][0] if len(found) == 1 else torch.cat([y for y, _ in found])

    def _each(self, x: Tensor, groups: int) -> tuple[Tensor, "Statistics"]:
        """Groups of one size, each folded into channels of its own: one call for all of them."""
        folded, back = _fold(x, groups)
        wide = torch.float64 if x.dtype == torch.float64 else torch.float32
        channels = folded.shape[1]
        mean = torch.zeros(channels, dtype=wide, device=x.device)
        var_unbiased = torch.zeros_like(mean)
        # half-precision layers have half-precision parameters; one call has one dtype for all
        weight, bias = (None if p is None else p.to(wide) for p in (self.weight, self.bias))
        if groups > 1:
            weight, bias = (None if p is None else p.repeat(groups) for p in (weight, bias))
        # momentum 1: what comes back in the buffers is the groups' statistics alone
        y = batch_norm(folded, mean, var_unbiased, weight, bias, True, 1.0, self.eps)
        values = folded[:, :1].numel()
        return back(y), Statistics(mean.view(groups, -1), var_unbiased.view(groups, -1), values)


class Statistics(NamedTuple):
    """Of groups of one size."""

    mean: Tensor  # (groups, C)
    var_unbiased: Tensor  # (groups, C)
    values: int  # per channel in each group


# values in a group, from which copying them into channels costs more than a call for each group
LARGE = {"cpu": 2**14, "cuda": 2**22}


def _parts(x: Tensor, groups: int) -> list[tuple[Tensor, int]]:
    """x cut into parts of one or more groups of one size: the groups that take one of the rest first."""
    samples = len(x) // groups
    rest = len(x) - samples * groups  # divmod would break the graph of a compiled layer
    if samples * x[:1].numel() >= LARGE.get(x.device.type, LARGE["cuda"]):
        sizes = [samples + 1] * rest + [samples] * (groups - rest)
        return [(part, 1) for part in x.split(sizes)]
    larger = rest * (samples + 1)
    return [part for part in ((x[:larger], rest), (x[larger:], groups - rest)) if part[1]]


def _pooled(parts: list[Statistics]) -> tuple[Tensor, Tensor]:
    """The mean of all values, and the unbiased variance within the groups: (C,) each."""
    values = sum(part.values * len(part.mean) for part in parts)
    free = sum((part.values - 1) * len(part.mean) for part in parts)
    means = [part.mean.sum(0) * (part.values / values) for part in parts]
    squares = [part.var_unbiased.sum(0) * ((part.values - 1) / free) for part in parts]
    return torch.stack(means).sum(0), torch.stack(squares).sum(0)


def _fold(x: Tensor, groups: int) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
    """(groups · n, C, *spatial) -> (n, groups · C, *spatial), and the way back.

    Where the channels are the fastest axis (channels_last, rows) they stay so: the first is then
    (n · prod(spatial), groups · C), and what comes back has the memory format of x.
    """
    if groups == 1:
        return x, lambda y: y
    last = x.dim() > 2 and x.stride(1) == 1
    if last:
        x = x.movedim(1, -1)  # (groups · n, *spatial, C)
    place = -2 if last else 1  # of the groups, before the channels
    apart = x.unflatten(0, (groups, -1)).movedim(0, place)
    folded = apart.flatten(place, place + 1)
    shape = apart.shape

    def back(y: Tensor) -> Tensor:
        whole = y.reshape(shape).movedim(place, 0).flatten(0, 1)
        return whole.movedim(-1, 1) if last else whole

    return (folded.flatten(0, -2) if last else folded), back
