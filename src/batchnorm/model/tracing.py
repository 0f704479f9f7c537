"""Which layer feeds which: read from the traced graph, never from the order of registration."""

import warnings
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from torch import fx, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd

from batchnorm.model.calling import muted, unchanged
from batchnorm.model.discovery import constant_norms
from batchnorm.variants.split import SplitBatchNorm
from batchnorm.variants.variant import Variant

KINDS = (_BatchNorm, Variant, SplitBatchNorm, _ConvNd, nn.Linear)
CONTAINERS = (
    nn.ModuleList,
    nn.ModuleDict,
    nn.DataParallel,
    nn.parallel.DistributedDataParallel,
)  # torch's, with a forward of their own or none: only what is in them can be traced
PASSES = (nn.Identity, nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.AlphaDropout)


@dataclass(eq=False)
class Call:
    """One call of a module in the traced graph, modules that pass evaluation unchanged left out."""

    module: nn.Module
    source: "Call | None" = None  # the module whose output, used here alone, is the input
    users: int = 0  # of the output, whatever they are
    before: str = ""  # what gives the input: a module's name, or a function's
    behind: tuple[str, ...] = ()  # what takes the output, likewise


@dataclass
class Traced:
    """The calls of a model's modules, and what could not be traced."""

    calls: dict[nn.Module, list[Call]] = field(default_factory=lambda: defaultdict(list))
    untraced: dict[str, str] = field(default_factory=dict)  # a module's name, and why
    opened: set[nn.Module] = field(default_factory=set)  # whose tensors are read from outside
    whole: bool = False  # the model itself was traced, and not only its parts


class _Tracer(fx.Tracer):
    """Stops at torch.nn's modules, at norms, and at whatever is a convolution or a linear layer."""

    def __init__(self, constants: set[nn.Module], traced: Traced, root: nn.Module) -> None:
        super().__init__()
        self._constants, self._traced = constants, traced
        self._owners = {
            id(tensor): module
            for module in root.modules()
            if isinstance(module, KINDS) or module in constants
            for tensor in (*module.parameters(recurse=False), *module.buffers(recurse=False))
        }

    def getattr(self, attr: str, attr_val: Any, parameter_proxy_cache: dict[str, Any]) -> Any:
        if id(attr_val) in self._owners:  # a leaf's own forward is not run: somebody else reads it
            self._traced.opened.add(self._owners[id(attr_val)])
        return super().getattr(attr, attr_val, parameter_proxy_cache)

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return (
            isinstance(m, KINDS)
            or m in self._constants
            or super().is_leaf_module(m, module_qualified_name)
        )


def trace(model: nn.Module, mode: bool | None = None) -> Traced:
    """Trace the model, or, where its control flow forbids, each of its parts by itself.

    In training or evaluation mode, or by default in that of each module.
    """
    traced = Traced()
    constants = set(constant_norms(model).values())
    with unchanged(model):  # a forward that keeps what it computes would keep a proxy
        if mode is not None:
            for module in model.modules():
                module.training = mode  # not by train(), which models overwrite
        graphs = list(_graphs(model, "", constants, traced, set()))
    for name, part, graph in graphs:
        traced.whole |= part is model
        _read(name, part, graph, traced)
    return traced


def _graphs(
    module: nn.Module,
    name: str,
    constants: set[nn.Module],
    traced: Traced,
    seen: set[nn.Module],
) -> Iterator[tuple[str, nn.Module, fx.Graph]]:
    if module in seen:
        return
    seen.add(module)
    tracer = _Tracer(constants, traced, module)
    if not isinstance(module, CONTAINERS):
        if not list(module.children()) or tracer.is_leaf_module(module, name):
            return
        try:
            with warnings.catch_warnings(), muted():
                warnings.simplefilter("ignore")  # of the model's own forward, which may print, too
                graph = tracer.trace(module)
        except Exception as error:  # noqa: BLE001  # a model's forward may raise anything on a proxy
            traced.untraced[name] = str(error).partition("\n")[0]
        else:
            yield name, module, graph
            return
    for child_name, child in module.named_children():
        path = f"{name}.{child_name}" if name else child_name
        yield from _graphs(child, path, constants, traced, seen)


def _read(name: str, root: nn.Module, graph: fx.Graph, traced: Traced) -> None:
    calls: dict[fx.Node, Call] = {}
    for node in graph.nodes:
        if node.op != "call_module":
            continue
        module = root.get_submodule(str(node.target))
        source = _only_source(node)
        if isinstance(module, PASSES) and not module.training:
            if source in calls:  # what comes out is what went in
                calls[node] = calls[source]
                calls[node].users += len(node.users) - 1
            continue
        before = ", ".join(_called(name, each) for each in node.all_input_nodes)
        behind = tuple(_called(name, user) for user in node.users)
        call = Call(module, users=len(node.users), before=before, behind=behind)
        if source in calls and calls[source].users == 1:
            call.source = calls[source]
        calls[node] = call
        traced.calls[module].append(call)


def _called(name: str, node: fx.Node) -> str:
    """The name of what a node calls: a module's path in the whole model, or a function's name."""
    if node.op == "call_module":
        return f"{name}.{node.target}" if name else str(node.target)
    if node.op == "call_function":
        return str(getattr(node.target, "__name__", node.target))
    return {"placeholder": "the input", "output": "the output"}.get(node.op, str(node.target))


def _only_source(node: fx.Node) -> Any:
    inputs = node.all_input_nodes
    return inputs[0] if len(inputs) == 1 else None
