"""The native kernels: against the float64 reference, in every layout, dtype and instruction set."""

import json
import math
import os

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

import batchnorm
from batchnorm.kernels import native
from batchnorm.kernels.activations import ACTIVATIONS
from kernel_fixtures import however_few_values, threads_kept  # noqa: F401  # two fixtures
from processes import python
from tolerance import bound

CASES = int(os.environ.get("BATCHNORM_FUZZ", "400"))  # a long run: BATCHNORM_FUZZ=100000
DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]


def test_they_are_there_and_say_so():
    assert native.NATIVE
    assert batchnorm.backend() in {"native, avx512", "native, avx2", "native, baseline"}
    assert native._cpu.has_pool(), "torch's OpenMP pool"


def exactly(x, running, weight, bias, residual, dy, *, training, activation):
    """y, running statistics and gradients in float64, by the definition.

    Not by torch's operator, which multiplies x before it subtracts: where the mean is large
    beside the spread, that loses digits in float64 too.
    """
    leaves = [
        None if v is None else v.detach().double().contiguous() for v in (x, weight, bias, residual)
    ]
    leaves = [None if v is None else v.requires_grad_() for v in leaves]
    count = x.numel() // x.shape[1]
    mean, var = statistics = [v.double() for v in running]
    axes = [axis for axis in range(x.dim()) if axis != 1]
    if training:
        mean = leaves[0].mean(axes)
        var = leaves[0].var(axes, correction=0)
        correction = count / (count - 1)
        of_batch = [mean.detach(), var.detach() * correction]
        statistics = [0.9 * old + 0.1 * new for old, new in zip(statistics, of_batch, strict=True)]
    mean, var, weight, bias = (
        None if v is None else v.view(-1, *[1] * (x.dim() - 2))
        for v in (mean, var, leaves[1], leaves[2])
    )
    y = (leaves[0] - mean) / (var + 1e-5).sqrt()
    y = y if weight is None else y * weight
    y = y if bias is None else y + bias
    if residual is not None:
        y = y + leaves[3]
    z = y
    y = y if activation is None else ACTIVATIONS[activation](y)
    found = [v for v in leaves if v is not None]
    return [y.detach(), *statistics], list(torch.autograd.grad(y, found, dy.double())), z.detach()


def ours(x, running, weight, bias, residual, dy, *, training, activation):
    leaves = [
        None if v is None else v.detach().requires_grad_() for v in (x, weight, bias, residual)
    ]
    statistics = [v.clone() for v in running]
    assert native.fits(leaves[0], *statistics, leaves[1], leaves[2], leaves[3])
    y = batchnorm.batch_norm(
        leaves[0], *statistics, leaves[1], leaves[2], training,
        residual=leaves[3], activation=activation,
    )  # fmt: skip
    found = [v for v in leaves if v is not None]
    return [y.detach(), *statistics], list(torch.autograd.grad(y, found, dy))


@st.composite
def problems(draw):
    """Any rank, layout, dtype, activation; odd sizes, large means, tiny and huge scales."""
    rank = draw(st.integers(2, 5))
    shape = [draw(st.integers(1, 40)), draw(st.integers(1, 40))]
    shape += [draw(st.integers(1, 20 if rank == 3 else 9)) for _ in range(rank - 2)]
    if math.prod(shape) // shape[1] == 1:
        shape[0] += 1
    return {
        "shape": shape,
        "layout": draw(st.sampled_from(["contiguous", "channels last", "strided", "transposed"])),
        "dtype": draw(st.sampled_from(DTYPES)),
        "parameters": draw(st.sampled_from(["none", "float32", "same", "weight"])),
        "activation": draw(st.sampled_from([None, *ACTIVATIONS])),
        "residual": draw(st.booleans()),
        "training": draw(st.booleans()),
        "mean": draw(st.sampled_from([0.0, 3.0, -1000.0])),
        "scale": draw(st.sampled_from([1.0, 1e-3, 100.0])),
        "seed": draw(st.integers(0, 2**31)),
        "threads": draw(st.integers(1, 3)),
    }


