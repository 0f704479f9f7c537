"""Rules about how a model is trained: the graph around its norms, the optimizer, the steps."""

import gc
from collections.abc import Iterator
from typing import Any

from torch import nn
from torch.nn.modules.conv import _ConvNd
from torch.optim.lr_scheduler import LRScheduler

from batchnorm.checks.findings import Level
from batchnorm.checks.rules import Evidence, Left, rule
from batchnorm.checks.rules.state import evaluated_in_training_mode, untrained
from batchnorm.checks.subject import Layer, Subject, parameters_of
from batchnorm.model.tracing import Call, Traced, trace

ACTIVATIONS = (
    nn.ReLU, nn.LeakyReLU, nn.ReLU6, nn.ELU, nn.SELU, nn.GELU, nn.SiLU, nn.Mish, nn.Hardswish,
    nn.Sigmoid, nn.Tanh, nn.Softplus, nn.PReLU,
)  # fmt: skip
FOREIGN = 0.5  # of a standard deviation
FUNCTIONS = {"relu", "relu_", "leaky_relu", "gelu", "silu", "sigmoid", "tanh", "hardswish", "elu"}


@rule(
    "BN005",
    "Running statistics moved by passes without gradients.",
    needs=("training",),
    remedy="""
    with batchnorm.no_update(model), torch.no_grad():  # or model.eval()
        model(x)
    """,
)
def moved_without_gradients(subject: Subject) -> Iterator[Evidence]:
    """A pass under `torch.no_grad()` in training mode updates the running statistics as any other.

    Harmful where those passes are of another kind than the others: the average then holds data that
    was never trained on. Reported where they are more than the passes with gradients and their
    inputs are, at the last looks, more than 0.5 from those (the standardized gap of BN001, without
    what chance does); and where there are none with gradients and the weights never moved, as in a
    teacher that should have been in evaluation mode. A generator fed with noise and an encoder that
    follows another by a moving average are healthy: a note.
    """
    seen = subject.training
    if seen is None or not seen.noticed:
        return
    if evaluated_in_training_mode(seen):
        return  # BN002 says it
    for layer, calls in seen.calls.items():
        # a reentrant checkpoint runs its part without gradients first, and again in backward
        without = calls[True, False] - seen.recomputed[layer]
        with_gradients = calls[True, True]
        if without <= 0 or layer not in subject.names:
            continue
        apart = seen.foreign.get(layer, 0.0)
        if with_gradients:
            harmful = without > with_gradients and apart > FOREIGN
        else:
            harmful = layer in seen.resting and layer not in seen.fixed  # of which BN003 tells
        text = f"{without} calls in training mode without gradients, {with_gradients} with"
        if apart:
            text += f", {apart:.2f} apart (reported from {FOREIGN})"
        numbers = {"without": without, "with": with_gradients, "apart": apart}
        yield Evidence(subject.names[layer], text, numbers, None if harmful else Level.NOTE)


def _drop_bias(subject: Subject, name: str) -> str:
    layer = subject.layers[name]
    before = _dead_bias_of(subject, subject.traced, layer)
    if before is None:
        raise Left("something else was changed that it hung on")
    if not _feeds_it_alone_in_both_modes(subject, layer):
        raise Left("that nothing else uses the bias cannot be seen from the graph in both modes")
    bias = before.bias
    # running_mean is the mean of what came in: without the bias it is smaller by it
    if layer.running_mean is not None and not untrained(layer):
        layer.running_mean.sub_(bias.detach().to(layer.running_mean.dtype))
    before.register_parameter("bias", None)
    for optimizer in subject.optimizers:
        for group in optimizer.param_groups:
            _taken(group, {id(bias)})
        optimizer.state.pop(bias, None)
    gone = next(n for n, module in subject.model.named_modules() if module is before)
    return (
        f"{name}: the bias before it is gone, and out of its running mean; checkpoints made before "
        f"hold {f'{gone}.' if gone else ''}bias, which the model has no more"
    )


