"""The native kernels on CPU tensors: which they take, in which layout, and the gradient.

For backward are saved: x, the statistics, and what the activation's derivative is a function of: y
for sigmoid and tanh, and for ReLU behind a residual; the residual for the others behind one; nothing
more for a plain ReLU, whose sign is computed again. What torch saves between normalization and
activation is not there at all. In front of a pooling y is not there either: beside x and the statistics
is saved which of a window's four values was the maximum, a byte a window.
"""

import logging
import os
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.nn import functional as F

from batchnorm.errors import BatchNormError
from batchnorm.kernels import memory
from batchnorm.kernels.activations import ACTIVATIONS, DERIVATIVES
from batchnorm.kernels.pools import POOLS, WINDOW

try:
    from batchnorm.kernels import _cpu
except ImportError:  # installed without a compiler
    _cpu = None  # type: ignore[assignment]

log = logging.getLogger("batchnorm")

DTYPES = {torch.float32: 0, torch.float64: 1, torch.bfloat16: 2, torch.float16: 3}
CODES = {
    name: code
    for code, name in enumerate(
        (None, "relu", "leaky_relu", "sigmoid", "tanh", "silu", "gelu", "hardswish")
    )
}
POOL_CODES = {"avg": 1, "max": 2}
NO_POOL = (0, 0, 0)
TINY = 8192  # values, up to which torch's node makes up for its slower operator
NEAR = 2.0  # standard deviations between a mean and 0, which cost torch's operator two bits
PLAIN = {Tensor, torch.nn.Parameter, torch.nn.Buffer}
SAVES_Y = {("relu", True), ("leaky_relu", True)} | {
    (name, behind) for name in ("sigmoid", "tanh") for behind in (True, False)
}
SAVES_RESIDUAL = {(name, True) for name in ("silu", "gelu", "hardswish")}
KEEPS_GRADIENT = {"silu", "gelu"}


def _backend() -> str:
    if os.environ.get("BATCHNORM_BACKEND") == "torch":
        return "torch"
    if _cpu is None:
        log.info("batchnorm was installed without its native kernels: torch's operator runs")
        return "torch"
    try:
        return f"native, {_cpu.isa()}"
    except RuntimeError as error:
        raise BatchNormError(f"{error}.") from error


BACKEND = _backend()
NATIVE = BACKEND != "torch"


def fits(
    x: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
) -> bool:
    """Whether these are plain CPU tensors, and nobody looks at what is done with them."""
    if not _plain(x) or x.numel() == 0:
        return False
    if residual is not None and not (
        _plain(residual) and residual.shape == x.shape and residual.dtype is x.dtype
    ):
        return False
    return _pair(weight, bias) and _pair(running_mean, running_var) and not transformed()


def sooner_by_torch(
    x: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
) -> bool:
    """Whether torch's operator, whose node in the graph is C++, is faster here and as accurate.

    A node in Python costs more than the kernels gain on so few values. torch sums contiguous planes
    in double, but multiplies x before it subtracts: digits stay where no mean is far from 0.
    """
    if not NATIVE or transformed() or not torch.is_grad_enabled() or not 0 < x.numel() <= TINY:
        return False
    if x.dtype is not torch.float32 or not _plain(x) or not x.is_contiguous():
        return False
    # what torch refuses and the kernels take, they take at every size
    if (running_mean is None) is not (running_var is None):
        return False
    for each in (running_mean, running_var, weight, bias):
        if each is not None and (each.dtype is not torch.float32 or each.dim() != 1):
            return False
    layout = layout_of(x)
    return layout is not None and bool(_cpu.near_zero(*layout, x.data_ptr(), NEAR))


def pools(x: Tensor, residual: Tensor | None) -> bool:
    """Whether the kernels also pool behind such an x, which `fits`."""
    return residual is None and x.dtype is torch.float32 and x.dim() == 4 and x.is_contiguous()


def transformed() -> bool:
    """Under a tracer, a compiler, a transform or a mode that has to see torch's own operators."""
    return (
        torch.compiler.is_compiling()
        or torch._C._are_functorch_transforms_active()  # noqa: SLF001  # torch has no public ways
        or torch._C._len_torch_dispatch_stack() > 0  # noqa: SLF001
        or torch._C._is_tracing()  # noqa: SLF001
        or forward_ad._current_level >= 0  # noqa: SLF001
    )


