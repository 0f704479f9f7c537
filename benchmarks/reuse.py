"""Large outputs in memory that is kept: torch eager, ours with and without it, side by side.

    python benchmarks/reuse.py [--rounds 9] [--json FILE] [--markdown FILE]

In one process with the default allocator, in turn, round by round; a number is the median of the rounds'
ratios.
"""

import statistics
from collections.abc import Callable
from dataclasses import asdict, dataclass

import torch

import figures
from batchnorm.kernels import memory
from batchnorm.lab.environment import environment
from batchnorm.speed import cases, timing
from batchnorm.speed.contenders import contenders
from batchnorm.views import markdown

SHAPES = tuple(shape for shape in cases.SHAPES if shape.family.endswith(("large", "beyond L3")))
OPERATIONS = tuple(
    cases.Operation(step, fusion) for fusion in ("plain", "ReLU") for step in ("forward", "both")
)
HEADER = ["shape", "with", "pass", "torch ÷ ours", "torch ÷ ours without", "without ÷ with"]


@dataclass(frozen=True)
class Row:
    """Seconds of torch, ours and ours without, a number a round."""

    shape: str
    fusion: str
    step: str
    times: dict[str, list[float]]

    def ratio(self, above: str, below: str) -> float:
        """The median of the rounds'."""
        pairs = zip(self.times[above], self.times[below], strict=True)
        return statistics.median(a / b for a, b in pairs)

    def cells(self) -> list[str]:
        """For a table."""
        pairs = (("torch", "ours"), ("torch", "without"), ("without", "ours"))
        return [self.shape, self.fusion, self.step, *(f"{self.ratio(*each):.2f}" for each in pairs)]


def switched(call: Callable[[], object], *, on: bool) -> Callable[[], object]:
    """The call, with memory that is kept, or without; what is kept stays where it is."""
    large = memory.LARGE if on else 2**62

    def timed() -> object:
        before, memory.LARGE = memory.LARGE, large
        try:
            return call()
        finally:
            memory.LARGE = before

    return timed


def measure(shape: cases.Shape, operation: cases.Operation, rounds: int) -> Row:
    """One shape and pass."""
    calls = contenders(shape, operation, torch.float32)
    ours = calls["ours"]
    timed = {
        "torch": calls["torch"],
        "ours": switched(ours, on=True),
        "without": switched(ours, on=False),
    }
    return Row(shape.name, operation.fusion, operation.step, timing.measure(timed, rounds))


def main() -> None:
    """Measure every shape and pass, print the table."""
    parser = figures.parser(__doc__, "reuse")
    parser.add_argument("--rounds", type=int, default=9)
    options = parser.parse_args()
    figures.check(options, "reuse")
    where = environment()
    line = f"{figures.measured_on(where)}, float32, {options.rounds} rounds"
    print(line)
    rows = [measure(shape, each, options.rounds) for shape in SHAPES for each in OPERATIONS]
    table = markdown.table(HEADER, [row.cells() for row in rows], words=3)
    print(table)
    figures.save(options.json, {"environment": where, "rows": [asdict(row) for row in rows]})
    figures.publish(options, "reuse", line, table)


if __name__ == "__main__":
    main()
