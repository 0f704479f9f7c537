"""Statistics that count right: once a step, once under checkpointing, in float32, of one value."""

import copy
import io
import pickle

import pytest
import timm.layers
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torch.utils.checkpoint import checkpoint

import batchnorm
from batchnorm import BatchNormError

KINDS = [nn.BatchNorm2d, batchnorm.BatchNorm2d, timm.layers.BatchNormAct2d]


def network(norm=nn.BatchNorm2d, **options):
    torch.manual_seed(0)
    return nn.Sequential(norm(3, **options), nn.Conv2d(3, 4, 3), norm(4, **options)).double()


def images(count=8, seed=1):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(count, 3, 6, 5, generator=generator, dtype=torch.float64) * 2 + 1


def assert_statistics(layer, values, *, momentum=0.1, mean=0.0, var=1.0):
    """Moved once from there towards those of the values: (M, C)."""
    expected = (1 - momentum) * mean + momentum * values.mean(0)
    torch.testing.assert_close(layer.running_mean, expected, rtol=1e-12, atol=1e-12)
    expected = (1 - momentum) * var + momentum * values.var(0)
    torch.testing.assert_close(layer.running_var, expected, rtol=1e-12, atol=1e-12)


def rows(x):
    return x.movedim(1, -1).reshape(-1, x.shape[1])


class TestOneUpdate:
    @pytest.mark.parametrize("momentum", [0.1, 0.3, None])
    @pytest.mark.parametrize("kind", KINDS)
    def test_micro_batches_count_as_the_large_batch(self, kind, momentum):
        model, seen = network(kind, momentum=momentum), []
        model[2].register_forward_pre_hook(lambda _m, args: seen.append(rows(args[0].detach())))
        x = images()
        for step in (1, 2):
            seen.clear()
            before = copy.deepcopy(model)
            with batchnorm.one_update(model) as same:
                assert same is model
                for batch in x.split([1, 4, 3]):  # of several sizes
                    model(batch).square().sum().backward()
            share = momentum or 1 / step
            for layer, old, values in (
                (model[0], before[0], rows(x)),
                (model[2], before[2], torch.cat(seen)),
            ):
                mean, var = old.running_mean, old.running_var
                assert_statistics(layer, values, momentum=share, mean=mean, var=var)
                assert layer.num_batches_tracked == step
                assert layer.momentum == momentum

    @settings(deadline=None, max_examples=30)
    @given(st.lists(st.integers(1, 5), min_size=1, max_size=4), st.integers(0, 100))
    def test_however_they_are_split(self, sizes, seed):
        layer, x = batchnorm.BatchNorm2d(3).double(), images(sum(sizes), seed)
        with batchnorm.one_update(layer):
            for batch in x.split(sizes):
                layer(batch)
        assert_statistics(layer, rows(x))

    @pytest.mark.parametrize("kind", KINDS)
    @pytest.mark.parametrize("reentrant", [True, False])
    def test_a_recomputation_does_not_count(self, kind, reentrant):
        model, twin = network(kind), network(kind)
        inputs = [images().requires_grad_() for _ in range(2)]
        with batchnorm.one_update(model):
            y = checkpoint(model, inputs[0], use_reentrant=reentrant)
            y.square().sum().backward()
        twin(inputs[1]).square().sum().backward()
        torch.testing.assert_close(inputs[0].grad, inputs[1].grad)
        torch.testing.assert_close(model.state_dict(), twin.state_dict())

    def test_both_at_once(self):
        model, x = network(batchnorm.BatchNorm2d), images().requires_grad_()
        with batchnorm.one_update(model):
            for batch in x.split(2):
                checkpoint(model, batch, use_reentrant=False).sum().backward()
        assert_statistics(model[0], rows(x.detach()))
        assert model[0].num_batches_tracked == 1

    def test_masks_axes_and_paused_layers(self):
        layer, x = batchnorm.BatchNorm(3).double(), images().movedim(1, -1)
        keep = torch.rand(8, 6, 5) < 0.5
        keep[4] = False
        with batchnorm.one_update(layer):
            for batch, mask in zip(x.split(1), keep.split(1), strict=True):
                layer(batch, mask=mask, axis=-1)
            with batchnorm.no_update(layer):
                layer(x * 100, axis=-1)
            layer.eval()(x * 100, axis=-1)
        assert_statistics(layer, x[keep])

    def test_an_error_leaves_everything_as_it_was(self):
        model = network()
        before, buffers = copy.deepcopy(model.state_dict()), list(model.buffers())

        def training():
            with batchnorm.one_update(model):
                model(images())
                raise ZeroDivisionError

        with pytest.raises(ZeroDivisionError):
            training()
        torch.testing.assert_close(model.state_dict(), before, rtol=0, atol=0)
        assert all(a is b for a, b in zip(buffers, model.buffers(), strict=True))
        with batchnorm.one_update(model):
            model(images())
            with pytest.raises(RuntimeError):
                model(torch.randn(2, 3, 1, 1))
        assert not model[0]._forward_hooks
        assert model[0].num_batches_tracked == 1

    def test_nothing_to_do_is_said(self, caplog):
        with batchnorm.one_update(nn.Linear(2, 2)):
            pass
        assert "nothing to do" in caplog.text


