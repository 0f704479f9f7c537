"""The operator: the one place that computes batch normalization, whatever computes it.

`functional` is its only caller and has checked the arguments. The operator normalizes and, in
training, updates the running statistics where it has the batch's variance in hand: handing back
`invstd` for somebody else to do so would cost the small variances, since 1 / invstd² − eps has no
digit left once var ≪ eps.
"""

from torch import Tensor
from torch.nn import functional as F


def backend() -> str:
    """The name of what computes batch normalization in this process: `torch`, its own operator."""
    return "torch"


def batch_norm(
    x: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    training: bool,
    momentum: float,
    eps: float,
) -> Tensor:
    """Normalize x: (N, C, *spatial); see `batchnorm.batch_norm` for the equations."""
    return F.batch_norm(x, running_mean, running_var, weight, bias, training, momentum, eps)
