"""Population statistics: what the running averages of training only approximate.

Running statistics are averages over the last few dozen batches, taken while the weights went on
changing. Whoever changes the weights or the data (prunes, quantizes, averages, moves to another
domain) leaves them wrong. Here they are computed anew, without labels and without gradients:

    mean = Σ x / M,    var_unbiased = Σ (x − mean)² / (M − 1)

over all M values per channel of the data, merged batch by batch (Chan, Golub & LeVeque 1979).

Source: Wu & Johnson 2021, https://arxiv.org/abs/2105.07576 (precise statistics); Li et al. 2016,
https://arxiv.org/abs/1603.04779 (AdaBN); Schneider et al. 2020, https://arxiv.org/abs/2006.16971
(the mixture with the source's statistics).
"""

import inspect
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field
from functools import partial
from itertools import islice
from typing import Any, Self, TypeAlias

import torch
from torch import Tensor, distributed, nn
from torch.nn.parameter import is_lazy

from batchnorm import kernels, masks
from batchnorm.errors import BatchNormError, brief
from batchnorm.model import account
from batchnorm.model.account import Change
from batchnorm.model.calling import eagerly
from batchnorm.model.discovery import batch_norms, constant_norms, refuse_no_model
from batchnorm.model.freezing import Frozen

# Any: torch types no attribute of a module, and a layer here is one with running statistics
Layer: TypeAlias = Any
Forward: TypeAlias = Callable[[nn.Module, Any], Any]


class Moments:
    """Mean and variance per channel of batches taken together.

    Merged pairwise in float64: sums of squares would lose the digits of a variance that is small
    beside the mean.
    """

    def __init__(self) -> None:
        self.count = 0
        self.mean = torch.zeros(())
        self.squares = torch.zeros(())  # Σ (x − mean)²

    def merge(self, mean: Tensor, var_biased: Tensor, count: int) -> None:
        """Take in a batch of `count` values per channel."""
        mean, squares = mean.double(), var_biased.double() * count
        total = self.count + count
        if not self.count:
            self.count, self.mean, self.squares = total, mean, squares
            return
        gap = mean - self.mean
        self.squares = self.squares + squares + gap.square() * (self.count * count / total)
        self.mean = self.mean + gap * (count / total)
        self.count = total

    @property
    def var_unbiased(self) -> Tensor:
        """Σ (x − mean)² / (M − 1); of a single value, 0."""
        return self.squares / max(self.count - 1, 1)


@dataclass
class Pass:
    """What one pass over the data found."""

    moments: dict[Layer, Moments] = field(default_factory=dict)  # in the order of the first calls
    calls: Counter[Layer] = field(default_factory=Counter)
    samples: int = 0
    sizes: Counter[int] = field(default_factory=Counter)  # of the batches


def recalibrate(
    model: nn.Module,
    loader: Iterable[Any],
    *,
    samples: int | None = None,
    forward: Forward | None = None,
    exact: bool = False,
    prior: float = 0.0,
    progress: Callable[[int], None] | None = None,
) -> nn.Module:
    """Give every batch-norm layer the statistics of the data, in place; return the model.

    In one pass each layer normalizes a batch with that batch's statistics, as in training, and the
    statistics of all batches are merged. From the second layer on they depend on how the data is
    split, by the noise of the batches before. With `exact=True` the data is read once a layer,
    each layer behind others that already have their final statistics, and the split does not
    matter; the loader must give the same samples each time.

    Only the layers whose statistics are wanted normalize by the batch. All else runs in evaluation
    mode: dropout is off, and frozen layers (in evaluation mode in a model that trains) keep their
    statistics. A layer that is called several times gets the statistics of all its calls. Modes
    and hooks come back, and, should anything raise, the old statistics. Where torch.distributed
    runs, every process gets the statistics of the data of all.

    Args:
        model: any model with batch norm in it; nothing is converted.
        loader: batches: tensors, tuples or lists whose first element is the input, or mappings of
            keyword arguments, of which those that the model's forward does not know are left out.
            They are moved to the model's device.
        samples: read at most so many (the last batch whole); by default all.
        forward: how to run the model on a batch, `forward(model, batch)`, where that is not enough.
        exact: read the data once for every layer.
        prior: the share, from 0 to 1, that the old statistics keep, for a new domain of which there
            is little data: mean ← prior · old + (1 − prior) · new, the variance likewise.
        progress: called with the number of samples read so far, after every batch.

    Returns:
        The model. `changes(model)` says which layers were done and which left, and why.

    Raises:
        BatchNormError: no batch; a prior outside [0, 1); values that are not finite; a layer
            without a size; with `exact`, a loader that can be read only once.
    """
    refuse_no_model(model, "recalibrate")
    _check(loader, samples, exact, prior)
    wanted, left = _wanted(model)
    batches = _Batches(loader, samples, progress)
    if not wanted:
        return account.record(model, "recalibrate", left)
    with Collector(model, wanted) as collector:
        read = _read_by_layer if exact else _read_once
        found = read(collector, batches, forward or run)
    if not found.samples:
        raise BatchNormError(
            "recalibrate got a loader without a batch. Pass some of the training data, without "
            "labels; a generator that was read before is empty."
        )
    _refuse_what_is_not_finite(wanted, found)
    for layer, moments in found.moments.items():
        _write(layer, moments, prior, found.calls[layer])
    return account.record(
        model, "recalibrate", [*_entries(wanted, found), *left],
        samples=found.samples, batch_sizes=sorted(found.sizes), exact=exact, prior=prior,
    )  # fmt: skip


