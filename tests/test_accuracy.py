"""A small version of benchmarks/accuracy.py: nowhere less accurate than torch, and faults are seen."""

import pytest
import torch

import accuracy
import batchnorm
from batchnorm import reference

SHAPE = (8, 16, 14, 14)
CASES = list(accuracy.cases())
FLOAT32 = accuracy.Case(torch.float32, 1e4, "NCHW")


def test_every_dtype_and_layout_is_there():
    assert {(case.dtype, case.layout) for case in CASES} == {
        (dtype, layout) for dtype in accuracy.DTYPES for layout in accuracy.LAYOUTS
    }
    assert {case.mean for case in CASES if case.dtype is torch.float32} == {0, 100, 1e4, 1e6}


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_at_least_as_accurate_as_torch(case):
    worse = [row for row in accuracy.compare(case, SHAPE, batchnorm.batch_norm) if row.worse]
    assert not worse


@pytest.mark.parametrize("layout", accuracy.LAYOUTS)
@pytest.mark.parametrize("shape", [(32, 4, 28, 28), (256, 4, 10, 10), (2, 4, 112, 112)], ids=str)
def test_many_chunks_far_from_zero_merge_without_loss(layout, shape):
    # a double keeps 1e-10 of a mean of 1e6; means of chunks that were kept so cost 1e-13 of the variance
    case = accuracy.Case(torch.float64, 1e6, layout)
    rows = {row.quantity: row for row in accuracy.compare(case, shape, batchnorm.batch_norm)}
    assert rows["running var"].ours <= rows["running var"].bound < 1e-14


def definition(x, running_mean, running_var, weight, bias, training, momentum, eps, *,
               moments=reference.moments, correction=1):  # fmt: skip
    assert training
    mean, var_biased = moments(x)
    count = x.numel() // x.shape[1]
    with torch.no_grad():
        running_mean.lerp_(mean, momentum)
        running_var.lerp_(var_biased * count / (count - correction), momentum)
    return reference.normalize(x, mean, var_biased, weight, bias, eps)


def one_pass(x):
    axes = [axis for axis in range(x.dim()) if axis != 1]
    mean = x.mean(axes)
    return mean, (x.square().mean(axes) - mean.square()).clamp_min(0)


def worse(case, ours):
    return {row.quantity for row in accuracy.compare(case, SHAPE, ours) if row.worse}


def test_the_definition_agrees_with_the_reference():
    case = accuracy.Case(torch.float64, 0.0, "NCHW")
    assert not worse(case, definition)
    rows = accuracy.compare(case, SHAPE, definition)
    assert max(row.ours for row in rows) < 1e-13


FAULTS = {
    "the variance in one pass": (
        FLOAT32, lambda *a: definition(*a, moments=one_pass), {"y", "running var"},
    ),
    "the running variance without Bessel": (
        FLOAT32, lambda *a: definition(*a, correction=0), {"running var"},
    ),
    "an output rounded to bfloat16": (
        accuracy.Case(torch.float32, 0.0, "channels_last"),
        lambda *a: definition(*a).bfloat16().float(),
        {"y"},
    ),
    "no number": (FLOAT32, lambda *a: definition(*a) * float("nan"), {"y", "dx"}),
}  # fmt: skip


@pytest.mark.parametrize(("case", "mutant", "quantities"), FAULTS.values(), ids=FAULTS)
def test_a_fault_is_seen(case, mutant, quantities):
    assert quantities <= worse(case, mutant)


def test_the_page_marks_what_is_worse():
    right = accuracy.compare(FLOAT32, SHAPE, batchnorm.batch_norm)
    wrong = accuracy.compare(FLOAT32, SHAPE, FAULTS["no number"][1])
    assert "**" not in accuracy.table(right)
    assert "**nan**" in accuracy.table(wrong)
    assert f"torch {torch.__version__}" in accuracy.page(right, SHAPE)
