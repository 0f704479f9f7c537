"""Watch a training that knows nothing of it, and say what was wrong with its batch norm.

torch's global hooks tell of every call of a module and every step of an optimizer. What is noted
are counts; every `every` steps the layers' inputs are looked at, too. Nothing is drawn from a random
generator, nothing is written into a module, so the training's numbers are what they would be.
"""

import threading
from collections import Counter, deque
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules import module as torch_module
from torch.nn.modules.batchnorm import _BatchNorm
from torch.optim.optimizer import register_optimizer_step_post_hook

from batchnorm import kernels
from batchnorm.checks.checking import Names, _listed, judge, level_of
from batchnorm.checks.findings import Findings, Level
from batchnorm.checks.rules import chosen
from batchnorm.checks.subject import Subject, Training
from batchnorm.model.recalibration import Moments

EVERY = 50  # steps between two looks at the layers' inputs
KEPT = 2  # looks that count, the last ones


class Watch:
    """What is seen of every model with batch norm in it that runs; `findings` judges it."""

    def __init__(
        self,
        model: nn.Module | None = None,
        *,
        every: int = EVERY,
        level: str | Level = Level.WARNING,
        select: Names | None = None,
        ignore: Names | None = None,
    ) -> None:
        self._only = model
        self._every = every
        self._level = level_of(level)
        self._rules = chosen(_listed(select), _listed(ignore))
        self._roots: dict[nn.Module, _Root] = {}
        self._optimizers: dict[int, Any] = {}
        self._steps: Counter[int] = Counter()  # by optimizer
        self._local = threading.local()  # DataParallel calls modules from threads

    # hooks

    def enter(self, module: nn.Module, args: Any, kwargs: Any = None) -> None:
        """Before a module's forward."""
        depth = getattr(self._local, "depth", 0)
        self._local.depth = depth + 1
        if depth == 0:
            self._local.root = self._root_of(module)
            if (root := self._local.root) is not None and not _recomputing():
                root.begin(module)
        root = self._local.root
        if root is not None and isinstance(module, _BatchNorm):
            x = args[0] if args else next(iter((kwargs or {}).values()), None)
            root.see(module, x, _recomputing())

    def leave(self, module: nn.Module, args: Any, output: Any) -> None:
        """Behind it, also where it raised."""
        del module, args, output
        self._local.depth = max(getattr(self._local, "depth", 1) - 1, 0)

    def step(self, optimizer: Any, args: Any, kwargs: Any) -> None:
        """Behind an optimizer's step."""
        del args, kwargs
        self._optimizers.setdefault(id(optimizer), optimizer)
        self._steps[id(optimizer)] += 1
        self._local.depth = 0  # whatever was left by a forward that raised
        held = {id(p) for group in optimizer.param_groups for p in group["params"]}
        for root in self._roots.values():
            if root.parameters & held:
                root.step(self._every)

    def _root_of(self, module: nn.Module) -> "_Root | None":
        if module in self._roots:
            return self._roots[module]
        for known in self._roots.values():  # a part that is called by itself
            if module in known.modules:
                return known
        if self._only is not None and module is not self._only:
            return None
        if isinstance(module, torch_module.Module) and any(
            isinstance(m, _BatchNorm) for m in module.modules()
        ):
            root = self._roots[module] = _Root(module)
            for inner in [
                known for known in self._roots if known is not module and known in root.modules
            ]:
                root.take(self._roots.pop(inner))
            return root
        return None

    # results

    @property
    def models(self) -> list[nn.Module]:
        """Those that ran with batch norm in them."""
        return list(self._roots)

    def findings(self) -> list[Findings]:
        """What is wrong with each model, by what was seen until now."""
        return [self._judge(root) for root in self._roots.values()]

    def _judge(self, root: "_Root") -> Findings:
        optimizers = [
            each
            for each in self._optimizers.values()
            if root.parameters & {id(p) for group in each.param_groups for p in group["params"]}
        ]
        subject = Subject(root.module, optimizers, training=root.training())
        return judge(subject, self._rules, self._level, {})


