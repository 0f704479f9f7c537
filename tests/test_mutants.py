"""An oracle is seen to fail: each fault, put into the code, breaks the test that stands for it."""

from functools import partial

import pytest
import torch
from torch import Tensor

import test_conventions
import test_estimators
import test_evaluation
import test_frozen
import test_ghost
import test_layers
import test_renorm
import test_split
import test_views
from batchnorm import conventions, kernels, layers, reference
from batchnorm.lab import summary as lab_summary
from batchnorm.model import recalibration
from batchnorm.variants import estimators, frozen, ghost, renorm, split, variant
from batchnorm.views import verdict


def operator(
    *, eps_scale=1.0, bessel=True, swapped=False, unbiased=False, stop_mean=False, affine=True,
    axes=None, in_place=True,
):  # fmt: skip
    """Batch norm by elementary operations; with the defaults it is right."""

    def batch_norm(
        x, running_mean, running_var, weight, bias, training, momentum, eps, residual, activation
    ):
        assert residual is None
        assert activation is None
        over = axes or [axis for axis in range(x.dim()) if axis != 1]
        shape = [1, -1] + [1] * (x.dim() - 2)
        mean, var = running_mean, running_var
        if training:
            count = x.numel() // x.shape[1]
            mean, var = x.mean(over), x.var(over, correction=int(unbiased))
            mean = mean.detach() if stop_mean else mean
            if running_mean is not None and in_place:
                share = 1 - momentum if swapped else momentum
                with torch.no_grad():
                    running_mean.lerp_(mean.to(running_mean), share)
                    running_var.lerp_(
                        (var * count / (count - 1 if bessel else count)).to(running_var), share
                    )
        y = (x - mean.view(shape)) / (var.view(shape) + eps * eps_scale).sqrt()
        if affine and weight is not None:
            y = y * weight.view(shape)
        return y if bias is None else y + bias.view(shape)

    return batch_norm


def the_reference_test():
    for std in (2.0, 1e-3):
        test_layers.test_training_beside_the_reference((4, 3, 5, 7), torch.float32, std)


def torch_in_training():
    pair = test_layers.PAIRS[2]
    test_layers.test_same_numbers_as_torch(*pair, options={}, training=True)


def torch_in_evaluation():
    pair = test_layers.PAIRS[2]
    test_layers.test_same_numbers_as_torch(*pair, options={}, training=False)


def a_pixel_is_a_sample():
    test_layers.test_a_pixel_is_a_sample()


def test_the_operator_without_a_fault_passes(monkeypatch):
    monkeypatch.setattr(kernels, "batch_norm", operator())
    the_reference_test()
    torch_in_evaluation()


OPERATORS = {
    "eps forgotten": (operator(eps_scale=0), the_reference_test),
    "eps ten times": (operator(eps_scale=10), torch_in_evaluation),
    "running variance without Bessel": (operator(bessel=False), the_reference_test),
    "momentum swapped": (operator(swapped=True), the_reference_test),
    "normalized with the unbiased variance": (operator(unbiased=True), the_reference_test),
    "mean held constant in backward": (operator(stop_mean=True), the_reference_test),
    "weight forgotten": (operator(affine=False), torch_in_training),
    "statistics not updated": (operator(in_place=False), torch_in_training),
}


@pytest.mark.parametrize(("mutant", "oracle"), OPERATORS.values(), ids=OPERATORS)
def test_a_fault_in_the_operator_is_seen(monkeypatch, mutant, oracle):
    monkeypatch.setattr(kernels, "batch_norm", mutant)
    with pytest.raises(AssertionError):
        oracle()


def test_statistics_of_each_image_by_itself_are_seen(monkeypatch):
    def per_position(x, *arguments):
        if x.dim() == 4:
            x = x + x.mean((2, 3), keepdim=True)
        return operator()(x, *arguments)

    monkeypatch.setattr(kernels, "batch_norm", per_position)
    with pytest.raises(AssertionError):
        a_pixel_is_a_sample()


def naive_moments(x: Tensor) -> tuple[Tensor, Tensor]:
    mean = x.mean((0, *range(2, x.dim())))
    return mean, x.square().mean((0, *range(2, x.dim()))) - mean.square()


def test_a_variance_of_one_pass_is_seen(monkeypatch):
    test_layers.test_the_reference_keeps_its_digits_far_from_zero()
    monkeypatch.setattr(reference, "moments", naive_moments)
    with pytest.raises(AssertionError):
        test_layers.test_the_reference_keeps_its_digits_far_from_zero()


def test_a_counter_that_starts_at_zero_is_seen(monkeypatch):
    right = layers.Forward._normalize_and_average

    def late(self, x, residual, activation):
        self.num_batches_tracked.add_(1)
        return right(self, x, residual, activation)

    monkeypatch.setattr(layers.Forward, "_normalize_and_average", late)
    pair = test_layers.PAIRS[2]
    with pytest.raises(AssertionError):
        test_layers.test_same_numbers_as_torch(*pair, options={"momentum": None}, training=True)


def merge_without_the_gap(self, mean, var_biased, count):
    total = self.count + count
    self.squares = self.squares + var_biased.double() * count
    self.mean = (self.mean * self.count + mean.double() * count) / total
    self.count = total


@pytest.fixture
def trained():
    return test_evaluation.trained.__wrapped__()


def test_a_merge_that_forgets_the_gap_between_the_means_is_seen(monkeypatch, trained):
    monkeypatch.setattr(recalibration.Moments, "merge", merge_without_the_gap)
    with pytest.raises(AssertionError):
        test_evaluation.test_population_statistics_of_the_first_layer_do_not_depend_on_the_split(
            trained, 7
        )


