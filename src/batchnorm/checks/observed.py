"""What is seen of one model while a training runs."""

from collections import Counter, deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from batchnorm import kernels
from batchnorm.checks.probing import apart, standardized_gap
from batchnorm.checks.rules.state import initial
from batchnorm.checks.subject import Training
from batchnorm.kernels.native import transformed
from batchnorm.model.discovery import SYNCHRONISED, Norm, batch_norms
from batchnorm.model.recalibration import Moments
from batchnorm.variants.variant import SET_ASIDE

KEPT = 4  # looks that count, the last ones
UPDATED = (True, True)  # a call that updated the statistics, with gradients
FIXED = 10  # steps without a gradient: a GAN's half waits for fewer


@dataclass
class _Batch:
    """The statistics of a batch, or of several."""

    moments: Moments
    samples: int

    @property
    def chance(self) -> float:
        """Of a mean 1 / n of a variance, of a log deviation 1 / 2n; a sample's pixels are one value."""
        return 1.5 / self.samples


def _batch(x: Tensor) -> _Batch:
    moments = Moments()
    moments.merge(*kernels.moments(x), x.numel() // x.shape[1])
    return _Batch(moments, x.shape[0])


def _merged(batches: Iterable[_Batch]) -> _Batch:
    whole = _Batch(Moments(), 0)
    for each in batches:
        one = each.moments
        whole.moments.merge(one.mean, one.squares / one.count, one.count)
        whole.samples += each.samples
    return whole


class Observed:
    """One model: what was seen of it."""

    def __init__(self, module: nn.Module, name: str, every: int) -> None:
        self.module = module
        self.name = name  # the variable that held it where it was called, if one did
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
        self.layers: list[Any] = []
        # at which step it was last evaluated, in how many passes; with another model's statistics
        self._evaluated_at, self._passes, self._copied = -1, 0, False
        self._fed: dict[Any, _Batch] = {}  # then, to each layer
        # whose weight takes no gradient -> since which step, and as it was
        self._fixed: dict[Any, tuple[int, Tensor]] = {}
        self._weights: dict[Any, tuple[int, Tensor]] = {}  # of every layer, as first seen
        self._synced: Counter[Any] = Counter()  # since the last step
        self.grow()

    def grow(self) -> None:
        """Take up the norms that were not there before."""
        for layer in batch_norms(self.module).values():
            if layer in self.layers:
                continue
            self.layers.append(layer)
            if _loaded_without_counter(layer):
                self.seen.filled.add(layer)
            if isinstance(layer, SYNCHRONISED):
                self._synced[layer] = 0

    def parameters(self) -> set[int]:
        return {id(p) for p in self.module.parameters()}

    def take(self, other: "Observed") -> None:
        """A part that ran by itself before the whole did."""
        self.seen.calls.update(other.seen.calls)
        self.seen.filled |= other.seen.filled

    def begin(self, module: nn.Module, step: int, others: "Iterable[Observed]") -> None:
        gradients = torch.is_grad_enabled()
        self.last = step
        self._averaging = module.training and not gradients and self._takes_averages()
        if self._averaging:
            return
        self.seen.forwards[module.training, gradients] += 1
        if not module.training:
            self._since["evaluated"] += 1
            self._evaluate(step, others)
        elif not gradients:
            self._since["blind"] += 1

    def _evaluate(self, step: int, others: "Iterable[Observed]") -> None:
        if step != self._evaluated_at:
            self._evaluated_at, self._passes, self._fed = step, 0, {}
            self._copied = not self.seen.steps and any(map(self._has_the_statistics_of, others))
        self._passes += 1

    def _has_the_statistics_of(self, other: "Observed") -> bool:
        """Copied since that one was trained, to other weights, as an average's often are."""
        trained = [
            layer for layer in other.layers if other.seen.calls.get(layer, Counter())[UPDATED]
        ]
        if other is self or len(self.layers) != len(other.layers) or not trained:
            return False
        pairs = list(zip(self.layers, other.layers, strict=True))
        return all(_same(one.running_mean, two.running_mean) for one, two in pairs) and not all(
            _same(one.weight, two.weight) for one, two in pairs
        )

    def _takes_averages(self) -> bool:
        """As torch.optim.swa_utils.update_bn does: no gradients, and every momentum is None."""
        training = [layer for layer in self.layers if layer.training]
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
        if not isinstance(x, Tensor) or x.dim() < 2 or x.shape[1] != layer.num_features:
            return  # called with axis=, which is not seen here
        if not layer.training:
            self._see_evaluated(layer, x)
            return
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

    def _see_evaluated(self, layer: Any, x: Tensor) -> None:
        """Of a whole evaluation, whose batches may be a class each: now and then one."""
        due = self._copied and (self._passes <= KEPT or self._passes % 8 == 0)
        if due and x.is_floating_point() and x.numel() > x.shape[1] and not transformed():
            fed = [self._fed[layer]] if layer in self._fed else []
            self._fed[layer] = _merged([*fed, _batch(x.detach())])

    def _look_blindly(self, layer: Any, x: Tensor) -> None:
        """As often as at the passes with gradients, though these may come at other steps."""
        last = self._blind_looked.get(layer)
        due = last is None or self._looking or self.seen.steps - last >= self._every
        if due and x.is_floating_point() and x.numel() > x.shape[1] and not transformed():
            self._blind_looked[layer] = self.seen.steps
            self._batch(layer, x.detach(), gradients=False)

    def _batch(self, layer: Any, x: Tensor, *, gradients: bool) -> "_Batch":
        batch = _batch(x)
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
        for layer in self.layers:
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
        for layer in self.layers:
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
        seen.copied = {
            layer: max(standardized_gap(layer, fed.moments) ** 2 - fed.chance, 0.0) ** 0.5
            for layer, fed in self._fed.items()
        }
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


def _same(one: Any, two: Any) -> bool:
    if not isinstance(one, Tensor) or not isinstance(two, Tensor) or is_lazy(one) or is_lazy(two):
        return one is two
    return one.shape == two.shape and one.device == two.device and torch.equal(one, two)


def _requires_grad(layer: Any) -> bool:
    """A layer that is unfrozen on purpose takes gradients again."""
    return any(p is not None and p.requires_grad for p in (layer.weight, layer.bias))
