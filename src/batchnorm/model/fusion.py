"""Let a norm do what follows it in the same sweep: an activation, a pooling too, or a residual sum.

The unit is a block: a module whose own forward calls norms. The block's forward is traced with its
children as leaves, norm, sum and activation that stand behind each other become one call, and the
block runs the new graph. Its modules stay what and where they are, with parameters and names;
whenever a graph does not hold for a call (other arguments, a hook, a module that was replaced,
torch.compile, a tracer), the block's own forward runs instead.
"""

import operator
import random
import sys
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import wraps
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F
from torch.nn.modules import module as torch_module
from torch.nn.modules.batchnorm import _BatchNorm

from batchnorm import layers
from batchnorm.kernels.activations import ACTIVATIONS
from batchnorm.kernels.pools import WINDOW
from batchnorm.layers import PLAIN, BatchNorm2d, BatchNormAct, hooked
from batchnorm.model.mixing import Mixin, mix, own_class, unmix

SUMS = {operator.add, operator.iadd, torch.add, "add", "add_"}
IN_PLACE_SUMS = {operator.iadd, "add_"}
# how an activation is called in a graph -> its name here; with default arguments only
CALLS: dict[Any, str] = {
    **{function: name for name, function in ACTIVATIONS.items()},
    torch.relu: "relu", "relu": "relu", "relu_": "relu", F.sigmoid: "sigmoid", "sigmoid": "sigmoid",
    "sigmoid_": "sigmoid", F.tanh: "tanh", "tanh": "tanh", "tanh_": "tanh",
}  # fmt: skip
MODULES: dict[type[nn.Module], str] = {
    nn.ReLU: "relu", nn.LeakyReLU: "leaky_relu", nn.Sigmoid: "sigmoid", nn.Tanh: "tanh",
    nn.SiLU: "silu", nn.GELU: "gelu", nn.Hardswish: "hardswish",
}  # fmt: skip
POOLS: dict[type[nn.Module], str] = {nn.AvgPool2d: "avg", nn.MaxPool2d: "max"}
# of a pooling module that the kernels do: its settings, where it has them
POOL_SETTINGS: dict[str, tuple[object, ...]] = {
    "kernel_size": (WINDOW, (WINDOW, WINDOW)), "stride": (WINDOW, (WINDOW, WINDOW)),
    "padding": (0, (0, 0)), "dilation": (1, (1, 1)), "ceil_mode": (False,),
    "return_indices": (False,), "divisor_override": (None, WINDOW * WINDOW),
}  # fmt: skip
DEFAULTS = {"negative_slope": 0.01, "approximate": "none"}
Kinds = tuple[type, ...]
TRACES = 8  # of a block, before it keeps its own forward


class Fused(Mixin):
    """A mixin, put before a block's own class: it runs the new graph where that holds."""

    def __init_subclass__(cls) -> None:
        own: Any = cls.__bases__[1].forward  # type: ignore[attr-defined]  # a module's class

        @wraps(own)  # tracers and others ask for its signature
        def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
            if torch.compiler.is_compiling() or kwargs or (plan := _plan_for(self, args)) is None:
                return own(self, *args, **kwargs)
            return plan.run(self, *args)

        cls.forward = forward


@dataclass(frozen=True)
class Plan:
    """A graph of a block, and what must be so for it to hold."""

    run: Callable[..., Any]
    taken: dict[str, list[str]]  # the norm's name in the block -> what it does besides
    modules: dict[str, nn.Module]  # activations that are not called any more
    settings: dict[str, Any]  # the block's plain attributes, which its forward may have read
    children: list[nn.Module | None]
    traced: int = 1  # how often, for these arguments

    def holds(self, block: nn.Module) -> bool:
        """The block has the same settings, children and activations."""
        own = vars(block)
        return (
            list(own["_modules"].values()) == self.children
            and all(own.get(name) == value for name, value in self.settings.items())
            and all(block.get_submodule(name) is module for name, module in self.modules.items())
        )

    @property
    def watched(self) -> bool:
        """A hook waits for a call that the graph does not make."""
        return any(map(hooked, self.modules.values()))


