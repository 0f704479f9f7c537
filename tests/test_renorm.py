"""Batch renormalization beside the real Keras's, and beside the paper's algorithm in NumPy."""

import os

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import batchnorm
from batchnorm import BatchNormError
from tolerance import assert_near, bound

os.environ["KERAS_BACKEND"] = "torch"
import keras

NO_SCHEDULE = {"warmup": 0, "r_steps": 0, "d_steps": 0}


class Paper:
    """Algorithm 1 of the paper in float64, for (M, C); r and d are constants in its gradient."""

    def __init__(self, mean, sigma, alpha, eps):
        self.mean, self.sigma, self.alpha, self.eps = mean, sigma, alpha, eps

    def step(self, x, dy, weight, bias, r_limit, d_limit):
        mean = x.mean(0)
        sigma = np.sqrt(self.eps + np.square(x - mean).mean(0))
        r = np.clip(sigma / self.sigma, 1 / r_limit, r_limit)
        d = np.clip((mean - self.mean) / self.sigma, -d_limit, d_limit)
        x_hat = (x - mean) / sigma
        y = weight * (x_hat * r + d) + bias
        g = dy * weight * r
        dx = (g - g.mean(0) - x_hat * (g * x_hat).mean(0)) / sigma
        self.mean = self.mean + self.alpha * (mean - self.mean)
        self.sigma = self.sigma + self.alpha * (sigma - self.sigma)
        return y, dx, (dy * (x_hat * r + d)).sum(0), dy.sum(0)


def layer_of(dtype=torch.float64, **options):
    torch.manual_seed(0)
    layer = batchnorm.RenormBatchNorm(3, eps=1e-3, dtype=dtype, **options)
    for tensor in (*layer.parameters(), layer.running_mean, layer.running_var):
        tensor.data.uniform_(0.5, 2)
    return layer


def batches(shape, count=4):
    """Whose means and deviations differ from each other, so that r and d are clipped in some."""
    values = np.random.default_rng(1)
    for _ in range(count):
        scale, shift = values.uniform(0.2, 3.0), values.uniform(-3.0, 3.0)
        yield values.normal(size=shape) * scale + shift, values.normal(size=shape)


@pytest.mark.parametrize("shape", [(8, 3), (5, 3, 7), (4, 3, 5, 3)])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize(("r_max", "d_max"), [(3.0, 5.0), (1.2, 0.3), (1.0, 0.0), (1e6, 1e6)])
def test_beside_the_paper_s_algorithm(shape, dtype, r_max, d_max):
    """Outputs, all gradients and the running statistics, step after step."""
    layer = layer_of(dtype, momentum=0.1, r_max=r_max, d_max=d_max, **NO_SCHEDULE)
    weight, bias, mean, var = (
        v.detach().double().numpy().copy()
        for v in (layer.weight, layer.bias, layer.running_mean, layer.running_var)
    )
    paper = Paper(mean, np.sqrt(var + 1e-3), 0.1, 1e-3)
    for batch, gradient in batches(shape):
        x = torch.from_numpy(batch).to(dtype).requires_grad_()
        dy = torch.from_numpy(gradient).to(dtype)
        y = layer(x)
        found = torch.autograd.grad(y, (x, layer.weight, layer.bias), dy)
        rows = [v.detach().double().movedim(1, -1).reshape(-1, 3).numpy() for v in (x, dy)]
        expected = paper.step(*rows, weight, bias, r_max, d_max)
        for mine, exact in zip((y.detach(), *found), expected, strict=True):
            flat = mine.movedim(1, -1).reshape(-1, 3) if mine.dim() > 1 else mine
            scale = 16 * max(1.0, float(np.abs(exact).max()))
            assert_near(flat, torch.from_numpy(exact), len(rows[0]), scale)
        assert_near(layer.running_mean, torch.from_numpy(paper.mean), len(rows[0]), 10)
        exact_var = torch.from_numpy(np.square(paper.sigma) - 1e-3)
        assert_near(layer.running_var, exact_var, len(rows[0]), 10)


@pytest.mark.parametrize("momentum", [0.01, 0.2])
def test_beside_the_real_keras(momentum):
    """Keras's rmin is 1 / r_max; its two momenta are one here, as in the paper."""
    theirs = keras.layers.BatchNormalization(
        epsilon=1e-3, momentum=1 - momentum, renorm=True, renorm_momentum=1 - momentum,
        renorm_clipping={"rmax": 1.5, "rmin": 1 / 1.5, "dmax": 0.5},
    )  # fmt: skip
    theirs.build((4, 5, 3, 3))
    ours = batchnorm.RenormBatchNorm(
        3, eps=1e-3, momentum=momentum, r_max=1.5, d_max=0.5, **NO_SCHEDULE
    )
    ours.running_var.fill_(1 - 1e-3)  # Keras's deviation starts at 1, eps within
    for seed, (batch, _) in enumerate(batches((4, 5, 3, 3), count=5)):
        x = torch.from_numpy(batch.astype(np.float32))
        y = theirs(x, training=True).detach().movedim(-1, 1)
        allowed = bound(torch.float32, 60, float(y.abs().max())) * (seed + 1)
        torch.testing.assert_close(ours(x.movedim(-1, 1)).detach(), y, rtol=0, atol=4 * allowed)
    near = {"rtol": 1e-5, "atol": 1e-5}
    torch.testing.assert_close(ours.running_mean, theirs.moving_mean.value.detach(), **near)
    torch.testing.assert_close(ours.running_var, theirs.moving_variance.value.detach(), **near)


