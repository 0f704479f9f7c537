"""Pass a few batches through a model that is given back bit for bit."""

import itertools
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree
from torch.utils.checkpoint import noop_context_fn

from batchnorm import kernels, masks
from batchnorm.checks.dependence import CLOSE, origin
from batchnorm.checks.subject import Layer, Probe, Seen, Subject
from batchnorm.model.calling import generators_kept, unchanged
from batchnorm.model.recalibration import Collector, Forward, Moments, Pass, run, size_of

LAYERS = 16  # whose share of the gap is measured, those with the largest standardized gap
SAMPLES = 256  # that are read by default
BATCHES = 8


def probe(subject: Subject, loader: Iterable[Any], forward: Forward | None, samples: int) -> Probe:
    """Read a few batches of the loader and look at every layer's input and at the outputs."""
    model, forward = subject.model, _on_a_copy(forward or run)
    found = Probe()
    with unchanged(model), generators_kept(loader), torch.no_grad():
        batches = list(_some(loader, samples))
        if not batches:
            return found
        found.batches = len(batches)
        found.samples = sum(size for _, size in batches)
        found.batch_size = max(size for _, size in batches)
        with Collector(model, [layer for _, layer in subject.tracking()]) as collector:
            _look(subject, batches, forward, found)
            _alone(model, batches[0][0], forward, found)
            _compare(subject, collector, batches, forward, found)
    return found


def _on_a_copy(forward: Forward) -> Forward:
    """A model may write into its inputs, and each batch is passed several times."""

    def copied(leaf: Any) -> Any:
        return leaf.clone() if isinstance(leaf, Tensor) else leaf

    return lambda model, batch: forward(model, pytree.tree_map(copied, batch))


def _some(loader: Iterable[Any], samples: int) -> Iterator[tuple[Any, int]]:
    seen = 0
    for batch in itertools.islice(loader, BATCHES):
        size = size_of(batch)
        yield batch, size
        seen += size
        if seen >= samples:
            return


