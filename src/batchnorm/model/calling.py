"""Run a model on sample inputs as users give them, and leave it as it was."""

import random
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from batchnorm.model.account import log

CONTAINERS = {dict, list, set}  # whose content comes back; _parameters, _buffers, _modules are such


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
    """Inside, a forward may write into buffers and attributes and draw numbers; all comes back.

    That is every module's attributes, those that hold tensors and plain lists and dictionaries with
    their content, its mode, its parameters' `.data` and `.grad`, and the random states. What stands
    in the parameters is not copied, which would cost a model's memory once more: a forward that
    writes there is told of in the log.
    """
    kept = [_Kept(module) for module in model.modules()]
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
            for each in kept:
                each.restore()
        if any(p._version != version for p, version in versions.items()):  # noqa: SLF001
            log.warning("the model's own forward writes into its parameters: they have changed")


class _Kept:
    """One module as it was."""

    def __init__(self, module: nn.Module) -> None:
        self.module = module
        own = [*module.parameters(recurse=False), *module.buffers(recurse=False)]
        # a scripted module's attributes are not in Python; a lazy one becomes another class
        self.plain = not isinstance(module, torch.jit.ScriptModule) and not any(map(is_lazy, own))
        self.attributes = dict(vars(module)) if self.plain else {}
        self.containers = [
            (each, each.copy()) for each in self.attributes.values() if type(each) in CONTAINERS
        ]
        tensors = [*module.buffers(recurse=False), *self.attributes.values()]
        self.values = [
            (each, each.detach().clone())
            for each in tensors
            if isinstance(each, Tensor) and not is_lazy(each)
        ]
        self.parameters = [
            (p, p.data, p.grad) for p in module.parameters(recurse=False) if not is_lazy(p)
        ]

    def restore(self) -> None:
        if self.plain:
            here = vars(self.module)
            for key in here.keys() - self.attributes.keys():
                del here[key]
            here.update(self.attributes)
        for container, content in self.containers:
            container.clear()
            container.extend(content) if isinstance(container, list) else container.update(content)
        for tensor, value in self.values:
            if not torch.equal(tensor, value):
                tensor.copy_(value)
        for parameter, data, gradient in self.parameters:
            if parameter.data_ptr() != data.data_ptr():
                parameter.data = data
            if parameter.grad is not gradient:
                parameter.grad = gradient
