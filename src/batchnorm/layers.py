"""The layers: parameters, running statistics, and the rule of training and evaluation.

`BatchNorm1d/2d/3d` are torch.nn's classes of the same names with another forward pass, so that
every tool that looks for batch normalization finds them, and a state dict of the one loads into
the other. `BatchNorm` takes any rank and can learn its size.
"""

import copy
from typing import Any, NoReturn

import torch
from torch import Tensor, fx, nn
from torch.nn.modules.batchnorm import _BatchNorm, _LazyNormBase
from torch.nn.modules.module import _has_any_global_hook as has_any_global_hook
from torch.nn.parameter import UninitializedBuffer

from batchnorm import masks
from batchnorm.errors import BatchNormError, no_tensor
from batchnorm.functional import batch_norm, check_pool
from batchnorm.kernels.activations import ACTIVATIONS
from batchnorm.kernels.pools import POOLS

STATE = ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")


class Forward(_BatchNorm):
    """torch.nn's parameters, buffers and state dict; our forward pass."""

    _ranks: tuple[int, ...] = ()  # of the inputs that the layer takes; empty: any from 2

    def forward(self, input: Tensor, mask: Tensor | None = None, axis: int = 1) -> Tensor:
        """Normalize input: (N, C, *spatial); update the running statistics in training mode.

        mask: True where a value counts; axis: where the channels stand. See `batchnorm.batch_norm`.
        """
        if isinstance(input, fx.Proxy):
            leaf: Tensor = as_leaf(self, input, mask, axis)
            return leaf
        return self.normalize(input, None, None, mask, axis)

    def normalize(
        self,
        input: Tensor,
        residual: Tensor | None = None,
        activation: str | None = None,
        mask: Tensor | None = None,
        axis: int = 1,
        pool: str | None = None,
    ) -> Tensor:
        """The forward pass, and in the same sweep what follows it: pool(activation(y + residual))."""
        self._check_input_dim(input)
        # past Module.__getattr__, which costs more than all the checks (and would as the default of
        # a `get`); not where something else than a buffer bears the name
        buffers = self._buffers
        running_mean = buffers["running_mean"] if "running_mean" in buffers else self.running_mean  # noqa: SIM401
        running_var = buffers["running_var"] if "running_var" in buffers else self.running_var  # noqa: SIM401
        if not self.training:
            # without running statistics evaluation, too, takes the batch's
            by_batch = running_mean is None and running_var is None
            return self._normalize(
                input, running_mean, running_var, by_batch, residual, activation, mask, axis, pool
            )
        if not self.track_running_stats:
            return self._normalize(input, None, None, True, residual, activation, mask, axis, pool)
        counter = self.num_batches_tracked
        if self.momentum is None and counter is not None:
            return self._normalize_and_average(input, residual, activation, mask, axis, pool)
        y = self._normalize(
            input, running_mean, running_var, True, residual, activation, mask, axis, pool
        )
        if counter is not None:
            counter.add_(1 if mask is None else masks.leaves_two(mask, input, axis))
        return y

    def _normalize(
        self,
        x: Tensor,
        running_mean: Tensor | None,
        running_var: Tensor | None,
        by_batch: bool,
        residual: Tensor | None,
        activation: str | None,
        mask: Tensor | None,
        axis: int,
        pool: str | None,
    ) -> Tensor:
        parameters = self._parameters
        return batch_norm(
            x,
            running_mean,
            running_var,
            parameters["weight"] if "weight" in parameters else self.weight,  # noqa: SIM401
            parameters["bias"] if "bias" in parameters else self.bias,  # noqa: SIM401
            by_batch,
            # a layer that has neither momentum nor a counter leaves its statistics alone, as torch's
            0.0 if self.momentum is None else self.momentum,
            self.eps,
            mask=mask,
            residual=residual,
            activation=activation,
            pool=pool,
            axis=axis,
        )

    def _normalize_and_average(
        self,
        x: Tensor,
        residual: Tensor | None,
        activation: str | None,
        mask: Tensor | None,
        axis: int,
        pool: str | None,
    ) -> Tensor:
        """running ← running + (batch − running) / t: after t batches their plain average.

        The counter stays a tensor: reading it as a number would wait for the device and break the
        graph of `torch.compile`.
        """
        assert self.running_mean is not None  # noqa: S101  # for the type checker
        assert self.running_var is not None  # noqa: S101
        assert self.num_batches_tracked is not None  # noqa: S101
        # momentum 1: what comes back in the buffers is the batch's statistics alone, and where a
        # channel has none of its own, the running ones
        mean, var_unbiased = self.running_mean.clone(), self.running_var.clone()
        y = batch_norm(
            x, mean, var_unbiased, self.weight, self.bias, True, 1.0, self.eps,
            mask=mask, residual=residual, activation=activation, pool=pool, axis=axis,
        )  # fmt: skip
        # a batch that moves nothing has no part in the average
        self.num_batches_tracked.add_(masks.moves(*masks.counted(x, mask, axis)))
        # a count as int64 would be inverted in float32, and counts end at 256 in bfloat16
        wide = torch.float64 if mean.dtype == torch.float64 else torch.float32
        count = self.num_batches_tracked.to(wide)
        share = count.clamp(min=1).reciprocal().to(mean.dtype)
        self.running_mean.lerp_(mean, share)
        self.running_var.lerp_(var_unbiased, share)
        return y

    def _check_input_dim(self, input: Tensor) -> None:
        try:  # costs nothing: this runs on every call
            rank = input.dim()
        except AttributeError:
            raise no_tensor(type(self).__name__, input) from None
        if rank in self._ranks or (not self._ranks and rank >= 2):
            return
        wanted = "D or ".join(map(str, self._ranks)) + "D" if self._ranks else "2D or more"
        name = "BatchNorm" if isinstance(self, _LazyNormBase) else type(self).__name__
        raise BatchNormError(
            f"{name} expected {wanted} input (got {rank}D input of shape "
            f"{tuple(input.shape)}). Use the layer of that rank, or batchnorm.BatchNorm for any."
        )

    def __prepare_scriptable__(self) -> NoReturn:
        raise BatchNormError(
            f"{type(self).__name__} cannot be compiled by TorchScript, which torch has deprecated. "
            "Use torch.export or torch.compile, or script the model with torch.nn's layer: it "
            "loads the same state dict."
        )