def _look(subject: Subject, batches: list[tuple[Any, int]], forward: Forward, found: Probe) -> None:
    """Every call of every norm, with the running statistics before it."""

    def see(layer: Layer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        found.calls[layer][-1].append(look(masks.values(args, kwargs)))

    layers = subject.layers.values()
    with ExitStack() as hooks:
        for layer in layers:
            found.calls[layer] = []
            hooks.enter_context(layer.register_forward_pre_hook(see, with_kwargs=True))
        for batch, _ in batches:
            for layer in layers:
                found.calls[layer].append([])
            forward(subject.model, batch)


def look(x: Tensor) -> Seen:
    """What a norm's input shows."""
    seen = Seen(tuple(x.shape), checkpointed=_in_checkpoint())
    if x.dim() > 1 and x.numel() and x.is_floating_point():
        mean, var_biased = kernels.moments(x.detach())
        seen.mean, seen.var_biased = mean.double(), var_biased.double()
        if x.dim() == 3 and x.shape[2] > 4:
            seen.padding = _padding(x.detach())
    return seen


def _in_checkpoint() -> bool:
    """Inside a checkpoint that was given nothing to do at the recomputation."""
    frame = sys._getframe(1)  # noqa: SLF001  # who called
    inside = False
    while (caller := frame.f_back) is not None:
        frame = caller
        if frame.f_globals.get("__name__") == "torch.utils.checkpoint":
            inside = True
            if frame.f_code.co_name == "checkpoint":
                return frame.f_locals.get("context_fn", noop_context_fn) is noop_context_fn
    return inside


def _padding(x: Tensor) -> float:
    """The share of trailing steps that repeat the last one, where samples differ in it.

    x: (N, C, L). Sequences of one length end anyhow; of several, the shorter ones end in what the
    network makes of zeros.
    """
    same = (x == x[:, :, -1:]).all(1)  # (N, L)
    tails = same.flip(1).cumprod(1).sum(1) - 1  # the last step repeats itself
    if int(tails.max()) == int(tails.min()):
        return 0.0
    return float(tails.sum()) / x.shape[0] / x.shape[2]


def _alone(model: nn.Module, batch: Any, forward: Forward, found: Probe) -> None:
    """How far the first half's outputs move when the second half is not there, in evaluation."""
    half = _half(batch)
    if half is None:
        return
    whole, again, part = (_flat(forward(model, each)) for each in (batch, batch, half))
    if whole is None or again is None or part is None or len(part) == 0:
        return
    scale = float(whole.std()) if whole.numel() > 1 else 0.0
    if whole.shape[1:] != part.shape[1:] or not scale > 0:
        return
    if float((whole - again).abs().max()) > 1e-4 * scale:
        return  # it draws
    found.alone = float((whole[: len(part)] - part).abs().max()) / scale
    if found.alone > CLOSE:
        found.origin = origin(model, partial(forward, model), batch, half)


def _half(batch: Any) -> Any:
    """The first half of the samples, where every tensor has as many of them."""
    leaves = [leaf for leaf in pytree.tree_leaves(batch) if isinstance(leaf, Tensor) and leaf.dim()]
    sizes = {len(leaf) for leaf in leaves}
    if len(sizes) != 1 or (size := sizes.pop()) < 4:
        return None
    return pytree.tree_map(
        lambda v: v[: size // 2] if isinstance(v, Tensor) and v.dim() else v, batch
    )


def _flat(outputs: Any) -> Tensor | None:
    """The floating outputs side by side: (N, values), float64."""
    leaves = [
        leaf.double().flatten(1) if leaf.dim() > 1 else leaf.double().reshape(-1, 1)
        for leaf in pytree.tree_leaves(outputs)
        if isinstance(leaf, Tensor) and leaf.is_floating_point() and leaf.dim()
    ]
    if not leaves or len({len(leaf) for leaf in leaves}) != 1:
        return None
    return torch.cat(leaves, 1)


def _compare(
    subject: Subject,
    collector: Collector,
    batches: list[tuple[Any, int]],
    forward: Forward,
    found: Probe,
) -> None:
    """The outputs with the running statistics against those with the statistics of the batches."""
    layers = [layer for _, layer in subject.tracking() if not subject.frozen(layer)]
    whole = collector.read(batches, forward, layers)
    collector.restore()
    found.fresh = {layer: m for layer, m in whole.moments.items() if m.count > 1}
    if not found.fresh:
        return
    outputs = partial(_outputs, subject.model, batches, forward)
    running = outputs()
    fresh = _with(collector, found.fresh, outputs)
    if running is None or fresh is None or running.shape != fresh.shape or not fresh.numel():
        return
    deviation = float((fresh - fresh.mean(0)).square().mean().sqrt())
    if not deviation > 0:
        return

    def apart(a: Tensor, b: Tensor) -> float:
        return float((a - b).square().mean().sqrt()) / deviation

    found.gap = apart(running, fresh)
    found.noise = _noise(collector, batches, forward, layers, outputs, apart)
    classes = _classes(batches, running)
    if classes is not None:
        found.accuracy = _accuracy(running, classes), _accuracy(fresh, classes)
        share = float(classes.bincount().max()) / len(classes)
        found.chance = share + 2 * (share * (1 - share) / len(classes)) ** 0.5
    if found.gap > 0:
        for layer in _most_apart(found.fresh):
            replaced = _with(collector, {layer: found.fresh[layer]}, outputs)
            if replaced is not None:
                found.shares[layer] = 1 - apart(replaced, fresh) / found.gap


def _outputs(model: nn.Module, batches: list[tuple[Any, int]], forward: Forward) -> Tensor | None:
    flat = [_flat(forward(model, batch)) for batch, _ in batches]
    rows = [each for each in flat if each is not None]
    if len(rows) != len(flat) or len({row.shape[1] for row in rows}) != 1:
        return None
    return torch.cat(rows)


def _with(
    collector: Collector, moments: dict[Layer, Moments], outputs: Callable[[], Tensor | None]
) -> Tensor | None:
    """The outputs with these statistics in these layers."""
    for layer, each in moments.items():
        collector.use(layer, each)
    try:
        return outputs()
    finally:
        collector.restore()


def _noise(
    collector: Collector,
    batches: list[tuple[Any, int]],
    forward: Forward,
    layers: list[Layer],
    outputs: Callable[[], Tensor | None],
    apart: Callable[[Tensor, Tensor], float],
) -> float | None:
    """What the same comparison shows between two halves of the batches: it is chance."""
    halves: list[Pass] = []
    for half in (batches[::2], batches[1::2]):
        if not half:
            return None
        halves.append(collector.read(half, forward, layers))
        collector.restore()
    first, second = (
        _with(collector, {layer: m for layer, m in each.moments.items() if m.count > 1}, outputs)
        for each in halves
    )
    return None if first is None or second is None else apart(first, second)


def standardized_gap(layer: Layer, fresh: Moments) -> float:
    """√mean over channels of ((mean − running mean)² ÷ running var + (ln √(var ÷ running var))²)."""
    return _apart(
        layer.eps, layer.running_mean.double(), layer.running_var.double(),
        fresh.mean, fresh.var_unbiased,
    )  # fmt: skip


def apart(eps: float, ours: Moments, theirs: Moments) -> float:
    """The standardized gap between the statistics of two kinds of batches, by the first's spread."""
    return _apart(eps, ours.mean, ours.var_unbiased, theirs.mean, theirs.var_unbiased)


def _apart(eps: float, mean: Tensor, var_unbiased: Tensor, other: Tensor, its_var: Tensor) -> float:
    spread = var_unbiased.clamp(min=0) + eps
    ratio = ((its_var + eps) / spread).log() / 2  # of the standard deviations
    return float(((other - mean).square() / spread + ratio.square()).mean().sqrt())


def _most_apart(fresh: dict[Layer, Moments]) -> list[Layer]:
    return sorted(fresh, key=lambda layer: -standardized_gap(layer, fresh[layer]))[:LAYERS]


def _classes(batches: list[tuple[Any, int]], scores: Tensor) -> Tensor | None:
    """Where the batches are (images, classes) and the outputs a score a class."""
    labels = [
        batch[1] for batch, _ in batches if isinstance(batch, list | tuple) and len(batch) == 2
    ]
    if len(labels) != len(batches) or not all(
        isinstance(each, Tensor) and each.dim() == 1 and not each.is_floating_point()
        for each in labels
    ):
        return None
    classes = torch.cat(labels).to(scores.device)
    if (
        len(classes) != len(scores)
        or not 0 <= int(classes.min()) <= int(classes.max()) < scores.shape[1]
    ):
        return None
    return classes


def _accuracy(scores: Tensor, classes: Tensor) -> float:
    return float((scores.argmax(1) == classes).double().mean())
