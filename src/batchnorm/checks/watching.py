"""Watch a training that knows nothing of it, and say what was wrong with its batch norm.

torch's global hooks tell of every call of a module and every step of an optimizer. What is noted
are counts; every `every` steps the layers' inputs are looked at, too. Nothing is drawn from a random
generator, nothing is written into a module, so the training's numbers are what they would be. Of a
model that torch.compile took, modes and buffers are seen at every step, the passes where the module
itself was compiled, and never the layers' inputs.
"""

import gc
import sys
import warnings
import weakref
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.nn.modules import module as torch_module
from torch.optim.optimizer import register_optimizer_step_post_hook

from batchnorm.checks.checking import judge
from batchnorm.checks.findings import Findings, Level, level_of
from batchnorm.checks.naming import caller_of
from batchnorm.checks.observed import Observed
from batchnorm.checks.rules import Names, chosen
from batchnorm.checks.subject import Subject
from batchnorm.errors import BatchNormError, brief
from batchnorm.model.calling import eagerly
from batchnorm.model.discovery import Norm
from batchnorm.variants.variant import recomputing

EVERY = 50  # steps between two looks at the layers' inputs
MODELS = 64  # watched at once: when another comes, the one that rested longest is judged and let go


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
        self._rules = chosen(select, ignore)
        self._roots: list[Observed] = []
        self._done: list[_Judged] = []  # of the models that were let go
        # by id, since a module may not be hashable; an entry leaves with its module
        self._roles: dict[int, _Role] = {}
        self._alive: dict[int, weakref.ref[nn.Module]] = {}
        self._optimizers: list[_Groups] = []
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
            if role.entry is not None and not recomputing():
                role.entry.begin(module, self._steps, self._roots)
            if role.owner is not None:
                role.owner.see(module, args[0] if args else None, recomputing())
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
            if self._steps % self._every == 0:
                self._let_the_abandoned_go()
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
        name, model = caller_of(module)
        model = model if self._only is None else self._only
        if not any(isinstance(m, Norm) for m in inside) or module not in set(model.modules()):
            return self._play(module, None, None)
        if (known := self._of_the_same_norms(inside)) and known.module not in inside:
            known.module, known.entries = model, [module]  # a wrapper that is made anew every step
            return self._play(module, known, known)
        root = next((r for r in self._roots if r.module is model), None) or self._begin(model, name)
        for part in [r for r in self._roots if r is not root and r.module in inside]:
            root.take(part)  # it was called by itself before
            self._roots.remove(part)
        root.entries = [*(entry for entry in root.entries if entry not in inside), module]
        self._meetings += 1
        for inner in inside - {module}:
            self._play(inner, None, root)
        return self._play(module, root, root)

    def _of_the_same_norms(self, inside: set[nn.Module]) -> Observed | None:
        """The model that every one of these norms is known to belong to."""
        roles = [self._roles.get(id(m), NOTHING) for m in inside if isinstance(m, Norm)]
        owners = {role.owner for role in roles}
        return owners.pop() if len(owners) == 1 and self._only is None else None

    def _play(self, module: nn.Module, entry: Observed | None, owner: Observed | None) -> "_Role":
        key = id(module)

        def forget(_: object) -> None:
            self._roles.pop(key, None)
            self._alive.pop(key, None)

        role = _Role(entry, owner if isinstance(module, Norm) else None)
        self._roles[key], self._alive[key] = role, weakref.ref(module, forget)
        return role

    def _begin(self, model: nn.Module, name: str) -> Observed:
        self._let_the_abandoned_go()
        whole = [root for root in self._roots if not isinstance(root.module, Norm)]
        if len(whole) >= MODELS:
            oldest = min(whole, key=lambda root: root.last)
            self._let_go(oldest, until=self._steps)
            # it may go on, and is not met again
            self._roles = {
                k: NOTHING if oldest in role else role for k, role in self._roles.items()
            }
        root = Observed(model, name, self._every)
        self._roots.append(root)
        return root

    def _let_the_abandoned_go(self) -> None:
        """The models that nobody else holds, as those of the folds before: their memory is wanted."""
        for root in [root for root in self._roots if root.module is not self._only]:
            ours = 1 + sum(entry is root.module for entry in root.entries)
            if sys.getrefcount(root.module) > ours + 1:  # and the argument
                continue
            self._let_go(root)
            # a part may be held, and be met again
            self._roles = {k: role for k, role in self._roles.items() if root not in role}

    def _let_go(self, root: Observed, until: int | None = None) -> None:
        # its own forward is not run, as a graph would: the training goes on
        judged = self._judge(root, graph=False)
        if until is not None:  # it may go on
            judged.name += f", watched until step {until}: more than {MODELS} models"
        self._done.append(judged)
        self._roots.remove(root)
        for groups in self._optimizers:
            groups.roots = [other for other in groups.roots if other is not root]
        self._optimizers = [each for each in self._optimizers if each.alive() or each.roots]

    def _trained_by(self, optimizer: Any) -> list[Observed]:
        """The models that hold one of the optimizer's parameters."""
        known = next((each for each in self._optimizers if each.alive() is optimizer), None)
        if known is None:
            known = _Groups(optimizer.param_groups, weakref.ref(optimizer))
            self._optimizers.append(known)
        elif known.meetings == self._meetings and self._steps % self._every:
            return known.roots
        roots = self._holding(held := known.held())
        if known.meetings < 0 and all(isinstance(root.module, Norm) for root in roots):
            for model in _outermost(held):  # compiled, or run by its forward
                self._meet(model)
            roots = self._holding(held)
        if roots or known.meetings < 0:
            known.meetings, known.roots = self._meetings, roots
        return roots

    def _holding(self, held: set[int]) -> list[Observed]:
        return [root for root in self._roots if root.parameters() & held]

    # results

    @property
    def models(self) -> list[nn.Module]:
        """Those that ran with batch norm in them and were not let go."""
        return [root.module for root in self._roots]

    def findings(self) -> list[Findings]:
        """What is wrong with each model, by what was seen until now; of its copies once.

        A copy has the same layers, and nothing that the one which is told of has not. The names of
        such are in the headline.
        """
        told: list[_Judged] = []
        like: dict[int, list[str]] = {}
        judged = [*self._done, *map(self._judge, self._roots)]
        # the widest first, and among equals the trained
        for each in sorted(judged, key=lambda each: (-len(each.places), not each.trained)):
            one = next((one for one in told if each.copies(one)), None)
            if one is None:
                told.append(each)
            else:
                like.setdefault(id(one), []).append(each.name)
        told.sort(key=judged.index)
        names = Counter[str]()
        for each in told:
            names[each.name] += 1
            number = f" #{n}" if (n := names[each.name]) > 1 else ""
            each.findings.model = f"{each.name}{number}{_and(like.get(id(each), []), each.name)}"
        return [each.findings for each in told]

    def _judge(self, root: Observed, *, graph: bool = True) -> "_Judged":
        optimizers = [each for each in self._optimizers if root in each.roots]
        subject = Subject(root.module, optimizers, training=root.training(), graph=graph)
        skipped = {} if self._failure is None else {"(hook)": self._failure}
        self._asleep = True
        try:
            with eagerly():  # a graph compiled now would be compiled for nothing
                found = judge(subject, self._rules, self._level, skipped)
        finally:
            self._asleep = False
        name = f"{root.name} ({found.model})" if root.name else found.model
        layers = tuple((name, each.num_features) for name, each in subject.layers.items())
        return _Judged(name, (type(subject.model), layers), bool(optimizers), found)