def laid_out(x, layout):
    if layout == "channels last" and x.dim() in {4, 5}:
        return x.contiguous(
            memory_format=torch.channels_last if x.dim() == 4 else torch.channels_last_3d
        )
    if layout == "strided":
        return x.repeat_interleave(2, -1)[..., ::2]
    if layout == "transposed":
        return x.transpose(0, -1).contiguous().transpose(0, -1)
    return x


def made(problem):
    generator = torch.Generator().manual_seed(problem["seed"])

    def randn(*shape):
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    shape, dtype = problem["shape"], problem["dtype"]
    C = shape[1]
    half = dtype in {torch.bfloat16, torch.float16}
    mean = max(-50.0, problem["mean"]) if half else problem["mean"]
    x = laid_out((randn(*shape) * problem["scale"] + mean).to(dtype), problem["layout"])
    kind = problem["parameters"]
    per_channel = dtype if kind == "same" else torch.promote_types(dtype, torch.float32)
    weight = None if kind == "none" else (randn(C) + 0.5).to(per_channel)
    bias = None if kind in {"none", "weight"} else randn(C).to(per_channel)
    variance = problem["scale"] ** 2
    running = [
        (randn(C) * problem["scale"] + mean).to(per_channel),
        ((randn(C).abs() + 0.5) * variance).to(per_channel),
    ]
    residual = randn(*shape).to(dtype) if problem["residual"] else None
    return x, running, weight, bias, residual, randn(*shape).to(dtype)


