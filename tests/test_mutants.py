"""An oracle is seen to fail: each fault, put into the code, breaks the test that stands for it."""

from functools import partial

import pytest
import torch
from torch import Tensor

import test_accumulation
import test_axis
import test_conventions
import test_counting
import test_estimators
import test_evaluation
import test_frozen
import test_ghost
import test_layers
import test_mask
import test_renorm
import test_split
import test_sync
import test_verbs
import test_views
from batchnorm import conventions, functional, kernels, layers, masks, reference
from batchnorm.kernels import verbs
from batchnorm.lab import summary as lab_summary
from batchnorm.model import counting, precision, recalibration
from batchnorm.variants import accumulation, estimators, frozen, ghost, renorm, split, sync, variant
from batchnorm.views import verdict


def operator(
    *, eps_scale=1.0, bessel=True, swapped=False, unbiased=False, stop_mean=False, affine=True,
    in_place=True,
):  # fmt: skip
    """Batch norm by elementary operations; with the defaults it is right."""

    def batch_norm(
        x,
        running_mean,
        running_var,
        weight,
        bias,
        training,
        momentum,
        eps,
        residual,
        activation,
        pool=None,
    ):
        assert residual is None
        assert activation is None
        assert pool is None
        over = [axis for axis in range(x.dim()) if axis != 1]
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


def the_mask_test():
    test_mask.test_it_is_batch_norm_of_the_packed_values((4, 3, 7), "C channels", torch.float64)


def all_of_it(right):
    return lambda x, keep: right(x, torch.ones_like(keep))


def without_bessel(running_mean, running_var, count, mean, squares, momentum):
    masks_update(running_mean, running_var, count + 1, mean, squares, momentum)


masks_update = masks.update_running
MASKS = {
    "padding in the statistics": (verbs, "moments", all_of_it(verbs.moments), the_mask_test),
    "Bessel's factor by another count": (masks, "update_running", without_bessel, the_mask_test),
    "statistics that move for one value": (
        masks, "update_running",
        lambda mean, var, count, *rest: masks_update(mean, var, count.clamp(min=2), *rest),
        test_mask.test_nothing_left_and_one_value_left,
    ),
    "padding that is not 0": (
        masks, "fit", lambda _mask, x, *_: torch.ones_like(x, dtype=torch.bool),
        test_mask.test_nan_beneath_the_mask_reaches_nothing,
    ),
    "channels moved to the wrong place": (
        functional, "channels_on_axis_1",
        lambda x, axis, flat: x.reshape(-1, x.shape[axis]) if flat else x.movedim(axis, 1),
        lambda: test_axis.test_any_axis((2, 5, 3, 4), 2, torch.float64),
    ),
}  # fmt: skip


@pytest.mark.parametrize(("module", "name", "fault", "oracle"), MASKS.values(), ids=MASKS)
def test_a_fault_in_mask_or_axis_is_seen(monkeypatch, module, name, fault, oracle):
    oracle()
    monkeypatch.setattr(module, name, fault)
    with pytest.raises(AssertionError):
        oracle()


def merged_without_the_gap(parts):
    count, mean, squares = parts.unbind(1)
    return count.sum(0), (mean * count).sum(0) / count.sum(0).clamp(min=1), squares.sum(0)


def merged_without_weights(parts):
    count, mean, _ = parts.unbind(1)
    return count.sum(0), mean.mean(0), sync_merge(parts)[2]


def without_means(*arguments):
    *first, total, dot = arguments[:7]
    return input_gradient(*first, total * 0, dot, *arguments[7:])


def without_invstd(dy, x, mean, invstd, *rest):
    return input_gradient(dy, x, mean, torch.ones_like(invstd), *rest)


def of_each_by_itself(parts):
    return sync_merge(parts[:1])


def every_pass(self):
    self.layer.num_batches_tracked.add_(1)
    moved(self)


sync_merge, input_gradient, moved = sync.merge, verbs.input_gradient, counting._Gathered.move
COUNTING = {
    "merged without the gap between means": (
        sync, "merge", merged_without_the_gap,
        test_sync.test_merged_moments_are_those_of_the_joined_batch,
    ),
    "merged with every part alike": (
        sync, "merge", merged_without_weights,
        test_sync.test_merged_moments_are_those_of_the_joined_batch,
    ),
    "an input gradient without the mean": (
        verbs, "input_gradient", without_means,
        lambda: test_verbs.test_shares_of_a_larger_batch("kernels", pytest.MonkeyPatch()),
    ),
    "an input gradient without the deviation": (
        verbs, "input_gradient", without_invstd,
        lambda: test_verbs.test_shares_of_a_larger_batch("kernels", pytest.MonkeyPatch()),
    ),
    "micro-batches with the moments of the first": (
        accumulation, "merge", of_each_by_itself,
        lambda: test_accumulation.test_it_is_the_large_batch(torch.nn.BatchNorm2d, [2, 2, 2]),
    ),
    "an activation's gradient left out": (
        accumulation, "_before", lambda _activation, dy, *_: dy,
        lambda: test_accumulation.test_fused_and_in_place(torch.nn.SiLU),
    ),
    "a recipe that is not what was kept": (
        accumulation, "normalized",
        lambda *arguments: normalized(*arguments)
        * (1 if torch._C._current_graph_task_id() == -1 else 2),
        lambda: test_accumulation.test_fused_and_in_place(torch.nn.ReLU),
    ),
    "a counter that moves twice": (
        counting._Gathered, "move", every_pass,
        lambda: test_counting.TestOneUpdate().test_both_at_once(),
    ),
    "micro-batches that weigh alike": (
        counting, "_together", lambda _layer, count: min(count, 2),
        lambda: test_counting.TestOneUpdate().test_micro_batches_count_as_the_large_batch(
            torch.nn.BatchNorm2d, 0.1
        ),
    ),
    "a cast that is not held up": (
        precision, "HALVES", set(),
        lambda: test_counting.TestKeepFloat32().test_where_a_bfloat16_mean_stands_still(),
    ),
}  # fmt: skip
normalized = accumulation.normalized


@pytest.mark.parametrize(("module", "name", "fault", "oracle"), COUNTING.values(), ids=COUNTING)
def test_a_fault_in_what_counts_is_seen(monkeypatch, module, name, fault, oracle):
    monkeypatch.setattr(module, name, fault)
    with pytest.raises(AssertionError):
        oracle()


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

    def late(self, *arguments):
        self.num_batches_tracked.add_(1)
        return right(self, *arguments)

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
