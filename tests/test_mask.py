"""mask=: batch normalization of the values that count, beside the same of the values packed."""

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.func import vmap

import batchnorm
from batchnorm import BatchNormError, reference
from batchnorm.kernels.activations import ACTIVATIONS
from tolerance import assert_near

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]


def exact(x, keep, weight, bias, running_mean, running_var, dy, *, momentum=0.1):
    """y, dx, dweight, dbias and the running statistics, a channel at a time, of the packed values.

    An oracle of its own: the values of a channel are picked out into a (M, 1) batch, and float64's
    reference does the rest. keep: (N, C, *spatial).
    """
    y, dx = torch.zeros_like(x), torch.zeros_like(x)
    dweight, dbias = torch.zeros_like(weight), torch.zeros_like(bias)
    mean, var = running_mean.clone(), running_var.clone()
    for c in range(x.shape[1]):
        here = keep[:, c]
        packed = x[:, c][here][:, None]
        if not len(packed):
            continue
        one = slice(c, c + 1)
        values, m, v = reference.forward(packed, weight[one], bias[one])
        y[:, c][here] = values[:, 0]
        gradients = reference.backward(dy[:, c][here][:, None], packed, weight[one])
        dx[:, c][here] = gradients[0][:, 0]
        dweight[c], dbias[c] = gradients[1][0], gradients[2][0]
        if len(packed) > 1:
            new = reference.update_running(mean[one], var[one], m, v, len(packed), momentum)
            mean[c], var[c] = new[0][0], new[1][0]
    return y, dx, dweight, dbias, mean, var


def problem(shape, seed, *, channels, share=0.6):
    generator = torch.Generator().manual_seed(seed)
    C = shape[1]
    x = torch.randn(shape, generator=generator, dtype=torch.float64) * 2 + 1
    keep = torch.rand((shape[0], channels, *shape[2:]), generator=generator) < share
    vectors = [torch.rand(C, generator=generator, dtype=torch.float64) + 0.5 for _ in range(4)]
    dy = torch.randn(shape, generator=generator, dtype=torch.float64)
    return x, keep, vectors, dy


def found(x, mask, vectors, dy, **options):
    weight, bias, mean, var = (v.clone() for v in vectors)
    x = x.clone().requires_grad_()
    weight.requires_grad_()
    bias.requires_grad_()
    y = batchnorm.batch_norm(x, mean, var, weight, bias, training=True, mask=mask, **options)
    y.backward(dy)
    return y.detach(), x.grad, weight.grad, bias.grad, mean, var


SHAPES = [(9, 3), (4, 3, 7), (3, 2, 5, 4), (2, 3, 2, 3, 4)]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", ["without channels", "one channel", "C channels"])
@pytest.mark.parametrize("shape", SHAPES)
def test_it_is_batch_norm_of_the_packed_values(shape, kind, dtype):
    x, keep, vectors, dy = problem(shape, 1, channels=shape[1] if kind == "C channels" else 1)
    mask = keep[:, 0] if kind == "without channels" else keep
    x, dy = x.to(dtype), dy.to(dtype)
    wide = torch.promote_types(dtype, torch.float32)
    vectors = [v.to(wide) for v in vectors]
    weight, bias, mean, var = (v.double() for v in vectors)
    wanted = exact(x.double(), keep.expand(shape), weight, bias, mean, var, dy.double())
    count = x.numel() // shape[1]
    for mine, other in zip(found(x, mask, vectors, dy), wanted, strict=True):
        scale = float(other.abs().max()) * (1 if mine.dim() > 1 else count**0.5)
        assert_near(mine, other, count, scale)


@settings(deadline=None, max_examples=60)
@given(
    st.tuples(st.integers(1, 5), st.integers(1, 4), st.integers(1, 6)),
    st.booleans(),
    st.floats(0, 1),
    st.integers(0, 1000),
)
def test_any_mask(shape, per_channel, share, seed):
    if shape[0] * shape[2] == 1:
        shape = (2, *shape[1:])
    channels = shape[1] if per_channel else 1
    x, keep, vectors, dy = problem(shape, seed, channels=channels, share=share)
    weight, bias, mean, var = vectors
    wanted = exact(x, keep.expand(shape), weight, bias, mean, var, dy)
    for mine, other in zip(found(x, keep, vectors, dy), wanted, strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-9, atol=1e-9)


