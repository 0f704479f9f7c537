"""axis=: the channels anywhere, beside the same with the channels moved by hand."""

import copy
import pickle

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import batchnorm
from batchnorm import BatchNormError, reference
from batchnorm.variants.along import BatchNormAlong
from tolerance import assert_near


def exact(x, axis, weight, bias, dy):
    """By the float64 reference, on channels that were moved to axis 1 and copied there."""
    moved, dmoved = (t.double().movedim(axis, 1).contiguous() for t in (x, dy))
    y, mean, var = reference.forward(moved, weight.double(), bias.double())
    dx, dweight, dbias = reference.backward(dmoved, moved, weight.double())
    return y.movedim(1, axis), dx.movedim(1, axis), dweight, dbias, mean, var


def problem(shape, axis, seed=0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    x, dy = (torch.randn(shape, generator=generator, dtype=torch.float64) for _ in range(2))
    wide = torch.promote_types(dtype, torch.float32)
    weight, bias = (torch.rand(shape[axis], generator=generator).to(wide) for _ in range(2))
    return x.to(dtype), dy.to(dtype), weight, bias


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    ("shape", "axis"),
    [((3, 9), 0), ((4, 7, 3), -1), ((3, 4, 7), 0), ((2, 5, 4, 3), 3), ((2, 5, 3, 4), 2)],
)
def test_any_axis(shape, axis, dtype):
    x, dy, weight, bias = problem(shape, axis, dtype=dtype)
    running = torch.zeros(shape[axis]), torch.ones(shape[axis])
    leaves = [t.clone().requires_grad_() for t in (x, weight, bias)]
    y = batchnorm.batch_norm(leaves[0], *running, *leaves[1:], training=True, axis=axis)
    y.backward(dy)
    count = x.numel() // shape[axis]
    *wanted, mean, var = exact(x, axis, weight, bias, dy)
    for mine, other in zip((y, *(leaf.grad for leaf in leaves)), wanted, strict=True):
        scale = float(other.abs().max()) * (1 if mine.dim() > 1 else count**0.5)
        assert_near(mine, other, count, scale)
    assert_near(running[0], 0.1 * mean, count)
    assert_near(running[1], 0.9 + 0.1 * var * count / (count - 1), count)
    assert y.stride() == x.stride()


@settings(deadline=None, max_examples=60)
@given(
    st.lists(st.integers(1, 4), min_size=2, max_size=5),
    st.data(),
    st.integers(0, 100),
)
def test_it_is_moving_by_hand_in_any_layout(shape, data, seed):
    axis = data.draw(st.integers(-len(shape), len(shape) - 1))
    order = data.draw(st.permutations(range(len(shape))))
    shape[(axis + 1) % len(shape)] += 1  # two values in a channel
    x, dy, weight, bias = problem(shape, axis, seed)
    back = sorted(range(len(shape)), key=order.__getitem__)
    x = x.permute(order).contiguous().permute(back)  # the same values, permuted in memory
    y = batchnorm.batch_norm(x, None, None, weight, bias, training=True, axis=axis)
    torch.testing.assert_close(y, exact(x, axis, weight, bias, dy)[0], rtol=1e-6, atol=1e-6)


def test_a_mask_a_residual_and_an_activation_stand_as_the_input_does():
    x, _, weight, bias = problem((4, 7, 3), -1)
    keep = torch.rand(4, 7) < 0.6
    for mask in (keep, keep[..., None], keep[..., None].expand(4, 7, 3)):
        for residual in (x, x[:1], x[..., :1]):
            for memory in (x, x.transpose(0, 1).contiguous().transpose(0, 1)):
                y = batchnorm.batch_norm(
                    memory, None, None, weight, bias, training=True, axis=-1,
                    mask=mask, residual=residual, activation="silu",
                )  # fmt: skip
                z = batchnorm.batch_norm(
                    x.movedim(-1, 1), None, None, weight, bias, training=True, mask=keep,
                    residual=residual.expand_as(x).movedim(-1, 1), activation="silu",
                )  # fmt: skip
                torch.testing.assert_close(y, z.movedim(1, -1))


def test_a_norm_with_its_activation_takes_a_mask_on_every_axis():
    layer = batchnorm.BatchNormAct1d(3, activation="sigmoid")
    x, keep = torch.randn(4, 7, 3), torch.rand(4, 7) < 0.6
    y = layer(x, mask=keep, axis=-1)
    packed = torch.nn.functional.batch_norm(x[keep], None, None, training=True).sigmoid()
    torch.testing.assert_close(y[keep], packed)
    assert not y[~keep].any()


