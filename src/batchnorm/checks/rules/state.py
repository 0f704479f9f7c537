"""Rules that read a model as it stands: buffers, parameters, switches."""

import re
from collections import Counter
from collections.abc import Iterator

import torch
from torch import Tensor
from torch.nn.parameter import is_lazy

from batchnorm.checks.findings import Level
from batchnorm.checks.rules import Evidence, Left, rule
from batchnorm.checks.subject import Layer, Subject, Training
from batchnorm.model.discovery import SYNCHRONISED
from batchnorm.model.freezing import Frozen, freeze_layer

HALF = {torch.float16, torch.bfloat16}


def _known(subject: Subject) -> Iterator[tuple[str, Layer]]:
    """The layers that keep statistics and know their size."""
    return ((n, m) for n, m in subject.tracking() if not is_lazy(m.running_mean))


def _broken(layer: Layer) -> tuple[Tensor, Tensor]:
    """The channels whose mean or variance is not finite, and those whose variance is negative."""
    infinite = ~(layer.running_mean.isfinite() & layer.running_var.isfinite())
    return infinite, ~infinite & (layer.running_var < 0)


def _reset_broken(subject: Subject, name: str) -> str:
    layer = subject.layers[name]
    infinite, negative = _broken(layer)
    broken = infinite | negative
    layer.running_mean.masked_fill_(broken, 0)
    layer.running_var.masked_fill_(broken, 1)
    return f"{name}: mean 0 and variance 1 in {int(broken.sum())} channels, the others as they were"


@rule(
    "BN008",
    "Running statistics that no data can have.",
    Level.ERROR,
    remedy="""
    layer.reset_running_stats()
    batchnorm.recalibrate(model, loader)
    """,
    mend=_reset_broken,
    saved=True,
    recalibrated=True,
)
def broken_statistics(subject: Subject) -> Iterator[Evidence]:
    """A running mean or variance that is NaN or infinite, or a variance below 0.

    One batch with a NaN in it is enough: the running average keeps it for ever, and `eval()` gives
    NaN from then on while `train()` goes on well. A negative variance comes from a variance computed
    as E[x²] − E[x]², or from weights that were averaged, rounded or edited. There is no threshold.
    """
    for name, layer in _known(subject):
        kinds = ("a mean or variance that is not finite", "a negative running variance")
        for broken, kind in zip(_broken(layer), kinds, strict=True):
            if count := int(broken.sum()):
                text = f"{count} of {len(broken)} channels have {kind}"
                yield Evidence(name, text, {"channels": count, "of": len(broken)})


def initial(layer: Layer) -> bool:
    """Its mean is 0 and its variance 1 in every channel."""
    return not layer.running_mean.any() and bool((layer.running_var == 1).all())


def untrained(layer: Layer) -> bool:
    """Its statistics are those that it was made with."""
    counter = layer.num_batches_tracked
    return (counter is None or int(counter) == 0) and initial(layer)


@rule(
    "BN009",
    "Evaluated with the statistics that the layer was made with.",
    remedy="""
    model.load_state_dict(torch.load("weights.pt", weights_only=True))  # with the buffers, or
    batchnorm.recalibrate(model, loader)
    """,
    recalibrated=True,
)
def never_trained(subject: Subject) -> Iterator[Evidence]:
    """The counter is 0, the running mean 0 and the running variance 1 in every channel.

    In evaluation mode such a layer does nothing but scale and shift. It happens where a checkpoint
    was loaded with `strict=False` and without its buffers, or where only parameters were copied. A
    model in training mode is about to be trained: there it is a note.
    """
    for name, layer in _known(subject):
        if untrained(layer):
            level = Level.NOTE if subject.model.training else None
            yield Evidence(
                name, "running mean 0, running variance 1, no batch counted", level=level
            )


