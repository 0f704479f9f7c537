"""Layers of the real Keras, Flax and ONNX beside ours: outputs, and statistics after training."""

import os
import warnings

import numpy as np
import pytest
import timm.layers
import torch

import batchnorm
from batchnorm import BatchNormError
from tolerance import assert_near

os.environ["KERAS_BACKEND"] = "torch"
import flax.linen
import jax
import keras
import onnx.reference
import onnxruntime

SHAPE = (6, 5, 4, 3)  # channels last: 120 values in each of 3 channels
COUNT = 120


def data(seed=0):
    """(N, H, W, C), far from mean 0 and variance 1."""
    return (np.random.default_rng(seed).normal(size=SHAPE) * 3 + 2).astype(np.float32)


def ours(layer, x):
    """What our layer makes of channels-last data, in that order."""
    with torch.no_grad():
        return layer(torch.from_numpy(x).movedim(-1, 1)).movedim(1, -1)


def near(actual, expected):
    actual, expected = (
        v.detach() if isinstance(v, torch.Tensor) else torch.from_numpy(np.array(v))
        for v in (actual, expected)
    )
    assert_near(actual, expected.double(), COUNT)


def trained(norm=None):
    """A layer whose every number differs from where it started."""
    torch.manual_seed(1)
    norm = norm or batchnorm.BatchNorm(3, eps=1e-2, momentum=0.2)
    for tensor in (*norm.parameters(), norm.running_mean, norm.running_var):
        tensor.data.uniform_(0.5, 2)
    return norm


def in_keras(**options):
    layer = keras.layers.BatchNormalization(**options)
    layer.build(SHAPE)
    values = np.random.default_rng(3)
    layer.set_weights([values.uniform(0.5, 2, 3) for _ in layer.weights])
    return layer


def of_keras(layer, x, training):
    return layer(torch.from_numpy(x), training=training).detach()


class TestKeras:
    @pytest.mark.parametrize(
        "options",
        [{}, {"epsilon": 1e-2, "momentum": 0.7}, {"scale": False}, {"center": False},
         {"scale": False, "center": False}],
    )  # fmt: skip
    def test_a_layer_made_there_evaluates_here(self, options):
        layer = in_keras(**options)
        norm = batchnorm.from_keras(layer).eval()
        near(ours(norm, data()), of_keras(layer, data(), training=False))
        assert norm.momentum == pytest.approx(1 - layer.momentum)
        assert norm.eps == layer.epsilon
        assert sum(p.numel() for p in norm.parameters() if p.requires_grad) == 3 * len(
            layer.trainable_variables
        )

    def test_training_goes_on_here_as_there(self):
        """With the biased variance, and with Bessel's factor in on the way in and out again."""
        layer = in_keras(momentum=0.7)
        here = batchnorm.from_keras(layer)
        biased = batchnorm.convert(here, to="estimator", unbiased=False)
        unbiased = batchnorm.from_keras(layer, count=COUNT)
        for seed in range(3):
            y = of_keras(layer, data(seed), training=True)
            near(ours(biased, data(seed)), y)
            near(ours(unbiased, data(seed)), y)
        near(biased.running_mean, layer.moving_mean.value.detach())
        near(biased.running_var, layer.moving_variance.value.detach())
        config, weights = batchnorm.to_keras(unbiased, count=COUNT)
        for mine, theirs in zip(weights, layer.weights, strict=True):
            near(mine, theirs.value)
        assert config["momentum"] == pytest.approx(0.7)

    @pytest.mark.parametrize("options", [{}, {"affine": False}, {"bias": False}])
    def test_a_layer_made_here_evaluates_there(self, options):
        norm = trained(batchnorm.BatchNorm(3, eps=1e-2, **options))
        config, weights = batchnorm.to_keras(norm)
        layer = keras.layers.BatchNormalization(**config)
        layer.build(SHAPE)
        layer.set_weights(weights)
        near(of_keras(layer, data(), training=False), ours(norm.eval(), data()))
        assert config["momentum"] == 0.9

    def test_another_axis(self):
        config, weights = batchnorm.to_keras(trained(), axis=1)
        layer = keras.layers.BatchNormalization(**config)
        x = torch.from_numpy(data()).movedim(-1, 1)
        layer.build(x.shape)
        layer.set_weights(weights)
        near(layer(x, training=False).detach(), trained().eval()(x).detach())

    def test_what_is_not_built_is_said(self):
        with pytest.raises(BatchNormError, match=r"no variables yet\. Call layer\.build"):
            batchnorm.from_keras(keras.layers.BatchNormalization())

    @pytest.mark.parametrize(
        "other", [keras.layers.LayerNormalization(), keras.layers.Dense(3), torch.nn.BatchNorm2d(3)]
    )
    def test_another_layer_is_said(self, other):
        name = type(other).__name__
        with pytest.raises(
            BatchNormError, match=rf"from_keras got a {name} and wants a keras\.layers\.BatchNorm"
        ):
            batchnorm.from_keras(other)