def _plain(x: Tensor) -> bool:
    # a subclass may be a wrapper around something else than memory
    return type(x) in PLAIN and x.is_cpu and x.dtype in DTYPES and x.layout is torch.strided


def _readable(dy: Tensor) -> bool:
    # is_grads_batched uses torch's older vmap, whose tensors are plain but for their memory
    batched = torch._C._functorch.is_legacy_batchedtensor(dy)  # noqa: SLF001
    return _plain(dy) and not batched


def _pair(a: Tensor | None, b: Tensor | None) -> bool:
    """Both None, or contiguous and of one dtype."""
    if a is None or b is None:
        return (a is None or _plain_vector(a)) and (b is None or _plain_vector(b))
    return a.dtype is b.dtype and _plain_vector(a) and _plain_vector(b)


def _plain_vector(x: Tensor) -> bool:
    return type(x) in PLAIN and x.is_cpu and x.dtype in DTYPES and x.is_contiguous()


# How the memory lies: (rows, batch, channels, plane). Rows are (batch, channels), planes (batch,
# channels, plane). Not a named tuple, which costs half a microsecond on every call.
Layout = tuple[bool, int, int, int]


def layout_of(x: Tensor) -> Layout | None:
    """None where the memory has to be copied first."""
    shape = x.shape
    batch, channels = shape[0], shape[1]
    if x.is_contiguous():
        plane = 1 if len(shape) == 2 else x.numel() // (batch * channels)
        return plane == 1, batch, channels, plane
    if (len(shape) == 4 and x.is_contiguous(memory_format=torch.channels_last)) or (
        len(shape) == 5 and x.is_contiguous(memory_format=torch.channels_last_3d)
    ):
        return True, x.numel() // channels, channels, 1
    return None


def _dense(x: Tensor) -> tuple[Tensor, Layout]:
    layout = layout_of(x)
    if layout is None:
        x = x.contiguous(memory_format=_format(x))
        layout = layout_of(x)
        assert layout is not None  # noqa: S101  # for the type checker
    return x, layout


def _format(x: Tensor) -> torch.memory_format:
    """Of a slice or a view: that of what it is a part of."""
    likely = {4: torch.channels_last, 5: torch.channels_last_3d}.get(x.dim())
    return likely if likely is not None and x.stride(1) == 1 else torch.contiguous_format


def _like(x: Tensor, model: Tensor) -> Tensor:
    """x in the memory layout of `model`."""
    return x if x.stride() == model.stride() else torch.empty_like(model).copy_(x)


def _address(x: Tensor | None) -> int:
    return 0 if x is None else x.data_ptr()


def _code(a: Tensor | None, b: Tensor | None) -> int:
    return DTYPES[a.dtype] if a is not None else DTYPES[b.dtype] if b is not None else 0


