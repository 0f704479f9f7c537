"""Run a model on sample inputs as users give them, and leave it as it was."""

import random
import sys
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, redirect_stdout
from functools import partial
from types import FunctionType, ModuleType
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.utils import _pytree as pytree

Restore = Callable[[], object]
FOLLOWED = 10_000  # the longest container of a loader's: a data set may be a list of a million


def feed(model: nn.Module, inputs: Any) -> Any:
    """The outputs for a tensor, a tuple of arguments, or a dict of keyword arguments."""
    if isinstance(inputs, dict):
        return model(**inputs)
    return model(*inputs) if isinstance(inputs, tuple) else model(inputs)


def tensors(outputs: Any) -> list[Tensor]:
    """The tensors among a model's outputs."""
    return [leaf for leaf in pytree.tree_leaves(outputs) if isinstance(leaf, Tensor)]


@contextmanager
def eagerly() -> Iterator[None]:
    """Inside, what torch.compile holds runs as it is written: hooks would compile it anew."""
    if "torch._dynamo" not in sys.modules:  # nothing was compiled, and the import takes seconds
        yield
        return
    with torch.compiler.set_stance("force_eager"):
        yield


class _Muted:
    """Standard output for the other threads; what this one writes is dropped."""

    def __init__(self, stream: Any) -> None:
        self._stream, self._thread = stream, threading.get_ident()

    def write(self, text: str) -> int:
        if threading.get_ident() == self._thread:
            return len(text)
        return int(self._stream.write(text))

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


@contextmanager
def muted() -> Iterator[None]:
    """Inside, what a model's forward prints is not shown; other threads print as they did."""
    with redirect_stdout(_Muted(sys.stdout)):
        yield


@contextmanager
def unchanged(model: nn.Module) -> Iterator[None]:
    """Inside, a forward may write wherever it likes and draw numbers; all comes back bit for bit.

    That is what the model holds: parameters, buffers, modes, hooks, `.data` and `.grad`, and every
    module's attributes with what they hold in turn, through containers and through helpers of the
    packages that the modules come from: tensors, arrays, generators. Values are copied, a model's
    memory once more: that a forward writes into its weights is known only when it has.
    """
    restorers = _restorers(model)
    drawn = random.getstate(), np.random.get_state()  # noqa: NPY002  # the global one, as users have it
    devices = {p.device.index or 0 for p in model.parameters() if p.device.type == "cuda"}
    try:
        with torch.random.fork_rng(sorted(devices)):
            yield
    finally:
        random.setstate(drawn[0])
        np.random.set_state(drawn[1])  # noqa: NPY002
        with torch.no_grad():
            for restore in restorers:
                restore()


@contextmanager
def generators_kept(loader: object) -> Iterator[None]:
    """Inside, a loader and its data may draw from random generators of their own; all come back."""
    kept = [restore for each in _reached(loader, _held) if (restore := _drawing(each))]
    try:
        yield
    finally:
        for restore in kept:
            restore()


def _reached(root: Any, inside: Callable[[Any], Iterable[Any]]) -> Iterator[Any]:
    """Each object that is held by the root, once."""
    seen: dict[int, Any] = {}  # holds them, so that no id is given twice
    waiting = deque([root])
    while waiting:
        each = waiting.popleft()
        if id(each) not in seen:
            seen[id(each)] = each
            yield each
            waiting.extend(inside(each))


def _held(holder: Any) -> Iterable[Any]:
    """Of a loader or a data set: its attributes, and what stands in short containers."""
    if isinstance(holder, dict | list | tuple):
        values = holder.values() if isinstance(holder, dict) else holder
        return list(values) if len(holder) <= FOLLOWED else ()
    if isinstance(holder, type | ModuleType | FunctionType | Tensor):
        return ()
    return list(getattr(holder, "__dict__", {}).values())


def _restorers(model: nn.Module) -> list[Restore]:
    # a trainer's helpers, or torch's, hold more than the model: data, other models
    packages = {_package(module) for module in model.modules()} - {"torch"}

    def inside(holder: Any) -> Iterable[Any]:
        if isinstance(holder, dict):
            return list(holder.values())
        if isinstance(holder, list | tuple | set | frozenset | deque):
            return list(holder)
        if isinstance(holder, torch.jit.ScriptModule):  # its attributes are not in Python
            return [*holder.parameters(), *holder.buffers()]
        if isinstance(holder, nn.Module):
            return () if _lazy(holder) else (vars(holder),)
        if isinstance(holder, type | ModuleType | FunctionType | Tensor):
            return ()
        return (
            (vars(holder),) if hasattr(holder, "__dict__") and _package(holder) in packages else ()
        )

    return [restore for each in _reached(model, inside) if (restore := _restorer(each))]


def _package(holder: Any) -> str:
    return str(type(holder).__module__).partition(".")[0]


def _lazy(module: nn.Module) -> bool:
    """It becomes another class when it learns its size, and that is not taken back."""
    own = (*module._parameters.values(), *module._buffers.values())  # noqa: SLF001  # torch's
    return any(is_lazy(tensor) for tensor in own if tensor is not None)


def _restorer(each: Any) -> Restore | None:
    """What gives one object its content back."""
    if isinstance(each, Tensor):
        if is_lazy(each) or each.is_meta or each.layout is not torch.strided:
            return None
        gradient = each.grad if each.is_leaf else None
        return partial(_give_back, each, each.data, gradient, each.detach().clone())
    if isinstance(each, np.ndarray):
        return partial(np.copyto, each, each.copy())
    if isinstance(each, dict):
        return partial(_refill_dict, each, dict(each))
    if isinstance(each, list | deque | set):
        return partial(_refill, each, list(each))
    return _drawing(each)


def _give_back(tensor: Tensor, data: Tensor, gradient: Tensor | None, value: Tensor) -> None:
    if tensor.data_ptr() != data.data_ptr():
        tensor.data = data
    if tensor.is_leaf and tensor.grad is not gradient:
        tensor.grad = gradient
    if not torch.equal(tensor, value):
        tensor.copy_(value)


def _refill_dict(container: dict[Any, Any], content: dict[Any, Any]) -> None:
    for key in [key for key in container if key not in content]:
        del container[key]
    for key, value in content.items():
        if key not in container or container[key] is not value:
            container[key] = value  # not update(), by which a Counter adds
    if list(container) != list(content):
        for key in content:
            container[key] = container.pop(key)


def _refill(container: Any, content: list[Any]) -> None:
    now = list(container)
    if len(now) == len(content) and all(a is b for a, b in zip(now, content, strict=True)):
        return
    container.clear()
    container.update(content) if isinstance(container, set) else container.extend(content)


def _drawing(each: Any) -> Restore | None:
    """What gives a random generator its state back."""
    match each:
        case torch.Generator():
            return partial(each.set_state, each.get_state())
        case random.Random():
            return partial(each.setstate, each.getstate())
        case np.random.Generator():
            drawing = each.bit_generator
            return partial(setattr, drawing, "state", drawing.state)
        case np.random.RandomState():
            return partial(each.set_state, each.get_state())
    return None
