"""What batch normalization there is in a model, what stands around it, and what it costs."""

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from typing import Any, overload

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from batchnorm import kernels, masks
from batchnorm.model.calling import eagerly, feed, unchanged
from batchnorm.model.discovery import Norm, batch_norms, constant_norms, refuse_no_model
from batchnorm.model.freezing import Frozen
from batchnorm.model.tracing import trace

ROUNDS = 5  # of the timing, after one that warms up; the median counts


@dataclass(frozen=True)
class Row:
    """One batch-norm layer. What only a run can tell is None without inputs."""

    layer: str  # its first name in the model
    kind: str  # its class
    channels: int | None  # None: not learned yet
    mode: str  # train, eval, frozen, constant
    before: str  # what feeds it: a module's name or a function's; "?" where tracing failed
    behind: str  # what takes its output
    health: tuple[str, ...]  # what is odd about its state; () where nothing is
    calls: int | None = None  # in one forward pass
    values: int | None = None  # per channel and call, the fewest: what the statistics are taken of
    drift: float | None = None  # √mean over channels of (batch mean − running mean)² / running var
    time: float | None = None  # its share of the forward pass
    memory: float | None = None  # its share of the bytes kept for the backward pass


class Summary(Sequence[Row]):
    """The rows in the order of registration; printed, a table."""

    def __init__(self, model: str, rows: list[Row], untraced: dict[str, str]) -> None:
        self.model, self.rows, self.untraced = model, rows, untraced

    @overload
    def __getitem__(self, index: int) -> Row: ...
    @overload
    def __getitem__(self, index: slice) -> list[Row]: ...
    def __getitem__(self, index: int | slice) -> Row | list[Row]:
        return self.rows[index]

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def headline(self) -> str:
        """One line for the whole model."""
        if not self.rows:
            return f"{self.model}: no batch norm in it"
        odd = sum(bool(row.health) for row in self.rows)
        said = f"{self.model}: {len(self.rows)} batch-norm layers, {odd} with something odd"
        for what in ("time", "memory"):
            shares = [share for row in self.rows if (share := getattr(row, what)) is not None]
            if shares:
                kept = (
                    "the forward pass's time" if what == "time" else "the memory kept for backward"
                )
                said += f", {sum(shares):.0%} of {kept}"
        return said

    @property
    def notes(self) -> list[str]:
        """What all layers have in common, and what could not be traced."""
        same = [f"{name} {values[0]}" for name, values in self._columns().items() if _same(values)]
        common = [f"every layer: {', '.join(same)}"] if same else []
        return common + [
            f"could not be traced: {name or 'the model'}: {why}"
            for name, why in self.untraced.items()
        ]

    @property
    def columns(self) -> dict[str, list[str]]:
        """The table as text by column, without those in which all layers are the same."""
        return {name: values for name, values in self._columns().items() if not _same(values)}

    def _columns(self) -> dict[str, list[str]]:
        table = {name: [cell(row) for row in self.rows] for name, cell in CELLS.items()}
        return {name: values for name, values in table.items() if set(values) != {UNKNOWN}}

    def __str__(self) -> str:
        table = [[name, *values] for name, values in self.columns.items()] if self.rows else []
        padded = [[cell.ljust(max(map(len, column))) for cell in column] for column in table]
        lines = ["  ".join(line).rstrip() for line in zip(*padded, strict=True)]
        return "\n".join([self.headline, *self.notes, *lines])

    __repr__ = __str__


UNKNOWN = "–"


def _same(values: list[str]) -> bool:
    return len(values) > 1 and len(set(values)) == 1


def _number(value: float | None, form: str) -> str:
    return UNKNOWN if value is None else format(value, form)


def _between(row: Row) -> str:
    """The neighbours; those beside the layer by their last names."""
    beside = row.layer.rpartition(".")[0] + "."
    before, behind = (
        ", ".join(name.removeprefix(beside) for name in names.split(", "))
        for names in (row.before, row.behind)
    )
    return f"{before} → {behind}"