@rule(
    "BN010",
    "No running statistics: in evaluation, too, an output depends on the rest of its batch.",
    remedy="""
    layer = torch.nn.BatchNorm2d(channels)  # track_running_stats=True, the default
    batchnorm.recalibrate(model, loader)
    """,
)
def no_running_statistics(subject: Subject) -> Iterator[Evidence]:
    """`track_running_stats=False`: `eval()` normalizes by the batch at hand.

    A single image then has another result than the same image in a batch of others, and a batch of
    one class another than a mixed one.
    """
    for name, layer in subject.layers.items():
        if layer.running_mean is None and not isinstance(layer, SYNCHRONISED):
            yield Evidence(name, "track_running_stats=False")


def _one_minus(subject: Subject, name: str) -> str:
    layer = subject.layers[name]
    old = layer.momentum
    if old == 1:
        raise Left("momentum 1 may be meant")
    # 0.99 was Keras's; of what is no share, or a half, torch's default
    layer.momentum = round(1 - old, 12) if 0.5 < old < 1 else 0.1
    return f"{name}: momentum {old} is now {layer.momentum}"


@rule(
    "BN011",
    "A momentum that forgets everything but the last batch or two.",
    remedy="layer.momentum = 1 - layer.momentum  # torch weighs the new batch: Keras's 0.99 is 0.01",
    mend=_one_minus,
)
def inverted_momentum(subject: Subject) -> Iterator[Evidence]:
    """momentum ≥ 0.5. In torch it weighs the new batch; in Keras, Flax and ONNX the old value.

    With 0.9 the running statistics are nine tenths the last batch. The half-life in batches is
    ln 2 ÷ −ln(1 − momentum): 6.6 for torch's 0.1, one batch for 0.5, 0.3 for 0.9. From 0.5 on,
    evaluation has the noise of a single batch; no published model is trained so. Momentum 1 with
    statistics that are taken once, from one large batch, is deliberate: a note.
    """
    for name, layer in _known(subject):
        if layer.momentum is not None and layer.momentum >= 0.5:
            level = Level.NOTE if layer.momentum == 1 else None
            text = f"momentum {layer.momentum:g}: the last batch has this share of the statistics"
            yield Evidence(name, text, {"momentum": layer.momentum}, level)


@rule(
    "BN013",
    "A layer whose eps is not that of the others.",
    Level.NOTE,
    remedy="layer.eps = 1e-5  # as where the weights come from: Keras 1e-3, torch 1e-5",
)
def odd_eps(subject: Subject) -> Iterator[Evidence]:
    """eps differs within the model, as where a part comes from another framework.

    Keras's default is 1e-3, torch's 1e-5. It matters where variances are small: at a variance of
    1e-3 the output of a layer with eps 1e-3 is 1/√2 of the one with eps 1e-5.
    """
    found = {name: layer.eps for name, layer in subject.layers.items()}
    usual = max(set(found.values()), key=list(found.values()).count, default=None)
    for name, eps in found.items():
        if eps != usual:
            yield Evidence(name, f"eps {eps:g}, the model's others {usual:g}", {"eps": eps})


def _to_float(subject: Subject, name: str) -> str:
    layer = subject.layers[name].float()  # torch takes half-precision inputs; Parameters stay
    for optimizer in subject.optimizers:
        for own in layer.parameters():
            state = optimizer.state.get(own, {})
            for key, value in state.items():
                if isinstance(value, Tensor) and value.shape == own.shape:
                    state[key] = value.to(own.dtype)  # of one dtype with it, or its step raises
    return (
        f"{name}: statistics, weight and bias are float32 now, and what its optimizer keeps of them"
    )


@rule(
    "BN020",
    "Running statistics in half precision.",
    remedy="""
    layer.float()  # its input may stay in half precision; or use autocast in place of .half()
    """,
    mend=_to_float,
)
def half_precision(subject: Subject) -> Iterator[Evidence]:
    """bfloat16 keeps 8 bits, float16 11: an average that moves by small shares gets stuck.

    running + momentum · (batch − running) rounds back to `running` once the step is below half a
    unit in the last place. At momentum 0.0025 a running mean on its way to 5 stays at 2.0 in
    bfloat16; in float32 it comes to 4.75 in 1,200 batches. A model that is only evaluated loses
    little: there it is a note.
    """
    for name, layer in _known(subject):
        if layer.running_mean.dtype in HALF:
            kind = str(layer.running_mean.dtype).removeprefix("torch.")
            level = None if layer.training else Level.NOTE
            yield Evidence(name, f"its running statistics are {kind}", {"dtype": kind}, level)