_PLANS: WeakKeyDictionary[nn.Module, dict[Any, Plan | None]] = WeakKeyDictionary()


def fuse(model: nn.Module) -> dict[nn.Module, list[str]]:
    """Make every block that has something to fuse run it fused, in place.

    Returns:
        For each norm that does more than before: what it took in.
    """
    found: dict[nn.Module, list[str]] = {}
    unfuse(model)
    for block in list(model.modules()):
        if not _may_be_a_block(block):
            continue
        plan = _planned(block, (Tensor,))
        if plan is None:
            continue
        mix(Fused, block)
        for name, taken in plan.taken.items():
            found[block.get_submodule(name)] = taken
    return found


def unfuse(model: nn.Module) -> None:
    """Give every block its own forward back, in place."""
    for block in model.modules():
        if isinstance(block, Fused):
            _PLANS.pop(block, None)
            unmix(block, Fused)


def activation_name(module: nn.Module) -> str | None:
    """Its name, where it is one with default arguments."""
    own = vars(module)
    if any(own.get(key, value) != value for key, value in DEFAULTS.items()):
        return None
    return MODULES.get(type(module))


def _pool_name(module: nn.Module) -> str | None:
    """Its name, where it is one of 2×2 windows, stride 2."""
    own = vars(module)
    if any(own.get(key, fit[0]) not in fit for key, fit in POOL_SETTINGS.items()):
        return None
    return POOLS.get(type(module))


def _may_be_a_block(module: nn.Module) -> bool:
    """It has norms in it, and a forward of its own in Python that takes one argument."""
    if isinstance(module, _BatchNorm | BatchNormAct | torch.jit.ScriptModule | fx.GraphModule):
        return False
    return "forward" not in vars(module) and any(
        isinstance(m, _BatchNorm) for m in module.modules()
    )


def _plan_for(block: nn.Module, args: tuple[Any, ...]) -> Plan | None:
    kinds = tuple(type(arg) for arg in args)
    if (
        any(kind not in {Tensor, nn.Parameter, list, tuple} for kind in kinds)
        or torch._C._get_tracing_state()  # noqa: SLF001  # what torch.jit.is_tracing asks
        or torch_module._has_any_global_hook()  # noqa: SLF001
        or getattr(block, "_is_replica", False)  # DataParallel makes new ones at every call
    ):
        return None
    plans = _PLANS.setdefault(block, {})
    key = (block.training, kinds)
    if key not in plans:
        plans[key] = _planned(block, kinds)
    plan = plans[key]
    if plan is None or plan.holds(block):
        return None if plan is not None and plan.watched else plan
    # a block whose settings change at every call would be traced at every call
    again = _planned(block, kinds) if plan.traced < TRACES else None
    plans[key] = None if again is None else replace(again, traced=plan.traced + 1)
    return plans[key]


def _planned(block: nn.Module, kinds: Kinds) -> Plan | None:
    """None where the forward cannot be traced, or has nothing to fuse."""
    graph = _traced(block, kinds)
    if graph is None:
        return None
    rewriting = _Rewriting(block, graph)
    for node in list(graph.nodes):
        rewriting.visit(node)
    if not rewriting.taken:
        return None
    graph.lint()
    module = fx.GraphModule(block, graph)
    children = list(block._modules.values())  # noqa: SLF001  # with those that are None
    return Plan(
        type(module).forward, rewriting.taken, rewriting.modules, _settings(block), children
    )


def _settings(block: nn.Module) -> dict[str, Any]:
    plain = (bool, int, float, str, type(None))
    return {name: value for name, value in vars(block).items() if isinstance(value, plain)}


class _Unsure(Exception):  # noqa: N818  # not for users: the block stays as it is
    """The forward asks for what a graph cannot know."""