def test_nan_beneath_the_mask_reaches_nothing():
    x, keep, vectors, dy = problem((4, 3, 7), 2, channels=1)
    clean = found(x, keep, vectors, dy, residual=x, activation="sigmoid")
    for value in (float("nan"), float("inf"), 1e300):
        dirty = x.masked_fill(~keep, value)
        dirt = dy.masked_fill(~keep, value)
        residual = dirty.clone().requires_grad_()
        mine = found(dirty, keep, vectors, dirt, residual=residual, activation="sigmoid")
        for a, b in zip(mine, clean, strict=True):
            assert torch.equal(a, b)
        assert residual.grad.isfinite().all()
        assert not residual.grad.masked_select(~keep).any()
    y, dx = clean[:2]
    assert not y.masked_select(~keep).any()
    assert not dx.masked_select(~keep).any()


def test_nothing_left_and_one_value_left():
    x, _, vectors, dy = problem((3, 4, 5), 3, channels=1)
    keep = torch.zeros(3, 4, 5, dtype=torch.bool)
    keep[1, 1, 2] = True  # one value in channel 1
    keep[:, 2] = True
    y, dx, dweight, dbias, mean, var = found(x, keep, vectors, dy)
    _, bias, old_mean, old_var = vectors
    for channel in (0, 3):  # none
        assert not y[:, channel].any()
        assert not dx[:, channel].any()
        assert dweight[channel] == dbias[channel] == 0
    assert y[1, 1, 2] == bias[1]
    assert not dx[:, 1].any()
    assert dbias[1] == dy[1, 1, 2]
    for channel in (0, 1, 3):
        assert (mean[channel], var[channel]) == (old_mean[channel], old_var[channel])
    assert mean[2] != old_mean[2]
    nothing = found(x, torch.zeros(3, 5, dtype=torch.bool), vectors, dy)
    assert not any(value.any() for value in nothing[:4])
    assert torch.equal(nothing[4], old_mean)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("activation", [None, *ACTIVATIONS])
def test_what_follows_it_and_evaluation(activation, training):
    x, keep, (weight, bias, mean, var), _ = problem((4, 3, 7), 4, channels=1)
    y = batchnorm.batch_norm(
        x, mean.clone(), var.clone(), weight, bias, training,
        mask=keep[:, 0], residual=x, activation=activation,
    )  # fmt: skip
    if training:
        z = exact(x, keep.expand(x.shape), weight, bias, mean, var, x)[0]
    else:
        z = reference.normalize(x, mean, var, weight, bias)
    z = z + x
    z = z if activation is None else ACTIVATIONS[activation](z)
    torch.testing.assert_close(y, z * keep, rtol=1e-10, atol=1e-10)


def test_gradcheck_and_double_backward():
    x, keep, (weight, bias, *_), _ = problem((3, 2, 4), 5, channels=2)
    inputs = [t.requires_grad_() for t in (x, weight, bias)]

    def function(x, weight, bias):
        return batchnorm.batch_norm(x, None, None, weight, bias, training=True, mask=keep)

    assert torch.autograd.gradcheck(function, inputs)
    assert torch.autograd.gradgradcheck(function, inputs)


LAYERS = {
    "BatchNorm1d": (lambda **o: batchnorm.BatchNorm1d(3, **o), (4, 3, 7)),
    "BatchNorm2d": (lambda **o: batchnorm.BatchNorm2d(3, **o), (4, 3, 5, 4)),
    "BatchNorm3d": (lambda **o: batchnorm.BatchNorm3d(3, **o), (2, 3, 2, 3, 4)),
    "BatchNorm": (batchnorm.BatchNorm, (4, 3, 7)),
    "BatchNormAct1d": (lambda **o: batchnorm.BatchNormAct1d(3, activation=None, **o), (4, 3, 7)),
}