@pytest.mark.usefixtures("threads_kept")
@settings(
    max_examples=CASES,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
@given(problem=problems())
def test_fuzz_against_float64(problem):
    torch.set_num_threads(problem["threads"])
    options = {"training": problem["training"], "activation": problem["activation"]}
    arguments = made(problem)
    x, running, weight, *_ = arguments
    outputs, gradients = ours(*arguments, **options)
    exact, exact_gradients, z = exactly(*arguments, **options)
    count = x.numel() // x.shape[1]
    eps = torch.finfo(x.dtype).eps
    # the mean is known to its last digit, but x is what the dtype holds: what is behind it is lost
    axes = [axis for axis in range(x.dim()) if axis != 1]
    spread = x.double().var(axes, correction=0) if problem["training"] else running[1].double()
    steep = float(((1 if weight is None else weight.double().abs()) / (spread + 1e-5).sqrt()).max())
    centred = float(
        (x.double() - running[0].double().view(1, -1, *[1] * len(axes[1:]))).abs().max()
    )
    # float parameters are multiplied in float: a unit of the largest z
    scale = max(float(z.abs().max()), steep * centred if not problem["training"] else 0.0, 1.0)
    # in float64 the reference's mean is rounded too
    mean_error = float(x.double().abs().max()) * torch.finfo(torch.float64).eps * 8
    means = steep * mean_error
    for mine, wanted in zip(outputs[:1], exact[:1], strict=True):
        assert mine.dtype == x.dtype
        assert mine.shape == x.shape
        torch.testing.assert_close(
            mine.double(),
            wanted,
            rtol=2 * eps,
            atol=bound(torch.float32 if x.dtype != torch.float64 else x.dtype, count, scale)
            + eps * float(wanted.abs().max())
            + means,
        )
    for mine, wanted in zip(outputs[1:], exact[1:], strict=True):
        unit = torch.finfo(mine.dtype).eps
        torch.testing.assert_close(
            mine.double(),
            wanted,
            rtol=8 * unit,
            atol=8 * unit * float(wanted.abs().max())
            + 2 * mean_error * float(spread.max().sqrt())
            + unit * torch.finfo(mine.dtype).tiny,  # below it a half has fewer digits
        )
    kinked = problem["activation"] in {"relu", "leaky_relu", "hardswish"}
    near = min((float((z - kink).abs().min()) for kink in (-3, 0, 3)), default=1.0)
    if kinked and near < 64 * eps * scale:
        return  # which side of the kink it is on is rounding
    of_y = (problem["activation"] in {"sigmoid", "tanh"}) or problem["residual"]
    for mine, wanted in zip(gradients, exact_gradients, strict=True):
        assert mine.shape == wanted.shape
        largest = float(wanted.abs().max())
        allowed = bound(x.dtype if of_y else mine.dtype, count, 1.0) * max(largest, 1.0)
        extra = bound(x.dtype, count) * steep * float(arguments[-1].abs().max()) * 8
        extra += 8 * means * steep * float(arguments[-1].abs().max())
        terms = float(arguments[-1].double().abs().sum()) * scale * (eps + means) * 8
        torch.testing.assert_close(
            mine.double(), wanted, rtol=0, atol=allowed + extra + (terms if mine.dim() == 1 else 0)
        )


@pytest.mark.usefixtures("threads_kept")
@pytest.mark.parametrize("layout", ["contiguous", "channels last"])
@pytest.mark.parametrize(
    "shape", [(64, 3, 40, 40), (8, 2, 200, 300), (3, 200, 9, 9), (5, 1, 33, 1)]
)
def test_threads_and_layouts_make_no_difference_beyond_rounding(shape, layout):
    x = laid_out(torch.randn(shape) + 5, layout)
    exact = F.batch_norm(x.double().contiguous(), None, None, training=True)
    for count in (1, 2, 3, 7):
        torch.set_num_threads(count)
        y = batchnorm.batch_norm(x, None, None, training=True)
        again = batchnorm.batch_norm(x, None, None, training=True)
        assert torch.equal(y, again), "deterministic for a thread count"
        assert float((y - exact).abs().max()) < 4e-6


@pytest.mark.usefixtures("threads_kept")
@pytest.mark.parametrize(("threads", "offset"), [(2, 0), (1, 1)])
@pytest.mark.parametrize(
    ("shape", "layout", "dtype"),
    [
        ((3, 5, 751, 751), "contiguous", torch.float32),  # a channel is shared by the threads
        ((16, 37, 121, 121), "contiguous", torch.float32),  # planes, whose rows begin anywhere
        ((41, 2053, 10, 10), "contiguous", torch.float32),  # small planes, as columns
        ((8, 64, 131, 127), "channels last", torch.float32),
        ((2, 67, 261, 253), "channels last", torch.float32),  # rows that begin anywhere
        ((16, 37, 171, 171), "contiguous", torch.bfloat16),
        ((16, 37, 86, 86), "contiguous", torch.float64),
    ],
)
def test_what_is_larger_than_the_caches_is_stored_past_them(shape, layout, dtype, offset, threads):
    torch.set_num_threads(threads)
    size = math.prod(shape)
    assert size * dtype.itemsize >= 32 << 20
    memory = torch.randn(size + offset, generator=torch.Generator().manual_seed(1)).to(dtype)
    x = memory[offset:].view(shape)
    if layout == "channels last":
        N, C, H, W = shape
        x = memory[offset:].view(N, H, W, C).permute(0, 3, 1, 2)
    x.requires_grad_()
    y = batchnorm.batch_norm(x, None, None, training=True, activation="relu")
    (dx,) = torch.autograd.grad(y, x, x.detach())
    exact = x.detach().double().contiguous()
    mean = exact.mean((0, 2, 3), keepdim=True)
    # not torch's var, whose rounding errors are a hundred times ours in float64
    var = (exact - mean).square().mean((0, 2, 3), keepdim=True)
    z = (exact - mean) / (var + 1e-5).sqrt()
    g = exact * (z > 0)
    means = [v.mean((0, 2, 3), keepdim=True) for v in (g, g * z)]
    exact_dx = (g - means[0] - z * means[1]) / (var + 1e-5).sqrt()
    eps = torch.finfo(dtype).eps
    kink = z.abs() < 64 * eps
    largest, count = float(z.abs().max()), size // shape[1]
    assert float((y.detach() - z.clamp_min(0)).abs().max()) < bound(dtype, count, largest)
    assert float((dx - exact_dx)[~kink].abs().max()) < 2 * bound(dtype, count, largest)


@pytest.mark.parametrize("layout", ["contiguous", "channels last"])
@pytest.mark.parametrize(("mean", "torchs"), [(0.0, 1e-6), (1e4, 2e-4), (1e6, 1e-2)])
def test_large_means_lose_no_more_than_x_itself_does(mean, torchs, layout):
    x = laid_out(torch.randn(16, 8, 30, 30) + mean, layout)
    y = batchnorm.batch_norm(x, None, None, training=True)
    exact = F.batch_norm(x.double().contiguous(), None, None, training=True)
    allowed = 4 * torch.finfo(torch.float32).eps * float(exact.abs().max())
    assert float((y - exact).abs().max()) < allowed, f"torch errs by up to {torchs} and more"


@pytest.mark.parametrize("layout", ["contiguous", "channels last"])
@pytest.mark.parametrize("value", [1e30, 3e38, float("inf"), float("nan"), 1e-30])
def test_what_squares_beyond_float_is_summed_in_double(value, layout):
    x = torch.randn(4, 3, 6, 6)
    x[:, 1] *= value
    x = laid_out(x, layout).requires_grad_()
    twin = x.detach().double().contiguous().requires_grad_()
    y, other = (
        f(v, None, None, training=True)
        for f, v in ((batchnorm.batch_norm, x), (F.batch_norm, twin))
    )
    torch.testing.assert_close(y.double(), other, equal_nan=True, atol=1e-5, rtol=1e-5)
    y.sum().backward()
    other.sum().backward()
    torch.testing.assert_close(x.grad.double(), twin.grad, equal_nan=True, atol=1e-5, rtol=1e-4)


ALIKE = """
import json, torch, batchnorm
torch.manual_seed(0)
found = [batchnorm.backend()]
for shape in ((4, 5, 7, 7), (33, 17), (2, 3, 65, 64)):
    for dtype in (torch.float32, torch.float64, torch.bfloat16, torch.float16):
        for activation in (None, "relu", "sigmoid", "tanh", "gelu"):
            x = (torch.randn(shape) * 3 + 1).to(dtype).requires_grad_()
            y = batchnorm.batch_norm(x, None, None, training=True, activation=activation)
            (dx,) = torch.autograd.grad(y, x, torch.randn(shape).to(dtype))
            found += [y.double().flatten()[:50].tolist(), dx.double().flatten()[:50].tolist()]
print(json.dumps(found))
"""


def test_the_instruction_sets_agree():
    widest = json.loads(python(ALIKE).stdout)
    for isa in ("avx2", "baseline"):
        other = python(ALIKE, BATCHNORM_ISA=isa)
        if "does not have" in other.stderr:
            continue  # this processor
        found = json.loads(other.stdout)
        assert found[0] == f"native, {isa}"
        for mine, theirs in zip(found[1:], widest[1:], strict=True):
            # a half's last digit may fall to the other side
            assert mine == pytest.approx(theirs, rel=1.6e-2, abs=2e-5)
        close = [
            m == pytest.approx(t, rel=1e-4, abs=2e-5)
            for m, t in zip(found[1:], widest[1:], strict=True)
        ]
        assert sum(close) > len(close) / 2


@pytest.mark.parametrize("activation", ["sigmoid", "tanh", "silu"])
def test_exponentials_keep_their_digits_in_double(activation):
    torch.manual_seed(0)
    sizes = torch.logspace(-300, math.log10(700), 3000, dtype=torch.float64)
    near = torch.randn(3000, dtype=torch.float64) * 3
    special = torch.tensor([0.0, math.inf, math.nan, 800.0, -800.0], dtype=torch.float64)
    x = torch.cat([sizes, -sizes, near, special])[None]
    mean, var = torch.zeros(2, x.shape[1], dtype=torch.float64)
    y = batchnorm.batch_norm(x, mean, var + 1, eps=0.0, activation=activation)
    # two or three operations behind an exponential, theirs too
    rtol = 8 * torch.finfo(torch.float64).eps
    torch.testing.assert_close(
        y, ACTIVATIONS[activation](x), rtol=rtol, atol=1e-300, equal_nan=True
    )


def test_the_normal_distribution_keeps_its_digits_in_double():
    z = torch.cat([torch.linspace(-8, 8, 4001, dtype=torch.float64), torch.randn(2000).double()])
    mean, var = torch.zeros(2, len(z), dtype=torch.float64)
    y = batchnorm.batch_norm(z[None], mean, var + 1, eps=0.0, activation="gelu")[0]
    exact = z * torch.special.erfc(-z / math.sqrt(2)) / 2
    # e^(-z²/2) errs by its exponent's roundoff, z² · eps, beside that of t = |z| / √2, twice z² · eps / 2
    rtol = (8 + 2 * float(z.square().max())) * torch.finfo(torch.float64).eps
    torch.testing.assert_close(y, exact, rtol=2 * rtol, atol=0)  # theirs, too
    near = z.abs() < 1
    torch.testing.assert_close(y[near], exact[near], rtol=4e-15, atol=0)


EXTREMES = {
    torch.float32: (-3.3e38, -1e30, -200.0, 200.0, 1e30, 3.3e38),
    torch.float64: (-1.7e308, -1e300, -2000.0, 2000.0, 1e300, 1.7e308),
}


@pytest.mark.parametrize("activation", ["sigmoid", "tanh", "silu", "gelu"])
@pytest.mark.parametrize("dtype", EXTREMES)
@pytest.mark.parametrize("layout", ["plane", "rows"])
def test_the_largest_values_meet_limits_and_not_a_cut_exponential(activation, dtype, layout):
    values = torch.tensor(EXTREMES[dtype], dtype=dtype)
    x = values.reshape((1, 1, -1) if layout == "plane" else (-1, 1)).requires_grad_()
    zero, one = torch.zeros(1, dtype=dtype), torch.ones(1, dtype=dtype)
    y = batchnorm.batch_norm(x, zero, one, eps=0.0, activation=activation)
    (dx,) = torch.autograd.grad(y.sum(), x)
    values = values.double().requires_grad_()
    expected = ACTIVATIONS[activation](values)
    (slope,) = torch.autograd.grad(expected.sum(), values)
    torch.testing.assert_close(y.flatten().double(), expected, rtol=1e-6, atol=1e-30)
    torch.testing.assert_close(dx.flatten().double(), slope, rtol=1e-6, atol=1e-30)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(8, 3, 20, 20), (64, 3)])
