"""Running statistics by other estimators, beside sums written out in float64."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import batchnorm
from batchnorm import BatchNormError, reference
from tolerance import assert_near


def batches(count, shape=(6, 3, 4)):
    generator = torch.Generator().manual_seed(2)
    return [torch.randn(shape, generator=generator, dtype=torch.float64) + i for i in range(count)]


def averaged(values, average, momentum, start):
    """The definition of each average, over the values of all batches."""
    if average == "cumulative":
        return sum(values) / len(values)
    faded = 1 - momentum
    weights = [momentum * faded ** (len(values) - 1 - place) for place in range(len(values))]
    total = sum(w * v for w, v in zip(weights, values, strict=True))
    if average == "debiased":
        return total / (1 - faded ** len(values))
    return total + faded ** len(values) * start


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("unbiased", [True, False])
@pytest.mark.parametrize("average", ["exponential", "debiased", "cumulative"])
@pytest.mark.parametrize("momentum", [0.1, 1e-3, 1.0])
def test_beside_the_definition(average, unbiased, momentum, dtype):
    layer = batchnorm.EstimatorBatchNorm(
        3, momentum=momentum, unbiased=unbiased, average=average, dtype=dtype
    )
    data = batches(5)
    for batch in data:
        y = layer(batch.to(dtype))
        assert_near(y.detach(), reference.forward(batch)[0], 24, 10)
    factor = 24 / 23 if unbiased else 1.0
    means, variances = zip(*(reference.moments(batch) for batch in data), strict=True)
    exact = averaged(means, average, momentum, 0.0)
    assert_near(layer.running_mean, exact, 24 * 5, 10)
    exact = averaged([v * factor for v in variances], average, momentum, 1.0)
    assert_near(layer.running_var, exact, 24 * 5, 10)


@settings(deadline=None, max_examples=30)
@given(st.floats(0.01, 1.0), st.integers(1, 6))
def test_a_debiased_average_forgets_where_it_started(momentum, count):
    layers = [
        batchnorm.EstimatorBatchNorm(3, momentum=momentum, average="debiased", dtype=torch.float64)
        for _ in range(2)
    ]
    layers[0].running_mean.fill_(100)
    layers[0].running_var.fill_(50)
    for batch in batches(count):
        for layer in layers:
            layer(batch)
    torch.testing.assert_close(layers[0].state_dict(), layers[1].state_dict(), rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize(
    ("ours", "theirs"), [({}, {}), ({"average": "cumulative"}, {"momentum": None})]
)
def test_with_torch_s_choices_it_is_torch_s_layer(ours, theirs):
    layer, twin = batchnorm.EstimatorBatchNorm(3, **ours), torch.nn.BatchNorm1d(3, **theirs)
    for batch in batches(4):
        torch.testing.assert_close(layer(batch.float()), twin(batch.float()), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(layer.state_dict(), twin.state_dict(), rtol=1e-5, atol=1e-6)


def test_a_small_momentum_keeps_its_digits():
    """1 − (1 − 1e-6) in float32 has one digit."""
    layer = batchnorm.EstimatorBatchNorm(3, momentum=1e-6, average="debiased")
    data = batches(2)
    for batch in data:
        layer(batch.float())
    exact = torch.stack([batch.mean((0, 2)) for batch in data]).mean(0)
    torch.testing.assert_close(layer.running_mean.double(), exact, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"average": "median"}, "got average='median' and wants one of exponential, debiased"),
        ({"momentum": None}, "momentum=None with average='exponential'"),
    ],
)
def test_errors_say_got_want_fix(options, message):
    with pytest.raises(BatchNormError, match=message):
        batchnorm.EstimatorBatchNorm(3, **options)