def test_unclipped_training_is_evaluation():
    """y = (x − running mean) / σ: the batch has no part in it."""
    layer = layer_of(r_max=1e6, d_max=1e6, **NO_SCHEDULE)
    x = torch.randn(16, 3, 4, dtype=torch.float64) * 3 + 2
    expected = layer.eval()(x)
    torch.testing.assert_close(layer.train()(x), expected, rtol=1e-9, atol=1e-9)


def test_in_the_warm_up_it_is_batch_normalization():
    layer, twin = layer_of(warmup=3, r_steps=9, d_steps=9), batchnorm.BatchNorm(3, eps=1e-3)
    twin = twin.double()
    twin.load_state_dict(layer.state_dict())
    for step in range(5):
        x = torch.randn(8, 3, dtype=torch.float64) * 3 + 2
        same = torch.allclose(layer(x), twin(x), rtol=1e-9, atol=1e-9)
        assert same == (step <= 3)  # at 3 the limits are where they start


def test_the_paper_s_schedule_ends_at_its_limits():
    """1 and 0 for 5,000 batches, then linearly to 3 at 40,000 and to 5 at 25,000, never beyond."""
    layer = batchnorm.RenormBatchNorm(3)
    expected = {
        0: (1, 0), 5_000: (1, 0), 15_000: (1 + 2 * 10 / 35, 2.5), 22_500: (2, 4.375),
        25_000: (1 + 2 * 20 / 35, 5), 40_000: (3, 5), 1_000_000: (3, 5),
    }  # fmt: skip
    for seen, limits in expected.items():
        layer.num_batches_tracked.fill_(seen)
        assert [float(limit) for limit in layer.limits()] == pytest.approx(limits)


@settings(deadline=None, max_examples=50)
@given(st.integers(0, 100), st.integers(0, 100), st.integers(0, 100), st.integers(0, 400))
def test_limits_widen_and_stay(warmup, more_r, more_d, seen):
    layer = batchnorm.RenormBatchNorm(
        3, r_max=2.0, d_max=3.0, warmup=warmup, r_steps=warmup + more_r, d_steps=warmup + more_d
    )
    ends = []
    for at in (seen, seen + 1):
        layer.num_batches_tracked.fill_(at)
        ends.append([float(limit) for limit in layer.limits()])
    (r, d), (r_next, d_next) = ends
    assert 1 <= r <= r_next <= 2
    assert 0 <= d <= d_next <= 3


@pytest.mark.parametrize("shape", [(6, 3), (6, 3, 50)])
def test_there_is_no_bessel_factor_whatever_the_size(shape):
    """σ is the deviation that normalizes: of like batches r is 1, with or without space."""
    layer = layer_of(momentum=1.0, **NO_SCHEDULE)
    x = torch.randn(shape, dtype=torch.float64) * 2 + 1
    layer(x)
    axes = [axis for axis in range(x.dim()) if axis != 1]
    torch.testing.assert_close(layer.running_var, x.var(axes, correction=0))


def test_small_variances_keep_their_digits():
    """var = 1e-10 beside eps = 1e-3: σ² − eps as a difference would have none."""
    layer = batchnorm.RenormBatchNorm(3, eps=1e-3, momentum=1.0, **NO_SCHEDULE)
    layer.running_var.fill_(1e-10)
    x = torch.randn(64, 3) * 2e-5
    layer(x)
    torch.testing.assert_close(layer.running_var, x.var(0, correction=0), rtol=1e-4, atol=0)


def test_the_average_over_all_batches():
    layer = layer_of(momentum=None, **NO_SCHEDULE)
    data = [torch.from_numpy(batch) for batch, _ in batches((8, 3))]
    for batch in data:
        layer(batch)
    sigmas = torch.stack([(b.var(0, correction=0) + 1e-3).sqrt() for b in data])
    torch.testing.assert_close(
        layer.running_mean, torch.stack(data).mean((0, 1)), rtol=1e-6, atol=0
    )
    torch.testing.assert_close(
        (layer.running_var + 1e-3).sqrt(), sigmas.mean(0), rtol=1e-6, atol=1e-7
    )


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"r_max": 0.5}, "wants r_max from 1"),
        ({"d_max": float("inf")}, "both finite. For no limit pass a large number"),
        ({"warmup": 10, "r_steps": 5}, "0 <= warmup <= r_steps and d_steps"),
    ],
)
def test_limits_that_make_no_sense_are_said(options, message):
    with pytest.raises(BatchNormError, match=message):
        batchnorm.RenormBatchNorm(3, **options)


def test_without_statistics_it_says_so():
    layer = layer_of()
    layer.running_mean = None
    with pytest.raises(BatchNormError, match="it is about them"):
        layer(torch.randn(4, 3, dtype=torch.float64))