@pytest.mark.parametrize("value", [math.inf, -math.inf, math.nan])
def test_in_evaluation_a_value_that_is_not_finite_has_no_part_in_the_gradient(dtype, shape, value):
    x = torch.randn(shape, dtype=torch.float64).to(dtype)
    x[0, 0] = value
    x.requires_grad_()
    parameters = torch.float64 if dtype == torch.float64 else torch.float32
    running = torch.zeros(3, dtype=parameters), torch.full((3,), 4.0, dtype=parameters)
    y = batchnorm.batch_norm(x, *running, eps=0.0)
    (dx,) = torch.autograd.grad(y, x, torch.ones_like(y))
    assert torch.equal(dx, torch.full_like(dx, 0.5))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_halves_are_rounded_to_nearest_even(dtype):
    torch.manual_seed(0)
    largest = torch.finfo(dtype).max
    # quarters of the last digit beside 1 and 256: below, at and above every tie, and odd and even
    steps = 1 + torch.arange(-64, 65) * torch.finfo(dtype).eps / 4
    values = torch.cat(
        [steps, -steps, 256 * steps, torch.randn(200) * 1e-3, torch.randn(200) * 1e3]
    )
    special = torch.tensor([largest, -largest, 0.0, -0.0, math.inf, -math.inf, math.nan])
    bias = torch.cat([values, special, torch.full((1,), 1.003 * largest)])
    mean, var = torch.zeros(len(bias)), torch.ones(len(bias))
    for rows in (1, 3):
        x = torch.zeros(rows, len(bias), dtype=dtype)
        y = batchnorm.batch_norm(x, mean, var, None, bias, eps=0.0)
        expected = bias.to(dtype).expand(rows, -1)
        torch.testing.assert_close(y, expected, rtol=0, atol=0, equal_nan=True)


def test_moments_are_the_references():
    for layout in ("contiguous", "channels last", "strided"):
        x = laid_out(torch.randn(7, 5, 6, 6) * 3 + 1e4, layout)
        mean, var_biased = batchnorm.kernels.moments(x)
        torch.testing.assert_close(mean, x.double().mean((0, 2, 3)), rtol=1e-12, atol=0)
        torch.testing.assert_close(
            var_biased, x.double().var((0, 2, 3), correction=0), rtol=1e-6, atol=0
        )
