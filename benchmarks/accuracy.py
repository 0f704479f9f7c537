"""How far torch's operator and ours are from the definition: docs/accuracy.md.

    python benchmarks/accuracy.py [--shape 32,64,28,28] [--json FILE]

The definition is computed in NumPy with two passes, in float64, and for float64 inputs in longdouble:
not by torch's operator, which loses digits in float64 too where the mean is large beside the spread.
Inputs are rounded to their dtype first, so every error is the operator's own. A number is the largest
error ÷ the largest value.

The exit status is 1 where ours errs by more than torch's and by more than a derived bound: an output
is rounded once to its dtype (half a unit); statistics and sums are taken in `units` steps of the
accumulator's roundoff (a pairwise or blocked sum of M terms: log2 M of them, and 8 for the operations
around it), each relative to Σ|terms|, which is larger than |Σ terms| by the sum's condition.
"""

import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.nn import functional as F

import batchnorm
import figures
from batchnorm.lab.environment import environment
from batchnorm.views import markdown

PAGE = Path(__file__).parent.parent / "docs" / "accuracy.md"
HEAD = """\
# Accuracy

Largest error ÷ largest value of a training step's results, against the definition computed in float64
with two passes (for float64 inputs in longdouble); made by `python benchmarks/accuracy.py`.
Inputs are normal with standard deviation 1 and the mean given, {shapes}; weight and
bias are random, momentum is 0.1, eps 1e-5.

**Bold**: less accurate than torch, and than rounding explains: half a unit of the output's dtype, and for a
sum of M terms log2 M + 8 units of the accumulator, each relative to Σ |terms|. A mean near 0 is a small sum of
large terms, and its error is large beside it.
"""
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
MEANS = (0.0, 100.0, 1e4, 1e6)
LAYOUTS = ("NCHW", "channels_last", "2-D")
QUANTITIES = ("y", "dx", "dweight", "dbias", "running mean", "running var")
EPS, MOMENTUM = 1e-5, 0.1

Array = npt.NDArray[Any]
Results = dict[str, Tensor]
BatchNorm = Callable[..., Tensor]


@dataclass(frozen=True)
class Case:
    """What goes in."""

    dtype: torch.dtype
    mean: float
    layout: str

    @property
    def name(self) -> str:
        """For messages."""
        return f"{str(self.dtype).removeprefix('torch.')}, {self.layout}, mean {self.mean:g}"


@dataclass(frozen=True)
class Inputs:
    """x, dy: (N, C, *spatial); weight, bias: (C,)."""

    x: Tensor
    dy: Tensor
    weight: Tensor
    bias: Tensor


@dataclass(frozen=True)
class Row:
    """One quantity of a case: relative errors, and what ours may be."""

    case: Case
    quantity: str
    torch: float
    ours: float
    bound: float

    @property
    def worse(self) -> bool:
        """Than torch, and than rounding explains; an error that is no number is the largest."""
        return not self.ours <= max(self.torch, self.bound)


def inputs_of(case: Case, shape: tuple[int, int, int, int]) -> Inputs:
    """The same normal numbers for every case, rounded to its dtype."""
    generator = torch.Generator().manual_seed(0)
    N, C, H, W = shape
    sizes = (N * H * W, C) if case.layout == "2-D" else shape
    x, dy = (torch.randn(sizes, generator=generator, dtype=torch.float64) for _ in range(2))
    weight, bias = (torch.rand(C, generator=generator) + 0.5 for _ in range(2))
    parameters = torch.float64 if case.dtype is torch.float64 else torch.float32
    last = case.layout == "channels_last"
    form = torch.channels_last if last else torch.contiguous_format
    x, dy = (v.to(case.dtype).contiguous(memory_format=form) for v in (x + case.mean, dy))
    return Inputs(x, dy, weight.to(parameters), bias.to(parameters))


def step(batch_norm: BatchNorm, inputs: Inputs) -> Results:
    """Forward and backward in training, running statistics from 0 and 1."""
    leaves = [v.detach().clone().requires_grad_() for v in (inputs.x, inputs.weight, inputs.bias)]
    x, weight, bias = leaves
    mean, var_unbiased = torch.zeros_like(inputs.weight), torch.ones_like(inputs.weight)
    y = batch_norm(x, mean, var_unbiased, weight, bias, True, MOMENTUM, EPS)
    gradients = torch.autograd.grad(y, leaves, inputs.dy)
    found = (y.detach(), *gradients, mean, var_unbiased)
    return dict(zip(QUANTITIES, found, strict=True))