class TestFlax:
    def made(self, **options):
        module = flax.linen.BatchNorm(**options)
        variables = module.init(jax.random.key(0), data(), use_running_average=False)
        values = np.random.default_rng(3)
        return module, jax.tree.map(
            lambda leaf: values.uniform(0.5, 2, leaf.shape).astype(np.float32), variables
        )

    @pytest.mark.parametrize(
        "options",
        [{}, {"use_scale": False}, {"use_bias": False}, {"epsilon": 1e-2, "momentum": 0.7}],
    )
    def test_a_layer_made_there_evaluates_here(self, options):
        module, variables = self.made(**options)
        known = {name: options[name] for name in ("epsilon", "momentum") if name in options}
        norm = batchnorm.from_flax(variables, **known).eval()
        there = module.apply(variables, data(), use_running_average=True)
        near(ours(norm, data()), there)
        assert norm.momentum == pytest.approx(1 - module.momentum)
        assert norm.eps == module.epsilon

    def test_training_goes_on_here_as_there(self):
        # the exact variance: by default Flax takes E[x²] − E[x]²
        module, variables = self.made(momentum=0.7, use_fast_variance=False)
        biased = batchnorm.convert(
            batchnorm.from_flax(variables, momentum=0.7), to="estimator", unbiased=False
        )
        unbiased = batchnorm.from_flax(variables, momentum=0.7, count=COUNT)
        for seed in range(3):
            y, changed = module.apply(
                variables, data(seed), use_running_average=False, mutable=["batch_stats"]
            )
            variables = {**variables, **changed}
            near(ours(biased, data(seed)), y)
            near(ours(unbiased, data(seed)), y)
        _, mine = batchnorm.to_flax(unbiased, count=COUNT)
        for name, value in variables["batch_stats"].items():
            near(getattr(biased, f"running_{name}"), value)
            near(mine["batch_stats"][name], value)

    @pytest.mark.parametrize("options", [{}, {"affine": False}, {"bias": False}])
    def test_a_layer_made_here_evaluates_there(self, options):
        norm = trained(batchnorm.BatchNorm(3, eps=1e-2, **options))
        chosen, variables = batchnorm.to_flax(norm)
        module = flax.linen.BatchNorm(use_running_average=True, **chosen)
        near(module.apply(variables, data()), ours(norm.eval(), data()))

    def test_a_whole_model_s_variables_are_refused(self):
        """The way out that the error names is one."""

        class Model(flax.linen.Module):
            @flax.linen.compact
            def __call__(self, x):
                return flax.linen.BatchNorm(use_running_average=True)(x)

        variables = Model().init(jax.random.key(0), data())
        with pytest.raises(BatchNormError) as caught:
            batchnorm.from_flax(variables)
        assert "batch_stats ['BatchNorm_0'] and wants the variables of one layer" in str(
            caught.value
        )
        way_out = str(caught.value).split("each collection: ")[1].removesuffix(".")
        near(
            ours(batchnorm.from_flax(eval(way_out)).eval(), data()),  # noqa: S307  # our own words
            Model().apply(variables, data()),
        )

    @pytest.mark.parametrize(
        ("variables", "message"),
        [
            (flax.linen.BatchNorm(), "a BatchNorm and wants the variables of one layer"),
            ({"params": {"scale": 1}}, r"batch_stats \[\] and wants"),
            (
                {"params": {"kernel": 1}, "batch_stats": {"mean": 1, "var": 1}},
                r"params with kernel, which no flax\.linen\.BatchNorm has",
            ),
        ],
    )
    def test_another_layer_is_said(self, variables, message):
        with pytest.raises(BatchNormError, match=f"from_flax got .*{message}"):
            batchnorm.from_flax(variables)

    @pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
    def test_half_precision_comes_in(self, dtype):
        _, variables = self.made()
        half = jax.tree.map(lambda leaf: jax.numpy.asarray(leaf, dtype), variables)
        norm = batchnorm.from_flax(half)
        for name, leaf in (
            ("weight", half["params"]["scale"]),
            ("bias", half["params"]["bias"]),
            ("running_mean", half["batch_stats"]["mean"]),
            ("running_var", half["batch_stats"]["var"]),
        ):
            exact = np.asarray(leaf.astype("float32"))
            assert np.array_equal(getattr(norm, name).detach().float().numpy(), exact)