def test_a_mean_over_the_survivors_is_seen(monkeypatch, tmp_path):
    right = lab_summary.mean_curve

    def survivors(cells, quantity):
        longest = max(cells, key=lambda cell: len(cell.evaluations))
        return right([longest], quantity)

    monkeypatch.setattr(test_views, "mean_curve", survivors)
    with pytest.raises(AssertionError):
        test_views.test_the_mean_ends_where_the_first_seed_diverged(tmp_path)


def test_a_sampling_error_of_the_variance_is_seen(monkeypatch, tmp_path):
    monkeypatch.setattr(verdict, "sampling_error", lambda share, n: share * (1 - share) / n)
    with pytest.raises(AssertionError):
        test_views.test_is_it_090_answers_with_the_sampling_error(tmp_path)


def whole_batch(x, _groups):
    return [(x, 1)]


def interleaved(x, groups):
    return [(x[place::groups], 1) for place in range(groups)]


def rest_dropped(x, groups):
    return [(x[: len(x) // groups * groups], groups)]


def plain_mean_of_groups(parts):
    means, variances = (torch.cat([part[place] for part in parts]).mean(0) for place in (0, 1))
    return means, variances


def with_bessel_of_the_batch_axis(right):
    """As torchrl has it: M / (M − 1) with M the samples, whatever the size in space."""

    def moments(x):
        mean, var_biased = right(x)
        return mean, var_biased * len(x) / (len(x) - 1)

    return moments


def progress_beyond_one(seen, start, end):
    return ((seen - start) / max(end - start, 1)).clamp(0)


def eps_outside(self, mean, var):
    running_mean, running_var = self.running()
    sigma = running_var.sqrt() + self.eps
    r_limit, d_limit = (limit.to(mean) for limit in self.limits())
    r = ((var.sqrt() + self.eps) / sigma).clamp(1 / r_limit, r_limit)
    return r, ((mean - running_mean) / sigma).clamp(-d_limit, d_limit)


def d_not_clipped(self, mean, var):
    running_mean, running_var = (running.to(mean) for running in self.running())
    sigma = (running_var + self.eps).sqrt()
    r_limit, _ = (limit.to(mean) for limit in self.limits())
    r = ((var + self.eps).sqrt() / sigma).clamp(1 / r_limit, r_limit)
    return r, (mean - running_mean) / sigma


def variance_averaged(self, mean, var):
    variant.Variant.move(self, mean, var)


GHOSTS = partial(test_ghost.test_beside_the_groups_one_by_one, 13, 4, torch.float64, (3, 7))
RENORMS = partial(
    test_renorm.test_beside_the_paper_s_algorithm, (4, 3, 5, 3), torch.float64, 1.2, 0.3
)
SCHEDULE = test_renorm.test_the_paper_s_schedule_ends_at_its_limits
DEBIASED = partial(
    test_estimators.test_beside_the_definition, "debiased", False, 0.1, torch.float64
)
KERAS = test_conventions.TestKeras().test_training_goes_on_here_as_there
FAMILY = {
    "the whole batch as one group": (ghost, "_parts", whole_batch, GHOSTS),
    "groups interleaved": (ghost, "_parts", interleaved, GHOSTS),
    "the rest dropped": (ghost, "_parts", rest_dropped, GHOSTS),
    "groups weighed alike": (ghost, "_pooled", plain_mean_of_groups, GHOSTS),
    "Bessel's factor of the samples": (
        kernels, "moments", with_bessel_of_the_batch_axis(kernels.moments), RENORMS,
    ),
    "a schedule beyond its end": (renorm, "_progress", progress_beyond_one, SCHEDULE),
    "eps outside the root": (renorm.RenormBatchNorm, "_correction", eps_outside, RENORMS),
    "d not clipped": (renorm.RenormBatchNorm, "_correction", d_not_clipped, RENORMS),
    "the variance averaged, not σ": (renorm.RenormBatchNorm, "_move", variance_averaged, RENORMS),
    "never debiased": (
        estimators.EstimatorBatchNorm, "share", lambda self: self.momentum, DEBIASED,
    ),
    "domains that share statistics": (
        split.SplitBatchNorm, "norm", property(lambda self: self.domains["clean"]),
        partial(test_split.test_each_domain_is_a_norm_of_its_own, shared=False),
    ),
    "eps kept in old variances": (
        frozen.FrozenBatchNorm, "_load_from_state_dict", torch.nn.Module._load_from_state_dict,
        test_frozen.test_a_variance_of_version_2_was_used_without_eps,
    ),
    "Keras's momentum kept": (
        conventions, "_imported", lambda state, count: IMPORTED(
            state._replace(momentum=1 - state.momentum), count
        ), KERAS,
    ),
    "no Bessel's factor on the way in": (
        conventions, "_imported", lambda state, _count: IMPORTED(state, None), KERAS,
    ),
    "weight and bias exchanged": (
        conventions, "_imported", lambda state, count: IMPORTED(
            state._replace(weight=state.bias, bias=state.weight), count
        ), KERAS,
    ),
}  # fmt: skip
IMPORTED = conventions._imported


@pytest.mark.parametrize(("owner", "name", "mutant", "oracle"), FAMILY.values(), ids=FAMILY)
def test_a_fault_in_the_family_is_seen(monkeypatch, owner, name, mutant, oracle):
    oracle()
    monkeypatch.setattr(owner, name, mutant)
    with pytest.raises(AssertionError):
        oracle()
