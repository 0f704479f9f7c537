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
from torch.nn.parameter import is_lazy
from torch.optim.optimizer import register_optimizer_step_post_hook

from batchnorm import kernels
from batchnorm.checks.checking import Names, _listed, judge, level_of
from batchnorm.checks.findings import Findings, Level
from batchnorm.checks.probing import standardized_gap
from batchnorm.checks.rules import chosen
from batchnorm.checks.subject import Subject, Training
from batchnorm.model.discovery import batch_norms
from batchnorm.model.recalibration import Moments

EVERY = 50  # steps between two looks at the layers' inputs
KEPT = 4  # looks that count, the last ones


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
        writer: Any = None,
    ) -> None:
        self._only = model
        self._writer = writer
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
                if self._writer is not None and root.looked:
                    root.write(self._writer)
                root.step(self._every)

    def _root_of(self, module: nn.Module) -> "_Root | None":
        """The model that a module belongs to, which may be called in parts, or is one itself."""
        if module in self._roots:
            return self._roots[module]
        for known in self._roots.values():
            if module in known.modules:
                return known
        if self._only is not None:
            return self._begin(self._only) if module in set(self._only.modules()) else None
        if any(isinstance(m, _BatchNorm) for m in module.modules()):
            return self._begin(module)
        return None

    def _begin(self, model: nn.Module) -> "_Root":
        root = _Root(model)
        for part in [known for known in self._roots if known in root.modules]:
            root.take(self._roots.pop(part))  # it was called by itself before
        self._roots[model] = root
        return root

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
        self._looks: dict[_BatchNorm, deque[float]] = {}  # gaps², the last ones
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
        if self._looking and values > 1 and x.is_floating_point() and _filled(layer):
            batch = Moments()
            batch.merge(*kernels.moments(x.detach()), values)
            chance = 1.5 / values  # of a mean, 1 / n of a variance; of a log deviation, 1 / 2n
            looks = self._looks.setdefault(layer, deque(maxlen=KEPT))
            looks.append(standardized_gap(layer, batch) ** 2 - chance)

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

    @property
    def looked(self) -> bool:
        """The step that ends now was one whose inputs were looked at."""
        return self._looking and bool(self._looks)

    def write(self, writer: Any) -> None:
        """The layers' gaps at the last look, as scalars."""
        for name, layer in batch_norms(self.module).items():
            if layer in self._looks:
                tag = f"batchnorm/{name or type(layer).__name__}/gap"
                writer.add_scalar(tag, max(self._looks[layer][-1], 0.0) ** 0.5, self.seen.steps)

    def training(self) -> Training:
        self.seen.drift = {
            layer: max(sum(looks) / len(looks), 0.0) ** 0.5 for layer, looks in self._looks.items()
        }
        return self.seen


def _filled(layer: _BatchNorm) -> bool:
    """Its average has forgotten the initial values, of which it keeps 0.05 or less."""
    if layer.running_mean is None or is_lazy(layer.running_mean):
        return False
    counter, momentum = layer.num_batches_tracked, layer.momentum
    return counter is None or momentum is None or (1 - momentum) ** int(counter) <= 0.05


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
    writer: Any = None,
) -> Iterator[Watch]:
    """Inside, every training step is watched; `.findings()` of what it gives tells what is wrong.

    Args:
        model: the one to watch; by default every model with batch norm in it that is called.
        every: steps between two looks at the layers' inputs, which cost about as much as a forward
            pass of the norms; counts are taken always.
        level: the lowest that is reported.
        select: identifiers, or their beginnings, of the rules; all by default.
        ignore: of those not to check.
        writer: a TensorBoard SummaryWriter, or whatever has its add_scalar: it gets each layer's gap
            (see BN001) at every look.

    Yields:
        The watch.
    """
    watching = Watch(model, every=every, level=level, select=select, ignore=ignore, writer=writer)
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