@rule(
    "BN022",
    "Channels that carry nothing.",
    remedy="batchnorm.summary(model)  # prune them, or train with a smaller rate or decay",
)
def dead_channels(subject: Subject) -> Iterator[Evidence]:
    """A running variance of (almost) 0: the channel is the same for every input.

    A ReLU before a convolution that died, a weight decayed to 0. Published models have some, so up
    to half of a layer's channels is a note; from half on the layer is narrower than its cost. A
    variance below eps ÷ 1000 counts as 0: what is left is multiplied by less than 1/√eps · √var =
    0.03. A weight of 0 counts, too, but not where all are 0, as the last norm of a residual block
    begins.
    """
    for name, layer in _known(subject):
        dead = (layer.running_var >= 0) & (layer.running_var < layer.eps / 1000)
        if layer.weight is not None and bool(layer.weight.any()):
            dead = dead | (layer.weight == 0)
        if count := int(dead.sum()):
            share = count / len(dead)
            text = f"{count} of {len(dead)} channels: running variance below eps / 1000 or weight 0"
            level = None if share >= 0.5 else Level.NOTE
            yield Evidence(name, text, {"channels": count, "of": len(dead)}, level)


STATISTICS = re.compile(
    r"(^|_)(running|moving)_?(mean|var|variance|std)\b|^(mean|var)_?(running|moving)"
)


@rule(
    "BN031",
    "Running statistics outside the state dict.",
    Level.ERROR,
    remedy="""
    self.register_buffer("moving_mean", torch.zeros(channels))  # in __init__, in place of
    # self.moving_mean = torch.zeros(channels)
    """,
)
def statistics_outside_the_state_dict(subject: Subject) -> Iterator[Evidence]:
    """A module keeps running statistics as plain attributes, or as buffers that are not saved.

    `state_dict` does not have them, so a model that is saved and loaded evaluates with the initial
    ones, at chance; `model.to(device)` leaves them behind. Found by name: running or moving, mean or
    variance.
    """
    for path, module in subject.model.named_modules():
        plain = [key for key, v in vars(module).items() if isinstance(v, Tensor)]
        unsaved = [key for key in module._buffers if key in module._non_persistent_buffers_set]  # noqa: SLF001
        for key in (*plain, *unsaved):
            if STATISTICS.search(key):
                how = "a plain attribute" if key in plain else "a buffer with persistent=False"
                yield Evidence(path, f"{key} is {how}", {"attribute": key})


@rule(
    "BN002",
    "In training mode while the model is evaluated.",
    Level.ERROR,
    remedy="model.eval()  # and model.train() before the next step",
)
def training_while_evaluated(subject: Subject) -> Iterator[Evidence]:
    """The model is in evaluation mode, and a batch norm in it is not; or a whole evaluation ran so.

    Every forward pass then normalizes by its batch and moves the running statistics: results depend
    on the order and size of the batches, and test data leaks into the model. Seen in a training by
    passes without gradients in training mode where fewer than a tenth as many were in evaluation
    mode, or where several such passes stood between two steps, with no evaluation beside them, more
    often than an evaluation did: one test at the end does not make ten validations right. Single
    passes now and then (a GAN's sample images; a validation of one batch, too) and those that take
    the statistics anew, by torch's `update_bn` or by hand before an evaluation, do not count.
    """
    if not subject.model.training:
        for name, layer in subject.layers.items():
            if layer.training and not isinstance(layer, Frozen):
                yield Evidence(name, "training=True in a model with training=False")
    seen = subject.training
    if seen is not None and evaluated_in_training_mode(seen):
        blind, right = seen.forwards[True, False], _evaluated(seen)
        text = f"{blind} passes without gradients in training mode, {right} in evaluation mode"
        yield Evidence("", text, {"passes": blind})


