"""masked: padding has no part in batch norm, in models that know nothing of masks."""

import contextlib
import copy
import logging

import pytest
import timm.layers
import torch
import torchaudio
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import batchnorm
from batchnorm import BatchNormError

LENGTHS = torch.tensor([5, 2, 7])
INSIDE = torch.arange(7) < LENGTHS[:, None]  # (3, 7)


def layer(kind=nn.BatchNorm1d, channels=4, **options):
    """In float64, with parameters and statistics that are not trivial."""
    torch.manual_seed(0)
    norm = kind(channels, **options).double()
    for name in ("weight", "running_mean", "running_var"):
        if getattr(norm, name) is not None:
            nn.init.uniform_(getattr(norm, name), 0.5, 1.5)
    return norm


def expected_of(norm, x, keep):
    """(outputs, running statistics) of the packed values, laid back: an oracle of its own."""
    twin = copy.deepcopy(norm)
    values = torch.stack([x[n, :, t] for n, t in keep.nonzero().tolist()])  # (M, C)
    y = torch.nn.functional.batch_norm(
        values, twin.running_mean, twin.running_var, twin.weight, twin.bias, twin.training
    )
    laid = torch.zeros_like(x)
    for (n, t), row in zip(keep.nonzero().tolist(), y, strict=True):
        laid[n, :, t] = row
    return laid, twin


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("kind", [nn.BatchNorm1d, batchnorm.BatchNorm1d, batchnorm.BatchNorm])
def test_it_is_batch_norm_of_the_packed_values(kind, training):
    norm = layer(kind).train(training)
    x = torch.randn(3, 4, 7, dtype=torch.float64, requires_grad=True)
    expected, twin = expected_of(norm, x, INSIDE)
    with batchnorm.masked(norm, LENGTHS):
        y = norm(x)
    torch.testing.assert_close(y, expected, rtol=1e-12, atol=1e-12)
    for name in ("running_mean", "running_var"):
        torch.testing.assert_close(getattr(norm, name), getattr(twin, name), rtol=1e-12, atol=0)
    cotangent = torch.randn_like(y)
    ours = torch.autograd.grad(y, [x, norm.weight, norm.bias], cotangent)
    theirs = torch.autograd.grad(expected, [x, twin.weight, twin.bias], cotangent)
    torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-10)


@settings(max_examples=40, deadline=None)
@given(st.lists(st.integers(0, 6), min_size=1, max_size=4).filter(lambda v: sum(v) > 1))
def test_lengths_and_their_mask_say_the_same(lengths):
    counts = torch.tensor(lengths)
    x = torch.randn(len(lengths), 4, 6, dtype=torch.float64)
    ours, theirs = layer(), layer()
    with batchnorm.masked(ours, counts, padded_to=6):
        y = ours(x)
    with batchnorm.masked(theirs, mask=torch.arange(6) < counts[:, None]):
        torch.testing.assert_close(y, theirs(x), rtol=0, atol=0)
    assert torch.equal(ours.running_var, theirs.running_var)
    expected, _ = expected_of(layer(), x, torch.arange(6) < counts[:, None])
    torch.testing.assert_close(y, expected, rtol=1e-11, atol=1e-11)


def test_nan_in_the_padding_does_not_leak():
    norm = layer()
    x = torch.randn(3, 4, 7, dtype=torch.float64)
    with batchnorm.masked(norm, LENGTHS):
        clean = norm(x)
    state = copy.deepcopy(norm.state_dict())
    again = layer()
    dirty = x.masked_fill(~INSIDE[:, None], float("nan")).requires_grad_()
    with batchnorm.masked(again, LENGTHS):
        y = again(dirty)
    assert torch.equal(y, clean)
    torch.testing.assert_close(again.state_dict(), state, rtol=0, atol=0)
    (gradient,) = torch.autograd.grad(y.square().sum(), dirty)
    assert gradient.isfinite().all()
    assert not gradient.masked_select(~INSIDE[:, None]).any()


def test_images_with_a_mask_of_their_own():
    norm = layer(nn.BatchNorm2d)
    x = torch.randn(2, 4, 5, 6, dtype=torch.float64)
    keep = torch.rand(2, 5, 6) < 0.5
    values = x.movedim(1, -1)[keep]
    with batchnorm.masked(norm, mask=keep):
        y = norm(x)
    torch.testing.assert_close(norm.running_mean, 0.9 * layer().running_mean + 0.1 * values.mean(0))
    assert not y.movedim(1, -1)[~keep].any()


def test_the_steps_on_another_axis_and_at_another_resolution():
    norm = layer(nn.BatchNorm2d)
    x = torch.randn(3, 4, 5, 4, dtype=torch.float64)  # (N, C, F, T / 2)
    with batchnorm.masked(norm, LENGTHS, padded_to=8, axis=3):
        norm(x)
    inside = torch.arange(4) < torch.tensor([3, 1, 4])[:, None]  # ⌈length / 2⌉
    values = x.permute(0, 3, 2, 1)[inside].flatten(0, 1)  # (M, C)
    torch.testing.assert_close(norm.running_mean, 0.9 * layer().running_mean + 0.1 * values.mean(0))