def as_leaf(layer: nn.Module, input: fx.Proxy, mask: Any = None, axis: int = 1) -> Any:
    """Stay one node under symbolic tracing, as torch.nn's layers do."""
    tracer = input.tracer
    assert isinstance(tracer, fx.Tracer)  # noqa: S101  # others hand out no Proxy to a module
    options = ({} if mask is None else {"mask": mask}) | ({} if axis == 1 else {"axis": axis})
    return tracer.create_proxy("call_module", tracer.path_of_module(layer), (input,), options)


class BatchNorm1d(Forward, nn.BatchNorm1d):
    """y = (x − mean) / √(var + eps) · weight + bias, per feature of (N, C) or channel of (N, C, L).

    A `torch.nn.BatchNorm1d`: the same arguments, defaults, state dict and numbers.

    In training mode mean and var (biased) are the batch's, and the running statistics move towards
    them, running ← (1 − momentum) · running + momentum · batch, with the unbiased variance. In
    evaluation mode they are the running ones.

    Args:
        num_features: C.
        eps: added to the variance, inside the square root.
        momentum: the weight of the new batch, as in torch; None: the average over all batches.
        affine: learn weight and bias.
        track_running_stats: keep running statistics; without, evaluation uses the batch's, too.
        device: where the parameters and buffers are made.
        dtype: of the parameters and buffers.
        bias: with affine: learn the bias.

    Raises:
        BatchNormError: another rank or count of channels; one value per channel in training.
    """

    _ranks = (2, 3)


class BatchNorm2d(Forward, nn.BatchNorm2d):
    """y = (x − mean) / √(var + eps) · weight + bias, per channel of (N, C, H, W).

    A `torch.nn.BatchNorm2d`; each pixel counts as a sample. See `BatchNorm1d` for the rest.
    """

    _ranks = (4,)


class BatchNorm3d(Forward, nn.BatchNorm3d):
    """y = (x − mean) / √(var + eps) · weight + bias, per channel of (N, C, D, H, W).

    A `torch.nn.BatchNorm3d`; each voxel counts as a sample. See `BatchNorm1d` for the rest.
    """

    _ranks = (5,)


class BatchNorm(Forward):
    """y = (x − mean) / √(var + eps) · weight + bias, per channel of (N, C, *spatial), any rank.

    `BatchNorm(64)` has its size; `BatchNorm()` learns it at the first batch. Until then its
    parameters are torch's uninitialized ones: an optimizer may hold them, a state dict with sizes
    may be loaded, and whoever asks for their shape is told to run a batch first.

    See `BatchNorm1d` for the other arguments.
    """

    def __init__(
        self,
        num_features: int | None = None,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        affine: bool = True,
        track_running_stats: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        bias: bool = True,
    ) -> None:
        options = (eps, momentum, affine, track_running_stats, device, dtype)
        if num_features is None:
            # the class changes instead of being chosen in __new__, which copy and pickle call
            # without arguments
            self.__class__ = _without_size(type(self))
            _BatchNormWithoutSize.__init__(self, *options, bias=bias)  # type: ignore[arg-type]  # of the new class
        else:
            super().__init__(num_features, *options, bias=bias)