def evaluated_in_training_mode(seen: Training) -> bool:
    """Passes without gradients, now and then, all in training mode, which moved statistics.

    Where they come with every other step or more they are a part of it, as a generator's in a GAN.
    """
    blind = seen.forwards[True, False]
    # where no call was seen the model is compiled
    moved = not seen.calls or any(calls[True, False] for calls in seen.calls.values())
    now_and_then = seen.blind_steps < seen.steps / 2
    never = _evaluated(seen) < blind / 10 and seen.blind_evaluations > 0
    mostly = seen.blind_evaluations > seen.evaluations
    return moved and now_and_then and (never or mostly)


def _evaluated(seen: Training) -> int:
    return seen.forwards[False, False] + seen.forwards[False, True]


def _freeze(subject: Subject, name: str) -> str:
    freeze_layer(subject.layers[name], use=True, update=False, parameters=True)
    return f"{name}: frozen, so that its statistics stay, too"


@rule(
    "BN003",
    "Frozen by requires_grad=False alone: its statistics go on moving.",
    remedy='batchnorm.freeze(model, "LAYER", parameters=True)  # survives model.train()',
    mend=_freeze,
)
def frozen_by_requires_grad_alone(subject: Subject) -> Iterator[Evidence]:
    """Weight and bias take no gradient, and in training mode the running statistics are updated.

    The layer normalizes by the batch and drifts to the new data, which a frozen backbone was meant
    not to do. Only where something else in the model is trained: a model whose every parameter is
    switched off for a moment is not one that somebody froze. In a training, where the weight took
    no gradient in the last ten steps, or in all, and is what it was (a GAN's halves take turns, an
    average of weights moves), and the layer was called in training mode, whatever else is trained.
    """
    seen = subject.training
    if seen is None and not any(p.requires_grad for p in subject.model.parameters()):
        return
    for name, layer in _known(subject):
        parameters = [p for p in (layer.weight, layer.bias) if p is not None]
        still = bool(parameters) and not any(p.requires_grad for p in parameters)
        if seen is not None:
            calls = seen.calls.get(layer, Counter())
            updated = calls[True, True] + calls[True, False]
            still = still and layer in seen.fixed and updated > 0
        # a training may end with an evaluation: its calls tell, where calls were seen
        moving = layer.training or (seen is not None and not isinstance(layer, Frozen))
        if still and moving and layer.track_running_stats:
            yield Evidence(name, "requires_grad=False, training=True: the statistics are updated")


@rule(
    "BN004",
    "A freeze that the next model.train() undoes.",
    remedy='batchnorm.freeze(model, "LAYER")  # in place of layer.eval()',
    mend=_freeze,
)
def freeze_undone(subject: Subject) -> Iterator[Evidence]:
    """A layer was put in evaluation mode by itself; `model.train()` puts it back.

    Seen in a training: a layer that stood in evaluation mode at one step stands in training mode at
    a later one, and its weight took a gradient at both or at neither (who unfreezes layer by layer
    switches gradients on, too). An `eval()` that a `train()` before the first step undoes leaves no
    trace, and is not seen. In a model at rest it is a note: the script may repeat `layer.eval()`
    every epoch.
    """
    seen = subject.training
    if seen is not None:
        for layer in seen.thawed:
            name = subject.names.get(layer)
            if name is not None:
                yield Evidence(
                    name, "in evaluation mode at one step, in training mode at a later one"
                )
    if subject.model.training and seen is None:
        for name, layer in _known(subject):
            if not layer.training and not isinstance(layer, Frozen) and _thaws(layer):
                yield Evidence(name, "layer.eval() in a model that trains", level=Level.NOTE)


def _thaws(layer: Layer) -> bool:
    """Its own train() listens."""
    try:
        layer.train()
        return bool(layer.training)
    finally:
        layer.eval()
