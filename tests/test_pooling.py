"""pool=: a pooling of 2×2 windows in the same sweep, and torch's where the kernels do not pool."""

import copy
import pickle

import pytest
import torch
from torch import nn
from torch.func import functional_call, grad, vmap
from torch.nn import functional as F

import batchnorm
from batchnorm import BatchNormError
from batchnorm.kernels import native
from batchnorm.kernels.activations import ACTIVATIONS
from tolerance import bound

POOLS = {"avg": lambda y: F.avg_pool2d(y, 2), "max": lambda y: F.max_pool2d(y, 2)}
# odd sizes, a plane that is taken in several bands, a row that is longer than one, LeNet's
SHAPES = [(4, 3, 2, 2), (3, 3, 5, 7), (2, 3, 131, 70), (1, 3, 5, 5001), (32, 3, 10, 10)]


@pytest.fixture(params=["kernels", "torch"])
def backend(request, monkeypatch):
    """Both pool: the kernels, and torch where there are none."""
    if request.param == "torch":
        monkeypatch.setattr(native, "NATIVE", False)
    elif not native.NATIVE:
        pytest.fail("the kernels were not built")
    return request.param


def made(shape, dtype=torch.float32):
    """x, weight, bias and the running statistics, the same numbers whatever the dtype."""
    draw = torch.Generator().manual_seed(3)
    channels = shape[1]
    x = (torch.randn(shape, generator=draw) * 2 + 1).to(dtype).requires_grad_()
    weight = torch.linspace(0.5, 1.5, channels).to(dtype).requires_grad_()
    bias = torch.linspace(-0.5, 0.5, channels).to(dtype).requires_grad_()
    return x, weight, bias, torch.full((channels,), 0.5, dtype=dtype), torch.full_like(bias, 3.0)


def definition(x, weight, bias, mean, var, training, activation, pool):
    """By torch's operators, and dp: 0 where rounding may choose another maximum."""
    y = F.batch_norm(x, mean, var, weight, bias, training)
    y = y if activation is None else ACTIVATIONS[activation](y)
    p = POOLS[pool](y)
    windows = y[..., : p.shape[2] * 2, : p.shape[3] * 2].unfold(2, 2, 2).unfold(3, 2, 2)
    first, second = windows.flatten(-2).topk(2).values.unbind(-1)
    dp = torch.linspace(-1, 2, p.numel(), dtype=p.dtype).view_as(p)
    return p, dp if pool == "avg" else torch.where(first - second > 1e-4, dp, 0.0)


