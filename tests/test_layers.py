"""The layers beside the float64 reference and beside torch.nn's, in every mode."""

import copy
import io
import pickle

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.testing._internal.common_modules import module_db

import batchnorm
from batchnorm import BatchNormError, reference
from tolerance import assert_near

PAIRS = [
    (batchnorm.BatchNorm1d, nn.BatchNorm1d, (8, 5)),
    (batchnorm.BatchNorm1d, nn.BatchNorm1d, (8, 5, 7)),
    (batchnorm.BatchNorm2d, nn.BatchNorm2d, (4, 5, 3, 6)),
    (batchnorm.BatchNorm3d, nn.BatchNorm3d, (2, 5, 3, 2, 4)),
]
OPTIONS = [
    {},
    {"affine": False},
    {"bias": False},
    {"track_running_stats": False},
    {"momentum": None},
    {"momentum": 0.3, "eps": 1e-2},
]


def randomized(layer: nn.Module) -> nn.Module:
    generator = torch.Generator().manual_seed(3)
    for tensor in (*layer.parameters(), *layer.buffers()):
        if tensor.is_floating_point():
            tensor.data.copy_(torch.rand(tensor.shape, generator=generator) + 0.5)
    return layer


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize(("ours", "theirs", "shape"), PAIRS)
def test_same_numbers_as_torch(ours, theirs, shape, options, training):
    torch.manual_seed(0)
    mine, twin = randomized(ours(shape[1], **options)), randomized(theirs(shape[1], **options))
    mine.train(training)
    twin.train(training)
    for _ in range(3):
        x = torch.randn(shape, requires_grad=True)
        x_twin = x.detach().clone().requires_grad_()
        y, y_twin = mine(x), twin(x_twin)
        torch.testing.assert_close(y, y_twin, rtol=1e-6, atol=1e-6)
        dy = torch.randn_like(y)
        y.backward(dy)
        y_twin.backward(dy)
        torch.testing.assert_close(x.grad, x_twin.grad, rtol=1e-6, atol=1e-6)
    for name, value in mine.state_dict().items():
        torch.testing.assert_close(value, twin.state_dict()[name], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("shape", [(16, 3), (4, 3, 9), (4, 3, 5, 7), (2, 3, 4, 3, 5)])
@pytest.mark.parametrize("std", [2.0, 1e-3])  # a variance far above eps, and one far below
def test_training_beside_the_reference(shape, dtype, std):
    torch.manual_seed(1)
    layer = randomized(batchnorm.BatchNorm(3)).to(dtype)
    before = layer.running_mean.double().clone(), layer.running_var.double().clone()
    x = ((torch.randn(shape, dtype=dtype) + 1.5) * std).requires_grad_()
    weight, bias = layer.weight.detach().double(), layer.bias.detach().double()
    y = layer(x)
    dy = torch.randn_like(y)
    y.backward(dy)
    exact, mean, var = reference.forward(x.detach().double(), weight, bias)
    dx, dweight, dbias = reference.backward(dy.double(), x.detach().double(), weight)
    count = x.numel() // 3
    assert_near(y, exact, count, 10)
    assert_near(x.grad, dx, count, 10 * max(1.0, dx.abs().max().item()))
    assert_near(layer.weight.grad, dweight, count, count**0.5 * 4)
    assert_near(layer.bias.grad, dbias, count, count**0.5 * 4)
    new_mean, new_var = reference.update_running(*before, mean, var, count, 0.1)
    assert_near(layer.running_mean, new_mean, count)
    assert_near(layer.running_var, new_var, count)


def test_the_reference_is_its_own_derivative():
    x = torch.randn(6, 3, 4, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(3, dtype=torch.float64, requires_grad=True)
    bias = torch.randn(3, dtype=torch.float64, requires_grad=True)
    dy = torch.randn(6, 3, 4, dtype=torch.float64)
    y, _, _ = reference.forward(x, weight, bias)
    by_autograd = torch.autograd.grad(y, (x, weight, bias), dy)
    for ours, exact in zip(reference.backward(dy, x, weight), by_autograd, strict=True):
        torch.testing.assert_close(ours.detach(), exact, rtol=1e-10, atol=1e-12)
    mean, var = torch.randn(3, dtype=torch.float64), torch.rand(3, dtype=torch.float64)
    y = reference.normalize(x, mean, var, weight, bias)
    by_autograd = torch.autograd.grad(y, (x, weight, bias), dy)
    found = reference.backward_evaluation(dy, x, mean, var, weight)
    for ours, exact in zip(found, by_autograd, strict=True):
        torch.testing.assert_close(ours.detach(), exact, rtol=1e-10, atol=1e-12)


def test_the_reference_keeps_its_digits_far_from_zero():
    """|mean| = 10⁷ std: of two passes six digits are left, of E[x²]−E[x]² none."""
    x = torch.randn(64, 3, generator=torch.Generator().manual_seed(4), dtype=torch.float64)
    near, far = reference.moments(x), reference.moments(x + 1e7)
    torch.testing.assert_close(far[1], near[1], rtol=1e-6, atol=0)


def test_gradcheck_and_double_backward():
    layer = randomized(batchnorm.BatchNorm2d(2)).double()
    x = torch.randn(3, 2, 2, 2, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(layer, x)
    assert torch.autograd.gradgradcheck(layer, x)


shapes = st.tuples(st.integers(2, 5), st.integers(1, 4), st.integers(1, 5), st.integers(1, 5))


@settings(deadline=None, max_examples=50)
@given(shapes, st.integers(0, 1000))
def test_a_pixel_is_a_sample(shape, seed):
    x = torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    y = batchnorm.batch_norm(x, None, None, training=True)
    rows = x.movedim(1, -1).reshape(-1, shape[1])
    z = batchnorm.batch_norm(rows, None, None, training=True)
    torch.testing.assert_close(y.movedim(1, -1).reshape(-1, shape[1]), z, rtol=1e-10, atol=1e-10)


@settings(deadline=None, max_examples=50)
@given(st.floats(0.1, 100), st.integers(0, 1000))
def test_a_scale_is_forgotten_up_to_eps(scale, seed):
    x = torch.randn(16, 3, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    y = batchnorm.batch_norm(x * scale, None, None, training=True, eps=1e-5 * scale**2)
    torch.testing.assert_close(
        y, batchnorm.batch_norm(x, None, None, training=True), rtol=1e-9, atol=1e-9
    )


@settings(deadline=None, max_examples=50)
@given(shapes, st.floats(-3, 3), st.floats(-3, 3), st.integers(0, 1000))
def test_output_mean_is_the_bias_and_variance_the_weights(shape, weight, bias, seed):
    x = torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    weights = torch.full((shape[1],), weight, dtype=torch.float64)
    biases = torch.full((shape[1],), bias, dtype=torch.float64)
    y = batchnorm.batch_norm(x, None, None, weights, biases, training=True)
    mean, var = reference.moments(y)
    _, var_in = reference.moments(x)
    torch.testing.assert_close(mean, biases, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(var, weight**2 * var_in / (var_in + 1e-5), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(
    "info",
    [i for i in module_db if i.module_cls in (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)],
    ids=lambda info: info.name,
)
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_torchs_own_module_samples(info, dtype, training):
    ours = getattr(batchnorm, info.module_cls.__name__)
    arguments = {"device": "cpu", "dtype": dtype, "requires_grad": True, "training": training}
    for sample in info.module_inputs_func(info, **arguments):
        built = sample.constructor_input
        mine = ours(*built.args, **built.kwargs).to(dtype).train(training)
        twin = info.module_cls(*built.args, **built.kwargs).to(dtype).train(training)
        x = sample.forward_input.args[0]
        torch.testing.assert_close(mine(x), twin(x))
        torch.testing.assert_close(mine.state_dict(), twin.state_dict())
    for error in info.module_error_inputs_func(info, **arguments):
        built = error.module_error_input.constructor_input
        layer = ours(*built.args, **built.kwargs)
        with pytest.raises(error.error_type, match=error.error_regex):
            layer(error.module_error_input.forward_input.args[0])


def test_an_average_over_batches_keeps_the_digits_of_float64():
    layer, twin = (
        cls(3, momentum=None, dtype=torch.float64)
        for cls in (batchnorm.BatchNorm1d, nn.BatchNorm1d)
    )
    for _ in range(7):
        x = torch.randn(9, 3, dtype=torch.float64) + 5
        layer(x)
        twin(x)
    torch.testing.assert_close(layer.running_mean, twin.running_mean, rtol=1e-14, atol=0)
    torch.testing.assert_close(layer.running_var, twin.running_var, rtol=1e-14, atol=0)


@pytest.mark.parametrize(("ours", "theirs", "shape"), PAIRS)
def test_state_dicts_go_both_ways_and_old_ones_load(ours, theirs, shape):
    mine, twin = ours(shape[1]), randomized(theirs(shape[1]))
    assert isinstance(mine, theirs)
    mine.load_state_dict(twin.state_dict())
    twin.load_state_dict(mine.state_dict())
    old = {k: v for k, v in twin.state_dict().items() if k != "num_batches_tracked"}
    mine.load_state_dict(dict(old))
    assert mine.num_batches_tracked.item() == 0


class Own(batchnorm.BatchNorm):
    """Somebody's subclass."""


class TestWithoutASize:
    def test_it_learns_it_at_the_first_batch(self):
        layer = batchnorm.BatchNorm()
        assert "size learned at the first batch" in repr(layer)
        with pytest.raises(RuntimeError, match="Call `forward`"):
            _ = layer.weight.shape
        x = torch.randn(4, 3, 5)
        y = layer(x)
        assert type(layer) is batchnorm.BatchNorm
        assert layer.num_features == 3
        torch.testing.assert_close(y, batchnorm.BatchNorm(3)(x))

    @pytest.mark.parametrize("twin", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
    def test_copies_learn_for_themselves(self, twin):
        layer = batchnorm.BatchNorm(eps=1e-2)
        other = twin(layer)
        layer(torch.randn(4, 3))
        other(torch.randn(4, 6, 2))
        assert (layer.num_features, other.num_features, other.eps) == (3, 6, 1e-2)
        again = twin(layer)
        assert again(torch.randn(4, 3)).shape == (4, 3)

    def test_a_subclass_stays_itself(self):
        layer = Own()
        assert isinstance(layer, Own)
        other = pickle.loads(pickle.dumps(layer))
        layer(torch.randn(4, 3))
        assert type(layer) is Own
        assert type(copy.deepcopy(other)) is type(other)
        other(torch.randn(4, 5))
        assert (type(other), other.num_features) == (Own, 5)

    def test_a_state_dict_gives_the_size(self):
        layer = batchnorm.BatchNorm().eval()
        layer.load_state_dict(randomized(batchnorm.BatchNorm(3)).state_dict())
        layer(torch.randn(2, 3))
        assert layer.num_features == 3


@pytest.mark.parametrize("momentum", [0.1, None])
def test_compiles_into_one_graph(momentum):
    layer, twin = (batchnorm.BatchNorm2d(3, momentum=momentum) for _ in range(2))
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    for _ in range(2):
        x = torch.randn(2, 3, 4, 4)
        torch.testing.assert_close(compiled(x), twin(x))
    torch.testing.assert_close(layer.running_var, twin.running_var)


def test_export_and_tracing_see_torchs_layer():
    model = nn.Sequential(batchnorm.BatchNorm2d(3)).eval()
    exported = torch.export.export(model, (torch.randn(2, 3, 4, 4),))
    assert "aten.batch_norm.default" in str(exported.graph)
    nodes = torch.fx.symbolic_trace(model).graph.nodes
    assert [node.target for node in nodes if node.op == "call_module"] == ["0"]


def test_torchscript_is_refused():
    with (
        pytest.warns(FutureWarning, match="deprecated"),
        pytest.raises(BatchNormError, match="cannot be compiled by TorchScript"),
    ):
        torch.jit.script(batchnorm.BatchNorm2d(3))


def test_pickle_and_torch_save():
    layer = randomized(batchnorm.BatchNorm2d(3))
    buffer = io.BytesIO()
    torch.save(layer, buffer)
    buffer.seek(0)
    twin = torch.load(buffer, weights_only=False)
    assert type(twin) is batchnorm.BatchNorm2d
    torch.testing.assert_close(twin.state_dict(), layer.state_dict())


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda: batchnorm.BatchNorm2d(8)(torch.rand(4, 3, 5, 5)),
            "got 3 channels .* num_features=3",
        ),
        (lambda: batchnorm.BatchNorm2d(8)(torch.rand(4, 8)), "expected 4D input .got 2D input"),
        (
            lambda: batchnorm.BatchNorm1d(8)(torch.rand(1, 8)),
            "Expected more than 1 value per channel",
        ),
        (lambda: batchnorm.BatchNorm(8)(torch.rand(8)), "expected 2D or more input"),
        (lambda: batchnorm.batch_norm(torch.rand(4, 3), None, None), "training=False without"),
        (
            lambda: batchnorm.batch_norm(torch.ones(4, 3).long(), None, None, training=True),
            "floating",
        ),
    ],
)
@pytest.mark.parametrize("kind", [ValueError, RuntimeError, BatchNormError])
def test_errors_say_got_want_fix(call, message, kind):
    with pytest.raises(kind, match=message):
        call()


def test_an_error_leaves_the_counter_alone():
    layer = batchnorm.BatchNorm1d(3)
    with pytest.raises(BatchNormError):
        layer(torch.rand(1, 3))
    assert layer.num_batches_tracked.item() == 0