@dataclass
class _Groups:
    """An optimizer's parameters and the models that it trains; it itself, with its moments, may go."""

    param_groups: list[dict[str, Any]]
    alive: "weakref.ref[Any]"
    meetings: int = -1  # how many models had been met when these were looked up
    roots: list[Observed] = field(default_factory=list)

    def held(self) -> set[int]:
        return {id(p) for group in self.param_groups for p in group["params"]}


@dataclass(eq=False)
class _Judged:
    """A model's findings, and what tells it from others."""

    name: str
    structure: object
    trained: bool
    findings: Findings

    @property
    def places(self) -> set[tuple[str, str]]:
        return {(f.rule, f.layer) for f in self.findings}

    def copies(self, other: "_Judged") -> bool:
        return self.structure == other.structure and self.places <= other.places


def _and(names: list[str], its_own: str) -> str:
    """Of copies."""
    if not names:
        return ""
    others = sorted({name.partition(" (")[0] for name in set(names) - {its_own}})
    return f" and {len(names)} like it" + (f" ({', '.join(others)})" if others else "")


class _Role(NamedTuple):
    """What the watch does when a module is called."""

    entry: Observed | None  # the model whose pass begins
    owner: Observed | None  # the model whose norm this is


NOTHING = _Role(None, None)


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