@pytest.mark.usefixtures("backend")
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("pool", POOLS)
@pytest.mark.parametrize("activation", [None, *ACTIVATIONS])
@pytest.mark.parametrize("shape", SHAPES)
def test_it_is_the_norm_the_activation_then_the_pooling(shape, activation, pool, training):
    *inputs, mean, var = made(shape)
    *exact, exact_mean, exact_var = made(shape, torch.float64)
    p, dp = definition(*exact, exact_mean, exact_var, training, activation, pool)
    wanted = torch.autograd.grad(p, exact, dp)
    mine = batchnorm.batch_norm(
        inputs[0], mean, var, *inputs[1:], training=training, activation=activation, pool=pool
    )
    found = torch.autograd.grad(mine, inputs, dp.float())
    count = inputs[0].numel() // 3
    allowed = bound(torch.float32, count, 8.0)
    torch.testing.assert_close(mine.double(), p, rtol=0, atol=allowed)
    torch.testing.assert_close(found[0].double(), wanted[0], rtol=0, atol=4 * allowed)
    for parameter, other in zip(found[1:], wanted[1:], strict=True):
        torch.testing.assert_close(parameter.double(), other, rtol=1e-5, atol=count**0.5 * allowed)
    torch.testing.assert_close(mean.double(), exact_mean, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(var.double(), exact_var, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("width", [2, 9, 33, 34])
def test_of_equals_and_of_nan_the_maximum_is_torch_s(width):
    draw = torch.Generator().manual_seed(0)
    x = torch.randint(3, (4, 2, 7, width), generator=draw).float()
    for value in (float("nan"), float("inf"), -float("inf")):
        x[torch.rand(x.shape, generator=draw) < 0.3] = value
    statistics = torch.zeros(2), torch.ones(2)
    y, _, winners = native.forward(
        x, *statistics, None, None, False, 0.0, 0.0, None, None, False, "max"
    )
    expected, where = F.max_pool2d(x, 2, return_indices=True)
    assert expected.isnan().any()
    torch.testing.assert_close(y, expected, rtol=0, atol=0, equal_nan=True)
    row, column = where // width, where % width
    assert torch.equal(winners, (row % 2 * 2 + column % 2).to(torch.uint8))


@pytest.mark.parametrize("width", [2, 9, 33, 34])
@pytest.mark.parametrize("pool", POOLS)
def test_of_equals_one_gets_the_gradient(pool, width):
    x = torch.randint(3, (4, 2, 7, width), generator=torch.Generator().manual_seed(0)).float()
    x.requires_grad_()
    y = batchnorm.BatchNormAct2d(2, activation=None, pool=pool).eval()(x)
    expected = POOLS[pool](batchnorm.BatchNorm2d(2).eval()(x))
    assert torch.equal(y, expected)
    dp = torch.linspace(1, 2, y.numel()).view_as(y)
    (dx,), (other,) = torch.autograd.grad(y, x, dp), torch.autograd.grad(expected, x, dp)
    torch.testing.assert_close(dx, other, rtol=1e-6, atol=0)
    assert int((dx != 0).sum()) == y.numel() * (4 if pool == "avg" else 1)


def test_what_is_in_no_window_counts_for_the_statistics_alone():
    layer = batchnorm.BatchNormAct2d(1, activation=None, pool="avg")
    x = torch.zeros(1, 1, 3, 3)
    x[..., 2] = 3.0
    x.requires_grad_()
    y = layer(x)
    std = (2 + 1e-5) ** 0.5  # mean 1, variance 2
    torch.testing.assert_close(y, torch.full((1, 1, 1, 1), -1 / std))
    (dx,) = torch.autograd.grad(y.sum(), x)
    # g = 1/4 in four places, Σ g = 1, Σ g·(x − 1) = −1: dx = (g − 1/9 + (x − 1)/2/9) / std
    expected = (torch.full((3, 3), 0.0) - 1 / 9 + (x.detach()[0, 0] - 1) / 18) / std
    expected[:2, :2] += 0.25 / std
    torch.testing.assert_close(dx[0, 0], expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    "needed", [(True, False, False), (False, True, False), (False, True, True)]
)
@pytest.mark.parametrize("pool", POOLS)
def test_only_the_gradients_that_are_needed(pool, needed):
    *inputs, mean, var = made((3, 3, 5, 7))
    y = batchnorm.batch_norm(inputs[0], mean, var, *inputs[1:], training=True, pool=pool)
    dp = torch.linspace(-1, 2, y.numel()).view_as(y)
    whole = torch.autograd.grad(y, inputs, dp)
    some = [v.detach().requires_grad_(need) for v, need in zip(inputs, needed, strict=True)]
    batchnorm.batch_norm(some[0], mean, var, *some[1:], training=True, pool=pool).backward(dp)
    for value, gradient, need in zip(some, whole, needed, strict=True):
        assert torch.equal(value.grad, gradient) if need else value.grad is None


@pytest.mark.parametrize("pool", POOLS)
def test_products_beyond_float_s_range(pool):
    x = torch.full((2, 1, 4, 4), 1e25, requires_grad=True)
    weight = torch.ones(1, requires_grad=True)
    statistics = torch.zeros(1), torch.full((1,), 1e36)
    y = batchnorm.batch_norm(x, *statistics, weight, None, pool=pool)
    y.backward(torch.full_like(y, 1e20))
    # eight windows, Σ g·x·invstd = 8 · 1e20 · 1e25 / 1e18
    torch.testing.assert_close(weight.grad, torch.full((1,), 8e27), rtol=1e-5, atol=0)


@pytest.mark.parametrize("pool", POOLS)
def test_what_is_behind_the_last_element_is_not_summed(pool):
    x = torch.full((2, 1, 2, 2), 3e38)  # 0 in a vector's lanes behind it, where z is −∞ and g NaN
    bias = torch.ones(1, requires_grad=True)
    statistics = torch.full((1,), 3e38), torch.full((1,), 1e-4)
    y = batchnorm.batch_norm(x, *statistics, None, bias, activation="silu", pool=pool)
    y.sum().backward()
    sigmoid = torch.tensor([1.0]).sigmoid()
    torch.testing.assert_close(bias.grad, 2 * sigmoid * (2 - sigmoid), rtol=1e-5, atol=0)


@pytest.mark.parametrize("pool", POOLS)
def test_threads_make_no_difference_beyond_rounding(pool):
    before, found = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 2):
            torch.set_num_threads(threads)
            *inputs, mean, var = made((8, 3, 70, 41))
            y = batchnorm.batch_norm(inputs[0], mean, var, *inputs[1:], training=True, pool=pool)
            found.append([y, *torch.autograd.grad(y.sin().sum(), inputs)])
    finally:
        torch.set_num_threads(before)
    torch.testing.assert_close(found[0], found[1], rtol=1e-5, atol=1e-5)
    assert all(map(torch.equal, found[1], found[2]))


@pytest.mark.parametrize(
    ("pool", "activation", "kept"),
    [("avg", "sigmoid", []), ("max", "tanh", [(torch.uint8, 8 * 3 * 16)]), ("avg", "gelu", [])],
)
def test_for_backward_are_kept_x_and_a_byte_a_window(pool, activation, kept):
    *inputs, _, _ = made((8, 3, 8, 8))
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        batchnorm.batch_norm(
            inputs[0], None, None, *inputs[1:], training=True, activation=activation, pool=pool
        )
    large = [t for t in saved if t.numel() > 9]  # more than the statistics
    assert large[0].data_ptr() == inputs[0].data_ptr()
    assert [(t.dtype, t.numel()) for t in large[1:]] == kept


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("pool", POOLS)
@pytest.mark.parametrize("activation", [None, "sigmoid", "silu"])
def test_double_backward(activation, pool, training):
    shape, results = (3, 3, 4, 5), []
    for dtype in (torch.float32, torch.float64):
        *inputs, mean, var = made(shape, dtype)
        y = batchnorm.batch_norm(
            inputs[0], mean, var, *inputs[1:], training=training, activation=activation, pool=pool
        )
        gradients = torch.autograd.grad(y.square().sum(), inputs, create_graph=True)
        total = sum(g.square().sum() for g in gradients)
        results.append([t.double() for t in torch.autograd.grad(total, inputs)])
    torch.testing.assert_close(*results, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("pool", POOLS)
def test_gradcheck(pool):
    *inputs, _, _ = made((3, 2, 4, 5), torch.float64)

    def call(x, weight, bias):
        return batchnorm.batch_norm(
            x, None, None, weight, bias, training=True, activation="sigmoid", pool=pool
        )

    assert torch.autograd.gradcheck(call, inputs)
    assert torch.autograd.gradgradcheck(call, inputs)


OTHERS = {
    "channels last": lambda x: x.contiguous(memory_format=torch.channels_last),
    "float64": lambda x: x.double(),
    "bfloat16": lambda x: x.bfloat16(),
    "a slice": lambda x: x[:, :, ::2],
    "empty": lambda x: x[:0],
}


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("pool", POOLS)
@pytest.mark.parametrize("other", OTHERS)
def test_what_the_kernels_do_not_pool_torch_pools(other, pool, training):
    layer = batchnorm.BatchNormAct2d(3, activation="silu", pool=pool).train(training)
    plain = batchnorm.BatchNormAct2d(3, activation="silu").train(training)
    if other == "float64":
        layer, plain = layer.double(), plain.double()
    x = OTHERS[other](torch.randn(4, 3, 9, 8)).detach().requires_grad_()
    twin = x.detach().clone().requires_grad_()
    y, expected = layer(x), POOLS[pool](plain(twin))
    assert y.stride() == expected.stride()
    torch.testing.assert_close(y, expected, rtol=1e-6, atol=1e-6, equal_nan=True)
    y.sum().backward()
    expected.sum().backward()
    torch.testing.assert_close(x.grad, twin.grad, rtol=1e-5, atol=1e-6)


def test_a_residual_and_a_mask():
    x, residual = torch.randn(4, 3, 6, 6), torch.randn(4, 3, 6, 6)
    mask = torch.rand(4, 6, 6) < 0.7
    layer = batchnorm.BatchNormAct2d(3, pool="max")
    plain = batchnorm.BatchNormAct2d(3)
    expected = POOLS["max"](plain(x, residual))
    torch.testing.assert_close(layer(x, residual), expected)
    expected = POOLS["max"](plain(x, mask=mask))
    torch.testing.assert_close(layer(x, mask=mask), expected)
    y = batchnorm.batch_norm(x, None, None, training=True, mask=mask, activation="relu", pool="max")
    torch.testing.assert_close(y, expected)


@pytest.mark.parametrize("pool", POOLS)
def test_traced_compiled_and_transformed_it_is_torch_s(pool):
    layer = batchnorm.BatchNormAct2d(3, activation="sigmoid", pool=pool).eval()
    x = torch.randn(4, 3, 6, 6)
    expected = layer(x)
    exported = torch.export.export(layer, (x,))
    names = {str(node.target) for node in exported.graph.nodes}
    assert any(f"{pool}_pool2d" in name for name in names), names
    torch.testing.assert_close(exported.module()(x), expected)
    compiled = torch.compile(layer, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(x), expected)

    def loss(parameters, sample):
        return functional_call(layer, parameters, (sample[None],)).square().sum()

    parameters = {name: value.detach() for name, value in layer.named_parameters()}
    each = vmap(grad(loss), in_dims=(None, 0))(parameters, x)
    layer(x).square().sum().backward()
    for name, value in layer.named_parameters():
        torch.testing.assert_close(each[name].sum(0), value.grad, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "change",
    [
        nn.SyncBatchNorm.convert_sync_batchnorm,
        lambda model: batchnorm.convert(model, to="torch"),
        lambda model: batchnorm.convert(model, to="sync"),
        batchnorm.fold,
        copy.deepcopy,
        lambda model: pickle.loads(pickle.dumps(model)),
    ],
)
def test_what_is_done_to_the_norm_leaves_the_pooling(change):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 4, 3), batchnorm.BatchNormAct2d(4, pool="max"))
    model(torch.randn(8, 3, 8, 8) + 2)
    x = torch.randn(4, 3, 8, 8)
    expected = model.eval()(x)
    assert expected.shape == (4, 4, 3, 3)
    torch.testing.assert_close(
        change(copy.deepcopy(model)).eval()(x), expected, rtol=1e-4, atol=1e-5
    )