def _feeds_it_alone_in_both_modes(subject: Subject, layer: Layer) -> bool:
    """Nothing else sees the convolution's output or its bias: an auxiliary head may, in training."""
    for mode in (False, True):
        traced = trace(subject.model, mode)
        source = _dead_bias_of(subject, traced, layer)
        if source is None or not traced.whole or source._forward_hooks:  # noqa: SLF001  # torch's
            return False
    return True


def _taken(group: dict[str, Any], ids: set[int]) -> list[tuple[Any, str | None]]:
    """Out of an optimizer's group, with the names where it was made of named parameters."""
    names = group.get("param_names") or [None] * len(group["params"])
    pairs = list(zip(group["params"], names, strict=True))
    left = [(p, name) for p, name in pairs if id(p) not in ids]
    group["params"] = [p for p, _ in left]
    if "param_names" in group:
        group["param_names"] = [name for _, name in left]
    return [(p, name) for p, name in pairs if id(p) in ids]


def _dead_bias_of(subject: Subject, traced: Traced, layer: Layer) -> Any:
    """The convolution or linear layer right before it, if it has a bias and feeds it alone."""
    calls = traced.calls.get(layer, [])
    sources = {call.source.module for call in calls if call.source is not None}
    if len(calls) != 1 or len(sources) != 1 or subject.frozen(layer):
        return None
    (source,) = sources
    if not isinstance(source, _ConvNd | nn.Linear) or source.bias is None:
        return None
    if isinstance(source, nn.Linear) and any(len(c.shape) != 2 for c in subject.calls(layer)):
        return None  # its features are the last axis, the norm's channels axis 1
    if isinstance(source, nn.Linear) and not subject.calls(layer):
        return None
    alone = len(traced.calls[source]) == 1 and source not in traced.opened
    names = subject.model.named_parameters(remove_duplicate=False)
    alone = alone and sum(p is source.bias for _, p in names) == 1
    channels = getattr(source, "out_channels", getattr(source, "out_features", None))
    return source if alone and channels == layer.num_features else None


@rule(
    "BN014",
    "A bias that the norm behind it takes away again.",
    Level.NOTE,
    needs=("graph",),
    remedy="torch.nn.Conv2d(channels_in, channels_out, 3, bias=False)",
    mend=_drop_bias,
)
def dead_bias(subject: Subject) -> Iterator[Evidence]:
    """A convolution or linear layer with a bias right before batch norm.

    Its mean is subtracted, so the bias changes nothing in training and its gradient is 0; the norm
    has a bias of its own. It costs memory and a little time. VGG-BN has them: a note.
    """
    for name, layer in subject.layers.items():
        source = _dead_bias_of(subject, subject.traced, layer)
        if source is not None:
            yield Evidence(name, f"a {type(source).__name__} with a bias before it")


@rule(
    "BN016",
    "Activation checkpointing updates the running statistics twice.",
    remedy="""
    # torch.utils.checkpoint runs the forward pass again in backward, and the average moves again
    once = lambda: batchnorm.update_once(block)
    y = checkpoint(block, x, use_reentrant=False, context_fn=once)
    """,
)
def checkpointed(subject: Subject) -> Iterator[Evidence]:
    """The layer runs inside `torch.utils.checkpoint`, whose recomputation counts the batch again.

    running ← 0.9² · running + (1 − 0.9²) · batch: the half-life is half of what it was meant to be,
    and `momentum=None` still averages, but counts double. Seen by the recomputation itself in a
    training, or, by `check`, by the call stack of a pass, where `checkpoint` was given no
    `context_fn`. With `use_reentrant=True`, which takes none, a momentum of 1 − √(1 − momentum)
    makes two updates into one; that is not seen, and is what to `ignore` the rule for.
    """
    seen = subject.training
    for name, layer in subject.tracking():
        if subject.frozen(layer) or not layer.track_running_stats or layer.momentum == 0:
            continue
        again = seen.recomputed[layer] if seen is not None else 0
        if again:
            text = f"{again} calls were recomputed in a backward pass"
            yield Evidence(name, text, {"recomputed": again})
        elif any(call.checkpointed for call in subject.calls(layer)):
            yield Evidence(name, "it is called inside torch.utils.checkpoint")


