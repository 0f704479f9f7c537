"""Gradient accumulation with the large batch's normalization: micro-batches in lockstep.

Of a layer l with inputs x_k of the micro-batches k, the large batch's forward pass is

    mean = Σ_k Σ x_k / M,    var = Σ_k Σ (x_k − mean)² / M,    y_k = (x_k − mean) / √(var + eps) · w + b

and its backward pass

    dx_k = w / √(var + eps) · (dy_k − Σ_k Σ dy_k / M − x̂_k · Σ_k Σ dy_k · x̂_k / M).

Both need a sum over all micro-batches at every layer, before any of them goes on: one after another,
as usual, they cannot be equal. So each micro-batch runs the model in a thread of its own, one thread
at a time. Whoever comes to a layer leaves its input there and waits; the last one normalizes for all,
as one node of one graph, and all go on. Backward there is nothing to wait for: that graph is run once,
and the node is reached when the gradients of all micro-batches are there.

Kept for the backward pass are the inputs of the norms, which no micro-batch can do without, and
whatever else the model keeps; but not what a norm gives, with its activation: where a following layer
wants to keep that, a recipe is kept, and it is computed again from the norm's input.
"""

import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.multiprocessing.reductions import StorageWeakRef

from batchnorm import masks
from batchnorm.errors import BatchNormError
from batchnorm.kernels import verbs
from batchnorm.kernels.activations import ACTIVATIONS
from batchnorm.variants.sync import merge


def normalized(
    x: Tensor,
    mean: Tensor,
    invstd: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    activation: str | None,
) -> Tensor:
    """activation((x − mean) · invstd · weight + bias)."""
    y = verbs.normalize(x, mean, invstd, weight, bias)
    return y if activation is None else ACTIVATIONS[activation](y)


class Joint(torch.autograd.Function):
    """All micro-batches at one norm: x_1 … x_K -> y_1 … y_K, and their moments together."""

    @staticmethod
    def forward(
        ctx: Any,
        weight: Tensor | None,
        bias: Tensor | None,
        eps: float,
        activation: str | None,
        *xs: Tensor,
    ) -> tuple[Tensor, ...]:
        parts = [torch.stack([m.double() for m in verbs.moments(x)]) for x in xs]
        count, mean, squares = merge(torch.stack(parts))
        invstd = (squares / count.clamp(min=1) + eps).rsqrt()
        ys = [normalized(x, mean, invstd, weight, bias, activation) for x in xs]
        ctx.save_for_backward(weight, bias, count, mean, invstd, *xs)
        ctx.activation = activation
        ctx.mark_non_differentiable(count, mean, squares, invstd)
        return *ys, count, mean, squares, invstd

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *dys: Tensor) -> Any:
        weight, bias, count, mean, invstd, *xs = ctx.saved_tensors
        affine = (mean, invstd, weight, bias)
        # behind the micro-batches' stand the moments', which are none
        pairs = list(zip(dys, xs, strict=False))
        # g is computed twice: kept for all micro-batches it would be as large as the large batch
        sums = [
            verbs.reduce_gradient(_before(ctx.activation, dy, x, *affine), x, mean)
            for dy, x in pairs
        ]
        total, dot = (sum(each) for each in zip(*sums, strict=True))
        shares = (total / count.clamp(min=1), dot / count.clamp(min=1))
        dxs = [
            verbs.input_gradient(
                _before(ctx.activation, dy, x, *affine), x, mean, invstd, weight, *shares
            )
            for dy, x in pairs
        ]
        dweight = (dot * invstd).to(weight.dtype) if ctx.needs_input_grad[0] else None
        dbias = total.to(bias.dtype) if ctx.needs_input_grad[1] else None
        return dweight, dbias, None, None, *dxs


def _before(
    activation: str | None,
    dy: Tensor,
    x: Tensor,
    mean: Tensor,
    invstd: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
) -> Tensor:
    """The gradient in front of the activation, whose input is computed again."""
    if activation is None:
        return dy
    y = normalized(x, mean, invstd, weight, bias, None).requires_grad_()
    with torch.enable_grad():
        z = ACTIVATIONS[activation](y)
    (g,) = torch.autograd.grad(z, y, dy)
    return g


Layout = tuple[torch.Size, tuple[int, ...]]


def _layout(t: Tensor) -> Layout:
    return t.shape, t.stride()


class Recipes:
    """What the norms gave: kept for the backward pass not as tensors, but as how to compute them."""

    def __init__(self) -> None:
        self._known: dict[int, tuple[StorageWeakRef, int, Layout, Callable[[], Tensor]]] = {}

    def add(self, y: Tensor, recipe: Callable[[], Tensor]) -> None:
        """Take note of how y was computed."""
        storage = StorageWeakRef(y.untyped_storage())
        self._known[y.data_ptr()] = (storage, y._version, _layout(y), recipe)  # noqa: SLF001  # torch's

    def pack(self, t: Tensor) -> Any:
        """In the place of a tensor that is to be kept: its recipe, if it is what a norm gave."""
        found = self._known.get(t.data_ptr())
        if found is None:
            return t
        storage, version, layout, recipe = found
        here = StorageWeakRef(t.untyped_storage())
        # not what lies there today, and no view that begins at the same place
        same = storage == here and not storage.expired() and layout == _layout(t)
        # changed in place, as by ReLU(inplace=True), it is another tensor
        return recipe if same and t._version == version else t  # noqa: SLF001

    @staticmethod
    def unpack(kept: Any) -> Tensor:
        """The tensor."""
        if isinstance(kept, Tensor):
            return kept
        with torch.no_grad():
            y: Tensor = kept()
        return y


@dataclass
class Arrival:
    """A micro-batch at a norm, and what it gets there."""

    layer: Any
    x: Tensor
    activation: str | None
    y: Tensor | None = None


