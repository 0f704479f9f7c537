"""What was chosen for a layer and goes with it into another class: freezing, float32, single values."""

from typing import Any, NamedTuple

from torch import nn

from batchnorm.model.freezing import Frozen, Switches, freeze_layer, thaw
from batchnorm.model.mixing import mix, unmix
from batchnorm.model.precision import Float32
from batchnorm.model.single import Lenient


class Choices(NamedTuple):
    """The choices that a layer bears."""

    switches: Switches | None  # of a frozen one
    trained: tuple[bool | None, ...]  # requires_grad of weight and bias; None: has none
    float32: bool
    single: tuple[str | None] | None  # of a lenient one: its name, until it has been said


def borne(layer: nn.Module) -> list[str]:
    """The verbs that chose something for the layer."""
    verbs = {"freeze": Frozen, "keep_float32": Float32, "single_values": Lenient}
    return [verb for verb, mixin in verbs.items() if isinstance(layer, mixin)]


def take_off(layer: Any) -> Choices:
    """The layer without its choices, in place."""
    affine = (getattr(layer, "weight", None), getattr(layer, "bias", None))
    trained = tuple(p.requires_grad if isinstance(p, nn.Parameter) else None for p in affine)
    switches = layer._switches if isinstance(layer, Frozen) else None  # noqa: SLF001  # our own
    if switches is not None:
        thaw(layer)
    float32 = isinstance(layer, Float32)
    if float32:
        unmix(layer, Float32)
    single = (layer._single,) if isinstance(layer, Lenient) else None  # noqa: SLF001
    if single is not None:
        unmix(layer, Lenient)
        del layer._single  # noqa: SLF001
    return Choices(switches, trained, float32, single)


def put_on(layer: Any, choices: Choices) -> None:
    """The choices for a layer that bears none of them yet, in place."""
    if choices.single is not None:
        mix(Lenient, layer)
        (layer._single,) = choices.single  # noqa: SLF001  # our own
    if choices.float32:
        mix(Float32, layer)
    if choices.switches is None:
        return
    freeze_layer(layer, use=choices.switches.use, update=choices.switches.update, parameters=False)
    # not what it finds now: another layer that holds the parameter may have frozen it
    before = choices.switches.required_grad
    layer._switches = layer._switches._replace(required_grad=before)  # noqa: SLF001  # our own
    for parameter, trained in zip((layer.weight, layer.bias), choices.trained, strict=True):
        if parameter is not None and trained is not None:
            parameter.requires_grad_(trained)