@rule(
    "BN017",
    "Gradient accumulation: each small batch is normalized by itself.",
    Level.NOTE,
    needs=("training",),
    remedy="""
    batchnorm.freeze(model)  # for fine-tuning: no statistics of small batches
    batchnorm.convert(model, to="group")  # or statistics of each sample
    """,
)
def accumulation(subject: Subject) -> Iterator[Evidence]:
    """Several passes with gradients to one step of the optimizer.

    The gradients are those of k small batches, each with its own statistics, and not those of the
    one large batch that they stand for. A warning where the small batches have fewer than 16 values
    per channel (see BN007), else a note.
    """
    seen = subject.training
    if seen is None or not seen.steps:
        return
    passes = seen.forwards[True, True] / seen.steps
    if passes < 1.5:
        return
    least = min((size for layer in seen.values if (size := seen.usual(layer))), default=0)
    if not least:
        return  # no layer normalizes by its batch
    level = Level.WARNING if least < 16 else None
    text = f"{passes:.1f} passes with gradients a step; the smallest norm sees {least} values"
    yield Evidence("", text, {"passes": passes, "values": least}, level)


def _no_decay(subject: Subject, name: str) -> str:
    layer = subject.layers[name]
    own = {id(p) for p in (layer.weight, layer.bias) if p is not None}
    for optimizer in subject.optimizers:
        for group in list(optimizer.param_groups):
            if not group.get("weight_decay") or not any(id(p) in own for p in group["params"]):
                continue
            if _scheduled(optimizer):
                raise Left(
                    "a scheduler has a rate for each group, and a new one would have none: build "
                    "the optimizer of batchnorm.param_groups, then the scheduler"
                )
            rest = _without_decay(optimizer, group)
            for parameter, its_name in _taken(group, own):
                rest["params"].append(parameter)
                if its_name is not None:
                    rest["param_names"].append(its_name)
    return f"{name}: weight and bias do not decay any more"


def _without_decay(optimizer: Any, group: dict[str, Any]) -> dict[str, Any]:
    """The group of the same options but for decay, which is made where there is none yet."""
    lists = ("params", "param_names")
    options = {key: value for key, value in group.items() if key not in lists}
    options["weight_decay"] = 0.0
    for other in optimizer.param_groups:
        if {key: value for key, value in other.items() if key not in lists} == options:
            found: dict[str, Any] = other
            return found
    made = options | {key: [] for key in lists if key in group}
    optimizer.param_groups.append(made)
    return made


def _scheduled(optimizer: Any) -> bool:
    """A scheduler holds it; those that are not torch's leave the rate that they began with."""
    if any("initial_lr" in group for group in optimizer.param_groups):
        return True
    # type(), since isinstance asks the object, which may be a proxy
    schedulers = (o for o in gc.get_objects() if issubclass(type(o), LRScheduler))
    return any(each.optimizer is optimizer for each in schedulers)


@rule(
    "BN023",
    "Weight decay on a norm's weight and bias.",
    Level.NOTE,
    needs=("optimizer",),
    remedy="optimizer = SGD(batchnorm.param_groups(model, weight_decay=1e-4), lr=0.1)",
    mend=_no_decay,
)
def weight_decay(subject: Subject) -> Iterator[Evidence]:
    """The optimizer pulls the norm's weight and bias to 0.

    Before batch norm decay changes only the effective learning rate; on the norm itself it shrinks
    the network's scale and moves its thresholds. Most published models do it, some gain a few tenths
    of a per cent without: a note.
    """
    decaying = {
        id(p): group["weight_decay"]
        for p, group in parameters_of(subject.optimizers)
        if group.get("weight_decay")
    }
    for name, layer in subject.layers.items():
        found = [decaying[id(p)] for p in (layer.weight, layer.bias) if id(p) in decaying]
        if found:
            yield Evidence(name, f"weight_decay={found[0]:g}", {"weight_decay": found[0]})


