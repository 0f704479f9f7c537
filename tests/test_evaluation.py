"""What is measured, and that everything borrowed for it comes back."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import tiny
from batchnorm import kernels
from batchnorm.lab import arms
from batchnorm.lab.evaluation import (
    evaluate,
    layer_statistics,
    population_statistics,
)
from batchnorm.model.recalibration import Moments


def state(model: nn.Module) -> dict[str, object]:
    buffers = {name: b.clone() for name, b in model.named_buffers()}
    return {"modes": [m.training for m in model.modules()], "buffers": buffers}


def assert_same_state(model: nn.Module, before: dict[str, object]) -> None:
    assert [m.training for m in model.modules()] == before["modes"]
    for name, buffer in model.named_buffers():
        torch.testing.assert_close(buffer, before["buffers"][name], rtol=0, atol=0)


@pytest.fixture
def trained() -> nn.Module:
    torch.manual_seed(0)
    model = tiny.network().train()
    model.norm1.eval()  # frozen: its mode must come back, too
    inputs, _, _, _ = tiny.images()
    model(inputs)
    return model


def batches(size: int = 32):
    inputs, labels, _, _ = tiny.images()
    return zip(inputs.split(size), labels.split(size), strict=True)


def test_evaluate_is_the_mean_over_images_whatever_the_batches(trained):
    before = state(trained)
    inputs, labels, _, _ = tiny.images()
    frozen = tiny.network().eval()
    frozen.load_state_dict(trained.state_dict())
    with torch.no_grad():
        logits = frozen(inputs)
    loss, accuracy = evaluate(trained, batches(50), "cpu")
    assert loss == pytest.approx(F.cross_entropy(logits, labels).item(), rel=1e-5)
    assert accuracy == (logits.argmax(1) == labels).double().mean().item()
    assert_same_state(trained, before)


@pytest.mark.parametrize("size", [7, 32, 320])
def test_population_statistics_of_the_first_layer_do_not_depend_on_the_split(trained, size):
    inputs, _, _, _ = tiny.images()
    with torch.no_grad():
        x = trained.conv1(trained.pool(inputs)).double()
    before, buffer = state(trained), trained.norm1.running_mean
    with population_statistics(trained, batches(size), "cpu") as found:
        assert found
        mean, var = trained.norm1.running_mean.double(), trained.norm1.running_var.double()
        torch.testing.assert_close(mean, x.mean((0, 2, 3)), rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(var, x.var((0, 2, 3)), rtol=1e-5, atol=1e-6)
    assert_same_state(trained, before)
    assert trained.norm1.running_mean is buffer


def test_deeper_layers_see_what_they_see_in_training(trained):
    """One batch: the population is that batch, so training mode must give the same numbers."""
    inputs, _, _, _ = tiny.images()
    twin = tiny.network().train()
    twin.load_state_dict(trained.state_dict())
    twin.norm1.momentum = twin.norm2.momentum = 1.0
    twin(inputs)
    with population_statistics(trained, batches(320), "cpu"):
        torch.testing.assert_close(trained.norm2.running_mean, twin.norm2.running_mean)
        torch.testing.assert_close(trained.norm2.running_var, twin.norm2.running_var)


def test_everything_comes_back_when_the_loader_raises(trained):
    def broken():
        yield from list(batches())[:2]
        raise OSError("the disk went away")

    before = state(trained)
    with pytest.raises(OSError, match="went away"), population_statistics(trained, broken(), "cpu"):
        pytest.fail("the body must not run")
    assert_same_state(trained, before)
    assert not trained.norm1._forward_pre_hooks


def test_the_notes_layer_is_recalibrated_too():
    model, _ = arms.apply(tiny.network(), "batch-note")
    with population_statistics(model, batches(), "cpu"):
        assert model.norm1.running_mean.shape == (8,)
    assert model.norm1.running_mean.shape == (1,)


def test_a_network_without_batch_norm_has_nothing_to_recalibrate():
    with population_statistics(tiny.without_norm(), batches(), "cpu") as found:
        assert not found


def test_moments_merge_to_those_of_the_joined_batches():
    torch.manual_seed(0)
    x = torch.randn(100, 3, 4, dtype=torch.float64) * torch.tensor([1e-3, 1, 50.0])[:, None] + 1e4
    merged = Moments()
    for piece in x.split([1, 2, 30, 67]):
        merged.merge(*kernels.moments(piece), len(piece) * 4)
    torch.testing.assert_close(merged.mean, x.mean((0, 2)), rtol=1e-14, atol=0)
    torch.testing.assert_close(merged.var_unbiased, x.var((0, 2)), rtol=1e-6, atol=0)
    assert merged.count == 400


def test_layer_statistics_are_those_of_input_and_output(trained):
    inputs, _, _, _ = tiny.images()
    before = state(trained)
    found = layer_statistics(trained, ["norm1", "norm2"], inputs)
    with torch.no_grad():
        x = trained.conv1(trained.pool(inputs))
    assert found["norm1"].input_mean == pytest.approx(x.mean((0, 2, 3)).tolist(), rel=1e-5)
    assert found["norm1"].input_var == pytest.approx(
        x.var((0, 2, 3), correction=0).tolist(), rel=1e-5
    )
    assert found["norm2"].weight == [0.0] * 8
    assert found["norm2"].output_var == [0.0] * 8
    assert_same_state(trained, before)
    assert not trained.norm1._forward_hooks


def test_layer_statistics_of_a_diverged_network_are_none():
    model = tiny.network()
    nn.init.constant_(model.conv1.weight, float("nan"))
    found = layer_statistics(model, ["norm1"], tiny.images()[0])
    assert found["norm1"].input_mean == [None] * 8


def test_instance_norm_keeps_its_own_statistics():
    model = nn.Sequential(nn.InstanceNorm2d(1, track_running_stats=True))
    with population_statistics(model, batches(), "cpu") as found:
        assert not found
