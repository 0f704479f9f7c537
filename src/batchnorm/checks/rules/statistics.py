"""Rules about running statistics that do not fit the data."""

from collections import Counter
from collections.abc import Iterator

from torch.nn.parameter import is_lazy
from torch.optim.swa_utils import AveragedModel

from batchnorm.checks.findings import Level
from batchnorm.checks.probing import standardized_gap
from batchnorm.checks.rules import Evidence, rule
from batchnorm.checks.rules.state import initial, untrained
from batchnorm.checks.subject import Layer, Subject, Training
from batchnorm.model.discovery import Norm
from batchnorm.variants.estimators import EstimatorBatchNorm

GAP = 0.25  # of the outputs' standard deviation
DRIFT = 0.75  # √mean(shift² + (ln ratio)²) of a layer
NOISE = 1.5  # times what two halves of the data show, or 3 times what chance does to the whole


def stale(subject: Subject) -> float | None:
    """The smallest gap that is reported, where the gap is above it."""
    probe = subject.probe
    if probe is None or probe.gap is None:
        return None
    floor = max(GAP, NOISE * (probe.noise or 0.0))
    return floor if probe.gap > floor else None


@rule(
    "BN001",
    "The running statistics are not those of the data.",
    remedy="batchnorm.recalibrate(model, loader)  # training data, no labels",
    recalibrated=True,
)
def stale_statistics(subject: Subject) -> Iterator[Evidence]:
    """The outputs move when the running statistics are replaced by those of the loader's data.

    Measured on a few batches: √mean(difference²) of the outputs with the two kinds of statistics,
    divided by the outputs' standard deviation. Reported from 0.25 on, where it is also 3 times what
    chance does: between the two halves of these batches it does twice as much as between all of
    them and the truth. Layers are ordered by the share of that gap
    which replacing their statistics alone removes; what is told of each is its standardized gap,
    √mean((μ − μ_running)² ÷ σ²_running + ln(σ ÷ σ_running)²). Behind it stand weights that moved
    since, other data than in training, a momentum, or a bug. Where the loader gives labels and the
    running statistics classify at least as well, and better than chance (the commonest class's
    share and twice its standard error), as in a network that was trained with frozen ones, it is a
    note; so it is in a new model in training mode, which is about to be trained.

    In a training, where there are no two evaluations to compare, a layer is reported whose running
    statistics are more than 0.75 (the same standardized gap, without what chance does to a batch of
    that size) from the batches that were looked at last: the weights move faster than the average
    follows. The note's LeNet at its constant rate was seen at 0.2. Where several passes go to one
    step and the running statistics are never used, as in a GAN's discriminator, which is fed two
    kinds of images in turn (seen at 1.0), it is a note.
    """
    yield from _drifting(subject)
    probe, floor = subject.probe, stale(subject)
    if probe is None or floor is None:
        return
    right = probe.accuracy is not None and probe.accuracy[0] >= max(probe.accuracy[1], probe.chance)
    new = subject.model.training and any(untrained(layer) for _, layer in subject.tracking())
    level = Level.NOTE if right or new else None
    scores = ""
    if probe.accuracy is not None:
        running, fresh = probe.accuracy
        scores = (
            f"; accuracy {running:.3f} with the running statistics, {fresh:.3f} with the data's"
        )
    text = f"the outputs move by {probe.gap:.2f} standard deviations (reported from {floor:.2f}){scores}"
    numbers = {"gap": probe.gap, "noise": probe.noise, "accuracy": probe.accuracy}
    yield Evidence("", text, numbers, level)
    ranked = sorted(probe.shares.items(), key=lambda item: -item[1])
    for layer, share in ranked[:5]:
        apart = standardized_gap(layer, probe.fresh[layer])
        if share >= 0.05:
            text = f"replacing its statistics alone removes {share:.0%} of that; its own gap is {apart:.2f}"
            yield Evidence(subject.names[layer], text, {"share": share, "gap": apart}, level)


def _drifting(subject: Subject) -> Iterator[Evidence]:
    seen = subject.training
    if seen is None:
        return
    for name, layer in subject.tracking():
        apart = seen.drift.get(layer, 0.0)
        if apart > DRIFT and not subject.frozen(layer):
            text = f"{apart:.2f} from the batches of the last looks (reported from {DRIFT})"
            level = Level.NOTE if _fed_in_turn(seen, layer) else None
            yield Evidence(name, text, {"gap": apart}, level)


