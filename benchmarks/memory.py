"""The peak memory of a training step: torch.nn's norms beside ours, in one and in many layers.

    python benchmarks/memory.py [--json FILE] [--markdown FILE]

Two measures, each arm in a process of its own:

- **allocated**: the sum of what torch's allocator has handed out and not got back, followed event by
  event through a step, at its highest. Exact to the byte, and the same in every run.
- **resident**: how far the process's resident set rises above where it stood before the step (VmHWM,
  reset through /proc/self/clear_refs; Linux). It sees what the first does not, buffers that a library
  takes from elsewhere, and is blurred by what the allocator keeps.

Parameters, their gradients and the optimizer's state are there before: a step is measured after
another one. The exit status is 1 where ours allocates more than torch.nn's: 16 bytes a channel are
not counted, for ours keeps the statistics in float64.
"""

import argparse
import gc
import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import torchvision
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

import batchnorm
import figures
from batchnorm.lab.environment import environment
from batchnorm.views import markdown

MIB = 2.0**20
ARMS = ("torch.nn", "convert", "convert(fuse=True)")


class Large(nn.Module):
    """One large norm and a ReLU, which works in place as networks have it."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm2d(64)
        self.activation = nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        """x: (N, 64, H, W)."""
        y: Tensor = self.activation(self.norm(x))
        return y


class OutOfPlace(Large):
    """The same with `nn.ReLU()`, as torch.nn has it by default."""

    def __init__(self) -> None:
        super().__init__()
        self.activation = nn.ReLU()


@dataclass(frozen=True)
class Workload:
    """A model, its input, and whether the input wants a gradient, as a layer's in a network does."""

    build: Callable[[], nn.Module]
    sizes: tuple[int, ...]
    differentiated: bool


WORKLOADS = {
    "ResNet-18, 16 × 128²": Workload(torchvision.models.resnet18, (16, 3, 128, 128), False),
    "BN + ReLU in place, 32×64×112×112": Workload(Large, (32, 64, 112, 112), True),
    "BN + ReLU, 32×64×112×112": Workload(OutOfPlace, (32, 64, 112, 112), True),
}


@dataclass(frozen=True)
class Peak:
    """Bytes above what there was before the step."""

    workload: str
    arm: str
    allocated: int
    resident: int | None
    statistics: int  # what ours may take more: a few bytes a channel


def measure(workload: str, arm: str) -> Peak:
    """A step that warms up, one by which the resident set is read, one under the profiler."""
    step = _step(WORKLOADS[workload], arm)
    step()
    resident = _resident(step)
    return Peak(workload, arm, _allocated(step), resident, _statistics(WORKLOADS[workload].build()))


def _statistics(model: nn.Module) -> int:
    """For a channel ours keeps three numbers in float64 for backward, torch two in float32."""
    norms = [norm for norm in model.modules() if isinstance(norm, nn.BatchNorm2d)]
    return sum(norm.num_features * (3 * 8 - 2 * 4) for norm in norms)


def _step(workload: Workload, arm: str) -> Callable[[], None]:
    torch.manual_seed(0)
    model = workload.build().train()
    if arm != ARMS[0]:
        batchnorm.convert(model, fuse=arm == ARMS[2])
    x = torch.randn(workload.sizes, requires_grad=workload.differentiated)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)

    def step() -> None:
        optimizer.zero_grad(set_to_none=False)
        leaf = x.detach().requires_grad_(workload.differentiated)
        model(leaf).mean().backward()
        optimizer.step()

    return step


def _allocated(step: Callable[[], None]) -> int:
    """The highest sum of the allocator's events: bytes asked for, less bytes given back."""
    gc.collect()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        step()
    result = profiler.profiler.kineto_results
    events = [each for each in result.events() if each.name() == "[memory]"]
    events.sort(key=lambda each: each.start_ns())
    now = highest = 0
    for each in events:
        now += each.nbytes()
        highest = max(highest, now)
    return highest


def _resident(step: Callable[[], None]) -> int | None:
    """How far the resident set rises; None where the system does not tell."""
    forget = Path("/proc/self/clear_refs")
    if not forget.exists():
        return None
    gc.collect()
    forget.write_text("5", encoding="ascii")  # the high-water mark begins anew
    before = _status("VmRSS")
    step()
    return _status("VmHWM") - before


def _status(name: str) -> int:
    text = Path("/proc/self/status").read_text(encoding="ascii")
    found = re.search(rf"^{name}:\s+(\d+) kB", text, re.MULTILINE)
    assert found is not None
    return int(found[1]) * 1024


def apart(workload: str, arm: str) -> Peak:
    """Measured in a process of its own."""
    command = [sys.executable, __file__, "--one", workload, arm]
    # memory that ours keeps is not torch's allocator's, and would not be counted
    variables = {**os.environ, "BATCHNORM_MEMORY": "0"}
    done = subprocess.run(  # noqa: S603
        command, check=True, stdout=subprocess.PIPE, text=True, env=variables
    )
    return Peak(**json.loads(done.stdout.splitlines()[-1]))


def table(peaks: list[Peak]) -> str:
    """A line a workload and arm: MiB, and the part of torch.nn's."""
    lines = []
    theirs = {peak.workload: peak for peak in peaks if peak.arm == ARMS[0]}
    for peak in peaks:
        other = theirs[peak.workload]
        cells = [
            f"{peak.allocated / MIB:.1f}",
            f"{peak.allocated / other.allocated:.2f}",
            "" if peak.resident is None else f"{peak.resident / MIB:.1f}",
        ]
        lines.append([peak.workload, peak.arm, *cells])
    header = ["", "norms", "allocated MiB", "÷ torch.nn", "resident MiB"]
    return markdown.table(header, lines, words=2)


def above(peaks: list[Peak]) -> list[Peak]:
    """Those of ours that allocate more than torch.nn's, the statistics of the channels apart."""
    theirs = {peak.workload: peak.allocated for peak in peaks if peak.arm == ARMS[0]}
    return [p for p in peaks if p.allocated > theirs[p.workload] + p.statistics]


def main() -> None:
    """Measure every arm, print the table, say where ours takes more."""
    parser = figures.parser(__doc__, "memory")
    parser.add_argument("--one", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one is not None:
        print(json.dumps(asdict(measure(*options.one))))
        return
    figures.check(options, "memory")
    where = environment()
    line = f"{where['processor']}, torch {where['torch']}, {where['backend']}"
    print(line)
    peaks = [apart(workload, arm) for workload in WORKLOADS for arm in ARMS]
    print(table(peaks))
    figures.save(options.json, {"environment": where, "peaks": [asdict(peak) for peak in peaks]})
    figures.publish(options, "memory", line, table(peaks))
    for peak in above(peaks):
        print(f"more than torch.nn's: {peak.workload}, {peak.arm}: {peak.allocated:,} bytes")
    sys.exit(bool(above(peaks)))


if __name__ == "__main__":
    main()
