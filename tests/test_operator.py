"""`batch_norm` wherever torch's goes: its own samples, dtypes, layouts, transforms, devices."""

import copy
from functools import partial

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.func import functional_call, grad, vmap
from torch.nn import functional as F
from torch.testing._internal.common_methods_invocations import op_db

import batchnorm
from batchnorm import reference
from tolerance import assert_near, assert_no_worse

(TORCHS,) = [
    op for op in op_db if op.name == "nn.functional.batch_norm" and not op.variant_test_name
]
DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]


def clones(value, *, wide):
    """Independent copies of tensors, in float64 if asked, and everything else as it is."""
    if not isinstance(value, torch.Tensor):
        return value
    twin = value.detach().double() if wide else value.detach().clone()
    return twin.requires_grad_(value.requires_grad)


@pytest.mark.parametrize("dtype", DTYPES)
def test_torchs_own_operator_samples(dtype):
    samples = list(TORCHS.sample_inputs("cpu", dtype, requires_grad=True))
    assert len(samples) > 10
    for sample in samples:
        results = []
        for function, wide in ((batchnorm.batch_norm, 0), (F.batch_norm, 0), (F.batch_norm, 1)):
            x, *args = map(partial(clones, wide=wide), (sample.input, *sample.args))
            kwargs = {name: clones(value, wide=wide) for name, value in sample.kwargs.items()}
            y = function(x, *args, **kwargs)
            weights = torch.arange(y.numel(), dtype=y.dtype).reshape(y.shape) % 7 - 3
            (y * weights).sum().backward()
            tensors = [t for t in (*args, *kwargs.values()) if isinstance(t, torch.Tensor)]
            found = [y, x.grad, *tensors, *(t.grad for t in tensors)]
            results.append([None if t is None else t.detach() for t in found])
        count = max(sample.input.numel() // max(sample.input.shape[-1], 1), 1)
        for mine, theirs, exact in zip(*results, strict=True):
            if mine is not None or theirs is not None:
                assert_no_worse(mine, theirs, exact, count)


def layers(rank, dtype=torch.float32, **options):
    """Ours and torch's, with the same state."""
    name = {2: "BatchNorm1d", 3: "BatchNorm1d", 4: "BatchNorm2d", 5: "BatchNorm3d"}[rank]
    pair = [getattr(batchnorm, name)(3, **options), getattr(nn, name)(3, **options)]
    for layer in pair:
        torch.manual_seed(5)
        for value in layer.state_dict().values():
            if value.is_floating_point():
                value.copy_(torch.rand(value.shape) + 0.5)
        layer.to(dtype)
    return pair


SHAPES = [(7, 3), (2, 3, 5), (4, 3, 6, 5), (2, 3, 3, 2, 4)]


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", SHAPES)
def test_half_inputs_with_float_parameters_are_summed_in_float(shape, dtype, training):
    ours, theirs = layers(len(shape))
    x = (torch.randn(shape, generator=torch.Generator().manual_seed(1)) + 1).to(dtype)
    exact = copy.deepcopy(theirs).double().train(training)
    y = ours.train(training)(x)
    assert y.dtype == dtype
    count = x.numel() // 3
    assert_no_worse(y, theirs.train(training)(x), exact(x.double()), count)
    for name, value in ours.state_dict().items():
        other = theirs.state_dict()[name]
        assert_no_worse(value, other, exact.state_dict()[name].double(), count)
    assert ours.running_mean.dtype == torch.float32
    if training:
        mean, _ = reference.moments(x.double())
        expected = 0.9 * layers(len(shape))[0].running_mean.double() + 0.1 * mean
        assert_near(ours.running_mean, expected, x.numel() // 3)


def test_autocast_leaves_the_statistics_in_float():
    ours, theirs = layers(4)
    x = torch.randn(4, 3, 6, 6)
    results = []
    for layer in (ours, theirs):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Conv2d(3, 3, 3), layer)
        with torch.autocast("cpu", torch.bfloat16):
            results.append(model(x))
    assert results[0].dtype == torch.bfloat16
    eps = torch.finfo(torch.bfloat16).eps  # a rounding may fall to the other side
    torch.testing.assert_close(*results, rtol=eps, atol=eps)
    torch.testing.assert_close(ours.running_var, theirs.running_var, rtol=1e-6, atol=0)
    assert ours.running_var.dtype == torch.float32


LAYOUTS = {
    "transposed": lambda x: x.transpose(0, -1).contiguous().transpose(0, -1),
    "every second": lambda x: x.repeat_interleave(2, dim=0)[::2],
    "expanded": lambda x: x[:1].expand_as(x),
    "channels last": lambda x: x.contiguous(
        memory_format=torch.channels_last if x.dim() == 4 else torch.channels_last_3d
    ),
}


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize(
    ("shape", "layout"),
    [(s, name) for s in SHAPES for name in LAYOUTS if len(s) >= 4 or name != "channels last"],
)
def test_every_layout_gives_the_numbers_of_the_contiguous_one(shape, layout, training):
    layer, other = layers(len(shape))
    layer.train(training)
    x = LAYOUTS[layout](torch.randn(shape, generator=torch.Generator().manual_seed(2)))
    y = layer(x)
    # an expanded batch has, in all its rows, the same values: the mean's error is seen at eps
    scale = 1e-5**-0.5 if layout == "expanded" and len(shape) == 2 and training else None
    twin = other.train(training).double()
    exact = twin(x.contiguous().double()).detach()
    assert_near(y.detach(), exact, x.numel() // 3, scale)
    assert y.shape == x.shape
    if layout == "channels last":
        assert y.stride() == x.stride()


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("shape", [(0, 3), (0, 3, 4), (4, 3, 0, 2), (0, 3, 2, 2)])
def test_empty_batches_do_what_torchs_do(shape, training):
    ours, theirs = layers(len(shape))
    results = []
    for layer in (ours, theirs):
        x = torch.zeros(shape, requires_grad=True)
        y = layer.train(training)(x)
        y.sum().backward()
        results.append([y, x.grad, layer.weight.grad, layer.running_mean, layer.running_var])
    for mine, other in zip(*results, strict=True):
        torch.testing.assert_close(mine, other, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("training", [True, False])
def test_what_is_not_finite_spreads_as_in_torch(value, training):
    ours, theirs = layers(4)
    x = torch.randn(2, 3, 4, 4)
    x[0, 1, 2, 2] = value
    y, y_twin = ours.train(training)(x), theirs.train(training)(x)
    torch.testing.assert_close(y, y_twin, equal_nan=True)
    for name in ("running_mean", "running_var"):
        mine, other = getattr(ours, name), getattr(theirs, name)
        torch.testing.assert_close(mine, other, rtol=1e-6, atol=0, equal_nan=True)
    assert y[:, [0, 2]].isfinite().all(), "other channels are untouched"
    assert y[:, 1].isfinite().any() != training


@pytest.mark.parametrize("training", [True, False])
def test_meta_and_fake_tensors_have_the_right_shape(training):
    meta = batchnorm.BatchNorm2d(3, device="meta").train(training)
    y = meta(torch.empty(2, 3, 4, 4, device="meta"))
    assert (y.shape, y.device.type) == ((2, 3, 4, 4), "meta")
    with FakeTensorMode():
        layer = batchnorm.BatchNorm2d(3).train(training)
        y = layer(torch.empty(2, 3, 4, 4).to(memory_format=torch.channels_last))
        assert y.stride() == (48, 1, 12, 3)


def test_functional_call_takes_parameters_from_outside():
    layer, _ = layers(2)
    layer.eval()
    state = dict(layer.state_dict(), weight=torch.full((3,), 2.0), bias=torch.zeros(3))
    x = torch.randn(4, 3)
    expected = (x - layer.running_mean) / (layer.running_var + 1e-5).sqrt() * 2
    torch.testing.assert_close(functional_call(layer, state, x), expected)


def test_per_sample_gradients_with_vmap_in_evaluation():
    layer, _ = layers(2)
    layer.eval()
    weight, bias = layer.weight.detach(), layer.bias.detach()
    statistics = (layer.running_mean, layer.running_var)
    x = torch.randn(5, 3)

    def loss(weight, sample):
        return batchnorm.batch_norm(sample[None], *statistics, weight, bias).square().sum()

    each = vmap(grad(loss), in_dims=(None, 0))(weight, x)
    for sample, found in zip(x, each, strict=True):
        torch.testing.assert_close(found, grad(loss)(weight, sample))


def test_vmap_over_a_batch_of_batches_in_training():
    x = torch.randn(4, 6, 3)
    mapped = vmap(lambda batch: batchnorm.batch_norm(batch, None, None, training=True))(x)
    for found, batch in zip(mapped, x, strict=True):
        torch.testing.assert_close(
            found, batchnorm.batch_norm(batch, None, None, training=True), rtol=1e-5, atol=1e-6
        )


def test_moved_and_cast_like_any_module():
    layer, _ = layers(4)
    layer.double()
    assert layer.running_mean.dtype == torch.float64
    assert layer.num_batches_tracked.dtype == torch.int64
    layer.to("meta")
    assert layer.weight.is_meta