class _Proxy(fx.Proxy):
    """A value in the graph whose type may be asked for where it is known."""

    kind: type | None = None

    @property  # type: ignore[misc]  # a property in the place of an attribute
    def __class__(self) -> Any:  # what isinstance asks
        asker = sys._getframe(1).f_globals.get("__name__", "")  # noqa: SLF001  # who asks
        if asker.startswith(("torch.", __name__)):  # tracing itself
            return _Proxy
        if self.kind is None:
            raise _Unsure
        return self.kind

    # fx would record the sum alone, and whoever else holds this value would miss the change
    def __iadd__(self, other: Any) -> Any:
        return self.tracer.create_proxy("call_function", operator.iadd, (self, other), {})

    def __isub__(self, other: Any) -> Any:
        return self.tracer.create_proxy("call_function", operator.isub, (self, other), {})

    def __imul__(self, other: Any) -> Any:
        return self.tracer.create_proxy("call_function", operator.imul, (self, other), {})

    def __itruediv__(self, other: Any) -> Any:
        return self.tracer.create_proxy("call_function", operator.itruediv, (self, other), {})


class _Tracer(fx.Tracer):
    """Every child is a leaf; buffers are values of the graph, not of this moment."""

    proxy_buffer_attributes = True

    def __init__(self, kinds: Kinds) -> None:
        super().__init__()
        self._kinds = iter(kinds)

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        del m, module_qualified_name
        return True

    def proxy(self, node: fx.Node) -> fx.Proxy:
        value = _Proxy(node, self)
        if node.op == "placeholder":
            value.kind = next(self._kinds, None)
        return value

    def create_arg(self, a: Any) -> Any:
        if type(a) is Tensor:
            raise _Unsure  # a constant of this moment
        return super().create_arg(a)


def _traced(block: nn.Module, kinds: Kinds) -> fx.Graph | None:
    """The graph of its own forward for arguments of these types; nothing of the block changes."""
    own = own_class(block) if isinstance(block, Fused) else type(block)
    code = getattr(own.forward, "__code__", None)
    if code is None or code.co_argcount != 1 + len(kinds) or code.co_kwonlyargcount:
        return None
    if code.co_flags & 0x0C:  # *args, **kwargs
        return None
    before = {name: dict(v) if isinstance(v, dict) else v for name, v in vars(block).items()}
    mixed, state = type(block), random.getstate()
    try:
        block.__class__ = own
        with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            drawn = torch.random.get_rng_state()
            graph = _Tracer(kinds).trace(block)
            chance = not torch.equal(drawn, torch.random.get_rng_state())
    except Exception:  # noqa: BLE001  # any model's forward may raise anything on a proxy
        return None
    finally:
        block.__class__ = mixed
        after = vars(block)
        moved = set(after) != set(before) or any(not _same(after[k], v) for k, v in before.items())
        if moved:
            after.clear()
            after.update(before)
    # a forward that draws, or that counts its calls, does something else each time
    chance = chance or random.getstate() != state
    random.setstate(state)
    return None if chance or moved else graph


def _same(now: Any, before: Any) -> bool:
    if isinstance(before, dict):
        return (
            isinstance(now, dict)
            and now.keys() == before.keys()
            and all(now[key] is value for key, value in before.items())
        )
    return now is before