PLAIN = (
    BatchNorm1d,
    BatchNorm2d,
    BatchNorm3d,
    BatchNorm,
)  # and no subclass, whose forward is its own


def fused(
    norm: Any,
    x: Tensor,
    residual: Tensor | None,
    activation: str | None,
    pool: str | None = None,
) -> Tensor:
    """pool(activation(norm(x) + residual)), in one sweep where the norm is this library's layer."""
    if type(norm) in PLAIN and not hooked(norm) and not isinstance(x, fx.Proxy):
        whole: Tensor = norm.normalize(x, residual, activation, pool=pool)
        return whole
    return following(norm(x), residual, activation, pool)


def following(
    y: Tensor, residual: Tensor | None, activation: str | None, pool: str | None
) -> Tensor:
    """pool(activation(y + residual)), by torch's operators."""
    if residual is not None:
        y = y + residual
    if activation is not None:
        y = ACTIVATIONS[activation](y)
    return y if pool is None else POOLS[pool](y)


def hooked(module: nn.Module) -> bool:
    """Somebody watches its calls."""
    return bool(
        module._forward_hooks  # noqa: SLF001  # torch has no public way
        or module._forward_pre_hooks  # noqa: SLF001
        or module._backward_hooks  # noqa: SLF001
        or module._backward_pre_hooks  # noqa: SLF001
    )


class BatchNormAct(nn.Module):
    """pool(activation(norm(x) + residual)), in one sweep over the memory.

    `norm` is this library's layer of the same arguments, a module of its own: what replaces it (a
    synchronised layer, one folded away) or watches it replaces and watches the norm alone, and sum,
    activation and pooling go on behind it. A state dict of a plain norm loads, too.
    """

    _norm: type[Forward]
    pool: str | None = None  # of a layer that was pickled before there was one

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
        activation: str | None = "relu",
        pool: str | None = None,
        bias: bool = True,
    ) -> None:
        super().__init__()
        if activation is not None and activation not in ACTIVATIONS:
            raise BatchNormError(
                f"{type(self).__name__} got activation={activation!r} and wants one of "
                f"{', '.join(ACTIVATIONS)}, or None."
            )
        if pool is not None and (pool not in POOLS or self._norm is not BatchNorm2d):
            raise BatchNormError(
                f"{type(self).__name__} got pool={pool!r} and wants None, or, in BatchNormAct2d, one of "
                f"{', '.join(POOLS)}. Put another pooling behind the layer."
            )
        self.activation, self.pool = activation, pool
        self.norm = self._norm(
            num_features, eps, momentum, affine, track_running_stats, device, dtype, bias=bias
        )
        self.register_load_state_dict_pre_hook(_of_a_plain_norm)  # type: ignore[no-untyped-call]

    def forward(
        self,
        input: Tensor,
        residual: Tensor | None = None,
        mask: Tensor | None = None,
        axis: int = 1,
    ) -> Tensor:
        """input: (N, C, *spatial); the residual of that shape, or one that becomes it.

        mask: True where a value counts; axis: where the channels stand. See `batchnorm.batch_norm`.
        """
        if mask is not None or axis != 1:
            return self._forward(input, residual, mask, axis)
        if has_any_global_hook():  # which waits for a call of the norm
            return following(self.norm(input), residual, self.activation, self.pool)
        return fused(self.norm, input, residual, self.activation, self.pool)

    def _forward(
        self, input: Tensor, residual: Tensor | None, mask: Tensor | None, axis: int
    ) -> Tensor:
        if self.pool is not None:
            check_pool(self.pool, input, axis)
        y = self.norm(input, mask=mask, axis=axis)
        y = following(y, residual, self.activation, None)
        y = y if mask is None else torch.where(masks.fit(mask, input, axis % input.dim()), y, 0)
        return following(y, None, None, self.pool)

    def extra_repr(self) -> str:
        """The activation, and the pooling if there is one."""
        pool = "" if self.pool is None else f", pool={self.pool!r}"
        return f"activation={self.activation!r}{pool}"


