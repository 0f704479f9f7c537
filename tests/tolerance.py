"""How far apart two correct results may be."""

import torch
from torch import Tensor


def bound(dtype: torch.dtype, count: int, scale: float = 1.0) -> float:
    """An absolute bound on the error of a normalized value, a gradient, or a mean.

    A sum of `count` terms, taken pairwise or in blocks, errs by at most about log2(count) unit
    roundoffs of the largest partial sum; the handful of operations around it (subtract, divide,
    multiply, add, each correct to half a unit, and the square root) add 8 more. `scale` is the
    largest absolute value in the result.
    """
    units = max(count, 2).bit_length() + 8
    return units * torch.finfo(dtype).eps * max(scale, 1.0)


def assert_no_worse(actual: Tensor, theirs: Tensor, exact: Tensor, count: int) -> None:
    """`actual` errs by no more than the larger of twice theirs and the bound; NaN where they have it."""
    assert actual.dtype == theirs.dtype
    assert actual.shape == theirs.shape
    same = (actual == theirs) | (actual.isnan() & theirs.isnan())  # infinities, too
    if bool(same.all()):
        return
    off = ~same
    assert actual[off].isfinite().all()
    largest = float(exact[exact.isfinite()].abs().max())
    error = float((actual.double() - exact)[off].abs().max())
    other = float((theirs.double() - exact)[off].abs().max())
    allowed = max(2 * other, bound(actual.dtype, count, largest))
    assert error <= allowed, f"error {error:.3g}, theirs {other:.3g}, allowed {allowed:.3g}"


def assert_near(actual: Tensor, exact: Tensor, count: int, scale: float | None = None) -> None:
    """`actual` is as near to the float64 result as its dtype allows."""
    largest = float(exact.abs().max()) if scale is None and exact.numel() else scale or 1.0
    allowed = bound(actual.dtype, count, largest)
    torch.testing.assert_close(actual.double(), exact, rtol=0, atol=allowed, equal_nan=True)