def exactly(inputs: Inputs) -> tuple[dict[str, Array], dict[str, float]]:
    """The results by the definition, and the condition Σ|terms| ÷ largest |Σ terms| of each."""
    wide: type[np.floating[Any]] = np.longdouble if inputs.x.dtype is torch.float64 else np.float64
    x, dy, weight, bias = (
        v.double().numpy().astype(wide) for v in (inputs.x, inputs.dy, inputs.weight, inputs.bias)
    )
    axes = tuple(axis for axis in range(x.ndim) if axis != 1)
    count = x.size // x.shape[1]
    weight_, bias_ = (np.expand_dims(v, tuple(range(1, x.ndim - 1))) for v in (weight, bias))
    mean = x.mean(axes, keepdims=True)
    centred = x - mean
    centred -= centred.mean(axes, keepdims=True)  # what rounding left in the mean
    var_biased = np.square(centred).mean(axes, keepdims=True)
    invstd = 1 / np.sqrt(var_biased + wide(EPS))
    x_hat = centred * invstd
    dweight, dbias = (terms.sum(axes, keepdims=True) for terms in (dy * x_hat, dy))
    dx = weight_ * invstd * (dy - dbias / count - x_hat * dweight / count)
    share: Any = wide(MOMENTUM)
    running_mean: Array = share * mean
    running_var = (1 - share) + share * var_biased * count / (count - 1)
    found = (weight_ * x_hat + bias_, dx, dweight, dbias, running_mean, running_var)
    exact = dict(zip(QUANTITIES, found, strict=True))
    sums = {"dweight": dy * x_hat, "dbias": dy, "running mean": share * x / count}
    condition = {
        name: float(np.abs(terms).sum(axes).max() / np.abs(exact[name]).max())
        for name, terms in sums.items()
    }
    return exact, condition


def error(actual: Tensor, exact: Array) -> float:
    """Largest error ÷ largest value."""
    values = actual.double().numpy().astype(exact.dtype).reshape(exact.shape)
    return float(np.abs(values - exact).max() / np.abs(exact).max())


def bound(case: Case, quantity: str, count: int, condition: float) -> float:
    """Half a unit of the output, and the accumulator's roundoff."""
    wide = torch.float64 if case.dtype is torch.float64 else torch.float32
    units = count.bit_length() + 8
    output = case.dtype if quantity in {"y", "dx"} else wide
    return torch.finfo(output).eps / 2 + units * torch.finfo(wide).eps * condition


def cases() -> Iterator[Case]:
    """Of each dtype the means that it can hold, and tell from one another."""
    for dtype in DTYPES:
        for mean in MEANS:
            # a unit in the last place larger than the spread leaves nothing to normalize
            if mean * torch.finfo(dtype).eps <= 1:
                for layout in LAYOUTS:
                    yield Case(dtype, mean, layout)


def compare(case: Case, shape: tuple[int, int, int, int], ours: BatchNorm) -> list[Row]:
    """A row a quantity."""
    inputs = inputs_of(case, shape)
    exact, condition = exactly(inputs)
    found = {"torch": step(F.batch_norm, inputs), "ours": step(ours, inputs)}
    count = inputs.x.numel() // inputs.x.shape[1]
    return [
        Row(
            case, name, error(found["torch"][name], exact[name]),
            error(found["ours"][name], exact[name]),
            bound(case, name, count, condition.get(name, 1.0)),
        )
        for name in QUANTITIES
    ]  # fmt: skip


def table(rows: list[Row]) -> str:
    """A line a case: torch → ours."""
    header = ["dtype", "layout", "mean", *QUANTITIES]
    lines = []
    for case in dict.fromkeys(row.case for row in rows):
        of_case = {row.quantity: row for row in rows if row.case == case}
        cells = []
        for name in QUANTITIES:
            row = of_case[name]
            ours = f"**{row.ours:.1e}**" if row.worse else f"{row.ours:.1e}"
            cells.append(f"{row.torch:.1e} → {ours}")
        dtype = str(case.dtype).removeprefix("torch.")
        lines.append([dtype, case.layout, f"{case.mean:g}", *cells])
    return markdown.table(header, lines, words=2)


def page(rows: list[Row], shape: tuple[int, int, int, int]) -> str:
    """docs/accuracy.md."""
    N, C, H, W = shape
    where = environment()
    shapes = f"{N}×{C}×{H}×{W}, in 2-D {N * H * W}×{C}"
    return "\n".join([
        HEAD.format(shapes=shapes),
        (
            f"{where['processor']}, {where['backend']}, torch {where['torch']}, "
            f"{torch.get_num_threads()} threads. In a cell: torch → ours. Of bfloat16 and float16 "
            "the means are left out that they cannot hold, or beside which they cannot tell 0 from "
            "1.\n"
        ),
        table(rows),
        "",
    ])  # fmt: skip


def main() -> None:
    """Compare every case, write the page, say where ours is worse."""
    parser = figures.parser(__doc__)
    parser.add_argument("--shape", default="32,64,28,28", help="N,C,H,W")
    parser.add_argument("--page", type=Path, default=PAGE, help="docs/accuracy.md by default")
    options = parser.parse_args()
    try:
        N, C, H, W = map(int, options.shape.split(","))
    except ValueError:
        parser.error(f"--shape is {options.shape!r} and should be N,C,H,W")
    shape = (N, C, H, W)
    rows = [row for case in cases() for row in compare(case, shape, batchnorm.batch_norm)]
    text = page(rows, shape)
    print(text)
    options.page.write_text(text, encoding="utf-8")
    figures.save(options.json, [asdict(row) | {"case": row.case.name} for row in rows])
    worse = [row for row in rows if row.worse]
    for row in worse:
        print(
            f"less accurate than torch: {row.case.name}, {row.quantity}: {row.ours:.2e}, "
            f"torch {row.torch:.2e}, bound {row.bound:.2e}"
        )
    sys.exit(bool(worse))


if __name__ == "__main__":
    main()