def _of_a_plain_norm(module: nn.Module, state_dict: dict[str, Any], prefix: str, *_: Any) -> None:
    """weight -> norm.weight, and so on."""
    assert isinstance(module, BatchNormAct)  # noqa: S101  # it is registered there
    for name in STATE:
        if prefix + name in state_dict:
            state_dict[f"{prefix}norm.{name}"] = state_dict.pop(prefix + name)


class BatchNormAct1d(BatchNormAct):
    """y = activation((x − mean) / √(var + eps) · weight + bias + residual) of (N, C) or (N, C, L).

    Mean, var and the running statistics are `BatchNorm1d`'s. For the backward pass are kept: x, and
    for sigmoid and tanh y, for ReLU and LeakyReLU behind a residual y, for the others behind one the
    residual; what torch keeps between the norm and the activation is never there.

    Args:
        num_features: C; this and the following as in `BatchNorm1d`.
        eps: added to the variance.
        momentum: the weight of the new batch; None: the average over all batches.
        affine: learn weight and bias.
        track_running_stats: keep running statistics.
        device: where the parameters and buffers are made.
        dtype: of the parameters and buffers.
        activation: relu, leaky_relu, sigmoid, tanh, silu, gelu, hardswish, with torch's default
            arguments, or None.
        bias: with affine: learn the bias.

    Raises:
        BatchNormError: another activation, rank or count of channels; a residual of another shape.
    """

    _norm = BatchNorm1d


class BatchNormAct2d(BatchNormAct):
    """y = pool(activation(BatchNorm2d(x) + residual)), of (N, C, H, W); see `BatchNormAct1d`.

    pool: avg or max, over windows of 2×2 with stride 2, as `nn.AvgPool2d(2)` and `nn.MaxPool2d(2)`; y
    is then (N, C, H // 2, W // 2). Contiguous float32 without a residual is pooled in the same sweep:
    what is pooled is never in memory, and for the backward pass are kept x and, for max, a byte for
    each window. Anything else is pooled by torch.
    """

    _norm = BatchNorm2d


class BatchNormAct3d(BatchNormAct):
    """y = activation(BatchNorm3d(x) + residual), of (N, C, D, H, W); see `BatchNormAct1d`."""

    _norm = BatchNorm3d


class _BatchNormWithoutSize(_LazyNormBase, BatchNorm):
    """What `BatchNorm()` is until its first batch."""

    cls_to_become = BatchNorm

    def initialize_parameters(
        self, input: Tensor, mask: Tensor | None = None, axis: int = 1
    ) -> None:
        del mask
        self._check_input_dim(input)
        masks.check_axis("BatchNorm", input, axis)
        super().initialize_parameters(input.movedim(axis, 1))
        # torch sets it only where something was uninitialized: not after a state dict was loaded
        self.num_features = input.shape[axis] if self.weight is None else self.weight.numel()

    def __deepcopy__(self, memo: dict[int, Any]) -> "_BatchNormWithoutSize":
        # torch copies a parameter without a size, but raises for a buffer without one
        for buffer in self.buffers():
            if isinstance(buffer, UninitializedBuffer):
                memo[id(buffer)] = UninitializedBuffer(  # type: ignore[call-arg]  # torch's own
                    device=buffer.device,
                    dtype=buffer.dtype,
                )
        twin = type(self).__new__(type(self))
        memo[id(self)] = twin
        twin.__setstate__(copy.deepcopy(self.__dict__, memo))  # type: ignore[no-untyped-call]
        return twin

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        return _rebuild_without_size, (self.cls_to_become,), self.__dict__

    def _get_name(self) -> str:
        return self.cls_to_become.__name__

    def extra_repr(self) -> str:
        return (
            f"size learned at the first batch, eps={self.eps}, momentum={self.momentum}, "
            f"affine={self.affine}, track_running_stats={self.track_running_stats}"
        )


_WITHOUT_SIZE: dict[type, type[_BatchNormWithoutSize]] = {BatchNorm: _BatchNormWithoutSize}


def _without_size(cls: type[BatchNorm]) -> type[_BatchNormWithoutSize]:
    """The class that becomes `cls` at its first batch, `BatchNorm` or a subclass of it."""
    if cls not in _WITHOUT_SIZE:
        content = {"cls_to_become": cls, "__module__": cls.__module__}
        _WITHOUT_SIZE[cls] = type(cls.__name__, (_BatchNormWithoutSize, cls), content)
    return _WITHOUT_SIZE[cls]


def _rebuild_without_size(cls: type[BatchNorm]) -> nn.Module:
    return nn.Module.__new__(_without_size(cls))
