"""Run a model on sample inputs as users give them, and leave it as it was."""

import random
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn.parameter import is_lazy

from batchnorm.model.account import log


def feed(model: nn.Module, inputs: Any) -> Any:
    """The outputs for a tensor, a tuple of arguments, or a dict of keyword arguments."""
    if isinstance(inputs, dict):
        return model(**inputs)
    return model(*inputs) if isinstance(inputs, tuple) else model(inputs)


@contextmanager
def eagerly() -> Iterator[None]:
    """Inside, what torch.compile holds runs as it is written: hooks would compile it anew."""
    if "torch._dynamo" not in sys.modules:  # nothing was compiled, and the import takes seconds
        yield
        return
    with torch.compiler.set_stance("force_eager"):
        yield


@contextmanager
def unchanged(model: nn.Module) -> Iterator[None]:
    """Inside, buffers (running statistics, counters) and random states may move; they come back.

    Parameters are not copied, which would cost a model's memory once more: a forward that writes
    into them is told of in the log.
    """
    before = {b: b.detach().clone() for b in model.buffers() if not is_lazy(b)}
    versions = {p: p._version for p in model.parameters() if not is_lazy(p)}  # noqa: SLF001  # torch's
    drawn = random.getstate(), np.random.get_state()  # noqa: NPY002  # the global one, as users have it
    devices = {p.device.index or 0 for p in model.parameters() if p.device.type == "cuda"}
    try:
        with torch.random.fork_rng(sorted(devices)):
            yield
    finally:
        random.setstate(drawn[0])
        np.random.set_state(drawn[1])  # noqa: NPY002
        with torch.no_grad():
            for buffer, value in before.items():
                buffer.copy_(value)
        if any(p._version != version for p, version in versions.items()):  # noqa: SLF001
            log.warning("the model's own forward writes into its parameters: they have changed")
