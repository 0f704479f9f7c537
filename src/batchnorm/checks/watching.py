"""Watch a training that knows nothing of it, and say what was wrong with its batch norm.

torch's global hooks tell of every call of a module and every step of an optimizer. What is noted
are counts; every `every` steps the layers' inputs are looked at, too. Nothing is drawn from a random
generator, nothing is written into a module, so the training's numbers are what they would be. Of a
model that torch.compile took, the passes, modes and buffers are seen, and not the layers' inputs.
"""

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
        self._entries: dict[nn.Module, _Root] = {}  # the modules that the training itself calls
        self._owners: dict[nn.Module, _Root] = {}  # of the norms
        self._parts: dict[nn.Module, set[nn.Module]] = {}  # what is in each entry
        self._known: set[nn.Module] = set()  # the others, which tell nothing
        self._trained: dict[Any, list[_Root | None]] = {}  # by which optimizer
        self._count = 0  # of steps

    # hooks

    def enter(self, module: nn.Module, args: Any) -> None:
        """Before a module's forward."""
        # what is compiled calls no hook: of such a model only the whole is seen
        if module in self._known or torch.compiler.is_compiling():
            return
        if module not in self._entries and module not in self._owners:
            self._meet(module)
        if (entered := self._entries.get(module)) is not None and not _recomputing():
            entered.begin(module)
        if (owner := self._owners.get(module)) is not None:
            owner.see(module, args[0] if args else None, _recomputing())

    def _meet(self, module: nn.Module) -> None:
        """A module that is called for the first time: parents are called before their parts."""
        if any(module in entry_parts for entry_parts in self._parts.values()):
            self._known.add(module)
            return
        inside = set(module.modules())
        if not any(isinstance(m, _BatchNorm) for m in inside):
            self._known.add(module)
            return
        model = module if self._only is None else self._only
        if module not in set(model.modules()):
            self._known.add(module)
            return
        root = self._roots.setdefault(model, _Root(model))
        for part in [other for other in self._roots if other is not model and other in inside]:
            root.take(self._roots.pop(part))  # it was called by itself before
        self._entries = {m: r for m, r in self._entries.items() if m not in inside}
        self._parts = {m: parts for m, parts in self._parts.items() if m not in inside}
        self._entries[module], self._parts[module] = root, inside - {module}
        self._owners.update({m: root for m in inside if isinstance(m, _BatchNorm)})
        self._known -= inside

    def step(self, optimizer: Any, args: Any, kwargs: Any) -> None:
        """Behind an optimizer's step."""
        del args, kwargs
        roots = self._trained.get(optimizer, [])
        if len(roots) != len(self._roots) or self._count % self._every == 0:
            held = {id(p) for group in optimizer.param_groups for p in group["params"]}
            # None for a model of another optimizer
            roots = [root if root.parameters & held else None for root in self._roots.values()]
            self._trained[optimizer] = roots
        self._count += 1
        for root in roots:
            if root is not None:
                if self._writer is not None and root.looked:
                    root.write(self._writer)
                root.step(self._every)

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
            for each in self._trained
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
        # since the last step
        self._synced = Counter({m: 0 for m in self._layers if isinstance(m, nn.SyncBatchNorm)})

    def take(self, other: "_Root") -> None:
        """A part that ran by itself before the whole did."""
        self.seen.calls.update(other.seen.calls)

    def begin(self, module: nn.Module) -> None:
        gradients = torch.is_grad_enabled()
        self.seen.forwards[module.training, gradients] += 1
        self._blind |= module.training and not gradients

    def see(self, layer: Any, x: Any, recomputed: bool) -> None:
        seen, training = self.seen, layer.training
        if recomputed:
            seen.recomputed[layer] += training
            return
        calls = seen.calls.get(layer)
        if calls is None:
            calls = seen.calls[layer] = Counter()
        calls[training and layer.track_running_stats, torch.is_grad_enabled()] += 1
        if training and layer in self._synced:
            self._synced[layer] += 1
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
        if most := max(self._synced.values(), default=0):
            for sync, count in self._synced.items():
                self.seen.synced.setdefault(sync, Counter())[count, most] += 1
                self._synced[sync] = 0
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
        hooks.enter_context(_removed(register_optimizer_step_post_hook(watching.step)))
        yield watching


@contextmanager
def _removed(handle: Any) -> Iterator[None]:
    try:
        yield
    finally:
        handle.remove()