class TestONNX:
    @pytest.mark.parametrize("options", [{}, {"affine": False}, {"bias": False}])
    def test_the_runtime_computes_what_the_layer_does(self, options):
        norm = trained(batchnorm.BatchNorm(3, eps=1e-2, **options)).eval()
        model = batchnorm.to_onnx(norm)
        onnx.checker.check_model(model, full_check=True)
        session = onnxruntime.InferenceSession(model.SerializeToString())
        x = np.moveaxis(data(), -1, 1).copy()
        (y,) = session.run(None, {"x": x})
        near(y, norm(torch.from_numpy(x)).detach())

    def test_there_and_back(self):
        norm = trained()
        (back,) = batchnorm.from_onnx(batchnorm.to_onnx(norm)).values()
        assert back.eps == pytest.approx(norm.eps)
        assert back.momentum == pytest.approx(norm.momentum)
        for name, value in norm.state_dict().items():
            torch.testing.assert_close(back.state_dict()[name], value, rtol=0, atol=0)

    def test_an_exported_model_s_layers_are_found(self, tmp_path):
        model = torch.nn.Sequential(trained(batchnorm.BatchNorm2d(3)), torch.nn.ReLU()).eval()
        x = torch.from_numpy(data()).movedim(-1, 1).contiguous()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the exporter's own, of what is deprecated in it
            torch.onnx.export(
                model, (x,), tmp_path / "model.onnx", dynamo=True, verbose=False, optimize=False
            )
        (found,) = batchnorm.from_onnx(onnx.load(tmp_path / "model.onnx")).values()
        near(found.eval()(x).relu().detach(), model(x).detach())

    def test_training_goes_on_here_as_there(self):
        """By onnx's own evaluator: the runtime's inference build has no training mode."""
        norm = trained()
        there = onnx.reference.ReferenceEvaluator(
            batchnorm.to_onnx(norm, training=True, count=COUNT)
        )
        x = np.moveaxis(data(), -1, 1).copy()
        y, mean, var = there.run(None, {"x": x})
        near(norm(torch.from_numpy(x)).detach(), y)
        found = batchnorm.from_onnx(batchnorm.to_onnx(norm, count=COUNT))["y"]
        near(found.running_mean, mean)
        near(found.running_var, var)

    def test_values_from_within_the_graph_are_refused(self):
        model = batchnorm.to_onnx(trained())
        del model.graph.initializer[:]
        with pytest.raises(BatchNormError, match="scale, bias, mean, var of the node 'y' are no"):
            batchnorm.from_onnx(model)


def note_s_function(x, moving_mean, moving_var, gamma, beta, eps, momentum, training):
    """The note's equations, for (N, C, H, W)."""
    if not training:
        x_hat = (x - moving_mean) / torch.sqrt(moving_var + eps)
    else:
        mean = x.mean(dim=(0, 2, 3), keepdim=True)
        var = ((x - mean) ** 2).mean(dim=(0, 2, 3), keepdim=True)
        x_hat = (x - mean) / torch.sqrt(var + eps)
        moving_mean = momentum * moving_mean + (1.0 - momentum) * mean
        moving_var = momentum * moving_var + (1.0 - momentum) * var
    return gamma * x_hat + beta, moving_mean, moving_var


class Note:
    def __init__(self):
        self.gamma, self.beta = torch.full((1,), 1.5), torch.full((1,), -0.5)
        self.moving_mean, self.moving_var = torch.zeros(1), torch.zeros(1)
        self.eps, self.momentum = 1e-5, 0.9

    def __call__(self, x, training):
        y, self.moving_mean, self.moving_var = note_s_function(
            x, self.moving_mean, self.moving_var, self.gamma, self.beta, self.eps, self.momentum,
            training,
        )  # fmt: skip
        return y