def test_state_and_looks():
    layer = batchnorm.BatchNormAct2d(4, pool="avg")
    layer.load_state_dict(nn.BatchNorm2d(4).state_dict())
    layer.load_state_dict(batchnorm.BatchNormAct2d(4).state_dict())
    assert "activation='relu', pool='avg'" in repr(layer)
    assert "pool" not in repr(batchnorm.BatchNormAct2d(4))
    for momentum in (0.1, None):
        layer = batchnorm.BatchNormAct2d(4, momentum=momentum, pool="avg")
        x = torch.randn(3, 4, 4, 4)
        expected = POOLS["avg"](batchnorm.BatchNormAct2d(4, momentum=momentum)(x))
        torch.testing.assert_close(layer(x), expected)
        assert int(layer.norm.num_batches_tracked) == 1


def test_what_it_does_not_take_is_said():
    with pytest.raises(BatchNormError, match=r"got pool='median' and wants None, or, .* avg, max"):
        batchnorm.BatchNormAct2d(4, pool="median")
    with pytest.raises(BatchNormError, match="BatchNormAct1d got pool='avg'"):
        batchnorm.BatchNormAct1d(4, pool="avg")
    x = torch.randn(4, 3, 6, 6)
    with pytest.raises(BatchNormError, match="pool='median' and wants one of avg, max"):
        batchnorm.batch_norm(x, None, None, training=True, pool="median")
    for wrong, axis in ((x[:, :, :1], 1), (x[..., 0], 1), (x, -1)):
        with pytest.raises(BatchNormError, match="H and W 2 or more, with axis=1"):
            batchnorm.batch_norm(wrong, None, None, training=True, pool="avg", axis=axis)
    with pytest.raises(BatchNormError, match="with axis=1"):
        batchnorm.BatchNormAct2d(6, pool="avg")(x, axis=-1)


def test_the_binding_checks_sizes_before_it_reads():
    x, p = torch.zeros(1, 1, 4, 4), torch.zeros(1, 1, 2, 2)

    def call(plane=16, width=4, pool=1, dtype=0, rows=False, winner=0):
        native._cpu.forward(
            dtype, rows, 1, 1, plane, 1, x.data_ptr(), 0, p.data_ptr(), 0, 0, 0, 0, 0, 0, 0, True,
            0.1, 1e-5, 0, pool, width, winner,
        )  # fmt: skip

    call()
    for wrong in (
        {"width": 3}, {"width": 0}, {"width": 1}, {"width": 16}, {"pool": 3}, {"pool": -1},
        {"pool": 2}, {"dtype": 1}, {"rows": True, "plane": 1},
    ):  # fmt: skip
        with pytest.raises(ValueError, match=r"pool|plane|maxima"):
            call(**wrong)