def test_averaged_weights_get_the_statistics_of_the_data():
    """EMA and SWA: the average of the weights, and statistics that are of no average."""
    model = network(batchnorm.BatchNorm2d)
    for averaged in (
        AveragedModel(model),
        AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.9)),
        AveragedModel(model, use_buffers=True),
    ):
        for step in range(3):
            with torch.no_grad():
                for p in model.parameters():
                    p.add_(torch.randn_like(p) * 0.1)
            model(images(seed=step))
            averaged.update_parameters(model)
        batchnorm.recalibrate(averaged, [images(seed=9)])
        norms = averaged.module
        assert_statistics(norms[0], rows(images(seed=9)), momentum=1.0)
        behind = norms[1](copy.deepcopy(norms[0]).train()(images(seed=9)))
        assert_statistics(norms[2], rows(behind.detach()), momentum=1.0)


class TestKeepFloat32:
    @pytest.mark.parametrize("kind", KINDS)
    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
    def test_casts_pass_it_by(self, kind, dtype):
        model = network(kind).float()
        exact = torch.rand(4) + 1 / 3
        model[2].running_mean.copy_(exact)
        assert batchnorm.keep_float32(model) is model
        for cast in (model.half, model.bfloat16, lambda: model.to(dtype), model.float):
            cast()
            assert model[2].weight.dtype == model[2].running_var.dtype == torch.float32
            assert torch.equal(model[2].running_mean, exact)
            assert model[2].num_batches_tracked.dtype == torch.int64
        model.to(dtype)
        assert model[1].weight.dtype == dtype
        y = model(images().to(dtype))
        assert y.dtype == dtype
        y.sum().backward()
        assert model[2].weight.grad.dtype == torch.float32
        model.double()
        assert model[2].weight.dtype == torch.float64

    def test_where_a_bfloat16_mean_stands_still(self):
        """Steps of 0.0025 · (5 − mean) are lost at 2.0, where half of the last digit is 0.0078."""
        x = torch.full((4, 1), 5.0, dtype=torch.bfloat16)
        x[::2] += 1 / 16
        x[1::2] -= 1 / 16
        stuck, kept = (batchnorm.BatchNorm1d(1, momentum=0.0025) for _ in range(2))
        batchnorm.keep_float32(kept)
        for _ in range(1200):
            stuck.bfloat16()(x)
            kept.bfloat16()(x)
        expected = 5 * (1 - 0.9975**1200)  # 4.75
        assert stuck.running_mean.item() == 2.0
        assert kept.running_mean.item() == pytest.approx(expected, rel=1e-5)

    def test_copies_freezes_and_the_way_back(self):
        model = batchnorm.keep_float32(network(batchnorm.BatchNorm2d).float(), "2")
        for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
            twin.bfloat16()
            assert [twin[i].weight.dtype for i in (0, 2)] == [torch.bfloat16, torch.float32]
            batchnorm.freeze(twin)
            again = pickle.loads(pickle.dumps(twin)).bfloat16().train()
            assert again[2].weight.dtype == torch.float32
            assert not again[2].training
            batchnorm.keep_float32(twin, keep=False)
            assert not twin.train()[2].training
            batchnorm.unfreeze(twin)
            assert type(twin[2]) is batchnorm.BatchNorm2d
            assert twin.bfloat16()[2].weight.dtype == torch.bfloat16
            assert "stays in float32, rounded before" in str(
                batchnorm.changes(batchnorm.keep_float32(twin))
            )
            assert "already" in str(batchnorm.changes(batchnorm.keep_float32(twin)))
        buffer = io.BytesIO()
        torch.save(model.state_dict(), buffer)
        buffer.seek(0)
        network().load_state_dict(torch.load(buffer, weights_only=True))


