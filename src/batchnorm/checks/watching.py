"""Watch a training that knows nothing of it, and say what was wrong with its batch norm.

torch's global hooks tell of every call of a module and every step of an optimizer. What is noted
are counts; every `every` steps the layers' inputs are looked at, too. Nothing is drawn from a random
generator, nothing is written into a module, so the training's numbers are what they would be. Of a
model that torch.compile took, modes and buffers are seen at every step, the passes where the module
itself was compiled, and never the layers' inputs.
"""

import gc
import warnings
import weakref
from collections import Counter, deque
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.modules import module as torch_module
from torch.nn.parameter import is_lazy
from torch.optim.optimizer import register_optimizer_step_post_hook

from batchnorm import kernels
from batchnorm.checks.checking import Names, _listed, judge
from batchnorm.checks.findings import Findings, Level, level_of
from batchnorm.checks.probing import apart, standardized_gap
from batchnorm.checks.rules import chosen
from batchnorm.checks.rules.state import initial
from batchnorm.checks.subject import Subject, Training
from batchnorm.errors import BatchNormError, brief
from batchnorm.kernels.native import transformed
from batchnorm.model.discovery import SYNCHRONISED, Norm, batch_norms
from batchnorm.model.recalibration import Moments
from batchnorm.variants.variant import SET_ASIDE

EVERY = 50  # steps between two looks at the layers' inputs
KEPT = 4  # looks that count, the last ones
FIXED = 10  # steps without a gradient: a GAN's half waits for fewer
MODELS = 8  # held at once: when another comes, the one that rested longest is judged and let go


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
        if every < 1:
            raise BatchNormError(f"watch got every={every} and wants a number of steps from 1 on.")
        self._only = model
        self._writer = writer
        self._every = every
        self._level = level_of(level)
        self._rules = chosen(_listed(select), _listed(ignore))
        self._roots: list[_Root] = []
        self._done: list[Findings] = []  # of the models that were let go
        # by id, since a module may not be hashable; an entry leaves with its module
        self._roles: dict[int, _Role] = {}
        self._alive: dict[int, weakref.ref[nn.Module]] = {}
        # optimizer -> the models that it trains, and how many had been met when that was looked up
        self._trained: dict[Any, tuple[int, list[_Root]]] = {}
        self._meetings = 0
        self._steps = 0
        self._asleep = False  # while a model is judged, which calls its modules
        self._failure: str | None = None

    # hooks: whatever goes wrong here is ours, and not the training's

    def enter(self, module: nn.Module, args: Any) -> None:
        """Before a module's forward."""
        # first, so that a compiler sees nothing but a constant
        if torch.compiler.is_compiling() or self._asleep:
            return
        try:
            role = self._roles.get(id(module))
            if role is None:
                role = self._meet(module)
            if role.entry is not None and not _recomputing():
                role.entry.begin(module, self._steps)
            if role.owner is not None:
                role.owner.see(module, args[0] if args else None, _recomputing())
        except Exception as error:  # noqa: BLE001  # modules are of every kind
            if id(module) not in self._roles:
                self._play(module, None, None)
            self._failure = self._failure or brief(error)

    def step(self, optimizer: Any, args: Any, kwargs: Any) -> None:
        """Behind an optimizer's step."""
        del args, kwargs
        if self._asleep:
            return
        try:
            trained = self._trained_by(optimizer)
            self._steps += 1
            for root in self._roots:
                root.notice(self._steps)
            for root in trained:
                if self._writer is not None and root.looked:
                    root.write(self._writer)
                root.step()
        except Exception as error:  # noqa: BLE001  # as above
            self._failure = self._failure or brief(error)

    def _meet(self, module: nn.Module) -> "_Role":
        """A module that is called for the first time: parents are called before their parts."""
        if getattr(module, "_is_replica", False):  # DataParallel's, made anew for every pass
            return NOTHING
        for root in self._roots:
            if any(module in set(entry.modules()) for entry in root.entries):
                root.grow()  # by a part that was added later
                return self._play(module, None, root)
        inside = set(module.modules())
        model = module if self._only is None else self._only
        if not any(isinstance(m, Norm) for m in inside) or module not in set(model.modules()):
            return self._play(module, None, None)
        root = next((r for r in self._roots if r.module is model), None) or self._begin(model)
        for part in [r for r in self._roots if r is not root and r.module in inside]:
            root.take(part)  # it was called by itself before
            self._roots.remove(part)
        root.entries = [*(entry for entry in root.entries if entry not in inside), module]
        self._meetings += 1
        for inner in inside - {module}:
            self._play(inner, None, root)
        return self._play(module, root, root)

    def _play(self, module: nn.Module, entry: "_Root | None", owner: "_Root | None") -> "_Role":
        key = id(module)

        def forget(_: object) -> None:
            self._roles.pop(key, None)
            self._alive.pop(key, None)

        role = _Role(entry, owner if isinstance(module, Norm) else None)
        self._roles[key], self._alive[key] = role, weakref.ref(module, forget)
        return role

    def _begin(self, model: nn.Module) -> "_Root":
        whole = [root for root in self._roots if not isinstance(root.module, Norm)]
        if len(whole) >= MODELS:
            self._let_go(min(whole, key=lambda root: root.last))
        root = _Root(model, self._every)
        self._roots.append(root)
        return root

    def _let_go(self, root: "_Root") -> None:
        # its own forward is not run, as a graph would: the training goes on
        self._done.append(self._judge(root, graph=False))
        self._roots.remove(root)
        self._roles = {key: NOTHING if root in role else role for key, role in self._roles.items()}
        left = set(self._roots)
        self._trained = {o: known for o, known in self._trained.items() if left & set(known[1])}

    def _trained_by(self, optimizer: Any) -> list["_Root"]:
        """The models that hold one of the optimizer's parameters."""
        meetings, roots = self._trained.get(optimizer, (-1, []))
        if meetings == self._meetings and self._steps % self._every:
            return roots
        held = _held(optimizer)
        roots = self._holding(held)
        if meetings < 0 and all(isinstance(root.module, Norm) for root in roots):
            for model in _outermost(held):  # compiled, or run by its forward
                self._meet(model)
            roots = self._holding(held)
        if roots or meetings < 0:
            self._trained[optimizer] = self._meetings, roots
        return roots

    def _holding(self, held: set[int]) -> list["_Root"]:
        return [root for root in self._roots if root.parameters() & held]

    # results

    @property
    def models(self) -> list[nn.Module]:
        """Those that ran with batch norm in them and were not let go."""
        return [root.module for root in self._roots]

    def findings(self) -> list[Findings]:
        """What is wrong with each model, by what was seen until now; of its copies once."""
        told: list[Findings] = []
        for each in [*self._done, *map(self._judge, self._roots)]:
            places = {(f.rule, f.layer) for f in each}
            alike = [other for other in told if other.model == each.model]
            if not any(places <= {(f.rule, f.layer) for f in other} for other in alike):
                told.append(each)
        return told

    def _judge(self, root: "_Root", *, graph: bool = True) -> Findings:
        optimizers = [each for each, (_, roots) in self._trained.items() if root in roots]
        subject = Subject(root.module, optimizers, training=root.training(), graph=graph)
        skipped = {} if self._failure is None else {"(hook)": self._failure}
        self._asleep = True
        try:
            return judge(subject, self._rules, self._level, skipped)
        finally:
            self._asleep = False


