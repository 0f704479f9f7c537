"""Batch normalization with constants: what detectors keep of a pre-trained backbone's."""

from typing import Any

import torch
from torch import Tensor, fx, nn

from batchnorm.functional import batch_norm
from batchnorm.layers import as_leaf
from batchnorm.variants.variant import check_rank


class FrozenBatchNorm(nn.Module):
    """y = (x − running mean) / √(running var + eps) · weight + bias, all of them constants.

    Nothing in it trains: weight and bias are buffers, and training mode computes what evaluation
    does. It has the state dict of torchvision's and detectron2's FrozenBatchNorm2d and reads theirs:

        torchvision's, torch.nn's                as they are; the counter is left out
        detectron2's                             version 3: as they are; of version 2, whose variance
                                                 was used without eps: running var ← running var − eps
        Caffe2's, weight and bias alone          y = x · weight + bias: running mean 0, running var
                                                 1 − eps, which is also where a new layer starts

    A checkpoint of maskrcnn-benchmark or of torchvision before 0.7 was made with eps=0: pass that.
    `convert(model)` makes trainable layers of it, frozen by `freeze`; to freeze your own layers and
    thaw them later, `freeze` is enough.

    Args:
        num_features: C.
        eps: added to the variance, inside the square root.
        device: where the buffers are made.
        dtype: of the buffers.

    Shapes: (N, C, *spatial), any rank from 2.
    """

    _version = 3  # detectron2's
    weight: Tensor
    bias: Tensor
    running_mean: Tensor
    running_var: Tensor

    def __init__(
        self,
        num_features: int,
        eps: float = 1e-5,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.num_features, self.eps = num_features, eps
        ones = torch.ones(num_features, device=device, dtype=dtype)
        self.register_buffer("weight", ones)
        self.register_buffer("bias", torch.zeros_like(ones))
        self.register_buffer("running_mean", torch.zeros_like(ones))
        self.register_buffer("running_var", ones - eps)

    def forward(self, input: Tensor, mask: Tensor | None = None, axis: int = 1) -> Tensor:
        """Normalize input: (N, C, *spatial).

        mask: True where a value counts; axis: where the channels stand. See `batchnorm.batch_norm`.
        """
        if isinstance(input, fx.Proxy):
            leaf: Tensor = as_leaf(self, input, mask, axis)
            return leaf
        check_rank(self, input, ())
        state = (self.running_mean, self.running_var, self.weight, self.bias)
        return batch_norm(input, *state, eps=self.eps, mask=mask, axis=axis)

    def _load_from_state_dict(
        self,
        state_dict: dict[str, Any],
        prefix: str,
        local_metadata: dict[str, Any],
        *arguments: Any,
    ) -> None:
        version = local_metadata.get("version")
        counted = state_dict.pop(prefix + "num_batches_tracked", None) is not None
        mean, var = prefix + "running_mean", prefix + "running_var"
        if version is None or version < 2:
            state_dict.setdefault(mean, torch.zeros_like(self.running_mean))
            state_dict.setdefault(var, torch.ones_like(self.running_var) - self.eps)
        elif version == 2 and not counted and var in state_dict:
            # torch.nn's layers are of version 2, too, but have a counter: detectron2 took eps off
            # their variance as well
            state_dict[var] = state_dict[var] - self.eps
        super()._load_from_state_dict(state_dict, prefix, local_metadata, *arguments)

    def extra_repr(self) -> str:
        """The size and eps."""
        return f"{self.num_features}, eps={self.eps}"