class TestSingleValues:
    @pytest.mark.parametrize("kind", [nn.BatchNorm1d, batchnorm.BatchNorm1d, batchnorm.BatchNorm])
    def test_the_running_statistics_said_once(self, kind, caplog):
        model = nn.Sequential(kind(3)).double()
        model[0].running_mean.uniform_()
        model[0].running_var.uniform_(0.5, 2)
        x = torch.randn(1, 3, dtype=torch.float64, requires_grad=True)
        with pytest.raises(ValueError, match="more than 1 value per channel"):
            model(x)
        expected = copy.deepcopy(model).eval()(x)
        before = copy.deepcopy(model.state_dict())
        assert batchnorm.single_values(model) is model
        for _ in range(3):
            y = model(x)
        torch.testing.assert_close(y, expected, rtol=0, atol=0)
        torch.testing.assert_close(model.state_dict(), before, rtol=0, atol=0)
        assert caplog.text.count("one value per channel in training, shape (1, 3)") == 1
        (gradient,) = torch.autograd.grad(y.sum(), x)
        torch.testing.assert_close(gradient[0], (model[0].running_var + 1e-5).rsqrt())
        assert model[0].training
        batch = torch.randn(4, 3, dtype=torch.float64)
        twin = nn.Sequential(kind(3)).double()
        twin.load_state_dict(before)
        torch.testing.assert_close(model(batch), twin(batch))
        torch.testing.assert_close(model.state_dict(), twin.state_dict())
        copied = pickle.loads(pickle.dumps(copy.deepcopy(model)))
        copied(x)
        batchnorm.single_values(model, "error")
        assert type(model[0]) is kind
        with pytest.raises(ValueError, match="more than 1 value per channel"):
            model(x)

    def test_compiled_traced_and_frozen(self):
        model = batchnorm.single_values(nn.Sequential(batchnorm.BatchNorm1d(3)))
        compiled = torch.compile(model, backend="aot_eager")
        x = torch.randn(4, 3)
        torch.testing.assert_close(compiled(x), copy.deepcopy(model)(x))
        torch.fx.symbolic_trace(model)
        batchnorm.freeze(model)
        batchnorm.single_values(model, "error")
        batchnorm.unfreeze(model)
        assert type(model[0]) is batchnorm.BatchNorm1d

    def test_what_is_left_is_said(self):
        model = nn.Sequential(nn.BatchNorm1d(3, track_running_stats=False), nn.SyncBatchNorm(3))
        account = str(batchnorm.changes(batchnorm.single_values(model)))
        assert "keeps no running statistics" in account
        assert "takes the values of all processes" in account
        with pytest.raises(BatchNormError, match="use='mean' and wants"):
            batchnorm.single_values(model, "mean")
