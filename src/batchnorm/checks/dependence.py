"""Where in a model the outputs of a sample begin to depend on the rest of its batch."""

from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

from batchnorm.model.discovery import Norm

CLOSE = 1e-3  # of a standard deviation: what another summation order does is far below


@dataclass
class Origin:
    """The module whose own code takes statistics, or something else, of the batch."""

    name: str  # "" for the model
    norm: bool  # it normalizes by the batch


def origin(model: nn.Module, run: Callable[[Any], Any], whole: Any, part: Any) -> Origin | None:
    """The first module that gives the samples of `part`, which `whole` begins with, other outputs.

    Whatever its inputs are: where these differ already the code between two modules did it, and so
    the module that calls both.
    """
    comparing = _Comparing(model)
    with comparing.hooks(), _BatchNormCalls() as calls:
        run(part)
        comparing.second = True
        run(whole)
    if comparing.found is None:
        return None
    name, call = comparing.found
    module = model.get_submodule(name)
    norm = calls.seen or isinstance(module, Norm)
    return Origin(name, norm or (call is not None and _normalizes(module, call)))


@dataclass
class _Comparing:
    """Every module's inputs and outputs in the first pass, beside those of the second."""

    model: nn.Module
    second: bool = False
    # the module, and its input where it alone did it
    found: tuple[str, Tensor | None] | None = None
    _kept: list[list[Tensor]] = field(default_factory=list)
    _at: int = 0

    def hooks(self) -> ExitStack:
        stack = ExitStack()
        for name, module in self.model.named_modules():
            stack.enter_context(
                module.register_forward_pre_hook(self._before(name), with_kwargs=True)
            )
            stack.enter_context(module.register_forward_hook(self._behind(name)))
        return stack

    def _before(self, name: str) -> Any:
        def hook(_: nn.Module, args: Any, kwargs: Any) -> None:
            if self._differs((args, kwargs)) and name:
                self.found = name.rpartition(".")[0], None

        return hook

    def _behind(self, name: str) -> Any:
        def hook(_: nn.Module, args: Any, outputs: Any) -> None:
            if self._differs(outputs):
                single = args[0] if len(args) == 1 and isinstance(args[0], Tensor) else None
                self.found = name, single

        return hook

    def _differs(self, values: Any) -> bool:
        """In the second pass, and for the first time."""
        tensors = [v for v in pytree.tree_leaves(values) if _compared(v)]
        if not self.second:
            self._kept.append([t.clone() for t in tensors])
            return False
        at, self._at = self._at, self._at + 1
        if self.found is not None or at >= len(self._kept):
            return False
        return any(map(_apart, tensors, self._kept[at]))


def _compared(value: Any) -> bool:
    return isinstance(value, Tensor) and value.is_floating_point() and value.dim() > 0


def _apart(whole: Tensor, part: Tensor) -> bool:
    """Of the same samples; whatever is not a value a sample is not compared."""
    if whole.shape[1:] != part.shape[1:] or len(whole) <= len(part):
        return False
    return _differ(whole[: len(part)], part)


def _differ(one: Tensor, other: Tensor) -> bool:
    scale = float(other.double().std()) if other.numel() > 1 else 0.0
    return float((one - other).abs().max()) > CLOSE * scale + 1e-12


class _BatchNormCalls(TorchFunctionMode):
    """torch's own operator with the statistics of the batch, wherever it is called."""

    seen = False

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        del types
        kwargs = kwargs or {}
        if func is nn.functional.batch_norm:
            self.seen |= bool(kwargs.get("training", args[5] if len(args) > 5 else False))
        return func(*args, **kwargs)


def _normalizes(module: nn.Module, x: Tensor) -> bool:
    """BN(a·x + b) = BN(x) for a > 0 and b a channel's; similarities within a batch change."""
    if x.dim() < 2 or not float(x.std()) > 0:
        return False
    x = x / x.std() * 1000  # so that eps is nothing beside the variance
    b = torch.linspace(-2000, 2000, x.shape[1], dtype=x.dtype, device=x.device)
    first, again = module(x.clone()), module(4 * x + b.reshape(-1, *[1] * (x.dim() - 2)))
    if not isinstance(first, Tensor) or not isinstance(again, Tensor):
        return False
    return first.shape == x.shape == again.shape and not _differ(again, first)