class _Role(NamedTuple):
    """What the watch does when a module is called."""

    entry: "_Root | None"  # the model whose pass begins
    owner: "_Root | None"  # the model whose norm this is


NOTHING = _Role(None, None)


def _held(optimizer: Any) -> set[int]:
    return {id(p) for group in optimizer.param_groups for p in group["params"]}


def _outermost(held: set[int]) -> list[nn.Module]:
    """The largest modules with batch norm that hold one of these parameters, wherever they are.

    A pass of what was compiled is seen by no hook; its parameters' optimizer is.
    """
    # type(), since isinstance asks the object, which may be a proxy
    modules = [m for m in gc.get_objects() if issubclass(type(m), nn.Module)]
    holding = [
        m
        for m in modules
        if not isinstance(m, Norm)
        and any(id(p) in held for p in m.parameters())
        and any(isinstance(part, Norm) for part in m.modules())
    ]
    parts = {id(part) for m in holding for part in m.modules() if part is not m}
    return [m for m in holding if id(m) not in parts]


@dataclass
class _Batch:
    """The statistics of a batch, or of several."""

    moments: Moments
    samples: int

    @property
    def chance(self) -> float:
        """Of a mean 1 / n of a variance, of a log deviation 1 / 2n; a sample's pixels are one value."""
        return 1.5 / self.samples


def _merged(batches: Iterable[_Batch]) -> _Batch:
    whole = _Batch(Moments(), 0)
    for each in batches:
        one = each.moments
        whole.moments.merge(one.mean, one.squares / one.count, one.count)
        whole.samples += each.samples
    return whole


