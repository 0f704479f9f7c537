"""What the studies measure, where the answer is known beforehand."""

import copy
import math

import pytest
import torch
from torch import nn

import tiny
from batchnorm import BatchNormError
from batchnorm.lab import arms, cells, fitting
from batchnorm.lab.batches import TensorBatches
from batchnorm.lab.record import CellConfig
from batchnorm.lab.studies import probes
from batchnorm.lab.study import Planned

TRAINED = {"train_images": 320, "epochs": 2, "learning_rate": 1.0}


def test_gradients_grow_as_yang_et_al_derive():
    options = {"depth": 30, "width": 256, "batch_size": 256}
    found = probes.gradient_growth(0, None, normalized=True, **options)
    assert found["growth"] == pytest.approx(math.sqrt(math.pi / (math.pi - 1)), abs=0.01)
    assert len(found["log_gradient"]) == 30
    without = probes.gradient_growth(0, None, normalized=False, **options)
    assert without["growth"] == pytest.approx(1, abs=0.02)


def test_mean_and_variance_are_bias_and_weight_in_training_alone():
    found = probes.fixed_moments(0, tiny.as_images(), **TRAINED)
    assert found["training"] < 0.01 < found["evaluation"]
    assert found["weight_spread"] > 0


def test_moments_that_are_not_those_of_weight_and_bias_are_seen():
    class Off(nn.BatchNorm1d):
        def forward(self, x):
            return super().forward(x) * 1.02

    torch.manual_seed(0)
    x = torch.randn(64, 5)
    assert probes._moment_error(nn.Sequential(nn.BatchNorm1d(5)), x) < 1e-4
    assert probes._moment_error(nn.Sequential(Off(5)), x) == pytest.approx(0.02, rel=0.01)


def test_looking_at_moments_leaves_the_model_as_it_was():
    model = nn.Sequential(nn.BatchNorm1d(5))
    probes._moment_error(model, torch.randn(64, 5) + 3)
    assert model[0].running_mean.tolist() == [0.0] * 5
    assert not model[0]._forward_hooks


def test_the_layer_is_affine_in_evaluation_alone():
    found = probes.linear(0, tiny.as_images(), **TRAINED)
    assert found["evaluation"] < 1e-5
    assert found["training"] > 0.01


def test_a_pixel_is_a_sample():
    found = probes.axes(1, tiny.as_images())
    assert found["pixels"] < 1e-4
    assert found["features"] < 1e-4
    assert found["images"] > 0.1


def test_speed_is_of_the_steps_that_were_timed(monkeypatch):
    clock = iter(range(1_000))
    monkeypatch.setattr(probes.time, "perf_counter", lambda: next(clock))
    found = probes.speed(0, tiny.as_images(), arm="batch", steps=3, batch_size=32)
    assert found == {"examples_per_second": 32}  # a tick a step


FAST = {"epochs": 4, "batch_size": 32, "learning_rate": 0.1}


def test_the_fast_recipe_is_of_lenets_size_and_learns(monkeypatch):
    clock = iter((10.0, 17.0))
    monkeypatch.setattr(probes.time, "perf_counter", lambda: next(clock))
    torch.manual_seed(0)
    found = probes.fast(0, tiny.as_images(), **FAST)
    assert found["parameters"] == 60_842  # the note's LeNet has 61,706
    assert found["seconds"] == 7  # from its making to the number
    assert found["accuracy"] > 0.5


@pytest.mark.parametrize("held_out", [0, 64])
def test_the_fast_recipe_is_tested_on_images_that_it_has_not_seen(monkeypatch, held_out):
    tested, trained = [], []
    monkeypatch.setattr(probes, "accuracy_of", lambda _model, *pair: tested.append(pair) or 0.5)
    whole = probes.batchnorm.recalibrate

    def recalibrate(model, loader):
        trained.extend(loader)
        return whole(model, trained)

    monkeypatch.setattr(probes.batchnorm, "recalibrate", recalibrate)
    images = tiny.as_images()
    assert probes.fast(0, images, **FAST, held_out_images=held_out)["accuracy"] == 0.5
    ((inputs, labels),) = tested
    count = len(images.train_images) - held_out
    expected = (images.train_images[count:], images.train_labels[count:])
    if not held_out:
        expected = (images.test_images, images.test_labels)
    assert torch.equal(inputs, expected[0])
    assert torch.equal(labels, expected[1])
    assert torch.equal(torch.cat(trained), images.train_images[:count])


