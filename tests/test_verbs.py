"""The four verbs, natively and by torch's operators, beside the float64 reference."""

import pytest
import torch

from batchnorm import reference
from batchnorm.kernels import native, verbs
from tolerance import assert_near

EPS = 1e-5
LAYOUTS = {
    "contiguous": lambda x: x,
    "channels last": lambda x: x.contiguous(memory_format=torch.channels_last),
    "strided": lambda x: torch.cat([x, x], 3)[..., : x.shape[3]],
}


def problem(dtype, layout):
    generator = torch.Generator().manual_seed(1)
    x, dy = (
        LAYOUTS[layout]((torch.randn(6, 5, 7, 3, generator=generator) + 2).to(dtype))
        for _ in range(2)
    )
    return x, dy, torch.rand(5, generator=generator) + 0.5, torch.rand(5, generator=generator)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("by", ["kernels", "torch's operators"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_together_they_are_forward_and_backward(dtype, by, layout, monkeypatch):
    monkeypatch.setattr(native, "NATIVE", by == "kernels")
    x, dy, weight, bias = problem(dtype, layout)
    with torch.no_grad():
        count, mean, squares = verbs.moments(x)
        invstd = (squares / count + EPS).rsqrt()
        y = verbs.normalize(x, mean, invstd, weight, bias)
        total, dot = verbs.reduce_gradient(dy, x, mean)
        dx = verbs.input_gradient(dy, x, mean, invstd, weight, total / count, dot / count)
    exact, exact_mean, exact_var = reference.forward(x.double(), weight.double(), bias.double())
    wanted = reference.backward(dy.double(), x.double(), weight.double())
    assert count.tolist() == [126] * 5
    wide = torch.promote_types(dtype, torch.float32)  # the kernels give doubles, of float32 sums
    assert_near(mean.to(wide), exact_mean, 126)
    assert_near(squares.to(wide), exact_var * 126, 126)
    assert_near(y, exact, 126)
    assert_near(dx, wanted[0], 126)
    for mine, other in ((total, wanted[2]), (dot * invstd, wanted[1])):
        # sums of chunks are float32 also where the result is double
        allowed = 1e-12 if dtype == torch.float64 else 1e-5
        torch.testing.assert_close(mine.double(), other, rtol=allowed, atol=allowed * 126)
    assert (y.dtype, dx.dtype) == (dtype, dtype)


@pytest.mark.parametrize("by", ["kernels", "torch's operators"])
def test_shares_of_a_larger_batch(by, monkeypatch):
    """What the verbs are for: the sums of all parts, between the verbs of each."""
    monkeypatch.setattr(native, "NATIVE", by == "kernels")
    x, dy, weight, _ = problem(torch.float64, "contiguous")
    wanted, *_ = reference.backward(dy, x, weight.double())
    mean, var = reference.moments(x)
    invstd = (var + EPS).rsqrt()
    with torch.no_grad():
        sums = [verbs.reduce_gradient(dy[i], x[i], mean) for i in (slice(2), slice(2, 6))]
        total, dot = (sum(each) / 126 for each in zip(*sums, strict=True))
        parts = [
            verbs.input_gradient(dy[i], x[i], mean, invstd, weight, total, dot)
            for i in (slice(2), slice(2, 6))
        ]
    torch.testing.assert_close(torch.cat(parts), wanted, rtol=1e-10, atol=1e-10)


def test_of_nothing():
    x = torch.empty(0, 3, 4)
    with torch.no_grad():
        assert [v.tolist() for v in verbs.moments(x)] == [[0.0] * 3] * 3
        zeros, ones = torch.zeros(3), torch.ones(3)
        assert verbs.normalize(x, zeros, ones).shape == x.shape
        assert [v.tolist() for v in verbs.reduce_gradient(x, x, zeros)] == [[0.0] * 3] * 2
        assert verbs.input_gradient(x, x, zeros, ones, None, zeros, zeros).shape == x.shape


def test_the_kernel_checks_addresses_and_sizes():
    with pytest.raises(ValueError, match="no address of x, dy, dx, statistics or sums"):
        native._cpu.input_gradient(0, False, 2, 3, 4, 1, 0, 0, 0, 0, 0, 0, 0)
    with pytest.raises(ValueError, match="positive"):
        native._cpu.input_gradient(0, False, 2, 0, 4, 1, 8, 8, 8, 0, 0, 8, 8)