CELLS: dict[str, Callable[[Row], str]] = {
    "layer": lambda row: row.layer or "(the model)",
    "kind": lambda row: row.kind,
    "channels": lambda row: _number(row.channels, "d"),
    "mode": lambda row: row.mode,
    "between": _between,
    "calls": lambda row: _number(row.calls, "d"),
    "values": lambda row: _number(row.values, ",d"),
    "drift": lambda row: _number(row.drift, ".2g"),
    "time": lambda row: _number(row.time, ".1%"),
    "memory": lambda row: _number(row.memory, ".1%"),
    "health": lambda row: "; ".join(row.health) or "well",
}


def summary(model: nn.Module, inputs: Any = None) -> Summary:
    """Every batch-norm layer of a model: neighbours, calls, values per channel, health, cost.

    With sample inputs the model is run in the mode it is in, with gradients; its buffers and the
    random state come back. Times are medians of a few forward passes (a layer's share includes
    the hook that measures it, about a microsecond); memory is what autograd keeps for the backward
    pass, charged to the layer that kept it first.

    Args:
        model: any model.
        inputs: a tensor, a tuple of arguments, or a dict of keyword arguments.

    Returns:
        A sequence of rows that prints as a table.
    """
    refuse_no_model(model, "summary")
    traced = trace(model)
    rows: dict[nn.Module, Row] = {}
    for name, layer in {**batch_norms(model), **constant_norms(model)}.items():
        found = traced.calls.get(layer, [])
        rows[layer] = Row(
            layer=name,
            kind=type(layer).__name__,
            channels=_channels(layer),
            mode=_mode(layer),
            before=_joined(call.before for call in found),
            behind=_joined(user for call in found for user in call.behind),
            health=tuple(_health(layer)),
        )
    if inputs is not None and rows:
        rows = _measured(model, inputs, rows)
    return Summary(type(model).__name__, list(rows.values()), traced.untraced)


def _joined(names: Iterator[str]) -> str:
    return ", ".join(dict.fromkeys(names)) or "?"


def _channels(layer: Any) -> int | None:
    if getattr(layer, "running_mean", None) is not None and not is_lazy(layer.running_mean):
        return len(layer.running_mean)
    return getattr(layer, "num_features", None) or None


def _mode(layer: nn.Module) -> str:
    if not isinstance(layer, Norm):
        return "constant"
    if isinstance(layer, Frozen):
        return "frozen"
    return "train" if layer.training else "eval"


def _health(layer: Any) -> Iterator[str]:
    """What the state alone tells; `check` looks at data, optimizer and loader, too."""
    mean, var, weight = layer.running_mean, layer.running_var, layer.weight
    if any(value is not None and is_lazy(value) for value in (mean, weight)):
        yield "has not learned its size"
        return
    if weight is not None:
        if not weight.isfinite().all():
            yield "its weight is not finite"
        if zeros := int((weight == 0).sum()):
            yield f"weight 0 in {zeros} of {len(weight)} channels"
    if mean is None or var is None:
        yield "no running statistics"
        return
    if not (mean.isfinite().all() and var.isfinite().all()):
        yield "statistics that are not finite"
    elif not mean.any() and bool((var == 1).all()):
        yield "never trained"
    elif tiny := int((var < getattr(layer, "eps", 1e-5)).sum()):
        yield f"running variance below eps in {tiny} of {len(var)} channels"
    if mean.dtype in {torch.float16, torch.bfloat16}:
        yield f"statistics in {str(mean.dtype).removeprefix('torch.')}"


@dataclass
class _Cost:
    """What the runs showed of a layer."""

    values: list[int] = field(default_factory=list)  # per channel, of each call
    drift: float | None = None
    seconds: list[float] = field(default_factory=list)  # of each run
    bytes: int = 0


def _measured(model: nn.Module, inputs: Any, rows: dict[nn.Module, Row]) -> dict[nn.Module, Row]:
    costs = {layer: _Cost() for layer in rows}
    with unchanged(model), eagerly(), torch.enable_grad():
        _look(model, inputs, costs)
        kept = _weigh(model, inputs, costs)
        seconds = _time(model, inputs, costs)
    return {layer: _with_cost(row, costs[layer], kept, seconds) for layer, row in rows.items()}


