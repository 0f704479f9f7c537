"""Freeze batch normalization so that `train()` does not thaw it; pause its running statistics.

Two switches of a layer, each by itself:

    use      normalize with the running statistics, in training mode, too
    update   move the running statistics towards those of each training batch

A layer as torch makes it has use=False, update=True. `freeze` sets use=True, update=False.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from types import TracebackType
from typing import Any, NamedTuple, Self

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.parameter import is_lazy

from batchnorm import masks
from batchnorm.errors import BatchNormError
from batchnorm.kernels import verbs
from batchnorm.model import account
from batchnorm.model.account import Change
from batchnorm.model.discovery import (
    Norm,
    batch_norms,
    constant_norms,
    matching,
    refuse_no_model,
)
from batchnorm.model.mixing import Mixin, mix, unmix
from batchnorm.variants.variant import SET_ASIDE, refuse_recomputation

METADATA = "batchnorm.frozen"  # the key in a state dict's metadata


class Switches(NamedTuple):
    """What a frozen layer does, and what it did before."""

    use: bool
    update: bool
    tracked: bool  # its track_running_stats before
    required_grad: tuple[bool | None, ...]  # of weight and bias before; None: has none


class Frozen(Mixin, _NormBase):
    """A mixin, put before a layer's own class: `train()` does not reach the statistics."""

    _switches: Switches
    _asked_to_train: bool  # the mode that the model around it is in

    def train(self, mode: bool = True) -> Self:
        """Remember the mode; a layer that uses its running statistics stays in evaluation mode."""
        self._asked_to_train = mode
        return super().train(mode and not self._switches.use)

    def forward(self, input: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Normalize as the switches say."""
        moves = self._switches.use and self._switches.update and self.track_running_stats
        if not (self._asked_to_train and moves):  # no_update sets track_running_stats, too
            unmoved: Tensor = super().forward(input, *args, **kwargs)
            return unmoved
        refuse_recomputation(self)
        mean, var = self.running_mean, self.running_var
        assert mean is not None  # noqa: S101  # a layer without statistics is not frozen
        assert var is not None  # noqa: S101
        # copies: backward needs the statistics that normalized, and they move below
        self.running_mean, self.running_var = mean.clone(), var.clone()
        try:
            y: Tensor = super().forward(input, *args, **kwargs)
        finally:
            self.running_mean, self.running_var = mean, var
        self._update(mean, var, *masks.counted(input, *args, **kwargs))
        return y

    @torch.no_grad()
    def _update(self, mean: Tensor, var: Tensor, x: Tensor, keep: Tensor | None) -> None:
        """running ← (1 − momentum) · running + momentum · batch, the variance unbiased."""
        if x.numel() < 2 * x.shape[1]:
            return  # one value has no variance
        momentum = self.momentum
        if self.num_batches_tracked is not None:
            self.num_batches_tracked.add_(masks.moves(x, keep))
            if momentum is None:
                momentum = 1 / max(int(self.num_batches_tracked), 1)
        share = 0.0 if momentum is None else momentum
        masks.update_running(mean, var, *verbs.moments(x, keep), share)

    def extra_repr(self) -> str:
        usual = super().extra_repr()  # type: ignore[no-untyped-call]
        return f"{usual}, use={self._switches.use}, update={self._switches.update}"

    def _save_to_state_dict(
        self, destination: dict[str, Any], prefix: str, keep_vars: bool
    ) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        metadata = getattr(destination, "_metadata", {}).get(prefix[:-1])
        if metadata is not None:
            metadata[METADATA] = {"use": self._switches.use, "update": self._switches.update}


def freeze(
    model: nn.Module,
    pattern: str | Sequence[str] = "*",
    *,
    use: bool = True,
    update: bool = False,
    parameters: bool = False,
) -> nn.Module:
    """Let batch-norm layers keep their running statistics, whatever `train()` says; in place.

    The layers keep their class (they are instances of it still), parameters, buffers, hooks and
    state dict; copies and pickles stay frozen. A state dict says in its metadata which layers were
    frozen: `freeze_like` freezes another model alike.

    Args:
        model: any model with batch norm in it.
        pattern: which layers, by name, with * and ?; or several patterns.
        use: normalize with the running statistics in training mode, too.
        update: let training batches move the running statistics.
        parameters: stop the layers' weight and bias from training as well.

    Returns:
        The model. `changes(model)` names the layers, and those that were left.

    Raises:
        BatchNormError: both switches as torch has them (that is `unfreeze`).
    """
    refuse_no_model(model, "freeze")
    if not use and update:
        raise BatchNormError(
            "freeze got use=False and update=True, which is what an unfrozen layer does. "
            "Call unfreeze."
        )
    entries = []
    for name, layer in matching(model, pattern):
        if layer.running_mean is None:
            entries.append(Change(name, done=False, what="keeps no running statistics to use"))
            continue
        freeze_layer(layer, use=use, update=update, parameters=parameters)
        entries.append(Change(name, done=True, what=f"frozen, use={use}, update={update}"))
    entries += [
        Change(name, done=False, what=f"a {type(constant).__name__} is frozen for good")
        for name, constant in constant_norms(model).items()
    ]
    agree(model)
    return account.record(model, "freeze", entries)


def unfreeze(model: nn.Module, pattern: str | Sequence[str] = "*") -> nn.Module:
    """Undo `freeze`, in place; return the model.

    Class, mode, `track_running_stats` and requires_grad are again what they were; momentum and the
    counter were never touched.
    """
    refuse_no_model(model, "unfreeze")
    agree(model)  # the layers may have been frozen by several calls
    entries = []
    for name, layer in matching(model, pattern):
        done = isinstance(layer, Frozen)
        thaw(layer)
        entries.append(Change(name, done=done, what="unfrozen" if done else "was not frozen"))
    return account.record(model, "unfreeze", entries)


def freeze_like(model: nn.Module, state_dict: Mapping[str, Any]) -> nn.Module:
    """Freeze the layers that were frozen in the model that gave the state dict; in place.

    The switches travel in the metadata of torch's own state dicts, also through torch.save and
    `torch.load(weights_only=True)`. safetensors and plain dicts lose them.

    Raises:
        BatchNormError: a state dict without metadata; a layer that this model lacks.
    """
    metadata = getattr(state_dict, "_metadata", None)
    if metadata is None:
        raise BatchNormError(
            "freeze_like got a state dict without metadata, as safetensors and copies into a plain "
            "dict leave it. Name the layers yourself: freeze(model, pattern)."
        )
    layers = batch_norms(model)
    entries = []
    for name, content in metadata.items():
        if (switches := content.get(METADATA)) is None:
            continue
        if name not in layers:
            raise BatchNormError(
                f"freeze_like: the state dict froze {name!r}, and the model has no batch norm of "
                "that name."
            )
        freeze_layer(layers[name], **switches, parameters=False)
        entries.append(Change(name, done=True, what="frozen as in the state dict"))
    agree(model)
    return account.record(model, "freeze_like", entries)


@contextmanager
def no_update(model: nn.Module) -> Iterator[nn.Module]:
    """Inside, training mode normalizes with the batch and leaves the running statistics alone.

    For a second forward pass on other data (an adversary's, a teacher's), for a look at the loss.
    Counters stay, too, and NaN in a batch cannot reach the statistics.
    """
    # torch reads the flag as "update, in training"; evaluation goes by whether there are buffers
    refuse_no_model(model, "no_update")
    layers = [m for m in batch_norms(model).values() if m.running_mean is not None]
    before = {layer: layer.track_running_stats for layer in layers}
    try:
        for layer in layers:
            layer.track_running_stats = False
        yield model
    finally:
        for layer, tracked in before.items():
            layer.track_running_stats = tracked


def update_once(
    model: nn.Module,
) -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
    """What to do in a checkpoint's forward pass, and at its recomputation: there, update nothing.

    `torch.utils.checkpoint` computes its part again in the backward pass, and the running statistics
    would move twice:

        checkpoint(block, x, use_reentrant=False, context_fn=lambda: update_once(block))

    The recomputation works on copies of the statistics as the first pass met them, so that it gives and
    saves what the first pass did, also where a layer uses its running statistics while they move
    (`RenormBatchNorm`, `freeze(update=True)`).

    Returns:
        Two context managers, as `context_fn` wants them: of one pass, for it and its recomputations,
        of which a graph that is retained (`backward(retain_graph=True)`) has several.
    """
    refuse_no_model(model, "update_once")
    met: dict[nn.Module, dict[str, Tensor]] = {}
    return _Anew(lambda: _remembered(model, met)), _Anew(lambda: _set_aside(model, met))


class _Anew(AbstractContextManager[None]):
    """A context of which each entry is a new one: a graph that is retained is recomputed each time."""

    def __init__(self, make: Callable[[], AbstractContextManager[None]]) -> None:
        self._make = make
        self._entered: list[AbstractContextManager[None]] = []

    def __enter__(self) -> None:
        context = self._make()
        context.__enter__()
        self._entered.append(context)

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> bool | None:
        return self._entered.pop().__exit__(kind, error, trace)


@contextmanager
def _remembered(model: nn.Module, met: dict[nn.Module, dict[str, Tensor]]) -> Iterator[None]:
    for layer in batch_norms(model).values():
        own = layer.named_buffers(recurse=False)
        met[layer] = {name: buffer.clone() for name, buffer in own if not is_lazy(buffer)}
    yield


@contextmanager
def _set_aside(model: nn.Module, met: dict[nn.Module, dict[str, Tensor]]) -> Iterator[None]:
    layers = {m for m in batch_norms(model).values() if m not in SET_ASIDE}
    before = {layer: dict(layer.named_buffers(recurse=False)) for layer in layers}
    try:
        SET_ASIDE.update(layers)
        for layer, buffers in before.items():
            for name, buffer in buffers.items():
                setattr(layer, name, met.get(layer, {}).get(name, buffer).clone())
        yield
    finally:
        for layer, buffers in before.items():
            for name, buffer in buffers.items():
                setattr(layer, name, buffer)
        SET_ASIDE.difference_update(layers)


def moves_while_frozen(layer: nn.Module) -> bool:
    """It uses its running statistics, and every batch moves them: freeze(update=True)."""
    return isinstance(layer, Frozen) and layer._switches.use and layer._switches.update  # noqa: SLF001  # our own


def freeze_layer(layer: Norm, *, use: bool, update: bool, parameters: bool) -> Norm:
    """Freeze one layer, in place; see `freeze`."""
    thaw(layer)
    affine = (layer.weight, layer.bias)
    required_grad = tuple(None if p is None else p.requires_grad for p in affine)
    training = layer.training
    mix(Frozen, layer)
    assert isinstance(layer, Frozen)  # noqa: S101  # for the type checker
    layer._switches = Switches(use, update, layer.track_running_stats, required_grad)  # noqa: SLF001  # our own
    if not update:
        layer.track_running_stats = False
    if parameters:
        for parameter in affine:
            if parameter is not None:
                parameter.requires_grad_(False)
    return layer.train(training)


def agree(model: nn.Module) -> None:
    """Let frozen layers that hold one parameter remember the same of it: it required a gradient or not.

    Of a shared weight the first layer found what it was, the others what the first had made of it.
    """
    frozen = [layer for layer in batch_norms(model).values() if isinstance(layer, Frozen)]
    before: dict[nn.Parameter, bool] = {}
    for layer in frozen:
        affine = (layer.weight, layer.bias)
        for parameter, required in zip(affine, layer._switches.required_grad, strict=True):  # noqa: SLF001  # our own
            if parameter is not None and required is not None:
                before[parameter] = required or before.get(parameter, False)
    for layer in frozen:
        known = tuple(None if p is None else before.get(p) for p in (layer.weight, layer.bias))
        layer._switches = layer._switches._replace(required_grad=known)  # noqa: SLF001  # our own


def thaw(layer: Norm) -> None:
    """Undo `freeze_layer`; nothing, where a layer is not frozen."""
    if not isinstance(layer, Frozen):
        return
    switches, training = layer._switches, layer._asked_to_train  # noqa: SLF001  # our own
    del layer._switches, layer._asked_to_train  # noqa: SLF001
    unmix(layer, Frozen)
    layer.track_running_stats = switches.tracked
    for parameter, required in zip((layer.weight, layer.bias), switches.required_grad, strict=True):
        if parameter is not None and required is not None:
            parameter.requires_grad_(required)
    layer.train(training)
