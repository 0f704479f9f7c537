"""What an installed package must do, away from the source: `python installed.py native`, or `torch`.

Run by tests/test_package.py, and on every wheel that is built; it needs the package alone.
"""

import sys
from pathlib import Path

import torch

import batchnorm
from tolerance import assert_near

ROOT = Path(__file__).resolve().parent.parent

installed = Path(batchnorm.__file__).resolve()
assert not installed.is_relative_to(ROOT / "src"), f"this is the source, not a package: {installed}"
assert (installed.parent / "py.typed").is_file()
assert batchnorm.backend().split(",")[0] == sys.argv[1], batchnorm.backend()

x = 3 + 2 * torch.randn(16, 5, 9, 9, generator=torch.Generator().manual_seed(0))
layer = batchnorm.BatchNorm2d(5)
y = layer(x)
exact = x.double()
var_biased, mean = torch.var_mean(exact, (0, 2, 3), correction=0, keepdim=True)
count = exact[:, 0].numel()
assert_near(y, (exact - mean) / (var_biased + layer.eps).sqrt(), count)
var_unbiased = exact.var((0, 2, 3))
assert_near(layer.running_var, 0.9 + 0.1 * var_unbiased, count)
y.sum().backward()
assert torch.isfinite(layer.weight.grad).all()

model = torch.nn.Sequential(torch.nn.Conv2d(5, 4, 3), torch.nn.BatchNorm2d(4), torch.nn.ReLU())
batchnorm.recalibrate(model, x.split(4))
folded = batchnorm.fold(model.eval(), x)
assert not any(isinstance(module, torch.nn.BatchNorm2d) for module in folded.modules())
torch.testing.assert_close(folded(x), model(x))
assert isinstance(batchnorm.check(model, x.split(4)), batchnorm.Findings)
print(batchnorm.backend(), installed.parent)  # noqa: T201
