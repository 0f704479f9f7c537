"""Where there are few values, torch's node in the graph costs less than one in Python."""

import pytest
import torch
from torch.nn import functional as F

import batchnorm
from batchnorm.kernels import native
from tolerance import bound


def parts(shape, mean=0.0, **options):
    torch.manual_seed(0)
    channels = shape[1]
    x = (torch.randn(shape, dtype=torch.float64) + mean).to(**options).requires_grad_()
    weight, bias = torch.rand(channels), torch.randn(channels)
    return x, torch.zeros(channels), torch.ones(channels), weight, bias


def asked(*of_a_layer):
    return native.sooner_by_torch(*of_a_layer)


@pytest.mark.parametrize("shape", [(8, 4), (4, 8, 2, 2), (2, 3, 5), (64, 128), (2, 3, 2, 3, 2)])
def test_few_values_near_zero_are_torchs(shape):
    x, mean, var, weight, bias = parts(shape, dtype=torch.float32)
    assert asked(x, mean, var, weight, bias)
    theirs, stats = x.detach().clone().requires_grad_(), (mean.clone(), var.clone())
    y = batchnorm.batch_norm(x, mean, var, weight, bias, True)
    wanted = F.batch_norm(theirs, *stats, weight, bias, True)
    dy = torch.randn(shape)
    y.backward(dy)
    wanted.backward(dy)
    for mine, its in ((y, wanted), (x.grad, theirs.grad), (mean, stats[0]), (var, stats[1])):
        assert torch.equal(mine, its)


@pytest.mark.parametrize(
    ("shape", "options"),
    [
        ((64, 129), {}),  # more values than TINY
        ((8, 4), {"dtype": torch.float64}),
        ((8, 4), {"dtype": torch.bfloat16}),
        ((4, 8, 2, 2), {"memory_format": torch.channels_last}),
        ((8, 4), {"mean": 3.0}),
        ((8, 4), {"mean": -1e4}),
    ],
)
def test_others_are_ours(shape, options):
    assert not asked(*parts(shape, **{"dtype": torch.float32, **options}))


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 3e38])
def test_extremes_are_ours(value):
    x, *others = parts((8, 4), dtype=torch.float32)
    assert asked(x, *others)
    with torch.no_grad():
        x[3, 2] = value
    assert not asked(x, *others)


@pytest.mark.parametrize(("shape", "size"), [((2048, 4), 5e17), ((64, 4), 3e18), ((8, 4), 1e19)])
def test_squares_that_torch_cannot_add_up_are_ours(shape, size):
    x, mean, var, weight, bias = parts(shape, dtype=torch.float32)
    x = (x.detach() * size).requires_grad_()
    assert not asked(x, mean, var, weight, bias)
    y = batchnorm.batch_norm(x, mean, var, None, None, True)
    assert var.isfinite().all()
    assert y.std(0, correction=0).sub(1).abs().max() < 1e-5


@pytest.mark.parametrize("rows", [8, 2048, 2049])
def test_what_torch_refuses_is_taken_at_every_size(rows):
    x = torch.randn(rows, 4, requires_grad=True)
    mean, weight = torch.zeros(4), torch.rand(4, 1)
    y = batchnorm.batch_norm(x, mean, None, None, None, True)
    assert torch.allclose(mean, 0.1 * x.detach().mean(0), atol=1e-6)
    assert torch.allclose(
        batchnorm.batch_norm(x, None, None, weight, None, True), y * weight[:, 0], atol=1e-6
    )


def test_constant_channels_are_ours_unless_they_are_zero():
    x, *others = parts((8, 4), dtype=torch.float32)
    with torch.no_grad():
        x[:, 1] = 0
        assert not asked(x, *others)  # no graph is made
    assert asked(x, *others)
    with torch.no_grad():
        x[:, 1] = 0.25
    assert not asked(x, *others)


def test_parameters_of_another_dtype_are_ours():
    x, mean, var, weight, bias = parts((8, 4), dtype=torch.float32)
    assert not asked(x, mean, var, weight.double(), bias.double())
    assert not asked(x, mean.double(), var.double(), weight, bias)


@pytest.mark.parametrize("mean", [0.0, 1.5, 3.0, 1e4])
@pytest.mark.parametrize("shape", [(16, 8), (4, 8, 3, 3)])
def test_either_is_as_exact(shape, mean):
    """No digit is lost at the seam: the reference in float64, within the bound of the kernels."""
    x, *_ = parts(shape, mean, dtype=torch.float32)
    y = batchnorm.batch_norm(x, None, None, training=True)
    exact = x.detach().double()
    axes = [axis for axis in range(x.dim()) if axis != 1]
    var, centre = torch.var_mean(exact, axes, correction=0, keepdim=True)
    wanted = (exact - centre) / (var + 1e-5).sqrt()
    scale = float(wanted.abs().max())
    assert (y - wanted).abs().max() <= bound(torch.float32, x.numel() // shape[1], scale)