class Collector:
    """Borrows a model: inside, it is in evaluation mode and may have other running statistics.

    On the way out every module has its mode and every layer its own buffers back.
    """

    def __init__(self, model: nn.Module, layers: Iterable[Layer]) -> None:
        self.model = model
        self.layers = list(layers)

    def __enter__(self) -> Self:
        self._eager = ExitStack()
        self._eager.enter_context(eagerly())
        self._modes = {module: module.training for module in self.model.modules()}
        self._buffers = {layer: (layer.running_mean, layer.running_var) for layer in self.layers}
        for module in self.model.modules():
            module.training = False  # not by eval(), which models overwrite to change their weights
        return self

    def __exit__(self, *exception: object) -> None:
        self._eager.close()
        for module, mode in self._modes.items():
            module.training = mode
        self.restore()

    def restore(self) -> None:
        """Give every layer its own statistics back; `read` leaves those of the last batch."""
        for layer, (mean, var) in self._buffers.items():
            layer.running_mean, layer.running_var = mean, var

    def use(self, layer: Layer, moments: Moments) -> None:
        """Let a layer normalize with these statistics from now on, until the way out."""
        mean, var = self._buffers[layer]
        layer.running_mean, layer.running_var = moments.mean.to(mean), moments.var_unbiased.to(var)

    def read(
        self,
        batches: Iterable[tuple[Any, int]],
        forward: Forward,
        layers: Iterable[Layer] | None = None,
        stop: "_Stop | None" = None,
    ) -> Pass:
        """Pass batches through the model; merge the moments of what goes into the layers.

        Before a layer normalizes, it is given the moments of its input as if they were the running
        ones: the layers behind it see what they see in training, and nothing else (dropout,
        counters, momentum) takes notice.
        """
        found = Pass()
        with ExitStack() as hooks, torch.no_grad():
            for layer in self.layers if layers is None else layers:
                take = partial(self._take, found, stop)
                hooks.enter_context(layer.register_forward_pre_hook(take, with_kwargs=True))
            for batch, size in batches:
                if stop is not None:
                    stop.calls = 0
                with suppress(_Enough):
                    forward(self.model, batch)
                found.samples += size
                found.sizes[size] += 1
        return found

    def _take(
        self,
        found: Pass,
        stop: "_Stop | None",
        layer: Layer,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> None:
        x = masks.values(args, kwargs)
        count = x.numel() // x.shape[1] if x.numel() else 0
        found.calls[layer] += 1
        merged = found.moments.setdefault(layer, Moments())
        if count:
            mean, var_biased = kernels.moments(x)
            merged.merge(mean, var_biased, count)
            if stop is None:
                old_mean, old_var = self._buffers[layer]
                layer.running_mean, layer.running_var = mean.to(old_mean), var_biased.to(old_var)
        if stop is not None:
            stop.calls += 1
            if stop.calls == stop.after:
                raise _Enough


@dataclass
class _Stop:
    """Leave the model after so many calls of the layer: what comes behind is not needed."""

    after: int
    calls: int = 0


class _Enough(BaseException):  # no error; not an Exception, which models may catch
    """The layer has seen its input."""


def run(model: nn.Module, batch: Any) -> Any:
    """Run a model on a batch as loaders give it; see `recalibrate`."""
    batch = _moved(batch, _device(model))
    match batch:
        case Tensor():
            return model(batch)
        case Mapping():
            return model(**_known(model, batch))
        case [first, *_]:
            return model(first)
    raise BatchNormError(
        f"got a batch of type {type(batch).__name__} and wants a tensor, a tuple or "
        "list that begins with the input, or a mapping of keyword arguments. For any other pass "
        "forward=, a function that runs the model on a batch."
    )


def _read_once(collector: Collector, batches: "_Batches", forward: Forward) -> Pass:
    return _together(collector, lambda: collector.read(batches, forward))


def _read_by_layer(collector: Collector, batches: "_Batches", forward: Forward) -> Pass:
    """A pass a layer, in the order of the calls; a pass a call for one called several times.

    Its second call sees what its first one gave, normalized with the statistics of the first, and
    so on: each pass is the same however the data is split.
    """
    order = _together(collector, lambda: collector.read(islice(batches, 1), forward))
    whole = Pass()
    for layer in order.moments:
        for calls in range(1, order.calls[layer] + 1):
            read = partial(collector.read, batches, forward, [layer], _Stop(calls))
            found = _together(collector, read)
            collector.use(layer, found.moments[layer])
        whole.moments[layer], whole.calls[layer] = found.moments[layer], found.calls[layer]
        whole.samples, whole.sizes = found.samples, found.sizes
    return whole


def _together(collector: Collector, read: Callable[[], Pass]) -> Pass:
    """What all processes found, the same for each; where one failed, all raise."""
    if not (distributed.is_available() and distributed.is_initialized()):
        return read()
    failure: BaseException | None = None
    try:
        found = read()
    except Exception as error:  # noqa: BLE001  # raised below, once the others know
        found, failure = Pass(), error
    mine = [
        (found.calls[layer], moments.count, moments.mean.cpu(), moments.squares.cpu())
        for layer in collector.layers
        for moments in [found.moments.get(layer, Moments())]
    ]
    content = (mine, found.samples, found.sizes, failure and brief(failure))
    everyone: list[Any] = [None] * distributed.get_world_size()
    distributed.all_gather_object(everyone, content)
    if failure is not None:
        raise failure
    if problems := [problem for *_, problem in everyone if problem]:
        raise BatchNormError(f"recalibrate stopped, for another process raised {problems[0]}")
    return _joined(collector.layers, everyone, list(found.moments))


def _joined(layers: list[Layer], everyone: list[Any], order: list[Layer]) -> Pass:
    """Merged in the order of the ranks, so that every process has the same bits."""
    whole = Pass()
    ordered = [*order, *(layer for layer in layers if layer not in order)]
    places = {layer: place for place, layer in enumerate(layers)}
    for layer in ordered:
        for theirs, *_ in everyone:
            calls, count, mean, squares = theirs[places[layer]]
            if calls:
                whole.calls[layer] += calls
                merged = whole.moments.setdefault(layer, Moments())
                if count:
                    merged.merge(mean, squares / count, count)
    for _, samples, sizes, _ in everyone:
        whole.samples += samples
        whole.sizes += sizes
    return whole


class _Batches:
    """The loader's batches with their sizes, up to a number of samples."""

    def __init__(
        self, loader: Iterable[Any], samples: int | None, progress: Callable[[int], None] | None
    ) -> None:
        self._loader, self._samples, self._progress = loader, samples, progress

    def __iter__(self) -> Iterator[tuple[Any, int]]:
        seen = 0
        for batch in self._loader:
            size = size_of(batch)
            yield batch, size
            seen += size
            if self._progress is not None:
                self._progress(seen)
            if self._samples is not None and seen >= self._samples:
                return


def _check(loader: Iterable[Any], samples: int | None, exact: bool, prior: float) -> None:
    if samples is not None and samples < 1:
        raise BatchNormError(f"recalibrate got samples={samples} and wants 1 or more, or None.")
    if not 0 <= prior < 1:
        raise BatchNormError(
            f"recalibrate got prior={prior} and wants a share from 0 to below 1; with 1 nothing "
            "would change."
        )
    if exact and isinstance(loader, Iterator):
        raise BatchNormError(
            f"recalibrate(exact=True) reads the data once a layer, and this {type(loader).__name__} "
            "can be read only once. Pass a list or a DataLoader."
        )


def _wanted(model: nn.Module) -> tuple[dict[Layer, str], list[Change]]:
    """The layers to recalibrate with their names, and why the others are left."""
    wanted: dict[Layer, str] = {}
    left = []
    for name, layer in batch_norms(model).items():
        if layer.running_mean is not None and is_lazy(layer.running_mean):
            raise BatchNormError(
                f"recalibrate: the layer {name} has not learned its size. Run one batch first."
            )
        if layer.running_mean is None or layer.running_var is None:
            left.append(Change(name, done=False, what="keeps no running statistics"))
        elif isinstance(layer, Frozen):
            left.append(Change(name, done=False, what="frozen by freeze"))
        elif model.training and not layer.training:
            left.append(
                Change(name, done=False, what="frozen: in evaluation mode while the model trains")
            )
        else:
            wanted[layer] = name
    for name, constant in constant_norms(model).items():
        left.append(
            Change(
                name, done=False, what=f"a {type(constant).__name__}: its statistics are constants"
            )
        )
    return wanted, left


def _refuse_what_is_not_finite(wanted: Mapping[Layer, str], found: Pass) -> None:
    for layer, moments in found.moments.items():
        if not (moments.mean.isfinite().all() and moments.squares.isfinite().all()):
            raise BatchNormError(
                f"recalibrate: the layer {wanted[layer]} got values that are not finite, so it has "
                "no statistics. Nothing was changed. Look for NaN and Inf in the data and in the "
                "weights before it."
            )


def _write(layer: Layer, moments: Moments, prior: float, calls: int) -> None:
    """Into the layer's own buffers, which others (an average of weights, DDP) may hold."""
    if not moments.count:
        return
    with torch.no_grad():
        for buffer, value in (
            (layer.running_mean, moments.mean),
            (layer.running_var, moments.var_unbiased),
        ):
            buffer.copy_(prior * buffer.double().to(value.device) + (1 - prior) * value)
        if getattr(layer, "num_batches_tracked", None) is not None:
            # the count of batches that the statistics hold, as an average over them has it
            layer.num_batches_tracked.fill_(calls)


def _entries(wanted: Mapping[Layer, str], found: Pass) -> Iterator[Change]:
    for layer, name in wanted.items():
        moments = found.moments.get(layer)
        if moments is None or not moments.count:
            yield Change(name, done=False, what="not called by these batches")
        else:
            yield Change(name, done=True, what=f"{moments.count} values per channel")


def _device(model: nn.Module) -> torch.device | None:
    tensors = [*islice(model.parameters(), 1), *islice(model.buffers(), 1)]
    return tensors[0].device if tensors else None


def _moved(batch: Any, device: torch.device | None) -> Any:
    """The batch with its tensors on the device; other things as they are."""
    if isinstance(batch, Tensor):
        return batch if device is None else batch.to(device)
    if isinstance(batch, Mapping):
        return {key: _moved(value, device) for key, value in batch.items()}
    if isinstance(batch, list | tuple):
        return [_moved(value, device) for value in batch]
    return batch


def _known(model: nn.Module, batch: Mapping[str, Any]) -> dict[str, Any]:
    """The keyword arguments that the model's forward takes."""
    parameters = inspect.signature(model.forward).parameters
    if any(p.kind is p.VAR_KEYWORD for p in parameters.values()):
        return dict(batch)
    return {key: value for key, value in batch.items() if key in parameters}


def size_of(batch: Any) -> int:
    """How many samples a batch holds: the length of its first tensor, or of a list in its place."""
    first = batch
    if isinstance(batch, Mapping):
        first = next(iter(batch.values()), None)
    elif isinstance(batch, Sequence) and len(batch):
        first = batch[0]
    if isinstance(first, Tensor):
        return len(first) if first.dim() else 1
    return len(first) if isinstance(first, Sequence) else 1