class _Root:
    """One model: what was seen of it."""

    def __init__(self, module: nn.Module, every: int) -> None:
        self.module = module
        self._every = every
        self.entries: list[nn.Module] = []  # the modules in it that the training itself calls
        self.last = 0  # step at which it ran
        self.seen = Training()
        self._required: dict[Norm, bool] = {}  # in evaluation mode at a step -> a gradient
        self._looks: dict[Norm, deque[float]] = {}  # gaps², the last ones
        # the batches' statistics, the last ones: with gradients, without
        self._batches: dict[tuple[Norm, bool], deque[_Batch]] = {}
        self._looking = True
        self._since: Counter[str] = Counter()  # passes since the last step, by kind
        self._blind_looked: dict[Norm, int] = {}  # at which step
        self._averaging = False  # in a pass that takes statistics anew
        self._layers: list[Any] = []
        # whose weight takes no gradient -> since which step, and as it was
        self._fixed: dict[Any, tuple[int, Tensor]] = {}
        self._weights: dict[Any, tuple[int, Tensor]] = {}  # of every layer, as first seen
        self._synced: Counter[Any] = Counter()  # since the last step
        self.grow()

    def grow(self) -> None:
        """Take up the norms that were not there before."""
        for layer in batch_norms(self.module).values():
            if layer in self._layers:
                continue
            self._layers.append(layer)
            if _loaded_without_counter(layer):
                self.seen.filled.add(layer)
            if isinstance(layer, SYNCHRONISED):
                self._synced[layer] = 0

    def parameters(self) -> set[int]:
        return {id(p) for p in self.module.parameters()}

    def take(self, other: "_Root") -> None:
        """A part that ran by itself before the whole did."""
        self.seen.calls.update(other.seen.calls)
        self.seen.filled |= other.seen.filled

    def begin(self, module: nn.Module, step: int) -> None:
        gradients = torch.is_grad_enabled()
        self.last = step
        self._averaging = module.training and not gradients and self._takes_averages()
        if self._averaging:
            return
        self.seen.forwards[module.training, gradients] += 1
        if not module.training:
            self._since["evaluated"] += 1
        elif not gradients:
            self._since["blind"] += 1

    def _takes_averages(self) -> bool:
        """As torch.optim.swa_utils.update_bn does: no gradients, and every momentum is None."""
        training = [layer for layer in self._layers if layer.training]
        return bool(training) and all(layer.momentum is None for layer in training)

    def see(self, layer: Any, x: Any, recomputed: bool) -> None:
        seen = self.seen
        updates = layer.training and layer.track_running_stats and layer not in SET_ASIDE
        if recomputed:
            seen.recomputed[layer] += updates
            return
        gradients = torch.is_grad_enabled()
        if self._averaging:
            seen.filled.add(layer)
            return
        calls = seen.calls.get(layer)
        if calls is None:
            calls = seen.calls[layer] = Counter()
        calls[updates, gradients] += 1
        if layer.training and layer in self._synced:
            self._synced[layer] += 1
        if not layer.training or not isinstance(x, Tensor) or x.dim() < 2:
            return
        if x.shape[1] != layer.num_features:
            return  # called with axis=, which is not seen here
        if gradients:
            self._see_values(layer, x)
        elif updates:
            self._look_blindly(layer, x)

    def _see_values(self, layer: Any, x: Tensor) -> None:
        seen = self.seen
        values = x.numel() // max(x.shape[1], 1)
        sizes = seen.values.get(layer)
        if sizes is None:
            sizes = seen.values[layer] = Counter()
        sizes[values] += 1
        if self._looking and values > 1 and x.is_floating_point() and not transformed():
            self._look(layer, self._batch(layer, x.detach(), gradients=True))

    def _look_blindly(self, layer: Any, x: Tensor) -> None:
        """As often as at the passes with gradients, though these may come at other steps."""
        last = self._blind_looked.get(layer)
        due = last is None or self._looking or self.seen.steps - last >= self._every
        if due and x.is_floating_point() and x.numel() > x.shape[1] and not transformed():
            self._blind_looked[layer] = self.seen.steps
            self._batch(layer, x.detach(), gradients=False)

    def _batch(self, layer: Any, x: Tensor, *, gradients: bool) -> "_Batch":
        moments = Moments()
        moments.merge(*kernels.moments(x), x.numel() // x.shape[1])
        batch = _Batch(moments, x.shape[0])
        self._batches.setdefault((layer, gradients), deque(maxlen=KEPT)).append(batch)
        return batch

    def _look(self, layer: Any, batch: "_Batch") -> None:
        if not _forgotten(layer) and layer not in self.seen.filled:
            return
        looks = self._looks.setdefault(layer, deque(maxlen=KEPT))
        looks.append(standardized_gap(layer, batch.moments) ** 2 - batch.chance)

    def _foreign(self) -> Iterator[tuple[Any, float]]:
        """How far the passes without gradients are from those with, at the last looks."""
        for (layer, gradients), blind in self._batches.items():
            seen = self._batches.get((layer, True))
            if gradients or not seen:
                continue
            ours, theirs = _merged(seen), _merged(blind)
            chance = ours.chance + theirs.chance
            yield layer, max(apart(layer.eps, ours.moments, theirs.moments) ** 2 - chance, 0) ** 0.5

    def notice(self, step: int) -> None:
        """At steps of whatever is trained: a weight that takes a gradient is not fixed.

        Now and then is enough, for a weight that took one in between has moved.
        """
        self.seen.noticed += 1
        if step % 7 and step > FIXED:
            return
        for layer in self._layers:
            if layer.weight is None or is_lazy(layer.weight):
                continue
            if layer not in self._weights:
                self._weights[layer] = self.seen.noticed, layer.weight.detach().clone()
            if layer.weight.requires_grad:
                self._fixed.pop(layer, None)
            elif layer not in self._fixed:
                self._fixed[layer] = self.seen.noticed, layer.weight.detach().clone()

    def step(self) -> None:
        self.seen.steps += 1
        self.seen.blind_steps += self._since["blind"] > 0
        self._count_evaluation(self.seen)
        self._since.clear()
        self._looking = self.seen.steps % self._every == 0
        if most := max(self._synced.values(), default=0):
            for sync, count in self._synced.items():
                self.seen.synced.setdefault(sync, Counter())[count, most] += 1
                self._synced[sync] = 0
        if not self.module.training:
            return
        for layer in self._layers:
            if not layer.training:
                self._required[layer] = _requires_grad(layer)
            elif layer in self._required and self._required[layer] == _requires_grad(layer):
                self.seen.thawed.add(layer)

    def _count_evaluation(self, seen: Training) -> None:
        """What stood between two steps."""
        if self._since["evaluated"]:
            seen.evaluations += 1
        elif self._since["blind"] > 1:
            seen.blind_evaluations += 1

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
        """What was seen, with what stands since the last step."""
        seen = replace(self.seen)
        self._count_evaluation(seen)
        seen.drift = {
            layer: max(sum(looks) / len(looks), 0.0) ** 0.5 for layer, looks in self._looks.items()
        }
        seen.foreign = dict(self._foreign())
        # an average of another model's weights changes without a gradient
        seen.fixed = self._unmoved(self._fixed)
        seen.resting = self._unmoved(self._weights)
        return seen

    def _unmoved(self, weights: dict[Any, tuple[int, Tensor]]) -> set[Any]:
        """Whose weight is what it was, for ten steps or for all."""
        noticed = self.seen.noticed
        return {
            layer
            for layer, (since, weight) in weights.items()
            if (since == 1 < noticed or noticed - since >= FIXED)
            and torch.equal(layer.weight, weight)
        }


def _loaded_without_counter(layer: Any) -> bool:
    counter, mean = layer.num_batches_tracked, layer.running_mean
    if counter is None or mean is None or is_lazy(mean) or counter.is_meta:
        return False
    return int(counter) == 0 and not initial(layer)


def _forgotten(layer: Any) -> bool:
    """Its average keeps 0.05 or less of the values that it began with."""
    if layer.running_mean is None or is_lazy(layer.running_mean):
        return False
    counter, momentum = layer.num_batches_tracked, layer.momentum
    return counter is None or momentum is None or (1 - momentum) ** int(counter) <= 0.05


def _requires_grad(layer: Any) -> bool:
    """A layer that is unfrozen on purpose takes gradients again."""
    return any(p is not None and p.requires_grad for p in (layer.weight, layer.bias))


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
    with ExitStack() as hooks, warnings.catch_warnings():
        # torch warns of global hooks where a module is compiled, and these allow for it
        warnings.filterwarnings("ignore", message=r"Using `torch.compile\(module\)` when there are")
        hooks.enter_context(_removed(torch_module.register_module_forward_pre_hook(watching.enter)))
        hooks.enter_context(_removed(register_optimizer_step_post_hook(watching.step)))
        yield watching


@contextmanager
def _removed(handle: Any) -> Iterator[None]:
    try:
        yield
    finally:
        handle.remove()