def test_rows_of_samples_are_taken_whole_and_rows_of_steps_masked():
    norm = layer()
    pooled = torch.randn(3, 4, dtype=torch.float64)
    expected = copy.deepcopy(norm)(pooled)
    with batchnorm.masked(norm, LENGTHS):
        torch.testing.assert_close(norm(pooled), expected, rtol=0, atol=0)
    norm, steps = layer(), torch.randn(21, 4, dtype=torch.float64)
    with batchnorm.masked(norm, LENGTHS):
        y = norm(steps)
    expected = copy.deepcopy(layer())(steps[INSIDE.flatten()])
    torch.testing.assert_close(y[INSIDE.flatten()], expected)
    assert not y[~INSIDE.flatten()].any()


class Strided(nn.Module):
    """A shared norm, called by keyword behind convolutions of two strides, with dropout."""

    def __init__(self):
        super().__init__()
        self.near, self.far = nn.Conv1d(4, 4, 3, padding=1), nn.Conv1d(4, 4, 3, 2, padding=1)
        self.norm = batchnorm.BatchNorm1d(4)
        self.act = timm.layers.BatchNormAct2d(4)

    def forward(self, x):
        x = self.far(self.norm(input=self.near(x)))
        return self.act(self.norm(input=x)[..., None])


def test_shared_norms_norms_with_activations_and_hooks():
    model, seen = Strided(), []
    model.norm.register_forward_hook(lambda _m, _args, y: seen.append(y.shape))
    hooks = [len(m._forward_pre_hooks) + len(m._forward_hooks) for m in model.modules()]
    with batchnorm.masked(model, LENGTHS, padded_to=7):
        y = model(torch.randn(3, 4, 7))
    assert y.shape == (3, 4, 4, 1)
    assert (
        not y[:, :, :, 0].movedim(1, -1)[torch.arange(4) >= torch.tensor([3, 1, 4])[:, None]].any()
    )
    assert seen == [(1, 4, 14), (1, 4, 8)]
    assert hooks == [len(m._forward_pre_hooks) + len(m._forward_hooks) for m in model.modules()]
    assert model.norm.num_batches_tracked == 2


def test_a_conformer_s_convolution_module():
    """torchaudio masks its attention and not its convolution: padding moves the statistics."""
    torch.manual_seed(0)
    model = torchaudio.models.Conformer(8, 2, 16, 1, depthwise_conv_kernel_size=3)
    (name, norm), *_ = [(n, m) for n, m in model.named_modules() if isinstance(m, nn.BatchNorm1d)]
    x, inside = torch.randn(3, 7, 8), []
    norm.register_forward_pre_hook(lambda _m, args: inside.append(args[0]))
    before = copy.deepcopy(model.state_dict())

    def running_mean(context):
        model.load_state_dict(before)
        with context:
            model(x, LENGTHS)
        return norm.running_mean.clone(), inside[-1]

    with_padding, values = running_mean(contextlib.nullcontext())
    torch.testing.assert_close(with_padding, 0.1 * values.mean((0, 2)))
    without, packed = running_mean(batchnorm.masked(model, LENGTHS))
    assert packed.shape == (1, 8, 14), name
    expected = 0.1 * values.movedim(1, -1)[INSIDE].mean(0)
    torch.testing.assert_close(without, expected, rtol=1e-4, atol=1e-6)
    assert (with_padding - without).abs().max() > 1e-3


def test_recalibrate_reads_the_packed_values():
    model = nn.Sequential(layer())
    batches = [(torch.randn(3, 4, 7, dtype=torch.float64), LENGTHS) for _ in range(3)]

    def forward(model, batch):
        x, lengths = batch
        with batchnorm.masked(model, lengths):
            model(x)

    batchnorm.recalibrate(model, batches, forward=forward)
    values = torch.cat([x.movedim(1, -1)[INSIDE] for x, _ in batches])
    torch.testing.assert_close(model[0].running_mean, values.mean(0))
    torch.testing.assert_close(model[0].running_var, values.var(0))


def test_what_does_not_fit_is_named():
    model = nn.Sequential(layer().float())
    with batchnorm.masked(model, LENGTHS), pytest.raises(BatchNormError, match="padded_to="):
        model(torch.randn(3, 4, 9))
    with batchnorm.masked(model, LENGTHS), pytest.raises(BatchNormError, match="the layer 0 got"):
        model(torch.randn(2, 4, 7))
    with (
        batchnorm.masked(model, torch.tensor([1, 0])),
        pytest.raises(BatchNormError, match="leaves"),
    ):
        model(torch.randn(2, 4, 1))
    model(torch.randn(2, 4, 9))  # the hooks are gone


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, "wants either"),
        ({"lengths": LENGTHS, "mask": INSIDE}, "wants either"),
        ({"mask": INSIDE.float()}, "torch.bool"),
        ({"mask": LENGTHS > 3}, "shape"),
        ({"lengths": LENGTHS.float()}, "whole numbers"),
        ({"lengths": LENGTHS, "padded_to": 6}, "from 0 to 6"),
        ({"lengths": -LENGTHS}, "from 0"),
    ],
)
def test_bad_masks_are_refused(arguments, message):
    with pytest.raises(BatchNormError, match=message), batchnorm.masked(layer(), **arguments):
        pass


def test_nothing_to_mask_is_said(caplog):
    with caplog.at_level(logging.WARNING), batchnorm.masked(nn.Linear(2, 2), LENGTHS):
        pass
    assert "nothing to do" in caplog.text
