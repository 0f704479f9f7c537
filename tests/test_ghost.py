"""Ghost batch normalization beside groups that are normalized one by one, in float64."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import batchnorm
from batchnorm import BatchNormError, reference
from batchnorm.variants import ghost
from tolerance import assert_near

SHAPES = [(3,), (3, 7), (3, 5, 4), (3, 2, 3, 2)]  # behind the batch axis


def sizes_of(count, ghost_size):
    """The groups: as many as fit, and none smaller than another by more than one sample."""
    groups = max(1, count // ghost_size)
    return [count // groups + (place < count % groups) for place in range(groups)]


def oracle(x, ghost_size, weight, bias, running, momentum):
    """y, and the running mean and variance behind it; group by group, in float64."""
    outputs, means, squares, values, free = [], 0, 0, 0, 0
    for group in x.double().split(sizes_of(len(x), ghost_size)):
        y, mean, var_biased = reference.forward(group, weight, bias)
        outputs.append(y)
        count = group[:, 0].numel()
        means, squares = means + count * mean, squares + count * var_biased
        values, free = values + count, free + count - 1
    new = (means / values, squares / free)
    moved = [(1 - momentum) * old + momentum * each for old, each in zip(running, new, strict=True)]
    return torch.cat(outputs), *moved


def layer_and_state(ghost_size, dtype=torch.float32, **options):
    torch.manual_seed(0)
    layer = batchnorm.GhostBatchNorm(3, ghost_size=ghost_size, dtype=dtype, **options)
    for tensor in (*layer.parameters(), layer.running_mean, layer.running_var):
        tensor.data.uniform_(0.5, 2)
    state = [layer.weight, layer.bias, layer.running_mean, layer.running_var]
    return layer, [None if v is None else v.detach().double().clone() for v in state]


def compare(x, ghost_size, momentum=0.1):
    """Outputs, gradients and running statistics."""
    layer, (weight, bias, *running) = layer_and_state(ghost_size, x.dtype, momentum=momentum)
    weight.requires_grad_()
    bias.requires_grad_()
    x, twin = x.requires_grad_(), x.detach().double().requires_grad_()
    y = layer(x)
    exact, mean, var = oracle(twin, ghost_size, weight, bias, running, momentum)
    count = max(sizes_of(len(x), ghost_size)) * x[0, 0].numel()
    assert_near(y.detach(), exact.detach(), count, 10)
    dy = torch.randn_like(y)
    found = torch.autograd.grad(y, (x, layer.weight, layer.bias), dy)
    true = torch.autograd.grad(exact, (twin, weight, bias), dy.double())
    for mine, theirs in zip(found, true, strict=True):
        assert_near(mine, theirs, x[:, 0].numel(), 10 * max(1.0, float(theirs.abs().max())))
    assert_near(layer.running_mean, mean.detach(), x[:, 0].numel(), 10)
    assert_near(layer.running_var, var.detach(), x[:, 0].numel(), 10)


@pytest.mark.parametrize("behind", SHAPES)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize(("count", "ghost_size"), [(12, 4), (13, 4), (15, 4), (7, 4), (3, 4)])
def test_beside_the_groups_one_by_one(count, ghost_size, dtype, behind):
    torch.manual_seed(1)
    compare(torch.randn(count, *behind, dtype=dtype) * 2 + 1.5, ghost_size)


@pytest.mark.parametrize("large", [0, 2**30])
@pytest.mark.parametrize("last", [False, True])
def test_copied_into_channels_or_called_one_by_one(monkeypatch, large, last):
    """Both ways of computing it, in both memory formats."""
    monkeypatch.setitem(ghost.LARGE, "cpu", large)
    torch.manual_seed(1)
    x = torch.randn(23, 3, 5, 4) * 2 + 1.5
    compare(x.contiguous(memory_format=torch.channels_last) if last else x, 5)


def test_groups_far_from_zero_keep_their_digits():
    torch.manual_seed(1)
    x = torch.randn(16, 3, 4) + torch.arange(16).div(4, rounding_mode="floor")[:, None, None] * 1e3
    compare(x, 4)


@settings(deadline=None, max_examples=40)
@given(st.integers(2, 40), st.integers(2, 12), st.integers(0, 1000))
def test_no_sample_is_dropped_and_no_group_is_small(count, ghost_size, seed):
    """Each group has mean bias, variance weight² · var / (var + eps), and the sizes that the docstring promises."""
    x = torch.randn(count, 3, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    layer = batchnorm.GhostBatchNorm(3, eps=1e-12, ghost_size=ghost_size, dtype=torch.float64)
    y = layer(x)
    assert y.shape == x.shape
    sizes = sizes_of(count, ghost_size)
    assert max(sizes) - min(sizes) <= 1
    assert min(sizes) >= min(ghost_size, count)
    for group, part in zip(y.split(sizes), x.split(sizes), strict=True):
        mean, var = reference.moments(group)
        before = reference.moments(part)[1]  # two values may lie close together: eps counts
        torch.testing.assert_close(mean, torch.zeros_like(mean), rtol=0, atol=1e-7)
        torch.testing.assert_close(var, before / (before + 1e-12), rtol=0, atol=1e-6)


@settings(deadline=None, max_examples=20)
@given(st.integers(2, 31), st.integers(0, 1000))
def test_of_one_group_it_is_batch_normalization(count, seed):
    x = torch.randn(count, 3, 2, generator=torch.Generator().manual_seed(seed))
    layer, twin = batchnorm.GhostBatchNorm(3, ghost_size=16), batchnorm.BatchNorm(3)
    torch.testing.assert_close(layer(x), twin(x), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(layer.state_dict(), twin.state_dict(), rtol=1e-5, atol=1e-5)


def test_a_nan_spoils_its_own_group_alone():
    x = torch.randn(13, 3)
    x[0] = float("nan")
    y = batchnorm.GhostBatchNorm(3, ghost_size=4)(x)
    assert y[:5].isnan().all()
    assert y[5:].isfinite().all()


def test_the_average_over_all_batches():
    layer, twin = (cls(3, momentum=None) for cls in (batchnorm.GhostBatchNorm, batchnorm.BatchNorm))
    for _ in range(3):
        x = torch.randn(9, 3) + 5  # one group
        layer(x)
        twin(x)
    torch.testing.assert_close(layer.state_dict(), twin.state_dict())


def test_images_of_one_sample_a_group_are_instance_normalization():
    x = torch.randn(5, 3, 6, 6)
    y = batchnorm.GhostBatchNorm(3, ghost_size=1)(x)
    torch.testing.assert_close(y, torch.nn.functional.instance_norm(x), rtol=1e-5, atol=1e-5)


def test_errors_say_got_want_fix():
    with pytest.raises(BatchNormError, match="ghost_size=0 and wants 1 or more"):
        batchnorm.GhostBatchNorm(3, ghost_size=0)
    with pytest.raises(BatchNormError, match=r"one value per channel in a ghost batch.*Pass ghost"):
        batchnorm.GhostBatchNorm(3, ghost_size=1)(torch.randn(4, 3))


def test_a_mask_s_packed_values_have_no_groups():
    layer = torch.nn.Sequential(batchnorm.GhostBatchNorm(3, ghost_size=2))
    lengths = torch.tensor([4, 2, 3, 1])
    with (
        batchnorm.masked(layer, lengths) as masked,
        pytest.raises(BatchNormError, match="the layer 0 takes the statistics of groups"),
    ):
        masked(torch.randn(4, 3, 4))
    with batchnorm.masked(layer.eval(), lengths):
        assert layer(torch.randn(4, 3, 4)).shape == (4, 3, 4)