class _Abandoned(BaseException):  # no error; not an Exception, which models may catch
    """Another micro-batch failed."""


@dataclass
class Lockstep:
    """The micro-batches' threads, of which one runs at a time."""

    count: int
    names: dict[nn.Module, str]
    recipes: Recipes = field(default_factory=Recipes)
    turn: int = 0
    waiting: dict[int, Arrival] = field(default_factory=dict)
    finished: set[int] = field(default_factory=set)
    failure: BaseException | None = None
    changed: threading.Condition = field(default_factory=threading.Condition)
    here: threading.local = field(default_factory=threading.local)
    gradients: bool = field(default_factory=torch.is_grad_enabled)  # of whoever starts the threads

    def run(self, place: int, work: Callable[[], None]) -> None:
        """The life of a thread."""
        self.here.place = place
        try:
            self._wait()
            work()
        except _Abandoned:
            pass
        except BaseException as error:  # noqa: BLE001  # raised where the threads were started
            self.failure = self.failure or error
        finally:
            self.finished.add(place)
            self._pass_on()

    def meet(self, arrival: Arrival) -> Tensor:
        """Leave x at the norm, wait for the other micro-batches, and come back with y."""
        self.waiting[self.here.place] = arrival
        self._pass_on()
        self._wait()
        if arrival.y is None:
            raise _Abandoned
        return arrival.y

    def _wait(self) -> None:
        with self.changed:
            self.changed.wait_for(lambda: self.turn == self.here.place)

    def _pass_on(self) -> None:
        """To the next thread that can go on; where all have come to a norm, it normalizes."""
        with self.changed:
            left = [place for place in range(self.count) if place not in self.finished]
            if all(place in self.waiting for place in left):
                try:
                    self._normalize()
                except Exception as error:  # noqa: BLE001  # as above
                    self.failure = self.failure or error
                self.waiting.clear()
            # one that failed wakes the others, which give up
            free = left if self.failure else [p for p in left if p not in self.waiting]
            later = [place for place in free if place > self.here.place]
            self.turn = (later or free or [-1])[0]
            self.changed.notify_all()

    def _normalize(self) -> None:
        arrivals = [self.waiting[place] for place in sorted(self.waiting)]
        if not arrivals or self.failure:
            return
        layer, activation = arrivals[0].layer, arrivals[0].activation
        if self.finished or any(other.layer is not layer for other in arrivals):
            found = ", ".join(sorted({repr(self.names[each.layer]) for each in arrivals}))
            raise BatchNormError(
                f"accumulate: {len(arrivals)} of {self.count} micro-batches came to {found} together, "
                "and all must call the same norms in the same order. Look for a branch that depends "
                "on the data."
            )
        affine = (layer.weight, layer.bias)
        *ys, count, mean, squares, invstd = Joint.apply(
            *affine, layer.eps, activation, *(each.x for each in arrivals)
        )
        _check_count(self.names[layer], count)
        _update(layer, count, mean, squares)
        for each, y in zip(arrivals, ys, strict=True):
            x = each.x.detach()
            self.recipes.add(y, partial(normalized, x, mean, invstd, *affine, activation))
            each.y = y


def _check_count(name: str, count: Tensor) -> None:
    if int(count[0]) < 2:
        raise BatchNormError(
            f"accumulate: Expected more than 1 value per channel when training, and all micro-batches "
            f"together give {name!r} {int(count[0])}."
        )


def _update(layer: Any, count: Tensor, mean: Tensor, squares: Tensor) -> None:
    if not layer.track_running_stats or layer.running_mean is None:
        return
    momentum = 0.0 if layer.momentum is None else layer.momentum
    if layer.num_batches_tracked is not None:
        layer.num_batches_tracked.add_(1)
        if layer.momentum is None:
            momentum = 1 / int(layer.num_batches_tracked)
    masks.update_running(layer.running_mean, layer.running_var, count, mean, squares, momentum)


def in_lockstep(
    works: Iterable[Callable[[], None]],
    names: dict[nn.Module, str],
    intercept: Callable[[Lockstep], Any],
) -> None:
    """Run each in a thread of its own, one at a time, as `Lockstep` says; raise what one raises."""
    works = list(works)
    lockstep = Lockstep(len(works), names)
    modes = _modes()

    def live(work: Callable[[], None]) -> None:
        hooks = torch.autograd.graph.saved_tensors_hooks
        with modes(), hooks(lockstep.recipes.pack, lockstep.recipes.unpack):
            work()

    threads = [
        threading.Thread(target=lockstep.run, args=(place, partial(live, work)), daemon=True)
        for place, work in enumerate(works)
    ]
    with intercept(lockstep):
        for thread in threads:
            thread.start()
        try:
            for thread in threads:
                thread.join()
        except BaseException as error:  # Ctrl-C: each thread gives up at its next norm
            lockstep.failure = lockstep.failure or error
            for thread in threads:
                thread.join()
            raise
    if lockstep.failure is not None:
        raise lockstep.failure


def _modes() -> Callable[[], Any]:
    """What a thread does not inherit: gradients, autocast and the device of its creator."""
    gradients = torch.is_grad_enabled()
    kinds = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
    casts = [
        (kind, torch.get_autocast_dtype(kind)) for kind in kinds if torch.is_autocast_enabled(kind)
    ]
    device = torch.cuda.current_device() if torch.cuda.is_initialized() else None

    @contextmanager
    def modes() -> Iterator[None]:
        if device is not None:
            torch.cuda.set_device(device)
        with torch.set_grad_enabled(gradients), ExitStack() as stack:
            for kind, dtype in casts:
                stack.enter_context(torch.autocast(kind, dtype))
            yield

    return modes