@rule(
    "BN029",
    "A norm whose weight and bias the optimizer does not hold.",
    needs=("optimizer",),
    remedy="optimizer = SGD(model.parameters(), lr=0.1)  # made after the model was changed",
)
def not_in_the_optimizer(subject: Subject) -> Iterator[Evidence]:
    """Weight and bias take gradients, and no group of the optimizer has them.

    They were replaced after the optimizer was made (a conversion that copies, `model.norm = …`, a
    move that makes new parameters), or forgotten. Not reported where the optimizer holds nothing of
    the model (it trains something else), and a note where it holds norms of other names: somebody
    chose.
    """
    held = {id(p) for p, _ in parameters_of(subject.optimizers)}
    mine = {id(p) for p in subject.model.parameters()}
    if not subject.optimizers or not held:
        return
    strange = held - mine
    for name, layer in subject.layers.items():
        own = [p for p in (layer.weight, layer.bias) if p is not None and p.requires_grad]
        if own and not any(id(p) in held for p in own):
            level = None if strange else Level.NOTE
            text = "weight and bias take gradients and are in no group"
            if strange:
                text += f"; {len(strange)} tensors of the optimizer are not the model's"
            yield Evidence(name, text, {"strange": len(strange)}, level)


@rule(
    "BN024",
    "Dropout feeds a norm.",
    Level.NOTE,
    needs=("graph",),
    remedy="x = dropout(relu(norm(conv(x))))  # dropout behind the last norm",
)
def dropout_before(subject: Subject) -> Iterator[Evidence]:
    """Dropout, then at most one linear layer or convolution, then batch norm.

    In training dropout raises the variance of what comes in by 1 ÷ (1 − p) for values around 0; in
    evaluation it is off, and the running variance, taken in training, is too large (Li et al. 2019,
    "variance shift"). Reported from p = 0.1 on: 10% of the variance. DeepLabV3 has it: a note.
    """
    for name, layer in subject.layers.items():
        if subject.frozen(layer):
            continue
        for call in subject.traced.calls.get(layer, []):
            p = _dropped(subject, call)
            if p >= 0.1:
                yield Evidence(name, f"dropout of {p:g} before it (reported from 0.1)", {"p": p})
                break


def _dropped(subject: Subject, call: Call) -> float:
    """The probability of the dropout before a call, through one linear layer or convolution."""
    modules = dict(subject.model.named_modules())
    for before in (call.before, _before(call)):
        module = modules.get(before)
        if isinstance(module, nn.Dropout | nn.Dropout1d | nn.Dropout2d | nn.Dropout3d):
            return float(module.p)
    return 0.0


def _before(call: Call) -> str:
    source = call.source
    return (
        source.before
        if source is not None and isinstance(source.module, _ConvNd | nn.Linear)
        else ""
    )


@rule(
    "BN034",
    "An activation before the norm.",
    Level.NOTE,
    needs=("graph",),
    remedy="x = relu(norm(conv(x)))  # the paper's order",
)
def activation_before(subject: Subject) -> Iterator[Evidence]:
    """The norm stands behind an activation; Ioffe and Szegedy put it before.

    Both orders train; which is better depends on the network. A note.
    """
    modules = dict(subject.model.named_modules())
    for name, layer in subject.layers.items():
        for call in subject.traced.calls.get(layer, []):
            if isinstance(modules.get(call.before), ACTIVATIONS) or call.before in FUNCTIONS:
                yield Evidence(name, f"{call.before} before it")
                break
