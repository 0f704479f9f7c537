"""Batch normalization with the channels on another axis, as a module."""

from typing import Any

import torch
from torch import Tensor, nn

from batchnorm.layers import PLAIN, BatchNorm


class BatchNormAlong(nn.Module):
    """y = (x − mean) / √(var + eps) · weight + bias, per channel, with the channels on `axis`.

    For (N, L, C), as attention and recurrent layers have it, in an `nn.Sequential`, where nobody
    passes `axis=` to a call. `norm` is a `BatchNorm` of its own; what replaces it replaces it alone,
    and the axis stays: the module is no `_BatchNorm`, which tools take for one with channels on axis
    1. A state dict of a plain norm fits under the prefix `norm.`.

    Args:
        num_features: C; None: learned at the first batch.
        axis: where the channels stand; -1 is the last.
        options: as in `BatchNorm`.

    Raises:
        BatchNormError: another count of channels; an input without that axis.
    """

    def __init__(self, num_features: int | None = None, axis: int = -1, **options: Any) -> None:
        super().__init__()
        self.axis = axis
        self.norm: nn.Module = BatchNorm(num_features, **options)

    def forward(self, input: Tensor, mask: Tensor | None = None) -> Tensor:
        """input: any rank from 2; mask: as in `batchnorm.batch_norm`, standing as the input does."""
        options = {} if mask is None else {"mask": mask}
        if isinstance(self.norm, PLAIN) or not isinstance(input, Tensor):
            y: Tensor = self.norm(input, axis=self.axis, **options)
            return y
        # somebody put another layer there
        y = self.norm(input.movedim(self.axis, 1), **options)
        return torch.movedim(y, 1, self.axis)

    def extra_repr(self) -> str:
        """The axis."""
        return f"axis={self.axis}"