def test_the_notes_defects():
    found = probes.defects(0, tiny.as_images(), **(TRAINED | {"epochs": 4}))
    assert found["untrained_scale"] == pytest.approx(1e-5**-0.5)
    assert found["parameters"] == 8
    assert found["reloaded"] < found["accuracy"]
    assert found["with_gradients"] < found["accuracy"]


def test_a_layer_that_obeys_eval_does_not_mind_one_class_at_a_time():
    images = tiny.as_images()
    model = probes._trained(0, images, 320, 1, 1.0)
    assert probes._accuracy_by_class(model, images) == pytest.approx(
        probes._test_accuracy(model, images)
    )


def test_along_a_gradient_of_no_length_nothing_changes():
    model = fitting.start("mlp", "none", 0)
    inputs, labels, _, _ = tiny.images()
    loss_range, change = probes._along_gradient(model, inputs[:64], labels[:64], 0.0)
    assert (loss_range, change) == (0, 0)


def test_along_a_gradient_the_loss_is_what_it_is_there():
    """A linear model: the loss at the far end by hand."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(784, 10))
    inputs, labels = tiny.images()[0][:64], tiny.images()[1][:64]
    loss = nn.functional.cross_entropy(model(inputs), labels)
    gradients = torch.autograd.grad(loss, list(model.parameters()))
    loss_range, change = probes._along_gradient(model, inputs, labels, 0.01)
    with torch.no_grad():
        for parameter, gradient in zip(model.parameters(), gradients, strict=True):
            parameter.sub_(0.01 * gradient)
    there = nn.functional.cross_entropy(model(inputs), labels)
    moved = torch.autograd.grad(there, list(model.parameters()))
    gap = math.sqrt(
        sum(float((m - g).square().sum()) for m, g in zip(moved, gradients, strict=True))
    )
    size = math.sqrt(sum(float(g.square().sum()) for g in gradients))
    assert loss_range == pytest.approx((loss - there).item(), rel=1e-3)
    assert change == pytest.approx(gap / size, rel=1e-3)


def test_predictiveness_looks_at_every_so_many_steps():
    options = {
        "arm": "batch", "network": "mlp", "train_images": 320, "learning_rate": 0.5, "reach": 2.0
    }  # fmt: skip
    found = probes.predictiveness(0, tiny.as_images(), every=2, **options)
    assert 0 <= found["accuracy"] <= 1
    assert found["step"] == [2, 4]
    assert len(found["loss_ranges"]) == 2
    assert found["loss_range"] == pytest.approx(sum(found["loss_ranges"]) / 2)
    with pytest.raises(BatchNormError, match="looks every 9 steps, and there are 5"):
        probes.predictiveness(0, tiny.as_images(), every=9, **options)


def test_figure_1_keeps_its_percentiles_and_accuracies():
    options = {"train_images": 240, "held_out_images": 80, "steps": 40, "learning_rate": 0.5}
    found = probes.figure_1(0, tiny.as_images(), arm="batch", **options)
    assert found["step"] == list(range(0, 41, 2))  # 4 steps an epoch, none after the 40th
    assert found["early_accuracy"] == found["test_accuracy"][found["step"].index(40 // 5)]
    curves = [value for value in found.values() if isinstance(value, list)]
    assert {len(curve) for curve in curves} == {21}
    columns = [found[f"percentile {percent}"] for percent in probes.PERCENTILES]
    for row in zip(*columns, strict=True):
        assert list(row) == sorted(row)
    assert found["accuracy"] == found["test_accuracy"][-1]


def test_percentiles_are_those_of_what_goes_into_the_last_sigmoids():
    images = tiny.as_images().test_images
    model = fitting.start("mlp", "batch", 0)
    inputs = probes._into_the_last_sigmoid(model, images)
    with torch.no_grad():
        by_hand = model.eval()[: list(dict(model.named_children())).index("activation3")](images)
    torch.testing.assert_close(inputs, by_hand)
    found = probes._percentiles(inputs.flatten(), (50, 99))
    assert found[0] == pytest.approx(by_hand.median().item(), abs=1e-3)
    assert (by_hand > found[1]).double().mean().item() == pytest.approx(0.01, abs=1e-3)


def test_training_stops_at_the_step_and_the_rate_has_decayed_there():
    batches = TensorBatches(tiny.as_images(), 64, 320)  # 5 steps an epoch
    seen = []
    model = fitting.fit(
        fitting.start("mlp", "none", 0), batches, 0.5, [0, 1], steps=7, after_step=seen.append
    )
    assert seen == [1, 2, 3, 4, 5, 6, 7]
    whole = fitting.fit(fitting.start("mlp", "none", 0), batches, 0.5, [0, 1])
    assert not torch.equal(model.linear1.weight, whole.linear1.weight)


EXCESS = {"sizes": (16, 32, 64), "rounds": 8}


def test_the_noise_of_a_batch_costs_a_loss_that_falls_with_its_size():
    found = probes.regularizer(0, tiny.as_images(), **TRAINED, **EXCESS)
    assert found["batch_size"] == [16, 32, 64]
    assert found["excess_loss"] == sorted(found["excess_loss"], reverse=True)
    assert -1.5 < found["power"] < -0.5
    assert found["pull"] > 0


def test_a_power_is_found_where_it_is_known():
    sizes = (8, 16, 32)
    assert probes._power(sizes, [3 / size**2 for size in sizes]) == pytest.approx(-2)
    assert math.isnan(probes._power(sizes, [1.0, 0.5, -0.1]))


def test_the_pull_is_the_derivative_along_the_weights():
    """Σ w · ∂L/∂w = dL(w · (1 + h))/dh at h = 0."""
    images = tiny.as_images()
    batch = [(images.train_images[:64], images.train_labels[:64])]
    model = probes._trained(0, images, 320, 1, 1.0).double()
    batch = [(batch[0][0].double(), batch[0][1])]

    def loss(scale):
        twin = copy.deepcopy(model)
        for module in twin.modules():
            if isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d):
                module.weight.data.mul_(scale)
        return probes._loss(twin, batch)

    quotient = (loss(1 + 1e-5) - loss(1 - 1e-5)) / 2e-5
    assert probes._pull(model, batch) == pytest.approx(quotient, rel=1e-5)


def test_noise_has_its_moments_and_is_absent_in_evaluation():
    torch.manual_seed(0)
    noise, x = arms.Noise(), torch.zeros(4_000, 50)
    y = noise(x)
    mean, std = y.mean(0), y.std(0)
    assert mean.abs().max() < 0.5 + 5 * 1.25 / math.sqrt(4_000)
    assert mean.std() == pytest.approx(1 / math.sqrt(12), rel=0.25)  # of U(−½, ½)
    assert 0 <= std.min() < std.max() < 1.25 * 1.1
    assert torch.equal(noise.eval()(x), x)


def ratio(network, tmp_path):
    config = CellConfig(
        arm="batch", network=network, data="tiny:images", epochs=3, batch_size=32, threads=1
    )
    cells.perform(config, tmp_path, None)
    return cells.outcome(Planned("batch", {}, 0, config), tmp_path).values["variance_ratio"]


def test_dropout_before_the_norms_shifts_the_variance(tmp_path):
    plain = ratio("lenet", tmp_path)
    before = ratio("lenet-dropout-before-0.5", tmp_path)
    assert before < 0.9 * plain


def test_a_variance_ratio_by_hand(tmp_path):
    ratio("lenet", tmp_path)
    (path,) = (tmp_path / "cells").glob("*.jsonl")
    cell = cells.read_cell(path)
    pairs = [
        (seen, kept)
        for layer in cell.last.layers.values()
        for seen, kept in zip(layer.input_var, layer.running_var, strict=True)
    ]
    assert len(pairs) == 6 + 16 + 120 + 84
    by_hand = math.prod((seen / kept) ** (1 / len(pairs)) for seen, kept in pairs)
    assert cells._variance_ratio(cell) == pytest.approx(by_hand, rel=1e-6)