class _Root:
    """One model: what was seen of it."""

    def __init__(self, module: nn.Module) -> None:
        self.module = module
        self.modules = set(module.modules())
        self.parameters = {id(p) for p in module.parameters()}
        self.seen = Training()
        self._was_evaluating: set[_BatchNorm] = set()
        self._looks: dict[_BatchNorm, deque[tuple[Tensor, Tensor, int]]] = {}
        self._looking = True
        self._blind = False  # since the last step
        self._layers = [m for m in module.modules() if isinstance(m, _BatchNorm)]

    def take(self, other: "_Root") -> None:
        """A part that ran by itself before the whole did."""
        self.seen.calls.update(other.seen.calls)

    def begin(self, module: nn.Module) -> None:
        gradients = torch.is_grad_enabled()
        self.seen.forwards[module.training, gradients] += 1
        self._blind |= module.training and not gradients

    def see(self, layer: _BatchNorm, x: Any, recomputed: bool) -> None:
        seen, training = self.seen, layer.training
        if recomputed:
            seen.recomputed[layer] += training
            return
        calls = seen.calls.get(layer)
        if calls is None:
            calls = seen.calls[layer] = Counter()
        calls[training and layer.track_running_stats, torch.is_grad_enabled()] += 1
        if not training or not isinstance(x, Tensor) or x.dim() < 2 or not torch.is_grad_enabled():
            return
        values = x.numel() // max(x.shape[1], 1)
        if values < seen.smallest.get(layer, values + 1):
            seen.smallest[layer] = values
        if self._looking and values > 1 and x.is_floating_point():
            mean, var_biased = kernels.moments(x.detach())
            looks = self._looks.setdefault(layer, deque(maxlen=KEPT))
            looks.append((mean, var_biased, values))

    def step(self, every: int) -> None:
        self.seen.steps += 1
        self.seen.blind_steps += self._blind
        self._blind = False
        self._looking = self.seen.steps % every == 0
        if not self.module.training:
            return
        for layer in self._layers:
            if not layer.training:
                self._was_evaluating.add(layer)
            elif layer in self._was_evaluating:
                self.seen.thawed.add(layer)

    def training(self) -> Training:
        self.seen.drift = {}
        for layer, looks in self._looks.items():
            merged = Moments()
            for mean, var_biased, count in looks:
                merged.merge(mean, var_biased, count)
            self.seen.drift[layer] = merged
        return self.seen


def _recomputing() -> bool:
    """In a backward pass: torch.utils.checkpoint runs the forward pass again."""
    return torch._C._current_graph_task_id() != -1  # noqa: SLF001  # torch has no public way


@contextmanager
def watch(
    model: nn.Module | None = None,
    *,
    every: int = EVERY,
    level: str | Level = Level.WARNING,
    select: Names | None = None,
    ignore: Names | None = None,
) -> Iterator[Watch]:
    """Inside, every training step is watched; `.findings()` of what it gives tells what is wrong.

    Args:
        model: the one to watch; by default every model with batch norm in it that is called.
        every: steps between two looks at the layers' inputs, which cost about as much as a forward
            pass of the norms; counts are taken always.
        level: the lowest that is reported.
        select: identifiers, or their beginnings, of the rules; all by default.
        ignore: of those not to check.

    Yields:
        The watch.
    """
    watching = Watch(model, every=every, level=level, select=select, ignore=ignore)
    with ExitStack() as hooks:
        hooks.enter_context(_removed(torch_module.register_module_forward_pre_hook(watching.enter)))
        hooks.enter_context(
            _removed(torch_module.register_module_forward_hook(watching.leave, always_call=True))
        )
        hooks.enter_context(_removed(register_optimizer_step_post_hook(watching.step)))
        yield watching


@contextmanager
def _removed(handle: Any) -> Iterator[None]:
    try:
        yield
    finally:
        handle.remove()
