"""The batch-norm layer of the student's note, written anew with all its defects.

It is an arm of the experiments, to show what each defect costs; use `batchnorm.BatchNorm` instead.
"""

import torch
from torch import Tensor, nn


class NoteBatchNorm(nn.Module):
    """y = (x − mean) / √(var + eps) · weight + bias, as the note has it.

    What is wrong with it, on purpose:
    - weight and bias are scalars, shared by all channels;
    - the running variance starts at 0: before any training evaluation multiplies by 1 / √eps;
    - grad mode is the switch, not `train()` and `eval()`: with gradients on, `eval()` normalizes
      with the batch and changes the running statistics;
    - the running statistics are plain attributes: `state_dict()` loses them;
    - the running variance is the biased one, and momentum weighs the old value (0.9).
    """

    def __init__(self) -> None:
        super().__init__()
        self.eps = 1e-5
        self.momentum = 0.9  # weighs the old value, unlike torch's
        self.weight = nn.Parameter(torch.ones(1))
        self.bias = nn.Parameter(torch.zeros(1))
        self.running_mean = torch.zeros(1)
        self.running_var = torch.zeros(1)

    def forward(self, x: Tensor) -> Tensor:
        """x: (N, C) or (N, C, H, W)."""
        if torch.is_grad_enabled():
            axes = [axis for axis in range(x.dim()) if axis != 1]
            var, mean = torch.var_mean(x, axes, correction=0)
            self._update(mean.detach(), var.detach())
        else:
            mean, var = self.running_mean.to(x.device), self.running_var.to(x.device)
        per_channel = (1, -1, *[1] * (x.dim() - 2))
        y = (x - mean.view(per_channel)) / torch.sqrt(var.view(per_channel) + self.eps)
        return y * self.weight + self.bias

    def _update(self, mean: Tensor, var_biased: Tensor) -> None:
        old = self.momentum
        self.running_mean = old * self.running_mean.to(mean.device) + (1 - old) * mean
        self.running_var = old * self.running_var.to(mean.device) + (1 - old) * var_biased
