"""Batch normalization of the batch that all processes hold together."""

import copy
import zlib
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, distributed
from torch._compile import _disable_dynamo
from torch.autograd.function import once_differentiable
from torch.nn.modules.batchnorm import _BatchNorm

from batchnorm import masks
from batchnorm.errors import BatchNormError, brief
from batchnorm.functional import check_channels
from batchnorm.kernels import verbs
from batchnorm.layers import BatchNorm, Forward, following

Exchange = Callable[[str, Tensor], Tensor]
_NAMES: dict[int, str] = {}  # of the layers that were called here, by what is sent of them
_PASSES = ("forward", "backward")
_made = 0


class SyncBatchNorm(Forward):
    """y = (x − mean) / √(var + eps) · weight + bias, mean and var of the values of all processes.

    In training each process sends count, mean and Σ (x − mean)² of what it holds, once forward, and
    Σ dy and Σ dy · (x − mean), once backward; merged in the order of the ranks (Chan, Golub & LeVeque
    1979), they give every process the same bits. Outputs, input gradients and running statistics are
    those of one process with the joined batch; the gradients of weight and bias are the process's
    share, which DDP averages. Batches may differ in size and may be empty; a mask (see
    `batchnorm.batch_norm`) may leave a process nothing. It runs wherever torch.distributed does: gloo
    on CPUs, nccl on GPUs. In evaluation, without a process group and in a group of one it is
    `BatchNorm`.

    Every process must call the same layers in the same order, forward and backward. With what it sends
    each layer says who it is, which call and which pass this is; where the processes differ, and where
    one does not come before the group's timeout (`init_process_group(timeout=)`), the error names the
    layer. On GPUs the comparison does not wait for the device: it fails there as an assertion that
    names the layer.

    Args:
        num_features: C; this and the following as in `BatchNorm1d`.
        eps: added to the variance.
        momentum: the weight of the new batch; None: the average over all batches.
        affine: learn weight and bias.
        track_running_stats: keep running statistics.
        process_group: the processes whose batch is one; None: all.
        device: where the parameters and buffers are made.
        dtype: of the parameters and buffers.
        bias: with affine: learn the bias.

    Raises:
        BatchNormError: another count of channels; processes that do not call the same layers.

    Source: equations as in `batchnorm.batch_norm`, over the joined batch; no second derivatives.
    """

    def __init__(
        self,
        num_features: int,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        affine: bool = True,
        track_running_stats: bool = True,
        process_group: Any = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        bias: bool = True,
    ) -> None:
        super().__init__(
            num_features, eps, momentum, affine, track_running_stats, device, dtype, bias=bias
        )
        global _made  # noqa: PLW0603  # the same number in processes that build the same model
        _made += 1
        self._become_synchronised(f"SyncBatchNorm number {_made}", process_group, BatchNorm)

    def _become_synchronised(self, label: str, group: Any, before: type[_BatchNorm]) -> None:
        self.process_group = group
        self.label = label  # its name in the model, where convert has put it there
        self._before = before
        self._calls = 0
        self.count: Tensor | None = None

    def normalize(
        self,
        input: Tensor,
        residual: Tensor | None = None,
        activation: str | None = None,
        mask: Tensor | None = None,
        axis: int = 1,
        pool: str | None = None,
    ) -> Tensor:
        """The forward pass; see `Forward`."""
        if not (self.training and several(self.process_group)):
            return super().normalize(input, residual, activation, mask, axis, pool)
        self._check_input_dim(input)
        masks.check_axis(type(self).__name__, input, axis)
        check_channels(
            input, self.running_mean, self.running_var, self.weight, self.bias, axis % input.dim()
        )
        x, keep = masks.counted(input, mask, axis)
        y, count, mean, squares = _apart(
            x, self.weight, self.bias, keep, self.eps, partial(self._exchange, self._calls)
        )
        self._calls += 1
        if keep is None and x.numel() <= x.shape[1]:  # no process waits that has values enough
            _refuse_one_value(self.label, input, count)
        self.count = count  # of the values that the statistics are of
        if self.track_running_stats:
            self._update(count, mean, squares)
        return following(y.movedim(1, axis), residual, activation, pool)

    def _update(self, count: Tensor, mean: Tensor, squares: Tensor) -> None:
        momentum: float | Tensor = 0.0 if self.momentum is None else self.momentum
        if self.num_batches_tracked is not None:
            self.num_batches_tracked.add_((count > 1).any())  # no batch that moves nothing
            if self.momentum is None:
                momentum = self.num_batches_tracked.double().clamp(min=1).reciprocal()
        masks.update_running(self.running_mean, self.running_var, count, mean, squares, momentum)

    def _exchange(self, call: int, direction: str, mine: Tensor) -> Tensor:
        """(k, C) of this process -> (processes, k, C), in the order of the ranks."""
        code = zlib.crc32(self.label.encode())
        _NAMES[code] = self.label
        header = mine.new_tensor([code, call, _PASSES.index(direction)])
        message = torch.cat([header, mine.flatten()])
        everyone = message.new_empty((distributed.get_world_size(self.process_group), len(message)))
        doing = f"the {direction} pass of its call {call + 1}"
        try:
            distributed.all_gather(list(everyone), message, group=self.process_group)
        except RuntimeError as error:
            raise BatchNormError(
                f"SyncBatchNorm {self.label!r}, in {doing}, did not hear from all other processes "
                f"({brief(error)}). Each must call the same layers equally often: look for a loader "
                "with fewer batches on one rank, a branch that depends on the data, a process that "
                "died."
            ) from error
        headers = everyone[:, : len(header)]
        self._compare(headers, header, doing)
        return everyone[:, len(header) :].reshape(-1, *mine.shape)

    def _compare(self, headers: Tensor, mine: Tensor, doing: str) -> None:
        start = f"SyncBatchNorm {self.label!r} is in {doing}"
        if headers.is_cuda:  # nobody waits for the device
            torch._assert_async((headers == mine).all(), f"{start}, another process elsewhere")  # noqa: SLF001  # torch has no public way
            return
        for rank, (code, call, direction) in enumerate(headers.tolist()):
            if [code, call, direction] != mine.tolist():
                name = _NAMES.get(int(code), "a layer that was not called here yet")
                raise BatchNormError(
                    f"{start}, and the group's rank {rank} in the {_PASSES[int(direction)]} pass of "
                    f"call {int(call) + 1} of {name!r}. Every process must call the same layers in "
                    "the same order, forward and backward: look for a branch that depends on the "
                    "data, or a step that one of them leaves out."
                )

    def __getstate__(self) -> dict[str, Any]:
        # a group is a handle of this process
        return {**self.__dict__, "process_group": None}

    def __deepcopy__(self, memo: dict[int, Any]) -> "SyncBatchNorm":
        memo[id(self.process_group)] = self.process_group
        twin = type(self).__new__(type(self))
        memo[id(self)] = twin
        twin.__dict__.update(copy.deepcopy(self.__dict__, memo))
        return twin