def _fed_in_turn(seen: Training, layer: Layer) -> bool:
    """Several passes a step, and no use of the running statistics: as a GAN's discriminator."""
    passes = seen.calls.get(layer, Counter())[True, True]
    return not seen.evaluated(layer) and passes > 1.5 * seen.steps


def initial_share(layer: Layer) -> float | None:
    """(1 − momentum)^t: how much of the initial mean 0 and variance 1 is still in the average."""
    if isinstance(layer, EstimatorBatchNorm) and layer.average != "exponential":
        return None  # the others have nothing of it from the first batch on
    counter, momentum = layer.num_batches_tracked, layer.momentum
    if counter is None or is_lazy(counter) or momentum is None or not 0 <= momentum < 1:
        return None
    return float((1 - momentum) ** int(counter))


@rule(
    "BN012",
    "Too few batches: the initial mean 0 and variance 1 are still in the running statistics.",
    remedy="batchnorm.recalibrate(model, loader)  # or train on before evaluating",
    recalibrated=True,
)
def too_few_updates(subject: Subject) -> Iterator[Evidence]:
    """(1 − momentum)^t, the share of the initial values after t batches, is above 0.05.

    With momentum 0.1 that is below 29 batches, with 0.01 below 299. Whoever recalibrates leaves the
    count of the batches that were read, few and enough: so without a loader it is a note, and with
    one it is reported where the data's statistics are really different (see BN001). In a training
    it is a note where the layer was not used in evaluation mode, and nothing is said of statistics that were loaded without their counter, or taken anew. A momentum
    of 0 keeps the initial values for ever.
    """
    probe, seen = subject.probe, subject.training
    filled = seen.filled if seen is not None else set()
    if probe is not None and stale(subject) is None:
        return
    for name, layer in subject.tracking():
        share = initial_share(layer)
        if share is None or share <= 0.05 or untrained(layer) or subject.frozen(layer):
            continue
        if layer in filled or (layer.momentum == 0 and not initial(layer)):
            continue
        count = int(layer.num_batches_tracked)
        text = f"{count} batches at momentum {layer.momentum:g}: {share:.0%} is still the initial value"
        sure = probe is not None or (seen is not None and seen.evaluated(layer))
        yield Evidence(name, text, {"batches": count, "share": share}, None if sure else Level.NOTE)


@rule(
    "BN028",
    "Averaged weights with the statistics of other weights.",
    remedy="""
    batchnorm.recalibrate(averaged, loader)  # after the last update_parameters; or, for an EMA,
    averaged = AveragedModel(model, use_buffers=True)  # averages the statistics, too
    """,
    recalibrated=True,
)
def averaged_without_statistics(subject: Subject) -> Iterator[Evidence]:
    """An `AveragedModel` averages parameters and, by default, copies the buffers of the last model.

    The statistics then belong to the last weights and not to the average. In a training, where a
    model that no optimizer trains is evaluated with the statistics of one that is, and other weights:
    a layer is reported whose statistics are more than 0.75 (the standardized gap of BN001, without
    what chance does) from what the last evaluation fed it. Else found where `use_buffers` is False
    and weights were averaged. Whether somebody recalibrated since cannot be seen: without a
    loader it is a note, and with one it is reported where the data's statistics are really different
    (see BN001).
    """
    yield from _copied(subject)
    if subject.probe is not None and stale(subject) is None:
        return
    level = Level.NOTE if subject.probe is None else None
    for path, module in subject.model.named_modules():
        if isinstance(module, AveragedModel) and not module.use_buffers and module.n_averaged > 1:
            inside = any(isinstance(m, Norm) for m in module.modules())
            if inside and any(True for _ in subject.tracking()):
                count = int(module.n_averaged)
                yield Evidence(
                    path, f"{count} averages, use_buffers=False", {"averages": count}, level
                )


def _copied(subject: Subject) -> Iterator[Evidence]:
    seen = subject.training
    for layer, apart in (seen.copied if seen is not None else {}).items():
        if apart > DRIFT and layer in subject.names:
            text = (
                f"evaluated with another model's statistics, {apart:.2f} from what it was fed "
                f"(reported from {DRIFT})"
            )
            yield Evidence(subject.names[layer], text, {"gap": apart})
