"""What the rules look at: a model, what stands around it, and what a few batches or a training showed."""

from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any, TypeAlias

from torch import Tensor, nn

from batchnorm.checks.dependence import Origin
from batchnorm.model.discovery import batch_norms, uncompiled
from batchnorm.model.freezing import Frozen
from batchnorm.model.recalibration import Moments, size_of
from batchnorm.model.tracing import Traced, trace

# Any: torch types no attribute of a module, and a layer here is one with running statistics
Layer: TypeAlias = Any


@dataclass
class Seen:
    """One call of a layer: what went in."""

    shape: tuple[int, ...]
    mean: Tensor | None = None  # (C,), of the batch, float64
    var_biased: Tensor | None = None
    padding: float | None = None  # share of trailing steps that are constant, in (N, C, L)
    checkpointed: bool = False  # inside torch.utils.checkpoint

    @property
    def values(self) -> int:
        """Per channel."""
        count = self.shape[0]
        for size in self.shape[2:]:
            count *= size
        return count


@dataclass
class Probe:
    """What a few batches showed, in evaluation mode with the running statistics."""

    batches: int = 0
    samples: int = 0
    batch_size: int = 0  # the largest
    calls: dict[Layer, list[list[Seen]]] = field(default_factory=dict)  # a list a batch
    fresh: dict[Layer, Moments] = field(default_factory=dict)  # the statistics of these batches
    gap: float | None = None  # √mean(running's outputs − fresh's)² ÷ their standard deviation
    noise: float | None = None  # the same between two halves of the batches
    shares: dict[Layer, float] = field(default_factory=dict)  # of the gap, removed by this layer's
    accuracy: tuple[float, float] | None = None  # with running and with fresh statistics
    chance: float = 0.0  # an accuracy that is above what the commonest class gives by chance
    alone: float | None = None  # how far a sample's output moves with the others of its batch
    origin: Origin | None = None  # where that begins, if it does


@dataclass
class Loading:
    """What a loader tells without being read."""

    batch_size: int | None = None
    least: int | None = None  # samples in the smallest batch; None: not known


@dataclass
class Training:
    """What was seen of a training while it ran."""

    steps: int = 0  # of the optimizers that hold one of the model's parameters
    forwards: Counter[tuple[bool, bool]] = field(default_factory=Counter)  # (training, gradients)
    blind_steps: int = 0  # before which there was a pass in training mode without gradients
    # between two steps: evaluations, and several passes without gradients in training mode alone
    evaluations: int = 0
    blind_evaluations: int = 0
    # (its statistics were updated, gradients)
    calls: dict[Layer, Counter[tuple[bool, bool]]] = field(default_factory=dict)
    recomputed: Counter[Layer] = field(default_factory=Counter)
    # values per channel in training -> calls
    values: dict[Layer, Counter[int]] = field(default_factory=dict)
    thawed: set[Layer] = field(default_factory=set)  # in evaluation mode at one step, later not
    noticed: int = 0  # steps of any optimizer
    # weights that took no gradient in the last ten of those steps, or in all, and did not move
    fixed: set[Layer] = field(default_factory=set)
    resting: set[Layer] = field(default_factory=set)  # weights that did not move, gradients or not
    # how far passes without gradients are from those with, by the standardized gap
    foreign: dict[Layer, float] = field(default_factory=dict)
    # with statistics of data whatever the counter says: loaded without it, or taken anew
    filled: set[Layer] = field(default_factory=set)
    drift: dict[Layer, float] = field(default_factory=dict)  # see `watching`, of the last looks
    # evaluated with statistics copied from another model: how far the last evaluation's inputs are
    copied: dict[Layer, float] = field(default_factory=dict)
    # synchronised norm -> its calls in a step, beside those of the most called one -> steps
    synced: dict[Layer, Counter[tuple[int, int]]] = field(default_factory=dict)

    def evaluated(self, layer: Layer) -> bool:
        """It was used with its running statistics, or, where a compiler hides calls, the model was."""
        calls = self.calls.get(layer, Counter()) if self.calls else self.forwards
        return calls[False, False] + calls[False, True] > 0

    def usual(self, layer: Layer) -> int | None:
        """Values per channel in most training batches; a last, smaller one is not among them."""
        sizes = self.values.get(layer)
        return sizes.most_common(1)[0][0] if sizes else None


@dataclass
class Subject:
    """Everything that a rule may ask."""

    model: nn.Module
    optimizers: list[Any] = field(default_factory=list)
    loading: Loading | None = None
    probe: Probe | None = None
    training: Training | None = None
    graph: bool = True  # it may be traced, which runs the model's own forward

    def __post_init__(self) -> None:
        self.model = uncompiled(self.model)
        self.layers: dict[str, Layer] = dict(batch_norms(self.model))
        self.names = {layer: name for name, layer in self.layers.items()}
        self._traced: Traced | None = None

    @property
    def traced(self) -> Traced:
        """The graph, traced when the first rule asks."""
        if self._traced is None:
            self._traced = trace(self.model)
        return self._traced

    def tracking(self) -> Iterator[tuple[str, Layer]]:
        """The layers that keep running statistics."""
        for name, layer in self.layers.items():
            if layer.running_mean is not None and layer.running_var is not None:
                yield name, layer

    def frozen(self, layer: Layer) -> bool:
        """It uses its running statistics and leaves them alone, on purpose."""
        return isinstance(layer, Frozen) or (self.model.training and not layer.training)

    def calls(self, layer: Layer) -> list[Seen]:
        """Of all batches."""
        if self.probe is None:
            return []
        return [seen for batch in self.probe.calls.get(layer, []) for seen in batch]


def loading_of(loader: Any) -> Loading | None:
    """Of a DataLoader, with a batch sampler of torch's or without, or of a list of batches."""
    if isinstance(loader, list | tuple) and loader:
        sizes = [size_of(batch) for batch in loader]
        return Loading(max(sizes), min(sizes))
    batches = getattr(loader, "batch_sampler", None) or loader
    batch_size, sampler = getattr(batches, "batch_size", None), getattr(batches, "sampler", None)
    if not isinstance(batch_size, int) or sampler is None:
        batch_size = getattr(loader, "batch_size", None)
        return Loading(batch_size) if isinstance(batch_size, int) else None
    try:
        total = len(sampler)
    except (TypeError, NotImplementedError):  # an iterable data set has no length
        return Loading(batch_size)
    rest = total % batch_size
    if getattr(batches, "drop_last", False) or not rest:
        return Loading(batch_size, batch_size)
    return Loading(batch_size, rest)


def parameters_of(optimizers: Iterable[Any]) -> Iterator[tuple[Tensor, dict[str, Any]]]:
    """Each parameter with its group."""
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                yield parameter, group