class _Rewriting:
    """One graph: norm, sum, activation and pooling behind each other become one call."""

    def __init__(self, block: nn.Module, graph: fx.Graph) -> None:
        self.block, self.graph = block, graph
        self.taken: dict[str, list[str]] = {}
        self.modules: dict[str, nn.Module] = {}

    def visit(self, norm: fx.Node) -> None:
        """Fuse what stands behind this node, if it is a norm's."""
        if not self._is_norm(norm):
            return
        (user,) = norm.users
        if (name := self._activation(user)) is not None:
            pool, last = self._pool(norm, user)
            self._replace(norm, last, None, name, pool)
        elif (residual := self._residual(user, norm)) is not None:
            behind = next(iter(user.users)) if len(user.users) == 1 else None
            name = None if behind is None else self._activation(behind)
            if self._may_move(norm, user):
                self._replace(
                    norm, user if name is None or behind is None else behind, residual, name
                )

    def _is_norm(self, node: fx.Node) -> bool:
        if node.op != "call_module" or len(node.users) != 1 or node.kwargs or len(node.args) != 1:
            return False
        module = self.block.get_submodule(str(node.target))
        return type(module) in PLAIN and str(node.target) not in self.taken

    def _activation(self, node: fx.Node) -> str | None:
        """Its name, where the node is one with default arguments."""
        if node.op == "call_module":
            module = self.block.get_submodule(str(node.target))
            return activation_name(module) if len(node.args) == 1 and not node.kwargs else None
        rest = {key for key, value in node.kwargs.items() if DEFAULTS.get(key, value) != value}
        rest |= set(node.kwargs) - {"inplace", *DEFAULTS}
        if node.op not in {"call_function", "call_method"} or len(node.args) != 1 or rest:
            return None
        return CALLS.get(node.target)

    def _pool(self, norm: fx.Node, activation: fx.Node) -> tuple[str | None, fx.Node]:
        """The pooling that takes the activation's output alone, and its node; else None."""
        # a BatchNorm1d's (N, C, L) would be an image to it, and N the channels
        if (
            len(activation.users) == 1
            and type(self.block.get_submodule(str(norm.target))) is BatchNorm2d
        ):
            (user,) = activation.users
            if user.op == "call_module" and len(user.args) == 1 and not user.kwargs:
                name = _pool_name(self.block.get_submodule(str(user.target)))
                together = norm.next is activation and activation.next is user
                if name is not None and (together or self._may_move(norm, user)):
                    return name, user
        return None, activation

    def _residual(self, node: fx.Node, norm: fx.Node) -> fx.Node | None:
        """What is added to the norm's output, where the node adds two values of the graph."""
        if node.op not in {"call_function", "call_method"} or node.target not in SUMS:
            return None
        if len(node.args) != 2 or node.kwargs or len(node.all_input_nodes) != 2:
            return None
        left, right = node.args
        if node.target in IN_PLACE_SUMS and right is norm:
            return None  # it writes over the other value
        other = right if left is norm else left
        return other if isinstance(other, fx.Node) else None

    def _may_move(self, norm: fx.Node, to: fx.Node) -> bool:
        """The norm is called where the sum or pooling stood: its input must be the same there."""
        if norm.next is to:
            return True
        (source,) = norm.all_input_nodes
        return source.op == "call_module" and len(source.users) == 1

    def _replace(
        self,
        norm: fx.Node,
        last: fx.Node,
        residual: fx.Node | None,
        activation: str | None,
        pool: str | None = None,
    ) -> None:
        with self.graph.inserting_before(last):
            module = self.graph.get_attr(str(norm.target))
            args = (module, norm.args[0], residual, activation, pool)
            fused = self.graph.call_function(layers.fused, args)
        last.replace_all_uses_with(fused)
        taken = [] if residual is None else ["a residual sum"]
        for node in self._chain(last, norm):
            if node.op == "call_module" and node is not norm:
                self.modules[str(node.target)] = self.block.get_submodule(str(node.target))
            self.graph.erase_node(node)
        taken += [] if activation is None else [activation]
        self.taken[str(norm.target)] = taken + ([] if pool is None else [f"{pool} pooling"])

    @staticmethod
    def _chain(last: fx.Node, norm: fx.Node) -> Iterator[fx.Node]:
        """From the last node back to the norm, along the norm's own output."""
        chain = [norm]
        while chain[-1] is not last:
            (user,) = (u for u in chain[-1].users if u.target is not layers.fused)
            chain.append(user)
        yield from reversed(chain)
