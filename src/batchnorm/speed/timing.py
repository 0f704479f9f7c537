"""Seconds, in this process: everyone in turn, round by round.

What counts is the median of the rounds' ratios, since seconds drift and ratios of neighbours do not.
"""

import gc
import time
from collections.abc import Iterator

import torch

from batchnorm.speed.cases import Operation, Plan, Shape
from batchnorm.speed.contenders import Call, contenders
from batchnorm.speed.rows import Row

LEAST = 5e-3  # seconds of one measurement: short calls are repeated
AGAIN = 3  # times the rounds, when what looks slower is measured again


def here(plan: Plan, setting: str) -> Iterator[Row]:
    """The rows, measured in this process."""
    before = torch.get_num_threads()
    try:
        for count in plan.threads:
            torch.set_num_threads(count)
            for shape in plan.shapes:
                for operation in shape.operations:
                    yield _row(plan, setting, count, shape, operation)
    finally:
        torch.set_num_threads(before)


def _row(plan: Plan, setting: str, threads: int, shape: Shape, operation: Operation) -> Row:
    def timed(rounds: int) -> Row:
        calls = contenders(shape, operation, getattr(torch, plan.dtype), compiled=plan.compiled)
        return Row(
            shape.family, shape.name, operation.step, operation.fusion, plan.dtype, threads,
            setting, measure(calls, rounds),
        )  # fmt: skip

    row = timed(plan.rounds)
    # among hundreds of rows some look slower by chance; the second measurement decides
    return timed(AGAIN * plan.rounds) if row.slower else row


def measure(calls: dict[str, Call], rounds: int) -> dict[str, list[float]]:
    """Seconds of a call of each, a number a round; every round begins with another one."""
    repeats = {}
    for name, call in calls.items():
        call()  # the first one makes what later ones find made
        repeats[name] = max(1, int(LEAST / _seconds(call, 1)))
    found: dict[str, list[float]] = {name: [] for name in calls}
    order = list(calls)
    collecting = gc.isenabled()
    gc.disable()  # a collection would fall on one of them
    try:
        for _ in range(rounds):
            for name in order:
                found[name].append(_seconds(calls[name], repeats[name]))
            order.append(order.pop(0))
    finally:
        if collecting:
            gc.enable()
    return found


def _seconds(call: Call, repeats: int) -> float:
    start = time.perf_counter()
    for _ in range(repeats):
        call()
    return (time.perf_counter() - start) / repeats