def _with_cost(row: Row, cost: _Cost, kept: int, seconds: float) -> Row:
    health = row.health
    if not cost.values:
        health = (*health, "not called")
    elif row.mode == "train" and min(cost.values) < 16:
        health = (*health, f"few values per channel: {min(cost.values)}")
    return replace(
        row,
        health=health,
        calls=len(cost.values),
        values=min(cost.values, default=None),
        drift=cost.drift,
        time=_median(cost.seconds) / seconds if cost.seconds else 0.0,
        memory=cost.bytes / kept if kept else None,
    )


def _look(model: nn.Module, inputs: Any, costs: dict[nn.Module, _Cost]) -> None:
    """Calls, values per channel, and how far the batch's means are from the running ones."""

    def see(layer: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        x = masks.values(args, kwargs).detach()
        cost = costs[layer]
        cost.values.append(x.numel() // x.shape[1] if x.numel() else 0)
        mean, var = layer.running_mean, layer.running_var
        if len(cost.values) == 1 and cost.values[0] and mean is not None and not is_lazy(mean):
            gap = kernels.moments(x)[0].double() - mean.double()
            scaled = gap.square() / (var.double() + getattr(layer, "eps", 1e-5))
            cost.drift = float(scaled.mean().sqrt())

    with ExitStack() as hooks:
        for layer in costs:
            hooks.enter_context(layer.register_forward_pre_hook(see, with_kwargs=True))
        feed(model, inputs)


def _weigh(model: nn.Module, inputs: Any, costs: dict[nn.Module, _Cost]) -> int:
    """Bytes kept for the backward pass: each storage once, parameters not."""
    own = {p.untyped_storage().data_ptr() for p in (*model.parameters(), *model.buffers())}
    kept: dict[int, int] = {}
    inside: list[nn.Module] = []

    def keep(x: Tensor) -> Tensor:
        storage = x.untyped_storage()
        if storage.data_ptr() not in own and storage.data_ptr() not in kept:
            kept[storage.data_ptr()] = storage.nbytes()
            if inside:
                costs[inside[-1]].bytes += storage.nbytes()
        return x

    with _around(costs, inside.append, lambda _layer: inside.pop()):
        saving = torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x)
        with saving:
            outputs = feed(model, inputs)
    del outputs  # until here the graph held every storage, so that no address came twice
    return sum(kept.values())


def _time(model: nn.Module, inputs: Any, costs: dict[nn.Module, _Cost]) -> float:
    """Seconds of a forward pass; those of each layer go into its cost."""
    started: list[float] = []
    spent = dict.fromkeys(costs, 0.0)
    clock = _clock(model)

    def stop(layer: nn.Module) -> None:
        spent[layer] += clock() - started.pop()

    totals = []
    with _around(costs, lambda _layer: started.append(clock()), stop):
        feed(model, inputs)
        for _ in range(ROUNDS):
            spent.update(dict.fromkeys(costs, 0.0))
            begin = clock()
            feed(model, inputs)
            totals.append(clock() - begin)
            for layer, seconds in spent.items():
                costs[layer].seconds.append(seconds)
    return _median(totals)


def _median(values: list[float]) -> float:
    return sorted(values)[len(values) // 2]


def _clock(model: nn.Module) -> Callable[[], float]:
    """Of the wall; a GPU's queue is waited for."""
    if not any(p.device.type == "cuda" for p in model.parameters()):
        return time.perf_counter

    def wait_and_look() -> float:
        torch.cuda.synchronize()
        return time.perf_counter()

    return wait_and_look


@contextmanager
def _around(
    layers: Any, enter: Callable[[nn.Module], Any], leave: Callable[[nn.Module], Any]
) -> Iterator[None]:
    """Call `enter` before and `leave` behind each call of these layers."""
    with ExitStack() as hooks:
        for layer in layers:
            hooks.enter_context(layer.register_forward_pre_hook(lambda m, _args: enter(m)))
            hooks.enter_context(layer.register_forward_hook(lambda m, _args, _y: leave(m) and None))
        yield
