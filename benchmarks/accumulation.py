"""The peak memory and the time of a training step: the large batch, and micro-batches in lockstep.

Each way runs in a process of its own: the peak is that of its resident memory over what it was before
the step, with an allocator that gives back at once what is freed (MALLOC_MMAP_THRESHOLD_; it makes all
ways slower); on a GPU (`--device cuda`) that of torch's allocator. The loss and the largest difference of a
gradient from the large batch's, in the largest gradient's units, stand beside it.

    python benchmarks/accumulation.py --batch 32 --micro-batches 8
"""

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch
import torchvision
from torch import Tensor, nn
from torch.nn import functional as F

import batchnorm

WAYS = {
    "large batch": "one forward and backward pass",
    "large batch, fused": "the same after convert(model, fuse=True)",
    "one after another": "micro-batches that each normalize alone: not the large batch",
    "accumulate": "micro-batches in lockstep",
    "accumulate, fused": "the same after convert(model, fuse=True)",
}


def step(way: str, model: nn.Module, data: tuple[Tensor, Tensor], parts: int) -> Tensor:
    """One forward and backward pass."""
    total = len(data[1])

    def loss_fn(model: nn.Module, part: Any) -> Tensor:
        images, labels = part
        return F.cross_entropy(model(images), labels, reduction="sum") / total

    split = list(zip(*(each.chunk(parts) for each in data), strict=True))
    if way.startswith("large"):
        loss = loss_fn(model, data)
    elif way.startswith("accumulate"):
        loss = batchnorm.accumulate(model, loss_fn, split)
    else:
        losses = []
        for part in split:
            losses.append(loss_fn(model, part))
            losses[-1].backward()
        return torch.stack(losses).sum().detach()
    loss.backward()
    return loss.detach()


def peak(device: str) -> float:
    """In MB, since `forget_peak`."""
    if device == "cuda":
        return torch.cuda.max_memory_allocated() / 1e6
    status = Path("/proc/self/status").read_text(encoding="utf-8")
    (line,) = (line for line in status.splitlines() if line.startswith("VmHWM"))
    return int(line.split()[1]) / 1e3


def forget_peak(device: str) -> None:
    """The peak is what is there now."""
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    else:
        Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")  # Linux


def measure(way: str, options: argparse.Namespace) -> dict[str, Any]:
    """Run one way in this process."""
    torch.manual_seed(0)
    model = torchvision.models.get_model(options.network, weights=None).to(options.device).train()
    if way.endswith("fused"):
        batchnorm.convert(model, fuse=True)
    size = (options.batch, 3, options.pixels, options.pixels)
    data = torch.randn(size, device=options.device), torch.arange(options.batch) % 10
    data = data[0], data[1].to(options.device)
    small = data[0][:2], data[1][:2]
    step("large batch", model, small, 1)  # what is allocated once
    model.zero_grad()
    forget_peak(options.device)
    before, start = peak(options.device), time.perf_counter()
    loss = step(way, model, data, options.micro_batches)
    seconds = time.perf_counter() - start
    gradients = torch.cat(
        [p.grad.flatten().cpu() for p in model.parameters() if p.grad is not None]
    )
    torch.save(gradients, options.out / f"{way}.pt")
    return {"loss": float(loss), "MB": peak(options.device) - before, "seconds": seconds}


def main() -> None:
    """Measure every way, and print a table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--network", default="resnet18")
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--micro-batches", type=int, default=8)
    parser.add_argument("--pixels", type=int, default=128)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--out", type=Path, default=Path("runs/accumulation"))
    parser.add_argument("--way", choices=WAYS)
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    if options.way:
        print(json.dumps(measure(options.way, options)))
        return
    print(
        f"| {options.network}, {options.batch} × {options.pixels}² | peak MB | seconds | gradient |"
    )
    print("|---|---|---|---|")
    for way in WAYS:
        command = [sys.executable, __file__, *sys.argv[1:], "--way", way]
        # threads have arenas of their own, and keep what was freed there
        environment = {**os.environ, "MALLOC_ARENA_MAX": "1", "MALLOC_MMAP_THRESHOLD_": "65536"}
        run = subprocess.run(  # noqa: S603  # itself
            command, capture_output=True, text=True, check=True, env=environment
        )
        found = json.loads(run.stdout.splitlines()[-1])
        exact, mine = (torch.load(options.out / f"{w}.pt") for w in ("large batch", way))
        gap = float((mine - exact).abs().max() / exact.abs().max())
        print(f"| {way} | {found['MB']:.0f} | {found['seconds']:.2f} | {gap:.0e} |")


if __name__ == "__main__":
    main()