@pytest.mark.parametrize("momentum", [0.1, None])
@pytest.mark.parametrize(("make", "shape"), LAYERS.values(), ids=LAYERS)
def test_layers_take_it(make, shape, momentum):
    layer = make(momentum=momentum).double()
    x, keep, _, dy = problem(shape, 6, channels=1)
    ones, zeros = torch.ones(3, dtype=torch.float64), torch.zeros(3, dtype=torch.float64)
    share = 1.0 if momentum is None else momentum
    wanted = exact(x, keep.expand(shape), ones, zeros, zeros, ones, dy, momentum=share)
    layer(x[:1], mask=torch.zeros_like(keep[:1]))  # nothing: a batch that is not one
    assert getattr(layer, "norm", layer).num_batches_tracked == 0
    y = layer(x, mask=keep[:, 0])
    torch.testing.assert_close(y, wanted[0], rtol=1e-10, atol=1e-10)
    norm = getattr(layer, "norm", layer)
    torch.testing.assert_close(norm.running_mean, wanted[4], rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(norm.running_var, wanted[5], rtol=1e-10, atol=1e-10)
    before = copy.deepcopy(layer.state_dict())
    layer.eval()(x, mask=keep[:, 0])
    torch.testing.assert_close(layer.state_dict(), before, rtol=0, atol=0)


def test_a_layer_s_activation_gives_no_value_to_padding():
    layer = batchnorm.BatchNormAct1d(3, activation="sigmoid")
    x, keep, _, _ = problem((4, 3, 7), 6, channels=1)
    assert not layer(x.float(), mask=keep).masked_select(~keep).any()


@pytest.mark.parametrize("update", [True, False])
def test_a_frozen_layer_takes_it(update):
    layer = batchnorm.BatchNorm1d(3).double()
    x, keep, _, dy = problem((4, 3, 7), 7, channels=1)
    ones, zeros = torch.ones(3, dtype=torch.float64), torch.zeros(3, dtype=torch.float64)
    wanted = exact(x, keep.expand(x.shape), ones, zeros, zeros, ones, dy)
    batchnorm.freeze(layer, update=update)
    y = layer.train()(x, mask=keep)
    torch.testing.assert_close(y, x / (1 + 1e-5) ** 0.5 * keep)
    expected = wanted[4] if update else zeros
    torch.testing.assert_close(layer.running_mean, expected)


def test_recalibrate_and_summary_read_what_counts():
    class Padded(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm = batchnorm.BatchNorm1d(3).double()

        def forward(self, x, keep):
            return self.norm(x, mask=keep)

    model = Padded()
    x, keep, _, _ = problem((4, 3, 7), 8, channels=1)
    batchnorm.recalibrate(model, [{"x": x, "keep": keep[:, 0]}])
    packed = x.movedim(1, -1)[keep[:, 0]]
    torch.testing.assert_close(model.norm.running_mean, packed.mean(0))
    torch.testing.assert_close(model.norm.running_var, packed.var(0))
    assert batchnorm.summary(model, {"x": x, "keep": keep[:, 0]})
    per_channel = {"x": x, "keep": keep.expand(x.shape)}
    with pytest.raises(BatchNormError, match="a place for every channel"):
        batchnorm.recalibrate(model, [per_channel])
    with (
        batchnorm.masked(model, mask=keep[:, 0]),
        pytest.raises(BatchNormError, match="a mask or an axis of its own"),
    ):
        model(x, keep[:, 0])


def test_compiled_traced_and_mapped():
    layer, twin = batchnorm.BatchNorm1d(3), batchnorm.BatchNorm1d(3)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    for seed in (1, 2):  # other places, the same graph
        x, keep, _, _ = problem((4, 3, 7), seed, channels=1)
        x = x.float()
        torch.testing.assert_close(compiled(x, mask=keep), twin(x, mask=keep))
    torch.testing.assert_close(layer.running_var, twin.running_var)

    class Padded(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm = layer

        def forward(self, x, keep):
            return self.norm(x, mask=keep)

    traced = torch.fx.symbolic_trace(Padded().eval())
    torch.testing.assert_close(traced(x, keep), layer.eval()(x, mask=keep))
    batches = torch.randn(5, 4, 3, 7)
    mapped = vmap(lambda b: batchnorm.batch_norm(b, None, None, training=True, mask=keep))(batches)
    each = batchnorm.batch_norm(batches[3], None, None, training=True, mask=keep)
    torch.testing.assert_close(mapped[3], each)


def test_autocast_and_layouts():
    layer = batchnorm.BatchNorm2d(3)
    x, keep, _, _ = problem((4, 3, 6, 6), 9, channels=1)
    x = x.float()
    with torch.autocast("cpu", torch.bfloat16):
        assert layer(x.bfloat16(), mask=keep).dtype == torch.bfloat16
    assert layer.running_var.dtype == torch.float32
    last = x.contiguous(memory_format=torch.channels_last)
    y, z = layer(x, mask=keep), layer(last, mask=keep)
    torch.testing.assert_close(y, z)
    assert z.stride() == last.stride()
    every = torch.cat([x, x])[::2]
    torch.testing.assert_close(layer(every, mask=keep), layer(every.contiguous(), mask=keep))
    assert layer(x[:0], mask=keep[:0]).shape == (0, 3, 6, 6)


@pytest.mark.parametrize(
    "mask",
    [
        torch.ones(4, 7),  # no booleans
        torch.ones(7, dtype=torch.bool),  # right-aligned
        torch.ones(1, 7, dtype=torch.bool),
        torch.ones(4, 2, 7, dtype=torch.bool),
        torch.ones(4, 3, dtype=torch.bool),
        torch.ones(4, 7, 3, dtype=torch.bool),
    ],
)
def test_what_does_not_fit_is_refused(mask):
    with pytest.raises(BatchNormError, match=r"wants torch.bool, \(4, 7\), \(4, 1, 7\) or \(4, 3"):
        batchnorm.BatchNorm1d(3)(torch.randn(4, 3, 7), mask=mask)