def forward(
    x: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    training: bool,
    momentum: float,
    eps: float,
    residual: Tensor | None,
    activation: str | None,
    kept: bool,
    pool: str | None = None,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """y, and for backward the statistics that were used, if they are `kept`, and the winners.

    statistics: (3, C), the mean, biased variance and 1 / √(var + eps); winners: uint8, of y's shape,
    where in its window each maximum stood, with pool="max".
    """
    x, layout = _dense(x)
    winners, pooling = None, NO_POOL
    if pool is None:
        y = memory.empty_like(x, DTYPES[x.dtype])
    else:
        y = x.new_empty((*x.shape[:2], x.shape[2] // WINDOW, x.shape[3] // WINDOW))
        winners = torch.empty_like(y, dtype=torch.uint8) if pool == "max" else None
        pooling = POOL_CODES[pool], x.shape[3], _address(winners)
    statistics = torch.empty((3, layout[2]), dtype=torch.float64, device="cpu") if kept else None
    if residual is not None:
        residual = _like(residual, x)
    _cpu.forward(
        DTYPES[x.dtype],
        *layout,
        torch.get_num_threads(),
        x.data_ptr(),
        _address(residual),
        y.data_ptr(),
        _address(weight),
        _address(bias),
        _code(weight, bias),
        _address(running_mean),
        _address(running_var),
        _code(running_mean, running_var),
        0 if statistics is None else statistics.data_ptr(),
        training,
        momentum,
        eps,
        CODES[activation],
        *pooling,
    )
    return y, statistics, winners


class BatchNorm(torch.autograd.Function):
    """The forward pass with a gradient."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        residual: Tensor | None,
        options: tuple[Tensor | None, Tensor | None, bool, float, float, str | None, str | None],
    ) -> Tensor:
        # as one: autograd looks at every argument, which costs
        running_mean, running_var, training, momentum, eps, activation, pool = options
        y, statistics, winners = forward(
            x,
            running_mean,
            running_var,
            weight,
            bias,
            training,
            momentum,
            eps,
            residual,
            activation,
            True,
            pool,
        )
        kind = (activation, residual is not None)
        extra = residual if kind in SAVES_RESIDUAL else None
        if kind in SAVES_Y and pool is None:
            extra = y
        ctx.save_for_backward(x, weight, bias, statistics, extra, winners)
        ctx.training, ctx.eps, ctx.kind, ctx.pool = training, eps, kind, pool
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> Any:
        x, weight, bias, statistics, extra, winners = ctx.saved_tensors
        if torch.is_grad_enabled() or transformed() or not _readable(dy):
            return *_differentiable(ctx, dy), None
        needs_x, needs_weight, needs_bias, needs_residual, *_ = ctx.needs_input_grad
        activation, behind = ctx.kind
        keeps = activation is not None and behind
        x, layout = _dense(x)
        pooling = NO_POOL
        if ctx.pool is None:
            dy = _like(dy, x)
        else:
            dy = dy.contiguous()
            pooling = POOL_CODES[ctx.pool], x.shape[3], _address(winners)
        if extra is not None:
            extra = _like(extra, x)
        code, costly = DTYPES[x.dtype], activation in KEEPS_GRADIENT or ctx.pool is not None
        dx = memory.empty_like(x, code) if needs_x or costly else None
        gradient = memory.empty_like(x, code) if keeps else dx if costly else None
        dweight = torch.empty_like(weight) if needs_weight else None
        dbias = torch.empty_like(bias) if needs_bias else None
        _cpu.backward(
            code,
            *layout,
            torch.get_num_threads(),
            x.data_ptr(),
            dy.data_ptr(),
            _address(extra),
            _address(dx),
            _address(gradient),
            _address(weight),
            _address(bias),
            _code(weight, bias),
            _address(dweight),
            _address(dbias),
            statistics.data_ptr(),
            ctx.training,
            CODES[activation],
            behind,
            *pooling,
        )
        dresidual = None if not needs_residual else gradient if keeps else dy
        return dx if needs_x else None, dweight, dbias, dresidual, None


def _differentiable(ctx: Any, dy: Tensor) -> list[Tensor | None]:
    """The gradients of x, weight, bias and residual by torch's operators, which have their own."""
    x, weight, bias, statistics, extra, _ = ctx.saved_tensors
    activation, behind = ctx.kind
    needed = ctx.needs_input_grad[:4]
    residual = extra if ctx.kind in SAVES_RESIDUAL else None
    with torch.enable_grad():
        # another name for each, since one tensor may be both x and residual
        inputs: list[Any] = [
            None if v is None else v.view_as(v) for v in (x, weight, bias, residual)
        ]
        x, weight, bias, residual = inputs
        running = (None, None)
        if not ctx.training:
            running = statistics[:2].to(torch.promote_types(x.dtype, torch.float32))
        y = F.batch_norm(x, *running, weight, bias, ctx.training, 0.0, ctx.eps)
        if residual is not None:
            y = y + residual
        g = dy
        if ctx.kind in SAVES_Y and ctx.pool is None:
            g = DERIVATIVES[activation](dy, extra)
        elif activation is not None:
            y = ACTIVATIONS[activation](y)
        if ctx.pool is not None:
            y = POOLS[ctx.pool](y)
        wanted = [v for v, need in zip(inputs, needed, strict=True) if need and v is not None]
        found = iter(torch.autograd.grad(y, wanted, g, create_graph=True))
    gradients = [
        next(found) if need and v is not None else None
        for v, need in zip(inputs, needed, strict=True)
    ]
    if behind and needed[3] and residual is None:
        gradients[3] = g
    return gradients


def batch_norm(
    x: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    training: bool,
    momentum: float,
    eps: float,
    residual: Tensor | None,
    activation: str | None,
    pool: str | None,
) -> Tensor:
    """As `kernels.batch_norm`, for what `fits`, and `pools` if there is a pooling."""
    if torch.is_grad_enabled() and (
        x.requires_grad
        or (weight is not None and weight.requires_grad)
        or (bias is not None and bias.requires_grad)
        or (residual is not None and residual.requires_grad)
    ):
        options = running_mean, running_var, training, momentum, eps, activation, pool
        y: Tensor = BatchNorm.apply(x, weight, bias, residual, options)
        return y
    return forward(
        x, running_mean, running_var, weight, bias, training, momentum, eps, residual, activation,
        False, pool,
    )[0]  # fmt: skip


def moments(x: Tensor) -> tuple[Tensor, Tensor]:
    """mean and var_biased: (C,), float64."""
    x, layout = _dense(x)
    statistics = torch.empty((3, layout[2]), dtype=torch.float64, device="cpu")
    _cpu.moments(
        DTYPES[x.dtype], *layout, torch.get_num_threads(), x.data_ptr(), statistics.data_ptr()
    )
    return statistics[0], statistics[1]


def normalize(
    x: Tensor, mean: Tensor, invstd: Tensor, weight: Tensor | None, bias: Tensor | None
) -> Tensor:
    """(x − mean) · invstd · weight + bias."""
    mean, var = mean.double().contiguous(), invstd.double().pow(-2).contiguous()
    # of one dtype, whatever they were: a kernel takes one code for both
    weight = None if weight is None else weight.detach().double().contiguous()
    bias = None if bias is None else bias.detach().double().contiguous()
    return forward(x, mean, var, weight, bias, False, 0.0, 0.0, None, None, False)[0]


def reduce_gradient(dy: Tensor, x: Tensor, mean: Tensor) -> tuple[Tensor, Tensor]:
    """Σ dy and Σ dy · (x − mean): (C,), float64."""
    x, layout = _dense(x)
    dy = _like(dy, x)
    # with an invstd of 1 dweight is dot
    statistics = torch.ones((3, layout[2]), dtype=torch.float64, device="cpu")
    statistics[0] = mean
    dot, total = torch.empty((2, layout[2]), dtype=torch.float64, device="cpu")
    _cpu.backward(
        DTYPES[x.dtype], *layout, torch.get_num_threads(), x.data_ptr(), dy.data_ptr(), 0, 0, 0, 0,
        0, DTYPES[torch.float64], dot.data_ptr(), total.data_ptr(), statistics.data_ptr(), True, 0,
        False, 0, 0, 0,
    )  # fmt: skip
    return total, dot


def input_gradient(
    dy: Tensor,
    x: Tensor,
    mean: Tensor,
    invstd: Tensor,
    weight: Tensor | None,
    mean_sum: Tensor,
    mean_dot: Tensor,
) -> Tensor:
    """weight · invstd · (dy − mean_sum − (x − mean) · invstd² · mean_dot)."""
    x, layout = _dense(x)
    dy = _like(dy, x)
    dx = memory.empty_like(x, DTYPES[x.dtype])
    statistics = torch.stack([mean.double(), mean.double(), invstd.double()])  # the second unread
    # the kernel divides by the count of values that it sees
    sums = torch.stack([mean_sum, mean_dot]).double() * (x.numel() // layout[2])
    scale = None if weight is None else weight.detach().contiguous()
    _cpu.input_gradient(
        DTYPES[x.dtype], *layout, torch.get_num_threads(), x.data_ptr(), dy.data_ptr(),
        dx.data_ptr(), _address(scale), _code(scale, None), statistics.data_ptr(), sums.data_ptr(),
    )  # fmt: skip
    return dx