def synchronised(layer: _BatchNorm, label: str, group: Any) -> SyncBatchNorm:
    """The same object as a synchronised layer."""
    before, layer.__class__ = type(layer), SyncBatchNorm
    assert isinstance(layer, SyncBatchNorm)  # noqa: S101  # for the type checker
    layer._become_synchronised(label, group, before)  # noqa: SLF001  # our own
    return layer


def plain(layer: SyncBatchNorm) -> _BatchNorm:
    """The same object in the class that it had before it was synchronised."""
    before = layer._before  # noqa: SLF001  # our own
    for name in ("process_group", "label", "count", "_before", "_calls"):
        delattr(layer, name)
    layer.__class__ = before  # type: ignore[assignment]  # it was one
    return layer


class OneValue(BatchNormError):  # noqa: N818  # what was found
    """All processes together have one value per channel; each of them finds so."""


def _refuse_one_value(label: str, x: Tensor, count: Tensor) -> None:
    if count.numel() and int(count[0]) == 1:
        raise OneValue(
            "Expected more than 1 value per channel when training, got one in all processes "
            f"together, here an input of shape {tuple(x.shape)}, in SyncBatchNorm {label!r}. One "
            "value has no variance: use a larger batch (drop_last=True if this is the last one), or "
            "the running statistics, batchnorm.single_values(model)."
        )


def several(group: Any) -> bool:
    """Whether torch.distributed runs with more than one process in the group."""
    return (
        distributed.is_available()
        and distributed.is_initialized()
        and distributed.get_world_size(group) > 1
    )


def merge(parts: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(processes, 3, C), count, mean and Σ (x − mean)² of each -> the same of all together.

    From the means' own differences: Σ x² − M · mean² would lose the digits of a variance that is
    small beside the mean.
    """
    count, mean, squares = parts.unbind(1)
    total = count.sum(0)
    # as deviations from one of the means, so that a large one costs no digits
    origin = mean.gather(0, count.argmax(0, keepdim=True))
    merged = origin[0] + ((mean - origin) * count).sum(0) / total.clamp(min=1)
    between = (mean - merged).square() * count
    return total, merged, squares.sum(0) + between.sum(0)


class _Synchronised(torch.autograd.Function):
    """The four verbs, and what is exchanged between them."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        keep: Tensor | None,
        eps: float,
        exchange: Exchange,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        mine = torch.stack([each.double() for each in verbs.moments(x, keep)])
        count, mean, squares = merge(exchange("forward", mine))
        invstd = (squares / count.clamp(min=1) + eps).rsqrt()
        y = verbs.normalize(x, mean, invstd, weight, bias, keep)
        ctx.save_for_backward(x, weight, keep, count, mean, invstd)
        ctx.exchange = exchange
        ctx.mark_non_differentiable(count, mean, squares)
        return y, count, mean, squares

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor, *_: Any) -> Any:
        x, weight, keep, count, mean, invstd = ctx.saved_tensors
        needs_x, needs_weight, needs_bias, *_ = ctx.needs_input_grad
        total, dot = verbs.reduce_gradient(dy, x, mean, keep)
        dweight = (dot * invstd).to(weight.dtype) if needs_weight else None
        dbias = total if needs_bias else None
        dx = None
        if needs_x:
            # as long as what the forward pass sends, so that one can tell that it has met the other
            mine = torch.stack([total.double(), dot.double(), torch.zeros_like(count)])
            sums = ctx.exchange("backward", mine).sum(0) / count.clamp(min=1)
            dx = verbs.input_gradient(dy, x, mean, invstd, weight, sums[0], sums[1], keep)
        return dx, dweight, dbias, None, None, None


@_disable_dynamo  # imports it at the first call, not here
def _apart(*arguments: Any) -> Any:
    """Out of a compiled graph: a collective with an error of its own is no part of one."""
    return _Synchronised.apply(*arguments)