class TestTheNote:
    def test_a_layer_made_there_goes_on_here(self):
        x = torch.from_numpy(data()).movedim(-1, 1)
        layer = Note()
        layer(x, training=True)
        norm = batchnorm.from_note(layer, 3, count=COUNT)
        assert norm.momentum == pytest.approx(0.1)
        evaluated = batchnorm.from_note(layer, 3).eval()
        near(evaluated(x).detach(), layer(x, training=False))
        for seed in range(1, 4):
            x = torch.from_numpy(data(seed)).movedim(-1, 1)
            near(norm(x).detach(), layer(x, training=True))
        back = batchnorm.to_note(norm, count=COUNT)
        for name in ("gamma", "beta", "moving_mean", "moving_var"):
            near(back[name], getattr(layer, name).reshape(-1))
        assert back["momentum"] == pytest.approx(0.9)

    def test_what_has_no_place_there_is_refused(self):
        with pytest.raises(BatchNormError, match="gamma differs among its channels"):
            batchnorm.to_note(trained())
        layer = Note()
        layer.gamma = torch.ones(2)
        with pytest.raises(BatchNormError, match="2 values in gamma and num_features=3"):
            batchnorm.from_note(layer, 3)


EXPORTS = [batchnorm.to_keras, batchnorm.to_flax, batchnorm.to_onnx, batchnorm.to_note]


@pytest.mark.parametrize("export", EXPORTS)
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"momentum": None}, "momentum=None, an average over all batches"),
        ({"track_running_stats": False}, "without running statistics"),
    ],
)
def test_what_has_no_counterpart_is_said(export, options, message):
    with pytest.raises(BatchNormError, match=f"{export.__name__} got a layer .*{message}"):
        export(batchnorm.BatchNorm(3, **options))


@pytest.mark.parametrize("export", EXPORTS)
def test_a_count_without_a_variance_is_said(export):
    with pytest.raises(BatchNormError, match="count=1 and wants 2 or more"):
        export(batchnorm.BatchNorm(3, affine=False), count=1)


@pytest.mark.parametrize("export", EXPORTS)
@pytest.mark.parametrize(
    ("layer", "message"),
    [
        (torch.nn.LayerNorm(3), r"a LayerNorm and wants a batch norm\. Pass the batch norms"),
        (torch.nn.Sequential(torch.nn.BatchNorm2d(3)), "a Sequential and wants a batch norm"),
        (torch.nn.InstanceNorm2d(3, track_running_stats=True), "a InstanceNorm2d and wants"),
        (batchnorm.SplitBatchNorm(3), r"a SplitBatchNorm and wants a batch norm\. Pass its \.norm"),
        (batchnorm.BatchNormAct2d(3, activation="relu"), r"a BatchNormAct2d .* Pass its \.norm"),
        (batchnorm.FrozenBatchNorm(3), r"a FrozenBatchNorm .* batchnorm\.convert\(layer\)"),
        (timm.layers.BatchNormAct2d(3), "a BatchNormAct2d with an activation of its own"),
        (batchnorm.BatchNorm(), "a layer that has not learned its size"),
    ],
)
def test_another_layer_is_not_exported(export, layer, message):
    with pytest.raises(BatchNormError, match=rf"{export.__name__} got {message}"):
        export(layer)


@pytest.mark.parametrize(
    ("model", "message"),
    [
        ("model.onnx", r"a str and wants an onnx\.ModelProto: onnx\.load"),
        (
            onnx.helper.make_model(
                onnx.helper.make_graph([onnx.helper.make_node("Relu", ["x"], ["y"])], "g", [], [])
            ),
            "a model of Relu, and wants one with BatchNormalization",
        ),
    ],
)
def test_what_is_no_such_onnx_model_is_said(model, message):
    with pytest.raises(BatchNormError, match=f"from_onnx got {message}"):
        batchnorm.from_onnx(model)


def test_what_is_no_layer_of_the_note_is_said():
    with pytest.raises(BatchNormError, match=r"from_note got a BatchNorm2d and wants .* has gamma"):
        batchnorm.from_note(torch.nn.BatchNorm2d(3), 3)


def test_an_onnx_model_in_bfloat16_comes_in():
    model = batchnorm.to_onnx(trained())
    exact = {}
    for each in model.graph.initializer:
        value = jax.numpy.asarray(onnx.numpy_helper.to_array(each), "bfloat16")
        exact[each.name] = np.asarray(value.astype("float32"))
        each.CopyFrom(onnx.numpy_helper.from_array(np.asarray(value), each.name))
    norm = batchnorm.from_onnx(model)["y"]
    assert np.array_equal(norm.weight.detach().numpy(), exact["scale"])
    assert np.array_equal(norm.running_var.numpy(), exact["var"])