def test_nothing_is_copied_of_what_is_contiguous(monkeypatch):
    seen = []
    kernel = batchnorm.kernels.batch_norm

    def spy(x, *arguments):
        seen.append(x)
        return kernel(x, *arguments)

    monkeypatch.setattr(batchnorm.kernels, "batch_norm", spy)
    x = torch.randn(4, 7, 3)
    for axis in (-1, 0, 2):
        y = batchnorm.batch_norm(x, None, None, training=True, axis=axis)
        assert seen[-1].data_ptr() == x.data_ptr()
        assert seen[-1].is_contiguous()
        assert y.is_contiguous()
    nhwc = torch.randn(2, 3, 5, 4).permute(0, 2, 3, 1)  # its memory is contiguous for axis 1
    batchnorm.batch_norm(nhwc, None, None, training=True, axis=3)
    assert seen[-1].is_contiguous()
    assert seen[-1].data_ptr() == nhwc.data_ptr()


@pytest.mark.parametrize("training", [True, False])
def test_layers_take_it(training):
    x, _, _, _ = problem((4, 7, 3), -1, dtype=torch.float32)
    for make in (lambda: batchnorm.BatchNorm1d(3), batchnorm.BatchNorm):
        layer, twin = make().train(training), nn.BatchNorm1d(3).train(training)
        y = layer(x, axis=-1)
        torch.testing.assert_close(y, twin(x.movedim(-1, 1)).movedim(1, -1))
        torch.testing.assert_close(layer.state_dict(), twin.state_dict(), rtol=1e-6, atol=1e-6)
        assert layer.num_features == 3


class TestAsAModule:
    def test_in_a_sequence(self):
        model = nn.Sequential(nn.Linear(5, 3), BatchNormAlong(), nn.ReLU())
        x = torch.randn(4, 7, 5)
        twin = nn.BatchNorm1d(3)
        expected = twin(model[0](x).movedim(-1, 1)).movedim(1, -1).relu()
        torch.testing.assert_close(model(x), expected)
        torch.testing.assert_close(model[1].norm.running_var, twin.running_var)
        assert "axis=-1" in repr(model)
        assert BatchNormAlong(3, eps=1e-2).norm.eps == 1e-2

    @pytest.mark.parametrize("to", ["torch's sync", "torch's"])
    def test_what_replaces_the_norm_keeps_the_axis(self, to):
        model = nn.Sequential(BatchNormAlong(3)).eval()
        model[0].norm.running_mean.uniform_()
        x = torch.randn(4, 7, 3)
        expected = model(x)
        if to == "torch's":
            other = nn.BatchNorm1d(3)
            other.load_state_dict(model[0].norm.state_dict())
            model[0].norm = other.eval()
        else:
            model = nn.SyncBatchNorm.convert_sync_batchnorm(model)
            assert type(model[0].norm) is nn.SyncBatchNorm
        torch.testing.assert_close(model(x), expected)

    def test_copies_traces_and_compiles(self):
        model = BatchNormAlong(3)
        x = torch.randn(4, 7, 3)
        mask = torch.arange(7) < torch.tensor([7, 3, 0, 2])[:, None]
        expected = copy.deepcopy(model)(x, mask)
        for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
            compiled = torch.compile(twin, fullgraph=True, backend="aot_eager")
            torch.testing.assert_close(compiled(x, mask), expected)
        traced = torch.fx.symbolic_trace(nn.Sequential(model))
        torch.testing.assert_close(traced(x), copy.deepcopy(model)(x))

    def test_whole_model_tools_find_it(self):
        model = nn.Sequential(nn.Linear(5, 3), BatchNormAlong(3))
        loader = [torch.randn(4, 7, 5) for _ in range(3)]
        batchnorm.recalibrate(model, loader)
        values = torch.cat([model[0](x).flatten(0, 1) for x in loader])
        torch.testing.assert_close(model[1].norm.running_mean, values.mean(0))
        torch.testing.assert_close(model[1].norm.running_var, values.var(0))
        assert batchnorm.summary(model, loader[0])
        batchnorm.freeze(model)
        batchnorm.convert(model, "torch")


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (batchnorm.BatchNorm1d(3), r"channels are axis 1.*or pass axis=2"),
        (lambda x: batchnorm.BatchNorm1d(3)(x, axis=0), r"channels are axis 0.*num_features=4"),
        (lambda x: batchnorm.BatchNorm1d(3)(x, axis=3), "axis=3 for an input of shape"),
        (lambda x: batchnorm.BatchNorm1d(5)(x, axis=-4), "wants an axis of"),
        (
            lambda x: batchnorm.batch_norm(x[:1, :1], None, None, training=True, axis=2),
            "more than 1 value per channel",
        ),
    ],
)
def test_errors_name_the_axis(call, message):
    with pytest.raises(BatchNormError, match=message):
        call(torch.randn(4, 7, 3))
